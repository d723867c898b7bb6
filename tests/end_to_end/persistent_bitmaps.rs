//! Bitmaps that images keep, beside qemu-storage-daemon: what is shown, refused, stored and found again; and what is left of them after
//! the daemon's end, well or not.

use std::fs;

use serde_json::json;
use tempfile::TempDir;

use crate::daemon::Daemon;
use crate::oracle::compare;
use crate::tools;

/// They come, record, go to the image and back.
#[test]
fn they_live_as_the_oracle_has_them() {
    compare(
        r#"
    $ qemu-img create -q -f qcow2 a.qcow2 4M
    $ qemu-img create -q -f qcow2 -o compat=0.10 v2.qcow2 4M
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "a", "discard": "unmap", "file": {"driver": "file", "node-name": "af", "filename": "a.qcow2"}}}
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "v2", "file": {"driver": "file", "filename": "v2.qcow2"}}}
    {"execute": "blockdev-add", "arguments": {"driver": "copy-on-read", "node-name": "cor", "file": "a"}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "a", "name": "p1", "persistent": true}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "a", "name": "p2", "persistent": true, "disabled": true, "granularity": 4096}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "a", "name": "v", "granularity": 4096}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "a", "name": "p1", "persistent": true}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "cor", "name": "p1", "persistent": true}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "v2", "name": "p1", "persistent": true}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "a", "name": "", "persistent": true}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "a", "name": "x", "granularity": 4294967296, "persistent": true}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "a", "name": "x", "granularity": 2147483648, "persistent": true}}
    bitmaps
    $ qemu-img info -U a.qcow2 | sed -n "/bitmaps:/,/refcount bits/p"
    {"execute": "block-export-add", "arguments": {"type": "nbd", "id": "e", "node-name": "a", "writable": true}}
    {"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": "s"}}}}
    {"execute": "block-export-add", "arguments": {"type": "nbd", "id": "e", "node-name": "a", "writable": true}}
    $ qemu-io -f raw 'nbd+unix:///a?socket=s' -c 'write 0 64k' -c 'write 1M 4k' > /dev/null
    {"execute": "block-dirty-bitmap-enable", "arguments": {"node": "a", "name": "p2"}}
    $ qemu-io -f raw 'nbd+unix:///a?socket=s' -c 'write 2M 64k' > /dev/null
    bitmaps
    {"execute": "blockdev-del", "arguments": {"node-name": "v2"}}
    {"execute": "block-export-del", "arguments": {"id": "e"}}
    {"execute": "blockdev-del", "arguments": {"node-name": "cor"}}
    {"execute": "blockdev-del", "arguments": {"node-name": "a"}}
    $ qemu-img info -U a.qcow2 | sed -n "/bitmaps:/,/refcount bits/p"
    $ qemu-img check a.qcow2 | head -2
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "a", "file": {"driver": "file", "node-name": "af", "filename": "a.qcow2"}}}
    bitmaps
    {"execute": "x-debug-block-dirty-bitmap-sha256", "arguments": {"node": "a", "name": "p1"}}
    {"execute": "x-debug-block-dirty-bitmap-sha256", "arguments": {"node": "a", "name": "p2"}}
    $ qemu-img info -U a.qcow2 | sed -n "/bitmaps:/,/refcount bits/p"
    {"execute": "block-dirty-bitmap-remove", "arguments": {"node": "a", "name": "p1"}}
    bitmaps
    $ qemu-img info -U a.qcow2 | sed -n "/bitmaps:/,/refcount bits/p"
    {"execute": "block-dirty-bitmap-disable", "arguments": {"node": "a", "name": "p2"}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "a", "name": "p3", "persistent": true}}
    {"execute": "block-dirty-bitmap-merge", "arguments": {"node": "a", "target": "p3", "bitmaps": ["p2"]}}
    {"execute": "block-dirty-bitmap-clear", "arguments": {"node": "a", "name": "p2"}}
    {"execute": "blockdev-del", "arguments": {"node-name": "a"}}
    $ qemu-img info a.qcow2 | sed -n "/bitmaps:/,/refcount bits/p"
    $ qemu-img check a.qcow2 | head -2
    "#,
        |_| (),
    );
}

