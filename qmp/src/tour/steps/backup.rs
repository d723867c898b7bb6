//! A backup that is slowed down, paused, resumed and let go at full speed while it runs.

use serde_json::json;

use crate::control::table;
use crate::size;
use crate::tour::scratch::IMAGE_BYTES;
use crate::tour::stage::{SOURCE, Shown, Stage, Trouble};
use crate::tour::steps::Step;

pub(super) const STEP: Step = Step {
    name: "blockdev-backup",
    about: "a copy as of one moment; its speed is limited, it is paused, resumed and let go",
    run: |stage| Box::pin(run(stage)),
};

/// Bytes per second at first.
const SPEED: u64 = 16 << 20;
/// Where it is paused, in bytes.
const PAUSE_AT: u64 = IMAGE_BYTES / 4;

async fn run(stage: &mut Stage<'_>) -> Result<Shown, Trouble> {
    let copy = stage.target("backup", IMAGE_BYTES).await?;
    let arguments = json!({"job-id": "backup0", "device": SOURCE, "target": "backup", "sync": "full",
        "speed": SPEED, "auto-dismiss": false});
    stage.run("blockdev-backup", arguments).await?;
    stage.say(&format!("limited to {}", table::limit(SPEED)));
    stage
        .until("backup0", |job| job.current >= PAUSE_AT)
        .await?;
    stage.run("job-pause", json!({"id": "backup0"})).await?;
    let paused = stage.until("backup0", |job| job.status == "paused").await?;
    if paused.has_ended() {
        return Err(Trouble::Wrong(
            "the backup ended although it was limited".to_owned(),
        ));
    }
    stage.say(&format!("paused at {}", size::shown(paused.current)));
    stage.linger().await;
    stage
        .run(
            "block-job-set-speed",
            json!({"device": "backup0", "speed": 0}),
        )
        .await?;
    stage.run("job-resume", json!({"id": "backup0"})).await?;
    stage.say("resumed without a limit");
    let job = stage.finish("backup0").await?;
    stage.run("job-dismiss", json!({"id": "backup0"})).await?;
    let verified = stage.verify_copy("backup", copy).await?;
    Ok(Shown {
        bytes: job.current,
        took: job.took(),
        verified,
    })
}
