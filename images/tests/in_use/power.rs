//! Clients at the same time, and the power that may go at every step.

use std::rc::Rc;

use blockyard_images::qcow2::create::CreateOptions;
use blockyard_images::qcow2::units::Version;
use blockyard_simulator::{Seed, each_seed, run};
use blockyard_storage::ByteRange;

use crate::recount::recount;
use crate::setup::Setup;

use crate::yard::{Failures, Yard, all};

#[test]
fn a_power_cut_at_any_step_leaves_what_was_flushed_and_leaks_at_most() {
    each_seed(
        "blockyard-images",
        "a_power_cut_at_any_step_leaves_what_was_flushed_and_leaks_at_most",
        150,
        |number| {
            let yard = Yard::new(number);
            let mover = yard.mover();
            let count = 1 + yard.seed.below(5);
            let mut tasks = yard.clients(&mover, count, 12, Failures::Never);
            let ended = run(all(&mut tasks), || {
                yard.check_after_cut(yard.world.steps());
                yard.world.step()
            });
            assert!(ended.is_some(), "somebody waits for ever");
            drop(tasks);
            let closed = run(mover.image.close(), || yard.world.step());
            closed.expect("it ends").expect("closed");
            let data = yard.data.as_ref().map(|data| data.bytes());
            yard.check_bytes(yard.image.bytes(), data);
        },
    );
}

#[test]
fn after_a_power_cut_an_image_is_used_on() {
    each_seed(
        "blockyard-images",
        "after_a_power_cut_an_image_is_used_on",
        150,
        |number| {
            let yard = Yard::new(500_000 + number);
            for _ in 0..4 {
                let mover = yard.mover();
                let mut tasks = yard.clients(&mover, 3, 10, Failures::Never);
                let mut left = yard.seed.below(200);
                let ended = run(all(&mut tasks), || {
                    left = left.saturating_sub(1);
                    left > 0 && yard.world.step()
                });
                if ended.is_none() && left > 0 {
                    panic!("somebody waits for ever");
                }
                drop((tasks, mover));
                yard.world.cut_power();
                yard.settle();
            }
        },
    );
}

#[test]
fn refcount_blocks_come_while_the_power_goes() {
    each_seed(
        "blockyard-images",
        "refcount_blocks_come_while_the_power_goes",
        60,
        |number| {
            let seed = Seed::new(8_000_000 + number);
            let mut setup = Setup::by(&seed, true);
            // A block counts 64 clusters, of 512 bytes.
            setup.create = CreateOptions::new(128 << 10);
            setup.create.cluster_bytes = 512;
            setup.create.refcount_bits = 64;
            setup.below = None;
            setup.device = None;
            let yard = Yard::with(number, setup, seed);
            let mover = yard.mover();
            let mut tasks = yard.clients(&mover, 3, 4, Failures::Never);
            let writer = mover.clone();
            let (cells, whole) = (Rc::clone(&yard.cells), ByteRange::new(0, 128 << 10));
            let first = async move {
                for piece in whole.pieces(16 << 10) {
                    let issued = cells.issue(piece, 77);
                    let bytes = vec![77; piece.length() as usize];
                    writer.write(piece.offset(), &bytes).await.expect("written");
                    issued.done();
                    let flushing = cells.flush();
                    writer.image.flush().await.expect("flushed");
                    cells.flushed(flushing);
                }
            };
            let step = || {
                yard.check_after_cut(yard.world.steps());
                yard.world.step()
            };
            run(first, step).expect("it ends");
            assert!(
                run(all(&mut tasks), step).is_some(),
                "somebody waits for ever"
            );
        },
    );
}

#[test]
fn the_length_changes_while_others_work_and_the_power_goes() {
    each_seed(
        "blockyard-images",
        "the_length_changes_while_others_work_and_the_power_goes",
        60,
        |number| {
            let yard = Yard::new(7_000_000 + number);
            if yard.setup.device.is_some() || yard.setup.create.version == Version::V2 {
                return;
            }
            let mover = yard.mover();
            let mut tasks = yard.clients(&mover, 2, 10, Failures::Never);
            tasks.push(yard.resizer(&mover, 3));
            let ended = run(all(&mut tasks), || {
                yard.check_after_cut(yard.world.steps());
                yard.world.step()
            });
            assert!(ended.is_some(), "somebody waits for ever");
            let closed = run(mover.image.close(), || yard.world.step());
            closed.expect("it ends").expect("closed");
            let data = yard.data.as_ref().map(|data| data.bytes());
            yard.check_bytes(yard.image.bytes(), data);
        },
    );
}

