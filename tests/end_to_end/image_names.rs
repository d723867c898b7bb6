//! Names that stand in images: which are followed, and that what they must not lead to is not even opened.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use rustix::fs::{CWD, Mode, mkfifoat};
use serde_json::{Value, json};

use crate::client::Client;
use crate::daemon::Daemon;
use crate::images::{Names, image, image_with};
use crate::oracle::{data_file, hole_file};
use crate::tools;

/// How to go on, as every refusal of a backing file says.
const ADVICE: &str = "and is not followed; open it by a command of its own and give its node as 'backing', or give null";

fn node(file: &str) -> Value {
    json!({"driver": "qcow2", "node-name": "t", "file": {"driver": "file", "filename": file}})
}

fn backing<'a>(name: &'a str, format: Option<&'a str>) -> Names<'a> {
    Names {
        backing: Some(name),
        format,
        data_file: None,
    }
}

/// What a file was when a test began: whoever opens and reads it leaves a trace.
struct Canary {
    path: std::path::PathBuf,
    before: (Vec<u8>, i64, i64),
}

impl Canary {
    fn in_folder(folder: &Path, name: &str) -> Self {
        let path = folder.join(name);
        hole_file(&path, 4 << 20);
        // Reading moves this time only if it is older than the last change.
        let past = rustix::fs::Timespec {
            tv_sec: 1,
            tv_nsec: 0,
        };
        let times = rustix::fs::Timestamps {
            last_access: past,
            last_modification: past,
        };
        rustix::fs::utimensat(CWD, &path, &times, rustix::fs::AtFlags::empty()).expect("set");
        let before = Self::look(&path);
        Self { path, before }
    }

    fn look(path: &Path) -> (Vec<u8>, i64, i64) {
        let facts = fs::metadata(path).expect("it is there");
        (Vec::new(), facts.atime(), facts.mtime())
    }

    fn is_untouched(&self) {
        assert_eq!(Self::look(&self.path), self.before, "somebody touched it");
        let bytes = fs::read(&self.path).expect("read");
        assert!(bytes.iter().all(|byte| *byte == 0));
    }
}

fn refusal(client: &mut Client, file: &str) -> String {
    let text = client.refusal("blockdev-add", node(file));
    assert_eq!(client.run("query-named-block-nodes", json!({})), json!([]));
    text
}

fn opens(client: &mut Client, file: &str) {
    client.run("blockdev-add", node(file));
    client.run("blockdev-del", json!({"node-name": "t"}));
}

fn have_tools() -> bool {
    tools::have("qemu-img", "qemu-utils")
}

