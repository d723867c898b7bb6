//! Checksum manifests: written by copies with and without a daemon, read by `verify` and by a program of the documentation, which
//! must agree; damage is named, and a target that changes what it is given fails its job.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::nbd_nodes::serve;
use crate::oracle::{data_file, hole_file};
use crate::place::{MIB, Place, code, complaint};
use crate::tools;

/// BLAKE3 in Python, for a disk of a few MiB, by its specification (hash mode; one chunk tree of up to 2^54 chunks).
const BLAKE3: &str = r#"
import struct
IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
ORDER = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
MASK = 0xFFFFFFFF
def compress(cv, block, counter, length, flags):
    m = list(struct.unpack("<16I", block.ljust(64, b"\0")))
    v = list(cv) + list(IV[:4]) + [counter & MASK, counter >> 32, length, flags]
    for turn in range(7):
        for i, (a, b, c, d) in enumerate(((0,4,8,12),(1,5,9,13),(2,6,10,14),(3,7,11,15),(0,5,10,15),(1,6,11,12),(2,7,8,13),(3,4,9,14))):
            for x, r, s in ((m[2 * i], 16, 12), (m[2 * i + 1], 8, 7)):
                v[a] = (v[a] + v[b] + x) & MASK
                t = v[d] ^ v[a]; v[d] = (t >> r | t << (32 - r)) & MASK
                v[c] = (v[c] + v[d]) & MASK
                t = v[b] ^ v[c]; v[b] = (t >> s | t << (32 - s)) & MASK
        m = [m[i] for i in ORDER]
    return [v[i] ^ v[i + 8] for i in range(8)]
