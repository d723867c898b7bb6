//! `info`, `resize`, `measure` and `compare` held against qemu-img: the same output, exit codes and files.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::{Command, Output};

use serde_json::Value;

use crate::images::run;
use crate::made_chains::info;
use crate::place::{MIB, Place, Tiny, can_mount, code, complaint};
use crate::tools;

pub(crate) fn have_qemu_img() -> bool {
    tools::have_oracle() && tools::have("qemu-img", "qemu-utils")
}

pub(crate) fn qemu_img(place: &Place, arguments: &[&str]) -> Output {
    let mut command = Command::new("qemu-img");
    command
        .args(arguments)
        .env("TZ", "UTC")
        .current_dir(place.folder.path());
    command.output().expect("it runs")
}

pub(crate) fn make(place: &Place, arguments: &[&str]) {
    let output = qemu_img(place, arguments);
    assert_eq!(code(&output), 0, "{arguments:?}: {}", complaint(&output));
}

pub(crate) fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Both print the same and end the same.
pub(crate) fn same(place: &Place, arguments: &[&str]) {
    let (ours, theirs) = (place.run(arguments), qemu_img(place, arguments));
    let complaints = format!("{}\n{}", complaint(&ours), complaint(&theirs));
    assert_eq!(text(&ours), text(&theirs), "{arguments:?}: {complaints}");
    assert_eq!(code(&ours), code(&theirs), "{arguments:?}: {complaints}");
}

/// Both print the same members, in whatever order.
fn same_json(place: &Place, arguments: &[&str]) {
    let read = |output: &Output| -> Value {
        let value = serde_json::from_slice(&output.stdout);
        value.unwrap_or_else(|_| panic!("{arguments:?}: {}", complaint(output)))
    };
    let (ours, theirs) = (place.run(arguments), qemu_img(place, arguments));
    assert_eq!(read(&ours), read(&theirs), "{arguments:?}");
    assert_eq!(code(&ours), code(&theirs), "{arguments:?}");
}

fn file(place: &Place, name: &str, length_bytes: u64, content: &[(u64, u8)]) {
    let file = File::create(place.path(name)).expect("made");
    file.set_len(length_bytes).expect("its length");
    for (offset, byte) in content {
        file.write_all_at(&[*byte; 4096], *offset).expect("written");
    }
}

#[test]
fn info_prints_what_qemu_img_prints() {
    if !have_qemu_img() {
        return;
    }
    let place = Place::new();
    file(&place, "base.raw", MIB, &[(0, 1)]);
    fs::write(place.path("odd"), "abc").expect("written");
    fs::create_dir(place.path("folder")).expect("made");
    let images: [(&str, &[&str]); 6] = [
        ("v3", &[]),
        ("v2", &["-o", "compat=0.10"]),
        ("overlay", &["-b", "base.raw", "-F", "raw"]),
        ("folder/overlay", &["-b", "../base.raw", "-F", "raw"]),
        (
            "outside",
            &["-o", "data_file=data,data_file_raw=on,extended_l2=on"],
        ),
        (
            "special",
            &[
                "-o",
                "compression_type=zstd,lazy_refcounts=on,refcount_bits=64,cluster_size=4k",
            ],
        ),
    ];
    for (name, options) in images {
        make(
            &place,
            &[&["create", "-q", "-f", "qcow2"], options, &[name, "5M"]].concat(),
        );
    }
    make(&place, &["snapshot", "-c", "before", "v3"]);
    make(
        &place,
        &["snapshot", "-c", "a rather long name of one", "v3"],
    );
    make(&place, &["bitmap", "--add", "v3", "one"]);
    make(
        &place,
        &["bitmap", "--add", "--disable", "-g", "1M", "v3", "two"],
    );
    for name in ["base.raw", "odd"]
        .into_iter()
        .chain(images.map(|(name, _)| name))
    {
        same(&place, &["info", name]);
        same_json(&place, &["info", "--output=json", name]);
        same(&place, &["info", "-U", "-f", "raw", name]);
    }
    // Its magic and nothing else.
    fs::write(place.path("broken"), b"QFI\xfb").expect("written");
    place.fail(&["info", "broken"], "Could not open 'broken': ");
    place.fail(
        &["info", "-f", "qcow2", "base.raw"],
        "Image is not in qcow2 format",
    );
    place.fail(
        &["info", "none"],
        "cannot read 'none': No such file or directory",
    );
    place.fail(&["info"], "FILE");
}

