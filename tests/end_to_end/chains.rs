//! qcow2 nodes and their chains: opened in every way, shown, used by jobs, made longer, kept from others and taken away, the
//! same on both daemons.

use std::fmt::Write as _;
use std::fs;

use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::images::{Names, SIZE, chain, image, image_with, overlay, run};
use crate::oracle::{compare, data_file, hole_file};
use crate::tools;

/// A node on an image file.
pub(crate) fn on(name: &str, file: &str) -> Value {
    json!({"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": file}})
}

/// The same with more options.
pub(crate) fn with(mut node: Value, more: Value) -> Value {
    let Value::Object(more) = more else {
        panic!("an object")
    };
    for (name, value) in more {
        node[name] = value;
    }
    node
}

/// A script that adds the node and, if that works, shows it and takes it away.
fn try_out(script: &mut String, node: Value) {
    let name = node["node-name"].clone();
    for (command, arguments) in [
        ("blockdev-add", node),
        ("query-named-block-nodes", json!({})),
        ("blockdev-del", json!({"node-name": name})),
    ] {
        let line = json!({"execute": command, "arguments": arguments});
        writeln!(script, "{line}").expect("a text");
    }
}

#[test]
fn chains_are_opened_in_every_way() {
    compare(
        r##"
        # As the images say.
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "top", "file": {"driver": "file", "filename": "top.qcow2"}}}
        {"execute": "query-named-block-nodes"}
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
        {"execute": "x-debug-query-block-graph"}
        locks top.qcow2
        locks mid.qcow2
        locks base.qcow2
        {"execute": "blockdev-del", "arguments": {"node-name": "top"}}
        {"execute": "query-named-block-nodes"}
        locks top.qcow2
        locks base.qcow2
        # By name, under the names that the images have.
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "base", "file": {"driver": "file", "filename": "base.qcow2"}}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "mid", "file": {"driver": "file", "filename": "mid.qcow2"}, "backing": "base"}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "top", "file": {"driver": "file", "filename": "top.qcow2"}, "backing": "mid"}}
        {"execute": "query-named-block-nodes"}
        {"execute": "x-debug-query-block-graph"}
        locks mid.qcow2
        {"execute": "blockdev-del", "arguments": {"node-name": "base"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "mid"}}
        {"execute": "block_resize", "arguments": {"node-name": "mid", "size": 1048576}}
        {"execute": "block_resize", "arguments": {"node-name": "base", "size": 1048576}}
        {"execute": "blockdev-del", "arguments": {"node-name": "top"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "base"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "mid"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "base"}}
        # Inline, with what is inherited and what is not.
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "base", "file": {"driver": "file", "filename": "./base.qcow2"}}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "top", "cache": {"direct": true, "no-flush": true}, "discard": "unmap", "detect-zeroes": "unmap", "file": {"driver": "file", "filename": "top.qcow2"}, "backing": {"driver": "qcow2", "node-name": "in", "file": {"driver": "file", "node-name": "inf", "filename": "mid.qcow2"}, "backing": "base"}}}
        {"execute": "query-named-block-nodes"}
        {"execute": "x-debug-query-block-graph"}
        {"execute": "blockdev-del", "arguments": {"node-name": "in"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "inf"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "base"}}
        # What was opened with another stays as long as it is used.
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "other", "file": {"driver": "file", "filename": "o.qcow2"}, "backing": "in"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "top"}}
        {"execute": "query-named-block-nodes"}
        {"execute": "x-debug-query-block-graph"}
        {"execute": "blockdev-del", "arguments": {"node-name": "other"}}
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
        {"execute": "blockdev-del", "arguments": {"node-name": "base"}}
        # None, and one that may be written.
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "top", "file": {"driver": "file", "filename": "top.qcow2"}, "backing": null}}
        {"execute": "query-named-block-nodes"}
        {"execute": "blockdev-del", "arguments": {"node-name": "top"}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "top", "file": {"driver": "file", "filename": "top.qcow2"}, "backing": ""}}
        {"execute": "blockdev-del", "arguments": {"node-name": "top"}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "top", "file": {"driver": "file", "filename": "top.qcow2"}, "backing": {"driver": "raw", "read-only": false, "file": {"driver": "file", "filename": "r.raw"}}}}
        {"execute": "query-named-block-nodes"}
        {"execute": "x-debug-query-block-graph"}
        {"execute": "blockdev-del", "arguments": {"node-name": "top"}}
        {"execute": "query-named-block-nodes"}
        # Read-only, all of it, and on other things than files.
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "top", "read-only": true, "file": {"driver": "file", "filename": "top.qcow2"}}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "too", "read-only": true, "force-share": true, "file": {"driver": "file", "filename": "top.qcow2"}}}
        {"execute": "x-debug-query-block-graph"}
        locks top.qcow2
        locks mid.qcow2
        {"execute": "blockdev-del", "arguments": {"node-name": "top"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "too"}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "q", "file": {"driver": "raw", "file": {"driver": "blkdebug", "align": 512, "image": {"driver": "file", "filename": "sub/rel.qcow2"}}}}}
        {"execute": "query-named-block-nodes"}
        {"execute": "x-debug-query-block-graph"}
        {"execute": "blockdev-del", "arguments": {"node-name": "q"}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "r", "file": {"driver": "qcow2", "node-name": "q", "file": {"driver": "file", "filename": "o.qcow2"}}}}
        {"execute": "query-named-block-nodes"}
        {"execute": "x-debug-query-block-graph"}
        {"execute": "block_resize", "arguments": {"node-name": "r", "size": 8388608}}
        {"execute": "block_resize", "arguments": {"node-name": "r", "size": 8388609}}
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
        {"execute": "blockdev-del", "arguments": {"node-name": "r"}}
        "##,
        |folder| {
            chain(folder);
            image(folder, "o.qcow2", &[]);
            image_with(
                folder,
                "sub/rel.qcow2",
                Names {
                    backing: Some("../mid.qcow2"),
                    format: Some("qcow2"),
                    ..Names::default()
                },
            );
        },
    );
}

