//! Backups that a client pulls, set up as management programs do it, beside qemu-storage-daemon: an export shows what several disks
//! were at one moment and what had changed, while they are written to.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::images::run;
use crate::nbd::{Nbd, export, start_server};
use crate::oracle::{compare, data_file, hole_file};
use crate::tools;
use crate::writer::SetAtEnd;

const DISKS: [&str; 3] = ["vda", "vdb", "vdc"];

const BITMAP: &str = "qemu:dirty-bitmap:backup-DISK";

const SHOWN: &str = r#"
    {"execute": "x-debug-query-block-graph"}
    {"execute": "query-block-jobs"}
    {"execute": "query-block-exports"}
    bitmaps
"#;

fn line(command: &str, arguments: Value) -> String {
    format!("{}\n", json!({"execute": command, "arguments": arguments}))
}

fn action(kind: &str, data: Value) -> Value {
    json!({"type": kind, "data": data})
}

fn transaction(actions: &[Value]) -> String {
    line("transaction", json!({"actions": actions}))
}

/// An image on a backing file, one by itself, and one of small clusters.
fn images(folder: &std::path::Path) {
    data_file(&folder.join("base.raw"), 4 << 20);
    let create = |arguments: &[&str]| {
        let all = [&["create", "-q", "-f", "qcow2"], arguments].concat();
        run(folder, "qemu-img", &all);
    };
    create(&["-b", "base.raw", "-F", "raw", "vda.qcow2"]);
    create(&["vdb.qcow2", "4M"]);
    create(&["-o", "cluster_size=4k", "vdc.qcow2", "4M"]);
}

/// Nodes as libvirt names and describes them, written to by clients.
fn nodes() -> String {
    let mut script = line(
        "nbd-server-start",
        json!({"addr": {"type": "unix", "data": {"path": "guest.sock"}}, "max-connections": 0}),
    );
    script += &line(
        "blockdev-add",
        json!({"driver": "file", "filename": "base.raw", "node-name": "libvirt-base-storage",
            "auto-read-only": true, "discard": "unmap", "read-only": true}),
    );
    for disk in DISKS {
        let storage = format!("libvirt-{disk}-storage");
        let format = format!("libvirt-{disk}-format");
        script += &line(
            "blockdev-add",
            json!({"driver": "file", "filename": format!("{disk}.qcow2"), "node-name": storage,
                "auto-read-only": true, "discard": "unmap"}),
        );
        let backing = match disk {
            "vda" => json!("libvirt-base-storage"),
            _ => Value::Null,
        };
        script += &line(
            "blockdev-add",
            json!({"node-name": format, "read-only": false, "discard": "unmap", "driver": "qcow2",
                "file": storage, "backing": backing}),
        );
        script += &line(
            "block-export-add",
            json!({"type": "nbd", "id": format!("guest-{disk}"), "node-name": format,
                "name": format!("guest-{disk}"), "writable": true}),
        );
    }
    script
}

fn write(disk: &str, commands: &[&str]) -> String {
    let commands = commands.iter().map(|command| format!("-c '{command}' "));
    format!(
        "$ qemu-io -f raw -d unmap {}-c flush 'nbd+unix:///guest-{disk}?socket=guest.sock' | grep -v ops\n",
        commands.collect::<String>()
    )
}

/// A checkpoint of every disk.
fn checkpoint_actions(name: &str) -> Vec<Value> {
    let add = |disk: &&str| {
        action(
            "block-dirty-bitmap-add",
            json!({"node": format!("libvirt-{disk}-format"), "name": name, "persistent": true,
                "disabled": false}),
        )
    };
    DISKS.iter().map(add).collect()
}

/// What a client of the export `disk` sees in these contexts.
fn looked_at(disk: &str, contexts: &[&str]) -> String {
    let uri = format!("nbd+unix:///{disk}?socket=guest.sock");
    let mut script = String::new();
    for context in contexts {
        let context = context.replace("DISK", disk);
        script += &format!("$ nbdinfo --map={context} '{uri}'\n");
    }
    script += &format!("$ nbdinfo --list --json '{uri}' | grep -v version\n");
    script
}

