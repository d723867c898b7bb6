//! Faults from one script on both daemons: how a fault filter is described and shown, and what jobs do about its faults.

use std::fmt::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::json;

use crate::daemon::{Daemon, terminate, wait_until};
use crate::nbd::Nbd;
use crate::oracle::{compare, data_file, hole_file};
use crate::tools;

/// A source with data, a hole for a target, and a target that is full.
fn files(folder: &Path) {
    data_file(&folder.join("s.raw"), 4 << 20);
    hole_file(&folder.join("t.raw"), 4 << 20);
    data_file(&folder.join("full.raw"), 4 << 20);
}

fn add(options: &str) -> String {
    format!(
        "{{\"execute\": \"blockdev-add\", \"arguments\": {{\"driver\": \"blkdebug\", {options}}}}}\n"
    )
}

fn delete(node: &str) -> String {
    format!("{{\"execute\": \"blockdev-del\", \"arguments\": {{\"node-name\": \"{node}\"}}}}\n")
}

#[test]
fn options_that_do_not_fit() {
    let mut script = String::from(
        r#"
        {"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "n", "size": 1048576, "read-zeroes": true}}
        "#,
    );
    for options in [
        r#""align": 3000"#,
        r#""align": -1"#,
        r#""align": 1"#,
        r#""align": 0"#,
        r#""align": 2147483648"#,
        r#""align": 9223372036854775807"#,
        r#""align": -9223372036854775808"#,
        r#""align": 1.5"#,
        r#""align": "512""#,
        r#""max-transfer": 1000"#,
        r#""max-transfer": -512"#,
        r#""max-transfer": 2147483647"#,
        r#""max-transfer": 2147483648"#,
        r#""align": 512, "max-transfer": 1000"#,
        r#""align": 512, "max-transfer": 1024"#,
        r#""align": 4096, "max-transfer": 1024"#,
        r#""align": 512, "opt-write-zero": 1000"#,
        r#""align": 512, "opt-write-zero": 1536"#,
        r#""opt-write-zero": -1"#,
        r#""align": 512, "max-write-zero": 1000"#,
        r#""opt-write-zero": 4096, "max-write-zero": 1024"#,
        r#""align": 512, "opt-write-zero": 1536, "max-write-zero": 2048"#,
        r#""align": 512, "opt-discard": 1000"#,
        r#""opt-discard": -4"#,
        r#""max-discard": -4"#,
        r#""opt-discard": 4096, "max-discard": 1024"#,
        r#""align": 512, "max-discard": 1000"#,
        r#""max-discard": 1000, "align": 3000"#,
        r#""config": "nope.conf""#,
        r#""config": """#,
        r#""config": ".""#,
        r#""inject-error": [{"event": "foo"}]"#,
        r#""inject-error": [{"event": "none", "iotype": "foo"}]"#,
        r#""inject-error": [{"event": "l2_load", "state": -1, "sector": -2}]"#,
        r#""inject-error": [{"event": "none", "sector": 9223372036854775807}]"#,
        r#""inject-error": [{"event": "none", "extra": 1}]"#,
        r#""inject-error": [{}]"#,
        r#""inject-error": {}"#,
        r#""set-state": [{"event": "none"}]"#,
        r#""set-state": [{"event": "cluster_free", "state": -5, "new_state": -2}]"#,
        r#""take-child-perms": ["write"], "unshare-child-perms": ["write"]"#,
        r#""x": 1"#,
    ] {
        script += &add(&format!(r#""node-name": "b", "image": "n", {options}"#));
        script += &delete("b");
    }
    for options in [
        r#""node-name": "b""#,
        r#""image": "n""#,
        r#""node-name": "b", "image": null"#,
        r#""node-name": "b", "image": "nope", "align": 3000"#,
        r#""node-name": "b", "image": "nope", "config": "nope""#,
        r#""node-name": "n", "image": "n""#,
        r#""node-name": "b", "image": {"driver": "file", "filename": "nope"}"#,
        r#""node-name": "b", "align": 3000, "image": {"driver": "file", "node-name": "gone", "filename": "s.raw"}"#,
        r#""node-name": "b", "force-share": true, "image": {"driver": "file", "filename": "s.raw"}"#,
        r#""node-name": "b", "read-only": true, "take-child-perms": ["write"], "image": {"driver": "file", "filename": "s.raw"}"#,
        r#""node-name": "b", "max-transfer": 512, "image": {"driver": "file", "filename": "s.raw"}"#,
    ] {
        script += &add(options);
    }
    script += &delete("gone");
    script += &delete("b");
    compare(&script, files);
}

#[test]
fn files_of_rules() {
    let mut script = String::new();
    let texts = [
        "",
        "\n# nothing\n\n",
        "[inject-error]\nevent = \"none\"\n",
        "[inject-error \"a\"]\n  event   =   \"none\"   more\nsector = \"-1\"\nerrno = \"0x1c\"\n",
        "[inject-error]more\r\nevent = \"l2_load\"\r\nonce = \"on\"\r\n",
        "[set-state]\nevent = \"none\"\nstate = \"1\"\nnew_state = \"2\"\n[inject-error]\nevent = \"none\"",
        "[inject-error]\nevent = \"none\"\nerrno = \"28",
        "event = \"none\"\n",
        "[foo]\nevent = \"none\"\n",
        "[inject-error]\n",
        "[set-state]\n",
        "[set-state]\nevent = \"none\"\nerrno = \"1\"\n",
        "[inject-error]\nevent = \"none\"\nfoo\n",
        "[inject-error]\nevent = \"none\"\nfoo = \"1\"\n",
        "[inject-error]\nevent = \"foo\"\n",
        "[inject-error]\nevent = \"none\"\niotype = \"foo\"\n",
        "[inject-error]\nevent = \"none\"\nerrno = \"x\"\n",
        "[inject-error]\nevent = \"none\"\nsector = \"99999999999999999999999\"\n",
        "[inject-error]\nevent = \"none\"\nonce = \"1\"\n",
        "[inject-error]\nevent = \"none\"\nimmediately = \"maybe\"\n",
        "[inject-error \"1\"]\nevent = \"none\"\n",
        "[set-state \"a\"]\nevent = \"none\"\n[set-state \"a\"]\nevent = \"none\"\n",
    ];
    for index in 0..texts.len() {
        script += &add(&format!(
            r#""node-name": "b", "config": "{index}.conf", "image": {{"driver": "null-co"}}"#
        ));
        script += &delete("b");
    }
    compare(&script, |folder| {
        for (index, text) in texts.iter().enumerate() {
            std::fs::write(folder.join(format!("{index}.conf")), text).expect("written");
        }
    });
}

#[test]
fn how_it_is_shown() {
    compare(
        r#"
        {"execute": "blockdev-add", "arguments": {"driver": "blkdebug", "node-name": "b0", "image": {"driver": "file", "filename": "s.raw"}}}
        {"execute": "blockdev-add", "arguments": {"driver": "blkdebug", "node-name": "b1", "config": "c.conf", "image": {"driver": "file", "filename": "t.raw"}}}
        {"execute": "blockdev-add", "arguments": {"driver": "blkdebug", "node-name": "b2", "align": 512, "max-transfer": 65536, "opt-write-zero": 4096, "max-write-zero": 65536, "opt-discard": 4096, "max-discard": 65536, "take-child-perms": ["write"], "unshare-child-perms": ["resize"], "inject-error": [{"event": "none", "sector": 5, "errno": 28, "once": true, "iotype": "read"}, {"event": "cor_write", "immediately": false, "state": 0}], "set-state": [{"event": "pwritev", "new_state": 2}], "image": {"driver": "file", "node-name": "f2", "filename": "full.raw"}}}
        {"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "n", "size": 512, "latency-ns": 5, "read-zeroes": true}}
        {"execute": "blockdev-add", "arguments": {"driver": "blkdebug", "node-name": "b3", "image": "n"}}
        {"execute": "blockdev-add", "arguments": {"driver": "blkdebug", "node-name": "b4", "image": {"driver": "blkdebug", "image": {"driver": "null-aio", "latency-ns": 1}}}}
        {"execute": "blockdev-add", "arguments": {"driver": "blkdebug", "node-name": "b5", "config": "c.conf", "align": 0, "max-transfer": 0, "image": {"driver": "null-co", "node-name": "n5", "read-zeroes": false}}}
        {"execute": "blockdev-add", "arguments": {"driver": "blkdebug", "node-name": "b6", "discard": "unmap", "detect-zeroes": "unmap", "cache": {"no-flush": true}, "image": "f2"}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "r0", "file": "b0"}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "r2", "offset": 512, "file": "b2"}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "r3", "size": 512, "file": "r0"}}
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
        {"execute": "query-named-block-nodes"}
        {"execute": "x-debug-query-block-graph"}
        {"execute": "blockdev-add", "arguments": {"driver": "blkdebug", "node-name": "b7", "unshare-child-perms": ["write"], "image": "f2"}}
        {"execute": "block_resize", "arguments": {"node-name": "f2", "size": 512}}
        {"execute": "block_resize", "arguments": {"node-name": "b0", "size": 1048576}}
        {"execute": "blockdev-del", "arguments": {"node-name": "f2"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "b0"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "r3"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "r0"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "b0"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "b4"}}
        {"execute": "blockdev-mirror", "arguments": {"job-id": "m", "device": "b5", "target": "b6", "sync": "none", "filter-node-name": "top"}}
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
        "#,
        |folder| {
            files(folder);
            let rules = "[inject-error]\nevent = \"none\"\nsector = \"99999999\"\n";
            std::fs::write(folder.join("c.conf"), rules).expect("written");
        },
    );
}

#[test]
fn a_filter_that_is_read_only_and_shared() {
    compare(
        r#"
        {"execute": "blockdev-add", "arguments": {"driver": "blkdebug", "node-name": "s", "read-only": true, "force-share": true, "image": {"driver": "file", "filename": "s.raw"}, "inject-error": [{"event": "none", "iotype": "read", "sector": 2048, "once": true}]}}
        {"execute": "blockdev-add", "arguments": {"driver": "blkdebug", "node-name": "t", "image": {"driver": "file", "filename": "t.raw"}}}
        {"execute": "blockdev-mirror", "arguments": {"job-id": "m", "device": "t", "target": "s", "sync": "full"}}
        {"execute": "block_resize", "arguments": {"node-name": "s", "size": 1048576}}
        {"execute": "blockdev-backup", "arguments": {"job-id": "j", "device": "s", "target": "t", "sync": "full"}}
        wait j null
        {"execute": "blockdev-backup", "arguments": {"job-id": "k", "device": "s", "target": "t", "sync": "full"}}
        wait k null
        $ cmp s.raw t.raw
        "#,
        files,
    );
}

/// Rules that have been used up stay so on another thread.
#[test]
fn rules_move_with_their_node() {
    let daemon = Daemon::start();
    files(daemon.folder.path());
    let mut client = daemon.client();
    client.run("object-add", json!({"qom-type": "iothread", "id": "io0"}));
    for (node, file) in [("s", "s.raw"), ("t", "t.raw")] {
        let image = json!({"driver": "file", "filename": file});
        let fault = json!({"event": "none", "iotype": "read", "sector": 2048, "once": true});
        let node = json!({"driver": "blkdebug", "node-name": node, "image": image, "inject-error": [fault]});
        client.run("blockdev-add", node);
    }
    for (job, end) in [("a", "aborting"), ("b", "pending")] {
        let source = json!({"node-name": "s", "iothread": "io0"});
        client.run("x-blockdev-set-iothread", source);
        let target = json!({"node-name": "t", "iothread": null});
        client.run("x-blockdev-set-iothread", target);
        let arguments = json!({"job-id": job, "device": "s", "target": "t", "sync": "full"});
        client.run("blockdev-backup", arguments);
        client.wait_for(job, end);
        client.wait_for(job, "null");
    }
    daemon.quit();
}

/// The flow of a read error that stops a mirror, and of its resumption.
#[test]
fn a_mirror_stopped_by_an_error_is_resumed() {
    compare(
        r#"
        {"execute": "blockdev-add", "arguments": {"driver": "blkdebug", "node-name": "s", "image": {"driver": "file", "filename": "s.raw"}, "inject-error": [{"event": "none", "iotype": "read", "sector": 2048, "once": true}]}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "t", "filename": "t.raw"}}
        {"execute": "blockdev-mirror", "arguments": {"job-id": "j", "device": "s", "target": "t", "sync": "full", "on-source-error": "stop"}}
        wait j stopped
        {"execute": "query-block-jobs"}
        {"execute": "job-resume", "arguments": {"id": "j"}}
        wait j ready
        {"execute": "query-block-jobs"}
        {"execute": "block-job-cancel", "arguments": {"device": "j", "force": true}}
        wait j null
        $ cmp s.raw t.raw
        "#,
        files,
    );
}