/// Reading and writing, other lengths, images that nobody has closed, an overlay on top and its commit.
#[test]
fn they_follow_what_becomes_of_their_image() {
    compare(
        r#"
    $ qemu-img create -q -f qcow2 a.qcow2 4M
    $ qemu-img bitmap --add a.qcow2 on; qemu-img bitmap --add --disable -g 4k a.qcow2 off; qemu-io -c 'write 1M 130k' a.qcow2 >/dev/null
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "a", "read-only": true, "file": {"driver": "file", "node-name": "af", "filename": "a.qcow2"}}}
    bitmaps
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "a", "name": "new", "persistent": true}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "a", "name": "mem"}}
    {"execute": "block-dirty-bitmap-clear", "arguments": {"node": "a", "name": "on"}}
    {"execute": "block-dirty-bitmap-remove", "arguments": {"node": "a", "name": "on"}}
    {"execute": "block-dirty-bitmap-merge", "arguments": {"node": "a", "target": "on", "bitmaps": ["off"]}}
    {"execute": "block-dirty-bitmap-merge", "arguments": {"node": "a", "target": "mem", "bitmaps": ["on"]}}
    {"execute": "block-dirty-bitmap-merge", "arguments": {"node": "a", "target": "new", "bitmaps": ["on"]}}
    {"execute": "block-dirty-bitmap-disable", "arguments": {"node": "a", "name": "on"}}
    {"execute": "block-dirty-bitmap-enable", "arguments": {"node": "a", "name": "off"}}
    bitmaps
    {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "a", "read-only": false, "file": "af"}]}}
    bitmaps
    $ qemu-img info -U a.qcow2 | sed -n "/bitmaps:/,/refcount bits/p"
    {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "a", "read-only": true, "file": "af"}]}}
    bitmaps
    $ qemu-img info -U a.qcow2 | sed -n "/bitmaps:/,/refcount bits/p"
    $ qemu-img check -U a.qcow2 | head -2
    {"execute": "block-dirty-bitmap-clear", "arguments": {"node": "a", "name": "on"}}
    {"execute": "block-dirty-bitmap-clear", "arguments": {"node": "a", "name": "new"}}
    {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "a", "read-only": false, "file": "af"}]}}
    {"execute": "block_resize", "arguments": {"node-name": "a", "size": 8388608}}
    {"execute": "block_resize", "arguments": {"node-name": "a", "size": 1179648}}
    bitmaps
    {"execute": "blockdev-del", "arguments": {"node-name": "a"}}
    $ qemu-img check a.qcow2 | head -2
    $ cp a.qcow2 b.qcow2
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "a", "file": {"driver": "file", "node-name": "af", "filename": "a.qcow2"}}}
    $ cp a.qcow2 c.qcow2
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "c", "file": {"driver": "file", "filename": "c.qcow2"}}}
    bitmaps
    {"execute": "block_resize", "arguments": {"node-name": "c", "size": 8388608}}
    {"execute": "block-dirty-bitmap-clear", "arguments": {"node": "c", "name": "on"}}
    {"execute": "block-dirty-bitmap-enable", "arguments": {"node": "c", "name": "on"}}
    {"execute": "block-dirty-bitmap-disable", "arguments": {"node": "c", "name": "on"}}
    {"execute": "block-dirty-bitmap-merge", "arguments": {"node": "c", "target": "on", "bitmaps": ["on"]}}
    {"execute": "x-debug-block-dirty-bitmap-sha256", "arguments": {"node": "c", "name": "on"}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "c", "name": "on", "persistent": true}}
    {"execute": "block-dirty-bitmap-remove", "arguments": {"node": "c", "name": "on"}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "c", "name": "on", "persistent": true}}
    bitmaps
    {"execute": "block_resize", "arguments": {"node-name": "c", "size": 8388608}}
    $ qemu-img info -U c.qcow2 | sed -n "/bitmaps:/,/refcount bits/p"
    {"execute": "blockdev-snapshot-internal-sync", "arguments": {"device": "a", "name": "s"}}
    bitmaps
    $ qemu-img create -q -f qcow2 o.qcow2 8M
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "o", "file": {"driver": "file", "filename": "o.qcow2"}}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "a", "name": "last", "persistent": true}}
    {"execute": "blockdev-snapshot", "arguments": {"node": "a", "overlay": "o"}}
    bitmaps
    $ qemu-img info -U a.qcow2 | sed -n "/bitmaps:/,/refcount bits/p"
    $ qemu-img check -U a.qcow2 | head -2
    {"execute": "block-commit", "arguments": {"device": "o", "job-id": "j", "top-node": "o"}}
    wait j ready
    $ qemu-img info -U a.qcow2 | sed -n "/bitmaps:/,/refcount bits/p"
    {"execute": "job-complete", "arguments": {"id": "j"}}
    wait j null
    $ qemu-img info -U a.qcow2 | sed -n "/bitmaps:/,/refcount bits/p"
    "#,
        |_| (),
    );
}

