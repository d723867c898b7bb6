//! [`Recorder`]: what a job has read, as checksums, in whatever order it comes and however often.
//!
//! Sums for a manifest are kept in a scratch file, so that memory follows no disk; of what is to be read back, a part is kept in
//! memory ([`Unverified`]). Whoever records a range has it for himself, so the last one to do so is right.

use std::cell::RefCell;
use std::rc::Rc;

use blockyard_storage::{Buffer, ByteRange, Storage};

use crate::data::CpuPool;
use crate::error::{EngineError, JobError};
use crate::manifest::EXTENT_BYTES;
use crate::manifest::onto::{Earlier, Sums, compose};
use crate::manifest::sums::{ExtentSum, SUM_BYTES, Summed, Summing};
use crate::manifest::text::Writer;
use crate::manifest::unverified::Unverified;
use crate::node::dirty_map::DirtyMap;

/// Fewer bytes are summed at once; more by a thread for such work.
const INLINE_MAX_BYTES: usize = 64 << 10;

/// Sums that are read from the scratch file at once.
const READ_EXTENTS: u64 = 4096;

/// Text that is written at once, in bytes.
pub(crate) const TEXT_BYTES: usize = 256 << 10;

/// What a job has read.
pub(crate) struct Recorder {
    length_bytes: u64,
    cpu: CpuPool,
    kept: Option<Kept>,
    unverified: Option<RefCell<Unverified>>,
    /// What comes to the target; the rest is read for its checksums alone. `None`: all.
    copied: RefCell<Option<DirtyMap>>,
    failure: RefCell<Option<JobError>>,
}

/// What is kept for a manifest.
struct Kept {
    /// The sum of each extent with data, one behind the other.
    scratch: Rc<dyn Storage>,
    /// Extents with data.
    data: RefCell<DirtyMap>,
    /// Extents of which it is known.
    known: RefCell<DirtyMap>,
}

impl Recorder {
    /// Of a disk of this length. With a `scratch` file sums are kept for a manifest; with `verifies`, until they were compared.
    pub(crate) fn new(
        length_bytes: u64,
        cpu: CpuPool,
        scratch: Option<Rc<dyn Storage>>,
        verifies: bool,
    ) -> Self {
        let map = || RefCell::new(DirtyMap::exactly(length_bytes, EXTENT_BYTES));
        Self {
            length_bytes,
            cpu,
            kept: scratch.map(|scratch| Kept {
                scratch,
                data: map(),
                known: map(),
            }),
            unverified: verifies.then(|| Unverified::new(length_bytes).into()),
            copied: RefCell::default(),
            failure: RefCell::default(),
        }
    }

    /// Whether bytes have to be read wherever they come from: a manifest tells of all of them.
    pub(crate) fn needs_every_byte(&self) -> bool {
        self.kept.is_some()
    }

    /// Only what `map` says comes to the target: whoever copies asks for each [part](Self::first_part).
    pub(crate) fn copy_only(&self, map: DirtyMap) {
        *self.copied.borrow_mut() = Some(map);
    }

    /// `range` comes to the target as well.
    pub(crate) fn copy_too(&self, range: ByteRange) {
        if let Some(copied) = &mut *self.copied.borrow_mut() {
            copied.mark(range);
        }
    }

    /// The first part of `range` that is treated alike, and whether it comes to the target.
    pub(crate) fn first_part(&self, range: ByteRange) -> (ByteRange, bool) {
        let copied = self.copied.borrow();
        let Some(copied) = &*copied else {
            return (range, true);
        };
        match copied.run_in(range).map(|run| run.intersection(&range)) {
            Some(run) if run.offset() == range.offset() => (run, true),
            Some(run) => (ByteRange::between(range.offset(), run.offset()), false),
            None => (range, false),
        }
    }

    /// What of `missing` does come to the target.
    pub(crate) fn copied_of(&self, mut missing: DirtyMap) -> DirtyMap {
        if let Some(copied) = &*self.copied.borrow() {
            missing.keep_only(copied);
        }
        missing
    }

