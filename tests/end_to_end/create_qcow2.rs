//! Creation of qcow2 images: refusals beside the reference daemon, images beside qemu-img's, and what the reference daemon
//! does not do: pause, cancel, clear what was there.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::client::Client;
use crate::daemon::Daemon;
use crate::oracle::{compare, data_file};
use crate::tools;

const MIB: u64 = 1 << 20;

fn empty_files(folder: &Path, names: &[&str]) {
    for name in names {
        fs::write(folder.join(name), "").expect("written");
    }
}

/// A script that tries to make an image of each of these options and shows what became of it.
fn refusals(nodes: &str, options: &[Value]) -> String {
    let mut script = nodes.to_owned();
    for (number, more) in options.iter().enumerate() {
        let mut options = json!({"driver": "qcow2", "file": "f", "size": MIB});
        for (name, value) in more.as_object().expect("options") {
            options[name] = value.clone();
        }
        let id = format!("j{number}");
        let arguments = json!({"job-id": id, "options": options});
        script += &json!({"execute": "blockdev-create", "arguments": arguments}).to_string();
        script += &format!("\nwait {id} concluded\n");
        script += "{\"execute\": \"query-jobs\"}\n";
        script += &json!({"execute": "job-dismiss", "arguments": {"id": id}}).to_string();
        script += "\n";
    }
    script
}

