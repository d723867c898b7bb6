//! [`FrozenBitmap`]: a bitmap that a job goes by. What changes meanwhile is kept apart, and in the end one becomes of both.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::bitmap::{Bitmap, Need, NodeBitmaps, next_place};
use crate::error::EngineError;
use crate::node::dirty_map::DirtyMap;
use crate::request::BitmapMode;

/// A bitmap that a job goes by. Whoever forgets to [settle](Self::settle) it has failed, and nothing that has changed is forgotten.
#[derive(Debug)]
pub struct FrozenBitmap {
    bitmaps: Arc<NodeBitmaps>,
    name: String,
    mode: BitmapMode,
    map: DirtyMap,
    is_settled: AtomicBool,
}

/// How a job has ended.
#[derive(Clone, Copy, Debug)]
pub(crate) enum JobEnd<'a> {
    /// Everything that it was about is durable.
    Success,
    /// Of what it was about, this is missing.
    Part(&'a DirtyMap),
    /// Nothing of what has changed so far is missing, what has changed since the job began included, and nobody writes.
    Equal,
    /// It has failed, and nobody knows how far it came.
    Failure,
}

/// What becomes of a bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// What has changed since the job began is all that is in it.
    Replaced,
    /// The same, and what the job has not copied.
    ReplacedButForRest,
    /// Nothing is in it any more.
    Emptied,
    /// What has changed since the job began comes to what was in it.
    Kept,
}

impl Fate {
    fn of(mode: BitmapMode, end: JobEnd<'_>) -> Self {
        match (mode, end) {
            (BitmapMode::OnSuccess | BitmapMode::Always, JobEnd::Success) => Fate::Replaced,
            (BitmapMode::OnSuccess | BitmapMode::Always, JobEnd::Equal) => Fate::Emptied,
            (BitmapMode::Always, JobEnd::Part(_)) => Fate::ReplacedButForRest,
            (BitmapMode::Never, _)
            | (BitmapMode::OnSuccess, JobEnd::Part(_))
            | (_, JobEnd::Failure) => Fate::Kept,
        }
    }
}

impl NodeBitmaps {
    /// Freezes one for a job, which does with it what `mode` says in the end. From now on what changes is kept apart.
    ///
    /// # Errors
    /// In QEMU's words: it is not there, or cannot be used for that.
    pub(crate) fn freeze(
        self: &Arc<Self>,
        name: &str,
        mode: BitmapMode,
    ) -> Result<FrozenBitmap, EngineError> {
        self.check(name, need(mode))?;
        let mut all = self.lock();
        let place = next_place(&all);
        let found = all.iter_mut().find(|bitmap| bitmap.name() == name);
        let bitmap = found.ok_or_else(|| super::not_found(name))?;
        bitmap.check(need(mode))?;
        Ok(FrozenBitmap {
            bitmaps: Arc::clone(self),
            name: name.to_owned(),
            mode,
            map: bitmap.freeze(place),
            is_settled: AtomicBool::new(false),
        })
    }

    /// Whether one can be used in a way.
    ///
    /// # Errors
    /// In QEMU's words.
    pub(crate) fn check(&self, name: &str, need: Need) -> Result<(), EngineError> {
        self.with(name, need, |_| ())
    }
}

/// What a job needs of a bitmap.
const fn need(mode: BitmapMode) -> Need {
    match mode {
        BitmapMode::Never => Need::Read,
        BitmapMode::OnSuccess | BitmapMode::Always => Need::Change,
    }
}

impl FrozenBitmap {
    /// What had changed when it was frozen.
    pub(crate) fn map(&self) -> &DirtyMap {
        &self.map
    }

    /// What is done with it in the end.
    pub(crate) fn mode(&self) -> BitmapMode {
        self.mode
    }

    /// Makes one of both again. Only the first call counts.
    pub(crate) fn settle(&self, end: JobEnd<'_>) {
        if self.is_settled.swap(true, Ordering::AcqRel) {
            return;
        }
        let fate = Fate::of(self.mode, end);
        let mut all = self.bitmaps.lock();
        if let Some(bitmap) = all.iter_mut().find(|bitmap| bitmap.name() == self.name) {
            bitmap.thaw(fate != Fate::Kept);
            match (fate, end) {
                (Fate::ReplacedButForRest, JobEnd::Part(missing)) => bitmap.merge(missing),
                (Fate::Emptied, _) => bitmap.clear(),
                _ => {}
            }
        }
        // What has been replaced is as new as what came in its place.
        all.sort_by_key(Bitmap::place);
        self.bitmaps.tell(&all);
    }
}

impl Drop for FrozenBitmap {
    fn drop(&mut self) {
        self.settle(JobEnd::Failure);
    }
}

#[cfg(test)]
mod tests {
    use blockyard_storage::ByteRange;

    use super::*;

    const LENGTH: u64 = 8 * 4096;

    fn granule(index: u64) -> ByteRange {
        ByteRange::new(index * 4096, 4096)
    }

