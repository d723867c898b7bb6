//! Amending the image of a node: it is closed, changed below the node, and opened again.

use std::cell::RefCell;
use std::rc::Rc;

use blockyard_images::qcow2::amend::{AmendError, AmendOptions, amend};
use blockyard_images::qcow2::info::ImageInfo;
use blockyard_images::qcow2::layout::header::Access;
use blockyard_images::qcow2::open::{OpenedImage, read_image};
use blockyard_images::qcow2::units::Version;
use blockyard_images::qcow2::{Options, Qcow2};
use blockyard_images::{ImageError, Pace};
use blockyard_storage::{Operation, Storage};

use crate::node::qcow2::Qcow2Node;
use crate::node::qcow2::mover::Mover;
use crate::node::{AmendStop, Reopened};

impl Qcow2Node {
    /// See [`Node::amend`](crate::node::Node::amend).
    pub(super) async fn amend_image(
        &self,
        options: &AmendOptions,
        pace: &dyn Pace,
    ) -> Result<(), AmendStop> {
        let old = self.mover();
        old.close().await.map_err(AmendStop::Failed)?;
        let before = old.read_anew().await?;
        let wanted = options.check(&before);
        wanted.map_err(|error| old.amend_stop(error))?;
        let version = before.header.geometry.version();
        let rises = options.version.is_some_and(|wanted| wanted > version);
        let size_bytes = options
            .size_bytes
            .filter(|size| *size != before.header.guest_bytes());
        if let Some(size_bytes) = size_bytes.filter(|_| !rises) {
            self.resize_for(size_bytes).await?;
            old.close().await.map_err(AmendStop::Failed)?;
        }
        old.away.set(true);
        let file: Rc<dyn Storage> = old.files.file.clone();
        let amended = amend(&file, options, pace).await;
        let reopened = reopen(&self.mover, &self.amended, &old).await;
        match amended {
            Ok(()) => reopened?,
            Err(AmendError::Cancelled) => return Err(AmendStop::Cancelled),
            Err(AmendError::Failed(error)) => return Err(old.amend_stop(error)),
        }
        match size_bytes.filter(|_| rises) {
            Some(size_bytes) => self.resize_for(size_bytes).await,
            None => Ok(()),
        }
    }

    async fn resize_for(&self, size_bytes: u64) -> Result<(), AmendStop> {
        let mover = self.mover();
        let possible = mover.image.check_resize(size_bytes);
        possible.map_err(|error| mover.amend_stop(error))?;
        let resized = mover.change_length(size_bytes).await;
        resized.map_err(AmendStop::Failed)
    }
}

/// Goes on with what the image is now.
pub(super) async fn reopen(
    mover: &RefCell<Rc<Mover>>,
    reopened: &RefCell<Option<Reopened>>,
    old: &Mover,
) -> Result<(), AmendStop> {
    let opened = old.read_anew().await?;
    let info = ImageInfo::of(&opened);
    let options = options_for(old, &opened);
    let file: Rc<dyn Storage> = old.files.file.clone();
    let data_file = old.files.data_file.clone();
    let data_file = data_file.map(|data_file| data_file as Rc<dyn Storage>);
    let image = Qcow2::new(file, data_file, opened, options);
    let image = image.map_err(|error| old.amend_stop(error))?;
    mover.replace(Rc::new(old.reopened(image)));
    reopened.replace(Some(Reopened { info, options }));
    Ok(())
}

impl Mover {
    async fn read_anew(&self) -> Result<OpenedImage, AmendStop> {
        let opened = read_image(&*self.files.file, Access::ReadWrite).await;
        opened.map_err(|error| self.amend_stop(error))
    }

    pub(super) fn amend_stop(&self, error: ImageError) -> AmendStop {
        match error {
            ImageError::Refused { text, detail } => {
                let detail = detail.unwrap_or_default();
                tracing::info!(node = self.name, text, detail, "an image is not amended");
                AmendStop::Refused(text)
            }
            error => AmendStop::Failed(self.failed(error, Operation::Write, None)),
        }
    }
}

/// How the image was used, as far as it can be used like that.
fn options_for(old: &Mover, opened: &OpenedImage) -> Options {
    let header = &opened.header;
    let mut options = *old.image.options();
    if options.lazy_refcounts == old.image.header().lazy_refcounts() {
        options.lazy_refcounts = header.lazy_refcounts();
    }
    if header.geometry.version() == Version::V2 {
        options.lazy_refcounts = false;
        options.discard_no_unref = false;
    }
    options
}
