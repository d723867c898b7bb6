//! Load for the QMP scenarios: clients that ask and time the answers, jobs that keep a daemon busy.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::Failure;
use crate::client::Client;

/// Threads that run until they are told to stop, and what they found.
pub(crate) struct Load<T> {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<T, Failure>>>,
}

impl<T: Send + 'static> Load<T> {
    /// No thread yet.
    pub(crate) fn new() -> Load<T> {
        Load {
            stop: Arc::new(AtomicBool::new(false)),
            threads: Vec::new(),
        }
    }

    /// Starts one more; it has to look at its flag often.
    pub(crate) fn add(
        &mut self,
        work: impl FnOnce(&AtomicBool) -> Result<T, Failure> + Send + 'static,
    ) {
        let stop = Arc::clone(&self.stop);
        self.threads.push(std::thread::spawn(move || work(&stop)));
    }

    /// Stops all and takes what they return.
    ///
    /// # Errors
    /// The first error of any of them.
    pub(crate) fn stop(mut self) -> Result<Vec<T>, Failure> {
        self.stop.store(true, Ordering::Relaxed);
        let ended: Vec<_> = self.threads.drain(..).map(JoinHandle::join).collect();
        ended
            .into_iter()
            .map(|end| end.map_err(|_| Failure::new("a load thread panicked"))?)
            .collect()
    }
}

impl<T> Drop for Load<T> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Asks the commands in turn, with a pause after each answer, until told to stop. Returns the seconds each answer took.
pub(crate) fn ask_in_turn(
    stop: &AtomicBool,
    mut client: Client,
    commands: &[&str],
    pause: Duration,
) -> Result<Vec<f64>, Failure> {
    let mut delays = Vec::new();
    for command in commands.iter().cycle() {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let began = Instant::now();
        client.call(command, json!({}))?;
        delays.push(began.elapsed().as_secs_f64());
        std::thread::sleep(pause);
    }
    Ok(delays)
}

/// Small numbers in an order that only looks random; the same in every run.
#[derive(Debug)]
pub(crate) struct Sequence(u64);

impl Sequence {
    /// Another seed, another order.
    pub(crate) fn new(seed: u64) -> Sequence {
        Sequence(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end.max(1)
    }
}

/// How the jobs of a QMP scenario are to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    /// 32 MiB/s each, reading a file in memory.
    Limited,
    /// As fast as they can, from one null device of 1 TiB to another whose requests take 1 ms (QEMU answers nobody
    /// while it copies between null devices that take no time).
    FlatOut,
}

/// Starts backups that outlast the measurement: from a null device, or from a shared file, each onto a null device.
pub(crate) fn start_jobs(
    client: &mut Client,
    count: usize,
    pace: Pace,
    file: &PathBuf,
) -> Result<(), Failure> {
    for index in 0..count {
        let (source, target, id) = (
            format!("s{index}"),
            format!("t{index}"),
            format!("job{index}"),
        );
        let (size, speed) = match pace {
            Pace::Limited => (8u64 << 30, 32 << 20),
            Pace::FlatOut => (1 << 40, 0),
        };
        let node = match pace {
            Pace::Limited => json!({"driver": "raw", "node-name": source, "read-only": true,
                "file": {"driver": "file", "filename": file, "read-only": true}}),
            Pace::FlatOut => {
                json!({"driver": "null-co", "node-name": source, "size": size, "read-zeroes": false})
            }
        };
        client.call("blockdev-add", node)?;
        client.call(
            "blockdev-add",
            json!({"driver": "null-co", "node-name": target, "size": size}),
        )?;
        let arguments = json!({"job-id": id, "device": source, "target": target, "sync": "full", "speed": speed,
            "auto-dismiss": false});
        client.call("blockdev-backup", arguments)?;
    }
    Ok(())
}

/// How many jobs are still at work.
pub(crate) fn running_jobs(client: &mut Client) -> Result<usize, Failure> {
    let jobs = client.call("query-jobs", json!({}))?;
    let working = |job: &&serde_json::Value| {
        ["running", "paused", "ready"]
            .iter()
            .any(|name| job["status"] == *name)
    };
    Ok(jobs
        .as_array()
        .map_or(0, |jobs| jobs.iter().filter(working).count()))
}
