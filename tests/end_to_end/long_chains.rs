//! Chains of hundreds of layers: what they cost, and where they end.

use std::fs;
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