    /// What is still to be read back.
    pub(crate) fn unverified(&self) -> Option<&RefCell<Unverified>> {
        self.unverified.as_ref()
    }

    /// Whether something is still to be read back.
    pub(crate) fn has_unverified(&self) -> bool {
        let unverified = self.unverified.as_ref();
        unverified.is_some_and(|unverified| unverified.borrow().bytes() > 0)
    }

    /// Whether something has to be read back before more is copied.
    pub(crate) fn is_full(&self) -> bool {
        let unverified = self.unverified.as_ref();
        unverified.is_some_and(|unverified| unverified.borrow().is_full())
    }

    /// Why what was recorded is worth nothing.
    pub(crate) fn failure(&self) -> Option<JobError> {
        self.failure.borrow().clone()
    }

    fn fail(&self, error: JobError) {
        self.failure.borrow_mut().get_or_insert(error);
    }

    /// Begins to take the bytes of `range`, whole extents, in their order. Nobody else does meanwhile.
    pub(crate) fn begin(&self, range: ByteRange) -> Recording<'_> {
        let is_whole = range.offset().is_multiple_of(EXTENT_BYTES)
            && (range.end().is_multiple_of(EXTENT_BYTES) || range.end() == self.length_bytes);
        if !is_whole {
            let text = format!("Internal error: {range} are no whole extents (bug)");
            self.fail(JobError::text(text));
        }
        Recording {
            recorder: self,
            summing: Summing::new(range, self.kept.is_some()),
            is_copied: true,
        }
    }

    /// The same of what does not come to the target.
    pub(crate) fn begin_to_read(&self, range: ByteRange) -> Recording<'_> {
        Recording {
            is_copied: false,
            ..self.begin(range)
        }
    }

    /// All of `range`, whole extents, is zeroes on both sides.
    pub(crate) async fn zeroes(&self, range: ByteRange) {
        let mut recording = self.begin(range);
        recording.zeroes(range.length());
        recording.end().await;
    }

    async fn keep(&self, kept: &Kept, run: &Summed) -> Result<(), JobError> {
        match run {
            Summed::Zeroes(range) => {
                kept.data.borrow_mut().clear(*range);
                kept.known.borrow_mut().mark(*range);
            }
            Summed::Data(range, sums) => {
                let mut bytes = Buffer::zeroed(sums.len() * SUM_BYTES);
                let places = bytes.as_mut_slice().chunks_exact_mut(SUM_BYTES);
                for (place, sum) in places.zip(sums) {
                    place.copy_from_slice(&sum.to_bytes());
                }
                let written = kept.scratch.write(place_of(range.offset()), bytes).await;
                written.outcome.map_err(|error| {
                    let reason = blockyard_storage::error::errno_text(error.errno);
                    let text = format!("Could not keep checksums for the manifest: {reason}");
                    JobError {
                        errno: Some(error.errno),
                        ..JobError::text(text)
                    }
                })?;
                kept.data.borrow_mut().mark(*range);
                kept.known.borrow_mut().mark(*range);
            }
        }
        Ok(())
    }

    /// What was kept of everything that was to be recorded.
    fn all_recorded(&self) -> Result<&Kept, JobError> {
        match (self.failure(), &self.kept) {
            (Some(error), _) => Err(error),
            (None, Some(kept)) => Ok(kept),
            (None, None) => Err(lost("no manifest is wanted")),
        }
    }

    /// Writes the manifest of all that was recorded to `output`, which is empty. Not durable.
    ///
    /// # Errors
    /// When something was not recorded, or a file fails.
    pub(crate) async fn write_manifest(&self, output: &dyn Storage) -> Result<(), JobError> {
        let kept = self.all_recorded()?;
        if kept.known.borrow().dirty_bytes() != self.length_bytes {
            return Err(lost("the manifest would leave something out"));
        }
        let (mut writer, mut text_bytes) = (Writer::new(self.length_bytes), 0);
        let mut position = 0;
        while position < self.length_bytes {
            let longest = READ_EXTENTS * EXTENT_BYTES;
            let run = kept.data.borrow().run_from(position, longest);
            let end = ByteRange::between(self.length_bytes, self.length_bytes);
            let run = run.unwrap_or(end);
            writer.zeroes(ByteRange::between(position, run.offset()));
            self.write_extents(kept, run, &mut writer).await?;
            position = run.end();
            if writer.waiting_bytes() >= TEXT_BYTES {
                text_bytes += write_text(output, text_bytes, &writer.take()).await?;
            }
        }
        write_text(output, text_bytes, &writer.finish()).await?;
        Ok(())
    }

    /// Writes the manifest of the disk to `output`, which is empty: what was recorded, and of the rest what the `earlier` one says. Not
    /// durable.
    ///
    /// # Errors
    /// When a block was recorded in parts, or a file fails.
    pub(crate) async fn write_manifest_onto(
        &self,
        earlier: &Earlier,
        output: &dyn Storage,
    ) -> Result<(), JobError> {
        let kept = self.all_recorded()?;
        let known = kept.known.borrow().clone();
        let ahead = RefCell::new(Ahead::default());
        let sums = async |block: ByteRange| {
            let taken = self.take_sums(kept, block, &ahead).await;
            taken.map_err(|error| EngineError::generic(error.text))
        };
        let composed = compose(earlier, self.length_bytes, known, sums, output).await;
        composed.map_err(|error| JobError::text(error.text))
    }

    /// What was recorded of a block.
    async fn take_sums(
        &self,
        kept: &Kept,
        block: ByteRange,
        ahead: &RefCell<Ahead>,
    ) -> Result<Sums, JobError> {
        let run = kept
            .known
            .borrow()
            .run_from(block.offset(), READ_EXTENTS * EXTENT_BYTES);
        let run = run.filter(|run| run.contains(&block));
        let run = run.ok_or_else(|| lost("the manifest would leave something out"))?;
        if !ahead.borrow().range.contains(&block) {
            let bytes = sums_in(kept, run).await?;
            *ahead.borrow_mut() = Ahead { range: run, bytes };
        }
        let (ahead, data) = (ahead.borrow(), kept.data.borrow());
        let first = (block.offset() - ahead.range.offset()) / EXTENT_BYTES;
        let first = usize::try_from(first).unwrap_or(usize::MAX);
        let sums = ahead.bytes.as_chunks::<SUM_BYTES>().0.iter().skip(first);
        let extents = block.pieces(EXTENT_BYTES).zip(sums);
        let sum = |(extent, sum)| {
            let is_data = data.run_in(extent).is_some();
            is_data.then(|| ExtentSum::from_bytes(sum))
        };
        Ok(Sums(extents.map(sum).collect()))
    }

    async fn write_extents(
        &self,
        kept: &Kept,
        run: ByteRange,
        writer: &mut Writer,
    ) -> Result<(), JobError> {
        if run.is_empty() {
            return Ok(());
        }
        let bytes = sums_in(kept, run).await?;
        let sums = bytes.as_chunks::<SUM_BYTES>().0;
        for (extent, sum) in run.pieces(EXTENT_BYTES).zip(sums) {
            writer.extent(extent, ExtentSum::from_bytes(sum));
        }
        Ok(())
    }
}

