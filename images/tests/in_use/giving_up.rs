//! What is given up comes back, however much it is and however it is scattered.

use std::rc::Rc;

use blockyard_images::qcow2::create::CreateOptions;
use blockyard_images::qcow2::{Options, Qcow2, Source};
use blockyard_simulator::{Seed, each_seed, run};
use blockyard_storage::{Buffer, ByteRange, LocalFuture, MemoryStorage, Storage};

use crate::cells::Cells;
use crate::mover::Mover;
use crate::recount::recount;
use crate::setup::{Setup, all_bytes, now};
use crate::yard::{Failures, Yard, all};

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

#[test]
fn a_guest_that_never_flushes_gets_its_room_back() {
    for cluster_bytes in [512, 65_536] {
        let used = Used::new(8 << 20, cluster_bytes, 16);
        for round in 0..100 {
            let range = ByteRange::new((round % 3) << 20, 1 << 20);
            used.write(range);
            now(used.mover.discard(range)).expect("discarded");
        }
        let length = used.file.facts().length_bytes;
        // Twice the MiB that may be given up, what was being written, and tables.
        assert!(length < 5 << 20, "{length} bytes were taken");
        used.ends_without_leaks();
    }
}

#[test]
fn what_somebody_reads_is_not_what_others_get() {
    let used = Used::new(8 << 20, 65_536, 16);
    let first = ByteRange::new(0, 65_536);
    used.write(first);
    let looking = now(used.mover.image.map(first)).expect("mapped");
    let Source::Data { at } = looking.source else {
        panic!("it was written");
    };
    now(used.mover.discard(first)).expect("discarded");
    let others = ByteRange::new(1 << 20, 1 << 20);
    let others_work = |rounds: u8| {
        for value in 0..rounds {
            let bytes = vec![100 + value; 1 << 20];
            now(used.mover.write(others.offset(), &bytes)).expect("written");
            now(used.mover.discard(others)).expect("discarded");
        }
        used.file.facts().length_bytes
    };
    others_work(20);
    let read = now(used.file.read(at.0, Buffer::zeroed(65_536)));
    assert!(read.buffer.as_slice().iter().all(|byte| *byte == 7));
    drop(looking);
    let before = others_work(4);
    assert_eq!(others_work(50), before, "nothing is used again");
    used.ends_without_leaks();
}

/// Somebody who writes the same few clusters and discards them, without ever flushing.
fn restless(
    mover: &Mover,
    cells: &Rc<Cells>,
    part: ByteRange,
    rounds: u8,
) -> LocalFuture<'static, ()> {
    let (mover, cells) = (mover.clone(), Rc::clone(cells));
    Box::pin(async move {
        for round in 1..=rounds {
            let bytes = vec![round; part.length() as usize];
            let issued = cells.issue(part, round);
            mover.write(part.offset(), &bytes).await.expect("written");
            issued.done();
            let issued = cells.issue(part, 0);
            mover.discard(part).await.expect("discarded");
            issued.done();
        }
    })
}

#[test]
fn room_is_used_again_while_the_power_goes() {
    each_seed(
        "blockyard-images",
        "room_is_used_again_while_the_power_goes",
        60,
        |number| {
            let seed = Seed::new(9_000_000 + number);
            let mut setup = Setup::by(&seed, true);
            let cluster_bytes = *seed.pick(&[512, 1024, 4096]);
            setup.create = CreateOptions::new(64 * cluster_bytes);
            setup.create.cluster_bytes = cluster_bytes;
            setup.create.lazy_refcounts = seed.one_in(4);
            setup.options.lazy_refcounts = setup.create.lazy_refcounts;
            setup.options.given_up_bytes_max = seed.below(8) * cluster_bytes;
            setup.options.discard_no_unref = false;
            setup.below = None;
            setup.device = None;
            let yard = Yard::with(number, setup, seed);
            let mover = yard.mover();
            let before = yard.image.bytes().len() as u64;
            let part = |index: u64| ByteRange::new(index * 16 * cluster_bytes, 4 * cluster_bytes);
            let rounds = 20;
            let mut tasks: Vec<_> = (0..3)
                .map(|index| restless(&mover, &yard.cells, part(index), rounds))
                .collect();
            if yard.seed.one_in(2) {
                tasks.extend(yard.clients(&mover, 4, 8, Failures::Never).pop());
            }
            let ended = run(all(&mut tasks), || {
                yard.check_after_cut(yard.world.steps());
                yard.world.step()
            });
            assert!(ended.is_some(), "somebody waits for ever");
            drop(tasks);
            let grown = (yard.image.bytes().len() as u64).saturating_sub(before);
            let written = 3 * u64::from(rounds) * 4 * cluster_bytes;
            assert!(
                grown < written / 2,
                "{grown} of {written}: nothing was used again"
            );
            let closed = run(mover.image.close(), || yard.world.step());
            closed.expect("it ends").expect("closed");
            yard.check_bytes(yard.image.bytes(), None);
            assert_eq!(recount(&yard.image.bytes()).leaks, Vec::<u64>::new());
        },
    );
}
