//! [`Stream`]: a table of entries of different lengths, read once from front to back in bounded memory.

use std::rc::Rc;

use blockyard_storage::{ByteRange, Storage, StorageError};

use super::read_ahead::{PIECE_BYTES, read_all};

/// Bytes of a file from some offset on.
pub(super) struct Stream {
    file: Rc<dyn Storage>,
    /// Where `bytes` begin.
    offset: u64,
    bytes: Vec<u8>,
}

impl Stream {
    pub(super) fn new(file: &Rc<dyn Storage>, offset: u64) -> Self {
        Self {
            file: Rc::clone(file),
            offset,
            bytes: Vec::new(),
        }
    }

    /// The `length` bytes at `offset`, which is not before that of the last call. The caller bounds the length. Behind the
    /// end of the file are zeroes.
    ///
    /// # Errors
    /// When they cannot be read.
    pub(super) async fn at(&mut self, offset: u64, length: usize) -> Result<&[u8], StorageError> {
        let skip = usize::try_from(offset.saturating_sub(self.offset)).unwrap_or(usize::MAX);
        let missing = self
            .bytes
            .len()
            .checked_sub(skip)
            .is_none_or(|left| left < length);
        if missing {
            let wanted = (length as u64).max(PIECE_BYTES);
            self.bytes = read_all(&self.file, ByteRange::new(offset, wanted)).await?;
            self.offset = offset;
            // A range is cut at the end of all offsets.
            self.bytes
                .resize(usize::try_from(wanted).unwrap_or(length), 0);
            return Ok(self.bytes.get(..length).unwrap_or(&[]));
        }
        Ok(self
            .bytes
            .get(skip..)
            .and_then(|rest| rest.get(..length))
            .unwrap_or(&[]))
    }
}
