//! How many clusters of an image's file are in use, by its stored counts.

use crate::error::ImageError;
use crate::qcow2::image::Qcow2;
use crate::qcow2::layout::refcounts::{TABLE_OFFSET_MASK, refcount_at};
use crate::qcow2::units::HostOffset;

/// Bytes of metadata read at once.
const READ_BYTES: u64 = 64 << 10;

impl Qcow2 {
    /// Whether at least `at_least` clusters of the file are in use, as its stored reference counts say. Reads no further than
    /// that is known; what this image has not written back yet is left out.
    ///
    /// # Errors
    /// What the storage says.
    pub async fn has_clusters(&self, at_least: u64) -> Result<bool, ImageError> {
        let state = &self.state;
        let geometry = &state.geometry;
        let clusters = geometry.clusters_for(state.file.facts().length_bytes).0;
        let per_block = geometry.refcounts_per_block();
        let (table, table_bytes) = {
            let header = state.header.borrow();
            (header.refcount_table, header.refcount_table_bytes())
        };
        let entries = clusters.div_ceil(per_block).min(table_bytes / 8);
        let mut in_use = 0;
        for first in (0..entries).step_by((READ_BYTES / 8) as usize) {
            let count = (READ_BYTES / 8).min(entries - first);
            let words = self.words_at(table.plus(first * 8), count).await?;
            for (index, word) in (first..).zip(words) {
                let block = HostOffset(word & TABLE_OFFSET_MASK);
                if block.0 != 0 {
                    let counted = (clusters - index * per_block).min(per_block);
                    in_use += self.in_use_of(block, counted).await?;
                }
                if in_use >= at_least {
                    return Ok(true);
                }
            }
        }
        Ok(in_use >= at_least)
    }

    async fn words_at(&self, at: HostOffset, count: u64) -> Result<Vec<u64>, ImageError> {
        let length = usize::try_from(count * 8).unwrap_or(0);
        let bytes = self.state.read_metadata(at, length).await?;
        let (words, _) = bytes.as_chunks::<8>();
        Ok(words.iter().map(|word| u64::from_be_bytes(*word)).collect())
    }

    /// How many of the first `counted` counts of a block are not zero.
    async fn in_use_of(&self, block: HostOffset, counted: u64) -> Result<u64, ImageError> {
        let geometry = &self.state.geometry;
        let bytes = (counted << geometry.refcount_order()).div_ceil(8);
        let mut in_use = 0;
        let mut rest = counted;
        for skip in (0..bytes).step_by(READ_BYTES as usize) {
            let length = READ_BYTES.min(bytes - skip);
            let length = usize::try_from(length).unwrap_or(0);
            let piece = self.state.read_metadata(block.plus(skip), length).await?;
            let counts = ((length as u64 * 8) >> geometry.refcount_order()).min(rest);
            rest -= counts;
            in_use += (0..usize::try_from(counts).unwrap_or(0))
                .filter(|index| refcount_at(geometry, &piece, *index).unwrap_or(0) != 0)
                .count() as u64;
        }
        Ok(in_use)
    }
}
