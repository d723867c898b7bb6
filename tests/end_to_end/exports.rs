//! Exports over QMP on both daemons: how they come and go, what is refused in which words, what clients of the distribution see.

use std::path::Path;

use serde_json::{Value, json};

use crate::images::chain;
use crate::oracle::{compare, data_file};
use crate::tools;

/// A raw disk, a chain of three, and the nodes of both.
fn files(folder: &Path) {
    chain(folder);
    data_file(&folder.join("r.raw"), 1_000_000);
}

fn line_of(command: &str, arguments: &Value) -> String {
    format!("{}\n", json!({"execute": command, "arguments": arguments}))
}

fn nodes() -> String {
    let file =
        |name: &str, file: &str| json!({"driver": "file", "node-name": name, "filename": file});
    let mut read_only = file("ro", "r.raw");
    read_only["read-only"] = json!(true);
    let qcow2 = |name: &str, below: Value| {
        json!({"driver": "qcow2", "node-name": name, "backing": below,
            "file": {"driver": "file", "filename": format!("{name}.qcow2")}})
    };
    let mut base = qcow2("base", json!(null));
    base["read-only"] = json!(true);
    let mut mid = qcow2("mid", json!("base"));
    mid["read-only"] = json!(true);
    [
        file("raw", "r.raw"),
        read_only,
        base,
        mid,
        qcow2("top", json!("mid")),
    ]
    .map(|node| line_of("blockdev-add", &node))
    .concat()
}

fn start(more: Value) -> String {
    let mut arguments = json!({"addr": unix("n.sock")});
    for (name, value) in more.as_object().expect("members") {
        arguments[name] = value.clone();
    }
    line_of("nbd-server-start", &arguments)
}

fn unix(path: &str) -> Value {
    json!({"type": "unix", "data": {"path": path}})
}

fn add(id: &str, node: &str, more: Value) -> String {
    let mut arguments = json!({"type": "nbd", "id": id, "node-name": node});
    for (name, value) in more.as_object().expect("members") {
        arguments[name] = value.clone();
    }
    line_of("block-export-add", &arguments)
}

fn stop() -> String {
    line_of("nbd-server-stop", &json!({}))
}

fn query() -> String {
    line_of("query-block-exports", &json!({}))
}

#[test]
fn the_server_is_started_and_refused_in_the_same_words() {
    let inet = |more: Value| {
        let mut data = json!({"host": "127.0.0.1", "port": "0"});
        for (name, value) in more.as_object().expect("members") {
            data[name] = value.clone();
        }
        json!({"type": "inet", "data": data})
    };
    let long = format!("/{}", "x".repeat(200));
    let mut script = stop() + &query();
    for address in [
        unix("nowhere/n.sock"),
        unix(&long),
        inet(json!({"port": "foo"})),
        inet(json!({"ipv6": true, "ipv4": false})),
        inet(json!({"host": "::1", "ipv4": true})),
        inet(json!({"to": 70000})),
        inet(json!({"to": -1})),
        inet(json!({"port": 1})),
        inet(json!({"numeric": true, "host": "localhost"})),
        json!({"type": "fd", "data": {"str": "77"}}),
        json!({"type": "fd", "data": {"str": "foo"}}),
        json!({"type": "unix", "path": "n.sock"}),
        json!({"type": "unix", "data": {"path": "n.sock", "frob": 1}}),
        json!({"type": "foo", "data": {}}),
        json!({"data": {}}),
    ] {
        script += &line_of("nbd-server-start", &json!({"addr": address}));
    }
    for more in [
        json!({"max-connections": -1}),
        json!({"max-connections": 1_u64 << 33}),
        json!({"handshake-max-seconds": -1}),
        json!({"handshake-max-seconds": "x"}),
        json!({"tls-creds": "nope"}),
        json!({"frob": 1}),
        json!({"tls-authz": "nope"}),
        json!({}),
    ] {
        script += &start(more);
    }
    script += "$ stat -c %F n.sock\n";
    script += &stop();
    script += "$ ls n.sock\n";
    script += &line_of("nbd-server-start", &json!({"addr": inet(json!({}))}));
    script += &line_of("nbd-server-start", &json!({"addr": inet(json!({}))}));
    script += &(stop() + &stop());
    let other = inet(json!({"ipv4": true, "ipv6": true, "to": 1, "keep-alive": true}));
    script += &line_of("nbd-server-start", &json!({"addr": other}));
    compare(&script, |_| {});
}

