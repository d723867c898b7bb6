//! Names in images as nodes that can be opened: the policy applied, and the file looked at where that decides what it is.

use std::path::{Path, PathBuf};

use blockyard_ring::confined::Confinement;
use blockyard_ring::{OpenMode, file_calls};

use crate::error::EngineError;
use crate::graph::Graph;
use crate::graph::host_files::{in_background, open_named};
use crate::graph::image_names::{
    BackingFormat, BackingName, Followed, data_file_path, no_data_file,
};
use crate::image_policy::NamesInImages;
use crate::request::{CommonOptions, DriverSpec, FileSpec, NamedBy, NodeSpec};

/// How a qcow2 image begins.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

impl Graph {
    /// The node below an image that is shown as `image` and whose file is in `folder`, as its header describes it.
    ///
    /// # Errors
    /// The name is not followed.
    pub(super) async fn describe(
        &self,
        backing: &BackingName,
        image: &str,
        folder: Option<&str>,
    ) -> Result<NodeSpec, EngineError> {
        let folder = folder.ok_or_else(|| {
            EngineError::generic(format!(
                "'{image}' is no file, so it is not known where what it names would be"
            ))
        })?;
        match backing.follow(&self.policy, image, folder)? {
            Followed::Node(spec) => Ok(*spec),
            Followed::File { path, format } => {
                let named_by = self.named_by_image();
                let format = match format {
                    Some(format) => format,
                    None => self.guess_format(path.clone(), &named_by).await?,
                };
                let is_device = is_block_device(path.clone()).await;
                let file = FileSpec {
                    filename: path,
                    named_by,
                    ..FileSpec::default()
                };
                Ok(format.describe(match is_device {
                    true => DriverSpec::HostDevice(file),
                    false => DriverSpec::File(file),
                }))
            }
        }
    }

    /// The data file that an image in `folder` names.
    ///
    /// # Errors
    /// The name is not followed.
    pub(super) fn named_data_file(
        &self,
        name: &[u8],
        folder: Option<&str>,
    ) -> Result<NodeSpec, EngineError> {
        let filename = data_file_path(name, self.policy.names)?;
        let named_by = match self.policy.names {
            NamesInImages::AsQemu => self.named_by_image(),
            NamesInImages::Files => NamedBy::Image {
                folder: Some(match folder {
                    Some("") => PathBuf::from("."),
                    Some(folder) => PathBuf::from(folder),
                    None => return Err(no_data_file(Some(name))),
                }),
            },
        };
        Ok(NodeSpec {
            node_name: None,
            common: CommonOptions::default(),
            driver: DriverSpec::File(FileSpec {
                filename,
                named_by,
                ..FileSpec::default()
            }),
        })
    }

    /// Who has named a backing file: where everything is followed to anywhere, it is as if the client had.
    fn named_by_image(&self) -> NamedBy {
        match (self.policy.names, self.policy.roots.is_empty()) {
            (NamesInImages::AsQemu, true) => NamedBy::Client,
            _ => NamedBy::Image { folder: None },
        }
    }

    /// The format that the first bytes of a client's file look like.
    ///
    /// # Errors
    /// The file cannot be opened in the background.
    pub(super) async fn format_by_content(&self, path: &str) -> Result<&'static str, EngineError> {
        let guessed = self.guess_format(PathBuf::from(path), &NamedBy::Client);
        Ok(match guessed.await? {
            BackingFormat::Qcow2 => "qcow2",
            _ => "raw",
        })
    }

    /// What the first bytes of a file look like.
    async fn guess_format(
        &self,
        path: PathBuf,
        named_by: &NamedBy,
    ) -> Result<BackingFormat, EngineError> {
        let confinement = match named_by {
            NamedBy::Client => None,
            NamedBy::Image { .. } => Some(Confinement {
                roots: self.policy.roots.clone(),
                folder: None,
            }),
        };
        let begins = in_background(move || {
            // What cannot be opened or read is told when it is opened in earnest.
            let Ok(file) = open_named(&path, OpenMode::default(), confinement.as_ref()) else {
                return Ok([0; 4]);
            };
            let mut start = [0; 4];
            let _ = file_calls::read_whole(file.descriptor(), 0, &mut start, 1);
            Ok(start)
        });
        match begins.await {
            Ok(QCOW2_MAGIC) => Ok(BackingFormat::Qcow2),
            Ok(_) => Ok(BackingFormat::Raw),
            Err(error) => Err(EngineError::generic(error.to_string())),
        }
    }
}

/// Whether a path leads to a block device. What cannot be looked at is told when it is opened.
async fn is_block_device(path: PathBuf) -> bool {
    use std::os::unix::fs::FileTypeExt;
    let looked = in_background(move || {
        let facts = std::fs::metadata(Path::new(&path))?;
        Ok(facts.file_type().is_block_device())
    });
    looked.await.unwrap_or(false)
}
