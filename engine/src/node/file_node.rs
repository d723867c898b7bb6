//! [`FileNode`]: a host file or device as a node, or whatever else behaves like one.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use blockyard_storage::error::{EBADF, EINVAL};
use blockyard_storage::{
    Aligned, Buffer, ByteRange, LocalFuture, Operation, Preallocation, Storage, StorageError,
    Transfer, ZeroMode,
};

use crate::data::DataContext;
use crate::error::{EngineError, NodeError};
use crate::limits::SECTOR_BYTES;
use crate::node::build::NodePlan;
use crate::node::gate::{Gate, Pass, Way};
use crate::node::zeroes::is_zero;
use crate::node::{Node, NodeFacts, NodeTransfer, Place, StatusExtent, cannot_become, refused};
use crate::request::{DetectZeroes, Discard};

/// What a client chose for one node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileOptions {
    /// Refuse writes.
    pub read_only: bool,
    /// What discards do.
    pub discard: Discard,
    /// Whether written zeroes become zero requests.
    pub detect_zeroes: DetectZeroes,
    /// Ignore flushes.
    pub no_flush: bool,
}

/// A host file as a node.
pub struct FileNode {
    /// Another one once the node has been opened in another way.
    opened: RefCell<Rc<OpenedFile>>,
    /// Closed while it is: what writes only parts of blocks must not meet others that do.
    gate: Rc<Gate>,
}

/// A file as it is open now.
struct OpenedFile {
    name: String,
    storage: Rc<dyn Storage>,
    request_alignment: u32,
    options: FileOptions,
}

impl FileNode {
    /// A node over `storage`, whatever alignment that demands.
    pub fn new(name: String, storage: Rc<dyn Storage>, options: FileOptions) -> Self {
        let opened = OpenedFile::new(name, storage, options);
        Self {
            opened: RefCell::new(Rc::new(opened)),
            gate: Rc::default(),
        }
    }

    fn opened(&self) -> Rc<OpenedFile> {
        Rc::clone(&self.opened.borrow())
    }

    /// The file for somebody who changes something.
    async fn opened_for_change(&self) -> (Pass, Rc<OpenedFile>) {
        let pass = self.gate.enter(Way::Write).await;
        (pass, self.opened())
    }
}

impl OpenedFile {
    fn new(name: String, storage: Rc<dyn Storage>, options: FileOptions) -> Self {
        let request_alignment = storage.facts().request_alignment;
        Self {
            name,
            storage: Aligned::over(storage),
            request_alignment,
            options,
        }
    }

    fn length(&self) -> u64 {
        round_up(self.storage.facts().length_bytes)
    }

    fn grows(&self) -> bool {
        !self.storage.facts().fixed_length
    }

    fn error(&self, source: StorageError) -> NodeError {
        NodeError {
            node: self.name.clone(),
            source,
        }
    }

    /// Why a request is refused before it is tried.
    fn refusal(&self, operation: Operation, range: ByteRange) -> Option<StorageError> {
        let errno = refused(operation, range, self.options.read_only, self.length())?;
        Some(StorageError::new(operation, range, errno))
    }

    /// Why a request that may pass the end is refused before it is tried.
    fn refusal_growing(&self, operation: Operation, range: ByteRange) -> Option<StorageError> {
        if self.grows() && !self.options.read_only {
            return None;
        }
        self.refusal(operation, range)
    }

    async fn write_allowed(&self, offset: u64, from: Buffer) -> NodeTransfer {
        if let Some(mode) = self.zeroes_instead(from.as_slice()) {
            let range = ByteRange::new(offset, from.len() as u64);
            let outcome = self.storage.zero(range, mode).await;
            return self.transfer(Transfer {
                buffer: from,
                outcome,
            });
        }
        self.transfer(self.storage.write(offset, from).await)
    }

    async fn zero_allowed(&self, range: ByteRange, mode: ZeroMode) -> Result<(), NodeError> {
        let may_unmap = mode.may_unmap && self.options.discard == Discard::Unmap;
        let mode = ZeroMode { may_unmap, ..mode };
        let zeroed = self.storage.zero(range, mode).await;
        zeroed.map_err(|error| self.error(error))
    }

