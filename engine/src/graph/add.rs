//! `blockdev-add`: from a description to open nodes, children first; everything is taken back if a later step fails.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use blockyard_ring::{FileKind, HostFile, OpenMode};
use blockyard_storage::LocalFuture;
use blockyard_storage::error::errno_text;
use tokio::sync::MutexGuard;

use crate::data::{NodeId, ThreadId};
use crate::error::EngineError;
use crate::graph::disk_facts::DiskQuestion;
use crate::graph::filenames::FileName;
use crate::graph::image_locks::HeldLocks;
use crate::graph::permissions::{ExtraPermissions, Permissions};
use crate::graph::records::{Edge, NodeRecord, Records, User};
use crate::graph::{Graph, names};
use crate::limits::{NODE_DEPTH_MAX, NODE_LENGTH_MAX, SECTOR_BYTES};
use crate::node::build::NodePlan;
use crate::node::file_node::FileOptions;
use crate::node::null_node::NullOptions;
use crate::node::raw_node::Window;
use crate::request::{
    Aio, CommonOptions, DetectZeroes, Discard, DriverSpec, FileSpec, NodeRef, NodeSpec, NullSpec,
    OnOffAuto,
};

/// How long opening a file may take: longer, and something is stuck.
const OPEN_WAIT: Duration = Duration::from_secs(30);

/// Length of a null node if the client does not say.
const NULL_LENGTH_BYTES: i64 = 1 << 30;

/// Options of one node with the defaults and the parent's values filled in.
#[derive(Clone, Copy)]
pub(super) struct Resolved {
    pub(super) read_only: bool,
    auto_read_only: bool,
    force_share: bool,
    cache_direct: bool,
    pub(super) cache_no_flush: bool,
    pub(super) discard: Discard,
    pub(super) detect_zeroes: DetectZeroes,
}

/// The child of a node that is being opened.
pub(super) struct OpenedChild<'a> {
    pub(super) id: NodeId,
    pub(super) filename: FileName,
    /// It was opened with its parent, and goes if that cannot be opened.
    inline: bool,
    held: MutexGuard<'a, ()>,
}

impl Resolved {
    /// Inline children take what they do not say from their parent.
    fn new(options: CommonOptions, parent: Option<Resolved>) -> Result<Self, EngineError> {
        let of_parent = |pick: fn(&Resolved) -> bool| parent.as_ref().is_some_and(pick);
        let resolved = Self {
            read_only: options
                .read_only
                .unwrap_or_else(|| of_parent(|parent| parent.read_only)),
            auto_read_only: options
                .auto_read_only
                .unwrap_or_else(|| of_parent(|parent| parent.auto_read_only)),
            force_share: options
                .force_share
                .unwrap_or_else(|| of_parent(|parent| parent.force_share)),
            cache_direct: options
                .cache_direct
                .unwrap_or_else(|| of_parent(|parent| parent.cache_direct)),
            cache_no_flush: options
                .cache_no_flush
                .unwrap_or_else(|| of_parent(|parent| parent.cache_no_flush)),
            discard: options.discard.unwrap_or_default(),
            detect_zeroes: options.detect_zeroes.unwrap_or_default(),
        };
        if resolved.detect_zeroes == DetectZeroes::Unmap && resolved.discard != Discard::Unmap {
            return Err(EngineError::generic(
                "setting detect-zeroes to unmap is not allowed without setting discard operation \
                 to unmap",
            ));
        }
        if resolved.force_share && !resolved.read_only {
            let text = "force-share=on can only be used with read-only images";
            return Err(EngineError::generic(text));
        }
        Ok(resolved)
    }
}

impl Graph {
    /// Opens a node and its inline children.
    ///
    /// # Errors
    /// In QEMU's words; nothing of it stays open then.
    pub async fn add(&self, spec: NodeSpec) -> Result<(), EngineError> {
        let Some(name) = spec.node_name.clone() else {
            let text = "'node-name' must be specified for the root node";
            return Err(EngineError::generic(text));
        };
        let id = self.open_unowned(spec).await?;
        let mut records = self.records.borrow_mut();
        if let Some(node) = records.node_mut(id) {
            node.monitor_owned = true;
        }
        tracing::debug!(node = name, "added");
        Ok(())
    }

    /// Opens a node and its inline children for somebody who closes it again.
    pub(super) async fn open_unowned(&self, spec: NodeSpec) -> Result<NodeId, EngineError> {
        check_depth(&spec)?;
        let thread = self.thread_for(&spec);
        self.open(spec, None, thread).await
    }

