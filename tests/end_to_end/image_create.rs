//! `create` held against qemu-img: the same files, nothing overwritten unasked, nothing half made left.

use std::fs;

use serde_json::Value;

use crate::image_commands::{have_qemu_img, make, qemu_img, same, text};
use crate::place::{MIB, Place};

#[test]
fn new_images_are_whole_and_those_of_qemu_img() {
    if !have_qemu_img() {
        return;
    }
    let place = Place::new();
    for options in [
        &[][..],
        &["-o", "compat=0.10,cluster_size=512"],
        &["-o", "preallocation=metadata,extended_l2=on"],
        &[
            "-o",
            "compression_type=zstd,lazy_refcounts=on,refcount_bits=1",
        ],
    ] {
        let create = |name| [&["create", "-q", "-f", "qcow2"], options, &[name, "5M"]].concat();
        place.succeed(&create("image"));
        make(&place, &["check", "-q", "image"]);
        let shown = |name: &str| {
            let mut value: Value =
                serde_json::from_slice(&qemu_img(&place, &["info", "--output=json", name]).stdout)
                    .expect("JSON");
            for member in ["filename", "actual-size", "children"] {
                value.as_object_mut().expect("an object").remove(member);
            }
            value
        };
        let ours = shown("image");
        make(&place, &create("image"));
        assert_eq!(ours, shown("image"), "{options:?}");
        fs::remove_file(place.path("image")).expect("removed");
    }
    place.succeed(&["create", "disk.raw", "3M"]);
    assert_eq!(place.read("disk.raw"), vec![0; 3 * MIB as usize]);
    place.succeed(&["create", "-o", "preallocation=full,size=1000", "odd.raw"]);
    assert_eq!(place.read("odd.raw").len(), 1024);
}

#[test]
fn an_overlay_is_as_long_as_its_backing_file() {
    if !have_qemu_img() {
        return;
    }
    let place = Place::new();
    fs::create_dir(place.path("folder")).expect("made");
    place.succeed(&["create", "-f", "qcow2", "folder/base", "7M"]);
    place.succeed(&[
        "create",
        "-f",
        "qcow2",
        "-b",
        "base",
        "-F",
        "qcow2",
        "folder/overlay",
    ]);
    same(&place, &["info", "folder/overlay"]);
    let shown = text(&qemu_img(&place, &["info", "folder/overlay"]));
    assert!(
        shown.contains("virtual size: 7 MiB") && shown.contains("backing file: base"),
        "{shown}"
    );
    let before = place.names();
    let refused: [(&[&str], &str); 6] = [
        (&["-b", "none", "-F", "raw", "new"], "'none'"),
        (&["-b", "folder/base", "new"], "--backing-format"),
        (
            &["-o", "backing_file=folder/base", "new"],
            "say -F raw or -F qcow2",
        ),
        (
            &["-u", "-b", "none", "-F", "raw", "new"],
            "Image creation needs a size parameter",
        ),
        (
            &["-b", "folder", "-F", "raw", "new", "1M"],
            "is a directory",
        ),
        (
            &["-b", "folder/base", "-F", "vmdk", "new"],
            "Unknown driver 'vmdk'",
        ),
    ];
    for (arguments, words) in refused {
        place.fail(&[&["create", "-f", "qcow2"], arguments].concat(), words);
    }
    assert_eq!(place.names(), before);
    place.succeed(&[
        "create", "-f", "qcow2", "-u", "-b", "none", "-F", "raw", "new", "1M",
    ]);
}

#[test]
fn nothing_is_overwritten_unasked_and_nothing_half_made_stays() {
    let place = Place::new();
    let bytes = place.data("there", 5000);
    place.fail(
        &["create", "-f", "qcow2", "there", "1M"],
        "--force overwrites it",
    );
    place.fail(&["create", "there", "1M"], "--force overwrites it");
    assert_eq!(place.read("there"), bytes);
    let refused = ["create", "-f", "qcow2", "-o", "cluster_size=3", "new", "1M"];
    place.fail(&refused, "Cluster size must be a power of two");
    place.fail(&["create", "new"], "Image creation needs a size parameter");
    place.fail(
        &["create", "-o", "cluster_size=4k", "new", "1M"],
        "Invalid parameter",
    );
    let twice = ["create", "-o", "size=1M", "new", "1M"];
    place.fail(&twice, "The image size must be specified only once");
    // The data file is there, so that the image is given up.
    let outside = [
        "create",
        "-f",
        "qcow2",
        "-o",
        "data_file=there",
        "new",
        "1M",
    ];
    place.fail(&outside, "--force overwrites it");
    assert_eq!(place.names(), ["there"]);
    place.succeed(&["create", "--force", "-f", "qcow2", "there", "1M"]);
    assert!(place.read("there").starts_with(b"QFI\xfb"));
    place.succeed(&["create", "--force", "there", "1M"]);
    assert_eq!(place.read("there"), vec![0; MIB as usize]);
    let help = text(&place.succeed(&["create", "-f", "qcow2", "-o", "help"]));
    assert!(help.contains("cluster_size=<size>"), "{help}");
}

/// Not even when it may be overwritten, and by whatever name it goes.
#[test]
fn no_new_image_takes_the_place_of_what_it_stands_on() {
    let place = Place::new();
    place.data("base", 1 << 20);
    place.succeed(&["create", "-f", "qcow2", "-b", "base", "-F", "raw", "top"]);
    std::fs::hard_link(place.path("top"), place.path("hard")).expect("linked");
    std::os::unix::fs::symlink("top", place.path("soft")).expect("linked");
    let before = (place.names(), place.read("base"), place.read("top"));
    let absolute = place.path("top").display().to_string();
    fn make<'a>(more: &[&'a str]) -> Vec<&'a str> {
        [&["create", "--force", "-f", "qcow2"], more].concat()
    }
    let stands_on_it = "cannot be overwritten: the new image is to stand on it";
    for (file, backing) in [
        ("top", "top"),
        ("./top", "top"),
        ("top", "./top"),
        ("top", &absolute),
        ("hard", "top"),
        ("soft", "top"),
        ("base", "top"),
        ("base", "soft"),
    ] {
        let arguments = make(&["-b", backing, "-F", "qcow2", file]);
        place.fail(&arguments, stands_on_it);
        let data_file = format!("data_file={file}");
        let arguments = make(&["-b", backing, "-F", "qcow2", "-o", &data_file, "new"]);
        place.fail(&arguments, stands_on_it);
        let unsafely = make(&["-u", "-b", backing, "-F", "qcow2", file, "1M"]);
        place.fail(&unsafely, stands_on_it);
    }
    for file in ["top", "hard", "new"] {
        let data_file = match file {
            "new" => "data_file=./new",
            _ => "data_file=top",
        };
        place.fail(&make(&["-o", data_file, file, "1M"]), "are the same file");
    }
    assert_eq!(
        (place.names(), place.read("base"), place.read("top")),
        before
    );
}