/// A client reads what has changed into an overlay of the copy that it has; the whole disk beside it is the same.
fn pulled(disk: &str, round: &str, before: &str) -> String {
    let dirty = format!(
        "$ for e in $(nbdinfo --map=qemu:dirty-bitmap:backup-{disk} 'nbd+unix:///{disk}?socket=guest.sock' | awk '$3==1 {{print $1\",\"$2}}'); do "
    );
    format!(
        "$ qemu-img create -q -f qcow2 -b 'nbd+unix:///{disk}?socket=guest.sock' -F raw {round}-{disk}.qcow2\n\
         {dirty} qemu-io -C -f qcow2 -c \"r -q ${{e%,*}} ${{e#*,}}\" {round}-{disk}.qcow2; done\n\
         $ qemu-img rebase -u -f qcow2 -b {before}-{disk}.qcow2 -F qcow2 {round}-{disk}.qcow2\n\
         $ nbdcopy 'nbd+unix:///{disk}?socket=guest.sock' {round}-{disk}.raw\n\
         $ qemu-img compare -f qcow2 -F raw {round}-{disk}.qcow2 {round}-{disk}.raw\n\
         $ sha256sum {round}-{disk}.raw\n"
    )
}

/// Disks that are backed up for the first time.
fn full() -> String {
    DISKS
        .map(|disk| {
            format!(
                "$ qemu-img convert -f raw -O qcow2 'nbd+unix:///{disk}?socket=guest.sock' full-{disk}.qcow2\n\
                 $ qemu-img convert -O raw full-{disk}.qcow2 - | sha256sum\n"
            )
        })
        .concat()
}

fn scratch(disk: &str) -> String {
    let storage = format!("scratch-{disk}-storage");
    format!("$ touch scratch-{disk}.qcow2\n")
        + &line(
            "blockdev-add",
            json!({"driver": "file", "filename": format!("scratch-{disk}.qcow2"),
                "node-name": storage, "auto-read-only": true, "discard": "unmap"}),
        )
        + &line(
            "blockdev-create",
            json!({"job-id": format!("create-{disk}"), "options": {"driver": "qcow2", "file": storage,
                "size": 4_194_304, "version": "v3"}}),
        )
        + &format!("wait create-{disk} concluded\n")
        + &line("job-dismiss", json!({"id": format!("create-{disk}")}))
        + &line(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": format!("scratch-{disk}-format"),
                "read-only": false, "discard": "unmap", "file": storage,
                "backing": format!("libvirt-{disk}-format")}),
        )
}

fn scratch_is_removed(disk: &str) -> String {
    ["format", "storage"]
        .map(|kind| {
            let name = format!("scratch-{disk}-{kind}");
            line("blockdev-del", json!({"node-name": name}))
        })
        .concat()
        + &format!("$ rm scratch-{disk}.qcow2\n")
}

/// Actions by which a bitmap comes into being that says what has changed since a checkpoint.
fn frozen_bitmap(disk: &str, since: &str) -> [Value; 2] {
    let node = format!("libvirt-{disk}-format");
    let name = format!("backup-{disk}");
    [
        action(
            "block-dirty-bitmap-add",
            json!({"node": node, "name": name, "persistent": false, "disabled": true,
                "granularity": 65536}),
        ),
        action(
            "block-dirty-bitmap-merge",
            json!({"node": node, "target": name, "bitmaps": [{"node": node, "name": since}]}),
        ),
    ]
}

fn exported(disk: &str, node: &str, has_bitmap: bool) -> String {
    let mut export = json!({"type": "nbd", "id": format!("libvirt-nbd-{disk}"), "node-name": node,
        "writable": false, "name": disk, "allocation-depth": true});
    if has_bitmap {
        let bitmap =
            json!({"node": format!("libvirt-{disk}-format"), "name": format!("backup-{disk}")});
        export["bitmaps"] = json!([bitmap]);
    }
    line("block-export-add", export)
}

