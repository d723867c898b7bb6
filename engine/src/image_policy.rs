//! [`ImagePolicy`]: how far names that stand in images are trusted.

use std::path::PathBuf;

use crate::error::EngineError;
use crate::request::NodeSpec;

/// Reads options of a node that stand in an image, as JSON (the engine knows none itself). The format that the image states is
/// the driver, whatever the options name.
pub type OptionsReader = fn(&str, Option<&str>) -> Result<NodeSpec, EngineError>;

/// How far names that stand in images are trusted: those of backing files and of data files.
#[derive(Clone, Debug, Default)]
pub struct ImagePolicy {
    /// Which names are followed.
    pub names: NamesInImages,
    /// Folders that every file named by an image must lie below, once symbolic links are resolved; their own names hold
    /// none. Empty: anywhere.
    pub roots: Vec<PathBuf>,
    /// Reads `json:` names; without it none is followed.
    pub read_options: Option<OptionsReader>,
    /// How the user goes on where a backing file is not followed; `None`: as clients of a daemon do.
    pub advice: Option<&'static str>,
}

/// Which names are followed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NamesInImages {
    /// Those of plain files whose format the image states, and descriptions of the same.
    #[default]
    Files,
    /// Whatever QEMU follows, and with its guesses.
    AsQemu,
}
