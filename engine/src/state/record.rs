//! A record as it stands in its file.
//!
//! ```text
//!   0   8   "BLKYREC1"
//!   8   8   length of the content in bytes, little-endian, as all that follows
//!   16  8   length of the field behind it in bytes
//!   24  4   CRC-32 of bytes 0 to 23 and the content
//!   28  4   zero
//!   32      the content; zeroes up to a multiple of 4096, if a field follows; the field
//! ```
//! The field changes in its place, so nothing vouches for its bits but that each only ever goes from 0 to 1.

use std::io;

const MAGIC: &[u8; 8] = b"BLKYREC1";
const HEAD_BYTES: usize = 32;
/// What the sum covers of the head.
const SUMMED_BYTES: usize = 24;
/// The field begins at a multiple of this, so that no write to it touches what is before.
const FIELD_ALIGNMENT: usize = 4096;

/// The bytes of a file, in pieces.
pub(super) fn encode(content: &[u8], field: Option<&[u8]>) -> Vec<Vec<u8>> {
    let field_bytes = field.map_or(0, <[u8]>::len);
    let mut head = MAGIC.to_vec();
    head.extend((content.len() as u64).to_le_bytes());
    head.extend((field_bytes as u64).to_le_bytes());
    let sum = sum_of(&head, content);
    head.extend(sum.to_le_bytes());
    head.extend([0; 4]);
    let mut pieces = vec![head, content.to_vec()];
    if let Some(field) = field {
        pieces.push(vec![
            0;
            field_offset(content.len()) - HEAD_BYTES - content.len()
        ]);
        pieces.push(field.to_vec());
    }
    pieces
}

/// Content and field of a file.
///
/// # Errors
/// `InvalidData`: this is not what was written.
pub(super) fn decode(mut file: Vec<u8>) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let (head, summed) = (file.get(..HEAD_BYTES), file.get(..SUMMED_BYTES));
    let (Some(head), Some(summed)) = (head, summed) else {
        return Err(garbled("it is cut off"));
    };
    if !head.starts_with(MAGIC) {
        return Err(garbled("it is no record"));
    }
    let length = |offset: usize| usize::try_from(number(head, offset, 8)).unwrap_or(usize::MAX);
    let (content_bytes, field_bytes) = (length(8), length(16));
    let end = HEAD_BYTES.saturating_add(content_bytes);
    let field_start = match field_bytes {
        0 => end,
        _ => end.checked_next_multiple_of(FIELD_ALIGNMENT).unwrap_or(end),
    };
    if field_start.checked_add(field_bytes) != Some(file.len()) {
        return Err(garbled("it is cut off"));
    }
    let content = file.get(HEAD_BYTES..end).unwrap_or(&[]);
    let sum = u64::from(sum_of(summed, content));
    if sum != number(head, SUMMED_BYTES, 4) || number(head, 28, 4) != 0 {
        return Err(garbled("its checksum is wrong"));
    }
    let field = file.split_off(field_start);
    file.truncate(end);
    file.drain(..HEAD_BYTES);
    Ok((file, field))
}

/// Where the field behind a content of this length begins in the file.
pub(super) const fn field_offset(content_bytes: usize) -> usize {
    (HEAD_BYTES + content_bytes).next_multiple_of(FIELD_ALIGNMENT)
}

fn sum_of(head: &[u8], content: &[u8]) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    sum.update(head);
    sum.update(content);
    sum.finalize()
}

/// A number of `length` bytes.
fn number(bytes: &[u8], offset: usize, length: usize) -> u64 {
    let bytes = bytes.iter().skip(offset).take(length).rev();
    bytes.fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn garbled(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_was_written_is_read(content: Vec<u8>, field: Option<Vec<u8>>) {
            let file = encode(&content, field.as_deref()).concat();
            if let Some(field) = &field {
                prop_assert_eq!(&file[field_offset(content.len())..], &field[..]);
            }
            let read = decode(file);
            if field.as_ref().is_none_or(|field| !field.is_empty()) {
                prop_assert_eq!(read.unwrap(), (content, field.unwrap_or_default()));
            }
        }

        #[test]
        fn anything_is_read_or_refused(mut file: Vec<u8>, is_record: bool) {
            if is_record {
                file.splice(..0, *MAGIC);
            }
            let _ = decode(file);
        }
    }
}