def node(data, counter, root):
    if len(data) <= 1024:
        cv, blocks = IV, max(1, (len(data) + 63) // 64)
        for i in range(blocks):
            block = data[64 * i:64 * i + 64]
            last = i == blocks - 1
            cv = compress(cv, block, counter, len(block), (i == 0) | last << 1 | (last and root) << 3)
        return cv
    left = 1024
    while left * 2 < len(data):
        left *= 2
    pair = node(data[:left], counter, False) + node(data[left:], counter + left // 1024, False)
    return compress(IV, struct.pack("<16I", *pair), 0, 64, 4 | root << 3)
class blake3:
    def __init__(self, data):
        self.words = node(data, 0, True)
    def digest(self):
        return struct.pack("<8I", *self.words)
    def hexdigest(self):
        return self.digest().hex()
"#;

/// The program of the documentation, with a BLAKE3 of its own.
fn check_by_hand(folder: &Path, disk: &str, manifest: &str) -> Output {
    let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/MANIFEST.md"));
    let text = text.expect("the documentation");
    let program = text.split("```python\n").nth(1).expect("a program");
    let program = program.split("```").next().expect("its end");
    assert!(program.lines().count() <= 32, "a short program");
    fs::write(folder.join("blake3.py"), BLAKE3).expect("written");
    fs::write(folder.join("check.py"), program).expect("written");
    let mut python = Command::new("python3");
    python
        .args(["-B", "check.py", disk, manifest])
        .current_dir(folder);
    python.output().expect("it runs")
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Data, holes, zeroes that were written, and an end within an extent.
fn sparse(place: &Place, name: &str) {
    let file = File::create(place.path(name)).expect("made");
    file.set_len(5 * MIB + 1000).expect("grown");
    let bytes: Vec<u8> = (0..300_000).map(|at| (at % 251) as u8 + 1).collect();
    for offset in [0, 2 * MIB - 70_000, 5 * MIB + 500] {
        let length = bytes.len().min((5 * MIB + 1000 - offset) as usize);
        file.write_all_at(&bytes[..length], offset)
            .expect("written");
    }
    file.write_all_at(&[0; 200_000], 3 * MIB).expect("written");
}

fn flip(path: &Path, offset: u64) {
    let file = File::options()
        .read(true)
        .write(true)
        .open(path)
        .expect("open");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("read");
    byte[0] ^= 4;
    file.write_all_at(&byte, offset).expect("written");
}

#[test]
fn a_copy_is_what_its_manifest_says_until_a_bit_flips() {
    if !tools::have("python3", "python3") {
        return;
    }
    let place = Place::new();
    sparse(&place, "source");
    for kind in ["backup", "mirror"] {
        for backend in ["auto", "threads"] {
            let options = [
                "--io-backend",
                backend,
                "--verify",
                "--manifest",
                "sums",
                "--force",
            ];
            place.succeed(&[&[kind, "source", "target"], &options[..]].concat());
            assert!(place.read("target") == place.read("source"));
            let said = place.succeed(&["verify", "target", "sums"]);
            assert_eq!(text(&said), "'target' holds what the manifest says.\n");
            let room = fs::metadata(place.path("sums")).expect("there").len();
            assert!(room < 1500, "{room} bytes");
        }
    }
    let by_hand = check_by_hand(place.folder.path(), "target", "sums");
    assert_eq!(
        (code(&by_hand), text(&by_hand)),
        (0, String::new()),
        "{}",
        complaint(&by_hand)
    );
    assert_eq!(
        place.names(),
        ["blake3.py", "check.py", "source", "sums", "target"],
        "nothing else is left"
    );
    for (offset, extent, length) in [
        (299_999, 262_144, 65_536),
        (MIB, MIB, 65_536),
        (3 * MIB + 65_536, 3 * MIB + 65_536, 65_536),
        (5 * MIB + 999, 5 * MIB, 1024),
    ] {
        flip(&place.path("target"), offset);
        let found = place.run(&["verify", "target", "sums"]);
        let line = format!("Differs: {length} bytes at offset {extent}");
        let said = format!("{line}\n'target' differs in {length} bytes, in whole extents.\n");
        assert_eq!((code(&found), text(&found)), (1, said));
        let found = place.run(&["verify", "--json", "target", "sums"]);
        let found: Value = serde_json::from_str(&text(&found)).expect("JSON");
        assert_eq!(found, json!([{"start": extent, "length": length}]));
        let by_hand = check_by_hand(place.folder.path(), "target", "sums");
        assert_eq!(code(&by_hand), 1);
        assert!(text(&by_hand).contains(&line), "{}", text(&by_hand));
        flip(&place.path("target"), offset);
    }
    place.succeed(&["verify", "-q", "target", "sums"]);
}

#[test]
fn a_manifest_judges_every_format_and_nothing_when_it_is_damaged() {
    if !tools::have("qemu-img", "qemu-utils") {
        return;
    }
    let place = Place::new();
    sparse(&place, "source");
    place.succeed(&["backup", "--manifest", "sums", "source", "target"]);
    let convert = [
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "-c",
        "source",
        "image.qcow2",
    ];
    let mut qemu_img = Command::new("qemu-img");
    let done = qemu_img
        .args(convert)
        .current_dir(place.folder.path())
        .status();
    assert!(done.expect("it runs").success());
    place.succeed(&["verify", "-f", "qcow2", "image.qcow2", "sums"]);
    let refused = place.run(&["verify", "image.qcow2", "sums"]);
    assert_eq!(code(&refused), 2);
    assert!(
        complaint(&refused).contains("looks like a qcow2 image"),
        "{}",
        complaint(&refused)
    );
    place.succeed(&["resize", "--shrink", "target", "4M"]);
    let found = place.run(&["verify", "target", "sums"]);
    assert_eq!(code(&found), 1);
    assert!(
        text(&found).starts_with("Differs: 1049600 bytes at offset 4194304\n"),
        "{}",
        text(&found)
    );

    let whole = place.read("sums");
    let mut changed = whole.clone();
    changed[90] ^= 1;
    for (damaged, words) in [
        (&whole[..whole.len() - 70], "The manifest cannot be used: "),
        (&changed[..], "The manifest cannot be used: "),
        (&b"nothing of the kind"[..], "its last line has no end"),
        (&b""[..], "it ends early"),
    ] {
        fs::write(place.path("damaged"), damaged).expect("written");
        let found = place.run(&["verify", "source", "damaged"]);
        assert_eq!((code(&found), text(&found)), (2, String::new()));
        assert!(complaint(&found).contains(words), "{}", complaint(&found));
    }
    assert_eq!(code(&place.run(&["verify", "source", "missing"])), 2);
    assert_eq!(code(&place.run(&["verify", "source"])), 2);
}

#[test]
fn a_manifest_takes_nobody_elses_place() {
    let place = Place::new();
    let bytes = place.data("source", MIB);
    place.data("other", 10);
    place.fail(
        &["backup", "--manifest", "other", "source", "target"],
        "'other' exists already; --force overwrites it",
    );
    for taken in ["source", "target", "."] {
        place.fail(
            &["backup", "--force", "--manifest", taken, "source", "target"],
            "cannot be overwritten by a manifest",
        );
    }
    place.fail(
        &["backup", "--manifest", "nowhere/sums", "source", "target"],
        "Could not write manifest 'nowhere/sums': No such file or directory",
    );
    assert_eq!(place.names(), ["other", "source"]);
    assert!(place.read("source") == bytes);
}

const LENGTH: u64 = 4 << 20;

/// A daemon whose disk `local` is to be copied to `remote`, which changes a byte after each write.
fn corrupting() -> (Daemon, crate::daemon::Process) {
    let daemon = Daemon::start_logging();
    let folder = daemon.path("");
    data_file(&folder.join("local.raw"), LENGTH);
    hole_file(&folder.join("remote.raw"), LENGTH);
    let file = folder.join("remote.raw").display().to_string();
    let size = format!("get_size=echo {LENGTH}");
    let read =
        format!("pread=dd if={file} skip=$4 count=$3 iflag=skip_bytes,count_bytes status=none");
    let flips = format!("printf '\\377' | dd of={file} bs=1 seek=300000 conv=notrunc status=none");
    let write =
        format!("pwrite=dd of={file} seek=$4 oflag=seek_bytes conv=notrunc status=none; {flips}");
    let arguments = [
        "-f",
        "-U",
        "server.sock",
        "eval",
        &size,
        &read,
        &write,
        "flush=true",
    ];
    let server = serve(&folder, "nbdkit", &arguments);
    (daemon, server)
}

#[test]
fn a_target_that_corrupts_fails_its_job() {
    if !tools::have("nbdkit", "nbdkit") {
        return;
    }
    for command in ["blockdev-backup", "blockdev-mirror"] {
        let (daemon, server) = corrupting();
        let mut client = daemon.client();
        let local = json!({"driver": "file", "node-name": "local", "filename": "local.raw"});
        client.run("blockdev-add", local);
        let remote = json!({"driver": "nbd", "node-name": "remote", "open-timeout": 20,
            "server": {"type": "unix", "path": "server.sock"}});
        client.run("blockdev-add", remote);
        let manifest = daemon.path("sums").display().to_string();
        let job = json!({"job-id": "j", "device": "local", "target": "remote", "sync": "full",
            "x-manifest": manifest, "x-verify": true, "auto-dismiss": false});
        client.run(command, job);
        client.wait_for("j", "concluded");
        let jobs = client.run("query-jobs", json!({}));
        let error = jobs[0]["error"].as_str().expect("it failed").to_owned();
        assert_eq!(
            error, "The target does not hold what was read from the source: 65536 bytes at 262144",
            "{command}"
        );
        assert!(!daemon.path("sums").exists());
        client.run("job-dismiss", json!({"id": "j"}));
        for name in ["local", "remote"] {
            client.run("blockdev-del", json!({"node-name": name}));
        }
        drop(server);
        daemon.assert_no_bug();
    }
}

#[test]
fn jobs_of_a_daemon_write_manifests_and_refuse_what_none_can_tell() {
    let daemon = Daemon::start_logging();
    let folder = daemon.path("");
    data_file(&folder.join("a.img"), LENGTH);
    let mut client = daemon.client();
    for name in ["a", "b"] {
        let path = format!("{name}.img");
        if name == "b" {
            hole_file(&folder.join(&path), LENGTH);
        }
        let node = json!({"driver": "file", "node-name": name, "filename": path});
        client.run("blockdev-add", node);
    }
    let job = |more: Value| {
        let mut job = json!({"job-id": "j", "device": "a", "target": "b", "sync": "full"});
        if let (Some(job), Value::Object(more)) = (job.as_object_mut(), more) {
            job.extend(more);
        }
        job
    };
    for command in ["blockdev-backup", "blockdev-mirror"] {
        for (more, text) in [
            (
                json!({"sync": "none", "x-manifest": "sums"}),
                "x-manifest needs a copy that is whole: sync mode 'none' never is",
            ),
            (
                json!({"x-onto-manifest": "sums"}),
                "x-onto-manifest is for the manifest that x-manifest names",
            ),
            (
                json!({"sync": "top", "x-manifest": "sums", "x-onto-manifest": "before"}),
                "x-onto-manifest needs a bitmap that says what has changed since: sync mode \
                 'incremental' or 'bitmap'",
            ),
        ] {
            assert_eq!(client.refusal(command, job(more)), text, "{command}");
        }
    }
    let refused = client.refusal(
        "blockdev-backup",
        job(json!({"sync": "none", "x-verify": true})),
    );
    assert_eq!(
        refused,
        "x-verify needs a copy that is whole: sync mode 'none' never is"
    );
    let small = job(json!({"granularity": 4096, "x-verify": true}));
    let refused = client.refusal("blockdev-mirror", small);
    assert!(refused.contains("has to be at least 65536"), "{refused}");

    for (command, name) in [("blockdev-backup", "one"), ("blockdev-mirror", "two")] {
        let path = daemon.path(name);
        let more = json!({"x-manifest": path.display().to_string(), "x-verify": true,
            "auto-finalize": false});
        client.run(command, job(more));
        if command == "blockdev-mirror" {
            client.wait_for("j", "ready");
            client.run("job-complete", json!({"id": "j"}));
        }
        client.wait_for("j", "pending");
        assert!(!path.exists(), "not before the job is final");
        client.run("job-finalize", json!({"id": "j"}));
        client.wait_for("j", "null");
        assert!(path.exists(), "before the job is gone");
        if command == "blockdev-backup" {
            // Nothing is written over it.
            let again = json!({"x-manifest": path.display().to_string(), "auto-dismiss": false});
            client.run("blockdev-backup", job(again));
            client.wait_for("j", "concluded");
            let jobs = client.run("query-jobs", json!({}));
            let error = jobs[0]["error"].as_str().expect("it failed").to_owned();
            let words = format!("Could not write manifest '{}': File exists", path.display());
            assert_eq!(error, words);
            client.run("job-dismiss", json!({"id": "j"}));
            // A cancelled one leaves none.
            let path = daemon.path("none");
            let more = json!({"x-manifest": path.display().to_string(), "auto-finalize": false});
            client.run("blockdev-backup", job(more));
            client.wait_for("j", "pending");
            client.run("job-cancel", json!({"id": "j"}));
            client.wait_for("j", "null");
            assert!(!path.exists());
        }
    }
    for name in ["a", "b"] {
        // A mirror that has completed let its users go over; nobody uses either.
        client.run("blockdev-del", json!({"node-name": name}));
    }
    let read = |name| fs::read(daemon.path(name)).expect("a manifest");
    assert!(read("one") == read("two"), "the same content");
    for image in ["a.img", "b.img"] {
        let path = |name| daemon.path(name).display().to_string();
        let verified = tools::run(&folder, &["verify", &path(image), &path("one")], "");
        assert_eq!(verified.code, Some(0), "{}", verified.errors);
    }
    let left = fs::read_dir(&folder).expect("a folder").filter(|entry| {
        let name = entry.as_ref().expect("an entry").file_name();
        name.to_string_lossy().contains("partial")
    });
    assert_eq!(left.count(), 0);
    daemon.assert_no_bug();
}
