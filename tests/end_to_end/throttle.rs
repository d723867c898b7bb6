//! Throttle groups and nodes on both daemons: how they are made, looked at and changed, what is refused in which words; and on ours,
//! what limits do to jobs.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::chains::{on, with};
use crate::daemon::Daemon;
use crate::images::{SIZE, chain};
use crate::oracle::{compare, data_file, hole_file};
use crate::{nbd, tools};

fn line(command: &str, arguments: &Value) -> String {
    format!("{}\n", json!({"execute": command, "arguments": arguments}))
}

fn object(id: &str, more: Value) -> String {
    let group = json!({"qom-type": "throttle-group", "id": id});
    line("object-add", &with(group, more))
}

fn read(path: &str, property: &str) -> String {
    line("qom-get", &json!({"path": path, "property": property}))
}

fn write(path: &str, property: &str, value: Value) -> String {
    let arguments = json!({"path": path, "property": property, "value": value});
    line("qom-set", &arguments)
}

const MOST: i64 = 1_000_000_000_000_000;

/// Limits that make sense and limits that do not.
fn limits() -> Vec<Value> {
    let mut list = vec![
        json!({}),
        json!({"bps-total": 1, "bps-read": 1}),
        json!({"iops-total": 1, "iops-write": 1}),
        json!({"bps-total-max": 1, "bps-read-max": 1}),
        json!({"iops-total": 1, "iops-total-max": 1, "iops-read-max": 1}),
        json!({"bps-total": 5, "iops-size": 9}),
        json!({"iops-read": 5, "iops-size": -9}),
        json!({"iops-size": 5, "bps-total-max-length": 0}),
        json!({"bps-total-max": MOST + 5, "iops-size": 5}),
        json!({"bps-total": MOST + 1, "bps-total-max-length": 0}),
        json!({"bps-total-max": 9, "bps-total-max-length": MOST}),
        json!({"iops-write-max-length": 1_i64 << 32, "bps-read-max-length": 1_i64 << 33}),
        json!({"bps-total-max-length": -1}),
        json!({"bps-total-max-length": -(1_i64 << 32)}),
        json!({"bps-total-max": 5, "bps-total-max-length": 0}),
        json!({"bps-total-max": MOST, "bps-total-max-length": 2}),
        json!({"bps-total": 9, "bps-total-max": 5, "bps-total-max-length": 2}),
        json!({"bps-read": 5, "bps-read-max": 1, "bps-write-max": 1}),
        json!({"bps-read": 1, "bps-total-max": 5}),
        json!({"bps-total": 1.5}),
        json!({"bps-total": "1"}),
        json!({"bps": 1}),
        json!(null),
        json!(1),
    ];
    for name in ["bps-total", "bps-write", "iops-read"] {
        for (average, burst, length) in [
            (MOST, 0, 1),
            (5, 7, 3),
            (5, MOST, 1),
            (5, MOST / 1000, 1000),
            (5, MOST / 1000, 1001),
            (1, 2, 4_294_967_295_i64),
            (-1, 0, 1),
        ] {
            list.push(json!({
                name: average,
                format!("{name}-max"): burst,
                format!("{name}-max-length"): length,
            }));
        }
    }
    list
}