/// `backup-begin` in pull mode: each disk is saved into a scratch image that stands on it.
fn begun(since: Option<&str>, checkpoint: &str) -> String {
    let mut script = DISKS.map(scratch).concat();
    let mut actions = Vec::new();
    for disk in DISKS {
        actions.extend(since.iter().flat_map(|since| frozen_bitmap(disk, since)));
        actions.push(action(
            "blockdev-backup",
            json!({"device": format!("libvirt-{disk}-format"), "job-id": format!("backup-{disk}"),
                "target": format!("scratch-{disk}-format"), "sync": "none",
                "auto-finalize": true, "auto-dismiss": false}),
        ));
    }
    actions.extend(checkpoint_actions(checkpoint));
    script += &transaction(&actions);
    for disk in DISKS {
        let node = format!("scratch-{disk}-format");
        script += &exported(disk, &node, since.is_some());
    }
    script
}

fn ended(command: &str) -> String {
    let mut script = String::new();
    for disk in DISKS {
        let job = format!("backup-{disk}");
        let named = match command {
            "job-cancel" | "job-complete" => json!({"id": job}),
            _ => json!({"device": job}),
        };
        script += &line(command, named);
        if command.ends_with("complete") {
            script += &line("block-job-cancel", json!({"device": job}));
        }
        script += &format!("wait {job} concluded\n");
    }
    script += &line("query-jobs", json!({}));
    for disk in DISKS {
        script += &line("job-dismiss", json!({"id": format!("backup-{disk}")}));
        script += &line(
            "block-export-del",
            json!({"id": format!("libvirt-nbd-{disk}")}),
        );
        script += &line(
            "block-dirty-bitmap-remove",
            json!({"node": format!("libvirt-{disk}-format"), "name": format!("backup-{disk}")}),
        );
        script += &scratch_is_removed(disk);
    }
    script
}

#[test]
fn disks_are_pulled_as_libvirt_does_it() {
    if !tools::have("nbdinfo", "libnbd-bin") {
        return;
    }
    let mut script = nodes();
    script += &write("vda", &["write -P 1 0 100k", "write -P 2 3M 300k"]);
    script += &write("vdb", &["write -P 3 1M 1M", "write -z 2M 64k"]);
    script += &write("vdc", &["write -P 4 10k 3k", "write -P 5 4090k 6k"]);
    script += &begun(None, "chk1");
    script += &write("vda", &["write -P 11 50k 100k"]);
    script += &write("vdb", &["write -P 13 0 10k", "write -z 1M 128k"]);
    script += SHOWN;
    script += &full();
    script += &ended("block-job-cancel");
    script += SHOWN;
    for (round, since, checkpoint, before, command) in [
        ("one", "chk1", "chk2", "full", "job-cancel"),
        ("two", "chk2", "chk3", "one", "block-job-complete"),
    ] {
        script += &write("vda", &["write -P 21 2M 1k", "discard 3M 64k"]);
        script += &write("vdb", &["write -P 23 70k 100k"]);
        script += &write("vdc", &["write -P 24 100k 1k", "write -z 1M 300k"]);
        script += &begun(Some(since), checkpoint);
        script += SHOWN;
        script += &DISKS
            .map(|disk| looked_at(disk, &[BITMAP, "qemu:allocation-depth", "base:allocation"]))
            .concat();
        script += &write(
            "vda",
            &[
                "write -P 31 2M 4k",
                "write -P 32 0 1k",
                "write -P 33 3M 70k",
            ],
        );
        script += &write("vdb", &["write -P 33 64k 1M", "write -z 0 4k"]);
        script += &write("vdc", &["write -P 34 100k 1k", "write -P 35 3M 64k"]);
        script += SHOWN;
        script += &DISKS
            .map(|disk| looked_at(disk, &[BITMAP, "qemu:allocation-depth", "base:allocation"]))
            .concat();
        script += &DISKS.map(|disk| pulled(disk, round, before)).concat();
        script += &ended(command);
        script += SHOWN;
    }
    script += &line("nbd-server-stop", json!({}));
    compare(&script, images);
}

