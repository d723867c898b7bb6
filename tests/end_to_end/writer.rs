//! Clients of an export that write at random, and know what they have to read.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use crate::nbd::{FLUSH, FUA, Nbd, TRIM, ZERO};

/// Sets a flag when it goes, so that a thread which ends with it ends also when a test fails.
pub(crate) struct SetAtEnd<'a>(pub(crate) &'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A client that writes at random, and knows what it has to read.
pub(crate) struct Writer {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    thread: JoinHandle<Vec<u8>>,
}

impl Writer {
    /// Begins to write to a part of an export. Every byte has to be read as it was written.
    pub(crate) fn start(socket: PathBuf, name: &str, part: Range<u64>, seed: u64) -> Self {
        Self::start_as(socket, name, part, seed, true)
    }

    /// The same without looking at what is read.
    pub(crate) fn start_blind(socket: PathBuf, name: &str, part: Range<u64>, seed: u64) -> Self {
        Self::start_as(socket, name, part, seed, false)
    }

    fn start_as(socket: PathBuf, name: &str, part: Range<u64>, seed: u64, looks: bool) -> Self {
        let name = name.to_owned();
        let (stop, written) = (
            Arc::new(AtomicBool::new(false)),
            Arc::<AtomicU64>::default(),
        );
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&written));
        let thread = std::thread::spawn(move || {
            let mut nbd = Nbd::open(&socket, &name);
            let length = u32::try_from(part.end - part.start).expect("small");
            let mut model = nbd.read(part.start, length);
            let mut random = Random(seed | 1);
            while !stopped.load(Ordering::Relaxed) {
                step(&mut nbd, part.start, &mut model, (&mut random, looks));
                count.fetch_add(1, Ordering::Relaxed);
            }
            let is_as_written = nbd.read(part.start, length) == model;
            assert!(!looks || is_as_written, "the disk is another");
            model
        });
        Self {
            stop,
            written,
            thread,
        }
    }

    /// Waits until it has made more requests.
    pub(crate) fn goes_on(&self, requests: u64) {
        let until = self.written.load(Ordering::Relaxed) + requests;
        while self.written.load(Ordering::Relaxed) < until {
            assert!(!self.thread.is_finished(), "the writer has failed");
            std::thread::yield_now();
        }
    }

    /// Ends it. What its part holds now.
    pub(crate) fn end(self) -> Vec<u8> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("every byte as it was written")
    }
}

/// Dice.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// A number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// One request within what begins at `start`, and what it means.
fn step(nbd: &mut Nbd, start: u64, model: &mut [u8], (random, looks): (&mut Random, bool)) {
    let all = model.len() as u64;
    let unit = [1, 512, 4096, 65536][usize::try_from(random.below(4)).expect("small")];
    let length = (1 + random.below(16)) * unit;
    let length = length.min(all / 4);
    let offset = random.below((all - length) / unit + 1) * unit;
    let place = usize::try_from(offset).expect("small");
    let offset = start + offset;
    let range = place..place + usize::try_from(length).expect("small");
    let short = u32::try_from(length).expect("small");
    match random.below(12) {
        0 => {
            nbd.change(ZERO, (offset, short));
            model[range].fill(0);
        }
        1 => {
            // What it reads as afterwards is not said.
            nbd.change(TRIM, (offset, short));
            let now = nbd.read(offset, short);
            model[range].copy_from_slice(&now);
        }
        2 => nbd.change(FLUSH, (0, 0)),
        3..=5 => {
            let is_as_written = nbd.read(offset, short) == model[range];
            assert!(!looks || is_as_written, "read {offset}");
        }
        kind => {
            let mut data = vec![0; range.len()];
            for byte in &mut data {
                *byte = (random.0 >> 20) as u8;
                random.0 = random
                    .0
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
            }
            nbd.write(offset, &data, if kind == 6 { FUA } else { 0 });
            model[range].copy_from_slice(&data);
        }
    }
}
