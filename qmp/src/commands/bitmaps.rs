//! Commands of dirty bitmaps.

use blockyard_engine::request::{BitmapChange, BitmapName, Request};

use crate::commands::{Action, Command, call};
use crate::error::QmpError;
use crate::schema::Type;
use crate::schema::bitmaps::{ADD, BITMAP, DIGEST, MERGE};
use crate::schema::fields::Fields;

pub(super) static COMMANDS: &[Command] = &[
    Command::act("block-dirty-bitmap-add", &ADD, |mut a| {
        change(BitmapChange::Add {
            granularity_bytes: a
                .unsigned("granularity")
                .map(|bytes| u32::try_from(bytes).unwrap_or(u32::MAX)),
            persistent: a.flag("persistent").unwrap_or(false),
            disabled: a.flag("disabled").unwrap_or(false),
            bitmap: bitmap_name(&mut a),
        })
    }),
    Command::act("block-dirty-bitmap-remove", &BITMAP, |mut a| {
        change(BitmapChange::Remove(bitmap_name(&mut a)))
    }),
    Command::act("block-dirty-bitmap-clear", &BITMAP, |mut a| {
        change(BitmapChange::Clear(bitmap_name(&mut a)))
    }),
    Command::act("block-dirty-bitmap-enable", &BITMAP, |mut a| {
        change(BitmapChange::Enable(bitmap_name(&mut a)))
    }),
    Command::act("block-dirty-bitmap-disable", &BITMAP, |mut a| {
        change(BitmapChange::Disable(bitmap_name(&mut a)))
    }),
    Command::act("block-dirty-bitmap-merge", &MERGE, |mut a| {
        let node = a.required_text("node");
        let sources = a.names_or_objects("bitmaps").into_iter();
        let source = |source: Result<String, Fields>| match source {
            Ok(name) => BitmapName {
                node: node.clone(),
                name,
            },
            Err(mut fields) => bitmap_name(&mut fields),
        };
        change(BitmapChange::Merge {
            sources: sources.map(source).collect(),
            target: BitmapName {
                name: a.required_text("target"),
                node: node.clone(),
            },
        })
    }),
    Command::new(
        "x-debug-block-dirty-bitmap-sha256",
        &BITMAP,
        Type::Object(&DIGEST),
        |mut a| call(Request::DigestBitmap(bitmap_name(&mut a))),
    )
    .unstable(),
];

fn change(change: BitmapChange) -> Result<Action, QmpError> {
    call(Request::ChangeBitmap(change))
}

/// Reads the name of a bitmap.
pub(super) fn bitmap_name(fields: &mut Fields) -> BitmapName {
    BitmapName {
        node: fields.required_text("node"),
        name: fields.required_text("name"),
    }
}
