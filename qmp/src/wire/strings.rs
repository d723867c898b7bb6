//! What stands in a string token: UTF-8, escapes, and what is neither.

use crate::wire::reader::ReadError;

/// Appends the content of a string token, which still has its quotes.
///
/// # Errors
/// In QEMU's words: the first escape or sequence that is none.
pub fn unescape(token: &[u8], text: &mut String) -> Result<(), ReadError> {
    let [quote, inner @ .., _] = token else {
        return Ok(());
    };
    let mut rest = inner;
    while let Some(place) = backslash(rest) {
        let (plain, escape) = rest.split_at(place);
        append_plain(plain, text)?;
        let Some((b'\\', [kind, behind @ ..])) = escape.split_first() else {
            break;
        };
        rest = behind;
        text.push(match kind {
            b'"' | b'\'' | b'\\' | b'/' => char::from(*kind),
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => unicode(&mut rest, *quote)?,
            _ => return Err(ReadError::parse("invalid escape sequence in string")),
        });
    }
    append_plain(rest, text)
}

fn backslash(bytes: &[u8]) -> Option<usize> {
    // Looking for one at all takes a fraction of the time.
    if !bytes.contains(&b'\\') {
        return None;
    }
    bytes.iter().position(|byte| *byte == b'\\')
}

fn append_plain(bytes: &[u8], text: &mut String) -> Result<(), ReadError> {
    match std::str::from_utf8(bytes) {
        Ok(plain) if plain.is_ascii() || !plain.chars().any(is_noncharacter) => {
            text.push_str(plain);
            Ok(())
        }
        _ => Err(ReadError::parse("invalid UTF-8 sequence in string")),
    }
}

/// Takes what follows `\u`: four digits, or two escapes that are one character. Errors also show the quote behind it.
fn unicode(rest: &mut &[u8], quote: u8) -> Result<char, ReadError> {
    let shown = *rest;
    let bad = |length: usize| {
        let shown: Vec<u8> = shown.iter().copied().chain([quote]).take(length).collect();
        let shown = String::from_utf8_lossy(&shown);
        ReadError::parse(format!("\\u{shown} is not a valid Unicode character"))
    };
    let first = take_unit(rest).ok_or_else(|| bad(4))?;
    if !(0xd800..0xdc00).contains(&first) {
        return character(first).ok_or_else(|| bad(4));
    }
    let second = rest.strip_prefix(b"\\u").and_then(|mut behind| {
        let unit = take_unit(&mut behind);
        *rest = behind;
        unit
    });
    match second {
        Some(second) if (0xdc00..0xe000).contains(&second) => {
            let code = 0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00);
            character(code).ok_or_else(|| bad(10))
        }
        _ => Err(bad(4)),
    }
}

/// Takes four hexadecimal digits.
fn take_unit(rest: &mut &[u8]) -> Option<u32> {
    let (digits, behind) = rest.split_first_chunk::<4>()?;
    *rest = behind;
    digits.iter().try_fold(0, |unit, digit| {
        Some(unit << 4 | char::from(*digit).to_digit(16)?)
    })
}

fn character(code: u32) -> Option<char> {
    char::from_u32(code).filter(|character| !is_noncharacter(*character))
}

fn is_noncharacter(character: char) -> bool {
    let code = u32::from(character);
    (0xfdd0..=0xfdef).contains(&code) || code & 0xfffe == 0xfffe
}
