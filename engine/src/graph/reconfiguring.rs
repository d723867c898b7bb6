//! `blockdev-reopen`: nodes get other options, and other nodes below them, while they are in use. All of a command or nothing.
//!
//! Each description is a whole one: what it leaves out goes back to its default. What was described with a node follows it,
//! unless it is named, which keeps what its own client said.

use std::collections::{HashSet, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::MutexGuard;

use crate::data::NodeId;
use crate::error::EngineError;
use crate::graph::add::{check_stays, check_window};
use crate::graph::fixed_options::{check_dropped, check_fixed};
use crate::graph::host_files::is_refused;
use crate::graph::image_options::image_options;
use crate::graph::linking::{Change, Link};
use crate::graph::nbd::nbd_access;
use crate::graph::options::{Inherits, Resolved};
use crate::graph::records::{
    BACKING_ROLE, DATA_FILE_ROLE, FILE_ROLE, IMAGE_ROLE, NodeRecord, User,
};
use crate::graph::reopen::{file_for, not_opened, pin};
use crate::graph::{Graph, not_found, throttling};
use crate::node::build::NodePlan;
use crate::node::file_node::FileOptions;
use crate::node::qcow2::opening::{header_on, refusal};
use crate::request::{BackingRef, DriverSpec, NodeRef, NodeSpec, Qcow2Spec};

/// A node that is to be opened in another way.
struct Item {
    id: NodeId,
    /// `None`: as its client has said before.
    spec: Option<NodeSpec>,
    inherits: Option<Inherits>,
}

/// What a command comes to.
#[derive(Default)]
struct Planned {
    nodes: Vec<NodeRecord>,
    links: Vec<Link>,
    queue: VecDeque<Item>,
    /// Nodes that are described by themselves, and do not follow others.
    described: HashSet<NodeId>,
}

/// What becomes of a child.
enum Wish {
    /// It stays as it is.
    Keep,
    /// It stays, and follows its parent.
    Follow(Option<Box<NodeSpec>>),
    /// Another node takes its place.
    Other(NodeId),
}

impl Graph {
    /// Opens nodes in another way.
    ///
    /// # Errors
    /// In QEMU's words; nothing has changed then.
    pub async fn reopen(&self, specs: Vec<NodeSpec>) -> Result<(), EngineError> {
        let _held = self.hold_for_reopen(&specs).await?;
        // What is planned from here on holds only as long as nobody else changes one of them.
        let pinned = self.pin_described(&specs)?;
        let outcome = self.reopen_pinned(specs).await;
        for id in pinned {
            self.release(id, &pin(id)).await;
        }
        outcome
    }

    fn pin_described(&self, specs: &[NodeSpec]) -> Result<Vec<NodeId>, EngineError> {
        let ids: Result<Vec<NodeId>, _> = specs.iter().map(|spec| self.described(spec)).collect();
        let ids = ids?;
        let mut records = self.records.borrow_mut();
        for id in &ids {
            records.check_unpinned(&records.component(*id), None)?;
        }
        records.change_edges(|edges| edges.extend(ids.iter().map(|id| pin(*id))))?;
        Ok(ids)
    }

    /// The same for nodes that an edge of the caller keeps as they are. The graph is held.
    async fn reopen_pinned(&self, specs: Vec<NodeSpec>) -> Result<(), EngineError> {
        let mut planned = Planned::default();
        for spec in specs {
            let id = self.described(&spec)?;
            if !planned.described.insert(id) {
                let name = spec.node_name.unwrap_or_default();
                let text = format!("Node '{name}' is described twice");
                return Err(EngineError::generic(text));
            }
            planned.queue.push_back(Item {
                id,
                spec: Some(spec),
                inherits: None,
            });
        }
        while let Some(item) = planned.queue.pop_front() {
            self.plan_item(item, &mut planned).await?;
        }
        self.carry_out(planned).await
    }

    /// Keeps others from changing the graph, once all nodes that are to be connected are on one thread.
    async fn hold_for_reopen(&self, specs: &[NodeSpec]) -> Result<MutexGuard<'_, ()>, EngineError> {
        let named = |spec: &NodeSpec| -> Vec<String> {
            let children = spec.driver.children().filter_map(|child| match child {
                NodeRef::Name(name) => Some(name.clone()),
                NodeRef::Inline(_) => None,
            });
            children.collect()
        };
        let names: Vec<String> = specs
            .iter()
            .flat_map(|spec| spec.node_name.iter().cloned().chain(named(spec)))
            .collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut held = self.hold_named(&names).await;
        loop {
            let mut apart = None;
            for spec in specs {
                let id = self.described(spec)?;
                let children = named(spec).into_iter();
                let children = children.filter_map(|name| self.find(&name));
                let thread = self.thread_of(id);
                let other = children
                    .into_iter()
                    .find(|child| self.thread_of(*child) != thread);
                apart = apart.or(other.map(|other| (id, other)));
            }
            let Some((id, other)) = apart else {
                return Ok(held);
            };
            held = self.join(held, id, other, 0, None).await?;
        }
    }

    /// The node that a description is of.
    fn described(&self, spec: &NodeSpec) -> Result<NodeId, EngineError> {
        let Some(name) = &spec.node_name else {
            return Err(EngineError::generic("node-name not specified"));
        };
        self.find(name).ok_or_else(|| {
            EngineError::generic(format!("Failed to find node with node-name='{name}'"))
        })
    }

    /// What becomes of one node; those that follow it are put in the queue.
    async fn plan_item(&self, item: Item, planned: &mut Planned) -> Result<(), EngineError> {
        let Item { id, spec, inherits } = item;
        let node = self.records.borrow().node(id).cloned();
        let mut node = node.ok_or_else(|| EngineError::generic("The node is gone"))?;
        if let Some(spec) = &spec {
            if spec.driver.name() != node.driver {
                if let Some(before) = &node.opened_as {
                    check_dropped(before, &spec.driver)?;
                }
                return Err(cannot_change("driver"));
            }
            if spec
                .node_name
                .as_ref()
                .is_some_and(|name| *name != node.name)
            {
                return Err(cannot_change("node-name"));
            }
        }
        let common = spec.as_ref().map_or(node.said, |spec| spec.common);
        if common
            .force_share
            .is_some_and(|share| share != node.force_share)
        {
            return Err(cannot_change("force-share"));
        }
        if spec.is_some() && (node.said.active.is_some() || common.active == Some(false)) {
            return Err(cannot_reset("active"));
        }
        let resolved = Resolved::new(common, inherits)?;
        if resolved.force_share != node.force_share {
            return Err(cannot_reset("force-share"));
        }
        if let (Some(spec), Some(before)) = (&spec, &node.opened_as) {
            check_fixed(before, &spec.driver)?;
        }
        node.read_only = resolved.read_only;
        node.said = common;
        node.detect_zeroes = resolved.detect_zeroes;
        node.cache_direct = resolved.cache_direct;
        node.cache_no_flush = resolved.cache_no_flush;
        let driver = spec.map(|spec| spec.driver);
        match node.plan {
            NodePlan::File { .. } => plan_file(&mut node, resolved).await?,
            NodePlan::Null(ref mut options) => options.read_only = resolved.read_only,
            NodePlan::Nbd {
                ref remote,
                ref mut options,
            } => {
                let read_only = nbd_access(remote, resolved).map_err(|_| {
                    let text = "Can't reopen read-only NBD mount as read/write";
                    EngineError::generic(text)
                })?;
                node.read_only = read_only;
                *options = FileOptions {
                    read_only,
                    discard: resolved.discard,
                    detect_zeroes: resolved.detect_zeroes,
                    no_flush: resolved.cache_no_flush,
                };
            }
            NodePlan::Raw { .. } => self.plan_raw(&mut node, driver, resolved, planned).await?,
            NodePlan::Blkdebug { .. } => {
                self.plan_blkdebug(&mut node, driver, resolved, planned)?
            }
            NodePlan::Qcow2 { .. } => {
                let spec = match driver {
                    Some(DriverSpec::Qcow2(spec)) => Some(*spec),
                    _ => None,
                };
                self.plan_qcow2(&mut node, spec, resolved, planned).await?;
            }
            NodePlan::Throttle { .. } => {
                self.plan_throttle(&mut node, driver, resolved, planned)?;
            }
            NodePlan::CopyOnRead { .. }
            | NodePlan::CopyBeforeWrite { .. }
            | NodePlan::SnapshotAccess { .. }
            | NodePlan::Filter { .. }
            | NodePlan::Opening => {
                return Err(EngineError::generic(format!(
                    "Block format '{}' used by node '{}' does not support reopening files",
                    node.driver, node.name
                )));
            }
        }
        // Whether it is active is another command's matter.
        node.plan.set_access(node.read_only, node.inactive);
        planned.nodes.push(node);
        Ok(())
    }

    async fn plan_raw(
        &self,
        node: &mut NodeRecord,
        spec: Option<DriverSpec>,
        resolved: Resolved,
        planned: &mut Planned,
    ) -> Result<(), EngineError> {
        let NodePlan::Raw { child, window, .. } = node.plan else {
            return Ok(());
        };
        let (mut child, mut window) = (child, window);
        let file = match &spec {
            Some(DriverSpec::Raw { file, .. }) => Some(file),
            _ => None,
        };
        let inherits = Inherits::Held(resolved);
        child = self.plan_child(node, FILE_ROLE, Some(child), file, inherits, planned)?;
        if let Some(DriverSpec::Raw { offset, size, .. }) = spec {
            node.opened_as = spec.map(Rc::new);
            window = check_window(offset, size, self.facts(child).await?.length_bytes)?;
            node.fixed_size = size.is_some();
            node.windowed = size.is_some() || offset.is_some_and(|offset| offset > 0);
        }
        node.plan = NodePlan::Raw {
            child,
            window,
            read_only: resolved.read_only,
            discard: resolved.discard,
            detect_zeroes: resolved.detect_zeroes,
        };
        Ok(())
    }

    fn plan_blkdebug(
        &self,
        node: &mut NodeRecord,
        spec: Option<DriverSpec>,
        resolved: Resolved,
        planned: &mut Planned,
    ) -> Result<(), EngineError> {
        let image = match &spec {
            Some(DriverSpec::Blkdebug(spec)) => Some(&spec.image),
            _ => None,
        };
        let NodePlan::Blkdebug { child, .. } = node.plan else {
            return Ok(());
        };
        let inherits = Inherits::Filtered(resolved);
        let wanted = self.plan_child(node, IMAGE_ROLE, Some(child), image, inherits, planned)?;
        if wanted != child {
            return Err(cannot_change(IMAGE_ROLE));
        }
        if let NodePlan::Blkdebug { options, .. } = &mut node.plan {
            options.read_only = resolved.read_only;
            options.discard = resolved.discard;
            options.detect_zeroes = resolved.detect_zeroes;
            options.no_flush = resolved.cache_no_flush;
        }
        Ok(())
    }

    fn plan_throttle(
        &self,
        node: &mut NodeRecord,
        spec: Option<DriverSpec>,
        resolved: Resolved,
        planned: &mut Planned,
    ) -> Result<(), EngineError> {
        let (file, group) = match &spec {
            Some(DriverSpec::Throttle { file, group }) => (Some(file), Some(group)),
            _ => (None, None),
        };
        let NodePlan::Throttle { child, .. } = node.plan else {
            return Ok(());
        };
        let inherits = Inherits::Filtered(resolved);
        let wanted = self.plan_child(node, FILE_ROLE, Some(child), file, inherits, planned)?;
        let group = group.map(|group| self.objects.borrow().throttle_group(group));
        let group = group.transpose()?;
        if let NodePlan::Throttle {
            child,
            member,
            options,
        } = &mut node.plan
        {
            *child = wanted;
            *options = throttling::options(resolved);
            match group {
                Some(group) if !Arc::ptr_eq(member.group(), &group) => *member = group.join(),
                _ => {}
            }
        }
        Ok(())
    }

    async fn plan_qcow2(
        &self,
        node: &mut NodeRecord,
        spec: Option<Qcow2Spec>,
        resolved: Resolved,
        planned: &mut Planned,
    ) -> Result<(), EngineError> {
        let NodePlan::Qcow2 {
            file,
            data_file,
            backing,
            plan,
        } = node.plan
        else {
            return Ok(());
        };
        let (mut plan, mut backing) = (plan, backing);
        let held = Inherits::Held(resolved);
        let given = spec.as_ref().map(|spec| &spec.file);
        let new_file = self.plan_child(node, FILE_ROLE, Some(file), given, held, planned)?;
        plan.image.read_only = resolved.read_only;
        plan.node.discard = resolved.discard;
        plan.node.detect_zeroes = resolved.detect_zeroes;
        if let Some(spec) = &spec {
            let header = self.threads.run(node.thread, move |context| {
                Box::pin(async move {
                    let lost = || EngineError::generic("A file is lost (bug)");
                    let file = context.node(new_file).ok_or_else(lost)?;
                    header_on(&context, file, true).await
                })
            });
            let header = header.await??;
            (plan.image, plan.node) = image_options(spec, &header, resolved).map_err(refusal)?;
            backing = self.plan_backing(node, &spec.backing, backing, resolved, planned)?;
        }
        let given = spec.as_ref().and_then(|spec| spec.data_file.as_ref());
        if given.is_some() || data_file.is_some() {
            let role = DATA_FILE_ROLE;
            let wanted = match data_file {
                Some(_) => self
                    .plan_child(node, role, data_file, given, held, planned)
                    .map(Some)?,
                None => None,
            };
            if wanted != data_file || data_file.is_none() {
                return Err(cannot_change(role));
            }
        }
        node.plan = NodePlan::Qcow2 {
            file: new_file,
            data_file,
            backing,
            plan,
        };
        Ok(())
    }

    /// What is below an image from then on.
    fn plan_backing(
        &self,
        node: &NodeRecord,
        given: &BackingRef,
        now: Option<NodeId>,
        resolved: Resolved,
        planned: &mut Planned,
    ) -> Result<Option<NodeId>, EngineError> {
        let named = node
            .image
            .as_ref()
            .is_some_and(|image| image.backing.is_some());
        let inherits = Inherits::Backing(resolved);
        match given {
            BackingRef::FromImage if named || now.is_some() => Err(EngineError::generic(format!(
                "backing is missing for '{}'",
                node.name
            ))),
            BackingRef::FromImage => Ok(None),
            BackingRef::Nothing => {
                if now.is_some() {
                    let now = self.check_replaced(node, BACKING_ROLE)?;
                    planned.link(node.id, BACKING_ROLE, now, None);
                }
                Ok(None)
            }
            BackingRef::Node(given) => self
                .plan_child(node, BACKING_ROLE, now, Some(given), inherits, planned)
                .map(Some),
        }
    }

    /// The node that is to be below another one in some role.
    fn plan_child(
        &self,
        node: &NodeRecord,
        role: &'static str,
        now: Option<NodeId>,
        given: Option<&NodeRef>,
        inherits: Inherits,
        planned: &mut Planned,
    ) -> Result<NodeId, EngineError> {
        let wish = self.wish(node, role, now, given)?;
        match (wish, now) {
            (Wish::Keep, Some(now)) => Ok(now),
            (Wish::Follow(spec), Some(now)) => {
                if !planned.described.contains(&now) {
                    planned.queue.push_back(Item {
                        id: now,
                        spec: spec.map(|spec| *spec),
                        inherits: Some(inherits),
                    });
                }
                Ok(now)
            }
            (Wish::Other(other), _) => {
                let now = self.check_replaced(node, role)?;
                let records = self.records.borrow();
                check_stays(&records, other)?;
                if records.parents_first([other]).contains(&node.id) {
                    return Err(EngineError::generic(format!(
                        "Making '{}' a {role} child of '{}' would create a cycle",
                        records.name_of(other),
                        node.name
                    )));
                }
                planned.link(node.id, role, now, Some(other));
                Ok(other)
            }
            (Wish::Keep | Wish::Follow(_), None) => Err(cannot_change(role)),
        }
    }

    /// What a description says of a child.
    fn wish(
        &self,
        node: &NodeRecord,
        role: &str,
        now: Option<NodeId>,
        given: Option<&NodeRef>,
    ) -> Result<Wish, EngineError> {
        let follows = {
            let records = self.records.borrow();
            let child = now.and_then(|now| records.node(now));
            child.is_some_and(|child| child.inherits_from == Some(node.id))
        };
        match given {
            None if follows => Ok(Wish::Follow(None)),
            None => Ok(Wish::Keep),
            Some(NodeRef::Name(name)) => {
                let found = self.find(name).ok_or_else(|| not_found("", name))?;
                Ok(match Some(found) == now {
                    false => Wish::Other(found),
                    true if follows => Wish::Follow(None),
                    true => Wish::Keep,
                })
            }
            Some(NodeRef::Inline(spec)) if follows => Ok(Wish::Follow(Some(spec.clone()))),
            Some(NodeRef::Inline(_)) => Err(cannot_change(&format!("{role}.driver"))),
        }
    }

    /// What the records have below a node, if it may be replaced.
    fn check_replaced(
        &self,
        node: &NodeRecord,
        role: &'static str,
    ) -> Result<Option<NodeId>, EngineError> {
        let records = self.records.borrow();
        let now = records.children(node.id).find(|edge| edge.role == role);
        let now = now.map(|edge| edge.child);
        let is_filter = now
            .and_then(|now| records.node(now))
            .is_some_and(|child| matches!(child.plan, NodePlan::Filter { .. }));
        if is_filter {
            return Err(EngineError::generic(format!(
                "Cannot replace implicit {role} child of {}",
                node.name
            )));
        }
        records.check_not_frozen(node.id, role)?;
        Ok(now)
    }

    /// Lets everything become what is planned.
    async fn carry_out(&self, planned: Planned) -> Result<(), EngineError> {
        let Planned { nodes, links, .. } = planned;
        let mut drained = Vec::new();
        let mut seen = HashSet::new();
        for link in &links {
            let User::Node(parent) = link.user else {
                continue;
            };
            let mut above = self.records.borrow().ancestors(parent);
            above.retain(|id| seen.insert(*id));
            drained.push(self.drain_roots_on(parent, &above).await?);
        }
        let ids: Vec<NodeId> = nodes.iter().map(|node| node.id).collect();
        let outcome = self.reopen_nodes(Change::new(nodes, links.clone())).await;
        drop(drained);
        outcome?;
        for link in &links {
            let User::Node(parent) = link.user else {
                continue;
            };
            let left = link.from.filter(|child| self.leave(parent, *child));
            if let Some(left) = left {
                self.close_unused(left).await;
            }
        }
        let mut records = self.records.borrow_mut();
        for id in ids {
            for id in records.component(id) {
                records.name_again(id);
            }
        }
        Ok(())
    }

    /// A node is not below another one any more. Whether it goes, too, if nobody uses it.
    fn leave(&self, parent: NodeId, child: NodeId) -> bool {
        let mut records = self.records.borrow_mut();
        let Some(node) = records.node_mut(child) else {
            return false;
        };
        if node.inherits_from == Some(parent) {
            node.inherits_from = None;
        }
        !node.monitor_owned
    }
}