#[test]
fn info_never_opens_what_an_image_names() {
    if !have_qemu_img() {
        return;
    }
    let place = Place::new();
    for name in ["/proc/self/environ", "json:{}", "fifo"] {
        make(
            &place,
            &[
                "create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", "image", "1M",
            ],
        );
        let shown = text(&place.succeed(&["info", "image"]));
        assert!(
            shown.contains(&format!("\nbacking file: {name}\n")),
            "{shown}"
        );
    }
}

#[test]
fn measures_are_those_of_qemu_img() {
    if !have_qemu_img() {
        return;
    }
    let place = Place::new();
    file(&place, "disk", 10 * MIB, &[(0, 1), (5 * MIB, 2)]);
    for options in [
        &["-O", "raw"][..],
        &["-O", "qcow2"],
        &["-O", "qcow2", "-o", "cluster_size=4k"],
        &["-O", "qcow2", "-o", "preallocation=full,refcount_bits=1"],
        &["-O", "qcow2", "-o", "extended_l2=on,cluster_size=1M"],
    ] {
        for source in [&["--size", "1G"][..], &["-f", "raw", "disk"]] {
            let arguments = [&["measure"], options, source].concat();
            same(&place, &arguments);
            same_json(&place, &[&arguments[..], &["--output=json"]].concat());
        }
    }
    place.fail(
        &[
            "measure",
            "-O",
            "qcow2",
            "-o",
            "cluster_size=3",
            "--size",
            "1M",
        ],
        "Cluster size must be a power of two between 512 and 2048k",
    );
    place.fail(&["measure"], "FILE");
    place.fail(&["measure", "--size", "1M", "disk"], "cannot be used with");
}

#[test]
fn raw_disks_change_their_length() {
    let place = Place::new();
    let mut bytes = place.data("disk", 10_240);
    place.succeed(&["resize", "disk", "+2k"]);
    bytes.resize(12_288, 0);
    assert_eq!(place.read("disk"), bytes);
    let words = "Use the --shrink option to perform a shrink operation.";
    place.fail(&["resize", "disk", "-4k"], words);
    place.fail(&["resize", "disk", "1k"], words);
    place.fail(
        &["resize", "--shrink", "disk", "0"],
        "New image size must be positive",
    );
    place.fail(
        &["resize", "--shrink", "disk", "-1G"],
        "New image size must be positive",
    );
    assert_eq!(place.read("disk"), bytes);
    place.succeed(&["resize", "--shrink", "disk", "-4k"]);
    bytes.truncate(8192);
    assert_eq!(place.read("disk"), bytes);
    let words = "Preallocation can only be used for growing images";
    place.fail(&["resize", "--preallocation", "full", "disk", "8k"], words);
    let words = "Unsupported preallocation mode: metadata";
    place.fail(
        &["resize", "--preallocation", "metadata", "disk", "1M"],
        words,
    );
    for mode in ["falloc", "full"] {
        place.succeed(&["resize", "--preallocation", mode, "disk", "+1M"]);
        bytes.resize(bytes.len() + MIB as usize, 0);
        assert_eq!(place.read("disk"), bytes);
    }
    let rooms = fs::metadata(place.path("disk")).expect("there");
    assert!(std::os::unix::fs::MetadataExt::blocks(&rooms) * 512 >= 2 * MIB);
    fs::write(place.path("image"), b"QFI\xfb and more").expect("written");
    place.fail(
        &["resize", "image", "1M"],
        "looks like a qcow2 image; say -f qcow2",
    );
    place.fail(&["resize", "disk", "1x"], "a number of bytes");
}

