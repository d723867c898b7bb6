//! Damaged images, alone and below others: each is refused in QEMU's words or opened, nothing panics, another client is
//! answered all the time, and memory stays where it was.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use crate::chains::{on, with};
use crate::client::Client;
use crate::daemon::Daemon;
use crate::damage::{MAKING, Sound};
use crate::images::{overlay, run};
use crate::tools;
use crate::writer::SetAtEnd;

/// What damaged images may take at most.
const MEMORY_BYTES_MAX: usize = 64 << 20;

/// Answers to somebody else while one image is held up.
const ANSWERS: usize = 200;

/// What we refuse and QEMU opens: tables that are behind the end of the file or on each other, which docs/COMPATIBILITY.md
/// lists.
const STRICTER: [&str; 4] = [
    "Active L1 table offset invalid",
    "Reference count table offset invalid",
    "Snapshot table offset invalid",
    "doesn't satisfy the constraints",
];

/// What QEMU stumbles over when it reads or writes bitmaps, which comes later or not at all here.
const OF_BITMAPS: [&str; 4] = [
    "Can't update bitmap directory",
    "Failed to read bitmap directory",
    "Could not read bitmap",
    "doesn't satisfy the constraints",
];

/// How an image is opened.
#[derive(Clone, Copy, Debug)]
enum Use {
    Reading,
    Writing,
    Backing,
}

const USES: [Use; 3] = [Use::Reading, Use::Writing, Use::Backing];

/// Why the image `bytes` cannot be added; `None`: it can, and is deleted again.
fn refusal(daemon: &Daemon, client: &mut Client, bytes: &[u8], how: Use) -> Option<String> {
    fs::write(daemon.path("damaged"), bytes).expect("written");
    let image = on("n", "damaged");
    let node = match how {
        Use::Reading => with(image, json!({"read-only": true})),
        Use::Writing => image,
        Use::Backing => {
            let below =
                json!({"driver": "qcow2", "file": {"driver": "file", "filename": "damaged"}});
            with(on("n", "overlay"), json!({"backing": below}))
        }
    };
    let reply = client.command("blockdev-add", node);
    if reply == json!({"return": {}}) {
        client.run("blockdev-del", json!({"node-name": "n"}));
        return None;
    }
    let text = reply["error"]["desc"].as_str();
    Some(text.unwrap_or_else(|| panic!("{reply}")).to_owned())
}

fn contains_any(text: &str, all: &[&str]) -> bool {
    all.iter().any(|words| text.contains(words))
}

/// Whether the two say the same, or differ where it is known.
fn agree(theirs: Option<&str>, ours: Option<&str>) -> bool {
    match (theirs, ours) {
        (None, Some(ours)) => contains_any(ours, &STRICTER),
        (Some(theirs), ours) if Some(theirs) != ours => contains_any(theirs, &OF_BITMAPS),
        _ => true,
    }
}

#[test]
fn damaged_images_are_refused_in_qemus_words_and_cost_little() {
    if !tools::have_oracle() || !tools::have("qemu-io", "qemu-utils") {
        return;
    }
    let (theirs, ours) = (Daemon::start_oracle_with(&[]), Daemon::start_logging());
    for (program, arguments) in MAKING {
        run(ours.folder.path(), program, arguments);
    }
    let sound = Sound::new(fs::read(ours.path("sound")).expect("read"));
    for daemon in [&theirs, &ours] {
        overlay(daemon.folder.path(), "overlay", "none", "qcow2");
    }
    let (mut their_client, mut client) = (theirs.client(), ours.client());
    assert_eq!(
        refusal(&ours, &mut client, sound.bytes(), Use::Writing),
        None
    );
    let before = ours.peak_resident_bytes();
    let ended = AtomicBool::new(false);
    let (mut all, mut same, mut different) = (0, 0, Vec::new());
    let answers = std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            let (mut other, mut answers) = (ours.client(), 0);
            while !ended.load(Ordering::Relaxed) {
                other.run("query-version", json!({}));
                answers += 1;
            }
            answers
        });
        // The other one ends also when this one fails.
        let ends = SetAtEnd(&ended);
        for damaged in sound.damaged() {
            for how in USES {
                let theirs = refusal(&theirs, &mut their_client, &damaged.bytes, how);
                let ours = refusal(&ours, &mut client, &damaged.bytes, how);
                all += 1;
                same += usize::from(theirs == ours);
                if !agree(theirs.as_deref(), ours.as_deref()) {
                    let what = &damaged.what;
                    different.push(format!("{what}, {how:?}: {theirs:?}, not {ours:?}"));
                }
            }
        }
        drop(ends);
        other.join().expect("it was answered")
    });
    assert!(different.is_empty(), "{different:#?}");
    assert!(all > 3 * 150, "{all} were tried");
    assert!(same > all * 9 / 10, "{same} of {all}");
    // One that waits for each image is answered once an image.
    assert!(answers > all, "{answers} answers beside {all} images");
    let grown = ours.peak_resident_bytes() - before;
    assert!(grown < MEMORY_BYTES_MAX, "{grown} bytes");
    assert_eq!(
        client.run("query-named-block-nodes", json!({})),
        Value::Array(Vec::new())
    );
    ours.assert_no_bug();
    ours.quit();
}

#[test]
fn an_image_on_a_disk_that_does_not_answer_holds_up_nobody_else() {
    let daemon = Daemon::start();
    let (mut client, mut other) = (daemon.client(), daemon.client());
    const HOUR_NS: u64 = 3_600_000_000_000;
    let disk = json!({"driver": "null-co", "size": 1 << 20, "latency-ns": HOUR_NS});
    let below = json!({"driver": "qcow2", "file": disk});
    let node = json!({"driver": "qcow2", "node-name": "n", "file": below});
    let add = json!({"execute": "blockdev-add", "arguments": node});
    client.send(add.to_string().as_bytes());
    for turn in 0..ANSWERS {
        other.run("query-version", json!({}));
        // What needs the graph, too.
        if turn % 20 == 0 {
            let node = json!({"driver": "null-co", "node-name": "other"});
            other.run("blockdev-add", node);
            other.run("query-named-block-nodes", json!({}));
            other.run("blockdev-del", json!({"node-name": "other"}));
        }
    }
    assert_eq!(client.reply_now(), None);
}
