//! What can go wrong with an image, apart from its content: it is refused, it turns out corrupt, or its storage fails.

use blockyard_storage::StorageError;
use blockyard_storage::error::errno_text;

use crate::qcow2::units::HostOffset;

/// A failed operation on an image.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ImageError {
    /// The image, or what is asked of it, is refused; nothing has changed. Texts that clients of QEMU know are QEMU's.
    #[error("{text}")]
    Refused {
        /// One sentence, without full stop.
        text: String,
        /// Which field has which value and what it may be, where the sentence does not say so.
        detail: Option<String>,
    },
    /// A part of the image could not be read, so it was not opened; nothing has changed.
    #[error("{text}: {}", errno_text(.source.errno))]
    Unreadable {
        /// Which part, in QEMU's words.
        text: &'static str,
        /// What the storage says.
        source: StorageError,
    },
    /// The image contradicts itself; found while it is in use.
    #[error("{}", .0.text)]
    Corrupt(Corruption),
    /// A storage below failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The image has been found corrupt before, or lost a flush: it refuses further work.
    #[error("The image is not usable any more: {0}")]
    Broken(String),
}

/// A contradiction in an image, as `BLOCK_IMAGE_CORRUPTED` reports it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Corruption {
    /// What is wrong, in QEMU's words where it has some.
    pub text: String,
    /// Where, if that is known.
    pub at: Option<HostOffset>,
    /// How many bytes it is about.
    pub length_bytes: Option<u64>,
    /// Writing on would do harm: the image takes no further request and its `corrupt` bit is set.
    pub fatal: bool,
}

impl ImageError {
    /// A refusal that needs no further explanation.
    pub fn refused(text: impl Into<String>) -> Self {
        Self::Refused {
            text: text.into(),
            detail: None,
        }
    }

    /// A refusal, and which field has which value.
    pub fn refused_because(text: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Refused {
            text: text.into(),
            detail: Some(detail.into()),
        }
    }
}
