//! The copy scenarios: one job on fresh daemons, sides in turn, each result compared with its source.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use serde_json::{Value, json};

use crate::Failure;
use crate::client::Client;
use crate::daemon::Daemon;
use crate::options::{JobKind, Options, Scenario, Side};
use crate::place::{self, Place};
use crate::report::{CopyResult, Run};

/// How the target is made ready before each run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    /// Written over its whole length once, then overwritten by each run.
    Written,
    /// A new sparse file for each run.
    New,
}

/// One place with a source in it.
struct Case {
    scenario: Scenario,
    place: Place,
    source: PathBuf,
    target: PathBuf,
    size_bytes: u64,
    target_kind: Target,
    direct: bool,
    /// Whether the copy loop is a limit here; where holes or shared extents are left out of the copy it is none.
    limited: bool,
}

/// Runs one scenario with every chosen job.
///
/// # Errors
/// The place cannot be made, a daemon fails, or a result differs from its source.
pub(crate) fn run(options: &Options, scenario: Scenario) -> Result<Vec<CopyResult>, Failure> {
    let case = prepare(options, scenario)?;
    options
        .jobs
        .iter()
        .map(|&job| measure(options, &case, job))
        .collect()
}

fn prepare(options: &Options, scenario: Scenario) -> Result<Case, Failure> {
    let size_bytes = match scenario {
        Scenario::Sparse => 8 << 30,
        _ => options.size_mib << 20,
    };
    let room_bytes = 2 * size_bytes + (512 << 20);
    const EXT4: [&str; 6] = [
        "mkfs.ext4",
        "-q",
        "-F",
        "-E",
        "nodiscard,lazy_itable_init=0,lazy_journal_init=0",
        "-m0",
    ];
    let place = match scenario {
        Scenario::Disk => Place::directory(&options.disk, "a directory on a real disk")?,
        Scenario::Cache => Place::tmpfs(room_bytes)?,
        // QEMU's backup reserves room for holes too.
        Scenario::Sparse => Place::loop_over_tmpfs(&EXT4, size_bytes + (1 << 30))?,
        Scenario::Xfs => Place::loop_over_tmpfs(
            &["mkfs.xfs", "-q", "-f", "-K", "-m", "reflink=1"],
            room_bytes,
        )?,
        // It needs room of its own: metadata twice, and old extents until a transaction ends.
        Scenario::Btrfs => Place::loop_over_tmpfs(
            &["mkfs.btrfs", "-q", "-f", "-K"],
            room_bytes + size_bytes + (1 << 30),
        )?,
        _ => Place::loop_over_tmpfs(&EXT4, room_bytes)?,
    };
    let (source, target) = (place.path("source.img"), place.path("target.img"));
    match scenario {
        Scenario::Sparse => place::fill_sparsely(&source, size_bytes, 64)?,
        _ => place::fill_with_data(&source, size_bytes, 1)?,
    }
    let shares = matches!(scenario, Scenario::Xfs | Scenario::Btrfs);
    let target_kind = if shares || scenario == Scenario::Sparse {
        Target::New
    } else {
        Target::Written
    };
    Ok(Case {
        scenario,
        place,
        source,
        target,
        size_bytes,
        target_kind,
        direct: scenario != Scenario::Cache,
        limited: target_kind == Target::Written,
    })
}

fn measure(options: &Options, case: &Case, job: JobKind) -> Result<CopyResult, Failure> {
    let sides: Vec<Side> = options
        .sides
        .iter()
        .copied()
        .filter(|&side| side != Side::Limit || case.limited)
        .collect();
    let mut result = CopyResult {
        scenario: case.scenario,
        job,
        place: case.place.description().to_owned(),
        bytes: case.size_bytes,
        direct: case.direct,
        runs: sides.iter().map(|&side| (side, Vec::new())).collect(),
    };
    for round in 0..options.rounds {
        for (side, runs) in &mut result.runs {
            make_ready(case, round)?;
            let mut run = match side {
                Side::Limit => copy_loop(options, case)?,
                _ => daemon_job(options, case, *side, job)
                    .map_err(|error| error.about(&format!("{} {}", side.name(), job.name())))?,
            };
            run.target_bytes = place::allocated_bytes(&case.target)?;
            if round == 0 || case.target_kind == Target::New {
                compare(&case.source, &case.target)
                    .map_err(|error| error.about(&format!("{} {}", side.name(), job.name())))?;
            }
            eprintln!(
                "  {} {} {}: {:.3} s, {:.2} CPU s",
                case.scenario.name(),
                job.name(),
                side.name(),
                run.wall_seconds,
                run.cpu_seconds
            );
            runs.push(run);
        }
    }
    Ok(result)
}

/// Brings the target to the same state before every run. In the first round it gets other data, so that the comparison
/// after it proves something.
fn make_ready(case: &Case, round: u32) -> Result<(), Failure> {
    match case.target_kind {
        Target::New => place::make_sparse(&case.target, case.size_bytes)?,
        Target::Written if round == 0 => place::fill_with_data(&case.target, case.size_bytes, 2)?,
        Target::Written => {}
    }
    place::run(Command::new("sync").arg("--file-system").arg(&case.target))
}

