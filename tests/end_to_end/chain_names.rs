//! What headers call the images below them after commits and streams from another folder: who opens the chain finds it.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::chains::{on, with};
use crate::daemon::Daemon;
use crate::images::{Names, image_with, run};
use crate::made_chains::{assert_shows, assert_sound, backing, keep};
use crate::place::Place;
use crate::tools::{self, have_oracle};

/// A chain of `names` in a folder of its own, each named as its neighbour sees it, with something of its own in each.
fn chain_in(folder: &Path, names: &[&str]) {
    fs::create_dir_all(folder).expect("made");
    for (nth, name) in names.iter().enumerate() {
        // Else QEMU takes what is before a colon for a protocol.
        let name = format!("./{name}");
        let mut create = vec!["create", "-q", "-f", "qcow2"];
        let below = nth
            .checked_sub(1)
            .map(|below| format!("./{}", names[below]));
        if let Some(below) = &below {
            create.extend(["-b", below, "-F", "qcow2"]);
        }
        create.extend([name.as_str(), "1M"]);
        run(folder, "qemu-img", &create);
        let write = format!("write -P {} {}k 200k", nth + 1, nth * 100);
        run(folder, "qemu-io", &["-f", "qcow2", "-c", &write, &name]);
    }
}

#[test]
fn a_commit_from_another_folder_leaves_names_that_are_found() {
    if !have_oracle() {
        return;
    }
    for base in ["base", "at 12:30"] {
        let place = Place::new();
        chain_in(&place.path("sub"), &[base, "mid", "top"]);
        let folder = place.folder.path();
        keep(folder, "sub/top", "kept");
        let base = format!("sub/{base}");
        place.succeed(&["commit", "--top", "sub/mid", "--base", &base, "sub/top"]);
        assert_shows(folder, "sub/top", "kept", &base);
        assert_sound(folder, "sub/top", &base);
        let found = backing(folder, "sub/top").0;
        let found = found.as_str().expect("a name").trim_start_matches("./");
        assert_eq!(format!("sub/{found}"), base);
    }
}

#[test]
fn a_stream_from_another_folder_leaves_names_that_are_found() {
    if !have_oracle() {
        return;
    }
    let place = Place::new();
    chain_in(&place.path("sub"), &["base", "mid", "top"]);
    let folder = place.folder.path();
    fs::create_dir(place.path("other")).expect("made");
    let create = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "../sub/top",
        "-F",
        "qcow2",
    ];
    run(folder, "qemu-img", &[&create[..], &["other/over"]].concat());
    let whole = place.path("sub/top").display().to_string();
    let create = ["create", "-q", "-f", "qcow2", "-b", &whole, "-F", "qcow2"];
    run(
        folder,
        "qemu-img",
        &[&create[..], &["other/whole"]].concat(),
    );
    // Where the name of the base would lead from the overlay's folder if it were taken as it is given.
    chain_in(&place.path("sub/sub"), &["base"]);
    for (overlay, expected) in [
        ("other/over", "../sub/base"),
        (
            "other/whole",
            place.path("sub/base").to_str().expect("a name"),
        ),
        ("sub/top", "./base"),
    ] {
        keep(folder, overlay, "kept");
        place.succeed(&["stream", "--base", "sub/base", overlay]);
        assert_shows(folder, overlay, "kept", overlay);
        let told = backing(folder, overlay).0;
        let told = told.as_str().expect("a name");
        assert_eq!(Path::new(told), Path::new(&expected), "{overlay}");
    }
}

/// QEMU's daemon writes the name as it was given, which leads nowhere.
#[test]
fn a_daemon_elsewhere_leaves_names_that_are_found() {
    if !have_oracle() {
        return;
    }
    for job in ["block-stream", "block-commit"] {
        let daemon = Daemon::start();
        let folder = daemon.folder.path();
        chain_in(&folder.join("sub"), &["base", "mid", "top"]);
        keep(folder, "sub/top", "kept");
        let mut client = daemon.client();
        client.run(
            "blockdev-add",
            with(on("base", "sub/base"), json!({"backing": null})),
        );
        for (name, file, below) in [("mid", "sub/mid", "base"), ("top", "sub/top", "mid")] {
            client.run(
                "blockdev-add",
                with(on(name, file), json!({"backing": below})),
            );
        }
        let mut arguments = json!({"job-id": "j", "device": "top", "base-node": "base"});
        if job == "block-commit" {
            arguments["top-node"] = json!("mid");
        }
        client.run(job, arguments);
        client.wait_for("j", "null");
        let nodes = client.run("query-named-block-nodes", json!({"flat": true}));
        let mut nodes = nodes.as_array().expect("nodes").iter();
        let top = nodes.find(|node| node["node-name"] == "top");
        assert_eq!(
            top.expect("there")["file"],
            "sub/top",
            "nothing but its header tells"
        );
        for name in ["top", "mid", "base"] {
            client.run("blockdev-del", json!({"node-name": name}));
        }
        assert_eq!(backing(folder, "sub/top").0, "base", "{job}");
        assert_shows(folder, "sub/top", "kept", job);
    }
}

