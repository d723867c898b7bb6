//! Backups by bitmap beside those of qemu-storage-daemon: arguments, what queries show meanwhile, and what each mode leaves of the bitmap
//! and on the target at each end.

use crate::oracle::{compare, data_file};

/// A disk that clients write to, and targets.
const NODES: &str = r#"
    $ truncate -s 4M t.img
    $ qemu-img create -q -f qcow2 q.qcow2 4M
    $ qemu-img create -q -f qcow2 -o cluster_size=256k l.qcow2 4M
    $ truncate -s 8M q.qcow2 l.qcow2
    {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "a", "filename": "a.img", "discard": "unmap"}}
    {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "t", "filename": "t.img"}}
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "q", "file": {"driver": "file", "filename": "q.qcow2"}}}
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "l", "file": {"driver": "file", "filename": "l.qcow2"}}}
    {"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": "nbd.sock"}}}}
    {"execute": "block-export-add", "arguments": {"type": "nbd", "id": "e", "node-name": "a", "name": "a", "writable": true}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "a", "name": "usual"}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "a", "name": "fine", "granularity": 512}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "a", "name": "coarse", "granularity": 1048576}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "a", "name": "off", "disabled": true}}
"#;

const SHOWN: &str = r#"
    {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
    {"execute": "query-block-jobs"}
"#;

fn write(commands: &[&str]) -> String {
    let commands = commands.iter().map(|command| format!("-c '{command}' "));
    format!(
        "\n    $ qemu-io -f raw {}-c flush 'nbd+unix:///a?socket=nbd.sock' > /dev/null\n",
        commands.collect::<String>()
    )
}

fn backup(target: &str, more: &str) -> String {
    format!(
        "\n    {{\"execute\": \"blockdev-backup\", \"arguments\": \
         {{\"job-id\": \"j\", \"device\": \"a\", \"target\": \"{target}\", {more}}}}}\n"
    )
}

fn digests() -> String {
    let digest = |name| {
        format!(
            "    {{\"execute\": \"x-debug-block-dirty-bitmap-sha256\", \
             \"arguments\": {{\"node\": \"a\", \"name\": \"{name}\"}}}}\n"
        )
    };
    ["usual", "fine", "coarse", "off"].map(digest).concat()
}

/// What is on the targets once nobody uses them.
fn contents() -> String {
    let mut script = String::new();
    for target in ["t", "q", "l"] {
        script += &format!(
            "    {{\"execute\": \"blockdev-del\", \"arguments\": {{\"node-name\": \"{target}\"}}}}\n"
        );
    }
    script += "    $ sha256sum t.img\n";
    for image in ["q", "l"] {
        script += &format!(
            "    $ qemu-img convert -O raw {image}.qcow2 {image}.raw && sha256sum {image}.raw\n"
        );
    }
    script
}

#[test]
fn arguments_are_refused_as_by_the_oracle() {
    let mut script = NODES.to_owned();
    for sync in ["full", "top", "none", "incremental", "bitmap"] {
        for bitmap in ["", r#", "bitmap": "zz""#, r#", "bitmap": "usual""#] {
            for mode in ["", "on-success", "never", "always", "soon"] {
                let mode = match mode {
                    "" => String::new(),
                    mode => format!(r#", "bitmap-mode": "{mode}""#),
                };
                script += &backup("t", &format!(r#""sync": "{sync}"{bitmap}{mode}"#));
                if sync == "none" && bitmap.is_empty() && mode.is_empty() {
                    script += "    {\"execute\": \"job-cancel\", \"arguments\": {\"id\": \"j\"}}\n";
                }
                script += "    gone j\n";
            }
        }
    }
    // Which of several mistakes is told.
    for (target, more) in [
        ("zz", r#""sync": "incremental""#),
        ("a", r#""sync": "incremental", "bitmap": "zz""#),
        ("a", r#""sync": "incremental", "bitmap": "usual""#),
        (
            "t",
            r#""sync": "incremental", "bitmap": "usual", "compress": true"#,
        ),
        (
            "t",
            r#""sync": "none", "bitmap": "usual", "bitmap-mode": "never", "compress": true"#,
        ),
        (
            "t",
            r#""sync": "bitmap", "bitmap": "usual", "bitmap-mode": "never", "x-perf": {"max-workers": 0}"#,
        ),
        (
            "t",
            r#""sync": "incremental", "bitmap": "usual", "x-perf": {"max-chunk": 4096}"#,
        ),
        (
            "t",
            r#""sync": "incremental", "bitmap": "usual", "filter-node-name": "q""#,
        ),
        (
            "t",
            r#""sync": "incremental", "bitmap": "usual", "speed": -1"#,
        ),
    ] {
        script += &backup(target, more);
        script += "    gone j\n";
        script += SHOWN;
    }
    compare(&script, |folder| data_file(&folder.join("a.img"), 4 << 20));
}

/// Jobs that end well, beside a client that writes before their ends are final.
#[test]
fn each_mode_ends_well_as_with_the_oracle() {
    let mut script = NODES.to_owned();
    script += &write(&[
        "write -P 1 70000 1000",
        "write -P 2 3M 300k",
        "discard 1M 64k",
    ]);
    for (nth, (target, sync, bitmap, mode, more)) in [
        ("t", "full", "usual", "on-success", ""),
        ("q", "full", "fine", "always", r#", "compress": true"#),
        ("l", "top", "coarse", "on-success", ""),
        ("t", "bitmap", "usual", "never", ""),
        (
            "t",
            "incremental",
            "usual",
            "on-success",
            r#", "x-perf": {"max-workers": 1}"#,
        ),
        (
            "q",
            "bitmap",
            "fine",
            "always",
            r#", "x-perf": {"min-cluster-size": 1048576}"#,
        ),
        ("l", "bitmap", "coarse", "on-success", ""),
        ("q", "bitmap", "off", "always", ""),
        ("q", "bitmap", "coarse", "never", ""),
        (
            "t",
            "incremental",
            "usual",
            "on-success",
            r#", "x-perf": {"max-chunk": 65536}"#,
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let arguments = format!(
            r#""sync": "{sync}", "bitmap": "{bitmap}", "bitmap-mode": "{mode}", "auto-finalize": false{more}"#
        );
        script += &backup(target, &arguments);
        script += "    wait j pending\n";
        script += SHOWN;
        script += &write(&[&format!("write -P {} {}k 5k", nth + 3, 300 * nth + 7)]);
        for command in ["clear", "remove", "enable", "disable"] {
            script += &format!(
                "    {{\"execute\": \"block-dirty-bitmap-{command}\", \"arguments\": {{\"node\": \"a\", \"name\": \"{bitmap}\"}}}}\n"
            );
        }
        script += &format!(
            r#"
    {{"execute": "block-dirty-bitmap-merge", "arguments": {{"node": "a", "target": "{bitmap}", "bitmaps": ["off"]}}}}
    {{"execute": "block-dirty-bitmap-merge", "arguments": {{"node": "a", "target": "off", "bitmaps": ["{bitmap}"]}}}}
    {{"execute": "block-dirty-bitmap-add", "arguments": {{"node": "a", "name": "new{nth}"}}}}
    "#
        );
        script += &backup(
            "q",
            &format!(r#""sync": "incremental", "bitmap": "{bitmap}""#),
        );
        script += SHOWN;
        script +=
            "    {\"execute\": \"job-finalize\", \"arguments\": {\"id\": \"j\"}}\n    gone j\n";
        script += SHOWN;
        script += &digests();
    }
    script += &contents();
    compare(&script, |folder| data_file(&folder.join("a.img"), 4 << 20));
}

/// Jobs that are cancelled when they have copied one cluster, or after their work is done.
#[test]
fn each_mode_is_cancelled_as_with_the_oracle() {
    let mut script = NODES.to_owned();
    script += &write(&[
        "write -P 1 70000 1000",
        "write -P 2 3M 300k",
        "write -z 1M 64k",
    ]);
    for (sync, bitmap, mode) in [
        ("bitmap", "usual", "never"),
        ("incremental", "usual", "on-success"),
        ("bitmap", "usual", "always"),
        ("bitmap", "fine", "always"),
        ("bitmap", "coarse", "always"),
        ("full", "usual", "on-success"),
        ("full", "usual", "always"),
        ("full", "off", "always"),
    ] {
        let arguments =
            format!(r#""sync": "{sync}", "bitmap": "{bitmap}", "bitmap-mode": "{mode}""#);
        script += &backup(
            "t",
            &format!(
                r#"{arguments}, "speed": 65536, "x-perf": {{"max-workers": 1, "max-chunk": 65536}}"#
            ),
        );
        script += "    moving j\n";
        script += &write(&["write -P 9 2000k 1k"]);
        script += "    {\"execute\": \"job-cancel\", \"arguments\": {\"id\": \"j\"}}\n    gone j\n";
        script += SHOWN;
        script += &digests();
        script += &backup("t", &format!(r#"{arguments}, "auto-finalize": false"#));
        script += "    wait j pending\n";
        script += &write(&["write -P 9 1000k 1k"]);
        script += "    {\"execute\": \"job-cancel\", \"arguments\": {\"id\": \"j\"}}\n    gone j\n";
        script += SHOWN;
        script += &digests();
    }
    script += &contents();
    compare(&script, |folder| data_file(&folder.join("a.img"), 4 << 20));
}

/// A target that fails at 3 MiB, once or for good.
#[test]
fn each_mode_fails_as_with_the_oracle() {
    let mut script = NODES.to_owned();
    for (once, policy) in [
        (false, "report"),
        (true, "report"),
        (true, "ignore"),
        (true, "stop"),
    ] {
        for (sync, bitmap, mode) in [
            ("bitmap", "usual", "never"),
            ("incremental", "fine", "on-success"),
            ("bitmap", "usual", "always"),
            ("bitmap", "coarse", "always"),
            ("full", "usual", "always"),
        ] {
            script += &format!(
                r#"
    {{"execute": "blockdev-add", "arguments": {{"driver": "blkdebug", "node-name": "f", "image": "t", "inject-error": [{{"event": "none", "iotype": "write", "sector": 6144, "once": {once}, "errno": 28}}]}}}}
    "#
            );
            script += &write(&[
                "write -P 1 70000 1000",
                "write -P 2 3000k 300k",
                "write -P 3 3M 4k",
            ]);
            script += &backup(
                "f",
                &format!(
                    r#""sync": "{sync}", "bitmap": "{bitmap}", "bitmap-mode": "{mode}", "on-target-error": "{policy}", "x-perf": {{"max-workers": 1, "max-chunk": 65536}}"#
                ),
            );
            if policy == "stop" {
                script += "    wait j stopped\n";
                script += SHOWN;
                script +=
                    "    {\"execute\": \"block-job-resume\", \"arguments\": {\"device\": \"j\"}}\n";
            }
            script += "    gone j\n";
            script += SHOWN;
            script += &digests();
            script +=
                "    {\"execute\": \"blockdev-del\", \"arguments\": {\"node-name\": \"f\"}}\n";
        }
    }
    script += &contents();
    compare(&script, |folder| data_file(&folder.join("a.img"), 4 << 20));
}

/// Increments in overlays of each other show the disk as it was each time.
#[test]
fn a_chain_of_increments_is_restored() {
    let mut script = r#"
    {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "a", "filename": "a.img", "discard": "unmap"}}
    {"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": "nbd.sock"}}}}
    {"execute": "block-export-add", "arguments": {"type": "nbd", "id": "e", "node-name": "a", "name": "a", "writable": true}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "a", "name": "b", "granularity": 32768}}
    "#
    .to_owned();
    for (nth, cluster) in ["64k", "4k", "512", "256k", "2M", "64k"]
        .into_iter()
        .enumerate()
    {
        let sync = if nth == 0 { "full" } else { "incremental" };
        let below = match nth.checked_sub(1) {
            Some(before) => format!("-b i{before}.qcow2 -F qcow2"),
            None => String::new(),
        };
        script += &format!(
            r#"
    $ qemu-img create -q -f qcow2 -o cluster_size={cluster} {below} i{nth}.qcow2 4M
    {{"execute": "blockdev-add", "arguments": {{"driver": "qcow2", "node-name": "i", "file": {{"driver": "file", "filename": "i{nth}.qcow2"}}}}}}
    "#
        );
        let arguments = format!(r#""sync": "{sync}", "bitmap": "b", "bitmap-mode": "on-success""#);
        script += &backup("i", &arguments);
        script += &format!(
            r#"
    gone j
    {{"execute": "blockdev-del", "arguments": {{"node-name": "i"}}}}
    $ qemu-img compare -f raw -F qcow2 -U a.img i{nth}.qcow2
    "#
        );
        let at = 600 * nth;
        script += &write(&[
            &format!("write -P {nth} {at}k 33k"),
            &format!("write -z {}k 130k", at + 200),
            &format!("discard {}k 64k", (at + 1100) % 3000),
        ]);
    }
    compare(&script, |folder| data_file(&folder.join("a.img"), 4 << 20));
}
