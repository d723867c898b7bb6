//! Contradictions that come to light in use: told in QEMU's words, noted in the header, and the end of the image.

use std::path::Path;
use std::process::Command;
use std::rc::Rc;

use blockyard_images::ImageError;
use blockyard_images::qcow2::create::CreateOptions;
use blockyard_images::qcow2::layout::header::{Access, Header, incompatible};
use blockyard_images::qcow2::overlap::OverlapChecks;
use blockyard_images::qcow2::units::Version;
use blockyard_images::qcow2::{Options, Qcow2};
use blockyard_storage::{Buffer, ByteRange, MemoryStorage, Storage};

use crate::mover::Mover;
use crate::recount::bytes;
use crate::sequences::tool;
use crate::setup::{Setup, all_bytes, now};
use crate::snapshot;

const CLUSTER: u64 = 65_536;
/// Where things are in an image with one L2 table and one cluster of data, the first of its disk.
const REFCOUNT_TABLE: u64 = CLUSTER;
const REFCOUNT_BLOCK: u64 = 2 * CLUSTER;
const L1_TABLE: u64 = 3 * CLUSTER;
const L2_TABLE: u64 = 4 * CLUSTER;
const DATA: u64 = 5 * CLUSTER;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

/// Which image is damaged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    V3,
    V2,
    Extended,
    DataFile,
}

/// What is asked of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Asked {
    Read,
    Write,
    /// Of the second cluster, which has no place.
    WriteNew,
}

struct Row {
    kind: Kind,
    /// Words that are put at places of the file.
    damage: &'static [(u64, u64)],
    asked: Asked,
    text: &'static str,
}

const fn row(kind: Kind, damage: &'static [(u64, u64)], asked: Asked, text: &'static str) -> Row {
    Row {
        kind,
        damage,
        asked,
        text,
    }
}

const ROWS: &[Row] = &[
    row(
        Kind::V3,
        &[(L2_TABLE, COPIED | DATA | 0x200)],
        Asked::Read,
        "Cluster allocation offset 0x50200 unaligned (L2 offset: 0x40000, L2 index: 0)",
    ),
    row(
        Kind::V3,
        &[(L2_TABLE, COPIED | DATA | 0x200)],
        Asked::Write,
        "Data cluster offset 0x50200 unaligned (guest offset: 0)",
    ),
    row(
        Kind::V3,
        &[(L2_TABLE, COPIED | DATA | 0x201)],
        Asked::Write,
        "Preallocated zero cluster offset 0x50200 unaligned (guest offset: 0)",
    ),
    row(
        Kind::V3,
        &[(L2_TABLE, DATA | 0x201)],
        Asked::Read,
        "Cluster allocation offset 0x50200 unaligned (L2 offset: 0x40000, L2 index: 0)",
    ),
    row(
        Kind::V3,
        &[(L1_TABLE, COPIED | L2_TABLE | 0x200)],
        Asked::Read,
        "L2 table offset 0x40200 unaligned (L1 index: 0)",
    ),
    row(
        Kind::V3,
        &[(L1_TABLE, COPIED | L2_TABLE | 0x200)],
        Asked::Write,
        "L2 table offset 0x40200 unaligned (L1 index: 0)",
    ),
    row(
        Kind::V3,
        &[(L2_TABLE, COPIED | REFCOUNT_TABLE)],
        Asked::Write,
        "Preventing invalid write on metadata (overlaps with refcount table)",
    ),
    row(
        Kind::V3,
        &[(L2_TABLE, COPIED | REFCOUNT_BLOCK)],
        Asked::Write,
        "Preventing invalid write on metadata (overlaps with refcount block)",
    ),
    row(
        Kind::V3,
        &[(L2_TABLE, COPIED | L1_TABLE)],
        Asked::Write,
        "Preventing invalid write on metadata (overlaps with active L1 table)",
    ),
    row(
        Kind::V3,
        &[(L2_TABLE, COPIED | L2_TABLE)],
        Asked::Write,
        "Preventing invalid write on metadata (overlaps with active L2 table)",
    ),
    row(
        Kind::V3,
        &[(REFCOUNT_TABLE, REFCOUNT_BLOCK | 0x200)],
        Asked::WriteNew,
        "Refblock offset 0x20200 unaligned (reftable index: 0)",
    ),
    row(
        Kind::V3,
        // No cluster has a reference, so that the first free one is the refcount table's.
        &[
            (REFCOUNT_BLOCK, 0x0001_0000_0000_0000),
            (REFCOUNT_BLOCK + 8, 0),
        ],
        Asked::WriteNew,
        "Preventing invalid write on metadata (overlaps with refcount table)",
    ),
    row(
        Kind::V2,
        &[(L2_TABLE, 1)],
        Asked::Read,
        "Zero cluster entry found in pre-v3 image (L2 offset: 0x40000, L2 index: 0)",
    ),
    row(
        Kind::Extended,
        &[(L2_TABLE + 8, 1 << 32 | 1)],
        Asked::Read,
        "Invalid cluster entry found  (L2 offset: 0x40000, L2 index: 0)",
    ),
    row(
        Kind::Extended,
        &[(L2_TABLE, 0)],
        Asked::Read,
        "Invalid cluster entry found  (L2 offset: 0x40000, L2 index: 0)",
    ),
    row(
        Kind::Extended,
        &[(L2_TABLE, 0)],
        Asked::Write,
        "Invalid cluster entry found (L2 offset: 0x40000, L2 index: 0)",
    ),
    row(
        Kind::DataFile,
        &[(L2_TABLE, COMPRESSED | DATA)],
        Asked::Read,
        "Compressed cluster entry found in image with external data file (L2 offset: 0x40000, L2 index: 0)",
    ),
    row(
        Kind::DataFile,
        &[(L2_TABLE, COPIED | DATA)],
        Asked::Read,
        "External data file host cluster offset 0x50000 does not match guest cluster offset: 0, L2 index: 0)",
    ),
];