#[test]
fn what_does_not_open_is_told_in_the_same_words() {
    let mut script = String::new();
    let top = || on("t", "top.qcow2");
    for node in [
        on("t", "none.qcow2"),
        on("1t", "none.qcow2"),
        on("1t", "r.raw"),
        on("t", "r.raw"),
        on("t", "sub"),
        on("t", "missing.qcow2"),
        on("t", "missing2.qcow2"),
        on("t", "not-qcow2.qcow2"),
        on("t", "vmdk.qcow2"),
        on("t", "self.qcow2"),
        on("t", "folder.qcow2"),
        json!({"driver": "qcow2", "node-name": "t"}),
        json!({"driver": "qcow2", "node-name": "t", "file": "nobody"}),
        json!({"driver": "qcow2", "node-name": "t", "file": "t"}),
        json!({"driver": "qcow2", "node-name": "t", "file": {"driver": "null-co"}}),
        with(top(), json!({"backing": "nobody"})),
        with(top(), json!({"backing": "t"})),
        with(top(), json!({"backing": 5})),
        with(top(), json!({"backing": {}})),
        with(top(), json!({"backing": on("t", "base.qcow2")})),
        with(top(), json!({"backing": on("b", "none.qcow2")})),
        with(top(), json!({"backing": on("b", "missing.qcow2")})),
        with(top(), json!({"data-file": "nobody"})),
        with(
            top(),
            json!({"data-file": {"driver": "file", "filename": "r.raw"}}),
        ),
        with(top(), json!({"read-only": true, "auto-read-only": true})),
        with(top(), json!({"force-share": true})),
        with(top(), json!({"detect-zeroes": "unmap"})),
        with(on("t", "outside.qcow2"), json!({})),
        with(on("t", "outside.qcow2"), json!({"data-file": "nobody"})),
        with(
            on("t", "outside.qcow2"),
            json!({"data-file": {"driver": "file", "filename": "none"}}),
        ),
        with(
            on("t", "outside.qcow2"),
            json!({"data-file": {"driver": "file", "filename": "outside.qcow2"}}),
        ),
        with(
            on("t", "outside.qcow2"),
            json!({"data-file": {"driver": "file", "filename": "r.raw"}}),
        ),
    ] {
        try_out(&mut script, node);
    }
    compare(&script, |folder| {
        chain(folder);
        overlay(folder, "missing.qcow2", "none.qcow2", "qcow2");
        overlay(folder, "missing2.qcow2", "missing.qcow2", "qcow2");
        overlay(folder, "not-qcow2.qcow2", "r.raw", "qcow2");
        let own = Names {
            backing: Some("self.qcow2"),
            format: Some("qcow2"),
            ..Names::default()
        };
        image_with(folder, "self.qcow2", own);
        overlay(folder, "folder.qcow2", "sub", "raw");
        let bogus = Names {
            backing: Some("r.raw"),
            format: Some("bogus"),
            ..Names::default()
        };
        image_with(folder, "vmdk.qcow2", bogus);
        let outside = Names {
            data_file: Some("none.raw"),
            ..Names::default()
        };
        image_with(folder, "outside.qcow2", outside);
    });
}