/// All of a disk has changed that does not fill the last cluster of bits; QEMU's tools make it longer.
#[test]
fn bits_behind_the_end_are_clear() {
    compare(
        r#"
    $ qemu-img create -q -f qcow2 a.qcow2 3146240
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "a", "file": {"driver": "file", "filename": "a.qcow2"}}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "a", "name": "all", "persistent": true}}
    {"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": "s"}}}}
    {"execute": "block-export-add", "arguments": {"type": "nbd", "id": "e", "node-name": "a", "writable": true}}
    $ qemu-io -f raw 'nbd+unix:///a?socket=s' -c 'write 0 3146240' > /dev/null
    {"execute": "block-export-del", "arguments": {"id": "e"}}
    bitmaps
    {"execute": "blockdev-del", "arguments": {"node-name": "a"}}
    $ qemu-img resize -q a.qcow2 16M
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "a", "file": {"driver": "file", "filename": "a.qcow2"}}}
    bitmaps
    {"execute": "x-debug-block-dirty-bitmap-sha256", "arguments": {"node": "a", "name": "all"}}
    "#,
        |_| (),
    );
}

/// What images cannot keep, bitmaps that are shown, data outside, overlays made by the daemon.
#[test]
fn they_are_refused_as_the_oracle_refuses_them() {
    let long = "x".repeat(1024);
    let mut script = r#"
    $ qemu-img create -q -f qcow2 a.qcow2 4M
    $ qemu-img create -q -f qcow2 big.qcow2 3T
    $ qemu-img create -q -f qcow2 -o cluster_size=512 small.qcow2 64G
    $ qemu-img create -q -f raw r.raw 1M
    $ qemu-img create -q -f qcow2 -o data_file=d.raw,data_file_raw=on df.qcow2 4M
    $ qemu-img create -q -f qcow2 -o lazy_refcounts=on lazy.qcow2 4M
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "a", "file": {"driver": "file", "filename": "a.qcow2"}}}
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "big", "file": {"driver": "file", "filename": "big.qcow2"}}}
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "small", "file": {"driver": "file", "filename": "small.qcow2"}}}
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "df", "file": {"driver": "file", "filename": "df.qcow2"}, "data-file": {"driver": "file", "filename": "d.raw"}}}
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "lazy", "file": {"driver": "file", "filename": "lazy.qcow2"}}}
    {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "r", "file": {"driver": "file", "filename": "r.raw"}}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "big", "name": "x", "granularity": 512, "persistent": true}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "big", "name": "x", "granularity": 4096, "persistent": true}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "small", "name": "x", "granularity": 512, "persistent": true}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "df", "name": "x", "granularity": 512, "persistent": true}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "lazy", "name": "x", "granularity": 512, "persistent": true}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "r", "name": "x", "granularity": 512, "persistent": true}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "a", "name": "on", "persistent": true}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "a", "name": "off", "persistent": true, "disabled": true}}
    {"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": "s"}}}}
    {"execute": "block-export-add", "arguments": {"type": "nbd", "id": "e", "node-name": "a", "writable": true, "bitmaps": ["on", "off"]}}
    {"execute": "block-dirty-bitmap-remove", "arguments": {"node": "a", "name": "off"}}
    {"execute": "block_resize", "arguments": {"node-name": "a", "size": 8388608}}
    bitmaps
    $ qemu-io -f raw 'nbd+unix:///a?socket=s' -c 'write 2M 64k' > /dev/null
    {"execute": "block-export-del", "arguments": {"id": "e"}}
    {"execute": "blockdev-del", "arguments": {"node-name": "a"}}
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "a", "file": {"driver": "file", "filename": "a.qcow2"}}}
    {"execute": "block-export-add", "arguments": {"type": "nbd", "id": "e", "node-name": "a", "writable": true, "bitmaps": ["on"]}}
    {"execute": "block_resize", "arguments": {"node-name": "a", "size": 8388608}}
    {"execute": "block-export-del", "arguments": {"id": "e"}}
    {"execute": "block-dirty-bitmap-remove", "arguments": {"node": "a", "name": "off"}}
    {"execute": "block-dirty-bitmap-remove", "arguments": {"node": "a", "name": "on"}}
    $ qemu-img info -U a.qcow2 | sed -n "/bitmaps:/,/refcount bits/p"
    $ qemu-img check -U a.qcow2 | head -2
    bitmaps
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "a", "name": "again", "persistent": true, "disabled": true}}
    {"execute": "block-dirty-bitmap-remove", "arguments": {"node": "a", "name": "again"}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "a", "name": "again", "persistent": true, "disabled": true}}
    {"execute": "block-export-add", "arguments": {"type": "nbd", "id": "e", "node-name": "a", "writable": true}}
    {"execute": "blockdev-snapshot-sync", "arguments": {"node-name": "a", "snapshot-file": "ov.qcow2", "snapshot-node-name": "ov"}}
    bitmaps
    $ qemu-img info -U a.qcow2 | sed -n "/bitmaps:/,/refcount bits/p"
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "ov", "name": "ovb", "persistent": true}}
    {"execute": "blockdev-snapshot-sync", "arguments": {"node-name": "ov", "snapshot-file": "ov2.qcow2", "snapshot-node-name": "ov2"}}
    $ qemu-img info -U ov.qcow2 | sed -n "/bitmaps:/,/refcount bits/p"
    {"execute": "block-commit", "arguments": {"device": "ov2", "job-id": "j", "top-node": "ov", "base-node": "a"}}
    wait j null
    bitmaps
    $ qemu-img info -U ov.qcow2 | sed -n "/bitmaps:/,/refcount bits/p"
    $ qemu-img info -U a.qcow2 | sed -n "/bitmaps:/,/refcount bits/p"
    {"execute": "blockdev-del", "arguments": {"node-name": "df"}}
    {"execute": "blockdev-del", "arguments": {"node-name": "small"}}
    {"execute": "blockdev-del", "arguments": {"node-name": "big"}}
    {"execute": "blockdev-del", "arguments": {"node-name": "lazy"}}
    $ for i in df small big lazy; do qemu-img info -U $i.qcow2 | sed -n "/bitmaps:/,/refcount bits/p"; qemu-img check $i.qcow2 | head -1; done
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "lazy", "read-only": true, "file": {"driver": "file", "filename": "lazy.qcow2"}}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "lazy", "name": "lost", "persistent": true}}
    {"execute": "blockdev-del", "arguments": {"node-name": "lazy"}}
    $ qemu-img info -U lazy.qcow2 | sed -n "/bitmaps:/,/refcount bits/p"
    "#
    .to_owned();
    script += r#"{"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": "lazy.qcow2"}}}"#;
    for name in [&long, &long[1..], &long[1..]] {
        let arguments = json!({"node": "n", "name": name, "persistent": true});
        let command = json!({"execute": "block-dirty-bitmap-add", "arguments": arguments});
        script += &format!("\n{command}");
    }
    compare(&script, |_| ());
}