#[test]
fn groups_are_made_and_changed_in_the_same_way() {
    let mut script = String::new();
    for (number, limits) in limits().into_iter().enumerate() {
        let id = format!("g{number}");
        script += &object(&id, json!({"limits": limits}));
        script += &read(&format!("/objects/{id}"), "limits");
    }
    for (number, properties) in [
        json!({"x-bps-total": 5, "x-iops-size": 4096, "x-iops-write": 7, "x-iops-write-max": 9}),
        json!({"x-bps-total": 5, "x-bps-read": 5}),
        json!({"x-bps-total": -5}),
        json!({"x-bps-total-max-length": 1_i64 << 32}),
        json!({"x-bps-total-max-length": 0}),
        json!({"x-iops-size": -1, "x-iops-read": 1}),
        json!({"x-bps-total": MOST + 1}),
        json!({"x-bps-total": "5"}),
        json!({"x-bps": 5}),
        json!({"limits": {"bps-total": 7, "iops-total": 7}, "x-bps-total": 5, "x-iops-total": 5}),
        json!({"limits": {"bps-read": 7}, "x-bps-total": 5}),
        json!({"limits": {"bps-read-max": 7}, "x-bps-read": 5}),
        json!({"limits": {"iops-total-max": 7}, "x-iops-total": 5}),
    ]
    .into_iter()
    .enumerate()
    {
        let id = format!("p{number}");
        script += &object(&id, properties);
        script += &read(&format!("/objects/{id}"), "limits");
    }
    for id in ["g0", "", "a b", "0"] {
        script += &object(id, json!({}));
        script += &object(id, json!({"limits": {"iops-size": 1}}));
        script += &line("object-add", &json!({"qom-type": "iothread", "id": id}));
    }
    for limits in limits() {
        script += &write("/objects/g0", "limits", limits);
        script += &read("/objects/g0", "limits");
    }
    for (property, value) in [
        ("x-bps-total", json!(5)),
        ("x-bps-total", json!("5")),
        ("x-iops-size", json!(5)),
        ("x-bps", json!(5)),
        ("type", json!("x")),
        ("limits", json!([])),
    ] {
        script += &write("/objects/g0", property, value);
        script += &read("/objects/g0", property);
    }
    compare(&script, |_| {});
}

#[test]
fn the_tree_of_objects_is_the_same_where_it_is_there() {
    let mut script = object("g", json!({}));
    script += &line("object-add", &json!({"qom-type": "iothread", "id": "io"}));
    for (property, value) in [
        ("poll-max-ns", json!(-1)),
        ("poll-max-ns", json!(7)),
        ("aio-max-batch", json!("7")),
        ("aio-max-batch", json!(7)),
        ("thread-pool-max", json!(5)),
        ("thread-pool-min", json!(5)),
        ("poll-grow", json!(null)),
        ("poll-shrink", json!(9_223_372_036_854_775_807_i64)),
        ("type", json!("thread")),
        ("limits", json!({})),
    ] {
        script += &write("/objects/io", property, value);
        script += &read("io", property);
    }
    for path in [
        "/",
        "",
        "/objects",
        "objects",
        "/objects/",
        "//objects//io",
        "objects/io",
        "io",
        "io/",
        "/io",
        "/objects/nope",
        "nope",
        "/objects/io/io",
    ] {
        for property in ["type", "io", "nope", "objects"] {
            script += &read(path, property);
            script += &write(path, property, json!(1));
        }
    }
    for path in ["/objects/nope", "nope", ""] {
        script += &line("qom-list", &json!({"path": path}));
    }
    script += &object("objects", json!({}));
    script += &read("objects", "type");
    for id in ["g", "g", "io", "objects"] {
        script += &line("object-del", &json!({"id": id}));
    }
    script += &read("/objects/g", "type");
    compare(&script, |_| {});
}

fn throttle(name: &str, group: &str, file: &Value, more: Value) -> Value {
    let node =
        json!({"driver": "throttle", "node-name": name, "throttle-group": group, "file": file});
    with(node, more)
}

fn graph() -> String {
    ["query-named-block-nodes", "x-debug-query-block-graph"]
        .map(|query| line(query, &json!({})))
        .concat()
}

fn reopen(node: Value) -> String {
    line("blockdev-reopen", &json!({"options": [node]}))
}

fn file(name: &str, filename: &str) -> Value {
    json!({"driver": "file", "node-name": name, "filename": filename})
}