    /// A node goes where its existing child lives, else to the least loaded thread.
    fn thread_for(&self, spec: &NodeSpec) -> ThreadId {
        match spec.driver.child() {
            Some(NodeRef::Name(name)) => self
                .find(name)
                .map_or_else(|| self.threads.choose(), |id| self.thread_of(id)),
            Some(NodeRef::Inline(child)) => self.thread_for(child),
            None => self.threads.choose(),
        }
    }

    /// Opens one node below `parent`; its name is reserved meanwhile.
    fn open(
        &self,
        spec: NodeSpec,
        parent: Option<Resolved>,
        thread: ThreadId,
    ) -> LocalFuture<'_, Result<NodeId, EngineError>> {
        Box::pin(async move {
            let resolved = Resolved::new(spec.common, parent)?;
            if let DriverSpec::File(file) | DriverSpec::HostDevice(file) = &spec.driver
                && file.filename.as_os_str().is_empty()
            {
                return Err(EngineError::generic(format!(
                    "The '{}' block driver requires a file name",
                    spec.driver.name()
                )));
            }
            // What is below comes before the name.
            if let DriverSpec::Raw {
                file: NodeRef::Name(child),
                ..
            } = &spec.driver
            {
                self.look_up(child)?;
            }
            let (id, name) = {
                let mut records = self.records.borrow_mut();
                let id = records.new_id();
                let name = match &spec.node_name {
                    Some(name) => {
                        names::check(&records, name)?;
                        name.clone()
                    }
                    None => names::made_up(id.0),
                };
                records.reserved.push(name.clone());
                (id, name)
            };
            let opened = self
                .open_reserved(id, name.clone(), spec, resolved, thread)
                .await;
            self.records
                .borrow_mut()
                .reserved
                .retain(|other| *other != name);
            opened
        })
    }

    async fn open_reserved(
        &self,
        early_id: NodeId,
        name: String,
        spec: NodeSpec,
        resolved: Resolved,
        thread: ThreadId,
    ) -> Result<NodeId, EngineError> {
        let driver = spec.driver.name();
        let mut record = NodeRecord {
            id: early_id,
            listed: early_id,
            name,
            driver,
            filename: FileName::default(),
            read_only: resolved.read_only,
            detect_zeroes: resolved.detect_zeroes,
            cache_direct: resolved.cache_direct,
            cache_no_flush: resolved.cache_no_flush,
            monitor_owned: false,
            fixed_size: false,
            windowed: false,
            force_share: resolved.force_share,
            exclusive: false,
            extra: ExtraPermissions::default(),
            thread,
            plan: NodePlan::Null(null_options(NullSpec::default(), true)?),
            locked: None,
            disk: DiskQuestion::default(),
        };
        match spec.driver {
            DriverSpec::File(file) => self.open_file(&mut record, file, resolved, false).await?,
            DriverSpec::HostDevice(file) => {
                self.open_file(&mut record, file, resolved, true).await?;
            }
            DriverSpec::NullCo(null) | DriverSpec::NullAio(null) => {
                record.plan = NodePlan::Null(null_options(null, resolved.read_only)?);
                record.filename = FileName::of_null(driver, &null);
            }
            DriverSpec::Raw { file, offset, size } => {
                return self.open_raw(record, file, offset, size, resolved).await;
            }
            DriverSpec::Blkdebug(spec) => {
                return self.open_blkdebug(record, spec, resolved).await;
            }
        }
        let _held = self.hold().await;
        self.enlist(record, None).await
    }

    /// The child of a node that is being opened; a child that is described inline is opened with it. The graph is held
    /// from then on.
    pub(super) async fn child(
        &self,
        record: &mut NodeRecord,
        child: NodeRef,
        resolved: Resolved,
    ) -> Result<OpenedChild<'_>, EngineError> {
        let inline = match child {
            NodeRef::Name(name) => Err(name),
            NodeRef::Inline(spec) => Ok(self.open(*spec, Some(resolved), record.thread).await?),
        };
        let held = self.hold().await;
        let (id, inline) = match inline {
            Ok(child) => (child, true),
            Err(name) => (self.look_up(&name)?, false),
        };
        // Children are older than their parents: what walks the graph relies on it.
        let mut records = self.records.borrow_mut();
        record.id = records.new_id();
        let below = records.node(id);
        let filename = below.map(|node| node.filename.clone()).unwrap_or_default();
        drop(records);
        record.thread = self.thread_of(id);
        Ok(OpenedChild {
            id,
            filename,
            inline,
            held,
        })
    }

    /// The end of opening a node above a child: lets go of the graph, and of the child if it came to nothing.
    pub(super) async fn settle_child(
        &self,
        child: OpenedChild<'_>,
        outcome: Result<NodeId, EngineError>,
    ) -> Result<NodeId, EngineError> {
        drop(child.held);
        if outcome.is_err() && child.inline {
            self.close_unused(child.id).await;
        }
        outcome
    }

    async fn open_raw(
        &self,
        mut record: NodeRecord,
        file: NodeRef,
        offset: Option<u64>,
        size: Option<u64>,
        resolved: Resolved,
    ) -> Result<NodeId, EngineError> {
        let child = self.child(&mut record, file, resolved).await?;
        record.listed = record.id;
        let outcome = async {
            let length = self.facts(child.id).await?.length_bytes;
            let window = check_window(offset, size, length)?;
            record.fixed_size = size.is_some();
            record.windowed = size.is_some() || offset.is_some_and(|offset| offset > 0);
            record.filename = FileName::of_raw(child.filename.clone(), offset, size);
            record.plan = NodePlan::Raw {
                child: child.id,
                window,
                read_only: resolved.read_only,
                discard: resolved.discard,
                detect_zeroes: resolved.detect_zeroes,
            };
            self.enlist(record, Some((child.id, "file"))).await
        }
        .await;
        self.settle_child(child, outcome).await
    }

    /// Takes a node into the records and brings it up on its thread.
    pub(super) async fn enlist(
        &self,
        record: NodeRecord,
        child: Option<(NodeId, &'static str)>,
    ) -> Result<NodeId, EngineError> {
        let (id, thread) = (record.id, record.thread);
        {
            let mut records = self.records.borrow_mut();
            if let Some((child, _)) = child {
                check_stays(&records, child)?;
            }
            let place = records.nodes.partition_point(|node| node.id < id);
            records.nodes.insert(place, record);
            let linked = records.change_edges(|edges| {
                edges.extend(child.map(|(child, role)| Edge {
                    user: User::Node(id),
                    child,
                    role,
                    taken: Permissions::NONE,
                    shared: Permissions::EVERY,
                }));
            });
            if let Err(error) = linked {
                records.nodes.retain(|node| node.id != id);
                return Err(error);
            }
        }
        self.threads.load(thread, 1);
        if let Err(error) = self.bring_up(id).await {
            self.close(id).await;
            return Err(error);
        }
        Ok(id)
    }

    async fn open_file(
        &self,
        record: &mut NodeRecord,
        spec: FileSpec,
        resolved: Resolved,
        device: bool,
    ) -> Result<(), EngineError> {
        if spec.aio == Some(Aio::Native) && !resolved.cache_direct {
            return Err(EngineError::generic(
                "aio=native was specified, but it requires cache.direct=on, which was not \
                 specified.",
            ));
        }
        let mode = OpenMode {
            write: !resolved.read_only,
            direct: resolved.cache_direct,
            create: false,
        };
        let shown = spec.filename.display().to_string();
        let opened = open_in_background(spec.filename.clone(), mode).await;
        let file = match opened {
            Err(error) if mode.write && resolved.auto_read_only && is_refused(&error) => {
                record.read_only = true;
                let read_only = OpenMode {
                    write: false,
                    ..mode
                };
                open_in_background(spec.filename, read_only).await
            }
            other => other,
        };
        let file = file.map_err(|error| {
            let reason = error
                .raw_os_error()
                .map_or_else(|| error.to_string(), errno_text);
            EngineError::generic(format!("Could not open '{shown}': {reason}"))
        })?;
        match (file.kind(), device) {
            (FileKind::Regular, false) | (FileKind::BlockDevice, true) => {}
            (_, false) => {
                let name = &record.name;
                let text = format!("'file' driver requires '{shown}' to be a regular file");
                tracing::debug!(node = name, "not a regular file");
                return Err(EngineError::generic(text));
            }
            (_, true) => {
                let text = format!(
                    "'host_device' driver requires '{shown}' to be either a character or block \
                     device"
                );
                return Err(EngineError::generic(text));
            }
        }
        if !record.read_only && file.is_write_protected().unwrap_or(false) {
            if !resolved.auto_read_only {
                let text = "The device is not writable: Permission denied";
                return Err(EngineError::generic(text));
            }
            record.read_only = true;
        }
        let locks = spec.locking != Some(OnOffAuto::Off);
        record.exclusive = spec.exclusive;
        record.locked = locks.then(|| (file.clone(), HeldLocks::default()));
        record.filename = FileName::of_file(record.driver, shown);
        let options = FileOptions {
            read_only: record.read_only,
            discard: resolved.discard,
            detect_zeroes: resolved.detect_zeroes,
            no_flush: resolved.cache_no_flush,
        };
        record.plan = NodePlan::File { file, options };
        Ok(())
    }
}

