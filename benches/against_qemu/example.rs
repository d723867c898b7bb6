//! Programs of this repository that are measured without the daemon: examples of its packages.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Failure;
use crate::process::run;

/// An example of a package as it is now, built if need be.
///
/// # Errors
/// What cargo says.
pub(crate) fn built(package: &str, name: &str) -> Result<PathBuf, Failure> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    let mut build = Command::new(env!("CARGO"));
    build.args([
        "build",
        "--release",
        "--quiet",
        "-p",
        package,
        "--example",
        name,
    ]);
    run(build.arg("--manifest-path").arg(manifest))?;
    Ok(Path::new(env!("CARGO_BIN_EXE_blockyard"))
        .with_file_name("examples")
        .join(name))
}
