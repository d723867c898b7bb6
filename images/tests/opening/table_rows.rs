//! Damage to tables: how long they are, where, and what their entries say.

use crate::images::{
    BITMAP_DIRECTORY, BITMAP_ENTRY, CLUSTER, L1_TABLE, REFCOUNT_TABLE, SNAPSHOT_ENTRY,
    SNAPSHOT_TABLE,
};
use crate::rows::Number::{Byte, Long, Short, Word};
use crate::rows::{Fields, OPENS, all, content, writing};

const REFCOUNTS_OFFSET: &str = "Reference count table offset invalid";
const REFCOUNTS_LARGE: &str = "Reference count table too large";
const SNAPSHOTS_OFFSET: &str = "Snapshot table offset invalid";
const SNAPSHOTS_LARGE: &str = "Snapshot table too large";
const L1_OFFSET: &str = "Active L1 table offset invalid";
const L1_LARGE: &str = "Active L1 table too large";
const B0: &str = "Bitmap 'b0' doesn't satisfy the constraints";
pub(crate) const BROKEN_DIRECTORY: &str = "Broken bitmap directory";
pub(crate) const NO_EXTRA: &str = "Bitmap extra data is not supported";
pub(crate) const MORE: &str = "More bitmaps found than specified in header extension";
pub(crate) const LESS: &str = "Less bitmaps found than specified in header extension";

/// Where the fields of the bitmaps extension are.
const EXTENSION: u64 = 120;
const B: u64 = BITMAP_DIRECTORY;
const S: u64 = SNAPSHOT_TABLE;

pub(crate) fn tables() -> Fields {
    let second = S + SNAPSHOT_ENTRY;
    vec![
        (
            "no refcount table",
            vec![(56, Word(0))],
            all("Image does not contain a reference count table"),
        ),
        (
            "2049 clusters of refcount table",
            vec![(56, Word(2049))],
            all(REFCOUNTS_LARGE),
        ),
        (
            "2^31 clusters of refcount table",
            vec![(56, Word(1 << 31))],
            all(REFCOUNTS_LARGE),
        ),
        (
            "2^32-1 clusters of refcount table",
            vec![(56, Word(u32::MAX))],
            all(REFCOUNTS_LARGE),
        ),
        (
            "refcount table at 4608",
            vec![(48, Long(4608))],
            all(REFCOUNTS_OFFSET),
        ),
        (
            "refcount table at 2^63",
            vec![(48, Long(1 << 63))],
            all(REFCOUNTS_OFFSET),
        ),
        (
            "refcount table at 2^64-4096",
            vec![(48, Long(!4095))],
            all(REFCOUNTS_OFFSET),
        ),
        (
            "65537 snapshots",
            vec![(60, Word(65_537))],
            all(SNAPSHOTS_LARGE),
        ),
        (
            "2^31 snapshots",
            vec![(60, Word(1 << 31))],
            all(SNAPSHOTS_LARGE),
        ),
        (
            "2^32-1 snapshots",
            vec![(60, Word(u32::MAX))],
            all(SNAPSHOTS_LARGE),
        ),
        (
            "snapshots at + 8",
            vec![(64, Long(S + 8))],
            all(SNAPSHOTS_OFFSET),
        ),
        (
            "no snapshots at + 8",
            vec![(60, Word(0)), (64, Long(S + 8))],
            all(SNAPSHOTS_OFFSET),
        ),
        (
            "snapshots at 2^64-4096",
            vec![(64, Long(!4095))],
            all(SNAPSHOTS_OFFSET),
        ),
        (
            "4 Mi + 1 L1 entries",
            vec![(36, Word((4 << 20) + 1))],
            all(L1_LARGE),
        ),
        ("2^29 L1 entries", vec![(36, Word(1 << 29))], all(L1_LARGE)),
        (
            "2^32-1 L1 entries",
            vec![(36, Word(u32::MAX))],
            all(L1_LARGE),
        ),
        ("L1 at + 8", vec![(40, Long(L1_TABLE + 8))], all(L1_OFFSET)),
        ("L1 at 2^63", vec![(40, Long(1 << 63))], all(L1_OFFSET)),
        ("L1 at 2^64-4096", vec![(40, Long(!4095))], all(L1_OFFSET)),
        (
            "no L1 entries",
            vec![(36, Word(0))],
            all("L1 table is too small"),
        ),
        (
            "too few L1 entries",
            vec![(36, Word(31))],
            all("L1 table is too small"),
        ),
        (
            "an empty disk",
            vec![(36, Word(0)), (24, Long(0)), (88, Long(0))],
            OPENS,
        ),
        (
            "1025 bytes of extra data",
            vec![(S + 36, Word(1025))],
            all("Too much extra metadata in snapshot table entry 0"),
        ),
        (
            "2^32-1 bytes of extra data",
            vec![(second + 36, Word(u32::MAX))],
            all("Too much extra metadata in snapshot table entry 1"),
        ),
        ("no snapshot L1 entries", vec![(S + 8, Word(0))], OPENS),
        ("more snapshot L1 entries", vec![(S + 8, Word(64))], OPENS),
        (
            "2^25+1 snapshot L1 entries",
            vec![(S + 8, Word((1 << 25) + 1)), (88, Long(0))],
            OPENS,
        ),
        (
            "2^32-1 snapshot L1 entries",
            vec![(S + 8, Word(u32::MAX)), (88, Long(0))],
            OPENS,
        ),
        ("snapshot L1 at 5", vec![(S, Long(5))], OPENS),
        ("snapshot L1 at 2^63", vec![(S, Long(1 << 63))], OPENS),
        ("one bitmap more", vec![(EXTENSION, Word(3))], all(LESS)),
        ("one bitmap less", vec![(EXTENSION, Word(1))], all(MORE)),
        (
            "directory of 63 bytes",
            vec![(EXTENSION + 8, Long(63))],
            all(BROKEN_DIRECTORY),
        ),
        (
            "directory of 65 bytes",
            vec![(EXTENSION + 8, Long(65))],
            all(BROKEN_DIRECTORY),
        ),
        (
            "directory of 96 bytes",
            vec![(EXTENSION + 8, Long(96))],
            all(MORE),
        ),
        (
            "directory of 0 bytes",
            vec![(EXTENSION + 8, Long(0))],
            all("Requested bitmap directory size is zero"),
        ),
        ("bitmap table at 0", vec![(B, Long(0))], all(B0)),
        (
            "bitmap table at + 512",
            vec![(B, Long(10 * CLUSTER + 512))],
            all(B0),
        ),
        ("0 bitmap table entries", vec![(B + 8, Word(0))], all(B0)),
        (
            "2 bitmap table entries",
            vec![(B + 8, Word(2))],
            all("Could not read bitmap 'b0' from image: Invalid argument"),
        ),
        (
            "131073 bitmap table entries",
            vec![(B + 8, Word(131_073))],
            all(B0),
        ),
        (
            "0x8000001 bitmap table entries",
            vec![(B + 8, Word(0x0800_0001))],
            all(B0),
        ),
        (
            "2^32-1 bitmap table entries",
            vec![(B + 8, Word(u32::MAX))],
            all(B0),
        ),
        ("in use", vec![(B + 12, Word(3))], OPENS),
        (
            "in use with 2 table entries",
            vec![(B + 12, Word(1)), (B + 8, Word(2))],
            OPENS,
        ),
        ("extra data compatible", vec![(B + 12, Word(4))], all(B0)),
        ("bitmap flag 31", vec![(B + 12, Word(1 << 31))], all(B0)),
        ("bitmap type 0", vec![(B + 16, Byte(0))], all(B0)),
        ("bitmap type 2", vec![(B + 16, Byte(2))], all(B0)),
        ("granularity_bits 0", vec![(B + 17, Byte(0))], all(B0)),
        ("granularity_bits 8", vec![(B + 17, Byte(8))], all(B0)),
        ("granularity_bits 31", vec![(B + 17, Byte(31))], OPENS),
        ("granularity_bits 32", vec![(B + 17, Byte(32))], all(B0)),
        ("granularity_bits 255", vec![(B + 17, Byte(255))], all(B0)),
        (
            "bitmap table too short",
            vec![(B + 17, Byte(9)), (24, Long(64 << 20))],
            all(B0),
        ),
        (
            "no bitmap name",
            vec![
                (B + 18, Short(0)),
                (EXTENSION, Word(1)),
                (EXTENSION + 8, Long(24)),
            ],
            OPENS,
        ),
        (
            "bitmap name of 65535 bytes",
            vec![(B + 18, Short(u16::MAX))],
            all(BROKEN_DIRECTORY),
        ),
        (
            "8 bytes of bitmap extra data",
            vec![(B + 20, Word(8))],
            all(NO_EXTRA),
        ),
        (
            "1000 bytes of bitmap extra data",
            vec![(B + 20, Word(1000))],
            all(BROKEN_DIRECTORY),
        ),
        (
            "2^32-1 bytes of bitmap extra data",
            vec![(B + 20, Word(u32::MAX))],
            all(NO_EXTRA),
        ),
        (
            "two bitmaps of one name",
            vec![(B + BITMAP_ENTRY + 25, Byte(b'0'))],
            all("Bitmap already exists: b0"),
        ),
    ]
}

