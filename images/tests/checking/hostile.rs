//! Images made to cost time or memory: a check ends in time that is linear in their bytes, within its bound of memory.

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use blockyard_images::ImageError;
use blockyard_images::qcow2::check::{CheckStop, Finding, Observer, Report, Unobserved, check};
use blockyard_images::qcow2::units::{Geometry, Version};
use blockyard_simulator::{Seed, each_seed, run};
use blockyard_storage::{
    Buffer, ByteRange, Extent, LocalFuture, MemoryStorage, Preallocation, Storage, StorageError,
    StorageFacts, Transfer, ZeroMode,
};

use crate::handmade::{DATA_CLUSTERS, geometries, image};
use crate::images::Image;
use crate::verdict::{ours, storage};

/// A storage that counts the bytes read from it.
struct Counting {
    inner: Rc<dyn Storage>,
    read_bytes: Cell<u64>,
}

impl Storage for Counting {
    fn facts(&self) -> StorageFacts {
        self.inner.facts()
    }
    fn read(&self, offset: u64, into: Buffer) -> LocalFuture<'_, Transfer> {
        self.read_bytes
            .set(self.read_bytes.get() + into.len() as u64);
        self.inner.read(offset, into)
    }
    fn write(&self, _: u64, _: Buffer) -> LocalFuture<'_, Transfer> {
        panic!("a check writes nothing")
    }
    fn zero(&self, _: ByteRange, _: ZeroMode) -> LocalFuture<'_, Result<(), StorageError>> {
        panic!("a check writes nothing")
    }
    fn discard(&self, _: ByteRange) -> LocalFuture<'_, Result<(), StorageError>> {
        panic!("a check writes nothing")
    }
    fn allocation(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> LocalFuture<'_, Result<Vec<Extent>, StorageError>> {
        self.inner.allocation(range, extents_max)
    }
    fn resize(&self, _: u64) -> LocalFuture<'_, Result<(), StorageError>> {
        panic!("a check writes nothing")
    }
    fn preallocate(
        &self,
        _: ByteRange,
        _: Preallocation,
    ) -> LocalFuture<'_, Result<(), StorageError>> {
        panic!("a check writes nothing")
    }
    fn sync(&self) -> LocalFuture<'_, Result<(), StorageError>> {
        panic!("a check writes nothing")
    }
    fn host_file(&self) -> Option<Arc<OwnedFd>> {
        None
    }
}

/// What a check says, and how many bytes it read.
fn read_by_check(image: &Image) -> (Report, u64) {
    let counting = Rc::new(Counting {
        inner: storage(&image.bytes),
        read_bytes: Cell::new(0),
    });
    let file: Rc<dyn Storage> = counting.clone();
    let report = run(check(&file, &Unobserved), || false).expect("nothing waits");
    (report.expect("checked"), counting.read_bytes.get())
}

/// An image with an L1 table of so many entries behind everything else.
fn with_l1(entries: u64, entry: impl Fn(u64) -> u64) -> Image {
    let geometry = Geometry::new(Version::V3, 16, 4, false).expect("allowed");
    let mut image = image(geometry);
    let at = image.bytes.len();
    image.bytes.resize(at + (entries as usize * 8), 0);
    image.set_half(36, u32::try_from(entries).expect("few"));
    image.set_word(40, at as u64);
    for index in 0..entries {
        image.set_word(at + index as usize * 8, entry(index));
    }
    image
}

#[test]
fn an_l1_table_that_leads_to_one_table_costs_one_table() {
    let image = with_l1(4 << 20, |_| 4 << 16);
    let (report, read_bytes) = read_by_check(&image);
    // Four million times what one table has, all of them too many for a count of 16 bits.
    assert_eq!(report.allocated_clusters, (4 << 20) * DATA_CLUSTERS);
    assert!(report.corruptions > (4 << 20) * DATA_CLUSTERS, "{report:?}");
    // The L1 table and the L2 table are read twice each: for references, and for flags.
    assert!(read_bytes < 2 * image.bytes.len() as u64, "{read_bytes}");
}

#[test]
fn tables_that_overlap_are_bounded() {
    // Every sector of the file as a table, and each overlaps its neighbours.
    let image = with_l1(4 << 20, |index| (index * 512) % (33 << 20));
    let (report, read_bytes) = read_by_check(&image);
    assert!(report.check_errors > 0, "not everything was looked at");
    // All tables twice, unaligned ones up to the length of the file and 64 MiB.
    let bound = 6 * image.bytes.len() as u64 + (128 << 20);
    assert!(read_bytes < bound, "{read_bytes}");
}

