//! Bitmaps that an image keeps: loaded once when its node is opened, wherever it moves, and stored when it is not written any more.

use std::ops::Range;
use std::sync::atomic::Ordering;

use blockyard_images::qcow2::bitmaps::{BitSink, BitSource, BitmapSize};
use blockyard_storage::ByteRange;

use crate::bitmap::{Bitmap, Need, NodeBitmaps, check_new, next_place};
use crate::error::EngineError;
use crate::node::dirty_map::DirtyMap;

/// What an image is to keep of a bitmap.
#[derive(Clone, Debug)]
pub(crate) struct BitmapInMemory {
    /// Its name there.
    pub(crate) name_in_image: Vec<u8>,
    /// What has changed.
    pub(crate) map: DirtyMap,
    /// Whether it records.
    pub(crate) records: bool,
}

impl NodeBitmaps {
    /// Whether those that the image keeps are here already.
    pub(crate) fn are_loaded(&self) -> bool {
        self.are_loaded.load(Ordering::Acquire)
    }

    /// Whether what was recorded of those that the image keeps could not be read: they are inconsistent until it is.
    pub(crate) fn are_unread(&self) -> bool {
        self.are_unread.load(Ordering::Acquire)
    }

    /// Takes in what the image keeps, in the order of its directory, in the place of what was taken in before while it was
    /// unread; `are_unread`: it is so yet.
    ///
    /// # Errors
    /// In QEMU's words: a name has been taken meanwhile.
    pub(crate) fn take_in(&self, loaded: Vec<Bitmap>, are_unread: bool) -> Result<(), EngineError> {
        let mut all = self.lock();
        // Nobody uses what is inconsistent.
        let stays = |one: &Bitmap| one.name_in_image().is_none() || !one.is_inconsistent();
        for bitmap in &loaded {
            let mut staying = all.iter().filter(|one| stays(one));
            if staying.any(|one| one.name() == bitmap.name()) {
                return check_new(&all, bitmap.name());
            }
        }
        all.retain(stays);
        let places = next_place(&all)..;
        for (mut bitmap, place) in loaded.into_iter().zip(places) {
            bitmap.set_place(place);
            all.push(bitmap);
        }
        self.are_loaded.store(true, Ordering::Release);
        self.are_unread.store(are_unread, Ordering::Release);
        self.tell(&all);
        Ok(())
    }

    /// The image has what it keeps, and somebody else may change that: it is loaded anew once it is ours again.
    pub(crate) fn release_kept(&self) {
        let mut all = self.lock();
        all.retain(|one| one.name_in_image().is_none());
        self.are_loaded.store(false, Ordering::Release);
        self.are_unread.store(false, Ordering::Release);
        self.tell(&all);
    }

    /// Somebody else may have written to the disk, which has this length now: what no image keeps and records takes all of it as
    /// changed. What was switched off says what had changed before.
    pub(crate) fn miss(&self, length_bytes: u64) {
        for bitmap in self.lock().iter_mut() {
            if bitmap.name_in_image().is_none() && bitmap.records() {
                bitmap.resize(length_bytes);
                bitmap.mark(ByteRange::new(0, length_bytes));
            }
        }
    }

    /// Whether the image that keeps some of them is for reading only.
    pub(crate) fn set_read_only(&self, read_only: bool) {
        for bitmap in self.lock().iter_mut() {
            bitmap.set_read_only(read_only);
        }
    }

    /// What the image is to keep, newest first.
    pub(crate) fn to_store(&self) -> Vec<BitmapInMemory> {
        let all = self.lock();
        all.iter().rev().filter_map(Bitmap::to_store).collect()
    }

    /// Lengths of the names of those that an image keeps, or is going to.
    pub(crate) fn kept_names_bytes(&self) -> Vec<usize> {
        let all = self.lock();
        let names = all.iter().filter_map(Bitmap::name_in_image);
        names.map(<[u8]>::len).collect()
    }

