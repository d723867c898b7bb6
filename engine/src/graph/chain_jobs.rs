//! Jobs that move data within one chain, commit and stream: which nodes take part, in QEMU's order of checks, and who is kept
//! off them meanwhile. How the chain is linked at their end is [`chain_ends`](super::chain_ends)' business.

use blockyard_images::qcow2::units::{Geometry, Version};

use crate::data::NodeId;
use crate::error::EngineError;
use crate::graph::host_files::in_background;
use crate::graph::image_names::in_folder;
use crate::graph::jobs::{JobNodes, edge};
use crate::graph::permissions::Permissions;
use crate::graph::records::{BASE_ROLE, Blocker, Edge, Frozen, INTERMEDIATE_ROLE, Records, User};
use crate::graph::{Graph, not_found};
use crate::job::context::JobKey;
use crate::job::verb::JobType;
use crate::node::filter_node::FilterKind;
use crate::request::{CommitSpec, Permission, StreamSpec, WorkSpec};

/// What a job takes of a chain. Its source is the highest node of which data is moved or, for a stream, that data is moved to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainPart {
    /// Layers that take part, counted from the source, which is the first; filters do not count.
    pub layers: usize,
    /// A stream: nothing stays below its device. A commit: its source goes on to be written to, and it becomes ready.
    pub is_whole: bool,
    /// The root of the chain, as the client named it.
    pub(super) device: NodeId,
    /// Nodes that are in the chain no longer when the job has ended well, the highest first.
    pub(super) inner: Vec<NodeId>,
    /// How far the base of a commit is read afterwards, through what is above it.
    pub seen_bytes: u64,
    /// The base must grow.
    pub(super) grows: bool,
    /// How headers tell of the new backing.
    pub(super) named: NewBacking,
}

/// How the header of an image is to tell of its new backing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct NewBacking {
    /// Its name; `None`: the file name that queries show.
    pub(super) name: Option<String>,
    /// A file that is no format is called raw.
    pub(super) mask_protocol: bool,
}

impl Graph {
    /// The nodes of a commit.
    ///
    /// # Errors
    /// In QEMU's words and order.
    pub(super) async fn prepare_commit(&self, spec: &CommitSpec) -> Result<JobNodes, EngineError> {
        let mut nodes = self.check_commit(spec).await?;
        if let (Some(part), Some(top)) = (&mut nodes.chain, nodes.source)
            && part.is_whole
        {
            // Where nobody writes, nothing has to be tracked, and nobody goes over to the base.
            let has_writer = self.records.borrow().demands(top).0.has(Permission::Write);
            part.is_whole = has_writer || !spec.top_is_quiet;
        }
        Ok(nodes)
    }

