//! [`create`]: from a plan to bytes, in bounded pieces, and back if it comes to nothing.

use blockyard_storage::error::{EINVAL, errno_text};
use blockyard_storage::{
    Buffer, ByteRange, Operation, Preallocation, Storage, StorageError, ZeroMode,
};

use crate::pace::{Cancelled, Pace};

use super::options::{Creation, ImagePreallocation};
use super::plan::Table;

/// Metadata is written in pieces of so many bytes, a multiple of every table's entry.
const TABLE_PIECE_BYTES: u64 = 1 << 20;
/// The file system reserves room in pieces of so many bytes.
const ROOM_PIECE_BYTES: u64 = 64 << 20;
/// Zeroes are written in pieces of so many bytes: pause and cancel wait for that long, and it takes longer.
const ZERO_PIECE_BYTES: u64 = 8 << 20;
/// Extents that are asked for at once.
const EXTENTS_MAX: usize = 256;
/// What a disk writes whole or not at all.
const SECTOR_BYTES: usize = 512;

/// Why an image was not made. The files are as long as they were, and the image file is no image.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CreateError {
    /// A storage failed.
    #[error("{step}: {}", errno_text(.source.errno))]
    Storage {
        /// What was being done, in QEMU's words where it has some.
        step: &'static str,
        /// It was the external data file.
        in_data_file: bool,
        /// What failed.
        source: StorageError,
    },
    /// A file whose length is fixed is too short.
    #[error("Could not resize image: Cannot grow device files")]
    TooShort,
    /// What was written does not come back.
    #[error("Image is not in qcow2 format")]
    NotKept,
    /// On request.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
}

/// Makes the image. Afterwards it is whole and durable. What the files held is lost as far as the image reaches, except
/// that the data file keeps what it holds; neither becomes shorter.
///
/// # Errors
/// As [`CreateError`] says. Nothing was changed if that is found out before the first write: a file of fixed length that
/// is too short.
///
/// # Cancel safety
/// Dropped midway, it leaves no image, and files that may have become longer. [`Pace`] is the better way.
pub async fn create(
    creation: &Creation,
    image: &dyn Storage,
    data_file: Option<&dyn Storage>,
    pace: &dyn Pace,
) -> Result<(), CreateError> {
    let mut making = Making {
        creation,
        image: File::new(image, false),
        data_file: data_file.map(|file| File::new(file, true)),
        pace,
        signed: false,
    };
    let outcome = making.make().await;
    if outcome.is_err() {
        making.take_back().await;
    }
    outcome
}

/// One of the two files.
struct File<'a> {
    storage: &'a dyn Storage,
    is_data_file: bool,
    length_before: u64,
}

impl<'a> File<'a> {
    fn new(storage: &'a dyn Storage, is_data_file: bool) -> Self {
        Self {
            storage,
            is_data_file,
            length_before: storage.facts().length_bytes,
        }
    }

    fn failed(&self, step: &'static str) -> impl Fn(StorageError) -> CreateError + use<> {
        let in_data_file = self.is_data_file;
        move |source| CreateError::Storage {
            step,
            in_data_file,
            source,
        }
    }

    /// What QEMU calls it when the file does not become long enough.
    fn growing(&self) -> &'static str {
        match self.is_data_file {
            true => "Could not resize image: Could not resize file",
            false => "Could not resize image: Failed to resize underlying file",
        }
    }

    fn reserving(&self, how: Preallocation) -> &'static str {
        match (self.is_data_file, how) {
            (true, Preallocation::Full) => {
                "Could not resize image: Could not write zeros for preallocation"
            }
            (true, _) => "Could not resize image: Could not preallocate new data",
            (false, Preallocation::Full) => {
                "Could not resize image: Failed to resize underlying file: Could not write zeros \
                 for preallocation"
            }
            (false, _) => {
                "Could not resize image: Failed to resize underlying file: Could not preallocate \
                 new data"
            }
        }
    }

    /// Refuses a file that neither is nor becomes long enough.
    fn check_room(&self, length_bytes: u64) -> Result<(), CreateError> {
        let facts = self.storage.facts();
        if !facts.fixed_length || facts.length_bytes >= length_bytes {
            return Ok(());
        }
        Err(CreateError::TooShort)
    }

    async fn grow(&self, length_bytes: u64) -> Result<(), CreateError> {
        if self.storage.facts().length_bytes >= length_bytes {
            return Ok(());
        }
        let grown = self.storage.resize(length_bytes).await;
        grown.map_err(self.failed(self.growing()))
    }

    async fn write(
        &self,
        offset: u64,
        bytes: Buffer,
        step: &'static str,
    ) -> Result<(), CreateError> {
        let written = self.storage.write(offset, bytes).await.outcome;
        written.map_err(self.failed(step))
    }

    async fn sync(&self, step: &'static str) -> Result<(), CreateError> {
        let synced = self.storage.sync().await;
        synced.map_err(self.failed(step))
    }

    /// Best effort: there is a failure already that is worth more than this one.
    async fn shrink_back(&self) {
        let facts = self.storage.facts();
        if facts.length_bytes > self.length_before && !facts.fixed_length {
            let _ = self.storage.resize(self.length_before).await;
        }
    }
}

