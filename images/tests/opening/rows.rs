//! Every way in which opening is refused, as rows: what is damaged, and what is said then; and what is not refused.

use crate::images::Image;
use crate::{extension_rows, header_rows, table_rows};

/// A damaged image and what becomes of it.
pub(crate) struct Row {
    /// What was done.
    pub(crate) damage: &'static str,
    pub(crate) image: Image,
    /// The text for who only looks at metadata, reads, and reads and writes; `None`: it opens.
    pub(crate) texts: [Option<&'static str>; 3],
    /// QEMU opens it all the same.
    pub(crate) qemu_opens: bool,
}

pub(crate) type Texts = [Option<&'static str>; 3];

pub(crate) const fn all(text: &'static str) -> Texts {
    [Some(text); 3]
}

pub(crate) const fn content(text: &'static str) -> Texts {
    [None, Some(text), Some(text)]
}

pub(crate) const fn writing(text: &'static str) -> Texts {
    [None, None, Some(text)]
}

pub(crate) const OPENS: Texts = [None; 3];

/// A number of 16, 32 or 64 bits at an offset.
pub(crate) type Put = (u64, Number);

#[derive(Clone, Copy)]
pub(crate) enum Number {
    Byte(u8),
    Short(u16),
    Word(u32),
    Long(u64),
}
use Number::{Byte, Long, Short, Word};

fn damaged(puts: &[Put]) -> Image {
    let mut image = Image::valid();
    for (offset, number) in puts {
        match number {
            Byte(number) => image.put(*offset, &[*number]),
            Short(number) => image.put(*offset, &number.to_be_bytes()),
            Word(number) => image.put(*offset, &number.to_be_bytes()),
            Long(number) => image.put(*offset, &number.to_be_bytes()),
        }
    }
    image
}

pub(crate) fn extended(extensions: &[(u32, &[u8])], puts: &[Put]) -> Image {
    let mut image = damaged(puts);
    image.put_extensions(extensions);
    image
}

/// All rows.
pub(crate) fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for (damage, puts, texts) in header_rows::fields()
        .into_iter()
        .chain(table_rows::tables())
    {
        rows.push(Row {
            damage,
            image: damaged(&puts),
            texts,
            qemu_opens: texts == OPENS,
        });
    }
    for (damage, puts, texts) in table_rows::places() {
        rows.push(Row {
            damage,
            image: damaged(&puts),
            texts,
            qemu_opens: true,
        });
    }
    for (damage, image, texts) in extension_rows::extensions() {
        rows.push(Row {
            damage,
            image,
            texts,
            qemu_opens: texts == OPENS,
        });
    }
    rows
}

/// What was done, to which numbers, and what is said then.
pub(crate) type Fields = Vec<(&'static str, Vec<Put>, Texts)>;
