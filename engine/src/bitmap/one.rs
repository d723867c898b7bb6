//! [`Bitmap`]: one dirty bitmap: its bits, and what state it is in.

use blockyard_storage::ByteRange;

use crate::bitmap::{BitmapInMemory, Need};
use crate::error::EngineError;
use crate::node::dirty_map::DirtyMap;
use crate::reply::BitmapView;

/// One dirty bitmap of a node.
#[derive(Clone, Debug)]
pub struct Bitmap {
    name: String,
    /// As it stands in the image that keeps it.
    name_in_image: Vec<u8>,
    /// Its place among those of its node: newer ones have a higher one.
    place: u64,
    map: DirtyMap,
    records: bool,
    is_persistent: bool,
    is_read_only: bool,
    is_inconsistent: bool,
    users: Users,
    /// It is removed, unless that comes to nothing: an image does not keep it any more.
    is_going: bool,
    /// What has been kept for the case that a transaction comes to nothing, oldest first.
    kept: Vec<Kept>,
}

/// What a bitmap was before one action of a transaction changed it.
#[derive(Clone, Debug)]
struct Kept {
    before: DirtyMap,
    /// What has been marked since, which stays whatever becomes of the transaction.
    since: DirtyMap,
    /// It recorded then: if it does not any more, it may again.
    recorded: bool,
}

/// Who uses a bitmap, which nobody else changes meanwhile.
#[derive(Clone, Debug, Default)]
struct Users {
    /// Exports and jobs that look at it.
    readers: usize,
    /// What is changed while a job goes by the bitmap.
    successor: Option<Successor>,
}

/// What has changed since a job has begun to go by a bitmap.
#[derive(Clone, Debug)]
struct Successor {
    map: DirtyMap,
    /// As if it were a bitmap of its own.
    place: u64,
}

impl Bitmap {
    /// A bitmap of a disk on which nothing has changed yet, in granules of `granularity_bytes` (a power of two). It records from now
    /// on.
    pub fn new(name: String, length_bytes: u64, granularity_bytes: u64) -> Self {
        Self {
            name_in_image: name.as_bytes().to_vec(),
            name,
            place: 0,
            map: DirtyMap::exactly(length_bytes, granularity_bytes),
            records: true,
            is_persistent: false,
            is_read_only: false,
            is_inconsistent: false,
            users: Users::default(),
            is_going: false,
            kept: Vec::new(),
        }
    }

    /// A bitmap as the image has it that keeps it. `is_inconsistent`: nobody has stored it as he should have.
    pub(crate) fn loaded(
        name_in_image: Vec<u8>,
        mut map: DirtyMap,
        records: bool,
        is_inconsistent: bool,
    ) -> Self {
        // No image tells.
        map.disk_was_longer();
        let shown = name_in_image.split(|byte| *byte == 0).next();
        Self {
            name: String::from_utf8_lossy(shown.unwrap_or_default()).into_owned(),
            name_in_image,
            place: 0,
            map,
            records,
            is_persistent: true,
            is_read_only: false,
            is_inconsistent,
            users: Users::default(),
            is_going: false,
            kept: Vec::new(),
        }
    }

    /// The image keeps it from now on.
    pub(crate) fn keep(&mut self) {
        self.is_persistent = true;
    }

    /// No image keeps it, although one could.
    pub(crate) fn keep_not_yet(&mut self) {
        self.is_persistent = false;
    }

    /// Its name in the image that keeps it, if one does.
    pub(crate) fn name_in_image(&self) -> Option<&[u8]> {
        self.is_persistent.then_some(&self.name_in_image)
    }

    /// Whether the image that keeps it is for reading only; it has been stored before.
    pub(super) fn set_read_only(&mut self, read_only: bool) {
        self.is_read_only = read_only && self.is_persistent;
    }

    /// What the image is to keep of it; `None`: nothing, or what it has already.
    pub(super) fn to_store(&self) -> Option<BitmapInMemory> {
        let is_kept = self.is_persistent && !self.is_going;
        if !is_kept || self.is_read_only || self.is_inconsistent {
            return None;
        }
        let mut map = self.map.clone();
        if let Some(successor) = &self.users.successor {
            map.merge(&successor.map);
        }
        // A transaction that has not ended may yet come to nothing.
        for kept in &self.kept {
            map.merge(&kept.before);
            map.merge(&kept.since);
        }
        Some(BitmapInMemory {
            name_in_image: self.name_in_image.clone(),
            map,
            records: self.records,
        })
    }

    /// Its name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// What has changed.
    pub(crate) fn map(&self) -> &DirtyMap {
        &self.map
    }

    /// Bytes of the granules that have changed, each as a whole.
    pub(crate) fn count_bytes(&self) -> u64 {
        count_bytes(&self.map)
    }

    /// Switches it on or off.
    pub(crate) fn set_recording(&mut self, records: bool) {
        self.records = records;
    }

    /// Whether nothing can be said of what is in it.
    pub(super) fn is_inconsistent(&self) -> bool {
        self.is_inconsistent
    }

    /// Whether it records.
    pub(crate) fn records(&self) -> bool {
        self.records
    }

    pub(super) fn hold(&mut self) {
        self.users.readers += 1;
    }

    pub(super) fn let_go(&mut self) {
        self.users.readers = self.users.readers.saturating_sub(1);
    }

    /// Whether it has to be told of writes.
    pub(super) fn listens(&self) -> bool {
        self.marks() || self.kept.iter().any(|kept| kept.recorded)
    }