#[test]
fn nodes_are_described_shown_and_reopened_in_the_same_way() {
    let mut script = object("g", json!({"limits": {"bps-total": 1_000_000_000}}));
    script += &object("h", json!({}));
    script += &line("object-add", &json!({"qom-type": "iothread", "id": "io"}));
    let add = |node: Value| line("blockdev-add", &node);
    script += &add(json!({"driver": "throttle", "node-name": "t", "file": "none"}));
    script += &add(json!({"driver": "throttle", "node-name": "t", "throttle-group": "g"}));
    script += &add(throttle("t", "nope", &json!("none"), json!({})));
    for group in ["nope", "io", ""] {
        script += &add(throttle("t", group, &file("f", "r.raw"), json!({})));
    }
    script += &add(throttle(
        "t",
        "g",
        &file("f", "r.raw"),
        json!({"limits": {}}),
    ));
    script += &add(throttle("t", "g", &file("f", "r.raw"), json!({})));
    script += &add(throttle("t", "h", &json!("f"), json!({})));
    script += &graph();
    let more = json!({"read-only": true, "discard": "unmap", "detect-zeroes": "on"});
    script += &add(throttle("u", "g", &file("e", "s.raw"), more));
    script += &add(throttle(
        "above",
        "h",
        &json!("t"),
        json!({"cache": {"direct": true}}),
    ));
    script += &add(json!({"driver": "raw", "node-name": "raw", "file": "above"}));
    script += &graph();
    script += &line("object-del", &json!({"id": "g"}));
    for node in [
        throttle("t", "h", &json!("f"), json!({})),
        throttle("t", "nope", &json!("f"), json!({})),
        json!({"driver": "throttle", "node-name": "t", "file": "f"}),
        throttle("t", "g", &json!("e"), json!({})),
        throttle("t", "g", &json!("above"), json!({})),
        throttle("t", "g", &json!("none"), json!({})),
        throttle("u", "h", &json!("e"), json!({"read-only": true})),
    ] {
        script += &reopen(node);
        script += &graph();
    }
    for id in ["g", "h"] {
        script += &line("object-del", &json!({"id": id}));
    }
    for name in ["t", "raw", "above", "t", "u"] {
        script += &line("blockdev-del", &json!({"node-name": name}));
    }
    for id in ["g", "h"] {
        script += &line("object-del", &json!({"id": id}));
    }
    script += &add(throttle("t", "h", &json!({"driver": "null-co"}), json!({})));
    compare(&script, |folder| {
        data_file(&folder.join("r.raw"), SIZE);
        hole_file(&folder.join("s.raw"), SIZE);
    });
}

/// An image below a filter, an image above one, and a chain with one in the middle.
#[test]
fn images_stand_on_filters_and_filters_on_images() {
    let raw = json!({"driver": "raw", "node-name": "n", "file": file("nf", "n.raw")});
    let mut script = object("g", json!({"limits": {"iops-total": 1_000_000}}));
    let add = |node: Value| line("blockdev-add", &node);
    script += &add(throttle("base", "g", &on("below", "base.qcow2"), json!({})));
    let through = throttle("midf", "g", &file("midff", "mid.qcow2"), json!({}));
    let mid = json!({"driver": "qcow2", "node-name": "mid", "file": through, "backing": "base"});
    script += &add(mid);
    script += &add(with(on("top", "top.qcow2"), json!({"backing": "mid"})));
    script += &add(throttle("all", "g", &json!("top"), json!({})));
    script += &graph();
    script += &add(raw);
    let job = json!({"job-id": "j", "device": "all", "target": "n", "sync": "full"});
    script += &line("blockdev-backup", &job);
    script += "gone j\n";
    script += &line(
        "block_resize",
        &json!({"node-name": "all", "size": 2 * SIZE}),
    );
    script += &line(
        "block-stream",
        &json!({"job-id": "j", "device": "top", "base-node": "mid"}),
    );
    script += "gone j\n";
    script += &graph();
    let job = json!({"job-id": "j", "device": "all", "top-node": "mid", "base-node": "below"});
    script += &line("block-commit", &job);
    script += "gone j\n";
    script += &graph();
    script += &line("blockdev-del", &json!({"node-name": "all"}));
    for name in ["top", "mid", "base", "n"] {
        script += &line("blockdev-del", &json!({"node-name": name}));
    }
    script += "$ qemu-img check -q top.qcow2\n";
    script += "$ qemu-img check -q base.qcow2\n";
    script += "$ cmp n.raw expected.raw\n";
    script +=
        "$ qemu-img resize -q --shrink top.qcow2 4M && qemu-img compare top.qcow2 expected.raw\n";
    compare(&script, |folder| {
        chain(folder);
        let convert = ["convert", "-O", "raw", "top.qcow2", "expected.raw"];
        crate::images::run(folder, "qemu-img", &convert);
        hole_file(&folder.join("n.raw"), SIZE);
    });
}

