//! [`Request`]: every command as plain data, without a trace of the wire it came over.

use std::path::PathBuf;

use crate::images::ImageSpec;
use crate::job::verb::{JobType, VerbCall};
use crate::sockets::Address;

pub use crate::event_loop::EventLoopSpec;
pub use crate::object_spec::{GivenValue, ObjectKind, ObjectSpec};
pub use crate::throttle::limits::{LimitsChange, NewLimits};
pub use crate::tls::authorization::{Authorization, Format, Rule};
pub use crate::tls::credentials::{Endpoint, X509Spec};

pub use crate::backup::{
    BackupPerf, BackupSpec, CbwBitmap, CbwOptions, CbwSpec, IntegritySpec, OnCbwError,
};
pub use crate::bitmap::{BitmapChange, BitmapName};
pub use crate::checkpoint::{CheckpointDiskSpec, CheckpointRequest, CheckpointSpec};
pub use crate::create::{CreateEncryption, CreatePreallocation, CreateQcow2Spec, CreateSpec};

pub use crate::blkdebug::{BLKDEBUG_EVENTS, BlkdebugIo, BlkdebugSpec, InjectError, SetState};
pub use crate::export::spec::{
    BitmapRef, ExportDeletion, ExportRequest, ExportSpec, LegacyExportSpec, NbdExportSpec,
    NbdServerSpec,
};
pub use crate::mirror::{CopyMode, MirrorSpec, NewTargetSpec};
pub use crate::qcow2::{
    BackingRef, EncryptionFormat, OverlapCheckSpec, OverlapTemplate, Qcow2Spec,
};
pub use crate::within_chain::{CommitSpec, NewOverlaySpec, PlanSpec, PlannedJob, StreamSpec};

/// One command to the engine.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// Open a node (and its inline children) under a name.
    BlockdevAdd(NodeSpec),
    /// Close a node that was added by name.
    BlockdevDel {
        /// Name of the node.
        node_name: String,
    },
    /// Change a node's length.
    BlockResize {
        /// Name of a device; there are none, so only good for an error.
        device: Option<String>,
        /// Name of the node.
        node_name: Option<String>,
        /// New length in bytes.
        size: i64,
    },
    /// Rewrite what an image says of its backing file.
    ChangeBackingFile {
        /// Name of the node at the top of the image's chain.
        device: String,
        /// Name of the image's node.
        image_node_name: String,
        /// Name of the backing file; an empty one: none.
        backing_file: String,
    },
    /// Open nodes in another way while they are in use, all or none.
    BlockdevReopen {
        /// What each is to be; what is left out goes back to its default.
        nodes: Vec<NodeSpec>,
    },
    /// Let nodes be active, or inactive while somebody else owns their images.
    SetActive {
        /// Name of the node; `None`: all nodes.
        node_name: Option<String>,
        /// Which of both.
        active: bool,
    },
    /// Put an overlay on a node, which is read-only from then on.
    BlockdevSnapshot {
        /// Name of the node.
        node: String,
        /// Name of the overlay's node, which has nothing below it yet.
        overlay: String,
    },
    /// Make an overlay and put it on a node.
    NewOverlay(NewOverlaySpec),
    /// Begin a checkpoint of several disks, or end one.
    Checkpoint(CheckpointRequest),
    /// Add or remove a child of a node, which no driver here can have.
    ChangeChildren {
        /// Name of the node.
        parent: String,
        /// Which child to remove.
        child: Option<String>,
        /// Name of the node to add.
        node: Option<String>,
    },
    /// Move a node to the data thread of an `iothread` object, or back to one of the engine's own.
    SetIothread {
        /// Name of the node.
        node_name: String,
        /// Name of the object; `None`: the engine's choice.
        iothread: Option<String>,
        /// Move even if something outside the chain uses the node.
        force: bool,
    },
    /// Create an object.
    ObjectAdd(ObjectSpec),
    /// Tell what an object has.
    ListProperties {
        /// Where it is.
        path: String,
    },
    /// Tell a property of an object.
    Property {
        /// Where it is.
        path: String,
        /// Which.
        name: String,
    },
    /// Give a property of an object another value.
    SetProperty {
        /// Where it is.
        path: String,
        /// Which.
        name: String,
        /// The value.
        value: GivenValue,
    },
    /// Delete an object.
    ObjectDel {
        /// Its id.
        id: String,
    },
    /// List all nodes, newest first.
    QueryNamedBlockNodes {
        /// Leave out the nested backing images.
        flat: bool,
    },
    /// The graph with permissions, for debugging.
    QueryBlockGraph,
    /// The chain of a node.
    QueryChain {
        /// Its name.
        node_name: String,
    },
    /// Find out what a job that moves data within a chain would come to.
    Plan(PlanSpec),
    /// Start a job.
    StartJob(JobSpec),
    /// Do all of this or nothing, at one moment of all disks that are named.
    Transaction {
        /// What to do, in this order; jobs are created in this order and start in the reverse one.
        actions: Vec<TransactionAction>,
        /// The jobs end together or not at all.
        grouped: bool,
    },
    /// A verb on a job.
    JobVerb {
        /// Through which command family it came: decides lookups and error classes.
        family: VerbFamily,
        /// Job id.
        id: String,
        /// What to do.
        verb: VerbCall,
    },
    /// All jobs, newest first.
    QueryJobs,
    /// All block jobs in the older form, newest first.
    QueryBlockJobs,
    /// Make an internal snapshot of the image that a node shows.
    CreateInternalSnapshot {
        /// Name of the node.
        device: String,
        /// Name of the snapshot.
        name: String,
    },
    /// Delete an internal snapshot.
    DeleteInternalSnapshot {
        /// Name of the node.
        device: String,
        /// Id of the snapshot.
        id: Option<String>,
        /// Name of the snapshot. If both are given, both have to be the snapshot's.
        name: Option<String>,
    },
    /// Something about exports.
    Export(ExportRequest),
    /// Make, change or remove a dirty bitmap.
    ChangeBitmap(BitmapChange),
    /// A digest of the bits of a dirty bitmap.
    DigestBitmap(BitmapName),
    /// Do something with a whole image that is no job. Not on the wire.
    Image(ImageSpec),
    /// End all jobs, close all nodes, then end the daemon.
    Quit,
}

