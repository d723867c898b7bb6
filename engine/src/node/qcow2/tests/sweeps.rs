//! The first, second, third ... request of an image's whole life fails, from its opening to its end: what ended well has
//! happened, what was flushed is there after a power cut, and after a sync that failed nothing is promised any more.

use std::rc::Rc;

use blockyard_simulator::{Fault, Seed, each_seed};
use blockyard_storage::error::{EIO, ENOSPC};
use blockyard_storage::{ByteRange, Operation as StorageOperation};

use super::faults::{Possible, read_all};
use super::model::{Model, Operation};
use super::yard::{Setup, Yard};
use crate::node::Node;
use crate::node::qcow2::Qcow2Node;

/// Requests of the guest in one life.
const REQUESTS: usize = 10;

/// What fails.
const FAILING: [(Option<StorageOperation>, i32); 4] = [
    (None, EIO),
    (Some(StorageOperation::Write), ENOSPC),
    (Some(StorageOperation::Sync), EIO),
    (Some(StorageOperation::Read), EIO),
];

/// An image in one life, and what is known of its bytes.
struct Life {
    yard: Yard,
    node: Rc<Qcow2Node>,
    possible: Possible,
    /// Nothing has failed since the bytes were last known.
    is_certain: bool,
    /// Only syncs fail.
    fails_syncs: bool,
}

impl Life {
    fn request(&mut self, operation: &Operation) {
        let setup = self.yard.setup.clone();
        self.possible.may(operation, &setup);
        let range = operation.range();
        match self.yard.drive(operation.carry_out(&self.node)) {
            Ok(read) if self.is_certain => {
                if let Some(read) = read {
                    let wanted = self.possible.newest().slice(range);
                    assert!(read == wanted, "{operation:?} of {setup:?}");
                }
            }
            Ok(_) => {}
            Err(_) => self.is_certain = false,
        }
    }

    /// What is read after a flush is there for ever. `false`: it failed.
    fn flush(&mut self, closes: bool) -> bool {
        let node = Rc::clone(&self.node);
        let had_failed = self.fails_syncs && self.yard.world.failures() > 0;
        let flushed = match closes {
            true => self.yard.drive(node.close()),
            false => self.yard.drive(node.flush()),
        };
        if flushed.is_err() {
            self.is_certain = false;
            return false;
        }
        assert!(!had_failed, "after a failed sync: {:?}", self.yard.setup);
        let bytes = read_all(&self.yard, &self.node);
        if self.is_certain {
            assert!(
                bytes == self.possible.newest().bytes,
                "{:?}",
                self.yard.setup
            );
        }
        self.possible.assert_allows(&bytes, &self.yard.setup);
        self.possible.settle(bytes);
        self.is_certain = true;
        true
    }
}

/// One life with one fault; how many requests have failed.
fn live(seed: u64, failing: (Option<StorageOperation>, i32), nth: u64) -> u64 {
    let (operation, errno) = failing;
    let mut setup = Setup::random(seed);
    // Bytes are compared often.
    setup.size_bytes = setup.size_bytes.min(6 << setup.cluster_bits).max(512);
    let yard = Yard::new(setup.clone());
    let fault = Fault::fails(errno).nth(nth);
    yard.world.add_fault(match operation {
        Some(operation) => fault.of(operation),
        None => fault,
    });
    let mut life = Life {
        node: yard.open(),
        possible: Possible::new(Model::of(&yard)),
        is_certain: true,
        fails_syncs: operation == Some(StorageOperation::Sync),
        yard,
    };
    let dice = Seed::new(seed);
    for _ in 0..REQUESTS {
        match Operation::random(&dice, &setup) {
            Operation::Flush => {
                life.flush(false);
            }
            other => {
                life.request(&other);
                life.request(&Operation::Read(other.range()));
            }
        }
        if dice.one_in(3) {
            life.node.image().clean_caches();
        }
    }
    let closes = dice.one_in(2);
    let ended = life.flush(closes);
    let Life {
        yard,
        node,
        possible,
        ..
    } = life;
    drop(node);
    yard.cut_power();
    let bytes = read_all(&yard, &yard.open());
    possible.assert_allows(&bytes, &setup);
    let failures = yard.world.failures();
    assert!(ended || failures > 0, "{setup:?}");
    failures
}

#[test]
fn every_request_of_a_life_fails_once() {
    each_seed("blockyard-engine", "every_request_of_a_life", 8, |seed| {
        for failing in FAILING {
            for nth in 1.. {
                if live(seed, failing, nth) == 0 {
                    assert!(
                        failing.0.is_some() || nth > 6,
                        "{nth} requests, seed {seed}"
                    );
                    break;
                }
            }
        }
    });
}

/// Where the guest writes in the second cluster, which is 512 KiB long: with long edges on both sides.
const IN_THE_MIDDLE: ByteRange = ByteRange::new((512 + 200) << 10, 4096);

/// A write with long edges into a cluster that held something else, with one fault at most; whether there was one.
fn write_with_long_edges(backing: bool, nth: u64) -> bool {
    let mut setup = Setup::new(7, 19);
    setup.size_bytes = 3 << 19;
    setup.backing_bytes = backing.then_some(setup.size_bytes);
    let yard = Yard::new(setup.clone());
    let node = yard.open();
    let mut model = Model::of(&yard);
    let ask = |operation: &Operation| yard.drive(operation.carry_out(&node));
    // The compressed cluster is elsewhere, so that the place of the first one is free, and full of its bytes.
    let first = ByteRange::new(0, setup.cluster_bytes());
    for operation in [Operation::Write(first, 6), Operation::Compress(first, 4)] {
        ask(&operation).expect("written");
        model.apply(&operation, &setup);
        for _ in 0..2 {
            ask(&Operation::Flush).expect("flushed");
        }
    }
    let write = Operation::Write(IN_THE_MIDDLE, 5);
    let mut after = model.clone();
    after.apply(&write, &setup);
    yard.world.add_fault(Fault::fails(EIO).nth(nth));
    let written = ask(&write);
    let failed = yard.world.failures() > 0;
    let bytes = read_all(&yard, &node);
    match written {
        Ok(_) => assert!(
            bytes == after.bytes,
            "written, backing: {backing}, fault {nth}"
        ),
        Err(_) => {
            assert!(failed);
            assert!(
                bytes == model.bytes,
                "not written, backing: {backing}, fault {nth}"
            );
        }
    }
    failed
}

#[test]
fn long_edges_are_written_or_the_write_has_failed() {
    for backing in [false, true] {
        let faults = (1..).take_while(|nth| write_with_long_edges(backing, *nth));
        assert!(faults.count() >= 3, "two edges and the data");
    }
}