    /// What the image keeps once it may have changed, as far as its room goes; nothing if it stores none of them anew.
    pub(crate) fn sizes_to_keep(&self) -> Vec<BitmapSize> {
        let all = self.lock();
        let kept: Vec<&Bitmap> = all
            .iter()
            .filter(|one| one.name_in_image().is_some())
            .collect();
        if kept.iter().all(|one| one.is_inconsistent()) {
            return Vec::new();
        }
        let size = |one: &&Bitmap| BitmapSize {
            granularity_bytes: one.map().granularity_bytes(),
            name_bytes: one.name_in_image().map_or(0, |name| name.len() as u64),
        };
        kept.iter().map(size).collect()
    }

    /// Why the disk cannot get another length, in QEMU's words: an image keeps a bitmap that cannot be changed with it.
    pub(crate) fn resize_refusal(&self) -> Option<String> {
        let all = self.lock();
        let mut kept = all.iter().filter(|one| one.name_in_image().is_some());
        let refused = kept.find_map(|one| one.check(Need::Change).err());
        refused.map(|error| error.to_string())
    }
}

impl BitSink for DirtyMap {
    fn set(&mut self, bits: Range<u64>) {
        let granularity = self.granularity_bytes();
        let start = bits.start.saturating_mul(granularity);
        self.mark(ByteRange::between(
            start,
            bits.end.saturating_mul(granularity).max(start),
        ));
    }

    fn put(&mut self, first: u64, bytes: &[u8]) {
        self.mark_bits(first, bytes);
    }

    fn memory_bytes(&self) -> u64 {
        DirtyMap::memory_bytes(self)
    }
}

impl BitSource for DirtyMap {
    fn next_set(&self, from: u64) -> Option<u64> {
        self.first_from(from)
    }

