//! Jobs on images: layers, compression, and images that contradict themselves, the same on both daemons.

use std::fs;
use std::path::Path;

use crate::images::{chain, image, overlay, run};
use crate::oracle::compare;

/// What `qemu-img map` says without places in the file, which are each daemon's own business. Of data it also says where the
/// file has holes.
const MAP: &str = "qemu-img map -f qcow2 --output=json";
const WITHOUT_PLACES: &str =
    r#"sed -E 's/, "offset": [0-9]+//; s/"zero": [a-z]*, "data": true/"data": true/'"#;

#[test]
fn copies_of_the_top_layer_hold_what_it_holds() {
    let script = r##"
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "top", "file": {"driver": "file", "filename": "top.qcow2"}}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "t", "file": {"driver": "file", "filename": "t.qcow2"}, "backing": null}}
        {"execute": "blockdev-backup", "arguments": {"job-id": "b", "device": "top", "target": "t", "sync": "top"}}
        wait b null
        {"execute": "blockdev-del", "arguments": {"node-name": "t"}}
        $ qemu-img compare -U top.qcow2 t.qcow2
        $ qemu-img check -q t.qcow2
        $ MAP t.qcow2 | PLACES
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "u", "file": {"driver": "file", "filename": "u.qcow2"}, "backing": null}}
        {"execute": "blockdev-mirror", "arguments": {"job-id": "m", "device": "top", "target": "u", "sync": "top"}}
        wait m ready
        {"execute": "job-complete", "arguments": {"id": "m"}}
        wait m null
        {"execute": "blockdev-del", "arguments": {"node-name": "u"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "top"}}
        $ qemu-img compare top.qcow2 u.qcow2
        $ qemu-img check -q u.qcow2
        $ MAP u.qcow2 | PLACES
        "##;
    let script = script.replace("MAP", MAP).replace("PLACES", WITHOUT_PLACES);
    compare(&script, |folder| {
        chain(folder);
        let zeroes = ["-f", "qcow2", "-c", "write -z 1M 64k", "top.qcow2"];
        run(folder, "qemu-io", &zeroes);
        for name in ["t.qcow2", "u.qcow2"] {
            overlay(folder, name, "mid.qcow2", "qcow2");
        }
    });
}

#[test]
fn compressed_backups_read_as_their_source_does() {
    compare(
        r##"
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "top", "file": {"driver": "file", "filename": "top.qcow2"}}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "t", "file": {"driver": "file", "filename": "t.qcow2"}}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "z", "file": {"driver": "file", "filename": "z.qcow2"}}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "large", "file": {"driver": "file", "filename": "large.qcow2"}}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "raw", "filename": "r.raw"}}
        {"execute": "blockdev-backup", "arguments": {"job-id": "r", "device": "top", "target": "raw", "sync": "full", "compress": true}}
        {"execute": "blockdev-backup", "arguments": {"job-id": "b", "device": "top", "target": "t", "sync": "full", "compress": true}}
        wait b null
        {"execute": "blockdev-backup", "arguments": {"job-id": "c", "device": "top", "target": "z", "sync": "full", "compress": true}}
        wait c null
        {"execute": "blockdev-backup", "arguments": {"job-id": "d", "device": "top", "target": "large", "sync": "full", "compress": true}}
        wait d null
        {"execute": "blockdev-del", "arguments": {"node-name": "t"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "z"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "large"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "top"}}
        $ for i in t z large; do qemu-img compare top.qcow2 $i.qcow2; qemu-img check -q $i.qcow2; done
        $ for i in t z large; do qemu-img map -f qcow2 --output=json $i.qcow2 | grep -c '"compressed": true'; done
        "##,
        |folder| {
            chain(folder);
            image(folder, "t.qcow2", &[]);
            image(
                folder,
                "z.qcow2",
                &["-o", "compression_type=zstd,cluster_size=4k"],
            );
            image(folder, "large.qcow2", &["-o", "cluster_size=2M"]);
        },
    );
}

/// An image of one cluster whose L2 entry is `word`.
fn nonsense(folder: &Path, name: &str, word: u64) {
    let create = ["create", "-q", "-f", "qcow2", name, "64k"];
    run(folder, "qemu-img", &create);
    run(
        folder,
        "qemu-io",
        &["-f", "qcow2", "-c", "write 0 64k", name],
    );
    let path = folder.join(name);
    let mut bytes = fs::read(&path).expect("read");
    let number = |bytes: &[u8], at: usize| {
        let word = bytes[at..at + 8].try_into().expect("8 bytes");
        usize::try_from(u64::from_be_bytes(word) & 0x00ff_ffff_ffff_fe00).expect("small")
    };
    let l2 = number(&bytes, number(&bytes, 40));
    bytes[l2..l2 + 8].copy_from_slice(&word.to_be_bytes());
    fs::write(path, bytes).expect("written");
}

#[test]
fn images_that_contradict_themselves_are_told_of() {
    const COPIED: u64 = 1 << 63;
    compare(
        r##"
        {"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "null", "size": 65536, "read-zeroes": false}}
        # Read.
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "askew", "file": {"driver": "file", "filename": "askew.qcow2"}}}
        {"execute": "blockdev-backup", "arguments": {"job-id": "r", "device": "askew", "target": "null", "sync": "full"}}
        wait r null
        {"execute": "blockdev-del", "arguments": {"node-name": "askew"}}
        $ qemu-img info askew.qcow2 | grep corrupt
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "askew", "file": {"driver": "file", "filename": "askew.qcow2"}}}
        # Read only.
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "ro", "read-only": true, "file": {"driver": "file", "filename": "ro.qcow2"}}}
        {"execute": "blockdev-backup", "arguments": {"job-id": "o", "device": "ro", "target": "null", "sync": "full"}}
        wait o null
        {"execute": "blockdev-del", "arguments": {"node-name": "ro"}}
        $ qemu-img info ro.qcow2 | grep corrupt
        # Written.
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "over", "file": {"driver": "file", "filename": "over.qcow2"}}}
        {"execute": "blockdev-backup", "arguments": {"job-id": "w", "device": "null", "target": "over", "sync": "full"}}
        wait w null
        {"execute": "blockdev-del", "arguments": {"node-name": "over"}}
        $ qemu-img info over.qcow2 | grep corrupt
        "##,
        |folder| {
            nonsense(folder, "askew.qcow2", COPIED | 0x50200);
            nonsense(folder, "ro.qcow2", COPIED | 0x50200);
            nonsense(folder, "over.qcow2", COPIED | 0x10000);
        },
    );
}
