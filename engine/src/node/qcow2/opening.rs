//! From an image on nodes to a node.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use blockyard_images::ImageError;
use blockyard_images::qcow2::check::repair_dirty;
use blockyard_images::qcow2::info::ImageInfo;
use blockyard_images::qcow2::layout::header::{Access, Header};
use blockyard_images::qcow2::open::{OpenedImage, read_header, read_image};
use blockyard_images::qcow2::{Options, Qcow2};
use blockyard_storage::{LocalFuture, Storage};
use futures_util::future::{Either, select};

use crate::bitmap::NodeBitmaps;
use crate::data::DataContext;
use crate::error::EngineError;
use crate::node::Node;
use crate::node::qcow2::keeping::{kept_by, take_in};
use crate::node::qcow2::{Qcow2Files, Qcow2Node, Qcow2Options};

/// How long reading the metadata of an image may take: longer, and a disk is stuck.
const READ_WAIT: Duration = Duration::from_secs(30);

/// How an image becomes a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Qcow2Plan {
    /// How the image is used.
    pub image: Options,
    /// What the client chose for the node.
    pub node: Qcow2Options,
}

/// The header of the image on `file`.
///
/// # Errors
/// In QEMU's words; also when a disk does not answer in time.
pub async fn header_on(
    context: &DataContext,
    file: Rc<dyn Node>,
    read_only: bool,
) -> Result<Header, EngineError> {
    let files = Qcow2Files::new(file, None);
    let reading = async move {
        let header = read_header(&*files.file, access(read_only)).await;
        header.map_err(refusal)
    };
    in_time(context, Box::pin(reading)).await
}

/// Opens the image on `files` as a node on the thread of `context`; what it keeps of bitmaps is put among `bitmaps`.
///
/// # Errors
/// In QEMU's words; also when a disk does not answer in time.
pub async fn open(
    context: &DataContext,
    name: String,
    files: Qcow2Files,
    backing: Option<Rc<dyn Node>>,
    plan: Qcow2Plan,
    bitmaps: Arc<NodeBitmaps>,
) -> Result<(Rc<Qcow2Node>, ImageInfo), EngineError> {
    let image = open_image(context, &files, plan, &bitmaps).await?;
    let node = Qcow2Node::new(name, image.image, files, backing, plan.node, context);
    let node = node.with_bitmaps(bitmaps);
    node.begin_upkeep(context);
    Ok((Rc::new(node), image.info))
}

/// An image that can be used.
pub(super) struct ImageOnFiles {
    pub(super) image: Rc<Qcow2>,
    /// What it says of itself.
    pub(super) info: ImageInfo,
    /// Name of the backing file, and its format.
    pub(super) backing: Option<(Vec<u8>, Option<Vec<u8>>)>,
}

/// Opens the image on `files`, repaired if it is to be written and was not closed.
///
/// # Errors
/// In QEMU's words; also when a disk does not answer in time.
pub(super) async fn open_image(
    context: &DataContext,
    files: &Qcow2Files,
    plan: Qcow2Plan,
    bitmaps: &NodeBitmaps,
) -> Result<ImageOnFiles, EngineError> {
    let file: Rc<dyn Storage> = files.file.clone();
    let data_file = files.data_file.clone();
    let data_file = data_file.map(|data_file| data_file as Rc<dyn Storage>);
    let mut opened = read(context, &file, plan).await?;
    if opened.header.is_dirty() && !plan.image.read_only {
        // This reads all tables, however long it takes: it is as in use as it will be.
        repair_dirty(&file).await.map_err(refusal)?;
        opened = read(context, &file, plan).await?;
    }
    let mut info = ImageInfo::of(&opened);
    let format = opened.header.extensions.backing_format.clone();
    let backing = opened.header.backing_name.clone();
    let image = Qcow2::new(file, data_file, opened, plan.image).map_err(refusal)?;
    if !plan.node.inactive {
        take_in(context, &image, bitmaps).await?;
    }
    if let Some(version_3) = &mut info.version_3 {
        version_3.bitmaps = kept_by(&image);
    }
    Ok(ImageOnFiles {
        image,
        info,
        backing: backing.map(|name| (name, format)),
    })
}

async fn read(
    context: &DataContext,
    file: &Rc<dyn Storage>,
    plan: Qcow2Plan,
) -> Result<OpenedImage, EngineError> {
    let reading = async {
        let image = read_image(&**file, access(plan.image.read_only)).await;
        image.map_err(refusal)
    };
    in_time(context, Box::pin(reading)).await
}

fn access(read_only: bool) -> Access {
    match read_only {
        true => Access::ReadOnly,
        false => Access::ReadWrite,
    }
}

/// What a client hears of an image that is not opened; people find the rest in the log.
pub(crate) fn refusal(error: ImageError) -> EngineError {
    if let ImageError::Refused {
        text,
        detail: Some(detail),
    } = &error
    {
        tracing::info!(text, detail, "an image is refused");
    }
    EngineError::generic(error.to_string())
}

/// What `work` comes to, unless that takes too long.
pub(super) async fn in_time<T>(
    context: &DataContext,
    work: LocalFuture<'_, Result<T, EngineError>>,
) -> Result<T, EngineError> {
    let clock = context.clock();
    let deadline = clock.sleep_until(clock.now().after(READ_WAIT));
    match select(work, deadline).await {
        Either::Left((outcome, _)) => outcome,
        Either::Right(_) => Err(EngineError::generic(format!(
            "The image could not be read within {} s",
            READ_WAIT.as_secs()
        ))),
    }
}
