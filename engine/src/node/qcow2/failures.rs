//! What a client hears when a request fails, and what the manager hears when an image turns out corrupt.

use blockyard_images::{Corruption, ImageError};
use blockyard_storage::error::{EBUSY, EINVAL, EIO, ENOMEDIUM};
use blockyard_storage::{ByteRange, Operation, StorageError};

use crate::error::NodeError;
use crate::event::EventKind;
use crate::node::qcow2::mover::Mover;
use crate::node::refused;

/// What of an image's corruption has been told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Told {
    #[default]
    Nothing,
    /// Something that leaves the node usable. Told once.
    Harmless,
    /// Something that does not.
    Fatal,
}

impl Mover {
    /// Why a request is refused before it is tried.
    pub(super) fn refusal(&self, operation: Operation, range: ByteRange) -> Option<NodeError> {
        if let Err(error) = self.check_known(operation, range) {
            return Some(error);
        }
        // Who reads may go on: nothing that is known of the image here leads to something else.
        let errno = match self.away.get() && operation != Operation::Read {
            true => EBUSY,
            false => refused(operation, range, self.read_only(), self.length())?,
        };
        Some(self.error(operation, Some(range), errno))
    }

    /// That the image is not [lost](Self::lost).
    pub(super) fn check_known(
        &self,
        operation: Operation,
        range: ByteRange,
    ) -> Result<(), NodeError> {
        match self.lost.get() {
            true => Err(self.error(operation, Some(range), ENOMEDIUM)),
            false => Ok(()),
        }
    }

    /// A failure of this node.
    pub(super) fn error(
        &self,
        operation: Operation,
        range: Option<ByteRange>,
        errno: i32,
    ) -> NodeError {
        NodeError {
            node: self.name.clone(),
            source: StorageError {
                operation,
                range,
                errno,
            },
        }
    }

    /// A failure of the image, as the caller of `operation` hears it.
    pub(super) fn failed(
        &self,
        error: ImageError,
        operation: Operation,
        range: Option<ByteRange>,
    ) -> NodeError {
        let errno = match error {
            ImageError::Storage(error) | ImageError::Unreadable { source: error, .. } => {
                return self.files.file.node_error(&error);
            }
            ImageError::Corrupt(corruption) => {
                self.tell(corruption);
                EIO
            }
            ImageError::Broken(_) if self.told.get() == Told::Fatal => ENOMEDIUM,
            ImageError::Broken(reason) => {
                tracing::debug!(node = self.name, reason, "the image takes no request");
                EIO
            }
            ImageError::Refused { text, detail } => {
                let detail = detail.unwrap_or_default();
                tracing::info!(
                    node = self.name,
                    text,
                    detail,
                    "the image refuses a request"
                );
                EINVAL
            }
        };
        self.error(operation, range, errno)
    }

    /// Tells of a contradiction: once of those that do no harm, once of the one that ends the image.
    fn tell(&self, corruption: Corruption) {
        let Corruption {
            text,
            at,
            length_bytes,
            fatal,
        } = corruption;
        let told = if fatal { Told::Fatal } else { Told::Harmless };
        if self.told.get() == Told::Fatal || self.told.get() == told {
            return;
        }
        self.told.set(told);
        tracing::error!(node = self.name, text, fatal, "the image is corrupt");
        self.news.tell(EventKind::BlockImageCorrupted {
            node_name: self.name.clone(),
            message: text,
            offset: at.map(|at| at.0),
            size: length_bytes,
            fatal,
        });
    }
}
