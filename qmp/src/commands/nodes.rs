//! Commands of nodes.

use std::path::PathBuf;

use blockyard_engine::error::EngineError;
use blockyard_engine::request::{
    Aio, BlkdebugIo, BlkdebugSpec, CbwBitmap, CbwOptions, CbwSpec, CommonOptions, DetectZeroes,
    Discard, DriverSpec, FileSpec, InjectError, NamedBy, NewOverlaySpec, NodeRef, NodeSpec,
    NullSpec, OnOffAuto, Permission, Request, SetState,
};
use serde_json::Value;

use crate::commands::jobs::{ON_CBW_ERRORS, seconds};
use crate::commands::nbd::nbd;
use crate::commands::qcow2::qcow2;
use crate::commands::{Command, call};
use crate::error::QmpError;
use crate::schema::check::{Spelling, check};
use crate::schema::fields::Fields;
use crate::schema::images::{DEVICE_INFO, SNAPSHOT_INFO};
use crate::schema::jobs::CHAIN_LAYER;
use crate::schema::nodes::{
    BY_NAME, CHANGE, CHANGE_BACKING_FILE, GRAPH, INTERNAL_SNAPSHOT, INTERNAL_SNAPSHOT_BY_NAME,
    OPTIONS, QUERY, REOPEN, RESIZE, SET_ACTIVE, SET_IOTHREAD, SNAPSHOT, SNAPSHOT_SYNC,
};
use crate::schema::{EMPTY, Type};
use crate::wire::document::{Document, Json};
use crate::wire::reader::read_text;

pub(super) static COMMANDS: &[Command] = &[
    Command::act("blockdev-add", &OPTIONS, |a| {
        call(Request::BlockdevAdd(node_spec(a)?))
    }),
    Command::act("blockdev-del", &BY_NAME, |mut a| {
        call(Request::BlockdevDel {
            node_name: a.required_text("node-name"),
        })
    }),
    Command::new(
        "query-named-block-nodes",
        &QUERY,
        Type::List(&Type::Object(&DEVICE_INFO)),
        |a| {
            call(Request::QueryNamedBlockNodes {
                flat: a.flag("flat").unwrap_or(false),
            })
        },
    ),
    Command::new(
        "x-debug-query-block-graph",
        &EMPTY,
        Type::Object(&GRAPH),
        |_| call(Request::QueryBlockGraph),
    )
    .unstable(),
    Command::new(
        "x-query-chain",
        &BY_NAME,
        Type::List(&Type::Object(&CHAIN_LAYER)),
        |mut a| {
            call(Request::QueryChain {
                node_name: a.required_text("node-name"),
            })
        },
    )
    .unstable(),
    Command::act("block_resize", &RESIZE, |mut a| {
        call(Request::BlockResize {
            device: a.text("device"),
            node_name: a.text("node-name"),
            size: a.int("size").unwrap_or(0),
        })
    }),
    Command::act(
        "blockdev-snapshot-internal-sync",
        &INTERNAL_SNAPSHOT,
        |mut a| {
            call(Request::CreateInternalSnapshot {
                device: a.required_text("device"),
                name: a.required_text("name"),
            })
        },
    ),
    Command::new(
        "blockdev-snapshot-delete-internal-sync",
        &INTERNAL_SNAPSHOT_BY_NAME,
        Type::Object(&SNAPSHOT_INFO),
        |mut a| {
            call(Request::DeleteInternalSnapshot {
                device: a.required_text("device"),
                id: a.text("id"),
                name: a.text("name"),
            })
        },
    ),
    Command::act("change-backing-file", &CHANGE_BACKING_FILE, |mut a| {
        call(Request::ChangeBackingFile {
            device: a.required_text("device"),
            image_node_name: a.required_text("image-node-name"),
            backing_file: a.required_text("backing-file"),
        })
    }),
    Command::act("blockdev-reopen", &REOPEN, |mut a| {
        let nodes = a.objects("options").into_iter();
        // Whether a name is missing is told together with what else is wrong.
        let nodes = nodes.map(|fields| nested_spec(fields, 1));
        call(Request::BlockdevReopen {
            nodes: nodes.collect::<Result<_, _>>()?,
        })
    }),
    Command::act("blockdev-set-active", &SET_ACTIVE, |mut a| {
        call(Request::SetActive {
            node_name: a.text("node-name"),
            active: a.flag("active").unwrap_or(true),
        })
    }),
    Command::act("blockdev-snapshot", &SNAPSHOT, |mut a| {
        call(Request::BlockdevSnapshot {
            node: a.required_text("node"),
            overlay: a.required_text("overlay"),
        })
    })
    .with_features(&["allow-write-only-overlay"]),
    Command::act("blockdev-snapshot-sync", &SNAPSHOT_SYNC, |mut a| {
        call(Request::NewOverlay(NewOverlaySpec {
            device: a.text("device"),
            node_name: a.text("node-name"),
            filename: a.required_text("snapshot-file"),
            overlay_name: a.text("snapshot-node-name"),
            format: a.text("format").unwrap_or_else(|| "qcow2".to_owned()),
            exists: a.word("mode", &[("existing", ())]).is_some(),
        }))
    }),
    Command::act("x-blockdev-change", &CHANGE, |mut a| {
        call(Request::ChangeChildren {
            parent: a.required_text("parent"),
            child: a.text("child"),
            node: a.text("node"),
        })
    })
    .unstable(),
    Command::act("x-blockdev-set-iothread", &SET_IOTHREAD, |mut a| {
        call(Request::SetIothread {
            node_name: a.required_text("node-name"),
            iothread: a.text("iothread"),
            force: a.flag("force").unwrap_or(false),
        })
    })
    .unstable(),
];

