//! One copy on the embedded engine: nodes, room, job, the target's last bytes. What `backup`, `mirror` and `bench` share.

use std::time::{Duration, Instant};

use blockyard_engine::error::EngineError;
use blockyard_engine::job::error_policy::OnError;
use blockyard_engine::reply::JobView;
use blockyard_engine::request::{
    CreatePreallocation, CreateSpec, DetectZeroes, Discard, IntegritySpec, WorkSpec,
};
use serde_json::Value;

use crate::terminal::copy::arguments::{CopyKind, SOURCE, TARGET};
use crate::terminal::copy::ends::{Source, Target, cannot_use, shown};
use crate::terminal::display::{Fact, Outcome};
use crate::terminal::embedded::{CameTo, Embedded, NodeFile};

/// The error of a job that was cancelled.
const CANCELED: &str = "Operation canceled";

/// Name of the job that gives the target its length and room.
const CREATE: &str = "create";

/// How to copy.
#[derive(Clone, Debug)]
pub(crate) struct CopyOptions {
    pub(crate) kind: CopyKind,
    /// Bytes per second at most; 0: no limit.
    pub(crate) speed: i64,
    pub(crate) on_error: OnError,
    pub(crate) preallocation: CreatePreallocation,
    pub(crate) detect_zeroes: DetectZeroes,
    /// Checksums of what is copied.
    pub(crate) integrity: IntegritySpec,
}

/// What a copy came to.
pub(crate) struct Copied {
    pub(crate) outcome: Outcome,
    pub(crate) bytes: u64,
    /// How long the job took until its result was durable; `None`: it did not get that far.
    pub(crate) took: Option<Duration>,
    /// The job as it was at its end; `None`: it did not begin, and has written nothing.
    pub(crate) job: Option<JobView>,
    pub(crate) facts: Vec<Fact>,
}

impl CameTo for Copied {
    fn is_success(&self) -> bool {
        self.outcome == Outcome::Completed
    }
}

impl Copied {
    /// A copy that ended before its job.
    pub(crate) fn refused(text: impl Into<String>) -> Self {
        Self {
            outcome: Outcome::failed(text),
            bytes: 0,
            took: None,
            job: None,
            facts: Vec::new(),
        }
    }

    /// Adds what there is to tell besides.
    pub(crate) fn tell(&mut self, key: &'static str, value: impl Into<Value>, text: String) {
        let value = value.into();
        self.facts.push(Fact { key, value, text });
    }

    /// Removes what this command made: a target that is no copy is worse than none. What was there before stays.
    pub(crate) fn clean_up(&mut self, target: &Target, keep: bool) {
        let path = shown(&target.path);
        let changed = if target.is_device {
            self.job.is_some()
        } else {
            target.has_changed()
        };
        let (removed, text) = if keep && target.is_new {
            (false, format!("{path} is kept and incomplete"))
        } else {
            match target.remove() {
                Ok(true) => (true, format!("{path} was removed")),
                Ok(false) if target.is_new => (false, format!("{path} is gone")),
                Ok(false) if !changed => (false, format!("{path} is unchanged")),
                Ok(false) => (false, format!("{path} stays and is incomplete")),
                Err(text) => (false, text),
            }
        };
        self.tell("target-removed", removed, text);
    }

    /// Removes the manifest of a copy that came to nothing after its job had ended well.
    pub(crate) fn remove_manifest(&self, options: &CopyOptions) {
        let is_written = self.job.as_ref().is_some_and(|job| job.error.is_none());
        if let (true, Some(path)) = (is_written, &options.integrity.manifest)
            && let Err(error) = std::fs::remove_file(path)
        {
            tracing::warn!(%error, "the manifest could not be removed");
        }
    }
}

/// Opens the source's node and takes its locks. Returns whether the page cache is bypassed.
///
/// # Errors
/// For the user: what is in the way.
pub(crate) async fn add_source(embedded: &Embedded, source: &Source) -> Result<bool, String> {
    let node = NodeFile {
        name: SOURCE,
        path: source.path.clone(),
        is_device: source.is_device,
        read_only: true,
        size_bytes: source.size_bytes(),
        discard: Discard::Ignore,
        detect_zeroes: DetectZeroes::Off,
    };
    let added = embedded.add_node(&node).await;
    added.map_err(|error| cannot_use(&source.path, &error.to_string()))
}