    /// The nodes of a commit, as the client describes it.
    ///
    /// # Errors
    /// In QEMU's words and order.
    pub(super) async fn check_commit(&self, spec: &CommitSpec) -> Result<JobNodes, EngineError> {
        let device = self
            .find(&spec.device)
            .ok_or_else(|| EngineError::device_not_found(&spec.device))?;
        if self.records.borrow().has_node_or_job_parent(device) {
            return Err(EngineError::generic("Need a root block node"));
        }
        self.records.borrow().check_no_job(device)?;
        let top = match (&spec.top_node, &spec.top) {
            (Some(_), Some(_)) => {
                let text = "'top-node' and 'top' are mutually exclusive";
                return Err(EngineError::generic(text));
            }
            (Some(name), None) => self.in_chain_of(device, name)?,
            (None, Some(file)) => match self.shown_as(device, file) {
                true => device,
                false => self.backing_by_file(device, file).await.ok_or_else(|| {
                    EngineError::generic(format!("Top image file {file} not found"))
                })?,
            },
            (None, None) => device,
        };
        let base = match (&spec.base_node, &spec.base) {
            (Some(_), Some(_)) => {
                let text = "'base-node' and 'base' are mutually exclusive";
                return Err(EngineError::generic(text));
            }
            (Some(name), None) => self.in_chain_of(top, name)?,
            (None, Some(file)) => self
                .backing_by_file(top, file)
                .await
                .ok_or_else(|| not_in_chain(file))?,
            (None, None) => {
                let records = self.records.borrow();
                records.chain(top).last().unwrap_or(top)
            }
        };
        let (inner, layers, is_active) = {
            let records = self.records.borrow();
            let inner: Vec<NodeId> = records.chain(top).take_while(|id| *id != base).collect();
            for id in inner.iter().copied().chain([base]) {
                records.check_no_job(id)?;
            }
            if inner.is_empty() {
                let text = "cannot commit an image into itself";
                return Err(EngineError::generic(text));
            }
            let is_device = records.unfiltered(top) == records.unfiltered(device);
            let has_writer = records.demands(top).0.has(Permission::Write);
            if spec.backing_file.is_some() && (is_device || has_writer) {
                return Err(EngineError::generic(match is_device {
                    true => "'backing-file' specified, but 'top' is the active layer",
                    false => "'backing-file' specified, but 'top' has a writer on it",
                }));
            }
            let is_active = is_device || has_writer;
            if let (false, Some(overlay)) = (is_active, records.overlay_in(device, top)) {
                records.check_no_job(overlay)?;
            }
            let layers = records.layers(&inner);
            (inner, layers, is_active)
        };
        let lengths = (self.facts(top).await?, self.facts(base).await?);
        let above = self.records.borrow().above(top);
        let mut seen_bytes = lengths.0.length_bytes;
        for id in above {
            seen_bytes = seen_bytes.max(self.facts(id).await?.length_bytes);
        }
        let (top_bytes, base_bytes) = (lengths.0.length_bytes, lengths.1.length_bytes);
        if is_active && top_bytes < base_bytes.min(seen_bytes) {
            // Until the client completes the job, the base may not be changed there: the device does not hide it.
            return Err(EngineError::generic(format!(
                "Node '{}' is written to and shorter than the base and than an image above it, which would show what the \
                 base holds behind its end; make it as long as that image first",
                self.records.borrow().name_of(top)
            )));
        }
        if base_bytes < top_bytes {
            self.check_can_grow(base, top, base_bytes).await?;
        }
        Ok(JobNodes {
            source: Some(top),
            target: Some(base),
            chain: Some(ChainPart {
                layers,
                is_whole: is_active,
                device,
                inner,
                seen_bytes,
                grows: base_bytes < top_bytes,
                named: NewBacking {
                    name: spec.backing_file.clone(),
                    mask_protocol: spec.backing_mask_protocol,
                },
            }),
            ..JobNodes::default()
        })
    }

    /// A base that is shorter than what is committed becomes as long, which images of version 2 cannot in some cases.
    async fn check_can_grow(
        &self,
        base: NodeId,
        top: NodeId,
        base_bytes: u64,
    ) -> Result<(), EngineError> {
        let (form, below) = {
            let records = self.records.borrow();
            let image = records.unfiltered(base);
            (records.form(image), records.backing(image))
        };
        let is_version_2 = |geometry: Geometry| geometry.version() == Version::V2;
        if !form.geometry.is_some_and(is_version_2) {
            return Ok(());
        }
        let below_bytes = match below {
            Some(below) => self.facts(below).await?.length_bytes,
            None => 0,
        };
        let why = match form.has_snapshots {
            true => "Can't resize a v2 image which has snapshots",
            false if below_bytes > base_bytes => {
                "what is below it and longer would show, as a v2 image has no zeroes to hide it"
            }
            false => return Ok(()),
        };
        let records = self.records.borrow();
        Err(EngineError::generic(format!(
            "Node '{}' cannot be made as long as node '{}': {why}",
            records.name_of(base),
            records.name_of(top)
        )))
    }