    /// Written zeroes as a zero request, if that was asked for.
    fn zeroes_instead(&self, bytes: &[u8]) -> Option<ZeroMode> {
        let may_unmap = match self.options.detect_zeroes {
            DetectZeroes::Off => return None,
            DetectZeroes::On => false,
            DetectZeroes::Unmap => self.options.discard == Discard::Unmap,
        };
        is_zero(bytes).then_some(ZeroMode {
            may_unmap,
            no_fallback: false,
        })
    }

    fn transfer(&self, Transfer { buffer, outcome }: Transfer) -> NodeTransfer {
        NodeTransfer {
            buffer,
            outcome: outcome.map_err(|error| self.error(error)),
        }
    }
}

/// Lengths of nodes are whole sectors.
fn round_up(length_bytes: u64) -> u64 {
    length_bytes
        .checked_next_multiple_of(SECTOR_BYTES)
        .unwrap_or(length_bytes)
}

impl Node for FileNode {
    fn name(&self) -> String {
        let file = self.opened();
        file.name.clone()
    }

    fn facts(&self) -> NodeFacts {
        let file = self.opened();
        let facts = file.storage.facts();
        NodeFacts {
            length_bytes: file.length(),
            request_alignment: file.request_alignment,
            transfer_max_bytes: facts.transfer_max_bytes,
            cluster_size_bytes: None,
            read_only: file.options.read_only,
            unmaps: file.options.discard == Discard::Unmap && facts.discards,
            fixed_length: facts.fixed_length,
        }
    }

    fn status(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> LocalFuture<'_, Result<Vec<StatusExtent>, NodeError>> {
        Box::pin(async move {
            let file = self.opened();
            let extents = file.storage.allocation(range, extents_max).await;
            let extents = extents.map_err(|error| file.error(error))?;
            let status = |extent: blockyard_storage::Extent| StatusExtent {
                range: extent.range,
                zero: !extent.data,
                allocated: true,
            };
            Ok(extents.into_iter().map(status).collect())
        })
    }

