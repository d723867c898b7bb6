//! [`Integrity`]: the checksums of one copy: recorded while it is made, compared with its target, put down in a manifest.

use std::rc::Rc;

use crate::data::{CpuPool, DataContext, HostFiles};
use crate::error::JobError;
use crate::job::work::Stop;
use crate::manifest::Recorder;
use crate::manifest::file::ManifestFile;
use crate::request::IntegritySpec;

/// What is done about checksums of one copy.
#[derive(Default)]
pub(crate) struct Integrity {
    spec: IntegritySpec,
    surroundings: Option<(Rc<dyn HostFiles>, CpuPool)>,
    recorder: Option<Rc<Recorder>>,
    file: Option<ManifestFile>,
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

    /// Begins to record the copy of a disk of this length, if that is wanted. Makes the manifest's file.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) async fn begin(
        &mut self,
        length_bytes: u64,
    ) -> Result<Option<Rc<Recorder>>, JobError> {
        let Some((files, cpu)) = self.surroundings.clone() else {
            return Ok(self.recorder.clone());
        };
        let mut scratch = None;
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

    /// Everything was copied: writes the manifest, which is durable then, but not there yet.
    ///
    /// # Errors
    /// When it is not whole.
    pub(crate) async fn write(&self) -> Result<(), Stop> {
        let (Some(recorder), Some(file)) = (&self.recorder, &self.file) else {
            return Ok(());
        };
        recorder.write_manifest(file.output()).await?;
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