/// The files of a chain as `blockyard chain` shows them, which has to reach its end.
fn layers(folder: &Path, top: &str) -> Vec<String> {
    let shown = tools::run(folder, &["chain", "--json", top], "");
    assert_eq!(shown.code, Some(0), "{top}: {}", shown.errors);
    let shown: Value = serde_json::from_str(&shown.output).expect("JSON");
    let layers = shown["layers"].as_array().expect("layers").iter();
    let names = layers.map(|layer| layer["filename"].as_str().expect("a name"));
    names.map(str::to_owned).collect()
}

/// Where nodes stand on each other in another way than the headers tell, the header of a new overlay describes them.
#[test]
fn chains_that_daemons_describe_are_followed() {
    if !have_oracle() {
        return;
    }
    let oracle: fn() -> Daemon = || Daemon::start_oracle_with(&[]);
    for start in [oracle, Daemon::start] {
        let daemon = start();
        let folder = daemon.folder.path();
        chain_in(folder, &["base", "mid", "top"]);
        let mut client = daemon.client();
        client.run("blockdev-add", on("base", "base"));
        for (name, below) in [("mid", "base"), ("top", "mid")] {
            client.run(
                "blockdev-add",
                with(on(name, name), json!({"backing": below})),
            );
        }
        client.run(
            "blockdev-snapshot-sync",
            json!({"node-name": "top", "snapshot-file": "new", "snapshot-node-name": "new"}),
        );
        let folder = daemon.quit_by(client);
        let folder = folder.path();
        let name = backing(folder, "new").0;
        assert!(name.as_str().expect("a name").starts_with("json:"));
        run(
            folder,
            "qemu-io",
            &["-f", "qcow2", "-c", "write -P 9 50k 100k", "new"],
        );
        keep(folder, "new", "kept");
        assert_eq!(layers(folder, "new"), ["new", "top", "mid", "base"]);
        let map = ["map", "-f", "qcow2", "new"];
        let mut theirs = Command::new("qemu-img");
        let theirs = theirs
            .args(map)
            .current_dir(folder)
            .output()
            .expect("it runs")
            .stdout;
        let ours = tools::run(folder, &map, "").output;
        assert_eq!(ours, String::from_utf8_lossy(&theirs));
        let again = Daemon::start_in(copied(folder), &[]);
        let mut client = again.client();
        client.run("blockdev-add", on("new", "new"));
        let shown = client.run("query-named-block-nodes", json!({"flat": true}));
        assert_eq!(shown.as_array().expect("nodes").len(), 8);
        again.quit_by(client);
        for arguments in [
            &["commit", "new"][..],
            &["commit", "--top", "mid", "new"],
            &["stream", "--base", "base", "new"],
            &["stream", "new"],
            &["rebase", "-b", "base", "-F", "qcow2", "new"],
        ] {
            let place = Place {
                folder: copied(folder),
            };
            place.succeed(arguments);
            let what = format!("{arguments:?}");
            let shows = if arguments == ["commit", "new"] {
                "top"
            } else {
                "new"
            };
            assert_shows(place.folder.path(), shows, "kept", &what);
        }
    }
}

/// A folder with the same files.
fn copied(folder: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().expect("a folder");
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_file() {
            let name = path.file_name().expect("a name");
            fs::copy(&path, copy.path().join(name)).expect("copied");
        }
    }
    copy
}

/// What a description leads to is what QEMU opens for it, also from another folder, where its names lead elsewhere.
#[test]
fn descriptions_lead_where_qemus_do() {
    if !have_oracle() {
        return;
    }
    let place = Place::new();
    let folder = place.folder.path();
    chain_in(folder, &["base", "mid"]);
    chain_in(&place.path("sub"), &["mid", "base"]);
    let file = |name: &str| json!({"driver": "file", "filename": name});
    for (description, format) in [
        (json!({"driver": "qcow2", "file": file("mid")}), "qcow2"),
        // Without the backing file that the header names.
        (
            json!({"driver": "qcow2", "file": file("mid"), "backing": null}),
            "qcow2",
        ),
        (json!({"driver": "raw", "file": file("mid")}), "raw"),
        (
            json!({"driver": "qcow2", "file": {"driver": "raw", "file": file("mid")}}),
            "qcow2",
        ),
        // The header's word counts.
        (json!({"driver": "qcow2", "file": file("mid")}), "raw"),
        (json!({"driver": "raw", "file": file("mid")}), "qcow2"),
        (json!({"file": file("mid")}), "qcow2"),
        // Its own backing in turn.
        (
            json!({"driver": "qcow2", "file": file("mid"), "backing":
                {"driver": "raw", "file": file("base")}}),
            "qcow2",
        ),
    ] {
        let name = format!("json:{description}");
        let names = Names {
            backing: Some(&name),
            format: Some(format),
            data_file: None,
        };
        image_with(&place.path("sub"), "over", names);
        for (at, over) in [(folder.to_owned(), "sub/over"), (place.path("sub"), "over")] {
            let ours = tools::run(&at, &["map", "-f", "qcow2", over], "");
            assert_eq!(ours.code, Some(0), "{name}: {}", ours.errors);
            let ours = tools::run(&at, &["backup", "-f", "qcow2", over, "ours"], "");
            assert_eq!(ours.code, Some(0), "{name}: {}", ours.errors);
            keep(&at, over, "theirs");
            assert!(
                fs::read(at.join("ours")).expect("read")
                    == fs::read(at.join("theirs")).expect("read"),
                "{name} in {format} from {}",
                at.display()
            );
            fs::remove_file(at.join("ours")).expect("removed");
        }
    }
}