fn compare(source: &Path, target: &Path) -> Result<(), Failure> {
    place::run(Command::new("cmp").arg(source).arg(target))
}

fn daemon_job(options: &Options, case: &Case, side: Side, job: JobKind) -> Result<Run, Failure> {
    let daemon = Daemon::start(options, side, 1)?;
    let mut client = daemon.client()?;
    for (name, path, read_only) in [
        ("source", &case.source, true),
        ("target", &case.target, false),
    ] {
        let node = raw_node(
            name,
            path,
            case.direct,
            read_only && job == JobKind::Backup,
            options.aio.as_deref(),
        );
        client.call("blockdev-add", node)?;
    }
    daemon.reset_peak()?;
    let (began, cpu) = (Instant::now(), daemon.cpu_seconds()?);
    run_job(&mut client, job)?;
    let (wall, cpu) = (began.elapsed(), daemon.cpu_seconds()? - cpu);
    let peak_bytes = daemon.peak_bytes()?;
    require_success(&mut client)?;
    Ok(Run {
        wall_seconds: wall.as_secs_f64(),
        cpu_seconds: cpu,
        peak_bytes,
        target_bytes: 0,
    })
}

/// The `blockdev-add` arguments of a raw image over a host file.
pub(crate) fn raw_node(
    name: &str,
    path: &Path,
    direct: bool,
    read_only: bool,
    aio: Option<&str>,
) -> Value {
    let mut file = json!({"driver": "file", "filename": path, "cache": {"direct": direct}});
    if let Some(aio) = aio {
        file["aio"] = json!(aio);
    }
    json!({"driver": "raw", "node-name": name, "read-only": read_only, "cache": {"direct": direct}, "file": file})
}

/// Starts the job `copy` and returns when it is concluded, a mirror completed as soon as it is ready.
fn run_job(client: &mut Client, job: JobKind) -> Result<(), Failure> {
    let arguments = json!({"job-id": "copy", "device": "source", "target": "target", "sync": "full", "auto-dismiss": false});
    match job {
        JobKind::Backup => client.call("blockdev-backup", arguments)?,
        JobKind::Mirror => {
            client.call("blockdev-mirror", arguments)?;
            let event =
                client.wait_for("ready", |event| is_status(event, &["ready", "concluded"]))?;
            match is_status(&event, &["ready"]) {
                true => client.call("job-complete", json!({"id": "copy"}))?,
                false => return require_success(client),
            }
        }
    };
    client
        .wait_for("concluded", |event| is_status(event, &["concluded"]))
        .map(|_| ())
}

fn is_status(event: &Value, wanted: &[&str]) -> bool {
    event["event"] == "JOB_STATUS_CHANGE"
        && event["data"]["id"] == "copy"
        && wanted
            .iter()
            .any(|status| event["data"]["status"] == *status)
}

fn require_success(client: &mut Client) -> Result<(), Failure> {
    let jobs = client.call("query-jobs", json!({}))?;
    match jobs[0].get("error") {
        None if jobs[0]["status"] == "concluded" => Ok(()),
        _ => Err(Failure::new(format!("the job failed: {jobs}"))),
    }
}

fn copy_loop(options: &Options, case: &Case) -> Result<Run, Failure> {
    let mut command = Command::new(copy_loop_program()?);
    command.arg(&case.source).arg(&case.target);
    command.args([
        "--chunk-kib",
        &options.chunk_kib.to_string(),
        "--depth",
        &options.depth.to_string(),
    ]);
    if case.direct {
        command.arg("--direct");
    }
    let output = command
        .output()
        .map_err(|error| Failure::new(format!("{command:?}: {error}")))?;
    let figures: Value = serde_json::from_slice(&output.stdout).map_err(|_| {
        Failure::new(format!(
            "copy loop: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        ))
    })?;
    let number = |name: &str| figures[name].as_f64().unwrap_or_default();
    Ok(Run {
        wall_seconds: number("wall_seconds"),
        cpu_seconds: number("cpu_seconds"),
        peak_bytes: figures["peak_kib"].as_u64().unwrap_or_default() << 10,
        target_bytes: 0,
    })
}

/// The copy loop's program, built if need be: an example of the package that may contain unsafe code.
fn copy_loop_program() -> Result<PathBuf, Failure> {
    let program = Path::new(env!("CARGO_BIN_EXE_blockyard"))
        .with_file_name("examples")
        .join("copy_loop");
    if !program.exists() {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
        let arguments = [
            "build",
            "--release",
            "--quiet",
            "-p",
            "blockyard-ring",
            "--example",
            "copy_loop",
        ];
        place::run(
            Command::new(env!("CARGO"))
                .args(arguments)
                .arg("--manifest-path")
                .arg(manifest),
        )?;
    }
    Ok(program)
}
