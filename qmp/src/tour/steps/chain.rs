//! A chain of three images becomes one: a commit moves data down, a stream brings it up, and what is seen stays the same.

use serde_json::{Value, json};

use crate::tour::scratch::{IMAGE, IMAGE_BYTES};
use crate::tour::stage::{SOURCE, Shown, Stage, Trouble};
use crate::tour::steps::Step;
use crate::tour::steps::qcow2::succeeds;

pub(super) const STEP: Step = Step {
    name: "chain",
    about: "three images on one another become one, by block-commit and block-stream",
    run: |stage| Box::pin(run(stage)),
};

const LAYERS: [&str; 3] = ["base", "mid", "top"];

/// The image that is left.
const TOP_FILE: &str = "top.qcow2";

async fn run(stage: &mut Stage<'_>) -> Result<Shown, Trouble> {
    layer(stage, "base", None).await?;
    layer(stage, "mid", Some("base")).await?;
    job(
        stage,
        "blockdev-backup",
        json!({"job-id": "fill", "device": SOURCE, "target": "mid", "sync": "full"}),
    )
    .await?;
    layer(stage, "top", Some("mid")).await?;
    let commit =
        json!({"job-id": "commit0", "device": "top", "top-node": "mid", "base-node": "base"});
    let down = job(stage, "block-commit", commit).await?;
    stage.say("top stands on base now, which holds what mid did");
    let stream = json!({"job-id": "stream0", "device": "top"});
    let up = job(stage, "block-stream", stream).await?;
    stage.say("top stands on nothing now");
    for name in LAYERS.iter().rev() {
        for node in [(*name).to_owned(), format!("{name}-file")] {
            stage
                .run("blockdev-del", json!({"node-name": node}))
                .await?;
        }
    }
    for arguments in [
        &["compare", "-F", "qcow2", IMAGE, TOP_FILE][..],
        &["check", TOP_FILE],
    ] {
        stage.say(&format!("$ blockyard {}", arguments.join(" ")));
        let folder = stage.scratch.folder().to_owned();
        stage.check(move || succeeds(arguments, &folder)).await?;
    }
    let took = down.1.zip(up.1).map(|(down, up)| down + up);
    Ok(Shown {
        bytes: down.0.saturating_add(up.0),
        took,
        verified: "the same disk in the top image alone, check finds nothing".to_owned(),
    })
}

/// Makes an image on another one, and opens it.
async fn layer(stage: &mut Stage<'_>, name: &str, below: Option<&str>) -> Result<(), Trouble> {
    let (filename, file) = (format!("{name}.qcow2"), format!("{name}-file"));
    stage
        .create(json!({"driver": "file", "filename": filename, "size": 0}))
        .await?;
    let node = json!({"driver": "file", "node-name": file, "filename": filename});
    stage.run("blockdev-add", node).await?;
    let mut image = json!({"driver": "qcow2", "file": file, "size": IMAGE_BYTES});
    let mut node = json!({"driver": "qcow2", "node-name": name, "file": file});
    if let Some(below) = below {
        image["backing-file"] = json!(format!("{below}.qcow2"));
        image["backing-fmt"] = json!("qcow2");
        node["backing"] = json!(below);
    }
    stage.create(image).await?;
    stage.run("blockdev-add", node).await?;
    Ok(())
}

/// Runs a job to its end. The bytes that it dealt with, and how long that took.
async fn job(
    stage: &mut Stage<'_>,
    command: &str,
    mut arguments: Value,
) -> Result<(u64, Option<std::time::Duration>), Trouble> {
    let id = arguments["job-id"].as_str().unwrap_or_default().to_owned();
    arguments["auto-dismiss"] = json!(false);
    stage.run(command, arguments).await?;
    let job = stage.finish(&id).await?;
    stage.run("job-dismiss", json!({"id": id})).await?;
    Ok((job.current, job.took()))
}
