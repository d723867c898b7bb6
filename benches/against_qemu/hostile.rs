//! Damaged images, and images that claim as much as they can: how long another client waits while one opens them, and what
//! they take.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::Failure;
use crate::client::Client;
use crate::control::{Figures, probe_figures, sockets_for};
use crate::daemon::Daemon;
use crate::damage::{MAKING, Sound};
use crate::load::{Load, ask_in_turn};
use crate::options::{Options, Side};
use crate::process::run;

/// An image with one claim: what it is, its cluster size, numbers at offsets, and the length of its file.
type Claim = (
    &'static str,
    &'static str,
    &'static [(u64, &'static [u8])],
    u64,
);

/// All of this lies in holes of the file, so that only what is allocated for it costs.
const CLAIMS: [Claim; 4] = [
    (
        "an L1 table of 32 MiB",
        "64k",
        &[
            (24, &(1_u64 << 51).to_be_bytes()),
            (36, &(4_u32 << 20).to_be_bytes()),
            (40, &(1_u64 << 20).to_be_bytes()),
        ],
        64 << 20,
    ),
    (
        "a refcount table of 8 MiB",
        "64k",
        &[
            (48, &(1_u64 << 20).to_be_bytes()),
            (56, &128_u32.to_be_bytes()),
        ],
        64 << 20,
    ),
    (
        "65536 snapshots",
        "64k",
        &[
            (60, &65_536_u32.to_be_bytes()),
            (64, &(1_u64 << 20).to_be_bytes()),
        ],
        64 << 20,
    ),
    (
        "the dirty bit, and 2^30 clusters to be counted",
        "4k",
        &[(72, &1_u64.to_be_bytes())],
        4 << 40,
    ),
];

/// Opens all of them on one side.
///
/// # Errors
/// The daemon ends, or an image cannot be made.
pub(crate) fn measure(options: &Options, side: Side) -> Result<Figures, Failure> {
    let folder = tempfile::tempdir().map_err(|error| Failure::new(error.to_string()))?;
    let path = folder.path().join("image");
    let sound = sound(folder.path())?;
    let overlay = folder.path().join("overlay");
    qemu_img(
        folder.path(),
        &[
            "create", "-q", "-u", "-f", "qcow2", "-b", "none", "-F", "qcow2", "overlay", "1M",
        ],
    )?;
    let daemon = Daemon::start(options, side, sockets_for(side, 2))?;
    let mut client = Client::connect(daemon.socket_for(0))?;
    write(&path, sound.bytes())?;
    open(&mut client, &path, &overlay)?;
    daemon.reset_peak()?;
    let before = daemon.peak_bytes()?;
    let probe = Client::connect(daemon.socket_for(1))?;
    let mut load = Load::new();
    load.add(move |stop| ask_in_turn(stop, probe, &["query-version"], Duration::ZERO));
    let mut opened = 0;
    for damaged in sound.damaged() {
        write(&path, &damaged.bytes)?;
        open(&mut client, &path, &overlay).map_err(|error| error.about(&damaged.what))?;
        opened += 1;
    }
    for claim in &CLAIMS {
        make(folder.path(), &path, claim)?;
        open(&mut client, &path, &overlay).map_err(|error| error.about(claim.0))?;
        opened += 1;
    }
    let grown = daemon.peak_bytes()?.saturating_sub(before);
    let delays = load.stop()?.concat();
    let mut figures = probe_figures(delays);
    figures.push(("memory at the peak", grown as f64 / 1_048_576.0, "MiB more"));
    Ok((
        figures,
        format!("{opened} images, each added for reading, for writing and below another"),
    ))
}

fn sound(folder: &Path) -> Result<Sound, Failure> {
    for (program, arguments) in MAKING {
        run(Command::new(program).args(arguments).current_dir(folder))?;
    }
    let path = folder.join("sound");
    let bytes = fs::read(&path).map_err(|error| Failure::at(&path, &error))?;
    Ok(Sound::new(bytes))
}

fn qemu_img(folder: &Path, arguments: &[&str]) -> Result<(), Failure> {
    run(Command::new("qemu-img").args(arguments).current_dir(folder)).map(drop)
}

fn write(path: &PathBuf, bytes: &[u8]) -> Result<(), Failure> {
    fs::write(path, bytes).map_err(|error| Failure::at(path, &error))
}

fn make(folder: &Path, path: &Path, claim: &Claim) -> Result<(), Failure> {
    let (_, cluster, numbers, length) = claim;
    let size = format!("cluster_size={cluster},lazy_refcounts=on");
    qemu_img(
        folder,
        &["create", "-q", "-f", "qcow2", "-o", &size, "image", "1M"],
    )?;
    let claimed = || -> std::io::Result<File> {
        let file = OpenOptions::new().write(true).open(path)?;
        for (offset, number) in *numbers {
            file.write_all_at(number, *offset)?;
        }
        file.set_len(*length)?;
        Ok(file)
    };
    claimed()
        .map(drop)
        .map_err(|error| Failure::at(path, &error))
}

/// Adds an image in every way, and deletes what was added. Refusals are none of our business here.
fn open(client: &mut Client, path: &Path, overlay: &Path) -> Result<(), Failure> {
    let image =
        |path: &Path| json!({"driver": "qcow2", "file": {"driver": "file", "filename": path}});
    let mut reading = image(path);
    reading["read-only"] = json!(true);
    let mut above = image(overlay);
    above["backing"] = image(path);
    for mut node in [reading, image(path), above] {
        node["node-name"] = json!("n");
        if client.ask("blockdev-add", &node)? == json!({"return": {}}) {
            let deleted: Value = client.ask("blockdev-del", &json!({"node-name": "n"}))?;
            if deleted != json!({"return": {}}) {
                return Err(Failure::new(deleted.to_string()));
            }
        }
    }
    Ok(())
}
