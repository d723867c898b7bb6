//! The codec against QEMU's: each reads what the other has written.

use std::path::Path;
use std::process::Command;

use blockyard_images::qcow2::compressed::ClusterCodec;
use blockyard_images::qcow2::layout::entries::{
    COMPRESSED, CompressedAt, L1Entry, L2Entry, put_word, word_at,
};
use blockyard_images::qcow2::units::{Compression, Geometry, HostOffset, Version};

/// Whether qemu-img and qemu-io are there; else the test has to return.
fn have_qemu() -> bool {
    let found = ["qemu-img", "qemu-io"]
        .iter()
        .all(|tool| Command::new(tool).arg("--version").output().is_ok());
    let missing = "qemu-img or qemu-io is missing: install the package qemu-utils";
    assert!(
        found || std::env::var("CI").as_deref() != Ok("true"),
        "{missing}"
    );
    if !found {
        eprintln!("SKIPPED: {missing}");
    }
    found
}

fn run(folder: &Path, program: &str, arguments: &[&str]) {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(folder)
        .output()
        .expect("it runs");
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let failed = !output.status.success() || text.contains("failed");
    assert!(!failed, "{program} {arguments:?}: {text}");
}

fn cluster(bits: u32) -> Vec<u8> {
    let mut state = 7_u32;
    let mut next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 28) as u8
    };
    (0..1 << bits).map(&mut next).collect()
}

fn for_every_kind(check: impl Fn(&Path, Compression, Geometry, &str)) {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    for (compression, name) in [(Compression::Zlib, "zlib"), (Compression::Zstd, "zstd")] {
        for bits in [9, 12, 16, 21] {
            let geometry = Geometry::new(Version::V3, bits, 4, false).expect("allowed");
            let options = format!(
                "cluster_size={},compression_type={name}",
                geometry.cluster_bytes()
            );
            let image = ["create", "-q", "-f", "qcow2", "-o", &options, "image", "4M"];
            run(folder.path(), "qemu-img", &image);
            check(folder.path(), compression, geometry, &options);
        }
    }
}

/// The L1 table's place and its first entry.
fn first_l1_entry(image: &[u8]) -> (usize, L1Entry) {
    let l1 = usize::try_from(word_at(image, 5).expect("a header")).expect("small");
    (l1, L1Entry(word_at(image, l1 / 8).expect("a table")))
}

#[test]
fn qemu_reads_what_is_written_here() {
    for_every_kind(|folder, compression, geometry, options| {
        let cluster = cluster(geometry.cluster_bits());
        let cluster_bytes = cluster.len();
        let mut made = vec![0; cluster_bytes - 1];
        let length = ClusterCodec::new()
            .compress(compression, &cluster, &mut made)
            .expect("gets shorter");
        let path = folder.join("image");
        let mut image = std::fs::read(&path).expect("readable");
        image.resize(image.len().next_multiple_of(cluster_bytes), 0);
        let (l1, _) = first_l1_entry(&image);
        let l2 = image.len();
        // At no particular alignment, and something else behind.
        let at = l2 + cluster_bytes + 77;
        image.resize(at, 0xff);
        image.extend_from_slice(&made[..length]);
        image.resize(image.len().next_multiple_of(512) + 512, 0xff);
        image[l2..l2 + cluster_bytes].fill(0);
        let place = CompressedAt {
            at: HostOffset(at as u64),
            length_bytes: length as u64,
        };
        let entry = place.encode(&geometry).expect("fits");
        assert!(put_word(&mut image, l2 / 8, entry));
        assert!(put_word(
            &mut image,
            l1 / 8,
            L1Entry::copied(HostOffset(l2 as u64)).0
        ));
        std::fs::write(&path, &image).expect("writable");
        run(
            folder,
            "qemu-img",
            &["convert", "-f", "qcow2", "-O", "raw", "image", "raw"],
        );
        let read = std::fs::read(folder.join("raw")).expect("readable");
        assert!(read[..cluster_bytes] == cluster, "{options}");
    });
}

#[test]
fn what_qemu_writes_is_read_here() {
    for_every_kind(|folder, compression, geometry, options| {
        let cluster = cluster(geometry.cluster_bits());
        std::fs::write(folder.join("data"), &cluster).expect("writable");
        let write = format!("write -c -s data 0 {}", cluster.len());
        run(folder, "qemu-io", &["-f", "qcow2", "-c", &write, "image"]);
        let image = std::fs::read(folder.join("image")).expect("readable");
        let (_, l1_entry) = first_l1_entry(&image);
        let l2 = usize::try_from(l1_entry.table().expect("a table").0).expect("small");
        let entry = L2Entry {
            word: word_at(&image, l2 / 8).expect("an entry"),
            bitmap: 0,
        };
        assert!(entry.word & COMPRESSED != 0, "{options}");
        let place = CompressedAt::decode(&geometry, entry.word);
        let at = usize::try_from(place.at.0).expect("small");
        let end = at + usize::try_from(place.length_bytes).expect("small");
        let mut read = vec![0xa5; cluster.len()];
        ClusterCodec::new()
            .decompress(compression, &image[at..end.min(image.len())], &mut read)
            .expect("QEMU's work");
        assert!(read == cluster, "{options}");
    });
}
