//! [`Disk`]: one simulated file or device: what reads see, what is durable, and what is pending between the two.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use blockyard_storage::{Buffer, ByteRange, MemoryStorage, Storage};

use crate::change::{Change, now, settle};
use crate::seed::Seed;
use crate::storage::SimulatedStorage;
use crate::world::World;

/// Unit in which room is taken, as `MemoryStorage` has it.
const BLOCK_BYTES: u64 = 4096;

/// What a disk is like.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// Length in bytes.
    pub length_bytes: u64,
    /// Requests must be multiples of this power of two.
    pub request_alignment: u32,
    /// It keeps its length, as a device does.
    pub fixed_length: bool,
    /// Room in bytes; what would take more fails with `ENOSPC`. `None`: enough.
    pub capacity_bytes: Option<u64>,
    /// Its extents can be shared with other disks of the world that say so too.
    pub shares_extents: bool,
}

impl Default for DiskOptions {
    fn default() -> Self {
        Self {
            length_bytes: 0,
            request_alignment: 1,
            fixed_length: false,
            capacity_bytes: None,
            shares_extents: false,
        }
    }
}

/// A disk of a world. Clones are the same disk.
#[derive(Clone)]
pub struct Disk {
    world: World,
    index: usize,
}

impl Disk {
    pub(crate) const fn new(world: World, index: usize) -> Self {
        Self { world, index }
    }

    pub(crate) const fn index(&self) -> usize {
        self.index
    }

    /// Opens it; also again after a power cut, which made every storage opened before fail with `EIO`.
    pub fn open(&self) -> Rc<SimulatedStorage> {
        Rc::new(SimulatedStorage::new(self.world.clone(), self.index, false))
    }

    /// Opens it for reading.
    pub fn open_read_only(&self) -> Rc<SimulatedStorage> {
        Rc::new(SimulatedStorage::new(self.world.clone(), self.index, true))
    }

    /// Puts durable bytes there at once, past every fault.
    pub fn fill(&self, offset: u64, bytes: &[u8]) {
        let change = Change::Write {
            offset,
            bytes: bytes.to_vec(),
        };
        self.world.with_disk(self.index, |state| {
            change.apply(&state.visible);
            change.apply(&state.durable);
        });
    }

    /// States its room in bytes anew.
    pub fn set_capacity(&self, capacity_bytes: Option<u64>) {
        self.world.with_disk(self.index, |state| {
            state.options.capacity_bytes = capacity_bytes
        });
    }

    /// Room taken, in bytes.
    pub fn allocated_bytes(&self) -> u64 {
        self.world
            .with_disk(self.index, |state| state.visible.allocated_bytes())
    }

    /// What reads see, from the first byte to the last.
    pub fn bytes(&self) -> Vec<u8> {
        self.world
            .with_disk(self.index, |state| bytes_of(&state.visible))
    }

    /// What no power cut changes.
    pub fn durable_bytes(&self) -> Vec<u8> {
        self.world
            .with_disk(self.index, |state| bytes_of(&state.durable))
    }

    /// What it may hold if the power went now; `seed` says which of the many possibilities. Changes nothing.
    pub fn bytes_after_cut(&self, seed: u64) -> Vec<u8> {
        bytes_of(&self.world.disk_after_cut(self.index, &Seed::new(seed)))
    }
}

/// The whole of a storage in memory.
fn bytes_of(memory: &MemoryStorage) -> Vec<u8> {
    let length = memory.facts().length_bytes as usize;
    now(memory.read(0, Buffer::zeroed(length)))
        .buffer
        .as_slice()
        .to_vec()
}

/// A change that took effect, and whether a sync covers it.
struct Pending {
    /// Changes of the disk before it.
    number: u64,
    change: Change,
}

/// A disk as its world holds it.
pub(crate) struct DiskState {
    pub(crate) name: String,
    pub(crate) options: DiskOptions,
    pub(crate) visible: MemoryStorage,
    pub(crate) durable: MemoryStorage,
    /// Stands for the host file where extents are shared.
    pub(crate) descriptor: Option<Arc<OwnedFd>>,
    pending: Vec<Pending>,
    changes: u64,
}

impl DiskState {
    pub(crate) fn new(name: &str, options: DiskOptions) -> Self {
        // Only the descriptor's identity counts.
        let descriptor = options.shares_extents.then(|| {
            let file = std::fs::File::open("/dev/null").expect("every system has it");
            Arc::new(OwnedFd::from(file))
        });
        Self {
            name: name.to_owned(),
            visible: MemoryStorage::new(options.length_bytes),
            durable: MemoryStorage::new(options.length_bytes),
            options,
            descriptor,
            pending: Vec::new(),
            changes: 0,
        }
    }

    /// Changes that took effect so far: what a sync that is issued now makes durable.
    pub(crate) const fn changes(&self) -> u64 {
        self.changes
    }

    /// Carries a change out for readers; it is pending until a sync.
    pub(crate) fn change(&mut self, change: Change) {
        change.apply(&self.visible);
        self.pending.push(Pending {
            number: self.changes,
            change,
        });
        self.changes += 1;
    }

    /// The part of `change` that there is room for; all of it unless the disk is full.
    pub(crate) fn fitting(&self, change: &Change) -> ByteRange {
        let range = change.range();
        let Some(capacity) = self.options.capacity_bytes.filter(|_| change.takes_room()) else {
            return range;
        };
        let mut room = capacity.saturating_sub(self.visible.allocated_bytes());
        for block in range.align_outward(BLOCK_BYTES).pieces(BLOCK_BYTES) {
            let extents = now(self.visible.allocation(block, 1)).expect("memory knows");
            if !extents.first().is_some_and(|extent| extent.data) {
                match room.checked_sub(BLOCK_BYTES) {
                    Some(less) => room = less,
                    None => return range.clamp_end(block.offset().max(range.offset())),
                }
            }
        }
        range
    }

    /// A sync that was issued after `before` changes has ended well.
    pub(crate) fn make_durable(&mut self, before: u64) {
        for pending in self
            .pending
            .extract_if(.., |pending| pending.number < before)
        {
            pending.change.apply(&self.durable);
        }
    }

    /// A sync that was issued after `before` changes has failed: what it covered is never tried again. Readers still see
    /// it; whether it is on the medium only shows after a cut.
    pub(crate) fn give_up(&mut self, before: u64, seed: &Seed) {
        let covered = self
            .pending
            .extract_if(.., |pending| pending.number < before);
        let covered: Vec<Change> = covered.map(|pending| pending.change).collect();
        settle(covered.iter(), &self.durable, seed);
    }

    /// What is there after a power cut with `in_flight` under way.
    pub(crate) fn after_cut<'a>(
        &'a self,
        in_flight: impl Iterator<Item = &'a Change>,
        seed: &Seed,
    ) -> MemoryStorage {
        let disk = self.durable.clone();
        let pending = self.pending.iter().map(|pending| &pending.change);
        settle(pending.chain(in_flight), &disk, seed);
        disk
    }

    /// Comes back with what a power cut left.
    pub(crate) fn restart(&mut self, left: MemoryStorage) {
        self.visible = left.clone();
        self.durable = left;
        self.pending.clear();
    }
}
