//! What is given up comes back, however much it is and however it is scattered.

use std::rc::Rc;

use blockyard_images::qcow2::create::CreateOptions;
use blockyard_images::qcow2::{Options, Qcow2};
use blockyard_simulator::Seed;
use blockyard_storage::{ByteRange, MemoryStorage, Storage};

use crate::mover::Mover;
use crate::recount::recount;
use crate::setup::{Setup, all_bytes, now};

/// An image that is used alone.
struct Used {
    file: Rc<MemoryStorage>,
    mover: Mover,
}

impl Used {
    fn new(size: u64, cluster_bytes: u64, refcount_bits: u64) -> Self {
        let mut create = CreateOptions::new(size);
        create.cluster_bytes = cluster_bytes;
        create.refcount_bits = refcount_bits;
        let setup = Setup {
            create,
            options: Options {
                // The fewest that there may be, which is what images get if nobody says more.
                refcount_cache_bytes: 4 * cluster_bytes,
                ..Options::default()
            },
            below: None,
            skips_zeroes: false,
            device: None,
        };
        let (file, _) = setup.memory();
        let storage = Rc::clone(&file) as Rc<dyn Storage>;
        let image = now(Qcow2::open(storage, None, setup.options)).expect("sound");
        let mover = Mover::new(image, None, false);
        Self { file, mover }
    }

    fn write(&self, range: ByteRange) {
        let bytes = vec![7; range.length() as usize];
        now(self.mover.write(range.offset(), &bytes)).expect("written");
    }

    fn ends_without_leaks(self) {
        now(self.mover.image.close()).expect("closed");
        let findings = recount(&all_bytes(&self.file));
        assert_eq!(findings.corruptions, Vec::<String>::new());
        assert_eq!(findings.leaks.len(), 0);
    }
}

#[test]
fn nothing_leaks_whatever_is_discarded() {
    for cluster_bytes in [512, 1024, 4096] {
        let size = 12 << 20;
        let used = Used::new(size, cluster_bytes, 16);
        let seed = Seed::new(cluster_bytes);
        for _ in 0..800 {
            let length = *seed.pick(&[512, 4096, 65_536, 1 << 20]);
            let range = ByteRange::new(seed.below((size - length) / 512) * 512, length);
            if seed.one_in(2) {
                used.write(range);
            } else {
                now(used.mover.discard(range)).expect("discarded");
            }
        }
        used.ends_without_leaks();
    }
}

#[test]
fn nothing_leaks_however_long_somebody_looks() {
    for refcount_bits in [1, 16] {
        let clusters = 140_000;
        let used = Used::new(clusters * 512, 512, refcount_bits);
        let whole = ByteRange::new(0, clusters * 512);
        used.write(whole);
        // A reader that is slow, and discards of every other cluster meanwhile.
        let looking = now(used.mover.image.map(ByteRange::new(0, 512))).expect("mapped");
        for cluster in (0..clusters).step_by(2) {
            let range = ByteRange::new(cluster * 512, 512);
            now(used.mover.discard(range)).expect("discarded");
        }
        drop(looking);
        used.ends_without_leaks();
    }
}
