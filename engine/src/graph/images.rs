//! Nodes that work on whole images uses: kept where they are, and from everybody else, until it has ended.

use std::rc::Rc;

use crate::bitmap::Need;
use crate::data::NodeId;
use crate::error::EngineError;
use crate::graph::Graph;
use crate::graph::permissions::Permissions;
use crate::graph::records::{Edge, User};
use crate::images::plan::{Moved, TargetForm};
use crate::images::rebase::{self, Pass};
use crate::images::snapshot::{self, SnapshotSpec, SnapshotsView};
use crate::images::{
    self, ImageReply, ImageSpec, ImageWatcher, ImageWork, Means, RebaseSpec, RebaseView,
};
use crate::request::Permission;

impl Graph {
    /// Does something with the image on a node. Others may only read the node meanwhile.
    ///
    /// # Errors
    /// When the node is not there or in use, and as the work's.
    pub async fn work_on_image(&self, spec: ImageSpec) -> Result<ImageReply, EngineError> {
        let edges = {
            let mut names = vec![spec.node.as_str()];
            names.extend(spec.work.other());
            let _held = self.hold_named(&names).await;
            let mut nodes = vec![self.look_up(&spec.node)?];
            if let Some(other) = spec.work.other() {
                nodes.push(self.look_up(other)?);
            }
            self.take_for_image(&nodes, spec.work.writes())?
        };
        // The edges keep the nodes where they are.
        let nodes = edges.iter().map(|edge| edge.child).collect();
        let outcome = self.run_on_image(nodes, spec).await;
        let mut records = self.records.borrow_mut();
        for edge in edges {
            if let Some(place) = records.edges.iter().position(|other| *other == edge)
                && let Err(error) = records.change_edges(|edges| {
                    edges.remove(place);
                })
            {
                let node = records.name_of(edge.child);
                tracing::error!(%error, node, "a permission stays taken");
            }
        }
        outcome
    }

    /// Takes nodes, all or none; the first one for writing, if that is needed.
    fn take_for_image(&self, nodes: &[NodeId], writes: bool) -> Result<Vec<Edge>, EngineError> {
        let mut records = self.records.borrow_mut();
        for id in nodes {
            records.check_free(*id)?;
            records.check_unpinned(&records.component(*id), None)?;
        }
        let edge = |(place, id): (usize, &NodeId)| {
            let mut edge = user(*id, writes && place == 0);
            if records.node(*id).is_some_and(|node| node.force_share) {
                edge.shared = Permissions::EVERY;
            }
            edge
        };
        let taken: Vec<Edge> = nodes.iter().enumerate().map(edge).collect();
        records.change_edges(|edges| edges.extend(taken.iter().cloned()))?;
        Ok(taken)
    }

    async fn run_on_image(
        &self,
        ids: Vec<NodeId>,
        spec: ImageSpec,
    ) -> Result<ImageReply, EngineError> {
        let Some(first) = ids.first() else {
            return Err(EngineError::generic("Internal error: no node (bug)"));
        };
        let thread = self.thread_of(*first);
        if ids.iter().any(|id| self.thread_of(*id) != thread) {
            // Commands have one data thread; a daemon does no such work.
            let text = "The nodes are on several data threads";
            return Err(EngineError::generic(text));
        }
        if let ImageWork::Rebase(rebase) = &spec.work
            && rebase.keeps_content
            && let Some(view) = self.look_before_rebase(&ids, rebase, &spec.watcher).await?
        {
            return Ok(ImageReply::Rebased(view));
        }
        if let ImageWork::Snapshot(spec) = &spec.work
            && let Some(view) = self.look_before_snapshot(*first, spec).await?
        {
            return Ok(ImageReply::Snapshots(view));
        }
        let changed = match &spec.work {
            ImageWork::ManifestOnto(onto) => {
                let bitmaps = self.bitmaps_on(*first)?;
                Some(bitmaps.with(&onto.bitmap, Need::Read, |one| one.map().clone())?)
            }
            _ => None,
        };
        self.threads
            .run(thread, move |context| {
                Box::pin(async move {
                    let mut nodes = ids.iter().filter_map(|id| context.node(*id));
                    match nodes.next() {
                        Some(node) => {
                            let other = nodes.next();
                            let with = Means {
                                cpu: context.cpu().clone(),
                                files: Rc::clone(context.files()),
                                changed,
                            };
                            images::run(node, other, spec.work, spec.watcher, with).await
                        }
                        None => Err(EngineError::generic("Internal error: a node is lost (bug)")),
                    }
                })
            })
            .await?
    }
}

