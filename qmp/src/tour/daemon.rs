//! [`Daemon`]: the tour's own daemon, a child process that does not outlive the tour however that ends.

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::time::{Instant, sleep};

use crate::client::address::Address;
use crate::client::connection::Client;
use crate::client::transcript::Transcript;
use crate::tour::scratch::Scratch;

/// Its socket, in the tour's folder.
pub const SOCKET: &str = "qmp.sock";
/// What it says, in the tour's folder.
pub const LOG: &str = "daemon.log";
/// Every message, in the tour's folder.
pub const TRANSCRIPT: &str = "transcript.txt";
const PIDFILE: &str = "daemon.pid";

/// How long it may take to be ready, to greet, or to end.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks at a process or file that tells nothing by itself.
const LOOK: Duration = Duration::from_millis(10);

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
}

impl Daemon {
    /// Starts this very program as a daemon in the folder, and connects.
    ///
    /// To be called on the program's first thread: the daemon ends when the thread that started it does.
    ///
    /// # Errors
    /// A text for the user.
    pub async fn start(scratch: &Scratch) -> Result<(Self, Client), String> {
        let child = spawn(scratch).map_err(|error| format!("cannot start the daemon: {error}"))?;
        let mut daemon = Self { child };
        let deadline = Instant::now() + PATIENCE;
        // It writes its process id when everything is set up.
        let ready = || std::fs::metadata(scratch.path(PIDFILE)).is_ok_and(|file| file.len() > 0);
        while !ready() {
            if let Ok(Some(status)) = daemon.child.try_wait() {
                let log = std::fs::read_to_string(scratch.path(LOG)).unwrap_or_default();
                return Err(format!(
                    "the daemon did not start ({status}): {}",
                    log.trim()
                ));
            }
            if Instant::now() > deadline {
                return Err(format!(
                    "the daemon was not ready within {} s",
                    PATIENCE.as_secs()
                ));
            }
            sleep(LOOK).await;
        }
        let transcript = Transcript::create(&scratch.path(TRANSCRIPT))
            .map_err(|error| format!("{TRANSCRIPT}: {error}"))?;
        let address = Address::Unix(scratch.path(SOCKET));
        let client = Client::connect(&address, PATIENCE, Some(transcript)).await;
        Ok((daemon, client.map_err(|error| error.to_string())?))
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the end of a daemon that was told to end.
    ///
    /// # Errors
    /// A text for the user: it did not, or not well.
    pub async fn ended(mut self) -> Result<(), String> {
        match self.wait().await {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(format!("the daemon ended with {status}")),
            None => Err(format!(
                "the daemon did not end within {} s",
                PATIENCE.as_secs()
            )),
        }
    }

    /// Asks it to end, its jobs being cancelled, and makes it when it does not.
    pub async fn stop(mut self) {
        if let Some(pid) = Pid::from_raw(i32::try_from(self.child.id()).unwrap_or(0)) {
            // It may have ended before; its id is kept until it is waited for.
            let _ = kill_process(pid, Signal::TERM);
        }
        self.wait().await;
    }

    async fn wait(&mut self) -> Option<ExitStatus> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Some(status);
            }
            if Instant::now() > deadline {
                return None;
            }
            sleep(LOOK).await;
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Nothing happens to a child that was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(scratch: &Scratch) -> io::Result<Child> {
    Command::new(std::env::current_exe()?)
        .args(["daemon", "--end-with-parent", "--pidfile", PIDFILE])
        .arg("--chardev")
        .arg(format!("socket,id=qmp,path={SOCKET},server=on,wait=off"))
        .args(["--monitor", "qmp"])
        .current_dir(scratch.folder())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(scratch.path(LOG))?)
        // Ctrl-C at the terminal is for the tour, which then ends the daemon.
        .process_group(0)
        .spawn()
}
