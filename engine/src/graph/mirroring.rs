//! What a mirror needs of the graph besides what every job does: its checks, the unit of its tracking, and the moment in which the
//! target takes the source's place.

use crate::data::NodeId;
use crate::error::{EngineError, JobError};
use crate::graph::Graph;
use crate::graph::backups::check_integrity;
use crate::graph::creating::Opened;
use crate::graph::jobs::JobNodes;
use crate::graph::roots::move_edges;
use crate::job::context::JobKey;
use crate::manifest::EXTENT_BYTES;
use crate::node::filter_node::FilterKind;
use crate::request::{BitmapMode, MirrorSpec, SyncMode};

/// Unit of tracking of a mirror, in bytes, if the client does not say.
const GRANULARITY_MIN_BYTES: u64 = 4 << 10;
const GRANULARITY_MAX_BYTES: u64 = 64 << 10;

impl Graph {
    /// The nodes of a mirror, and the filter above its source. What was `opened` for it is its own from here on.
    ///
    /// # Errors
    /// In QEMU's words and order; nothing has changed then, and nothing stays open.
    pub(super) async fn prepare_mirror(
        &self,
        spec: &MirrorSpec,
        opened: Opened,
    ) -> Result<JobNodes, EngineError> {
        let prepared = self.check_and_filter(spec, opened).await;
        if prepared.is_err() {
            self.close_opened(&opened).await;
        }
        prepared
    }

    /// That a node may be the source of a mirror.
    pub(super) fn check_mirror_source(&self, source: NodeId) -> Result<(), EngineError> {
        let records = self.records.borrow();
        match records.has_node_or_job_parent(source) {
            true => Err(EngineError::generic("Need a root block node")),
            false => records.check_free(source),
        }
    }

    /// What can be said of the arguments of a mirror without its target, in QEMU's order.
    pub(super) fn check_mirror_arguments(
        &self,
        spec: &MirrorSpec,
        source: NodeId,
    ) -> Result<(), EngineError> {
        check_granularity(spec)?;
        if let Some(replaces) = &spec.replaces {
            self.check_may_replace(replaces, source, spec)?;
        }
        self.check_sync(spec, source).map(drop)
    }

    async fn check_and_filter(
        &self,
        spec: &MirrorSpec,
        opened: Opened,
    ) -> Result<JobNodes, EngineError> {
        let source = self.look_up(&spec.device)?;
        let target = match (&spec.new_target, opened.target) {
            (Some(_), Some(target)) => target,
            (Some(_), None) => return Err(EngineError::generic("A node was not opened (bug)")),
            (None, _) => self.look_up(&spec.target)?,
        };
        let is_root = !self.records.borrow().has_node_or_job_parent(source);
        if !is_root {
            return Err(EngineError::generic("Need a root block node"));
        }
        check_granularity(spec)?;
        self.records.borrow().check_free(source)?;
        self.records.borrow().check_free(target)?;
        if let Some(replaces) = &spec.replaces {
            self.check_may_replace(replaces, source, spec)?;
        }
        let bitmap_mode = self.check_sync(spec, source)?;
        if source == target {
            return Err(EngineError::generic("Can't mirror node into itself"));
        }
        let name = spec.filter_node_name.as_deref();
        let granularity = self.granularity_bytes(spec.granularity, target).await?;
        let granularity = match spec.integrity.is_wanted() {
            // What is copied again is whole extents.
            true => granularity.max(EXTENT_BYTES),
            false => granularity,
        };
        let kind = FilterKind::Tracks {
            granularity_bytes: granularity,
            commits: false,
        };
        let freeze = || self.freeze_for_job(source, spec.bitmap.as_deref(), bitmap_mode);
        let (filter, bitmap) = self
            .insert_filter(source, None, "mirror_top", kind, name, freeze)
            .await?;
        Ok(JobNodes {
            source: Some(source),
            target: Some(target),
            filter: Some(filter),
            bitmap,
            target_backing: self.target_backing(spec),
            opened,
            ..JobNodes::default()
        })
    }