impl Planned {
    fn link(
        &mut self,
        parent: NodeId,
        role: &'static str,
        from: Option<NodeId>,
        to: Option<NodeId>,
    ) {
        self.links.push(Link {
            user: User::Node(parent),
            role,
            from,
            to,
        });
    }
}

/// What becomes of a file; where it may not be written, it is read-only if its client allows that.
async fn plan_file(node: &mut NodeRecord, resolved: Resolved) -> Result<(), EngineError> {
    let NodePlan::File { file, .. } = &node.plan else {
        return Ok(());
    };
    let mut read_only = resolved.read_only;
    let mut opened = file_for(file, read_only, resolved.cache_direct).await;
    if let Err(error) = &opened
        && !read_only
        && resolved.auto_read_only
        && is_refused(error)
    {
        read_only = true;
        opened = file_for(file, read_only, resolved.cache_direct).await;
    }
    let opened = opened.map_err(|error| not_opened(node, &error))?;
    node.read_only = read_only;
    if let NodePlan::File { file, options } = &mut node.plan {
        options.read_only = read_only;
        options.discard = resolved.discard;
        options.detect_zeroes = resolved.detect_zeroes;
        options.no_flush = resolved.cache_no_flush;
        if let Some(opened) = opened {
            *file = opened;
        }
    }
    Ok(())
}

pub(super) fn cannot_change(option: &str) -> EngineError {
    EngineError::generic(format!("Cannot change the option '{option}'"))
}

pub(super) fn cannot_reset(option: &str) -> EngineError {
    EngineError::generic(format!(
        "Option '{option}' cannot be reset to its default value"
    ))
}
