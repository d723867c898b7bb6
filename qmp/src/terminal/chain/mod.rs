//! The commands on chains of images: `chain` shows one, `commit` and `stream` move what its layers hold, `rebase` puts an image
//! on another one. Without a daemon; nobody else may write to the images meanwhile.

pub(crate) mod arguments;
pub(crate) mod moves;
pub(crate) mod rebase;
pub(crate) mod show;

use std::path::Path;

use blockyard_engine::error::EngineError;
use blockyard_engine::reply::{FormatSpecific, LayerView, PlanView};

use crate::size;
use crate::terminal::copy::ends::shown;
use crate::terminal::embedded::Embedded;
use crate::terminal::images::info::identity;
use crate::terminal::room;

/// The layer of a chain that a path leads to, by which file it is.
///
/// # Errors
/// For the user: there is no such file, or it is not in the chain.
pub(crate) fn layer_at<'a>(
    layers: &'a [LayerView],
    path: &Path,
    top: &Path,
) -> Result<(usize, &'a LayerView), String> {
    let wanted = identity(path)?;
    let is_wanted =
        |layer: &LayerView| identity(Path::new(&*layer.file())).is_ok_and(|it| it == wanted);
    let mut layers = layers.iter().enumerate();
    let found = layers.find(|(_, layer)| is_wanted(layer));
    found.ok_or_else(|| {
        format!(
            "{} is not in the chain of {}; `blockyard chain` shows it",
            shown(path),
            shown(top)
        )
    })
}

/// Whether an image that a dry run has opened for reading could be opened for writing, too, as far as its marks tell.
///
/// # Errors
/// As the opening's.
pub(crate) async fn check_marks(embedded: &Embedded, node: &str) -> Result<(), EngineError> {
    let image = embedded.image_view(node).await?;
    match image.format_specific {
        Some(FormatSpecific::Qcow2 {
            version_3: Some(marks),
            ..
        }) if marks.corrupt => Err(EngineError::generic(
            "qcow2: Image is corrupt; cannot be opened read/write",
        )),
        _ => Ok(()),
    }
}

/// What a plan comes to, for people.
pub(crate) fn told(plan: &PlanView) -> String {
    let mut text = format!("copies {}", size::shown(plan.copy_bytes));
    if plan.zero_bytes > 0 {
        text += &format!(", zeroes {}", size::shown(plan.zero_bytes));
    }
    text + &room::told(&plan.room)
}
