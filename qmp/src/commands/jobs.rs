//! Commands of jobs: verbs, starters and queries.

use std::path::PathBuf;

use blockyard_engine::images::ImageWatcher;
use blockyard_engine::job::error_policy::OnError;
use blockyard_engine::job::verb::VerbCall;
use blockyard_engine::request::{
    AmendSpec, BackupPerf, BackupSpec, BitmapMode, CbwOptions, CommitSpec, CopyMode,
    CreateEncryption, CreatePreallocation, CreateQcow2Spec, CreateSpec, IntegritySpec, JobSpec,
    MirrorSpec, NewTargetSpec, OnCbwError, PlanSpec, PlannedJob, Request, StreamSpec, SyncMode,
    VerbFamily, WorkSpec,
};

use crate::commands::nodes::node_reference;
use crate::commands::{Action, Command, call};
use crate::error::QmpError;
use crate::schema::fields::Fields;
use crate::schema::jobs::{
    AMEND, BACKUP, BLOCK_JOB_INFO, BY_DEVICE, BY_ID, CANCEL, CHANGE, COMMIT, CREATE, DRIVE_BACKUP,
    DRIVE_MIRROR, JOB_INFO, MIRROR, PLAN, PLAN_INFO, SET_SPEED, STREAM,
};
use crate::schema::{EMPTY, Type};

pub(super) static COMMANDS: &[Command] = &[
    Command::new(
        "query-jobs",
        &EMPTY,
        Type::List(&Type::Object(&JOB_INFO)),
        |_| call(Request::QueryJobs),
    ),
    Command::act("job-pause", &BY_ID, |a| job(a, VerbCall::Pause)),
    Command::act("job-resume", &BY_ID, |a| job(a, VerbCall::Resume)),
    Command::act("job-cancel", &BY_ID, |a| {
        job(a, VerbCall::Cancel { force: true })
    }),
    Command::act("job-complete", &BY_ID, |a| job(a, VerbCall::Complete)),
    Command::act("job-finalize", &BY_ID, |a| job(a, VerbCall::Finalize)),
    Command::act("job-dismiss", &BY_ID, |a| job(a, VerbCall::Dismiss)),
    Command::new(
        "query-block-jobs",
        &EMPTY,
        Type::List(&Type::Object(&BLOCK_JOB_INFO)),
        |_| call(Request::QueryBlockJobs),
    ),
    Command::act("block-job-pause", &BY_DEVICE, |a| {
        block_job(a, "device", VerbCall::Pause)
    }),
    Command::act("block-job-resume", &BY_DEVICE, |a| {
        block_job(a, "device", VerbCall::Resume)
    }),
    Command::act("block-job-complete", &BY_DEVICE, |a| {
        block_job(a, "device", VerbCall::Complete)
    }),
    Command::act("block-job-finalize", &BY_ID, |a| {
        block_job(a, "id", VerbCall::Finalize)
    }),
    Command::act("block-job-dismiss", &BY_ID, |a| {
        block_job(a, "id", VerbCall::Dismiss)
    }),
    Command::act("block-job-cancel", &CANCEL, |a| {
        let force = a.flag("force").unwrap_or(false);
        block_job(a, "device", VerbCall::Cancel { force })
    }),
    Command::act("block-job-set-speed", &SET_SPEED, |a| {
        let speed = a.int("speed").unwrap_or(0);
        block_job(a, "device", VerbCall::SetSpeed { speed })
    }),
    Command::act("block-job-change", &CHANGE, |a| {
        let copy_mode = a.word("copy-mode", COPY_MODES);
        block_job(a, "id", VerbCall::Change { copy_mode })
    }),
    Command::act("blockdev-backup", &BACKUP, backup),
    Command::act("drive-backup", &DRIVE_BACKUP, drive_backup).with_features(&["deprecated"]),
    Command::act("blockdev-mirror", &MIRROR, mirror),
    Command::act("drive-mirror", &DRIVE_MIRROR, drive_mirror),
    Command::act("block-commit", &COMMIT, commit),
    Command::act("block-stream", &STREAM, stream),
    Command::new("x-plan", &PLAN, Type::Object(&PLAN_INFO), plan).unstable(),
    Command::act("blockdev-create", &CREATE, create),
    Command::act("x-blockdev-amend", &AMEND, amend).unstable(),
];

