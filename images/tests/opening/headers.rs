//! Headers that qemu-img writes are read and written again as they were.

use blockyard_images::qcow2::layout::bitmaps::Bitmap;
use blockyard_images::qcow2::layout::extensions::UnknownExtension;
use blockyard_images::qcow2::layout::header::{Access, Header};
use blockyard_images::qcow2::layout::snapshots::Snapshot;
use blockyard_images::qcow2::units::{Compression, Version};

use crate::oracle::Oracle;

/// Options of `qemu-img create`, and more arguments.
pub(crate) const CREATED: &[(&str, &[&str])] = &[
    ("", &[]),
    ("compat=0.10", &[]),
    ("compat=0.10,cluster_size=512", &[]),
    ("compat=0.10", &["-b", "base.raw", "-F", "raw"]),
    ("cluster_size=512", &["-b", "base.raw", "-F", "raw"]),
    ("cluster_size=4096", &[]),
    ("cluster_size=8192", &["-b", "base.raw", "-F", "raw"]),
    ("cluster_size=2M", &["-b", "base.raw", "-F", "raw"]),
    ("refcount_bits=1", &[]),
    ("refcount_bits=64,lazy_refcounts=on", &[]),
    ("extended_l2=on,compression_type=zstd", &[]),
    (
        "extended_l2=on,cluster_size=16k",
        &["-b", "base.raw", "-F", "raw"],
    ),
    ("data_file=data.raw", &[]),
    ("data_file=data.raw,data_file_raw=on", &[]),
    ("data_file=data.raw", &["-b", "base.raw", "-F", "raw"]),
    ("preallocation=metadata", &[]),
];

#[test]
fn images_of_qemu_are_written_again_as_they_were() {
    let Some(oracle) = Oracle::find() else {
        return;
    };
    oracle.qemu_img(&["create", "-q", "-f", "raw", "base.raw", "64M"]);
    for (options, more) in CREATED {
        let image = oracle.create(options, more);
        let header = Header::parse(&image, Access::ReadWrite)
            .unwrap_or_else(|error| panic!("{options}: {error}"));
        let written = header.encode().expect("fits");
        assert_eq!(written, image[..written.len()], "{options} {more:?}");
        assert_eq!(header.size_bytes, 64 << 20, "{options}");
        let backed = more.contains(&"-b").then_some(&b"base.raw"[..]);
        assert_eq!(header.backing_name.as_deref(), backed, "{options}");
        let has = |option| options.contains(option);
        assert_eq!(header.has_data_file(), has("data_file="), "{options}");
        assert_eq!(header.is_data_file_raw(), has("data_file_raw"), "{options}");
        assert_eq!(header.lazy_refcounts(), has("lazy_refcounts"), "{options}");
        assert_eq!(
            header.geometry.extended_l2(),
            has("extended_l2"),
            "{options}"
        );
        let zstd = header.compression == Compression::Zstd;
        assert_eq!(zstd, has("zstd"), "{options}");
        let v2 = header.geometry.version() == Version::V2;
        assert_eq!(v2, has("compat=0.10"), "{options}");
    }
}

#[test]
fn qemu_reads_a_written_header_as_its_own() {
    let Some(oracle) = Oracle::find() else {
        return;
    };
    oracle.qemu_img(&["create", "-q", "-f", "raw", "base.raw", "64M"]);
    for (options, more) in CREATED {
        let mut image = oracle.create(options, more);
        let before = described(&oracle);
        let mut header = Header::parse(&image, Access::ReadWrite).expect("valid");
        header.extensions.unknown.push(UnknownExtension {
            kind: 0x1234_5678,
            data: vec![0xaa; 13],
        });
        if header.geometry.version() == Version::V3 {
            header.extra.extend([0x55; 16]);
            header.compatible |= 1 << 40;
        }
        let written = header.encode().expect("fits");
        image[..written.len()].copy_from_slice(&written);
        oracle.write("created.qcow2", &image);
        let after = described(&oracle);
        assert_eq!(before, after, "{options} {more:?}");
        let again = Header::parse(&image, Access::ReadWrite).expect("valid");
        assert_eq!(again, header, "{options} {more:?}");
    }
}

/// What QEMU says of the image, apart from the room that the file takes.
fn described(oracle: &Oracle) -> Vec<String> {
    let text = oracle.qemu_img(&["info", "--output=json", "created.qcow2"]);
    let lines = text.lines().filter(|line| !line.contains("actual-size"));
    lines.map(str::to_owned).collect()
}

#[test]
fn bitmaps_and_snapshots_of_qemu_are_found() {
    let Some(oracle) = Oracle::find() else {
        return;
    };
    oracle.create("", &[]);
    oracle.qemu_img(&["bitmap", "--add", "created.qcow2", "b0"]);
    oracle.qemu_img(&["bitmap", "--add", "created.qcow2", "b1"]);
    oracle.qemu_img(&["snapshot", "-c", "s0", "created.qcow2"]);
    let image = oracle.read("created.qcow2");
    let header = Header::parse(&image, Access::ReadWrite).expect("valid");
    let bitmaps = header.extensions.bitmaps.expect("there are some");
    assert_eq!(bitmaps.bitmaps, 2);
    assert!(header.bitmaps_valid());
    assert_eq!(header.snapshots, 1);
    let written = header.encode().expect("fits");
    assert_eq!(written, image[..written.len()]);

    let at = usize::try_from(header.snapshot_table.0).expect("a small file");
    let snapshot = Snapshot::parse(&image[at..]);
    assert_eq!(
        (&snapshot.id[..], &snapshot.name[..]),
        (&b"1"[..], &b"s0"[..])
    );
    assert_eq!(snapshot.disk_bytes, Some(64 << 20));
    let file_bytes = image.len() as u64;
    assert_eq!(
        snapshot.check_l1_table(&header.geometry, file_bytes),
        Ok(())
    );
    let written = snapshot.encode().expect("short");
    let entry = &image[at..(at + written.len()).min(image.len())];
    assert_eq!(written[..entry.len()], *entry);
    assert!(written[entry.len()..].iter().all(|byte| *byte == 0));

    let at = usize::try_from(bitmaps.directory.0).expect("a small file");
    let directory = &image[at..at + usize::try_from(bitmaps.directory_bytes).expect("small")];
    let first = Bitmap::parse(directory, &header.geometry, header.guest_bytes()).expect("valid");
    assert_eq!((&first.name[..], first.granularity_bits), (&b"b0"[..], 16));
    assert!(first.is_auto() && !first.is_in_use());
    let written = first.encode().expect("short");
    assert_eq!(written, directory[..written.len()]);
}
