//! Which snapshot is meant, and what a new one is called.

use crate::error::ImageError;
use crate::qcow2::layout::snapshots::Snapshot;
use crate::qcow2::open::OpenedImage;

/// A snapshot that is to be made.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NewSnapshot {
    /// Any bytes but NUL; others may have the same name.
    pub name: Vec<u8>,
    /// When it is made, in seconds since 1970.
    pub date_seconds: u32,
    /// And nanoseconds.
    pub date_nanoseconds: u32,
    /// How long the guest has been running, in nanoseconds.
    pub vm_clock_nanoseconds: u64,
}

/// Which snapshot is meant. Names need not be unique: the first in the table is it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SnapshotChoice {
    /// The one with this id or, if there is none, this name.
    IdOrName(Vec<u8>),
    /// The one with this name.
    Name(Vec<u8>),
    /// The one with this id.
    Id(Vec<u8>),
    /// The one with this id, if it has this name.
    Both {
        /// Its id.
        id: Vec<u8>,
        /// Its name.
        name: Vec<u8>,
    },
}

impl SnapshotChoice {
    /// The one in this image, and its place in the table.
    pub(super) fn find_in<'a>(
        &self,
        image: &'a OpenedImage,
    ) -> Result<(usize, &'a Snapshot), ImageError> {
        let place = self.find(&image.snapshots);
        let found = place.and_then(|place| Some((place, image.snapshots.get(place)?)));
        found.ok_or_else(|| ImageError::refused("snapshot not found"))
    }

    /// Where it is in the table.
    pub fn find(&self, snapshots: &[Snapshot]) -> Option<usize> {
        let position = |is_it: &dyn Fn(&Snapshot) -> bool| snapshots.iter().position(is_it);
        match self {
            Self::IdOrName(either) => position(&|snapshot| snapshot.id == *either)
                .or_else(|| position(&|snapshot| snapshot.name == *either)),
            Self::Name(name) => position(&|snapshot| snapshot.name == *name),
            Self::Id(id) => position(&|snapshot| snapshot.id == *id),
            Self::Both { id, name } => {
                position(&|snapshot| snapshot.id == *id && snapshot.name == *name)
            }
        }
    }
}

impl NewSnapshot {
    /// The entry, apart from its L1 table: the id is one more than the largest that is a number, as QEMU chooses it.
    ///
    /// # Errors
    /// When the name cannot be one.
    pub(super) fn entry(
        &self,
        others: &[Snapshot],
        disk_bytes: u64,
    ) -> Result<Snapshot, ImageError> {
        if self.name.contains(&0) {
            return Err(ImageError::refused_because(
                "Invalid argument",
                "the name of a snapshot has no NUL in it",
            ));
        }
        Ok(Snapshot {
            id: next_id(others),
            name: self.name.clone(),
            date_seconds: self.date_seconds,
            date_nanoseconds: self.date_nanoseconds,
            vm_clock_nanoseconds: self.vm_clock_nanoseconds,
            disk_bytes: Some(disk_bytes),
            ..Snapshot::default()
        })
    }
}

fn next_id(others: &[Snapshot]) -> Vec<u8> {
    let largest = others.iter().map(|snapshot| number(&snapshot.id)).max();
    let next = largest.unwrap_or(0).checked_add(1);
    let id = |number: u64| number.to_string().into_bytes();
    match next {
        Some(next) => id(next),
        // Each of them has one id, so that one of so many is free.
        None => (1..=others.len() as u64 + 1)
            .map(id)
            .find(|id| others.iter().all(|snapshot| snapshot.id != *id))
            .unwrap_or_default(),
    }
}

/// The number that an id begins with; 0: none.
fn number(id: &[u8]) -> u64 {
    id.iter()
        .take_while(|byte| byte.is_ascii_digit())
        .fold(0, |number: u64, digit| {
            number
                .saturating_mul(10)
                .saturating_add(u64::from(digit - b'0'))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshots(all: &[(&str, &str)]) -> Vec<Snapshot> {
        all.iter()
            .map(|(id, name)| Snapshot {
                id: id.as_bytes().to_vec(),
                name: name.as_bytes().to_vec(),
                ..Snapshot::default()
            })
            .collect()
    }

    #[test]
    fn ids_are_found_before_names() {
        let all = snapshots(&[("1", "2"), ("2", "one"), ("3", "one"), ("4", "")]);
        let bytes = |text: &str| text.as_bytes().to_vec();
        for (choice, found) in [
            (SnapshotChoice::IdOrName(bytes("2")), Some(1)),
            (SnapshotChoice::IdOrName(bytes("one")), Some(1)),
            (SnapshotChoice::IdOrName(bytes("two")), None),
            (SnapshotChoice::Name(bytes("2")), Some(0)),
            (SnapshotChoice::Name(bytes("3")), None),
            (SnapshotChoice::Name(bytes("")), Some(3)),
            (SnapshotChoice::Id(bytes("3")), Some(2)),
            (SnapshotChoice::Id(bytes("one")), None),
        ] {
            assert_eq!(choice.find(&all), found, "{choice:?}");
        }
        let both = |id, name| SnapshotChoice::Both {
            id: bytes(id),
            name: bytes(name),
        };
        assert_eq!(both("3", "one").find(&all), Some(2));
        assert_eq!(both("1", "one").find(&all), None);
    }

    #[test]
    fn ids_go_on_behind_the_largest() {
        for (ids, next) in [
            (&[][..], "1"),
            (&[("1", ""), ("7", ""), ("3", "")], "8"),
            (&[("x", ""), ("12x", "")], "13"),
            (&[("18446744073709551614", "")], "18446744073709551615"),
            (&[("18446744073709551615", ""), ("1", ""), ("2", "")], "3"),
            (&[("99999999999999999999999", "")], "1"),
        ] {
            assert_eq!(next_id(&snapshots(ids)), next.as_bytes(), "{ids:?}");
        }
    }

    #[test]
    fn names_have_no_end_in_them() {
        let new = NewSnapshot {
            name: b"a\0b".to_vec(),
            ..NewSnapshot::default()
        };
        let refused = new.entry(&[], 512).expect_err("it would be another name");
        assert_eq!(refused.to_string(), "Invalid argument");
    }
}