const COPY_MODES: &[(&str, CopyMode)] = &[
    ("background", CopyMode::Background),
    ("write-blocking", CopyMode::WriteBlocking),
];

const SYNC_MODES: &[(&str, SyncMode)] = &[
    ("top", SyncMode::Top),
    ("full", SyncMode::Full),
    ("none", SyncMode::None),
    ("incremental", SyncMode::Incremental),
    ("bitmap", SyncMode::Bitmap),
];

const BITMAP_MODES: &[(&str, BitmapMode)] = &[
    ("on-success", BitmapMode::OnSuccess),
    ("never", BitmapMode::Never),
    ("always", BitmapMode::Always),
];

const ON_ERROR: &[(&str, OnError)] = &[
    ("report", OnError::Report),
    ("ignore", OnError::Ignore),
    ("enospc", OnError::Enospc),
    ("stop", OnError::Stop),
    ("auto", OnError::Auto),
];

pub(super) const ON_CBW_ERRORS: &[(&str, OnCbwError)] = &[
    ("break-guest-write", OnCbwError::BreakGuestWrite),
    ("break-snapshot", OnCbwError::BreakSnapshot),
];

const PREALLOCATIONS: &[(&str, CreatePreallocation)] = &[
    ("off", CreatePreallocation::Off),
    ("metadata", CreatePreallocation::Metadata),
    ("falloc", CreatePreallocation::Falloc),
    ("full", CreatePreallocation::Full),
];

fn job(mut arguments: Fields, verb: VerbCall) -> Result<Action, QmpError> {
    call(Request::JobVerb {
        family: VerbFamily::Job,
        id: arguments.required_text("id"),
        verb,
    })
}

fn block_job(mut arguments: Fields, id: &str, verb: VerbCall) -> Result<Action, QmpError> {
    call(Request::JobVerb {
        family: VerbFamily::BlockJob,
        id: arguments.required_text(id),
        verb,
    })
}

fn start(arguments: &Fields, id: Option<String>, work: WorkSpec) -> Result<Action, QmpError> {
    call(Request::StartJob(JobSpec {
        id,
        auto_finalize: arguments.flag("auto-finalize").unwrap_or(true),
        auto_dismiss: arguments.flag("auto-dismiss").unwrap_or(true),
        work,
    }))
}

fn on_error(arguments: &Fields, name: &str) -> OnError {
    arguments.word(name, ON_ERROR).unwrap_or_default()
}

/// A number of seconds; 0: none.
pub(super) fn seconds(arguments: &Fields, name: &str) -> u32 {
    let seconds = arguments.unsigned(name).unwrap_or(0);
    // The schema lets no more through.
    u32::try_from(seconds).unwrap_or(u32::MAX)
}

fn sync_mode(arguments: &Fields) -> SyncMode {
    arguments.word("sync", SYNC_MODES).unwrap_or(SyncMode::Full)
}

fn backup(mut arguments: Fields) -> Result<Action, QmpError> {
    let work = BackupSpec {
        target: arguments.required_text("target"),
        ..backup_spec(&mut arguments)
    };
    let id = arguments.text("job-id");
    start(&arguments, id, WorkSpec::Backup(work))
}

fn drive_backup(mut arguments: Fields) -> Result<Action, QmpError> {
    let work = BackupSpec {
        new_target: Some(new_target(&mut arguments)),
        ..backup_spec(&mut arguments)
    };
    let id = arguments.text("job-id");
    start(&arguments, id, WorkSpec::Backup(work))
}

