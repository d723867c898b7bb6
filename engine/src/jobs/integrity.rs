//! [`Integrity`]: the checksums of one copy: recorded while it is made, compared with its target, put down in a manifest.

use std::path::Path;
use std::rc::Rc;

use blockyard_storage::ByteRange;

use crate::data::{CpuPool, DataContext, HostFiles};
use crate::error::JobError;
use crate::job::context::JobContext;
use crate::job::work::Stop;
use crate::manifest::Recorder;
use crate::manifest::file::{ManifestFile, open_earlier};
use crate::manifest::onto::Earlier;
use crate::node::dirty_map::DirtyMap;
use crate::node::file_node::{FileNode, FileOptions};
use crate::request::IntegritySpec;

/// What is done about checksums of one copy.
#[derive(Default)]
pub(crate) struct Integrity {
    spec: IntegritySpec,
    surroundings: Option<(Rc<dyn HostFiles>, CpuPool)>,
    recorder: Option<Rc<Recorder>>,
    file: Option<ManifestFile>,
    earlier: Option<Earlier>,
}

impl Integrity {
    /// What a client wants, on the thread of `context`.
    pub(crate) fn of(spec: &IntegritySpec, context: &DataContext) -> Self {
        Self {
            spec: spec.clone(),
            surroundings: Some((context.files().clone(), context.cpu().clone())),
            ..Self::default()
        }
    }

    /// What a test wants, which has its own recorder.
    #[cfg(test)]
    pub(crate) fn with_recorder(recorder: Option<Rc<Recorder>>) -> Self {
        Self {
            recorder,
            ..Self::default()
        }
    }

    /// The same onto an earlier manifest.
    #[cfg(test)]
    pub(crate) fn onto(self, earlier: Option<Earlier>) -> Self {
        Self { earlier, ..self }
    }

    /// Begins to record the copy of a disk of this length, if that is wanted. Makes the manifest's file, and opens the one that it is
    /// laid onto.
    ///
    /// # Errors
    /// When either cannot be done.
    pub(crate) async fn begin(
        &mut self,
        length_bytes: u64,
    ) -> Result<Option<Rc<Recorder>>, JobError> {
        let Some((files, cpu)) = self.surroundings.clone() else {
            return Ok(self.recorder.clone());
        };
        let mut scratch = None;
        if let Some(path) = &self.spec.onto_manifest {
            self.earlier = Some(open(path, Rc::clone(&files)).await?);
        }
        if let Some(path) = &self.spec.manifest {
            let file = ManifestFile::create(path, self.spec.replaces_manifest, files).await?;
            scratch = Some(file.scratch());
            self.file = Some(file);
        }
        if scratch.is_some() || self.spec.verify {
            let recorder = Recorder::new(length_bytes, cpu, scratch, self.spec.verify);
            self.recorder = Some(Rc::new(recorder));
        }
        Ok(self.recorder.clone())
    }

    /// Who is told what is read, if anybody is.
    pub(crate) fn recorder(&self) -> Option<&Rc<Recorder>> {
        self.recorder.as_ref()
    }

    /// Where no more than what `changes` says is copied: what has to be recorded besides, as the manifest tells of a whole disk. That
    /// is all of it, or what the earlier manifest does not tell of in whole blocks. `None`: no manifest is wanted.
    pub(crate) fn recorded_besides(&self, changes: &DirtyMap) -> Option<DirtyMap> {
        let recorder = self.recorder.as_ref();
        recorder.filter(|recorder| recorder.needs_every_byte())?;
        Some(match &self.earlier {
            Some(earlier) => earlier.blocks_to_know(changes),
            None => {
                let mut all = changes.emptied();
                all.mark(ByteRange::new(0, changes.length_bytes()));
                all
            }
        })
    }

    /// Reads all of the manifest that it is laid onto, so that nothing is built upon one that is damaged.
    ///
    /// # Errors
    /// It is; [`Stop::Cancelled`] after a forced cancel.
    pub(crate) async fn check(&self, cx: &JobContext) -> Result<(), Stop> {
        match &self.earlier {
            Some(earlier) => earlier.check(async || cx.checkpoint().await).await,
            None => Ok(()),
        }
    }

    /// Everything was copied: writes the manifest, which is durable then, but not there yet.
    ///
    /// # Errors
    /// When it is not whole.
    pub(crate) async fn write(&self) -> Result<(), Stop> {
        let (Some(recorder), Some(file)) = (&self.recorder, &self.file) else {
            return Ok(());
        };
        match &self.earlier {
            Some(earlier) => recorder.write_manifest_onto(earlier, file.output()).await?,
            None => recorder.write_manifest(file.output()).await?,
        }
        Ok(file.sync().await?)
    }

    /// Puts the manifest in its place, for good.
    ///
    /// # Errors
    /// It is not there.
    pub(crate) async fn publish(&mut self) -> Result<(), JobError> {
        match &mut self.file {
            Some(file) => file.publish().await,
            None => Ok(()),
        }
    }

    /// The job has come to nothing.
    pub(crate) fn remove(&mut self) {
        if let Some(mut file) = self.file.take() {
            file.remove();
        }
    }
}

/// The manifest at `path`, for reading.
async fn open(path: &Path, files: Rc<dyn HostFiles>) -> Result<Earlier, JobError> {
    let storage = open_earlier(path, files).await?;
    let node = FileNode::new("manifest".to_owned(), storage, FileOptions::default());
    let earlier = Earlier::open(Rc::new(node)).await;
    earlier.map_err(|error| JobError::text(error.text))
}
