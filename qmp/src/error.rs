//! [`QmpError`]: a refused command, as its client sees it.

use std::io;

use blockyard_engine::error::{EngineError, ErrorKind};

/// Class and text of an error reply.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct QmpError {
    /// `GenericError`, `CommandNotFound`, `DeviceNotActive` or `DeviceNotFound`.
    pub class: &'static str,
    /// What went wrong.
    pub text: String,
}

impl QmpError {
    /// An error without a class of its own.
    pub fn generic(text: impl Into<String>) -> Self {
        Self {
            class: "GenericError",
            text: text.into(),
        }
    }

    /// An unknown command, or one that may not come now.
    pub fn command_not_found(text: impl Into<String>) -> Self {
        Self {
            class: "CommandNotFound",
            text: text.into(),
        }
    }
}

impl From<EngineError> for QmpError {
    fn from(error: EngineError) -> Self {
        let class = match error.kind {
            ErrorKind::Generic | ErrorKind::LockOfNobody => "GenericError",
            ErrorKind::DeviceNotActive => "DeviceNotActive",
            ErrorKind::DeviceNotFound => "DeviceNotFound",
        };
        Self {
            class,
            text: error.text,
        }
    }
}

/// The operating system's words, without its number.
pub(crate) fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error") {
        Some((words, _)) => words.to_owned(),
        None => text,
    }
}
