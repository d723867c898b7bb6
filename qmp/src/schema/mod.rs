//! The shape of everything on the wire, as data. Arguments are checked by it, and `query-qmp-schema` is printed from it,
//! so that the two cannot differ.
//!
//! [`check`] refuses what does not fit, in QEMU's words; [`fields`] then reads what does. The types themselves stand in
//! [`protocol`], [`jobs`], [`nodes`], [`bitmaps`], [`checkpoints`], [`exports`], [`images`] and [`objects`], named as in QEMU's documentation.

pub mod bitmaps;
pub mod check;
pub mod checkpoints;
pub mod exports;
pub mod fields;
pub mod images;
pub mod introspect;
pub mod jobs;
pub mod nodes;
pub mod objects;
pub mod protocol;
pub mod transaction;

/// A type of values.
#[derive(Clone, Copy, Debug)]
pub enum Type {
    /// A string.
    Text,
    /// A boolean.
    Bool,
    /// A signed 64-bit integer.
    Int,
    /// A signed 32-bit integer.
    Int32,
    /// An unsigned 16-bit integer.
    Uint16,
    /// An unsigned 32-bit integer.
    Uint32,
    /// An unsigned 64-bit integer; negative numbers wrap, as everywhere in QMP.
    Uint64,
    /// As [`Type::Uint64`], with size suffixes in key=value options.
    Size,
    /// `null`.
    Null,
    /// Anything.
    Any,
    /// One of some words.
    Word(&'static Words),
    /// An object.
    Object(&'static Object),
    /// Told apart by its JSON type.
    Alternate(&'static Alternate),
    /// A list.
    List(&'static Type),
}

/// An enumeration.
#[derive(Debug)]
pub struct Words {
    /// The words, in their order.
    pub words: &'static [&'static str],
}

/// An object type, possibly a union: then the value of its tag decides about further members.
#[derive(Debug)]
pub struct Object {
    /// Members in the order in which they are checked.
    pub members: &'static [Member],
    /// Further members by the value of a tag.
    pub union: Option<Union>,
    /// Features that clients may test for.
    pub features: &'static [&'static str],
}

/// The variable part of a union.
#[derive(Debug)]
pub struct Union {
    /// Which member decides.
    pub tag: &'static str,
    /// Value of the tag, and what it brings; other values bring nothing.
    pub branches: &'static [(&'static str, &'static Object)],
}

/// A member of an object.
#[derive(Debug)]
pub struct Member {
    /// Its name.
    pub name: &'static str,
    /// Its type.
    pub kind: Type,
    /// It may be left out.
    pub optional: bool,
    /// Features that clients may test for.
    pub features: &'static [&'static str],
}

/// A value that may be of several JSON types.
#[derive(Debug)]
pub struct Alternate {
    /// Its name, for errors.
    pub name: &'static str,
    /// The types; at most one per JSON type.
    pub kinds: &'static [Type],
}

/// An event.
#[derive(Debug)]
pub struct EventType {
    /// Its name.
    pub name: &'static str,
    /// Its data.
    pub data: &'static Object,
}

/// A member that must be there.
pub const fn required(name: &'static str, kind: Type) -> Member {
    Member {
        name,
        kind,
        optional: false,
        features: &[],
    }
}

/// A member that may be left out.
pub const fn optional(name: &'static str, kind: Type) -> Member {
    Member {
        name,
        kind,
        optional: true,
        features: &[],
    }
}

impl Member {
    /// The same member, marked as one that may change.
    pub const fn unstable(mut self) -> Self {
        self.features = &["unstable"];
        self
    }

    /// The same member, marked as one that will go.
    pub const fn deprecated(mut self) -> Self {
        self.features = &["deprecated"];
        self
    }
}

impl Object {
    /// A plain object.
    pub const fn of(members: &'static [Member]) -> Self {
        Self {
            members,
            union: None,
            features: &[],
        }
    }

    /// A union.
    pub const fn union(
        members: &'static [Member],
        tag: &'static str,
        branches: &'static [(&'static str, &'static Object)],
    ) -> Self {
        Self {
            members,
            union: Some(Union { tag, branches }),
            features: &[],
        }
    }
}

impl Words {
    /// An enumeration of `words`.
    pub const fn of(words: &'static [&'static str]) -> Self {
        Self { words }
    }
}

/// The object without members.
pub static EMPTY: Object = Object::of(&[]);
