//! What a backup needs of the graph besides what every job does: its checks, in QEMU's order, and the point in time.

use crate::data::NodeId;
use crate::error::EngineError;
use crate::graph::Graph;
use crate::graph::creating::Opened;
use crate::graph::jobs::JobNodes;
use crate::node::filter_node::FilterKind;
use crate::request::{BackupSpec, BitmapMode, IntegritySpec, SyncMode};

/// Unit of a backup in bytes.
const BACKUP_CLUSTER_BYTES: i64 = 64 << 10;

/// A write waits for no more than this besides what it touches, whatever unit the client wants, in bytes.
const BACKUP_SPAN_MAX_BYTES: u64 = 16 << 20;

impl Graph {
    /// The nodes of a backup, and the filter above its source. What was `opened` for it is its own from here on.
    ///
    /// # Errors
    /// In QEMU's words and order; nothing has changed then, and nothing stays open.
    pub(super) async fn prepare_backup(
        &self,
        spec: &BackupSpec,
        opened: Opened,
    ) -> Result<JobNodes, EngineError> {
        let prepared = self.check_and_save(spec, opened).await;
        if prepared.is_err() {
            self.close_opened(&opened).await;
        }
        prepared
    }

    /// What can be said of the arguments of a backup without its target; what becomes of its bitmap.
    ///
    /// # Errors
    /// In QEMU's words.
    pub(super) fn check_backup_arguments(
        &self,
        spec: &BackupSpec,
        source: NodeId,
    ) -> Result<Option<BitmapMode>, EngineError> {
        let name = spec.bitmap.as_deref();
        let mode = self.check_job_bitmap(source, spec.sync, name, spec.bitmap_mode)?;
        self.check_backup_perf(spec, source, mode)?;
        check_cluster_size(spec)?;
        Ok(mode)
    }

    /// That as many requests, of such lengths, are possible, and that the bitmap can be changed as it is to be.
    fn check_backup_perf(
        &self,
        spec: &BackupSpec,
        source: NodeId,
        mode: Option<BitmapMode>,
    ) -> Result<(), EngineError> {
        if spec.perf.max_workers < 1 || spec.perf.max_workers > i64::from(i32::MAX) {
            let text = "max-workers must be between 1 and 2147483647";
            return Err(EngineError::generic(text));
        }
        if spec.perf.max_chunk < 0 {
            let text = "max-chunk must be zero (which means no limit) or positive";
            return Err(EngineError::generic(text));
        }
        check_integrity(&spec.integrity, spec.sync, mode)?;
        self.check_change_of_bitmap(source, spec.bitmap.as_deref(), mode)
    }

    async fn check_and_save(
        &self,
        spec: &BackupSpec,
        opened: Opened,
    ) -> Result<JobNodes, EngineError> {
        let source = self.look_up(&spec.device)?;
        let target = match (&spec.new_target, opened.target) {
            (Some(_), Some(target)) => target,
            (Some(_), None) => return Err(EngineError::generic("A node was not opened (bug)")),
            (None, _) => self.look_up(&spec.target)?,
        };
        let name = spec.bitmap.as_deref();
        let bitmap_mode = self.check_job_bitmap(source, spec.sync, name, spec.bitmap_mode)?;
        if source == target {
            return Err(EngineError::generic("Source and target cannot be the same"));
        }
        if spec.compress && !self.compresses(target).await? {
            return Err(EngineError::generic(
                "Compression is not supported for this drive ",
            ));
        }
        // A backup may go on below an overlay.
        self.records.borrow().check_no_job(source)?;
        self.records.borrow().check_no_job(target)?;
        self.check_backup_perf(spec, source, bitmap_mode)?;
        let lengths = (
            self.facts(source).await?.length_bytes,
            self.facts(target).await?.length_bytes,
        );
        if lengths.0 != lengths.1 {
            return Err(EngineError::generic(
                "Source and target image have different sizes",
            ));
        }
        check_cluster_size(spec)?;
        let read_only = |id| {
            self.records
                .borrow()
                .node(id)
                .is_some_and(|node| node.read_only)
        };
        if read_only(target) {
            let text = "Could not create node: Block node is read-only";
            return Err(EngineError::generic(text));
        }
        if spec.discard_source && read_only(source) {
            let text = "Could not replace node: Block node is read-only";
            return Err(EngineError::generic(text));
        }
        let minimum = spec.perf.min_cluster_size;
        let cluster_bytes = self.backup_cluster_bytes(target, minimum).await?;
        let replaced = self.records.borrow().check_links_to(source);
        replaced.map_err(|error| error.prefixed("Could not replace node: "))?;
        let (filter, bitmap) = self
            .insert_filter(
                source,
                Some(target),
                "copy-before-write",
                FilterKind::Saves {
                    cluster_bytes,
                    options: spec.cbw,
                    admits_writers: !spec.discard_source,
                },
                spec.filter_node_name.as_deref(),
                || self.freeze_for_job(source, name, bitmap_mode),
            )
            .await?;
        Ok(JobNodes {
            source: Some(source),
            target: Some(target),
            filter: Some(filter),
            bitmap,
            opened,
            ..JobNodes::default()
        })
    }

