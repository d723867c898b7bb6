//! Opening a `blkdebug` node: its rules, from a file and from the client, and limits that fit each other.

use std::path::PathBuf;

use blockyard_ring::{FileKind, HostFile, OpenMode, file_calls};
use blockyard_storage::error::errno_text;

use crate::data::NodeId;
use crate::error::EngineError;
use crate::graph::Graph;
use crate::graph::add::Site;
use crate::graph::fault_config::{self, FaultConfig};
use crate::graph::filenames::FileName;
use crate::graph::host_files::in_background;
use crate::graph::options::{Inherits, Resolved};
use crate::graph::permissions::{ExtraPermissions, Permissions};
use crate::graph::records::{IMAGE_ROLE, NodeRecord};
use crate::limits::{BLKDEBUG_ALIGN_MAX_BYTES, FAULT_CONFIG_BYTES_MAX};
use crate::node::blkdebug_node::{BlkdebugOptions, SharedFaults};
use crate::node::build::NodePlan;
use crate::node::fault_rules::FaultRules;
use crate::request::BlkdebugSpec;

impl Graph {
    /// Opens a fault filter and, if that is described inline, its child.
    pub(super) async fn open_blkdebug(
        &self,
        name: Option<&str>,
        spec: BlkdebugSpec,
        resolved: Resolved,
        site: Site,
    ) -> Result<NodeId, EngineError> {
        let reserved = self.reserve(name)?;
        let mut config = match &spec.config {
            Some(path) => read_config(path.clone()).await?,
            None => FaultConfig::default(),
        };
        config.inject_error.extend(spec.inject_error.clone());
        config.set_state.extend(spec.set_state.clone());
        let rules = FaultRules::new(&config.inject_error, config.set_state);
        let rules = rules.map_err(|(name, value)| out_of_range(name, value))?;
        let inherits = Inherits::Filtered(resolved.passing_inactive());
        let image = self.open_below(spec.image.clone(), inherits, site).await?;
        let outcome = async {
            let _held = self.hold_still(&[&image], site.batch).await;
            let child = self.child_now(&image, site.batch)?;
            let alignment = self.facts(child).await?.request_alignment;
            let options = BlkdebugOptions {
                read_only: resolved.read_only,
                discard: resolved.discard,
                detect_zeroes: resolved.detect_zeroes,
                no_flush: resolved.cache_no_flush,
                ..limits(&spec, alignment)?
            };
            let record = NodeRecord {
                extra: ExtraPermissions {
                    taken: Permissions::of(&spec.take_child_perms),
                    unshared: Permissions::of(&spec.unshare_child_perms),
                },
                filename: FileName::of_blkdebug(&self.filename(child), &spec),
                plan: NodePlan::Blkdebug {
                    child,
                    options,
                    faults: SharedFaults::new(rules),
                },
                thread: self.thread_of(child),
                ..reserved.record("blkdebug", resolved, site)?
            };
            let id = self.enlist(record, Some((child, IMAGE_ROLE))).await?;
            self.adopt(id, &image);
            Ok(id)
        }
        .await;
        self.settle(image, outcome).await
    }
}

/// Reads a file of rules, which has to be a regular file of moderate length.
async fn read_config(path: PathBuf) -> Result<FaultConfig, EngineError> {
    let text = in_background(move || {
        let file = HostFile::open(&path, OpenMode::default())?;
        let length = usize::try_from(file.length_bytes()).unwrap_or(usize::MAX);
        let errno = match file.kind() {
            FileKind::Regular if length <= FAULT_CONFIG_BYTES_MAX => None,
            FileKind::Regular => Some(blockyard_storage::error::EFBIG),
            FileKind::Directory => Some(blockyard_storage::error::EISDIR),
            _ => Some(blockyard_storage::error::EINVAL),
        };
        if let Some(errno) = errno {
            return Ok(Err(errno));
        }
        let mut bytes = vec![0; length];
        let read = file_calls::read_whole(file.descriptor(), 0, &mut bytes, 1);
        Ok(read.map(|length| {
            bytes.truncate(length);
            bytes
        }))
    })
    .await;
    let bytes = text.map_err(|error| {
        let reason = error
            .raw_os_error()
            .map_or_else(|| error.to_string(), errno_text);
        EngineError::generic(format!("Could not read blkdebug config file: {reason}"))
    })?;
    let bytes = bytes.map_err(|errno| {
        let reason = errno_text(errno);
        EngineError::generic(format!("Cannot read config file: {reason}"))
    })?;
    fault_config::parse(&String::from_utf8_lossy(&bytes))
}

/// The limits of a node above a child with this alignment, in QEMU's order of checks.
fn limits(spec: &BlkdebugSpec, child_alignment: u32) -> Result<BlkdebugOptions, EngineError> {
    let align = size("align", spec.align)?;
    if align != 0 && (align > BLKDEBUG_ALIGN_MAX_BYTES || !align.is_power_of_two()) {
        return Err(unmet("align", align));
    }
    let unit = if align == 0 {
        u64::from(child_alignment.max(1))
    } else {
        align
    };
    let limit = |name, value: Option<i32>, unit: u64| {
        let value = size(name, value.map(i64::from))?;
        if value >= i32::MAX as u64 || !value.is_multiple_of(unit) {
            return Err(unmet(name, value));
        }
        Ok(value)
    };
    let max_transfer = limit("max-transfer", spec.max_transfer, unit)?;
    let opt_write_zero = limit("opt-write-zero", spec.opt_write_zero, unit)?;
    let max_write_zero = limit(
        "max-write-zero",
        spec.max_write_zero,
        unit.max(opt_write_zero),
    )?;
    let opt_discard = limit("opt-discard", spec.opt_discard, unit)?;
    let max_discard = limit("max-discard", spec.max_discard, unit.max(opt_discard))?;
    // All of them are below 2 GiB.
    let short = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    Ok(BlkdebugOptions {
        align: short(align),
        max_transfer: short(max_transfer),
        opt_write_zero: short(opt_write_zero),
        max_write_zero: short(max_write_zero),
        opt_discard: short(opt_discard),
        max_discard: short(max_discard),
        ..BlkdebugOptions::default()
    })
}

fn size(name: &str, value: Option<i64>) -> Result<u64, EngineError> {
    let value = value.unwrap_or(0);
    u64::try_from(value).map_err(|_| out_of_range(name, value))
}

fn out_of_range(name: &str, value: i64) -> EngineError {
    EngineError::generic(format!(
        "Value '{value}' is out of range for parameter '{name}'"
    ))
}

fn unmet(name: &str, value: u64) -> EngineError {
    EngineError::generic(format!("Cannot meet constraints with {name} {value}"))
}