/// Sums that have been read from the scratch file.
#[derive(Default)]
struct Ahead {
    range: ByteRange,
    bytes: Vec<u8>,
}

/// The sums of all extents of `run`, one behind the other; what is there for zeroes means nothing.
async fn sums_in(kept: &Kept, run: ByteRange) -> Result<Vec<u8>, JobError> {
    let length = |range: ByteRange| {
        let extents = range.length().div_ceil(EXTENT_BYTES);
        usize::try_from(extents).unwrap_or(usize::MAX) * SUM_BYTES
    };
    let mut bytes = vec![0; length(run)];
    let mut rest = run;
    loop {
        let data = kept.data.borrow().run_in(rest);
        let Some(data) = data else {
            return Ok(bytes);
        };
        let read = kept
            .scratch
            .read(place_of(data.offset()), Buffer::zeroed(length(data)));
        let read = read.await;
        read.outcome.map_err(|error| JobError::errno(error.errno))?;
        let skipped = length(ByteRange::between(run.offset(), data.offset()));
        let place = bytes.get_mut(skipped..skipped + length(data));
        if let Some(place) = place {
            place.copy_from_slice(read.buffer.as_slice());
        }
        rest = ByteRange::between(data.end(), run.end());
    }
}

fn lost(what: &str) -> JobError {
    JobError::text(format!("Internal error: {what} (bug)"))
}

