//! Opening: from the bytes of a file that may come from anybody to a description that can be relied on.
//!
//! Every check is made before the value it is about is used, in QEMU's order, and refuses with QEMU's text. What is allocated
//! follows what the file can hold: tables are read in pieces of at most 1 MiB and only as far as the file goes; the largest of
//! all images take about 200 MiB (L1 table 32, refcount table 8, snapshots and bitmaps 64 each and their names). Reads follow
//! the bytes of the tables, never the number of their entries.
//!
//! Beyond QEMU, tables must lie within the file and, where the image is to be written, apart from each other (`places`). Who
//! only reads needs a good L1 table and nothing else; what is wrong besides is told in [`OpenedImage::findings`]. L2 tables and
//! refcount blocks are not looked at here: that would cost time that follows the disk. They are checked when they are used.
//!
//! Spec: qcow2, "Header", "Snapshots", "Bitmaps".

use std::collections::HashSet;

use blockyard_storage::{ByteRange, Storage};

use crate::error::ImageError;
use crate::qcow2::layout::bitmaps::{BITMAP_HEAD_BYTES, Bitmap, BitmapHead};
use crate::qcow2::layout::extensions::BitmapsExtension;
use crate::qcow2::layout::fields::until_nul;
use crate::qcow2::layout::header::{Access, Header};
use crate::qcow2::layout::snapshots::{
    SNAPSHOT_ALIGNMENT_BYTES, SNAPSHOT_HEAD_BYTES, SNAPSHOT_TABLE_BYTES_MAX, Snapshot, SnapshotHead,
};
use crate::qcow2::places::Places;
use crate::qcow2::reading::{Entries, read_bytes, read_words};
pub use crate::qcow2::stale_bitmaps::{BeforeWriting, DiskChange, Overwrite};
use crate::qcow2::units::Version;

/// Bytes that are read first: enough for most headers.
const START_BYTES: usize = 64 << 10;

const HEADER_UNREADABLE: &str = "Could not read qcow2 header";

/// An image whose metadata has been read and checked, as far as opening does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OpenedImage {
    /// What it was opened for.
    pub access: Access,
    /// The header.
    pub header: Header,
    /// The L1 table, as it stands in the file; empty with [`Access::Metadata`].
    pub l1_table: Vec<u64>,
    /// The refcount table, as it stands in the file; empty unless for writing or checking.
    pub refcount_table: Vec<u64>,
    /// The internal snapshots, in the order of their table; empty with [`Access::Check`], which reads the table itself.
    pub snapshots: Vec<Snapshot>,
    /// The table of internal snapshots; empty if there are none.
    pub snapshot_table: ByteRange,
    /// The bitmaps, in the order of their directory; none if the image says that they are not valid.
    pub bitmaps: Vec<Bitmap>,
    /// What is wrong but does not matter for this access, as sentences without full stop.
    pub findings: Vec<String>,
}

/// Reads and checks what an image says of itself.
///
/// # Errors
/// [`ImageError::Refused`] with QEMU's texts, [`ImageError::Unreadable`] where the storage fails.
///
/// # Cancel safety
/// Nothing is changed, so it may be dropped at any time.
pub async fn read_image(file: &dyn Storage, access: Access) -> Result<OpenedImage, ImageError> {
    let header = read_header(file, access).await?;
    let mut image = OpenedImage {
        access,
        header,
        l1_table: Vec::new(),
        refcount_table: Vec::new(),
        snapshots: Vec::new(),
        snapshot_table: ByteRange::default(),
        bitmaps: Vec::new(),
        findings: Vec::new(),
    };
    image.refuse_encryption()?;
    let file_bytes = file.facts().length_bytes;
    if reads_guest_data(access) {
        Places::new(&image.header, file_bytes).check_readable()?;
    }
    if access == Access::ReadWrite {
        Places::new(&image.header, file_bytes).check_all()?;
    }
    image.read_tables(file).await?;
    if access != Access::Check {
        image.read_snapshots(file).await?;
    }
    image.read_bitmaps(file).await?;
    image.check_places(file_bytes)?;
    Ok(image)
}

impl OpenedImage {
    /// Marks the bitmaps that `change` makes stale and clears what the header may not promise any more. What is returned must
    /// be durable in the image file before the guest's disk is changed; asked again, there is nothing left to do.
    ///
    /// # Errors
    /// None for an image that was opened here.
    pub fn mark_before(&mut self, change: DiskChange) -> Result<BeforeWriting, ImageError> {
        let changes = BeforeWriting::mark(&self.header, &mut self.bitmaps, change)?;
        self.header.autoclear &= !changes.clear_autoclear;
        Ok(changes)
    }