/// The table is shared with a snapshot, so that going back may not need another one.
#[test]
fn room_that_cannot_be_reserved_leaves_the_old_length() {
    if !have_qemu_img() || !can_mount() {
        return;
    }
    let place = Place::new();
    let Some(tiny) = Tiny::mount(place.path("tiny")) else {
        return;
    };
    make(&place, &["create", "-q", "-f", "qcow2", "tiny/disk", "2M"]);
    let write = ["-f", "qcow2", "-c", "write -P 7 64k 100k", "tiny/disk"];
    run(place.folder.path(), "qemu-io", &write);
    make(&place, &["snapshot", "-c", "kept", "tiny/disk"]);
    // As much of it as there is room for.
    let _ = fs::write(tiny.path.join("fill"), vec![1; 5 * MIB as usize]);
    for mode in ["falloc", "full"] {
        let resize = ["resize", "-f", "qcow2", "--preallocation", mode];
        let ended = place.run(&[&resize[..], &["tiny/disk", "+8M"]].concat());
        assert_eq!(code(&ended), 1, "{mode}");
        let told = complaint(&ended);
        let words = "cannot resize 'tiny/disk': Could not preallocate: No space left on device\n";
        assert!(told.ends_with(words), "{mode}: {told}");
        let length = &info(&tiny.path, "disk")["virtual-size"];
        assert_eq!(*length, 2 * MIB, "{mode}");
        make(&place, &["check", "-q", "tiny/disk"]);
    }
    drop(tiny);
}

#[test]
fn comparisons_say_what_qemu_img_says() {
    if !have_qemu_img() {
        return;
    }
    let place = Place::new();
    file(&place, "one", 10 * MIB, &[(4 * MIB, 1), (7 * MIB, 2)]);
    file(
        &place,
        "same",
        10 * MIB,
        &[(4 * MIB, 1), (7 * MIB, 2), (2 * MIB, 0)],
    );
    file(&place, "longer", 12 * MIB, &[(4 * MIB, 1), (7 * MIB, 2)]);
    file(
        &place,
        "tail",
        12 * MIB,
        &[(4 * MIB, 1), (7 * MIB, 2), (11 * MIB, 1)],
    );
    file(&place, "other", 10 * MIB, &[(4 * MIB, 1), (7 * MIB, 3)]);
    let changed = File::options()
        .write(true)
        .open(place.path("same"))
        .expect("opened");
    for (one, other) in [
        ("one", "same"),
        ("one", "longer"),
        ("longer", "one"),
        ("one", "tail"),
        ("tail", "longer"),
        ("one", "other"),
        ("other", "tail"),
        ("one", "one"),
    ] {
        same(&place, &["compare", "-f", "raw", "-F", "raw", one, other]);
        same(
            &place,
            &["compare", "-q", "-f", "raw", "-F", "raw", other, one],
        );
    }
    same(
        &place,
        &["compare", "-s", "-f", "raw", "-F", "raw", "one", "longer"],
    );
    same(
        &place,
        &["compare", "-s", "-f", "raw", "-F", "raw", "one", "one"],
    );
    for offset in [0, 511, 512, 4 * MIB + 1000, 10 * MIB - 1] {
        changed.write_all_at(&[9], offset).expect("written");
        same(
            &place,
            &["compare", "-f", "raw", "-F", "raw", "one", "same"],
        );
        changed
            .write_all_at(&[u8::from(offset == 4 * MIB + 1000)], offset)
            .expect("written");
    }
    let output = place.run(&["compare", "one", "none"]);
    assert_eq!(code(&output), 2, "{}", complaint(&output));
    assert_eq!(code(&place.run(&["compare", "one"])), 1);
}

