//! Reading tables of an image that is not trusted yet: in bounded pieces, never behind the end of the file, with memory for
//! what the file can hold.

use blockyard_storage::{Buffer, Storage};

use crate::error::ImageError;
use crate::qcow2::layout::fields::u64_at;

/// Largest piece in bytes.
const PIECE_BYTES_MAX: u64 = 1 << 20;
/// First piece of a table whose length is not known.
const PIECE_BYTES_MIN: u64 = 16 << 10;

/// The `length_bytes` at `offset`; what is behind the end of the file are zeroes. The caller bounds the length: so much is
/// allocated.
///
/// # Errors
/// [`ImageError::Unreadable`] with `text`.
pub(super) async fn read_bytes(
    file: &dyn Storage,
    offset: u64,
    length_bytes: usize,
    text: &'static str,
) -> Result<Vec<u8>, ImageError> {
    let mut bytes = Vec::with_capacity(length_bytes);
    let end = offset.saturating_add(length_bytes as u64);
    let mut pieces = Pieces::new(file, offset, end, text);
    while let Some(piece) = pieces.next(PIECE_BYTES_MAX).await? {
        bytes.extend(piece.as_slice());
    }
    bytes.resize(length_bytes, 0);
    Ok(bytes)
}

/// The same for a table of `entries` big-endian words. Where they are zeroes, which is most of a table that only claims to be
/// large, the memory is not touched, so that the system need not provide it.
///
/// # Errors
/// [`ImageError::Unreadable`] with `text`.
pub(super) async fn read_words(
    file: &dyn Storage,
    offset: u64,
    entries: usize,
    text: &'static str,
) -> Result<Vec<u64>, ImageError> {
    let mut words = vec![0; entries];
    let mut rest = words.as_mut_slice();
    let end = offset.saturating_add((entries as u64).saturating_mul(8));
    let mut pieces = Pieces::new(file, offset, end, text);
    while let Some(piece) = pieces.next(PIECE_BYTES_MAX).await? {
        // A piece ends within a word at the end of the file only.
        let bytes = piece.as_slice().chunks(8);
        let (front, behind) = rest.split_at_mut(bytes.len().min(rest.len()));
        for (word, bytes) in front.iter_mut().zip(bytes) {
            match u64_at(bytes, 0) {
                0 => {}
                other => *word = other,
            }
        }
        rest = behind;
    }
    Ok(words)
}

/// A table of entries whose length stands in themselves, read forwards.
pub(super) struct Entries<'a> {
    pieces: Pieces<'a>,
    window: Vec<u8>,
    /// Bytes of the window that have been passed.
    passed: usize,
    next_piece_bytes: u64,
}

impl<'a> Entries<'a> {
    /// Of the table that begins at `offset` and takes `length_bytes` at most; reading fails with `text`.
    pub(super) fn new(
        file: &'a dyn Storage,
        offset: u64,
        length_bytes: u64,
        text: &'static str,
    ) -> Self {
        Self {
            pieces: Pieces::new(file, offset, offset.saturating_add(length_bytes), text),
            window: Vec::new(),
            passed: 0,
            next_piece_bytes: PIECE_BYTES_MIN,
        }
    }

    /// The next `length_bytes`; fewer at the end of the table or file.
    ///
    /// # Errors
    /// [`ImageError::Unreadable`].
    pub(super) async fn front(&mut self, length_bytes: usize) -> Result<&[u8], ImageError> {
        while self.window.len() - self.passed < length_bytes {
            self.window.drain(..self.passed);
            self.passed = 0;
            let wanted = self.next_piece_bytes.max(length_bytes as u64);
            let Some(piece) = self.pieces.next(wanted.min(PIECE_BYTES_MAX)).await? else {
                break;
            };
            self.window.extend(piece.as_slice());
            self.next_piece_bytes = (self.next_piece_bytes * 4).min(PIECE_BYTES_MAX);
        }
        let end = self.window.len().min(self.passed + length_bytes);
        Ok(self.window.get(self.passed..end).unwrap_or(&[]))
    }

    /// Goes on behind the next `length_bytes`, which [`front`](Self::front) has shown, up to seven bytes of padding apart.
    ///
    /// # Errors
    /// [`ImageError::Unreadable`].
    pub(super) async fn pass(&mut self, length_bytes: usize) -> Result<(), ImageError> {
        let shown = self.front(length_bytes).await?.len();
        self.passed += shown;
        Ok(())
    }
}

/// A part of a file in pieces, from its start.
struct Pieces<'a> {
    file: &'a dyn Storage,
    next: u64,
    end: u64,
    text: &'static str,
}

impl<'a> Pieces<'a> {
    fn new(file: &'a dyn Storage, offset: u64, end: u64, text: &'static str) -> Self {
        Self {
            file,
            next: offset,
            end: end.min(file.facts().length_bytes),
            text,
        }
    }

    /// The next piece of `length_bytes` at most.
    async fn next(&mut self, length_bytes: u64) -> Result<Option<Buffer>, ImageError> {
        let length_bytes = self.end.saturating_sub(self.next).min(length_bytes);
        if length_bytes == 0 {
            return Ok(None);
        }
        // At most one mebibyte.
        let buffer = Buffer::zeroed(usize::try_from(length_bytes).unwrap_or(0));
        let read = self.file.read(self.next, buffer).await;
        read.outcome.map_err(|source| ImageError::Unreadable {
            text: self.text,
            source,
        })?;
        self.next += length_bytes;
        Ok(Some(read.buffer))
    }
}