/// One part of a transaction.
#[derive(Clone, Debug, PartialEq)]
pub enum TransactionAction {
    /// Let the transaction fail.
    Abort,
    /// Make, change or remove a dirty bitmap.
    ChangeBitmap(BitmapChange),
    /// Put an overlay on a node.
    BlockdevSnapshot {
        /// Name of the node.
        node: String,
        /// Name of the overlay's node, which has nothing below it yet.
        overlay: String,
    },
    /// Make an overlay and put it on a node.
    NewOverlay(NewOverlaySpec),
    /// Make an internal snapshot of the image that a node shows.
    CreateInternalSnapshot {
        /// Name of the node.
        device: String,
        /// Name of the snapshot.
        name: String,
    },
    /// Start a job.
    StartJob(Box<JobSpec>),
}

impl From<JobSpec> for TransactionAction {
    fn from(job: JobSpec) -> Self {
        Self::StartJob(Box::new(job))
    }
}

/// The two families of job commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VerbFamily {
    /// `job-*`.
    Job,
    /// `block-job-*`: block jobs only, other error class.
    BlockJob,
}

/// How a node is to be opened. Options left out are `None` and get their default (or, for inline children, the
/// parent's value) when the node is opened.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeSpec {
    /// Name; mandatory for a root node, else one is made up.
    pub node_name: Option<String>,
    /// Options every driver has.
    pub common: CommonOptions,
    /// The driver and its own options.
    pub driver: DriverSpec,
}

/// Options of every driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CommonOptions {
    /// Refuse writers.
    pub read_only: Option<bool>,
    /// Fall back to read-only where writing is not permitted.
    pub auto_read_only: Option<bool>,
    /// What discard requests do.
    pub discard: Option<Discard>,
    /// Whether written zeroes become zero requests.
    pub detect_zeroes: Option<DetectZeroes>,
    /// Bypass the page cache.
    pub cache_direct: Option<bool>,
    /// Ignore flushes.
    pub cache_no_flush: Option<bool>,
    /// Share everything with other users of the file (read-only nodes only).
    pub force_share: Option<bool>,
    /// Whether the node is active.
    pub active: Option<bool>,
}

/// What discard requests do on a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Discard {
    /// Nothing.
    #[default]
    Ignore,
    /// Give room back.
    Unmap,
}

/// Whether written zeroes are found and turned into zero requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DetectZeroes {
    /// Not looked for.
    #[default]
    Off,
    /// Zero requests that keep the room.
    On,
    /// Zero requests that may give room back.
    Unmap,
}

/// How a host file is read and written. Accepted for compatibility: one engine serves all three.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Aio {
    /// QEMU's default.
    #[default]
    Threads,
    /// Needs direct I/O.
    Native,
    /// What this engine does anyway.
    IoUring,
}

/// Three-way switch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnOffAuto {
    /// Decided at run time.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