/// Disks whose users have a node above them that is put on a filter, all at one moment.
fn tops() -> String {
    let mut script = nodes();
    for disk in DISKS {
        script += &line(
            "block-export-del",
            json!({"id": format!("guest-{disk}"), "mode": "hard"}),
        );
        script += &line(
            "blockdev-add",
            json!({"driver": "raw", "node-name": format!("top-{disk}"), "discard": "unmap",
                "file": format!("libvirt-{disk}-format")}),
        );
        script += &line(
            "block-export-add",
            json!({"type": "nbd", "id": format!("guest-{disk}"), "node-name": format!("top-{disk}"),
                "name": format!("guest-{disk}"), "writable": true}),
        );
    }
    script
}

/// The users' nodes are put on these.
fn put_on(kind: &str) -> String {
    let options = DISKS.map(|disk| {
        let file = match kind {
            "cbw" => format!("cbw-{disk}"),
            _ => format!("libvirt-{disk}-format"),
        };
        json!({"driver": "raw", "node-name": format!("top-{disk}"), "discard": "unmap", "file": file})
    });
    line("blockdev-reopen", json!({"options": options}))
}

/// Filters above the disks save what is changed into scratch images, and nodes beside them show what was there.
fn filtered(since: &str, more: &Value) -> String {
    let mut script = DISKS.map(scratch).concat();
    let bitmaps = DISKS.iter().flat_map(|disk| frozen_bitmap(disk, since));
    let mut actions: Vec<Value> = bitmaps.collect();
    actions.extend(checkpoint_actions("later"));
    script += &transaction(&actions);
    for disk in DISKS {
        let mut filter = json!({"driver": "copy-before-write", "node-name": format!("cbw-{disk}"),
            "discard": "unmap", "file": format!("libvirt-{disk}-format"),
            "target": format!("scratch-{disk}-format")});
        for (name, value) in more.as_object().expect("options") {
            filter[name] = value.clone();
        }
        if more.get("bitmap").is_some() {
            filter["bitmap"] = json!({"node": format!("libvirt-{disk}-format"),
                "name": format!("backup-{disk}")});
        }
        script += &line("blockdev-add", filter);
    }
    script += &put_on("cbw");
    for disk in DISKS {
        script += &line(
            "blockdev-add",
            json!({"driver": "snapshot-access", "node-name": format!("access-{disk}"),
                "discard": "unmap", "file": format!("cbw-{disk}")}),
        );
        script += &exported(disk, &format!("access-{disk}"), true);
    }
    script
}

fn unfiltered() -> String {
    let mut script = String::new();
    for disk in DISKS {
        script += &line("blockdev-del", json!({"node-name": format!("cbw-{disk}")}));
        script += &line(
            "block-export-del",
            json!({"id": format!("libvirt-nbd-{disk}"), "mode": "hard"}),
        );
        script += &line(
            "blockdev-del",
            json!({"node-name": format!("access-{disk}")}),
        );
    }
    script += &put_on("disk");
    for disk in DISKS {
        script += &line("blockdev-del", json!({"node-name": format!("cbw-{disk}")}));
        script += &line(
            "block-dirty-bitmap-remove",
            json!({"node": format!("libvirt-{disk}-format"), "name": format!("backup-{disk}")}),
        );
        script += &line(
            "block-dirty-bitmap-remove",
            json!({"node": format!("libvirt-{disk}-format"), "name": "later"}),
        );
        script += &scratch_is_removed(disk);
    }
    script
}

/// Parts of what `access-DISK` shows, which need not be readable.
fn parts_of(disk: &str) -> String {
    let reads = [
        "0 64k",
        "64k 64k",
        "1M 64k",
        "2M 4k",
        "3M 64k",
        "3M 300k",
        "4032k 64k",
    ];
    reads
        .map(|read| {
            format!(
                "$ qemu-io -r -f raw -c 'read -v {read}' 'nbd+unix:///{disk}?socket=guest.sock' | grep -v ops | sha256sum\n"
            )
        })
        .concat()
}