impl Graph {
    /// What a rebase comes to, if that is all that was asked for, or if there is too little room for it.
    async fn look_before_rebase(
        &self,
        ids: &[NodeId],
        spec: &RebaseSpec,
        watcher: &ImageWatcher,
    ) -> Result<Option<RebaseView>, EngineError> {
        if spec.force && !spec.dry_run {
            return Ok(None);
        }
        let Some(image) = ids.first().map(|id| self.records.borrow().unfiltered(*id)) else {
            return Ok(None);
        };
        let (form, ground) = self.ground(image).await;
        if !spec.dry_run {
            let bound = self.plan_rebase(ids, form.clone(), Pass::Bound, watcher);
            if ground.view(&bound.await?.room).fits != Some(false) {
                return Ok(None);
            }
        }
        let moved = self.plan_rebase(ids, form, Pass::Count, watcher).await?;
        let room = ground.view(&moved.room);
        let is_asked_for = spec.dry_run || room.fits == Some(false);
        Ok(is_asked_for.then_some(RebaseView {
            copied_bytes: moved.copy_bytes,
            zeroed_bytes: moved.zero_bytes,
            is_done: false,
            room,
        }))
    }

    /// What a change of snapshots takes, if that is all that was asked for, or if there is too little room for it. `id`: the
    /// node of the image's file.
    async fn look_before_snapshot(
        &self,
        id: NodeId,
        spec: &SnapshotSpec,
    ) -> Result<Option<SnapshotsView>, EngineError> {
        if spec.force && !spec.dry_run {
            return Ok(None);
        }
        let image = self.records.borrow().unfiltered(id);
        let (_, ground) = self.ground(image).await;
        let change = spec.change.clone();
        let counted = self.threads.run(self.thread_of(id), move |context| {
            Box::pin(async move {
                match context.node(id) {
                    Some(node) => snapshot::room(node, &change).await,
                    None => Err(EngineError::generic("Internal error: a node is lost (bug)")),
                }
            })
        });
        let room = ground.view(&counted.await??);
        let is_asked_for = spec.dry_run || room.fits == Some(false);
        let is_done = false;
        Ok(is_asked_for.then_some(SnapshotsView { is_done, room }))
    }

    async fn plan_rebase(
        &self,
        ids: &[NodeId],
        form: TargetForm,
        pass: Pass,
        watcher: &ImageWatcher,
    ) -> Result<Moved, EngineError> {
        let lost = || EngineError::generic("Internal error: a node is lost (bug)");
        let (image, backing) = (ids.first().copied(), ids.get(1).copied());
        let (image, watcher) = (image.ok_or_else(lost)?, watcher.clone());
        let planned = self.threads.run(self.thread_of(image), move |context| {
            Box::pin(async move {
                let backing = match backing {
                    Some(id) => Some(context.node(id).ok_or_else(lost)?),
                    None => None,
                };
                let image = context.node(image).ok_or_else(lost)?;
                rebase::plan(image, backing, form, pass, &watcher).await
            })
        });
        planned.await?
    }
}

/// What the work takes: the metadata that it reads must not change under it.
fn user(id: NodeId, writes: bool) -> Edge {
    let reads = Permissions::of(&[Permission::ConsistentRead]);
    let changes = Permissions::of(&[Permission::Write, Permission::Resize]);
    Edge {
        user: User::Command,
        child: id,
        role: "root",
        taken: match writes {
            true => reads.union(changes),
            false => reads,
        },
        shared: reads.with(Permission::WriteUnchanged),
    }
}