#[test]
fn options_fit_or_are_refused_in_the_same_words() {
    let mut script = String::new();
    for options in [
        json!({"cache-size": 1, "l2-cache-size": 1, "refcount-cache-size": 1}),
        json!({"cache-size": 1, "l2-cache-size": 2}),
        json!({"cache-size": 1, "refcount-cache-size": 2}),
        json!({"cache-size": 1_048_576, "l2-cache-size": 524_288}),
        json!({"cache-size": 0}),
        json!({"cache-size": -1}),
        json!({"l2-cache-entry-size": 256}),
        json!({"l2-cache-entry-size": 65_536}),
        json!({"refcount-cache-size": 1_u64 << 62}),
        json!({"cache-clean-interval": -1}),
        json!({"cache-clean-interval": 0}),
        json!({"lazy-refcounts": true}),
        json!({"discard-no-unref": true}),
        json!({"lazy-refcounts": true, "discard-no-unref": true, "l2-cache-entry-size": 1}),
        json!({"pass-discard-request": true, "pass-discard-snapshot": false, "pass-discard-other": true}),
        json!({"overlap-check": "all"}),
        json!({"overlap-check": "some"}),
        json!({"overlap-check": {"template": "none", "main-header": true, "inactive-l2": true}}),
        json!({"overlap-check": {"template": "some"}}),
        json!({"overlap-check": {"bogus": true}}),
        json!({"overlap-check": 5}),
        json!({"encrypt": {"format": "luks", "key-secret": "s"}}),
        json!({"encrypt": {"format": "aes"}}),
        json!({"encrypt": {"format": "some"}}),
        json!({"encrypt": {}}),
        json!({"data-file": null}),
        json!({"cache-size": 1, "l2-cache-size": 2, "data-file": "nobody", "backing": "nobody"}),
    ] {
        for file in ["v3.qcow2", "v2.qcow2"] {
            try_out(&mut script, with(on("t", file), options.clone()));
        }
    }
    let options = json!({"cache-size": 1, "l2-cache-size": 2});
    try_out(&mut script, with(on("t", "r.raw"), options.clone()));
    try_out(&mut script, with(on("t", "missing.qcow2"), options));
    compare(&script, |folder| {
        image(folder, "v3.qcow2", &[]);
        image(folder, "v2.qcow2", &["-o", "compat=0.10"]);
        overlay(folder, "missing.qcow2", "none.qcow2", "qcow2");
        data_file(&folder.join("r.raw"), SIZE);
    });
}

