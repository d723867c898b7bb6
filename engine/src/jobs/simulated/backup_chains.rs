//! Chains of incremental backups, each onto a qcow2 overlay of the one before, beside writers: each that has ended well shows, through
//! its chain, what the source was when its filter came, whatever has failed or was cancelled in between.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use blockyard_images::qcow2::units::{Compression, Version};
use blockyard_simulator::{DiskOptions, Fault, Seed, World, each_seed, run};
use blockyard_storage::error::{EIO, ENOSPC};
use blockyard_storage::{Buffer, ByteRange, Operation};

use super::backup_stage::{Disks, Setup, Stage};
use crate::bitmap::{Bitmap, NodeBitmaps};
use crate::job::work::Stop;
use crate::node::Node;
use crate::node::qcow2::Qcow2Node;
use crate::node::qcow2::tests::yard::{Setup as ImageSetup, Yard};
use crate::request::{BitmapMode, DetectZeroes, SyncMode};

const NAME: &str = "b";

/// Backups in a chain.
const BACKUPS: usize = 20;

/// One backup.
struct Layer {
    yard: Yard,
    /// What the source was.
    shows: Vec<u8>,
}

/// A disk, its bitmap, and its backups.
struct History {
    seed: u64,
    dice: Seed,
    bitmaps: Arc<NodeBitmaps>,
    granularity: u64,
    source: Vec<u8>,
    length: u64,
    layers: Vec<Layer>,
    /// Whether each backup compresses, or one of four.
    compresses: bool,
}

/// What has been seen in all histories.
#[derive(Default)]
struct Seen {
    failed: Cell<usize>,
    cancelled: Cell<usize>,
    larger_clusters: Cell<usize>,
    smaller_clusters: Cell<usize>,
}

fn count(counter: &Cell<usize>) {
    counter.set(counter.get() + 1);
}

impl History {
    fn new(seed: u64, compresses: bool) -> Self {
        let dice = Seed::new(seed ^ 0x00c4_a12b);
        let length = 512 * (20 + dice.below(200));
        let granularity = *dice.pick(&[512, 2048, 4096, 16_384, 65_536]);
        let bitmaps = Arc::new(NodeBitmaps::default());
        let bitmap = Bitmap::new(NAME.to_owned(), length, granularity);
        bitmaps.add(bitmap).expect("added");
        // The first backup is of everything.
        bitmaps.mark(ByteRange::new(0, length), length);
        let byte = |_| match dice.one_in(40) {
            true => dice.any() as u8,
            false => 0,
        };
        let source = (0..length).map(byte).collect();
        Self {
            seed,
            bitmaps,
            granularity,
            source,
            length,
            layers: Vec::new(),
            compresses,
            dice,
        }
    }

    fn source_disk(&self, nth: u64) -> Disks {
        let world = World::new(self.seed ^ nth << 20);
        let options = DiskOptions {
            length_bytes: self.length,
            ..DiskOptions::default()
        };
        let source = world.disk("source", options.clone());
        for (index, block) in self.source.chunks(512).enumerate() {
            if block.iter().any(|byte| *byte != 0) {
                source.fill(index as u64 * 512, block);
            }
        }
        let target = world.disk("unused", options);
        Disks {
            world,
            source,
            target,
            unmaps: self.dice.one_in(2),
        }
    }

    /// A new image, whose header names something below it if there are backups before.
    fn image(&self, nth: u64) -> Yard {
        let dice = &self.dice;
        let seed = self.seed.wrapping_mul(1000).wrapping_add(nth);
        let version = match dice.one_in(4) {
            true => Version::V2,
            false => Version::V3,
        };
        Yard::new(ImageSetup {
            version,
            compression: match version == Version::V3 && dice.one_in(2) {
                true => Compression::Zstd,
                false => Compression::Zlib,
            },
            size_bytes: self.length,
            backing_bytes: (!self.layers.is_empty()).then_some(512),
            alignment: *dice.pick(&[1, 512, 4096]),
            detect_zeroes: *dice.pick(&[DetectZeroes::Off, DetectZeroes::Off, DetectZeroes::Unmap]),
            lazy_refcounts: version == Version::V3 && dice.one_in(4),
            l2_cache_bytes: *dice.pick(&[0, 1024, 1 << 20]),
            refcount_cache_bytes: *dice.pick(&[0, 256 << 10]),
            ..ImageSetup::new(seed, *dice.pick(&[9, 9, 10, 12, 14, 16]))
        })
    }

    /// The first backups as one disk.
    fn shown(&self, count: usize) -> Option<Rc<dyn Node>> {
        let mut below: Option<Rc<dyn Node>> = None;
        for layer in self.layers.iter().take(count) {
            below = Some(layer.yard.open_on(below.as_ref()));
        }
        below
    }

    /// What is read through a chain of images on these disks.
    fn content(&self, yards: &[&Yard], top: &Rc<dyn Node>) -> Vec<u8> {
        let step = || yards.iter().any(|yard| yard.world.step());
        for _ in 0..40 {
            let read = top.read(0, Buffer::zeroed(self.length as usize));
            let read = run(read, step).expect("read");
            if read.outcome.is_ok() {
                return read.buffer.as_slice().to_vec();
            }
        }
        panic!("a backup cannot be read, seed {}", self.seed)
    }