/// A job's filter goes with its job: what stood on it would go on reading through a node that the graph has forgotten, and
/// could not be moved any more.
fn check_stays(records: &Records, child: NodeId) -> Result<(), EngineError> {
    match records.node(child) {
        Some(node) if matches!(node.plan, NodePlan::Filter { .. }) => {
            let name = &node.name;
            let text = format!("Node '{name}' is the filter of a job and cannot have other users");
            Err(EngineError::generic(text))
        }
        _ => Ok(()),
    }
}

async fn open_in_background(path: PathBuf, mode: OpenMode) -> io::Result<HostFile> {
    in_background(move || HostFile::open(&path, mode)).await
}

/// Runs a call on a thread of its own: a file system that does not answer holds up only this request, and not for ever.
pub(super) async fn in_background<T: Send + 'static>(
    call: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let calling = tokio::task::spawn_blocking(call);
    match tokio::time::timeout(OPEN_WAIT, calling).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(_)) => Err(io::Error::other("opening failed (bug)")),
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Whether a file may just not be written.
fn is_refused(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
    )
}

/// Refuses descriptions nested too deep before anything is opened.
fn check_depth(spec: &NodeSpec) -> Result<(), EngineError> {
    let mut depth = 1;
    let mut rest = spec;
    loop {
        let Some(NodeRef::Inline(child)) = rest.driver.child() else {
            return Ok(());
        };
        depth += 1;
        if depth > NODE_DEPTH_MAX {
            return Err(EngineError::generic(format!(
                "Node definitions are nested more than {NODE_DEPTH_MAX} deep"
            )));
        }
        rest = child;
    }
}

