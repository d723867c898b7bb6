//! `x-blockdev-amend`: options of an image are changed in place, with real progress. What is written, and in which order, is
//! the business of [`blockyard_images::qcow2::amend`]; the node closes the image for it and opens it again.

use std::rc::Rc;

use blockyard_images::qcow2::amend::AmendOptions;
use blockyard_images::qcow2::units::Version;
use blockyard_storage::LocalFuture;

use crate::error::JobError;
use crate::job::context::JobContext;
use crate::job::work::{Stop, Work};
use crate::jobs::create::count_failed_step;
use crate::jobs::create_qcow2::JobPace;
use crate::node::{AmendStop, Node};
use crate::request::AmendSpec;

/// The work of amending an image.
pub(crate) struct Amend {
    node: Rc<dyn Node>,
    options: AmendOptions,
    encrypt: bool,
}

impl Amend {
    /// Amends the image of `node`.
    pub(crate) fn new(node: Rc<dyn Node>, spec: &AmendSpec) -> Self {
        let options = AmendOptions {
            version: spec.version_2.map(|version_2| match version_2 {
                true => Version::V2,
                false => Version::V3,
            }),
            size_bytes: spec.size,
            backing_name: spec.backing_file.clone().map(String::into_bytes),
            backing_format: spec.backing_fmt.clone().map(String::into_bytes),
            // The node knows.
            is_overlay: false,
            is_recorded: false,
            data_file_raw: spec.data_file_raw,
            lazy_refcounts: spec.lazy_refcounts,
            // A negative width is as wrong as none.
            refcount_bits: spec
                .refcount_bits
                .map(|bits| u64::try_from(bits).unwrap_or(0)),
        };
        Self {
            node,
            options,
            encrypt: spec.encrypt,
        }
    }

    async fn amend(&self, cx: &JobContext) -> Result<(), Stop> {
        // What is refused counts as one step.
        cx.progress().set_remaining(1);
        if self.encrypt {
            // Encrypted images are not opened.
            let text = "image is not encrypted, can't amend";
            return Err(Stop::Failed(JobError::text(text)));
        }
        if self.options == AmendOptions::default() {
            cx.progress().done(1);
            return Ok(());
        }
        cx.progress().set_remaining(0);
        let amended = self.node.amend(&self.options, &JobPace(cx)).await;
        amended.map_err(|stop| match stop {
            AmendStop::Cancelled => Stop::Cancelled,
            AmendStop::Refused(text) => Stop::Failed(JobError::text(text)),
            AmendStop::Failed(error) => Stop::Failed(JobError::from(error)),
        })
    }
}

impl Work for Amend {
    fn run<'a>(&'a mut self, cx: &'a JobContext) -> LocalFuture<'a, Result<(), Stop>> {
        Box::pin(async move {
            let outcome = self.amend(cx).await;
            if outcome.is_err() {
                count_failed_step(cx);
            }
            outcome
        })
    }
}