#[test]
fn images_of_every_kind_are_shown() {
    if !tools::have_oracle() {
        return;
    }
    // Once, as its snapshots have dates.
    let made = tempfile::tempdir().expect("a folder");
    let folder = made.path();
    let images = [
        ("v2", "compat=0.10"),
        ("v3", "compat=1.1,lazy_refcounts=on,refcount_bits=64"),
        (
            "extended",
            "extended_l2=on,compression_type=zstd,cluster_size=128k",
        ),
        ("outside", "data_file=outside.raw"),
        ("raw", "data_file=raw.raw,data_file_raw=on"),
        ("snapshots", "cluster_size=512"),
    ];
    let mut script = String::new();
    for (name, options) in images {
        image(folder, &format!("{name}.qcow2"), &["-o", options]);
        for read_only in [false, true] {
            let node = on(name, &format!("{name}.qcow2"));
            try_out(&mut script, with(node, json!({"read-only": read_only})));
        }
    }
    for name in ["one", "two"] {
        run(
            folder,
            "qemu-img",
            &["snapshot", "-c", name, "snapshots.qcow2"],
        );
    }
    image(folder, "bitmaps.qcow2", &[]);
    run(
        folder,
        "qemu-img",
        &["bitmap", "--add", "bitmaps.qcow2", "b1"],
    );
    run(
        folder,
        "qemu-img",
        &["bitmap", "--add", "--disable", "bitmaps.qcow2", "b2"],
    );
    let bitmaps = with(on("b", "bitmaps.qcow2"), json!({"read-only": true}));
    try_out(&mut script, bitmaps);
    compare(&script, |folder| {
        for file in fs::read_dir(made.path()).expect("a folder") {
            let file = file.expect("a file");
            fs::copy(file.path(), folder.join(file.file_name())).expect("copied");
        }
    });
}

#[test]
fn data_files_are_used_as_their_image_is() {
    compare(
        r##"
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "t", "file": {"driver": "file", "filename": "outside.qcow2"}}}
        {"execute": "x-debug-query-block-graph"}
        locks outside.qcow2
        locks outside.raw
        {"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "n", "size": 4194304, "read-zeroes": true}}
        {"execute": "blockdev-mirror", "arguments": {"job-id": "j", "device": "n", "target": "t", "sync": "full"}}
        wait j ready
        {"execute": "x-debug-query-block-graph"}
        locks outside.qcow2
        locks outside.raw
        {"execute": "job-cancel", "arguments": {"id": "j"}}
        wait j null
        {"execute": "block_resize", "arguments": {"node-name": "t", "size": 8388608}}
        $ stat -c %s outside.raw
        {"execute": "blockdev-del", "arguments": {"node-name": "t"}}
        # By name, with other users.
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "d", "filename": "other.raw"}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "f", "filename": "other.qcow2"}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "t", "file": "f", "data-file": "f"}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "t", "file": "f", "data-file": "d"}}
        {"execute": "query-named-block-nodes"}
        {"execute": "x-debug-query-block-graph"}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "u", "file": "f", "data-file": "d"}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "r", "file": "d"}}
        {"execute": "block_resize", "arguments": {"node-name": "d", "size": 4194304}}
        {"execute": "block_resize", "arguments": {"node-name": "f", "size": 4194304}}
        {"execute": "blockdev-del", "arguments": {"node-name": "d"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "f"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "t"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "d"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "r"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "d"}}
        "##,
        |folder| {
            image(folder, "outside.qcow2", &["-o", "data_file=outside.raw"]);
            image(folder, "other.qcow2", &["-o", "data_file=other.raw"]);
        },
    );
}

