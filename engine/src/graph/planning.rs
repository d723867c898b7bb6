//! What a commit or a stream would come to: its checks are made, nothing is started, and others go on meanwhile.

use blockyard_images::more_room::MoreRoom;
use blockyard_images::qcow2::info::ImageInfo;
use blockyard_images::qcow2::units::{Geometry, Version};
use blockyard_ring::FileKind;

use crate::data::NodeId;
use crate::error::EngineError;
use crate::graph::Graph;
use crate::graph::chain_jobs::ChainPart;
use crate::graph::creating::Opened;
use crate::graph::host_files::in_background;
use crate::graph::jobs::JobNodes;
use crate::graph::permissions::Permissions;
use crate::graph::records::{Edge, Records, User};
use crate::images::plan::{self, TargetForm};
use crate::jobs::commit::Commit;
use crate::jobs::stream::Stream;
use crate::reply::{LayerView, PlanView, RoomView};
use crate::request::{PlanSpec, PlannedJob, WorkSpec};

/// What is moved, and where to.
struct Moves {
    source: NodeId,
    target: NodeId,
    part: ChainPart,
    /// Keep the nodes where they are.
    edges: Vec<Edge>,
}

/// The room of the file that a target takes room of.
#[derive(Clone, Copy, Debug, Default)]
struct FileRoom {
    /// Which file system it is on.
    system: u64,
    length_bytes: u64,
    unallocated_bytes: Option<u64>,
    free_bytes: Option<u64>,
}

/// The files that an image takes room of, its own and that of the guest's data.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ground {
    of_image: Option<FileRoom>,
    of_data: Option<FileRoom>,
}

impl Ground {
    /// Whether there is room for that.
    pub(super) fn view(&self, room: &MoreRoom) -> RoomView {
        RoomView {
            data_bytes: room.data_bytes,
            metadata_bytes: room.metadata_bytes,
            bitmaps_bytes: room.bitmaps_bytes,
            free_bytes: self.of_data.and_then(|file| file.free_bytes),
            fits: fits(room, self.of_image, self.of_data),
        }
    }
}

impl Graph {
    /// Finds out what a job would come to. Whoever uses its nodes goes on; what is changed meanwhile may be counted or not.
    ///
    /// # Errors
    /// As the job's before it is started; when it was cancelled.
    pub async fn plan(&self, spec: PlanSpec) -> Result<PlanView, EngineError> {
        let moves = self.take_for_plan(spec.job.clone()).await?;
        let planned = self.plan_taken(&moves, spec).await;
        for edge in moves.edges {
            self.release(edge.child, &edge).await;
        }
        planned
    }

    async fn take_for_plan(&self, job: PlannedJob) -> Result<Moves, EngineError> {
        let is_commit = matches!(job, PlannedJob::Commit(_));
        let work = match job {
            PlannedJob::Commit(spec) => WorkSpec::Commit(spec),
            PlannedJob::Stream(spec) => WorkSpec::Stream(spec),
        };
        let _held = self.hold_for(&work, &Opened::default()).await;
        let nodes = match &work {
            WorkSpec::Stream(spec) => self.check_stream(spec).await?,
            WorkSpec::Commit(spec) => self.check_commit(spec).await?,
            _ => JobNodes::default(),
        };
        let (Some(source), Some(target), Some(part)) = (nodes.source, nodes.target, nodes.chain)
        else {
            return Err(EngineError::generic("Internal error: no chain (bug)"));
        };
        let mut records = self.records.borrow_mut();
        let mut taken: Vec<NodeId> = records.chain(source).collect();
        taken.extend(is_commit.then_some(target));
        taken.sort();
        taken.dedup();
        let edges: Vec<Edge> = taken.into_iter().map(looker).collect();
        records.change_edges(|all| all.extend(edges.iter().cloned()))?;
        Ok(Moves {
            source,
            target,
            part,
            edges,
        })
    }

    async fn plan_taken(&self, moves: &Moves, spec: PlanSpec) -> Result<PlanView, EngineError> {
        let (source, target) = (moves.source, moves.target);
        let image = self.records.borrow().unfiltered(target);
        let (mut form, ground) = self.ground(image).await;
        form.grown_to_bytes = {
            let (from, to) = (self.facts(source).await?, self.facts(target).await?);
            (to.length_bytes < from.length_bytes).then_some(from.length_bytes)
        };
        let moved = self.moved(moves, form, spec).await?;
        let layers = {
            let records = self.records.borrow();
            let inner = moves.part.inner.iter();
            let inner = inner.filter(|id| records.unfiltered(**id) == **id);
            let layers = inner.map(|id| records.layer_view(*id));
            layers.collect::<Option<Vec<_>>>()
        };
        let target = self.records.borrow().layer_view(image);
        let (Some(layers), Some(target)) = (layers, target) else {
            return Err(EngineError::generic("Internal error: a node is lost (bug)"));
        };
        Ok(PlanView {
            layers,
            target,
            copy_bytes: moved.copy_bytes,
            zero_bytes: moved.zero_bytes,
            room: ground.view(&moved.room),
        })
    }

    /// What is known of an image that is going to be written to, and of the files that it takes room of.
    pub(super) async fn ground(&self, image: NodeId) -> (TargetForm, Ground) {
        let (mut form, data) = {
            let records = self.records.borrow();
            let data = records.data_file(image).unwrap_or(image);
            (records.form(image), data)
        };
        let of_image = self.file_room(image).await;
        let of_data = match data == image {
            true => of_image,
            false => self.file_room(data).await,
        };
        form.file_bytes = of_image.map_or(0, |room| room.length_bytes);
        form.unallocated_bytes = match self.takes_room(data) {
            true => of_data.and_then(|room| room.unallocated_bytes),
            false => Some(0),
        };
        (form, Ground { of_image, of_data })
    }

