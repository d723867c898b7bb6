//! A mirror: it copies, stays in step with its source, and ends when it is told to.

use serde_json::json;

use crate::tour::scratch::IMAGE_BYTES;
use crate::tour::stage::{SOURCE, Shown, Stage, Trouble};
use crate::tour::steps::Step;

pub(super) const STEP: Step = Step {
    name: "blockdev-mirror",
    about: "a copy that follows its source until it is completed",
    run: |stage| Box::pin(run(stage)),
};

async fn run(stage: &mut Stage<'_>) -> Result<Shown, Trouble> {
    let copy = stage.target("mirror", IMAGE_BYTES).await?;
    let arguments = json!({"job-id": "mirror0", "device": SOURCE, "target": "mirror", "sync": "full",
        "auto-dismiss": false});
    stage.run("blockdev-mirror", arguments).await?;
    let ready = stage.until("mirror0", |job| job.status == "ready").await?;
    if ready.has_ended() {
        return Err(Trouble::Wrong(
            "the mirror ended before it was told to".to_owned(),
        ));
    }
    stage.say("ready: source and target are the same, and would be kept so");
    stage.run("job-complete", json!({"id": "mirror0"})).await?;
    let job = stage.finish("mirror0").await?;
    stage.run("job-dismiss", json!({"id": "mirror0"})).await?;
    let verified = stage.verify_copy("mirror", copy).await?;
    Ok(Shown {
        bytes: job.current,
        took: job.took(),
        verified,
    })
}
