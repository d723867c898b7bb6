//! What goes wrong says why: a command that is refused, and a failed job that stays to tell its error.

use serde_json::json;

use crate::client::error::CallError;
use crate::tour::scratch::IMAGE_BYTES;
use crate::tour::stage::{SOURCE, Shown, Stage, Trouble};
use crate::tour::steps::Step;

pub(super) const STEP: Step = Step {
    name: "errors",
    about: "a target that is too small, and a job that fails",
    run: |stage| Box::pin(run(stage)),
};

async fn run(stage: &mut Stage<'_>) -> Result<Shown, Trouble> {
    stage.target("small", IMAGE_BYTES / 2).await?;
    let arguments =
        json!({"job-id": "backup1", "device": SOURCE, "target": "small", "sync": "full"});
    match stage.run("blockdev-backup", arguments).await {
        Err(Trouble::Call(CallError::Refused(refusal))) => {
            stage.say(&format!("refused, as it should be: {refusal}"));
        }
        Err(other) => return Err(other),
        Ok(_) => {
            return Err(Trouble::Wrong(
                "a target that is too small was taken".to_owned(),
            ));
        }
    }
    stage
        .run("blockdev-del", json!({"node-name": "small"}))
        .await?;
    let options = json!({"driver": "file", "filename": "missing/new.raw", "size": IMAGE_BYTES});
    stage
        .run(
            "blockdev-create",
            json!({"job-id": "create", "options": options}),
        )
        .await?;
    let failed = stage.until("create", |_| false).await;
    stage.display.forget("create");
    let Err(Trouble::Failed { error, .. }) = failed else {
        return Err(Trouble::Wrong(
            "an image was created in a folder that is not there".to_owned(),
        ));
    };
    stage.say(&format!("failed, as it should: {error}"));
    let jobs = stage.run("query-jobs", json!({})).await?;
    if jobs[0]["error"] != error.as_str() {
        return Err(Trouble::Wrong(format!(
            "the job list does not keep the error: {jobs}"
        )));
    }
    stage.run("job-dismiss", json!({"id": "create"})).await?;
    Ok(Shown {
        bytes: 0,
        took: None,
        verified: "both errors named their reason".to_owned(),
    })
}
