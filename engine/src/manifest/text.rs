//! The text of a manifest: [`Writer`] makes it, [`Reader`] reads it line by line and takes nothing that the writer would not have
//! written. Pure.
//!
//! ```text
//! blockyard-manifest 1
//! length 1073741824
//! extent 65536
//! zero 0 1048576
//! data 1048576 196608 8a1b2c3d 00ff10ee 4d5e6f70 <64 digits>
//! zero 1245184 1072496640
//! sha256 <64 digits>
//! ```
//! Offsets and lengths are in bytes. A `data` line is a run of extents within one block, none of which is all zeroes: the CRC-32 of
//! each, and the BLAKE3 of their BLAKE3 one behind the other. A `zero` line is a run that could not be longer. The last line is the
//! SHA-256 of all bytes before it. So there is one text for a disk's content, and its last line is a digest of that.

use std::fmt::Write as _;

use blockyard_storage::ByteRange;
use sha2::{Digest, Sha256};

use crate::manifest::sums::ExtentSum;
use crate::manifest::{BLOCK_BYTES, EXTENT_BYTES};

/// Longest line in bytes, with its end. The longest that is written has 257.
pub(crate) const LINE_MAX_BYTES: usize = 512;

const TITLE: &str = "blockyard-manifest 1";

/// What a line is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    /// All zeroes.
    Zero(ByteRange),
    /// Extents with something else in each.
    Data(DataRecord),
}

/// Extents of one block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DataRecord {
    /// Which bytes.
    pub(crate) range: ByteRange,
    /// The CRC-32 of each extent.
    pub(crate) crc32: Vec<u32>,
    /// The BLAKE3 of their BLAKE3.
    pub(crate) digest: [u8; 32],
}

impl Record {
    /// Which bytes.
    pub(crate) fn range(&self) -> ByteRange {
        match self {
            Record::Zero(range) => *range,
            Record::Data(data) => data.range,
        }
    }
}

/// The BLAKE3 of these extents' BLAKE3.
pub(crate) fn digest_of(sums: &[ExtentSum]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for sum in sums {
        hasher.update(&sum.digest);
    }
    *hasher.finalize().as_bytes()
}

/// Makes the text of a manifest.
pub(crate) struct Writer {
    text: String,
    seal: Sha256,
    zeroes: ByteRange,
    data: (ByteRange, Vec<ExtentSum>),
}

impl Writer {
    /// Of a disk of this length in bytes.
    pub(crate) fn new(length_bytes: u64) -> Self {
        Self {
            text: format!("{TITLE}\nlength {length_bytes}\nextent {EXTENT_BYTES}\n"),
            seal: Sha256::new(),
            zeroes: ByteRange::default(),
            data: (ByteRange::default(), Vec::new()),
        }
    }

    /// What comes next is zeroes.
    pub(crate) fn zeroes(&mut self, range: ByteRange) {
        if range.is_empty() {
            return;
        }
        self.end_data();
        self.zeroes = match self.zeroes.is_empty() {
            true => range,
            false => ByteRange::between(self.zeroes.offset(), range.end()),
        };
    }

    /// The next extent has this sum.
    pub(crate) fn extent(&mut self, extent: ByteRange, sum: ExtentSum) {
        self.end_zeroes();
        if extent.offset().is_multiple_of(BLOCK_BYTES) {
            self.end_data();
        }
        let (range, sums) = &mut self.data;
        *range = match sums.is_empty() {
            true => extent,
            false => ByteRange::between(range.offset(), extent.end()),
        };
        sums.push(sum);
    }

    /// What comes next is a line of another manifest, in a block of which nothing else is different.
    pub(crate) fn record(&mut self, data: &DataRecord) {
        self.end_zeroes();
        self.end_data();
        self.data_line(data.range, data.crc32.iter().copied(), &data.digest);
    }

    fn end_zeroes(&mut self) {
        let range = std::mem::take(&mut self.zeroes);
        if !range.is_empty() {
            self.line(&format!("zero {} {}", range.offset(), range.length()));
        }
    }

