//! [`try_everything`]: whatever can be done with an image whose bytes may be anything. What a fuzzer calls, see
//! `images/fuzz/`, and what the tests of [`mutations`](crate::mutations) call.
//!
//! Nothing panics, waits for ever, or costs more than the bytes of the file allow. What a check calls sound stays sound however
//! it is used, and what a repair says of its result is what the next check says.

use std::cell::Cell;
use std::rc::Rc;

use blockyard_images::ImageError;
use blockyard_images::qcow2::check::{Repair, Report, Unobserved, check, repair, repair_dirty};
use blockyard_images::qcow2::info::ImageInfo;
use blockyard_images::qcow2::layout::header::{Access, Header};
use blockyard_images::qcow2::open::read_image;
use blockyard_images::qcow2::overlap::OverlapChecks;
use blockyard_images::qcow2::units::GuestCluster;
use blockyard_images::qcow2::{Options, Qcow2};
use blockyard_simulator::{Seed, run};
use blockyard_storage::{
    Buffer, ByteRange, Extent, LocalFuture, MemoryStorage, Preallocation, Storage, StorageError,
    StorageFacts, Transfer, ZeroMode,
};

use crate::mover::Mover;
use crate::recount::recount;

/// Requests to an image that was opened.
const STEPS: u64 = 14;

/// Extents of the guest's disk that are looked at, at most.
const EXTENTS_MAX: usize = 200;

/// Longest request, and how much longer or shorter a disk becomes, in bytes.
const SPAN_BYTES: u64 = 64 << 10;

/// Does everything with an image of these bytes.
pub(crate) fn try_everything(bytes: &[u8]) {
    let open = open_for_everything(bytes);
    if !open {
        return;
    }
    look(bytes);
    let found = check_it(bytes);
    for how in [Repair::Leaks, Repair::All] {
        repair_it(bytes, how);
    }
    use_it(bytes, found);
}

/// Whether it can be opened for anything but a look at its header.
fn open_for_everything(bytes: &[u8]) -> bool {
    let accesses = [
        Access::Metadata,
        Access::ReadOnly,
        Access::ReadWrite,
        Access::Check,
    ];
    let mut opens = false;
    for access in accesses {
        let file = Bounded::new(bytes);
        // Tables may be in each other's place, so that bytes count more than once.
        file.allow(6 * file.length() + (64 << 10), 16 + file.length() / 1024);
        if let Ok(image) = now(read_image(&*file, access)) {
            let _ = ImageInfo::of(&image);
            opens |= access != Access::Metadata;
        }
    }
    opens
}

/// Reads what can be read.
fn look(bytes: &[u8]) {
    let file = Bounded::new(bytes);
    file.allow_use();
    let options = Options {
        read_only: true,
        ..options(&Seed::new(0))
    };
    let Ok(image) = now(open(&file, options)) else {
        return;
    };
    let mut rest = ByteRange::new(0, image.length_bytes());
    for _ in 0..EXTENTS_MAX {
        if rest.is_empty() {
            break;
        }
        file.allow_use();
        match now(image.map(rest)) {
            Ok(extent) => {
                let range = extent.range;
                assert!(!range.is_empty() && range.offset() == rest.offset());
                assert!(range.end() <= rest.end());
                rest = rest.split_at(range.length()).1;
            }
            Err(_) => rest = rest.split_at(image.geometry().cluster_bytes()).1,
        }
    }
    let mover = Mover::new(image, None, false);
    for offset in [0, mover.image.length_bytes() / 2] {
        file.allow_use();
        let range = ByteRange::new(offset, SPAN_BYTES).clamp_end(mover.image.length_bytes());
        let _ = now(mover.read(range));
    }
}

/// What a check finds, if the image can be checked.
fn check_it(bytes: &[u8]) -> Option<Report> {
    let file = Bounded::new(bytes);
    file.allow_check(1);
    let before = file.inner.clone();
    let report = now(check(&file.storage(), &Unobserved)).ok();
    assert!(same(&before, &file.inner), "a check writes nothing");
    report
}

/// Repairs it. The result is what is said of it, and stays as it is.
fn repair_it(bytes: &[u8], how: Repair) {
    let file = Bounded::new(bytes);
    file.allow_check(4);
    let Ok(repaired) = now(repair(&file.storage(), how, &Unobserved)) else {
        return;
    };
    file.allow_check(1);
    let again = now(check(&file.storage(), &Unobserved)).expect("it was checked a moment ago");
    let mut told = repaired.after;
    if !repaired.has_fixed() {
        // What a repair could not put right counts besides what a check finds.
        told.check_errors = told.check_errors.min(again.check_errors);
    }
    assert_eq!(again, told, "after {how:?}");
    let is_right = again.corruptions == 0 && again.check_errors == 0;
    file.allow_check(4);
    let before = file.inner.clone();
    let twice = now(repair(&file.storage(), how, &Unobserved)).expect("it was repaired already");
    if is_right && again.leaks == 0 {
        assert_eq!(
            (twice.corruptions_fixed, twice.leaks_fixed),
            (0, 0),
            "{how:?}"
        );
        assert!(same(&before, &file.inner), "nothing was left to do");
    }
}

