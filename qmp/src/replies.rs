//! Replies as clients see them.

use blockyard_engine::job::rates::RatesView;
use blockyard_engine::reply::{
    BitmapInfo, BitmapView, BlockJobView, CheckpointView, Compression, Counted, ExportView, Format,
    FormatSpecific, GraphNodeKind, GraphView, ImageView, IoStatus, JobView, LayerView, NodeView,
    PlanView, PropertyValue, Reply, RoomView, Rule, SnapshotInfo, Version3Info,
};
use blockyard_engine::request::{DetectZeroes, Permission};
use serde_json::{Value, json};

/// A reply as the value of `return`.
pub fn value(reply: &Reply) -> Value {
    match reply {
        // Work on images is never asked for over the wire.
        Reply::Done | Reply::Closed { .. } | Reply::Image(_) => json!({}),
        Reply::Jobs(jobs) => jobs.iter().map(job).collect(),
        Reply::BlockJobs(jobs) => jobs.iter().map(block_job).collect(),
        Reply::Nodes(nodes) => nodes.iter().map(node).collect(),
        Reply::Graph(view) => graph(view),
        Reply::Chain(layers) => layers.iter().map(layer).collect(),
        Reply::Plan(view) => plan(view),
        Reply::Snapshot(gone) => snapshot(gone),
        Reply::Exports(exports) => exports.iter().map(export).collect(),
        Reply::Properties(list) => list
            .iter()
            .map(|property| json!({"name": property.name, "type": property.kind}))
            .collect(),
        Reply::Property(value) => property(value),
        Reply::Checkpoint(view) => checkpoint(view),
        Reply::Checkpoints(all) => all.iter().map(checkpoint).collect(),
        Reply::BitmapDigest(digest) => {
            let digits = digest.iter().map(|byte| format!("{byte:02x}"));
            json!({"sha256": digits.collect::<String>()})
        }
    }
}

fn checkpoint(view: &CheckpointView) -> Value {
    let disks = view.disks.iter().map(|disk| {
        let mut shown = json!({
            "node": disk.node,
            "bitmap": disk.bitmap,
            "persistent": disk.persistent,
        });
        for (name, value) in [("previous", &disk.previous), ("changed", &disk.changed)] {
            if let Some(value) = value {
                shown[name] = json!(value);
            }
        }
        shown
    });
    json!({"id": view.id, "disks": disks.collect::<Value>()})
}

/// The value of a property of an object.
fn property(value: &PropertyValue) -> Value {
    let limits = match value {
        PropertyValue::Text(text) => return json!(text),
        PropertyValue::Int(number) => return json!(number),
        PropertyValue::Flag(flag) => return json!(flag),
        PropertyValue::Rules(rules) => return rules.iter().map(rule).collect(),
        PropertyValue::Limits(limits) => limits,
    };
    let mut value = json!({"iops-size": limits.request_bytes.cast_signed()});
    for counted in Counted::ALL {
        let (name, rate) = (counted.name(), limits.rate(counted));
        value[name] = json!(rate.average);
        value[format!("{name}-max")] = json!(rate.burst);
        value[format!("{name}-max-length")] = json!(rate.burst_seconds);
    }
    value
}

fn export(export: &ExportView) -> Value {
    json!({
        "node-name": export.node_name,
        "shutting-down": export.shutting_down,
        "type": "nbd",
        "id": export.id,
    })
}

fn rule(rule: &Rule) -> Value {
    let policy = if rule.allows { "allow" } else { "deny" };
    let mut value = json!({"match": rule.matches, "policy": policy});
    if let Some(format) = rule.format {
        value["format"] = json!(match format {
            Format::Exact => "exact",
            Format::Glob => "glob",
        });
    }
    value
}

/// What a job within a chain would come to.
pub(crate) fn plan(view: &PlanView) -> Value {
    let mut value = json!({
        "layers": view.layers.iter().map(layer).collect::<Value>(),
        "target": layer(&view.target),
        "bytes-to-copy": view.copy_bytes,
        "bytes-to-zero": view.zero_bytes,
    });
    add_room(&mut value, &view.room);
    value
}

