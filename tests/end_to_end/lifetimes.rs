//! How jobs end, in all ways: numbers at the end, cancels, and the end of the daemon, the same on both daemons.

use std::fmt::Write;
use std::path::Path;

use crate::oracle::{compare, data_file, hole_file};

/// Jobs in every status that lasts, each on nodes of its own.
fn jobs_in_every_status() -> String {
    let mut script = String::new();
    for job in [
        "run", "paused", "ready", "standby", "pending", "done", "mpending", "mrun",
    ] {
        for side in ["s", "t"] {
            writeln!(
                script,
                r#"{{"execute": "blockdev-add", "arguments": {{"driver": "null-co", "node-name": "{job}-{side}", "size": 67108864, "read-zeroes": false}}}}"#
            )
            .expect("written");
        }
    }
    script += r#"
    {"execute": "blockdev-backup", "arguments": {"job-id": "run", "device": "run-s", "target": "run-t", "sync": "full", "speed": 65536, "auto-dismiss": false}}
    {"execute": "blockdev-backup", "arguments": {"job-id": "paused", "device": "paused-s", "target": "paused-t", "sync": "full", "speed": 65536}}
    {"execute": "job-pause", "arguments": {"id": "paused"}}
    wait paused paused
    {"execute": "blockdev-mirror", "arguments": {"job-id": "ready", "device": "ready-s", "target": "ready-t", "sync": "full"}}
    wait ready ready
    {"execute": "blockdev-mirror", "arguments": {"job-id": "standby", "device": "standby-s", "target": "standby-t", "sync": "full"}}
    wait standby ready
    {"execute": "job-pause", "arguments": {"id": "standby"}}
    wait standby standby
    {"execute": "job-complete", "arguments": {"id": "standby"}}
    {"execute": "blockdev-backup", "arguments": {"job-id": "pending", "device": "pending-s", "target": "pending-t", "sync": "full", "auto-finalize": false}}
    wait pending pending
    {"execute": "blockdev-mirror", "arguments": {"job-id": "mpending", "device": "mpending-s", "target": "mpending-t", "sync": "full", "auto-finalize": false}}
    wait mpending ready
    {"execute": "block-job-cancel", "arguments": {"device": "mpending"}}
    wait mpending pending
    {"execute": "blockdev-mirror", "arguments": {"job-id": "mrun", "device": "mrun-s", "target": "mrun-t", "sync": "full", "speed": 65536}}
    {"execute": "blockdev-backup", "arguments": {"job-id": "done", "device": "done-s", "target": "done-t", "sync": "full", "auto-dismiss": false}}
    wait done concluded
    {"execute": "blockdev-create", "arguments": {"job-id": "create", "options": {"driver": "file", "filename": "new.raw", "size": 65536}}}
    wait create concluded
    {"execute": "query-jobs"}
    "#;
    script
}

#[test]
pub(crate) fn the_daemon_quits() {
    compare(&jobs_in_every_status(), |_| {});
}

#[test]
fn the_daemon_is_ended_by_signals() {
    for signal in ["TERM", "INT", "HUP"] {
        compare(
            &format!("{}\nsignal {signal}", jobs_in_every_status()),
            |_| {},
        );
    }
}

fn odd_sizes(folder: &Path) {
    for (name, length) in [
        ("even", 65_536),
        ("odd", 66_048),
        ("bytes", 1000),
        ("empty", 0),
    ] {
        data_file(&folder.join(format!("{name}.s")), length);
        hole_file(&folder.join(format!("{name}.t")), length);
    }
    // 128 KiB of data in 4 MiB.
    hole_file(&folder.join("sparse.s"), 4 << 20);
    let data = vec![7; 128 << 10];
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(folder.join("sparse.s"))
        .expect("opened");
    std::os::unix::fs::FileExt::write_all_at(&file, &data, 1 << 20).expect("written");
    hole_file(&folder.join("sparse.t"), 4 << 20);
}

