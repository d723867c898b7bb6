//! QEMU's tools of version 10.0: found, or the test is skipped aloud; with CI=true their absence is a failure.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// QEMU's tools, and a folder for their files that goes with this value.
pub(crate) struct Oracle {
    folder: tempfile::TempDir,
}

impl Oracle {
    /// `None`: the test has to return.
    pub(crate) fn find() -> Option<Self> {
        let version = Command::new("qemu-img").arg("--version").output();
        let version = version.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        if !version.is_ok_and(|version| version.contains("version 10.0")) {
            let what = "qemu-img 10.0 is missing: install the package qemu-utils of that version";
            assert!(std::env::var("CI").as_deref() != Ok("true"), "{what}");
            eprintln!("SKIPPED: {what}");
            return None;
        }
        Some(Self {
            folder: tempfile::tempdir().expect("a temporary folder"),
        })
    }

    /// Where a file of the folder is.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The bytes of a file of the folder.
    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).expect("readable")
    }

    /// Makes or replaces a file of the folder.
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path(name), bytes).expect("writable");
    }

    /// What a tool does with these arguments in the folder.
    pub(crate) fn run(&self, tool: &str, arguments: &[&str]) -> Output {
        Command::new(tool)
            .args(arguments)
            .current_dir(self.folder.path() as &Path)
            .env("LC_ALL", "C")
            .output()
            .expect("it starts")
    }

    /// What `qemu-img` prints, which must not fail.
    pub(crate) fn qemu_img(&self, arguments: &[&str]) -> String {
        let output = self.run("qemu-img", arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The bytes of a new image with these options, which may name the raw file `base.raw` and the data file `data.raw`.
    pub(crate) fn create(&self, options: &str, more: &[&str]) -> Vec<u8> {
        let mut arguments = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            arguments.extend(["-o", options]);
        }
        arguments.extend(more);
        arguments.extend(["created.qcow2", "64M"]);
        let _ = std::fs::remove_file(self.path("data.raw"));
        self.qemu_img(&arguments);
        self.read("created.qcow2")
    }
}
