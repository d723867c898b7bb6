//! [`Yard`]: one image with its disks, and how it is made and opened.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use blockyard_images::pace::Unwatched;
use blockyard_images::qcow2::create::{CreateOptions, create};
use blockyard_images::qcow2::units::{Compression, Version};
use blockyard_images::qcow2::{Options, Qcow2};
use blockyard_ring::{HostFile, Socket};
use blockyard_simulator::{Disk, DiskOptions, Seed, World, run};
use blockyard_storage::buffer::BufferPool;
use blockyard_storage::{Aligned, ByteRange, LocalFuture, Storage};
use tokio::sync::mpsc::UnboundedReceiver;

use crate::clock::{Clock, Moment};
use crate::data::{CpuPool, DataContext, HostFiles, Spawner};
use crate::event::EventKind;
use crate::node::Node;
use crate::node::file_node::{FileNode, FileOptions};
use crate::node::news::News;
use crate::node::qcow2::{Qcow2Files, Qcow2Node, Qcow2Options};
use crate::request::{DetectZeroes, Discard};

/// Where the guest's data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DataFile {
    Inside,
    Outside,
    Raw,
}

/// What an image is like.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) seed: u64,
    pub(crate) version: Version,
    pub(crate) cluster_bits: u32,
    pub(crate) extended_l2: bool,
    pub(crate) refcount_bits: u64,
    pub(crate) compression: Compression,
    pub(crate) data_file: DataFile,
    pub(crate) size_bytes: u64,
    /// Length of the raw file below it.
    pub(crate) backing_bytes: Option<u64>,
    /// Of requests on every disk.
    pub(crate) alignment: u32,
    pub(crate) discard: Discard,
    pub(crate) detect_zeroes: DetectZeroes,
    pub(crate) lazy_refcounts: bool,
    pub(crate) discard_no_unref: bool,
    pub(crate) l2_cache_bytes: u64,
    pub(crate) refcount_cache_bytes: u64,
    /// What is given up for other reasons than a request is discarded in the file.
    pub(crate) pass_discard_other: bool,
    /// Room that may be given up before it is made free.
    pub(crate) given_up_bytes_max: u64,
}

impl Setup {
    /// An image of clusters of this size, without anything special.
    pub(crate) fn new(seed: u64, cluster_bits: u32) -> Self {
        Self {
            seed,
            version: Version::V3,
            cluster_bits,
            extended_l2: false,
            refcount_bits: 16,
            compression: Compression::Zlib,
            data_file: DataFile::Inside,
            size_bytes: 20 << cluster_bits,
            backing_bytes: None,
            alignment: 1,
            discard: Discard::Unmap,
            detect_zeroes: DetectZeroes::Off,
            lazy_refcounts: false,
            discard_no_unref: false,
            l2_cache_bytes: 1 << 20,
            refcount_cache_bytes: 256 << 10,
            pass_discard_other: false,
            given_up_bytes_max: 64 << 20,
        }
    }

