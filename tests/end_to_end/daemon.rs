//! Daemons under test: started in a folder of their own, ended with the test.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::channel;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tempfile::TempDir;

use crate::client::{Client, DEADLINE};
use crate::tools;

/// A running daemon and its folder.
pub(crate) struct Daemon {
    process: Process,
    is_oracle: bool,
    /// Its folder, which is also where it runs.
    pub(crate) folder: TempDir,
}

impl Daemon {
    /// Starts ours with a QMP socket in a new folder.
    pub(crate) fn start() -> Self {
        Self::start_with(&[])
    }

    /// The same with further options before the monitor.
    pub(crate) fn start_with(options: &[&str]) -> Self {
        Self::start_in(tempfile::tempdir().expect("a folder"), options)
    }

    /// The same in a folder that is there already.
    pub(crate) fn start_in(folder: TempDir, options: &[&str]) -> Self {
        Self::launch(ours(), folder, options, false)
    }

    /// The same by a command that runs the program that its arguments go on with.
    pub(crate) fn start_inside(mut by: Command, folder: TempDir, options: &[&str]) -> Self {
        by.arg(tools::blockyard()).arg("daemon");
        Self::launch(by, folder, options, false)
    }

    /// Starts ours with what it logs in the file `log` of its folder.
    pub(crate) fn start_logging() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let log = File::create(folder.path().join("log")).expect("created");
        let mut command = ours();
        command.stderr(log);
        Self::launch(command, folder, &[], false)
    }

    /// Starts QEMU's in a new folder in the same way, logging there.
    pub(crate) fn start_oracle_with(options: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let log = File::create(folder.path().join("log")).expect("created");
        let mut command = Command::new("qemu-storage-daemon");
        command.stderr(log);
        Self::launch(command, folder, options, true)
    }

    /// Starts QEMU's in a folder that is there already.
    pub(crate) fn start_oracle_in(folder: TempDir) -> Self {
        Self::launch(Command::new("qemu-storage-daemon"), folder, &[], true)
    }

    fn launch(mut command: Command, folder: TempDir, options: &[&str], is_oracle: bool) -> Self {
        command
            .args(options)
            .args([
                "--chardev",
                "socket,id=qmp,path=qmp.sock,server=on,wait=off",
            ])
            .args(["--monitor", "qmp", "--pidfile", "pid"])
            .current_dir(folder.path())
            .stdin(Stdio::null());
        let daemon = Self {
            process: Process::start(&mut command),
            is_oracle,
            folder,
        };
        // The first reply means that everything has been set up.
        daemon.wait_for_socket();
        daemon
    }

    /// Path of its QMP socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("qmp.sock")
    }

    /// A path in its folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A client that has negotiated.
    pub(crate) fn client(&self) -> Client {
        Client::ready(&self.socket())
    }

    /// Asks it to end by a signal.
    pub(crate) fn terminate(&self) {
        terminate(self.pid());
    }

    /// Waits for its end, which must be a good one. Its folder stays.
    pub(crate) fn ended(self) -> TempDir {
        let status = self.process.wait();
        assert!(status.success(), "{status}");
        self.folder
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Ends it over QMP; it must end well. QEMU's, which may greet a client twice that comes while another one goes, is ended by a
    /// signal.
    pub(crate) fn quit(self) {
        if self.is_oracle {
            self.terminate();
        } else {
            let mut client = self.client();
            client.run("quit", json!({}));
            client.end();
        }
        let status = self.wait();
        assert!(status.success(), "{status}");
    }

    /// Ends ours over QMP; its folder stays.
    pub(crate) fn end(self) -> TempDir {
        let client = self.client();
        self.quit_by(client)
    }

    /// Ends it by a client that is the last one; it must end well. Its folder stays.
    pub(crate) fn quit_by(self, mut client: Client) -> TempDir {
        client.run("quit", json!({}));
        client.end();
        self.ended()
    }

    /// What its descriptors stand for, as the kernel names it.
    pub(crate) fn descriptors(&self) -> Vec<String> {
        let folder = format!("/proc/{}/fd", self.pid());
        let entries = std::fs::read_dir(folder).expect("it runs").flatten();
        entries
            .filter_map(|entry| std::fs::read_link(entry.path()).ok())
            .map(|target| target.display().to_string())
            .collect()
    }

    /// Bytes of memory in use.
    pub(crate) fn resident_bytes(&self) -> usize {
        self.memory_bytes("VmRSS:")
    }

    /// The most that it has ever had in use, in bytes.
    pub(crate) fn peak_resident_bytes(&self) -> usize {
        self.memory_bytes("VmHWM:")
    }

    fn memory_bytes(&self, which: &str) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()));
        let status = status.expect("it runs");
        let mut lines = status.lines();
        let line = lines.find_map(|line| line.strip_prefix(which));
        let line = line.expect("a size").trim().trim_end_matches(" kB");
        let kilobytes: usize = line.parse().expect("a number");
        kilobytes << 10
    }

    /// That one started with [`start_logging`](Self::start_logging) has not noticed any bug of its own.
    pub(crate) fn assert_no_bug(&self) {
        let log = std::fs::read_to_string(self.path("log")).expect("logged");
        let bug = log
            .lines()
            .find(|line| line.contains("panicked") || line.contains("bug)"));
        assert_eq!(bug, None, "{log}");
    }

    /// Waits for its end.
    pub(crate) fn wait(self) -> ExitStatus {
        self.process.wait()
    }

    /// Ends it at once, as a crash would; its folder stays.
    pub(crate) fn kill(self) -> TempDir {
        self.process.kill();
        self.folder
    }

    fn wait_for_socket(&self) {
        wait_until(&self.folder.path().join("pid"));
    }
}

