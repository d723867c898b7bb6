//! A bitmap that takes the place of another one in an image that a crash has left between the two.

use std::sync::PoisonError;

use blockyard_storage::ByteRange;

use crate::bitmap::{Bitmap, NodeBitmaps, next_place};
use crate::node::dirty_map::DirtyMap;

/// Which bitmap takes the place of which.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Succession<'a> {
    /// Name of the new one.
    pub(crate) bitmap: &'a str,
    /// Name of the older one, if there was one.
    pub(crate) previous: Option<&'a str>,
    /// Bytes of a granule of the new one.
    pub(crate) granularity_bytes: u64,
    /// The older one stays.
    pub(crate) keep_previous: bool,
}

impl NodeBitmaps {
    /// The new bitmap is there, if it was not already, and the older one is not any more. The new one says at least what has changed
    /// since it began: what the older one says, which began before it; everything, if nothing is known.
    pub(crate) fn succeed(&self, how: Succession<'_>, length_bytes: u64) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        let place_of = |all: &[Bitmap], name: &str| all.iter().position(|one| one.name() == name);
        let previous = how.previous.and_then(|name| place_of(&all, name));
        if place_of(&all, how.bitmap).is_none() {
            let known = previous.and_then(|place| all.get(place));
            let known = known.filter(|one| !one.is_inconsistent());
            let mut map = DirtyMap::exactly(length_bytes, how.granularity_bytes);
            match known {
                Some(known) => map.merge(known.map()),
                None => {
                    map.mark(ByteRange::new(0, length_bytes));
                }
            }
            let mut new = Bitmap::loaded(how.bitmap.as_bytes().to_vec(), map, true, false);
            new.set_place(next_place(&all));
            all.push(new);
        }
        if let Some(place) = previous.filter(|_| !how.keep_previous) {
            all.remove(place);
        }
        self.tell(&all);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bitmap::Need;

    const LENGTH: u64 = 1 << 20;

    fn with(name: &str, is_inconsistent: bool) -> NodeBitmaps {
        let bitmaps = NodeBitmaps::default();
        let mut map = DirtyMap::exactly(LENGTH, 4096);
        map.mark(ByteRange::new(8192, 1));
        let one = Bitmap::loaded(name.as_bytes().to_vec(), map, true, is_inconsistent);
        bitmaps.take_in(vec![one], false).expect("a new name");
        bitmaps
    }

    fn how(previous: Option<&str>, keep_previous: bool) -> Succession<'_> {
        Succession {
            bitmap: "new",
            previous,
            granularity_bytes: 65_536,
            keep_previous,
        }
    }

    fn is(bitmaps: &NodeBitmaps, expected: &[(&str, u64)]) {
        let mut shown: Vec<_> = bitmaps
            .views()
            .into_iter()
            .map(|view| {
                assert!(view.persistent && view.recording && !view.inconsistent);
                (view.name.expect("a name"), view.count_bytes)
            })
            .collect();
        shown.sort();
        let expected: Vec<_> = expected
            .iter()
            .map(|(name, bytes)| ((*name).to_owned(), *bytes))
            .collect();
        assert_eq!(shown, expected);
    }

    #[test]
    fn it_says_what_the_older_one_said_and_however_often_it_comes() {
        let bitmaps = with("old", false);
        for _ in 0..2 {
            bitmaps.succeed(how(Some("old"), false), LENGTH);
            is(&bitmaps, &[("new", 65_536)]);
        }
        assert!(bitmaps.record());
        let kept = with("old", false);
        for _ in 0..2 {
            kept.succeed(how(Some("old"), true), LENGTH);
            is(&kept, &[("new", 65_536), ("old", 4096)]);
        }
    }

    #[test]
    fn where_nothing_is_known_everything_may_have_changed() {
        for (bitmaps, previous) in [
            (with("old", true), Some("old")),
            (NodeBitmaps::default(), Some("old")),
            (NodeBitmaps::default(), None),
        ] {
            bitmaps.succeed(how(previous, false), LENGTH);
            is(&bitmaps, &[("new", LENGTH)]);
        }
    }

    /// The image had changed over before the crash, and says more exactly what has changed.
    #[test]
    fn one_that_is_there_stays_as_it_is() {
        let bitmaps = with("new", false);
        bitmaps.succeed(how(Some("old"), false), LENGTH);
        is(&bitmaps, &[("new", 4096)]);
        let changed = bitmaps.with("new", Need::Change, |one| one.map().granularity_bytes());
        assert_eq!(changed.expect("free"), 4096);
    }
}
