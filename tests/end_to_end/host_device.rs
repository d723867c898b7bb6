//! Block devices, as loop devices over files: added, sized, copied from and to, locked and refused as by the oracle.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::daemon::Daemon;
use crate::oracle::{compare, data_file, hole_file};
use crate::script::locked_bytes;
use crate::tools;

/// A loop device, detached when it goes.
struct LoopDevice(PathBuf);

impl LoopDevice {
    /// Attaches a file; `None`, aloud: this machine or user cannot.
    fn attach(file: &Path, read_only: bool) -> Option<Self> {
        if !tools::have("losetup", "mount") {
            return None;
        }
        let mut command = Command::new("losetup");
        command.args(["--find", "--show"]);
        if read_only {
            command.arg("--read-only");
        }
        let output = command.arg(file).output().expect("losetup runs");
        if !output.status.success() {
            let reason = String::from_utf8_lossy(&output.stderr);
            // No package helps against a missing right, so this is no failure anywhere.
            eprintln!("SKIPPED: loop devices need root and a kernel that has them: {reason}");
            return None;
        }
        let printed = String::from_utf8(output.stdout).expect("a path");
        Some(Self(PathBuf::from(printed.trim())))
    }

    fn path(&self) -> &str {
        self.0.to_str().expect("a path")
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let detached = Command::new("losetup")
            .arg("--detach")
            .arg(&self.0)
            .status();
        if !detached.is_ok_and(|status| status.success()) {
            eprintln!("{} stays attached", self.0.display());
        }
    }
}

const LENGTH_BYTES: u64 = 4 << 20;

/// Two devices over files in a folder: one with data, one with holes.
fn devices(folder: &Path) -> Option<(LoopDevice, LoopDevice)> {
    data_file(&folder.join("s.img"), LENGTH_BYTES);
    hole_file(&folder.join("t.img"), LENGTH_BYTES);
    let source = LoopDevice::attach(&folder.join("s.img"), false)?;
    let target = LoopDevice::attach(&folder.join("t.img"), false)?;
    Some((source, target))
}

#[test]
fn texts_and_views_are_the_same() {
    let folder = tempfile::tempdir().expect("a folder");
    let Some((source, target)) = devices(folder.path()) else {
        return;
    };
    hole_file(&folder.path().join("ro.img"), LENGTH_BYTES);
    let Some(write_protected) = LoopDevice::attach(&folder.path().join("ro.img"), true) else {
        return;
    };
    let (s, t, ro) = (source.path(), target.path(), write_protected.path());
    let script = format!(
        r#"
        {{"execute": "blockdev-add", "arguments": {{"driver": "file", "node-name": "s", "filename": "{s}"}}}}
        {{"execute": "blockdev-add", "arguments": {{"driver": "host_device", "node-name": "ro", "filename": "{ro}"}}}}
        {{"execute": "blockdev-add", "arguments": {{"driver": "host_device", "node-name": "ro", "filename": "{ro}", "auto-read-only": true}}}}
        {{"execute": "blockdev-del", "arguments": {{"node-name": "ro"}}}}
        {{"execute": "blockdev-add", "arguments": {{"driver": "host_device", "node-name": "ro2", "filename": "{ro}", "read-only": true}}}}
        {{"execute": "blockdev-add", "arguments": {{"driver": "host_device", "node-name": "s", "filename": "{s}"}}}}
        {{"execute": "blockdev-add", "arguments": {{"driver": "raw", "node-name": "t", "file": {{"driver": "host_device", "node-name": "th", "filename": "{t}", "cache": {{"direct": true}}}}}}}}
        {{"execute": "blockdev-add", "arguments": {{"driver": "file", "node-name": "f", "filename": "f.raw"}}}}
        {{"execute": "query-named-block-nodes", "arguments": {{"flat": true}}}}
        {{"execute": "x-debug-query-block-graph"}}
        {{"execute": "block_resize", "arguments": {{"node-name": "s", "size": 8388608}}}}
        {{"execute": "block_resize", "arguments": {{"node-name": "s", "size": 4194304}}}}
        {{"execute": "block_resize", "arguments": {{"node-name": "s", "size": 1048576}}}}
        {{"execute": "block_resize", "arguments": {{"node-name": "t", "size": 4198400}}}}
        {{"execute": "block_resize", "arguments": {{"node-name": "ro2", "size": 4194304}}}}
        {{"execute": "blockdev-mirror", "arguments": {{"job-id": "ro", "device": "s", "target": "ro2", "sync": "full"}}}}
        {{"execute": "blockdev-backup", "arguments": {{"job-id": "b", "device": "s", "target": "t", "sync": "full", "auto-finalize": false}}}}
        wait b pending
        $ qemu-io -f raw -c 'write 0 4k' {s} 2>&1 | grep -v ops
        $ qemu-img info -f raw {t} | grep -v disk
        {{"execute": "job-finalize", "arguments": {{"id": "b"}}}}
        wait b null
        $ cmp {s} {t}
        {{"execute": "blockdev-mirror", "arguments": {{"job-id": "m", "device": "t", "target": "f", "sync": "full"}}}}
        wait m ready
        $ qemu-io -f raw -c 'write 0 4k' {t} 2>&1 | grep -v ops
        {{"execute": "job-complete", "arguments": {{"id": "m"}}}}
        wait m null
        $ cmp f.raw {s}
        {{"execute": "blockdev-del", "arguments": {{"node-name": "t"}}}}
        "#
    );
    compare(&script, |folder| {
        hole_file(&folder.join("f.raw"), LENGTH_BYTES);
    });
}