#[test]
fn files_and_layers_have_the_same_conflicts() {
    compare(
        r##"
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "f", "filename": "base.qcow2"}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "a", "file": "f"}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "b", "file": "f"}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "b", "file": "f", "read-only": true}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "w", "file": "f", "offset": 512}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "r", "file": "f"}}
        {"execute": "block_resize", "arguments": {"node-name": "f", "size": 1048576}}
        {"execute": "blockdev-del", "arguments": {"node-name": "f"}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "c", "file": {"driver": "file", "filename": "base.qcow2"}}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "c", "read-only": true, "file": {"driver": "file", "filename": "base.qcow2"}}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "c", "file": {"driver": "file", "filename": "mid.qcow2"}}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "m", "file": {"driver": "file", "filename": "mid.qcow2"}, "backing": "a"}}
        {"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "n", "size": 4194304, "read-zeroes": true}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "x", "file": {"driver": "file", "filename": "x.raw"}}}
        # Who uses a backing, and for what.
        {"execute": "blockdev-mirror", "arguments": {"job-id": "j", "device": "a", "target": "x", "sync": "full"}}
        {"execute": "blockdev-mirror", "arguments": {"job-id": "j", "device": "x", "target": "a", "sync": "full"}}
        {"execute": "blockdev-backup", "arguments": {"job-id": "j", "device": "a", "target": "x", "sync": "full", "auto-finalize": false}}
        wait j pending
        {"execute": "x-debug-query-block-graph"}
        {"execute": "query-named-block-nodes"}
        {"execute": "blockdev-del", "arguments": {"node-name": "a"}}
        {"execute": "block_resize", "arguments": {"node-name": "a", "size": 1048576}}
        {"execute": "job-finalize", "arguments": {"id": "j"}}
        wait j null
        {"execute": "blockdev-backup", "arguments": {"job-id": "k", "device": "n", "target": "a", "sync": "full", "auto-finalize": false}}
        wait k pending
        {"execute": "x-debug-query-block-graph"}
        {"execute": "job-finalize", "arguments": {"id": "k"}}
        wait k null
        # An overlay that is read keeps writers off what is below.
        {"execute": "blockdev-backup", "arguments": {"job-id": "l", "device": "m", "target": "x", "sync": "full", "auto-finalize": false}}
        wait l pending
        {"execute": "x-debug-query-block-graph"}
        {"execute": "blockdev-backup", "arguments": {"job-id": "o", "device": "n", "target": "a", "sync": "full"}}
        {"execute": "job-finalize", "arguments": {"id": "l"}}
        wait l null
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
        "##,
        |folder| {
            chain(folder);
            hole_file(&folder.join("x.raw"), SIZE);
        },
    );
}

#[test]
fn jobs_copy_what_a_chain_shows() {
    compare(
        r##"
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "top", "file": {"driver": "file", "node-name": "topf", "filename": "top.qcow2"}}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "t", "file": {"driver": "file", "node-name": "tf", "filename": "t.qcow2"}}}
        {"execute": "blockdev-backup", "arguments": {"job-id": "b", "device": "top", "target": "t", "sync": "full", "filter-node-name": "flt", "auto-finalize": false}}
        wait b pending
        {"execute": "x-debug-query-block-graph"}
        {"execute": "query-named-block-nodes"}
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
        locks top.qcow2
        locks mid.qcow2
        locks t.qcow2
        {"execute": "blockdev-del", "arguments": {"node-name": "top"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "topf"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "t"}}
        {"execute": "block_resize", "arguments": {"node-name": "top", "size": 8388608}}
        {"execute": "block_resize", "arguments": {"node-name": "t", "size": 8388608}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "u", "file": {"driver": "file", "filename": "u.qcow2"}, "backing": "t"}}
        {"execute": "job-finalize", "arguments": {"id": "b"}}
        wait b null
        {"execute": "blockdev-del", "arguments": {"node-name": "u"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "t"}}
        $ qemu-img compare -U top.qcow2 t.qcow2
        $ qemu-img check -q t.qcow2
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "t", "file": {"driver": "file", "node-name": "tf", "filename": "u.qcow2"}}}
        {"execute": "blockdev-mirror", "arguments": {"job-id": "m", "device": "top", "target": "t", "sync": "full", "filter-node-name": "flt"}}
        wait m ready
        {"execute": "x-debug-query-block-graph"}
        {"execute": "query-named-block-nodes"}
        locks top.qcow2
        locks u.qcow2
        {"execute": "job-complete", "arguments": {"id": "m"}}
        wait m null
        {"execute": "query-named-block-nodes"}
        {"execute": "x-debug-query-block-graph"}
        {"execute": "blockdev-del", "arguments": {"node-name": "t"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "top"}}
        $ qemu-img compare top.qcow2 u.qcow2
        $ qemu-img check -q u.qcow2
        "##,
        |folder| {
            chain(folder);
            image(folder, "t.qcow2", &[]);
            image(folder, "u.qcow2", &[]);
        },
    );
}