    async fn moved(
        &self,
        moves: &Moves,
        form: TargetForm,
        spec: PlanSpec,
    ) -> Result<plan::Moved, EngineError> {
        let (source, target) = (moves.source, moves.target);
        let (layers, seen_bytes) = (moves.part.layers, moves.part.seen_bytes);
        let planned = self.threads.run(self.thread_of(source), move |context| {
            Box::pin(async move {
                let nodes = (context.node(source), context.node(target));
                let (Some(source), Some(target)) = nodes else {
                    return Err(EngineError::generic("Internal error: a node is lost (bug)"));
                };
                let plans = match spec.job {
                    PlannedJob::Commit(_) => {
                        Commit::new(source.clone(), target.clone(), layers, seen_bytes).plans()
                    }
                    PlannedJob::Stream(_) => Stream::new(source.clone(), layers).plans(),
                };
                plan::run(&source, &target, plans, form, &spec.watcher).await
            })
        });
        planned.await?
    }

    /// Whether what is below a node gets room as it is written to, which devices do not.
    fn takes_room(&self, id: NodeId) -> bool {
        let records = self.records.borrow();
        let file = records.host_file(id);
        file.is_some_and(|file| file.kind() == FileKind::Regular)
    }

    /// What the file below a node has; `None`: it is in no file, or on a device, or its file system does not answer.
    async fn file_room(&self, id: NodeId) -> Option<FileRoom> {
        let file = self.records.borrow().host_file(id).cloned()?;
        if file.kind() != FileKind::Regular {
            return None;
        }
        let asked = in_background(move || {
            let length_bytes = file.length_bytes();
            Ok(FileRoom {
                system: file.identity().0,
                length_bytes,
                unallocated_bytes: file
                    .allocated_bytes()
                    .ok()
                    .map(|allocated| length_bytes.saturating_sub(allocated)),
                free_bytes: file.free_bytes().ok(),
            })
        });
        asked.await.ok()
    }
}

impl Records {
    /// What is known of an image that is going to be written to.
    pub(super) fn form(&self, id: NodeId) -> TargetForm {
        let info = self
            .node(id)
            .and_then(|node| node.image.as_ref()?.info.as_ref());
        let bitmaps = self.node(id).map(|node| node.bitmaps.sizes_to_keep());
        TargetForm {
            geometry: info.and_then(geometry),
            bitmaps: bitmaps.unwrap_or_default(),
            has_snapshots: info.is_some_and(|info| !info.snapshots.is_empty()),
            ..TargetForm::default()
        }
    }

    fn layer_view(&self, id: NodeId) -> Option<LayerView> {
        self.node(id).map(LayerView::of)
    }
}

fn geometry(info: &ImageInfo) -> Option<Geometry> {
    let version = match info.version_3 {
        Some(_) => Version::V3,
        None => Version::V2,
    };
    let has_subclusters = info.version_3.as_ref().is_some_and(|info| info.extended_l2);
    let (clusters, counts) = (info.cluster_bytes, info.refcount_bits);
    Geometry::new(
        version,
        clusters.trailing_zeros(),
        counts.trailing_zeros(),
        has_subclusters,
    )
}

/// Whether there is enough room; `None`: it is not known of a file that takes some.
fn fits(room: &MoreRoom, image: Option<FileRoom>, data: Option<FileRoom>) -> Option<bool> {
    let for_data = room.data_bytes;
    let for_tables = room.metadata_bytes.saturating_add(room.bitmaps_bytes);
    let is_enough = |file: Option<FileRoom>, needed: u64| match needed {
        0 => Some(true),
        needed => Some(needed <= file?.free_bytes?),
    };
    let system = |file: Option<FileRoom>| file.map(|file| file.system);
    if system(image) == system(data) {
        return is_enough(data, for_data.saturating_add(for_tables));
    }
    match (is_enough(data, for_data), is_enough(image, for_tables)) {
        (Some(false), _) | (_, Some(false)) => Some(false),
        (Some(true), Some(true)) => Some(true),
        _ => None,
    }
}

/// Looks on, and has nothing against what others do.
fn looker(id: NodeId) -> Edge {
    Edge {
        user: User::Command,
        child: id,
        role: "root",
        taken: Permissions::NONE,
        shared: Permissions::EVERY,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_on_one_file_system_is_counted_together_and_what_is_unknown_is_not_enough_of() {
        let room = |data_bytes, other_bytes: u64| MoreRoom {
            data_bytes,
            metadata_bytes: other_bytes / 2,
            bitmaps_bytes: other_bytes - other_bytes / 2,
        };
        let file = |system, free| {
            Some(FileRoom {
                system,
                free_bytes: Some(free),
                ..FileRoom::default()
            })
        };
        assert_eq!(fits(&room(6, 4), file(1, 10), file(1, 10)), Some(true));
        assert_eq!(fits(&room(6, 5), file(1, 10), file(1, 10)), Some(false));
        assert_eq!(fits(&room(6, 5), file(1, 5), file(2, 6)), Some(true));
        assert_eq!(fits(&room(6, 5), file(1, 4), file(2, 6)), Some(false));
        assert_eq!(fits(&room(6, 5), None, file(2, 5)), Some(false));
        assert_eq!(fits(&room(6, 5), None, file(2, 6)), None);
        assert_eq!(fits(&room(6, 0), None, None), None);
        assert_eq!(fits(&room(0, 0), None, None), Some(true));
    }
}
