//! Either daemon as a child process, and what it costs: CPU time and peak memory from /proc.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::Failure;
use crate::cleanup::{Guard, Undo};
use crate::client::Client;
use crate::options::{Options, Side};
use crate::process;

/// A running daemon. Killed when dropped.
#[derive(Debug)]
pub(crate) struct Daemon {
    child: Child,
    sockets: Vec<PathBuf>,
    directory: tempfile::TempDir,
    guard: Guard,
}

impl Daemon {
    /// Starts a daemon with this many QMP sockets and waits until it is ready. That is when its pid file is there: QEMU
    /// listens earlier, but greets twice, or not at all, whoever connects before its monitors are set up.
    ///
    /// # Errors
    /// It is not ready within ten seconds.
    pub(crate) fn start(options: &Options, side: Side, sockets: usize) -> Result<Daemon, Failure> {
        Self::start_with(options, side, sockets, &[])
    }

    /// The same with more arguments.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub(crate) fn start_with(
        options: &Options,
        side: Side,
        sockets: usize,
        more: &[&OsStr],
    ) -> Result<Daemon, Failure> {
        let directory =
            tempfile::tempdir().map_err(|error| Failure::new(format!("scratch: {error}")))?;
        let paths: Vec<PathBuf> = (0..sockets)
            .map(|index| directory.path().join(format!("qmp-{index}")))
            .collect();
        let mut command = match side {
            Side::Qemu => Command::new(&options.qemu),
            Side::Blockyard | Side::Limit => {
                let mut command = Command::new(&options.blockyard);
                command.arg("daemon");
                command
            }
        };
        for (index, path) in paths.iter().enumerate() {
            command.arg("--chardev").arg(format!(
                "socket,id=c{index},path={},server=on,wait=off",
                path.display()
            ));
            command
                .arg("--monitor")
                .arg(format!("chardev=c{index},id=m{index}"));
        }
        let pidfile = directory.path().join("pid");
        command.arg("--pidfile").arg(&pidfile).args(more);
        let log = fs::File::create(directory.path().join("log"))
            .map_err(|error| Failure::new(error.to_string()))?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let child = command
            .spawn()
            .map_err(|error| Failure::new(format!("{command:?}: {error}")))?;
        let guard = Guard::new(Undo::Process(child.id()));
        let mut daemon = Daemon {
            child,
            sockets: paths,
            directory,
            guard,
        };
        daemon.await_ready(&pidfile)?;
        Ok(daemon)
    }

    fn await_ready(&mut self, pidfile: &Path) -> Result<(), Failure> {
        let deadline = Instant::now() + Duration::from_secs(10);
        while fs::read(pidfile).map_or(true, |text| !text.ends_with(b"\n")) {
            let ended = self.child.try_wait().is_ok_and(|status| status.is_some());
            if ended || Instant::now() > deadline {
                let log = fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
                return Err(Failure::new(format!(
                    "the daemon does not start: {}",
                    log.trim()
                )));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// The path of its first socket.
    pub(crate) fn socket(&self) -> &Path {
        &self.sockets[0]
    }

    /// The path of a socket; numbers beyond the last begin again at the first.
    pub(crate) fn socket_for(&self, client: usize) -> &Path {
        &self.sockets[client % self.sockets.len()]
    }

    /// A client on the first socket.
    pub(crate) fn client(&self) -> Result<Client, Failure> {
        Client::connect(self.socket())
    }

    /// Ends it as a client does, and waits for that. A daemon that is killed may hold its images a little longer: the kernel
    /// takes a ring down once its process has gone.
    ///
    /// # Errors
    /// It does not end within half a minute.
    pub(crate) fn quit(mut self, mut client: Client) -> Result<(), Failure> {
        client.call("quit", json!({}))?;
        drop(client);
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            if Instant::now() > deadline {
                return Err(Failure::new("the daemon does not end"));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// User and system time of all its threads so far, in seconds; the kernel's resolution is 10 ms.
    pub(crate) fn cpu_seconds(&self) -> Result<f64, Failure> {
        process::cpu_seconds(self.child.id())
    }

    /// Sets the peak back to what is in memory now.
    pub(crate) fn reset_peak(&self) -> Result<(), Failure> {
        let path = PathBuf::from(format!("/proc/{}/clear_refs", self.child.id()));
        fs::write(&path, "5").map_err(|error| Failure::at(&path, &error))
    }

    /// Most memory in use since the peak was reset, in bytes.
    pub(crate) fn peak_bytes(&self) -> Result<u64, Failure> {
        self.status_bytes("VmHWM:")
    }

    /// Memory in use, in bytes.
    pub(crate) fn resident_bytes(&self) -> Result<u64, Failure> {
        self.status_bytes("VmRSS:")
    }

    fn status_bytes(&self, name: &str) -> Result<u64, Failure> {
        let path = PathBuf::from(format!("/proc/{}/status", self.child.id()));
        let text = fs::read_to_string(&path).map_err(|error| Failure::at(&path, &error))?;
        text.lines()
            .find_map(|line| {
                line.strip_prefix(name)?
                    .trim()
                    .strip_suffix(" kB")?
                    .parse::<u64>()
                    .ok()
            })
            .map(|kib| kib << 10)
            .ok_or_else(|| Failure::new(format!("{}: no {name}", path.display())))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        // Before its number can be given to another process.
        self.guard.disarm();
        let _ = self.child.wait();
    }
}
