//! How much room an image will need, before it is made.

use std::rc::Rc;

use blockyard_images::measure::{Qcow2Measure, raw};
use blockyard_images::qcow2::bitmaps::BitmapSize;
use blockyard_images::qcow2::create::CreateOptions;
use blockyard_storage::ByteRange;

use crate::error::EngineError;
use crate::images::watcher::ImageWatcher;
use crate::images::{cancelled, refused};
use crate::jobs::create_qcow2::create_options;
use crate::limits::STATUS_EXTENTS_MAX;
use crate::node::Node;
use crate::node::chain::{Content, chain_status};
use crate::request::CreateQcow2Spec;

pub use blockyard_images::measure::Measure as MeasureView;

/// The image that will be made.
#[derive(Clone, Debug, PartialEq)]
pub enum MeasureTarget {
    /// A raw one.
    Raw,
    /// A qcow2 one. Its nodes and its size are not looked at.
    Qcow2(Box<CreateQcow2Spec>),
}

/// What is to be measured.
#[derive(Clone, Debug, PartialEq)]
pub struct MeasureSpec {
    /// The image that will be made.
    pub target: MeasureTarget,
    /// The source's bitmaps: granularity and length of the name in bytes each. `None`: the source cannot have any.
    pub bitmaps: Option<Vec<(u64, u64)>>,
}

/// The room for an empty disk of so many bytes.
///
/// # Errors
/// When there can be no such image.
pub fn measure_size(target: &MeasureTarget, size_bytes: u64) -> Result<MeasureView, EngineError> {
    match options(target, size_bytes) {
        None => Ok(raw(size_bytes)),
        Some(options) => {
            let measure = Qcow2Measure::of_size(&options).map_err(refused)?;
            Ok(measure.finish())
        }
    }
}

/// The room for what the disk on a node holds, through its backing chain.
///
/// # Errors
/// When there can be no such image, when the source cannot tell what it holds, when it was cancelled.
pub(super) async fn run(
    node: Rc<dyn Node>,
    spec: MeasureSpec,
    watcher: &ImageWatcher,
) -> Result<MeasureView, EngineError> {
    let size_bytes = node.facts().length_bytes;
    let Some(options) = options(&spec.target, size_bytes) else {
        return Ok(raw(size_bytes));
    };
    let mut measure = Qcow2Measure::of_source(&options).map_err(refused)?;
    if let Some(bitmaps) = spec.bitmaps {
        let sizes = bitmaps
            .into_iter()
            .map(|(granularity_bytes, name_bytes)| BitmapSize {
                granularity_bytes,
                name_bytes,
            });
        measure.bitmaps(size_bytes, sizes);
    }
    let mut rest = ByteRange::new(0, size_bytes);
    while !rest.is_empty() {
        watcher.set_progress(rest.offset(), size_bytes);
        if watcher.is_cancelled() {
            return Err(cancelled());
        }
        let extents = chain_status(&node, None, rest, STATUS_EXTENTS_MAX).await;
        let extents = extents.map_err(|error| EngineError::generic(error.to_string()))?;
        for extent in &extents {
            if extent.content == Content::Data {
                measure.data(extent.range);
            }
        }
        let known_to = extents.last().map_or(rest.end(), |last| last.range.end());
        rest = ByteRange::between(known_to, rest.end());
    }
    Ok(measure.finish())
}

/// `None`: a raw image has none.
fn options(target: &MeasureTarget, size_bytes: u64) -> Option<CreateOptions> {
    match target {
        MeasureTarget::Raw => None,
        MeasureTarget::Qcow2(spec) => Some(CreateOptions {
            size_bytes,
            ..create_options(spec)
        }),
    }
}
