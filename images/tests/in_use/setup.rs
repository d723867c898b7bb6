//! [`Setup`]: an image by seed: any geometry, any way to use it.

use std::future::Future;
use std::rc::Rc;

use blockyard_images::pace::Unwatched;
use blockyard_images::qcow2::Options;
use blockyard_images::qcow2::create::{CreateOptions, create};
use blockyard_images::qcow2::overlap::OverlapChecks;
use blockyard_images::qcow2::units::{Compression, Version};
use blockyard_simulator::{Seed, run};
use blockyard_storage::{Buffer, MemoryStorage, Storage};

use crate::recount::bytes;

/// An image and how it is used.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) create: CreateOptions,
    pub(crate) options: Options,
    /// Bytes of the backing file.
    pub(crate) below: Option<Rc<Vec<u8>>>,
    pub(crate) skips_zeroes: bool,
    /// Length of a device in bytes; `None`: a file.
    pub(crate) device: Option<u64>,
}

impl Setup {
    /// One of all images. `small`: where bytes are compared often.
    pub(crate) fn by(seed: &Seed, small: bool) -> Self {
        let large: &[u32] = if small { &[14, 14, 16] } else { &[16, 17, 21] };
        let bits = match seed.below(if small { 8 } else { 12 }) {
            0..4 => 9,
            4 => 10,
            5 => 12,
            6 => 14,
            _ => *seed.pick(large),
        };
        let clusters = match bits {
            9..12 => 1 + seed.below(300),
            12..16 => 1 + seed.below(40),
            _ => 1 + seed.below(5),
        };
        let size = (clusters << bits) - 512 * seed.below((1 << bits) / 512);
        let v2 = seed.one_in(6);
        let mut create = CreateOptions::new(size);
        create.cluster_bytes = 1 << bits;
        if v2 {
            create.version = Version::V2;
        } else {
            create.refcount_bits = 1 << seed.below(7);
            create.extended_l2 = bits >= 14 && seed.one_in(2);
            create.lazy_refcounts = seed.one_in(6);
            if seed.one_in(3) {
                create.compression = Compression::Zstd;
            }
            if seed.one_in(6) {
                create.data_file_name = Some(b"data".to_vec());
                create.data_file_raw = seed.one_in(2);
            }
        }
        let has_backing = !create.data_file_raw && seed.one_in(2);
        if has_backing {
            create.backing_name = Some(b"below".to_vec());
            create.backing_format = Some("raw".to_owned());
        }
        let below = has_backing.then(|| {
            let length = match seed.below(3) {
                0 => size / 2,
                1 => size + 5000,
                _ => size,
            };
            Rc::new(patches(seed, length as usize))
        });
        let entry = 512 << seed.below(u64::from(bits) - 8);
        let options = Options {
            read_only: false,
            lazy_refcounts: create.lazy_refcounts,
            l2_cache_bytes: entry * (1 + seed.below(16)),
            l2_cache_entry_bytes: entry,
            refcount_cache_bytes: seed.below(65_536),
            discard_no_unref: !v2 && seed.one_in(4),
            pass_discard_request: seed.one_in(2),
            pass_discard_snapshot: true,
            pass_discard_other: seed.one_in(4),
            given_up_bytes_max: *Seed::new(size).pick(&[0, 2 << bits, 64 << 20]),
            overlap_checks: match seed.below(3) {
                0 => OverlapChecks::NONE,
                1 => OverlapChecks::ALL,
                _ => OverlapChecks::CACHED,
            },
        };
        Self {
            create,
            options,
            below,
            skips_zeroes: seed.one_in(2),
            // Room for everything twice, and for the tables.
            device: seed.one_in(8).then(|| (size << 2) + (64 << bits)),
        }
    }

    /// What the guest sees at first.
    pub(crate) fn disk(&self) -> Vec<u8> {
        let below = self.below.as_deref().map_or(&[][..], |below| below);
        bytes(below, 0, self.create.size_bytes)
    }

    pub(crate) fn has_data_file(&self) -> bool {
        self.create.data_file_name.is_some()
    }

    /// Makes the image.
    pub(crate) fn make(&self, file: &dyn Storage, data_file: Option<&dyn Storage>) {
        let plan = self.create.plan().expect("possible");
        now(create(&plan, file, data_file, &Unwatched)).expect("made");
    }

    /// The image in memory.
    pub(crate) fn memory(&self) -> (Rc<MemoryStorage>, Option<Rc<MemoryStorage>>) {
        let file = Rc::new(match self.device {
            Some(length) => MemoryStorage::new(length).fixed_length(),
            None => MemoryStorage::new(0),
        });
        let data = self.has_data_file().then(|| Rc::new(MemoryStorage::new(0)));
        let data_file = data.as_ref().map(|data| &**data as &dyn Storage);
        self.make(&*file, data_file);
        (file, data)
    }
}

/// Bytes in patches, some of them zeroes.
pub(crate) fn patches(seed: &Seed, length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        let fill = if seed.one_in(3) { 0 } else { seed.any() as u8 };
        let patch = 1 + seed.below(5000) as usize;
        let end = length.min(bytes.len() + patch);
        bytes.resize(end, fill);
    }
    bytes
}

/// The result of a future that waits for nothing.
pub(crate) fn now<T>(future: impl Future<Output = T>) -> T {
    run(future, || false).expect("memory waits for nothing")
}

/// All bytes of a storage in memory.
pub(crate) fn all_bytes(storage: &MemoryStorage) -> Vec<u8> {
    let length = storage.facts().length_bytes as usize;
    let read = now(storage.read(0, Buffer::zeroed(length)));
    read.buffer.as_slice().to_vec()
}