#[test]
fn names_of_anything_but_files_are_refused_and_lead_nowhere() {
    if !have_tools() {
        return;
    }
    let daemon = Daemon::start();
    let folder = daemon.folder.path();
    let canary = Canary::in_folder(folder, "canary");
    let canary_path = canary.path.display().to_string();
    let json_name = format!(
        "json:{}",
        json!({"driver": "raw", "size": 512, "file": {"driver": "file", "filename": canary_path}})
    );
    let unlocked = format!(
        "json:{}",
        json!({"driver": "raw", "file": {"driver": "file", "filename": canary_path, "locking": "off"}})
    );
    let server = r#"json:{"driver": "raw", "file": {"driver": "nbd", "server": {"type": "unix", "path": "qmp.sock"}}}"#;
    let mut client = daemon.client();
    for (name, why) in [
        (json_name.as_str(), "asks for more than images in files"),
        (&unlocked, "asks for more than images in files"),
        (server, "asks for more than images in files"),
        (
            r#"json:{"driver": "raw", "file": "node"}"#,
            "asks for more than images in files",
        ),
        (
            "json:{",
            "is not understood (JSON parse error, premature EOI)",
        ),
        ("json:{}", "is not understood (Parameter 'file' is missing)"),
        ("nbd:localhost:1", "is not the name of a file"),
        ("nbd+unix:///x?socket=qmp.sock", "is not the name of a file"),
        ("http://localhost/x", "is not the name of a file"),
        ("file:canary", "is not the name of a file"),
        ("/proc/self/environ", "belongs to a process or the kernel"),
        ("/proc/self/fd/0", "belongs to a process or the kernel"),
        ("/dev/fd/0", "belongs to a process or the kernel"),
        ("/dev/fdset/1", "belongs to a process or the kernel"),
        (
            "/sys/kernel/uevent_seqnum",
            "belongs to a process or the kernel",
        ),
    ] {
        image_with(folder, "i.qcow2", backing(name, Some("raw")));
        assert_eq!(
            refusal(&mut client, "i.qcow2"),
            format!(
                "Could not open backing file: '{name}' in the header of 'i.qcow2' {why} {ADVICE}"
            )
        );
    }
    image_with(folder, "i.qcow2", backing("canary", None));
    assert_eq!(
        refusal(&mut client, "i.qcow2"),
        format!(
            "Could not open backing file: 'canary' in the header of 'i.qcow2' is there without its format {ADVICE}"
        )
    );
    // A way through a link is seen too.
    symlink("/proc/self/environ", folder.join("link")).expect("linked");
    image_with(folder, "i.qcow2", backing("link", Some("raw")));
    assert_eq!(
        refusal(&mut client, "i.qcow2"),
        "Could not open backing file: Could not open 'link': an image names it, and it belongs to \
         a process or the kernel"
    );
    let described =
        r#"json:{"driver": "raw", "file": {"driver": "file", "filename": "/proc/self/environ"}}"#;
    image_with(folder, "i.qcow2", backing(described, Some("raw")));
    assert_eq!(
        refusal(&mut client, "i.qcow2"),
        "Could not open backing file: Could not open '/proc/self/environ': an image names it, and it \
         belongs to a process or the kernel"
    );
    // The client may name all that.
    let own = json!({"driver": "raw", "file": {"driver": "file", "filename": canary_path}});
    let mut named = node("i.qcow2");
    named["backing"] = own;
    client.run("blockdev-add", named);
    client.run("blockdev-del", json!({"node-name": "t"}));
    let mut without = node("i.qcow2");
    without["backing"] = Value::Null;
    client.run("blockdev-add", without);
    canary.is_untouched();
    daemon.quit();
}

/// A raw disk that its guest has made look like an image is a raw disk.
#[test]
fn raw_is_raw_whatever_it_looks_like() {
    if !have_tools() {
        return;
    }
    let daemon = Daemon::start();
    let folder = daemon.folder.path();
    let canary = Canary::in_folder(folder, "canary");
    image_with(folder, "guest.raw", backing("canary", Some("raw")));
    image_with(folder, "top.qcow2", backing("guest.raw", Some("raw")));
    let mut client = daemon.client();
    client.run("blockdev-add", node("top.qcow2"));
    let nodes = client.run("query-named-block-nodes", json!({"flat": true}));
    let files: Vec<&Value> = nodes
        .as_array()
        .expect("a list")
        .iter()
        .map(|node| &node["drv"])
        .collect();
    assert_eq!(files, ["raw", "file", "qcow2", "file"]);
    canary.is_untouched();
    daemon.quit();
}

#[test]
fn what_is_no_file_blocks_nobody() {
    if !have_tools() {
        return;
    }
    let daemon = Daemon::start();
    let folder = daemon.folder.path();
    mkfifoat(CWD, folder.join("fifo"), Mode::from_raw_mode(0o600)).expect("made");
    let mut client = daemon.client();
    for (name, shown) in [
        ("fifo", "fifo"),
        ("/dev/zero", "/dev/zero"),
        ("qmp.sock", "qmp.sock"),
    ] {
        image_with(folder, "i.qcow2", backing(name, Some("raw")));
        assert_eq!(
            refusal(&mut client, "i.qcow2"),
            format!(
                "Could not open backing file: 'file' driver requires '{shown}' to be a regular file"
            )
        );
    }
    // The image itself, named by the client.
    assert_eq!(
        refusal(&mut client, "fifo"),
        "'file' driver requires 'fifo' to be a regular file"
    );
    let outside = Names {
        data_file: Some("fifo"),
        ..Names::default()
    };
    image_with(folder, "o.qcow2", outside);
    assert_eq!(
        refusal(&mut client, "o.qcow2"),
        "'file' driver requires 'fifo' to be a regular file"
    );
    daemon.quit();
}

