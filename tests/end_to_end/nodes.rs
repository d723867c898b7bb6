//! Nodes: how they are added, shown, used, kept from others and taken away, the same on both daemons.

use std::path::Path;

use crate::oracle::{compare, data_file, hole_file};

fn files(folder: &Path) {
    data_file(&folder.join("s.raw"), 4 << 20);
    hole_file(&folder.join("t.raw"), 4 << 20);
    hole_file(&folder.join("u.raw"), 4 << 20);
    data_file(&folder.join("odd.raw"), 1000);
    std::fs::create_dir(folder.join("folder")).expect("made");
}

#[test]
fn options_and_refusals() {
    compare(
        r##"
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "a", "filename": "folder"}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "a", "filename": "folder", "read-only": true}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "a", "filename": "/dev/null"}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "a", "filename": ""}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "a", "filename": "file:s.raw"}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "a", "filename": "s.raw/x"}}
        {"execute": "blockdev-add", "arguments": {"driver": "host_device", "node-name": "a", "filename": "s.raw"}}
        {"execute": "blockdev-add", "arguments": {"driver": "host_device", "node-name": "a", "filename": "none"}}
        {"execute": "blockdev-add", "arguments": {"driver": "host_device", "node-name": "a", "filename": "folder"}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "a", "filename": "s.raw", "aio": "native"}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "a", "filename": "s.raw", "aio": "native", "cache": {"direct": false}}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "a", "filename": "s.raw", "aio-max-batch": -1}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "a", "filename": "s.raw", "force-share": true}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "a", "filename": "s.raw", "detect-zeroes": "unmap"}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "a", "filename": "s.raw", "active": false}}
        {"execute": "blockdev-del", "arguments": {"node-name": "a"}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "a", "filename": "s.raw", "aio": "io_uring", "cache": {"no-flush": true}, "auto-read-only": true, "discard": "unmap", "detect-zeroes": "unmap", "locking": "on"}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "b", "filename": "t.raw", "read-only": true, "force-share": true, "locking": "off", "aio-max-batch": 7, "drop-cache": false, "x-check-cache-dropped": true}}
        {"execute": "query-named-block-nodes"}
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
        {"execute": "x-debug-query-block-graph"}
        {"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "n1", "size": 0}}
        {"execute": "blockdev-add", "arguments": {"driver": "null-aio", "node-name": "n2", "size": 1000, "latency-ns": 1}}
        {"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "n3", "size": 9223372036854775807}}
        {"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "n4", "latency-ns": 9223372036854775808}}
        {"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "n5"}}
        {"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "n6", "read-only": true, "auto-read-only": true, "force-share": true, "cache": {"direct": true}}}
        {"execute": "blockdev-del", "arguments": {"node-name": "a"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "b"}}
        {"execute": "blockdev-del", "arguments": {"node-name": ""}}
        "##,
        files,
    );
}

#[test]
fn the_raw_driver() {
    compare(
        r##"
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "f", "filename": "s.raw"}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "r", "file": "f"}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "r2", "file": "f"}}
        {"execute": "query-named-block-nodes"}
        {"execute": "x-debug-query-block-graph"}
        {"execute": "blockdev-del", "arguments": {"node-name": "f"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "r2"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "r"}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "w", "file": "f", "offset": 512, "size": 1024}}
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
        {"execute": "x-debug-query-block-graph"}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "w2", "file": "f", "offset": 1024}}
        {"execute": "block_resize", "arguments": {"node-name": "w", "size": 2048}}
        {"execute": "block_resize", "arguments": {"node-name": "f", "size": 2048}}
        {"execute": "blockdev-del", "arguments": {"node-name": "w2"}}
        {"execute": "block_resize", "arguments": {"node-name": "f", "size": 2048}}
        {"execute": "block_resize", "arguments": {"node-name": "w", "size": 2048}}
        {"execute": "blockdev-del", "arguments": {"node-name": "w"}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "w", "file": "f", "offset": 513, "size": 1024}}
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
        {"execute": "block_resize", "arguments": {"node-name": "w", "size": 2048}}
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
        {"execute": "blockdev-del", "arguments": {"node-name": "w"}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "w", "file": "f", "offset": -1}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "w", "file": "f", "size": -512}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "w", "file": "f", "offset": 0, "size": 0}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "w4", "file": "f", "offset": 1024}}
        {"execute": "block_resize", "arguments": {"node-name": "w4", "size": 8192}}
        $ stat -c %s s.raw
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
        {"execute": "blockdev-del", "arguments": {"node-name": "w"}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "w", "read-only": true, "file": "f", "offset": 512}}
        {"execute": "x-debug-query-block-graph"}
        {"execute": "blockdev-del", "arguments": {"node-name": "w"}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "r", "file": "nope"}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "r", "file": {"driver": "file", "filename": "none"}}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "r", "file": {"driver": "file", "node-name": "r", "filename": "t.raw"}}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "r", "file": {"driver": "file", "node-name": "f", "filename": "t.raw"}}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "r", "read-only": true, "cache": {"no-flush": true}, "file": {"driver": "file", "node-name": "inner", "filename": "t.raw"}}}
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "rw", "file": "inner"}}
        {"execute": "blockdev-mirror", "arguments": {"job-id": "j", "device": "f", "target": "rw", "sync": "full"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "rw"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "inner"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "r"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "inner"}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "odd", "file": {"driver": "file", "filename": "odd.raw"}}}
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "deep", "file": {"driver": "raw", "file": {"driver": "raw", "file": {"driver": "null-co"}}}}}
        {"execute": "block_resize", "arguments": {"node-name": "deep", "size": 8388608}}
        "##,
        files,
    );
}