    /// What is copied, and what becomes of the bitmap. QEMU knows no bitmaps here: without one, its refusals are left.
    fn check_sync(
        &self,
        spec: &MirrorSpec,
        source: NodeId,
    ) -> Result<Option<BitmapMode>, EngineError> {
        let mode = match spec.sync {
            SyncMode::Incremental => Some("incremental"),
            SyncMode::Bitmap => Some("bitmap"),
            SyncMode::Full | SyncMode::Top | SyncMode::None => None,
        };
        let name = spec.bitmap.as_deref();
        if let (Some(mode), None) = (mode, name) {
            return Err(EngineError::generic(format!(
                "Sync mode '{mode}' not supported"
            )));
        }
        let bitmap_mode = self.check_job_bitmap(source, spec.sync, name, spec.bitmap_mode)?;
        self.check_change_of_bitmap(source, name, bitmap_mode)?;
        check_integrity(&spec.integrity, spec.sync, bitmap_mode)?;
        let is_new = spec.new_target.as_ref().is_some_and(|new| !new.exists);
        if let (Some(mode), true) = (mode, is_new) {
            return Err(EngineError::generic(format!(
                "Sync mode '{mode}' needs a target that exists and holds what the source was"
            )));
        }
        match spec.buf_size.is_some_and(|size| size < 0) {
            true => Err(EngineError::generic("Invalid parameter 'buf-size'")),
            false => Ok(bitmap_mode),
        }
    }

    /// Unit in which writes above a mirror's source are tracked, in bytes: what the client says, or what the target keeps
    /// together.
    pub(super) async fn granularity_bytes(
        &self,
        asked: Option<u32>,
        target: NodeId,
    ) -> Result<u64, EngineError> {
        match asked.filter(|granularity| *granularity != 0) {
            Some(granularity) => Ok(granularity.into()),
            None => {
                let cluster = self.facts(target).await?.cluster_size_bytes;
                let cluster = cluster.map_or(GRANULARITY_MAX_BYTES, u64::from);
                Ok(cluster.clamp(GRANULARITY_MIN_BYTES, GRANULARITY_MAX_BYTES))
            }
        }
    }

    /// Only the source may be replaced: everything else would change under its users.
    fn check_may_replace(
        &self,
        replaces: &str,
        source: NodeId,
        spec: &MirrorSpec,
    ) -> Result<(), EngineError> {
        let Some(id) = self.find(replaces) else {
            let text = format!("Failed to find node with node-name='{replaces}'");
            return Err(EngineError::generic(text));
        };
        self.records.borrow().check_free(id)?;
        if id != source {
            return Err(EngineError::generic(format!(
                "Cannot replace '{replaces}' by a node mirrored from '{}', because it cannot be \
                 guaranteed that doing so would not lead to an abrupt change of visible data",
                spec.device
            )));
        }
        Ok(())
    }

    /// Lets the target take the source's place, for a mirror that completes.
    ///
    /// # Errors
    /// When the users of the source cannot live with the target.
    pub async fn pivot(
        &self,
        key: JobKey,
        nodes: &JobNodes,
        replaces: Option<&str>,
    ) -> Result<(), JobError> {
        let (Some(source), Some(target)) = (nodes.source, nodes.target) else {
            return Ok(());
        };
        if let Some(name) = replaces
            && self.find(name) != Some(source)
        {
            return Err(JobError::text(format!(
                "Can no longer replace '{name}': it has changed"
            )));
        }
        let from = nodes.filter.unwrap_or(source);
        let roots = {
            let mut records = self.records.borrow_mut();
            let roots = records.roots_on(&[from]);
            let moved = records.change_edges(|edges| {
                // The job wanted the target for itself until now.
                edges.retain(|edge| edge.child != target || !edge.is_of(key));
                move_edges(edges, from, target, Some(key));
            });
            moved.map_err(|error| JobError::text(error.text))?;
            roots
        };
        let went_over = self.threads.run(self.thread_of(target), move |context| {
            Box::pin(async move {
                let filter = context.node(from).and_then(|filter| filter.tracker());
                if let (Some(filter), Some(target)) = (filter, context.node(target)) {
                    // What waits in the filter is the target's, too.
                    filter.go_over_to(target);
                }
            })
        });
        let put = async {
            went_over.await?;
            self.put_on(&roots, target).await
        };
        put.await
            .map_err(|error: EngineError| JobError::text(error.text))?;
        self.follow_access(source, target).await;
        Ok(())
    }
}

fn check_granularity(spec: &MirrorSpec) -> Result<(), EngineError> {
    let Some(granularity) = spec.granularity.filter(|granularity| *granularity != 0) else {
        return Ok(());
    };
    let is_short = u64::from(granularity) < EXTENT_BYTES;
    if is_short && spec.integrity.is_wanted() {
        return Err(EngineError::generic(format!(
            "Parameter 'granularity' has to be at least {EXTENT_BYTES} for x-manifest and x-verify"
        )));
    }
    if !(512..=64 << 20).contains(&granularity) {
        return Err(EngineError::generic(
            "Parameter 'granularity' expects a value in range [512B, 64MB]",
        ));
    }
    if !granularity.is_power_of_two() {
        let text = "Parameter 'granularity' expects a power of 2";
        return Err(EngineError::generic(text));
    }
    Ok(())
}
