//! [`Yard`]: an image on simulated disks, and clients that use it at the same time.

use std::cell::Cell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;

use blockyard_images::ImageError;
use blockyard_images::qcow2::Qcow2;
use blockyard_images::qcow2::layout::header::{Access, Header};
use blockyard_images::qcow2::units::{GuestCluster, Version};
use blockyard_simulator::disk::DiskOptions;
use blockyard_simulator::{Disk, Seed, World, run};
use blockyard_storage::{ByteRange, LocalFuture, MemoryStorage, Operation, Storage};

use crate::cells::{CELL_BYTES, Cells};
use crate::disk_model::{guest_bytes, guest_bytes_of};
use crate::mover::Mover;
use crate::recount::{recount, snapshot_tables};
use crate::setup::{Setup, all_bytes, now};
use crate::snapshot;

/// Bytes of a backing file that holds one value a cell.
fn cells_below(seed: &Seed, length: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < length {
        let value = if seed.one_in(3) { 0 } else { seed.any() as u8 };
        let cells = 1 + seed.below(20);
        bytes.resize(bytes.len() + (cells * CELL_BYTES) as usize, value);
    }
    bytes.truncate(length as usize);
    bytes
}

/// An image on disks of a world.
pub(crate) struct Yard {
    pub(crate) world: World,
    pub(crate) setup: Setup,
    pub(crate) image: Disk,
    pub(crate) data: Option<Disk>,
    pub(crate) cells: Rc<Cells>,
    pub(crate) seed: Seed,
    /// What an internal snapshot holds.
    snapshot: Option<Vec<u8>>,
    /// A flush failed for good.
    pub(crate) unflushed: Rc<Cell<bool>>,
}

/// Writes some of a disk that is in memory.
async fn write_some(setup: &Setup, file: &Rc<MemoryStorage>, seed: &Seed, disk: &mut [u8]) {
    let storage = Rc::clone(file) as Rc<dyn Storage>;
    let image = Qcow2::open(storage, None, setup.options)
        .await
        .expect("sound");
    let mover = Mover::new(image, setup.below.clone(), setup.skips_zeroes);
    let cells = disk.len() as u64 / CELL_BYTES;
    for value in 200..200 + seed.below(8) as u8 {
        let start = seed.below(cells) * CELL_BYTES;
        let length = (1 + seed.below(cells)) * CELL_BYTES;
        let range = ByteRange::new(start, length).clamp_end(disk.len() as u64);
        let bytes = vec![value; range.length() as usize];
        mover.write(start, &bytes).await.expect("written");
        disk[range.offset() as usize..range.end() as usize].fill(value);
    }
    let whole = setup.create.cluster_bytes.min(disk.len() as u64);
    let bytes = vec![250; whole as usize];
    let first = GuestCluster(0);
    mover
        .write_compressed(first, &bytes)
        .await
        .expect("written");
    disk[..whole as usize].fill(250);
    mover.image.close().await.expect("closed");
}

/// How a client's request may end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Failures {
    /// Well.
    Never,
    /// With an error too.
    Allowed,
}

impl Yard {
    pub(crate) fn new(number: u64) -> Self {
        let seed = Seed::new(number);
        let mut setup = Setup::by(&seed, true);
        // Discards of parts of blocks do nothing on these disks, and bytes are compared at every step.
        let clusters = 1 + seed.below(if setup.create.cluster_bytes > 4096 {
            6
        } else {
            60
        });
        setup.create.size_bytes = clusters * setup.create.cluster_bytes;
        setup.device = setup
            .device
            .map(|_| (clusters + 32) * 4 * setup.create.cluster_bytes);
        let length = setup.create.size_bytes;
        if setup.below.is_some() {
            let below = match seed.below(2) {
                0 => length,
                _ => length / 128 * CELL_BYTES,
            };
            setup.below = Some(Rc::new(cells_below(&seed, below)));
        }
        Self::with(number, setup, seed)
    }

