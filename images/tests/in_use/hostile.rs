//! Images with damaged tables: used without a panic, an endless loop or memory without bound, whatever comes of it.

use std::cell::Cell;
use std::rc::Rc;

use blockyard_images::ImageError;
use blockyard_images::qcow2::layout::entries::L1Entry;
use blockyard_images::qcow2::layout::header::{Access, Header};
use blockyard_images::qcow2::layout::snapshots::Snapshot;
use blockyard_images::qcow2::overlap::OverlapChecks;
use blockyard_images::qcow2::units::{GuestCluster, HostOffset};
use blockyard_images::qcow2::{Options, Qcow2};
use blockyard_simulator::{Seed, each_seed, run};
use blockyard_storage::{Buffer, ByteRange, MemoryStorage, Storage};

use crate::mover::Mover;
use crate::opened_images;
use crate::recount::bytes;
use crate::sequences::{Step, range_of};
use crate::setup::{Setup, all_bytes, now, patches};

/// Puts nonsense into the tables of an image.
fn damage(seed: &Seed, file: &mut [u8]) {
    let header = Header::parse(file, Access::Check).expect("an image");
    let cluster_bytes = header.geometry.cluster_bytes();
    let l1 = header.l1_table.0;
    let entry = bytes(file, l1, 8);
    let entry = L1Entry(u64::from_be_bytes(entry.try_into().expect("eight")));
    let block = bytes(file, header.refcount_table.0, 8);
    let block = u64::from_be_bytes(block.try_into().expect("eight"));
    let mut tables = vec![
        (l1, header.l1_table_bytes()),
        (header.refcount_table.0, 64),
        (block, 512),
    ];
    if let Some(table) = entry.table() {
        tables.push((table.0, cluster_bytes.min(4096)));
        tables.push((table.0, 256));
    }
    for _ in 0..1 + seed.below(6) {
        let (at, length) = *seed.pick(&tables);
        let place = || (at + seed.below(length.max(1))) as usize;
        let other = file.get(place()).copied().unwrap_or(0);
        if let Some(byte) = file.get_mut(place()) {
            match seed.below(3) {
                0 => *byte ^= 1 << seed.below(8),
                1 => *byte = seed.any() as u8,
                _ => *byte = other,
            }
        }
    }
}

async fn step(mover: &Mover, step: &Step) -> Result<(), ImageError> {
    match step {
        Step::Write(offset, bytes) => mover.write(*offset, bytes).await,
        Step::WriteCompressed(cluster, bytes) => mover.write_compressed(*cluster, bytes).await,
        Step::Zero(range, may_unmap) => mover.zero(*range, *may_unmap).await,
        Step::Discard(range) => mover.discard(*range).await,
        Step::Fill(range, by_zeroes) => mover.fill(*range, *by_zeroes).await,
        Step::Read(range) => mover.read(*range).await.map(drop),
        Step::Flush | Step::Reopen => mover.image.flush().await,
        Step::Clean => {
            mover.image.clean_caches();
            Ok(())
        }
        Step::Resize(length) => mover.image.resize(*length, 0).await,
    }
}

#[test]
fn damaged_tables_do_no_more_than_fail() {
    let corrupt = Rc::new(Cell::new(0));
    let found = Rc::clone(&corrupt);
    each_seed(
        "blockyard-images",
        "damaged_tables_do_no_more_than_fail",
        1500,
        move |number| {
            let seed = Seed::new(9_000_000 + number);
            let setup = Setup::by(&seed, true);
            let (file, data) = setup.memory();
            let open = |file: Rc<MemoryStorage>| {
                let data = data.clone().map(|data| data as Rc<dyn Storage>);
                Qcow2::open(file as Rc<dyn Storage>, data, setup.options)
            };
            let image = now(open(Rc::clone(&file))).expect("sound");
            let mover = Mover::new(image, setup.below.clone(), setup.skips_zeroes);
            let length = setup.create.size_bytes;
            for cluster in 0..4 {
                let range = range_of(&seed, length, setup.create.cluster_bytes);
                let bytes = patches(&seed, range.length() as usize);
                now(mover.write(range.offset(), &bytes)).expect("written");
                let start = cluster * setup.create.cluster_bytes;
                if start < length && !setup.has_data_file() {
                    let count = setup.create.cluster_bytes.min(length - start);
                    let bytes = patches(&seed, count as usize);
                    now(mover.write_compressed(GuestCluster(cluster), &bytes)).expect("written");
                }
            }
            now(mover.image.close()).expect("closed");
            let mut bytes = all_bytes(&file);
            damage(&seed, &mut bytes);
            now(file.write(0, Buffer::copy_of(&bytes)))
                .outcome
                .expect("memory");
            let Ok(image) = now(open(file)) else {
                return;
            };
            let mover = Mover::new(image, setup.below.clone(), setup.skips_zeroes);
            let mut gone = false;
            for _ in 0..30 {
                let length = mover.image.length_bytes();
                let next = Step::by(&seed, &setup, length.min(4 << 20));
                let ended = run(step(&mover, &next), || false).expect("memory waits for nothing");
                match ended {
                    Err(ImageError::Corrupt(what)) if what.fatal => {
                        assert!(!gone, "told twice");
                        gone = true;
                        found.set(found.get() + 1);
                    }
                    Err(ImageError::Broken(why)) => assert!(gone, "broken without a reason: {why}"),
                    Ok(()) | Err(_) => {}
                }
                if gone {
                    let refused = mover.image.map_now(ByteRange::new(0, 1));
                    assert!(matches!(refused, Some(Err(ImageError::Broken(_)))));
                }
            }
        },
    );
    assert!(corrupt.get() > 0, "nothing was damaged");
}

#[test]
fn snapshots_that_say_they_are_large_cost_no_more_than_their_bytes() {
    let snapshot = Snapshot {
        l1_table: HostOffset(opened_images::L1_TABLE),
        l1_entries: u32::MAX,
        ..Snapshot::default()
    };
    let entry = snapshot.encode().expect("short");
    let mut image = opened_images::Image::valid();
    let table = image.0.len() as u64;
    let count = 65_535_u32;
    image.put(table, &entry.repeat(count as usize));
    image.put(60, &count.to_be_bytes());
    image.put(64, &table.to_be_bytes());
    let file = Rc::new(MemoryStorage::new(0));
    let written = now(file.write(0, Buffer::copy_of(&image.0)));
    written.outcome.expect("memory");
    let options = Options {
        overlap_checks: OverlapChecks::ALL,
        ..Options::default()
    };
    // It would be 32 GiB for each of them.
    let image = now(Qcow2::open(file, None, options)).expect("nothing is wrong yet");
    let mover = Mover::new(image, None, false);
    // The active table is theirs, too.
    match now(mover.write(0, &[1])) {
        Err(ImageError::Corrupt(told)) => assert!(told.text.contains("overlaps"), "{}", told.text),
        other => panic!("{other:?}"),
    }
}
