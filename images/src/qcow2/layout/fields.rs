//! Big-endian numbers and byte strings at any place of a piece of metadata. What lies behind the end of the piece reads as
//! zero, as the bytes behind the end of an image file do.

/// The 16-bit number at `offset`.
pub fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_be_bytes(array_at(bytes, offset))
}

/// The 32-bit number at `offset`.
pub fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_be_bytes(array_at(bytes, offset))
}

/// The 64-bit number at `offset`.
pub fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_be_bytes(array_at(bytes, offset))
}

/// A copy of the `length` bytes at `offset`. The caller bounds the length: so much is allocated.
pub fn bytes_at(bytes: &[u8], offset: usize, length: usize) -> Vec<u8> {
    let rest = bytes.get(offset..).unwrap_or(&[]);
    let mut copy = rest.get(..length).unwrap_or(rest).to_vec();
    copy.resize(length, 0);
    copy
}

/// The bytes before the first NUL: what QEMU takes a name for, whatever follows in its field.
pub fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or(&[])
}

fn array_at<const LENGTH: usize>(bytes: &[u8], offset: usize) -> [u8; LENGTH] {
    let mut array = [0; LENGTH];
    let rest = bytes.get(offset..).unwrap_or(&[]);
    for (to, from) in array.iter_mut().zip(rest) {
        *to = *from;
    }
    array
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn behind_the_end_are_zeroes() {
        let bytes = [1, 2, 3, 4, 5, 6];
        assert_eq!(u16_at(&bytes, 1), 0x0203);
        assert_eq!(u32_at(&bytes, 4), 0x0506_0000);
        assert_eq!(u64_at(&bytes, 0), 0x0102_0304_0506_0000);
        assert_eq!(u64_at(&bytes, usize::MAX), 0);
        assert_eq!(bytes_at(&bytes, 4, 4), [5, 6, 0, 0]);
        assert_eq!(until_nul(b"ab\0c"), b"ab");
    }
}
