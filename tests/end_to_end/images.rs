//! qcow2 images for tests, made by qemu-img; and ones that name whatever a test wants, which qemu-img would not write.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::oracle::data_file;

/// Length of every disk here, unless a test says something else.
pub(crate) const SIZE: u64 = 4 << 20;

/// Runs one of QEMU's tools in a folder; it must succeed.
pub(crate) fn run(folder: &Path, program: &str, arguments: &[&str]) {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(folder)
        .output()
        .expect("it runs");
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A new image without a backing file.
pub(crate) fn image(folder: &Path, name: &str, options: &[&str]) {
    let mut arguments = vec!["create", "-q", "-f", "qcow2"];
    arguments.extend_from_slice(options);
    arguments.extend([name, "4M"]);
    run(folder, "qemu-img", &arguments);
}

/// A new image on a backing file of this format.
pub(crate) fn overlay(folder: &Path, name: &str, backing: &str, format: &str) {
    let size = SIZE.to_string();
    let arguments = [
        "create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", format, name, &size,
    ];
    run(folder, "qemu-img", &arguments);
}

/// Three layers, the data of each at another place, and raw files.
pub(crate) fn chain(folder: &Path) {
    image(folder, "base.qcow2", &[]);
    overlay(folder, "mid.qcow2", "base.qcow2", "qcow2");
    overlay(folder, "top.qcow2", "mid.qcow2", "qcow2");
    for (name, write) in [
        ("base.qcow2", "write -P 1 0 1M"),
        ("mid.qcow2", "write -P 2 512k 1M"),
        ("top.qcow2", "write -P 3 3M 100k"),
    ] {
        run(folder, "qemu-io", &["-f", "qcow2", "-c", write, name]);
    }
    data_file(&folder.join("r.raw"), SIZE);
    fs::create_dir(folder.join("sub")).expect("made");
}

/// What the header of an image says of other files.
#[derive(Clone, Copy, Default)]
pub(crate) struct Names<'a> {
    /// Name of the backing file.
    pub(crate) backing: Option<&'a str>,
    /// Format of the backing file.
    pub(crate) format: Option<&'a str>,
    /// Name of the data file; the image then keeps its data there.
    pub(crate) data_file: Option<&'a str>,
}

/// A new image whose header says this.
///
/// Spec: qcow2, "Header", "Header extensions".
pub(crate) fn image_with(folder: &Path, name: &str, names: Names<'_>) {
    const HEADER_BYTES: usize = 112;
    image(folder, name, &[]);
    let path = folder.join(name);
    let mut bytes = fs::read(&path).expect("read");
    let mut rest = Vec::new();
    let mut extension = |kind: u32, data: &[u8]| {
        rest.extend(kind.to_be_bytes());
        rest.extend(u32::try_from(data.len()).expect("short").to_be_bytes());
        rest.extend(data);
        rest.resize(rest.len().next_multiple_of(8), 0);
    };
    if let Some(format) = names.format {
        extension(0xe279_2aca, format.as_bytes());
    }
    if let Some(data_file) = names.data_file {
        extension(0x4441_5441, data_file.as_bytes());
        bytes[79] |= 4;
    }
    extension(0, &[]);
    if let Some(backing) = names.backing {
        let offset = (HEADER_BYTES + rest.len()) as u64;
        bytes[8..16].copy_from_slice(&offset.to_be_bytes());
        let length = u32::try_from(backing.len()).expect("short");
        bytes[16..20].copy_from_slice(&length.to_be_bytes());
        rest.extend(backing.as_bytes());
    }
    bytes[HEADER_BYTES..4096].fill(0);
    bytes[HEADER_BYTES..HEADER_BYTES + rest.len()].copy_from_slice(&rest);
    fs::write(path, bytes).expect("written");
}