/// Deepest nesting of inline definitions, checked before anything is built.
const DEPTH_MAX: usize = 32;

const PERMISSIONS: &[(&str, Permission)] = &[
    ("consistent-read", Permission::ConsistentRead),
    ("write", Permission::Write),
    ("write-unchanged", Permission::WriteUnchanged),
    ("resize", Permission::Resize),
];

const IO_TYPES: &[(&str, BlkdebugIo)] = &[
    ("read", BlkdebugIo::Read),
    ("write", BlkdebugIo::Write),
    ("write-zeroes", BlkdebugIo::WriteZeroes),
    ("discard", BlkdebugIo::Discard),
    ("flush", BlkdebugIo::Flush),
    ("block-status", BlkdebugIo::BlockStatus),
];

/// Reads a checked node description.
///
/// # Errors
/// When the node has no name, definitions are nested too deep, or a number is outside what the driver can take.
pub fn node_spec(fields: Fields) -> Result<NodeSpec, QmpError> {
    if !fields.has("node-name") {
        let text = "'node-name' must be specified for the root node";
        return Err(QmpError::generic(text));
    }
    nested_spec(fields, 1)
}

/// Reads options of a node that stand in an image, as JSON; `format` is the driver, whatever they name, as in QEMU.
///
/// # Errors
/// As a command with these options.
pub fn node_options_in_image(text: &str, format: Option<&str>) -> Result<NodeSpec, EngineError> {
    let read = || {
        let refused = || QmpError::generic("Invalid JSON object given");
        let document = read_text(text).map_err(|error| QmpError::generic(error.0))?;
        let Value::Object(mut members) = Value::from(document.root()) else {
            return Err(refused());
        };
        if let Some(format) = format {
            members.insert("driver".to_owned(), Value::from(format));
        }
        let document = Document::from(&Value::Object(members));
        let Json::Object(members) = document.root() else {
            return Err(refused());
        };
        let members = check(&OPTIONS, members, Spelling::Json)?;
        nested_spec(Fields::new(members), 1)
    };
    read().map_err(|error| EngineError::generic(error.text))
}

