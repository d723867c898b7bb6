//! Backups by bitmap, one after the other onto the same disk, on simulated disks: whatever fails, pauses or ends early, and whenever the
//! target's host loses its power, each backup that ends well brings the target to what the source was when its filter came.

use std::cell::Cell;
use std::sync::Arc;

use blockyard_simulator::{DiskOptions, Fault, Seed, World, each_seed};
use blockyard_storage::error::{EIO, ENOSPC};
use blockyard_storage::{ByteRange, Operation};

use super::backup_stage::{Disks, Setup, Stage};
use crate::bitmap::{Bitmap, Need, NodeBitmaps};
use crate::job::work::Stop;
use crate::request::{BitmapMode, SyncMode};

const NAME: &str = "b";

/// Several backups of one disk onto another one.
struct Chain {
    seed: u64,
    dice: Seed,
    bitmaps: Arc<NodeBitmaps>,
    source: Vec<u8>,
    target: Vec<u8>,
    length: u64,
}

/// How one backup ended.
struct Round {
    ended: Result<(), Stop>,
    setup: Setup,
    mode: BitmapMode,
}

impl Chain {
    /// Nothing of the target can be relied on.
    fn new(seed: u64) -> Self {
        let dice = Seed::new(seed ^ 0xc4a1);
        let length = 512 * (20 + dice.below(200));
        let granularity = *dice.pick(&[512, 4096, 16_384, 1 << 20]);
        let bitmaps = Arc::new(NodeBitmaps::default());
        let bitmap = Bitmap::new(NAME.to_owned(), length, granularity);
        bitmaps.add(bitmap).expect("added");
        bitmaps.mark(ByteRange::new(0, length), length);
        let bytes = |share: u64| {
            let byte = |_| match dice.one_in(share) {
                true => dice.any() as u8,
                false => 0,
            };
            (0..length).map(byte).collect()
        };
        Self {
            seed,
            bitmaps,
            source: bytes(40),
            target: bytes(3),
            length,
            dice,
        }
    }

    fn disks(&self, nth: u64) -> Disks {
        let world = World::new(self.seed ^ nth << 20);
        let options = DiskOptions {
            length_bytes: self.length,
            shares_extents: self.dice.one_in(4),
            ..DiskOptions::default()
        };
        let source = world.disk("source", options.clone());
        let target = world.disk("target", options);
        for (disk, bytes) in [(&source, &self.source), (&target, &self.target)] {
            for (index, block) in bytes.chunks(512).enumerate() {
                if block.iter().any(|byte| *byte != 0) {
                    disk.fill(index as u64 * 512, block);
                }
            }
        }
        Disks {
            world,
            source,
            target,
            unmaps: self.dice.one_in(2),
        }
    }

    /// One more backup. Writers go on to the end of it, and what they change is there before the next one.
    fn backup(&mut self, nth: u64, setup: Setup, mode: BitmapMode, faults: &[Fault]) -> Round {
        let disks = self.disks(nth);
        for fault in faults {
            disks.world.add_fault(fault.clone());
        }
        let source = disks.node(&disks.source, "source");
        let target = disks.node(&disks.target, "target");
        let by_bitmap = Some((&self.bitmaps, NAME, mode));
        let original = self.source.clone();
        let stage = Stage::with_bitmaps(setup.clone(), original, source, target, by_bitmap);
        let ended = stage.run(|| disks.world.step());
        stage.assert_end(&ended, || disks.world.step());
        if ended.is_ok() {
            // Nothing but what is on the target matters from now on.
            let durable = disks.target.bytes_after_cut(nth);
            assert!(durable == stage.original, "{}, {setup:?}", self.seed);
        }
        while disks.world.step() {}
        self.source = disks.source.bytes();
        self.target = match self.dice.one_in(2) {
            true => disks.target.bytes_after_cut(nth),
            false => disks.target.bytes(),
        };
        Round { ended, setup, mode }
    }

    fn dirty_bytes(&self) -> u64 {
        let dirty = self
            .bitmaps
            .with(NAME, Need::Read, |one| one.map().dirty_bytes());
        dirty.expect("nobody uses it")
    }