    fn with_bitmaps(names: &[&str]) -> Arc<NodeBitmaps> {
        let bitmaps = Arc::new(NodeBitmaps::default());
        for name in names {
            let bitmap = Bitmap::new((*name).to_owned(), LENGTH, 4096);
            bitmaps.add(bitmap).expect("added");
        }
        bitmaps
    }

    fn dirty(bitmaps: &NodeBitmaps, name: &str) -> Vec<u64> {
        let map = bitmaps.with(name, Need::Show, |one| one.map().clone());
        let map = map.expect("it is there");
        let is_dirty = |index: &u64| map.run_in(granule(*index)).is_some();
        (0..8).filter(is_dirty).collect()
    }

    /// The bitmap has granules 0 to 3 when the job begins, 6 changes meanwhile, and 3 changes again; 0 is never copied.
    fn outcome(mode: BitmapMode, end: Option<JobEnd<'_>>) -> Vec<u64> {
        let bitmaps = with_bitmaps(&["b"]);
        bitmaps.mark(ByteRange::new(0, 4 * 4096), LENGTH);
        let frozen = bitmaps.freeze("b", mode).expect("frozen");
        bitmaps.mark(granule(6), LENGTH);
        bitmaps.mark(granule(3), LENGTH);
        assert_eq!(dirty(&bitmaps, "b"), [0, 1, 2, 3], "frozen");
        match end {
            Some(end) => frozen.settle(end),
            None => drop(frozen),
        }
        dirty(&bitmaps, "b")
    }

    #[test]
    fn each_mode_has_its_ends() {
        let mut missing = DirtyMap::exactly(LENGTH, 4096);
        missing.mark(granule(0));
        let all = [0, 1, 2, 3, 6];
        let ends = [
            (JobEnd::Success, [&[3, 6][..], &[3, 6], &all]),
            (JobEnd::Part(&missing), [&all, &[0, 3, 6], &all]),
            (JobEnd::Equal, [&[], &[], &all]),
            (JobEnd::Failure, [&all, &all, &all]),
        ];
        let modes = [BitmapMode::OnSuccess, BitmapMode::Always, BitmapMode::Never];
        for (end, expected) in ends {
            for (mode, expected) in modes.into_iter().zip(expected) {
                assert_eq!(outcome(mode, Some(end)), expected, "{mode:?}, {end:?}");
            }
        }
        for mode in modes {
            assert_eq!(outcome(mode, None), all, "{mode:?}, never settled");
        }
    }

    #[test]
    fn what_is_missing_may_have_other_granules() {
        let mut missing = DirtyMap::exactly(LENGTH, 16384);
        missing.mark(granule(5));
        let end = JobEnd::Part(&missing);
        assert_eq!(outcome(BitmapMode::Always, Some(end)), [3, 4, 5, 6, 7]);
    }

    #[test]
    fn a_frozen_one_is_in_use_until_the_first_end() {
        let bitmaps = with_bitmaps(&["b"]);
        let frozen = bitmaps.freeze("b", BitmapMode::Never).expect("frozen");
        for need in [Need::Read, Need::Change, Need::Remove, Need::Switch] {
            assert!(bitmaps.check("b", need).is_err(), "{need:?}");
        }
        assert!(bitmaps.freeze("b", BitmapMode::Never).is_err());
        frozen.settle(JobEnd::Success);
        bitmaps.mark(granule(2), LENGTH);
        let again = bitmaps.freeze("b", BitmapMode::OnSuccess).expect("frozen");
        // It is over for the first one.
        frozen.settle(JobEnd::Failure);
        drop(frozen);
        assert!(bitmaps.check("b", Need::Read).is_err());
        again.settle(JobEnd::Success);
        assert_eq!(dirty(&bitmaps, "b"), [0_u64; 0]);
    }

    #[test]
    fn what_is_replaced_is_as_new_as_what_comes() {
        let bitmaps = with_bitmaps(&["a", "b"]);
        let names = || -> Vec<_> {
            let views = bitmaps.views().into_iter();
            views.map(|view| view.name.unwrap_or_default()).collect()
        };
        let off = |one: &mut Bitmap| one.set_recording(false);
        bitmaps.with("a", Need::Switch, off).expect("switched");
        let frozen = bitmaps.freeze("a", BitmapMode::Always).expect("frozen");
        let new = Bitmap::new("c".to_owned(), LENGTH, 512);
        bitmaps.add(new).expect("added");
        assert_eq!(names(), ["c", "", "b", "a"]);
        let recording: Vec<_> = bitmaps.views().iter().map(|view| view.recording).collect();
        assert_eq!(recording, [true, false, true, false]);
        frozen.settle(JobEnd::Success);
        assert_eq!(names(), ["c", "a", "b"]);
        let frozen = bitmaps.freeze("b", BitmapMode::OnSuccess).expect("frozen");
        assert_eq!(names(), ["", "c", "a", "b"]);
        drop(frozen);
        assert_eq!(names(), ["c", "a", "b"], "kept, and where it was");
    }
}
