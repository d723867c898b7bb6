//! `backup` and `mirror` of qcow2 images without a daemon, and backups of what a bitmap says has changed: held against qemu-img, ended
//! early in every way, and refused where something would be missing in the copy.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use crate::place::{Place, Running, Tiny, can_mount, code, complaint, events};
use crate::tools;

/// Runs a tool of QEMU's in the place; what it prints.
fn tool(place: &Place, program: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(place.path("."));
    let ended = tools::run_command(command, "");
    assert_eq!(
        ended.code,
        Some(0),
        "{program} {arguments:?}: {}",
        ended.errors
    );
    ended.output
}

/// Writes pieces of 64 KiB, each with its own byte, through QEMU, which keeps the bitmaps up to date.
fn write(place: &Place, image: &str, pieces: &[(u64, u8)]) {
    let mut command = Command::new("qemu-io");
    command
        .args(["-f", "qcow2", image])
        .current_dir(place.path("."));
    let script: String = pieces
        .iter()
        .map(|(offset_kib, byte)| format!("write -q -P {byte} {offset_kib}k 64k\n"))
        .collect();
    let ended = tools::run_command(command, &script);
    assert_eq!(ended.code, Some(0), "{}", ended.errors);
}

fn require_equal(place: &Place, one: (&str, &str), two: (&str, &str)) {
    let formats = ["compare", "-f", one.0, "-F", two.0, one.1, two.1];
    tool(place, "qemu-img", &formats);
}

fn require_sound(place: &Place, image: &str) {
    tool(place, "qemu-img", &["check", "-q", "-f", "qcow2", image]);
}

/// A bitmap as our command shows it: how many bytes have changed, its flags.
fn bitmap(place: &Place, image: &str, name: &str) -> (u64, Vec<String>) {
    let output = place.succeed(&["bitmap", "list", "--json", image]);
    let all: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let all = all.as_array().expect("an array");
    let found = all.iter().find(|one| one["name"] == name).expect("there");
    let flags = found["flags"].as_array().expect("flags").iter();
    let flags = flags.map(|flag| flag.as_str().expect("a name").to_owned());
    (
        found["dirty-bytes"].as_u64().unwrap_or_default(),
        flags.collect(),
    )
}

/// An image of 64 MiB with some data, and a bitmap that has recorded nothing since.
fn disk(place: &Place) {
    tool(
        place,
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "disk", "64M"],
    );
    write(place, "disk", &[(0, 1), (640, 2), (4096, 3), (65472, 4)]);
    tool(
        place,
        "qemu-img",
        &["bitmap", "--add", "-f", "qcow2", "disk", "b"],
    );
}

#[test]
fn disks_go_from_any_format_to_any() {
    if !tools::have_oracle() {
        return;
    }
    let place = Place::new();
    disk(&place);
    tool(
        &place,
        "qemu-img",
        &["convert", "-f", "qcow2", "-O", "raw", "disk", "disk.raw"],
    );
    // Half a disk in an overlay, the rest below.
    tool(
        &place,
        "qemu-img",
        &[
            "create", "-q", "-f", "qcow2", "-b", "disk", "-F", "qcow2", "top", "64M",
        ],
    );
    write(&place, "top", &[(64, 9), (4096, 8)]);
    for kind in ["backup", "mirror"] {
        for (source_format, source) in [("qcow2", "disk"), ("raw", "disk.raw"), ("qcow2", "top")] {
            for target_format in ["raw", "qcow2"] {
                let copy = [kind, "--verify", "-f", source_format, "-O", target_format];
                let output = place.succeed(&[&copy[..], &[source, "copy"]].concat());
                let said = String::from_utf8_lossy(&output.stdout).into_owned();
                assert!(said.ends_with(", verified\n"), "{said}");
                require_equal(&place, (source_format, source), (target_format, "copy"));
                if target_format == "qcow2" {
                    require_sound(&place, "copy");
                }
                std::fs::remove_file(place.path("copy")).expect("removed");
            }
        }
    }
    assert_eq!(bitmap(&place, "disk", "b"), (0, vec!["auto".to_owned()]));
    place.succeed(&[
        "backup",
        "-f",
        "qcow2",
        "-O",
        "qcow2",
        "--compress",
        "-o",
        "compression_type=zstd,cluster_size=32k",
        "disk",
        "small",
    ]);
    require_equal(&place, ("qcow2", "disk"), ("qcow2", "small"));
    require_sound(&place, "small");
    let facts = tool(
        &place,
        "qemu-img",
        &["info", "-f", "qcow2", "--output", "json", "small"],
    );
    let facts: Value = serde_json::from_str(&facts).expect("JSON");
    assert_eq!(facts["cluster-size"], 32 << 10);
    let map = tool(
        &place,
        "qemu-img",
        &["map", "-f", "qcow2", "--output", "json", "small"],
    );
    assert!(map.contains("\"compressed\": true"), "{map}");
    // One that is there already is emptied first.
    place.fail(
        &["backup", "-f", "qcow2", "-O", "qcow2", "top", "small"],
        "--force",
    );
    place.succeed(&[
        "backup", "--force", "-f", "qcow2", "-O", "qcow2", "top", "small",
    ]);
    require_equal(&place, ("qcow2", "top"), ("qcow2", "small"));
}