    fn random_setup(&self, nth: u64) -> (Setup, BitmapMode) {
        let (sync, mode) = *self.dice.pick(&[
            (SyncMode::Incremental, BitmapMode::OnSuccess),
            (SyncMode::Incremental, BitmapMode::OnSuccess),
            (SyncMode::Bitmap, BitmapMode::OnSuccess),
            (SyncMode::Bitmap, BitmapMode::Always),
            (SyncMode::Bitmap, BitmapMode::Always),
            (SyncMode::Bitmap, BitmapMode::Never),
            (SyncMode::Full, BitmapMode::OnSuccess),
            (SyncMode::Full, BitmapMode::Always),
        ]);
        let setup = Setup::random(self.seed.wrapping_mul(100).wrapping_add(nth));
        let operations = 1 + setup.operations / 8;
        let setup = Setup {
            sync,
            operations,
            ..setup
        };
        (setup, mode)
    }

    /// One that nothing disturbs, after which nothing is missing.
    fn quiet(&mut self, nth: u64) {
        let (setup, _) = self.random_setup(nth);
        let setup = Setup {
            sync: SyncMode::Incremental,
            cancel_at: None,
            ..setup
        };
        let round = self.backup(nth, setup, BitmapMode::OnSuccess, &[]);
        assert_eq!(round.ended, Ok(()), "{:?}", round.setup);
    }
}

#[test]
fn each_backup_of_a_chain_is_what_the_source_was() {
    each_seed("blockyard-engine", "each_backup_of_a_chain", 200, |seed| {
        let mut chain = Chain::new(seed);
        for nth in 0..20 {
            chain.quiet(nth);
        }
    });
}

#[test]
fn whatever_fails_in_a_chain_the_next_backup_misses_nothing() {
    let (succeeded, failed) = (Cell::new(0), Cell::new(0));
    each_seed(
        "blockyard-engine",
        "whatever_fails_in_a_chain",
        300,
        |seed| {
            let mut chain = Chain::new(seed);
            for nth in 0..10 {
                let (setup, mode) = chain.random_setup(nth);
                let mut faults = Vec::new();
                if chain.dice.one_in(2) {
                    let errno = *chain.dice.pick(&[EIO, ENOSPC]);
                    let one_in = 5 + chain.dice.below(40);
                    faults.push(Fault::fails(errno).one_in(one_in));
                }
                if chain.dice.one_in(4) {
                    faults.push(Fault::fails(EIO).of(Operation::Sync).one_in(2));
                }
                let round = chain.backup(nth, setup, mode, &faults);
                let count = match round.ended {
                    Ok(()) => &succeeded,
                    Err(_) => &failed,
                };
                count.set(count.get() + 1);
            }
            chain.quiet(10);
        },
    );
    let (succeeded, failed) = (succeeded.get(), failed.get());
    assert!(
        succeeded > 600 && failed > 300,
        "{succeeded} succeeded, {failed} failed"
    );
}

/// What a mode promises of the bitmap, where nobody writes meanwhile.
#[test]
fn the_bitmap_says_what_is_missing() {
    let (some, none) = (Cell::new(0), Cell::new(0));
    each_seed("blockyard-engine", "the_bitmap_says_what", 200, |seed| {
        let mut chain = Chain::new(seed);
        let (setup, mode) = chain.random_setup(0);
        let setup = Setup {
            operations: 0,
            cancel_at: Some(chain.dice.below(60)),
            perf: crate::request::BackupPerf {
                max_workers: 1,
                ..setup.perf
            },
            ..setup
        };
        let all = chain.dirty_bytes();
        assert_eq!(all, chain.length);
        let round = chain.backup(0, setup, mode, &[]);
        let missing = chain.dirty_bytes();
        match (&round.ended, round.mode) {
            (_, BitmapMode::Never) | (Err(_), BitmapMode::OnSuccess) => assert_eq!(missing, all),
            (Ok(()), _) => assert_eq!(missing, 0),
            (Err(_), BitmapMode::Always) => {
                let count = if missing < all { &some } else { &none };
                count.set(count.get() + 1);
            }
        }
    });
    assert!(some.get() > 10, "{} and {}", some.get(), none.get());
}