const NODES: &str = r#"
{"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "f", "filename": "f.img"}}
{"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "d", "filename": "d.img"}}
{"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "r", "filename": "r.img", "read-only": true}}
"#;

#[test]
fn refusals_are_those_of_the_reference_daemon() {
    let long_name = "z".repeat(1024);
    let name_for_large_clusters = "z".repeat(900);
    let gone = json!({"driver": "file", "filename": "gone.img"});
    let options = [
        json!({"size": 513}),
        json!({"size": -1}),
        json!({"size": 1_u64 << 63}),
        json!({"size": (1_u64 << 63) - 512}),
        json!({"size": 1_u64 << 62}),
        json!({"size": (128_u64 << 30) + 512, "cluster-size": 512}),
        json!({"cluster-size": 0}),
        json!({"cluster-size": 256}),
        json!({"cluster-size": 513}),
        json!({"cluster-size": 4 << 20}),
        json!({"refcount-bits": 3}),
        json!({"refcount-bits": 0}),
        json!({"refcount-bits": -1}),
        json!({"refcount-bits": 128}),
        json!({"version": "v2", "refcount-bits": 8}),
        json!({"version": "v2", "lazy-refcounts": true}),
        json!({"version": "v2", "extended-l2": true}),
        json!({"version": "v2", "data-file": "d"}),
        json!({"version": "v2", "compression-type": "zstd"}),
        json!({"extended-l2": true, "cluster-size": 8192}),
        json!({"backing-file": "b", "preallocation": "metadata"}),
        json!({"backing-fmt": "raw"}),
        json!({"data-file-raw": true}),
        json!({"data-file-raw": true, "data-file": "d", "backing-file": "b"}),
        json!({"backing-file": long_name}),
        json!({"backing-file": long_name, "backing-fmt": "vmdk"}),
        json!({"backing-file": name_for_large_clusters, "cluster-size": 512}),
        json!({"file": "n"}),
        json!({"file": gone}),
        json!({"file": "r"}),
        json!({"file": {"driver": "file", "filename": "r.img", "read-only": true}}),
        json!({"data-file": "n"}),
        json!({"data-file": gone}),
        json!({"data-file": "r"}),
        json!({"encrypt": {"format": "luks"}}),
        // Of two reasons the same one is told.
        json!({"size": 513, "file": "n"}),
        json!({"size": 513, "file": "r"}),
        json!({"size": 513, "cluster-size": 1}),
        json!({"cluster-size": 1, "version": "v2", "extended-l2": true}),
        json!({"extended-l2": true, "cluster-size": 4096, "backing-fmt": "raw"}),
        json!({"backing-fmt": "raw", "version": "v2", "lazy-refcounts": true}),
        json!({"version": "v2", "lazy-refcounts": true, "refcount-bits": 3}),
        json!({"refcount-bits": 3, "data-file-raw": true}),
        json!({"data-file-raw": true, "version": "v2", "data-file": "n"}),
        json!({"data-file": "n", "file": "r"}),
        json!({"data-file": "r", "size": 1_u64 << 62}),
        json!({"size": 1_u64 << 62, "backing-file": long_name}),
        json!({"backing-file": long_name, "encrypt": {"format": "luks"}}),
    ];
    compare(&refusals(NODES, &options), |folder| {
        empty_files(folder, &["f.img", "d.img", "r.img"]);
    });
}

#[test]
fn arguments_are_checked_as_by_the_reference_daemon() {
    let mut script = String::new();
    for options in [
        json!({"driver": "qcow2"}),
        json!({"driver": "qcow2", "size": 1}),
        json!({"driver": "qcow2", "file": "f"}),
        json!({"driver": "qcow2", "file": "f", "size": "1"}),
        json!({"driver": "qcow2", "file": "f", "size": 1, "x": 1}),
        json!({"driver": "qcow2", "file": "f", "size": 1, "version": "v4"}),
        json!({"driver": "qcow2", "file": "f", "size": 1, "backing-fmt": "foo"}),
        json!({"driver": "qcow2", "file": "f", "size": 1, "compression-type": "lzo"}),
        json!({"driver": "qcow2", "file": "f", "size": 1, "preallocation": "some"}),
        json!({"driver": "qcow2", "file": "f", "size": 1, "cluster-size": "64k"}),
        json!({"driver": "qcow2", "file": "f", "size": 1, "refcount-bits": true}),
        json!({"driver": "qcow2", "file": "f", "size": 1, "data-file-raw": 1}),
        json!({"driver": "qcow2", "file": "f", "size": 1, "encrypt": {}}),
        json!({"driver": "qcow2", "file": "f", "size": 1, "encrypt": {"format": "foo"}}),
        json!({"driver": "qcow2", "file": "f", "size": 1, "encrypt": {"format": "luks", "hash-alg": "foo"}}),
        json!({"driver": "qcow2", "file": {"driver": "file"}, "size": 1}),
    ] {
        let arguments = json!({"job-id": "j", "options": options});
        script += &json!({"execute": "blockdev-create", "arguments": arguments}).to_string();
        script += "\n";
    }
    script += r#"{"execute": "blockdev-create", "arguments": {"options": {"driver": "qcow2", "file": "f", "size": 1}}}"#;
    compare(&script, |_| {});
}

/// One way to give one option: as we take it, and as qemu-img does.
#[derive(Clone)]
struct Choice {
    name: &'static str,
    ours: Value,
    theirs: &'static str,
}

fn choice(name: &'static str, ours: Value, theirs: &'static str) -> Choice {
    Choice { name, ours, theirs }
}

/// Every option, in every way that changes something.
fn choices() -> Vec<Choice> {
    vec![
        choice("size", json!(0), "0"),
        choice("size", json!(5 * MIB + 512), "5243392"),
        choice("version", json!("v2"), "compat=0.10"),
        choice("cluster-size", json!(512), "cluster_size=512"),
        choice("cluster-size", json!(16_384), "cluster_size=16384"),
        choice("cluster-size", json!(2 * MIB), "cluster_size=2M"),
        choice("refcount-bits", json!(1), "refcount_bits=1"),
        choice("refcount-bits", json!(64), "refcount_bits=64"),
        choice("lazy-refcounts", json!(true), "lazy_refcounts=on"),
        choice("extended-l2", json!(true), "extended_l2=on"),
        choice("compression-type", json!("zstd"), "compression_type=zstd"),
        choice("preallocation", json!("metadata"), "preallocation=metadata"),
        choice("preallocation", json!("falloc"), "preallocation=falloc"),
        choice("preallocation", json!("full"), "preallocation=full"),
        choice(
            "backing-file",
            json!("base"),
            "backing_file=base,backing_fmt=raw",
        ),
        choice("data-file", json!("d"), "data_file=d.img"),
        choice(
            "data-file-raw",
            json!(true),
            "data_file=d.img,data_file_raw=on",
        ),
    ]
}

/// What qemu-img says of the image, without what depends on the file system; with the extents it maps.
fn seen(folder: &Path, map: bool) -> String {
    let run = |arguments: &[&str]| {
        let output = Command::new("qemu-img")
            .args(arguments)
            .current_dir(folder)
            .output()
            .expect("qemu-img runs");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            text(output.stderr)
        );
        text(output.stdout)
    };
    let check = run(&["check", "-f", "qcow2", "f.img"]);
    assert!(
        check.starts_with("No errors were found on the image."),
        "{check}"
    );
    let info = run(&["info", "--output=json", "-f", "qcow2", "f.img"]);
    let info = info
        .lines()
        .filter(|line| !line.contains("\"actual-size\""));
    let mut seen = info.collect::<Vec<_>>().join("\n");
    for name in ["f.img", "d.img"] {
        if let Ok(file) = fs::metadata(folder.join(name)) {
            seen += &format!("\n{name}: {} bytes", file.len());
        }
    }
    if map {
        let extents = run(&["map", "--output=json", "-f", "qcow2", "f.img"]);
        let extents: Value = serde_json::from_str(&extents).expect("JSON");
        seen += &merged(&extents);
    }
    seen
}

/// Extents without their places in the file and whether that has a hole there, neighbours of one kind as one.
fn merged(extents: &Value) -> String {
    let mut list: Vec<(u64, Value)> = Vec::new();
    for extent in extents.as_array().expect("a list") {
        let mut kind = extent.clone();
        let length = extent["length"].as_u64().expect("a length");
        let members = kind.as_object_mut().expect("an object");
        let present = members["present"] == true;
        members.retain(|name, _| match name.as_str() {
            "start" | "length" | "offset" => false,
            "zero" | "data" => !present,
            _ => true,
        });
        match list.last_mut() {
            Some((before, last)) if *last == kind => *before += length,
            _ => list.push((length, kind)),
        }
    }
    format!("\n{list:?}")
}

/// Makes an image by our daemon and by qemu-img, and compares.
struct Pair<'a> {
    daemon: &'a Daemon,
    client: Client,
    ours: &'a Path,
    theirs: &'a Path,
}

impl Pair<'_> {
    fn compare(&mut self, choices: &[&Choice]) {
        let what: Vec<_> = choices.iter().map(|choice| choice.theirs).collect();
        let made = self.theirs_makes(choices);
        let has_data_file = choices
            .iter()
            .any(|choice| choice.name.starts_with("data-"));
        let error = self.ours_makes(choices, has_data_file);
        if !made {
            assert!(error.is_some(), "{what:?}: qemu-img refuses");
            return;
        }
        assert_eq!(error, None, "{what:?}");
        let is = |name: &str, value: Value| {
            let mut all = choices.iter();
            all.any(|choice| choice.name == name && choice.ours == value)
        };
        let reserves = is("preallocation", json!("falloc")) || is("preallocation", json!("full"));
        // An empty disk has nothing to reserve, and nothing is left over here; subclusters of a raw data file are in use,
        // as the file is the disk.
        if reserves && is("size", json!(0)) {
            return;
        }
        let map = !(is("extended-l2", json!(true)) && is("data-file-raw", json!(true)));
        assert_eq!(seen(self.ours, map), seen(self.theirs, map), "{what:?}");
    }

    fn theirs_makes(&self, choices: &[&Choice]) -> bool {
        for name in ["f.img", "d.img"] {
            let _ = fs::remove_file(self.theirs.join(name));
        }
        let mut size = "1M";
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2"]);
        for choice in choices {
            match choice.name {
                "size" => size = choice.theirs,
                _ => {
                    command.args(["-o", choice.theirs]);
                }
            }
        }
        let output = command
            .args(["f.img", size])
            .current_dir(self.theirs)
            .output();
        output.expect("qemu-img runs").status.success()
    }

    /// The error, if there was one.
    fn ours_makes(&mut self, choices: &[&Choice], has_data_file: bool) -> Option<Value> {
        let mut options = json!({"driver": "qcow2", "size": MIB});
        for choice in choices {
            options[choice.name] = choice.ours.clone();
            if choice.name == "backing-file" {
                options["backing-fmt"] = json!("raw");
            }
        }
        let _ = fs::remove_file(self.ours.join("d.img"));
        empty_files(self.ours, &["f.img"]);
        options["file"] = json!({"driver": "file", "filename": "f.img"});
        if has_data_file {
            empty_files(self.ours, &["d.img"]);
            options["data-file"] = json!({"driver": "file", "filename": "d.img"});
        }
        let job = create(&mut self.client, &options);
        assert_eq!(job["current-progress"], job["total-progress"]);
        let nodes = self.client.run("query-named-block-nodes", json!({}));
        assert_eq!(nodes, json!([]), "what was opened for it went with it");
        assert_eq!(self.daemon.path(""), self.ours.join(""));
        job.get("error").cloned()
    }
}

