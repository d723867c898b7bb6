//! `blockdev-create` for `qcow2`: an image on a node, with real progress. What is written, and in which order, is the
//! business of [`blockyard_images::qcow2::create`]; here it gets its storages and a job to run in.

use std::rc::Rc;

use blockyard_images::qcow2::create::{CreateError, CreateOptions, ImagePreallocation, create};
use blockyard_images::qcow2::units::{Compression, Version};
use blockyard_images::{Cancelled, ImageError, Pace};
use blockyard_storage::{LocalFuture, Storage};

use crate::error::JobError;
use crate::job::context::JobContext;
use crate::job::work::{Stop, Work};
use crate::jobs::create::count_failed_step;
use crate::node::Node;
use crate::node::child_storage::ChildStorage;
use crate::request::{CreateEncryption, CreatePreallocation, CreateQcow2Spec};

/// The work of making an image.
pub(crate) struct CreateQcow2 {
    options: CreateOptions,
    encrypt: Option<CreateEncryption>,
    image: ChildStorage,
    data_file: Option<ChildStorage>,
}

/// The options of the images crate, but for the name of the data file, which only its node knows.
pub(crate) fn create_options(spec: &CreateQcow2Spec) -> CreateOptions {
    let defaults = CreateOptions::new(spec.size);
    CreateOptions {
        version: match spec.version_2 {
            true => Version::V2,
            false => Version::V3,
        },
        cluster_bytes: spec.cluster_size.unwrap_or(defaults.cluster_bytes),
        // A negative width is as wrong as none.
        refcount_bits: spec.refcount_bits.map_or(defaults.refcount_bits, |bits| {
            u64::try_from(bits).unwrap_or(0)
        }),
        lazy_refcounts: spec.lazy_refcounts,
        extended_l2: spec.extended_l2,
        compression: match spec.zstd {
            true => Compression::Zstd,
            false => Compression::Zlib,
        },
        preallocation: match spec.preallocation.unwrap_or(CreatePreallocation::Off) {
            CreatePreallocation::Off => ImagePreallocation::Off,
            CreatePreallocation::Metadata => ImagePreallocation::Metadata,
            CreatePreallocation::Falloc => ImagePreallocation::Falloc,
            CreatePreallocation::Full => ImagePreallocation::Full,
        },
        backing_name: spec.backing_file.clone().map(String::into_bytes),
        backing_format: spec.backing_fmt.clone(),
        data_file_name: spec.data_file.as_ref().map(|_| Vec::new()),
        data_file_raw: spec.data_file_raw,
        ..defaults
    }
}

impl CreateQcow2 {
    /// An image on `image`, with its guest data on the node and under the name of `data_file`.
    pub(crate) fn new(
        spec: &CreateQcow2Spec,
        image: Rc<dyn Node>,
        data_file: Option<(Rc<dyn Node>, &[u8])>,
    ) -> Self {
        let mut options = create_options(spec);
        if let Some((_, name)) = &data_file {
            options.data_file_name = Some(name.to_vec());
        }
        Self {
            options,
            encrypt: spec.encrypt.clone(),
            image: ChildStorage::new(image),
            data_file: data_file.map(|(node, _)| ChildStorage::new(node)),
        }
    }

    async fn create(&self, cx: &JobContext) -> Result<(), Stop> {
        // What is refused counts as one step.
        cx.progress().set_remaining(1);
        let creation = self.options.plan().map_err(refused)?;
        check_encryption(self.encrypt.as_ref()).map_err(Stop::Failed)?;
        cx.progress().set_remaining(0);
        let data_file = self.data_file.as_ref().map(|file| file as &dyn Storage);
        let made = create(&creation, &self.image, data_file, &JobPace(cx)).await;
        made.map_err(|error| self.failed(error))
    }

    fn failed(&self, error: CreateError) -> Stop {
        let text = error.to_string();
        let (in_data_file, source) = match error {
            CreateError::Cancelled(Cancelled) => return Stop::Cancelled,
            CreateError::TooShort | CreateError::NotKept => {
                return Stop::Failed(JobError::text(text));
            }
            CreateError::Storage {
                in_data_file,
                source,
                ..
            } => (in_data_file, source),
        };
        let storage = self.data_file.as_ref().filter(|_| in_data_file);
        let error = storage.unwrap_or(&self.image).node_error(&source);
        Stop::Failed(JobError {
            text,
            ..JobError::from(error)
        })
    }
}

impl Work for CreateQcow2 {
    fn run<'a>(&'a mut self, cx: &'a JobContext) -> LocalFuture<'a, Result<(), Stop>> {
        Box::pin(async move {
            let outcome = self.create(cx).await;
            if outcome.is_err() {
                count_failed_step(cx);
            }
            outcome
        })
    }
}

/// The pace of a job: its progress, its pauses, its cancellation.
pub(crate) struct JobPace<'a>(pub(crate) &'a JobContext);

impl Pace for JobPace<'_> {
    fn expect(&self, bytes: u64) {
        self.0.progress().increase_remaining(bytes);
    }

    fn done(&self, bytes: u64) {
        self.0.progress().done(bytes);
    }

    fn checkpoint(&self) -> LocalFuture<'_, Result<(), Cancelled>> {
        Box::pin(async move {
            match self.0.checkpoint().await {
                Ok(()) => Ok(()),
                Err(_) => Err(Cancelled),
            }
        })
    }
}

/// What QEMU checks last.
fn check_encryption(encrypt: Option<&CreateEncryption>) -> Result<(), JobError> {
    let text = match encrypt {
        None => return Ok(()),
        Some(CreateEncryption { key_secret: None }) => {
            "Parameter 'encrypt.key-secret' is required for cipher"
        }
        Some(_) => "Encrypted qcow2 images cannot be made here",
    };
    Err(JobError::text(text))
}

fn refused(error: ImageError) -> Stop {
    if let ImageError::Refused {
        text,
        detail: Some(detail),
    } = &error
    {
        tracing::info!(reason = text, detail, "an image cannot be made");
    }
    Stop::Failed(JobError::text(error.to_string()))
}