#[test]
fn groups_come_from_the_command_line_too() {
    let object = "throttle-group,id=g,x-bps-total=1000,limits.iops-read=5,limits.iops-read-max=7";
    let node = "throttle,node-name=t,throttle-group=g,file.driver=null-co,file.size=65536";
    let options = ["--object", object, "--blockdev", node];
    let shown = |daemon: Daemon| {
        let mut client = daemon.client();
        let limits = json!({"path": "/objects/g", "property": "limits"});
        let limits = client.run("qom-get", limits);
        let nodes = client.run("query-named-block-nodes", json!({"flat": true}));
        drop(client);
        daemon.quit();
        (limits, nodes.as_array().map(Vec::len))
    };
    let ours = shown(Daemon::start_with(&options));
    assert_eq!(ours.0["iops-read-max"], json!(7));
    assert_eq!(ours.1, Some(2));
    if tools::have_oracle() {
        assert_eq!(ours, shown(Daemon::start_oracle_with(&options)));
    }
}

/// A daemon with data on `s`, which is read through `t` in group `g`, and an empty target `n`.
fn daemon_with_limits(limits: Value) -> Daemon {
    let daemon = Daemon::start_with(&["--data-threads", "4"]);
    data_file(&daemon.path("s.raw"), SIZE);
    hole_file(&daemon.path("n.raw"), SIZE);
    let mut client = daemon.client();
    let group = json!({"qom-type": "throttle-group", "id": "g", "limits": limits});
    client.run("object-add", group);
    client.run(
        "blockdev-add",
        throttle("t", "g", &file("s", "s.raw"), json!({})),
    );
    client.run("blockdev-add", file("n", "n.raw"));
    drop(client);
    daemon
}

fn backup(device: &str, target: &str) -> Value {
    json!({"job-id": target, "device": device, "target": target, "sync": "full"})
}

#[test]
fn a_job_is_as_fast_as_the_limit_lets_it_be() {
    let daemon = daemon_with_limits(json!({"bps-read": 2 << 20}));
    let mut client = daemon.client();
    let begun = Instant::now();
    client.run("blockdev-backup", backup("t", "n"));
    client.wait_for("n", "null");
    // What comes at once: the first request, and a tenth of a second.
    let least = Duration::from_millis((4 - 1) * 500 - 100);
    assert!(begun.elapsed() >= least, "{:?}", begun.elapsed());
    assert!(
        fs::read(daemon.path("s.raw")).expect("read")
            == fs::read(daemon.path("n.raw")).expect("read")
    );
    daemon.quit();
}

/// At these limits the job would take a month, and so would whoever waited for its requests.
#[test]
fn limits_change_while_a_job_waits_for_them_and_end_with_the_daemon() {
    let daemon = daemon_with_limits(json!({"bps-total": 1}));
    let mut client = daemon.client();
    client.run("blockdev-backup", backup("t", "n"));
    client.wait_for("n", "running");
    let limits = json!({"path": "g", "property": "limits", "value": {"bps-total": 0}});
    client.run("qom-set", limits);
    client.wait_for("n", "null");
    assert!(
        fs::read(daemon.path("s.raw")).expect("read")
            == fs::read(daemon.path("n.raw")).expect("read")
    );
    let limits = json!({"path": "g", "property": "limits", "value": {"bps-total": 1}});
    client.run("qom-set", limits);
    client.run("blockdev-backup", backup("t", "n"));
    client.wait_for("n", "running");
    assert_eq!(
        client.refusal("object-del", json!({"id": "g"})),
        "object 'g' is in use, can not be deleted"
    );
    let begun = Instant::now();
    daemon.quit();
    assert!(
        begun.elapsed() < Duration::from_secs(25),
        "nothing is waited for"
    );
}

