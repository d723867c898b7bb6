//! A manifest of a whole disk of which only a part is read, onto that of the backup before: of a disk that nobody writes to.

use std::path::PathBuf;
use std::rc::Rc;

use blockyard_storage::ByteRange;

use crate::data::{CpuPool, HostFiles};
use crate::error::{EngineError, JobError};
use crate::images::verify::{check_cancelled, is_known_zero, read};
use crate::images::watcher::ImageWatcher;
use crate::manifest::EXTENT_BYTES;
use crate::manifest::file::ManifestFile;
use crate::manifest::onto::{Earlier, Sums, compose};
use crate::manifest::sums::ExtentSum;
use crate::node::Node;
use crate::node::dirty_map::DirtyMap;
use crate::node::zeroes::is_zero;

/// What becomes of which manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestOntoSpec {
    /// Name of the node with the manifest of the backup before.
    pub previous: String,
    /// Name of the bitmap of the disk's node that says what has changed since.
    pub bitmap: String,
    /// Where the new one goes.
    pub path: PathBuf,
    /// Whether something may be there, which it replaces in one step.
    pub replaces: bool,
}

/// Writes the manifest of the disk on `node`, of which `changed` has changed since the one on `previous` was written. It is
/// durable then.
///
/// # Errors
/// When the one before is none, or damaged; when something cannot be read or written; when it was cancelled. Nothing is left behind.
pub(super) async fn run(
    node: Rc<dyn Node>,
    previous: Rc<dyn Node>,
    changed: DirtyMap,
    spec: ManifestOntoSpec,
    (cpu, files): (CpuPool, Rc<dyn HostFiles>),
    watcher: &ImageWatcher,
) -> Result<(), EngineError> {
    let file = ManifestFile::create(&spec.path, spec.replaces, files).await;
    let mut file = file.map_err(text)?;
    // As a whole first, so that nothing is built upon one that is damaged.
    let earlier = Earlier::open(previous).await?;
    let going_on = async || check_cancelled(watcher);
    earlier.check(going_on).await?;
    let disk_bytes = node.facts().length_bytes;
    let sums = async |block: ByteRange| {
        check_cancelled(watcher)?;
        let sums = sums_of(&node, block, &cpu).await?;
        watcher.set_progress(block.end(), disk_bytes);
        Ok(sums)
    };
    compose(&earlier, disk_bytes, changed, sums, file.output()).await?;
    file.sync().await.map_err(text)?;
    file.publish().await.map_err(text)
}

fn text(error: JobError) -> EngineError {
    EngineError::generic(error.text)
}

/// What a block of a disk holds.
async fn sums_of(
    node: &Rc<dyn Node>,
    block: ByteRange,
    cpu: &CpuPool,
) -> Result<Sums, EngineError> {
    if is_known_zero(node, block).await {
        return Ok(Sums::zeroes(block));
    }
    let buffer = read(node, block).await?;
    let work = cpu.run(move |_| {
        let extents = buffer.as_slice().chunks(EXTENT_BYTES as usize);
        let sum = |extent: &[u8]| (!is_zero(extent)).then(|| ExtentSum::of(extent, true));
        Sums(extents.map(sum).collect())
    });
    let sums = work.await;
    sums.ok_or_else(|| EngineError::generic("Internal error: no checksums (bug)"))
}