#[test]
fn a_data_file_lies_beside_its_image() {
    if !have_tools() {
        return;
    }
    let daemon = Daemon::start();
    let folder = daemon.folder.path();
    fs::create_dir(folder.join("sub")).expect("made");
    let canary = Canary::in_folder(folder, "sub/canary");
    let absolute = folder.join("sub/canary").display().to_string();
    symlink("sub/canary", folder.join("link")).expect("linked");
    data_file(&folder.join("d.raw"), 4 << 20);
    let beside = folder.join("d.raw").display().to_string();
    let mut client = daemon.client();
    let make = |name: &str| {
        let names = Names {
            data_file: Some(name),
            ..Names::default()
        };
        image_with(folder, "o.qcow2", names);
    };
    for name in [
        "sub/canary",
        "../x/canary",
        &absolute,
        "link",
        "json:{\"driver\": \"file\", \"filename\": \"d.raw\"}",
        "nbd:localhost:1",
        "/proc/self/environ",
    ] {
        make(name);
        let text = refusal(&mut client, "o.qcow2");
        if name == "../x/canary" {
            assert_eq!(
                text,
                "Could not open '../x/canary': No such file or directory"
            );
            continue;
        }
        assert_eq!(
            text,
            format!(
                "'data-file' is required for this image: '{name}' in its header is not followed, \
                 as it is not a file beside it"
            )
        );
    }
    for name in ["d.raw", "./d.raw", "sub/../d.raw", &beside] {
        make(name);
        opens(&mut client, "o.qcow2");
    }
    // A client names whatever it wants.
    make("sub/canary");
    let mut named = node("o.qcow2");
    named["data-file"] = json!({"driver": "file", "filename": "d.raw"});
    client.run("blockdev-add", named);
    canary.is_untouched();
    daemon.quit();
}

#[test]
fn files_lie_below_the_roots_that_the_daemon_was_given() {
    if !have_tools() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name);
    for name in ["in", "in/deep", "in-not", "out"] {
        fs::create_dir(at(name)).expect("made");
    }
    let canary = Canary::in_folder(folder.path(), "out/canary");
    for name in ["in/file", "in/deep/file", "in-not/file"] {
        hole_file(&at(name), 4 << 20);
    }
    symlink("../out/canary", at("in/link")).expect("linked");
    symlink("in", at("way-in")).expect("linked");
    let daemon = Daemon::start_in(
        folder,
        &["--image-root", "way-in", "--image-root", "in/deep"],
    );
    let folder = daemon.folder.path();
    let mut client = daemon.client();
    for (name, inside) in [
        ("file", true),
        ("deep/file", true),
        ("../way-in/file", true),
        ("../out/canary", false),
        ("link", false),
        ("../in-not/file", false),
    ] {
        let file = json!({"driver": "file", "filename": format!("in/{name}")});
        let described = format!("json:{}", json!({"driver": "raw", "file": file}));
        image_with(folder, "in/i.qcow2", backing(&described, Some("raw")));
        match inside {
            true => opens(&mut client, "in/i.qcow2"),
            false => assert!(
                refusal(&mut client, "in/i.qcow2")
                    .ends_with("' is outside of where such files may be")
            ),
        }
        image_with(folder, "in/i.qcow2", backing(name, Some("raw")));
        if inside {
            opens(&mut client, "in/i.qcow2");
            continue;
        }
        let text = refusal(&mut client, "in/i.qcow2");
        let start = format!(
            "Could not open backing file: Could not open 'in/{name}': an image names it, and '"
        );
        assert!(
            text.starts_with(&start) && text.ends_with("' is outside of where such files may be"),
            "{text}"
        );
    }
    // What the client names itself may be anywhere.
    image(folder, "out/i.qcow2", &[]);
    opens(&mut client, "out/i.qcow2");
    canary.is_untouched();
    daemon.quit();
}

