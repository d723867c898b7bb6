//! Types of dirty bitmaps.

use crate::schema::{Alternate, Object, Type, optional, required};

/// A bitmap by name.
pub static BITMAP: Object =
    Object::of(&[required("node", Type::Text), required("name", Type::Text)]);

/// Arguments of `block-dirty-bitmap-add`.
pub static ADD: Object = Object::of(&[
    required("node", Type::Text),
    required("name", Type::Text),
    optional("granularity", Type::Uint32),
    optional("persistent", Type::Bool),
    optional("disabled", Type::Bool),
]);

/// `BlockDirtyBitmapSha256`.
pub static DIGEST: Object = Object::of(&[required("sha256", Type::Text)]);

/// `BlockDirtyBitmapOrStr`.
pub static BITMAP_OR_NAME: Alternate = Alternate {
    name: "BlockDirtyBitmapOrStr",
    kinds: &[Type::Text, Type::Object(&BITMAP)],
};

/// Arguments of `block-dirty-bitmap-merge`.
pub static MERGE: Object = Object::of(&[
    required("node", Type::Text),
    required("target", Type::Text),
    required("bitmaps", Type::List(&Type::Alternate(&BITMAP_OR_NAME))),
]);