/// Images of many kinds with something in each, and the format of each.
fn zoo(place: &Place) -> Vec<(&'static str, &'static str)> {
    file(place, "base.raw", 2 * MIB, &[(0, 1), (MIB, 2)]);
    let images: [(&str, &[&str]); 7] = [
        ("plain", &[]),
        ("old", &["-o", "compat=0.10"]),
        ("small", &["-o", "cluster_size=512"]),
        ("subclusters", &["-o", "extended_l2=on"]),
        ("outside", &["-o", "data_file=data"]),
        // Longer than what is below it.
        ("middle", &["-b", "base.raw", "-F", "raw"]),
        ("top", &["-b", "middle", "-F", "qcow2"]),
    ];
    for (name, options) in images {
        let create = [&["create", "-q", "-f", "qcow2"], options, &[name, "5M"]].concat();
        make(place, &create);
        let mut command = Command::new("qemu-io");
        command
            .args(["-f", "qcow2", name])
            .current_dir(place.folder.path());
        for step in [
            "write -P 7 300k 200k",
            "write -P 8 2100k 3k",
            "write -z 320k 64k",
            "write -z 1M 70k",
            "write -P 9 5000k 120k",
        ] {
            command.args(["-c", step]);
        }
        let output = command.output().expect("it runs");
        assert_eq!(code(&output), 0, "{name}: {}", complaint(&output));
    }
    let convert = [
        "convert",
        "-c",
        "-f",
        "qcow2",
        "-O",
        "qcow2",
        "plain",
        "compressed",
    ];
    make(place, &convert);
    let mut found = vec![("base.raw", "raw"), ("compressed", "qcow2")];
    found.extend(images.map(|(name, _)| (name, "qcow2")));
    found
}

#[test]
fn maps_are_those_of_qemu_img() {
    if !have_qemu_img() || !tools::have("qemu-io", "qemu-utils") {
        return;
    }
    let place = Place::new();
    for (name, format) in zoo(&place) {
        let arguments = ["map", "-f", format, "--output=json", name];
        same_json(&place, &arguments);
        same(&place, &arguments);
        let part = ["--start-offset", "300000", "--max-length", "800000"];
        same(&place, &[&arguments[..], &part].concat());
        // With compressed clusters, qemu-img has no table to show.
        if name != "compressed" {
            same(&place, &["map", "-f", format, name]);
        }
    }
    make(&place, &["create", "-q", "-f", "raw", "without", "0"]);
    let without = ["map", "-f", "raw", "--output=json", "without"];
    same(&place, &without);
    same(&place, &[&without[..], &["--start-offset", "5M"]].concat());
    let create = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "preallocation=metadata",
    ];
    make(&place, &[&create[..], &["assigned", "5M"]].concat());
    let arguments = ["map", "-f", "qcow2", "--output=json", "assigned"];
    same_json(&place, &arguments);
    let shown = text(&place.succeed(&arguments));
    assert!(shown.contains("\"zero\": true, \"data\": true"), "{shown}");
    let shown = text(&place.succeed(&["map", "-f", "qcow2", "compressed"]));
    assert!(shown.contains("compressed      compressed"), "{shown}");
    place.fail(&["map", "plain"], "looks like a qcow2 image; say -f qcow2");
}

#[test]
fn disks_in_any_format_are_compared_and_measured() {
    if !have_qemu_img() || !tools::have("qemu-io", "qemu-utils") {
        return;
    }
    let place = Place::new();
    let images = zoo(&place);
    let mut equal = 0;
    for (one, format) in &images {
        for (other, other_format) in &images {
            let arguments = ["compare", "-f", format, "-F", other_format, one, other];
            same(&place, &arguments);
            equal += i32::from(code(&place.run(&arguments)) == 0);
        }
        same(
            &place,
            &["compare", "-s", "-f", format, "-F", format, one, one],
        );
        for target in [
            &["-O", "raw"][..],
            &["-O", "qcow2", "-o", "cluster_size=4k"],
        ] {
            same(
                &place,
                &[&["measure", "-f", format], target, &[one]].concat(),
            );
        }
    }
    // Those without a backing file hold the same disk.
    assert!(equal > images.len() as i32, "{equal}");
    make(&place, &["bitmap", "--add", "plain", "one"]);
    same(&place, &["measure", "-f", "qcow2", "-O", "qcow2", "plain"]);
}

