//! `blockdev-add`: from a description to open nodes, files first; everything is taken back if a later step fails.
//!
//! What one command opens is a batch: its nodes have their edges and image locks while others are still being opened, but
//! nobody else sees one of them before all are open. Files are opened on threads of their own, and formats look at their
//! images on data threads, so nothing here may hold the graph meanwhile.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use blockyard_ring::HostFile;
use blockyard_storage::LocalFuture;

use crate::bitmap::NodeBitmaps;
use crate::data::{NodeId, ThreadId};
use crate::error::EngineError;
use crate::graph::disk_facts::DiskQuestion;
use crate::graph::filenames::FileName;
use crate::graph::image_locks::HeldLocks;
use crate::graph::options::{Inherits, Resolved};
use crate::graph::permissions::{ExtraPermissions, Permissions};
use crate::graph::records::{Batch, Edge, FILE_ROLE, NodeRecord, Records, User};
use crate::graph::{Graph, names, not_found};
use crate::limits::{NODE_DEPTH_MAX, NODE_LENGTH_MAX, SECTOR_BYTES};
use crate::node::build::NodePlan;
use crate::node::null_node::NullOptions;
use crate::node::raw_node::Window;
use crate::request::{DriverSpec, NodeRef, NodeSpec, NullSpec};

/// Length of a null node if the client does not say.
const NULL_LENGTH_BYTES: i64 = 1 << 30;

/// Where a node is opened.
#[derive(Clone, Copy)]
pub(super) struct Site {
    /// With what else.
    pub(super) batch: Batch,
    /// On which thread, unless a child decides.
    pub(super) thread: ThreadId,
    /// Below which node, if it is described with that.
    pub(super) inherits: Option<Inherits>,
}

/// A child of a node that is being opened.
pub(super) enum Below {
    /// Somebody else's, as far as it is still there when it is needed.
    Named(String),
    /// Opened with its parent, and closed if that cannot be opened.
    Opened(NodeId),
}

/// A name that is kept for a node. It is free again when this goes, unless the node is in the records then.
pub(super) struct Reserved<'a> {
    graph: &'a Graph,
    id: NodeId,
    name: String,
}

impl Graph {
    /// Opens a node and everything that is described with it or follows from its image.
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

    /// The same for somebody who closes the node again.
    pub(super) async fn open_unowned(&self, spec: NodeSpec) -> Result<NodeId, EngineError> {
        check_depth(&spec)?;
        let batch = self.records.borrow_mut().new_batch();
        let site = Site {
            batch,
            thread: self.thread_for(&spec),
            inherits: None,
        };
        let id = self.open(spec, site).await?;
        self.records.borrow_mut().publish(batch);
        Ok(id)
    }

    /// A node goes where its existing children live, else to the least loaded thread.
    fn thread_for(&self, spec: &NodeSpec) -> ThreadId {
        let mut waiting = vec![spec];
        while let Some(spec) = waiting.pop() {
            for child in spec.driver.children() {
                match child {
                    NodeRef::Inline(child) => waiting.push(child),
                    NodeRef::Name(name) => {
                        if let Some(id) = self.find(name) {
                            return self.thread_of(id);
                        }
                    }
                }
            }
        }
        self.threads.choose()
    }

