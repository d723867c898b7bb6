//! The scenario `far-nbd`: jobs whose other end is an NBD server, nbdkit, that takes its time for every request. What was written
//! is compared with what should be there.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Failure;
use crate::case::EXT4;
use crate::cleanup::{Guard, Undo};
use crate::daemon::Daemon;
use crate::data;
use crate::image::{Format, Image, runs_in_mixed_order};
use crate::job::{is_status, require_success};
use crate::options::{Contestant, JobKind, Options, Scenario, Side};
use crate::place::Place;
use crate::process::run as run_program;
use crate::report::{CopyResult, Run};

/// Length of the disks in bytes.
const LENGTH_BYTES: u64 = 256 << 20;

/// How long the server takes for a request.
const DELAYS: [&str; 2] = ["10ms", "1ms"];

const JOBS: [JobKind; 4] = [
    JobKind::Commit,
    JobKind::Stream,
    JobKind::Backup,
    JobKind::Mirror,
];

/// The files of all runs.
struct Far<'a> {
    options: &'a Options,
    place: Place,
    /// What is on the disk, as a raw file and as a qcow2 image.
    content: Image,
    full: Image,
    /// What is on the far disk before anything is copied to it.
    before: Image,
}

/// Runs every job at every delay.
///
/// # Errors
/// The place cannot be made, a program or a daemon fails, or a result differs from what should be there.
pub(crate) fn run(options: &Options) -> Result<Vec<CopyResult>, Failure> {
    let place = Place::loop_over_tmpfs(&EXT4, 6 * LENGTH_BYTES)?;
    let image = |name: &str, format| Image {
        path: place.path(name),
        format,
    };
    let content = image("content.img", Format::Raw);
    let full = image("full.qcow2", Format::Qcow2);
    let before = image("before.img", Format::Raw);
    data::fill_with_noise(&content.path, LENGTH_BYTES, 1)?;
    data::fill_with_noise(&before.path, LENGTH_BYTES, 2)?;
    full.create_in_order(LENGTH_BYTES, &content, &runs_in_mixed_order(LENGTH_BYTES))?;
    let far = Far {
        options,
        place,
        content,
        full,
        before,
    };
    let mut results = Vec::new();
    for delay in DELAYS {
        for job in JOBS {
            results.push(far.measure(job, delay)?);
        }
    }
    Ok(results)
}

