//! The bitmap directory, the tables of bitmaps, and the clusters of their bits.
//!
//! Spec: qcow2, "Bitmaps".

use blockyard_storage::ByteRange;

use super::findings::FindingKind;
use super::observer::CheckStop;
use super::read_ahead::{PIECE_BYTES, ReadAhead};
use super::scan::Scan;
use super::stream::Stream;
use super::sweep::{Stretch, sweep};
use crate::qcow2::layout::bitmaps::{BITMAP_HEAD_BYTES, Bitmap, BitmapCluster, BitmapHead};
use crate::qcow2::layout::entries::word_at;
use crate::qcow2::units::HostOffset;

impl Scan<'_> {
    /// Counts what the bitmaps extension leads to. An extension that is not valid leads nowhere: some program has written
    /// the image without keeping the bitmaps.
    ///
    /// # Errors
    /// When something cannot be read, or the observer cancels.
    pub(super) async fn count_bitmaps(&mut self) -> Result<(), CheckStop> {
        let Some(extension) = self.header.extensions.bitmaps else {
            return Ok(());
        };
        if !self.header.bitmaps_valid() {
            return Ok(());
        }
        self.references.add(
            extension.directory,
            extension.directory_bytes,
            1,
            &mut self.sink,
        );
        let tables = self.read_directory().await?;
        let mut clusters = Vec::new();
        let mut bytes = Vec::new();
        for (table, length_bytes) in tables {
            let references = &mut self.references;
            if references.is_in_file(table, length_bytes, 1, &mut self.sink)
                && let Some((start, end)) = references.clusters_of(table, length_bytes)
            {
                clusters.push(stretch(start, end));
            }
            let range = self.in_file(table, length_bytes);
            bytes.push(stretch(range.offset(), range.end()));
        }
        for run in sweep(clusters) {
            self.references
                .add_clusters(run.start, run.end, run.times, &mut self.sink);
        }
        self.sink.step(0).await?;
        let pieces = sweep(bytes).flat_map(|run| {
            ByteRange::between(run.start, run.end)
                .pieces(PIECE_BYTES)
                .map(move |piece| (piece, run.times))
        });
        let file = self.file.clone();
        let mut reads = ReadAhead::new(&file, pieces);
        while let Some((range, times, buffer)) = reads.next().await? {
            self.look_at_bitmap_table(buffer.as_slice(), times);
            reads.give_back(buffer);
            self.sink.step(range.length()).await?;
        }
        Ok(())
    }

    /// The tables of all bitmaps whose directory entries can be used: place and length in bytes.
    async fn read_directory(&mut self) -> Result<Vec<(HostOffset, u64)>, CheckStop> {
        let Some(extension) = self.header.extensions.bitmaps else {
            return Ok(Vec::new());
        };
        let mut stream = Stream::new(&self.file, extension.directory.0);
        let (mut offset, end) = (
            extension.directory.0,
            extension.directory.plus(extension.directory_bytes).0,
        );
        let (mut tables, mut bitmaps) = (Vec::new(), 0_u32);
        while offset < end {
            let head = BitmapHead::parse(stream.at(offset, BITMAP_HEAD_BYTES).await?);
            let next = offset.checked_add(head.entry_bytes());
            let Some(next) = next.filter(|next| *next <= end) else {
                self.broken_bitmaps("Broken bitmap directory");
                break;
            };
            if bitmaps == extension.bitmaps {
                self.broken_bitmaps("More bitmaps found than specified in header extension");
                break;
            }
            bitmaps += 1;
            // At most as long as the directory, which is below 64 MiB.
            let length = usize::try_from(next - offset).unwrap_or(0);
            let bytes = stream.at(offset, length).await?;
            match Bitmap::parse(bytes, &self.geometry, self.header.guest_bytes()) {
                Ok(bitmap) => tables.push((bitmap.table, bitmap.table_bytes())),
                Err(error) => self.broken_bitmaps(&error.to_string()),
            }
            offset = next;
        }
        if offset == end && bitmaps < extension.bitmaps {
            self.broken_bitmaps("Less bitmaps found than specified in header extension");
        }
        self.sink.step(extension.directory_bytes).await?;
        Ok(tables)
    }

    fn broken_bitmaps(&mut self, text: &str) {
        let text = text.to_owned();
        self.sink.found(FindingKind::Bitmap { text }, 1);
    }

    fn look_at_bitmap_table(&mut self, table: &[u8], times: u64) {
        let cluster_bytes = self.geometry.cluster_bytes();
        for index in 0..table.len() / 8 {
            let entry = word_at(table, index).unwrap_or(0);
            match BitmapCluster::decode(&self.geometry, entry) {
                Some(BitmapCluster::Stored(at)) => {
                    self.references
                        .add(at, cluster_bytes, times, &mut self.sink);
                }
                Some(BitmapCluster::Clear | BitmapCluster::Set) => {}
                None => self
                    .sink
                    .found(FindingKind::BitmapTableEntry { entry }, times),
            }
        }
    }
}

const fn stretch(start: u64, end: u64) -> Stretch {
    Stretch {
        start,
        end,
        active: false,
    }
}