    fn place(&self, range: ByteRange, _: bool) -> LocalFuture<'_, Result<Place, NodeError>> {
        Box::pin(async move {
            let extents = self.status(range, 1).await?;
            let extent = extents.first();
            let range = extent.map_or(range, |extent| extent.range);
            let zero = extent.is_some_and(|extent| extent.zero);
            Ok(Place {
                range,
                zero,
                allocated: true,
                data: !zero,
                compressed: false,
                host_offset: Some(range.offset()),
            })
        })
    }

    fn read(&self, offset: u64, into: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(async move {
            let file = self.opened();
            let range = ByteRange::new(offset, into.len() as u64);
            if let Some(error) = file.refusal(Operation::Read, range) {
                return NodeTransfer {
                    buffer: into,
                    outcome: Err(file.error(error)),
                };
            }
            file.transfer(file.storage.read(offset, into).await)
        })
    }

    fn write(&self, offset: u64, from: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(async move {
            let (_pass, file) = self.opened_for_change().await;
            let range = ByteRange::new(offset, from.len() as u64);
            match file.refusal(Operation::Write, range) {
                Some(error) => NodeTransfer {
                    buffer: from,
                    outcome: Err(file.error(error)),
                },
                None => file.write_allowed(offset, from).await,
            }
        })
    }

    fn zero(&self, range: ByteRange, mode: ZeroMode) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            let (_pass, file) = self.opened_for_change().await;
            match file.refusal(Operation::Zero, range) {
                Some(error) => Err(file.error(error)),
                None => file.zero_allowed(range, mode).await,
            }
        })
    }

    fn grows(&self) -> bool {
        self.opened().grows()
    }

    fn write_growing(&self, offset: u64, from: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(async move {
            let (_pass, file) = self.opened_for_change().await;
            let range = ByteRange::new(offset, from.len() as u64);
            match file.refusal_growing(Operation::Write, range) {
                Some(error) => NodeTransfer {
                    buffer: from,
                    outcome: Err(file.error(error)),
                },
                None => file.write_allowed(offset, from).await,
            }
        })
    }

    fn zero_growing(
        &self,
        range: ByteRange,
        mode: ZeroMode,
    ) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            let (_pass, file) = self.opened_for_change().await;
            match file.refusal_growing(Operation::Zero, range) {
                Some(error) => Err(file.error(error)),
                None => file.zero_allowed(range, mode).await,
            }
        })
    }

    fn discard(&self, range: ByteRange) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            let (_pass, file) = self.opened_for_change().await;
            if let Some(error) = file.refusal(Operation::Discard, range) {
                return Err(file.error(error));
            }
            if file.options.discard == Discard::Ignore {
                return Ok(());
            }
            file.storage
                .discard(range)
                .await
                .map_err(|error| file.error(error))
        })
    }

    fn flush(&self) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            let (_pass, file) = self.opened_for_change().await;
            if file.options.no_flush || file.options.read_only {
                return Ok(());
            }
            file.storage.sync().await.map_err(|error| file.error(error))
        })
    }

    fn resize(&self, length_bytes: u64) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            let (_pass, file) = self.opened_for_change().await;
            if file.options.read_only {
                let range = ByteRange::new(0, length_bytes);
                return Err(file.error(StorageError::new(Operation::Resize, range, EBADF)));
            }
            let facts = file.storage.facts();
            if facts.fixed_length && length_bytes <= facts.length_bytes {
                // A device has the length that it has, and that is enough.
                return Ok(());
            }
            file.storage
                .resize(length_bytes)
                .await
                .map_err(|error| file.error(error))
        })
    }

    fn exact_length_bytes(&self) -> u64 {
        let file = self.opened();
        file.storage.facts().length_bytes
    }

    fn preallocate(
        &self,
        range: ByteRange,
        how: Preallocation,
    ) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            let (_pass, file) = self.opened_for_change().await;
            if let Some(error) = file.refusal(Operation::Preallocate, range) {
                return Err(file.error(error));
            }
            let whole = range.align_inward(u64::from(file.request_alignment.max(1)));
            let reserved = async {
                if how != Preallocation::Full || whole == range {
                    return file.storage.preallocate(range, how).await;
                }
                // Only whole blocks can be written past the page cache; what is left at the edges is written around.
                for edge in [
                    ByteRange::between(range.offset(), whole.offset().min(range.end())),
                    ByteRange::between(whole.end().max(range.offset()), range.end()),
                ] {
                    let zeroes = Buffer::zeroed(usize::try_from(edge.length()).unwrap_or(0));
                    file.storage.write(edge.offset(), zeroes).await.outcome?;
                }
                file.storage.preallocate(whole, how).await
            };
            reserved.await.map_err(|error| file.error(error))
        })
    }

    fn host_extent(&self, range: ByteRange) -> Option<(Arc<OwnedFd>, u64)> {
        let file = self.opened();
        // The rounded tail is not in the file.
        let whole = range.end() <= file.storage.facts().length_bytes;
        file.storage
            .host_file()
            .filter(|_| whole)
            .map(|file| (file, range.offset()))
    }

    fn share(
        &self,
        source: Arc<OwnedFd>,
        from: u64,
        to: ByteRange,
    ) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            let (_pass, file) = self.opened_for_change().await;
            if let Some(error) = file.refusal(Operation::Share, to) {
                return Err(file.error(error));
            }
            if to.end() > file.storage.facts().length_bytes {
                return Err(file.error(StorageError::new(Operation::Share, to, EINVAL)));
            }
            file.storage
                .share(source, from, to)
                .await
                .map_err(|error| file.error(error))
        })
    }

    fn reopen<'a>(
        &'a self,
        context: &'a DataContext,
        plan: &'a NodePlan,
    ) -> LocalFuture<'a, Result<(), EngineError>> {
        Box::pin(async move {
            let options = match plan {
                NodePlan::File { options, .. } | NodePlan::Nbd { options, .. } => options,
                _ => return Err(cannot_become(&self.name())),
            };
            let _closed = self.gate.close(Way::Write).await;
            let old = self.opened();
            if !old.options.read_only && !old.options.no_flush {
                // What went wrong with bytes on their way is told to whom they were written through.
                let synced = old.storage.sync().await.map_err(|error| old.error(error));
                synced.map_err(|error| EngineError::generic(error.to_string()))?;
            }
            let opened = match plan {
                NodePlan::File { file, .. } => {
                    let storage = context.files().storage(file, options.read_only);
                    OpenedFile::new(self.name(), storage, *options)
                }
                // The connections stay.
                _ => OpenedFile {
                    name: self.name(),
                    storage: Rc::clone(&old.storage),
                    request_alignment: old.request_alignment,
                    options: *options,
                },
            };
            self.opened.replace(Rc::new(opened));
            Ok(())
        })
    }
}
