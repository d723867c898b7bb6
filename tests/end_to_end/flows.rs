//! The flows of a job's life, the same on both daemons.

use std::path::Path;

use crate::oracle::{compare, data_file, hole_file};

const NULL_NODES: &str = r#"
{"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "s", "size": 8388608, "read-zeroes": false}}
{"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "t", "size": 8388608, "read-zeroes": false}}
{"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "S", "size": 67108864, "read-zeroes": false}}
{"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "T", "size": 67108864, "read-zeroes": false}}
{"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "small", "size": 1048576, "read-zeroes": false}}
{"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "ro", "size": 8388608, "read-only": true}}
"#;

fn on_null_nodes(script: &str) {
    compare(&format!("{NULL_NODES}{script}"), |_| {});
}

#[test]
fn backup_with_all_defaults() {
    on_null_nodes(
        r#"
        {"execute": "blockdev-backup", "arguments": {"job-id": "j", "device": "s", "target": "t", "sync": "full"}}
        wait j null
        {"execute": "query-jobs"}
        "#,
    );
}

#[test]
fn backup_that_waits_for_finalize_and_dismiss() {
    on_null_nodes(
        r#"
        {"execute": "blockdev-backup", "arguments": {"job-id": "j", "device": "s", "target": "t", "sync": "full", "auto-finalize": false, "auto-dismiss": false}}
        wait j pending
        {"execute": "query-block-jobs"}
        {"execute": "job-pause", "arguments": {"id": "j"}}
        {"execute": "job-resume", "arguments": {"id": "j"}}
        {"execute": "job-complete", "arguments": {"id": "j"}}
        {"execute": "job-dismiss", "arguments": {"id": "j"}}
        {"execute": "block-job-set-speed", "arguments": {"device": "j", "speed": 1}}
        {"execute": "block-job-change", "arguments": {"id": "j", "type": "backup"}}
        {"execute": "job-finalize", "arguments": {"id": "j"}}
        wait j concluded
        {"execute": "query-jobs"}
        {"execute": "query-block-jobs"}
        {"execute": "job-cancel", "arguments": {"id": "j"}}
        {"execute": "job-finalize", "arguments": {"id": "j"}}
        {"execute": "blockdev-backup", "arguments": {"job-id": "j", "device": "s", "target": "t", "sync": "full"}}
        {"execute": "job-dismiss", "arguments": {"id": "j"}}
        {"execute": "job-dismiss", "arguments": {"id": "j"}}
        {"execute": "block-job-dismiss", "arguments": {"id": "j"}}
        "#,
    );
}

#[test]
pub(crate) fn pause_resume_and_cancel_of_a_paused_job() {
    on_null_nodes(
        r#"
        {"execute": "blockdev-backup", "arguments": {"job-id": "j", "device": "s", "target": "t", "sync": "full", "speed": 65536, "auto-dismiss": false}}
        {"execute": "job-resume", "arguments": {"id": "j"}}
        {"execute": "job-pause", "arguments": {"id": "j"}}
        wait j paused
        {"execute": "query-block-jobs"}
        {"execute": "job-pause", "arguments": {"id": "j"}}
        {"execute": "block-job-cancel", "arguments": {"device": "j"}}
        {"execute": "job-finalize", "arguments": {"id": "j"}}
        {"execute": "job-resume", "arguments": {"id": "j"}}
        wait j running
        {"execute": "block-job-pause", "arguments": {"device": "j"}}
        wait j paused
        {"execute": "job-cancel", "arguments": {"id": "j"}}
        wait j concluded
        {"execute": "query-jobs"}
        {"execute": "block-job-dismiss", "arguments": {"id": "j"}}
        "#,
    );
}

#[test]
pub(crate) fn mirror_to_ready_change_and_complete() {
    on_null_nodes(
        r#"
        {"execute": "blockdev-mirror", "arguments": {"job-id": "m", "device": "s", "target": "t", "sync": "full", "auto-finalize": false}}
        wait m ready
        {"execute": "query-block-jobs"}
        {"execute": "block-job-change", "arguments": {"id": "m", "type": "mirror"}}
        {"execute": "block-job-change", "arguments": {"id": "m", "type": "mirror", "copy-mode": "write-blocking"}}
        {"execute": "query-jobs"}
        {"execute": "block-job-change", "arguments": {"id": "m", "type": "mirror", "copy-mode": "background"}}
        {"execute": "job-pause", "arguments": {"id": "m"}}
        wait m standby
        {"execute": "job-resume", "arguments": {"id": "m"}}
        wait m ready
        {"execute": "job-complete", "arguments": {"id": "m"}}
        wait m pending
        {"execute": "query-block-jobs"}
        {"execute": "job-finalize", "arguments": {"id": "m"}}
        wait m null
        {"execute": "query-block-jobs"}
        "#,
    );
}

#[test]
fn mirror_cancelled_before_and_after_ready() {
    on_null_nodes(
        r#"
        {"execute": "blockdev-mirror", "arguments": {"job-id": "m", "device": "S", "target": "T", "sync": "full", "speed": 65536}}
        {"execute": "job-complete", "arguments": {"id": "m"}}
        {"execute": "block-job-cancel", "arguments": {"device": "m"}}
        wait m null
        {"execute": "blockdev-mirror", "arguments": {"job-id": "m", "device": "s", "target": "t", "sync": "full"}}
        wait m ready
        {"execute": "block-job-cancel", "arguments": {"device": "m"}}
        wait m null
        {"execute": "blockdev-mirror", "arguments": {"job-id": "m", "device": "s", "target": "t", "sync": "full"}}
        wait m ready
        {"execute": "job-cancel", "arguments": {"id": "m"}}
        wait m null
        {"execute": "blockdev-mirror", "arguments": {"job-id": "m", "device": "s", "target": "t", "sync": "full"}}
        wait m ready
        {"execute": "job-pause", "arguments": {"id": "m"}}
        wait m standby
        {"execute": "job-complete", "arguments": {"id": "m"}}
        {"execute": "job-complete", "arguments": {"id": "m"}}
        {"execute": "query-jobs"}
        {"execute": "job-resume", "arguments": {"id": "m"}}
        wait m null
        "#,
    );
}

#[test]
fn jobs_that_never_begin() {
    on_null_nodes(
        r#"
        {"execute": "blockdev-mirror", "arguments": {"device": "s", "target": "t", "sync": "full", "job-id": "1x"}}
        {"execute": "blockdev-mirror", "arguments": {"device": "s", "target": "t", "sync": "full"}}
        {"execute": "blockdev-mirror", "arguments": {"device": "s", "target": "t", "sync": "full", "job-id": "j", "speed": -1}}
        {"execute": "blockdev-mirror", "arguments": {"device": "s", "target": "ro", "sync": "full", "job-id": "j"}}
        {"execute": "blockdev-mirror", "arguments": {"device": "zz", "target": "t", "sync": "full", "job-id": "j"}}
        {"execute": "blockdev-mirror", "arguments": {"device": "s", "target": "zz", "sync": "full", "job-id": "j"}}
        {"execute": "blockdev-mirror", "arguments": {"device": "s", "target": "s", "sync": "full", "job-id": "j"}}
        {"execute": "blockdev-mirror", "arguments": {"device": "s", "target": "t", "sync": "bitmap", "job-id": "j"}}
        {"execute": "blockdev-mirror", "arguments": {"device": "s", "target": "t", "sync": "incremental", "job-id": "j"}}
        {"execute": "blockdev-mirror", "arguments": {"device": "s", "target": "t", "sync": "full", "job-id": "j", "granularity": 513}}
        {"execute": "blockdev-mirror", "arguments": {"device": "s", "target": "t", "sync": "full", "job-id": "j", "granularity": 1}}
        {"execute": "blockdev-mirror", "arguments": {"device": "s", "target": "t", "sync": "full", "job-id": "j", "buf-size": -1}}
        {"execute": "blockdev-mirror", "arguments": {"device": "s", "target": "t", "sync": "full", "job-id": "j", "on-source-error": "stop", "replaces": "zz"}}
        {"execute": "blockdev-mirror", "arguments": {"device": "s", "target": "t", "sync": "full", "job-id": "j", "filter-node-name": "t"}}
        {"execute": "blockdev-mirror", "arguments": {"device": "s", "target": "t", "sync": "full", "job-id": "j", "filter-node-name": "1t"}}
        {"execute": "blockdev-backup", "arguments": {"device": "s", "target": "t", "sync": "full", "job-id": "j", "speed": -1}}
        {"execute": "blockdev-backup", "arguments": {"device": "s", "target": "ro", "sync": "full", "job-id": "j"}}
        {"execute": "blockdev-backup", "arguments": {"device": "s", "target": "s", "sync": "full", "job-id": "j"}}
        {"execute": "blockdev-backup", "arguments": {"device": "s", "target": "small", "sync": "full", "job-id": "j"}}
        {"execute": "blockdev-backup", "arguments": {"device": "s", "target": "zz", "sync": "full", "job-id": "j"}}
        {"execute": "blockdev-backup", "arguments": {"device": "zz", "target": "t", "sync": "full", "job-id": "j"}}
        {"execute": "blockdev-backup", "arguments": {"device": "s", "target": "t", "sync": "bitmap", "job-id": "j"}}
        {"execute": "blockdev-backup", "arguments": {"device": "s", "target": "t", "sync": "incremental", "job-id": "j", "bitmap": "b"}}
        {"execute": "blockdev-backup", "arguments": {"device": "s", "target": "t", "sync": "bitmap", "job-id": "j", "bitmap": "b"}}
        {"execute": "blockdev-backup", "arguments": {"device": "s", "target": "t", "sync": "bitmap", "job-id": "j", "bitmap": "b", "bitmap-mode": "never"}}
        {"execute": "blockdev-backup", "arguments": {"device": "s", "target": "t", "sync": "full", "job-id": "j", "bitmap-mode": "never"}}
        {"execute": "blockdev-backup", "arguments": {"device": "s", "target": "t", "sync": "full", "job-id": "j", "compress": true}}
        {"execute": "blockdev-backup", "arguments": {"device": "s", "target": "t", "sync": "full", "job-id": "j", "x-perf": {"max-workers": 0}}}
        {"execute": "blockdev-backup", "arguments": {"device": "s", "target": "t", "sync": "full", "job-id": "j", "x-perf": {"max-chunk": -1}}}
        {"execute": "blockdev-backup", "arguments": {"device": "s", "target": "t", "sync": "full", "job-id": "j", "x-perf": {"max-chunk": 1024}}}
        {"execute": "blockdev-backup", "arguments": {"device": "s", "target": "t", "sync": "full", "job-id": "j", "x-perf": {"min-cluster-size": 513}}}
        {"execute": "query-jobs"}
        "#,
    );
}

#[test]
fn a_mirror_to_another_size_fails_in_the_job() {
    on_null_nodes(
        r#"
        {"execute": "blockdev-mirror", "arguments": {"job-id": "m", "device": "s", "target": "small", "sync": "full", "auto-dismiss": false}}
        wait m concluded
        {"execute": "query-jobs"}
        {"execute": "query-block-jobs"}
        {"execute": "job-dismiss", "arguments": {"id": "m"}}
        "#,
    );
}

#[test]
fn verbs_on_nothing_and_arguments_that_do_not_fit() {
    on_null_nodes(
        r#"
        {"execute": "job-pause", "arguments": {"id": "x"}}
        {"execute": "job-change", "arguments": {"id": "x"}}
        {"execute": "block-job-pause", "arguments": {"device": "x"}}
        {"execute": "block-job-resume", "arguments": {"device": "x"}}
        {"execute": "block-job-cancel", "arguments": {"device": "x"}}
        {"execute": "block-job-complete", "arguments": {"device": "x"}}
        {"execute": "block-job-finalize", "arguments": {"id": "x"}}
        {"execute": "block-job-finalize", "arguments": {"device": "x"}}
        {"execute": "block-job-set-speed", "arguments": {"device": "x"}}
        {"execute": "block-job-set-speed", "arguments": {"device": "x", "speed": 1.5}}
        {"execute": "block-job-set-speed", "arguments": {"device": "x", "speed": -1}}
        {"execute": "block-job-change", "arguments": {"id": "x", "type": "nope"}}
        {"execute": "block-job-change", "arguments": {"id": "x", "type": "mirror", "copy-mode": "nope"}}
        {"execute": "block-job-change", "arguments": {"id": "x", "type": "mirror", "copy-mode": "background"}}
        {"execute": "blockdev-backup", "arguments": {}}
        {"execute": "blockdev-backup", "arguments": {"device": "s", "sync": "none", "target": 1}}
        {"execute": "blockdev-backup", "arguments": {"device": "s", "sync": "some", "target": "t"}}
        {"execute": "blockdev-mirror", "arguments": {"device": "s", "target": "t", "sync": "full", "job-id": "j", "granularity": 4294967296}}
        {"execute": "blockdev-mirror", "arguments": {"device": "s", "target": "t", "sync": "full", "job-id": "j", "granularity": "x"}}
        {"execute": "blockdev-create", "arguments": {"job-id": "c"}}
        {"execute": "blockdev-create", "arguments": {"job-id": "c", "options": {"driver": "file", "filename": "x"}}}
        {"execute": "blockdev-create", "arguments": {"job-id": "c", "options": {"driver": "null-co"}}}
        {"execute": "blockdev-create", "arguments": {"job-id": "1c", "options": {"driver": "file", "filename": "x", "size": 512}}}
        {"execute": "query-jobs", "arguments": {"x": 1}}
        {"execute": "query-block"}
        "#,
    );
}

#[test]
pub(crate) fn created_files() {
    compare(
        r#"
        {"execute": "blockdev-create", "arguments": {"job-id": "c", "options": {"driver": "file", "filename": "new.raw", "size": 65536}}}
        wait c concluded
        {"execute": "query-jobs"}
        {"execute": "query-block-jobs"}
        {"execute": "block-job-dismiss", "arguments": {"id": "c"}}
        {"execute": "job-dismiss", "arguments": {"id": "c"}}
        {"execute": "blockdev-create", "arguments": {"job-id": "c", "options": {"driver": "file", "filename": "/nonexistent/x", "size": 65536}}}
        wait c concluded
        {"execute": "query-jobs"}
        {"execute": "job-dismiss", "arguments": {"id": "c"}}
        {"execute": "blockdev-create", "arguments": {"job-id": "c", "options": {"driver": "file", "filename": "meta.raw", "size": 65536, "preallocation": "metadata"}}}
        wait c concluded
        {"execute": "query-jobs"}
        {"execute": "job-dismiss", "arguments": {"id": "c"}}
        {"execute": "blockdev-create", "arguments": {"job-id": "c", "options": {"driver": "file", "filename": "hint.raw", "size": 65536, "extent-size-hint": 4294967296}}}
        wait c concluded
        {"execute": "query-jobs"}
        {"execute": "job-dismiss", "arguments": {"id": "c"}}
        {"execute": "blockdev-create", "arguments": {"job-id": "c", "options": {"driver": "file", "filename": "hint.raw", "size": 65536, "extent-size-hint": 3, "nocow": true}}}
        wait c concluded
        {"execute": "query-jobs"}
        {"execute": "job-dismiss", "arguments": {"id": "c"}}
        {"execute": "blockdev-create", "arguments": {"job-id": "c", "options": {"driver": "file", "filename": ".", "size": 65536}}}
        wait c concluded
        {"execute": "query-jobs"}
        {"execute": "job-dismiss", "arguments": {"id": "c"}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "n", "filename": "hint.raw"}}
        "#,
        |_| {},
    );
}

fn two_files(folder: &Path) {
    data_file(&folder.join("s.raw"), 4 << 20);
    hole_file(&folder.join("t.raw"), 4 << 20);
}

#[test]
pub(crate) fn nodes_on_files() {
    compare(
        r##"
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "s", "file": {"driver": "file", "node-name": "sf", "filename": "s.raw"}}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "s", "filename": "t.raw"}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "1s", "filename": "t.raw"}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "filename": "t.raw"}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "a234567890123456789012345678901234567890", "filename": "t.raw"}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "x", "filename": "none.raw"}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "x", "filename": "."}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "x", "filename": "t.raw", "aio": "native"}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "x", "filename": "t.raw", "force-share": true}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "x", "file": "nope"}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "x", "file": 5}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "x", "file": "sf", "offset": 512}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "x", "file": {"driver": "file", "filename": "t.raw"}, "offset": 8388608}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "x", "file": {"driver": "file", "filename": "t.raw"}, "size": 8388608}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "x", "file": {"driver": "file", "filename": "t.raw"}, "size": 513}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "t", "filename": "t.raw", "read-only": true, "discard": "unmap", "detect-zeroes": "on"}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "d", "filename": "t.raw", "detect-zeroes": "unmap"}}
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
        {"execute": "blockdev-del", "arguments": {"node-name": "sf"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "nope"}}
        {"execute": "block_resize", "arguments": {"node-name": "t", "size": 1024}}
        {"execute": "block_resize", "arguments": {"node-name": "s", "size": -1}}
        {"execute": "block_resize", "arguments": {"node-name": "s", "size": 1048577}}
        {"execute": "block_resize", "arguments": {"node-name": "nope", "size": 1024}}
        {"execute": "block_resize", "arguments": {"device": "s", "size": 1024}}
        {"execute": "block_resize", "arguments": {"size": 1024}}
        {"execute": "block_resize", "arguments": {"device": "s", "node-name": "s", "size": 1024}}
        {"execute": "block_resize", "arguments": {"node-name": "s", "size": 1048576}}
        {"execute": "blockdev-del", "arguments": {"node-name": "s"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "s"}}
        "##,
        two_files,
    );
}

