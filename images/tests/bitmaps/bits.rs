//! Bits in memory, images to keep them in, and what an image holds.

use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use blockyard_images::ImageError;
use blockyard_images::pace::Unwatched;
use blockyard_images::qcow2::bitmaps::{
    BitSink, BitSource, BitmapToStore, LoadLimits, load_bitmap,
};
use blockyard_images::qcow2::create::{CreateOptions, create};
use blockyard_images::qcow2::layout::header::Access;
use blockyard_images::qcow2::open::read_image;
use blockyard_images::qcow2::{Options, Qcow2};
use blockyard_simulator::run;
use blockyard_storage::{Buffer, MemoryStorage, Storage};

/// One bit for each granule of a disk.
#[derive(Clone, PartialEq, Eq, Default)]
pub(crate) struct Bits(pub(crate) Vec<bool>);

impl std::fmt::Debug for Bits {
    /// There are too many to be shown.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let set = self.0.iter().filter(|bit| **bit).count();
        write!(
            f,
            "{set} of {}, the first at {:?}",
            self.0.len(),
            self.next_set(0)
        )
    }
}

impl Bits {
    /// Of a disk, those between each pair of `set` are.
    pub(crate) fn of(disk_bytes: u64, granularity_bytes: u64, set: &[(u64, u64)]) -> Self {
        let count = disk_bytes.div_ceil(granularity_bytes);
        Self(
            (0..count)
                .map(|bit| set.iter().any(|(from, to)| (*from..*to).contains(&bit)))
                .collect(),
        )
    }
}

impl BitSink for Bits {
    fn set(&mut self, bits: Range<u64>) {
        self.0[bits.start as usize..bits.end as usize].fill(true);
    }

    fn put(&mut self, first: u64, bytes: &[u8]) {
        for (index, bit) in (first as usize..self.0.len()).zip(0..bytes.len() * 8) {
            self.0[index] = bytes[bit / 8] & 1 << (bit % 8) != 0;
        }
    }

    fn memory_bytes(&self) -> u64 {
        self.0.len() as u64 / 8
    }
}

impl BitSource for Bits {
    fn next_set(&self, from: u64) -> Option<u64> {
        let from = from as usize;
        let found = self.0.get(from..)?.iter().position(|bit| *bit);
        found.map(|index| (from + index) as u64)
    }

    fn copy_to(&self, first: u64, bytes: &mut [u8]) {
        bytes.fill(0);
        for (bit, set) in self.0.iter().skip(first as usize).enumerate() {
            if *set && bit / 8 < bytes.len() {
                bytes[bit / 8] |= 1 << (bit % 8);
            }
        }
    }
}

/// A bitmap as it is to be stored.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Wanted {
    pub(crate) name: &'static str,
    pub(crate) granularity_bytes: u64,
    pub(crate) auto: bool,
    pub(crate) bits: Bits,
}

/// Stores bitmaps.
pub(crate) async fn store(image: &Qcow2, wanted: &[Wanted]) -> Result<(), ImageError> {
    let bitmaps: Vec<BitmapToStore<'_>> = wanted
        .iter()
        .map(|one| BitmapToStore {
            name: one.name.as_bytes(),
            granularity_bytes: one.granularity_bytes,
            auto: one.auto,
            bits: &one.bits,
        })
        .collect();
    image.store_bitmaps(&bitmaps).await.map(drop)
}

/// What an image says of a bitmap: how it is marked, and its bits unless they are out of date.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Kept {
    pub(crate) granularity_bytes: u64,
    pub(crate) auto: bool,
    /// `None`: in use.
    pub(crate) bits: Option<Bits>,
}

impl From<&Wanted> for Kept {
    fn from(wanted: &Wanted) -> Self {
        Self {
            granularity_bytes: wanted.granularity_bytes,
            auto: wanted.auto,
            bits: Some(wanted.bits.clone()),
        }
    }
}

/// The bitmaps of an image by name.
pub(crate) type AllKept = BTreeMap<String, Kept>;

/// What is to be there after these were stored.
pub(crate) fn all_kept(wanted: &[Wanted]) -> AllKept {
    let kept = wanted.iter().map(|one| (one.name.to_owned(), one.into()));
    kept.collect()
}

/// The bitmaps of an image, loaded as whoever opens it for writing does.
pub(crate) fn kept(image: &[u8]) -> Result<AllKept, ImageError> {
    let file = memory(image);
    now(async {
        let opened = read_image(&*file, Access::ReadWrite).await?;
        let disk_bytes = opened.header.guest_bytes();
        let mut limits = LoadLimits::of(&*file);
        let mut all = AllKept::new();
        for bitmap in &opened.bitmaps {
            let granularity_bytes = 1 << bitmap.granularity_bits;
            let mut bits = Bits::of(disk_bytes, granularity_bytes, &[]);
            if !bitmap.is_in_use() {
                load_bitmap(&*file, &opened.header, bitmap, &mut limits, &mut bits).await?;
            }
            let kept = Kept {
                granularity_bytes,
                auto: bitmap.is_auto(),
                bits: (!bitmap.is_in_use()).then_some(bits),
            };
            all.insert(String::from_utf8_lossy(&bitmap.name).into_owned(), kept);
        }
        Ok(all)
    })
}

/// A new image.
pub(crate) fn new_image(options: &CreateOptions) -> Vec<u8> {
    let file = memory(&[]);
    let plan = options.plan().expect("possible");
    now(create(&plan, &*file, None, &Unwatched)).expect("made");
    bytes_of(&*file)
}

/// Does something with an image that is opened for writing and closed, and returns it.
pub(crate) fn with_image(image: &[u8], work: impl AsyncFnOnce(&Qcow2)) -> Vec<u8> {
    let file = memory(image);
    let storage: Rc<dyn Storage> = file.clone();
    now(async {
        let image = Qcow2::open(storage, None, Options::default()).await;
        let image = image.expect("it opens");
        work(&image).await;
        image.close().await.expect("closed");
    });
    bytes_of(&*file)
}

/// These bytes as a file.
pub(crate) fn memory(bytes: &[u8]) -> Rc<MemoryStorage> {
    let file = Rc::new(MemoryStorage::new(bytes.len() as u64));
    let written = now(file.write(0, Buffer::copy_of(bytes)));
    written.outcome.expect("written");
    file
}

/// All that a file holds.
pub(crate) fn bytes_of(file: &dyn Storage) -> Vec<u8> {
    let length = file.facts().length_bytes as usize;
    let read = now(file.read(0, Buffer::zeroed(length)));
    read.outcome.expect("read");
    read.buffer.as_slice().to_vec()
}

/// The result of a future that waits for nothing.
pub(crate) fn now<T>(future: impl Future<Output = T>) -> T {
    run(future, || false).expect("memory waits for nothing")
}