#[test]
pub(crate) fn lengths_change() {
    compare(
        r##"
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "r", "file": {"driver": "file", "node-name": "f", "filename": "s.raw"}}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "ro", "filename": "t.raw", "read-only": true}}
        {"execute": "block_resize", "arguments": {"node-name": "r", "size": 1234}}
        $ stat -c %s s.raw
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
        {"execute": "block_resize", "arguments": {"node-name": "r", "size": 0}}
        {"execute": "block_resize", "arguments": {"node-name": "r", "size": 9223372036854775807}}
        {"execute": "block_resize", "arguments": {"node-name": "r", "size": 9223372035781033984}}
        {"execute": "block_resize", "arguments": {"node-name": "r", "size": 9223372035781033985}}
        {"execute": "block_resize", "arguments": {"node-name": "r", "size": 8388608}}
        $ stat -c %s s.raw
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
        {"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "n"}}
        {"execute": "block_resize", "arguments": {"node-name": "n", "size": 8388608}}
        {"execute": "block_resize", "arguments": {"node-name": "ro", "size": 8388608}}
        {"execute": "block_resize", "arguments": {"node-name": "ro", "size": -5}}
        {"execute": "block_resize", "arguments": {"node-name": "nope", "device": "x", "size": 8388608}}
        "##,
        files,
    );
}

