//! Another length for an image, and room reserved for what is added.

use std::rc::Rc;

use blockyard_storage::error::errno_text;
use blockyard_storage::{ByteRange, Preallocation};

use crate::error::{EngineError, NodeError};
use crate::images::watcher::ImageWatcher;
use crate::images::{ImageFormat, cancelled};
use crate::jobs::create::piece_bytes;
use crate::limits::NODE_LENGTH_MAX;
use crate::node::Node;
use crate::request::CreatePreallocation;

/// The new length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewLength {
    /// So many bytes.
    Exactly(u64),
    /// So many more than before.
    Longer(u64),
    /// So many fewer.
    Shorter(u64),
}

/// What is to be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResizeSpec {
    /// What stands on the node.
    pub format: ImageFormat,
    /// The new length.
    pub length: NewLength,
    /// What is behind the new end may be lost.
    pub may_shrink: bool,
    /// How room is reserved for what is added.
    pub preallocation: CreatePreallocation,
}

/// What has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResizeView {
    /// Length before, in bytes.
    pub before_bytes: u64,
    /// Length now, in bytes.
    pub after_bytes: u64,
}

/// Gives the disk on a node another length. It is durable when this returns. After an error the length is what it was, unless
/// the error says otherwise.
///
/// # Errors
/// In QEMU's words where it has some.
pub(super) async fn run(
    node: Rc<dyn Node>,
    spec: ResizeSpec,
    watcher: &ImageWatcher,
) -> Result<ResizeView, EngineError> {
    let before_bytes = node.facts().length_bytes;
    let after_bytes = new_length(&spec, before_bytes)?;
    if node.facts().fixed_length && after_bytes != before_bytes {
        return Err(EngineError::generic("Cannot resize device files"));
    }
    let how = preallocation(&spec)?;
    if let Some(refusal) = node.resize_refusal(after_bytes) {
        return Err(EngineError::generic(refusal));
    }
    let failed = |error: NodeError| could_not("resize image", &error);
    // Of a file that is no whole number of sectors, the length to the byte is what counts.
    let exact_before = node.exact_length_bytes();
    node.resize(after_bytes).await.map_err(failed)?;
    let added = ByteRange::between(before_bytes, after_bytes);
    if how != Preallocation::Off && !added.is_empty() {
        let pieces = added.pieces(piece_bytes(spec.preallocation));
        if let Err(error) = reserve(&node, pieces, how, added, watcher).await {
            return match node.resize(exact_before).await {
                Ok(()) => Err(error),
                Err(stays) => Err(EngineError::generic(format!(
                    "{error}; the image stays {after_bytes} bytes long: {}",
                    errno_text(stays.errno())
                ))),
            };
        }
    }
    node.flush()
        .await
        .map_err(|error| could_not("flush image", &error))?;
    Ok(ResizeView {
        before_bytes,
        after_bytes,
    })
}

async fn reserve(
    node: &Rc<dyn Node>,
    pieces: impl Iterator<Item = ByteRange>,
    how: Preallocation,
    added: ByteRange,
    watcher: &ImageWatcher,
) -> Result<(), EngineError> {
    for piece in pieces {
        watcher.set_progress(piece.offset() - added.offset(), added.length());
        if watcher.is_cancelled() {
            return Err(cancelled());
        }
        let reserved = node.preallocate(piece, how).await;
        reserved.map_err(|error| could_not("preallocate", &error))?;
    }
    Ok(())
}

fn new_length(spec: &ResizeSpec, before_bytes: u64) -> Result<u64, EngineError> {
    let refused = |text: &str| Err(EngineError::generic(text));
    let length = match spec.length {
        NewLength::Exactly(bytes) => Some(bytes),
        NewLength::Longer(bytes) => before_bytes.checked_add(bytes),
        NewLength::Shorter(bytes) => Some(before_bytes.saturating_sub(bytes)),
    };
    let Some(length) = length.filter(|length| *length <= NODE_LENGTH_MAX) else {
        return Err(EngineError::generic(format!(
            "The new size is too large; {NODE_LENGTH_MAX} bytes are possible"
        )));
    };
    if length == 0 {
        return refused("New image size must be positive");
    }
    if length <= before_bytes && spec.preallocation != CreatePreallocation::Off {
        return refused("Preallocation can only be used for growing images");
    }
    if length < before_bytes && !spec.may_shrink {
        return refused("Use the --shrink option to perform a shrink operation.");
    }
    Ok(length)
}

fn preallocation(spec: &ResizeSpec) -> Result<Preallocation, EngineError> {
    match (spec.preallocation, spec.format) {
        (CreatePreallocation::Off, _) => Ok(Preallocation::Off),
        (CreatePreallocation::Falloc, _) => Ok(Preallocation::Falloc),
        (CreatePreallocation::Full, _) => Ok(Preallocation::Full),
        (CreatePreallocation::Metadata, ImageFormat::Raw) => Err(EngineError::generic(
            "Unsupported preallocation mode: metadata",
        )),
        (CreatePreallocation::Metadata, ImageFormat::Qcow2) => Err(EngineError::generic(
            "Metadata alone cannot be preallocated when an image grows; choose falloc or full",
        )),
    }
}

fn could_not(what: &str, error: &NodeError) -> EngineError {
    EngineError::generic(format!("Could not {what}: {}", errno_text(error.errno())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn length(length: NewLength, before: u64, may_shrink: bool) -> Result<u64, String> {
        let spec = ResizeSpec {
            format: ImageFormat::Raw,
            length,
            may_shrink,
            preallocation: CreatePreallocation::Off,
        };
        new_length(&spec, before).map_err(|error| error.text)
    }

    #[test]
    fn lengths_are_absolute_or_relative_and_never_shrink_unasked() {
        use NewLength::{Exactly, Longer, Shorter};
        assert_eq!(length(Exactly(10), 4, false), Ok(10));
        assert_eq!(length(Exactly(4), 4, false), Ok(4));
        assert_eq!(length(Longer(10), 4, false), Ok(14));
        assert_eq!(length(Shorter(1), 4, true), Ok(3));
        let refusal = Err("Use the --shrink option to perform a shrink operation.".to_owned());
        assert_eq!(length(Shorter(1), 4, false), refusal);
        assert_eq!(length(Exactly(3), 4, false), refusal);
        let zero = Err("New image size must be positive".to_owned());
        for gone in [Shorter(4), Shorter(u64::MAX), Exactly(0)] {
            assert_eq!(length(gone, 4, true), zero);
        }
        for large in [Longer(u64::MAX), Exactly(u64::MAX)] {
            assert!(length(large, 4, true).is_err());
        }
    }
}