/// Runs a job to its end and dismisses it; how `query-jobs` showed it in between.
fn create(client: &mut Client, options: &Value) -> Value {
    client.run(
        "blockdev-create",
        json!({"job-id": "c", "options": options}),
    );
    client.wait_for("c", "concluded");
    let jobs = client.run("query-jobs", json!({}));
    client.run("job-dismiss", json!({"id": "c"}));
    jobs[0].clone()
}

#[test]
fn every_pair_of_options_gives_the_image_of_qemu_img() {
    if !tools::have("qemu-img", "qemu-utils") {
        return;
    }
    let daemon = Daemon::start();
    let ours = daemon.path("");
    let theirs = tempfile::tempdir().expect("a folder");
    for folder in [ours.as_path(), theirs.path()] {
        data_file(&folder.join("base"), 1 << 16);
    }
    let mut pair = Pair {
        client: daemon.client(),
        daemon: &daemon,
        ours: &ours,
        theirs: theirs.path(),
    };
    let choices = choices();
    pair.compare(&[]);
    for (index, first) in choices.iter().enumerate() {
        pair.compare(&[first]);
        for second in &choices[index + 1..] {
            if first.name != second.name {
                pair.compare(&[first, second]);
            }
        }
    }
    let named = |theirs: &str| choices.iter().find(|choice| choice.theirs == theirs);
    let several = [
        "extended_l2=on",
        "preallocation=metadata",
        "backing_file=base,backing_fmt=raw",
    ];
    let several: Vec<_> = several.into_iter().filter_map(named).collect();
    pair.compare(&several);
    daemon.quit();
}