const POLICIES: [&str; 5] = ["report", "ignore", "enospc", "stop", "auto"];

/// One job between two fault filters, each with its rules, to its end; a job that stops is looked at and resumed.
fn job(
    script: &mut String,
    kind: &str,
    id: &str,
    rules: [&str; 2],
    policies: [&str; 2],
    stops: bool,
) {
    let nodes = [("s", "s.raw"), ("t", "full.raw")].into_iter().zip(rules);
    for ((node, file), rule) in nodes {
        *script += &add(&format!(
            r#""node-name": "{node}", "inject-error": [{rule}], "image": {{"driver": "file", "filename": "{file}"}}"#
        ));
    }
    let [source, target] = policies;
    let _ = writeln!(
        script,
        r#"{{"execute": "blockdev-{kind}", "arguments": {{"job-id": "{id}", "device": "s", "target": "t", "sync": "full", "auto-dismiss": false, "on-source-error": "{source}", "on-target-error": "{target}"}}}}"#
    );
    if stops {
        let _ = writeln!(
            script,
            r#"wait {id} stopped
            {{"execute": "query-block-jobs"}}
            {{"execute": "job-resume", "arguments": {{"id": "{id}"}}}}"#
        );
    }
}

/// Dismisses a job and closes its nodes.
fn end(script: &mut String, id: &str) {
    let _ = writeln!(
        script,
        r#"wait {id} concluded
        {{"execute": "query-jobs"}}
        {{"execute": "job-dismiss", "arguments": {{"id": "{id}"}}}}"#
    );
    *script += &(delete("s") + &delete("t"));
}

