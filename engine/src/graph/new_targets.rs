//! Targets that a mirror or a backup opens by their files, and makes before unless they are there. A mirror's gets what is below it
//! when it takes the source's place, not before: until then nobody reads it, and what is named may still be on its way there.

use crate::data::NodeId;
use crate::error::{EngineError, JobError};
use crate::graph::Graph;
use crate::graph::creating::Opened;
use crate::graph::jobs::JobNodes;
use crate::graph::names;
use crate::graph::new_images::{NewImage, check_format, file_node};
use crate::graph::reopen::pin;
use crate::image_policy::NamesInImages;
use crate::limits::CHAIN_LAYERS_MAX;
use crate::node::build::NodePlan;
use crate::request::{
    BackingRef, BackupSpec, CommonOptions, DetectZeroes, Discard, DriverSpec, MirrorSpec,
    NewTargetSpec, NodeRef, NodeSpec, Qcow2Spec, SyncMode,
};

/// What comes below a target when it takes the source's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TargetBacking {
    /// What its image names.
    OfImage,
    /// What is below the source.
    BelowSource,
    /// The source.
    Source,
}

impl Graph {
    /// Makes and opens the target of a mirror that is described by its file. Whatever is wrong with the job otherwise is told
    /// before a file is touched.
    ///
    /// # Errors
    /// In QEMU's words; nothing stays open then.
    pub(super) async fn open_for_mirror(&self, spec: &MirrorSpec) -> Result<Opened, EngineError> {
        let Some(new) = &spec.new_target else {
            return Ok(Opened::default());
        };
        let source = self.look_up(&spec.device)?;
        self.check_mirror_source(source)?;
        if spec.replaces.is_some() && new.node_name.is_none() {
            return Err(EngineError::generic(
                "a node-name must be provided when replacing a named node of the graph",
            ));
        }
        let below = self.below_new_target(spec.sync, source);
        let common = self.as_source(source)?;
        let check = async || {
            self.check_mirror_arguments(spec, source)?;
            self.check_depth_above(below)
        };
        self.open_new_target(new, source, below, common, check)
            .await
    }

    /// The same for a backup. Nobody ever reads what is below its target.
    ///
    /// # Errors
    /// As above.
    pub(super) async fn open_for_backup(&self, spec: &BackupSpec) -> Result<Opened, EngineError> {
        let Some(new) = &spec.new_target else {
            return Ok(Opened::default());
        };
        let source = self.look_up(&spec.device)?;
        self.records.borrow().check_no_job(source)?;
        let below = match spec.sync {
            SyncMode::Incremental | SyncMode::Bitmap => None,
            sync => self.below_new_target(sync, source),
        };
        let common = CommonOptions {
            discard: Some(Discard::Unmap),
            detect_zeroes: Some(DetectZeroes::Unmap),
            ..self.as_source(source)?
        };
        let check = async || self.check_backup_arguments(spec, source).map(drop);
        self.open_new_target(new, source, below, common, check)
            .await
    }

    /// Makes and opens a target, once `check` has found nothing wrong with the job otherwise. Its header names what is `below`.
    async fn open_new_target(
        &self,
        new: &NewTargetSpec,
        source: NodeId,
        below: Option<NodeId>,
        common: CommonOptions,
        check: impl AsyncFnOnce() -> Result<(), EngineError>,
    ) -> Result<Opened, EngineError> {
        let (driver, backing) = {
            let records = self.records.borrow();
            let node = records.node(source);
            let node = node.ok_or_else(|| EngineError::generic("The node is gone"))?;
            let backing = below.and_then(|id| records.node(id));
            let backing = backing.map(|node| (node.filename.to_string(), node.driver));
            (node.driver, backing)
        };
        let format = match (&new.format, new.exists) {
            (Some(format), _) => format,
            (None, false) => driver,
            (None, true) => self.format_of_existing(new).await?,
        };
        if !new.exists {
            check_format(format, backing.is_some())?;
        }
        let target = target_node(new, format, common)?;
        if let Some(name) = &new.node_name {
            names::check(&self.records.borrow(), name)?;
        }
        check().await?;
        if !new.exists {
            self.make_image(&NewImage {
                filename: &new.filename,
                format,
                size_bytes: self.facts(source).await?.length_bytes,
                backing,
            })
            .await?;
        }
        Ok(Opened {
            target: Some(self.open_unowned(target).await?),
            data_file: None,
        })
    }

    /// What the header of a target that is made names: what the source stands on if only its top layer is copied, the source if
    /// nothing is.
    fn below_new_target(&self, sync: SyncMode, source: NodeId) -> Option<NodeId> {
        let records = self.records.borrow();
        match sync {
            SyncMode::Full => None,
            SyncMode::None => Some(source),
            SyncMode::Top | SyncMode::Incremental | SyncMode::Bitmap => records
                .next_in_chain(records.unfiltered(source))
                .map(|below| records.unfiltered(below)),
        }
    }