fn qemu(program: &str, folder: &Path, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(folder)
        .output()
        .expect("it runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{arguments:?}: {text}");
    text
}

#[test]
fn a_new_file_becomes_an_image_that_others_use() {
    if !tools::have("qemu-img", "qemu-utils") {
        return;
    }
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let file = json!({"driver": "file", "filename": "new.img", "size": 0});
    assert_eq!(create(&mut client, &file).get("error"), None);
    let node = json!({"driver": "file", "node-name": "f", "filename": "new.img"});
    client.run("blockdev-add", node);
    for (size, preallocation) in [(64 * MIB, "off"), (8 * MIB, "full"), (3 * MIB, "metadata")] {
        let options =
            json!({"driver": "qcow2", "file": "f", "size": size, "preallocation": preallocation});
        assert_eq!(create(&mut client, &options).get("error"), None);
        let folder = daemon.path("");
        // What an image held that was there before does not show.
        let size = size.to_string();
        let read = format!("read -P 0 0 {size}");
        for commands in [
            &["-c", &read, "-c", "write -P 7 1M 70000"][..],
            &["-c", "read -P 7 1M 70000"],
        ] {
            let arguments = [&["-f", "qcow2", "new.img"], commands].concat();
            let said = qemu("qemu-io", &folder, &arguments);
            assert!(!said.contains("failed"), "{said}");
        }
        let checked = qemu("qemu-img", &folder, &["check", "-f", "qcow2", "new.img"]);
        assert!(
            checked.starts_with("No errors were found on the image."),
            "{checked}"
        );
        let info = qemu(
            "qemu-img",
            &folder,
            &["info", "-f", "qcow2", "--output=json", "new.img"],
        );
        let info: Value = serde_json::from_str(&info).expect("JSON");
        assert_eq!(info["virtual-size"].to_string(), size);
    }
    daemon.quit();
}

