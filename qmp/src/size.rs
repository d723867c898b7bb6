//! Numbers of bytes as people write and read them: suffixes from `B` to `E`, each 1024 times the one before.

const SUFFIXES: [char; 7] = ['b', 'k', 'm', 'g', 't', 'p', 'e'];

/// What [`parse`] takes, for messages.
pub const EXPECTED: &str =
    "a number of bytes, or one followed by k, M, G, T, P or E (each 1024 times the one before)";

/// Reads a number of bytes: decimal, possibly a fraction with a suffix, or hexadecimal behind `0x`. `None` if it is
/// anything else or does not fit.
pub fn parse(text: &str) -> Option<u64> {
    let lower = text.to_ascii_lowercase();
    if let Some(hex) = lower.strip_prefix("0x") {
        // `from_str_radix` would take a sign.
        return hex
            .starts_with(|first: char| first.is_ascii_hexdigit())
            .then(|| u64::from_str_radix(hex, 16).ok())?;
    }
    let scale = SUFFIXES.iter().position(|suffix| lower.ends_with(*suffix));
    let digits = if scale.is_some() {
        &lower[..lower.len() - 1]
    } else {
        &lower
    };
    let unit = 1_i128 << (10 * scale.unwrap_or(0));
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let all_digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if !all_digits(whole) || !all_digits(fraction) || whole.is_empty() || fraction.len() > 18 {
        return None;
    }
    let whole: i128 = whole.parse().ok()?;
    let mut bytes = whole.checked_mul(unit)?;
    if !fraction.is_empty() {
        if scale.unwrap_or(0) == 0 {
            return None;
        }
        let parts: i128 = fraction.parse().ok()?;
        bytes += parts * unit / 10_i128.pow(u32::try_from(fraction.len()).ok()?);
    }
    u64::try_from(bytes).ok()
}

/// A number of bytes with one decimal place in the largest unit that it fills: `512 B`, `1.5 GiB`.
pub fn shown(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    let mut value = bytes as f64;
    // What would be shown as 1024.0 belongs to the next unit.
    while value >= 1023.95 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{bytes} B")
    } else {
        format!("{value:.1} {}", units[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_and_without_suffix() {
        for (text, expected) in [
            ("0", Some(0)),
            ("512", Some(512)),
            ("512b", Some(512)),
            ("1k", Some(1024)),
            ("1.5G", Some(3 << 29)),
            ("100M", Some(100 << 20)),
            ("2t", Some(2 << 40)),
            ("15E", Some(15 << 60)),
            ("0x10", Some(16)),
            ("16E", None),
            ("18446744073709551616", None),
            ("1.5", None),
            ("", None),
            ("k", None),
            (".5k", None),
            ("-1", None),
            ("+1", None),
            ("0x+1", None),
            ("0x", None),
            ("1 k", None),
            ("1MiB", None),
            ("1kk", None),
            ("é", None),
        ] {
            assert_eq!(parse(text), expected, "{text:?}");
        }
    }

    #[test]
    fn sizes_are_shown_in_the_largest_unit_they_fill() {
        for (bytes, expected) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (3 << 29, "1.5 GiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(shown(bytes), expected);
        }
    }
}
