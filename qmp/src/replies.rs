//! Replies as clients see them.

use blockyard_engine::reply::{
    BlockJobView, FormatSpecific, GraphNodeKind, GraphView, ImageView, IoStatus, JobView, NodeView,
    Reply,
};
use blockyard_engine::request::{DetectZeroes, Permission};
use serde_json::{Value, json};

/// A reply as the value of `return`.
pub fn value(reply: &Reply) -> Value {
    match reply {
        // Work on images is never asked for over the wire.
        Reply::Done | Reply::Image(_) => json!({}),
        Reply::Jobs(jobs) => jobs.iter().map(job).collect(),
        Reply::BlockJobs(jobs) => jobs.iter().map(block_job).collect(),
        Reply::Nodes(nodes) => nodes.iter().map(node).collect(),
        Reply::Graph(view) => graph(view),
    }
}

fn job(job: &JobView) -> Value {
    let mut value = json!({
        "id": job.id,
        "type": job.job_type.name(),
        "status": job.status.name(),
        "current-progress": job.current_progress,
        "total-progress": job.total_progress,
    });
    if let Some(error) = &job.error {
        value["error"] = json!(error);
    }
    value
}

fn block_job(job: &BlockJobView) -> Value {
    let io_status = match job.io_status {
        IoStatus::Ok => "ok",
        IoStatus::Failed => "failed",
        IoStatus::NoSpace => "nospace",
    };
    let mut value = json!({
        "device": job.id,
        "type": job.job_type.name(),
        "len": job.total_bytes,
        "offset": job.current_bytes,
        "busy": job.busy,
        "paused": job.paused,
        "speed": job.speed,
        "io-status": io_status,
        "ready": job.ready,
        "status": job.status.name(),
        "auto-finalize": job.auto_finalize,
        "auto-dismiss": job.auto_dismiss,
    });
    if let Some(error) = &job.error {
        value["error"] = json!(error);
    }
    if let Some(synced) = job.actively_synced {
        value["actively-synced"] = json!(synced);
    }
    value
}

fn node(node: &NodeView) -> Value {
    let detect_zeroes = match node.detect_zeroes {
        DetectZeroes::Off => "off",
        DetectZeroes::On => "on",
        DetectZeroes::Unmap => "unmap",
    };
    let mut value = json!({
        "node-name": node.node_name,
        "drv": node.driver,
        "file": node.filename,
        "ro": node.read_only,
        "active": node.active,
        "encrypted": false,
        "detect_zeroes": detect_zeroes,
        "backing_file_depth": node.backing_file_depth,
        "write_threshold": 0,
        "image": image(&node.image),
        "cache": {
            "writeback": true,
            "direct": node.cache_direct,
            "no-flush": node.cache_no_flush,
        },
    });
    for limit in ["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"] {
        value[limit] = json!(0);
    }
    if let Some(backing) = &node.backing_file {
        value["backing_file"] = json!(backing);
    }
    value
}

fn image(view: &ImageView) -> Value {
    let mut value = json!({
        "filename": view.filename,
        "format": view.format,
        "virtual-size": view.virtual_size_bytes,
    });
    if let Some(dirty) = view.dirty_flag {
        value["dirty-flag"] = json!(dirty);
    }
    if let Some(size) = view.actual_size_bytes {
        value["actual-size"] = json!(size);
    }
    if let Some(size) = view.cluster_size_bytes {
        value["cluster-size"] = json!(size);
    }
    if let Some(FormatSpecific::File { extent_size_hint }) = &view.format_specific {
        let mut data = json!({});
        if let Some(hint) = extent_size_hint {
            data["extent-size-hint"] = json!(hint);
        }
        value["format-specific"] = json!({"type": "file", "data": data});
    }
    if let Some(backing) = &view.backing_image {
        value["backing-image"] = image(backing);
    }
    value
}

fn graph(view: &GraphView) -> Value {
    let nodes: Vec<Value> = view
        .nodes
        .iter()
        .map(|node| {
            let kind = match node.kind {
                GraphNodeKind::BlockDriver => "block-driver",
                GraphNodeKind::BlockJob => "block-job",
                GraphNodeKind::BlockBackend => "block-backend",
            };
            json!({"id": node.id, "type": kind, "name": node.name})
        })
        .collect();
    let edges: Vec<Value> = view
        .edges
        .iter()
        .map(|edge| {
            json!({
                "parent": edge.parent,
                "child": edge.child,
                "name": edge.name,
                "perm": permissions(&edge.taken),
                "shared-perm": permissions(&edge.shared),
            })
        })
        .collect();
    json!({"nodes": nodes, "edges": edges})
}

fn permissions(list: &[Permission]) -> Vec<&'static str> {
    list.iter()
        .rev()
        .map(|one| match one {
            Permission::ConsistentRead => "consistent-read",
            Permission::Write => "write",
            Permission::WriteUnchanged => "write-unchanged",
            Permission::Resize => "resize",
        })
        .collect()
}