    /// The nodes of a stream, and the filter above its device.
    ///
    /// # Errors
    /// In QEMU's words and order; nothing has changed then.
    pub(super) async fn prepare_stream(&self, spec: &StreamSpec) -> Result<JobNodes, EngineError> {
        let nodes = self.check_stream(spec).await?;
        let name = spec.filter_node_name.as_deref();
        let device = self.look_up(&spec.device)?;
        let kind = FilterKind::Passes;
        let (filter, ()) = self
            .insert_filter(device, None, "copy-on-read", kind, name, || Ok(()))
            .await
            .map_err(|error| error.prefixed("Could not create node: "))?;
        Ok(JobNodes {
            filter: Some(filter),
            ..nodes
        })
    }

    /// The nodes of a stream, before anything is changed for it.
    ///
    /// # Errors
    /// In QEMU's words and order.
    pub(super) async fn check_stream(&self, spec: &StreamSpec) -> Result<JobNodes, EngineError> {
        let (base, base_node, bottom) = (&spec.base, &spec.base_node, &spec.bottom);
        for (one, other, names) in [
            (base, base_node, ("base", "base-node")),
            (base, bottom, ("base", "bottom")),
            (bottom, base_node, ("bottom", "base-node")),
        ] {
            if one.is_some() && other.is_some() {
                return Err(EngineError::generic(format!(
                    "'{}' and '{}' cannot be specified at the same time",
                    names.0, names.1
                )));
            }
        }
        let device = self.look_up(&spec.device)?;
        let below = |id| {
            let records = self.records.borrow();
            records.chain(device).skip(1).any(|other| other == id)
        };
        // What stays below the device, or the last that does not.
        let mut stays = None;
        let mut last = None;
        if let Some(file) = base {
            let found = self.backing_by_file(device, file).await;
            stays = Some(found.ok_or_else(|| not_in_chain(file))?);
        } else if let Some(name) = base_node {
            let id = self.find(name).ok_or_else(|| not_found("", name))?;
            if !below(id) {
                return Err(EngineError::generic(format!(
                    "Node '{name}' is not a backing image of '{}'",
                    spec.device
                )));
            }
            stays = Some(id);
        } else if let Some(name) = bottom {
            let id = self.find(name).ok_or_else(|| not_found("", name))?;
            if self.records.borrow().unfiltered(id) != id {
                return Err(EngineError::generic(format!(
                    "Node '{name}' is a filter, use a non-filter node as 'bottom'"
                )));
            }
            if id != device && !below(id) {
                return Err(EngineError::generic(format!(
                    "Node '{name}' is not in a chain starting from '{}'",
                    spec.device
                )));
            }
            last = Some(id);
        }
        if stays.is_none() && spec.backing_file.is_some() {
            return Err(EngineError::generic(
                "backing file specified, but streaming the entire chain",
            ));
        }
        let part = {
            let records = self.records.borrow();
            if let Some(last) = last {
                stays = records.next_in_chain(last);
            }
            let taken: Vec<NodeId> = records
                .chain(device)
                .take_while(|id| Some(*id) != stays)
                .collect();
            for id in &taken {
                records.check_no_job(*id)?;
            }
            let relied_on = taken.split_last().map_or(&[][..], |(_, parents)| parents);
            records
                .check_links_free(relied_on)
                .map_err(|error| error.prefixed("Could not create node: "))?;
            records
                .check_links_to(device)
                .map_err(|error| error.prefixed("Could not replace node: "))?;
            records.check_links_stay(&taken)?;
            ChainPart {
                layers: records.layers(&taken),
                is_whole: stays.is_none(),
                device,
                inner: taken.get(1..).unwrap_or_default().to_vec(),
                seen_bytes: 0,
                grows: false,
                named: NewBacking {
                    name: spec.backing_file.clone(),
                    mask_protocol: spec.backing_mask_protocol,
                },
            }
        };
        Ok(JobNodes {
            source: Some(device),
            target: Some(device),
            chain: Some(part),
            ..JobNodes::default()
        })
    }