    fn end_data(&mut self) {
        let (range, sums) = std::mem::take(&mut self.data);
        if sums.is_empty() {
            return;
        }
        self.data_line(range, sums.iter().map(|sum| sum.crc32), &digest_of(&sums));
    }

    fn data_line(&mut self, range: ByteRange, crc32: impl Iterator<Item = u32>, digest: &[u8; 32]) {
        let mut line = format!("data {} {}", range.offset(), range.length());
        for crc32 in crc32 {
            // Writing to a string does not fail.
            let _ = write!(line, " {crc32:08x}");
        }
        let _ = write!(line, " {}", hex(digest));
        self.line(&line);
    }

    fn line(&mut self, line: &str) {
        self.text.push_str(line);
        self.text.push('\n');
    }

    /// Bytes of text that were not taken yet.
    pub(crate) fn waiting_bytes(&self) -> usize {
        self.text.len()
    }

    /// What the text goes on with.
    pub(crate) fn take(&mut self) -> String {
        let text = std::mem::take(&mut self.text);
        self.seal.update(text.as_bytes());
        text
    }

    /// The rest of the text.
    pub(crate) fn finish(mut self) -> String {
        self.end_zeroes();
        self.end_data();
        let mut text = self.take();
        let seal: [u8; 32] = self.seal.finalize().into();
        let _ = writeln!(text, "sha256 {}", hex(&seal));
        text
    }
}

/// Reads a manifest line by line.
pub(crate) struct Reader {
    seal: Sha256,
    lines: u64,
    length_bytes: u64,
    next: u64,
    last: Last,
}

/// What stood in the line before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Last {
    Nothing,
    Title,
    Length,
    Extent,
    Zero,
    Data,
    Seal([u8; 32]),
}

impl Reader {
    /// Nothing was read yet.
    pub(crate) fn new() -> Self {
        Self {
            seal: Sha256::new(),
            lines: 0,
            length_bytes: 0,
            next: 0,
            last: Last::Nothing,
        }
    }

    /// Length of the disk in bytes, once it was read.
    pub(crate) fn length_bytes(&self) -> u64 {
        self.length_bytes
    }

    /// Takes the next line, without its end.
    ///
    /// # Errors
    /// What is wrong with it, for the user.
    pub(crate) fn line(&mut self, line: &[u8]) -> Result<Option<Record>, String> {
        self.lines += 1;
        let taken = self.take_line(line);
        taken.map_err(|reason| format!("line {}: {reason}", self.lines))
    }

    fn take_line(&mut self, line: &[u8]) -> Result<Option<Record>, String> {
        let text = std::str::from_utf8(line).map_err(|_| "it is no text".to_owned())?;
        let mut words = text.split(' ');
        let word = words.next().unwrap_or_default();
        let (last, record) = match (self.last, word) {
            (Last::Nothing, _) if text == TITLE => {
                words.next();
                (Last::Title, None)
            }
            (Last::Nothing, "blockyard-manifest") => {
                return Err("a manifest of another version".to_owned());
            }
            (Last::Nothing, _) => return Err("it is no manifest".to_owned()),
            (Last::Title, "length") => {
                self.length_bytes = number(words.next())?;
                (Last::Length, None)
            }
            (Last::Length, "extent") => {
                let extent = number(words.next())?;
                if extent != EXTENT_BYTES {
                    return Err(format!("extents of {extent} bytes, not {EXTENT_BYTES}"));
                }
                (Last::Extent, None)
            }
            (Last::Extent | Last::Data, "zero") => {
                let range = self.range(words.next(), words.next())?;
                (Last::Zero, Some(Record::Zero(range)))
            }
            (Last::Extent | Last::Zero | Last::Data, "data") => {
                let range = self.range(words.next(), words.next())?;
                if self.last == Last::Data && !range.offset().is_multiple_of(BLOCK_BYTES) {
                    return Err("it goes on with the block of the line before".to_owned());
                }
                let data = data_record(range, &mut words)?;
                (Last::Data, Some(Record::Data(data)))
            }
            (Last::Extent | Last::Zero | Last::Data, "sha256") => {
                if self.next != self.length_bytes {
                    return Err(format!("nothing is said of byte {} and behind", self.next));
                }
                (Last::Seal(digest(words.next())?), None)
            }
            (Last::Seal(_), _) => return Err("there is something behind the end".to_owned()),
            _ => return Err(format!("'{word}' is not expected here", word = shown(word))),
        };
        if words.next().is_some() {
            return Err("there is more in it than expected".to_owned());
        }
        self.last = last;
        if !matches!(last, Last::Seal(_)) {
            self.seal.update(line);
            self.seal.update(b"\n");
        }
        Ok(record)
    }

