//! [`ReadAhead`]: many reads in flight, their bytes in order, memory bounded.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll};

use blockyard_storage::{Buffer, ByteRange, LocalFuture, Storage, StorageError, Transfer};

/// Largest read in bytes. With the number of reads, this is all the memory that reading takes: 4 MiB.
pub(in crate::qcow2) const PIECE_BYTES: u64 = 256 << 10;
const READS_MAX: usize = 16;

/// Reads ranges of a file, none longer than [`PIECE_BYTES`], and keeps what belongs to each with it.
pub(in crate::qcow2) struct ReadAhead<I, T> {
    file: Rc<dyn Storage>,
    ranges: I,
    reads: VecDeque<(ByteRange, T, Read)>,
    spare: Vec<Buffer>,
}

enum Read {
    Waiting(LocalFuture<'static, Transfer>),
    Done(Transfer),
}

impl<I: Iterator<Item = (ByteRange, T)>, T> ReadAhead<I, T> {
    pub(in crate::qcow2) fn new(file: &Rc<dyn Storage>, ranges: I) -> Self {
        Self {
            file: Rc::clone(file),
            ranges,
            reads: VecDeque::new(),
            spare: Vec::new(),
        }
    }

    /// The next range with its bytes; `None`: that was all. Give the buffer back when done with it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(in crate::qcow2) async fn next(
        &mut self,
    ) -> Result<Option<(ByteRange, T, Buffer)>, StorageError> {
        self.fill();
        poll_fn(|cx| self.poll_front(cx)).await;
        let Some((range, belongs, Read::Done(transfer))) = self.reads.pop_front() else {
            return Ok(None);
        };
        transfer.outcome?;
        Ok(Some((range, belongs, transfer.buffer)))
    }

    /// Takes a buffer back for a later read.
    pub(in crate::qcow2) fn give_back(&mut self, buffer: Buffer) {
        self.spare.push(buffer);
    }

    fn fill(&mut self) {
        while self.reads.len() < READS_MAX {
            let Some((range, belongs)) = self.ranges.next() else {
                return;
            };
            let length = usize::try_from(range.length().min(PIECE_BYTES)).unwrap_or(0);
            let buffer = self.buffer(length);
            let file = Rc::clone(&self.file);
            let offset = range.offset();
            let read = Box::pin(async move { file.read(offset, buffer).await });
            self.reads.push_back((range, belongs, Read::Waiting(read)));
        }
    }

    fn buffer(&mut self, length: usize) -> Buffer {
        match self.spare.pop() {
            Some(mut buffer) if buffer.capacity() >= length => {
                buffer.set_length(length);
                buffer
            }
            _ => Buffer::zeroed(length),
        }
    }

    /// Lets all reads get on; ready when the first has ended, or there is none.
    fn poll_front(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        for (_, _, read) in &mut self.reads {
            if let Read::Waiting(future) = read
                && let Poll::Ready(transfer) = future.as_mut().poll(cx)
            {
                *read = Read::Done(transfer);
            }
        }
        match self.reads.front() {
            Some((_, _, Read::Waiting(_))) => Poll::Pending,
            _ => Poll::Ready(()),
        }
    }
}

/// Reads one range of any length that the caller has bounded.
///
/// # Errors
/// When it cannot be read.
pub(in crate::qcow2) async fn read_all(
    file: &Rc<dyn Storage>,
    range: ByteRange,
) -> Result<Vec<u8>, StorageError> {
    let mut bytes = Vec::with_capacity(usize::try_from(range.length()).unwrap_or(0));
    let mut reads = ReadAhead::new(file, range.pieces(PIECE_BYTES).map(|piece| (piece, ())));
    while let Some((_, (), buffer)) = reads.next().await? {
        bytes.extend_from_slice(buffer.as_slice());
        reads.give_back(buffer);
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use blockyard_simulator::{DiskOptions, Fault, World, run};
    use blockyard_storage::Operation;

    use super::*;

    #[test]
    fn bytes_come_in_order_whichever_read_ends_first() {
        for seed in 0..20 {
            let world = World::new(seed);
            let disk = world.disk("image", DiskOptions::default());
            let bytes: Vec<u8> = (0..100_u32).flat_map(u32::to_be_bytes).collect();
            disk.fill(1000, &bytes);
            let file: Rc<dyn Storage> = disk.open();
            let read = run(
                async {
                    let pieces =
                        (0..100_u32).map(|n| (ByteRange::new(1000 + u64::from(n) * 4, 4), n));
                    let mut reads = ReadAhead::new(&file, pieces);
                    let mut numbers = 0;
                    while let Some((range, number, buffer)) = reads.next().await.expect("no fault")
                    {
                        assert_eq!(number, numbers);
                        assert_eq!(range.offset(), 1000 + u64::from(number) * 4);
                        assert_eq!(buffer.as_slice(), number.to_be_bytes());
                        reads.give_back(buffer);
                        numbers += 1;
                    }
                    numbers
                },
                || world.step(),
            );
            assert_eq!(read, Some(100));
        }
    }

    #[test]
    fn a_failed_read_is_told_where_it_was() {
        let world = World::new(1);
        let disk = world.disk("image", DiskOptions::default());
        world.add_fault(Fault::fails(5).of(Operation::Read));
        let file: Rc<dyn Storage> = disk.open();
        let read = read_all(&file, ByteRange::new(512, 100));
        let error = run(read, || world.step());
        let error = error.expect("ended").expect_err("it fails");
        assert_eq!(error.range, Some(ByteRange::new(512, 100)));
    }
}
