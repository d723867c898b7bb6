//! The daemon where io_uring is forbidden, as in containers: it says so once, and everything works by threads.

use serde_json::json;

use crate::daemon::Daemon;
use crate::oracle::{data_file, hole_file};
use crate::{flows, lifetimes, nodes, python_client};

/// Runs a test on a thread that may not use io_uring; a filter is inherited by the processes that the thread starts.
fn forbidden(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        forbid_io_uring();
        test();
    });
    thread.join().expect("what works with a ring works without");
}

fn forbid_io_uring() {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
    const IO_URING_SETUP: i64 = 425;
    const EPERM: u32 = 1;
    let arch = std::env::consts::ARCH.try_into().expect("a known machine");
    let rules = [(IO_URING_SETUP, vec![])].into_iter().collect();
    let refuse = SeccompAction::Errno(EPERM);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch).expect("a filter");
    let program: BpfProgram = filter.try_into().expect("compiles");
    seccompiler::apply_filter(&program).expect("installed");
}

fn rings(daemon: &Daemon) -> usize {
    let descriptors = daemon.descriptors();
    let rings = descriptors.iter().filter(|name| name.contains("io_uring"));
    rings.count()
}

#[test]
fn it_says_so_once_and_copies() {
    forbidden(|| {
        let daemon = Daemon::start_logging();
        assert_eq!(rings(&daemon), 0);
        data_file(&daemon.path("s.raw"), 4 << 20);
        hole_file(&daemon.path("t.raw"), 4 << 20);
        let mut client = daemon.client();
        for (name, direct) in [("s", false), ("t", false), ("direct", true)] {
            let filename = if direct {
                "s.raw"
            } else {
                &format!("{name}.raw")
            };
            client.run(
                "blockdev-add",
                json!({"driver": "file", "node-name": name, "filename": filename,
                    "aio": "io_uring", "cache": {"direct": direct}}),
            );
        }
        for (number, source) in ["s", "direct"].into_iter().enumerate() {
            let id = format!("j{number}");
            let job = json!({"job-id": id, "device": source, "target": "t", "sync": "full"});
            client.run("blockdev-backup", job);
            client.wait_for(&id, "null");
            let read = |name| std::fs::read(daemon.path(name)).expect("read");
            assert!(read("s.raw") == read("t.raw"), "the copy differs");
            std::fs::write(daemon.path("t.raw"), vec![1; 4 << 20]).expect("overwritten");
        }
        let log = daemon.path("log");
        client.run("object-add", json!({"qom-type": "iothread", "id": "io0"}));
        let text = std::fs::read_to_string(&log).expect("logged");
        daemon.quit();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 1, "{text}");
        assert!(
            lines[0].contains(" WARN ") && lines[0].contains("io_uring"),
            "{text}"
        );
    });
}

/// The same daemon with nothing forbidden, so that the test above shows the filter's work and not the machine's.
#[test]
fn with_a_ring_it_says_nothing() {
    let daemon = Daemon::start_logging();
    let log = std::fs::read_to_string(daemon.path("log")).expect("logged");
    if rings(&daemon) == 0 {
        // The machine itself forbids it.
        assert_eq!(log.lines().count(), 1, "{log}");
    } else {
        assert_eq!(log, "");
    }
    daemon.quit();
}

#[test]
fn the_flows_are_the_same() {
    forbidden(|| {
        flows::pause_resume_and_cancel_of_a_paused_job();
        flows::mirror_to_ready_change_and_complete();
        flows::created_files();
        flows::nodes_on_files();
        flows::nodes_in_use_by_a_job();
        flows::objects();
        lifetimes::the_daemon_quits();
        lifetimes::progress_counts_the_same();
        nodes::lengths_change();
        nodes::what_a_mirror_pivots();
        nodes::nodes_of_a_concluded_job();
        python_client::a_management_tool_in_python();
    });
}