struct Making<'a> {
    creation: &'a Creation,
    image: File<'a>,
    data_file: Option<File<'a>>,
    pace: &'a dyn Pace,
    /// The magic may be in the file.
    signed: bool,
}

const HEADER_STEP: &str = "Could not write qcow2 header";

impl Making<'_> {
    async fn make(&mut self) -> Result<(), CreateError> {
        self.check_files()?;
        self.expect_work();
        self.pace.checkpoint().await?;
        self.destroy_old_header().await?;
        self.make_data_file().await?;
        self.make_room().await?;
        for table in [
            Table::RefcountTable,
            Table::RefcountBlocks,
            Table::L1,
            Table::L2,
        ] {
            self.write_table(table).await?;
        }
        self.write_behind_first_sector().await?;
        self.pace.checkpoint().await?;
        if let Some(data_file) = &self.data_file {
            data_file.sync(data_file.growing()).await?;
        }
        self.image.sync(HEADER_STEP).await?;
        self.sign().await
    }

    fn check_files(&self) -> Result<(), CreateError> {
        let plan = self.creation.plan();
        if self.creation.header().has_data_file() != self.data_file.is_some() {
            // Whoever calls has the options and the files.
            let error = StorageError::whole(Operation::Write, EINVAL);
            return Err(self.image.failed(HEADER_STEP)(error));
        }
        self.image.check_room(plan.file_bytes())?;
        match &self.data_file {
            Some(data_file) => data_file.check_room(plan.data_file_bytes()),
            None => Ok(()),
        }
    }

    fn expect_work(&self) {
        let plan = self.creation.plan();
        let tables = [
            Table::RefcountTable,
            Table::RefcountBlocks,
            Table::L1,
            Table::L2,
        ];
        let tables = tables.map(|table| plan.table(table).length());
        self.pace.expect(tables.iter().sum());
        self.pace.expect(SECTOR_BYTES as u64);
        if self.reserves().is_some() {
            self.pace.expect(match self.data_file {
                Some(_) => plan.data_file_bytes(),
                None => plan.file_bytes(),
            });
        }
    }

    /// How room is reserved, if it is.
    fn reserves(&self) -> Option<Preallocation> {
        match self.creation.preallocation() {
            ImagePreallocation::Falloc => Some(Preallocation::Falloc),
            ImagePreallocation::Full => Some(Preallocation::Full),
            ImagePreallocation::Off | ImagePreallocation::Metadata => None,
        }
    }

    /// Whatever the file is now, from here on it is nothing.
    async fn destroy_old_header(&self) -> Result<(), CreateError> {
        if self.image.length_before == 0 {
            return Ok(());
        }
        let read = self
            .image
            .storage
            .read(0, Buffer::zeroed(SECTOR_BYTES))
            .await;
        if read.outcome.is_ok() && read.buffer.as_slice().iter().all(|byte| *byte == 0) {
            return Ok(());
        }
        let zeroes = Buffer::zeroed(SECTOR_BYTES);
        self.image.write(0, zeroes, HEADER_STEP).await?;
        self.image.sync(HEADER_STEP).await
    }

    /// Content of the data file stays: with raw data it is the guest's disk, and it is nobody's to destroy otherwise.
    async fn make_data_file(&self) -> Result<(), CreateError> {
        let Some(data_file) = &self.data_file else {
            return Ok(());
        };
        let length = self.creation.plan().data_file_bytes();
        data_file.grow(length).await?;
        let Some(how) = self.reserves() else {
            return Ok(());
        };
        let held = ByteRange::new(0, length.min(data_file.length_before));
        self.reserve(data_file, held, Preallocation::Falloc).await?;
        let new = ByteRange::between(held.end(), length);
        self.reserve(data_file, new, how).await
    }

    /// The image file becomes as long as it must be, and zeroes wherever the image will be.
    async fn make_room(&self) -> Result<(), CreateError> {
        let plan = self.creation.plan();
        self.image.grow(plan.file_bytes()).await?;
        let how = self.reserves().filter(|_| self.data_file.is_none());
        let whole = ByteRange::new(0, plan.file_bytes());
        if how == Some(Preallocation::Full) {
            return self.reserve(&self.image, whole, Preallocation::Full).await;
        }
        self.clear(how.is_none()).await?;
        match how {
            Some(how) => self.reserve(&self.image, whole, how).await,
            None => Ok(()),
        }
    }

    async fn reserve(
        &self,
        file: &File<'_>,
        range: ByteRange,
        how: Preallocation,
    ) -> Result<(), CreateError> {
        let piece_bytes = match how {
            Preallocation::Full => ZERO_PIECE_BYTES,
            Preallocation::Falloc | Preallocation::Off => ROOM_PIECE_BYTES,
        };
        for piece in range.pieces(piece_bytes) {
            self.pace.checkpoint().await?;
            let reserved = file.storage.preallocate(piece, how).await;
            reserved.map_err(file.failed(file.reserving(how)))?;
            self.pace.done(piece.length());
        }
        Ok(())
    }

    /// What the file held before must not show through the new image.
    async fn clear(&self, may_unmap: bool) -> Result<(), CreateError> {
        const STEP: &str = "Could not clear the image file";
        let plan = self.creation.plan();
        let used = plan.used_clusters().0 * plan.geometry().cluster_bytes();
        let mut rest = ByteRange::new(0, used.min(self.image.length_before));
        let mode = ZeroMode {
            may_unmap,
            no_fallback: false,
        };
        while !rest.is_empty() {
            self.pace.checkpoint().await?;
            let extents = self.image.storage.allocation(rest, EXTENTS_MAX).await;
            let extents = extents.map_err(self.image.failed(STEP))?;
            let mut known_to = rest.offset();
            for extent in extents {
                known_to = known_to.max(extent.range.end());
                if !extent.data {
                    continue;
                }
                self.pace.expect(extent.range.length());
                for piece in extent.range.pieces(ZERO_PIECE_BYTES) {
                    self.pace.checkpoint().await?;
                    let zeroed = self.image.storage.zero(piece, mode).await;
                    zeroed.map_err(self.image.failed(STEP))?;
                    self.pace.done(piece.length());
                }
            }
            if known_to == rest.offset() {
                // A storage that says nothing of the first byte breaks its promise: go no further on it.
                let error = StorageError::new(Operation::Allocation, rest, EINVAL);
                return Err(self.image.failed(STEP)(error));
            }
            rest = ByteRange::between(known_to, rest.end());
        }
        Ok(())
    }

    async fn write_table(&self, table: Table) -> Result<(), CreateError> {
        let step = match table {
            Table::RefcountTable | Table::RefcountBlocks => "Could not write refcount table",
            Table::L1 => "Could not resize image: Failed to grow the L1 table",
            Table::L2 => "Could not resize image: Allocating clusters failed",
        };
        let plan = self.creation.plan();
        let whole = plan.table(table);
        let mut rest = whole;
        while !rest.is_empty() {
            self.pace.checkpoint().await?;
            let (piece, after) = rest.split_at(TABLE_PIECE_BYTES);
            rest = after;
            let length = usize::try_from(piece.length()).unwrap_or(usize::MAX);
            let mut bytes = Buffer::zeroed(length);
            plan.fill(table, piece.offset() - whole.offset(), bytes.as_mut_slice());
            self.image.write(piece.offset(), bytes, step).await?;
            self.pace.done(piece.length());
        }
        Ok(())
    }

    async fn write_behind_first_sector(&self) -> Result<(), CreateError> {
        let header = self.creation.header_bytes();
        match header.get(SECTOR_BYTES..) {
            Some(rest) if !rest.is_empty() => {
                let bytes = Buffer::copy_of(rest);
                self.image
                    .write(SECTOR_BYTES as u64, bytes, HEADER_STEP)
                    .await
            }
            _ => Ok(()),
        }
    }

    /// The first sector makes it an image.
    async fn sign(&mut self) -> Result<(), CreateError> {
        let header = self.creation.header_bytes();
        let mut sector = Buffer::zeroed(SECTOR_BYTES);
        for (byte, of_header) in sector.as_mut_slice().iter_mut().zip(header) {
            *byte = *of_header;
        }
        let expected = Buffer::copy_of(sector.as_slice());
        self.signed = true;
        self.image.write(0, sector, HEADER_STEP).await?;
        self.image.sync(HEADER_STEP).await?;
        // A node that keeps nothing succeeds with everything.
        let read = self
            .image
            .storage
            .read(0, Buffer::zeroed(SECTOR_BYTES))
            .await;
        read.outcome
            .map_err(self.image.failed("Could not read qcow2 header"))?;
        if read.buffer.as_slice() != expected.as_slice() {
            return Err(CreateError::NotKept);
        }
        self.pace.done(SECTOR_BYTES as u64);
        Ok(())
    }

    /// Leaves no image, and the lengths as they were.
    async fn take_back(&self) {
        if self.signed {
            let zeroes = Buffer::zeroed(SECTOR_BYTES);
            if self.image.storage.write(0, zeroes).await.outcome.is_ok() {
                let _ = self.image.storage.sync().await;
            }
        }
        self.image.shrink_back().await;
        if let Some(data_file) = &self.data_file {
            data_file.shrink_back().await;
        }
    }
}
