//! Mirrors by bitmap beside writers, one after the other onto the same disk.

use super::super::integrity::{earlier, recorder};
use super::*;
use crate::bitmap::{Bitmap, NodeBitmaps};
use crate::node::recording_node::RecordingNode;
use crate::request::BitmapMode;

/// Puts data on a disk, and leaves holes where there is none.
pub(super) fn fill(disk: &Disk, bytes: &[u8]) {
    for (index, block) in bytes.chunks(512).enumerate() {
        if block.iter().any(|byte| *byte != 0) {
            disk.fill(index as u64 * 512, block);
        }
    }
}

impl Disks {
    /// A mirror by bitmap.
    fn stage_by_bitmap(&self, setup: Setup, bitmaps: &Arc<NodeBitmaps>, mode: BitmapMode) -> Stage {
        let source = self.node(&self.source, "source");
        let (source, target) = (
            RecordingNode::new(source, Arc::clone(bitmaps), Spawner::new(drop)),
            self.node(&self.target, "target"),
        );
        let source = Rc::new(source);
        let stage = Stage::new(setup, &self.bytes, source, target, self.granularity_bytes);
        let frozen = bitmaps.freeze("b", mode).expect("frozen");
        Stage {
            bitmap: Some(Arc::new(frozen)),
            ..stage
        }
    }
}

/// One mirror after the other brings the same target up to date, however each ends, and whenever the target's host loses its power.
#[test]
fn a_mirror_by_bitmap_misses_nothing_whatever_came_before() {
    let (equal, early) = (Cell::new(0), Cell::new(0));
    each_seed("blockyard-engine", "a_mirror_by_bitmap", 200, |seed| {
        let dice = Seed::new(seed ^ 0xb17);
        let disks = Disks::random(seed);
        let (mut source, mut target) = (disks.source.bytes(), disks.target.bytes());
        let length = source.len() as u64;
        let bitmaps = Arc::new(NodeBitmaps::default());
        let granularity = *dice.pick(&[512, 4096, 65536]);
        let bitmap = Bitmap::new("b".to_owned(), length, granularity);
        bitmaps.add(bitmap).expect("added");
        bitmaps.mark(ByteRange::new(0, length), length);
        for round in 0..8 {
            let seed = seed * 100 + round;
            let (sync, mode) = *dice.pick(&[
                (SyncMode::Incremental, BitmapMode::OnSuccess),
                (SyncMode::Bitmap, BitmapMode::Always),
                (SyncMode::Bitmap, BitmapMode::Always),
                (SyncMode::Bitmap, BitmapMode::Never),
                (SyncMode::Full, BitmapMode::Always),
                (SyncMode::Full, BitmapMode::OnSuccess),
            ]);
            let disks = Disks::holding(seed, Some((&source, &target)));
            if dice.one_in(2) {
                let errno = *dice.pick(&[EIO, ENOSPC]);
                let fault = Fault::fails(errno).one_in(5 + dice.below(40));
                disks.world.add_fault(fault);
            }
            let setup = Setup::random(seed);
            let end = match setup.end {
                End::Complete => End::LetGo,
                other => other,
            };
            let operations = 1 + setup.operations / 4;
            let setup = Setup {
                end,
                operations,
                ready_for: setup.ready_for / 4,
                ..setup
            };
            let stage = disks.stage_by_bitmap(setup, &bitmaps, mode);
            // That the target is equal if it ends well is looked at in there.
            let ended = disks.run(&stage, sync).0.expect("never stopped");
            stage.assert_end(&ended, || disks.world.step());
            let count = if ended.is_ok() { &equal } else { &early };
            count.set(count.get() + 1);
            while disks.world.step() {}
            source = disks.source.bytes();
            target = match dice.one_in(2) {
                true => disks.target.bytes_after_cut(round),
                false => disks.target.bytes(),
            };
        }
    });
    let (equal, early) = (equal.get(), early.get());
    assert!(equal > 300 && early > 200, "{equal}, {early}");
}

/// Its manifest tells of the whole disk at the end, whether the rest is read or taken over, and whatever writers do in any block.
#[test]
fn a_mirror_by_bitmap_has_a_manifest_of_the_whole_disk() {
    let (ended_well, onto) = (Cell::new(0), Cell::new(0));
    each_seed("blockyard-engine", "a_mirror_by_bitmap_has", 120, |seed| {
        let dice = Seed::new(seed ^ 0x3a_11fe);
        let length = 512 * (2048 * dice.below(4) + 20 + dice.below(2048)) as usize;
        let bytes = |share: u64| -> Vec<u8> {
            let runs = (0..length).step_by(512 * 16);
            let run = |at: usize| {
                let byte = if dice.one_in(share) {
                    dice.any() as u8
                } else {
                    0
                };
                vec![byte; (length - at).min(512 * 16)]
            };
            runs.flat_map(run).collect()
        };
        let before = bytes(2);
        let (mut source, granularity) = (before.clone(), *dice.pick(&[4096, 65536, 1 << 20]));
        let bitmaps = Arc::new(NodeBitmaps::default());
        let bitmap = Bitmap::new("b".to_owned(), length as u64, granularity);
        bitmaps.add(bitmap).expect("added");
        for _ in 0..dice.below(4) {
            let at = dice.below(length as u64 / 512) as usize * 512;
            source[at..at + 512].fill(dice.any() as u8);
            bitmaps.mark(ByteRange::new(at as u64, 512), length as u64);
        }
        let mut disks = Disks::holding(seed, Some((&source, &before)));
        disks.granularity_bytes = *dice.pick(&[65536, 65536, 1 << 20]);
        let setup = Setup {
            operations: 1 + dice.below(8) as usize,
            ready_for: dice.below(60),
            ..Setup::random(seed)
        };
        let mut stage = disks.stage_by_bitmap(setup, &bitmaps, BitmapMode::OnSuccess);
        stage.recorder = Some(recorder(length as u64));
        stage.earlier = dice.one_in(2).then(|| earlier(&before));
        let is_onto = stage.earlier.is_some();
        // That the manifest is that of the target is looked at in there.
        let ended = disks.run(&stage, SyncMode::Incremental).0.expect("it ends");
        stage.assert_end(&ended, || disks.world.step());
        ended_well.set(ended_well.get() + usize::from(ended.is_ok()));
        onto.set(onto.get() + usize::from(ended.is_ok() && is_onto));
    });
    let counted = (ended_well.get(), onto.get());
    assert!(counted.0 > 60 && counted.1 > 25, "{counted:?}");
}
