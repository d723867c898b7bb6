//! Where the tables of an image are: within the file, and apart from each other.
//!
//! QEMU looks at neither when it opens an image. A table behind the end of the file would read as zeroes, which is a disk
//! without its content; and of two tables in one place each write to one destroys the other.

use blockyard_storage::ByteRange;

use crate::error::ImageError;
use crate::qcow2::layout::bitmaps::Bitmap;
use crate::qcow2::layout::header::Header;
use crate::qcow2::units::{Geometry, HostOffset};

/// Tables and the clusters they take.
pub(super) struct Places<'a> {
    geometry: Geometry,
    file_bytes: u64,
    places: Vec<Place<'a>>,
}

/// What is somewhere.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Table<'a> {
    /// The first cluster.
    Header,
    /// The refcount table.
    Refcounts,
    /// The L1 table in use.
    ActiveL1,
    /// The table of internal snapshots.
    Snapshots,
    /// The directory of bitmaps.
    BitmapDirectory,
    /// The table of the bitmap with this name.
    Bitmap(&'a [u8]),
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place<'a> {
    /// Whole clusters.
    clusters: ByteRange,
    table: Table<'a>,
    length_bytes: u64,
}

impl<'a> Places<'a> {
    /// Of the tables that the header itself describes.
    pub(super) fn new(header: &Header, file_bytes: u64) -> Self {
        let mut places = Self {
            geometry: header.geometry,
            file_bytes,
            places: Vec::new(),
        };
        places.add(Table::Header, HostOffset(0), 1);
        let refcounts = header.refcount_table_bytes();
        places.add(Table::Refcounts, header.refcount_table, refcounts);
        places.add(Table::ActiveL1, header.l1_table, header.l1_table_bytes());
        places
    }

    /// Adds the table of internal snapshots, as long as it is.
    pub(super) fn add_snapshots(&mut self, header: &Header, length_bytes: u64) {
        self.add(Table::Snapshots, header.snapshot_table, length_bytes);
    }

    /// Adds the bitmap directory and the tables of these bitmaps.
    pub(super) fn add_bitmaps(&mut self, header: &Header, bitmaps: &'a [Bitmap]) {
        if let Some(extension) = header.extensions.bitmaps {
            let length_bytes = extension.directory_bytes;
            self.add(Table::BitmapDirectory, extension.directory, length_bytes);
        }
        for bitmap in bitmaps {
            let table = Table::Bitmap(&bitmap.name);
            self.add(table, bitmap.table, bitmap.table_bytes());
        }
    }

    /// Refuses an L1 table that cannot be read: nothing can be read of the image then.
    ///
    /// # Errors
    /// [`ImageError::Refused`] with the text that QEMU has for other bad offsets of the same table.
    pub(super) fn check_readable(&self) -> Result<(), ImageError> {
        let Some(l1) = self.places.iter().find(|p| p.table == Table::ActiveL1) else {
            return Ok(());
        };
        self.check_in_file(l1)?;
        if l1.clusters.offset() == 0 {
            return Err(overlap(l1, &Table::Header));
        }
        Ok(())
    }

    /// Refuses tables that are not in the file, or where another table is.
    ///
    /// # Errors
    /// As [`check_readable`](Self::check_readable).
    pub(super) fn check_all(&mut self) -> Result<(), ImageError> {
        for place in &self.places {
            self.check_in_file(place)?;
        }
        // Where any two overlap, so do two neighbours in the order of their first bytes.
        self.places.sort_unstable();
        for pair in self.places.windows(2) {
            let [first, second] = pair else { continue };
            if first.clusters.overlaps(&second.clusters) {
                let (kept, refused) = match first.table < second.table {
                    true => (first, second),
                    false => (second, first),
                };
                return Err(overlap(refused, &kept.table));
            }
        }
        Ok(())
    }

    fn add(&mut self, table: Table<'a>, at: HostOffset, length_bytes: u64) {
        if length_bytes != 0 {
            let range = ByteRange::new(at.0, length_bytes);
            self.places.push(Place {
                clusters: range.align_outward(self.geometry.cluster_bytes()),
                table,
                length_bytes,
            });
        }
    }

    /// The last cluster of the file may be cut off anywhere: it goes on with zeroes.
    fn check_in_file(&self, place: &Place<'_>) -> Result<(), ImageError> {
        let file = ByteRange::new(0, self.file_bytes).align_outward(self.geometry.cluster_bytes());
        if file.contains(&place.clusters) {
            return Ok(());
        }
        Err(place.table.refused(format!(
            "{} bytes at {:#x} are not in the file of {} bytes",
            place.length_bytes,
            place.clusters.offset(),
            self.file_bytes
        )))
    }
}

impl Table<'_> {
    fn name(&self) -> String {
        match self {
            Self::Header => "the header".to_owned(),
            Self::Refcounts => "the refcount table".to_owned(),
            Self::ActiveL1 => "the L1 table".to_owned(),
            Self::Snapshots => "the snapshot table".to_owned(),
            Self::BitmapDirectory => "the bitmap directory".to_owned(),
            Self::Bitmap(name) => format!("the table of bitmap '{}'", lossy(name)),
        }
    }

    fn refused(&self, detail: String) -> ImageError {
        let text = match self {
            Self::Header => "qcow2 header too short".to_owned(),
            Self::Refcounts => "Reference count table offset invalid".to_owned(),
            Self::ActiveL1 => "Active L1 table offset invalid".to_owned(),
            Self::Snapshots => "Snapshot table offset invalid".to_owned(),
            Self::BitmapDirectory => "bitmaps_ext: invalid bitmap directory offset".to_owned(),
            Self::Bitmap(name) => {
                format!("Bitmap '{}' doesn't satisfy the constraints", lossy(name))
            }
        };
        ImageError::refused_because(text, detail)
    }
}

fn overlap(refused: &Place<'_>, kept: &Table<'_>) -> ImageError {
    refused.table.refused(format!(
        "{} bytes at {:#x} overlap {}",
        refused.length_bytes,
        refused.clusters.offset(),
        kept.name()
    ))
}

fn lossy(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}