    /// Anything that can be.
    pub(crate) fn random(seed: u64) -> Self {
        let dice = Seed::new(seed ^ 0x9c0_7700);
        let extended_l2 = dice.one_in(3);
        let cluster_bits = match extended_l2 {
            true => *dice.pick(&[14, 15, 16]),
            false => *dice.pick(&[9, 9, 10, 12, 13, 16]),
        };
        let version = match extended_l2 || !dice.one_in(4) {
            true => Version::V3,
            false => Version::V2,
        };
        let v3 = version == Version::V3;
        let clusters = if cluster_bits < 12 { 200 } else { 10 };
        let size_bytes = ((1 + dice.below(clusters)) << cluster_bits) - 512 * dice.below(2);
        let backing_bytes = match dice.below(4) {
            0 => None,
            1 => Some(size_bytes),
            2 => Some(512 * (1 + dice.below(size_bytes / 512))),
            _ => Some(size_bytes + 512 * dice.below(100)),
        };
        let data_file = match dice.below(6) {
            0 if v3 => DataFile::Outside,
            1 if v3 && backing_bytes.is_none() => DataFile::Raw,
            _ => DataFile::Inside,
        };
        Self {
            version,
            extended_l2,
            refcount_bits: if v3 {
                *dice.pick(&[1, 2, 8, 16, 64])
            } else {
                16
            },
            compression: match v3 && dice.one_in(2) {
                true => Compression::Zstd,
                false => Compression::Zlib,
            },
            data_file,
            size_bytes,
            backing_bytes,
            alignment: *dice.pick(&[1, 512, 4096]),
            discard: *dice.pick(&[Discard::Unmap, Discard::Unmap, Discard::Ignore]),
            detect_zeroes: *dice.pick(&[DetectZeroes::Off, DetectZeroes::On, DetectZeroes::Unmap]),
            lazy_refcounts: v3 && dice.one_in(4),
            discard_no_unref: v3 && dice.one_in(4),
            l2_cache_bytes: *dice.pick(&[0, 1024, 1 << 20]),
            refcount_cache_bytes: *dice.pick(&[0, 256 << 10]),
            pass_discard_other: dice.one_in(3),
            given_up_bytes_max: *dice.pick(&[0, 2 << cluster_bits, 64 << 20]),
            ..Self::new(seed, cluster_bits)
        }
    }

    pub(crate) fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }
}

/// Time that nobody waits for.
struct Still;

impl Clock for Still {
    fn now(&self) -> Moment {
        Moment::default()
    }

    fn sleep_until(&self, _: Moment) -> LocalFuture<'static, ()> {
        Box::pin(std::future::pending())
    }
}

/// No host file is needed here.
struct NoFiles;

impl HostFiles for NoFiles {
    fn storage(&self, _: &HostFile, _: bool) -> Rc<dyn Storage> {
        unreachable!("nodes are made on simulated disks")
    }

    fn socket(&self, _: OwnedFd) -> io::Result<Rc<dyn Socket>> {
        unreachable!("nothing is connected")
    }

    fn blocking(&self, _: Box<dyn FnOnce() + Send>) -> LocalFuture<'static, ()> {
        unreachable!("nothing blocks")
    }
}

/// An image, its disks, and what its nodes have told.
pub(crate) struct Yard {
    pub(crate) setup: Setup,
    pub(crate) world: World,
    pub(crate) image: Disk,
    pub(crate) data: Option<Disk>,
    pub(crate) base: Option<Disk>,
    /// What the raw file below holds.
    pub(crate) base_bytes: Vec<u8>,
    pub(crate) context: DataContext,
    pub(crate) heard: RefCell<UnboundedReceiver<EventKind>>,
    /// Changes that nobody waits for any more.
    left: Rc<RefCell<Vec<LocalFuture<'static, ()>>>>,
}

impl Yard {
    /// Disks with a new image.
    pub(crate) fn new(setup: Setup) -> Self {
        let world = World::new(setup.seed);
        let disk = |name: &str, length_bytes| {
            world.disk(
                name,
                DiskOptions {
                    length_bytes,
                    request_alignment: setup.alignment,
                    ..DiskOptions::default()
                },
            )
        };
        let image = disk("image", 0);
        let data = (setup.data_file != DataFile::Inside).then(|| disk("data", 0));
        let base = setup.backing_bytes.map(|length| disk("base", length));
        let base_bytes = base_bytes(setup.seed, setup.backing_bytes.unwrap_or(0));
        if let Some(base) = &base {
            for block in ByteRange::new(0, base_bytes.len() as u64).pieces(4096) {
                let bytes = &base_bytes[block.offset() as usize..block.end() as usize];
                if bytes.iter().any(|byte| *byte != 0) {
                    base.fill(block.offset(), bytes);
                }
            }
        }
        let (news, heard) = News::channel();
        let context = DataContext::new(
            Rc::new(Still),
            BufferPool::new(1 << 20),
            CpuPool::on_the_spot(),
            news,
            Rc::new(NoFiles),
        );
        let left: Rc<RefCell<Vec<LocalFuture<'static, ()>>>> = Rc::default();
        let take = Rc::clone(&left);
        let context = context.with_spawner(Spawner::new(move |work| take.borrow_mut().push(work)));
        let yard = Self {
            setup,
            world,
            image,
            data,
            base,
            base_bytes,
            context,
            heard: RefCell::new(heard),
            left,
        };
        yard.make_image();
        yard
    }

