//! Random chains of images made by QEMU's tools, and what qemu-img says of images.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::images::run;
use crate::place::{Place, code, complaint};

/// The same numbers for a seed in every run.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    pub(crate) fn pick<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[usize::try_from(self.below(from.len() as u64)).expect("small")]
    }
}

/// Writes random data, zeroes and discards to an image.
pub(crate) fn scribble(dice: &mut Dice, folder: &Path, name: &str, format: &str, length: u64) {
    let mut arguments = vec![
        "-f".to_owned(),
        format.to_owned(),
        "-d".to_owned(),
        "unmap".to_owned(),
    ];
    for _ in 0..2 + dice.below(6) {
        let offset = dice.below(length / 512) * 512;
        let bytes = (1 + dice.below(1200)) * 512;
        let bytes = bytes.min(length - offset);
        let what = match dice.below(6) {
            0 => "write -z".to_owned(),
            1 => "write -z -u".to_owned(),
            2 => "discard".to_owned(),
            // Few patterns, so that layers often hold the same.
            other => format!("write -P {}", other % 3),
        };
        arguments.extend(["-c".to_owned(), format!("{what} {offset} {bytes}")]);
    }
    arguments.push(name.to_owned());
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    run(folder, "qemu-io", &arguments);
}

/// A random image of up to 6 MiB, on `backing` if there is one: its length.
pub(crate) fn random_image(
    dice: &mut Dice,
    folder: &Path,
    name: &str,
    backing: Option<(&str, &str)>,
) -> u64 {
    let length = (1 + dice.below(12 * 1024)) * 512;
    let options = dice.pick(&[
        "cluster_size=64k",
        "cluster_size=512",
        "cluster_size=4k,compat=0.10",
        "cluster_size=2M",
        "cluster_size=64k,extended_l2=on",
        "cluster_size=64k,compat=0.10",
    ]);
    let shown = length.to_string();
    let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", options];
    if let Some((backing, format)) = backing {
        arguments.extend(["-b", backing, "-F", format]);
    }
    arguments.extend([name, &shown]);
    run(folder, "qemu-img", &arguments);
    scribble(dice, folder, name, "qcow2", length);
    length
}

/// Layers `l0` (qcow2 or raw) to `l<count - 1>`, each on the one before.
pub(crate) fn random_chain(dice: &mut Dice, folder: &Path, count: u64) -> Vec<String> {
    let base_format = dice.pick(&["raw", "qcow2"]);
    match base_format {
        "raw" => {
            let file = fs::File::create(folder.join("l0")).expect("made");
            let length = (1 + dice.below(12 * 1024)) * 512;
            file.set_len(length).expect("grown");
            scribble(dice, folder, "l0", "raw", length);
        }
        _ => {
            random_image(dice, folder, "l0", None);
        }
    }
    let mut names = vec!["l0".to_owned()];
    for place in 1..count {
        let below = format!("l{}", place - 1);
        let format = if place == 1 { base_format } else { "qcow2" };
        let name = format!("l{place}");
        random_image(dice, folder, &name, Some((&below, format)));
        names.push(name);
    }
    names
}

/// What a disk shows, as a raw file.
pub(crate) fn keep(folder: &Path, name: &str, to: &str) {
    run(
        folder,
        "qemu-img",
        &["convert", "-f", "qcow2", "-O", "raw", name, to],
    );
}

/// It shows what was kept, and is sound.
pub(crate) fn assert_shows(folder: &Path, name: &str, kept: &str, what: &str) {
    let compared = Command::new("qemu-img")
        .args(["compare", "-f", "qcow2", "-F", "raw", name, kept])
        .current_dir(folder)
        .output()
        .expect("it runs");
    let said = String::from_utf8_lossy(&compared.stdout).into_owned();
    assert!(compared.status.success(), "{what}: {name}: {said}");
    assert_sound(folder, name, what);
}

pub(crate) fn assert_sound(folder: &Path, name: &str, what: &str) {
    let checked = Command::new("qemu-img")
        .args(["check", "-f", "qcow2", name])
        .current_dir(folder)
        .output()
        .expect("it runs");
    let said = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(checked.status.success(), "{what}: {name}: {said}");
}

pub(crate) fn assert_at_most_leaks(folder: &Path, name: &str) {
    let checked = Command::new("qemu-img")
        .args(["check", "-f", "qcow2", name])
        .current_dir(folder)
        .output()
        .expect("it runs");
    assert!(
        matches!(code(&checked), 0 | 3),
        "{name}: {}",
        complaint(&checked)
    );
}

/// Backing file and its format, as qemu-img shows them.
pub(crate) fn backing(folder: &Path, name: &str) -> (Value, Value) {
    let info = info(folder, name);
    let of = |key: &str| info[key].clone();
    (of("backing-filename"), of("backing-filename-format"))
}

pub(crate) fn info(folder: &Path, name: &str) -> Value {
    let info = Command::new("qemu-img")
        .args(["info", "-U", "--output=json", name])
        .current_dir(folder)
        .output()
        .expect("it runs");
    serde_json::from_slice(&info.stdout).expect("JSON")
}

/// Whether an image on another one has to become longer, which version 2 cannot where the one below may be longer already, as it
/// has no zeroes of its own to hide that.
pub(crate) fn cannot_grow(folder: &Path, base: &str, top: &str) -> bool {
    let info = |name: &str| info(folder, name);
    let (base, top) = (info(base), info(top));
    let length = |info: &Value| number(&info["virtual-size"]);
    let below = info(base["backing-filename"].as_str().expect("it has one"));
    let is_v2 = base["format-specific"]["data"]["compat"] == "0.10";
    is_v2 && length(&base) < length(&top) && length(&base) < length(&below)
}

pub(crate) fn room(folder: &Path, name: &str) -> u64 {
    fs::metadata(folder.join(name)).expect("there").blocks() * 512
}

pub(crate) fn json_of(place: &Place, arguments: &[&str]) -> Value {
    let output = place.run(arguments);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(
        code(&output),
        0,
        "{arguments:?}: {text}{}",
        complaint(&output)
    );
    // Of several lines the last is the result.
    serde_json::from_str(&text)
        .or_else(|_| serde_json::from_str(text.lines().last().unwrap_or_default()))
        .unwrap_or_else(|error| panic!("{arguments:?}: {error}: {text}"))
}

pub(crate) fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value}"))
}