/// The room that something takes, and whether it is there.
pub(crate) fn add_room(value: &mut Value, room: &RoomView) {
    value["space-needed"] = json!({
        "data": room.data_bytes,
        "metadata": room.metadata_bytes,
        "bitmaps": room.bitmaps_bytes,
    });
    if let Some(bytes) = room.free_bytes {
        value["space-free"] = json!(bytes);
    }
    if let Some(fits) = room.fits {
        value["fits"] = json!(fits);
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
    if let Some(chain) = &job.chain {
        value["x-chain"] = chain.iter().map(layer).collect();
    }
    put_rates(&mut value, job.rates.as_ref());
    value
}

fn put_rates(value: &mut Value, rates: Option<&RatesView>) {
    if let Some(rates) = rates {
        value["x-dirty-bytes"] = json!(rates.dirty_bytes);
        value["x-dirty-rate"] = json!(rates.dirtied_a_second);
        value["x-copy-rate"] = json!(rates.copied_a_second);
        value["x-converges"] = json!(rates.converges());
    }
}

fn layer(layer: &LayerView) -> Value {
    let mut value = json!({
        "node-name": layer.node_name,
        "driver": layer.driver,
        "filename": layer.filename,
        "read-only": layer.read_only,
    });
    if let Some(name) = &layer.backing_filename {
        value["backing-filename"] = json!(name);
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
    put_rates(&mut value, job.rates.as_ref());
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
    if !node.bitmaps.is_empty() {
        value["dirty-bitmaps"] = node.bitmaps.iter().map(bitmap).collect();
    }
    value
}

fn bitmap(bitmap: &BitmapView) -> Value {
    let mut value = json!({
        "count": bitmap.count_bytes,
        "granularity": bitmap.granularity_bytes,
        "recording": bitmap.recording,
        "busy": bitmap.busy,
        "persistent": bitmap.persistent,
    });
    if let Some(name) = &bitmap.name {
        value["name"] = json!(name);
    }
    if bitmap.inconsistent {
        value["inconsistent"] = json!(true);
    }
    value
}

/// What a node's image is.
pub(crate) fn image(view: &ImageView) -> Value {
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
    for (name, text) in [
        ("backing-filename", &view.backing_filename),
        ("full-backing-filename", &view.full_backing_filename),
        ("backing-filename-format", &view.backing_filename_format),
    ] {
        if let Some(text) = text {
            value[name] = json!(text);
        }
    }
    if !view.snapshots.is_empty() {
        value["snapshots"] = view.snapshots.iter().map(snapshot).collect();
    }
    if let Some(specific) = &view.format_specific {
        value["format-specific"] = format_specific(specific);
    }
    if let Some(backing) = &view.backing_image {
        value["backing-image"] = image(backing);
    }
    value
}

fn snapshot(snapshot: &SnapshotInfo) -> Value {
    const SECOND: u64 = 1_000_000_000;
    let mut value = json!({
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_bytes,
        "date-sec": snapshot.date_seconds,
        "date-nsec": snapshot.date_nanoseconds,
        "vm-clock-sec": snapshot.vm_clock_nanoseconds / SECOND,
        "vm-clock-nsec": snapshot.vm_clock_nanoseconds % SECOND,
    });
    if let Some(count) = snapshot.icount {
        value["icount"] = json!(count);
    }
    value
}

fn format_specific(specific: &FormatSpecific) -> Value {
    let (kind, data) = match specific {
        FormatSpecific::File { extent_size_hint } => {
            let mut data = json!({});
            if let Some(hint) = extent_size_hint {
                data["extent-size-hint"] = json!(hint);
            }
            ("file", data)
        }
        FormatSpecific::Qcow2 {
            refcount_bits,
            compression,
            version_3,
        } => {
            let mut data = json!({
                "compat": if version_3.is_some() { "1.1" } else { "0.10" },
                "compression-type": match compression {
                    Compression::Zlib => "zlib",
                    Compression::Zstd => "zstd",
                },
                "refcount-bits": refcount_bits,
            });
            if let Some(version_3) = version_3 {
                add_version_3(&mut data, version_3);
            }
            ("qcow2", data)
        }
    };
    json!({"type": kind, "data": data})
}

fn add_version_3(data: &mut Value, info: &Version3Info) {
    data["lazy-refcounts"] = json!(info.lazy_refcounts);
    data["corrupt"] = json!(info.corrupt);
    data["extended-l2"] = json!(info.extended_l2);
    if let Some(name) = &info.data_file {
        data["data-file"] = json!(name);
    }
    if let Some(is_raw) = info.data_file_raw {
        data["data-file-raw"] = json!(is_raw);
    }
    if !info.bitmaps.is_empty() {
        let bitmap = |bitmap: &BitmapInfo| {
            let flags = [("in-use", bitmap.in_use), ("auto", bitmap.auto)];
            let set = flags.iter().filter(|(_, set)| *set);
            let flags: Vec<&str> = set.map(|(name, _)| *name).collect();
            json!({"name": bitmap.name, "granularity": bitmap.granularity_bytes, "flags": flags})
        };
        data["bitmaps"] = info.bitmaps.iter().map(bitmap).collect();
    }
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