#[test]
fn qcow2_disks_change_their_length() {
    if !have_qemu_img() || !tools::have("qemu-io", "qemu-utils") {
        return;
    }
    let place = Place::new();
    for (name, format) in zoo(&place)
        .into_iter()
        .filter(|(_, format)| *format == "qcow2")
    {
        let copy = |from: &str, to: &str| {
            fs::copy(place.path(from), place.path(to)).expect("copied");
        };
        let has_data_file = name == "outside";
        if has_data_file {
            copy("data", "data.before");
        }
        copy(name, "reference");
        for change in ["7M", "+1000k", "--shrink 3M", "+0", "4M"] {
            let change: Vec<&str> = change.split(' ').collect();
            let resize = |file| {
                let (length, options) = change.split_last().expect("a length");
                [&["resize", "-f", format], options, &[file, length]].concat()
            };
            same_in(&place, &resize(name), &resize("reference"), has_data_file);
            make(&place, &["check", "-q", name]);
            if !has_data_file {
                make(
                    &place,
                    &[
                        "compare",
                        "-q",
                        "-f",
                        format,
                        "-F",
                        format,
                        name,
                        "reference",
                    ],
                );
            }
        }
        place.fail(
            &["resize", "-f", format, name, "1M"],
            "Use the --shrink option to perform a shrink operation.",
        );
        if !has_data_file {
            let grow = [
                "resize",
                "-f",
                format,
                "--preallocation",
                "full",
                name,
                "+1M",
            ];
            place.succeed(&grow);
            make(&place, &["check", "-q", name]);
        }
    }
}

/// Ours changes one file and theirs another one, unless they would share a data file; both say the same.
fn same_in(place: &Place, ours: &[&str], theirs: &[&str], only_ours: bool) {
    let output = place.succeed(ours);
    if !only_ours {
        let expected = qemu_img(place, theirs);
        assert_eq!(text(&output), text(&expected), "{ours:?}");
    }
}

#[test]
fn chains_are_followed_as_far_as_is_safe() {
    if !have_qemu_img() {
        return;
    }
    let place = Place::new();
    file(&place, "base.raw", MIB, &[]);
    let chain = |name: &str, backing: &[&str]| {
        make(
            &place,
            &[
                &["create", "-q", "-u", "-f", "qcow2"],
                backing,
                &[name, "1M"],
            ]
            .concat(),
        );
    };
    chain("middle", &["-b", "base.raw", "-F", "raw"]);
    chain("top", &["-b", "./middle", "-F", "qcow2"]);
    let arguments = ["info", "--backing-chain", "-f", "qcow2", "top"];
    same(&place, &arguments);
    same_json(&place, &[&arguments[..], &["--output=json"]].concat());
    same_json(
        &place,
        &["info", "--backing-chain", "--output=json", "base.raw"],
    );
    place.fail(
        &["info", "--backing-chain", "top"],
        "say -f qcow2 to follow",
    );
    rustix::fs::mknodat(
        rustix::fs::CWD,
        place.path("fifo"),
        rustix::fs::FileType::Fifo,
        0o600.into(),
        0,
    )
    .expect("made");
    for (backing, words) in [
        (
            &["-b", "json:{}", "-F", "raw"][..],
            "is not understood (Parameter 'file' is missing)",
        ),
        (
            &["-b", "nbd:host:1", "-F", "raw"],
            "is not the name of a file",
        ),
        (
            &["-b", "/proc/self/environ", "-F", "raw"],
            "belongs to a process or the kernel",
        ),
        (&["-b", "fifo", "-F", "raw"], "fifo"),
        (&["-b", "none", "-F", "raw"], "none"),
        (&["-b", "./odd", "-F", "qcow2"], "creates an infinite loop"),
    ] {
        chain("odd", backing);
        place.fail(&["info", "--backing-chain", "-f", "qcow2", "odd"], words);
        let advice = "; `blockyard rebase -u -b FILE -F FORMAT IMAGE` gives it a name that is";
        if words.starts_with("is ") || words.starts_with("belongs ") {
            for command in [
                &["info", "--backing-chain", "-f", "qcow2", "odd"][..],
                &["chain", "odd"],
                &["commit", "odd"],
                &["map", "-f", "qcow2", "odd"],
            ] {
                place.fail(command, &format!("{words} and is not followed{advice}"));
            }
        }
        place.succeed(&["info", "-f", "qcow2", "odd"]);
    }
    // What the advice says does help.
    chain("odd", &["-b", "json:{}", "-F", "raw"]);
    place.succeed(&["rebase", "-u", "-b", "base.raw", "-F", "raw", "odd"]);
    place.succeed(&["chain", "odd"]);
}