/// What both commands have in common.
fn backup_spec(arguments: &mut Fields) -> BackupSpec {
    let perf = arguments.object("x-perf").unwrap_or_default();
    let defaults = BackupPerf::default();
    BackupSpec {
        device: arguments.required_text("device"),
        sync: sync_mode(arguments),
        speed: arguments.int("speed").unwrap_or(0),
        bitmap: arguments.text("bitmap"),
        bitmap_mode: arguments.word("bitmap-mode", BITMAP_MODES),
        compress: arguments.flag("compress").unwrap_or(false),
        on_source_error: on_error(arguments, "on-source-error"),
        on_target_error: on_error(arguments, "on-target-error"),
        filter_node_name: arguments.text("filter-node-name"),
        discard_source: arguments.flag("discard-source").unwrap_or(false),
        perf: BackupPerf {
            use_copy_range: perf
                .flag("use-copy-range")
                .unwrap_or(defaults.use_copy_range),
            max_workers: perf.int("max-workers").unwrap_or(defaults.max_workers),
            max_chunk: perf.int("max-chunk").unwrap_or(defaults.max_chunk),
            min_cluster_size: perf.unsigned("min-cluster-size").unwrap_or(0),
        },
        cbw: CbwOptions {
            on_error: arguments
                .word("on-cbw-error", ON_CBW_ERRORS)
                .unwrap_or_default(),
            timeout_seconds: seconds(arguments, "x-cbw-timeout"),
        },
        integrity: integrity(arguments),
        ..BackupSpec::default()
    }
}

/// What is done about checksums.
fn integrity(arguments: &mut Fields) -> IntegritySpec {
    IntegritySpec {
        manifest: arguments.text("x-manifest").map(PathBuf::from),
        replaces_manifest: false,
        onto_manifest: arguments.text("x-onto-manifest").map(PathBuf::from),
        verify: arguments.flag("x-verify").unwrap_or(false),
    }
}

/// A target by its file.
fn new_target(arguments: &mut Fields) -> NewTargetSpec {
    NewTargetSpec {
        filename: arguments.required_text("target"),
        node_name: arguments.text("node-name"),
        format: arguments.text("format"),
        exists: arguments.word("mode", &[("existing", ())]).is_some(),
    }
}

fn mirror(mut arguments: Fields) -> Result<Action, QmpError> {
    let work = MirrorSpec {
        target: arguments.required_text("target"),
        target_is_zero: arguments.flag("target-is-zero").unwrap_or(false),
        ..mirror_spec(&mut arguments)
    };
    let id = arguments.text("job-id");
    start(&arguments, id, WorkSpec::Mirror(work))
}

fn drive_mirror(mut arguments: Fields) -> Result<Action, QmpError> {
    let work = MirrorSpec {
        new_target: Some(new_target(&mut arguments)),
        unmap: arguments.flag("unmap").unwrap_or(true),
        ..mirror_spec(&mut arguments)
    };
    let id = arguments.text("job-id");
    start(&arguments, id, WorkSpec::Mirror(work))
}

/// What both commands have in common.
fn mirror_spec(arguments: &mut Fields) -> MirrorSpec {
    let granularity = arguments.unsigned("granularity");
    MirrorSpec {
        device: arguments.required_text("device"),
        replaces: arguments.text("replaces"),
        sync: sync_mode(arguments),
        bitmap: arguments.text("bitmap"),
        bitmap_mode: arguments.word("bitmap-mode", BITMAP_MODES),
        speed: arguments.int("speed").unwrap_or(0),
        granularity: granularity.and_then(|bytes| u32::try_from(bytes).ok()),
        buf_size: arguments.int("buf-size"),
        on_source_error: on_error(arguments, "on-source-error"),
        on_target_error: on_error(arguments, "on-target-error"),
        filter_node_name: arguments.text("filter-node-name"),
        copy_mode: arguments
            .word("copy-mode", COPY_MODES)
            .unwrap_or(CopyMode::Background),
        integrity: integrity(arguments),
        ..MirrorSpec::default()
    }
}

fn commit(mut arguments: Fields) -> Result<Action, QmpError> {
    let work = WorkSpec::Commit(commit_spec(&mut arguments));
    let id = arguments.text("job-id");
    start(&arguments, id, work)
}

fn stream(mut arguments: Fields) -> Result<Action, QmpError> {
    let work = WorkSpec::Stream(stream_spec(&mut arguments));
    let id = arguments.text("job-id");
    start(&arguments, id, work)
}

fn plan(mut arguments: Fields) -> Result<Action, QmpError> {
    let job = match arguments.text("job").as_deref() {
        Some("commit") => PlannedJob::Commit(commit_spec(&mut arguments)),
        _ => PlannedJob::Stream(stream_spec(&mut arguments)),
    };
    call(Request::Plan(PlanSpec {
        job,
        watcher: ImageWatcher::alone(),
    }))
}

