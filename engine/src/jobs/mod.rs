//! The kinds of work there are: each is a plan and an ending around the one copier.

pub(crate) mod active_commit;
mod amend;
mod back_off;
mod backup;
mod ceiling;
mod changes;
pub(crate) mod commit;
mod copier;
#[cfg(test)]
mod copier_tests;
mod copy_options;
pub(crate) mod create;
pub(crate) mod create_qcow2;
mod create_raw;
mod in_flight;
mod integrity;
mod mirror;
pub(crate) mod plan;
#[cfg(test)]
mod simulated;
mod steps;
pub(crate) mod stream;
#[cfg(test)]
pub(crate) mod test_support;
mod verifying;
mod window_size;

use std::rc::Rc;

use crate::data::{DataContext, NodeId};
use crate::error::JobError;
use crate::graph::JobNodes;
use crate::job::context::ErrorPolicies;
use crate::job::work::Work;
use crate::jobs::integrity::Integrity;
use crate::node::Node;
use crate::node::copy_before_write::Saver;
use crate::node::mirror_top::Tracker;
use crate::request::{CommitSpec, CreatePreallocation, CreateSpec, StreamSpec, WorkSpec};

/// What the filter above a mirror's source knows of its writers.
pub(crate) fn tracker(filter: Rc<dyn Node>) -> Result<Rc<Tracker>, JobError> {
    let bug = || JobError::text("Internal error: a filter does not track writes (bug)");
    filter.tracker().ok_or_else(bug)
}

/// What the filter above a backup's source has saved.
fn saver(filter: Rc<dyn Node>) -> Result<Rc<Saver>, JobError> {
    let bug = || JobError::text("Internal error: a filter does not save what is written (bug)");
    filter.saver().ok_or_else(bug)
}

/// The work that a job's description asks for, on the thread where its nodes live.
///
/// # Errors
/// When the nodes are not there, which is a bug of the caller.
pub fn work(
    spec: &WorkSpec,
    nodes: &JobNodes,
    context: &DataContext,
) -> Result<Box<dyn Work>, JobError> {
    let node = |id: Option<NodeId>| -> Result<Rc<dyn Node>, JobError> {
        id.and_then(|id| context.node(id))
            .ok_or_else(|| JobError::text("Internal error: a node is not where it should be (bug)"))
    };
    let chain = nodes.chain.as_ref();
    let (layers, seen_bytes) = chain.map_or((1, 0), |part| (part.layers, part.seen_bytes));
    let is_active = chain.is_some_and(|part| part.is_whole);
    Ok(match spec {
        WorkSpec::Backup(spec) => {
            let backup = backup::Backup::new(
                node(nodes.source)?,
                node(nodes.target)?,
                saver(node(nodes.filter)?)?,
                nodes.bitmap.clone(),
                spec.clone(),
            );
            Box::new(backup.keeping(Integrity::of(&spec.integrity, context)))
        }
        WorkSpec::Mirror(spec) => {
            let mirror = mirror::Mirror::new(
                node(nodes.source)?,
                node(nodes.target)?,
                tracker(node(nodes.filter)?)?,
                nodes.bitmap.clone(),
                spec,
            );
            Box::new(mirror.keeping(Integrity::of(&spec.integrity, context)))
        }
        WorkSpec::Commit(_) if is_active => Box::new(active_commit::ActiveCommit::new(
            node(nodes.source)?,
            node(nodes.target)?,
            layers,
            tracker(node(nodes.filter)?)?,
        )),
        WorkSpec::Commit(_) => Box::new(commit::Commit::new(
            node(nodes.source)?,
            node(nodes.target)?,
            layers,
            seen_bytes,
        )),
        WorkSpec::Stream(_) => Box::new(stream::Stream::new(node(nodes.source)?, layers)),
        WorkSpec::Create(CreateSpec::File {
            filename,
            size,
            preallocation,
            nocow,
            extent_size_hint,
        }) => {
            let preallocation = preallocation.unwrap_or(CreatePreallocation::Off);
            let options = create::CreateFileOptions {
                filename: filename.clone(),
                size_bytes: *size,
                preallocation,
                nocow: *nocow,
                extent_size_hint: *extent_size_hint,
                piece_bytes: create::piece_bytes(preallocation),
            };
            Box::new(create::CreateFile::new(options, context))
        }
        WorkSpec::Create(CreateSpec::Raw {
            size,
            preallocation,
            ..
        }) => {
            let preallocation = preallocation.unwrap_or(CreatePreallocation::Off);
            Box::new(create_raw::CreateRaw::new(
                node(nodes.target)?,
                *size,
                preallocation,
                create::piece_bytes(preallocation),
            ))
        }
        WorkSpec::Create(CreateSpec::Qcow2(spec)) => {
            let data_file = match (&spec.data_file, &nodes.data_file_name) {
                (Some(_), Some(name)) => Some((node(nodes.data_file)?, name.as_bytes())),
                _ => None,
            };
            Box::new(create_qcow2::CreateQcow2::new(
                spec,
                node(nodes.target)?,
                data_file,
            ))
        }
        WorkSpec::Amend(spec) => Box::new(amend::Amend::new(node(nodes.target)?, spec)),
        WorkSpec::Create(CreateSpec::Unsupported { driver }) => {
            return Err(JobError::text(format!(
                "Driver '{driver}' cannot create images"
            )));
        }
    })
}

impl ErrorPolicies {
    /// What the client chose for a job.
    pub fn of(spec: &WorkSpec) -> Self {
        match spec {
            WorkSpec::Backup(spec) => Self {
                on_source_error: spec.on_source_error,
                on_target_error: spec.on_target_error,
            },
            WorkSpec::Mirror(spec) => Self {
                on_source_error: spec.on_source_error,
                on_target_error: spec.on_target_error,
            },
            WorkSpec::Commit(CommitSpec { on_error, .. })
            | WorkSpec::Stream(StreamSpec { on_error, .. }) => Self {
                on_source_error: *on_error,
                on_target_error: *on_error,
            },
            WorkSpec::Create(_) | WorkSpec::Amend(_) => Self::default(),
        }
    }
}
