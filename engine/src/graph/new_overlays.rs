//! `blockdev-snapshot-sync`: an overlay is made in a file, or found there, and put on a node.

use std::sync::Arc;

use crate::data::{DataContext, NodeId};
use crate::error::EngineError;
use crate::graph::{Graph, not_found};
use crate::job::context::{ErrorPolicies, JobContext, JobKey, JobShared};
use crate::job::work::{Stop, Work};
use crate::jobs::create::{CreateFile, CreateFileOptions, piece_bytes};
use crate::jobs::create_qcow2::CreateQcow2;
use crate::request::{
    BackingRef, CommonOptions, CopyMode, CreatePreallocation, CreateQcow2Spec, DriverSpec,
    FileSpec, NewOverlaySpec, NodeRef, NodeSpec, Qcow2Spec,
};

impl Graph {
    /// Makes an overlay, unless it exists, and puts it on a node. It goes again if nobody used the node, who would use it now;
    /// its file stays.
    ///
    /// # Errors
    /// In QEMU's words and order; what was made in the file may be left.
    pub async fn put_new_overlay(&self, spec: &NewOverlaySpec) -> Result<(), EngineError> {
        let name = spec.node_name.as_deref().unwrap_or_default();
        let device = spec.device.as_deref().unwrap_or_default();
        let below = self.find(name).ok_or_else(|| not_found(device, name))?;
        self.records.borrow().check_free(below)?;
        match &spec.overlay_name {
            None => return Err(EngineError::generic("New overlay node-name missing")),
            Some(overlay) if self.records.borrow().is_taken(overlay) => {
                return Err(EngineError::generic("New overlay node-name already in use"));
            }
            Some(_) => {}
        }
        if !spec.exists {
            self.make_overlay(spec, below).await?;
        }
        let overlay = self.open_unowned(overlay_node(spec)?).await?;
        let overlay_name = self.records.borrow().name_of(overlay).to_owned();
        let put = self.put_overlay(name, &overlay_name).await;
        self.close_unused(overlay).await;
        put
    }

    /// An empty image that says that it stands on a node.
    async fn make_overlay(&self, spec: &NewOverlaySpec, below: NodeId) -> Result<(), EngineError> {
        let fail = |text: String| Err(EngineError::generic(text));
        let file = &spec.filename;
        match spec.format.as_str() {
            "qcow2" => {}
            "raw" | "file" | "host_device" | "luks" => {
                return fail(format!(
                    "Backing file not supported for file format '{}'",
                    spec.format
                ));
            }
            other => return fail(format!("Unknown file format '{other}'")),
        }
        let (backing, driver) = {
            let records = self.records.borrow();
            let node = records.node(below);
            let node = node.ok_or_else(|| EngineError::generic("The node is gone"))?;
            (node.filename.to_string(), node.driver)
        };
        if backing == *file {
            let text =
                "Error: Trying to create an image with the same filename as the backing file";
            return Err(EngineError::generic(text));
        }
        let image = CreateQcow2Spec {
            file: NodeRef::Name(String::new()),
            data_file: None,
            data_file_raw: false,
            extended_l2: false,
            size: self.facts(below).await?.length_bytes,
            version_2: false,
            backing_file: Some(backing),
            backing_fmt: Some(driver.to_owned()),
            encrypt: None,
            cluster_size: None,
            preallocation: None,
            lazy_refcounts: false,
            refcount_bits: None,
            zstd: false,
        };
        let options = CreateFileOptions {
            filename: file.into(),
            size_bytes: 0,
            preallocation: CreatePreallocation::Off,
            nocow: false,
            extent_size_hint: None,
            piece_bytes: piece_bytes(CreatePreallocation::Off),
        };
        let thread = self.threads.choose();
        let made = self.threads.run(thread, move |context| {
            Box::pin(async move {
                let work = CreateFile::new(options, &context);
                carry_out(Box::new(work), &context).await
            })
        });
        made.await??;
        let holder = self.open_unowned(file_node(spec)).await?;
        let made = self.threads.run(self.thread_of(holder), move |context| {
            Box::pin(async move {
                let Some(node) = context.node(holder) else {
                    return Err(EngineError::generic("The node is gone"));
                };
                let work = CreateQcow2::new(&image, node, None);
                carry_out(Box::new(work), &context).await
            })
        });
        let made = made.await;
        self.close(holder).await;
        made?
    }
}

/// Does a job's work within a command: nobody hears of it but of its error.
async fn carry_out(mut work: Box<dyn Work>, context: &DataContext) -> Result<(), EngineError> {
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

fn file_node(spec: &NewOverlaySpec) -> NodeSpec {
    NodeSpec {
        node_name: None,
        common: CommonOptions::default(),
        driver: DriverSpec::File(FileSpec {
            filename: (&spec.filename).into(),
            ..FileSpec::default()
        }),
    }
}

/// The overlay as it would be described in `blockdev-add`.
///
/// # Errors
/// The format is not one that can be opened.
fn overlay_node(spec: &NewOverlaySpec) -> Result<NodeSpec, EngineError> {
    let file = NodeRef::Inline(Box::new(file_node(spec)));
    let driver = match spec.format.as_str() {
        "qcow2" => DriverSpec::Qcow2(Box::new(Qcow2Spec {
            backing: BackingRef::Nothing,
            ..Qcow2Spec::over(file)
        })),
        "raw" => DriverSpec::Raw {
            file,
            offset: None,
            size: None,
        },
        other => {
            let text = format!("Unknown driver '{other}'");
            return Err(EngineError::generic(text));
        }
    };
    Ok(NodeSpec {
        node_name: spec.overlay_name.clone(),
        common: CommonOptions::default(),
        driver,
    })
}