    /// What is to come below the target of a mirror in the end.
    pub(super) fn target_backing(&self, spec: &MirrorSpec) -> Option<TargetBacking> {
        let new = spec.new_target.as_ref()?;
        match (new.exists, spec.sync) {
            (true, _) => Some(TargetBacking::OfImage),
            (false, SyncMode::Top) => Some(TargetBacking::BelowSource),
            (false, SyncMode::None) => Some(TargetBacking::Source),
            (false, SyncMode::Full | SyncMode::Incremental | SyncMode::Bitmap) => None,
        }
    }

    /// The format of an image that nobody has told of. Whoever can write to a disk decides what it looks like.
    async fn format_of_existing(&self, new: &NewTargetSpec) -> Result<&'static str, EngineError> {
        match self.policy.names {
            NamesInImages::AsQemu => self.format_by_content(&new.filename).await,
            NamesInImages::Files => Err(EngineError::generic(format!(
                "The format of '{}' must be given: what a file holds is not trusted to tell it",
                new.filename
            ))),
        }
    }

    /// What a target takes over from its source.
    fn as_source(&self, source: NodeId) -> Result<CommonOptions, EngineError> {
        let records = self.records.borrow();
        let source = records.node(source);
        let source = source.ok_or_else(|| EngineError::generic("The node is gone"))?;
        Ok(CommonOptions {
            discard: source.said.discard.filter(|how| *how == Discard::Unmap),
            cache_direct: source.cache_direct.then_some(true),
            cache_no_flush: source.cache_no_flush.then_some(true),
            ..CommonOptions::default()
        })
    }

    fn check_depth_above(&self, below: Option<NodeId>) -> Result<(), EngineError> {
        let records = self.records.borrow();
        let layers = below.map_or(0, |below| records.chain_depth(below).saturating_add(2));
        match usize::try_from(layers).is_ok_and(|layers| layers > CHAIN_LAYERS_MAX) {
            true => Err(EngineError::generic(format!(
                "The backing chain would have more than {CHAIN_LAYERS_MAX} layers"
            ))),
            false => Ok(()),
        }
    }

    /// Puts a target that was opened for its job on what is to be below it. Nobody reads it yet.
    ///
    /// # Errors
    /// It cannot be opened, or others are in the way: the target has nothing below it then.
    pub async fn complete_target(&self, nodes: &JobNodes) -> Result<(), JobError> {
        let (Some(wanted), Some(source), Some(target)) =
            (nodes.target_backing, nodes.source, nodes.target)
        else {
            return Ok(());
        };
        let put = async {
            self.pin(target).await?;
            let put = self.put_target_on(wanted, source, target).await;
            self.release(target, &pin(target)).await;
            put
        };
        let put: Result<(), EngineError> = put.await;
        put.map_err(|error| JobError::text(error.text))
    }

    /// The same for a target that an edge of the caller keeps where it is.
    async fn put_target_on(
        &self,
        wanted: TargetBacking,
        source: NodeId,
        target: NodeId,
    ) -> Result<(), EngineError> {
        let below = {
            let records = self.records.borrow();
            let is_image = records
                .node(target)
                .is_some_and(|node| matches!(node.plan, NodePlan::Qcow2 { .. }));
            if !is_image {
                return Ok(());
            }
            match wanted {
                TargetBacking::OfImage => None,
                TargetBacking::BelowSource => {
                    match records.next_in_chain(records.unfiltered(source)) {
                        Some(below) => Some(below),
                        None => return Ok(()),
                    }
                }
                TargetBacking::Source => Some(source),
            }
        };
        match below {
            Some(below) => self.set_backing_live(target, Some(below)).await,
            None => self.open_named_backing(target).await,
        }
    }

    /// A target that has taken the place of a node that is read-only becomes so, too, as far as it can.
    pub(super) async fn follow_access(&self, replaced: NodeId, target: NodeId) {
        let is_read_only = |id| {
            let records = self.records.borrow();
            records.node(id).is_some_and(|node| node.read_only)
        };
        if !is_read_only(replaced) || is_read_only(target) {
            return;
        }
        let made = async {
            self.pin(target).await?;
            let made = self.make_all_read_only(target).await;
            self.release(target, &pin(target)).await;
            made
        };
        let made: Result<(), EngineError> = made.await;
        if let Err(error) = made {
            let records = self.records.borrow();
            let node = records.name_of(target);
            tracing::warn!(%error, node, "a node stays writable");
        }
    }
}

/// The target as it would be described in `blockdev-add`.
///
/// # Errors
/// The format is not one that can be opened.
fn target_node(
    new: &NewTargetSpec,
    format: &str,
    common: CommonOptions,
) -> Result<NodeSpec, EngineError> {
    let file = file_node(&new.filename);
    let driver = match format {
        "qcow2" => DriverSpec::Qcow2(Box::new(Qcow2Spec {
            backing: BackingRef::Nothing,
            ..Qcow2Spec::over(NodeRef::Inline(Box::new(file)))
        })),
        "raw" => DriverSpec::Raw {
            file: NodeRef::Inline(Box::new(file)),
            offset: None,
            size: None,
        },
        "file" => file.driver,
        other => {
            let text = format!("Unknown driver '{other}'");
            return Err(EngineError::generic(text));
        }
    };
    Ok(NodeSpec {
        node_name: new.node_name.clone(),
        common,
        driver,
    })
}
