//! Reading two files side by side until they differ.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{Advice, SeekFrom, fadvise, seek};
use rustix::io::Errno;

/// Bytes compared at once, read from both sides at the same time.
const PIECE_BYTES: usize = 4 << 20;

/// What a comparison came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compared {
    /// Every byte is the same.
    Equal,
    /// The first byte that is not.
    DiffersAt(u64),
    /// It was told to stop.
    Stopped,
}

/// Which side could not be read, where and why.
#[derive(Debug)]
pub(crate) struct Unreadable {
    pub(crate) is_source: bool,
    pub(crate) offset: u64,
    pub(crate) error: io::Error,
}

/// Compares the first `length_bytes` bytes of both files. Where both have holes nothing is read. `go_on` hears how far it
/// is, and says whether to go on.
///
/// # Errors
/// When a side cannot be read, or ends early.
pub(crate) fn compare(
    source: &File,
    target: &File,
    length_bytes: u64,
    mut go_on: impl FnMut(u64) -> bool,
) -> Result<Compared, Unreadable> {
    let (mut ours, mut theirs) = (vec![0; PIECE_BYTES], vec![0; PIECE_BYTES]);
    for file in [source, target] {
        // What is compared is what the medium holds, as far as the kernel lets go of its memory of it; it is advice only.
        let _ = fadvise(file, 0, None, Advice::DontNeed);
        let _ = fadvise(file, 0, None, Advice::Sequential);
    }
    let mut offset = 0;
    while offset < length_bytes {
        if !go_on(offset) {
            return Ok(Compared::Stopped);
        }
        offset = data_from(source, offset).min(data_from(target, offset));
        if offset >= length_bytes {
            break;
        }
        let piece = usize::try_from(length_bytes - offset)
            .map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES));
        let (ours, theirs) = (&mut ours[..piece], &mut theirs[..piece]);
        let read = |file: &File, bytes: &mut [u8], is_source| {
            file.read_exact_at(bytes, offset)
                .map_err(|error| Unreadable {
                    is_source,
                    offset,
                    error,
                })
        };
        std::thread::scope(|scope| {
            let other = scope.spawn(|| read(target, theirs, false));
            let here = read(source, ours, true);
            let other = other
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            here.and(other)
        })?;
        if ours != theirs {
            let same = ours.iter().zip(theirs.iter()).take_while(|(a, b)| a == b);
            return Ok(Compared::DiffersAt(offset + same.count() as u64));
        }
        offset += piece as u64;
    }
    go_on(length_bytes);
    Ok(Compared::Equal)
}

/// Where the next data is; without an answer, right here.
fn data_from(file: &File, offset: u64) -> u64 {
    match seek(file, SeekFrom::Data(offset)) {
        Ok(data) => data,
        // Nothing but a hole up to the end.
        Err(Errno::NXIO) => u64::MAX,
        Err(_) => offset,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(content: &[(u64, &[u8])], length_bytes: u64) -> File {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(length_bytes).expect("its length");
        for (offset, bytes) in content {
            file.write_all_at(bytes, *offset).expect("written");
        }
        file
    }

    #[test]
    fn the_first_difference_is_found_wherever_it_is() {
        let length = (9 << 20) + 77;
        let one = file(&[(0, &[1]), (8 << 20, &[2; 4096])], length);
        let compare = |other: &File| compare(&one, other, length, |_| true).expect("readable");
        assert_eq!(
            compare(&file(&[(0, &[1]), (8 << 20, &[2; 4096])], length)),
            Compared::Equal
        );
        for offset in [0, 1, (4 << 20) - 1, 4 << 20, (8 << 20) + 4095, length - 1] {
            let other = file(&[(0, &[1]), (8 << 20, &[2; 4096]), (offset, &[9])], length);
            assert_eq!(compare(&other), Compared::DiffersAt(offset));
        }
    }

    #[test]
    fn a_short_side_is_no_equal_side() {
        let one = file(&[(4090, &[1; 6])], 4096);
        let error = compare(&one, &file(&[], 4000), 4096, |_| true).expect_err("too short");
        assert!(!error.is_source);
        assert_eq!(error.error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn it_stops_when_told() {
        let one = file(&[(0, &[1])], 1 << 20);
        let stopped = compare(&one, &one, 1 << 20, |_| false).expect("readable");
        assert_eq!(stopped, Compared::Stopped);
    }
}
