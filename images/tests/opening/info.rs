//! What is said of an image is what `qemu-img info` says of it.

use blockyard_images::qcow2::info::ImageInfo;
use blockyard_images::qcow2::layout::header::Access;
use blockyard_images::qcow2::open::read_image;
use blockyard_images::qcow2::units::Compression;

use crate::headers::CREATED;
use crate::oracle::Oracle;
use crate::storages::{ReadOnlyBytes, now};

/// Members that `qemu-img info` prints of the image itself, apart from its place and its room.
const MEMBERS: &[&str] = &[
    "virtual-size",
    "cluster-size",
    "encrypted",
    "dirty-flag",
    "backing-filename",
    "backing-filename-format",
    "compat",
    "compression-type",
    "lazy-refcounts",
    "refcount-bits",
    "data-file",
    "data-file-raw",
    "corrupt",
    "extended-l2",
    "id",
    "name",
    "vm-state-size",
    "date-sec",
    "date-nsec",
    "vm-clock-sec",
    "vm-clock-nsec",
    "icount",
    "granularity",
];

fn text(name: &str) -> String {
    format!("\"{name}\"")
}

/// The members as QEMU would print them.
fn printed(info: &ImageInfo) -> Vec<(&'static str, String)> {
    let compression = match info.compression {
        Compression::Zlib => "zlib",
        Compression::Zstd => "zstd",
    };
    let mut members = vec![
        ("virtual-size", info.virtual_size_bytes.to_string()),
        ("cluster-size", info.cluster_bytes.to_string()),
        ("dirty-flag", info.dirty.to_string()),
        ("refcount-bits", info.refcount_bits.to_string()),
        ("compression-type", text(compression)),
        (
            "compat",
            text(if info.version_3.is_some() {
                "1.1"
            } else {
                "0.10"
            }),
        ),
    ];
    if info.encrypted {
        members.push(("encrypted", "true".to_owned()));
    }
    members.extend(
        info.backing_file
            .iter()
            .map(|name| ("backing-filename", text(name))),
    );
    let format = info.backing_format.iter();
    members.extend(format.map(|name| ("backing-filename-format", text(name))));
    if let Some(version_3) = &info.version_3 {
        members.push(("lazy-refcounts", version_3.lazy_refcounts.to_string()));
        members.push(("corrupt", version_3.corrupt.to_string()));
        members.push(("extended-l2", version_3.extended_l2.to_string()));
        members.extend(
            version_3
                .data_file
                .iter()
                .map(|name| ("data-file", text(name))),
        );
        let raw = version_3.data_file_raw.iter();
        members.extend(raw.map(|raw| ("data-file-raw", raw.to_string())));
        for bitmap in &version_3.bitmaps {
            members.push(("name", text(&bitmap.name)));
            members.push(("granularity", bitmap.granularity_bytes.to_string()));
        }
    }
    for snapshot in &info.snapshots {
        members.push(("id", text(&snapshot.id)));
        members.push(("name", text(&snapshot.name)));
        members.push(("vm-state-size", snapshot.vm_state_bytes.to_string()));
        members.push(("date-sec", snapshot.date_seconds.to_string()));
        members.push(("date-nsec", snapshot.date_nanoseconds.to_string()));
        let clock = snapshot.vm_clock_nanoseconds;
        members.push(("vm-clock-sec", (clock / 1_000_000_000).to_string()));
        members.push(("vm-clock-nsec", (clock % 1_000_000_000).to_string()));
        members.extend(
            snapshot
                .icount
                .iter()
                .map(|count| ("icount", count.to_string())),
        );
    }
    members.sort();
    members
}

/// The members that QEMU prints of `created.qcow2`, without those of its children.
fn said(oracle: &Oracle) -> Vec<(&'static str, String)> {
    let json = oracle.qemu_img(&["info", "-f", "qcow2", "--output=json", "created.qcow2"]);
    let children = "\n    ],\n";
    let own = match json.starts_with("{\n    \"children\"") {
        true => json.split_once(children).expect("their end").1,
        false => &json,
    };
    let member = |line: &str| {
        let (name, value) = line.trim().split_once("\": ")?;
        let name = name.strip_prefix('"')?;
        let known = MEMBERS.iter().find(|known| **known == name)?;
        Some((*known, value.trim_end_matches(',').to_owned()))
    };
    let mut members: Vec<_> = own.lines().filter_map(member).collect();
    members.sort();
    members
}

fn check(oracle: &Oracle, what: &str) -> ImageInfo {
    let file = ReadOnlyBytes::new(oracle.read("created.qcow2"));
    let image = now(read_image(&file, Access::Metadata)).expect("it is sound");
    let info = ImageInfo::of(&image);
    assert_eq!(printed(&info), said(oracle), "{what}");
    assert!(image.findings.is_empty(), "{what}: {:?}", image.findings);
    info
}

#[test]
fn new_images_are_described_as_by_qemu() {
    let Some(oracle) = Oracle::find() else {
        return;
    };
    oracle.qemu_img(&["create", "-q", "-f", "raw", "base.raw", "64M"]);
    for (options, more) in CREATED {
        oracle.create(options, more);
        check(&oracle, options);
    }
}

#[test]
fn snapshots_bitmaps_and_flags_are_described_as_by_qemu() {
    let Some(oracle) = Oracle::find() else {
        return;
    };
    let mut image = oracle.create("", &[]);
    for change in [
        &["bitmap", "--add", "-g", "4096", "created.qcow2", "fine"] as &[&str],
        &["bitmap", "--add", "--disable", "created.qcow2", "frozen"],
        &["snapshot", "-c", "first", "created.qcow2"],
        &["snapshot", "-c", "second", "created.qcow2"],
    ] {
        oracle.qemu_img(change);
    }
    let info = check(&oracle, "snapshots and bitmaps");
    let bitmaps = info.version_3.expect("version 3").bitmaps;
    let flags: Vec<_> = bitmaps
        .iter()
        .map(|b| (&*b.name, b.in_use, b.auto))
        .collect();
    assert_eq!(flags, [("fine", false, true), ("frozen", false, false)]);
    let disks: Vec<_> = info.snapshots.iter().map(|s| s.disk_bytes).collect();
    assert_eq!(disks, [64 << 20; 2]);
    // Dirty and corrupt; a data file's name without a data file.
    image[79] = 3;
    image[112..136].copy_from_slice(b"DATA\0\0\0\x04some\0\0\0\0\0\0\0\0\0\0\0\0");
    oracle.write("created.qcow2", &image);
    check(&oracle, "flags");
}
