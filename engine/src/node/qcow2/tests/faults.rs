//! What fails, what is given up, and power cuts: a failed request leaves each byte old or new, everybody else's bytes are
//! what they were, and what was flushed is there for ever.

use std::rc::Rc;

use blockyard_simulator::{Fault, Seed, each_seed};
use blockyard_storage::error::{EIO, ENOSPC};
use blockyard_storage::{ByteRange, Operation as StorageOperation};
use futures_util::future::join_all;

use super::model::{Model, Operation};
use super::yard::{Setup, Yard};
use crate::node::Node;
use crate::node::qcow2::Qcow2Node;

/// What each byte may be: more than one where a request failed, was given up or is not durable yet.
pub(crate) struct Possible {
    models: Vec<Model>,
}

impl Possible {
    pub(crate) fn new(model: Model) -> Self {
        Self {
            models: vec![model],
        }
    }

    /// The state of now, if everything that was asked has happened.
    pub(crate) fn newest(&self) -> &Model {
        self.models.last().expect("at least one")
    }

    /// An operation may have had its effect, as a whole or in part.
    pub(crate) fn may(&mut self, operation: &Operation, setup: &Setup) {
        let mut next = self.newest().clone();
        next.apply(operation, setup);
        self.models.push(next);
    }

    /// Nothing else is possible any more than what is there.
    pub(crate) fn settle(&mut self, bytes: Vec<u8>) {
        self.models = vec![Model { bytes }];
    }

    pub(crate) fn assert_allows(&self, bytes: &[u8], setup: &Setup) {
        for (place, byte) in bytes.iter().enumerate() {
            let allowed = self.models.iter().any(|model| model.bytes[place] == *byte);
            assert!(allowed, "byte {place} is {byte} in {setup:?}");
        }
    }
}

/// Everything the node shows.
pub(crate) fn read_all(yard: &Yard, node: &Rc<Qcow2Node>) -> Vec<u8> {
    let all = Operation::Read(ByteRange::new(0, yard.setup.size_bytes));
    // A fault may be left that strikes once.
    let mut tries = (0..20).map(|_| yard.drive(all.carry_out(node)));
    let read = tries.find_map(Result::ok).expect("readable");
    read.expect("bytes")
}

fn operations(dice: &Seed, setup: &Setup) -> Vec<Operation> {
    let mut operations: Vec<Operation> = Vec::new();
    for _ in 0..1 + dice.below(5) {
        let operation = Operation::random(dice, setup);
        let mut others = operations.iter().map(Operation::range);
        if !others.any(|other| other.overlaps(&operation.range())) {
            operations.push(operation);
        }
    }
    operations
}

#[test]
fn what_was_flushed_survives_the_power_and_the_rest_is_old_or_new() {
    each_seed(
        "blockyard-engine",
        "what_was_flushed_survives",
        200,
        |seed| {
            let yard = Yard::new(Setup::random(seed));
            let setup = &yard.setup;
            let dice = Seed::new(seed);
            let mut possible = Possible::new(Model::of(&yard));
            for _ in 0..3 {
                let node = yard.open();
                let steps = yard.world.steps() + dice.below(120);
                let goes_on = || yard.world.steps() < steps;
                let work = async {
                    for _ in 0..8 {
                        let operations = operations(&dice, setup);
                        let flushes = dice.one_in(3);
                        for operation in &operations {
                            possible.may(operation, setup);
                        }
                        let asked = operations.iter().map(|one| one.carry_out(&node));
                        for answer in join_all(asked).await {
                            answer.expect("nothing fails");
                        }
                        if flushes {
                            node.flush().await.expect("flushed");
                            let newest = possible.newest().bytes.clone();
                            possible.settle(newest);
                        }
                    }
                };
                let _ = yard.drive_while(work, goes_on);
                drop(node);
                yard.cut_power();
                let node = yard.open();
                let bytes = read_all(&yard, &node);
                possible.assert_allows(&bytes, setup);
                // From now on it stays what it is.
                possible.settle(bytes);
            }
        },
    );
}

#[test]
fn a_request_that_fails_leaves_old_or_new_bytes_and_the_image_sound() {
    each_seed("blockyard-engine", "a_request_that_fails", 200, |seed| {
        let yard = Yard::new(Setup::random(seed));
        let setup = &yard.setup;
        let dice = Seed::new(seed);
        let mut possible = Possible::new(Model::of(&yard));
        let mut node = yard.open();
        for _ in 0..12 {
            let kind = *dice.pick(&[
                StorageOperation::Read,
                StorageOperation::Write,
                StorageOperation::Write,
                StorageOperation::Zero,
                StorageOperation::Discard,
            ]);
            let errno = *dice.pick(&[EIO, ENOSPC]);
            let fault = Fault::fails(errno).of(kind);
            yard.world.add_fault(fault.nth(1 + dice.below(12)));
            let operations = operations(&dice, setup);
            let asked = operations.iter().map(|one| one.carry_out(&node));
            let answers = yard.drive(join_all(asked));
            for (operation, answer) in operations.iter().zip(answers) {
                match answer {
                    Ok(Some(read)) => {
                        let at = operation.range().offset() as usize;
                        for (place, byte) in read.iter().enumerate() {
                            let allowed = possible.models.iter();
                            let mut allowed = allowed.map(|model| model.bytes[at + place]);
                            assert!(allowed.any(|allowed| allowed == *byte), "{operation:?}");
                        }
                    }
                    Ok(None) => possible.may(operation, setup),
                    Err(error) => {
                        assert!(
                            [EIO, ENOSPC].contains(&error.errno()),
                            "{operation:?} {error}"
                        );
                        possible.may(operation, setup);
                    }
                }
            }
            // What is there now is there to stay, also in a new node.
            let bytes = read_all(&yard, &node);
            possible.assert_allows(&bytes, setup);
            possible.settle(bytes.clone());
            if dice.one_in(3) {
                while yard.drive(node.close()).is_err() {}
                node = yard.open();
                assert!(read_all(&yard, &node) == bytes, "{setup:?}");
            }
        }
        assert_eq!(yard.news(), []);
    });
}

#[test]
fn requests_that_are_given_up_leave_old_or_new_bytes_and_harm_nobody() {
    each_seed(
        "blockyard-engine",
        "requests_that_are_given_up",
        200,
        |seed| {
            let yard = Yard::new(Setup::random(seed));
            let setup = &yard.setup;
            let dice = Seed::new(seed);
            let mut possible = Possible::new(Model::of(&yard));
            let node = yard.open();
            for _ in 0..10 {
                let given_up = Operation::random(&dice, setup);
                possible.may(&given_up, setup);
                let steps = yard.world.steps() + dice.below(12);
                let goes_on = || yard.world.steps() < steps;
                let _ = yard.drive_while(given_up.carry_out(&node), goes_on);
                let other = Operation::random(&dice, setup);
                if !other.range().overlaps(&given_up.range()) {
                    yard.drive(other.carry_out(&node)).expect("done");
                    let models = &mut possible.models;
                    models
                        .iter_mut()
                        .for_each(|model| model.apply(&other, setup));
                }
                // Whatever was under way ends some time.
                yard.finish_what_is_left();
                while yard.world.step() {}
                let bytes = read_all(&yard, &node);
                possible.assert_allows(&bytes, setup);
                possible.settle(bytes);
            }
            yard.drive(node.close()).expect("closed");
            let node = yard.open();
            let bytes = read_all(&yard, &node);
            possible.assert_allows(&bytes, setup);
        },
    );
}