#[test]
fn exports_come_and_go_in_the_same_words() {
    let long = "x".repeat(4097);
    let mut script = add("e", "raw", json!({}));
    script += &line_of("nbd-server-add", &json!({"device": "raw"}));
    script += &nodes();
    script += &add("e", "raw", json!({}));
    script += &line_of("nbd-server-add", &json!({"device": "raw"}));
    script += &line_of("nbd-server-add", &json!({"device": "raw", "name": long}));
    script += &start(json!({}));
    for (id, node, more) in [
        ("1e", "raw", json!({})),
        ("e e", "none", json!({})),
        ("", "raw", json!({})),
        ("e", "none", json!({})),
        ("e", "raw", json!({"iothread": "none"})),
        ("e", "raw", json!({"name": long})),
        ("e", "raw", json!({"description": long})),
        ("e", "raw", json!({"bitmaps": ["zz"]})),
        (
            "e",
            "raw",
            json!({"bitmaps": [{"node": "raw", "name": "zz"}]}),
        ),
        (
            "e",
            "raw",
            json!({"bitmaps": [{"node": "none", "name": "zz"}]}),
        ),
        ("e", "raw", json!({"bitmaps": [1]})),
        ("e", "raw", json!({"type": "foo"})),
        ("e", "raw", json!({"mountpoint": "x"})),
        ("e", "raw", json!({"writable": 1})),
        ("e", "ro", json!({"writable": true})),
        ("e", "base", json!({"writable": true})),
        ("e", "raw", json!({"writethrough": true})),
        ("e", "raw", json!({"name": "other"})),
        ("e2", "raw", json!({})),
        ("e2", "raw", json!({"name": ""})),
        (
            "e3",
            "raw",
            json!({"name": long[1..], "description": long[1..]}),
        ),
        (
            "e4",
            "top",
            json!({"writable": true, "allocation-depth": true}),
        ),
        ("e5", "base", json!({})),
    ] {
        script += &add(id, node, more);
    }
    script += &line_of("block-export-add", &json!({"id": "c", "node-name": "raw"}));
    script += &line_of(
        "block-export-add",
        &json!({"type": "nbd", "node-name": "raw"}),
    );
    script += &line_of("block-export-add", &json!({"type": "nbd", "id": "c"}));
    script += &query();
    script += &line_of("x-debug-query-block-graph", &json!({}));
    script += &line_of("blockdev-del", &json!({"node-name": "raw"}));
    script += &line_of("blockdev-del", &json!({"node-name": "top"}));
    let size = json!({"node-name": "raw", "size": 2_048_000});
    script += &line_of("block_resize", &size);
    script += &line_of(
        "blockdev-snapshot",
        &json!({"node": "top", "overlay": "raw"}),
    );
    for delete in [
        json!({"id": "none"}),
        json!({"id": "e3", "mode": "foo"}),
        json!({"id": "e3"}),
        json!({"id": "e3"}),
        json!({"id": "e2", "mode": "hard"}),
    ] {
        script += &line_of("block-export-del", &delete);
    }
    for older in [
        json!({"device": "raw"}),
        json!({"device": "ro", "name": "n1", "writable": true, "description": "d"}),
        json!({"device": "none", "name": "n1"}),
        json!({"device": "raw", "name": "n1"}),
        json!({"device": "raw", "name": "n2", "bitmap": "zz"}),
        json!({"device": "raw", "name": "2n"}),
        json!({"device": "raw", "name": ""}),
    ] {
        script += &line_of("nbd-server-add", &older);
    }
    script += &query();
    script += &line_of("nbd-server-remove", &json!({"name": "n1", "mode": "hard"}));
    script += &line_of("nbd-server-remove", &json!({"name": "n1"}));
    script += &line_of("object-add", &json!({"qom-type": "iothread", "id": "t"}));
    script += &add("io", "ro", json!({"iothread": "t"}));
    script += &stop();
    script += &query();
    script += &add("e", "raw", json!({}));
    compare(&script, files);
}