    fn make_image(&self) {
        let setup = &self.setup;
        let options = CreateOptions {
            version: setup.version,
            cluster_bytes: setup.cluster_bytes(),
            refcount_bits: setup.refcount_bits,
            lazy_refcounts: setup.lazy_refcounts,
            extended_l2: setup.extended_l2,
            compression: setup.compression,
            backing_name: setup.backing_bytes.map(|_| b"base".to_vec()),
            backing_format: setup.backing_bytes.map(|_| "raw".to_owned()),
            data_file_name: self.data.as_ref().map(|_| b"data".to_vec()),
            data_file_raw: setup.data_file == DataFile::Raw,
            ..CreateOptions::new(setup.size_bytes)
        };
        let creation = options.plan().expect("an image that can be");
        let image = Aligned::over(self.image.open());
        let data = self.data.as_ref().map(|data| Aligned::over(data.open()));
        let made = create(&creation, &*image, data.as_deref(), &Unwatched);
        self.drive(made).expect("made");
    }

    /// Runs to the end; whatever waits ends in an order of the seed's choosing.
    pub(crate) fn drive<T>(&self, future: impl Future<Output = T>) -> T {
        let ended = self.drive_while(future, || true);
        ended.expect("waits for something that can happen")
    }

    /// The same as long as `goes_on` says so; then the future is dropped where it is.
    pub(crate) fn drive_while<T>(
        &self,
        future: impl Future<Output = T>,
        goes_on: impl Fn() -> bool,
    ) -> Option<T> {
        self.drive_with(future, || goes_on() && self.world.step())
    }

    /// The same as long as `idle` makes something happen.
    pub(crate) fn drive_with<T>(
        &self,
        future: impl Future<Output = T>,
        idle: impl FnMut() -> bool,
    ) -> Option<T> {
        let mut future = pin!(future);
        let with_what_is_left = poll_fn(|cx| {
            let mut left = std::mem::take(&mut *self.left.borrow_mut());
            left.retain_mut(|work| work.as_mut().poll(cx).is_pending());
            let known = left.len();
            self.left.borrow_mut().append(&mut left);
            let polled = future.as_mut().poll(cx);
            if self.left.borrow().len() > known {
                // What has just come has not been polled yet.
                cx.waker().wake_by_ref();
            }
            polled
        });
        run(with_what_is_left, idle)
    }

    /// Brings what was left to its end.
    pub(crate) fn finish_what_is_left(&self) {
        self.drive(poll_fn(|_| match self.left.borrow().is_empty() {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }));
    }

    /// Lets go on what was left, for somebody else who drives; whether some of it has come to its end.
    pub(crate) fn go_on_with_what_is_left(&self) -> bool {
        let mut left = std::mem::take(&mut *self.left.borrow_mut());
        let before = left.len();
        let mut cx = Context::from_waker(Waker::noop());
        left.retain_mut(|work| work.as_mut().poll(&mut cx).is_pending());
        let has_ended = left.len() < before;
        self.left.borrow_mut().append(&mut left);
        has_ended
    }

    /// The power goes: nothing that was under way goes on.
    pub(crate) fn cut_power(&self) {
        // What is dropped may leave what it was waiting for.
        while !self.left.borrow().is_empty() {
            let left = std::mem::take(&mut *self.left.borrow_mut());
            drop(left);
        }
        self.world.cut_power();
    }

    /// A file node on one of the disks.
    pub(crate) fn file(&self, name: &str, disk: &Disk, read_only: bool) -> Rc<dyn Node> {
        let options = FileOptions {
            read_only,
            discard: Discard::Unmap,
            ..FileOptions::default()
        };
        Rc::new(FileNode::new(name.to_owned(), disk.open(), options))
    }

