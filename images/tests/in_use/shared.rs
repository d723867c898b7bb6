//! What an entry has not alone stays as it is, wherever what it has alone ends.

use std::rc::Rc;

use blockyard_images::qcow2::create::CreateOptions;
use blockyard_images::qcow2::{Options, Qcow2};
use blockyard_storage::{Buffer, ByteRange, MemoryStorage, Storage};

use crate::mover::Mover;
use crate::recount::bytes;
use crate::setup::{Setup, all_bytes, now};

const CLUSTER: u64 = 65_536;
/// Where things are in an image whose first clusters are written at once.
const REFCOUNT_BLOCK: u64 = 2 * CLUSTER;
const L1_TABLE: u64 = 3 * CLUSTER;
const L2_TABLE: u64 = 4 * CLUSTER;
const DATA: u64 = 5 * CLUSTER;
const COPIED: u64 = 1 << 63;

/// An image of three clusters that hold 1.
fn image() -> Rc<MemoryStorage> {
    let mut setup = Setup::by(&blockyard_simulator::Seed::new(0), true);
    setup.create = CreateOptions::new(4 * CLUSTER);
    setup.device = None;
    let (file, _) = setup.memory();
    let mover = open(&file);
    now(mover.write(0, &vec![1; 3 * CLUSTER as usize])).expect("written");
    now(mover.image.close()).expect("closed");
    assert_eq!(word(&file, L2_TABLE + 8), COPIED | (DATA + CLUSTER));
    file
}

fn open(file: &Rc<MemoryStorage>) -> Mover {
    let file = Rc::clone(file) as Rc<dyn Storage>;
    let image = now(Qcow2::open(file, None, Options::default())).expect("sound");
    Mover::new(image, None, false)
}

fn word(file: &MemoryStorage, at: u64) -> u64 {
    let word = bytes(&all_bytes(file), at, 8);
    u64::from_be_bytes(word.try_into().expect("eight"))
}

fn put(file: &MemoryStorage, at: u64, bytes: &[u8]) {
    let put = now(file.write(at, Buffer::copy_of(bytes)));
    put.outcome.expect("memory");
}

/// A cluster has two references.
fn share(file: &MemoryStorage, cluster: u64) {
    put(file, REFCOUNT_BLOCK + cluster * 2, &[0, 2]);
}

#[test]
fn a_write_stops_before_a_shared_neighbour() {
    let file = image();
    share(&file, DATA / CLUSTER + 1);
    put(&file, L2_TABLE + 8, &(DATA + CLUSTER).to_be_bytes());
    let mover = open(&file);
    let new = vec![2; 3 * CLUSTER as usize];
    now(mover.write(0, &new)).expect("written");
    assert_eq!(now(mover.read(ByteRange::new(0, 3 * CLUSTER))), Ok(new));
    now(mover.image.close()).expect("closed");
    let file = all_bytes(&file);
    let held = |cluster: u64| bytes(&file, DATA + cluster * CLUSTER, 1)[0];
    assert_eq!(
        [held(0), held(1), held(2)],
        [2, 1, 2],
        "in place, elsewhere, in place"
    );
}

#[test]
fn a_copy_of_a_shared_table_has_nothing_alone() {
    let file = image();
    // Its entries say that they have their clusters alone, which the table itself has not.
    share(&file, L2_TABLE / CLUSTER);
    put(&file, L1_TABLE, &L2_TABLE.to_be_bytes());
    for cluster in 0..3 {
        share(&file, DATA / CLUSTER + cluster);
    }
    let mover = open(&file);
    now(mover.write(0, &[2; 512])).expect("written");
    now(mover.write(2 * CLUSTER, &[2; 512])).expect("written");
    now(mover.image.close()).expect("closed");
    assert_ne!(word(&file, L1_TABLE), L2_TABLE);
    let file = all_bytes(&file);
    let data = bytes(&file, DATA, 3 * CLUSTER);
    assert!(data.iter().all(|byte| *byte == 1), "somebody else's data");
}