#[test]
fn a_chain_of_backups_is_the_disk_at_each_of_them() {
    if !tools::have_oracle() {
        return;
    }
    let place = Place::new();
    disk(&place);
    let full = ["backup", "-f", "qcow2", "-O", "qcow2", "--manifest"];
    place.succeed(&[&full[..], &["sums0", "disk", "day0"]].concat());
    let mut previous = "day0".to_owned();
    for day in 1..=4_u8 {
        let pieces = [
            (u64::from(day) * 128, day),
            (4096 + u64::from(day) * 64, 100 + day),
            (0, 200 + day),
        ];
        write(&place, "disk", &pieces);
        assert_eq!(bitmap(&place, "disk", "b").0, 3 << 16);
        let (target, kept) = (format!("day{day}"), format!("disk{day}"));
        let (sums, sums_before) = (format!("sums{day}"), format!("sums{}", day - 1));
        let onto = [
            "backup",
            "--verify",
            "--incremental",
            "b",
            "--onto",
            &previous,
            "--manifest",
            &sums,
            "--onto-manifest",
            &sums_before,
        ];
        let output = place.succeed(&[&onto[..], &["--json", "disk", &target]].concat());
        let last = events(&output.stdout).pop().expect("an end");
        assert_eq!(last["bitmap"], "b", "{last}");
        assert_eq!(last["bitmap-cleared"], true, "{last}");
        assert_eq!(last["bytes"], 3 << 16, "{last}");
        assert_eq!(bitmap(&place, "disk", "b"), (0, vec!["auto".to_owned()]));
        require_sound(&place, "disk");
        require_sound(&place, &target);
        std::fs::copy(place.path("disk"), place.path(&kept)).expect("copied");
        // There is one for each content, however little of it was read.
        place.succeed(&[&full[..], &["whole", "--force", "disk", "other"]].concat());
        assert!(place.read(&sums) == place.read("whole"), "{sums}");
        previous = target;
    }
    for day in 1..=4 {
        let (target, sums) = (format!("day{day}"), format!("sums{day}"));
        place.succeed(&["verify", "-f", "qcow2", &target, &sums]);
        let (target, kept) = (format!("day{day}"), format!("disk{day}"));
        require_equal(&place, ("qcow2", &target), ("qcow2", &kept));
    }
    let facts = tool(
        &place,
        "qemu-img",
        &["info", "-f", "qcow2", "--output", "json", "day4"],
    );
    let facts: Value = serde_json::from_str(&facts).expect("JSON");
    assert_eq!(facts["backing-filename"], "day3");
    assert_eq!(facts["backing-filename-format"], "qcow2");
    // What has changed below is seen from above.
    write(&place, "day1", &[(640, 9)]);
    let output = place.run(&["verify", "-f", "qcow2", "day4", "sums4"]);
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(
        code(&output) != 0 && told.contains("Differs: 65536 bytes at offset 655360"),
        "{told}"
    );
}

#[test]
fn what_has_changed_can_be_had_alone_and_the_bitmap_kept() {
    if !tools::have_oracle() {
        return;
    }
    let place = Place::new();
    disk(&place);
    place.succeed(&["backup", "-f", "qcow2", "disk", "full.raw"]);
    write(&place, "disk", &[(640, 7), (6400, 8)]);
    let changed = (2 << 16, vec!["auto".to_owned()]);
    place.succeed(&[
        "backup",
        "--incremental",
        "b",
        "--keep-bitmap",
        "disk",
        "changes",
    ]);
    assert_eq!(bitmap(&place, "disk", "b"), changed);
    let map = tool(
        &place,
        "qemu-img",
        &["map", "-f", "qcow2", "--output", "json", "changes"],
    );
    let map: Value = serde_json::from_str(&map).expect("JSON");
    let data = map.as_array().expect("an array").iter();
    let data: Vec<u64> = data
        .filter(|one| one["data"] == true)
        .filter_map(|one| one["start"].as_u64())
        .collect();
    assert_eq!(data, [640 << 10, 6400 << 10]);
    // Onto a raw backup, from another folder.
    std::fs::create_dir(place.path("sub")).expect("made");
    let onto = [
        "backup",
        "--verify",
        "--incremental",
        "b",
        "--onto",
        "full.raw",
    ];
    place.fail(&[&onto[..], &["disk", "sub/next"]].concat(), "full.raw");
    assert_eq!(bitmap(&place, "disk", "b"), changed);
    place.succeed(&[&onto[..], &["-F", "raw", "disk", "sub/next"]].concat());
    require_equal(&place, ("qcow2", "disk"), ("qcow2", "sub/next"));
    assert_eq!(bitmap(&place, "disk", "b").0, 0);
}