#[test]
pub(crate) fn progress_counts_the_same() {
    let mut script = String::new();
    for name in ["even", "odd", "bytes", "empty", "sparse"] {
        for (target, options) in [("plain", ""), ("unmap", r#", "discard": "unmap""#)] {
            let mut line = |text: String| writeln!(script, "{text}").expect("written");
            line(format!(
                r#"{{"execute": "blockdev-add", "arguments": {{"driver": "file", "node-name": "s", "filename": "{name}.s"}}}}"#
            ));
            line(format!(
                r#"{{"execute": "blockdev-add", "arguments": {{"driver": "file", "node-name": "t", "filename": "{name}.t"{options}}}}}"#
            ));
            for sync in ["full", "top", "none"] {
                let job = format!("{name}-{target}-{sync}");
                line(format!(
                    r#"{{"execute": "blockdev-backup", "arguments": {{"job-id": "b-{job}", "device": "s", "target": "t", "sync": "{sync}", "auto-dismiss": false}}}}"#
                ));
                if sync == "none" {
                    line(format!(
                        r#"{{"execute": "job-cancel", "arguments": {{"id": "b-{job}"}}}}"#
                    ));
                }
                line(format!("wait b-{job} concluded"));
                line(r#"{"execute": "query-jobs"}"#.to_owned());
                line(format!(
                    r#"{{"execute": "job-dismiss", "arguments": {{"id": "b-{job}"}}}}"#
                ));
                line(format!(
                    r#"{{"execute": "blockdev-mirror", "arguments": {{"job-id": "m-{job}", "device": "s", "target": "t", "sync": "{sync}"}}}}"#
                ));
                line(format!("wait m-{job} ready"));
                line(r#"{"execute": "query-block-jobs"}"#.to_owned());
                line(format!(
                    r#"{{"execute": "job-cancel", "arguments": {{"id": "m-{job}"}}}}"#
                ));
                line(format!("wait m-{job} null"));
            }
            line(r#"{"execute": "blockdev-del", "arguments": {"node-name": "s"}}"#.to_owned());
            line(r#"{"execute": "blockdev-del", "arguments": {"node-name": "t"}}"#.to_owned());
        }
    }
    // The oracle pads what ends inside a sector.
    script += "$ rm bytes.*; stat -c '%n %s' *.s *.t; for s in *.s; do cmp $s ${s%.s}.t; done\n";
    compare(&script, odd_sizes);
}

#[test]
fn files_that_jobs_create() {
    let mut script = String::from(
        r#"{"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "u", "filename": "even.s"}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "v", "filename": "even.t"}}
        {"execute": "blockdev-mirror", "arguments": {"job-id": "hold", "device": "u", "target": "v", "sync": "full"}}
        wait hold ready
        "#,
    );
    let options = [
        r#""filename": "a", "size": 0"#,
        r#""filename": "a", "size": 1000"#,
        r#""filename": "a", "size": 65536, "preallocation": "off", "nocow": true"#,
        r#""filename": "a", "size": 65536, "preallocation": "falloc""#,
        r#""filename": "a", "size": 65537, "preallocation": "full""#,
        r#""filename": "a", "size": 65536, "extent-size-hint": 0"#,
        r#""filename": "a", "size": 65536, "extent-size-hint": 18446744073709551615"#,
        r#""filename": "a", "size": 18446744073709551615"#,
        r#""filename": "a", "size": 9223372036854775807"#,
        r#""filename": "a", "size": 65536, "preallocation": "metadata""#,
        r#""filename": "", "size": 65536"#,
        r#""filename": "no/a", "size": 65536"#,
        r#""filename": "even.s", "size": 65536"#,
        r#""filename": "even.t", "size": 65536"#,
        r#""filename": "odd.s", "size": 512"#,
    ];
    for (number, options) in options.iter().enumerate() {
        writeln!(
            script,
            r#"{{"execute": "blockdev-create", "arguments": {{"job-id": "c{number}", "options": {{"driver": "file", {options}}}}}}}
            wait c{number} concluded
            {{"execute": "query-jobs"}}
            {{"execute": "query-block-jobs"}}
            $ stat -c '%n %s' a *.s *.t
            {{"execute": "job-dismiss", "arguments": {{"id": "c{number}"}}}}"#
        )
        .expect("written");
    }
    script += r#"
        {"execute": "blockdev-create", "arguments": {"job-id": "c", "options": {"driver": "null-aio"}}}
        {"execute": "blockdev-create", "arguments": {"job-id": "c", "options": {"driver": "host_device"}}}
        {"execute": "blockdev-create", "arguments": {"job-id": "hold", "options": {"driver": "file", "filename": "b", "size": 1}}}
        {"execute": "blockdev-create", "arguments": {"job-id": "", "options": {"driver": "file", "filename": "b", "size": 1}}}
        {"execute": "blockdev-create", "arguments": {"job-id": "c", "options": {"driver": "file", "filename": "b", "size": -1}}}
        wait c concluded
        {"execute": "query-jobs"}
    "#;
    compare(&script, odd_sizes);
}
