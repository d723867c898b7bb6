//! A compressed backup to a new qcow2 image, which is checked and read back by the commands for images.

use std::path::Path;
use std::process::Command;

use serde_json::json;

use crate::error::reason;
use crate::size;
use crate::tour::scratch::{IMAGE, IMAGE_BYTES};
use crate::tour::stage::{SOURCE, Shown, Stage, Trouble};
use crate::tour::steps::Step;

pub(super) const STEP: Step = Step {
    name: "qcow2",
    about: "a new qcow2 image, and a backup to it that is compressed by all cores",
    run: |stage| Box::pin(run(stage)),
};

const COPY: &str = "backup.qcow2";

async fn run(stage: &mut Stage<'_>) -> Result<Shown, Trouble> {
    stage
        .create(json!({"driver": "file", "filename": COPY, "size": 0}))
        .await?;
    let file = json!({"driver": "file", "node-name": "container", "filename": COPY});
    stage.run("blockdev-add", file).await?;
    let image = json!({"driver": "qcow2", "file": "container", "size": IMAGE_BYTES,
        "compression-type": "zstd"});
    stage.create(image).await?;
    let node = json!({"driver": "qcow2", "node-name": "image", "file": "container"});
    stage.run("blockdev-add", node).await?;
    let backup = json!({"job-id": "backup2", "device": SOURCE, "target": "image", "sync": "full",
        "compress": true, "auto-dismiss": false});
    stage.run("blockdev-backup", backup).await?;
    let job = stage.finish("backup2").await?;
    stage.run("job-dismiss", json!({"id": "backup2"})).await?;
    for node in ["image", "container"] {
        stage
            .run("blockdev-del", json!({"node-name": node}))
            .await?;
    }
    for arguments in [
        &["compare", "-F", "qcow2", IMAGE, COPY][..],
        &["check", COPY],
    ] {
        stage.say(&format!("$ blockyard {}", arguments.join(" ")));
        let folder = stage.scratch.folder().to_owned();
        stage.check(move || succeeds(arguments, &folder)).await?;
    }
    let copy = stage.scratch.path(COPY);
    let stored = std::fs::metadata(&copy).map(|found| found.len());
    let stored = stored.map_err(|error| Trouble::Wrong(reason(&error)))?;
    Ok(Shown {
        bytes: job.current,
        took: job.took(),
        verified: format!(
            "the same disk in {}, check finds nothing",
            size::shown(stored)
        ),
    })
}

/// Runs a command of this program, which has to find everything in order.
pub(super) fn succeeds(arguments: &[&str], folder: &Path) -> Result<(), String> {
    let told = |text: &str| format!("blockyard {}: {text}", arguments.join(" "));
    let program = std::env::current_exe().map_err(|error| told(&reason(&error)))?;
    let output = Command::new(program)
        .args(arguments)
        .current_dir(folder)
        .output()
        .map_err(|error| told(&reason(&error)))?;
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    Err(told(String::from_utf8_lossy(&said).trim()))
}