    /// The filter of a job that only exists with the job.
    ///
    /// # Errors
    /// In QEMU's words.
    pub async fn insert_late_filter(
        &self,
        work: &WorkSpec,
        nodes: &mut JobNodes,
    ) -> Result<(), EngineError> {
        let (WorkSpec::Commit(spec), Some(part), Some(top)) = (work, &nodes.chain, nodes.source)
        else {
            return Ok(());
        };
        let (driver, kind) = match (part.is_whole, nodes.target) {
            (true, Some(base)) => {
                let kind = FilterKind::Tracks {
                    granularity_bytes: self.granularity_bytes(None, base).await?,
                    commits: true,
                };
                ("mirror_top", kind)
            }
            _ => ("commit_top", FilterKind::Passes),
        };
        {
            let records = self.records.borrow();
            records.check_links_to(top)?;
            let parents: Vec<NodeId> = records
                .chain(top)
                .take_while(|id| Some(*id) != nodes.target)
                .collect();
            records.check_links_free(&parents)?;
            records.check_links_stay(parents.get(1..).unwrap_or_default())?;
        }
        let name = spec.filter_node_name.as_deref();
        let inserted = self.insert_filter(top, None, driver, kind, name, || Ok(()));
        nodes.filter = Some(inserted.await?.0);
        Ok(())
    }

    /// Opens for writing what a job within a chain writes to, and takes the permission to do so. It has its other edges by
    /// then, which keep its nodes where they are: the graph need not be held, as files are opened and images read.
    ///
    /// # Errors
    /// In QEMU's words.
    pub async fn open_chain_for_writing(
        &self,
        key: JobKey,
        nodes: &JobNodes,
    ) -> Result<(), EngineError> {
        let (Some(part), Some(target)) = (&nodes.chain, nodes.target) else {
            return Ok(());
        };
        let writable = self.open_for_writing(target).await?;
        let is_stream = nodes.source == nodes.target;
        let mut records = self.records.borrow_mut();
        records.writable.push((key, writable));
        let read = Permissions::NONE.with(Permission::ConsistentRead);
        let root = |child, taken, shared| edge(User::Backend(key), child, "root", taken, shared);
        if is_stream {
            let filter = nodes.filter.unwrap_or(target);
            if let Some(filter) = records.node_mut(filter) {
                filter.read_only = false;
            }
            let shared = Permissions::EVERY.without(Permission::Resize);
            return records.change_edges(|edges| edges.push(root(filter, read, shared)));
        }
        let mut taken = match part.is_whole {
            true => Permissions::NONE.with(Permission::Write),
            false => read.with(Permission::Write),
        };
        if part.grows {
            taken = taken.with(Permission::Resize);
        }
        let mut shared = read.with(Permission::WriteUnchanged);
        if part.is_whole {
            shared = shared.with(Permission::Write);
        }
        records.change_edges(|edges| edges.push(root(target, taken, shared)))
    }

    /// The node with a name, if it is of a chain.
    fn in_chain_of(&self, top: NodeId, name: &str) -> Result<NodeId, EngineError> {
        let id = self.find(name).ok_or_else(|| not_found("", name))?;
        match self.records.borrow().chain(top).any(|other| other == id) {
            true => Ok(id),
            false => Err(EngineError::generic(format!(
                "'{name}' is not in this backing file chain"
            ))),
        }
    }

    fn shown_as(&self, id: NodeId, file: &str) -> bool {
        let records = self.records.borrow();
        let node = records.node(id);
        node.is_some_and(|node| node.filename.to_string() == file)
    }

    /// The backing in a chain that a file name stands for: as its overlay names it, whatever way that is written, or, where the
    /// client has chosen it, as queries show it.
    async fn backing_by_file(&self, top: NodeId, file: &str) -> Option<NodeId> {
        let mut candidates = Vec::new();
        {
            let records = self.records.borrow();
            for overlay in records.chain(top) {
                let (Some(node), Some(below)) = (records.node(overlay), records.backing(overlay))
                else {
                    continue;
                };
                let below = records.unfiltered(below);
                let shown = records.node(below)?.filename.to_string();
                let image = node.image.as_ref();
                let own = image.filter(|image| image.own_backing == shown);
                let named = own.and_then(|image| image.backing.as_ref());
                let folder = records.folder(overlay);
                let paths = match (named, folder) {
                    (Some(named), Some(folder)) => Some((
                        in_folder(named.name.as_slice(), folder),
                        in_folder(file.as_bytes(), folder),
                    )),
                    _ => None,
                };
                candidates.push((below, shown == file, paths));
            }
        }
        let file = in_background(move || {
            let same = |one: &std::path::Path, other: &std::path::Path| {
                one == other
                    || matches!((one.canonicalize(), other.canonicalize()), (Ok(one), Ok(other)) if one == other)
            };
            let mut candidates = candidates.into_iter();
            let found = candidates.find(|(_, is_shown, paths)| match paths {
                Some((one, other)) => same(one, other),
                None => *is_shown,
            });
            Ok(found.map(|(id, ..)| id))
        });
        file.await.ok().flatten()
    }
}