/// Who may write to what is exported, and export what is written to.
#[test]
fn permissions_of_exports_and_jobs_meet_in_the_same_words() {
    let mut script = nodes() + &start(json!({}));
    let target = json!({"driver": "null-co", "node-name": "t", "size": 1 << 20});
    script += &line_of("blockdev-add", &target);
    script += &add("s", "top", json!({"writable": true}));
    script += &add("b", "t", json!({}));
    let mirror = json!({"job-id": "j", "device": "top", "target": "t", "sync": "full"});
    script += &line_of("blockdev-mirror", &mirror);
    script += &line_of("block-export-del", &json!({"id": "b"}));
    let commit = json!({"job-id": "c", "device": "top", "base-node": "base"});
    script += &add("m", "mid", json!({}));
    script += &line_of("block-commit", &commit);
    script += &line_of("block-export-del", &json!({"id": "m"}));
    script += &line_of("block-commit", &commit);
    script += "wait c ready\n";
    script += &add("m", "mid", json!({}));
    script += &add("w", "base", json!({"writable": true}));
    script += &add("r", "base", json!({}));
    script += &query();
    script += &line_of("job-complete", &json!({"id": "c"}));
    script += "gone c\n";
    script += &query();
    compare(&script, files);
}

/// What the tools of libnbd and of QEMU tell of the same exports.
#[test]
fn clients_of_the_distribution_see_the_same() {
    if !tools::have("nbdinfo", "libnbd-bin") || !tools::have("qemu-nbd", "qemu-utils") {
        return;
    }
    let mut script = nodes() + &start(json!({}));
    script += &add(
        "r",
        "raw",
        json!({"writable": true, "description": "some words"}),
    );
    script += &add(
        "t",
        "top",
        json!({"writable": true, "allocation-depth": true}),
    );
    script += &add("b", "base", json!({"name": "with space / and % sign"}));
    script += &add("e", "ro", json!({"name": ""}));
    for command in [
        "nbdinfo 'nbd+unix:///raw?socket=n.sock'",
        "nbdinfo --json 'nbd+unix:///top?socket=n.sock'",
        "nbdinfo --list 'nbd+unix:///?socket=n.sock'",
        "nbdinfo --map 'nbd+unix:///top?socket=n.sock'",
        "nbdinfo --map=qemu:allocation-depth 'nbd+unix:///top?socket=n.sock'",
        "nbdinfo --map 'nbd+unix:///raw?socket=n.sock'",
        "nbdinfo 'nbd+unix:///none?socket=n.sock'",
        "nbdinfo --is tls 'nbd+unix:///raw?socket=n.sock'",
        "qemu-nbd --list -k n.sock",
        "qemu-img info 'nbd+unix:///top?socket=n.sock'",
        "qemu-img map --output=json 'nbd+unix:///top?socket=n.sock'",
        "qemu-io -f raw -c 'read -P 0 0 1k' -c 'write -P 5 512 70000' -c 'write -z 1M 64k' \
         -c 'write -z -u 2M 64k' -c 'discard 3M 1M' -c flush -c 'write -f -P 6 100k 1' \
         -c 'read -P 5 512 70000' -c map -c 'alloc 0 1M' 'nbd+unix:///top?socket=n.sock'",
        "qemu-io -r -f raw -c 'read -P 5 512 70000' -c 'write 0 1k' 'nbd+unix:///top?socket=n.sock'",
        "qemu-io -f raw -c 'write 0 1k' 'nbd+unix:///?socket=n.sock'",
        "qemu-io -f raw -c 'read 0 2M' 'nbd+unix:///raw?socket=n.sock'",
        "nbdcopy 'nbd+unix:///top?socket=n.sock' copy.raw && sha256sum copy.raw",
        "nbdcopy copy.raw 'nbd+unix:///raw?socket=n.sock'",
        "head -c 999936 copy.raw | nbdcopy - 'nbd+unix:///raw?socket=n.sock'; sha256sum r.raw",
    ] {
        script += &format!("$ {command} 2>&1 | sed -E 's/ [0-9.]+ (sec|KiB|MiB|GiB|ops).*//'\n");
    }
    compare(&script, files);
}

#[test]
fn options_are_those_of_the_commands() {
    for (arguments, expected) in [
        (
            &["--export", "nbd,id=e,node-name=n"][..],
            "--export nbd,id=e,node-name=n: Cannot find device='' nor node-name='n'",
        ),
        (
            &["--nbd-server", "addr.type=unix"],
            "--nbd-server addr.type=unix: Parameter 'addr.path' is missing",
        ),
        (
            &["--nbd-server", "addr.type=fd,addr.str=0"],
            "--nbd-server addr.type=fd,addr.str=0: File descriptor '0' is not a socket",
        ),
    ] {
        let folder = tempfile::tempdir().expect("a folder");
        let mut daemon = tools::without_warnings();
        daemon.arg("daemon").args(arguments);
        daemon.current_dir(folder.path());
        let ended = tools::run_command(daemon, "");
        assert_eq!(ended.code, Some(1));
        assert_eq!(ended.errors, format!("blockyard: {expected}\n"));
    }
}