/// A device is written through whatever stands between: what the file behind it holds afterwards is the copy.
#[test]
fn copies_reach_the_file_behind() {
    let daemon = Daemon::start();
    let Some((source, target)) = devices(daemon.folder.path()) else {
        return;
    };
    let mut client = daemon.client();
    for (name, device, direct) in [("s", &source, true), ("t", &target, false)] {
        client.run(
            "blockdev-add",
            json!({"driver": "host_device", "node-name": name, "filename": device.path(),
                "cache": {"direct": direct}, "discard": "unmap"}),
        );
    }
    let job = |id: &str, device: &str, target: &str| json!({"job-id": id, "device": device, "target": target, "sync": "full", "auto-finalize": false});
    client.run("blockdev-backup", job("b", "s", "t"));
    client.wait_for("b", "pending");
    assert_eq!(
        locked_bytes(Path::new(source.path())),
        ["READ 100-100", "READ 201-201", "READ 203-203"]
    );
    client.run("job-finalize", json!({"id": "b"}));
    client.wait_for("b", "null");
    // Zeroes over data, from a source that says where it has none.
    hole_file(&daemon.path("z.raw"), LENGTH_BYTES);
    client.run(
        "blockdev-add",
        json!({"driver": "file", "node-name": "z", "filename": "z.raw"}),
    );
    let same = |one: &str, other: &str| {
        let read = |name| std::fs::read(daemon.path(name)).expect("read");
        File::open(target.path())
            .expect("opened")
            .sync_all()
            .expect("synced");
        read(one) == read(other)
    };
    assert!(same("s.img", "t.img"), "the copy differs");
    client.run("blockdev-mirror", job("m", "z", "t"));
    client.wait_for("m", "ready");
    client.run("job-complete", json!({"id": "m"}));
    client.wait_for("m", "pending");
    client.run("job-finalize", json!({"id": "m"}));
    client.wait_for("m", "null");
    assert!(same("z.raw", "t.img"), "zeroes did not arrive");
    daemon.quit();
}

#[test]
fn images_are_made_on_devices_that_are_long_enough() {
    let folder = tempfile::tempdir().expect("a folder");
    let Some((image, data)) = devices(folder.path()) else {
        return;
    };
    let (i, d) = (image.path(), data.path());
    let mut script = String::new();
    for (name, driver, file) in [
        ("i", "host_device", i),
        ("d", "host_device", d),
        ("f", "file", "f.img"),
    ] {
        let node = json!({"driver": driver, "node-name": name, "filename": file});
        script += &json!({"execute": "blockdev-add", "arguments": node}).to_string();
        script += "\n";
    }
    for (number, options) in [
        json!({"file": "i", "size": 1 << 30}),
        json!({"file": "i", "size": 1 << 20, "preallocation": "metadata"}),
        json!({"file": "i", "size": 16 << 20, "preallocation": "metadata"}),
        json!({"file": "f", "data-file": "d", "size": 1 << 20}),
        json!({"file": "f", "data-file": "d", "size": 8 << 20}),
    ]
    .into_iter()
    .enumerate()
    {
        let mut options = options;
        options["driver"] = json!("qcow2");
        let id = format!("j{number}");
        let arguments = json!({"job-id": id, "options": options});
        script += &json!({"execute": "blockdev-create", "arguments": arguments}).to_string();
        script += &format!("\nwait {id} concluded\n{{\"execute\": \"query-jobs\"}}\n");
        script += &json!({"execute": "job-dismiss", "arguments": {"id": id}}).to_string();
        // After a failure theirs is an image that contradicts itself, ours the one from before.
        if number < 2 {
            script += &format!("\n$ qemu-img check -f qcow2 {i}");
        }
        script += "\n";
    }
    compare(&script, |folder| {
        std::fs::write(folder.join("f.img"), "").expect("written");
    });
}
