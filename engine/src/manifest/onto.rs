//! A manifest of a whole disk of which only a part is read: of the rest, what the manifest of the backup before says is taken over.
//!
//! What may have changed is known in whole blocks, as a digest is of all extents of a line. There is one text for each content, so this
//! comes to the manifest that a full backup would have got, if what is said to have changed is all that has.

use std::rc::Rc;

use blockyard_storage::{ByteRange, Storage};

use crate::error::{EngineError, JobError};
use crate::manifest::lines::Lines;
use crate::manifest::recorder::{TEXT_BYTES, write_text};
use crate::manifest::sums::ExtentSum;
use crate::manifest::text::{Record, Writer};
use crate::manifest::{BLOCK_BYTES, EXTENT_BYTES};
use crate::node::Node;
use crate::node::dirty_map::DirtyMap;

/// What the extents of one block hold, in their order; `None`: zeroes.
pub(crate) struct Sums(pub(crate) Vec<Option<ExtentSum>>);

impl Sums {
    /// A block of nothing but zeroes.
    pub(crate) fn zeroes(block: ByteRange) -> Self {
        Self(block.pieces(EXTENT_BYTES).map(|_| None).collect())
    }
}

/// The manifest of the backup before.
#[derive(Clone)]
pub(crate) struct Earlier {
    node: Rc<dyn Node>,
    length_bytes: u64,
}

impl Earlier {
    /// The one on this node, of which only the beginning is looked at.
    ///
    /// # Errors
    /// It cannot be read, or does not begin like one.
    pub(crate) async fn open(node: Rc<dyn Node>) -> Result<Self, EngineError> {
        let mut lines = Lines::of(Rc::clone(&node));
        let is_empty = lines.next().await?.is_none();
        let length_bytes = lines.length_bytes();
        if is_empty {
            // A disk of nothing has one, too.
            lines.finish()?;
        }
        Ok(Self { node, length_bytes })
    }

    /// Reads all of it; asks now and then whether to go on.
    ///
    /// # Errors
    /// It is damaged, or cannot be read; why not to go on.
    pub(crate) async fn check<E: From<EngineError>>(
        &self,
        goes_on: impl AsyncFn() -> Result<(), E>,
    ) -> Result<(), E> {
        let mut lines = Lines::of(Rc::clone(&self.node));
        while lines.next().await?.is_some() {
            goes_on().await?;
        }
        Ok(lines.finish()?)
    }

    /// Where it can say nothing of a disk of this length, whatever has not changed: behind its end, and of the block that one of the
    /// ends cuts.
    fn says_nothing_of(&self, disk_bytes: u64) -> ByteRange {
        let from = match self.length_bytes == disk_bytes {
            true => disk_bytes,
            false => {
                let cut = self.length_bytes.min(disk_bytes);
                cut - cut % BLOCK_BYTES
            }
        };
        ByteRange::between(from, disk_bytes)
    }

    /// Which blocks of a disk, at least, have to be known if this has changed.
    pub(crate) fn blocks_to_know(&self, changed: &DirtyMap) -> DirtyMap {
        let mut blocks = DirtyMap::new(changed.length_bytes(), BLOCK_BYTES);
        blocks.merge(changed);
        blocks.mark(self.says_nothing_of(changed.length_bytes()));
        blocks
    }
}

/// Writes the text of the manifest of a disk of this length, of which `changed` has changed since the one before; `sums` tells what a
/// block holds now.
///
/// # Errors
/// When the one before is damaged, or cannot be read; when the new one cannot be written; those of `sums`.
pub(crate) async fn compose(
    earlier: &Earlier,
    disk_bytes: u64,
    changed: DirtyMap,
    sums: impl AsyncFn(ByteRange) -> Result<Sums, EngineError>,
    output: &dyn Storage,
) -> Result<(), EngineError> {
    let mut onto = Onto {
        changed,
        unsaid: earlier.says_nothing_of(disk_bytes),
        disk_bytes,
        done: 0,
        writer: Writer::new(disk_bytes),
        sums,
    };
    let (mut lines, mut text_bytes) = (Lines::of(Rc::clone(&earlier.node)), 0);
    while let Some(record) = lines.next().await? {
        onto.take(&record).await?;
        if onto.writer.waiting_bytes() >= TEXT_BYTES {
            let more = onto.writer.take();
            text_bytes += write_text(output, text_bytes, &more).await.map_err(text)?;
        }
    }
    lines.finish()?;
    onto.know_the_rest().await?;
    let rest = onto.writer.finish();
    let written = write_text(output, text_bytes, &rest).await;
    written.map(drop).map_err(text)
}

fn text(error: JobError) -> EngineError {
    EngineError::generic(error.text)
}

struct Onto<F> {
    changed: DirtyMap,
    /// What the one before says nothing of.
    unsaid: ByteRange,
    disk_bytes: u64,
    /// Up to where the new manifest has been made.
    done: u64,
    writer: Writer,
    sums: F,
}

impl<F: AsyncFn(ByteRange) -> Result<Sums, EngineError>> Onto<F> {
    /// Goes on as far as a line goes; what of it has changed is asked for.
    async fn take(&mut self, record: &Record) -> Result<(), EngineError> {
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
                self.know(block).await?;
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

    /// The first block that `range` touches and that may have changed.
    fn first_changed(&self, range: ByteRange) -> Option<ByteRange> {
        let around = range.align_outward(BLOCK_BYTES);
        let changed = self.changed.run_in(around);
        let changed = changed.map(|run| run.offset().max(around.offset()));
        let unsaid = (!self.unsaid.is_empty()).then(|| self.unsaid.offset().max(around.offset()));
        let first = changed.into_iter().chain(unsaid).min()?;
        let block = ByteRange::new(first - first % BLOCK_BYTES, BLOCK_BYTES);
        (block.offset() < range.end()).then(|| block.clamp_end(self.disk_bytes))
    }

    async fn know(&mut self, block: ByteRange) -> Result<(), EngineError> {
        let Sums(sums) = (self.sums)(block).await?;
        for (extent, sum) in block.pieces(EXTENT_BYTES).zip(sums) {
            match sum {
                Some(sum) => self.writer.extent(extent, sum),
                None => self.writer.zeroes(extent),
            }
        }
        self.done = block.end();
        Ok(())
    }

    /// What the one before says nothing of.
    async fn know_the_rest(&mut self) -> Result<(), EngineError> {
        while self.done < self.disk_bytes {
            let rest = ByteRange::between(self.done, self.disk_bytes);
            let (block, _) = rest.split_at(BLOCK_BYTES - self.done % BLOCK_BYTES);
            self.know(block).await?;
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
    use crate::node::zeroes::is_zero;

    const EXTENT: usize = EXTENT_BYTES as usize;

    /// What comes of an earlier manifest, where this is said to have changed.
    fn onto(new: &[u8], changed: &DirtyMap, previous: &[u8]) -> Result<String, String> {
        let output = MemoryStorage::new(0);
        let previous = node(previous, ByteRange::default());
        let sums = async |block: ByteRange| {
            let bytes = &new[block.offset() as usize..block.end() as usize];
            let sum = |bytes: &[u8]| (!is_zero(bytes)).then(|| ExtentSum::of(bytes, true));
            Ok(Sums(bytes.chunks(EXTENT).map(sum).collect()))
        };
        let done = block_on(async {
            let earlier = Earlier::open(previous).await?;
            earlier.check(async || Ok::<_, EngineError>(())).await?;
            compose(&earlier, new.len() as u64, changed.clone(), sums, &output).await
        });
        done.map_err(|error: EngineError| error.text)?;
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
