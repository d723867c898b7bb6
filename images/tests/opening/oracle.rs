//! QEMU's tools of version 10.0: found, or the test is skipped aloud; with CI=true their absence is a failure.

use std::fmt::Write as _;
use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

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

    /// Makes or replaces a file of the folder. Zeroes become holes.
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) {
        const BLOCK_BYTES: usize = 4096;
        let file = std::fs::File::create(self.path(name)).expect("writable");
        file.set_len(bytes.len() as u64).expect("long enough");
        for (index, block) in bytes.chunks(BLOCK_BYTES).enumerate() {
            if block.iter().any(|byte| *byte != 0) {
                let offset = (index * BLOCK_BYTES) as u64;
                file.write_all_at(block, offset).expect("written");
            }
        }
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

    /// What `qemu-img info` says when it cannot open an image; `None`: it can.
    pub(crate) fn info_text(&self, name: &str) -> Option<String> {
        let output = self.run("qemu-img", &["info", "-f", "qcow2", "--output=json", name]);
        if output.status.success() {
            return None;
        }
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        // A warning before it has no end of line.
        let text = said
            .split(&format!("qemu-img: Could not open '{name}': "))
            .nth(1);
        let text = text.unwrap_or_else(|| panic!("{name}: {output:?}"));
        text.lines().next().map(str::to_owned)
    }

    /// What qemu-storage-daemon says when these images cannot be added; `None`: they can. Writing, it may change them.
    pub(crate) fn open_texts(&self, names: &[String], write: Write) -> Vec<Option<String>> {
        let names = names.iter().map(|name| (name.clone(), String::new()));
        self.open_texts_with(&names.collect::<Vec<_>>(), write)
    }

    /// The same with more options, as members of the JSON object with a comma before each.
    pub(crate) fn open_texts_with(
        &self,
        asked: &[(String, String)],
        write: Write,
    ) -> Vec<Option<String>> {
        let mut script = String::from("{\"execute\":\"qmp_capabilities\"}\n");
        for (index, (name, options)) in asked.iter().enumerate() {
            writeln!(
                script,
                r#"{{"execute":"blockdev-add","id":{index},"arguments":{{"driver":"qcow2","node-name":"n","read-only":{},"file":{{"driver":"file","filename":"{name}"}}{options}}}}}
{{"execute":"blockdev-del","arguments":{{"node-name":"n"}}}}"#,
                write == Write::No
            )
            .expect("a string");
        }
        script.push_str("{\"execute\":\"quit\"}\n");
        let mut daemon = Command::new("qemu-storage-daemon")
            .args(["--chardev", "stdio,id=c", "--monitor", "chardev=c"])
            .current_dir(self.folder.path() as &Path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("it starts");
        let mut input = daemon.stdin.take().expect("piped");
        let feeder = std::thread::spawn(move || input.write_all(script.as_bytes()));
        let output = daemon.wait_with_output().expect("it ends");
        feeder.join().expect("no panic").expect("it reads all");
        let replies = String::from_utf8_lossy(&output.stdout).into_owned();
        let reply = |index: usize| {
            let id = format!("\"id\": {index}");
            let of_index = |line: &&str| {
                let rest = line.split(&id).nth(1);
                rest.is_some_and(|rest| rest.starts_with([',', '}']))
            };
            let line = replies.lines().find(of_index).expect("each has a reply");
            let text = line.split("\"desc\": \"").nth(1)?;
            let (text, _) = text.split_once("\"}").expect("the end of the text");
            Some(text.replace("\\\"", "\""))
        };
        (0..asked.len()).map(reply).collect()
    }
}

/// Whether an image is opened for writing.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Write {
    No,
    Yes,
}