    /// A new image whose disk is written from its start, durably.
    pub(crate) fn filled(number: u64, setup: Setup, seed: Seed, range: ByteRange) -> Self {
        let (memory, _) = setup.memory();
        let mut disk = setup.disk();
        disk[..range.length() as usize].fill(99);
        now(async {
            let storage = Rc::clone(&memory) as Rc<dyn Storage>;
            let image = Qcow2::open(storage, None, setup.options)
                .await
                .expect("sound");
            let mover = Mover::new(image, setup.below.clone(), setup.skips_zeroes);
            let bytes = vec![99; range.length() as usize];
            mover.write(range.offset(), &bytes).await.expect("written");
            mover.image.close().await.expect("closed");
        });
        let yard = Self::with(number, setup, seed);
        yard.image.fill(0, &all_bytes(&memory));
        yard.cells.settle(&disk);
        yard
    }

    /// A given image on disks of a world of its own.
    pub(crate) fn with(number: u64, setup: Setup, seed: Seed) -> Self {
        let world = World::new(number);
        let options = DiskOptions {
            length_bytes: setup.device.unwrap_or(0),
            fixed_length: setup.device.is_some(),
            ..DiskOptions::default()
        };
        let image = world.disk("image", options);
        let options = DiskOptions::default();
        let data = setup.has_data_file().then(|| world.disk("data", options));
        let (memory, memory_data) = setup.memory();
        let mut disk = setup.disk();
        let mut file = all_bytes(&memory);
        let mut snapshot = None;
        if data.is_none() && seed.one_in(2) {
            now(write_some(&setup, &memory, &seed, &mut disk));
            file = all_bytes(&memory);
            if let Some(shared) = snapshot::take(&file) {
                file = shared;
                snapshot = Some(disk.clone());
            }
        }
        image.fill(0, &file);
        if let (Some(disk), Some(memory)) = (&data, memory_data) {
            disk.fill(0, &all_bytes(&memory));
        }
        Self {
            cells: Rc::new(Cells::of(&disk)),
            snapshot,
            world,
            setup,
            image,
            data,
            seed,
            unflushed: Rc::default(),
        }
    }