/// Threads, internal snapshots, other options; jobs that take layers out; a program that does not know of bitmaps.
#[test]
fn they_stay_with_their_image_on_its_way() {
    compare(
        r#"
    $ qemu-img create -q -f qcow2 a.qcow2 4M
    $ qemu-img bitmap --add a.qcow2 on; qemu-img bitmap --add --disable -g 4k a.qcow2 off; qemu-io -c 'write 1M 130k' a.qcow2 >/dev/null
    {"execute": "object-add", "arguments": {"qom-type": "iothread", "id": "t"}}
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "a", "file": {"driver": "file", "node-name": "af", "filename": "a.qcow2"}}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "a", "name": "new", "persistent": true}}
    {"execute": "x-blockdev-set-iothread", "arguments": {"node-name": "a", "iothread": "t"}}
    bitmaps
    $ qemu-img info -U a.qcow2 | sed -n "/bitmaps:/,/refcount bits/p"
    {"execute": "block-dirty-bitmap-remove", "arguments": {"node": "a", "name": "off"}}
    {"execute": "x-blockdev-set-iothread", "arguments": {"node-name": "a", "iothread": null}}
    bitmaps
    {"execute": "blockdev-snapshot-internal-sync", "arguments": {"device": "a", "name": "s"}}
    bitmaps
    {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "a", "discard": "unmap", "file": "af"}]}}
    bitmaps
    $ qemu-img info -U a.qcow2 | sed -n "/bitmaps:/,/refcount bits/p"
    {"execute": "blockdev-del", "arguments": {"node-name": "a"}}
    $ qemu-img info -U a.qcow2 | sed -n "/bitmaps:/,/refcount bits/p"
    $ qemu-img create -q -f qcow2 -b a.qcow2 -F qcow2 b.qcow2; qemu-img bitmap --add b.qcow2 of-b
    $ qemu-img create -q -f qcow2 -b b.qcow2 -F qcow2 c.qcow2; qemu-img bitmap --add c.qcow2 of-c
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "c", "file": {"driver": "file", "filename": "c.qcow2"}, "backing": {"driver": "qcow2", "node-name": "b", "file": {"driver": "file", "filename": "b.qcow2"}, "backing": {"driver": "qcow2", "node-name": "a", "file": {"driver": "file", "filename": "a.qcow2"}}}}}
    bitmaps
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "a", "name": "below", "persistent": true}}
    {"execute": "blockdev-snapshot-internal-sync", "arguments": {"device": "c", "name": "s"}}
    {"execute": "block-stream", "arguments": {"job-id": "j", "device": "c", "base-node": "a"}}
    wait j null
    bitmaps
    $ qemu-img info -U c.qcow2 | sed -n "/bitmaps:/,/refcount bits/p"
    {"execute": "blockdev-del", "arguments": {"node-name": "b"}}
    $ qemu-img info -U b.qcow2 | sed -n "/bitmaps:/,/refcount bits/p"
    {"execute": "block-commit", "arguments": {"job-id": "k", "device": "c", "top-node": "c", "base-node": "a"}}
    wait k ready
    bitmaps
    $ qemu-img info -U a.qcow2 | sed -n "/bitmaps:/,/refcount bits/p"
    {"execute": "job-cancel", "arguments": {"id": "k"}}
    wait k null
    bitmaps
    $ qemu-img info -U a.qcow2 | sed -n "/bitmaps:/,/refcount bits/p"
    {"execute": "blockdev-del", "arguments": {"node-name": "c"}}
    $ for i in a b c; do qemu-img info -U $i.qcow2 | sed -n "/bitmaps:/,/refcount bits/p"; qemu-img check $i.qcow2 | head -1; done
    $ dd if=/dev/zero of=c.qcow2 bs=1 seek=88 count=8 conv=notrunc status=none
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "c", "backing": null, "file": {"driver": "file", "filename": "c.qcow2"}}}
    bitmaps
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "c", "name": "of-c", "persistent": true}}
    {"execute": "blockdev-del", "arguments": {"node-name": "c"}}
    $ qemu-img info -U c.qcow2 | sed -n "/bitmaps:/,/refcount bits/p"
    $ qemu-img check c.qcow2 2> /dev/null | grep leaked
    "#,
        |_| (),
    );
}