fn nested_spec(mut fields: Fields, depth: usize) -> Result<NodeSpec, QmpError> {
    if depth > DEPTH_MAX {
        let text = format!("Node definitions are nested more than {DEPTH_MAX} deep");
        return Err(QmpError::generic(text));
    }
    let cache = fields.object("cache").unwrap_or_default();
    let common = CommonOptions {
        discard: fields.word(
            "discard",
            &[("ignore", Discard::Ignore), ("unmap", Discard::Unmap)],
        ),
        cache_direct: cache.flag("direct"),
        cache_no_flush: cache.flag("no-flush"),
        active: fields.flag("active"),
        read_only: fields.flag("read-only"),
        auto_read_only: fields.flag("auto-read-only"),
        force_share: fields.flag("force-share"),
        detect_zeroes: fields.word(
            "detect-zeroes",
            &[
                ("off", DetectZeroes::Off),
                ("on", DetectZeroes::On),
                ("unmap", DetectZeroes::Unmap),
            ],
        ),
    };
    let node_name = fields.text("node-name");
    let driver = match fields.required_text("driver").as_str() {
        "file" => DriverSpec::File(file(fields)?),
        "host_device" => DriverSpec::HostDevice(file(fields)?),
        "nbd" => DriverSpec::Nbd(Box::new(nbd(fields)?)),
        "null-co" => DriverSpec::NullCo(null(&fields)),
        "null-aio" => DriverSpec::NullAio(null(&fields)),
        "blkdebug" => DriverSpec::Blkdebug(blkdebug(fields, depth)?),
        "copy-before-write" => {
            DriverSpec::CopyBeforeWrite(Box::new(copy_before_write(fields, depth)?))
        }
        "snapshot-access" => DriverSpec::SnapshotAccess {
            file: reference(&mut fields, "file", depth)?,
        },
        "copy-on-read" => DriverSpec::CopyOnRead {
            bottom: fields.text("bottom"),
            file: reference(&mut fields, "file", depth)?,
        },
        "qcow2" => DriverSpec::Qcow2(Box::new(qcow2(fields, depth)?)),
        "raw" => DriverSpec::Raw {
            offset: length(&fields, "offset")?,
            size: length(&fields, "size")?,
            file: reference(&mut fields, "file", depth)?,
        },
        "throttle" => DriverSpec::Throttle {
            group: fields.required_text("throttle-group"),
            file: reference(&mut fields, "file", depth)?,
        },
        other => {
            let text = format!("Parameter 'driver' does not accept value '{other}'");
            return Err(QmpError::generic(text));
        }
    };
    Ok(NodeSpec {
        node_name,
        common,
        driver,
    })
}

/// Reads a checked reference to a node: its name or its description.
///
/// # Errors
/// As [`node_spec`].
pub(super) fn node_reference(fields: &mut Fields, name: &str) -> Result<NodeRef, QmpError> {
    reference(fields, name, 0)
}

/// Reads a checked reference to a node below one that is nested this deep.
pub(super) fn reference(
    fields: &mut Fields,
    name: &str,
    depth: usize,
) -> Result<NodeRef, QmpError> {
    Ok(match fields.name_or_object(name) {
        Ok(name) => NodeRef::Name(name),
        Err(inline) => NodeRef::Inline(Box::new(nested_spec(inline, depth + 1)?)),
    })
}

/// The same where there may be none; an empty name is an old spelling of that.
pub(super) fn reference_or_null(
    fields: &mut Fields,
    name: &str,
    depth: usize,
) -> Result<Option<NodeRef>, QmpError> {
    if fields.is_null(name) {
        return Ok(None);
    }
    Ok(match reference(fields, name, depth)? {
        NodeRef::Name(name) if name.is_empty() => None,
        node => Some(node),
    })
}

