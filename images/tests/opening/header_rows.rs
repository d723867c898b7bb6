//! Damage to the numbers of the header, apart from those that describe tables.

use crate::rows::Number::{Byte, Long, Word};
use crate::rows::{Fields, OPENS, all, content, writing};

const TOO_WIDE: &str = "Reference count entry width too large; may not exceed 64 bits";
const TOO_SHORT: &str = "qcow2 header too short";
const TOO_LONG: &str = "qcow2 header exceeds cluster size";
const BACKING_OFFSET: &str = "Invalid backing file offset";
const NEEDS_KEY: &str = "Parameter 'encrypt.key-secret' is required for cipher";
const TOTAL: &str = "Could not refresh total sector count: File too large";
const ZLIB_MARKED: &str = "qcow2: Compression type incompatible feature bit must not be set";
const ZSTD_UNMARKED: &str = "qcow2: Compression type incompatible feature bit must be set";

pub(crate) fn fields() -> Fields {
    vec![
        ("nothing", vec![], OPENS),
        (
            "magic",
            vec![(0, Byte(0))],
            all("Image is not in qcow2 format"),
        ),
        (
            "version 0",
            vec![(4, Word(0))],
            all("Unsupported qcow2 version 0"),
        ),
        (
            "version 1",
            vec![(4, Word(1))],
            all("Unsupported qcow2 version 1"),
        ),
        (
            "version 4",
            vec![(4, Word(4))],
            all("Unsupported qcow2 version 4"),
        ),
        (
            "version 2^32-1",
            vec![(4, Word(u32::MAX))],
            all("Unsupported qcow2 version 4294967295"),
        ),
        (
            "cluster_bits 0",
            vec![(20, Word(0))],
            all("Unsupported cluster size: 2^0"),
        ),
        (
            "cluster_bits 8",
            vec![(20, Word(8))],
            all("Unsupported cluster size: 2^8"),
        ),
        (
            "cluster_bits 22",
            vec![(20, Word(22))],
            all("Unsupported cluster size: 2^22"),
        ),
        (
            "cluster_bits 63",
            vec![(20, Word(63))],
            all("Unsupported cluster size: 2^63"),
        ),
        (
            "cluster_bits 64",
            vec![(20, Word(64))],
            all("Unsupported cluster size: 2^64"),
        ),
        (
            "cluster_bits 255",
            vec![(20, Word(255))],
            all("Unsupported cluster size: 2^255"),
        ),
        (
            "cluster_bits 2^32-1",
            vec![(20, Word(u32::MAX))],
            all("Unsupported cluster size: 2^4294967295"),
        ),
        ("header_length 0", vec![(100, Word(0))], all(TOO_SHORT)),
        ("header_length 103", vec![(100, Word(103))], all(TOO_SHORT)),
        ("header_length 4097", vec![(100, Word(4097))], all(TOO_LONG)),
        (
            "header_length 2^31",
            vec![(100, Word(1 << 31))],
            all(TOO_LONG),
        ),
        (
            "header_length 2^32-1",
            vec![(100, Word(u32::MAX))],
            all(TOO_LONG),
        ),
        (
            "backing_file_offset 4097",
            vec![(8, Long(4097))],
            all(BACKING_OFFSET),
        ),
        (
            "backing_file_offset 2^63",
            vec![(8, Long(1 << 63))],
            all(BACKING_OFFSET),
        ),
        (
            "backing_file_offset 2^64-1",
            vec![(8, Long(u64::MAX))],
            all(BACKING_OFFSET),
        ),
        (
            "backing_file_offset 4096 and a byte",
            vec![(8, Long(4096)), (16, Word(1))],
            all("Backing file name too long"),
        ),
        (
            "backing_file_size 1024",
            vec![(8, Long(1024)), (16, Word(1024))],
            all("Backing file name too long"),
        ),
        (
            "backing_file_size 2^32-1",
            vec![(8, Long(1024)), (16, Word(u32::MAX))],
            all("Backing file name too long"),
        ),
        (
            "backing_file_size without an offset",
            vec![(16, Word(u32::MAX))],
            OPENS,
        ),
        ("no backing_file_size", vec![(8, Long(1024))], OPENS),
        (
            "incompatible bit 5",
            vec![(72, Long(1 << 5))],
            all("Unsupported qcow2 feature(s): Unknown incompatible feature: 20"),
        ),
        (
            "incompatible bit 63",
            vec![(72, Long(1 << 63))],
            all("Unsupported qcow2 feature(s): Unknown incompatible feature: 8000000000000000"),
        ),
        (
            "corrupt",
            vec![(72, Long(2))],
            writing("qcow2: Image is corrupt; cannot be opened read/write"),
        ),
        (
            "extended L2",
            vec![(72, Long(16))],
            all("Unsupported subcluster size: 128"),
        ),
        (
            "compression type 1",
            vec![(104, Byte(1))],
            all(ZSTD_UNMARKED),
        ),
        (
            "compression type bit",
            vec![(72, Long(8))],
            all(ZLIB_MARKED),
        ),
        (
            "compression type 2",
            vec![(72, Long(8)), (104, Byte(2))],
            all("qcow2: unknown compression type: 2"),
        ),
        ("zstd", vec![(72, Long(8)), (104, Byte(1))], OPENS),
        ("refcount_order 0", vec![(96, Word(0))], OPENS),
        ("refcount_order 7", vec![(96, Word(7))], all(TOO_WIDE)),
        ("refcount_order 63", vec![(96, Word(63))], all(TOO_WIDE)),
        ("refcount_order 64", vec![(96, Word(64))], all(TOO_WIDE)),
        (
            "refcount_order 2^32-1",
            vec![(96, Word(u32::MAX))],
            all(TOO_WIDE),
        ),
        ("crypt_method 1", vec![(32, Word(1))], content(NEEDS_KEY)),
        (
            "crypt_method 2",
            vec![(32, Word(2))],
            all("Missing CRYPTO header for crypt method 2"),
        ),
        (
            "crypt_method 3",
            vec![(32, Word(3))],
            all("Unsupported encryption method 3"),
        ),
        (
            "crypt_method 2^32-1",
            vec![(32, Word(u32::MAX))],
            all("Unsupported encryption method -1"),
        ),
        (
            "size 2^60",
            vec![(24, Long(1 << 60))],
            all("Image is too big"),
        ),
        (
            "size 2^63-1",
            vec![(24, Long(i64::MAX as u64))],
            all("Image is too big"),
        ),
        (
            "size 2^63",
            vec![(24, Long(1 << 63))],
            all("Image is too big"),
        ),
        (
            "size 2^64-1",
            vec![(24, Long(u64::MAX)), (88, Long(0))],
            all(TOTAL),
        ),
        (
            "size not in sectors",
            vec![(24, Long((64 << 20) - 1))],
            OPENS,
        ),
        (
            "raw without data file",
            vec![(88, Long(3))],
            content("data-file-raw requires a data file"),
        ),
        ("unknown compatible bits", vec![(80, Long(u64::MAX))], OPENS),
        ("unknown autoclear bits", vec![(88, Long(!2))], OPENS),
        (
            "longer header",
            vec![(100, Word(512)), (88, Long(0))],
            OPENS,
        ),
    ]
}
