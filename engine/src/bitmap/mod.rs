//! [`NodeBitmaps`]: the dirty bitmaps of one node: which parts of its disk were changed since when.
//!
//! A change is marked once it has ended, however it ended, in every bitmap that records then. So whoever looks at a bitmap, clears
//! it or has it replaced while a write is on its way finds that write marked afterwards: no change is ever missed.

mod activity;
mod anew;
mod frozen;
mod one;
mod persistent;
mod request;
mod succession;
mod written_down;

use std::cmp::Reverse;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blockyard_storage::ByteRange;

use crate::error::EngineError;
use crate::node::dirty_map::DirtyMap;

pub(crate) use activity::Regions;
pub(crate) use anew::LOOK_PAUSE;
pub use frozen::FrozenBitmap;
pub(crate) use frozen::JobEnd;
pub use one::Bitmap;
pub(crate) use persistent::BitmapInMemory;
pub use request::{BitmapChange, BitmapName};
pub(crate) use succession::Succession;
pub(crate) use written_down::{decode, encode};

/// Longest name of a bitmap in bytes.
const NAME_BYTES_MAX: usize = 1023;

/// The bitmaps of one node, shared between the thread that changes the node and the manager. The lock is held for as long as it takes
/// to change some bits.
#[derive(Debug, Default)]
pub struct NodeBitmaps {
    /// Whether any of them records: what every write looks at.
    any_records: AtomicBool,
    /// Those that an image keeps have been loaded.
    are_loaded: AtomicBool,
    /// What was recorded of them could not be read then.
    are_unread: AtomicBool,
    /// Oldest first.
    all: Mutex<Vec<Bitmap>>,
    /// What makes those that an image keeps good after a crash.
    activity: activity::Activity,
}

/// What one bitmap was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// It may be anything but in use, and is looked at.
    Read,
    /// It is changed as well.
    Change,
    /// It goes: also if nothing can be said of what is in it.
    Remove,
    /// It is looked at as it is, whoever uses it.
    Show,
    /// It is switched on or off, which needs no image that can be written.
    Switch,
}

impl NodeBitmaps {
    /// Something within `range` of a disk that is this long now, in bytes, has changed, or may have. All bitmaps that record have it
    /// afterwards, in memory.
    pub fn mark(&self, range: ByteRange, length_bytes: u64) {
        for bitmap in self.lock().iter_mut() {
            // An image's own file becomes longer as it is written.
            if bitmap.map().length_bytes() < length_bytes {
                bitmap.resize(length_bytes);
            }
            bitmap.mark(range);
        }
    }

    /// Whether a change has to be marked.
    pub fn record(&self) -> bool {
        self.any_records.load(Ordering::Acquire)
    }

    /// Whether a new one may have this name.
    ///
    /// # Errors
    /// In QEMU's words: it is taken, or none.
    pub(crate) fn check_new(&self, name: &str) -> Result<(), EngineError> {
        check_new(&self.lock(), name)
    }

    /// Takes a new one in.
    ///
    /// # Errors
    /// In QEMU's words: its name is taken, or none.
    pub fn add(&self, mut bitmap: Bitmap) -> Result<(), EngineError> {
        let mut all = self.lock();
        check_new(&all, bitmap.name())?;
        bitmap.set_place(next_place(&all));
        all.push(bitmap);
        self.tell(&all);
        Ok(())
    }

    /// Takes one away whatever state it is in: its removal was looked at before.
    ///
    /// # Errors
    /// In QEMU's words: it is not there.
    pub(crate) fn take_out(&self, name: &str) -> Result<Bitmap, EngineError> {
        let mut all = self.lock();
        let place = all.iter().position(|bitmap| bitmap.name() == name);
        let removed = all.remove(place.ok_or_else(|| not_found(name))?);
        self.tell(&all);
        Ok(removed)
    }

    /// Does something with one.
    ///
    /// # Errors
    /// In QEMU's words: it is not there, or cannot be used for what is needed.
    pub(crate) fn with<T>(
        &self,
        name: &str,
        need: Need,
        act: impl FnOnce(&mut Bitmap) -> T,
    ) -> Result<T, EngineError> {
        let mut all = self.lock();
        let found = all.iter_mut().find(|bitmap| bitmap.name() == name);
        let bitmap = found.ok_or_else(|| not_found(name))?;
        bitmap.check(need)?;
        let done = act(bitmap);
        self.tell(&all);
        Ok(done)
    }

