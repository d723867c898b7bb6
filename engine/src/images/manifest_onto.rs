//! A manifest of a whole disk of which only a part is read: of the rest, what the manifest of the backup before says is taken over.
//!
//! What may have changed is read in whole blocks, as a digest is of all extents of a line. There is one text for each content, so this
//! comes to the manifest that a full backup would have got, if the bitmap has missed nothing.

use std::path::PathBuf;
use std::rc::Rc;

use blockyard_storage::{ByteRange, Storage};

use crate::data::{CpuPool, HostFiles};
use crate::error::{EngineError, JobError};
use crate::images::verify::{Lines, check_cancelled, is_known_zero, read};
use crate::images::watcher::ImageWatcher;
use crate::manifest::file::ManifestFile;
use crate::manifest::recorder::{TEXT_BYTES, write_text};
use crate::manifest::sums::ExtentSum;
use crate::manifest::text::{Record, Writer};
use crate::manifest::{BLOCK_BYTES, EXTENT_BYTES};
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
    compose(&node, previous, changed, (cpu, file.output()), watcher).await?;
    file.sync().await.map_err(text)?;
    file.publish().await.map_err(text)
}

/// Writes its text.
async fn compose(
    node: &Rc<dyn Node>,
    previous: Rc<dyn Node>,
    changed: DirtyMap,
    (cpu, output): (CpuPool, &dyn Storage),
    watcher: &ImageWatcher,
) -> Result<(), EngineError> {
    // As a whole first, so that nothing is built upon one that is damaged.
    let mut whole = Lines::of(Rc::clone(&previous));
    while whole.next().await?.is_some() {
        check_cancelled(watcher)?;
    }
    let previous_bytes = whole.length_bytes();
    whole.finish()?;
    let disk_bytes = node.facts().length_bytes;
    let mut onto = Onto {
        node,
        changed,
        previous_bytes,
        disk_bytes,
        done: 0,
        writer: Writer::new(disk_bytes),
        cpu,
    };
    let (mut lines, mut text_bytes) = (Lines::of(previous), 0);
    while let Some(record) = lines.next().await? {
        check_cancelled(watcher)?;
        onto.take(&record, watcher).await?;
        if onto.writer.waiting_bytes() >= TEXT_BYTES {
            let more = onto.writer.take();
            text_bytes += write_text(output, text_bytes, &more).await.map_err(text)?;
        }
    }
    lines.finish()?;
    onto.read_the_rest(watcher).await?;
    let rest = onto.writer.finish();
    let written = write_text(output, text_bytes, &rest).await;
    written.map(drop).map_err(text)
}

fn text(error: JobError) -> EngineError {
    EngineError::generic(error.text)
}

struct Onto<'a> {
    node: &'a Rc<dyn Node>,
    changed: DirtyMap,
    previous_bytes: u64,
    disk_bytes: u64,
    /// Up to where the new manifest has been made.
    done: u64,
    writer: Writer,
    cpu: CpuPool,
}

