//! Programs that tests need: found, or skipped aloud; with CI=true their absence is a failure.

use std::path::PathBuf;
use std::process::Command;

/// Where the built program is.
pub(crate) fn blockyard() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_blockyard"))
}

/// Whether a program that a Debian package brings can be run; else the test has to return.
pub(crate) fn have(program: &str, package: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        missing(&format!(
            "{program} is missing: install the package {package}"
        ));
    }
    found
}

/// Whether qemu-storage-daemon is there in the version whose texts are compared.
pub(crate) fn have_oracle() -> bool {
    let version = Command::new("qemu-storage-daemon")
        .arg("--version")
        .output();
    let version = version.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    match version {
        Ok(version) if version.contains("version 10.0") => true,
        _ => {
            missing(
                "qemu-storage-daemon 10.0 is missing: install the package qemu-utils of that version",
            );
            false
        }
    }
}

fn missing(what: &str) {
    assert!(std::env::var("CI").as_deref() != Ok("true"), "{what}");
    eprintln!("SKIPPED: {what}");
}
