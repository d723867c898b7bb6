//! Measures against those of qemu-img, for images of every kind.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use blockyard_images::measure::{Measure, Qcow2Measure, raw};
use blockyard_images::qcow2::create::{CreateOptions, ImagePreallocation};
use blockyard_storage::ByteRange;

/// Whether qemu-img is there; else the test has to return.
fn have_qemu() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok();
    let missing = "qemu-img is missing: install the package qemu-utils";
    assert!(
        found || std::env::var("CI").as_deref() != Ok("true"),
        "{missing}"
    );
    if !found {
        eprintln!("SKIPPED: {missing}");
    }
    found
}

/// What qemu-img prints: required and fully allocated bytes; `None`: it refuses.
fn by_qemu(folder: &Path, arguments: &[&str]) -> Option<(u64, u64)> {
    let output = Command::new("qemu-img")
        .arg("measure")
        .args(arguments)
        .current_dir(folder)
        .output()
        .expect("it runs");
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    let number = |name: &str| {
        let line = printed.lines().find_map(|line| line.strip_prefix(name));
        line.expect("printed")
            .trim()
            .parse::<u64>()
            .expect("a number")
    };
    let succeeded = output.status.success();
    succeeded.then(|| (number("required size:"), number("fully allocated size:")))
}

fn both(measure: Measure) -> (u64, u64) {
    (measure.required_bytes, measure.fully_allocated_bytes)
}

/// Every kind of image whose measure differs from others, as we and as qemu-img are told.
fn kinds() -> Vec<(CreateOptions, String)> {
    let mut kinds = Vec::new();
    for cluster_bits in [9, 12, 14, 16, 21] {
        for refcount_bits in [1, 16, 64] {
            for extended_l2 in [false, true] {
                for (preallocation, word) in [
                    (ImagePreallocation::Off, "off"),
                    (ImagePreallocation::Full, "full"),
                ] {
                    if extended_l2 && cluster_bits < 14 {
                        continue;
                    }
                    let mut options = CreateOptions::new(0);
                    options.cluster_bytes = 1 << cluster_bits;
                    options.refcount_bits = refcount_bits;
                    options.extended_l2 = extended_l2;
                    options.preallocation = preallocation;
                    let subclusters = if extended_l2 { "on" } else { "off" };
                    let text = format!(
                        "cluster_size={},refcount_bits={refcount_bits},extended_l2={subclusters},preallocation={word}",
                        options.cluster_bytes
                    );
                    kinds.push((options, text));
                }
            }
        }
    }
    kinds
}

#[test]
fn of_a_size() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    for (options, text) in kinds() {
        for size_bytes in [0, 1000, (5 << 30) + 512, 1 << 45] {
            let options = CreateOptions {
                size_bytes,
                ..options.clone()
            };
            let ours = Qcow2Measure::of_size(&options).ok();
            let ours = ours.map(|measure| both(measure.finish()));
            let size = size_bytes.to_string();
            let arguments = ["-O", "qcow2", "-o", &text, "--size", &size];
            assert_eq!(ours, by_qemu(folder.path(), &arguments), "{text} {size}");
        }
    }
    let arguments = ["-O", "raw", "--size", "1000"];
    assert_eq!(Some(both(raw(1000))), by_qemu(folder.path(), &arguments));
}

#[test]
fn of_a_file_with_holes() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let size_bytes = (24 << 20) + 1000;
    let source = std::fs::File::create(folder.path().join("s.img")).expect("created");
    source.set_len(size_bytes).expect("sized");
    // Whole blocks of any file system, at no particular place in a cluster.
    let extents = [(0, 1), (3, 1), (4, 2), (40, 1), (200, 33), (371, 1)];
    let extents = extents.map(|(first, count)| ByteRange::new(first << 16, count << 16));
    for extent in extents {
        let bytes = vec![7; usize::try_from(extent.length()).expect("short")];
        source
            .write_all_at(&bytes, extent.offset())
            .expect("written");
    }
    source.sync_all().expect("on the disk");
    for (options, text) in kinds() {
        let options = CreateOptions {
            size_bytes,
            ..options
        };
        let mut ours = Qcow2Measure::of_source(&options).expect("possible");
        extents.iter().for_each(|extent| ours.data(*extent));
        let arguments = ["-O", "qcow2", "-o", &text, "-f", "raw", "s.img"];
        let theirs = by_qemu(folder.path(), &arguments);
        assert_eq!(Some(both(ours.finish())), theirs, "{text}");
    }
}
