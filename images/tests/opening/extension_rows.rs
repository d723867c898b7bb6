//! Damage to header extensions.

use crate::images::{BITMAP_DIRECTORY, Image};
use crate::rows::Number::{Long, Word};
use crate::rows::{OPENS, Texts, all, extended};
use crate::table_rows::{LESS, MORE, NO_EXTRA};

/// Where the bitmap directory is.
const B: u64 = BITMAP_DIRECTORY;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const DATA_FILE_NAME: u32 = 0x4441_5441;
const CRYPTO: u32 = 0x0537_be77;
const FEATURE_NAMES: u32 = 0x6803_f857;
const BITMAPS: u32 = 0x2385_2875;

fn bitmaps_extension(bitmaps: u32, reserved: u32, length_bytes: u64, offset: u64) -> Vec<u8> {
    let mut data = bitmaps.to_be_bytes().to_vec();
    data.extend(reserved.to_be_bytes());
    data.extend(length_bytes.to_be_bytes());
    data.extend(offset.to_be_bytes());
    data
}

fn feature(kind: u8, bit: u8, name: &str) -> Vec<u8> {
    let mut entry = vec![kind, bit];
    entry.extend(name.as_bytes());
    entry.resize(48, 0);
    entry
}

pub(crate) fn extensions() -> Vec<(&'static str, Image, Texts)> {
    let names = [
        feature(0, 5, "five"),
        feature(1, 6, "not this"),
        feature(0, 7, "seven"),
    ]
    .concat();
    let bitmaps = |bitmaps, reserved, length_bytes, offset| {
        let data = bitmaps_extension(bitmaps, reserved, length_bytes, offset);
        extended(&[(BITMAPS, &data)], &[])
    };
    let mut cut_off = Image::valid();
    cut_off.put(8, &116_u64.to_be_bytes());
    let mut too_large = Image::valid();
    too_large.put(116, &5000_u32.to_be_bytes());
    let mut version_2 = Image::version_2();
    version_2.put(72, &[0; 8]);
    vec![
        (
            "an extension across the end",
            too_large,
            all("Header extension too large"),
        ),
        (
            "four bytes of an extension",
            cut_off,
            all("Header extension too large"),
        ),
        (
            "an end mark that is too long",
            {
                let mut image = extended(&[], &[(88, Long(0))]);
                image.put(116, &5000_u32.to_be_bytes());
                image
            },
            all("Header extension too large"),
        ),
        (
            "a backing format of 16 bytes",
            extended(&[(BACKING_FORMAT, &[b'x'; 16])], &[]),
            all("ERROR: ext_backing_format: len=16 too large (>=16)"),
        ),
        (
            "a backing format of 15 bytes",
            extended(&[(BACKING_FORMAT, &[b'x'; 15])], &[]),
            OPENS,
        ),
        (
            "a data file's name",
            extended(&[(DATA_FILE_NAME, b"/etc/shadow")], &[]),
            OPENS,
        ),
        (
            "an encryption header without encryption",
            extended(&[(CRYPTO, &[0; 16])], &[]),
            all("CRYPTO header extension only expected with LUKS encryption method"),
        ),
        (
            "an encryption header of 15 bytes",
            extended(&[(CRYPTO, &[0; 15])], &[(32, Word(2))]),
            all("CRYPTO header extension size 15, but expected size 16"),
        ),
        (
            "an encryption header at 512",
            extended(
                &[(CRYPTO, &[[0, 0, 0, 0, 0, 0, 2, 0], [0; 8]].concat())],
                &[(32, Word(2))],
            ),
            all("Encryption header offset '512' is not a multiple of cluster size '4096'"),
        ),
        (
            "features with names",
            extended(&[(FEATURE_NAMES, &names)], &[(72, Long(0xe0))]),
            all("Unsupported qcow2 feature(s): five, seven, Unknown incompatible feature: 40"),
        ),
        (
            "a bitmaps extension of 23 bytes",
            extended(&[(BITMAPS, &[0; 23])], &[]),
            all("bitmaps_ext: Invalid extension length"),
        ),
        (
            "reserved bits of bitmaps",
            bitmaps(2, 1, 64, B),
            all("bitmaps_ext: Reserved field is not zero"),
        ),
        (
            "no bitmaps",
            bitmaps(0, 0, 64, B),
            all("found bitmaps extension with zero bitmaps"),
        ),
        ("65535 bitmaps", bitmaps(65_535, 0, 64, B), all(LESS)),
        (
            "65536 bitmaps",
            bitmaps(65_536, 0, 64, B),
            all(
                "bitmaps_ext: Image has 65536 bitmaps, exceeding the QEMU supported maximum of 65535",
            ),
        ),
        (
            "2^32-1 bitmaps",
            bitmaps(u32::MAX, 0, 64, B),
            all(
                "bitmaps_ext: Image has 4294967295 bitmaps, exceeding the QEMU supported maximum of 65535",
            ),
        ),
        (
            "a directory at + 8",
            bitmaps(2, 0, 64, B + 8),
            all("bitmaps_ext: invalid bitmap directory offset"),
        ),
        (
            "a directory in the header",
            bitmaps(2, 0, 64, 0),
            all(NO_EXTRA),
        ),
        (
            "a directory behind the end",
            bitmaps(2, 0, 64, 1 << 40),
            all("Bitmap '' doesn't satisfy the constraints"),
        ),
        (
            "a directory of 64 MiB",
            bitmaps(2, 0, 67_107_841, B),
            all(
                "bitmaps_ext: bitmap directory size (67107841) exceeds the maximum supported size (67107840)",
            ),
        ),
        (
            "the largest directory",
            bitmaps(2, 0, 67_107_840, B),
            all(MORE),
        ),
        (
            "bitmaps that are not valid",
            extended(
                &[(BITMAPS, &bitmaps_extension(7, 1, 5, 5))],
                &[(88, Long(0))],
            ),
            OPENS,
        ),
        ("no bitmaps extension", extended(&[], &[]), OPENS),
        (
            "an unknown extension",
            extended(&[(0x1234_5678, &[7; 100])], &[]),
            OPENS,
        ),
        ("version 2", version_2, OPENS),
    ]
}
