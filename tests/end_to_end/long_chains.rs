//! Chains of hundreds of layers: what they cost, and where they end.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::chains::{on, with};
use crate::daemon::Daemon;
use crate::images::{Names, image, image_with};
use crate::tools;

/// What a layer may take besides what its file holds: its tables are read when they are needed.
const LAYER_BYTES_MAX: usize = 64 << 10;
/// Two hundred of them take a fraction of it.
const OPEN_WAIT: Duration = Duration::from_secs(10);

fn long_chain(folder: &Path, layers: usize) {
    image(folder, "0.qcow2", &[]);
    for layer in 1..layers {
        // What differs is the name of the backing file.
        let names = Names {
            backing: Some(&format!("{}.qcow2", layer - 1)),
            format: Some("qcow2"),
            data_file: None,
        };
        let name = format!("{layer}.qcow2");
        match layer {
            1 => image_with(folder, &name, names),
            _ => {
                let mut bytes = fs::read(folder.join("1.qcow2")).expect("read");
                let backing = names.backing.expect("named").as_bytes();
                bytes[16..20]
                    .copy_from_slice(&u32::try_from(backing.len()).expect("short").to_be_bytes());
                let offset = u64::from_be_bytes(bytes[8..16].try_into().expect("eight"));
                let offset = usize::try_from(offset).expect("small");
                bytes[offset..offset + backing.len()].copy_from_slice(backing);
                fs::write(folder.join(name), bytes).expect("written");
            }
        }
    }
}

/// A layer whose L1 table claims 32 MiB, the most there can be, and is a hole.
fn layer_of_large_tables(folder: &Path, layer: usize, backing: Option<&str>) {
    let names = Names {
        backing,
        format: backing.map(|_| "qcow2"),
        data_file: None,
    };
    let name = format!("{layer}.qcow2");
    image_with(folder, &name, names);
    const ENTRIES: u32 = 4 << 20;
    let file = OpenOptions::new().write(true).open(folder.join(name));
    let file = file.expect("opened");
    // Size of the disk, entries and place of the L1 table.
    file.write_all_at(&(1_u64 << 51).to_be_bytes(), 24)
        .expect("written");
    file.write_all_at(&ENTRIES.to_be_bytes(), 36)
        .expect("written");
    file.write_all_at(&(1_u64 << 20).to_be_bytes(), 40)
        .expect("written");
    file.set_len((1 << 20) + u64::from(ENTRIES) * 8)
        .expect("longer");
}

#[test]
fn tables_of_a_chain_are_bounded_and_others_go_on() {
    if !tools::have("qemu-img", "qemu-utils") {
        return;
    }
    const LAYERS: usize = 33;
    let daemon = Daemon::start();
    for layer in 0..LAYERS {
        let backing = layer.checked_sub(1).map(|below| format!("{below}.qcow2"));
        layer_of_large_tables(daemon.folder.path(), layer, backing.as_deref());
    }
    let (mut client, mut other) = (daemon.client(), daemon.client());
    let add = |layer: usize| {
        let node = with(
            on("top", &format!("{layer}.qcow2")),
            json!({"read-only": true}),
        );
        json!({"execute": "blockdev-add", "arguments": node})
    };
    let before = daemon.resident_bytes();
    client.send(add(LAYERS - 1).to_string().as_bytes());
    // The other one is answered while all these tables are read.
    let mut answers = 0;
    let refused = loop {
        other.run("query-version", json!({}));
        if let Some(reply) = client.reply_now() {
            break reply;
        }
        answers += 1;
    };
    assert!(answers > 0, "it has waited for the tables");
    let refused = refused["error"]["desc"].as_str().expect("refused");
    assert!(
        refused.ends_with("The tables of all these images would take more than 1024 MiB"),
        "{refused}"
    );
    let open = daemon.descriptors();
    assert!(
        !open.iter().any(|file| file.ends_with(".qcow2")),
        "{open:?}"
    );
    // One layer less fits, and holes take no memory.
    client.send(add(LAYERS - 2).to_string().as_bytes());
    assert_eq!(client.reply(), json!({"return": {}}));
    let grown = daemon.resident_bytes().saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes");
    client.run("blockdev-del", json!({"node-name": "top"}));
    daemon.quit();
}

#[test]
fn two_hundred_layers_are_opened_in_little_time_and_memory() {
    if !tools::have("qemu-img", "qemu-utils") {
        return;
    }
    const LAYERS: usize = 200;
    let daemon = Daemon::start();
    long_chain(daemon.folder.path(), LAYERS + 100);
    let mut client = daemon.client();
    client.run("blockdev-add", on("warm", "0.qcow2"));
    client.run("blockdev-del", json!({"node-name": "warm"}));
    let before = daemon.resident_bytes();
    let started = Instant::now();
    client.run("blockdev-add", on("top", &format!("{}.qcow2", LAYERS - 1)));
    let took = started.elapsed();
    let bytes = daemon.resident_bytes().saturating_sub(before);
    eprintln!("{LAYERS} layers in {took:?}, {} bytes each", bytes / LAYERS);
    assert!(took < OPEN_WAIT, "{took:?}");
    assert!(bytes < LAYERS * LAYER_BYTES_MAX, "{bytes} bytes");
    let nodes = client.run("query-named-block-nodes", json!({"flat": true}));
    assert_eq!(nodes.as_array().map(Vec::len), Some(2 * LAYERS));
    client.run("blockdev-del", json!({"node-name": "top"}));
    assert_eq!(client.run("query-named-block-nodes", json!({})), json!([]));

    // By name, one command a layer.
    let mut below = Value::Null;
    for layer in 0..LAYERS {
        let node = on(&format!("n{layer}"), &format!("{layer}.qcow2"));
        client.run("blockdev-add", with(node, json!({"backing": below})));
        below = json!(format!("n{layer}"));
    }
    for layer in (0..LAYERS).rev() {
        client.run("blockdev-del", json!({"node-name": format!("n{layer}")}));
    }

    // A chain that is too long leaves nothing open.
    let refused = client.refusal("blockdev-add", on("top", "299.qcow2"));
    assert!(
        refused.ends_with("The backing chain would have more than 256 layers"),
        "{refused}"
    );
    assert_eq!(client.run("query-named-block-nodes", json!({})), json!([]));
    let open = daemon.descriptors();
    assert!(
        !open.iter().any(|file| file.ends_with(".qcow2")),
        "{open:?}"
    );
    client.run("blockdev-add", on("top", "255.qcow2"));
    daemon.quit();
}
