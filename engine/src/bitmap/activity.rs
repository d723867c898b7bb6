//! Where a disk may have changed since its bitmaps were written down outside of their image: what makes them good after a crash.
//!
//! A disk is divided into regions. Before the first change of a region, a bit is set for it in a field of bits in the state directory,
//! durably; later changes of it find that in memory. Bitmaps are written down beside, as they are at one moment; what is changed
//! at that moment, marked in no bitmap yet, is in the field as well. So at any time
//!
//! ```text
//!   what has changed  ⊆  what was written down  ∪  the field
//! ```
//! When they are written down anew, a new field begins before the moment and the old one goes on until the image names the new one.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use blockyard_images::qcow2::layout::extensions::ActivityId;
use blockyard_storage::ByteRange;

use crate::bitmap::NodeBitmaps;
use crate::bitmap::anew::Anew;
use crate::state::{HeldName, MarkField, MarkedRecord, StateDir};

/// Regions of a disk at most: 128 KiB for the field.
const REGIONS_MAX: u64 = 1 << 20;

/// Regions behind one that are set with it where the one before was: whoever writes on and on waits for a quarter of the syncs.
const AHEAD: u64 = 3;

/// How a disk is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Regions {
    region_bytes: u64,
    /// Those of the disk; behind them there is one for all that lies behind its end.
    count: u64,
}

/// What is recorded of one node.
#[derive(Debug, Default)]
pub(super) struct Activity {
    state: Option<StateDir>,
    is_recorded: AtomicBool,
    inner: Mutex<Inner>,
    writing_down: tokio::sync::Mutex<()>,
    anew: Mutex<Anew>,
    /// The state directory has failed, and nothing is recorded although something could be.
    is_given_up: AtomicBool,
}

#[derive(Debug, Default)]
struct Inner {
    /// Changes that are not marked in the bitmaps yet.
    under_way: BTreeMap<u64, ByteRange>,
    next_key: u64,
    /// What changes go to: one, two while another one begins.
    fields: Vec<Field>,
    /// Another one whenever the fields change.
    era: u64,
}

/// Where changes are recorded.
#[derive(Debug)]
struct Field {
    id: ActivityId,
    regions: Regions,
    record: MarkedRecord,
    /// The bits that are durable.
    durable: MarkField,
    /// No other image is taken for what is recorded under this name.
    _held: HeldName,
}

/// A change that is under way.
#[derive(Debug)]
#[must_use = "it is under way until it has ended"]
pub(crate) struct ChangeKey(u64);

impl Regions {
    /// Of a disk of this length: regions of `smallest_bytes` (a power of two), or more where there would be too many.
    pub(crate) fn of(length_bytes: u64, smallest_bytes: u64) -> Self {
        let needed = length_bytes.div_ceil(REGIONS_MAX).next_power_of_two();
        let region_bytes = smallest_bytes.max(needed);
        Self {
            region_bytes,
            count: length_bytes.div_ceil(region_bytes),
        }
    }

    /// Bytes of each.
    pub(crate) const fn region_bytes(&self) -> u64 {
        self.region_bytes
    }

    /// Bits of the field.
    pub(crate) const fn bits(&self) -> u64 {
        self.count + 1
    }

    fn touched_by(&self, range: ByteRange) -> Range<u64> {
        if range.is_empty() {
            return 0..0;
        }
        let first = (range.offset() / self.region_bytes).min(self.count);
        let last = ((range.end() - 1) / self.region_bytes).min(self.count);
        first..last + 1
    }

    /// What a bit stands for.
    pub(crate) fn range_of(&self, bit: u64) -> ByteRange {
        let start = bit.saturating_mul(self.region_bytes);
        match bit < self.count {
            true => ByteRange::new(start, self.region_bytes),
            false => ByteRange::between(start, u64::MAX),
        }
    }
}

impl NodeBitmaps {
    /// Without bitmaps; those that an image keeps are written down in `state`.
    pub(crate) fn recorded_in(state: Option<StateDir>) -> Self {
        Self {
            activity: Activity {
                state,
                ..Activity::default()
            },
            ..Self::default()
        }
    }

    /// Where bitmaps are written down.
    pub(crate) fn state(&self) -> Option<&StateDir> {
        self.activity.state.as_ref()
    }

    /// Whether changes are recorded.
    pub(crate) fn is_recorded(&self) -> bool {
        self.activity.is_recorded.load(Ordering::Acquire)
    }

    /// What is changed from now on, until [`end_change`](Self::end_change), which comes behind its mark in the bitmaps. `None`: nobody
    /// needs to know.
    pub(crate) fn begin_change(&self, range: ByteRange) -> Option<ChangeKey> {
        self.activity.state.as_ref()?;
        let mut inner = self.activity.lock();
        let key = inner.next_key;
        inner.next_key += 1;
        inner.under_way.insert(key, range);
        Some(ChangeKey(key))
    }

    /// A change has ended, and is marked.
    pub(crate) fn end_change(&self, key: Option<ChangeKey>) {
        if let Some(ChangeKey(key)) = key {
            self.activity.lock().under_way.remove(&key);
        }
    }

    /// Records that `range`, a change of which has begun, may have changed. It is durable afterwards; where nothing is recorded,
    /// nothing is done.
    ///
    /// # Errors
    /// What the state directory says: the change must not be made as long as the image says that all are recorded.
    pub(crate) async fn touch(&self, range: ByteRange) -> io::Result<()> {
        if !self.is_recorded() {
            return Ok(());
        }
        loop {
            let (era, missing) = self.activity.missing(range);
            if missing.is_empty() {
                return Ok(());
            }
            for (record, bits) in &missing {
                record.mark(bits.clone()).await?;
            }
            self.activity.are_durable(era, &missing);
        }
    }