#[test]
fn the_refcount_table_moves_while_the_power_goes() {
    {
        let refcount_bits = 64;
        let seed = Seed::new(refcount_bits);
        let mut setup = Setup::by(&seed, true);
        setup.create = CreateOptions::new(5 << 20);
        setup.create.cluster_bytes = 512;
        setup.create.refcount_bits = refcount_bits;
        setup.below = None;
        setup.device = None;
        setup.options.lazy_refcounts = false;
        // What the table that is made with the image covers: a cluster of entries.
        let covered = 64 * (512 * 8 / refcount_bits) * 512;
        let filled = covered - covered / 16 - (128 << 10);
        let filled = ByteRange::new(0, filled).align_inward(4096);
        let yard = Yard::filled(refcount_bits, setup, seed, filled);
        let mover = yard.mover();
        let table = mover.image.header().refcount_table;
        let writing = async {
            for piece in ByteRange::new(filled.end(), 512 << 10).pieces(64 << 10) {
                let value = 1 + (piece.offset() >> 16) as u8;
                let issued = yard.cells.issue(piece, value);
                let bytes = vec![value; piece.length() as usize];
                mover.write(piece.offset(), &bytes).await.expect("written");
                issued.done();
                let flushing = yard.cells.flush();
                mover.image.flush().await.expect("flushed");
                yard.cells.flushed(flushing);
            }
        };
        let mut moves = 0;
        let ended = run(writing, || {
            // The move itself, some of what comes before, and of what comes after.
            let moved = mover.image.header().refcount_table != table;
            moves += u64::from(moved || mover.image.file().facts().length_bytes >= covered);
            if moves > 0 && moves < 40 || yard.world.steps().is_multiple_of(512) {
                yard.check_after_cut(yard.world.steps());
            }
            yard.world.step()
        });
        assert!(ended.is_some());
        let now = mover.image.header().refcount_table;
        assert_ne!(now, table, "it did not move");
        run(mover.image.close(), || yard.world.step())
            .expect("it ends")
            .expect("closed");
        yard.check_bytes(yard.image.bytes(), None);
        let findings = recount(&yard.image.bytes());
        assert_eq!(findings.leaks, Vec::<u64>::new());
    }
}

#[test]
fn an_l1_table_of_many_blocks_finds_its_place_while_the_power_goes() {
    let seed = Seed::new(1);
    let mut setup = Setup::by(&seed, true);
    setup.create = CreateOptions::new(1 << 20);
    setup.create.cluster_bytes = 512;
    setup.create.refcount_bits = 64;
    setup.below = None;
    setup.device = None;
    setup.options.lazy_refcounts = false;
    let yard = Yard::filled(1, setup, seed, ByteRange::new(0, 40_960));
    let mover = yard.mover();
    // A block counts 64 clusters; the table takes 512, and more blocks than the refcount table has entries for.
    let length = 1 << 30;
    let resizing = async {
        mover.image.resize(length, 0).await.expect("longer");
        mover
            .write(length - 1000, &[5; 1000])
            .await
            .expect("written");
        mover.image.flush().await.expect("flushed");
    };
    let ended = run(resizing, || {
        let file = yard.image.bytes_after_cut(yard.world.steps());
        let findings = recount(&file);
        assert_eq!(findings.corruptions, Vec::<String>::new());
        yard.world.step()
    });
    assert!(ended.is_some());
    let read = run(mover.read(ByteRange::new(length - 1000, 1000)), || {
        yard.world.step()
    });
    assert_eq!(read.expect("it ends").expect("read"), [5; 1000]);
    run(mover.image.close(), || yard.world.step())
        .expect("it ends")
        .expect("closed");
    let findings = recount(&yard.image.bytes());
    assert_eq!(findings.corruptions, Vec::<String>::new());
    assert_eq!(findings.leaks, Vec::<u64>::new());
}

#[test]
fn an_l1_table_of_many_clusters_comes_while_others_write() {
    each_seed(
        "blockyard-images",
        "an_l1_table_of_many_clusters_comes",
        40,
        |number| {
            let seed = Seed::new(8_500_000 + number);
            let mut setup = Setup::by(&seed, true);
            setup.create = CreateOptions::new(256 << 10);
            setup.create.cluster_bytes = 512;
            setup.create.refcount_bits = 64;
            setup.below = None;
            setup.device = None;
            setup.options.lazy_refcounts = false;
            let yard = Yard::with(number, setup, seed);
            let mover = yard.mover();
            let mut tasks = yard.clients(&mover, 4, 20, Failures::Never);
            // A block counts 64 clusters, itself among them, and the table takes 100 that stand together.
            let longer = mover.clone();
            tasks.push(Box::pin(async move {
                longer.image.resize(100 << 21, 0).await.expect("longer");
            }));
            let ended = run(all(&mut tasks), || {
                if yard.seed.one_in(16) {
                    let file = yard.image.bytes_after_cut(yard.world.steps());
                    assert_eq!(recount(&file).corruptions, Vec::<String>::new());
                }
                yard.world.step()
            });
            assert!(ended.is_some(), "somebody waits for ever");
            let closed = run(mover.image.close(), || yard.world.step()).expect("it ends");
            closed.expect("closed");
            let findings = recount(&yard.image.bytes());
            assert_eq!(findings.corruptions, Vec::<String>::new());
            assert_eq!(findings.leaks, Vec::<u64>::new());
        },
    );
}
