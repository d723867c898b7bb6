//! Bits behind a record that are set one by one, durably, for whoever must not go on before.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::record::field_offset;
use super::{Answer, Pulse, RecordKind, StateDir, checked, gone};

/// A field of bits in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MarkField {
    bits: u64,
    bytes: Vec<u8>,
}

impl MarkField {
    /// A field of so many bits, none of which is set.
    pub(crate) fn new(bits: u64) -> Self {
        let bytes = usize::try_from(bits.div_ceil(8)).unwrap_or(usize::MAX);
        Self {
            bits,
            bytes: vec![0; bytes],
        }
    }

    /// A field of so many bits as it was found; `None` if it is not as long.
    pub(crate) fn found(bits: u64, bytes: &[u8]) -> Option<Self> {
        (bytes.len() as u64 == bits.div_ceil(8)).then(|| Self {
            bits,
            bytes: bytes.to_vec(),
        })
    }

    /// Whether a bit is set.
    pub(crate) fn has(&self, bit: u64) -> bool {
        let byte = usize::try_from(bit / 8).unwrap_or(usize::MAX);
        let byte = self.bytes.get(byte).copied().unwrap_or(0);
        byte & 1 << (bit % 8) != 0
    }

    /// Whether all of `bits` are set.
    pub(crate) fn has_all(&self, mut bits: Range<u64>) -> bool {
        bits.all(|bit| self.has(bit))
    }

    /// Bits that are set.
    pub(crate) fn count(&self) -> u64 {
        let ones = self.bytes.iter().map(|byte| u64::from(byte.count_ones()));
        ones.sum()
    }

    /// Bits that are set here and there.
    pub(crate) fn count_common(&self, other: &Self) -> u64 {
        let both = self.bytes.iter().zip(&other.bytes);
        both.map(|(one, other)| u64::from((one & other).count_ones()))
            .sum()
    }

    /// Sets bits; those behind the end do not count.
    pub(crate) fn set(&mut self, bits: Range<u64>) {
        for bit in bits.start..bits.end.min(self.bits) {
            let byte = usize::try_from(bit / 8).unwrap_or(usize::MAX);
            if let Some(byte) = self.bytes.get_mut(byte) {
                *byte |= 1 << (bit % 8);
            }
        }
    }

    /// Its bits, the lowest of each byte first.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// A record with a field behind it, whose bits can be set.
#[derive(Clone, Debug)]
pub(crate) struct MarkedRecord {
    state: StateDir,
    file: Arc<FieldInFile>,
}

#[derive(Debug)]
struct FieldInFile {
    file: File,
    offset: u64,
    field: Mutex<MarkField>,
    /// A sync has failed: nobody knows what of it is durable, whatever the next one says.
    is_broken: AtomicBool,
}

/// Bits that are to be set.
pub(super) struct Marking {
    file: Arc<FieldInFile>,
    bits: Range<u64>,
    done: Answer<()>,
}

impl StateDir {
    /// As [`write`](Self::write), with a field of bits behind the record that can be set afterwards. As long as the record has this
    /// name, they are set in it.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    ///
    /// # Cancel safety
    /// As [`write`](Self::write).
    pub(crate) async fn write_marked(
        &self,
        kind: RecordKind,
        name: &str,
        bytes: Vec<u8>,
        field: MarkField,
    ) -> io::Result<MarkedRecord> {
        let name = checked(name)?;
        let offset = field_offset(bytes.len()) as u64;
        let written = self.call(move |folder, pulse| {
            let file = folder.write((kind, &name), &bytes, Some(&field.bytes), pulse)?;
            Ok((file, field))
        });
        let (file, field) = written.await?;
        let file = Arc::new(FieldInFile {
            file,
            offset,
            field: Mutex::new(field),
            is_broken: AtomicBool::new(false),
        });
        let state = self.clone();
        Ok(MarkedRecord { state, file })
    }
}

impl MarkedRecord {
    /// Whether both are the same.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.file, &other.file)
    }

    /// Sets bits. They are durable afterwards. What is asked for at the same time is synced together.
    ///
    /// # Errors
    /// `InvalidInput` for bits behind the end; what the file system says: the bits may be set or not then.
    ///
    /// # Cancel safety
    /// They are set all the same.
    pub(crate) async fn mark(&self, bits: Range<u64>) -> io::Result<()> {
        let (answer, outcome) = Answer::new();
        let (file, done) = (Arc::clone(&self.file), answer.clone());
        let marking = Marking { file, bits, done };
        self.state.mark(marking, answer)?;
        outcome.await.map_err(|_| gone())?
    }
}

/// Sets what was asked for, one sync for each file, and tells those who wait.
pub(super) fn carry_out(markings: Vec<Marking>, pulse: &Pulse) {
    let mut synced: Vec<(Arc<FieldInFile>, Result<(), String>)> = Vec::new();
    let written: Vec<_> = markings.iter().map(Marking::write).collect();
    for marking in &markings {
        if !synced
            .iter()
            .any(|(file, _)| Arc::ptr_eq(file, &marking.file))
        {
            let outcome = marking.file.file.sync_data();
            if outcome.is_err() {
                marking.file.is_broken.store(true, Ordering::Release);
            }
            let outcome = outcome.map_err(|error| error.to_string());
            synced.push((Arc::clone(&marking.file), outcome));
            pulse.beat();
        }
    }
    for (marking, written) in markings.into_iter().zip(written) {
        let outcome = written.and_then(|()| {
            let of_file = |(file, _): &&(_, _)| Arc::ptr_eq(file, &marking.file);
            let synced = synced.iter().find(of_file).map(|(_, outcome)| outcome);
            match synced {
                Some(Err(text)) => Err(io::Error::other(text.clone())),
                _ => Ok(()),
            }
        });
        marking.done.give(outcome);
    }
    pulse.beat();
}

impl Marking {
    fn write(&self) -> io::Result<()> {
        let field = self.file.field.lock();
        let mut field = field.unwrap_or_else(PoisonError::into_inner);
        if self.bits.end > field.bits {
            let text = "it is behind the end of the field";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        if self.bits.is_empty() {
            return Ok(());
        }
        if self.file.is_broken.load(Ordering::Acquire) {
            return Err(io::Error::other("what was written before may be lost"));
        }
        field.set(self.bits.clone());
        let (first, last) = (self.bits.start / 8, (self.bits.end - 1) / 8);
        let place = |byte: u64| usize::try_from(byte).unwrap_or(usize::MAX);
        let bytes = field.bytes.get(place(first)..=place(last));
        let offset = self.file.offset + first;
        self.file.file.write_all_at(bytes.unwrap_or(&[]), offset)
    }
}
