//! Before a disk changes, bitmaps that would become stale are marked, and only those: QEMU agrees on what is left.

use blockyard_images::qcow2::layout::header::{Access, autoclear};
use blockyard_images::qcow2::open::{BeforeWriting, DiskChange, OpenedImage, read_image};

use crate::images::Image;
use crate::oracle::Oracle;
use crate::storages::{ReadOnlyBytes, now};

fn opened(bytes: &[u8]) -> OpenedImage {
    let file = ReadOnlyBytes::new(bytes.to_vec());
    now(read_image(&file, Access::ReadWrite)).expect("it is sound")
}

/// The image after these changes.
fn changed(bytes: &[u8], changes: &BeforeWriting) -> Image {
    let mut image = Image(bytes.to_vec());
    for overwrite in &changes.overwrites {
        image.put(overwrite.at.0, &overwrite.bytes);
    }
    let mut field = [0; 8];
    field.copy_from_slice(&image.0[88..96]);
    let autoclear = u64::from_be_bytes(field) & !changes.clear_autoclear;
    image.put(88, &autoclear.to_be_bytes());
    assert_eq!(image.0.len(), bytes.len(), "nothing is added");
    image
}

fn in_use(image: &OpenedImage) -> Vec<bool> {
    image
        .bitmaps
        .iter()
        .map(|bitmap| bitmap.is_in_use())
        .collect()
}

#[test]
fn only_what_becomes_stale_is_marked() {
    let image = Image::valid();
    for (change, marked) in [
        (DiskChange::Content, [true, false]),
        (DiskChange::Length, [true, true]),
    ] {
        let mut before = opened(&image.0);
        assert_eq!(in_use(&before), [false, false]);
        let changes = before.mark_before(change).expect("well-formed");
        assert!(!changes.is_empty());
        let after = opened(&changed(&image.0, &changes).0);
        assert_eq!(in_use(&after), marked);
        assert_eq!(after.bitmaps, before.bitmaps, "known in memory too");
        assert_eq!(after.header, before.header);
        let again = before.mark_before(change).expect("well-formed");
        assert!(again.is_empty(), "{again:?}");
    }
}

#[test]
fn unknown_autoclear_bits_go_and_known_ones_stay() {
    let mut image = Image::valid();
    image.put(
        88,
        &(1_u64 << 63 | 1 << 7 | autoclear::BITMAPS).to_be_bytes(),
    );
    let mut before = opened(&image.0);
    let changes = before
        .mark_before(DiskChange::Content)
        .expect("well-formed");
    assert_eq!(changes.clear_autoclear, 1 << 63 | 1 << 7);
    assert_eq!(before.header.autoclear, autoclear::BITMAPS);
    let after = opened(&changed(&image.0, &changes).0);
    assert_eq!(after.header.autoclear, autoclear::BITMAPS);
}

#[test]
fn an_image_without_bitmaps_needs_nothing() {
    let image = Image::version_2();
    let changes = opened(&image.0).mark_before(DiskChange::Length);
    assert_eq!(changes, Ok(BeforeWriting::default()));
}

#[test]
fn qemu_takes_marked_bitmaps_for_inconsistent_and_the_others_for_valid() {
    let Some(oracle) = Oracle::find() else {
        return;
    };
    oracle.create("", &[]);
    for (name, disabled) in [("records", false), ("frozen", true)] {
        let state = if disabled { "--disable" } else { "--enable" };
        oracle.qemu_img(&["bitmap", "--add", state, "created.qcow2", name]);
    }
    let bytes = oracle.read("created.qcow2");
    let mut before = opened(&bytes);
    let changes = before
        .mark_before(DiskChange::Content)
        .expect("well-formed");
    oracle.write("created.qcow2", &changed(&bytes, &changes).0);
    let check = oracle.qemu_img(&["check", "created.qcow2"]);
    assert!(check.contains("No errors were found"), "{check}");
    for (name, usable) in [("records", false), ("frozen", true)] {
        let cleared = oracle.run("qemu-img", &["bitmap", "--clear", "created.qcow2", name]);
        assert_eq!(cleared.status.success(), usable, "{name}: {cleared:?}");
    }
    // Its name is still known, so it can be removed.
    oracle.qemu_img(&["bitmap", "--remove", "created.qcow2", "records"]);
    let left = opened(&oracle.read("created.qcow2"));
    assert_eq!(left.bitmaps.len(), 1);
}
