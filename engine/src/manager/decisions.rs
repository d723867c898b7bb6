//! What has been decided of checkpoints and is not in every image yet: written down before the first image is changed, so that a
//! crash in between leaves all of them with the new bitmaps once they are opened again, and one before leaves none.
//!
//! ```text
//!   0   4   version: 1; little-endian, as all that follows
//!   4   4   number of images; then for each of them
//!           4   length of the path of its file, and the path
//!           8   device, 8 inode of its file
//!           4   length of the new bitmap's name, and the name
//!           4   length of the older bitmap's name, and the name; u32::MAX: there was none
//!           8   bytes of a granule of the new bitmap
//!           1   1: the older bitmap stays
//! ```
//! An image that changes over by itself is found by its file: its path, or its device and inode.

use std::io;

use crate::state::{RecordKind, StateDir};

const KIND: RecordKind = RecordKind::Checkpoints;
/// The only record: all that is left to do.
const NAME: &str = "decided";
const VERSION: u32 = 1;

/// Images that wait for what has been decided at most; what they wait for is kept until they are opened again.
pub(super) const IMAGES_MAX: usize = 4096;

/// What has been decided for one image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Decision {
    /// Path of the image's file.
    pub(crate) path: Vec<u8>,
    /// Its device and inode.
    pub(crate) identity: (u64, u64),
    /// Name of the new bitmap.
    pub(crate) bitmap: String,
    /// Name of the older one.
    pub(crate) previous: Option<String>,
    /// Bytes of a granule of the new bitmap.
    pub(crate) granularity_bytes: u64,
    /// The older one stays.
    pub(crate) keep_previous: bool,
}

/// Makes durable that this is what is left to do.
///
/// # Errors
/// What the file system says.
pub(super) async fn write(state: &StateDir, left: &[Decision]) -> io::Result<()> {
    match left.is_empty() {
        true => state.remove(KIND, NAME).await,
        false => state.write(KIND, NAME, encode(left)).await,
    }
}

/// What is left to do.
///
/// # Errors
/// What the file system says; `InvalidData` if that was not written here.
pub(super) async fn read(state: &StateDir) -> io::Result<Vec<Decision>> {
    let Some(bytes) = state.read(KIND, NAME).await? else {
        return Ok(Vec::new());
    };
    decode(&bytes).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn encode(left: &[Decision]) -> Vec<u8> {
    let number = |number: usize| u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes();
    let mut bytes = VERSION.to_le_bytes().to_vec();
    bytes.extend(number(left.len()));
    for one in left {
        bytes.extend(number(one.path.len()));
        bytes.extend(&one.path);
        bytes.extend(one.identity.0.to_le_bytes());
        bytes.extend(one.identity.1.to_le_bytes());
        bytes.extend(number(one.bitmap.len()));
        bytes.extend(one.bitmap.as_bytes());
        match &one.previous {
            Some(previous) => {
                bytes.extend(number(previous.len()));
                bytes.extend(previous.as_bytes());
            }
            None => bytes.extend(u32::MAX.to_le_bytes()),
        }
        bytes.extend(one.granularity_bytes.to_le_bytes());
        bytes.push(u8::from(one.keep_previous));
    }
    bytes
}

fn decode(bytes: &[u8]) -> Option<Vec<Decision>> {
    let mut rest = bytes;
    if u32::from_le_bytes(take(&mut rest)?) != VERSION {
        return None;
    }
    let count = u32::from_le_bytes(take(&mut rest)?);
    let mut all = Vec::new();
    for _ in 0..count {
        let path = text(&mut rest)??.to_vec();
        let identity = (
            u64::from_le_bytes(take(&mut rest)?),
            u64::from_le_bytes(take(&mut rest)?),
        );
        let name = |name: &[u8]| String::from_utf8(name.to_vec()).ok();
        let bitmap = name(text(&mut rest)??)?;
        let previous = match text(&mut rest)? {
            Some(previous) => Some(name(previous)?),
            None => None,
        };
        let granularity_bytes = u64::from_le_bytes(take(&mut rest)?);
        let [keep_previous] = take(&mut rest)?;
        if !granularity_bytes.is_power_of_two() || granularity_bytes < 512 || keep_previous > 1 {
            return None;
        }
        all.push(Decision {
            path,
            identity,
            bitmap,
            previous,
            granularity_bytes,
            keep_previous: keep_previous == 1,
        });
    }
    rest.is_empty().then_some(all)
}

/// A text behind its length; `Some(None)`: there is none.
fn text<'a>(rest: &mut &'a [u8]) -> Option<Option<&'a [u8]>> {
    let length = u32::from_le_bytes(take(rest)?);
    if length == u32::MAX {
        return Some(None);
    }
    let (text, behind) = rest.split_at_checked(usize::try_from(length).ok()?)?;
    *rest = behind;
    Some(Some(text))
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (first, behind) = rest.split_first_chunk()?;
    *rest = behind;
    Some(*first)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    prop_compose! {
        fn decision()(
            path: Vec<u8>,
            identity: (u64, u64),
            bitmap: String,
            previous: Option<String>,
            bits in 9_u32..32,
            keep_previous: bool,
        ) -> Decision {
            Decision {
                path,
                identity,
                bitmap,
                previous,
                granularity_bytes: 1 << bits,
                keep_previous,
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_left_comes_back(left in prop::collection::vec(decision(), 0..5)) {
            let bytes = encode(&left);
            prop_assert_eq!(decode(&bytes), Some(left));
            for cut in 0..bytes.len() {
                prop_assert_eq!(decode(&bytes[..cut]), None);
            }
        }

        #[test]
        fn nothing_is_too_odd(bytes: Vec<u8>) {
            let _ = decode(&bytes);
            let _ = decode(&[&[1, 0, 0, 0, 1, 0, 0, 0][..], &bytes].concat());
        }
    }
}
