//! Reads both sides of a copy: every byte, and where nothing is stored.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::tour::files::{Compared, compare};

/// Bytes read at once from either side.
const READ_BYTES: usize = 1 << 20;

/// What two equal files have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Equal {
    /// Their length.
    pub length_bytes: u64,
    /// Of these, what is stored in the copy; the rest are holes.
    pub stored_bytes: u64,
}

/// Compares a copy with its source.
///
/// # Errors
/// A text for the user: the first difference, more stored in the copy than in the source, or what could not be read.
pub fn copies(source: &Path, copy: &Path) -> Result<Equal, String> {
    let (one, other) = (open(source)?, open(copy)?);
    let (shown_source, shown_copy) = (source.display(), copy.display());
    let length_bytes = length(&one, source)?;
    let length_copy = length(&other, copy)?;
    if length_copy != length_bytes {
        return Err(format!(
            "{shown_copy} has {length_copy} bytes, {shown_source} {length_bytes}"
        ));
    }
    match compare(&one, &other, length_bytes, |_| true) {
        Ok(Compared::Equal) => {}
        Ok(Compared::DiffersAt(place)) => {
            return Err(format!(
                "{shown_copy} differs from {shown_source} at byte {place}"
            ));
        }
        Ok(Compared::Stopped) => return Err("the comparison was stopped".to_owned()),
        Err(unreadable) => {
            let path = if unreadable.is_source { source } else { copy };
            let (place, error) = (unreadable.offset, unreadable.error);
            return Err(format!("{}: byte {place}: {error}", path.display()));
        }
    }
    let (stored_source, stored_copy) = (stored(&one, source)?, stored(&other, copy)?);
    if stored_copy > stored_source {
        return Err(format!(
            "{shown_copy} stores {stored_copy} bytes, {shown_source} only {stored_source}: holes were filled"
        ));
    }
    Ok(Equal {
        length_bytes,
        stored_bytes: stored_copy,
    })
}

/// Checks that a file is `length_bytes` of zeroes.
///
/// # Errors
/// A text for the user.
pub fn zeroes(path: &Path, length_bytes: u64) -> Result<(), String> {
    let mut file = open(path)?;
    let mut bytes = vec![0; READ_BYTES];
    let mut place = 0_u64;
    loop {
        let length = read(&mut file, &mut bytes, path)?;
        if let Some(index) = bytes[..length].iter().position(|byte| *byte != 0) {
            let at = place + index as u64;
            return Err(format!("{} is not zero at byte {at}", path.display()));
        }
        if length == 0 {
            break;
        }
        place += length as u64;
    }
    if place == length_bytes {
        return Ok(());
    }
    let shown = path.display();
    Err(format!(
        "{shown} has {place} bytes instead of {length_bytes}"
    ))
}

fn length(file: &File, path: &Path) -> Result<u64, String> {
    let found = file.metadata();
    found
        .map(|found| found.len())
        .map_err(|error| format!("{}: {error}", path.display()))
}

fn open(path: &Path) -> Result<File, String> {
    File::open(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// Fills the buffer as far as the file goes.
fn read(file: &mut File, bytes: &mut [u8], path: &Path) -> Result<usize, String> {
    let mut length = 0;
    while length < bytes.len() {
        match file.read(&mut bytes[length..]) {
            Ok(0) => break,
            Ok(more) => length += more,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(format!("{}: {error}", path.display())),
        }
    }
    Ok(length)
}

/// Bytes that are not in holes, as the file system tells.
fn stored(file: &File, path: &Path) -> Result<u64, String> {
    let told = |error: Errno| format!("{}: {error}", path.display());
    let mut stored = 0;
    let mut place = 0;
    loop {
        match rustix::fs::seek(file, SeekFrom::Data(place)) {
            Ok(data) => {
                place = rustix::fs::seek(file, SeekFrom::Hole(data)).map_err(told)?;
                stored += place - data;
            }
            Err(Errno::NXIO) => return Ok(stored),
            Err(error) => return Err(told(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn file(folder: &Path, name: &str, length: u64, data: &[(u64, &[u8])]) -> std::path::PathBuf {
        let path = folder.join(name);
        let file = File::create(&path).expect("created");
        file.set_len(length).expect("sized");
        for (offset, bytes) in data {
            file.write_all_at(bytes, *offset).expect("written");
        }
        path
    }

    #[test]
    fn differences_are_found_wherever_they_are() {
        let folder = tempfile::tempdir().expect("a folder");
        let folder = folder.path();
        let length = (2 << 20) + 100;
        let source = file(folder, "a", length, &[(0, b"data")]);
        let same = file(folder, "b", length, &[(0, b"data")]);
        let equal = copies(&source, &same).expect("equal");
        assert_eq!(equal.length_bytes, length);
        for (name, length, data, told) in [
            ("first", length, &[(0, &b"Data"[..])][..], "at byte 0"),
            (
                "last",
                length,
                &[(0, b"data"), (length - 1, b"x")],
                &format!("at byte {}", length - 1),
            ),
            ("short", length - 1, &[(0, b"data")], "has 2097251 bytes"),
            ("long", length + 1, &[(0, b"data")], "has 2097253 bytes"),
        ] {
            let other = file(folder, name, length, data);
            let error = copies(&source, &other).expect_err("different");
            assert!(error.contains(told), "{name}: {error}");
        }
    }

    #[test]
    fn filled_holes_are_found() {
        let folder = tempfile::tempdir().expect("a folder");
        let source = file(folder.path(), "a", 4 << 20, &[]);
        let filled = file(folder.path(), "b", 4 << 20, &[(1 << 20, &[0; 1 << 20])]);
        let error = copies(&source, &filled).expect_err("filled");
        assert!(error.ends_with("holes were filled"), "{error}");
        assert_eq!(
            copies(&filled, &source).map(|equal| equal.stored_bytes),
            Ok(0)
        );
    }

    #[test]
    fn zeroes_are_all_zero_and_as_many_as_wanted() {
        let folder = tempfile::tempdir().expect("a folder");
        let clean = file(folder.path(), "a", 3 << 20, &[]);
        assert_eq!(zeroes(&clean, 3 << 20), Ok(()));
        assert!(zeroes(&clean, 4 << 20).is_err());
        let dirty = file(folder.path(), "b", 3 << 20, &[((3 << 20) - 1, b"x")]);
        assert!(zeroes(&dirty, 3 << 20).is_err());
    }
}