/// Where the sum of the extent that begins here is kept.
fn place_of(offset: u64) -> u64 {
    offset / EXTENT_BYTES * SUM_BYTES as u64
}

/// Writes the next piece of a manifest's text; how long that is.
pub(crate) async fn write_text(
    output: &dyn Storage,
    offset: u64,
    text: &str,
) -> Result<u64, JobError> {
    let written = output.write(offset, Buffer::copy_of(text.as_bytes())).await;
    match written.outcome {
        Ok(()) => Ok(text.len() as u64),
        Err(error) => Err(JobError {
            errno: Some(error.errno),
            ..JobError::text(format!(
                "Could not write the manifest: {}",
                blockyard_storage::error::errno_text(error.errno)
            ))
        }),
    }
}

/// The bytes of one range on their way. Nothing is recorded before its [end](Self::end).
#[must_use = "nothing is recorded before its end"]
pub(crate) struct Recording<'a> {
    recorder: &'a Recorder,
    summing: Summing,
    is_copied: bool,
}

impl Recording<'_> {
    /// The next bytes. `None`: they are lost to a bug.
    pub(crate) async fn bytes(&mut self, buffer: Buffer) -> Option<Buffer> {
        if self.recorder.kept.is_none() || buffer.len() <= INLINE_MAX_BYTES {
            self.summing.push(buffer.as_slice());
            return Some(buffer);
        }
        let empty = Summing::new(ByteRange::default(), false);
        let mut summing = std::mem::replace(&mut self.summing, empty);
        let work = self.recorder.cpu.run(move |_| {
            summing.push(buffer.as_slice());
            (summing, buffer)
        });
        let (summing, buffer) = work.await?;
        self.summing = summing;
        Some(buffer)
    }

    /// The next `length` bytes are zeroes.
    pub(crate) fn zeroes(&mut self, length: u64) {
        self.summing.push_zeroes(length);
    }

    /// All of the range has come, and is on the target if it is to be there.
    pub(crate) async fn end(mut self) {
        for run in self.summing.take_runs() {
            if let Some(kept) = &self.recorder.kept
                && let Err(error) = self.recorder.keep(kept, &run).await
            {
                self.recorder.fail(error);
            }
            if let Some(unverified) = &self.recorder.unverified
                && self.is_copied
            {
                unverified.borrow_mut().add(&run);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;

    use blockyard_storage::memory::MemoryStorage;

    use super::*;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.expect("a runtime").block_on(future)
    }

    fn recorder(length: u64) -> Recorder {
        let scratch = Rc::new(MemoryStorage::new(0));
        Recorder::new(length, CpuPool::on_the_spot(), Some(scratch), false)
    }

    async fn text_of(recorder: &Recorder) -> Result<String, JobError> {
        let output = MemoryStorage::new(0);
        recorder.write_manifest(&output).await?;
        let length = usize::try_from(output.facts().length_bytes).expect("a length");
        let read = output.read(0, Buffer::zeroed(length)).await;
        Ok(String::from_utf8(read.buffer.as_slice().to_vec()).expect("a text"))
    }

    /// What one after the other comes to.
    fn in_order(disk: &[u8]) -> String {
        let mut writer = Writer::new(disk.len() as u64);
        let extents = disk.chunks(EXTENT_BYTES as usize).enumerate();
        for (nth, extent) in extents {
            let range = ByteRange::new(nth as u64 * EXTENT_BYTES, extent.len() as u64);
            match extent.iter().all(|byte| *byte == 0) {
                true => writer.zeroes(range),
                false => writer.extent(range, ExtentSum::of(extent, true)),
            }
        }
        writer.finish()
    }

    #[test]
    fn the_order_in_which_bytes_come_does_not_matter_and_the_last_ones_count() {
        let length = 40 * EXTENT_BYTES as usize + 512;
        let mut disk: Vec<u8> = (0..length).map(|at| (at / 4096) as u8).collect();
        disk[5 * EXTENT_BYTES as usize..20 * EXTENT_BYTES as usize].fill(0);
        let recorder = recorder(length as u64);
        let all = ByteRange::new(0, length as u64);
        let place = |range: ByteRange| range.offset() as usize..range.end() as usize;
        block_on(async {
            // What was there before, in one go, and then what is there now from behind.
            let mut old = recorder.begin(all);
            let buffer = old.bytes(Buffer::copy_of(&vec![7; length])).await;
            assert!(buffer.is_some());
            old.end().await;
            let pieces: Vec<_> = all.pieces(3 * EXTENT_BYTES).collect();
            for range in pieces.into_iter().rev() {
                let mut recording = recorder.begin(range);
                let bytes = &disk[place(range)];
                let (front, rest) = bytes.split_at(bytes.len() / 3);
                for part in [front, rest] {
                    assert!(recording.bytes(Buffer::copy_of(part)).await.is_some());
                }
                recording.end().await;
            }
            assert_eq!(text_of(&recorder).await, Ok(in_order(&disk)));
        });
    }

    #[test]
    fn what_was_not_recorded_is_no_manifest() {
        let recorder = recorder(4 * EXTENT_BYTES);
        block_on(async {
            recorder.zeroes(ByteRange::new(0, 3 * EXTENT_BYTES)).await;
            let error = text_of(&recorder).await.expect_err("an extent is missing");
            assert!(error.text.contains("leave something out"), "{}", error.text);
            recorder
                .zeroes(ByteRange::new(3 * EXTENT_BYTES, EXTENT_BYTES))
                .await;
            assert!(text_of(&recorder).await.is_ok());
            recorder.zeroes(ByteRange::new(512, EXTENT_BYTES)).await;
            assert!(text_of(&recorder).await.is_err(), "no whole extents");
        });
    }

    #[test]
    fn a_sparse_disk_has_a_short_manifest() {
        let recorder = recorder(8 << 40);
        block_on(async {
            recorder.zeroes(ByteRange::new(0, 8 << 40)).await;
            let mut data = recorder.begin(ByteRange::new(4 << 40, EXTENT_BYTES));
            assert!(
                data.bytes(Buffer::copy_of(&[1; EXTENT_BYTES as usize]))
                    .await
                    .is_some()
            );
            data.end().await;
            let text = text_of(&recorder).await.expect("a text");
            assert_eq!(text.lines().count(), 7);
        });
    }

    #[test]
    fn a_scratch_file_that_fails_fails_the_manifest() {
        let scratch = Rc::new(MemoryStorage::new(0).read_only());
        let recorder = Recorder::new(EXTENT_BYTES, CpuPool::on_the_spot(), Some(scratch), false);
        block_on(async {
            let mut recording = recorder.begin(ByteRange::new(0, EXTENT_BYTES));
            let bytes = Buffer::copy_of(&[1; EXTENT_BYTES as usize]);
            assert!(recording.bytes(bytes).await.is_some());
            recording.end().await;
            assert!(recorder.failure().is_some());
            assert!(text_of(&recorder).await.is_err());
        });
    }
}