    /// Keeps others from changing or removing one, as long as the guard is there; what is recorded goes on. Whether it can be
    /// used has been looked at before: whoever shows one twice holds it twice.
    ///
    /// # Errors
    /// In QEMU's words: it is not there.
    pub(crate) fn hold(self: &Arc<Self>, name: &str) -> Result<HeldBitmap, EngineError> {
        self.with(name, Need::Show, Bitmap::hold)?;
        Ok(HeldBitmap {
            bitmaps: Arc::clone(self),
            name: name.to_owned(),
        })
    }

    /// That nobody uses any of them.
    ///
    /// # Errors
    /// In QEMU's words.
    pub(crate) fn check_idle(&self) -> Result<(), EngineError> {
        let all = self.lock();
        all.iter().try_for_each(Bitmap::check_idle)
    }

    /// Whether one of this name is there.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.lock().iter().any(|bitmap| bitmap.name() == name)
    }

    /// The disk has another length.
    pub(crate) fn resize(&self, length_bytes: u64) {
        for bitmap in self.lock().iter_mut() {
            bitmap.resize(length_bytes);
        }
    }

    /// What queries show of all of them, newest first.
    pub(crate) fn views(&self) -> Vec<crate::reply::BitmapView> {
        let mut views: Vec<_> = self.lock().iter().flat_map(Bitmap::views).collect();
        views.sort_by_key(|(place, _)| Reverse(*place));
        views.into_iter().map(|(_, view)| view).collect()
    }

    fn tell(&self, all: &[Bitmap]) {
        let any = all.iter().any(Bitmap::listens);
        self.any_records.store(any, Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Bitmap>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A bitmap that somebody looks at for a while, and which is in use for everybody else.
#[derive(Debug)]
pub struct HeldBitmap {
    bitmaps: Arc<NodeBitmaps>,
    name: String,
}

impl HeldBitmap {
    /// Its name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Looks at what has changed as of now; `None` only if it was lost, which is a bug.
    pub(crate) fn look<T>(&self, look: impl FnOnce(&DirtyMap) -> T) -> Option<T> {
        let all = self.bitmaps.lock();
        let found = all.iter().find(|bitmap| bitmap.name() == self.name);
        found.map(|bitmap| look(bitmap.map()))
    }
}

impl Drop for HeldBitmap {
    fn drop(&mut self) {
        let mut all = self.bitmaps.lock();
        let found = all.iter_mut().find(|bitmap| bitmap.name() == self.name);
        if let Some(bitmap) = found {
            bitmap.let_go();
        }
    }
}

/// A place behind all that are there.
fn next_place(all: &[Bitmap]) -> u64 {
    let last = all.iter().map(Bitmap::last_place).max();
    last.map_or(0, |last| last.saturating_add(1))
}

fn check_new(all: &[Bitmap], name: &str) -> Result<(), EngineError> {
    let refused = |text: String| Err(EngineError::generic(text));
    if all.iter().any(|other| other.name() == name) {
        return refused(format!("Bitmap already exists: {name}"));
    }
    if name.len() > NAME_BYTES_MAX {
        return refused(format!("Bitmap name too long: {name}"));
    }
    Ok(())
}

fn not_found(name: &str) -> EngineError {
    EngineError::generic(format!("Dirty bitmap '{name}' not found"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTH: u64 = 1 << 20;

    fn bitmap(name: &str, granularity_bytes: u64) -> Bitmap {
        Bitmap::new(name.to_owned(), LENGTH, granularity_bytes)
    }

    fn count(bitmaps: &NodeBitmaps, name: &str) -> u64 {
        let count = bitmaps.with(name, Need::Read, |one| one.count_bytes());
        count.expect("it is there")
    }

    #[test]
    fn those_that_record_are_marked() {
        let bitmaps = NodeBitmaps::default();
        let write = ByteRange::new(70_000, 1);
        bitmaps.mark(write, LENGTH);
        bitmaps.add(bitmap("a", 65_536)).expect("added");
        bitmaps.add(bitmap("b", 512)).expect("added");
        assert!(bitmaps.record());
        bitmaps.mark(write, LENGTH);
        assert_eq!((count(&bitmaps, "a"), count(&bitmaps, "b")), (65_536, 512));
        let off = |one: &mut Bitmap| one.set_recording(false);
        bitmaps.with("a", Need::Switch, off).expect("switched");
        bitmaps.mark(ByteRange::new(0, LENGTH), LENGTH);
        assert_eq!(
            (count(&bitmaps, "a"), count(&bitmaps, "b")),
            (65_536, LENGTH)
        );
        bitmaps.with("b", Need::Switch, off).expect("switched");
        assert!(!bitmaps.record(), "nobody records");
        bitmaps.take_out("a").expect("removed");
        let names: Vec<_> = bitmaps.views().into_iter().map(|view| view.name).collect();
        assert_eq!(names, [Some("b".to_owned())]);
    }

    /// What is written while a transaction is on its way stays marked, whatever becomes of its actions.
    #[test]
    fn what_a_transaction_has_changed_is_taken_back_and_no_mark_is_lost() {
        let bitmaps = NodeBitmaps::default();
        bitmaps.add(bitmap("a", 512)).expect("added");
        let write = |granule: u64| bitmaps.mark(ByteRange::new(granule * 512, 1), LENGTH);
        let act = |act: fn(&mut Bitmap)| bitmaps.with("a", Need::Show, act).expect("there");
        let is = |granules: &[u64]| {
            let all: Vec<u64> = granules.iter().map(|granule| granule * 512).collect();
            let count = count(&bitmaps, "a");
            assert_eq!(count, 512 * all.len() as u64);
            let marked = |at: &u64| {
                let mut map = DirtyMap::exactly(LENGTH, 512);
                map.mark(ByteRange::new(*at, 1));
                bitmaps.with("a", Need::Show, |one| {
                    map.merge(one.map());
                    count_of(&map) == count
                })
            };
            assert!(all.iter().all(|at| marked(at).expect("there")));
        };
        write(1);
        act(|one| {
            one.keep_content();
            one.clear();
        });
        write(2);
        act(|one| {
            one.keep_content();
            let mut other = DirtyMap::exactly(LENGTH, 512);
            other.mark(ByteRange::new(7 * 512, 1));
            one.merge(&other);
        });
        write(3);
        is(&[2, 3, 7]);
        act(Bitmap::restore);
        is(&[2, 3]);
        act(Bitmap::restore);
        is(&[1, 2, 3]);
        act(|one| {
            one.keep_content();
            one.clear();
            one.forget();
        });
        is(&[]);
    }

    fn count_of(map: &DirtyMap) -> u64 {
        let mut one = bitmap("count", 512);
        one.merge(map);
        one.count_bytes()
    }

    #[test]
    fn names_are_refused_in_the_reference_order() {
        let bitmaps = NodeBitmaps::default();
        let refused = |name: &str| {
            let refused = bitmaps.add(bitmap(name, 512));
            refused.expect_err("refused").to_string()
        };
        let long = "x".repeat(NAME_BYTES_MAX + 1);
        assert_eq!(refused(&long), format!("Bitmap name too long: {long}"));
        bitmaps.add(bitmap(&long[1..], 512)).expect("added");
        let text = format!("Bitmap already exists: {}", &long[1..]);
        assert_eq!(refused(&long[1..]), text);
        let gone = bitmaps.take_out("a").expect_err("not there").to_string();
        assert_eq!(gone, "Dirty bitmap 'a' not found");
    }

    #[test]
    fn a_disk_that_grows_is_marked_to_its_end() {
        let bitmaps = NodeBitmaps::default();
        bitmaps.add(bitmap("a", 65_536)).expect("added");
        bitmaps.mark(ByteRange::new(LENGTH - 1, 1), LENGTH);
        bitmaps.mark(ByteRange::new(LENGTH, 512), LENGTH + 512);
        assert_eq!(count(&bitmaps, "a"), 2 * 65_536);
        bitmaps.resize(LENGTH - 65_536);
        assert_eq!(count(&bitmaps, "a"), 0);
    }
}