/// The image stands on another one, whose name is in its header.
#[test]
fn the_bitmap_of_an_overlay_is_cleared_as_well() {
    if !tools::have_oracle() {
        return;
    }
    let place = Place::new();
    for (format, base) in [("raw", "base.raw"), ("qcow2", "base.qcow2")] {
        let overlay = format!("on-{format}");
        tool(
            &place,
            "qemu-img",
            &["create", "-q", "-f", format, base, "1M"],
        );
        let create = [
            "create", "-q", "-f", "qcow2", "-b", base, "-F", format, &overlay,
        ];
        tool(&place, "qemu-img", &create);
        let full = format!("full-{format}");
        place.succeed(&["backup", "-f", "qcow2", "-O", "qcow2", &overlay, &full]);
        place.succeed(&["bitmap", "add", &overlay, "b"]);
        write(&place, &overlay, &[(64, 7)]);
        let next = format!("next-{format}");
        let by = [
            "backup",
            "--incremental",
            "b",
            "--onto",
            &full,
            &overlay,
            &next,
        ];
        place.succeed(&by);
        require_equal(&place, ("qcow2", &overlay), ("qcow2", &next));
        assert_eq!(bitmap(&place, &overlay, "b").0, 0, "{format}");
    }
}

/// What a disk grows by was something else before it was cut.
#[test]
fn a_disk_that_was_cut_and_has_grown_again_is_copied_as_it_is() {
    if !tools::have_oracle() {
        return;
    }
    let place = Place::new();
    tool(
        &place,
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "disk", "4M"],
    );
    write(&place, "disk", &[(0, 7), (1024, 8), (3072, 9)]);
    place.succeed(&["backup", "-f", "qcow2", "-O", "qcow2", "disk", "full"]);
    place.succeed(&["bitmap", "add", "disk", "b"]);
    place.succeed(&["resize", "--shrink", "-f", "qcow2", "disk", "1M"]);
    place.succeed(&["resize", "-f", "qcow2", "disk", "5M"]);
    place.succeed(&[
        "backup",
        "--incremental",
        "b",
        "--onto",
        "full",
        "disk",
        "next",
    ]);
    require_equal(&place, ("qcow2", "disk"), ("qcow2", "next"));
}

#[test]
fn what_would_miss_something_is_refused_before_anything_changes() {
    if !tools::have_oracle() {
        return;
    }
    let place = Place::new();
    disk(&place);
    place.data("raw", 1 << 20);
    write(&place, "disk", &[(64, 7)]);
    tool(
        &place,
        "qemu-img",
        &["bitmap", "--add", "--disable", "-f", "qcow2", "disk", "off"],
    );
    let before = place.read("disk");
    let names = place.names();
    let by = |bitmap| ["backup", "--incremental", bitmap, "disk", "copy"];
    place.fail(&by("nope"), "'disk' has no bitmap 'nope'");
    place.fail(&by("off"), "Bitmap 'off' of 'disk' is disabled");
    misused(
        &place,
        &["--incremental", "b", "-f", "raw", "disk", "copy"],
        "qcow2 images",
    );
    misused(
        &place,
        &["--incremental", "b", "-O", "raw", "disk", "copy"],
        "qcow2 images",
    );
    misused(
        &place,
        &["--incremental", "b", "--verify", "disk", "copy"],
        "--onto",
    );
    misused(&place, &["--compress", "raw", "copy"], "-O qcow2");
    misused(&place, &["--onto", "disk", "raw", "copy"], "--incremental");
    place.fail(&["backup", "--incremental", "b", "raw", "copy"], "'raw'");
    place.fail(
        &[
            "backup",
            "--incremental",
            "b",
            "--onto",
            "disk",
            "disk",
            "copy",
        ],
        "'disk' is SRC itself",
    );
    place.fail(
        &[
            "backup",
            "--incremental",
            "b",
            "--onto",
            "nowhere",
            "disk",
            "copy",
        ],
        "nowhere",
    );
    place.fail(
        &[
            "backup",
            "-O",
            "qcow2",
            "-o",
            "cluster_size=3",
            "raw",
            "copy",
        ],
        "luster size",
    );
    place.fail(
        &["backup", "-O", "qcow2", "-o", "size=5", "raw", "copy"],
        "as long as SRC",
    );
    assert!(place.read("disk") == before, "nothing has changed");
    assert_eq!(place.names(), names);
    // A previous backup is not overwritten by the next one.
    place.succeed(&["backup", "-f", "qcow2", "-O", "qcow2", "disk", "full"]);
    let full = place.read("full");
    place.fail(
        &[
            "backup",
            "--force",
            "--incremental",
            "b",
            "--onto",
            "full",
            "disk",
            "full",
        ],
        "full",
    );
    assert!(place.read("full") == full, "nothing has changed");
    // One whose image was not closed says so, and its image is left alone.
    mark_in_use(&place.path("disk"));
    place.fail(&by("b"), "Bitmap 'b' of 'disk' is inconsistent");
    place.succeed(&[
        "backup",
        "--incremental",
        "off",
        "--keep-bitmap",
        "disk",
        "copy",
    ]);
}