/// Writes, zeroes, discards, makes it longer and shorter.
fn use_it(bytes: &[u8], found: Option<Report>) {
    // Chance that follows the bytes.
    let seed = bytes.iter().fold(bytes.len() as u64, |sum, byte| {
        sum.rotate_left(7).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(*byte)
    });
    let seed = Seed::new(seed);
    let file = Bounded::new(bytes);
    let Ok(header) = Header::parse(bytes, Access::ReadWrite) else {
        return;
    };
    let mut is_sound = found.is_some_and(|found| found.corruptions == 0 && found.check_errors == 0);
    if header.is_dirty() {
        file.allow_check(4);
        match now(repair_dirty(&file.storage())) {
            Ok(report) => is_sound = report.corruptions == 0,
            Err(_) => return,
        }
    }
    // A check does not look at where data is in an external file, nor at what a cluster is to those who refer to it, as that
    // of QEMU does not.
    is_sound = is_sound && !header.has_data_file() && recount(bytes).corruptions.is_empty();
    file.allow_use();
    let Ok(image) = now(open(&file, options(&seed))) else {
        return;
    };
    let mover = Mover::new(image, None, seed.one_in(2));
    for _ in 0..STEPS {
        file.allow_use();
        let ended = now(step(&mover, &seed));
        if let Err(ImageError::Corrupt(told)) = &ended {
            is_sound &= !is_beyond_a_check(&told.text);
        }
        if is_sound {
            let corrupt = matches!(ended, Err(ImageError::Corrupt(_) | ImageError::Broken(_)));
            assert!(!corrupt, "a sound image: {ended:?}");
        }
    }
    file.allow_use();
    let closed = now(mover.image.close());
    drop(mover);
    if is_sound {
        assert_eq!(closed, Ok(()), "a sound image");
        file.allow_check(1);
        let after = now(check(&file.storage(), &Unobserved)).expect("it can be checked");
        assert_eq!((after.corruptions, after.check_errors), (0, 0), "{after:?}");
    }
}

/// What neither our check nor that of QEMU looks at. The last cluster of a file need not be all there.
fn is_beyond_a_check(text: &str) -> bool {
    text.starts_with("Zero cluster entry found in pre-v3 image")
        || text.ends_with("is behind the end of the image file")
}

async fn step(mover: &Mover, seed: &Seed) -> Result<(), ImageError> {
    let length = mover.image.length_bytes();
    let cluster_bytes = mover.image.geometry().cluster_bytes();
    // The ends of a disk are where sums overflow.
    let start = match seed.below(4) {
        0 => length.saturating_sub(seed.below(SPAN_BYTES)),
        1 => seed.below(length),
        _ => seed.below(length.min(cluster_bytes * 40)),
    };
    let range = ByteRange::new(start, 1 + seed.below(SPAN_BYTES)).clamp_end(length);
    match seed.below(12) {
        0..4 => {
            let bytes = vec![seed.any() as u8; range.length() as usize];
            mover.write(start, &bytes).await
        }
        4 => mover.read(range).await.map(drop),
        5 | 6 => mover.zero(range, seed.one_in(2)).await,
        7 => mover.discard(range).await,
        8 if length > 0 && !mover.image.header().has_data_file() => {
            let cluster = start.min(length - 1) / cluster_bytes;
            let bytes = vec![7; cluster_bytes as usize];
            mover.write_compressed(GuestCluster(cluster), &bytes).await
        }
        9 => {
            let other = match seed.one_in(2) {
                true => length.saturating_add(seed.below(SPAN_BYTES)),
                false => length.saturating_sub(seed.below(SPAN_BYTES)),
            };
            mover.image.resize(other / 512 * 512, 0).await
        }
        10 => {
            mover.image.clean_caches();
            Ok(())
        }
        _ => mover.image.flush().await,
    }
}

async fn open(file: &Rc<Bounded>, options: Options) -> Result<Rc<Qcow2>, ImageError> {
    let access = match options.read_only {
        true => Access::ReadOnly,
        false => Access::ReadWrite,
    };
    let image = read_image(&**file, access).await?;
    let data: Option<Rc<dyn Storage>> = match image.header.has_data_file() {
        true => Some(Rc::new(MemoryStorage::new(0))),
        false => None,
    };
    Qcow2::open(file.storage(), data, options).await
}