/// Every policy for one fault that happens once.
fn every_policy(kind: &str, iotype: &str, errno: i32) {
    const NO_SPACE: i32 = 28;
    let on_source = iotype == "read";
    let mut script = String::new();
    for policy in POLICIES {
        let id = format!("{policy}-{errno}");
        let fault = format!(
            r#"{{"event": "none", "iotype": "{iotype}", "errno": {errno}, "sector": 4096, "once": true}}"#
        );
        let (rules, policies) = if on_source {
            ([fault.as_str(), NO_FAULT], [policy, "report"])
        } else {
            ([NO_FAULT, fault.as_str()], ["report", policy])
        };
        let stops =
            policy == "stop" || (policy != "report" && policy != "ignore" && errno == NO_SPACE);
        let survives = stops || policy == "ignore";
        job(&mut script, kind, &id, rules, policies, stops);
        if kind == "mirror" && survives {
            let _ = writeln!(
                script,
                r#"wait {id} ready
                {{"execute": "query-block-jobs"}}
                {{"execute": "block-job-cancel", "arguments": {{"device": "{id}"}}}}"#
            );
        }
        end(&mut script, &id);
        if survives {
            script += "$ cmp s.raw full.raw\n";
        }
    }
    compare(&script, files);
}

/// A rule that no request meets.
const NO_FAULT: &str = r#"{"event": "cor_write"}"#;

