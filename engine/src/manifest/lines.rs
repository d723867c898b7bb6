//! [`Lines`]: a manifest that is there, line by line.

use std::rc::Rc;

use blockyard_storage::Buffer;
use blockyard_storage::error::errno_text;

use crate::error::EngineError;
use crate::manifest::text::{LINE_MAX_BYTES, Reader, Record};
use crate::node::Node;

/// Bytes of the manifest that are read at once.
const TEXT_BYTES: u64 = 256 << 10;

/// The lines of a manifest.
pub(crate) struct Lines {
    node: Rc<dyn Node>,
    length_bytes: u64,
    position: u64,
    /// What has been read and not taken.
    text: Vec<u8>,
    taken: usize,
    reader: Reader,
}

impl Lines {
    /// Of the manifest on a node.
    pub(crate) fn of(node: Rc<dyn Node>) -> Self {
        Self {
            length_bytes: node.exact_length_bytes(),
            node,
            position: 0,
            text: Vec::new(),
            taken: 0,
            reader: Reader::new(),
        }
    }

    /// Length of the disk that it tells of, in bytes, once a record was read.
    pub(crate) fn length_bytes(&self) -> u64 {
        self.reader.length_bytes()
    }

    /// What the next line with a record says; `None`: there is none.
    ///
    /// # Errors
    /// It cannot be read, or is none.
    pub(crate) async fn next(&mut self) -> Result<Option<Record>, EngineError> {
        loop {
            let rest = self.text.get(self.taken..).unwrap_or_default();
            if let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                let line = rest.get(..end).unwrap_or_default();
                let record = self.reader.line(line).map_err(bad)?;
                self.taken += end + 1;
                match record {
                    Some(record) => return Ok(Some(record)),
                    None => continue,
                }
            }
            if rest.len() > LINE_MAX_BYTES {
                return Err(bad("it is no manifest: a line is too long".to_owned()));
            }
            if self.position >= self.length_bytes {
                return match rest.is_empty() {
                    true => Ok(None),
                    false => Err(bad("its last line has no end".to_owned())),
                };
            }
            self.read().await?;
        }
    }

    async fn read(&mut self) -> Result<(), EngineError> {
        self.text.drain(..self.taken);
        self.taken = 0;
        let wanted = TEXT_BYTES.min(self.length_bytes - self.position);
        // No more than TEXT_BYTES.
        let buffer = Buffer::zeroed(usize::try_from(wanted).unwrap_or(usize::MAX));
        let read = self.node.read(self.position, buffer).await;
        read.outcome.map_err(|error| {
            let reason = errno_text(error.errno());
            EngineError::generic(format!("Could not read the manifest: {reason}"))
        })?;
        self.text.extend_from_slice(read.buffer.as_slice());
        self.position += wanted;
        Ok(())
    }

    /// Everything was read.
    ///
    /// # Errors
    /// It is no whole manifest, or has changed.
    pub(crate) fn finish(self) -> Result<(), EngineError> {
        self.reader.finish().map_err(bad)
    }
}

fn bad(reason: String) -> EngineError {
    EngineError::generic(format!("The manifest cannot be used: {reason}"))
}