/// Gives the target its length and room, and opens its node. A file is empty then. Returns whether the page cache is
/// bypassed.
///
/// # Errors
/// What the copy came to already.
pub(crate) async fn add_target(
    embedded: &mut Embedded,
    options: &CopyOptions,
    source: &Source,
    target: &Target,
) -> Result<bool, Copied> {
    let cannot = |error: EngineError| Copied::refused(cannot_use(&target.path, &error.to_string()));
    if !target.is_device {
        if !target.is_new {
            check_unused(embedded, target).await.map_err(cannot)?;
        }
        let work = WorkSpec::Create(CreateSpec::File {
            filename: target.path.clone(),
            size: source.disk_bytes,
            preallocation: Some(options.preallocation),
            nocow: false,
            extent_size_hint: None,
        });
        let takes_long = options.preallocation != CreatePreallocation::Off;
        let job = embedded.run_job(CREATE, work, takes_long).await;
        let job = job.map_err(|error| Copied::refused(error.text))?;
        if job.error.is_some() {
            let outcome = outcome_of(embedded, &job);
            return Err(Copied {
                outcome,
                ..Copied::refused("")
            });
        }
    }
    let node = NodeFile {
        name: TARGET,
        path: target.path.clone(),
        is_device: target.is_device,
        read_only: false,
        size_bytes: source.size_bytes(),
        // Ranges that become zeroes may give their room back, unless it was reserved on purpose.
        discard: match options.preallocation {
            CreatePreallocation::Off => Discard::Unmap,
            _ => Discard::Ignore,
        },
        detect_zeroes: options.detect_zeroes,
    };
    embedded.add_node(&node).await.map_err(cannot)
}

/// Copies the source's node to the target's. On success the target is as long as the source, and durable.
pub(crate) async fn copy_across(
    embedded: &mut Embedded,
    options: &CopyOptions,
    source: &Source,
    target: &Target,
) -> Copied {
    let integrity = options.integrity.clone();
    let work = options
        .kind
        .work(options.speed, options.on_error, integrity);
    let started = Instant::now();
    let job = match embedded.run_job(options.kind.name(), work, true).await {
        Ok(job) => job,
        Err(error) => return Copied::refused(error.text),
    };
    let mut copied = Copied {
        outcome: outcome_of(embedded, &job),
        bytes: job.current_progress,
        took: None,
        job: Some(job),
        facts: Vec::new(),
    };
    if copied.outcome == Outcome::Completed {
        match target.finish(source.disk_bytes) {
            Ok(()) => copied.took = Some(started.elapsed()),
            Err(text) => copied.outcome = Outcome::failed(text),
        }
        // A job counts in units of its own.
        copied.bytes = source.disk_bytes;
    }
    copied
}

/// Whether somebody else uses the target, asked before it is emptied: creating a file in use is refused only if its user
/// shares it with no writer, while copying onto it is refused in any case.
///
/// # Errors
/// The engine's: somebody does, or the file cannot be opened.
pub(super) async fn check_unused(embedded: &Embedded, target: &Target) -> Result<(), EngineError> {
    let node = NodeFile {
        name: TARGET,
        path: target.path.clone(),
        is_device: false,
        read_only: false,
        size_bytes: 0,
        discard: Discard::Ignore,
        detect_zeroes: DetectZeroes::Off,
    };
    embedded.add_node(&node).await?;
    embedded.delete_node(TARGET).await
}

/// How a job ended.
pub(super) fn outcome_of(embedded: &Embedded, job: &JobView) -> Outcome {
    let Some(error) = job.error.clone() else {
        return Outcome::Completed;
    };
    if embedded.interrupt.is_asked() && error == CANCELED {
        return Outcome::Cancelled;
    }
    Outcome::Failed {
        error,
        failed_at: job.failed_at.clone(),
    }
}