/// A driver and its own options.
#[derive(Clone, Debug, PartialEq)]
pub enum DriverSpec {
    /// A regular file.
    File(FileSpec),
    /// A block device of the host.
    HostDevice(FileSpec),
    /// A disk of another host.
    Nbd(Box<NbdSpec>),
    /// Raw data on a child, optionally a window of it.
    Raw {
        /// The child.
        file: NodeRef,
        /// First byte of the window in the child.
        offset: Option<u64>,
        /// Length of the window in bytes.
        size: Option<u64>,
    },
    /// A node that keeps nothing; `null-co`.
    NullCo(NullSpec),
    /// The same under its other name; `null-aio`.
    NullAio(NullSpec),
    /// A filter that injects faults.
    Blkdebug(BlkdebugSpec),
    /// A filter that copies what is read into its child.
    CopyOnRead {
        /// The child.
        file: NodeRef,
        /// The last layer that is copied from, by name.
        bottom: Option<String>,
    },
    /// A filter with limits.
    Throttle {
        /// The child.
        file: NodeRef,
        /// The group whose limits hold, by id.
        group: String,
    },
    /// A filter that saves what is about to be changed.
    CopyBeforeWrite(Box<CbwSpec>),
    /// What was there when such a filter came.
    SnapshotAccess {
        /// The filter.
        file: NodeRef,
    },
    /// A qcow2 image.
    Qcow2(Box<Qcow2Spec>),
}

impl DriverSpec {
    /// The driver's name as clients spell it.
    pub const fn name(&self) -> &'static str {
        match self {
            DriverSpec::File(_) => "file",
            DriverSpec::HostDevice(_) => "host_device",
            DriverSpec::Nbd(_) => "nbd",
            DriverSpec::Raw { .. } => "raw",
            DriverSpec::NullCo(_) => "null-co",
            DriverSpec::NullAio(_) => "null-aio",
            DriverSpec::Blkdebug(_) => "blkdebug",
            DriverSpec::CopyOnRead { .. } => "copy-on-read",
            DriverSpec::Throttle { .. } => "throttle",
            DriverSpec::CopyBeforeWrite(_) => "copy-before-write",
            DriverSpec::SnapshotAccess { .. } => "snapshot-access",
            DriverSpec::Qcow2(_) => "qcow2",
        }
    }

    /// The same, to be changed.
    pub fn children_mut(&mut self) -> impl Iterator<Item = &mut NodeRef> {
        let children = match self {
            DriverSpec::Raw { file, .. }
            | DriverSpec::CopyOnRead { file, .. }
            | DriverSpec::Throttle { file, .. }
            | DriverSpec::SnapshotAccess { file } => [Some(file), None, None],
            DriverSpec::CopyBeforeWrite(spec) => {
                [Some(&mut spec.file), Some(&mut spec.target), None]
            }
            DriverSpec::Blkdebug(spec) => [Some(&mut spec.image), None, None],
            DriverSpec::Qcow2(spec) => {
                let spec = &mut **spec;
                let backing = match &mut spec.backing {
                    BackingRef::Node(backing) => Some(backing),
                    BackingRef::FromImage | BackingRef::Nothing => None,
                };
                [Some(&mut spec.file), spec.data_file.as_mut(), backing]
            }
            _ => [const { None }; 3],
        };
        children.into_iter().flatten()
    }

    /// The nodes below that the client tells of, the one with the image first.
    pub fn children(&self) -> impl Iterator<Item = &NodeRef> {
        let children = match self {
            DriverSpec::Raw { file, .. }
            | DriverSpec::CopyOnRead { file, .. }
            | DriverSpec::Throttle { file, .. }
            | DriverSpec::SnapshotAccess { file } => [Some(file), None, None],
            DriverSpec::CopyBeforeWrite(spec) => [Some(&spec.file), Some(&spec.target), None],
            DriverSpec::Blkdebug(spec) => [Some(&spec.image), None, None],
            DriverSpec::Qcow2(spec) => {
                let backing = match &spec.backing {
                    BackingRef::Node(backing) => Some(backing),
                    BackingRef::FromImage | BackingRef::Nothing => None,
                };
                [Some(&spec.file), spec.data_file.as_ref(), backing]
            }
            _ => [None; 3],
        };
        children.into_iter().flatten()
    }
}

/// A child: an existing node or one to open inline.
#[derive(Clone, Debug, PartialEq)]
pub enum NodeRef {
    /// By name.
    Name(String),
    /// Opened with its parent, and closed with its last one.
    Inline(Box<NodeSpec>),
}

/// Options of `file` and `host_device`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FileSpec {
    /// Path on the host.
    pub filename: PathBuf,
    /// Kind of I/O.
    pub aio: Option<Aio>,
    /// Whether to take QEMU's image locks.
    pub locking: Option<OnOffAuto>,
    /// Keep writers in other programs off the file as long as the node lives, not only while a user of the node needs
    /// that. No client can ask for it over the wire.
    pub exclusive: bool,
    /// Who has chosen it. Over the wire it is always the client.
    pub named_by: NamedBy,
}

