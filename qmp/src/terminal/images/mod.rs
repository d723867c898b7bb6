//! The commands that look at or change one image: `bitmap`, `info`, `map`, `measure`, `compare`, `create`, `resize`, `snapshot`, with the output and exit
//! codes of qemu-img's commands of these names.
//!
//! No format is guessed where it decides how bytes are read or written. Without a format an image is raw, unless it begins
//! like another kind of image: then it is refused until the user says which it is.

pub(crate) mod bitmap;
pub(crate) mod compare;
pub(crate) mod create;
pub(crate) mod create_options;
pub(crate) mod info;
pub(crate) mod info_report;
pub(crate) mod map;
pub(crate) mod measure;
pub(crate) mod resize;
pub(crate) mod snapshot;
pub(crate) mod verify;

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use blockyard_engine::image_policy::ImagePolicy;
use blockyard_engine::images::ImageFormat;
use blockyard_engine::request::{BackingRef, Discard, NamedBy};

use crate::commands::node_options_in_image;
use crate::terminal::check::arguments::Format;
use crate::terminal::copy::ends::{Source, shown};
use crate::terminal::embedded::{Embedded, ImageFile, Sharing};

/// How whoever runs a command goes on where a name in an image is not followed.
const BACKING_ADVICE: &str =
    "`blockyard rebase -u -b FILE -F FORMAT IMAGE` gives it a name that is";

impl From<Format> for ImageFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Raw => ImageFormat::Raw,
            Format::Qcow2 => ImageFormat::Qcow2,
        }
    }
}

/// An image to open.
#[derive(Clone, Debug)]
pub(crate) struct Disk<'a> {
    /// Name of its node.
    pub(crate) node: &'static str,
    /// Where it is.
    pub(crate) path: &'a Path,
    /// What the user says that it is.
    pub(crate) format: Option<Format>,
    /// How the user can say it.
    pub(crate) option: &'static str,
    pub(crate) read_only: bool,
    pub(crate) sharing: Sharing,
    /// Whether the user names it, or an image does.
    pub(crate) named_by: NamedBy,
}

impl Disk<'_> {
    /// What it is, by the user's word.
    ///
    /// # Errors
    /// For the user: it cannot be read, or may be something else.
    pub(crate) fn format(&self) -> Result<Format, String> {
        let source = Source::open(self.path)?;
        match self.format {
            Some(format) => Ok(format),
            None => match source.looks_like()? {
                None => Ok(Format::Raw),
                Some("qcow2") => Err(format!(
                    "{} looks like a qcow2 image; say {option} qcow2 to use it as one, or {option} raw for the bytes \
                     of the file",
                    shown(self.path),
                    option = self.option
                )),
                Some(other) => Err(format!(
                    "{} looks like a {other} image, a format that is not supported; say {} raw for the bytes of the \
                     file",
                    shown(self.path),
                    self.option
                )),
            },
        }
    }

    /// Opens the file that it is in, and takes its image locks.
    ///
    /// # Errors
    /// For the user.
    pub(crate) async fn open_file(&self, embedded: &Embedded) -> Result<(), String> {
        let opened = embedded.add_image_file(&self.file()).await;
        opened.map_err(|error| could_not_open(self.path, &error))
    }

    /// What it is to the engine.
    pub(crate) fn file(&self) -> ImageFile {
        ImageFile {
            name: self.node,
            path: self.path.to_owned(),
            is_device: fs::metadata(self.path)
                .is_ok_and(|facts| facts.file_type().is_block_device()),
            read_only: self.read_only,
            sharing: self.sharing,
            discard: Discard::Ignore,
            named_by: self.named_by.clone(),
        }
    }

    /// Opens a qcow2 image without what it names as below it.
    ///
    /// # Errors
    /// For the user.
    pub(crate) async fn open_alone(&self, embedded: &Embedded) -> Result<(), String> {
        let opened = embedded.add_qcow2(&self.file(), BackingRef::Nothing).await;
        opened.map_err(|error| could_not_open(self.path, &error))
    }

    /// Opens the disk in it, with the chain that a qcow2 image names.
    ///
    /// # Errors
    /// For the user.
    pub(crate) async fn open(&self, embedded: &Embedded) -> Result<Format, String> {
        let format = self.format()?;
        match format {
            Format::Raw => self.open_file(embedded).await?,
            Format::Qcow2 => {
                let opened = embedded
                    .add_qcow2(&self.file(), BackingRef::FromImage)
                    .await;
                opened.map_err(|error| could_not_open(self.path, &error))?;
            }
        }
        Ok(format)
    }
}

/// What qemu-img says then.
pub(crate) fn could_not_open(path: &Path, error: impl std::fmt::Display) -> String {
    format!("Could not open {}: {error}", shown(path))
}

/// How much others may do meanwhile.
pub(crate) const fn sharing(force_share: bool) -> Sharing {
    match force_share {
        true => Sharing::Everything,
        false => Sharing::Readers,
    }
}

/// How far names that stand in images are trusted.
pub(crate) fn image_policy() -> ImagePolicy {
    ImagePolicy {
        read_options: Some(node_options_in_image),
        advice: Some(BACKING_ADVICE),
        ..ImagePolicy::default()
    }
}
