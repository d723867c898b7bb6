//! [`guest_bytes`]: the guest's disk as it stands in a file, read by the test itself.

use blockyard_images::qcow2::compressed::ClusterCodec;
use blockyard_images::qcow2::layout::entries::{
    COMPRESSED, CompressedAt, L1Entry, OFFSET_MASK, l2_entry_at, word_at,
};
use blockyard_images::qcow2::layout::header::{Access, Header};

use crate::recount::bytes;

/// What a guest sees of `length` bytes that the L1 table at `l1` leads to, over `below`.
pub(crate) fn guest_bytes_of(
    file: &[u8],
    data_file: Option<&[u8]>,
    below: &[u8],
    l1: (u64, u64),
    length: u64,
) -> Vec<u8> {
    let header = Header::parse(file, Access::Check).expect("an image");
    let geometry = header.geometry;
    let cluster_bytes = geometry.cluster_bytes();
    let mut disk = bytes(below, 0, length.next_multiple_of(cluster_bytes));
    for (index, cluster) in disk.chunks_mut(cluster_bytes as usize).enumerate() {
        let index = index as u64;
        let l1_index = index / geometry.l2_entries();
        if l1_index >= l1.1 {
            continue;
        }
        let word = bytes(file, l1.0 + l1_index * 8, 8);
        let Some(table) = L1Entry(word_at(&word, 0).expect("there")).table() else {
            continue;
        };
        let table = bytes(file, table.0, cluster_bytes);
        let place = (index % geometry.l2_entries()) as usize;
        let entry = l2_entry_at(&geometry, &table, place).expect("there");
        if entry.word & COMPRESSED != 0 {
            let place = CompressedAt::decode(&geometry, entry.word);
            let stream = bytes(file, place.at.0, place.length_bytes);
            ClusterCodec::new()
                .decompress(header.compression, &stream, cluster)
                .expect("a stream");
            continue;
        }
        let at = entry.word & OFFSET_MASK;
        let has_place = at != 0 || data_file.is_some() && entry.is_copied();
        let held = bytes(data_file.unwrap_or(file), at, cluster_bytes);
        let piece_bytes = geometry.subcluster_bytes() as usize;
        for (sub, piece) in cluster.chunks_mut(piece_bytes).enumerate() {
            let (data, zero) = match geometry.extended_l2() {
                true => (entry.has_data(sub as u32), entry.reads_zero(sub as u32)),
                false => (true, entry.word & 1 != 0),
            };
            if zero {
                piece.fill(0);
            } else if data && has_place {
                piece.copy_from_slice(&held[sub * piece_bytes..(sub + 1) * piece_bytes]);
            }
        }
    }
    disk.truncate(length as usize);
    disk
}

/// What the guest sees of an image over `below`.
pub(crate) fn guest_bytes(file: &[u8], data_file: Option<&[u8]>, below: &[u8]) -> Vec<u8> {
    let header = Header::parse(file, Access::Check).expect("an image");
    let l1 = (header.l1_table.0, u64::from(header.l1_entries));
    guest_bytes_of(file, data_file, below, l1, header.guest_bytes())
}