#[test]
pub(crate) fn nodes_in_use_by_a_job() {
    compare(
        r#"
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "s", "filename": "s.raw"}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "t", "filename": "t.raw"}}
        {"execute": "blockdev-backup", "arguments": {"job-id": "j", "device": "s", "target": "t", "sync": "full", "speed": 1, "filter-node-name": "f"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "s"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "t"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "f"}}
        {"execute": "block_resize", "arguments": {"node-name": "t", "size": 1048576}}
        {"execute": "blockdev-backup", "arguments": {"job-id": "k", "device": "s", "target": "t", "sync": "full"}}
        {"execute": "blockdev-mirror", "arguments": {"job-id": "k", "device": "s", "target": "t", "sync": "full"}}
        {"execute": "blockdev-mirror", "arguments": {"job-id": "k", "device": "f", "target": "t", "sync": "full"}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "r", "file": "t"}}
        {"execute": "job-cancel", "arguments": {"id": "j"}}
        wait j null
        {"execute": "blockdev-del", "arguments": {"node-name": "s"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "t"}}
        "#,
        two_files,
    );
}

#[test]
pub(crate) fn objects() {
    compare(
        r#"
        {"execute": "object-add", "arguments": {"qom-type": "iothread", "id": "io0"}}
        {"execute": "object-add", "arguments": {"qom-type": "iothread", "id": "io0"}}
        {"execute": "object-add", "arguments": {"qom-type": "iothread", "id": "0"}}
        {"execute": "object-add", "arguments": {"qom-type": "iothread"}}
        {"execute": "object-add", "arguments": {"qom-type": "nope", "id": "x"}}
        {"execute": "object-add", "arguments": {"qom-type": "iothread", "id": "io1", "poll-max-ns": 100}}
        {"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "n"}}
        {"execute": "x-blockdev-set-iothread", "arguments": {"node-name": "n", "iothread": "io0"}}
        {"execute": "x-blockdev-set-iothread", "arguments": {"node-name": "n", "iothread": "nope"}}
        {"execute": "x-blockdev-set-iothread", "arguments": {"node-name": "nope", "iothread": "io0"}}
        {"execute": "x-blockdev-set-iothread", "arguments": {"node-name": "n", "iothread": null}}
        {"execute": "x-blockdev-set-iothread", "arguments": {"node-name": "n"}}
        {"execute": "object-del", "arguments": {"id": "io1"}}
        {"execute": "object-del", "arguments": {"id": "io1"}}
        "#,
        |_| {},
    );
}

#[test]
fn quit_with_jobs_in_every_state() {
    on_null_nodes(
        r#"
        {"execute": "blockdev-backup", "arguments": {"job-id": "k", "device": "s", "target": "t", "sync": "full", "speed": 65536}}
        {"execute": "blockdev-backup", "arguments": {"job-id": "p", "device": "S", "target": "T", "sync": "full", "auto-finalize": false}}
        wait p pending
        {"execute": "blockdev-create", "arguments": {"job-id": "c", "options": {"driver": "file", "filename": "new.raw", "size": 65536}}}
        wait c concluded
        "#,
    );
}

#[test]
fn windows_of_one_file() {
    compare(
        r#"
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "u", "filename": "t.raw"}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "w1", "file": "u", "size": 1048576}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "w2", "file": "u", "offset": 1048576, "size": 1048576}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "w3", "file": "u", "offset": 1048576}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "w4", "file": "u", "offset": 0}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "w5", "file": "u", "offset": 512, "read-only": true}}
        {"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "n", "size": 1048576}}
        {"execute": "blockdev-mirror", "arguments": {"job-id": "j", "device": "n", "target": "w1", "sync": "full"}}
        wait j ready
        {"execute": "blockdev-mirror", "arguments": {"job-id": "k", "device": "w2", "target": "w3", "sync": "full"}}
        {"execute": "block_resize", "arguments": {"node-name": "u", "size": 8388608}}
        {"execute": "block_resize", "arguments": {"node-name": "w3", "size": 8388608}}
        {"execute": "block_resize", "arguments": {"node-name": "w4", "size": 8388608}}
        {"execute": "block_resize", "arguments": {"node-name": "w1", "size": 8388608}}
        {"execute": "job-cancel", "arguments": {"id": "j"}}
        wait j null
        "#,
        two_files,
    );
}
