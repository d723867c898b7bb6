//! Zero detection: whether bytes are all zeroes, at memory speed.

/// Bytes looked at before the first decision.
const STRIDE: usize = 512;

/// Whether every byte is zero. Stops at the first stride that is not.
pub fn is_zero(bytes: &[u8]) -> bool {
    let mut strides = bytes.chunks_exact(STRIDE);
    // An OR over a whole stride has no branch inside, so that the compiler turns it into wide instructions.
    strides
        .by_ref()
        .all(|stride| stride.iter().fold(0, |seen, byte| seen | byte) == 0)
        && strides.remainder().iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_anywhere_is_found() {
        for length in [0, 1, 511, 512, 513, 4096, 5000] {
            let mut bytes = vec![0; length];
            assert!(is_zero(&bytes));
            for place in 0..length {
                bytes[place] = 0x80;
                assert!(!is_zero(&bytes), "{place} of {length}");
                bytes[place] = 0;
            }
        }
    }
}
