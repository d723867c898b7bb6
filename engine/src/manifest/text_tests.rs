//! Tests of the text of a manifest: whatever disk is written is read again, and nothing else is.

use proptest::prelude::*;

use super::*;

/// Extents of a disk: how many are zeroes, and then how many are data.
fn disks() -> impl Strategy<Value = (Vec<(u64, u64)>, u64)> {
    let runs = proptest::collection::vec((0_u64..1 << 20, 0_u64..40), 1..6);
    (runs, 0_u64..128)
}

fn sum(extent: u64) -> ExtentSum {
    ExtentSum::of(&extent.to_le_bytes(), true)
}

/// The text of such a disk, whose last extent lacks some sectors, and its records.
fn written(runs: &[(u64, u64)], missing_sectors: u64) -> (String, Vec<Record>, u64) {
    let extents: u64 = runs.iter().map(|(zero, data)| zero + data).sum();
    let length = (extents * EXTENT_BYTES).saturating_sub(missing_sectors * 512);
    let (mut writer, mut text, mut at) = (Writer::new(length), String::new(), 0);
    let mut records: Vec<Record> = Vec::new();
    for (zero, data) in runs {
        let zeroes = ByteRange::new(at, zero * EXTENT_BYTES).clamp_end(length);
        writer.zeroes(zeroes);
        match records.last_mut() {
            _ if zeroes.is_empty() => {}
            Some(Record::Zero(range)) => *range = ByteRange::between(range.offset(), zeroes.end()),
            _ => records.push(Record::Zero(zeroes)),
        }
        at += zero * EXTENT_BYTES;
        for _ in 0..*data {
            let extent = ByteRange::new(at, EXTENT_BYTES).clamp_end(length);
            writer.extent(extent, sum(at));
            match records.last_mut() {
                Some(Record::Data(record))
                    if record.range.offset() / BLOCK_BYTES == at / BLOCK_BYTES =>
                {
                    record.range = ByteRange::between(record.range.offset(), extent.end());
                    record.crc32.push(sum(at).crc32);
                }
                _ => records.push(Record::Data(DataRecord {
                    range: extent,
                    crc32: vec![sum(at).crc32],
                    digest: [0; 32],
                })),
            }
            at += EXTENT_BYTES;
            if writer.waiting_bytes() > 700 {
                text += &writer.take();
            }
        }
    }
    text += &writer.finish();
    for record in &mut records {
        if let Record::Data(record) = record {
            let first = record.range.offset() / EXTENT_BYTES;
            let extents = first..first + record.crc32.len() as u64;
            let sums: Vec<_> = extents.map(|extent| sum(extent * EXTENT_BYTES)).collect();
            record.digest = digest_of(&sums);
        }
    }
    (text, records, length)
}

fn read(text: &[u8]) -> Result<(Vec<Record>, u64), String> {
    let (mut reader, mut records) = (Reader::new(), Vec::new());
    let mut lines: Vec<&[u8]> = text.split(|byte| *byte == b'\n').collect();
    if lines.pop() != Some(&[]) {
        return Err("no end of the last line".to_owned());
    }
    for line in lines {
        records.extend(reader.line(line)?);
    }
    let length = reader.length_bytes();
    reader.finish().map(|()| (records, length))
}

proptest! {
    #[test]
    fn what_is_written_is_read_again((runs, missing) in disks()) {
        let (text, records, length) = written(&runs, missing);
        prop_assert!(text.lines().all(|line| line.len() < LINE_MAX_BYTES));
        prop_assert_eq!(read(text.as_bytes()), Ok((records, length)));
    }

    #[test]
    fn a_changed_byte_is_found((runs, missing) in disks(), place in any::<prop::sample::Index>(), bit in 0_u32..8) {
        let (text, ..) = written(&runs, missing);
        let mut bytes = text.into_bytes();
        let place = place.index(bytes.len());
        bytes[place] ^= 1 << bit;
        prop_assert!(read(&bytes).is_err());
    }

    #[test]
    fn a_truncated_manifest_is_found((runs, missing) in disks(), place in any::<prop::sample::Index>()) {
        let (text, ..) = written(&runs, missing);
        let cut = &text.as_bytes()[..place.index(text.len())];
        prop_assert!(read(cut).is_err());
    }

    #[test]
    fn anything_else_is_no_manifest(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(read(&bytes).is_err());
    }
}

/// A text with a seal that fits.
fn sealed(lines: &str) -> String {
    let mut seal = Sha256::new();
    seal.update(lines.as_bytes());
    let seal: [u8; 32] = seal.finalize().into();
    format!("{lines}sha256 {}\n", hex(&seal))
}

#[test]
fn a_manifest_that_says_what_none_can_say_is_refused() {
    let head = "blockyard-manifest 1\nlength 2097152\nextent 65536\n";
    let zero = format!("data 0 65536 00000000 {}\n", "0".repeat(64));
    let refusals = [
        ("", "nothing is said of byte 0 and behind"),
        ("zero 0 2097153\n", "do not lie within the disk"),
        ("zero 0 0\n", "do not lie within the disk"),
        (
            "zero 0 18446744073709551615\n",
            "do not lie within the disk",
        ),
        (
            "zero 65536 65536\n",
            "byte 65536 comes where byte 0 is next",
        ),
        ("zero 0 512\n", "an extent ends at byte 512"),
        ("zero 00 65536\n", "'00' is no number"),
        ("zero +0 65536\n", "'+0' is no number"),
        (
            "zero 0 65536\nzero 65536 65536\n",
            "'zero' is not expected here",
        ),
        ("zero 0  65536\n", "'' is no number"),
        ("zero 0 65536 \n", "there is more in it than expected"),
        ("zero 0\n", "a number is missing"),
        ("data 0 65536 00000000\n", "a checksum is missing"),
        ("data 0 65536 0000000\n", "is no checksum of 4 bytes"),
        ("data 0 65536 0000000G\n", "is no checksum of 4 bytes"),
        (
            "data 0 2097152 00000000\n",
            "it is about more than one block",
        ),
        ("length 2097152\n", "'length' is not expected here"),
        ("\n", "'' is not expected here"),
        (
            &*format!("{zero}{}", zero.replace("data 0", "data 65536")),
            "it goes on with the block of the line before",
        ),
        (&*zero, "nothing is said of byte 65536 and behind"),
    ];
    for (lines, reason) in refusals {
        let refused = read(sealed(&format!("{head}{lines}")).as_bytes());
        let text = refused.expect_err(lines);
        assert!(text.contains(reason), "{lines:?}: {text}");
    }
    let whole = sealed(&format!("{head}zero 0 2097152\n"));
    assert!(read(whole.as_bytes()).is_ok());
    let text = read(format!("{whole}x\n").as_bytes()).expect_err("more");
    assert!(text.contains("behind the end"), "{text}");
    let text = read(whole.replace("manifest 1", "manifest 2").as_bytes());
    assert!(
        text.expect_err("another version")
            .contains("another version")
    );
}

#[test]
fn a_disk_of_nothing_has_a_manifest() {
    let text = Writer::new(0).finish();
    assert_eq!(read(text.as_bytes()), Ok((Vec::new(), 0)));
}