/// QEMU does not look where tables are; the texts are those of its other checks.
pub(crate) fn places() -> Fields {
    let behind = 1 << 40;
    vec![
        (
            "L1 in the header",
            vec![(40, Long(0)), (88, Long(0))],
            content(L1_OFFSET),
        ),
        (
            "L1 behind the end",
            vec![(40, Long(behind))],
            content(L1_OFFSET),
        ),
        (
            "L1 across the end",
            vec![(36, Word(8192)), (88, Long(0))],
            content(L1_OFFSET),
        ),
        (
            "L1 in the refcount table",
            vec![(40, Long(REFCOUNT_TABLE))],
            writing(L1_OFFSET),
        ),
        (
            "L1 longer than its cluster",
            vec![(36, Word(2000))],
            writing(SNAPSHOTS_OFFSET),
        ),
        (
            "refcount table in the header",
            vec![(48, Long(0)), (88, Long(0))],
            writing(REFCOUNTS_OFFSET),
        ),
        (
            "refcount table behind the end",
            vec![(48, Long(behind))],
            writing(REFCOUNTS_OFFSET),
        ),
        (
            "refcount table across the end",
            vec![(56, Word(2048)), (88, Long(0))],
            writing(REFCOUNTS_OFFSET),
        ),
        (
            "snapshots in the L1 table",
            vec![(64, Long(L1_TABLE))],
            writing(SNAPSHOTS_OFFSET),
        ),
        (
            "snapshots behind the end",
            vec![(64, Long(behind))],
            writing(SNAPSHOTS_OFFSET),
        ),
        (
            "directory across the end",
            vec![(B, Long(behind))],
            writing(B0),
        ),
        (
            "bitmap table in the refcount table",
            vec![(B, Long(REFCOUNT_TABLE))],
            writing(B0),
        ),
        (
            "two bitmaps with one table",
            vec![(B + BITMAP_ENTRY, Long(10 * CLUSTER))],
            writing("Bitmap 'b1' doesn't satisfy the constraints"),
        ),
    ]
}
