//! Image locks of chains between processes: whoever writes a layer, or one that stands on it, is alone with what it writes,
//! and everybody may read what nobody writes.

use serde_json::{Value, json};

use crate::chains::{on, with};
use crate::daemon::Daemon;
use crate::images::{chain, overlay};
use crate::locks::Holder;
use crate::oracle::compare;
use crate::script::locked_bytes;
use crate::tools;

/// What QEMU's tools may do with the layers of a chain that the daemon has open.
#[test]
fn tools_meet_a_chain_of_the_daemon() {
    const TOOLS: &str = "
        locks top.qcow2
        locks mid.qcow2
        locks base.qcow2
        $ qemu-io -f qcow2 -c 'read 0 4k' top.qcow2 | grep -v ops
        $ qemu-io -f qcow2 -r -c 'read 0 4k' top.qcow2 | grep -v ops
        $ qemu-io -f qcow2 -r -U -c 'read 0 4k' top.qcow2 | grep -v ops
        $ qemu-img info top.qcow2 | grep -v disk
        $ qemu-img info -U --backing-chain top.qcow2 | grep -v disk
        $ qemu-io -f qcow2 -c 'write -P 2 512k 4k' mid.qcow2 | grep -v ops
        $ qemu-io -f qcow2 -r -c 'read 0 4k' mid.qcow2 | grep -v ops
        $ qemu-io -f qcow2 -c 'read 0 4k' base.qcow2 | grep -v ops
        $ qemu-io -f qcow2 -r -c 'read 0 4k' base.qcow2 | grep -v ops
        $ qemu-io -f qcow2 -c 'read 0 4k' other.qcow2 | grep -v ops
        $ qemu-img resize -q base.qcow2 8M
        $ qemu-img commit -q mid.qcow2
        $ qemu-img rebase -q -u -F qcow2 -b base.qcow2 top.qcow2
        $ qemu-img check -q mid.qcow2
        $ qemu-img check -q top.qcow2
    ";
    let add = |node: Value| json!({"execute": "blockdev-add", "arguments": node});
    let del = |name: &str| json!({"execute": "blockdev-del", "arguments": {"node-name": name}});
    let read_only = |node| with(node, json!({"read-only": true}));
    let script = format!(
        "{}\n{TOOLS}\n{}\n{}\n{TOOLS}\n{}\n{}\n{}\n{TOOLS}\n{}\n{}\nlocks top.qcow2\nlocks base.qcow2\n",
        add(on("top", "top.qcow2")),
        del("top"),
        add(read_only(on("top", "top.qcow2"))),
        del("top"),
        // A layer of its own, which may be written.
        add(on("base", "base.qcow2")),
        add(with(on("mid", "mid.qcow2"), json!({"backing": "base"}))),
        del("mid"),
        del("base"),
    );
    compare(&script, |folder| {
        chain(folder);
        overlay(folder, "other.qcow2", "mid.qcow2", "qcow2");
    });
}

/// They hold, we want: refused with the layer's own words and the holder, and possible once it has gone.
#[test]
fn the_daemon_meets_tools_on_its_chain() {
    if !tools::have("qemu-io", "qemu-utils") {
        return;
    }
    let daemon = Daemon::start();
    let folder = daemon.folder.path();
    chain(folder);
    overlay(folder, "other.qcow2", "mid.qcow2", "qcow2");
    let mut client = daemon.client();
    let top = || on("top", "top.qcow2");
    let read_only = || with(top(), json!({"read-only": true}));
    let mut opens = |node: Value| {
        client.run("blockdev-add", node);
        client.run("blockdev-del", json!({"node-name": "top"}));
    };

    // Somebody else's overlay on the same layers is in nobody's way.
    let beside = Holder::open_as("qcow2", folder, &[], "other.qcow2");
    opens(top());
    beside.leave();
    let careless = Holder::open_as("qcow2", folder, &["-r", "-U"], "top.qcow2");
    opens(read_only());
    opens(top());
    careless.leave();
    let reader = Holder::open_as("qcow2", folder, &["-r"], "top.qcow2");
    opens(read_only());
    let by = format!(" (held by process {})", reader.id());
    let mut client = daemon.client();
    assert_eq!(
        client.refusal("blockdev-add", top()),
        format!("Failed to get \"write\" lock{by}")
    );
    reader.leave();
    for (file, layers_above) in [("mid.qcow2", 1), ("base.qcow2", 2)] {
        let writer = Holder::open_as("qcow2", folder, &[], file);
        let by = format!(" (held by process {})", writer.id());
        let prefix = "Could not open backing file: ".repeat(layers_above);
        for node in [top(), read_only()] {
            assert_eq!(
                client.refusal("blockdev-add", node),
                format!("{prefix}Failed to get shared \"write\" lock{by}")
            );
        }
        // Nothing of what had been opened stays locked.
        assert_eq!(
            locked_bytes(&daemon.path("top.qcow2")),
            Vec::<String>::new()
        );
        client.run("blockdev-add", with(top(), json!({"backing": null})));
        client.run("blockdev-del", json!({"node-name": "top"}));
        writer.leave();
    }
    client.run("blockdev-add", top());
    daemon.quit();
}
