//! Room that is given up becomes free behind requests.

use blockyard_simulator::Fault;
use blockyard_storage::error::ENOSPC;
use blockyard_storage::{ByteRange, Operation as StorageOperation};

use super::model::Operation;
use super::yard::{Setup, Yard};
use crate::node::Node;

const CLUSTER: u64 = 4096;

fn at(cluster: u64, clusters: u64) -> ByteRange {
    ByteRange::new(cluster * CLUSTER, clusters * CLUSTER)
}

/// An image of which four clusters may be given up.
fn yard() -> Yard {
    Yard::new(Setup {
        given_up_bytes_max: 4 * CLUSTER,
        ..Setup::new(1, 12)
    })
}

#[test]
fn nobody_waits_for_room_to_become_free() {
    let yard = yard();
    let node = yard.open();
    let image = node.image();
    for round in 1..20 {
        let write = Operation::Write(at(0, 5), round);
        yard.drive(write.carry_out(&node)).expect("written");
        let discard = Operation::Discard(at(0, 5));
        yard.drive(discard.carry_out(&node)).expect("discarded");
        assert!(image.wants_flush(), "the discard has waited for it");
        yard.finish_what_is_left();
        assert!(!image.wants_flush());
        assert_eq!(image.given_up_clusters(), 0);
    }
    // Those that are written, those of the round before, and tables.
    assert!(yard.image.bytes().len() as u64 <= 16 * CLUSTER);
}

#[test]
fn closing_waits_for_the_flush_behind() {
    let yard = yard();
    let node = yard.open();
    for operation in [
        Operation::Write(at(0, 5), 1),
        Operation::Discard(at(0, 5)),
        // Lets the flush begin.
        Operation::Read(at(6, 1)),
    ] {
        yard.drive(operation.carry_out(&node)).expect("done");
    }
    yard.drive(node.close()).expect("closed");
    assert!(!yard.go_on_with_what_is_left(), "it had ended");
    assert_eq!(node.image().given_up_clusters(), 0);
}

#[test]
fn a_flush_behind_that_fails_is_not_tried_again_and_again() {
    let yard = yard();
    let node = yard.open();
    let write = Operation::Write(at(0, 9), 1);
    yard.drive(write.carry_out(&node)).expect("written");
    yard.drive(node.flush()).expect("flushed");
    let fails = Fault::fails(ENOSPC).of(StorageOperation::Write).from(1);
    yard.world.add_fault(fails);
    for cluster in 0..7 {
        let discard = Operation::Discard(at(cluster, 1));
        yard.drive(discard.carry_out(&node)).expect("discarded");
        yard.finish_what_is_left();
    }
    let failures = yard.world.failures();
    assert!(failures > 0, "it was tried");
    let discard = Operation::Discard(at(7, 1));
    yard.drive(discard.carry_out(&node)).expect("discarded");
    yard.finish_what_is_left();
    assert_eq!(yard.world.failures(), failures, "it was tried again");
    yard.world.heal();
    yard.drive(node.flush()).expect("there is room now");
    assert!(!node.image().wants_flush());
}