/// At this limit its second write would be over in a day. It is carried out, as an export that goes waits for what it has begun.
#[test]
fn an_export_does_not_go_at_the_pace_of_its_limits() {
    let daemon = daemon_with_limits(json!({"bps-write": 1}));
    let mut client = daemon.client();
    nbd::start_server(&daemon, &mut client, 0);
    nbd::export(&mut client, "t");
    let mut writer = nbd::Nbd::open(&daemon.path("nbd.sock"), "t");
    for offset in [0, 65536] {
        writer.send(nbd::WRITE, 0, (offset, 65536), &[7; 65536]);
    }
    // The first one may pass at once.
    writer.reply();
    let begun = Instant::now();
    client.run("block-export-del", json!({"id": "t", "mode": "hard"}));
    let is_deleted = |message: &Value| message["event"] == "BLOCK_EXPORT_DELETED";
    while !client.message().is_some_and(|message| is_deleted(&message)) {}
    assert!(
        begun.elapsed() < Duration::from_secs(25),
        "nothing is waited for"
    );
    assert_eq!(
        fs::read(daemon.path("s.raw")).expect("read")[..131_072],
        [7; 131_072]
    );
    daemon.quit();
}

/// Two nodes on two threads: what one has used up the other one waits for, and both go on when the limits change.
#[test]
fn a_group_is_shared_across_threads() {
    let daemon = daemon_with_limits(json!({"bps-total": 2 << 20}));
    data_file(&daemon.path("s2.raw"), SIZE);
    hole_file(&daemon.path("n2.raw"), SIZE);
    let mut client = daemon.client();
    client.run("object-add", json!({"qom-type": "iothread", "id": "io"}));
    client.run(
        "blockdev-add",
        throttle("t2", "g", &file("s2", "s2.raw"), json!({})),
    );
    client.run("blockdev-add", file("n2", "n2.raw"));
    for node in ["t2", "n2"] {
        let away = json!({"node-name": node, "iothread": "io"});
        client.run("x-blockdev-set-iothread", away);
    }
    let mut other = daemon.client();
    let begun = Instant::now();
    client.run("blockdev-backup", backup("t", "n"));
    client.run("blockdev-backup", backup("t2", "n2"));
    client.wait_for("n", "null");
    other.wait_for("n2", "null");
    let least = Duration::from_millis((8 - 1) * 500 - 100);
    assert!(begun.elapsed() >= least, "{:?}", begun.elapsed());
    for (source, target) in [("s.raw", "n.raw"), ("s2.raw", "n2.raw")] {
        assert!(
            fs::read(daemon.path(source)).expect("read")
                == fs::read(daemon.path(target)).expect("read")
        );
    }
    daemon.quit();
}

/// At these limits the header alone would take hours. Whoever finalizes a job waits for the file system, as in QEMU, not for limits.
#[test]
fn a_job_is_not_finalized_at_the_pace_of_its_limits() {
    if !tools::have("qemu-img", "qemu-utils") || !tools::have("qemu-io", "qemu-utils") {
        return;
    }
    for job in ["block-stream", "block-commit"] {
        let folder = tempfile::tempdir().expect("a folder");
        chain(folder.path());
        let daemon = Daemon::start_in(folder, &[]);
        let mut client = daemon.client();
        client.run(
            "object-add",
            json!({"qom-type": "throttle-group", "id": "g"}),
        );
        let image = |name: &str, backing: Value| {
            let filename = format!("{name}.qcow2");
            let file = throttle(
                &format!("{name}-t"),
                "g",
                &file(&format!("{name}-f"), &filename),
                json!({}),
            );
            json!({"driver": "qcow2", "node-name": name, "file": file, "backing": backing})
        };
        let base = image("base", json!(null));
        client.run("blockdev-add", image("top", image("mid", base)));
        let arguments = match job {
            "block-stream" => json!({"device": "top"}),
            _ => json!({"device": "top", "top-node": "mid"}),
        };
        let waits = json!({"job-id": "j", "auto-finalize": false});
        client.run(job, with(arguments, waits));
        client.wait_for("j", "pending");
        client.run(
            "qom-set",
            json!({"path": "g", "property": "limits", "value": {"bps-total": 10}}),
        );
        let begun = Instant::now();
        client.run("job-finalize", json!({"id": "j"}));
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(25), "{job}: {took:?}");
        daemon.quit();
    }
}
