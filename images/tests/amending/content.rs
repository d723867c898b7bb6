//! What all disks of an image hold: the guest's and those of its internal snapshots, however it is kept.

use std::collections::BTreeMap;

use blockyard_images::qcow2::layout::entries::{Cluster, L1Entry, L2Entry, l2_entry_at};
use blockyard_images::qcow2::layout::fields::u64_at;
use blockyard_images::qcow2::layout::header::{Access, Header};
use blockyard_images::qcow2::layout::snapshots::{SNAPSHOT_HEAD_BYTES, Snapshot, SnapshotHead};

/// What a subcluster of a disk holds. Zeroes are not listed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Held {
    /// Whatever is below.
    Below,
    /// These bytes.
    Bytes(Vec<u8>),
    /// The compressed bytes at this place.
    Compressed(u64, Vec<u8>),
    /// A cluster of the data file, as the entry has it.
    InDataFile(u64),
}

/// By disk (0 is the guest's) and number of the subcluster.
pub(crate) type Content = BTreeMap<(usize, u64), Held>;

/// The content of an image.
pub(crate) fn content(image: &[u8]) -> Content {
    let header = Header::parse(image, Access::Check).expect("it opens");
    let mut content = Content::new();
    let active = (header.l1_table.0, header.l1_entries);
    let inactive = snapshots(image, &header)
        .into_iter()
        .map(|snapshot| (snapshot.l1_table.0, snapshot.l1_entries));
    for (disk, (l1, entries)) in std::iter::once(active).chain(inactive).enumerate() {
        for index in 0..u64::from(entries) {
            let entry = L1Entry(u64_at(image, (l1 + index * 8) as usize));
            read_table(image, &header, entry, index, &mut |subcluster, held| {
                content.insert((disk, subcluster), held);
            });
        }
    }
    content
}

/// The snapshots of an image.
pub(crate) fn snapshots(image: &[u8], header: &Header) -> Vec<Snapshot> {
    let mut at = header.snapshot_table.0 as usize;
    (0..header.snapshots)
        .map(|_| {
            let head = SnapshotHead::parse(&image[at..at + SNAPSHOT_HEAD_BYTES]);
            let length = head.entry_bytes() as usize;
            let snapshot = Snapshot::parse(&image[at..at + length]);
            at = (at + length).next_multiple_of(8);
            snapshot
        })
        .collect()
}

fn read_table(
    image: &[u8],
    header: &Header,
    table: L1Entry,
    l1_index: u64,
    put: &mut dyn FnMut(u64, Held),
) {
    let geometry = header.geometry;
    let subclusters = u64::from(geometry.subclusters());
    let has_backing = header.backing_name.is_some();
    let bytes = table.table().map(|at| &image[at.0 as usize..]);
    for index in 0..geometry.l2_entries() {
        let entry = bytes.map_or(Some(L2Entry::default()), |bytes| {
            l2_entry_at(&geometry, bytes, index as usize)
        });
        let entry = entry.expect("the table is in the file");
        let first = (l1_index * geometry.l2_entries() + index) * subclusters;
        for subcluster in 0..geometry.subclusters() {
            if let Some(held) = held(image, header, entry, subcluster, has_backing) {
                put(first + u64::from(subcluster), held);
            }
        }
    }
}

fn held(
    image: &[u8],
    header: &Header,
    entry: L2Entry,
    subcluster: u32,
    has_backing: bool,
) -> Option<Held> {
    let geometry = header.geometry;
    let below = has_backing.then_some(Held::Below);
    let at = match entry.cluster(&geometry) {
        Cluster::Compressed(place) => {
            let bytes = image.get(place.at.0 as usize..).unwrap_or(&[]);
            let length = (place.length_bytes as usize).min(bytes.len());
            return Some(Held::Compressed(entry.word, bytes[..length].to_vec()));
        }
        _ if geometry.extended_l2() && entry.reads_zero(subcluster) => return None,
        _ if geometry.extended_l2() && !entry.has_data(subcluster) => return below,
        Cluster::Zero { .. } => return None,
        Cluster::Unallocated if header.has_data_file() && entry.is_copied() => 0,
        Cluster::Unallocated => return below,
        Cluster::Allocated { at } => at.0,
    };
    if header.has_data_file() {
        return Some(Held::InDataFile(at));
    }
    let length = geometry.subcluster_bytes() as usize;
    let start = at as usize + subcluster as usize * length;
    let mut bytes = image.get(start..).unwrap_or(&[]).to_vec();
    bytes.resize(length, 0);
    bytes
        .iter()
        .any(|byte| *byte != 0)
        .then_some(Held::Bytes(bytes))
}
