//! [`Der`]: reads the encoding that certificates have, as far as they use it. Nothing is believed of a length.
//!
//! Spec: X.690, "Basic encoding rules".

/// What is left to read of a value.
#[derive(Clone, Copy, Debug)]
pub(super) struct Der<'a> {
    bytes: &'a [u8],
}

/// Tags of values, with their class and form.
pub(super) mod tag {
    pub(in super::super) const BOOLEAN: u8 = 0x01;
    pub(in super::super) const BIT_STRING: u8 = 0x03;
    pub(in super::super) const OCTET_STRING: u8 = 0x04;
    pub(in super::super) const OBJECT_IDENTIFIER: u8 = 0x06;
    pub(in super::super) const UTC_TIME: u8 = 0x17;
    pub(in super::super) const GENERALIZED_TIME: u8 = 0x18;
    pub(in super::super) const SEQUENCE: u8 = 0x30;
    pub(in super::super) const SET: u8 = 0x31;
    /// `[0]`, around a version.
    pub(in super::super) const VERSION: u8 = 0xa0;
    /// `[3]`, around extensions.
    pub(in super::super) const EXTENSIONS: u8 = 0xa3;
}

impl<'a> Der<'a> {
    pub(super) const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The next value: its tag and its content.
    pub(super) fn next(&mut self) -> Option<(u8, &'a [u8])> {
        let (&tag, rest) = self.bytes.split_first()?;
        let (&first, rest) = rest.split_first()?;
        let (length, rest) = match first {
            0..=0x7f => (usize::from(first), rest),
            // Lengths that do not fit four bytes cannot be those of a certificate, and indefinite ones do not occur.
            0x81..=0x84 => {
                let (bytes, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
                let length = bytes.iter().try_fold(0_usize, |length, byte| {
                    length.checked_mul(256)?.checked_add(usize::from(*byte))
                });
                (length?, rest)
            }
            _ => return None,
        };
        let (content, rest) = rest.split_at_checked(length)?;
        self.bytes = rest;
        Some((tag, content))
    }

    /// The next value, which has this tag.
    pub(super) fn expect(&mut self, wanted: u8) -> Option<&'a [u8]> {
        let (tag, content) = self.next()?;
        (tag == wanted).then_some(content)
    }

    /// The next value if it has this tag, which is then read.
    pub(super) fn take_if(&mut self, wanted: u8) -> Option<&'a [u8]> {
        let mut ahead = *self;
        let content = ahead.expect(wanted)?;
        *self = ahead;
        Some(content)
    }
}

/// An object identifier as it is written: numbers and dots.
pub(super) fn identifier(content: &[u8]) -> Option<String> {
    let mut parts: Vec<u64> = Vec::new();
    let mut part: u64 = 0;
    for byte in content {
        part = part.checked_mul(128)?.checked_add(u64::from(byte & 0x7f))?;
        if byte & 0x80 == 0 {
            if parts.is_empty() {
                let first = (part / 40).min(2);
                parts.push(first);
                part -= first * 40;
            }
            parts.push(std::mem::take(&mut part));
        }
    }
    let texts: Vec<String> = parts.iter().map(u64::to_string).collect();
    (!texts.is_empty()).then(|| texts.join("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_and_lengths_are_not_believed() {
        let mut der = Der::new(&[0x30, 3, 1, 2, 3, 0x04, 0x81, 2, 9, 8]);
        assert_eq!(der.take_if(tag::SET), None);
        assert_eq!(der.expect(tag::SEQUENCE), Some(&[1, 2, 3][..]));
        assert_eq!(der.expect(tag::OCTET_STRING), Some(&[9, 8][..]));
        assert!(der.is_empty() && der.next().is_none());
        for broken in [
            &[0x30][..],
            &[0x30, 4, 1, 2, 3],
            &[0x30, 0x80, 0, 0],
            &[0x30, 0x84, 0xff, 0xff, 0xff, 0xff, 1],
            &[0x30, 0x85, 0, 0, 0, 0, 1, 1],
        ] {
            assert_eq!(Der::new(broken).next(), None, "{broken:x?}");
        }
        let email = [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 9, 1];
        assert_eq!(identifier(&email).as_deref(), Some("1.2.840.113549.1.9.1"));
        assert_eq!(identifier(&[0x55, 4, 3]).as_deref(), Some("2.5.4.3"));
        assert_eq!(identifier(&[0xff; 20]), None);
    }
}
