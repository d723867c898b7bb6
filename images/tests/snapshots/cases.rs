//! Images and what is done to their snapshots, with what has to come of it.

use std::rc::Rc;

use blockyard_images::Pace;
use blockyard_images::qcow2::snapshot::{
    NewSnapshot, SnapshotChoice, SnapshotError, apply, create, delete,
};
use blockyard_images::qcow2::units::{Geometry, Version};
use blockyard_simulator::{Disk, DiskOptions, World};
use blockyard_storage::Storage;

use crate::content::{Content, content};
use crate::handmade::{Kind, image};
use crate::verdict::ours;

/// What is done. There is one snapshot, with the id "1".
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Deed {
    Create,
    Apply,
    Delete,
}

/// An image and what is done to it.
pub(crate) struct Case {
    pub(crate) told: String,
    pub(crate) image: Vec<u8>,
    pub(crate) deed: Deed,
    pub(crate) disk: DiskOptions,
}

/// Every deed on images of several kinds.
pub(crate) fn cases() -> Vec<Case> {
    use Version::{V2, V3};
    let zeroes = Kind {
        snapshot: true,
        zeroes: true,
        backing_name_bytes: 20,
        ..Kind::default()
    };
    let old = Kind {
        zeroes: false,
        ..zeroes
    };
    let short = Kind {
        short_entry: true,
        ..old
    };
    let geometry = |version, bits, order, extended| {
        Geometry::new(version, bits, order, extended).expect("allowed")
    };
    let images = [
        (geometry(V3, 9, 4, false), zeroes),
        (geometry(V3, 9, 6, false), zeroes),
        (geometry(V3, 12, 2, false), zeroes),
        (geometry(V3, 14, 3, true), zeroes),
        (geometry(V2, 9, 4, false), old),
        (geometry(V2, 12, 4, false), short),
    ];
    let mut all = Vec::new();
    for (geometry, kind) in images {
        for (deed, room) in [Deed::Create, Deed::Apply, Deed::Delete]
            .into_iter()
            .flat_map(|deed| [(deed, 0), (deed, 12)])
            // Large ones take long to compare.
            .filter(|(_, room)| geometry.cluster_bits() == 9 || *room > 0)
        {
            let image = image(geometry, Kind { room, ..kind });
            let disk = DiskOptions {
                length_bytes: image.len() as u64,
                fixed_length: room > 0,
                ..DiskOptions::default()
            };
            all.push(Case {
                told: format!("{deed:?} {geometry:?} {kind:?} room {room}"),
                image,
                deed,
                disk,
            });
        }
    }
    all
}

impl Case {
    /// Does it.
    pub(crate) async fn run(
        &self,
        file: &Rc<dyn Storage>,
        pace: &dyn Pace,
    ) -> Result<(), SnapshotError> {
        let one = SnapshotChoice::IdOrName(b"1".to_vec());
        match self.deed {
            Deed::Create => {
                let new = NewSnapshot {
                    name: b"two".to_vec(),
                    ..NewSnapshot::default()
                };
                create(file, &new, true, pace).await.map(drop)
            }
            Deed::Apply => apply(file, &one, true, pace).await,
            Deed::Delete => delete(file, &one, true, pace).await.map(drop),
        }
    }

    /// A disk of a world with the image.
    pub(crate) fn disk(&self, seed: u64) -> (World, Disk) {
        let world = World::new(seed);
        let disk = world.disk("image", self.disk.clone());
        disk.fill(0, &self.image);
        (world, disk)
    }
}

/// What has to hold of an image at any time.
pub(crate) struct Judge {
    old: Content,
    new: Content,
}

impl Judge {
    pub(crate) fn of(case: &Case) -> Self {
        let old = content(&case.image);
        let disk = |of: usize, now: usize| {
            let held = old.iter().filter(move |((disk, _), _)| *disk == of);
            held.map(move |((_, place), held)| ((now, *place), held.clone()))
        };
        let new = match case.deed {
            Deed::Create => disk(0, 0).chain(disk(1, 1)).chain(disk(0, 2)).collect(),
            Deed::Apply => disk(1, 0).chain(disk(1, 1)).collect(),
            Deed::Delete => disk(0, 0).collect(),
        };
        assert!(old != new, "{}: nothing is to change", case.told);
        Self { old, new }
    }

    /// The image is the old one or the new one, sound and without leaks; whether it is the new one.
    pub(crate) fn look(&self, image: &[u8], told: &str) -> bool {
        let content = content(image);
        let is_new = content == self.new;
        assert!(
            is_new || content == self.old,
            "{told}: the content is another"
        );
        let checked = ours(image).expect("checked");
        let report = checked.report;
        let wrong = report.corruptions + report.check_errors + report.leaks;
        assert_eq!(wrong, 0, "{told}: {:?}", checked.lines);
        is_new
    }
}