    /// Opens one node; its name is reserved meanwhile.
    pub(super) fn open(
        &self,
        spec: NodeSpec,
        site: Site,
    ) -> LocalFuture<'_, Result<NodeId, EngineError>> {
        Box::pin(async move {
            let resolved = Resolved::new(spec.common, site.inherits)?;
            let name = spec.node_name.as_deref();
            let driver = spec.driver.name();
            if let DriverSpec::File(file) | DriverSpec::HostDevice(file) = &spec.driver
                && file.filename.as_os_str().is_empty()
            {
                return Err(EngineError::generic(format!(
                    "The '{driver}' block driver requires a file name"
                )));
            }
            let fixed = match &spec.driver {
                DriverSpec::Qcow2(_) => None,
                driver => Some(Rc::new(driver.clone())),
            };
            let opened = match spec.driver {
                DriverSpec::File(file) => {
                    let open = self.open_file(driver, file, resolved, false);
                    self.open_leaf(name, driver, resolved, site, open).await
                }
                DriverSpec::HostDevice(file) => {
                    let open = self.open_file(driver, file, resolved, true);
                    self.open_leaf(name, driver, resolved, site, open).await
                }
                DriverSpec::Nbd(spec) => {
                    let open = self.open_nbd(*spec, resolved);
                    self.open_leaf(name, driver, resolved, site, open).await
                }
                DriverSpec::NullCo(null) | DriverSpec::NullAio(null) => {
                    let open = async move {
                        Ok(Leaf {
                            plan: NodePlan::Null(null_options(null, resolved.read_only)?),
                            filename: FileName::of_null(driver, &null),
                            read_only: resolved.read_only,
                            exclusive: false,
                            locked: None,
                        })
                    };
                    self.open_leaf(name, driver, resolved, site, open).await
                }
                DriverSpec::Raw { file, offset, size } => {
                    let file = self
                        .open_below(file, Inherits::Held(resolved), site)
                        .await?;
                    let raw = self.open_raw(name, &file, (offset, size), resolved, site);
                    let outcome = raw.await;
                    self.settle(file, outcome).await
                }
                DriverSpec::Blkdebug(spec) => self.open_blkdebug(name, spec, resolved, site).await,
                DriverSpec::CopyOnRead { file, bottom } => {
                    self.open_copy_on_read(name, file, bottom, resolved, site)
                        .await
                }
                DriverSpec::Throttle { file, group } => {
                    self.open_throttle(name, file, &group, resolved, site).await
                }
                DriverSpec::CopyBeforeWrite(spec) => {
                    self.open_copy_before_write(name, *spec, resolved, site)
                        .await
                }
                DriverSpec::SnapshotAccess { file } => {
                    self.open_snapshot_access(name, file, resolved, site).await
                }
                DriverSpec::Qcow2(spec) => self.open_qcow2(name, *spec, resolved, site).await,
            };
            if let (Ok(id), Some(fixed)) = (&opened, fixed)
                && let Some(node) = self.records.borrow_mut().node_mut(*id)
            {
                node.opened_as = Some(fixed);
            }
            opened
        })
    }

    /// Keeps a name, or one that is made up, for a node that is being opened.
    ///
    /// # Errors
    /// In QEMU's words.
    pub(super) fn reserve(&self, name: Option<&str>) -> Result<Reserved<'_>, EngineError> {
        let mut records = self.records.borrow_mut();
        if let Some(name) = name {
            names::check(&records, name)?;
        }
        let id = records.new_id();
        let name = name.map_or_else(|| names::made_up(id.0), str::to_owned);
        records.reserved.push(name.clone());
        Ok(Reserved {
            graph: self,
            id,
            name,
        })
    }

    /// Opens a child that is described with its parent; one that is named must be there.
    pub(super) async fn open_below(
        &self,
        child: NodeRef,
        inherits: Inherits,
        site: Site,
    ) -> Result<Below, EngineError> {
        match child {
            NodeRef::Name(name) => {
                self.look_up_in(&name, site.batch)?;
                Ok(Below::Named(name))
            }
            NodeRef::Inline(spec) => {
                let inherits = Some(inherits);
                let id = self.open(*spec, Site { inherits, ..site }).await?;
                Ok(Below::Opened(id))
            }
        }
    }

    /// Which node a child is now. The graph is held.
    pub(super) fn child_now(&self, child: &Below, batch: Batch) -> Result<NodeId, EngineError> {
        match child {
            Below::Named(name) => self.look_up_in(name, batch),
            Below::Opened(id) => Ok(*id),
        }
    }

    /// What was opened with its parent follows it from now on.
    pub(super) fn adopt(&self, parent: NodeId, child: &Below) {
        if let Below::Opened(child) = child {
            self.records.borrow_mut().adopt(parent, *child);
        }
    }

    /// The end of opening a node above a child, which is let go of if it came to nothing.
    pub(super) async fn settle<T>(
        &self,
        child: Below,
        outcome: Result<T, EngineError>,
    ) -> Result<T, EngineError> {
        if let (Below::Opened(id), Err(_)) = (child, &outcome) {
            self.close_unused(id).await;
        }
        outcome
    }

    /// The node with a name, if it is open or part of the same batch.
    fn look_up_in(&self, name: &str, batch: Batch) -> Result<NodeId, EngineError> {
        let records = self.records.borrow();
        let found = records.by_name(name, Some(batch)).map(|node| node.id);
        found.ok_or_else(|| not_found(name, name))
    }

    /// Opens a node that stands on no other.
    async fn open_leaf(
        &self,
        name: Option<&str>,
        driver: &'static str,
        resolved: Resolved,
        site: Site,
        open: impl Future<Output = Result<Leaf, EngineError>>,
    ) -> Result<NodeId, EngineError> {
        let reserved = self.reserve(name)?;
        let leaf = open.await?;
        let record = NodeRecord {
            plan: leaf.plan,
            filename: leaf.filename,
            read_only: leaf.read_only,
            exclusive: leaf.exclusive,
            locked: leaf.locked,
            ..reserved.record(driver, resolved, site)?
        };
        let _held = self.hold().await;
        self.enlist(record, None).await
    }

    async fn open_raw(
        &self,
        name: Option<&str>,
        file: &Below,
        (offset, size): (Option<u64>, Option<u64>),
        resolved: Resolved,
        site: Site,
    ) -> Result<NodeId, EngineError> {
        let reserved = self.reserve(name)?;
        let _held = self.hold_still(&[file], site.batch).await;
        let child = self.child_now(file, site.batch)?;
        let length = self.facts(child).await?.length_bytes;
        let window = check_window(offset, size, length)?;
        let record = NodeRecord {
            fixed_size: size.is_some(),
            windowed: size.is_some() || offset.is_some_and(|offset| offset > 0),
            filename: FileName::of_raw(&self.filename(child), offset, size),
            plan: NodePlan::Raw {
                child,
                window,
                read_only: resolved.read_only,
                discard: resolved.discard,
                detect_zeroes: resolved.detect_zeroes,
            },
            thread: self.thread_of(child),
            ..reserved.record("raw", resolved, site)?
        };
        let id = self.enlist(record, Some((child, FILE_ROLE))).await?;
        self.adopt(id, file);
        Ok(id)
    }

    /// How queries show a node.
    pub(super) fn filename(&self, id: NodeId) -> FileName {
        let records = self.records.borrow();
        records
            .node(id)
            .map(|node| node.filename.clone())
            .unwrap_or_default()
    }

    /// Takes a node into the records and brings it up on its thread. The graph is held.
    pub(super) async fn enlist(
        &self,
        record: NodeRecord,
        child: Option<(NodeId, &'static str)>,
    ) -> Result<NodeId, EngineError> {
        let id = self.record(record, child)?;
        if let Err(error) = self.bring_up(id).await {
            self.close(id).await;
            return Err(error);
        }
        Ok(id)
    }

    /// Takes a node into the records, with its edge and the image locks that follow. The graph is held.
    pub(super) fn record(
        &self,
        record: NodeRecord,
        child: Option<(NodeId, &'static str)>,
    ) -> Result<NodeId, EngineError> {
        let (id, thread) = (record.id, record.thread);
        let mut records = self.records.borrow_mut();
        if let Some((child, _)) = child {
            check_stays(&records, child)?;
        }
        records.insert(record);
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
        self.threads.load(thread, 1);
        Ok(id)
    }
}

/// What a node that stands on no other has of its own.
pub(super) struct Leaf {
    pub(super) plan: NodePlan,
    pub(super) filename: FileName,
    pub(super) read_only: bool,
    pub(super) exclusive: bool,
    pub(super) locked: Option<(HostFile, HeldLocks)>,
}

impl Reserved<'_> {
    /// The record of a node under this name, which stands on nothing yet.
    pub(super) fn record(
        &self,
        driver: &'static str,
        resolved: Resolved,
        site: Site,
    ) -> Result<NodeRecord, EngineError> {
        Ok(NodeRecord {
            id: self.id,
            name: self.name.clone(),
            batch: Some(site.batch),
            driver,
            filename: FileName::default(),
            image: None,
            read_only: resolved.read_only,
            inactive: resolved.inactive,
            said: resolved.said,
            inherits_from: None,
            opened_as: None,
            detect_zeroes: resolved.detect_zeroes,
            cache_direct: resolved.cache_direct,
            cache_no_flush: resolved.cache_no_flush,
            monitor_owned: false,
            fixed_size: false,
            windowed: false,
            force_share: resolved.force_share,
            extra: ExtraPermissions::default(),
            exclusive: false,
            thread: site.thread,
            plan: NodePlan::Null(null_options(NullSpec::default(), true)?),
            locked: None,
            bitmaps: Arc::new(NodeBitmaps::recorded_in(self.graph.state.clone())),
            disk: DiskQuestion::default(),
        })
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        let mut records = self.graph.records.borrow_mut();
        records.reserved.retain(|name| *name != self.name);
    }
}

