//! [`Certificate`]: what has to be known of a certificate besides what a handshake checks: whom it names, and what it may be used
//! for. Pure.
//!
//! Spec: RFC 5280, "Certificate and Certificate Extensions Profile".

use std::fmt::Write;

use crate::tls::der::{Der, identifier, tag};

/// What a certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// Whom it names, in the order in which that stands in it: `C=GB,O=Example,CN=laptop`.
    pub subject: String,
    /// Seconds since 1970 from which it is good.
    pub not_before: i64,
    /// Seconds since 1970 until which it is good.
    pub not_after: i64,
    /// Whether its key signs other certificates; `None`: it does not say.
    pub is_ca: Option<bool>,
    /// What its key may do, if it says so.
    pub usage: Option<Usage>,
    /// What it may be used for, as object identifiers, if it says so; and whether all others are ruled out.
    pub purposes: Option<(Vec<String>, bool)>,
}

/// What a key may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    bits: u16,
    /// Everything else is ruled out.
    pub is_critical: bool,
}

impl Usage {
    /// Sign messages.
    pub const DIGITAL_SIGNATURE: u16 = 1 << 15;
    /// Encrypt keys.
    pub const KEY_ENCIPHERMENT: u16 = 1 << 13;
    /// Sign certificates.
    pub const CERTIFICATE_SIGN: u16 = 1 << 10;

    /// Whether it may do this.
    pub const fn allows(self, use_bit: u16) -> bool {
        self.bits & use_bit != 0
    }
}

const KEY_USAGE: &str = "2.5.29.15";
const BASIC_CONSTRAINTS: &str = "2.5.29.19";
const EXTENDED_KEY_USAGE: &str = "2.5.29.37";

/// How parts of a name are called.
const ATTRIBUTES: &[(&str, &str)] = &[
    ("2.5.4.3", "CN"),
    ("2.5.4.4", "surName"),
    ("2.5.4.5", "serialNumber"),
    ("2.5.4.6", "C"),
    ("2.5.4.7", "L"),
    ("2.5.4.8", "ST"),
    ("2.5.4.9", "street"),
    ("2.5.4.10", "O"),
    ("2.5.4.11", "OU"),
    ("2.5.4.12", "title"),
    ("2.5.4.42", "givenName"),
    ("0.9.2342.19200300.100.1.1", "UID"),
    ("0.9.2342.19200300.100.1.25", "DC"),
    ("1.2.840.113549.1.9.1", "EMAIL"),
];

/// UTF8String, NumericString, PrintableString, TeletexString, IA5String: text as it is.
const TEXT_TAGS: [u8; 5] = [0x0c, 0x12, 0x13, 0x14, 0x16];

impl Certificate {
    /// Reads a certificate; `None`: that is none.
    pub fn read(der: &[u8]) -> Option<Self> {
        let whole = Der::new(der).expect(tag::SEQUENCE)?;
        let signed = Der::new(whole).expect(tag::SEQUENCE)?;
        let mut signed = Der::new(signed);
        let _version = signed.take_if(tag::VERSION);
        let _serial_number = signed.next()?;
        let _algorithm = signed.expect(tag::SEQUENCE)?;
        let _issuer = signed.expect(tag::SEQUENCE)?;
        let mut validity = Der::new(signed.expect(tag::SEQUENCE)?);
        let subject = name(signed.expect(tag::SEQUENCE)?)?;
        let _key = signed.expect(tag::SEQUENCE)?;
        let mut certificate = Self {
            subject,
            not_before: time(validity.next()?)?,
            not_after: time(validity.next()?)?,
            is_ca: None,
            usage: None,
            purposes: None,
        };
        while let Some((found, content)) = signed.next() {
            if found == tag::EXTENSIONS {
                let mut extensions = Der::new(Der::new(content).expect(tag::SEQUENCE)?);
                while !extensions.is_empty() {
                    certificate.take_extension(extensions.expect(tag::SEQUENCE)?)?;
                }
            }
        }
        Some(certificate)
    }

    fn take_extension(&mut self, content: &[u8]) -> Option<()> {
        let mut extension = Der::new(content);
        let id = identifier(extension.expect(tag::OBJECT_IDENTIFIER)?)?;
        let is_critical = extension.take_if(tag::BOOLEAN).is_some_and(is_true);
        let value = extension.expect(tag::OCTET_STRING)?;
        match id.as_str() {
            BASIC_CONSTRAINTS => {
                let mut constraints = Der::new(Der::new(value).expect(tag::SEQUENCE)?);
                self.is_ca = Some(constraints.take_if(tag::BOOLEAN).is_some_and(is_true));
            }
            KEY_USAGE => {
                let bits = Der::new(value).expect(tag::BIT_STRING)?;
                let byte = |place: usize| u16::from(bits.get(place).copied().unwrap_or(0));
                self.usage = Some(Usage {
                    bits: byte(1) << 8 | byte(2),
                    is_critical,
                });
            }
            EXTENDED_KEY_USAGE => {
                let mut list = Der::new(Der::new(value).expect(tag::SEQUENCE)?);
                let mut purposes = Vec::new();
                while !list.is_empty() {
                    purposes.push(identifier(list.expect(tag::OBJECT_IDENTIFIER)?)?);
                }
                self.purposes = Some((purposes, is_critical));
            }
            _ => {}
        }
        Some(())
    }
}

fn is_true(content: &[u8]) -> bool {
    content.first().is_some_and(|byte| *byte != 0)
}