/// Fails for what was asked, before anything is looked at.
fn misused(place: &Place, arguments: &[&str], words: &str) {
    let output = place.run(&[&["backup"], arguments].concat());
    assert_eq!(code(&output), 2, "{arguments:?}");
    let said = complaint(&output);
    assert!(said.contains(words), "{arguments:?}: {said}");
}

/// Sets the flag of the first bitmap that says that the image was not closed.
fn mark_in_use(image: &Path) {
    let mut bytes = std::fs::read(image).expect("read");
    let number = |bytes: &[u8], at: usize| {
        u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
    };
    // Spec: qcow2, "Bitmaps extension": behind its type and length, the directory's offset comes last.
    let mut at = 104;
    while u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes")) != 0x2385_2875 {
        let length = u32::from_be_bytes(bytes[at + 4..at + 8].try_into().expect("four bytes"));
        at += 8 + (length as usize).next_multiple_of(8);
    }
    let directory = usize::try_from(number(&bytes, at + 24)).expect("an offset");
    // Spec: qcow2, "Bitmap directory": a table's offset and size, then the flags; bit 0 is in_use.
    bytes[directory + 15] |= 1;
    std::fs::write(image, bytes).expect("written");
}

#[test]
fn a_backup_that_ends_early_leaves_the_bitmap_as_it_was() {
    if !tools::have_oracle() {
        return;
    }
    let place = Place::new();
    disk(&place);
    place.succeed(&["backup", "-f", "qcow2", "-O", "qcow2", "disk", "full"]);
    let pieces: Vec<(u64, u8)> = (0..500).map(|nth| (nth * 128, nth as u8 | 1)).collect();
    write(&place, "disk", &pieces);
    let changed = (500 << 16, vec!["auto".to_owned()]);
    assert_eq!(bitmap(&place, "disk", "b"), changed);
    let next = [
        "backup",
        "--incremental",
        "b",
        "--onto",
        "full",
        "disk",
        "next",
    ];
    // Cancelled: what it made is gone.
    let running = Running::start(&place, &next);
    running.signal(Signal::INT);
    assert_eq!(running.end().0, 130);
    assert!(!place.path("next").exists());
    assert_eq!(bitmap(&place, "disk", "b"), changed);
    // Killed: what it made stays, and says nothing.
    let running = Running::start(&place, &next);
    running.signal(Signal::KILL);
    drop(running);
    // The kernel takes down a ring, and with it the locks of its files, once its process has gone.
    let until = Instant::now() + Duration::from_secs(30);
    while code(&place.run(&["bitmap", "list", "disk"])) != 0 {
        assert!(Instant::now() < until, "its locks are still there");
    }
    assert_eq!(bitmap(&place, "disk", "b"), changed);
    require_sound(&place, "disk");
    place.fail(&next, "'next' exists already");
    // The target has no room for it.
    if can_mount()
        && let Some(tiny) = Tiny::mount(place.path("tiny"))
    {
        let small = [
            "backup",
            "--incremental",
            "b",
            "--onto",
            "full",
            "disk",
            "tiny/next",
        ];
        place.fail(&small, "No space left on device");
        assert!(!tiny.path.join("next").exists());
        assert_eq!(bitmap(&place, "disk", "b"), changed);
    }
    // Whatever came before, the next one has all of it.
    place.succeed(&[&next[..], &["--force", "--verify"]].concat());
    require_equal(&place, ("qcow2", "disk"), ("qcow2", "next"));
    assert_eq!(bitmap(&place, "disk", "b").0, 0);
}