#[test]
fn roots_have_to_be_there() {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("file"), "").expect("written");
    for (root, why) in [
        ("none", "No such file or directory"),
        ("file", "not a directory"),
    ] {
        let arguments = ["daemon", "--image-root", root];
        let ended = tools::run(folder.path(), &arguments, "");
        assert_eq!(ended.code, Some(1));
        assert!(
            ended
                .errors
                .ends_with(&format!("--image-root {root}: {why}\n")),
            "{}",
            ended.errors
        );
    }
}

/// Images whose names only QEMU follows, for clients that rely on it.
#[test]
fn qemus_ways_can_be_had() {
    if !have_tools() {
        return;
    }
    let daemon = Daemon::start_with(&["--image-names", "qemu"]);
    let folder = daemon.folder.path();
    image(folder, "base.qcow2", &[]);
    hole_file(&folder.join("r.raw"), 4 << 20);
    let nested = json!({"driver": "qcow2", "file": {"driver": "file", "filename": "base.qcow2"}});
    let nested = format!("json:{nested}");
    let without_driver = json!({"file": {"driver": "file", "filename": "base.qcow2"}});
    let without_driver = format!("json:{without_driver}");
    let mut client = daemon.client();
    for (name, format, driver) in [
        (nested.as_str(), None, "qcow2"),
        (&without_driver, Some("qcow2"), "qcow2"),
        ("file:base.qcow2", Some("qcow2"), "qcow2"),
        ("base.qcow2", None, "qcow2"),
        ("r.raw", None, "raw"),
    ] {
        image_with(folder, "i.qcow2", backing(name, format));
        client.run("blockdev-add", node("i.qcow2"));
        let nodes = client.run("query-named-block-nodes", json!({"flat": true}));
        assert_eq!(nodes[0]["drv"], driver, "{name}");
        assert_eq!(nodes[2]["backing_file"], nodes[0]["file"], "{name}");
        // It came of what the image names.
        assert_eq!(nodes[2]["file"], "i.qcow2");
        client.run("blockdev-del", json!({"node-name": "t"}));
    }
    for (name, text) in [
        ("foo:bar", "Unknown protocol 'foo'"),
        ("json:{", "JSON parse error, premature EOI"),
        ("json:{}", "Parameter 'driver' is missing"),
    ] {
        image_with(folder, "i.qcow2", backing(name, None));
        let text = format!("Could not open backing file: {text}");
        assert_eq!(refusal(&mut client, "i.qcow2"), text);
    }
    daemon.quit();
}

/// A chain of images that lead to each other ends, also where nobody writes and no lock stops it.
#[test]
fn a_chain_that_leads_to_itself_is_refused() {
    if !have_tools() {
        return;
    }
    let daemon = Daemon::start();
    let folder = daemon.folder.path();
    image_with(folder, "a.qcow2", backing("b.qcow2", Some("qcow2")));
    image_with(folder, "b.qcow2", backing("link.qcow2", Some("qcow2")));
    symlink("a.qcow2", folder.join("link.qcow2")).expect("linked");
    let mut client = daemon.client();
    let mut read_only = node("a.qcow2");
    read_only["read-only"] = json!(true);
    assert_eq!(
        client.refusal("blockdev-add", read_only),
        "Could not open backing file: Could not open backing file: 'link.qcow2' is a layer of its \
         own backing chain"
    );
    assert_eq!(client.run("query-named-block-nodes", json!({})), json!([]));
    daemon.quit();
}