fn file(mut fields: Fields) -> Result<FileSpec, QmpError> {
    if let Some(manager) = fields.text("pr-manager") {
        let text = format!("No persistent reservation manager with id '{manager}'");
        return Err(QmpError::generic(text));
    }
    Ok(FileSpec {
        filename: PathBuf::from(fields.required_text("filename")),
        locking: fields.word(
            "locking",
            &[
                ("auto", OnOffAuto::Auto),
                ("on", OnOffAuto::On),
                ("off", OnOffAuto::Off),
            ],
        ),
        aio: fields.word(
            "aio",
            &[
                ("threads", Aio::Threads),
                ("native", Aio::Native),
                ("io_uring", Aio::IoUring),
            ],
        ),
        exclusive: false,
        named_by: NamedBy::Client,
    })
}

fn null(fields: &Fields) -> NullSpec {
    NullSpec {
        size: fields.int("size"),
        latency_ns: fields.unsigned("latency-ns"),
        read_zeroes: fields.flag("read-zeroes"),
    }
}

fn copy_before_write(mut fields: Fields, depth: usize) -> Result<CbwSpec, QmpError> {
    let bitmap = fields.object("bitmap").map(|mut bitmap| CbwBitmap {
        node: bitmap.required_text("node"),
        name: bitmap.required_text("name"),
    });
    Ok(CbwSpec {
        bitmap,
        options: CbwOptions {
            on_error: fields
                .word("on-cbw-error", ON_CBW_ERRORS)
                .unwrap_or_default(),
            timeout_seconds: seconds(&fields, "cbw-timeout"),
        },
        min_cluster_size: fields.unsigned("min-cluster-size").unwrap_or(0),
        file: reference(&mut fields, "file", depth)?,
        target: reference(&mut fields, "target", depth)?,
    })
}

fn blkdebug(mut fields: Fields, depth: usize) -> Result<BlkdebugSpec, QmpError> {
    // The schema holds these to 32 bits.
    let limit = |name| fields.int(name).and_then(|bytes| i32::try_from(bytes).ok());
    let inject = |mut rule: Fields| InjectError {
        event: rule.required_text("event"),
        state: rule.int("state"),
        iotype: rule.word("iotype", IO_TYPES),
        errno: rule.int("errno"),
        sector: rule.int("sector"),
        once: rule.flag("once"),
        immediately: rule.flag("immediately"),
    };
    let set_state = |mut rule: Fields| SetState {
        event: rule.required_text("event"),
        state: rule.int("state"),
        new_state: rule.int("new_state").unwrap_or(0),
    };
    Ok(BlkdebugSpec {
        align: fields.int("align"),
        max_transfer: limit("max-transfer"),
        opt_write_zero: limit("opt-write-zero"),
        max_write_zero: limit("max-write-zero"),
        opt_discard: limit("opt-discard"),
        max_discard: limit("max-discard"),
        take_child_perms: fields.word_list("take-child-perms", PERMISSIONS),
        unshare_child_perms: fields.word_list("unshare-child-perms", PERMISSIONS),
        config: fields.text("config").map(PathBuf::from),
        inject_error: fields
            .objects("inject-error")
            .into_iter()
            .map(inject)
            .collect(),
        set_state: fields
            .objects("set-state")
            .into_iter()
            .map(set_state)
            .collect(),
        image: reference(&mut fields, "image", depth)?,
    })
}

fn length(fields: &Fields, name: &str) -> Result<Option<u64>, QmpError> {
    let Some(number) = fields.int(name) else {
        return Ok(None);
    };
    let text = || format!("Value '{number}' is out of range for parameter '{name}'");
    let length = u64::try_from(number).map_err(|_| QmpError::generic(text()))?;
    Ok(Some(length))
}

#[cfg(test)]
mod tests {
    use blockyard_engine::request::BLKDEBUG_EVENTS;

    use crate::schema::nodes::BLKDEBUG_EVENT;

    #[test]
    fn schema_and_engine_know_the_same_events() {
        assert_eq!(BLKDEBUG_EVENT.words, BLKDEBUG_EVENTS);
    }
}