/// A job's filter goes with its job: what stood on it would go on reading through a node that the graph has forgotten, and
/// could not be moved any more.
pub(super) fn check_stays(records: &Records, child: NodeId) -> Result<(), EngineError> {
    match records.node(child) {
        Some(node) if matches!(node.plan, NodePlan::Filter { .. }) => {
            let name = &node.name;
            let text = format!("Node '{name}' is the filter of a job and cannot have other users");
            Err(EngineError::generic(text))
        }
        _ => Ok(()),
    }
}

/// Refuses descriptions nested too deep before anything is opened.
fn check_depth(spec: &NodeSpec) -> Result<(), EngineError> {
    let mut waiting = vec![(spec, 1)];
    while let Some((spec, depth)) = waiting.pop() {
        if depth > NODE_DEPTH_MAX {
            return Err(EngineError::generic(format!(
                "Node definitions are nested more than {NODE_DEPTH_MAX} deep"
            )));
        }
        for child in spec.driver.children() {
            if let NodeRef::Inline(child) = child {
                waiting.push((child, depth + 1));
            }
        }
    }
    Ok(())
}

/// The window of a raw node on a child of this length.
///
/// # Errors
/// In QEMU's words.
pub(super) fn check_window(
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

pub(super) fn null_options(spec: NullSpec, read_only: bool) -> Result<NullOptions, EngineError> {
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