#[test]
fn every_policy_for_reads_of_a_backup() {
    every_policy("backup", "read", 5);
    every_policy("backup", "read", 28);
}

#[test]
fn every_policy_for_writes_of_a_backup() {
    every_policy("backup", "write", 5);
    every_policy("backup", "write", 28);
}

#[test]
fn every_policy_for_reads_of_a_mirror() {
    every_policy("mirror", "read", 5);
    every_policy("mirror", "read", 28);
}

#[test]
fn every_policy_for_writes_of_a_mirror() {
    every_policy("mirror", "write", 5);
    every_policy("mirror", "write", 28);
}

/// Faults that are armed by an event, on a raw node above the filter, for good or by way of states.
#[test]
fn faults_of_events() {
    let mut script = String::new();
    let rules = [
        r#""inject-error": [{"event": "pwritev", "errno": 28, "once": true}]"#,
        r#""inject-error": [{"event": "pwritev_done", "errno": 28, "iotype": "write", "once": true}]"#,
        r#""inject-error": [{"event": "write_aio", "errno": 28, "state": 2, "once": true, "immediately": true}], "set-state": [{"event": "pwritev", "new_state": 2}]"#,
        r#""inject-error": [{"event": "none", "errno": 0, "iotype": "write"}, {"event": "none", "errno": 28, "iotype": "write"}]"#,
        r#""inject-error": [{"event": "none", "errno": 28, "sector": 8192}, {"event": "read_aio"}, {"event": "l2_load"}, {"event": "pwritev_zero"}]"#,
        r#""config": "c.conf""#,
        r#""config": "c.conf", "inject-error": [{"event": "none", "errno": 28, "iotype": "write", "sector": 1, "once": true}]"#,
        r#""max-transfer": 65536, "inject-error": [{"event": "none", "errno": 28, "iotype": "write", "sector": 8191, "once": true}]"#,
        r#""align": 1048576, "inject-error": [{"event": "none", "errno": 28, "iotype": "write", "sector": 8191, "once": true}]"#,
    ];
    // How often each stops a backup.
    let stops = [1, 1, 1, 0, 0, 1, 2, 1, 1];
    for (index, (rules, stops)) in rules.iter().zip(stops).enumerate() {
        script += &add(&format!(
            r#""node-name": "e", {rules}, "image": {{"driver": "file", "filename": "full.raw"}}"#
        ));
        let _ = writeln!(
            script,
            r#"{{"execute": "blockdev-add", "arguments": {{"driver": "raw", "node-name": "t", "file": "e"}}}}
            {{"execute": "blockdev-add", "arguments": {{"driver": "file", "node-name": "s", "filename": "s.raw"}}}}
            {{"execute": "blockdev-backup", "arguments": {{"job-id": "j{index}", "device": "s", "target": "t", "sync": "full", "auto-dismiss": false, "on-target-error": "enospc", "x-perf": {{"max-workers": 1}}}}}}"#
        );
        for _ in 0..stops {
            let _ = writeln!(
                script,
                r#"wait j{index} stopped
                {{"execute": "query-block-jobs"}}
                {{"execute": "job-resume", "arguments": {{"id": "j{index}"}}}}"#
            );
        }
        end(&mut script, &format!("j{index}"));
        script += &delete("e");
        script += "$ cmp s.raw full.raw\n";
    }
    compare(&script, |folder| {
        files(folder);
        let rules =
            "[inject-error]\nevent = \"none\"\niotype = \"write\"\nerrno = \"28\"\nonce = \"on\"\n";
        std::fs::write(folder.join("c.conf"), rules).expect("written");
    });
}