    /// Changes are recorded in one more field from now on, of a disk as [`Regions`] say. What is under way, which has to be set in it
    /// as well.
    pub(crate) fn add_field(
        &self,
        id: ActivityId,
        regions: Regions,
        record: MarkedRecord,
        held: HeldName,
    ) -> Vec<Range<u64>> {
        let mut inner = self.activity.lock();
        inner.era += 1;
        inner.fields.push(Field {
            id,
            regions,
            record,
            durable: MarkField::new(regions.bits()),
            _held: held,
        });
        self.activity.is_recorded.store(true, Ordering::Release);
        let ranges = inner.under_way.values();
        ranges.map(|range| regions.touched_by(*range)).collect()
    }

    /// Changes are recorded only in the field of this name from now on, in none if it is not there. The names of all others.
    pub(crate) fn keep_field(&self, kept: Option<ActivityId>) -> Vec<ActivityId> {
        let mut inner = self.activity.lock();
        inner.era += 1;
        let mut others = Vec::new();
        inner.fields.retain(|field| {
            let stays = Some(field.id) == kept;
            others.extend((!stays).then_some(field.id));
            stays
        });
        let is_recorded = !inner.fields.is_empty();
        self.activity
            .is_recorded
            .store(is_recorded, Ordering::Release);
        others
    }

    /// Changes are not recorded in the field of this name any more.
    pub(crate) fn drop_field(&self, id: ActivityId) {
        let mut inner = self.activity.lock();
        inner.era += 1;
        inner.fields.retain(|field| field.id != id);
        let is_recorded = !inner.fields.is_empty();
        self.activity
            .is_recorded
            .store(is_recorded, Ordering::Release);
    }

    /// Keeps everybody else from writing down what an image keeps, or ending it, as long as the guard is there.
    pub(crate) async fn write_down_alone(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.activity.writing_down.lock().await
    }

    /// The state directory has failed: what was recorded in it, or was to be, is not, until it is tried again.
    pub(crate) fn set_given_up(&self, is_given_up: bool) {
        self.activity
            .is_given_up
            .store(is_given_up, Ordering::Release);
    }

    /// Whether what an image keeps is to be written down anew, although nobody has changed it: so much has changed since it was last
    /// that it pays, or it could not be. To be asked again and again, each [`LOOK_PAUSE`](super::LOOK_PAUSE).
    pub(crate) fn is_due(&self) -> bool {
        if !self.is_recorded() {
            return self.activity.is_given_up.load(Ordering::Acquire);
        }
        let touched = {
            let inner = self.activity.lock();
            inner.fields.last().map(|field| field.durable.clone())
        };
        let anew = self.activity.anew.lock();
        let mut anew = anew.unwrap_or_else(PoisonError::into_inner);
        touched.is_some_and(|touched| anew.is_due(touched))
    }

    /// The name that changes were recorded under first, if any are.
    pub(crate) fn recorded_as(&self) -> Option<ActivityId> {
        self.activity.lock().fields.first().map(|field| field.id)
    }
}

impl Activity {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What has to be set before a change.
    fn missing(&self, range: ByteRange) -> (u64, Vec<(MarkedRecord, Range<u64>)>) {
        let inner = self.lock();
        let missing = inner.fields.iter().filter_map(|field| {
            let bits = field.regions.touched_by(range);
            if field.durable.has_all(bits.clone()) {
                return None;
            }
            let goes_on = bits.start.checked_sub(1);
            let end = match goes_on.is_some_and(|before| field.durable.has(before)) {
                true => (bits.end + AHEAD).min(field.regions.bits()),
                false => bits.end,
            };
            Some((field.record.clone(), bits.start..end))
        });
        (inner.era, missing.collect())
    }

    /// What was missing is there now.
    fn are_durable(&self, era: u64, set: &[(MarkedRecord, Range<u64>)]) {
        let mut inner = self.lock();
        if inner.era != era {
            return;
        }
        for (record, bits) in set {
            let field = inner.fields.iter_mut();
            for field in field.filter(|field| field.record.is(record)) {
                field.durable.set(bits.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALLEST: u64 = 1 << 24;

    #[test]
    fn regions_cover_every_disk() {
        for length_bytes in [0, 1, SMALLEST, (1 << 40) + 1, 16 << 40, 1 << 62] {
            let regions = Regions::of(length_bytes, SMALLEST);
            assert!(regions.count <= REGIONS_MAX);
            assert!(regions.region_bytes.is_power_of_two());
            let whole = regions.touched_by(ByteRange::new(0, length_bytes));
            assert_eq!(whole, 0..regions.count);
            let behind = regions.touched_by(ByteRange::between(length_bytes, u64::MAX));
            assert_eq!(behind.end, regions.bits());
            assert!(behind.start + 1 >= regions.count);
            for bit in 0..regions.bits().min(100) {
                let range = regions.range_of(bit);
                assert_eq!(
                    regions.touched_by(range),
                    bit..bit + 1,
                    "{length_bytes} {bit}"
                );
            }
        }
        assert!(
            Regions::of(5, SMALLEST)
                .touched_by(ByteRange::new(3, 0))
                .is_empty()
        );
    }
}