    fn setup(&self, nth: u64) -> Setup {
        let setup = Setup::random(self.seed.wrapping_mul(100).wrapping_add(nth));
        Setup {
            sync: SyncMode::Incremental,
            compress: self.dice.one_in(4) || self.compresses,
            operations: 1 + setup.operations / 8,
            ..setup
        }
    }

    /// One more backup, which comes to the others if it ends well.
    fn back_up(&mut self, nth: u64, seen: &Seen) {
        let (setup, yard, disks) = (self.setup(nth), self.image(nth), self.source_disk(nth));
        let below = self.shown(self.layers.len());
        let target = yard.open_on(below.as_ref());
        // Each strikes once, now or when what has become of it is looked at.
        while self.dice.one_in(3) {
            let errno = *self.dice.pick(&[EIO, ENOSPC]);
            let fault = Fault::fails(errno).nth(1 + self.dice.below(100));
            match self.dice.one_in(2) {
                true => disks.world.add_fault(fault),
                false => yard.world.add_fault(fault),
            }
        }
        if self.dice.one_in(12) {
            let sync = Fault::fails(EIO).of(Operation::Sync);
            yard.world.add_fault(sync.nth(1 + self.dice.below(3)));
        }
        let source = disks.node(&disks.source, "source");
        let by_bitmap = Some((&self.bitmaps, NAME, BitmapMode::OnSuccess));
        let original = self.source.clone();
        let node: Rc<dyn Node> = target.clone();
        let stage = Stage::with_bitmaps(setup, original, source, node, by_bitmap);
        let step = || {
            let layers = self.layers.iter().map(|layer| &layer.yard);
            let mut yards: Vec<&Yard> = layers.chain([&yard]).collect();
            if self.dice.one_in(2) {
                yards.reverse();
            }
            if self.dice.one_in(2) && disks.world.step() {
                return true;
            }
            yards.iter().any(|yard| yard.world.step())
                || yard.go_on_with_what_is_left()
                || disks.world.step()
        };
        let ended = stage.run(step);
        stage.assert_end(&ended, step);
        while disks.world.step() {}
        let shows = stage.original.clone();
        drop(stage);
        self.source = disks.source.bytes();
        match ended {
            Ok(()) => self.keep(yard, &target, shows, seen),
            Err(Stop::Cancelled) => count(&seen.cancelled),
            Err(Stop::Failed(_)) => count(&seen.failed),
        }
    }

    /// A backup that has ended well is whole, also if the power goes right then.
    fn keep(&mut self, yard: Yard, target: &Rc<Qcow2Node>, shows: Vec<u8>, seen: &Seen) {
        match yard.setup.cluster_bytes().cmp(&self.granularity) {
            std::cmp::Ordering::Greater => count(&seen.larger_clusters),
            std::cmp::Ordering::Less => count(&seen.smaller_clusters),
            std::cmp::Ordering::Equal => {}
        }
        if self.dice.one_in(3) {
            yard.cut_power();
        } else {
            yard.finish_what_is_left();
            // It has failed before, if a sync has: what it says then is not asked for here.
            let _ = yard.drive(target.close());
        }
        self.layers.push(Layer { yard, shows });
        self.assert_shown(self.layers.len());
    }

    fn assert_shown(&self, count: usize) {
        let Some(layer) = count.checked_sub(1).and_then(|top| self.layers.get(top)) else {
            return;
        };
        let top = self.shown(count).expect("a chain");
        let yards: Vec<&Yard> = self.layers.iter().map(|layer| &layer.yard).collect();
        let content = self.content(&yards, &top);
        assert!(
            content == layer.shows,
            "backup {count} of seed {}",
            self.seed
        );
    }
}

/// Makes so many histories, and looks at each of their backups.
fn try_chains(name: &str, count: u64, compresses: bool) -> Seen {
    let seen = Seen::default();
    each_seed("blockyard-engine", name, count, |seed| {
        let mut history = History::new(seed, compresses);
        let mut nth = 0;
        while history.layers.len() < BACKUPS {
            history.back_up(nth, &seen);
            nth += 1;
            assert!(nth < 400, "most of them fail, seed {seed}");
        }
        for count in 1..=BACKUPS {
            history.assert_shown(count);
        }
    });
    seen
}

#[test]
fn each_backup_of_a_chain_of_images_shows_its_point_in_time() {
    let seen = try_chains("each_backup_of_a_chain_of_images", 200, false);
    let seen = [
        &seen.failed,
        &seen.cancelled,
        &seen.larger_clusters,
        &seen.smaller_clusters,
    ];
    let seen = seen.map(Cell::get);
    assert!(seen.iter().all(|count| *count > 100), "{seen:?}");
}

#[test]
fn each_backup_of_a_chain_of_compressed_images_shows_its_point_in_time() {
    let seen = try_chains("each_backup_of_a_chain_of_compressed_images", 50, true);
    let seen = [&seen.failed, &seen.cancelled].map(Cell::get);
    assert!(seen.iter().all(|count| *count > 25), "{seen:?}");
}
