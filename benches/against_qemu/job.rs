//! One job on a fresh daemon, from `blockdev-add` to `concluded`.

use std::time::Instant;

use serde_json::{Value, json};

use crate::Failure;
use crate::case::{Case, Target};
use crate::client::Client;
use crate::daemon::Daemon;
use crate::options::{Contestant, JobKind, Options};
use crate::report::Run;

/// Starts a daemon, opens source and target on it, and runs the job.
///
/// # Errors
/// The daemon refuses, or the job fails.
pub(crate) fn run(
    options: &Options,
    case: &Case,
    target: &Target,
    contestant: &Contestant,
    job: JobKind,
) -> Result<Run, Failure> {
    let daemon = Daemon::start(options, contestant.side, 1)?;
    let mut client = daemon.client()?;
    let read_only = job == JobKind::Backup;
    let source = case
        .source
        .node("source", contestant, case.direct, read_only);
    let opening = Instant::now();
    client.call("blockdev-add", source)?;
    let open_seconds = opening.elapsed().as_secs_f64();
    let mut node = target.image.node("target", contestant, case.direct, false);
    if target.unmap {
        node["discard"] = json!("unmap");
        node["file"]["discard"] = json!("unmap");
    }
    client.call("blockdev-add", node)?;
    daemon.reset_peak()?;
    let (began, cpu) = (Instant::now(), daemon.cpu_seconds()?);
    copy(&mut client, job, target.compress)?;
    let (wall, cpu) = (began.elapsed(), daemon.cpu_seconds()? - cpu);
    let peak_bytes = daemon.peak_bytes()?;
    require_success(&mut client)?;
    for name in ["target", "source"] {
        client.call("blockdev-del", json!({"node-name": name}))?;
    }
    Ok(Run {
        wall_seconds: wall.as_secs_f64(),
        cpu_seconds: cpu,
        peak_bytes,
        open_seconds,
        target_bytes: 0,
        first_byte_seconds: None,
    })
}

/// Starts the job `copy` and returns when it is concluded, a mirror completed as soon as it is ready.
fn copy(client: &mut Client, job: JobKind, compress: bool) -> Result<(), Failure> {
    let mut arguments = json!({"job-id": "copy", "device": "source", "target": "target", "sync": "full",
        "auto-dismiss": false});
    match job {
        JobKind::Backup => {
            if compress {
                arguments["compress"] = json!(true);
            }
            client.call("blockdev-backup", arguments)?
        }
        JobKind::Mirror => {
            client.call("blockdev-mirror", arguments)?;
            let event =
                client.wait_for("ready", |event| is_status(event, &["ready", "concluded"]))?;
            match is_status(&event, &["ready"]) {
                true => client.call("job-complete", json!({"id": "copy"}))?,
                false => return require_success(client),
            }
        }
        _ => return Err(Failure::new("a job of the chain scenarios")),
    };
    client
        .wait_for("concluded", |event| is_status(event, &["concluded"]))
        .map(|_| ())
}

pub(crate) fn is_status(event: &Value, wanted: &[&str]) -> bool {
    event["event"] == "JOB_STATUS_CHANGE"
        && event["data"]["id"] == "copy"
        && wanted
            .iter()
            .any(|status| event["data"]["status"] == *status)
}

pub(crate) fn require_success(client: &mut Client) -> Result<(), Failure> {
    let jobs = client.call("query-jobs", json!({}))?;
    match jobs[0].get("error") {
        None if jobs[0]["status"] == "concluded" => Ok(()),
        _ => Err(Failure::new(format!("the job failed: {jobs}"))),
    }
}
