//! [`EngineError`]: what a command or a job failed with, as a kind for programs and one sentence for people.

use blockyard_storage::{ByteRange, StorageError};

/// What sort of failure, as far as a client can tell them apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum ErrorKind {
    /// Everything without a kind of its own.
    Generic,
    /// A block job that does not exist, asked for through a `block-job-*` command.
    DeviceNotActive,
    /// A device, object or class that does not exist, where the client expects that class.
    DeviceNotFound,
    /// Somebody has locked an image, and no process shows that lock: as generic for clients. It may be that of a process that was
    /// killed a moment ago.
    LockOfNobody,
}

/// A refused or failed request. The text is what the client sees.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{text}")]
pub struct EngineError {
    /// For programs.
    pub kind: ErrorKind,
    /// For people, and, where QEMU has a text, QEMU's.
    pub text: String,
}

impl EngineError {
    /// An error without a kind of its own.
    pub fn generic(text: impl Into<String>) -> Self {
        Self {
            kind: ErrorKind::Generic,
            text: text.into(),
        }
    }

    /// A legacy block-job lookup that found nothing.
    pub fn no_block_job(id: &str) -> Self {
        Self {
            kind: ErrorKind::DeviceNotActive,
            text: format!("Block job '{id}' not found"),
        }
    }

    /// A device that does not exist, where the client expects that class.
    pub fn device_not_found(name: &str) -> Self {
        Self {
            kind: ErrorKind::DeviceNotFound,
            text: format!("Device '{name}' not found"),
        }
    }

    /// The same error with `prefix` before its text.
    pub fn prefixed(self, prefix: &str) -> Self {
        Self {
            kind: self.kind,
            text: format!("{prefix}{}", self.text),
        }
    }
}

/// A failed request on a node: which node, which bytes, which errno.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("Node '{node}': {source}")]
pub struct NodeError {
    /// Name of the node the request was made on.
    pub node: String,
    /// What happened below it.
    pub source: StorageError,
}

impl NodeError {
    /// The operating system's error number.
    pub fn errno(&self) -> i32 {
        self.source.errno
    }

    /// Whether room was missing.
    pub fn is_no_space(&self) -> bool {
        self.source.is_no_space()
    }

    /// The bytes the failed operation was about.
    pub fn range(&self) -> Option<ByteRange> {
        self.source.range
    }
}

/// Why a job ended without success. `text` is what clients see (`Input/output error`); the rest is for people.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct JobError {
    /// What queries and events show.
    pub text: String,
    /// The operating system's error number, where there is one.
    pub errno: Option<i32>,
    /// Name of the node the failure was on.
    pub node: Option<String>,
    /// Bytes the failed operation was about.
    pub range: Option<ByteRange>,
}

impl JobError {
    /// An error that is only a text.
    pub fn text(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            errno: None,
            node: None,
            range: None,
        }
    }

    /// Where a request failed: node and bytes.
    pub fn place(&self) -> Option<String> {
        let node = self.node.as_ref()?;
        Some(match self.range {
            Some(range) => format!("node '{node}', {range}"),
            None => format!("node '{node}'"),
        })
    }

    /// An error whose text is the operating system's.
    pub fn errno(errno: i32) -> Self {
        Self {
            text: blockyard_storage::error::errno_text(errno),
            errno: Some(errno),
            node: None,
            range: None,
        }
    }
}

impl From<NodeError> for JobError {
    fn from(error: NodeError) -> Self {
        Self {
            text: blockyard_storage::error::errno_text(error.errno()),
            errno: Some(error.errno()),
            range: error.range(),
            node: Some(error.node),
        }
    }
}