#[test]
fn snapshots_that_share_bytes_of_l1_tables_are_read_once() {
    let mut image = with_l1(1 << 20, |index| if index % 4096 == 0 { 4 << 16 } else { 0 });
    let (l1, snapshots) = (image.l1(), 65_536_u64);
    let at = image.bytes.len();
    image.bytes.resize(at + 64 * snapshots as usize, 0);
    image.set_half(60, 65_536);
    image.set_word(64, at as u64);
    for index in 0..snapshots as usize {
        let entry = at + index * 64;
        image.set_word(entry, l1 as u64 + (index as u64 % 64) * 65_536);
        image.set_half(entry + 8, 900_000);
        image.set_half(entry + 36, 24);
    }
    let (report, read_bytes) = read_by_check(&image);
    assert!(report.corruptions > 0);
    assert!(read_bytes < 3 * image.bytes.len() as u64, "{read_bytes}");
}

#[test]
fn a_file_with_too_many_clusters_is_refused() {
    let bytes = image(Geometry::new(Version::V3, 9, 4, false).expect("allowed")).bytes;
    let storage = MemoryStorage::new(1 << 50);
    let written = run(storage.write(0, Buffer::copy_of(&bytes)), || false);
    written.expect("at once").outcome.expect("written");
    let file: Rc<dyn Storage> = Rc::new(storage);
    let refused = run(check(&file, &Unobserved), || false).expect("nothing waits");
    assert!(
        matches!(&refused, Err(CheckStop::Failed(ImageError::Refused { text, .. })) if text == "File too large"),
        "{refused:?}"
    );
}

#[test]
fn a_sparse_file_of_many_terabytes_is_checked() {
    let bytes = image(Geometry::new(Version::V3, 16, 4, false).expect("allowed")).bytes;
    let storage = MemoryStorage::new(64 << 40);
    let written = run(storage.write(0, Buffer::copy_of(&bytes)), || false);
    written.expect("at once").outcome.expect("written");
    let file: Rc<dyn Storage> = Rc::new(storage);
    let report = run(check(&file, &Unobserved), || false).expect("nothing waits");
    let report = report.expect("checked");
    assert_eq!((report.corruptions, report.leaks), (0, 0));
    assert_eq!(report.image_end_offset, bytes.len() as u64);
}

/// Cancels after so many questions.
struct CancelAfter(Cell<u64>);

impl Observer for CancelAfter {
    fn found(&self, _: Vec<Finding>) -> LocalFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }
    fn repaired(&self, _: u64, _: u64) -> LocalFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }

    fn progress(&self, _: u64, _: u64) {}
    fn is_cancelled(&self) -> bool {
        let left = self.0.get();
        self.0.set(left.saturating_sub(1));
        left == 0
    }
}

#[test]
fn it_ends_when_its_observer_does_not_want_to_go_on() {
    let image = image(geometries()[3]);
    let file = storage(&image.bytes);
    for steps in 0.. {
        let observer = CancelAfter(Cell::new(steps));
        match run(check(&file, &observer), || false).expect("nothing waits") {
            Ok(_) => {
                assert!(steps > 5, "{steps} questions");
                return;
            }
            Err(stop) => assert_eq!(stop, CheckStop::Cancelled),
        }
    }
}

#[test]
fn any_bytes_are_checked_or_refused() {
    each_seed("blockyard-images", "any_bytes", 2000, |seed| {
        let dice = Seed::new(seed);
        let geometries = geometries();
        // Larger ones take time and are no different.
        let small: Vec<_> = geometries
            .iter()
            .filter(|one| one.cluster_bits() <= 14)
            .collect();
        let mut image = image(**dice.pick(&small));
        let metadata = 5 * image.cluster_bytes() as u64;
        for _ in 0..=dice.below(20) {
            let offset = dice.below(metadata) as usize;
            image.bytes[offset] = dice.any() as u8;
        }
        if dice.one_in(5) {
            let length = dice.below(image.bytes.len() as u64) as usize;
            image.bytes.truncate(length);
        }
        // Either is right; that it ends without a panic is what counts.
        let _ = ours(&image.bytes);
    });
}