#[test]
fn disks_are_pulled_through_filters() {
    if !tools::have("nbdinfo", "libnbd-bin") {
        return;
    }
    let mut script = tops();
    script += &transaction(&checkpoint_actions("chk"));
    for more in [
        json!({}),
        json!({"bitmap": true}),
        json!({"on-cbw-error": "break-snapshot", "cbw-timeout": 30, "min-cluster-size": 131_072}),
        json!({"on-cbw-error": "break-guest-write", "bitmap": true, "min-cluster-size": 1_048_576}),
    ] {
        script += &write(
            "vda",
            &["write -P 1 0 100k", "write -P 2 3M 300k", "discard 2M 64k"],
        );
        script += &write("vdb", &["write -P 3 1M 1M", "write -z 2M 64k"]);
        script += &write("vdc", &["write -P 4 10k 3k", "write -P 5 4090k 6k"]);
        script += &filtered("chk", &more);
        script += SHOWN;
        script += &DISKS.map(|disk| looked_at(disk, &[BITMAP])).concat();
        script += &write(
            "vda",
            &[
                "write -P 11 0 1k",
                "write -P 12 3M 64k",
                "discard 3200k 64k",
            ],
        );
        script += &write(
            "vdb",
            &[
                "write -P 13 0 10k",
                "write -z 1M 128k",
                "discard 1200k 256k",
            ],
        );
        script += &write("vdc", &["write -P 14 0 4M"]);
        script += SHOWN;
        script += &DISKS.map(|disk| looked_at(disk, &[BITMAP])).concat();
        script += &DISKS.map(parts_of).concat();
        script += &unfiltered();
        script += SHOWN;
    }
    compare(&script, images);
}

/// What a client has read it gives up, so that the scratch image has no more than what is still to be read.
#[test]
fn what_was_pulled_is_given_up() {
    let mut script = r#"
    $ qemu-img create -q -f qcow2 t.qcow2 4M
    {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "a", "filename": "base.raw"}}
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "t", "discard": "unmap", "file": {"driver": "file", "filename": "t.qcow2", "discard": "unmap"}}}
    {"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": "nbd.sock"}}}}
    {"execute": "blockdev-add", "arguments": {"driver": "copy-before-write", "node-name": "c", "file": "a", "target": "t"}}
    {"execute": "blockdev-add", "arguments": {"driver": "snapshot-access", "node-name": "s", "file": "c", "discard": "unmap"}}
    {"execute": "blockdev-add", "arguments": {"driver": "snapshot-access", "node-name": "kept", "file": "c"}}
    {"execute": "blockdev-add", "arguments": {"driver": "snapshot-access", "node-name": "ro", "file": "c", "discard": "unmap", "read-only": true}}
    "#
    .to_owned();
    for (node, writable) in [
        ("c", true),
        ("s", true),
        ("kept", true),
        ("ro", true),
        ("ro", false),
        ("t", false),
    ] {
        script += &line(
            "block-export-add",
            json!({"type": "nbd", "id": node, "node-name": node, "writable": writable,
                "allocation-depth": true}),
        );
    }
    let client = |name: &str, commands: &[&str]| {
        let commands = commands.iter().map(|command| format!("-c '{command}' "));
        format!(
            "$ qemu-io -f raw -d unmap {} 'nbd+unix:///{name}?socket=nbd.sock' | grep -v ops\n",
            commands.collect::<String>()
        )
    };
    let maps = "$ nbdinfo --map=qemu:allocation-depth 'nbd+unix:///t?socket=nbd.sock'\n";
    script += &client("c", &["write -P 9 0 300k"]);
    script += maps;
    for (name, commands) in [
        ("s", &["write 0 64k", "write -z 0 64k"][..]),
        ("kept", &["discard 0 64k", "read 0 64k"]),
        ("ro", &["discard 0 64k"]),
        ("s", &["discard 1k 63k", "read 0 64k"]),
        (
            "s",
            &[
                "discard 1k 130k",
                "read 0 64k",
                "read 64k 1k",
                "read 120k 20k",
                "read 128k 64k",
            ],
        ),
        ("kept", &["read 64k 64k", "read 0 64k"]),
        ("s", &["discard 1M 1M", "read 1M 1k", "read 2M 4k"]),
        ("c", &["write -P 8 1000k 1M"]),
        ("s", &["discard 5M 1M", "discard 3M 1M", "read 3M 4k"]),
    ] {
        script += &client(name, commands);
        script += maps;
        script += "$ nbdinfo --map 'nbd+unix:///s?socket=nbd.sock'\n";
    }
    compare(&script, images);
}