impl Onto<'_> {
    /// Goes on as far as a line goes; what of it has changed is read.
    async fn take(&mut self, record: &Record, watcher: &ImageWatcher) -> Result<(), EngineError> {
        let range = record.range();
        loop {
            let start = range.offset().max(self.done);
            let end = range.end().min(self.disk_bytes);
            if start >= end {
                return Ok(());
            }
            let rest = ByteRange::between(start, end);
            let block = self.first_changed(rest);
            let kept = block.map_or(end, |block| block.offset().max(start));
            if kept > start {
                self.keep(record, ByteRange::between(start, kept));
            }
            if let Some(block) = block {
                self.read_block(block, watcher).await?;
            }
        }
    }

    /// What is taken over: zeroes, or a whole line, whose block has not changed.
    fn keep(&mut self, record: &Record, part: ByteRange) {
        match record {
            Record::Zero(_) => self.writer.zeroes(part),
            Record::Data(data) => self.writer.record(data),
        }
        self.done = part.end();
    }

    /// The first block that `range` touches and that may have changed. Where the disk has got another length, what was said of the
    /// block at its old end is of no use, nor is there anything said of what is behind.
    fn first_changed(&self, range: ByteRange) -> Option<ByteRange> {
        let around = range.align_outward(BLOCK_BYTES);
        let changed = self.changed.run_in(around);
        let changed = changed.map(|run| run.offset().max(around.offset()));
        let is_cut = self.previous_bytes != self.disk_bytes;
        let cut = is_cut.then(|| self.previous_bytes.min(self.disk_bytes));
        let cut = cut.map(|cut| (cut - cut % BLOCK_BYTES).max(around.offset()));
        let first = changed.into_iter().chain(cut).min()?;
        let block = ByteRange::new(first - first % BLOCK_BYTES, BLOCK_BYTES);
        (block.offset() < range.end()).then(|| block.clamp_end(self.disk_bytes))
    }

    async fn read_block(
        &mut self,
        block: ByteRange,
        watcher: &ImageWatcher,
    ) -> Result<(), EngineError> {
        check_cancelled(watcher)?;
        if is_known_zero(self.node, block).await {
            self.writer.zeroes(block);
        } else {
            let buffer = read(self.node, block).await?;
            let work = self.cpu.run(move |_| {
                let extents = buffer.as_slice().chunks(EXTENT_BYTES as usize);
                let sum = |extent: &[u8]| (!is_zero(extent)).then(|| ExtentSum::of(extent, true));
                extents.map(sum).collect::<Vec<_>>()
            });
            let sums = work.await;
            let sums =
                sums.ok_or_else(|| EngineError::generic("Internal error: no checksums (bug)"))?;
            for (extent, sum) in block.pieces(EXTENT_BYTES).zip(sums) {
                match sum {
                    Some(sum) => self.writer.extent(extent, sum),
                    None => self.writer.zeroes(extent),
                }
            }
        }
        self.done = block.end();
        watcher.set_progress(self.done, self.disk_bytes);
        Ok(())
    }

    /// What the one before says nothing of.
    async fn read_the_rest(&mut self, watcher: &ImageWatcher) -> Result<(), EngineError> {
        while self.done < self.disk_bytes {
            let rest = ByteRange::between(self.done, self.disk_bytes);
            let (block, _) = rest.split_at(BLOCK_BYTES - self.done % BLOCK_BYTES);
            self.read_block(block, watcher).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use blockyard_storage::{Buffer, MemoryStorage};
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::images::verify::tests::{block_on, manifest_of, node};

    const EXTENT: usize = EXTENT_BYTES as usize;

    /// What comes of an earlier manifest, where this is said to have changed.
    fn onto(new: &[u8], changed: &DirtyMap, previous: &[u8]) -> Result<String, String> {
        let output = MemoryStorage::new(0);
        let nothing = ByteRange::default();
        let (disk, previous) = (node(new, nothing), node(previous, nothing));
        let with = (CpuPool::on_the_spot(), &output as &dyn Storage);
        let watcher = ImageWatcher::alone();
        let done = block_on(compose(&disk, previous, changed.clone(), with, &watcher));
        done.map_err(|error| error.text)?;
        let length = usize::try_from(output.facts().length_bytes).expect("a length");
        let read = block_on(output.read(0, Buffer::zeroed(length)));
        Ok(String::from_utf8(read.buffer.as_slice().to_vec()).expect("a text"))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// There is one manifest for each content, however it was come by.
        #[test]
        fn it_is_the_manifest_of_the_whole_disk(
            extents in vec(0_u8..3, 1..60),
            changes in vec((any::<prop::sample::Index>(), 0_u8..4), 0..6),
            old_extents in 1_usize..60,
            tail in 0_usize..2,
            granularity in 12_u32..21,
        ) {
            let disk = |extents: &[u8], tail: usize| {
                let bytes = extents.iter().flat_map(|byte| [*byte; EXTENT]);
                bytes.chain([9].repeat(512 * tail)).collect::<Vec<u8>>()
            };
            // It may have got another length.
            let mut before = extents.clone();
            before.resize(old_extents, 1);
            let old = disk(&before, 1 - tail);
            let mut now = extents;
            for (at, byte) in &changes {
                *at.get_mut(&mut now) = *byte;
            }
            let new = disk(&now, tail);
            let mut changed = DirtyMap::exactly(new.len() as u64, 1 << granularity);
            for (at, (one, other)) in now.iter().zip(&before).enumerate() {
                if one != other {
                    changed.mark(ByteRange::new((at * EXTENT) as u64, 1));
                }
            }
            let made = onto(&new, &changed, &manifest_of(&old));
            let expected = String::from_utf8(manifest_of(&new)).expect("a text");
            prop_assert_eq!(made, Ok(expected));
        }
    }

    #[test]
    fn nothing_is_built_upon_a_damaged_one() {
        let disk = vec![1; 3 * EXTENT];
        let changed = DirtyMap::exactly(disk.len() as u64, 4096);
        let mut previous = manifest_of(&disk);
        let place = previous.len() / 2;
        previous[place] ^= 1;
        let refused = onto(&disk, &changed, &previous).expect_err("refused");
        assert!(
            refused.starts_with("The manifest cannot be used"),
            "{refused}"
        );
    }
}
