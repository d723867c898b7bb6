//! What headers call the images below them after commits and streams from another folder: who opens the chain finds it.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::chains::{on, with};
use crate::daemon::Daemon;
use crate::images::run;
use crate::made_chains::{assert_shows, assert_sound, backing, keep};
use crate::place::Place;
use crate::tools::have_oracle;

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