/// Each job kind on nodes that have users of every kind, and what others may do meanwhile.
#[test]
fn nodes_that_jobs_hold() {
    for (job, more) in [
        ("blockdev-backup", r#", "speed": 1"#),
        ("blockdev-mirror", ""),
        ("blockdev-mirror", r#", "replaces": "s""#),
        ("blockdev-mirror", r#", "sync": "none""#),
    ] {
        let sync = if more.contains("sync") {
            ""
        } else {
            r#", "sync": "full""#
        };
        let wait = if job == "blockdev-mirror" {
            "wait j ready"
        } else {
            "wait j running"
        };
        // Only a backup shares its target's image with another job.
        let beside = if job == "blockdev-backup" {
            "wait beside null"
        } else {
            ""
        };
        let script = format!(
            r##"
            {{"execute": "blockdev-add", "arguments": {{"driver": "file", "node-name": "s", "filename": "s.raw"}}}}
            {{"execute": "blockdev-add", "arguments": {{"driver": "raw", "node-name": "t", "file": {{"driver": "file", "node-name": "tf", "filename": "t.raw"}}}}}}
            {{"execute": "blockdev-add", "arguments": {{"driver": "file", "node-name": "u", "filename": "u.raw"}}}}
            {{"execute": "object-add", "arguments": {{"qom-type": "iothread", "id": "io0"}}}}
            locks s.raw
            locks t.raw
            {{"execute": "{job}", "arguments": {{"job-id": "j", "device": "s", "target": "t", "filter-node-name": "flt"{sync}{more}}}}}
            {wait}
            locks s.raw
            locks t.raw
            {{"execute": "x-debug-query-block-graph"}}
            {{"execute": "query-named-block-nodes", "arguments": {{"flat": true}}}}
            {{"execute": "blockdev-add", "arguments": {{"driver": "null-co", "node-name": "z", "size": 4194304}}}}
            {{"execute": "blockdev-del", "arguments": {{"node-name": "s"}}}}
            {{"execute": "blockdev-del", "arguments": {{"node-name": "t"}}}}
            {{"execute": "blockdev-del", "arguments": {{"node-name": "tf"}}}}
            {{"execute": "blockdev-del", "arguments": {{"node-name": "flt"}}}}
            {{"execute": "block_resize", "arguments": {{"node-name": "s", "size": 8388608}}}}
            {{"execute": "block_resize", "arguments": {{"node-name": "t", "size": 8388608}}}}
            {{"execute": "block_resize", "arguments": {{"node-name": "tf", "size": 8388608}}}}
            {{"execute": "block_resize", "arguments": {{"node-name": "flt", "size": 8388608}}}}
            {{"execute": "blockdev-mirror", "arguments": {{"job-id": "k", "device": "s", "target": "u", "sync": "full"}}}}
            {{"execute": "blockdev-mirror", "arguments": {{"job-id": "k", "device": "flt", "target": "u", "sync": "full"}}}}
            {{"execute": "blockdev-mirror", "arguments": {{"job-id": "k", "device": "u", "target": "s", "sync": "full"}}}}
            {{"execute": "blockdev-mirror", "arguments": {{"job-id": "k", "device": "u", "target": "t", "sync": "full"}}}}
            {{"execute": "blockdev-mirror", "arguments": {{"job-id": "k", "device": "u", "target": "tf", "sync": "full"}}}}
            {{"execute": "blockdev-mirror", "arguments": {{"job-id": "k", "device": "t", "target": "u", "sync": "full"}}}}
            {{"execute": "blockdev-mirror", "arguments": {{"job-id": "j", "device": "u", "target": "z", "sync": "full"}}}}
            {{"execute": "blockdev-mirror", "arguments": {{"job-id": "k", "device": "u", "target": "z", "sync": "full", "replaces": "s"}}}}
            {{"execute": "blockdev-mirror", "arguments": {{"job-id": "k", "device": "u", "target": "z", "sync": "full", "replaces": "z"}}}}
            {{"execute": "blockdev-backup", "arguments": {{"job-id": "k", "device": "u", "target": "s", "sync": "full"}}}}
            {{"execute": "blockdev-backup", "arguments": {{"job-id": "k", "device": "u", "target": "t", "sync": "full"}}}}
            {{"execute": "blockdev-backup", "arguments": {{"job-id": "beside", "device": "u", "target": "tf", "sync": "full"}}}}
            {beside}
            {{"execute": "blockdev-backup", "arguments": {{"job-id": "k", "device": "t", "target": "u", "sync": "full"}}}}
            {{"execute": "blockdev-backup", "arguments": {{"job-id": "k", "device": "flt", "target": "u", "sync": "full"}}}}
            {{"execute": "blockdev-add", "arguments": {{"driver": "raw", "node-name": "r", "file": "s", "offset": 512}}}}
            {{"execute": "blockdev-add", "arguments": {{"driver": "raw", "node-name": "r", "file": "t", "offset": 512}}}}
            {{"execute": "blockdev-add", "arguments": {{"driver": "raw", "node-name": "r", "file": "flt", "offset": 512}}}}
            {{"execute": "blockdev-add", "arguments": {{"driver": "file", "node-name": "flt", "filename": "u.raw"}}}}
            {{"execute": "x-blockdev-set-iothread", "arguments": {{"node-name": "nope", "iothread": null}}}}
            {{"execute": "job-cancel", "arguments": {{"id": "j"}}}}
            wait j null
            {{"execute": "query-jobs"}}
            locks s.raw
            locks t.raw
            {{"execute": "x-debug-query-block-graph"}}
            {{"execute": "blockdev-del", "arguments": {{"node-name": "s"}}}}
            {{"execute": "blockdev-del", "arguments": {{"node-name": "t"}}}}
            "##
        );
        compare(&script, files);
    }
}

/// Nodes stay held until the job is dismissed, not only until it has concluded.
#[test]
pub(crate) fn nodes_of_a_concluded_job() {
    for (job, end) in [
        ("blockdev-backup", ""),
        (
            "blockdev-mirror",
            r#"{"execute": "job-complete", "arguments": {"id": "j"}}"#,
        ),
        (
            "blockdev-mirror",
            r#"{"execute": "job-cancel", "arguments": {"id": "j"}}"#,
        ),
    ] {
        let ready = if end.is_empty() { "" } else { "wait j ready" };
        let script = format!(
            r##"
            {{"execute": "blockdev-add", "arguments": {{"driver": "file", "node-name": "s", "filename": "s.raw"}}}}
            {{"execute": "blockdev-add", "arguments": {{"driver": "file", "node-name": "t", "filename": "t.raw"}}}}
            {{"execute": "blockdev-add", "arguments": {{"driver": "file", "node-name": "u", "filename": "u.raw"}}}}
            {{"execute": "{job}", "arguments": {{"job-id": "j", "device": "s", "target": "t", "sync": "full", "auto-dismiss": false}}}}
            {ready}
            {end}
            wait j concluded
            locks s.raw
            locks t.raw
            {{"execute": "x-debug-query-block-graph"}}
            {{"execute": "query-named-block-nodes", "arguments": {{"flat": true}}}}
            {{"execute": "blockdev-del", "arguments": {{"node-name": "s"}}}}
            {{"execute": "blockdev-del", "arguments": {{"node-name": "t"}}}}
            {{"execute": "block_resize", "arguments": {{"node-name": "s", "size": 4194304}}}}
            {{"execute": "block_resize", "arguments": {{"node-name": "t", "size": 4194304}}}}
            {{"execute": "blockdev-backup", "arguments": {{"job-id": "k", "device": "u", "target": "t", "sync": "full"}}}}
            {{"execute": "blockdev-mirror", "arguments": {{"job-id": "k", "device": "s", "target": "u", "sync": "full"}}}}
            {{"execute": "job-dismiss", "arguments": {{"id": "j"}}}}
            {{"execute": "query-jobs"}}
            {{"execute": "query-named-block-nodes", "arguments": {{"flat": true}}}}
            "##
        );
        compare(&script, files);
    }
}

#[test]
pub(crate) fn what_a_mirror_pivots() {
    compare(
        r##"
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "s", "filename": "s.raw"}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "t", "filename": "t.raw"}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "above", "file": "s"}}
        {"execute": "blockdev-mirror", "arguments": {"job-id": "j", "device": "s", "target": "t", "sync": "full"}}
        {"execute": "blockdev-mirror", "arguments": {"job-id": "j", "device": "above", "target": "t", "sync": "full", "replaces": "s"}}
        {"execute": "blockdev-mirror", "arguments": {"job-id": "j", "device": "above", "target": "t", "sync": "full"}}
        {"execute": "x-debug-query-block-graph"}
        wait j ready
        {"execute": "job-complete", "arguments": {"id": "j"}}
        wait j null
        {"execute": "x-debug-query-block-graph"}
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
        {"execute": "blockdev-del", "arguments": {"node-name": "s"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "t"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "above"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "s"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "t"}}
        "##,
        files,
    );
}

