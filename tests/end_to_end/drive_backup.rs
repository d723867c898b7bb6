//! `drive-backup`: refusals, the files that it makes, what is in them and below them, the same on both daemons.

use std::path::Path;

use serde_json::{Value, json};

use crate::chains::{on, with};
use crate::images::{chain, image, overlay, run};
use crate::oracle::{compare, hole_file};

/// A line of a script.
fn line(command: &str, arguments: &Value) -> String {
    format!("{}\n", json!({"execute": command, "arguments": arguments}))
}

/// Three layers by name, the lower ones read-only, and a bitmap of what a client has changed on the top.
fn nodes() -> String {
    let read_only = json!({"read-only": true});
    let mut script = line(
        "blockdev-add",
        &with(on("base", "base.qcow2"), read_only.clone()),
    );
    let mid = with(on("mid", "mid.qcow2"), json!({"backing": "base"}));
    script += &line("blockdev-add", &with(mid, read_only));
    let top = with(on("top", "top.qcow2"), json!({"backing": "mid"}));
    script += &line("blockdev-add", &top);
    script += &line(
        "block-dirty-bitmap-add",
        &json!({"node": "top", "name": "b"}),
    );
    script += &line(
        "nbd-server-start",
        &json!({"addr": {"type": "unix", "data": {"path": "nbd.sock"}}}),
    );
    let export = json!({"type": "nbd", "id": "e", "node-name": "top", "writable": true});
    script += &line("block-export-add", &export);
    script +=
        "$ qemu-io -f raw -c 'write -P 5 1M 100k' 'nbd+unix:///top?socket=nbd.sock' > /dev/null\n";
    script
}

/// Images that exist before a backup opens them.
fn with_targets(folder: &Path) {
    chain(folder);
    image(folder, "bare.qcow2", &[]);
    overlay(folder, "on-bare.qcow2", "bare.qcow2", "qcow2");
    overlay(folder, "on-nothing.qcow2", "gone.qcow2", "qcow2");
    image(folder, "old.qcow2", &[]);
    run(
        folder,
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 9 2M 2M", "old.qcow2"],
    );
    hole_file(&folder.join("t.raw"), 4 << 20);
    hole_file(&folder.join("short.raw"), 2 << 20);
}

fn backup(arguments: &Value) -> String {
    let usual = json!({"job-id": "j", "device": "top", "target": "new", "sync": "full"});
    line("drive-backup", &with(usual, arguments.clone()))
}

#[test]
fn refused_drive_backups_say_why() {
    let mut script = nodes();
    for arguments in [
        json!({"device": "nope"}),
        json!({"device": ""}),
        json!({"format": "foo"}),
        json!({"format": ""}),
        json!({"sync": "top", "format": "raw"}),
        json!({"sync": "none", "format": "raw"}),
        json!({"format": "blkdebug"}),
        json!({"format": "null-co"}),
        json!({"target": "nodir/x"}),
        json!({"target": "nodir/x", "mode": "existing", "format": "qcow2"}),
        json!({"target": "nodir/x", "mode": "existing", "format": "foo"}),
        json!({"target": "bare.qcow2", "mode": "other"}),
        json!({"target": "t.raw", "mode": "existing", "format": "qcow2"}),
        json!({"target": "short.raw", "mode": "existing", "format": "raw"}),
        json!({"sync": "incremental"}),
        json!({"sync": "incremental", "bitmap": "zz"}),
        json!({"sync": "bitmap", "bitmap": "b"}),
        json!({"sync": "none", "bitmap": "b", "bitmap-mode": "never"}),
        json!({"sync": "full", "bitmap-mode": "always"}),
        json!({"sync": "some"}),
        json!({"node-name": "t"}),
        json!({"x-perf": {"max-workers": 0}}),
        json!({"x-perf": {"max-chunk": 4096}}),
        json!({"x-perf": {"min-cluster-size": 3}}),
        json!({"format": "raw", "target": "c.raw", "compress": true}),
        json!({"filter-node-name": "top"}),
        json!({"job-id": "1x"}),
        json!({"speed": -1}),
        json!({"target-is-zero": true}),
        json!({"bogus": 1}),
    ] {
        script += &backup(&arguments);
        script += "gone j\n";
    }
    script += &line("drive-backup", &json!({"device": "top", "sync": "full"}));
    script += &line("x-debug-query-block-graph", &json!({}));
    script += &line(
        "x-debug-block-dirty-bitmap-sha256",
        &json!({"node": "top", "name": "b"}),
    );
    compare(&script, with_targets);
}

#[test]
fn what_is_backed_up_is_in_the_file() {
    for (target, arguments) in [
        ("new", json!({})),
        ("new", json!({"sync": "top"})),
        ("new", json!({"device": "base", "sync": "top"})),
        ("new", json!({"device": "mid", "sync": "top"})),
        ("new", json!({"compress": true})),
        ("old.qcow2", json!({})),
        ("bare.qcow2", json!({"mode": "existing", "format": "qcow2"})),
        (
            "on-bare.qcow2",
            json!({"mode": "existing", "format": "qcow2", "sync": "incremental", "bitmap": "b"}),
        ),
        (
            "bare.qcow2",
            json!({"mode": "existing", "format": "qcow2", "sync": "bitmap", "bitmap": "b", "bitmap-mode": "always"}),
        ),
        (
            "new",
            json!({"sync": "bitmap", "bitmap": "b", "bitmap-mode": "never"}),
        ),
    ] {
        let arguments = with(arguments, json!({"target": target}));
        let mut script = nodes();
        script += &backup(&arguments);
        script += "gone j\n";
        script += &line("x-debug-query-block-graph", &json!({}));
        script += &format!(
            "$ qemu-img info --output=json -U {target} | grep -E '\"(backing-filename|backing-filename-format|format)\"'\n\
             $ qemu-img convert -U -O raw {target} c.raw && sha256sum c.raw\n"
        );
        compare(&script, with_targets);
    }
    let arguments = json!({"format": "raw", "target": "n.raw"});
    let script = nodes() + &backup(&arguments) + "gone j\n$ sha256sum n.raw\n";
    compare(&script, with_targets);
}

/// What is overwritten goes to an image that stands on the source.
#[test]
fn what_is_overwritten_is_in_the_file() {
    let mut script = nodes();
    script += &backup(&json!({"sync": "none"}));
    script += "wait j running\n";
    script += "$ qemu-io -f raw -c 'write -P 6 1060k 1k' -c 'write -z 2M 64k' 'nbd+unix:///top?socket=nbd.sock' > /dev/null\n";
    script += &line("query-block-jobs", &json!({}));
    script += &line("job-cancel", &json!({"id": "j"}));
    script += "gone j\n";
    script += &line("x-debug-query-block-graph", &json!({}));
    script += "$ qemu-img info --output=json -U new | grep -E '\"(backing-filename|backing-filename-format|format)\"'\n";
    script += "$ qemu-img convert -U -O raw new c.raw && sha256sum c.raw\n";
    compare(&script, with_targets);
}