impl Far<'_> {
    fn measure(&self, job: JobKind, delay: &str) -> Result<CopyResult, Failure> {
        let contestants = self.options.contestants().into_iter();
        let contestants = contestants.filter(|contestant| contestant.side != Side::Limit);
        let moves = match job {
            JobKind::Commit => "full qcow2 -> far base, below an empty top",
            JobKind::Stream => "far base -> empty top",
            _ => "raw -> far target",
        };
        let mut result = CopyResult {
            scenario: Scenario::FarNbd,
            job,
            place: self.place.description().to_owned(),
            what: format!("the far end is nbdkit, {delay} a request; {moves}"),
            bytes: LENGTH_BYTES,
            direct: true,
            runs: contestants
                .map(|contestant| (contestant, Vec::new()))
                .collect(),
        };
        for _ in 0..self.options.rounds {
            for (contestant, runs) in &mut result.runs {
                let name = format!("{} {} {delay}", contestant.name(), job.name());
                let run = self.run_once(contestant, job, delay);
                let run = run.map_err(|error| error.about(&name))?;
                eprintln!(
                    "  far-nbd {name}: {:.3} s, {:.2} CPU s",
                    run.wall_seconds, run.cpu_seconds
                );
                runs.push(run);
            }
        }
        Ok(result)
    }

    fn run_once(&self, contestant: &Contestant, job: JobKind, delay: &str) -> Result<Run, Failure> {
        let server = Server::start(delay)?;
        let top = Image {
            path: self.place.path("top.qcow2"),
            format: Format::Qcow2,
        };
        let mid = Image {
            path: self.place.path("mid.qcow2"),
            format: Format::Qcow2,
        };
        top.create(LENGTH_BYTES, &[])?;
        let first = match job {
            JobKind::Stream => &self.content,
            // The server's memory has to be there: to touch it for the first time would take longer than to copy it.
            _ => &self.before,
        };
        first.copy_to(&server.uri())?;
        if job == JobKind::Commit {
            run_program(Command::new("cp").arg(&self.full.path).arg(&mid.path))?;
            mid.leave_page_cache()?;
        }
        self.content.leave_page_cache()?;
        top.leave_page_cache()?;
        run_program(Command::new("sync").arg("--file-system").arg(&top.path))?;
        let daemon = Daemon::start(self.options, contestant.side, 1)?;
        let mut client = daemon.client()?;
        let mut far = json!({"driver": "nbd", "node-name": "far",
            "server": {"type": "unix", "path": server.socket}});
        if let (Side::Blockyard, Some(connections)) = (contestant.side, self.options.connections) {
            far["x-connections"] = json!(connections);
        }
        let opening = Instant::now();
        client.call("blockdev-add", far)?;
        let open_seconds = opening.elapsed().as_secs_f64();
        let node = |image: &Image, name: &str, backing: &str| {
            let mut node = image.node(name, contestant, true, false);
            node["backing"] = json!(backing);
            node
        };
        let mut arguments = json!({"job-id": "copy", "auto-dismiss": false});
        let command = match job {
            JobKind::Commit => {
                client.call("blockdev-add", node(&mid, "mid", "far"))?;
                client.call("blockdev-add", node(&top, "top", "mid"))?;
                let more = json!({"device": "top", "top-node": "mid", "base-node": "far",
                    "backing-file": server.uri()});
                add(&mut arguments, more);
                "block-commit"
            }
            JobKind::Stream => {
                client.call("blockdev-add", node(&top, "top", "far"))?;
                add(&mut arguments, json!({"device": "top"}));
                "block-stream"
            }
            _ => {
                let content = self.content.node("content", contestant, true, false);
                client.call("blockdev-add", content)?;
                let more = json!({"device": "content", "target": "far", "sync": "full"});
                add(&mut arguments, more);
                match job {
                    JobKind::Backup => "blockdev-backup",
                    _ => "blockdev-mirror",
                }
            }
        };
        daemon.reset_peak()?;
        let (began, cpu) = (Instant::now(), daemon.cpu_seconds()?);
        client.call(command, arguments)?;
        if job == JobKind::Mirror {
            let event =
                client.wait_for("ready", |event| is_status(event, &["ready", "concluded"]))?;
            if is_status(&event, &["ready"]) {
                client.call("job-complete", json!({"id": "copy"}))?;
            }
        }
        client.wait_for("concluded", |event| is_status(event, &["concluded"]))?;
        let (wall, cpu) = (began.elapsed(), daemon.cpu_seconds()? - cpu);
        let peak_bytes = daemon.peak_bytes()?;
        require_success(&mut client)?;
        client.call("job-dismiss", json!({"id": "copy"}))?;
        daemon.quit(client)?;
        match job {
            JobKind::Stream => {
                top.require_sound()?;
                top.require_equal(&self.content)?;
            }
            _ => self.content.require_equal_at(&server.uri())?,
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
}

fn add(arguments: &mut Value, more: Value) {
    if let (Some(arguments), Value::Object(more)) = (arguments.as_object_mut(), more) {
        arguments.extend(more);
    }
}

impl Image {
    /// Copies what is in it to a server's export.
    fn copy_to(&self, uri: &str) -> Result<(), Failure> {
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-n", "-W", "-O", "raw", "-f", self.format.name()]);
        run_program(command.arg(&self.path).arg(uri)).map(|_| ())
    }

    /// Fails unless a server's export reads the same.
    fn require_equal_at(&self, uri: &str) -> Result<(), Failure> {
        let mut command = Command::new("qemu-img");
        command.args(["compare", "-F", "raw", "-f", self.format.name()]);
        run_program(command.arg(&self.path).arg(uri)).map(|_| ())
    }
}

/// An nbdkit with a disk in memory, full of zeroes at first. Killed when dropped.
struct Server {
    child: Child,
    socket: PathBuf,
    guard: Guard,
    _directory: tempfile::TempDir,
}

impl Server {
    fn start(delay: &str) -> Result<Self, Failure> {
        let directory =
            tempfile::tempdir().map_err(|error| Failure::new(format!("scratch: {error}")))?;
        let socket = directory.path().join("nbd");
        let pidfile = directory.path().join("pid");
        let mut command = Command::new("nbdkit");
        command
            .arg("--foreground")
            .arg("--unix")
            .arg(&socket)
            .arg("--pidfile")
            .arg(&pidfile)
            .args(["--filter=delay", "memory"])
            .arg(format!("size={LENGTH_BYTES}"))
            .arg(format!("rdelay={delay}"))
            .arg(format!("wdelay={delay}"));
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| Failure::new(format!("{command:?}: {error}")))?;
        let guard = Guard::new(Undo::Process(child.id()));
        let mut server = Self {
            child,
            socket,
            guard,
            _directory: directory,
        };
        let deadline = Instant::now() + Duration::from_secs(10);
        while !pidfile.exists() {
            let ended = server.child.try_wait().is_ok_and(|ended| ended.is_some());
            if ended || Instant::now() > deadline {
                return Err(Failure::new("nbdkit does not start"));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(server)
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        // Before its number can be given to another process.
        self.guard.disarm();
        let _ = self.child.wait();
    }
}