    fn marks(&self) -> bool {
        self.records && !self.is_inconsistent
    }

    pub(super) fn mark(&mut self, range: ByteRange) {
        for kept in &mut self.kept {
            if self.records || kept.recorded {
                kept.since.mark(range);
            }
        }
        if self.marks() {
            let successor = self.users.successor.as_mut();
            let map = successor.map_or(&mut self.map, |successor| &mut successor.map);
            map.mark(range);
        }
    }

    /// What changes from now on is kept apart, until [`thaw`](Self::thaw). What has changed until now.
    pub(super) fn freeze(&mut self, place: u64) -> DirtyMap {
        let map = DirtyMap::exactly(self.map.length_bytes(), self.map.granularity_bytes());
        self.users.successor = Some(Successor { map, place });
        self.map.clone()
    }

    /// What has changed since [`freeze`](Self::freeze) is all that has changed if the bitmap is `replaced`; else it comes to
    /// what was there.
    pub(super) fn thaw(&mut self, replaced: bool) {
        let Some(Successor { map, place }) = self.users.successor.take() else {
            return;
        };
        if replaced {
            (self.map, self.place) = (map, place);
        } else {
            self.map.merge(&map);
        }
    }

    /// Its place among those of its node.
    pub(super) fn place(&self) -> u64 {
        self.place
    }

    pub(super) fn set_place(&mut self, place: u64) {
        self.place = place;
    }

    /// The highest place that it needs.
    pub(super) fn last_place(&self) -> u64 {
        let successor = self.users.successor.as_ref();
        successor.map_or(self.place, |successor| successor.place)
    }

    /// Whether somebody removes it.
    pub(crate) fn set_going(&mut self, is_going: bool) {
        self.is_going = is_going;
    }

    /// Keeps what it says and whether it records now, until [`forget`](Self::forget) or [`restore`](Self::restore).
    pub(crate) fn keep_content(&mut self) {
        let since = DirtyMap::exactly(self.map.length_bytes(), self.map.granularity_bytes());
        let before = self.map.clone();
        self.kept.push(Kept {
            before,
            since,
            recorded: self.records,
        });
    }

    /// What was kept last is not needed any more.
    pub(crate) fn forget(&mut self) {
        self.kept.pop();
    }

    /// It says and does what was kept last; what has been marked since stays marked.
    pub(crate) fn restore(&mut self) {
        if let Some(kept) = self.kept.pop() {
            self.map = kept.before;
            self.map.merge(&kept.since);
            self.records = kept.recorded;
        }
    }

    /// Nothing has changed.
    pub(crate) fn clear(&mut self) {
        self.map.clear_all();
    }

    /// What has changed according to `other` has changed here, too, whatever its granularity.
    pub(crate) fn merge(&mut self, other: &DirtyMap) {
        self.map.merge(other);
    }

    /// The disk has another length. That it was cut before and has grown again is a change, as everything there was lost.
    pub(super) fn resize(&mut self, length_bytes: u64) {
        let records = self.records;
        self.map.resize(length_bytes, records);
        for kept in &mut self.kept {
            kept.before.resize(length_bytes, kept.recorded);
            kept.since.resize(length_bytes, kept.recorded || records);
        }
        if let Some(successor) = &mut self.users.successor {
            successor.map.resize(length_bytes, records);
        }
    }

    /// Whether it can be used in a way.
    ///
    /// # Errors
    /// Why not, in QEMU's words and order.
    pub(super) fn check(&self, need: Need) -> Result<(), EngineError> {
        let name = &self.name;
        if need == Need::Show {
            return Ok(());
        }
        self.check_idle()?;
        if self.is_read_only && matches!(need, Need::Change | Need::Remove) {
            return Err(EngineError::generic(format!(
                "Bitmap '{name}' is readonly and cannot be modified"
            )));
        }
        if self.is_inconsistent && need != Need::Remove {
            return Err(EngineError::generic(format!(
                "Bitmap '{name}' is inconsistent and cannot be used"
            )));
        }
        Ok(())
    }

    /// That nobody uses it.
    ///
    /// # Errors
    /// In QEMU's words.
    pub(super) fn check_idle(&self) -> Result<(), EngineError> {
        match self.is_busy() {
            true => Err(EngineError::generic(format!(
                "Bitmap '{}' is currently in use by another operation and cannot be used",
                self.name
            ))),
            false => Ok(()),
        }
    }

    fn is_busy(&self) -> bool {
        self.users.readers > 0 || self.users.successor.is_some()
    }

    /// What queries show, each with its place.
    pub(super) fn views(&self) -> impl Iterator<Item = (u64, BitmapView)> {
        let recording = self.marks();
        let successor = self.users.successor.as_ref();
        let successor = successor.map(|Successor { map, place }| {
            let view = BitmapView {
                name: None,
                count_bytes: count_bytes(map),
                granularity_bytes: map.granularity_bytes(),
                recording,
                busy: false,
                persistent: false,
                inconsistent: false,
            };
            (*place, view)
        });
        let own = BitmapView {
            name: Some(self.name.clone()),
            count_bytes: self.count_bytes(),
            granularity_bytes: self.map.granularity_bytes(),
            recording,
            busy: self.is_busy(),
            persistent: self.is_persistent,
            inconsistent: self.is_inconsistent,
        };
        successor.into_iter().chain([(self.place, own)])
    }
}

fn count_bytes(map: &DirtyMap) -> u64 {
    let granularity = map.granularity_bytes();
    map.dirty_bytes()
        .div_ceil(granularity)
        .saturating_mul(granularity)
}