/// Asks a process that runs to end.
pub(crate) fn terminate(pid: u32) {
    let pid = Pid::from_raw(i32::try_from(pid).expect("a pid"));
    kill_process(pid.expect("a pid"), Signal::TERM).expect("it runs");
}

fn ours() -> Command {
    let mut command = Command::new(tools::blockyard());
    command.arg("daemon");
    command
}

/// A process that does not outlive its test.
pub(crate) struct Process(Option<Child>);

impl Process {
    /// Starts it.
    pub(crate) fn start(command: &mut Command) -> Self {
        Self(Some(command.spawn().expect("it starts")))
    }

    /// The process itself.
    pub(crate) fn child(&mut self) -> &mut Child {
        self.0.as_mut().expect("running")
    }

    /// Its id.
    pub(crate) fn id(&self) -> u32 {
        self.0.as_ref().expect("running").id()
    }

    /// Ends it at once, as a crash would.
    pub(crate) fn kill(mut self) {
        let child = self.child();
        child.kill().expect("killed");
        child.wait().expect("ended");
        self.0 = None;
    }

    /// Waits for its end, with the deadline of everything.
    pub(crate) fn wait(mut self) -> ExitStatus {
        let mut child = self.0.take().expect("running");
        let (sender, ended) = channel();
        let id = child.id();
        let waiting = std::thread::spawn(move || {
            // Nobody listens any more once the deadline has passed.
            let _ = sender.send(child.wait());
        });
        match ended.recv_timeout(DEADLINE) {
            Ok(status) => {
                waiting.join().expect("joined");
                status.expect("waited")
            }
            Err(_) => {
                let pid = Pid::from_raw(i32::try_from(id).expect("a pid")).expect("a pid");
                kill_process(pid, Signal::KILL).expect("killed");
                panic!("process {id} did not end within {DEADLINE:?}")
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // The test failed, or does not care.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Waits until a file has appeared and is not empty.
pub(crate) fn wait_until(path: &Path) {
    wait_for_change(path, |path| {
        std::fs::metadata(path).map_or(0, |found| found.len()) > 0
    });
}

/// Waits until a file has appeared.
pub(crate) fn wait_until_exists(path: &Path) {
    wait_for_change(path, Path::exists);
}

/// Waits for changes of a file's folder until the file is as wanted.
fn wait_for_change(path: &Path, done: impl Fn(&Path) -> bool) {
    use rustix::fs::inotify;
    let folder = path.parent().expect("a folder");
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC).expect("inotify");
    let events =
        inotify::WatchFlags::CREATE | inotify::WatchFlags::MODIFY | inotify::WatchFlags::MOVED_TO;
    inotify::add_watch(&watch, folder, events).expect("watched");
    let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
    let started = std::time::Instant::now();
    while !done(path) {
        let left = DEADLINE.checked_sub(started.elapsed());
        let left = left.unwrap_or_else(|| panic!("{} did not appear", path.display()));
        let timeout = rustix::event::Timespec {
            tv_sec: i64::try_from(left.as_secs()).expect("seconds"),
            tv_nsec: 1,
        };
        let mut polled = [rustix::event::PollFd::new(
            &watch,
            rustix::event::PollFlags::IN,
        )];
        if rustix::event::poll(&mut polled, Some(&timeout)).expect("polled") > 0 {
            inotify::Reader::new(&watch, &mut buffer)
                .next()
                .expect("an event");
        }
    }
}