    /// No key can be given here, and without one its content cannot be understood.
    fn refuse_encryption(&self) -> Result<(), ImageError> {
        if self.header.crypt_method != 0 && reads_guest_data(self.access) {
            return Err(ImageError::refused_because(
                "Parameter 'encrypt.key-secret' is required for cipher",
                format!("crypt_method is {}", self.header.crypt_method),
            ));
        }
        Ok(())
    }

    async fn read_tables(&mut self, file: &dyn Storage) -> Result<(), ImageError> {
        let header = &self.header;
        if self.access != Access::Metadata {
            let entries = usize::try_from(header.l1_entries).unwrap_or(usize::MAX);
            self.l1_table =
                read_words(file, header.l1_table.0, entries, "Could not read L1 table").await?;
        }
        if matches!(self.access, Access::ReadWrite | Access::Check) {
            let entries = usize::try_from(header.refcount_table_bytes() / 8).unwrap_or(usize::MAX);
            let text = "Could not initialize refcount handling";
            self.refcount_table = read_words(file, header.refcount_table.0, entries, text).await?;
        }
        Ok(())
    }

    async fn read_snapshots(&mut self, file: &dyn Storage) -> Result<(), ImageError> {
        let table = self.header.snapshot_table.0;
        let text = "Failed to read snapshot table";
        let mut entries = Entries::new(file, table, u64::MAX, text);
        let mut length_bytes = 0;
        for index in 0..usize::try_from(self.header.snapshots).unwrap_or(usize::MAX) {
            let head = SnapshotHead::parse(entries.front(SNAPSHOT_HEAD_BYTES).await?);
            head.check(index)?;
            let entry_bytes = head.entry_bytes();
            // Its parts are 16-bit numbers, but for the extra data that has been checked.
            let wanted = usize::try_from(entry_bytes).unwrap_or(usize::MAX);
            let entry = entries.front(wanted).await?;
            if entry.len() < wanted {
                self.end_of_snapshots(index)?;
                break;
            }
            self.snapshots.push(Snapshot::parse(entry));
            self.snapshot_table = ByteRange::new(table, length_bytes + entry_bytes);
            if self.snapshot_table.length() > SNAPSHOT_TABLE_BYTES_MAX {
                return Err(ImageError::refused_because(
                    "Snapshot table is too big",
                    format!(
                        "{} entries take {} bytes, {SNAPSHOT_TABLE_BYTES_MAX} at most are possible",
                        index + 1,
                        self.snapshot_table.length()
                    ),
                ));
            }
            entries
                .pass(wanted.next_multiple_of(SNAPSHOT_ALIGNMENT_BYTES))
                .await?;
            length_bytes += entry_bytes.next_multiple_of(SNAPSHOT_ALIGNMENT_BYTES as u64);
        }
        Ok(())
    }

    /// The entry at `index` is behind the end of the file. QEMU takes it for one of zeroes.
    fn end_of_snapshots(&mut self, index: usize) -> Result<(), ImageError> {
        let what = format!(
            "snapshot table entry {index} of {} ends behind the end of the file",
            self.header.snapshots
        );
        if self.access == Access::ReadWrite {
            return Err(ImageError::refused_because(
                "Snapshot table offset invalid",
                what,
            ));
        }
        self.findings.push(what);
        Ok(())
    }

    async fn read_bitmaps(&mut self, file: &dyn Storage) -> Result<(), ImageError> {
        let Some(extension) = self.header.extensions.bitmaps else {
            return Ok(());
        };
        if !self.header.bitmaps_valid() {
            self.findings
                .push(ignored_bitmaps(self.header.geometry.version()).to_owned());
            return Ok(());
        }
        if extension.directory_bytes == 0 {
            return Err(ImageError::refused(
                "Requested bitmap directory size is zero",
            ));
        }
        let text = "Failed to read bitmap directory";
        let mut left = extension.directory_bytes;
        let mut entries = Entries::new(file, extension.directory.0, left, text);
        while left > 0 {
            let head = BitmapHead::parse(entries.front(BITMAP_HEAD_BYTES).await?);
            self.check_next_bitmap(&head, left, &extension)?;
            let known_bytes = head.known_bytes();
            let entry = entries.front(known_bytes).await?;
            let guest_bytes = self.header.guest_bytes();
            let bitmap = Bitmap::parse(entry, &self.header.geometry, guest_bytes)?;
            self.bitmaps.push(bitmap);
            // Without extra data, which has been refused, this is all.
            let entry_bytes = head.entry_bytes();
            left = left.saturating_sub(entry_bytes);
            entries
                .pass(usize::try_from(entry_bytes).unwrap_or(usize::MAX))
                .await?;
        }
        if self.bitmaps.len() as u64 != u64::from(extension.bitmaps) {
            return Err(ImageError::refused_because(
                "Less bitmaps found than specified in header extension",
                format!("{} of {}", self.bitmaps.len(), extension.bitmaps),
            ));
        }
        self.check_bitmap_names()
    }

