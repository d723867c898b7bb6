//! Random damages: ours and QEMU's check find the same, and nothing panics.

use std::cell::Cell;

use blockyard_images::qcow2::layout::entries::{COMPRESSED, COPIED};
use blockyard_simulator::{Seed, each_seed};

use crate::images::{Image, NAME, RECIPES};
use crate::oracle::Oracle;
use crate::verdict::{assert_same, ours, theirs};

/// Changes one to three things in the metadata.
pub(crate) fn damage(image: &mut Image, dice: &Seed) -> String {
    let tables = image.tables();
    let cluster = image.cluster_bytes() as u64;
    let mut told = String::new();
    for _ in 0..=dice.below(3) {
        let (table, bytes) = *dice.pick(&tables);
        // The header decides whether there is anything to check: rarely.
        if table == 0 && !dice.one_in(4) {
            continue;
        }
        let offset = table + dice.below(bytes as u64 / 8) as usize * 8;
        let old = image.word(offset);
        let (other, other_bytes) = *dice.pick(&tables);
        let elsewhere = other + dice.below(other_bytes as u64 / 8) as usize * 8;
        let new = match dice.below(10) {
            0 => old ^ 1 << dice.below(64),
            1 => old ^ COPIED,
            2 => old ^ COMPRESSED,
            3 => 0,
            4 => image.word(elsewhere),
            5 => other as u64 | COPIED,
            6 => (dice.below(image.bytes.len() as u64 / cluster + 2) * cluster) | COPIED,
            7 => dice.any(),
            8 => old ^ 0x200 << dice.below(8),
            _ => old ^ dice.any() & 0xff << (dice.below(8) * 8),
        };
        told += &format!("{offset:#x}: {old:#x} -> {new:#x}; ");
        image.set_word(offset, new);
    }
    if dice.one_in(12) && image.bytes.len() > 512 {
        let cut = dice.below(3 * cluster) as usize;
        told += &format!("cut by {cut}");
        let length = image.bytes.len().saturating_sub(cut).max(512);
        image.bytes.truncate(length);
    }
    told
}

#[test]
fn images_that_qemu_makes_are_clean() {
    let Some(oracle) = Oracle::find() else {
        return;
    };
    for recipe in RECIPES {
        let image = recipe.make(&oracle);
        let ours = ours(&image).expect("sound");
        let theirs = theirs(&oracle, NAME).expect("sound");
        assert_same(&ours, &theirs, &format!("{recipe:?}"));
        assert_eq!(ours.lines, [""; 0], "{recipe:?}");
    }
}

#[test]
fn random_damages_are_found_as_qemu_finds_them() {
    let Some(oracle) = Oracle::find() else {
        return;
    };
    let images: Vec<Vec<u8>> = RECIPES.iter().map(|recipe| recipe.make(&oracle)).collect();
    let (tried, compared) = (Cell::new(0), Cell::new(0));
    each_seed("blockyard-images", "random_damages", 150, |seed| {
        tried.set(tried.get() + 1);
        let dice = Seed::new(seed);
        let which = dice.below(images.len() as u64) as usize;
        let mut image = Image {
            bytes: images[which].clone(),
        };
        let told = damage(&mut image, &dice);
        let found = ours(&image.bytes);
        oracle.write(NAME, &image.bytes);
        let Ok(expected) = theirs(&oracle, NAME) else {
            return;
        };
        compared.set(compared.get() + 1);
        let recipe = RECIPES[which];
        let found = found.unwrap_or_else(|error| panic!("{recipe:?}: {told}: {error}"));
        assert_same(&found, &expected, &format!("{recipe:?}: {told}"));
    });
    // QEMU opens most of them.
    assert!(tried.get() < 10 || compared.get() * 3 > tried.get() * 2);
}
