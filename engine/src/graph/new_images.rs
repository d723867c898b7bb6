//! Images that a command makes before it opens them: refused by format, then the file, then what is in it.

use std::sync::Arc;

use crate::data::DataContext;
use crate::error::EngineError;
use crate::graph::Graph;
use crate::job::context::{ErrorPolicies, JobContext, JobKey, JobShared};
use crate::job::work::{Stop, Work};
use crate::jobs::create::{CreateFile, CreateFileOptions, piece_bytes};
use crate::jobs::create_qcow2::CreateQcow2;
use crate::request::{
    CommonOptions, CopyMode, CreatePreallocation, CreateQcow2Spec, DriverSpec, FileSpec, NodeRef,
    NodeSpec,
};

/// An empty image that is to be made in a file.
pub(super) struct NewImage<'a> {
    /// The file, as queries show it.
    pub(super) filename: &'a str,
    /// Its format, which [`check_format`] lets pass.
    pub(super) format: &'a str,
    /// Length of its disk in bytes.
    pub(super) size_bytes: u64,
    /// What its header says of its backing file: name and format.
    pub(super) backing: Option<(String, &'static str)>,
}

/// Refuses formats that nothing is made in here, or that know no backing file where there is to be one.
///
/// # Errors
/// In QEMU's words.
pub(super) fn check_format(format: &str, has_backing: bool) -> Result<(), EngineError> {
    let text = match format {
        "qcow2" => return Ok(()),
        "raw" | "file" if !has_backing => return Ok(()),
        "raw" | "file" | "host_device" | "luks" if has_backing => {
            format!("Backing file not supported for file format '{format}'")
        }
        "null-co" | "null-aio" | "blkdebug" | "copy-on-read" | "throttle" => {
            format!("Format driver '{format}' does not support image creation")
        }
        other => format!("Unknown file format '{other}'"),
    };
    Err(EngineError::generic(text))
}

impl Graph {
    /// Makes an image; what was in its file before is gone. It is durable when this returns.
    ///
    /// # Errors
    /// In QEMU's words. A file that was not there before is removed then, one that was stays, with what was made in it.
    pub(super) async fn make_image(&self, new: &NewImage<'_>) -> Result<(), EngineError> {
        if new
            .backing
            .as_ref()
            .is_some_and(|(backing, _)| backing == new.filename)
        {
            let text =
                "Error: Trying to create an image with the same filename as the backing file";
            return Err(EngineError::generic(text));
        }
        let is_qcow2 = new.format == "qcow2";
        let options = CreateFileOptions {
            filename: new.filename.into(),
            size_bytes: if is_qcow2 { 0 } else { new.size_bytes },
            preallocation: CreatePreallocation::Off,
            nocow: false,
            extent_size_hint: None,
            piece_bytes: piece_bytes(CreatePreallocation::Off),
        };
        let thread = self.threads.choose();
        let made = self.threads.run(thread, move |context| {
            Box::pin(async move {
                let mut work = CreateFile::new(options, &context);
                carry_out(&mut work, &context).await?;
                Ok::<_, EngineError>(work.take_made())
            })
        });
        let made = made.await??;
        if !is_qcow2 {
            return Ok(());
        }
        let outcome = self.fill_qcow2(new).await;
        if let (Err(_), Some(made)) = (&outcome, made) {
            let removed = self.threads.run(thread, move |context| {
                context.files().blocking(Box::new(move || made.remove()))
            });
            if let Err(error) = removed.await {
                tracing::warn!(%error, "a half-made file stays");
            }
        }
        outcome
    }

    /// Makes an empty image of a file that is there.
    async fn fill_qcow2(&self, new: &NewImage<'_>) -> Result<(), EngineError> {
        let image = qcow2_spec(new);
        let holder = self.open_unowned(file_node(new.filename)).await?;
        let made = self.threads.run(self.thread_of(holder), move |context| {
            Box::pin(async move {
                let Some(node) = context.node(holder) else {
                    return Err(EngineError::generic("The node is gone"));
                };
                let mut work = CreateQcow2::new(&image, node, None);
                carry_out(&mut work, &context).await
            })
        });
        let made = made.await;
        self.close(holder).await;
        made?
    }
}

fn qcow2_spec(new: &NewImage<'_>) -> CreateQcow2Spec {
    let (backing_file, backing_fmt) = match &new.backing {
        Some((name, format)) => (Some(name.clone()), Some((*format).to_owned())),
        None => (None, None),
    };
    CreateQcow2Spec {
        file: NodeRef::Name(String::new()),
        data_file: None,
        data_file_raw: false,
        extended_l2: false,
        size: new.size_bytes,
        version_2: false,
        backing_file,
        backing_fmt,
        encrypt: None,
        cluster_size: None,
        preallocation: None,
        lazy_refcounts: false,
        refcount_bits: None,
        zstd: false,
    }
}

/// Does a job's work within a command: nobody hears of it but of its error.
async fn carry_out(work: &mut dyn Work, context: &DataContext) -> Result<(), EngineError> {
    let shared = Arc::new(JobShared::new(0, CopyMode::Background));
    let (reports, _) = tokio::sync::mpsc::unbounded_channel();
    let cx = JobContext::new(
        JobKey(0),
        shared,
        reports,
        context.clock().clone(),
        context.pool().clone(),
        ErrorPolicies::default(),
    );
    match work.run(&cx).await {
        Ok(()) => Ok(()),
        Err(Stop::Failed(error)) => Err(EngineError::generic(error.text)),
        Err(Stop::Cancelled) => Err(EngineError::generic("Operation canceled")),
    }
}

/// A file as it would be described in `blockdev-add`.
pub(super) fn file_node(filename: &str) -> NodeSpec {
    NodeSpec {
        node_name: None,
        common: CommonOptions::default(),
        driver: DriverSpec::File(FileSpec {
            filename: filename.into(),
            ..FileSpec::default()
        }),
    }
}
