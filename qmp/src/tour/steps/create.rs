//! A new image with all of its room taken at once.

use serde_json::json;

use crate::tour::compare;
use crate::tour::scratch::IMAGE_BYTES;
use crate::tour::stage::{Shown, Stage, Trouble};
use crate::tour::steps::Step;

pub(super) const STEP: Step = Step {
    name: "blockdev-create",
    about: "a new image, with its room taken beforehand and real progress",
    run: |stage| Box::pin(run(stage)),
};

async fn run(stage: &mut Stage<'_>) -> Result<Shown, Trouble> {
    let options = json!({"driver": "file", "filename": "new.raw", "size": IMAGE_BYTES,
        "preallocation": "full"});
    stage
        .run(
            "blockdev-create",
            json!({"job-id": "create", "options": options}),
        )
        .await?;
    let job = stage.finish("create").await?;
    stage.run("job-dismiss", json!({"id": "create"})).await?;
    let path = stage.scratch.path("new.raw");
    stage
        .check(move || compare::zeroes(&path, IMAGE_BYTES))
        .await?;
    Ok(Shown {
        bytes: job.current,
        took: job.took(),
        verified: "its length, and every byte zero".to_owned(),
    })
}
