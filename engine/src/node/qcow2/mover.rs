//! [`Mover`]: an image, the nodes below it, and what moves bytes between them.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use blockyard_images::qcow2::Qcow2;
use blockyard_storage::ZeroMode;
use blockyard_storage::buffer::BufferPool;

use crate::data::{CpuPool, DataContext};
use crate::limits::SECTOR_BYTES;
use crate::node::Node;
use crate::node::child_storage::ChildStorage;
use crate::node::fault_rules::DebugEvent;
use crate::node::news::News;
use crate::node::qcow2::compressed::ClusterCache;
use crate::node::qcow2::failures::Told;
use crate::node::qcow2::flush_behind::FlushBehind;
use crate::node::qcow2::room_ahead::RoomAhead;
use crate::node::qcow2::{Qcow2Files, Qcow2Options};
use crate::request::{DetectZeroes, Discard};

/// What one image's node is made of.
pub(super) struct Mover {
    pub(super) name: String,
    pub(super) image: Rc<Qcow2>,
    pub(super) files: Qcow2Files,
    pub(super) backing: RefCell<Option<Rc<dyn Node>>>,
    pub(super) options: Qcow2Options,
    pub(super) pool: BufferPool,
    pub(super) cpu: CpuPool,
    pub(super) news: News,
    pub(super) decompressed: ClusterCache,
    pub(super) ahead: RoomAhead,
    pub(super) behind: FlushBehind,
    pub(super) told: Cell<Told>,
    /// The image is being amended: what is known of it here may not be so any more.
    pub(super) away: Cell<bool>,
    /// It has been changed and could not be opened again: nothing that is known of it here is so any more, for good.
    pub(super) lost: Cell<bool>,
}

impl Mover {
    pub(super) fn new(
        name: String,
        image: Rc<Qcow2>,
        files: Qcow2Files,
        backing: Option<Rc<dyn Node>>,
        options: Qcow2Options,
        context: &DataContext,
    ) -> Self {
        Self {
            name,
            image,
            files,
            backing: RefCell::new(backing),
            options,
            pool: context.pool().clone(),
            cpu: context.cpu().clone(),
            news: context.news().clone(),
            decompressed: ClusterCache::default(),
            ahead: RoomAhead::default(),
            behind: FlushBehind::default(),
            told: Cell::default(),
            away: Cell::new(false),
            lost: Cell::new(false),
        }
    }

    /// A mover for the same image, which has been opened anew.
    pub(super) fn reopened(&self, image: Rc<Qcow2>) -> Self {
        Self {
            name: self.name.clone(),
            image,
            files: self.files.clone(),
            backing: RefCell::new(self.backing()),
            options: self.options,
            pool: self.pool.clone(),
            cpu: self.cpu.clone(),
            news: self.news.clone(),
            decompressed: ClusterCache::default(),
            ahead: RoomAhead::default(),
            behind: FlushBehind::default(),
            told: self.told.clone(),
            away: Cell::new(false),
            lost: Cell::new(false),
        }
    }

    pub(super) fn read_only(&self) -> bool {
        self.image.options().read_only
    }

    /// Lengths of nodes are whole sectors; what an image has beyond them is not shown, as QEMU does.
    pub(super) fn length(&self) -> u64 {
        let length = self.image.length_bytes();
        length - length % SECTOR_BYTES
    }

    pub(super) fn unmaps(&self) -> bool {
        self.options.discard == Discard::Unmap
    }

    pub(super) fn backing(&self) -> Option<Rc<dyn Node>> {
        self.backing.borrow().clone()
    }

    pub(super) fn names_backing(&self) -> bool {
        self.image.header().backing_name.is_some() || self.backing().is_some()
    }

    /// Where the guest's data is.
    pub(super) fn data(&self) -> &Rc<ChildStorage> {
        self.files.data_file.as_ref().unwrap_or(&self.files.file)
    }

    /// Tells a fault filter below.
    pub(super) fn announce(&self, event: DebugEvent) {
        self.files.file.node().hear(event);
    }

    /// How a written run of zeroes is to be made one without data, if that was asked for.
    pub(super) fn zeroes_instead(&self, bytes: &[u8]) -> Option<ZeroMode> {
        let may_unmap = match self.options.detect_zeroes {
            DetectZeroes::Off => return None,
            DetectZeroes::On => false,
            DetectZeroes::Unmap => self.unmaps(),
        };
        crate::node::zeroes::is_zero(bytes).then_some(ZeroMode {
            may_unmap,
            no_fallback: false,
        })
    }
}