/// Zero requests: a source that is a hole over a target that is not.
#[test]
fn every_policy_for_zeroes() {
    for kind in ["backup", "mirror"] {
        let mut script = String::new();
        for policy in POLICIES {
            let id = format!("{kind}-{policy}");
            script += &add(
                r#""node-name": "t", "inject-error": [{"event": "none", "iotype": "write-zeroes", "errno": 28, "sector": 4096, "once": true}], "image": {"driver": "file", "filename": "full.raw"}"#,
            );
            let _ = writeln!(
                script,
                r#"{{"execute": "blockdev-add", "arguments": {{"driver": "file", "node-name": "s", "filename": "t.raw"}}}}
                {{"execute": "blockdev-{kind}", "arguments": {{"job-id": "{id}", "device": "s", "target": "t", "sync": "full", "auto-dismiss": false, "on-target-error": "{policy}"}}}}"#
            );
            if !matches!(policy, "report" | "ignore") {
                let _ = writeln!(
                    script,
                    r#"wait {id} stopped
                    {{"execute": "query-block-jobs"}}
                    {{"execute": "job-resume", "arguments": {{"id": "{id}"}}}}"#
                );
            }
            if kind == "mirror" && policy != "report" {
                let _ = writeln!(
                    script,
                    r#"wait {id} ready
                    {{"execute": "block-job-cancel", "arguments": {{"device": "{id}"}}}}"#
                );
            }
            end(&mut script, &id);
            if policy != "report" {
                script += "$ cmp t.raw full.raw\n";
            }
            // A target that is zero already is left alone by one of the two daemons.
            let _ = writeln!(
                script,
                r#"{{"execute": "blockdev-create", "arguments": {{"job-id": "c", "options": {{"driver": "file", "filename": "full.raw", "size": 4194304, "preallocation": "full"}}}}}}
                wait c concluded
                {{"execute": "job-dismiss", "arguments": {{"id": "c"}}}}"#
            );
        }
        compare(&script, files);
    }
}

/// A flush that fails is an error of the target, before the mirror is ready and at its end.
#[test]
fn every_policy_for_flushes_of_a_mirror() {
    let mut script = String::new();
    for policy in POLICIES {
        let fault = r#"{"event": "none", "iotype": "flush", "errno": 28, "once": true}"#;
        let stops = !matches!(policy, "report" | "ignore");
        let id = format!("f-{policy}");
        job(
            &mut script,
            "mirror",
            &id,
            [NO_FAULT, fault],
            ["report", policy],
            stops,
        );
        if policy != "report" {
            let _ = writeln!(
                script,
                r#"wait {id} ready
                {{"execute": "query-block-jobs"}}
                {{"execute": "block-job-complete", "arguments": {{"device": "{id}"}}}}"#
            );
        }
        end(&mut script, &id);
    }
    compare(&script, files);
}

