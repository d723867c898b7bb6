//! Tables in memory: read once for everybody, and no more of them than there is room for.

use blockyard_images::qcow2::Source;
use blockyard_images::qcow2::create::CreateOptions;
use blockyard_simulator::{Seed, run};
use blockyard_storage::{ByteRange, LocalFuture};

use crate::setup::Setup;
use crate::yard::{Failures, Yard, all};

/// An image of 512-byte clusters whose disk is written from its start.
fn yard(l2_cache_bytes: u64, written: u64) -> Yard {
    let seed = Seed::new(3);
    let mut setup = Setup::by(&seed, true);
    setup.create = CreateOptions::new(1 << 20);
    setup.create.cluster_bytes = 512;
    setup.below = None;
    setup.device = None;
    setup.options.lazy_refcounts = false;
    setup.options.l2_cache_bytes = l2_cache_bytes;
    setup.options.l2_cache_entry_bytes = 512;
    Yard::filled(3, setup, seed, ByteRange::new(0, written))
}

#[test]
fn many_who_need_one_table_read_it_once() {
    let yard = yard(1 << 20, 65_536);
    let mover = yard.mover();
    let before = yard.world.steps();
    let looks = (0..32).map(|index| {
        let mover = mover.clone();
        Box::pin(async move {
            let range = ByteRange::new(index * 512, 512);
            assert!(mover.image.map_now(range).is_none(), "not read yet");
            let extent = mover.image.map(range).await.expect("sound");
            assert!(matches!(extent.source, Source::Data { .. }));
            assert!(mover.image.map_now(range).is_some(), "in memory now");
        }) as LocalFuture<'static, ()>
    });
    let mut looks: Vec<_> = looks.collect();
    run(all(&mut looks), || yard.world.step()).expect("it ends");
    assert_eq!(yard.world.steps() - before, 1, "one read for all of them");
}

#[test]
fn who_reads_a_table_may_give_up() {
    let yard = yard(1 << 20, 65_536);
    let mover = yard.mover();
    let look = || {
        let mover = mover.clone();
        Box::pin(async move {
            let extent = mover.image.map(ByteRange::new(0, 512)).await;
            assert!(extent.is_ok());
        }) as LocalFuture<'static, ()>
    };
    let mut first = vec![look()];
    assert!(run(all(&mut first), || false).is_none(), "it waits");
    let mut second = vec![look()];
    assert!(
        run(all(&mut second), || false).is_none(),
        "it waits for the first"
    );
    drop(first);
    run(all(&mut second), || yard.world.step()).expect("it ends");
}

#[test]
fn the_fewest_tables_do_for_many_at_once() {
    let yard = yard(0, 900 << 10);
    let mover = yard.mover();
    let mut clients = yard.clients(&mover, 24, 20, Failures::Never);
    let ended = run(all(&mut clients), || yard.world.step());
    assert!(ended.is_some(), "somebody waits for ever");
    // Each table was in memory at some time, and few are.
    let held = (0..32).filter(|table| {
        let range = ByteRange::new(table * 32_768, 512);
        mover.image.map_now(range).is_some()
    });
    assert!(held.count() <= 4);
}