/// A writer goes from disk to disk, so that only some states of the three can ever have been there at one time; a client sees one
/// of them for as long as it looks.
#[test]
fn three_disks_are_shown_as_they_were_at_one_moment() {
    if !tools::have("qemu-img", "qemu-utils") {
        return;
    }
    for _ in 0..5 {
        one_moment();
    }
}

fn one_moment() {
    let daemon = Daemon::start_with(&["--data-threads", "3"]);
    let mut client = daemon.client();
    start_server(&daemon, &mut client, 10);
    let mut actions = Vec::new();
    for disk in DISKS {
        let scratch = format!("{disk}-scratch");
        hole_file(&daemon.path(disk), 256 << 10);
        let create = ["create", "-q", "-f", "qcow2", &scratch, "256k"];
        run(&daemon.path(""), "qemu-img", &create);
        let node = json!({"driver": "file", "node-name": disk, "filename": disk});
        client.run("blockdev-add", node);
        let file = json!({"driver": "file", "filename": scratch});
        let node = json!({"driver": "qcow2", "node-name": scratch, "file": file, "backing": disk});
        client.run("blockdev-add", node);
        export(&mut client, disk);
        let job = json!({"job-id": disk, "device": disk, "target": scratch, "sync": "none"});
        actions.push(json!({"type": "blockdev-backup", "data": job}));
    }
    let socket = daemon.path("nbd.sock");
    let (rounds, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let rounds_more = |more: u64, is_over: &dyn Fn() -> bool| {
        let until = rounds.load(Ordering::Relaxed) + more;
        while rounds.load(Ordering::Relaxed) < until && !is_over() {
            std::thread::yield_now();
        }
    };
    std::thread::scope(|scope| {
        let ends = SetAtEnd(&stop);
        let writer = scope.spawn(|| {
            let mut disks = DISKS.map(|disk| Nbd::open(&socket, disk));
            while !stop.load(Ordering::Relaxed) {
                let round = 1 + rounds.fetch_add(1, Ordering::Relaxed);
                for disk in &mut disks {
                    disk.write(4096, &round.to_be_bytes(), 0);
                }
            }
        });
        rounds_more(20, &|| writer.is_finished());
        client.run("transaction", json!({"actions": actions}));
        let mut shown = DISKS.map(|disk| {
            let node = format!("{disk}-scratch");
            let export = json!({"type": "nbd", "id": node, "node-name": node});
            client.run("block-export-add", export);
            Nbd::open(&socket, &node)
        });
        let mut looked = shown.each_mut().map(round_of);
        for _ in 0..10 {
            rounds_more(5, &|| writer.is_finished());
            let again = shown.each_mut().map(round_of);
            assert_eq!(std::mem::replace(&mut looked, again), again);
        }
        let [a, b, c] = looked;
        assert!(c >= 18, "somebody has written before");
        assert!(a == c || a == c + 1, "{a} {b} {c}");
        assert!(b == a || b == c, "{a} {b} {c}");
        drop(ends);
        writer.join().expect("every write is answered");
    });
    for disk in DISKS {
        client.run("job-cancel", json!({"id": disk}));
        client.wait_for(disk, "null");
    }
    drop(client);
    daemon.quit();
}

fn round_of(disk: &mut Nbd) -> u64 {
    let eight: [u8; 8] = disk.read(4096, 8).try_into().expect("eight");
    u64::from_be_bytes(eight)
}
