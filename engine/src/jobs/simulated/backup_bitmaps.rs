//! Backups by bitmap, one after the other onto the same disk, on simulated disks: whatever fails, pauses or ends early, and whenever the
//! target's host loses its power, each backup that ends well brings the target to what the source was when its filter came.

use std::cell::Cell;
use std::sync::Arc;

use blockyard_simulator::{DiskOptions, Fault, Seed, World, each_seed};
use blockyard_storage::error::{EIO, ENOSPC};
use blockyard_storage::{ByteRange, Operation};

use super::backup_stage::{Disks, Setup, Stage};
use super::integrity::{earlier, manifest, manifest_of, manifest_onto, recorder};
use crate::bitmap::{Bitmap, Need, NodeBitmaps};
use crate::job::work::Stop;
use crate::manifest::onto::Earlier;
use crate::request::{BackupPerf, BitmapMode, SyncMode};

const NAME: &str = "b";

/// Several backups of one disk onto another one.
struct Chain {
    seed: u64,
    dice: Seed,
    bitmaps: Arc<NodeBitmaps>,
    source: Vec<u8>,
    target: Vec<u8>,
    length: u64,
    /// Each backup has a manifest: of what the target is before it, if that is known.
    manifests: Option<Option<Earlier>>,
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
        Self::of(seed, dice, length)
    }

    fn of(seed: u64, dice: Seed, length: u64) -> Self {
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
            manifests: None,
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
        let mut stage = Stage::with_bitmaps(setup.clone(), original, source, target, by_bitmap);
        if let Some(before) = &self.manifests {
            stage.recorder = Some(recorder(self.length));
            stage.earlier = before.clone().filter(|_| self.dice.one_in(2));
        }
        let ended = stage.run(|| disks.world.step());
        stage.assert_end(&ended, || disks.world.step());
        if ended.is_ok() {
            // Nothing but what is on the target matters from now on.
            let durable = disks.target.bytes_after_cut(nth);
            assert!(durable == stage.original, "{}, {setup:?}", self.seed);
            self.assert_recorded(&stage, &disks);
        }
        while disks.world.step() {}
        self.source = disks.source.bytes();
        self.target = match self.dice.one_in(2) {
            true => disks.target.bytes_after_cut(nth),
            false => disks.target.bytes(),
        };
        Round { ended, setup, mode }
    }

    /// The manifest, if there is one, tells of the whole disk as it was.
    fn assert_recorded(&mut self, stage: &Stage, disks: &Disks) {
        let (Some(recorder), Some(before)) = (&stage.recorder, &mut self.manifests) else {
            return;
        };
        let made = async {
            match &stage.earlier {
                Some(earlier) => manifest_onto(recorder, earlier).await,
                None => manifest(recorder).await,
            }
        };
        let made = blockyard_simulator::run(made, || disks.world.step());
        let expected = manifest_of(&stage.original);
        assert!(made == Some(expected), "{}, {:?}", self.seed, stage.setup);
        *before = Some(earlier(&stage.original));
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
            perf: BackupPerf {
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

/// Whether what has not changed is read or taken over from the manifest before, the new one tells of all that the target holds.
#[test]
fn each_backup_of_a_chain_has_a_manifest_of_the_whole_disk() {
    let (whole, failed) = (Cell::new(0), Cell::new(0));
    each_seed(
        "blockyard-engine",
        "each_backup_has_a_manifest",
        60,
        |seed| {
            let dice = Seed::new(seed ^ 0xc4a2);
            let length = 512 * (20 + 2048 * dice.below(4) + dice.below(2048));
            let mut chain = Chain::of(seed, dice, length);
            chain.manifests = Some(None);
            for nth in 0..6 {
                let (setup, _) = chain.random_setup(nth);
                let cluster_bytes = *chain.dice.pick(&[65_536, 65_536, 131_072, 2 << 20]);
                let setup = Setup {
                    sync: SyncMode::Incremental,
                    cluster_bytes,
                    perf: BackupPerf {
                        min_cluster_size: cluster_bytes,
                        ..setup.perf
                    },
                    operations: setup.operations / 4,
                    ..setup
                };
                let mut faults = Vec::new();
                if chain.dice.one_in(4) {
                    // The job's policy does not hear of what cannot be read back.
                    let one_in = 3 + chain.dice.below(20);
                    faults.push(Fault::fails(EIO).of(Operation::Write).one_in(one_in));
                }
                let round = chain.backup(nth, setup, BitmapMode::OnSuccess, &faults);
                let count = if round.ended.is_ok() { &whole } else { &failed };
                count.set(count.get() + 1);
            }
        },
    );
    let (whole, failed) = (whole.get(), failed.get());
    assert!(whole > 150 && failed > 20, "{whole} whole, {failed} failed");
}