#[test]
fn cancelled_while_it_writes_zeroes_it_leaves_the_file_as_it_was() {
    let daemon = Daemon::start();
    data_file(&daemon.path("f.img"), 10_000);
    empty_files(&daemon.path(""), &["d.img"]);
    let mut client = daemon.client();
    for (name, file) in [("f", "f.img"), ("d", "d.img")] {
        let node = json!({"driver": "file", "node-name": name, "filename": file});
        client.run("blockdev-add", node);
    }
    for data_file in [false, true] {
        // Long enough to be paused in between.
        let mut options =
            json!({"driver": "qcow2", "file": "f", "size": 8192 * MIB, "preallocation": "full"});
        if data_file {
            options["data-file"] = json!("d");
        }
        client.run(
            "blockdev-create",
            json!({"job-id": "c", "options": options}),
        );
        client.run("job-pause", json!({"id": "c"}));
        client.wait_for("c", "paused");
        let job = client.run("query-jobs", json!({}))[0].clone();
        assert!(job["total-progress"].as_u64() > Some(8192 * MIB), "{job}");
        client.run("job-cancel", json!({"id": "c"}));
        client.wait_for("c", "concluded");
        client.run("job-dismiss", json!({"id": "c"}));
        let image = fs::read(daemon.path("f.img")).expect("read");
        assert_eq!(image.len(), 10_000);
        assert!(!image.starts_with(b"QFI\xfb"));
        let data = fs::metadata(daemon.path("d.img")).expect("there");
        assert_eq!(data.len(), 0);
    }
    daemon.quit();
}

#[test]
fn nodes_in_use_are_told_by_the_job_and_kept_from_others() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    empty_files(&daemon.path(""), &["f.img", "d.img"]);
    for (name, file) in [("f", "f.img"), ("d", "d.img")] {
        let node = json!({"driver": "file", "node-name": name, "filename": file});
        client.run("blockdev-add", node);
    }
    let same = json!({"driver": "qcow2", "file": "f", "data-file": "f", "size": MIB});
    assert_eq!(
        create(&mut client, &same)["error"],
        "Permission conflict on node 'f': permissions 'resize' are both required by create job 'c' (uses node 'f' as 'file' child) and unshared by create job 'c' (uses node 'f' as 'data-file' child)."
    );
    let long = json!({"driver": "qcow2", "file": "f", "data-file": "d", "size": 8192 * MIB, "preallocation": "full"});
    // The job has its nodes when it is answered for: the next command, in the same breath, finds them in use.
    let long =
        json!({"execute": "blockdev-create", "arguments": {"job-id": "long", "options": long}});
    let delete = json!({"execute": "blockdev-del", "arguments": {"node-name": "f"}});
    client.send(format!("{long}\n{delete}\n").as_bytes());
    assert_eq!(client.reply(), json!({"return": {}}));
    assert_eq!(client.reply()["error"]["desc"], "Node f is in use");
    client.run("job-pause", json!({"id": "long"}));
    client.wait_for("long", "paused");
    for (node, text) in [
        (
            "f",
            "Permission conflict on node 'f': permissions 'write, resize' are both required by an unnamed block device (uses node 'f' as 'root' child) and unshared by create job 'long' (uses node 'f' as 'file' child).",
        ),
        (
            "d",
            "Permission conflict on node 'd': permissions 'resize' are both required by an unnamed block device (uses node 'd' as 'root' child) and unshared by create job 'long' (uses node 'd' as 'data-file' child).",
        ),
    ] {
        let options = json!({"driver": "qcow2", "file": node, "size": MIB});
        client.run(
            "blockdev-create",
            json!({"job-id": "c", "options": options}),
        );
        client.wait_for("c", "concluded");
        let jobs = client.run("query-jobs", json!({}));
        let job = jobs
            .as_array()
            .expect("a list")
            .iter()
            .find(|job| job["id"] == "c");
        assert_eq!(job.expect("listed")["error"], text);
        client.run("job-dismiss", json!({"id": "c"}));
        assert_eq!(
            client.refusal("blockdev-del", json!({"node-name": node})),
            format!("Node {node} is in use")
        );
        let busy = format!("Node '{node}' is busy: block device is in use by block job: create");
        let resize = json!({"node-name": node, "size": 512});
        assert_eq!(client.refusal("block_resize", resize), busy);
    }
    client.run("job-cancel", json!({"id": "long"}));
    client.wait_for("long", "concluded");
    daemon.quit();
}