#[test]
fn disks_in_images_get_other_lengths() {
    let mut script = String::new();
    for (name, sizes) in [
        (
            "v3",
            [
                1000,
                0,
                1 << 20,
                8 << 20,
                9_223_372_035_781_033_984_u64,
                9_223_372_035_781_033_985,
                1 << 60,
            ],
        ),
        ("v2", [8 << 20, 1 << 20, 1000, 0, 1 << 60, 1 << 62, 4 << 20]),
        ("v2-snapshot", [8 << 20; 7]),
        (
            "v3-again",
            [8 << 20, 1 << 20, 1000, 0, 1 << 60, 1 << 62, 4 << 20],
        ),
        (
            "outside",
            [8 << 20, 1 << 20, 1000, 0, 1 << 60, 1 << 62, 4 << 20],
        ),
    ] {
        let add = on(name, &format!("{name}.qcow2"));
        writeln!(
            script,
            "{}",
            json!({"execute": "blockdev-add", "arguments": add})
        )
        .expect("text");
        for size in sizes {
            let resize = json!({"node-name": name, "size": size});
            let line = json!({"execute": "block_resize", "arguments": resize});
            // How long the file becomes is its daemon's own business.
            let look = format!("$ qemu-img info -U {name}.qcow2 | grep 'virtual size'");
            writeln!(script, "{line}\n{look}").expect("a text");
        }
        let delete = json!({"node-name": name});
        let line = json!({"execute": "blockdev-del", "arguments": delete});
        writeln!(script, "{line}\n$ qemu-img check -q {name}.qcow2").expect("a text");
    }
    script += r##"
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "ro", "read-only": true, "file": {"driver": "file", "filename": "v3.qcow2"}}}
        {"execute": "block_resize", "arguments": {"node-name": "ro", "size": 1000}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "top", "file": {"driver": "file", "filename": "short.qcow2"}}}
        {"execute": "block_resize", "arguments": {"node-name": "top", "size": 4194304}}
        {"execute": "blockdev-del", "arguments": {"node-name": "top"}}
        $ qemu-io -f qcow2 -r -c 'read -P 0 1M 3M' short.qcow2 | grep -v ops
        $ qemu-img check -q short.qcow2
    "##;
    compare(&script, |folder| {
        image(folder, "v3.qcow2", &[]);
        image(folder, "v2.qcow2", &["-o", "compat=0.10"]);
        image(folder, "v2-snapshot.qcow2", &["-o", "compat=0.10"]);
        image(folder, "v3-again.qcow2", &[]);
        run(
            folder,
            "qemu-img",
            &["snapshot", "-c", "s", "v2-snapshot.qcow2"],
        );
        image(folder, "outside.qcow2", &["-o", "data_file=outside.raw"]);
        // What is below is longer.
        chain(folder);
        let arguments = [
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            "base.qcow2",
            "-F",
            "qcow2",
            "short.qcow2",
            "1M",
        ];
        run(folder, "qemu-img", &arguments);
        run(
            folder,
            "qemu-io",
            &["-f", "qcow2", "-c", "write -P 9 0 4M", "base.qcow2"],
        );
    });
}

#[test]
fn nodes_on_the_command_line() {
    if !tools::have("qemu-img", "qemu-utils") {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    chain(folder.path());
    let daemon = Daemon::start_in(
        folder,
        &[
            "--blockdev",
            "qcow2,node-name=base,file.driver=file,file.filename=base.qcow2,read-only=on",
            "--blockdev",
            "driver=qcow2,node-name=mid,file.driver=file,file.filename=mid.qcow2,backing=base,\
             overlap-check.template=all,overlap-check.inactive-l2=off,cache-size=1048576",
            "--blockdev",
            r#"{"driver": "qcow2", "node-name": "top", "backing": "mid", "file": {"driver": "file", "filename": "top.qcow2"}}"#,
        ],
    );
    let mut client = daemon.client();
    let nodes = client.run("query-named-block-nodes", json!({"flat": true}));
    let named: Vec<&Value> = nodes
        .as_array()
        .expect("a list")
        .iter()
        .filter(|node| node["drv"] == "qcow2")
        .map(|node| &node["node-name"])
        .collect();
    assert_eq!(named, ["top", "mid", "base"]);
    daemon.quit();
}