/// An image of a kind with its first cluster written, and its data file.
fn image_of(kind: Kind) -> (Setup, Rc<MemoryStorage>, Option<Rc<MemoryStorage>>) {
    let mut create = CreateOptions::new(16 * CLUSTER);
    match kind {
        Kind::V3 => {}
        Kind::V2 => create.version = Version::V2,
        Kind::Extended => create.extended_l2 = true,
        Kind::DataFile => create.data_file_name = Some(b"data".to_vec()),
    }
    let setup = Setup {
        create,
        options: Options::default(),
        below: None,
        skips_zeroes: false,
        device: None,
    };
    let (file, data) = setup.memory();
    let mover = open(&setup, &file, data.as_ref());
    now(mover.write(0, &[1; CLUSTER as usize])).expect("written");
    now(mover.image.close()).expect("closed");
    (setup, file, data)
}

fn open(setup: &Setup, file: &Rc<MemoryStorage>, data: Option<&Rc<MemoryStorage>>) -> Mover {
    let file = Rc::clone(file) as Rc<dyn Storage>;
    let data = data.map(|data| Rc::clone(data) as Rc<dyn Storage>);
    let image = now(Qcow2::open(file, data, setup.options)).expect("sound");
    Mover::new(image, None, false)
}

fn put(file: &MemoryStorage, damage: &[(u64, u64)]) {
    for (at, word) in damage {
        let bytes = Buffer::copy_of(&word.to_be_bytes());
        now(file.write(*at, bytes)).outcome.expect("memory");
    }
}

#[test]
fn contradictions_are_told_once_and_noted() {
    for row in ROWS {
        let (setup, file, data) = image_of(row.kind);
        put(&file, row.damage);
        let mover = open(&setup, &file, data.as_ref());
        let asked = match row.asked {
            Asked::Read => now(mover.read(ByteRange::new(0, 512))).map(drop),
            Asked::Write => now(mover.write(0, &[2; 512])),
            Asked::WriteNew => now(mover.write(CLUSTER, &[2; 512])),
        };
        match asked {
            Err(ImageError::Corrupt(told)) => {
                assert_eq!(told.text, row.text);
                assert!(told.fatal);
            }
            other => panic!("{}: {other:?}", row.text),
        }
        let again = now(mover.read(ByteRange::new(15 * CLUSTER, 512)));
        assert_eq!(again, Err(ImageError::Broken(row.text.to_owned())));
        let flushed = now(mover.image.flush());
        assert_eq!(flushed, Err(ImageError::Broken(row.text.to_owned())));
        let header = Header::parse(&all_bytes(&file), Access::ReadOnly).expect("a header");
        let noted = header.incompatible & incompatible::CORRUPT != 0;
        assert_eq!(noted, row.kind != Kind::V2);
    }
}

#[test]
fn who_only_reads_is_told_and_goes_on() {
    let row = &ROWS[0];
    let (mut setup, file, _) = image_of(row.kind);
    put(&file, row.damage);
    setup.options.read_only = true;
    let mover = open(&setup, &file, None);
    for _ in 0..2 {
        match now(mover.read(ByteRange::new(0, 512))) {
            Err(ImageError::Corrupt(told)) => assert!(!told.fatal && told.text == row.text),
            other => panic!("{other:?}"),
        }
    }
    let elsewhere = now(mover.read(ByteRange::new(CLUSTER, 512)));
    assert_eq!(elsewhere, Ok(vec![0; 512]));
}

