//! The room that is told before a change is enough for it, and telling changes nothing.

use std::rc::Rc;

use blockyard_images::pace::Unwatched;
use blockyard_images::qcow2::snapshot::{NewSnapshot, SnapshotChange, SnapshotChoice, room};
use blockyard_simulator::{World, run};
use blockyard_storage::Storage;

use crate::cases::{Case, Deed, cases};

fn told(case: &Case, world: &World, file: &Rc<dyn Storage>) -> u64 {
    let one = SnapshotChoice::IdOrName(b"1".to_vec());
    let new = NewSnapshot {
        name: b"two".to_vec(),
        ..NewSnapshot::default()
    };
    let change = match case.deed {
        Deed::Create => SnapshotChange::Create(&new),
        Deed::Apply => SnapshotChange::Apply(&one),
        Deed::Delete => SnapshotChange::Delete(&one),
    };
    let room = run(room(file, &change), || world.step());
    let room = room.expect("it ends").expect("told");
    assert_eq!((room.data_bytes, room.bitmaps_bytes), (0, 0));
    room.metadata_bytes
}

/// Bytes that are not zero any more, or were behind the end, in whole clusters.
fn taken(before: &[u8], after: &[u8], cluster_bytes: usize) -> u64 {
    let is_empty =
        |bytes: Option<&[u8]>| bytes.is_none_or(|bytes| bytes.iter().all(|byte| *byte == 0));
    let clusters = after.chunks(cluster_bytes).enumerate();
    let new = clusters.filter(|(index, cluster)| {
        let old = before.get(index * cluster_bytes..);
        let old = old.map(|old| &old[..cluster_bytes.min(old.len())]);
        !is_empty(Some(cluster)) && is_empty(old)
    });
    (new.count() * cluster_bytes) as u64
}

#[test]
fn no_change_takes_more_than_was_told() {
    for case in cases() {
        let (world, disk) = case.disk(1);
        let file: Rc<dyn Storage> = disk.open();
        let bound = told(&case, &world, &file);
        assert!(disk.bytes() == case.image, "{}", case.told);
        let done = run(case.run(&file, &Unwatched), || world.step());
        done.expect("it ends").expect("done");
        let after = disk.bytes();
        let cluster_bytes = 1 << u32::from_be_bytes([after[20], after[21], after[22], after[23]]);
        let taken = taken(&case.image, &after, cluster_bytes);
        assert!(
            taken > 0 && taken <= bound,
            "{taken} of {bound}: {}",
            case.told
        );
        let grown = after.len().saturating_sub(case.image.len()) as u64;
        assert!(grown <= bound, "{grown} of {bound}: {}", case.told);
    }
}