    fn range(&mut self, offset: Option<&str>, length: Option<&str>) -> Result<ByteRange, String> {
        let (offset, length) = (number(offset)?, number(length)?);
        if offset != self.next {
            return Err(format!(
                "byte {offset} comes where byte {} is next",
                self.next
            ));
        }
        let end = offset
            .checked_add(length)
            .filter(|end| *end <= self.length_bytes);
        let Some(end) = end.filter(|_| length > 0) else {
            return Err(format!(
                "{length} bytes at {offset} do not lie within the disk"
            ));
        };
        if !end.is_multiple_of(EXTENT_BYTES) && end != self.length_bytes {
            return Err(format!("an extent ends at byte {end}"));
        }
        self.next = end;
        Ok(ByteRange::between(offset, end))
    }

    /// Everything was read.
    ///
    /// # Errors
    /// Why it is no whole manifest, for the user.
    pub(crate) fn finish(self) -> Result<(), String> {
        let Last::Seal(told) = self.last else {
            return Err(format!("it ends early, behind line {}", self.lines));
        };
        let found: [u8; 32] = self.seal.finalize().into();
        match told == found {
            true => Ok(()),
            false => {
                Err("it has changed since it was written: its SHA-256 is another one".to_owned())
            }
        }
    }
}

fn data_record<'a>(
    range: ByteRange,
    words: &mut impl Iterator<Item = &'a str>,
) -> Result<DataRecord, String> {
    if range.offset() / BLOCK_BYTES != (range.end() - 1) / BLOCK_BYTES {
        return Err("it is about more than one block".to_owned());
    }
    let mut crc32 = Vec::new();
    for _ in 0..range.length().div_ceil(EXTENT_BYTES) {
        let [a, b, c, d] = bytes_of(words.next())?;
        crc32.push(u32::from_be_bytes([a, b, c, d]));
    }
    Ok(DataRecord {
        range,
        crc32,
        digest: digest(words.next())?,
    })
}

/// A number as it is written.
fn number(word: Option<&str>) -> Result<u64, String> {
    let word = word.ok_or_else(|| "a number is missing".to_owned())?;
    let number = word
        .parse::<u64>()
        .ok()
        .filter(|number| number.to_string() == word);
    number.ok_or_else(|| format!("'{}' is no number", shown(word)))
}

fn digest(word: Option<&str>) -> Result<[u8; 32], String> {
    bytes_of(word)
}

fn bytes_of<const LENGTH: usize>(word: Option<&str>) -> Result<[u8; LENGTH], String> {
    let word = word.ok_or_else(|| "a checksum is missing".to_owned())?;
    let wrong = || format!("'{}' is no checksum of {LENGTH} bytes", shown(word));
    if word.len() != 2 * LENGTH {
        return Err(wrong());
    }
    let mut bytes = [0; LENGTH];
    for (byte, digits) in bytes.iter_mut().zip(word.as_bytes().chunks_exact(2)) {
        let [high, low] = digits else {
            return Err(wrong());
        };
        let (high, low) = (digit(*high), digit(*low));
        let (Some(high), Some(low)) = (high, low) else {
            return Err(wrong());
        };
        *byte = high << 4 | low;
    }
    Ok(bytes)
}

fn digit(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

/// A word of somebody else's file.
fn shown(word: &str) -> String {
    word.chars()
        .take(40)
        .flat_map(char::escape_default)
        .collect()
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
#[path = "text_tests.rs"]
mod tests;
