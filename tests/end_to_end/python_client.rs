//! Python's `qemu.qmp`, the client that management tools and QEMU's own scripts use, against our daemon.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::daemon::Daemon;
use crate::oracle::{data_file, hole_file};
use crate::tools;

#[test]
pub(crate) fn a_management_tool_in_python() {
    let Some(python) = tools::python_with_qmp() else {
        return;
    };
    let daemon = Daemon::start();
    data_file(&daemon.path("s.raw"), 4 << 20);
    hole_file(&daemon.path("t.raw"), 4 << 20);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/end_to_end/qmp_client.py");
    let output = Command::new(python)
        .arg(script)
        .arg(daemon.socket())
        .arg(daemon.folder.path())
        .stdin(Stdio::null())
        .output()
        .expect("python runs");
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{printed}{errors}");
    let steps: Vec<&str> = printed.lines().collect();
    assert_eq!(
        steps,
        [
            "negotiated",
            "backup done",
            "mirror done",
            "errors understood",
            "reconnected",
            "ended"
        ]
    );
    let read = |name| std::fs::read(daemon.path(name)).expect("read");
    assert!(read("s.raw") == read("t.raw"), "the copy differs");
    assert!(daemon.wait().success());
}
