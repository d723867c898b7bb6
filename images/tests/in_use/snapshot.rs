//! [`take`]: an internal snapshot, taken by the test itself of an image that nobody uses.

use blockyard_images::qcow2::layout::entries::{
    COMPRESSED, CompressedAt, L1Entry, OFFSET_MASK, l2_entry_at, put_l2_entry, word_at,
};
use blockyard_images::qcow2::layout::header::{Access, Header};
use blockyard_images::qcow2::layout::refcounts::{TABLE_OFFSET_MASK, put_refcount, refcount_at};
use blockyard_images::qcow2::units::Geometry;

use crate::recount::bytes;

struct Taking {
    file: Vec<u8>,
    header: Header,
    geometry: Geometry,
}

/// The image in `file` with a snapshot of what it holds, its first; `None` where its reference counts have no room for it.
pub(crate) fn take(file: &[u8]) -> Option<Vec<u8>> {
    let header = Header::parse(file, Access::Check).expect("an image");
    let mut taking = Taking {
        file: file.to_vec(),
        geometry: header.geometry,
        header,
    };
    if taking.header.has_data_file() || taking.header.snapshots > 0 {
        return None;
    }
    taking.share_tables()?;
    let cluster_bytes = taking.geometry.cluster_bytes();
    let end = taking.file.len().next_multiple_of(cluster_bytes as usize);
    taking.file.resize(end, 0);
    let l1 = bytes(
        &taking.file,
        taking.header.l1_table.0,
        taking.header.l1_table_bytes(),
    );
    let l1_at = taking.append(&l1)?;
    let mut entry = Vec::new();
    entry.extend(l1_at.to_be_bytes());
    entry.extend(taking.header.l1_entries.to_be_bytes());
    entry.extend(1_u16.to_be_bytes());
    entry.extend(1_u16.to_be_bytes());
    entry.extend([0; 20]);
    entry.extend(16_u32.to_be_bytes());
    entry.extend(0_u64.to_be_bytes());
    entry.extend(taking.header.size_bytes.to_be_bytes());
    entry.extend(b"1s");
    let table_at = taking.append(&entry)?;
    taking.file[60..64].copy_from_slice(&1_u32.to_be_bytes());
    taking.file[64..72].copy_from_slice(&table_at.to_be_bytes());
    Some(taking.file)
}

impl Taking {
    /// Puts bytes into new clusters at the end of the file.
    fn append(&mut self, bytes: &[u8]) -> Option<u64> {
        let cluster_bytes = self.geometry.cluster_bytes() as usize;
        let at = self.file.len();
        let length = bytes.len().next_multiple_of(cluster_bytes);
        for cluster in at / cluster_bytes..(at + length) / cluster_bytes {
            self.raise(cluster as u64)?;
        }
        self.file.extend(bytes);
        self.file.resize(at + length, 0);
        Some(at as u64)
    }

    fn raise(&mut self, cluster: u64) -> Option<()> {
        let per_block = self.geometry.refcounts_per_block();
        let index = cluster / per_block;
        if index * 8 >= self.header.refcount_table_bytes() {
            return None;
        }
        let entry = bytes(&self.file, self.header.refcount_table.0 + index * 8, 8);
        let block = word_at(&entry, 0)? & TABLE_OFFSET_MASK;
        if block == 0 {
            return None;
        }
        let length = self.geometry.cluster_bytes() as usize;
        let block = self.file.get_mut(block as usize..)?.get_mut(..length)?;
        let place = (cluster % per_block) as usize;
        let count = refcount_at(&self.geometry, block, place)?;
        put_refcount(&self.geometry, block, place, count + 1).then_some(())
    }

    /// Everything that the L1 table leads to has one reference more, and nobody has it alone.
    fn share_tables(&mut self) -> Option<()> {
        let bits = self.geometry.cluster_bits();
        for index in 0..u64::from(self.header.l1_entries) {
            let place = self.header.l1_table.0 + index * 8;
            let entry = L1Entry(word_at(&bytes(&self.file, place, 8), 0)?);
            let Some(table) = entry.table() else {
                continue;
            };
            self.raise(table.0 >> bits)?;
            let shared = entry.with_copied(false).0.to_be_bytes();
            self.file[place as usize..][..8].copy_from_slice(&shared);
            let mut slice = bytes(&self.file, table.0, self.geometry.cluster_bytes());
            for index in 0..self.geometry.l2_entries() as usize {
                let entry = l2_entry_at(&self.geometry, &slice, index)?;
                if entry.word & COMPRESSED != 0 {
                    let place = CompressedAt::decode(&self.geometry, entry.word);
                    let last = place.at.0 + place.length_bytes - 1;
                    for cluster in place.at.0 >> bits..=last >> bits {
                        self.raise(cluster)?;
                    }
                } else if entry.word & OFFSET_MASK != 0 {
                    self.raise((entry.word & OFFSET_MASK) >> bits)?;
                    let shared = entry.with_copied(false);
                    assert!(put_l2_entry(&self.geometry, &mut slice, index, shared));
                }
            }
            self.file[table.0 as usize..][..slice.len()].copy_from_slice(&slice);
        }
        Some(())
    }
}