/// A name as text. Spec: RFC 4514, in the order of the certificate.
fn name(content: &[u8]) -> Option<String> {
    let mut parts = Der::new(content);
    let mut shown = String::new();
    while !parts.is_empty() {
        if !shown.is_empty() {
            shown.push(',');
        }
        let mut set = Der::new(parts.expect(tag::SET)?);
        let mut is_first = true;
        while !set.is_empty() {
            if !std::mem::take(&mut is_first) {
                shown.push('+');
            }
            let mut attribute = Der::new(set.expect(tag::SEQUENCE)?);
            let id = identifier(attribute.expect(tag::OBJECT_IDENTIFIER)?)?;
            let (kind, value) = attribute.next()?;
            show_attribute(&mut shown, &id, kind, value);
        }
    }
    Some(shown)
}

fn show_attribute(shown: &mut String, id: &str, kind: u8, value: &[u8]) {
    let known = ATTRIBUTES.iter().find(|(known, _)| *known == id);
    let text = std::str::from_utf8(value).ok();
    let text = text.filter(|_| TEXT_TAGS.contains(&kind));
    if let (Some((_, name)), Some(text)) = (known, text) {
        shown.push_str(name);
        shown.push('=');
        escape(shown, text);
        return;
    }
    shown.push_str(known.map_or(id, |(_, name)| name));
    shown.push_str("=#");
    for byte in value {
        // Writing to a text cannot fail.
        let _ = write!(shown, "{byte:02x}");
    }
}

/// So that no value can look like another name.
fn escape(shown: &mut String, text: &str) {
    let last = text.chars().count().saturating_sub(1);
    for (place, character) in text.chars().enumerate() {
        let at_edge = place == 0 && character == '#' || matches!(place, 0) && character == ' ';
        let at_edge = at_edge || place == last && character == ' ';
        if character == '\0' {
            shown.push_str("\\00");
            continue;
        }
        if at_edge || matches!(character, ',' | '+' | '"' | '\\' | '<' | '>' | ';') {
            shown.push('\\');
        }
        shown.push(character);
    }
}

/// Seconds since 1970.
fn time((kind, content): (u8, &[u8])) -> Option<i64> {
    let text = std::str::from_utf8(content).ok()?.strip_suffix('Z')?;
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let (year, rest) = match kind {
        tag::UTC_TIME => {
            let (year, rest) = text.split_at_checked(2)?;
            let year: i64 = year.parse().ok()?;
            (if year < 50 { 2000 + year } else { 1900 + year }, rest)
        }
        tag::GENERALIZED_TIME => {
            let (year, rest) = text.split_at_checked(4)?;
            (year.parse().ok()?, rest)
        }
        _ => return None,
    };
    if rest.len() != 10 {
        return None;
    }
    let part = |place: usize| rest.get(place * 2..place * 2 + 2)?.parse::<i64>().ok();
    let (month, day) = (part(0)?, part(1)?);
    if !(1..=12).contains(&month) {
        return None;
    }
    // Years begin in March here, so that the odd day comes last.
    let shifted = if month > 2 { year } else { year - 1 };
    let days_before = (153 * ((month + 9) % 12) + 2) / 5;
    let leap_days = shifted.div_euclid(4) - shifted.div_euclid(100) + shifted.div_euclid(400);
    let days = 365 * shifted + leap_days + days_before + day - 1 - 719_468;
    Some(days * 86_400 + part(2)? * 3600 + part(3)? * 60 + part(4)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read() {
        let utc = |text: &str| time((tag::UTC_TIME, text.as_bytes()));
        let general = |text: &str| time((tag::GENERALIZED_TIME, text.as_bytes()));
        assert_eq!(utc("700101000000Z"), Some(0));
        assert_eq!(utc("000229120000Z"), Some(951_825_600));
        assert_eq!(utc("491231235959Z"), general("20491231235959Z"));
        assert_eq!(general("21000301000000Z"), Some(4_107_542_400));
        for broken in [
            "",
            "7001010000Z",
            "701301000000Z",
            "70010100000xZ",
            "700101000000",
        ] {
            assert_eq!(utc(broken), None, "{broken}");
        }
    }

    #[test]
    fn nothing_in_a_name_can_look_like_another_one() {
        let mut shown = String::new();
        escape(&mut shown, " a,b+c\"d\\e<f>g;h#i=j\0 ");
        assert_eq!(shown, "\\ a\\,b\\+c\\\"d\\\\e\\<f\\>g\\;h#i=j\\00\\ ");
        let mut shown = String::new();
        show_attribute(&mut shown, "1.2.3", 0x0c, b"x");
        assert_eq!(shown, "1.2.3=#78");
        // CN=a, O=b and an e-mail address, as a printed name has them.
        let part = |id: &[u8], kind: u8, text: &[u8]| {
            let mut attribute = vec![6, u8::try_from(id.len()).expect("short")];
            attribute.extend(id);
            attribute.extend([kind, u8::try_from(text.len()).expect("short")]);
            attribute.extend(text);
            let mut set = vec![0x30, u8::try_from(attribute.len()).expect("short")];
            set.extend(attribute);
            let mut part = vec![0x31, u8::try_from(set.len()).expect("short")];
            part.extend(set);
            part
        };
        let encoded = [
            part(&[0x55, 4, 10], 0x13, b"b"),
            part(&[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 9, 1], 0x16, b"x@y"),
            part(&[0x55, 4, 3], 0x0c, b"a"),
        ];
        assert_eq!(
            name(&encoded.concat()).as_deref(),
            Some("O=b,EMAIL=x@y,CN=a")
        );
    }

    #[test]
    fn what_is_no_certificate_is_refused() {
        for bytes in [&b""[..], b"\x30\x00", b"\x30\x03\x30\x01\x02", b"garbage"] {
            assert_eq!(Certificate::read(bytes), None);
        }
    }
}
