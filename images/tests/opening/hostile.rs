//! Damaged images are refused with the right words by us and by QEMU, and cost little whatever they hold.

use blockyard_images::ImageError;
use blockyard_images::qcow2::layout::header::Access;
use blockyard_images::qcow2::open::read_image;

use crate::images::Image;
use crate::oracle::{Oracle, Write};
use crate::rows::rows;
use crate::storages::{ReadOnlyBytes, now};

/// In the order of a row's texts.
const ACCESSES: [Access; 3] = [Access::Metadata, Access::ReadOnly, Access::ReadWrite];

#[test]
fn every_refusal_has_its_words() {
    let mut different = Vec::new();
    for row in rows() {
        for (access, expected) in ACCESSES.into_iter().zip(row.texts) {
            let file = ReadOnlyBytes::new(row.image.0.clone());
            let said = now(read_image(&file, access)).err();
            let said = said.map(|error| error.to_string());
            if said.as_deref() != expected {
                different.push(format!(
                    "{}, {access:?}: {said:?}, not {expected:?}",
                    row.damage
                ));
            }
        }
    }
    assert!(different.is_empty(), "{different:#?}");
}

#[test]
fn every_refusal_that_does_not_name_its_value_has_a_detail() {
    for row in rows() {
        let file = ReadOnlyBytes::new(row.image.0);
        let Err(refused) = now(read_image(&file, Access::ReadWrite)) else {
            continue;
        };
        let ImageError::Refused { text, detail } = refused else {
            panic!("{}: {refused}", row.damage);
        };
        let names_a_value = text.chars().any(|c| c.is_ascii_digit());
        let is_a_flag = [
            "must be set",
            "must not be set",
            "is corrupt",
            "requires a data file",
        ]
        .iter()
        .any(|words| text.contains(words));
        let is_zero = ["zero", "does not contain", "already exists"]
            .iter()
            .any(|words| text.contains(words));
        assert!(
            detail.is_some() || names_a_value || is_a_flag || is_zero,
            "{}: {text}",
            row.damage
        );
    }
}

#[test]
fn a_check_opens_what_it_is_there_to_find() {
    for row in rows() {
        let file = ReadOnlyBytes::new(row.image.0);
        let opened = now(read_image(&file, Access::Check));
        let only_writers_mind = row.texts[1].is_none() || row.damage.starts_with("L1 ");
        let checkable = only_writers_mind || row.damage == "no refcount table";
        if checkable && row.qemu_opens {
            assert!(opened.is_ok(), "{}: {:?}", row.damage, opened.err());
        }
    }
}

#[test]
fn qemu_uses_the_same_words() {
    let Some(oracle) = Oracle::find() else {
        return;
    };
    let rows = rows();
    let name = |index: usize| format!("{index}.qcow2");
    for (index, row) in rows.iter().enumerate() {
        oracle.write(&name(index), &row.image.0);
    }
    let names: Vec<_> = (0..rows.len()).map(name).collect();
    let said = [
        names.iter().map(|name| oracle.info_text(name)).collect(),
        oracle.open_texts(&names, Write::No),
        oracle.open_texts(&names, Write::Yes),
    ];
    let mut different = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        for ((access, said), text) in ACCESSES.iter().zip(&said).zip(row.texts) {
            let said = said[index].as_deref();
            let expected = text.filter(|_| !row.qemu_opens);
            if said != expected {
                different.push(format!(
                    "{}, {access:?}: {said:?}, not {expected:?}",
                    row.damage
                ));
            }
        }
    }
    assert!(different.is_empty(), "{different:#?}");
}

#[test]
fn qemu_finds_the_valid_image_clean() {
    let Some(oracle) = Oracle::find() else {
        return;
    };
    oracle.write("valid.qcow2", &Image::valid().0);
    let said = oracle.qemu_img(&["check", "valid.qcow2"]);
    assert!(said.contains("No errors were found"), "{said}");
}