fn qemu_img(daemon: &Daemon, arguments: &[&str]) -> String {
    let mut command = std::process::Command::new("qemu-img");
    command.args(arguments).current_dir(daemon.folder.path());
    let ended = tools::run_command(command, "");
    assert_eq!(ended.code, Some(0), "{arguments:?}: {}", ended.errors);
    ended.output
}

/// The next daemon in the folder of one that has ended.
fn next(folder: TempDir) -> Daemon {
    for left in ["qmp.sock", "pid"] {
        let _ = fs::remove_file(folder.path().join(left));
    }
    Daemon::start_in(folder, &[])
}

fn add(daemon: &Daemon, read_only: bool) {
    crate::state_dir::add(&mut daemon.client(), read_only);
}

/// Names of the bitmaps of the only image, and whether each is inconsistent.
fn shown(daemon: &Daemon) -> Vec<(String, bool)> {
    let nodes = daemon
        .client()
        .run("query-named-block-nodes", json!({"flat": true}));
    let nodes = nodes.as_array().expect("a list").clone();
    let node = nodes.iter().find(|node| node["node-name"] == json!("n"));
    let bitmaps = node.expect("there")["dirty-bitmaps"].as_array().cloned();
    let bitmap = |one: &serde_json::Value| {
        let name = one["name"].as_str().expect("a name").to_owned();
        (name, one["inconsistent"] == json!(true))
    };
    bitmaps.unwrap_or_default().iter().map(bitmap).collect()
}