fn check_window(
    offset: Option<u64>,
    size: Option<u64>,
    length: u64,
) -> Result<Window, EngineError> {
    let window = Window {
        offset_bytes: offset.unwrap_or(0),
        size_bytes: size,
    };
    if window.offset_bytes > length {
        return Err(EngineError::generic(format!(
            "Offset ({}) cannot be greater than size of the containing file ({length})",
            window.offset_bytes
        )));
    }
    if size.is_none() && !(length - window.offset_bytes).is_multiple_of(SECTOR_BYTES) {
        return Err(EngineError::generic(format!(
            "Offset ({}) cuts the containing file inside a sector of {SECTOR_BYTES} bytes; give a \
             size too",
            window.offset_bytes
        )));
    }
    if let Some(size) = size {
        let end = window.offset_bytes.checked_add(size);
        if end.is_none_or(|end| end > length) {
            // The two blanks are what clients see elsewhere.
            return Err(EngineError::generic(format!(
                "The sum of offset ({}) and size ({size}) has to be smaller or equal to the  \
                 actual size of the containing file ({length})",
                window.offset_bytes
            )));
        }
        if !size.is_multiple_of(SECTOR_BYTES) {
            return Err(EngineError::generic(
                "Specified size is not multiple of 512",
            ));
        }
    }
    Ok(window)
}

fn null_options(spec: NullSpec, read_only: bool) -> Result<NullOptions, EngineError> {
    let length = u64::try_from(spec.size.unwrap_or(NULL_LENGTH_BYTES));
    let length = length.map_err(|_| EngineError::generic("size is invalid"))?;
    let latency_ns = spec.latency_ns.unwrap_or(0);
    if i64::try_from(latency_ns).is_err() {
        return Err(EngineError::generic("latency-ns is invalid"));
    }
    let length = length.checked_next_multiple_of(SECTOR_BYTES);
    let length = length.filter(|length| *length <= NODE_LENGTH_MAX);
    let too_large = "Could not refresh total sector count: File too large";
    Ok(NullOptions {
        length_bytes: length.ok_or_else(|| EngineError::generic(too_large))?,
        latency: Duration::from_nanos(latency_ns),
        read_zeroes: spec.read_zeroes.unwrap_or(false),
        read_only,
    })
}