    fn copy_to(&self, first: u64, bytes: &mut [u8]) {
        self.bits_into(first, bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTH: u64 = 1 << 20;

    fn loaded(name: &[u8], records: bool, is_inconsistent: bool) -> Bitmap {
        let mut map = DirtyMap::exactly(LENGTH, 4096);
        map.mark(ByteRange::new(0, 1));
        Bitmap::loaded(name.to_vec(), map, records, is_inconsistent)
    }

    fn stored(bitmaps: &NodeBitmaps) -> Vec<(Vec<u8>, u64, bool)> {
        let all = bitmaps.to_store().into_iter();
        all.map(|one| (one.name_in_image, one.map.dirty_bytes(), one.records))
            .collect()
    }

    #[test]
    fn an_image_gets_what_it_keeps_and_may_be_changed() {
        let bitmaps = NodeBitmaps::default();
        assert!(!bitmaps.are_loaded());
        // No text, and one that ends before its end.
        let names: [&[u8]; 3] = [b"on", b"o\xff", b"broken\0more"];
        let taken_in = bitmaps.take_in(
            vec![
                loaded(names[0], true, false),
                loaded(names[1], false, false),
                loaded(names[2], true, true),
            ],
            false,
        );
        taken_in.expect("new names");
        assert!(bitmaps.are_loaded() && bitmaps.record());
        bitmaps
            .add(Bitmap::new("mine".to_owned(), LENGTH, 4096))
            .expect("a new name");
        bitmaps.mark(ByteRange::new(8192, 4096), LENGTH);
        let names_shown: Vec<_> = bitmaps.views().into_iter().map(|view| view.name).collect();
        let shown = ["mine", "broken", "o\u{fffd}", "on"].map(|name| Some(name.to_owned()));
        assert_eq!(names_shown, shown);
        assert_eq!(
            stored(&bitmaps),
            [
                (names[1].to_vec(), 4096, false),
                (names[0].to_vec(), 8192, true)
            ],
            "newest first, without what cannot be relied on"
        );
        assert_eq!(bitmaps.kept_names_bytes(), names.map(<[u8]>::len));
        let refusal = bitmaps.resize_refusal().expect("refused");
        assert_eq!(
            refusal,
            "Bitmap 'broken' is inconsistent and cannot be used"
        );
        bitmaps.take_out("broken").expect("removed");
        assert_eq!(bitmaps.resize_refusal(), None);
        bitmaps.set_read_only(true);
        assert!(stored(&bitmaps).is_empty(), "it has them already");
        let refusal = bitmaps.resize_refusal().expect("refused");
        assert_eq!(refusal, "Bitmap 'on' is readonly and cannot be modified");
        bitmaps.take_out("mine").expect("not the image's");
        bitmaps.set_read_only(false);
        assert_eq!(stored(&bitmaps).len(), 2);
    }

    #[test]
    fn what_an_image_keeps_goes_with_it_and_memory_knows_that_it_has_missed_something() {
        let bitmaps = NodeBitmaps::default();
        let taken_in = bitmaps.take_in(vec![loaded(b"kept", true, false)], false);
        taken_in.expect("a new name");
        for (name, records) in [("on", true), ("off", false)] {
            let mut bitmap = Bitmap::new(name.to_owned(), LENGTH, 4096);
            bitmap.set_recording(records);
            bitmaps.add(bitmap).expect("a new name");
        }
        bitmaps.mark(ByteRange::new(0, 1), LENGTH);
        bitmaps.release_kept();
        assert!(!bitmaps.are_loaded() && bitmaps.kept_names_bytes().is_empty());
        let refused = bitmaps.take_in(vec![loaded(b"off", true, false)], false);
        let refused = refused.expect_err("one is here");
        assert_eq!(refused.to_string(), "Bitmap already exists: off");
        assert!(!bitmaps.are_loaded());
        let mut other = DirtyMap::exactly(2 * LENGTH, 4096);
        other.mark(ByteRange::new(LENGTH, 4096));
        let kept = Bitmap::loaded(b"kept".to_vec(), other, true, false);
        bitmaps.take_in(vec![kept], false).expect("it was released");
        bitmaps.miss(2 * LENGTH);
        let mut shown: Vec<_> = bitmaps
            .views()
            .into_iter()
            .map(|view| (view.name.expect("named"), view.count_bytes))
            .collect();
        shown.sort();
        let expected = [("kept", 4096), ("off", 0), ("on", 2 * LENGTH)];
        assert_eq!(
            shown,
            expected.map(|(name, count)| (name.to_owned(), count))
        );
        let held = bitmaps.check_idle();
        held.expect("nobody uses them");
        let bitmaps = std::sync::Arc::new(bitmaps);
        let held = bitmaps.hold("on").expect("there");
        bitmaps.check_idle().expect_err("one is in use");
        drop(held);
        bitmaps.check_idle().expect("not any more");
    }

    #[test]
    fn what_was_unread_takes_its_place_later() {
        let bitmaps = NodeBitmaps::default();
        let unread = vec![loaded(b"a", true, true), loaded(b"b", false, true)];
        bitmaps.take_in(unread, true).expect("new names");
        bitmaps.set_read_only(true);
        assert!(bitmaps.are_unread() && !bitmaps.record());
        bitmaps
            .add(Bitmap::new("c".to_owned(), LENGTH, 4096))
            .expect("a new name");
        let read = || vec![loaded(b"b", false, false), loaded(b"c", true, false)];
        let refused = bitmaps.take_in(read(), false).expect_err("there is one");
        assert_eq!(refused.to_string(), "Bitmap already exists: c");
        assert!(bitmaps.are_unread() && bitmaps.views().len() == 3);
        bitmaps.take_out("c").expect("removed");
        bitmaps.take_in(read(), false).expect("nobody has it");
        bitmaps.set_read_only(false);
        assert!(!bitmaps.are_unread() && bitmaps.record());
        let names: Vec<_> = stored(&bitmaps).into_iter().map(|one| one.0).collect();
        assert_eq!(names, [b"c", b"b"]);
    }
}