fn commit_spec(arguments: &mut Fields) -> CommitSpec {
    CommitSpec {
        device: arguments.required_text("device"),
        base_node: arguments.text("base-node"),
        base: arguments.text("base"),
        top_node: arguments.text("top-node"),
        top: arguments.text("top"),
        backing_file: arguments.text("backing-file"),
        backing_mask_protocol: arguments.flag("backing-mask-protocol").unwrap_or(false),
        speed: arguments.int("speed").unwrap_or(0),
        on_error: on_error(arguments, "on-error"),
        top_is_quiet: false,
        filter_node_name: arguments.text("filter-node-name"),
    }
}

fn stream_spec(arguments: &mut Fields) -> StreamSpec {
    StreamSpec {
        device: arguments.required_text("device"),
        base: arguments.text("base"),
        base_node: arguments.text("base-node"),
        bottom: arguments.text("bottom"),
        backing_file: arguments.text("backing-file"),
        backing_mask_protocol: arguments.flag("backing-mask-protocol").unwrap_or(false),
        speed: arguments.int("speed").unwrap_or(0),
        on_error: on_error(arguments, "on-error"),
        filter_node_name: arguments.text("filter-node-name"),
    }
}

fn create(mut arguments: Fields) -> Result<Action, QmpError> {
    let id = arguments.text("job-id");
    let mut options = arguments.object("options").unwrap_or_default();
    let driver = options.required_text("driver");
    let work = WorkSpec::Create(match driver.as_str() {
        "file" => CreateSpec::File {
            filename: PathBuf::from(options.required_text("filename")),
            size: options.unsigned("size").unwrap_or(0),
            preallocation: options.word("preallocation", PREALLOCATIONS),
            nocow: options.flag("nocow").unwrap_or(false),
            extent_size_hint: options.unsigned("extent-size-hint"),
        },
        "raw" => CreateSpec::Raw {
            size: options.unsigned("size").unwrap_or(0),
            preallocation: options.word("preallocation", PREALLOCATIONS),
            file: node_reference(&mut options, "file")?,
        },
        "qcow2" => CreateSpec::Qcow2(Box::new(create_qcow2(options)?)),
        _ => CreateSpec::Unsupported { driver },
    });
    call(Request::StartJob(JobSpec {
        id,
        auto_finalize: true,
        auto_dismiss: false,
        work,
    }))
}

fn amend(mut arguments: Fields) -> Result<Action, QmpError> {
    let mut options = arguments.object("options").unwrap_or_default();
    let work = WorkSpec::Amend(AmendSpec {
        node: arguments.required_text("node-name"),
        driver: options.required_text("driver"),
        version_2: options.word("version", &[("v2", true), ("v3", false)]),
        size: options.unsigned("size"),
        backing_file: options.text("backing-file"),
        backing_fmt: options.text("backing-fmt"),
        data_file_raw: options.flag("data-file-raw"),
        lazy_refcounts: options.flag("lazy-refcounts"),
        refcount_bits: options.int("refcount-bits"),
        encrypt: options.has("encrypt"),
    });
    call(Request::StartJob(JobSpec {
        id: arguments.text("job-id"),
        auto_finalize: true,
        auto_dismiss: false,
        work,
    }))
}

fn create_qcow2(mut options: Fields) -> Result<CreateQcow2Spec, QmpError> {
    let encrypt = options.object("encrypt");
    let flag = |name| options.flag(name).unwrap_or(false);
    let is = |name, word| options.word(name, &[(word, ())]).is_some();
    Ok(CreateQcow2Spec {
        data_file_raw: flag("data-file-raw"),
        extended_l2: flag("extended-l2"),
        size: options.unsigned("size").unwrap_or(0),
        version_2: is("version", "v2"),
        encrypt: encrypt.map(|mut encrypt| CreateEncryption {
            key_secret: encrypt.text("key-secret"),
        }),
        cluster_size: options.unsigned("cluster-size"),
        preallocation: options.word("preallocation", PREALLOCATIONS),
        lazy_refcounts: flag("lazy-refcounts"),
        refcount_bits: options.int("refcount-bits"),
        zstd: is("compression-type", "zstd"),
        backing_file: options.text("backing-file"),
        backing_fmt: options.text("backing-fmt"),
        data_file: match options.has("data-file") {
            true => Some(node_reference(&mut options, "data-file")?),
            false => None,
        },
        file: node_reference(&mut options, "file")?,
    })
}