    /// Whether an entry can follow those that are known, with `left` bytes of the directory.
    fn check_next_bitmap(
        &self,
        head: &BitmapHead,
        left: u64,
        extension: &BitmapsExtension,
    ) -> Result<(), ImageError> {
        let index = self.bitmaps.len();
        let broken = |wanted: u64| {
            ImageError::refused_because(
                "Broken bitmap directory",
                format!("entry {index} needs {wanted} bytes, {left} are left"),
            )
        };
        if left < BITMAP_HEAD_BYTES as u64 {
            return Err(broken(BITMAP_HEAD_BYTES as u64));
        }
        if index as u64 >= u64::from(extension.bitmaps) {
            return Err(ImageError::refused_because(
                "More bitmaps found than specified in header extension",
                format!("there are {} and {left} bytes more", extension.bitmaps),
            ));
        }
        let entry_bytes = head.entry_bytes();
        // Extra data is refused in any case; QEMU's sum wraps where it is longer than this.
        if entry_bytes > left && i32::try_from(entry_bytes).is_ok() {
            return Err(broken(entry_bytes));
        }
        Ok(())
    }

    fn check_bitmap_names(&self) -> Result<(), ImageError> {
        let mut names = HashSet::with_capacity(self.bitmaps.len());
        for bitmap in &self.bitmaps {
            let name = until_nul(&bitmap.name);
            if !names.insert(name) {
                return Err(ImageError::refused(format!(
                    "Bitmap already exists: {}",
                    String::from_utf8_lossy(name)
                )));
            }
        }
        Ok(())
    }

    /// Whether all tables lie well, now that it is known how long they are.
    fn check_places(&mut self, file_bytes: u64) -> Result<(), ImageError> {
        let mut places = Places::new(&self.header, file_bytes);
        places.add_snapshots(&self.header, self.snapshot_table.length());
        if self.header.bitmaps_valid() {
            places.add_bitmaps(&self.header, &self.bitmaps);
        }
        match places.check_all() {
            Err(refused) if self.access == Access::ReadWrite => Err(refused),
            Err(ImageError::Refused { text, detail }) => {
                let detail = detail.map(|detail| format!(": {detail}"));
                self.findings.push(text + &detail.unwrap_or_default());
                Ok(())
            }
            other => other,
        }
    }
}

/// Whether what the guest's disk holds is going to be looked at.
fn reads_guest_data(access: Access) -> bool {
    matches!(access, Access::ReadOnly | Access::ReadWrite)
}

/// Reads and checks the first cluster.
///
/// # Errors
/// As [`read_image`].
pub async fn read_header(file: &dyn Storage, access: Access) -> Result<Header, ImageError> {
    let mut start = read_bytes(file, 0, START_BYTES, HEADER_UNREADABLE).await?;
    let cluster_bytes = Header::cluster_bytes_of(&start)?;
    // At most 2 MiB.
    let cluster_bytes = usize::try_from(cluster_bytes).unwrap_or(START_BYTES);
    if let Some(more) = cluster_bytes.checked_sub(START_BYTES) {
        start.extend(read_bytes(file, START_BYTES as u64, more, HEADER_UNREADABLE).await?);
    }
    Header::parse(&start, access)
}

fn ignored_bitmaps(version: Version) -> &'static str {
    match version {
        Version::V2 => {
            "This qcow2 v2 image contains bitmaps, but they may have been modified by a program without persistent \
             bitmap support; so now they must all be considered inconsistent"
        }
        Version::V3 => {
            "a program lacking bitmap support modified this file, so all bitmaps are now considered inconsistent"
        }
    }
}