    /// Somebody who makes the disk longer and as long as it was again, over and over.
    pub(crate) fn resizer(&self, mover: &Mover, times: u64) -> LocalFuture<'static, ()> {
        let (mover, length) = (mover.clone(), self.setup.create.size_bytes);
        let seed = Seed::new(self.seed.any());
        let longest = self.setup.create.cluster_bytes * 400;
        let below = mover.below.as_ref().map_or(0, |below| below.len() as u64);
        Box::pin(async move {
            for _ in 0..times {
                let longer = length + 512 * (1 + seed.below(longest / 512));
                mover.image.resize(longer, below).await.expect("longer");
                let new = ByteRange::between(length, longer);
                if seed.one_in(2) {
                    mover.zero(new, seed.one_in(2)).await.expect("zeroed");
                }
                let read = mover.read(new).await.expect("read");
                assert!(read.iter().all(|byte| *byte == 0), "old bytes came back");
                let end = ByteRange::between(longer - 512, longer);
                mover.write(end.offset(), &[1; 512]).await.expect("written");
                mover.image.resize(length, 0).await.expect("shorter");
            }
        })
    }

    /// Opens the image; steps as many as it takes.
    pub(crate) fn mover(&self) -> Mover {
        let file: Rc<dyn Storage> = self.image.open();
        let data = self
            .data
            .as_ref()
            .map(|data| data.open() as Rc<dyn Storage>);
        let opening = Qcow2::open(file, data, self.setup.options);
        let image = run(opening, || self.world.step()).expect("it ends");
        let image = image.expect("sound");
        Mover::new(image, self.setup.below.clone(), self.setup.skips_zeroes)
    }

    /// The part of the disk that belongs to one of `count` clients; they share clusters at the borders.
    fn part(&self, index: u64, count: u64) -> ByteRange {
        let cells = self.setup.create.size_bytes / CELL_BYTES;
        let border = |index: u64| cells * index / count * CELL_BYTES;
        ByteRange::between(border(index), border(index + 1))
    }

    /// Clients with `steps` requests each.
    pub(crate) fn clients(
        &self,
        mover: &Mover,
        count: u64,
        steps: u64,
        failures: Failures,
    ) -> Vec<LocalFuture<'static, ()>> {
        let client = |index| {
            let client = Client {
                mover: mover.clone(),
                cells: Rc::clone(&self.cells),
                part: self.part(index, count),
                seed: Seed::new(self.seed.any()),
                failures,
                ignores_discard: self.setup.create.version == Version::V2
                    && self.setup.below.is_some(),
                compresses: !self.setup.has_data_file(),
                value: Cell::new(index as u8),
                unflushed: Rc::clone(&self.unflushed),
            };
            Box::pin(async move { client.work(steps).await }) as LocalFuture<'static, ()>
        };
        (0..count).map(client).collect()
    }

    /// Whatever a power cut has left is what there is now.
    pub(crate) fn settle(&self) {
        let file = self.image.bytes();
        let data = self.data.as_ref().map(|data| data.bytes());
        let disk = guest_bytes(&file, data.as_deref(), self.below());
        self.check_bytes(file, data);
        self.cells.settle(&disk);
    }

    fn below(&self) -> &[u8] {
        self.setup.below.as_deref().map_or(&[][..], |below| below)
    }

    /// Holds what would be left of the image, if the power went now, to the rules.
    pub(crate) fn check_after_cut(&self, seed: u64) {
        let file = self.image.bytes_after_cut(seed);
        let data = self.data.as_ref().map(|data| data.bytes_after_cut(seed));
        self.check_bytes(file, data);
    }

    pub(crate) fn check_bytes(&self, mut file: Vec<u8>, data: Option<Vec<u8>>) {
        let header = Header::parse(&file, Access::ReadOnly).expect("a header");
        let disk = guest_bytes(&file, data.as_deref(), self.below());
        let length = self.setup.create.size_bytes.min(disk.len() as u64);
        if let Err(text) = self.cells.may_be_left(&disk[..length as usize]) {
            panic!("{text}");
        }
        if let Some(snapshot) = &self.snapshot {
            let l1 = snapshot_tables(&file, &header)[0];
            let length = snapshot.len() as u64;
            let held = guest_bytes_of(&file, None, self.below(), l1, length);
            assert!(held == *snapshot, "the snapshot has changed");
        }
        if header.is_dirty() {
            file = repaired(&file);
        }
        let findings = recount(&file);
        assert_eq!(findings.corruptions, Vec::<String>::new());
        if header.is_dirty() {
            let again = guest_bytes(&file, data.as_deref(), self.below());
            assert!(again == disk, "the repair changed the guest's disk");
        }
    }
}

/// A dirty image after its repair.
fn repaired(file: &[u8]) -> Vec<u8> {
    let memory = Rc::new(MemoryStorage::new(0));
    let copy = blockyard_storage::Buffer::copy_of(file);
    crate::setup::now(memory.write(0, copy))
        .outcome
        .expect("memory");
    let storage: Rc<dyn Storage> = Rc::clone(&memory) as Rc<dyn Storage>;
    crate::setup::now(blockyard_images::qcow2::check::repair_dirty(&storage)).expect("repaired");
    all_bytes(&memory)
}

/// Somebody who does one thing after the other in a part of the disk.
struct Client {
    mover: Mover,
    cells: Rc<Cells>,
    part: ByteRange,
    seed: Seed,
    failures: Failures,
    ignores_discard: bool,
    compresses: bool,
    value: Cell<u8>,
    /// Flushes that failed because of a sync, by all clients.
    unflushed: Rc<Cell<bool>>,
}

impl Client {
    async fn work(&self, steps: u64) {
        for _ in 0..steps {
            if self.part.is_empty() {
                return;
            }
            self.step().await;
        }
    }