#[test]
fn more_of_objects() {
    compare(
        r##"
        {"execute": "object-add", "arguments": {"qom-type": "iothread", "id": "io0"}}
        {"execute": "object-add", "arguments": {"qom-type": "iothread", "id": "io0"}}
        {"execute": "object-add", "arguments": {"qom-type": "iothread", "id": ""}}
        {"execute": "object-add", "arguments": {"qom-type": "iothread", "id": "io 1"}}
        {"execute": "object-add", "arguments": {"qom-type": "iothread", "id": "io1", "poll-max-ns": -1}}
        {"execute": "object-add", "arguments": {"qom-type": "iothread", "id": "io1", "aio-max-batch": -1}}
        {"execute": "object-add", "arguments": {"qom-type": "iothread", "id": "io1", "thread-pool-max": 0}}
        {"execute": "object-add", "arguments": {"qom-type": "iothread", "id": "io1", "thread-pool-min": 5, "thread-pool-max": 4}}
        {"execute": "object-add", "arguments": {"qom-type": "iothread", "id": "io2", "props": {}}}
        {"execute": "object-del", "arguments": {"id": ""}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "s", "file": {"driver": "file", "node-name": "sf", "filename": "s.raw"}}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "t", "filename": "t.raw"}}
        {"execute": "x-blockdev-set-iothread", "arguments": {"node-name": "sf", "iothread": "io0"}}
        {"execute": "x-blockdev-set-iothread", "arguments": {"node-name": "s", "iothread": "io0"}}
        {"execute": "object-del", "arguments": {"id": "io0"}}
        {"execute": "x-blockdev-set-iothread", "arguments": {"node-name": "s", "iothread": null, "force": true}}
        {"execute": "x-blockdev-set-iothread", "arguments": {"node-name": "t", "iothread": null, "force": true}}
        {"execute": "object-del", "arguments": {"id": "io0"}}
        "##,
        files,
    );
}
