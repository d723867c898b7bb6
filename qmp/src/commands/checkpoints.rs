//! Commands of checkpoints of several disks, which are ours.

use blockyard_engine::request::{CheckpointDiskSpec, CheckpointRequest, CheckpointSpec, Request};

use crate::commands::{Action, Command, call};
use crate::error::QmpError;
use crate::schema::checkpoints::{ABORT, BEGIN, CHECKPOINT, COMMIT};
use crate::schema::fields::Fields;
use crate::schema::{EMPTY, Type};

pub(super) static COMMANDS: &[Command] = &[
    Command::new(
        "x-checkpoint-begin",
        &BEGIN,
        Type::Object(&CHECKPOINT),
        begin,
    )
    .unstable(),
    Command::act("x-checkpoint-commit", &COMMIT, |mut a| {
        ask(CheckpointRequest::Commit {
            id: a.required_text("id"),
            keep_previous: a.flag("keep-previous").unwrap_or(false),
        })
    })
    .unstable(),
    Command::act("x-checkpoint-abort", &ABORT, |mut a| {
        ask(CheckpointRequest::Abort {
            id: a.required_text("id"),
        })
    })
    .unstable(),
    Command::new(
        "x-query-checkpoints",
        &EMPTY,
        Type::List(&Type::Object(&CHECKPOINT)),
        |_| ask(CheckpointRequest::Query),
    )
    .unstable(),
];

fn begin(mut a: Fields) -> Result<Action, QmpError> {
    let disk = |mut disk: Fields| CheckpointDiskSpec {
        node: disk.required_text("node"),
        bitmap: disk.required_text("bitmap"),
        previous: disk.text("previous"),
        granularity_bytes: disk
            .unsigned("granularity")
            .map(|bytes| u32::try_from(bytes).unwrap_or(u32::MAX)),
    };
    ask(CheckpointRequest::Begin(CheckpointSpec {
        id: a.required_text("id"),
        disks: a.objects("disks").into_iter().map(disk).collect(),
        persistent: a.flag("persistent"),
        abort_on_disconnect: a.flag("abort-on-disconnect").unwrap_or(false),
    }))
}

fn ask(request: CheckpointRequest) -> Result<Action, QmpError> {
    call(Request::Checkpoint(request))
}
