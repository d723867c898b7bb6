//! The steps of a copy, each carried out by itself: what is read, written, zeroed, shared or filled, in which pieces.

use std::rc::Rc;

use blockyard_storage::ByteRange;

use crate::error::NodeError;
use crate::job::context::JobContext;
use crate::job::error_policy::Side;
use crate::jobs::copier::CopyOptions;
use crate::jobs::plan::{Step, StepKind};
use crate::manifest::Recorder;
use crate::node::transfer::{Failed, Writing, bring_over, compress, copy, read_for_sums, zero};
use crate::node::{Fill, Node};

/// Why one range was not copied.
pub(super) enum Failure {
    /// A request failed.
    Io(Side, NodeError),
    /// Its extents cannot be shared; nothing is wrong with copying it.
    NotShared,
}

impl From<Failed> for Failure {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::Reading(error) => Failure::Io(Side::Source, error),
            Failed::Writing(error) => Failure::Io(Side::Target, error),
        }
    }
}

/// Carries one step out. What is read is recorded; then it is whole extents, and what of them does not come to the target is read for
/// its checksums alone.
///
/// # Errors
/// As [`Failure`] says; a part may have been done.
pub(super) async fn carry_out(
    step: Step,
    nodes: (&Rc<dyn Node>, &dyn Node),
    cx: &JobContext,
    options: CopyOptions,
    recorder: Option<&Recorder>,
) -> Result<(), Failure> {
    let mut rest = step.range;
    while !rest.is_empty() {
        let (part, _) = first_part(
            Step {
                range: rest,
                ..step
            },
            recorder,
        );
        carry_out_part(part, nodes, cx, options, recorder).await?;
        rest = ByteRange::between(part.range.end(), rest.end());
    }
    Ok(())
}

/// The first part of a step that is treated alike, and whether it comes to the target.
pub(super) fn first_part(step: Step, recorder: Option<&Recorder>) -> (Step, bool) {
    let Some(recorder) = recorder else {
        return (step, true);
    };
    let (range, is_copied) = recorder.first_part(step.range);
    let kind = match is_copied {
        true => step.kind,
        false => StepKind::Sum,
    };
    (Step { range, kind }, kind != StepKind::Sum)
}

async fn carry_out_part(
    step: Step,
    (source, target): (&Rc<dyn Node>, &dyn Node),
    cx: &JobContext,
    options: CopyOptions,
    recorder: Option<&Recorder>,
) -> Result<(), Failure> {
    let (range, pool) = (step.range, cx.pool());
    match step.kind {
        StepKind::Copy if options.compress => {
            let how = (pool, options.unit_bytes);
            compress(range, &**source, target, how, recorder).await?;
        }
        StepKind::Copy => copy(range, &**source, target, pool, recorder).await?,
        StepKind::Parts => {
            let how = Writing {
                unit_bytes: options.unit_bytes,
                compress: options.compress,
                may_unmap: options.may_unmap,
            };
            bring_over(range, source, target, pool, how, recorder).await?;
        }
        StepKind::Zero => {
            zero(range, target, options.may_unmap)
                .await
                .map_err(Failed::Writing)?;
            if let Some(recorder) = recorder {
                recorder.zeroes(range).await;
            }
        }
        StepKind::Sum => {
            if let Some(recorder) = recorder {
                read_for_sums(range, source, pool, recorder).await?;
            }
        }
        StepKind::Share => share(range, &**source, target).await?,
        StepKind::Fill(with) => fill(range, with, target, cx).await?,
        StepKind::Skip => {}
    }
    Ok(())
}

/// Lets the target hold one range itself. Whether reading or writing failed is not told.
async fn fill(
    range: ByteRange,
    with: Fill,
    target: &dyn Node,
    cx: &JobContext,
) -> Result<(), Failure> {
    let memory = match with {
        Fill::Bytes => {
            let length = usize::try_from(range.length()).unwrap_or(usize::MAX);
            Some(cx.pool().take(length).await)
        }
        Fill::Zeroes => None,
    };
    let filled = target.fill(range, with, memory).await;
    filled.map_err(|error| Failure::Io(Side::Source, error))
}

/// Shares one range. Whatever goes wrong, copying tells better what it is.
async fn share(range: ByteRange, source: &dyn Node, target: &dyn Node) -> Result<(), Failure> {
    let Some((file, offset)) = source.host_extent(range) else {
        return Err(Failure::NotShared);
    };
    target.share(file, offset, range).await.map_err(|error| {
        tracing::debug!(%error, "extents cannot be shared, bytes are copied");
        Failure::NotShared
    })
}