/// Who has chosen a file, which decides how it is looked at before it is opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NamedBy {
    /// A client, whom everything belongs to.
    #[default]
    Client,
    /// An image, whose content may be anybody's.
    Image {
        /// The folder that the file has to be in; `None`: any that the daemon's options allow.
        folder: Option<PathBuf>,
    },
}

/// Options of `nbd`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdSpec {
    /// Where the server is.
    pub server: Address,
    /// Which of its exports; `None`: the one without a name.
    pub export: Option<String>,
    /// TLS credentials by id.
    pub tls_creds: Option<String>,
    /// The name in the server's certificate.
    pub tls_hostname: Option<String>,
    /// Name of a metadata context to ask for instead of `base:allocation`.
    pub x_dirty_bitmap: Option<String>,
    /// For so many seconds requests wait for a connection that broke.
    pub reconnect_delay_seconds: Option<u32>,
    /// For so many seconds opening tries again.
    pub open_timeout_seconds: Option<u32>,
    /// How many connections there may be at most, where the server can do with several.
    pub connections: Option<u32>,
}

/// Options of `null-co` and `null-aio`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NullSpec {
    /// Length in bytes; 1 GiB if left out.
    pub size: Option<i64>,
    /// How long each request takes, in nanoseconds.
    pub latency_ns: Option<u64>,
    /// Whether reads fill the buffer with zeroes (else it keeps its content).
    pub read_zeroes: Option<bool>,
}

/// A permission on an edge of the graph. The order is QEMU's, which is also the order of the lock bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Permission {
    /// Reads deliver consistent data.
    ConsistentRead,
    /// Writes.
    Write,
    /// Writes that do not change what a reader sees.
    WriteUnchanged,
    /// Changes of length.
    Resize,
}

/// A job to start.
#[derive(Clone, Debug, PartialEq)]
pub struct JobSpec {
    /// Id; `None` fails with QEMU's text for an empty id.
    pub id: Option<String>,
    /// Finalize without waiting for the client.
    pub auto_finalize: bool,
    /// Vanish without waiting for the client.
    pub auto_dismiss: bool,
    /// What to do.
    pub work: WorkSpec,
}

/// What a job is to do.
#[derive(Clone, Debug, PartialEq)]
pub enum WorkSpec {
    /// `blockdev-backup`.
    Backup(BackupSpec),
    /// `blockdev-mirror`, `drive-mirror`.
    Mirror(MirrorSpec),
    /// `block-commit`.
    Commit(CommitSpec),
    /// `block-stream`.
    Stream(StreamSpec),
    /// `blockdev-create`.
    Create(CreateSpec),
    /// `x-blockdev-amend`.
    Amend(AmendSpec),
}

impl WorkSpec {
    /// The job type this becomes.
    pub const fn job_type(&self) -> JobType {
        match self {
            WorkSpec::Backup(_) => JobType::Backup,
            WorkSpec::Mirror(_) => JobType::Mirror,
            WorkSpec::Commit(_) => JobType::Commit,
            WorkSpec::Stream(_) => JobType::Stream,
            WorkSpec::Create(_) => JobType::Create,
            WorkSpec::Amend(_) => JobType::Amend,
        }
    }
}

/// How much of the source a copy takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncMode {
    /// What the source's own layer holds.
    Top,
    /// Everything.
    Full,
    /// Only what is written from now on.
    None,
    /// What a bitmap says, clearing it.
    Incremental,
    /// What a bitmap says, by `bitmap-mode`.
    Bitmap,
}

/// What a backup does to its bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapMode {
    /// Cleared on success only.
    OnSuccess,
    /// Left alone.
    Never,
    /// Always what is still to be copied.
    Always,
}

/// Arguments of `x-blockdev-amend`. Options left out stay as they are; values are as the client gave them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AmendSpec {
    /// The node whose image it is about.
    pub node: String,
    /// Its driver.
    pub driver: String,
    /// Version 2 of the format, or 3.
    pub version_2: Option<bool>,
    /// Length of the guest's disk in bytes.
    pub size: Option<u64>,
    /// Name of the backing file; an empty one: none.
    pub backing_file: Option<String>,
    /// Name of its format.
    pub backing_fmt: Option<String>,
    /// The data file reads as the guest's disk does.
    pub data_file_raw: Option<bool>,
    /// Let reference counts be written late.
    pub lazy_refcounts: Option<bool>,
    /// Width of a reference count in bits.
    pub refcount_bits: Option<i64>,
    /// Encryption is to be changed.
    pub encrypt: bool,
}

impl AmendSpec {
    /// Whether anything is to be changed. Without, it is a success for any image.
    pub fn changes_something(&self) -> bool {
        let nothing = Self {
            node: self.node.clone(),
            driver: self.driver.clone(),
            ..Self::default()
        };
        *self != nothing
    }
}