#[test]
fn a_daemon_that_ends_has_stored_them_and_one_that_is_killed_has_not() {
    if !tools::have_oracle() {
        return;
    }
    let daemon = Daemon::start();
    qemu_img(&daemon, &["create", "-q", "-f", "qcow2", "i.qcow2", "1M"]);
    add(&daemon, false);
    let names = ["one", "two"];
    for name in names {
        let arguments = json!({"node": "n", "name": name, "persistent": true});
        daemon.client().run("block-dirty-bitmap-add", arguments);
    }
    let folder = daemon.end();
    let daemon = next(folder);
    let info = qemu_img(&daemon, &["info", "-U", "i.qcow2"]);
    assert!(!info.contains("in-use") && info.contains("auto"), "{info}");
    // Who only reads leaves them as they are, however he ends.
    add(&daemon, true);
    let sound = [("two".to_owned(), false), ("one".to_owned(), false)];
    let listed = |daemon: &Daemon| {
        let mut all = shown(daemon);
        all.sort();
        all
    };
    let mut expected = sound.to_vec();
    expected.sort();
    assert_eq!(listed(&daemon), expected);
    let daemon = next(daemon.kill());
    add(&daemon, false);
    assert_eq!(listed(&daemon), expected);
    let daemon = next(daemon.kill());
    let info = qemu_img(&daemon, &["info", "-U", "i.qcow2"]);
    assert_eq!(info.matches("in-use").count(), 2, "{info}");
    add(&daemon, false);
    expected
        .iter_mut()
        .for_each(|(_, inconsistent)| *inconsistent = true);
    assert_eq!(listed(&daemon), expected);
    for name in names {
        let arguments = json!({"node": "n", "name": name});
        daemon.client().run("block-dirty-bitmap-remove", arguments);
    }
    let daemon = next(daemon.end());
    let info = qemu_img(&daemon, &["info", "-U", "i.qcow2"]);
    assert!(!info.contains("bitmaps"), "{info}");
    qemu_img(&daemon, &["check", "-U", "i.qcow2"]);
    daemon.quit();
}