#[test]
fn a_longer_file_stays_so_long_and_a_data_file_keeps_its_content() {
    if !tools::have("qemu-img", "qemu-utils") {
        return;
    }
    let daemon = Daemon::start();
    let folder = daemon.path("");
    data_file(&daemon.path("f.img"), 3 * MIB);
    let mut client = daemon.client();
    let file = |name: &str| json!({"driver": "file", "filename": name});
    for preallocation in ["off", "metadata", "falloc", "full"] {
        data_file(&daemon.path("d.img"), 2 * MIB);
        let held = fs::read(daemon.path("d.img")).expect("read");
        let mut options = json!({"driver": "qcow2", "file": file("f.img"), "size": MIB, "preallocation": preallocation});
        assert_eq!(create(&mut client, &options).get("error"), None);
        assert_eq!(
            fs::metadata(daemon.path("f.img")).expect("there").len(),
            3 * MIB
        );
        let said = qemu(
            "qemu-io",
            &folder,
            &["-r", "-f", "qcow2", "-c", "read -P 0 0 1M", "f.img"],
        );
        assert!(!said.contains("failed"), "{said}");
        qemu("qemu-img", &folder, &["check", "-f", "qcow2", "f.img"]);
        // As raw data it is the disk, with subclusters and without.
        options["data-file"] = file("d.img");
        options["data-file-raw"] = json!(true);
        options["extended-l2"] = json!(preallocation == "off");
        assert_eq!(create(&mut client, &options).get("error"), None);
        assert!(fs::read(daemon.path("d.img")).expect("read") == held);
        fs::write(daemon.path("first"), &held[..MIB as usize]).expect("written");
        let image =
            "driver=qcow2,file.filename=f.img,data-file.driver=file,data-file.filename=d.img";
        let raw = "driver=raw,file.filename=first";
        qemu(
            "qemu-img",
            &folder,
            &["compare", "--image-opts", image, raw],
        );
    }
    daemon.quit();
}

#[test]
fn geometries_at_their_limits_are_sound() {
    if !tools::have("qemu-img", "qemu-utils") {
        return;
    }
    let daemon = Daemon::start();
    let folder = daemon.path("");
    let mut client = daemon.client();
    for (cluster_bytes, refcount_bits, size, preallocation) in [
        // L1 tables of 32 MiB.
        (512, 16, 128 << 30, "off"),
        (2 * MIB, 16, 1 << 61, "off"),
        (65_536, 64, 1 << 51, "off"),
        // Refcount tables of several clusters.
        (512, 64, 64 * MIB, "metadata"),
        (512, 1, 1024 * MIB, "metadata"),
        (4096, 64, 2048 * MIB, "metadata"),
    ] {
        empty_files(&folder, &["f.img"]);
        let options = json!({
            "driver": "qcow2", "file": {"driver": "file", "filename": "f.img"}, "size": size,
            "cluster-size": cluster_bytes, "refcount-bits": refcount_bits,
            "preallocation": preallocation,
        });
        assert_eq!(create(&mut client, &options).get("error"), None);
        let checked = qemu("qemu-img", &folder, &["check", "-f", "qcow2", "f.img"]);
        assert!(
            checked.starts_with("No errors were found on the image."),
            "{checked}"
        );
        let info = ["info", "-f", "qcow2", "--output=json", "f.img"];
        let info: Value = serde_json::from_str(&qemu("qemu-img", &folder, &info)).expect("JSON");
        assert_eq!(info["virtual-size"], json!(size));
    }
    daemon.quit();
}
