//! Work on whole images that is no job: a command begins it, looks on and waits for its end. Runs on a data thread.
//!
//! Each kind of work is a file with its description, its result and the function that does it; [`ImageSpec`] and
//! [`ImageReply`] list them. What they share is in [`watcher`]: progress, cancelling and what is told meanwhile.

pub mod check;
pub mod watcher;

use std::rc::Rc;

use crate::error::EngineError;
use crate::node::Node;

pub use check::{CheckSpec, CheckView, FindingView, RepairChoice, Severity};
pub use watcher::{ImageEvent, ImageWatch, ImageWatcher};

/// What to do, and with which node.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageSpec {
    /// Name of the node that holds the image's file. Nobody else uses it meanwhile.
    pub node: String,
    /// What to do.
    pub work: ImageWork,
    /// Who looks on.
    pub watcher: ImageWatcher,
}

/// The kinds of work.
#[derive(Clone, Debug, PartialEq)]
pub enum ImageWork {
    /// Checks a qcow2 image, and repairs it if wanted.
    Check(CheckSpec),
}

impl ImageWork {
    /// Whether the node is written to.
    pub(crate) const fn writes(&self) -> bool {
        match self {
            ImageWork::Check(spec) => spec.repair.is_some(),
        }
    }
}

/// What a piece of work came to.
#[derive(Clone, Debug, PartialEq)]
pub enum ImageReply {
    /// Of [`ImageWork::Check`].
    Checked(CheckView),
}

/// Carries the work out on the node's thread.
///
/// # Errors
/// As the work's.
pub(crate) async fn run(
    node: Rc<dyn Node>,
    work: ImageWork,
    watcher: ImageWatcher,
) -> Result<ImageReply, EngineError> {
    match work {
        ImageWork::Check(spec) => check::run(node, spec, &watcher)
            .await
            .map(ImageReply::Checked),
    }
}
