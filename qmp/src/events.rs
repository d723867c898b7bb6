//! Events as clients see them.

use std::time::UNIX_EPOCH;

use blockyard_engine::event::{BlockJobFigures, Event, EventKind};
use blockyard_engine::job::error_policy::{ErrorAction, Side};
use serde_json::{Value, json};

/// An event as a message.
pub fn message(event: &Event) -> Value {
    let (name, data) = content(&event.kind);
    let since = event.time.duration_since(UNIX_EPOCH).unwrap_or_default();
    json!({
        "timestamp": {"seconds": since.as_secs(), "microseconds": since.subsec_micros()},
        "event": name,
        "data": data,
    })
}

fn content(kind: &EventKind) -> (&'static str, Value) {
    match kind {
        EventKind::JobStatusChange { id, status } => (
            "JOB_STATUS_CHANGE",
            json!({"id": id, "status": status.name()}),
        ),
        EventKind::BlockJobCompleted { job, error } => {
            let mut data = figures(job);
            if let Some(error) = error {
                data["error"] = json!(error);
            }
            ("BLOCK_JOB_COMPLETED", data)
        }
        EventKind::BlockJobCancelled(job) => ("BLOCK_JOB_CANCELLED", figures(job)),
        EventKind::BlockJobReady(job) => ("BLOCK_JOB_READY", figures(job)),
        EventKind::BlockJobPending { job_type, id } => (
            "BLOCK_JOB_PENDING",
            json!({"type": job_type.name(), "id": id}),
        ),
        EventKind::BlockJobError { id, side, action } => {
            let operation = match side {
                Side::Source => "read",
                Side::Target => "write",
            };
            let action = match action {
                ErrorAction::Report => "report",
                ErrorAction::Ignore => "ignore",
                ErrorAction::Stop => "stop",
            };
            let data = json!({"device": id, "operation": operation, "action": action});
            ("BLOCK_JOB_ERROR", data)
        }
        EventKind::BlockExportDeleted { id } => ("BLOCK_EXPORT_DELETED", json!({"id": id})),
        EventKind::BlockImageCorrupted {
            node_name,
            message,
            offset,
            size,
            fatal,
        } => {
            let mut data = json!({
                "device": "",
                "node-name": node_name,
                "msg": message,
                "fatal": fatal,
            });
            if let Some(offset) = offset {
                data["offset"] = json!(offset);
            }
            if let Some(size) = size {
                data["size"] = json!(size);
            }
            ("BLOCK_IMAGE_CORRUPTED", data)
        }
    }
}

fn figures(job: &BlockJobFigures) -> Value {
    json!({
        "type": job.job_type.name(),
        "device": job.id,
        "len": job.total_bytes,
        "offset": job.current_bytes,
        "speed": job.speed,
    })
}