#[test]
fn tables_of_snapshots_are_protected_on_request() {
    let (mut setup, file, _) = image_of(Kind::V3);
    let shared = snapshot::take(&all_bytes(&file)).expect("there is room");
    now(file.write(0, Buffer::copy_of(&shared)))
        .outcome
        .expect("memory");
    let mover = open(&setup, &file, None);
    // The table in use is another one after this.
    now(mover.write(0, &[2; 512])).expect("written");
    now(mover.image.close()).expect("closed");
    let l1 = bytes(&all_bytes(&file), L1_TABLE, 8);
    let table = u64::from_be_bytes(l1.try_into().expect("eight")) & !COPIED;
    assert_ne!(table, L2_TABLE);
    put(&file, &[(table, COPIED | L2_TABLE)]);
    let copy = Rc::new(MemoryStorage::clone(&file));
    setup.options.overlap_checks = OverlapChecks::ALL;
    let mover = open(&setup, &copy, None);
    match now(mover.write(0, &[3; 512])) {
        Err(ImageError::Corrupt(told)) => assert_eq!(
            told.text,
            "Preventing invalid write on metadata (overlaps with inactive L2 table)"
        ),
        other => panic!("{other:?}"),
    }
    setup.options.overlap_checks = OverlapChecks::CACHED;
    let mover = open(&setup, &file, None);
    assert_eq!(now(mover.write(0, &[3; 512])), Ok(()));
}

/// What a request says of an image whose file was cut off.
fn cut_off(length: u64, ask: impl AsyncFnOnce(&Mover) -> Result<(), ImageError>) -> Option<String> {
    let (setup, file, _) = image_of(Kind::V3);
    now(file.resize(length)).expect("shorter");
    let mover = open(&setup, &file, None);
    let before = all_bytes(&file);
    let told = now(ask(&mover)).err();
    let header = Header::parse(&all_bytes(&file), Access::Check).expect("sound");
    assert_eq!(
        header.incompatible & incompatible::CORRUPT,
        0,
        "it can be saved yet"
    );
    if told.is_some() {
        assert!(all_bytes(&file) == before, "it was changed");
    }
    told.map(|error| match error {
        ImageError::Corrupt(told) if !told.fatal => told.text,
        other => panic!("{other:?}"),
    })
}

#[test]
fn tables_that_were_cut_off_are_not_taken_for_zeroes() {
    let l2 = "L2 table at 0x40000 is behind the end of the image file";
    for length in [L2_TABLE, L2_TABLE + 512, DATA - 512] {
        let read = cut_off(length, async |mover| {
            mover.read(ByteRange::new(0, 512)).await.map(drop)
        });
        assert_eq!(read.as_deref(), Some(l2));
        let written = cut_off(length, async |mover| mover.write(0, &[1; 512]).await);
        assert_eq!(written.as_deref(), Some(l2));
    }
    let whole = cut_off(DATA, async |mover| {
        mover.read(ByteRange::new(0, 512)).await.map(drop)
    });
    assert_eq!(
        whole, None,
        "data that was cut off reads as zeroes, as in QEMU"
    );
}

#[test]
fn clusters_whose_counts_were_cut_off_are_not_free() {
    let (setup, file, _) = image_of(Kind::V3);
    let end = all_bytes(&file).len() as u64;
    // The block moves to the end, and is lost.
    put(&file, &[(REFCOUNT_TABLE, end)]);
    let mover = open(&setup, &file, None);
    let before = all_bytes(&file);
    let text = format!("Refcount block at {end:#x} is behind the end of the image file");
    for _ in 0..2 {
        match now(mover.write(CLUSTER, &[1; 512])) {
            Err(ImageError::Corrupt(told)) => {
                assert_eq!((told.text, told.fatal), (text.clone(), false))
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(all_bytes(&file) == before, "it was changed");
    // What needs no room can be had.
    assert!(now(mover.read(ByteRange::new(0, 512))).is_ok());
    assert_eq!(now(mover.write(0, &[1; 512])), Ok(()));
}

/// What QEMU prints of a request.
fn by_qemu(program: &Path, folder: &Path, asked: Asked) -> String {
    let command = match asked {
        Asked::Read => "read 0 512",
        Asked::Write => "write 0 512",
        Asked::WriteNew => "write 64k 512",
    };
    let output = Command::new(program)
        .args(["-f", "qcow2", "-c", command, "image"])
        .current_dir(folder)
        .output()
        .expect("it runs");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn qemu_tells_the_same_contradictions() {
    let Some(qemu_io) = tool("qemu-io", "qemu-utils") else {
        return;
    };
    let folder = tempfile::tempdir().expect("a folder");
    for row in ROWS {
        let (_, file, data) = image_of(row.kind);
        put(&file, row.damage);
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("image"), all_bytes(&file)).expect("written");
        if let Some(data) = data {
            std::fs::write(path("data"), all_bytes(&data)).expect("written");
        }
        let told = by_qemu(&qemu_io, folder.path(), row.asked);
        assert!(told.contains(row.text), "{}: {told}", row.text);
    }
}