impl Records {
    /// A job's edges to a chain, but for those that write, and what it keeps others off and frozen.
    pub(super) fn chain_edges(&self, key: JobKey, nodes: &JobNodes, part: &ChainPart) -> Vec<Edge> {
        let (Some(source), Some(target)) = (nodes.source, nodes.target) else {
            return Vec::new();
        };
        let (none, every) = (Permissions::NONE, Permissions::EVERY);
        let read = none.with(Permission::ConsistentRead);
        let unchanged = none.with(Permission::WriteUnchanged);
        let keeps_length = every.without(Permission::Resize);
        let above = nodes.filter.unwrap_or(source);
        let job = |node, role, taken, shared| edge(User::Job(key), node, role, taken, shared);
        let is_stream = source == target;
        let base = self.unfiltered(target);
        // Filters on the base show what the base does, which the job reads.
        let let_in = |id, shared: Permissions| match self.unfiltered(id) == base {
            true => shared.with(Permission::ConsistentRead),
            false => shared,
        };
        let mut edges = Vec::new();
        if is_stream {
            edges.push(job(above, "main node", none, every));
            edges.push(job(source, "active node", none, keeps_length));
            let shared = read.with(Permission::WriteUnchanged);
            let inner = part.inner.iter();
            edges.extend(inner.map(|id| job(*id, INTERMEDIATE_ROLE, none, shared)));
        } else if part.is_whole {
            edges.push(job(above, "main node", read, keeps_length));
            edges.push(job(source, "source", none, keeps_length));
            edges.push(job(target, "target", none, every));
            let shared = unchanged.with(Permission::Write);
            let inner = part.inner.iter().skip(1);
            edges.extend(inner.map(|id| job(*id, INTERMEDIATE_ROLE, none, let_in(*id, shared))));
        } else {
            edges.push(job(part.device, "main node", none, every));
            let shared = unchanged.with(Permission::Write);
            let inner = part.inner.iter();
            edges.extend(inner.map(|id| job(*id, INTERMEDIATE_ROLE, none, let_in(*id, shared))));
            edges.push(job(target, BASE_ROLE, none, every));
            edges.push(edge(User::Backend(key), source, "root", none, every));
        }
        edges
    }

    /// Keeps others off the nodes of a chain, and its links as they are.
    pub(super) fn guard_chain(
        &mut self,
        key: JobKey,
        job_type: JobType,
        nodes: &JobNodes,
        part: &ChainPart,
    ) {
        let (Some(source), Some(target)) = (nodes.source, nodes.target) else {
            return;
        };
        let mut guarded = vec![part.device];
        if source == target || part.is_whole {
            guarded.extend(nodes.filter);
        }
        guarded.extend([source].iter().chain(&part.inner));
        if source != target {
            guarded.push(target);
        }
        guarded.sort();
        guarded.dedup();
        self.blockers
            .extend(guarded.into_iter().map(|node| Blocker {
                node,
                job: key,
                job_type,
            }));
        let parents = nodes.filter.into_iter().chain([source]);
        let parents = parents.chain(part.inner.iter().copied());
        self.frozen
            .extend(parents.map(|parent| Frozen { parent, job: key }));
    }
}

fn not_in_chain(file: &str) -> EngineError {
    EngineError::generic(format!("Can't find '{file}' in the backing chain"))
}