    fn range(&self) -> ByteRange {
        let cluster_bytes = self.mover.image.geometry().cluster_bytes();
        let start = self.part.offset() + self.seed.below(self.part.length());
        let longest = *self.seed.pick(&[512, cluster_bytes * 2, cluster_bytes * 5]);
        let unit = *self
            .seed
            .pick(&[CELL_BYTES, CELL_BYTES, 512, cluster_bytes]);
        ByteRange::new(start, 1 + self.seed.below(longest))
            .align_outward(unit)
            .intersection(&self.part)
    }

    fn ended(&self, outcome: Result<(), ImageError>) -> bool {
        match (outcome, self.failures) {
            (Ok(()), _) => true,
            (Err(_), Failures::Allowed) => false,
            (Err(error), Failures::Never) => panic!("{error}"),
        }
    }

    /// Asks a range to hold a value; `true`: it does now.
    async fn put(
        &self,
        range: ByteRange,
        value: u8,
        request: impl Future<Output = Result<(), ImageError>>,
    ) {
        let issued = self.cells.issue(range, value);
        let outcome = request.await;
        match self.ended(outcome) {
            true => issued.done(),
            false => issued.failed(),
        }
    }

    async fn step(&self) {
        let (mover, range) = (&self.mover, self.range());
        match self.seed.below(16) {
            0..5 => {
                self.value.set(self.value.get().wrapping_add(7));
                let value = self.value.get();
                let bytes = vec![value; range.length() as usize];
                self.put(range, value, mover.write(range.offset(), &bytes))
                    .await;
            }
            5 | 6 => {
                let may_unmap = self.seed.one_in(2);
                self.put(range, 0, mover.zero(range, may_unmap)).await;
            }
            7 | 8 => {
                let cluster_bytes = mover.image.geometry().cluster_bytes();
                let gone = match self.ignores_discard {
                    true => ByteRange::default(),
                    false => range.align_inward(cluster_bytes),
                };
                self.put(gone, 0, mover.discard(range)).await;
            }
            9 if self.compresses => {
                let geometry = mover.image.geometry();
                let whole = range
                    .align_outward(geometry.cluster_bytes())
                    .split_at(3 * geometry.cluster_bytes())
                    .0;
                if self.part.contains(&whole) {
                    self.value.set(self.value.get().wrapping_add(7));
                    let value = self.value.get();
                    let bytes = vec![value; whole.length() as usize];
                    let cluster = GuestCluster(whole.offset() / geometry.cluster_bytes());
                    self.put(whole, value, mover.write_compressed(cluster, &bytes))
                        .await;
                }
            }
            10..13 => {
                let flushing = self.cells.flush();
                let lost = self.unflushed.get();
                let outcome = mover.image.flush().await;
                if let Err(ImageError::Storage(error)) = &outcome
                    && error.operation == Operation::Sync
                {
                    self.unflushed.set(true);
                }
                if self.ended(outcome) {
                    assert!(!lost, "a flush is never tried again to success");
                    self.cells.flushed(flushing);
                }
            }
            13 => mover.image.clean_caches(),
            14 => {
                // Also where others write.
                let length = mover.image.length_bytes();
                let start = self.seed.below(length.max(1));
                let filled = ByteRange::new(start, range.length()).clamp_end(length);
                let outcome = mover.fill(filled, self.seed.one_in(2)).await;
                // The disk may have become shorter meanwhile.
                if filled.end() <= mover.image.length_bytes() {
                    self.ended(outcome);
                }
            }
            _ => match mover.read(range).await {
                Ok(bytes) => {
                    if let Err(text) = self.cells.may_read(range, &bytes) {
                        panic!("read: {text}");
                    }
                }
                Err(error) => {
                    self.ended(Err(error));
                }
            },
        }
    }
}

/// Ends when all of `tasks` have.
pub(crate) async fn all(tasks: &mut Vec<LocalFuture<'static, ()>>) {
    poll_fn(|cx| {
        tasks.retain_mut(|task| task.as_mut().poll(cx).is_pending());
        match tasks.is_empty() {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    })
    .await;
}
