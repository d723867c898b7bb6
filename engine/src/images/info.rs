//! What an image says of itself, read from its file without opening what it names.

use std::path::Path;
use std::rc::Rc;

use blockyard_images::qcow2::layout::header::{Access, MAGIC};
use blockyard_images::qcow2::open::read_image;
use blockyard_storage::{Buffer, Storage};

use crate::error::EngineError;
use crate::graph::image_names::{BackingFormat, BackingName, Followed};
use crate::image_policy::ImagePolicy;
use crate::images::{ImageFormat, refused};
use crate::node::Node;
use crate::node::child_storage::ChildStorage;

pub use crate::graph::described_images::{Below, NamedImage};
pub use blockyard_images::qcow2::info::{BitmapInfo, ImageInfo, SnapshotInfo, Version3Info};
pub use blockyard_images::qcow2::units::Compression;

/// What is to be looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InfoSpec {
    /// Format of the image; `None`: qcow2 if it begins like one, else raw. Nothing is followed or written, so that whoever
    /// could write to the disk can at most have its own words shown.
    pub format: Option<ImageFormat>,
}

/// What an image says of itself.
#[derive(Clone, Debug, PartialEq)]
pub struct InfoView {
    /// Length of the guest's disk in bytes.
    pub virtual_size_bytes: u64,
    /// What the header of a qcow2 image says; `None`: it is raw.
    pub qcow2: Option<ImageInfo>,
    /// What is wrong but does no harm here, as sentences without full stop.
    pub findings: Vec<String>,
}

/// The image that the header of one at `path` names as below it; `None`: it names none.
///
/// # Errors
/// The name is not followed, and why.
pub fn backing_of(
    path: &Path,
    info: &ImageInfo,
    policy: &ImagePolicy,
) -> Result<Option<NamedImage>, EngineError> {
    let Some(name) = &info.backing_file else {
        return Ok(None);
    };
    let backing = BackingName {
        name: name.clone().into_bytes(),
        format: info.backing_format.clone(),
    };
    let shown = path.to_string_lossy();
    let folder = shown.rfind('/').map_or("", |slash| &shown[..=slash]);
    let named = match backing.follow(policy, &shown, folder)? {
        Followed::File { path, format } => Some(NamedImage {
            path,
            format: match format {
                Some(BackingFormat::Qcow2) => ImageFormat::Qcow2,
                _ => ImageFormat::Raw,
            },
            below: Below::AsNamed,
        }),
        Followed::Node(spec) => NamedImage::described(&spec),
    };
    let named = named.ok_or_else(|| EngineError::generic("Only images in files are followed"));
    named.map(Some)
}

/// Looks at the image on a node.
///
/// # Errors
/// When the image is refused or cannot be read.
pub(super) async fn run(node: Rc<dyn Node>, spec: InfoSpec) -> Result<InfoView, EngineError> {
    let length_bytes = node.facts().length_bytes;
    let file = ChildStorage::new(node);
    let is_qcow2 = match spec.format {
        Some(format) => format == ImageFormat::Qcow2,
        None => begins_like_qcow2(&file).await?,
    };
    if !is_qcow2 {
        return Ok(InfoView {
            virtual_size_bytes: length_bytes,
            qcow2: None,
            findings: Vec::new(),
        });
    }
    let image = read_image(&file, Access::Metadata).await.map_err(refused)?;
    let info = ImageInfo::of(&image);
    Ok(InfoView {
        virtual_size_bytes: info.virtual_size_bytes,
        qcow2: Some(info),
        findings: image.findings,
    })
}

async fn begins_like_qcow2(file: &ChildStorage) -> Result<bool, EngineError> {
    let read = file
        .read(0, Buffer::zeroed(MAGIC.to_be_bytes().len()))
        .await;
    match read.outcome {
        Ok(()) => Ok(read.buffer.as_slice() == MAGIC.to_be_bytes()),
        Err(error) => Err(EngineError::generic(file.node_error(&error).to_string())),
    }
}