fn options(seed: &Seed) -> Options {
    Options {
        l2_cache_bytes: *seed.pick(&[0, 4096, 1 << 20]),
        l2_cache_entry_bytes: *seed.pick(&[512, 65_536]),
        refcount_cache_bytes: *seed.pick(&[0, 1 << 16]),
        discard_no_unref: seed.one_in(4),
        pass_discard_request: seed.one_in(2),
        pass_discard_other: seed.one_in(2),
        overlap_checks: *seed.pick(&[
            OverlapChecks::NONE,
            OverlapChecks::CACHED,
            OverlapChecks::ALL,
        ]),
        ..Options::default()
    }
}

/// The end of something that waits for nothing but its storage, which is in memory.
fn now<T>(work: impl Future<Output = T>) -> T {
    run(work, || false).expect("memory waits for nothing")
}

fn same(one: &MemoryStorage, other: &MemoryStorage) -> bool {
    let bytes = |storage: &MemoryStorage| {
        let length = storage.facts().length_bytes;
        let into = Buffer::zeroed(length.min(64 << 20) as usize);
        (length, now(storage.read(0, into)).buffer)
    };
    let (one, other) = (bytes(one), bytes(other));
    one.0 == other.0 && one.1.as_slice() == other.1.as_slice()
}

/// A file in memory that counts, and panics when it is asked for more than was allowed.
struct Bounded {
    inner: MemoryStorage,
    bytes_left: Cell<u64>,
    requests_left: Cell<u64>,
}

impl Bounded {
    fn new(bytes: &[u8]) -> Rc<Self> {
        let inner = MemoryStorage::new(0);
        let written = now(inner.write(0, Buffer::copy_of(bytes)));
        written.outcome.expect("memory");
        Rc::new(Self {
            inner,
            bytes_left: Cell::new(0),
            requests_left: Cell::new(0),
        })
    }

    fn storage(self: &Rc<Self>) -> Rc<dyn Storage> {
        Rc::clone(self) as Rc<dyn Storage>
    }

    fn length(&self) -> u64 {
        self.inner.facts().length_bytes
    }

    /// From now on.
    fn allow(&self, bytes: u64, requests: u64) {
        self.bytes_left.set(bytes);
        self.requests_left.set(requests);
    }

    /// What so many passes over all metadata may cost, and writing all of it: tables in any place are read up to the length of
    /// the file and 64 MiB.
    fn allow_check(&self, passes: u64) {
        let bytes = passes * (6 * self.length() + (128 << 20));
        self.allow(bytes, 256 + bytes / 512);
    }

    /// What one request of a guest may cost: it may have to write all tables in the cache back, and to look for the end of the
    /// file in 64 blocks of counts.
    fn allow_use(&self) {
        let bytes = 6 * self.length() + (192 << 20);
        self.allow(bytes, 4096 + bytes / 4096);
    }

    fn count(&self, bytes: u64) {
        let left = self.requests_left.get().checked_sub(1);
        self.requests_left.set(left.expect("too many requests"));
        let left = self.bytes_left.get().checked_sub(bytes);
        self.bytes_left.set(left.expect("too many bytes"));
    }
}

impl Storage for Bounded {
    fn facts(&self) -> StorageFacts {
        self.inner.facts()
    }
    fn read(&self, offset: u64, into: Buffer) -> LocalFuture<'_, Transfer> {
        self.count(into.len() as u64);
        self.inner.read(offset, into)
    }
    fn write(&self, offset: u64, from: Buffer) -> LocalFuture<'_, Transfer> {
        self.count(from.len() as u64);
        self.inner.write(offset, from)
    }
    fn zero(&self, range: ByteRange, mode: ZeroMode) -> LocalFuture<'_, Result<(), StorageError>> {
        self.count(0);
        self.inner.zero(range, mode)
    }
    fn discard(&self, range: ByteRange) -> LocalFuture<'_, Result<(), StorageError>> {
        self.count(0);
        self.inner.discard(range)
    }
    fn allocation(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> LocalFuture<'_, Result<Vec<Extent>, StorageError>> {
        self.count(0);
        self.inner.allocation(range, extents_max)
    }
    fn resize(&self, length_bytes: u64) -> LocalFuture<'_, Result<(), StorageError>> {
        self.count(0);
        self.inner.resize(length_bytes)
    }
    fn preallocate(
        &self,
        range: ByteRange,
        how: Preallocation,
    ) -> LocalFuture<'_, Result<(), StorageError>> {
        self.count(0);
        self.inner.preallocate(range, how)
    }
    fn sync(&self) -> LocalFuture<'_, Result<(), StorageError>> {
        self.count(0);
        self.inner.sync()
    }
}