    /// What a backup to this target saves together, in bytes, if its client wants at least `minimum`.
    pub(super) async fn backup_cluster_bytes(
        &self,
        target: NodeId,
        minimum: u64,
    ) -> Result<u64, EngineError> {
        let of_target = self.facts(target).await?.cluster_size_bytes;
        let of_target = of_target.map_or(0, u64::from);
        let wanted = minimum.min(BACKUP_SPAN_MAX_BYTES);
        Ok(of_target
            .max(wanted)
            .max(BACKUP_CLUSTER_BYTES.unsigned_abs()))
    }

    /// Whether a node can be written compressed.
    async fn compresses(&self, id: NodeId) -> Result<bool, EngineError> {
        let asked = self.threads.run(self.thread_of(id), move |context| {
            Box::pin(async move { context.node(id).is_some_and(|node| node.compresses()) })
        });
        asked.await
    }
}

/// That what is recorded is what a manifest tells of.
pub(super) fn check_integrity(
    wanted: &IntegritySpec,
    sync: SyncMode,
    bitmap_mode: Option<BitmapMode>,
) -> Result<(), EngineError> {
    if wanted.manifest.is_some() && sync == SyncMode::None {
        let text = "x-manifest needs a copy that is whole: sync mode 'none' never is";
        return Err(EngineError::generic(text));
    }
    if wanted.verify && sync == SyncMode::None {
        let text = "x-verify needs a copy that is whole: sync mode 'none' never is";
        return Err(EngineError::generic(text));
    }
    if wanted.onto_manifest.is_some() {
        if wanted.manifest.is_none() {
            let text = "x-onto-manifest is for the manifest that x-manifest names";
            return Err(EngineError::generic(text));
        }
        if !matches!(sync, SyncMode::Incremental | SyncMode::Bitmap) {
            let text = "x-onto-manifest needs a bitmap that says what has changed since: sync mode \
                        'incremental' or 'bitmap'";
            return Err(EngineError::generic(text));
        }
        if bitmap_mode == Some(BitmapMode::Always) {
            // Nobody could tell what of it has come to the target since that manifest was written.
            let text = "x-onto-manifest needs a bitmap that keeps all that has changed if the job fails: \
                        bitmap-mode 'on-success' or 'never'";
            return Err(EngineError::generic(text));
        }
    }
    Ok(())
}

/// That the client's own units are some.
fn check_cluster_size(spec: &BackupSpec) -> Result<(), EngineError> {
    let minimum = spec.perf.min_cluster_size;
    if i64::try_from(minimum).is_err() {
        return Err(EngineError::generic(format!(
            "min-cluster-size too large: {minimum} > {}",
            i64::MAX
        )));
    }
    if minimum != 0 && !minimum.is_power_of_two() {
        return Err(EngineError::generic(
            "Could not create node: Cannot create block-copy-state: min-cluster-size needs to \
             be a power of 2",
        ));
    }
    let cluster = BACKUP_CLUSTER_BYTES.max(i64::try_from(minimum).unwrap_or(i64::MAX));
    if spec.perf.max_chunk != 0 && spec.perf.max_chunk < cluster {
        return Err(EngineError::generic(format!(
            "Required max-chunk ({}) is less than backup cluster size ({cluster})",
            spec.perf.max_chunk
        )));
    }
    Ok(())
}