    /// The raw file below.
    pub(crate) fn backing(&self) -> Option<Rc<dyn Node>> {
        let base = self.base.as_ref()?;
        Some(self.file("base", base, true))
    }

    /// The image as a node, newly opened. Files whose sync has failed are opened anew.
    pub(crate) fn open(&self) -> Rc<Qcow2Node> {
        self.open_on(self.backing().as_ref())
    }

    /// The same with something else below it, whatever it names.
    pub(crate) fn open_on(&self, backing: Option<&Rc<dyn Node>>) -> Rc<Qcow2Node> {
        let file = || self.file("file", &self.image, false);
        let mut tries = (0..3).map(|_| self.open_as(file(), backing.cloned(), false));
        tries.find_map(|node| node).expect("an image")
    }

    /// The same for reading.
    pub(crate) fn open_read_only(&self) -> Rc<Qcow2Node> {
        let file = self.file("file", &self.image, true);
        self.open_as(file, self.backing(), true).expect("an image")
    }

    /// For reading and writing, on another node for its file.
    pub(crate) fn open_over(
        &self,
        file: Rc<dyn Node>,
        backing: Option<Rc<dyn Node>>,
    ) -> Rc<Qcow2Node> {
        self.open_as(file, backing, false).expect("an image")
    }

    fn open_as(
        &self,
        file: Rc<dyn Node>,
        backing: Option<Rc<dyn Node>>,
        read_only: bool,
    ) -> Option<Rc<Qcow2Node>> {
        let setup = &self.setup;
        let data = self.data.as_ref();
        let data = data.map(|data| self.file("data", data, false));
        let files = Qcow2Files::new(file, data);
        let storage = files.file.clone() as Rc<dyn Storage>;
        let data_storage = files.data_file.clone().map(|data| data as Rc<dyn Storage>);
        let options = Options {
            read_only,
            lazy_refcounts: setup.lazy_refcounts,
            discard_no_unref: setup.discard_no_unref,
            pass_discard_request: setup.discard == Discard::Unmap,
            pass_discard_other: setup.pass_discard_other,
            l2_cache_bytes: setup.l2_cache_bytes,
            l2_cache_entry_bytes: 512,
            refcount_cache_bytes: setup.refcount_cache_bytes,
            given_up_bytes_max: setup.given_up_bytes_max,
            ..Options::default()
        };
        // A fault may be left that strikes once.
        let mut tries = (0..20)
            .map(|_| self.drive(Qcow2::open(storage.clone(), data_storage.clone(), options)));
        let mut why = None;
        let image = tries.find_map(|opened| opened.map_err(|error| why = Some(error)).ok());
        if image.is_none() {
            eprintln!("it cannot be opened: {why:?}");
        }
        let image = image?;
        let options = Qcow2Options {
            inactive: false,
            discard: setup.discard,
            detect_zeroes: setup.detect_zeroes,
            cache_clean_interval: None,
        };
        Some(Rc::new(Qcow2Node::new(
            "image".to_owned(),
            image,
            files,
            backing,
            options,
            &self.context,
        )))
    }

    /// What the nodes have told since the last call.
    pub(crate) fn news(&self) -> Vec<EventKind> {
        let mut heard = self.heard.borrow_mut();
        std::iter::from_fn(|| heard.try_recv().ok()).collect()
    }
}

/// Runs of bytes, some of them zeroes.
pub(crate) fn base_bytes(seed: u64, length: u64) -> Vec<u8> {
    let dice = Seed::new(seed ^ 0xba5e);
    let mut bytes = Vec::new();
    while bytes.len() < length as usize {
        let value = if dice.one_in(3) { 0 } else { dice.any() as u8 };
        let run = 512 * (1 + dice.below(40)) as usize;
        bytes.extend((0..run).map(|place| match value {
            0 => 0,
            value => value.wrapping_add((place / 100) as u8) | 1,
        }));
    }
    bytes.truncate(length as usize);
    bytes
}