/// A source that cannot tell what it holds is copied; a target that cannot is zeroed.
#[test]
fn questions_about_allocation_that_fail() {
    let fault = r#"{"event": "none", "iotype": "block-status", "errno": 5}"#;
    let policies = ["report", "report"];
    let mut script = String::new();
    job(&mut script, "backup", "b", [fault, fault], policies, false);
    end(&mut script, "b");
    script += "equal s.raw full.raw\n";
    job(&mut script, "mirror", "m", [fault, fault], policies, false);
    script += r#"wait m ready
        {"execute": "job-complete", "arguments": {"id": "m"}}
        "#;
    end(&mut script, "m");
    script += "equal s.raw full.raw\n";
    script += &add(&format!(
        r#""node-name": "t", "inject-error": [{fault}], "image": {{"driver": "file", "filename": "full.raw"}}"#
    ));
    script += r#"
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "s", "filename": "t.raw"}}
        {"execute": "blockdev-backup", "arguments": {"job-id": "z", "device": "s", "target": "t", "sync": "full", "auto-dismiss": false}}
        "#;
    end(&mut script, "z");
    script += "equal t.raw full.raw\n";
    compare(&script, files);
}

/// What is tried again until somebody ends it is told to clients each time, and to the log once.
#[test]
fn a_failure_that_is_ignored_fills_no_log() {
    let daemon = Daemon::start_logging();
    files(daemon.folder.path());
    let mut client = daemon.client();
    client.run(
        "blockdev-add",
        json!({"driver": "file", "node-name": "s", "filename": "s.raw"}),
    );
    client.run(
        "blockdev-add",
        json!({"driver": "blkdebug", "node-name": "t",
            "inject-error": [{"event": "none", "iotype": "write", "errno": 28}],
            "image": {"driver": "file", "filename": "t.raw"}}),
    );
    client.run(
        "blockdev-mirror",
        json!({"job-id": "j", "device": "s", "target": "t", "sync": "full",
            "on-target-error": "ignore"}),
    );
    let mut failures = 0;
    while failures < 5 {
        let message = client.message().expect("an event");
        failures += u32::from(message["event"] == "BLOCK_JOB_ERROR");
    }
    client.run("job-cancel", json!({"id": "j"}));
    client.wait_for("j", "null");
    let log = std::fs::read_to_string(daemon.path("log")).expect("logged");
    assert_eq!(log.matches("a request of a job failed").count(), 1, "{log}");
    daemon.quit();
}

/// QEMU's ends well.
#[test]
fn a_last_flush_that_fails_shows_in_the_exit_code() {
    for by_signal in [false, true] {
        let folder = tempfile::tempdir().expect("a folder");
        files(folder.path());
        let faults = r#"[{"event": "none", "iotype": "flush", "errno": 28}]"#;
        let node = format!(
            r#"{{"driver": "blkdebug", "node-name": "faulty", "inject-error": {faults},
            "image": {{"driver": "file", "node-name": "file", "filename": "s.raw"}}}}"#
        );
        let mut command = Command::new(tools::blockyard());
        command.args(["daemon", "--blockdev", &node, "--chardev", "stdio,id=c"]);
        command.args(["--nbd-server", "addr.type=unix,addr.path=nbd.sock"]);
        command.args(["--export", "nbd,id=e,node-name=faulty,writable=on"]);
        command.args(["--monitor", "c", "--pidfile", "pid"]);
        command.current_dir(folder.path());
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.stderr(Stdio::piped()).spawn().expect("it starts");
        wait_until(&folder.path().join("pid"));
        let mut writer = Nbd::open(&folder.path().join("nbd.sock"), "faulty");
        writer.write(0, &[1; 512], 0);
        if by_signal {
            terminate(child.id());
        } else {
            let quit = r#"{"execute": "qmp_capabilities"} {"execute": "quit"}"#;
            let input = child.stdin.as_mut().expect("piped");
            std::io::Write::write_all(input, quit.as_bytes()).expect("sent");
        }
        let ended = tools::ended(child);
        assert_eq!(ended.code, Some(1), "{}", ended.errors);
        let told = ended
            .errors
            .lines()
            .find(|line| line.starts_with("blockyard:"));
        let told = told.unwrap_or_else(|| panic!("no word of it: {}", ended.errors));
        assert!(
            told.contains("The last flush of node 'faulty' failed: ")
                && told.contains("No space left on device"),
            "{told}"
        );
    }
}
