//! Random operations, several at once, on images of every kind, against the model.

use std::rc::Rc;

use blockyard_images::qcow2::units::Version;
use blockyard_simulator::{Seed, each_seed};
use blockyard_storage::ByteRange;
use blockyard_storage::error::EOPNOTSUPP;
use futures_util::future::join_all;

use super::model::{Model, Operation, assert_holds, assert_status};
use super::yard::{DataFile, Setup, Yard};
use crate::node::qcow2::Qcow2Node;
use crate::node::{Fill, Node};

/// Operations whose ranges do not overlap.
pub(super) fn round(dice: &Seed, setup: &Setup) -> Vec<Operation> {
    let mut operations: Vec<Operation> = Vec::new();
    for _ in 0..1 + dice.below(6) {
        let operation = Operation::random(dice, setup);
        let mut others = operations.iter().map(Operation::range);
        if !others.any(|other| other.overlaps(&operation.range())) {
            operations.push(operation);
        }
    }
    operations
}

/// Another length. What comes in is zeroes.
fn resize(yard: &Yard, node: &Rc<Qcow2Node>, setup: &mut Setup, model: &mut Model, dice: &Seed) {
    let old = setup.size_bytes;
    let new = match dice.below(3) {
        0 => 512 * dice.below(old / 512 + 1),
        1 => old + 512 * dice.below(20),
        _ => old + dice.below(4) * setup.cluster_bytes(),
    };
    let below = setup.backing_bytes.unwrap_or(0);
    let clusters = old.next_multiple_of(setup.cluster_bytes());
    let hidden = new.min(below) > clusters;
    let resized = yard.drive(node.resize(new));
    if setup.version == Version::V2 && hidden {
        assert_eq!(resized.map_err(|error| error.errno()), Err(EOPNOTSUPP));
        return;
    }
    resized.unwrap_or_else(|error| panic!("{new} {setup:?}: {error}"));
    assert_eq!(node.facts().length_bytes, new);
    setup.size_bytes = new;
    model.bytes.resize(new as usize, 0);
}

#[test]
fn images_of_every_kind_hold_what_was_written() {
    each_seed("blockyard-engine", "images_of_every_kind", 150, |seed| {
        let yard = Yard::new(Setup::random(seed));
        let mut setup = yard.setup.clone();
        let dice = Seed::new(seed);
        let mut model = Model::of(&yard);
        let mut node = yard.open();
        for _ in 0..25 {
            let operations = round(&dice, &setup);
            let asked = operations.iter().map(|one| one.carry_out(&node));
            let answers = yard.drive(join_all(asked));
            for (operation, answer) in operations.iter().zip(answers) {
                let read =
                    answer.unwrap_or_else(|error| panic!("{operation:?} {setup:?}: {error}"));
                if let Some(read) = read {
                    let expected = model.slice(operation.range());
                    assert!(read == expected, "{operation:?} {setup:?}");
                }
                model.apply(operation, &setup);
            }
            if dice.one_in(8) {
                resize(&yard, &node, &mut setup, &mut model, &dice);
            }
            if dice.one_in(6) {
                assert_status(&yard, &node, &model, &dice);
            }
            if dice.one_in(6) {
                yard.drive(node.close()).expect("closed");
                node = yard.open();
            }
            if dice.one_in(3) {
                assert_holds(&yard, &node, &model, &dice);
            }
        }
        yard.drive(node.close()).expect("closed");
        let node = yard.open();
        assert_holds(&yard, &node, &model, &dice);
        assert_status(&yard, &node, &model, &dice);
        assert_eq!(yard.news(), []);
    });
}

#[test]
fn what_is_filled_needs_nothing_below() {
    each_seed(
        "blockyard-engine",
        "what_is_filled_needs_nothing",
        100,
        |seed| {
            let mut setup = Setup::random(seed);
            if setup.data_file != DataFile::Raw {
                setup.backing_bytes.get_or_insert(setup.size_bytes);
            }
            let yard = Yard::new(setup.clone());
            let dice = Seed::new(seed);
            let mut model = Model::of(&yard);
            let node = yard.open();
            let whole = ByteRange::new(0, setup.size_bytes);
            for _ in 0..4 {
                // Filled while others write, then once more for what they discarded.
                let filled = Operation::Fill(whole, Fill::Bytes);
                let mut operations = round(&dice, &setup);
                operations.retain(|one| !matches!(one, Operation::Fill(..)));
                let asked = operations.iter().chain([&filled]);
                let asked = asked.map(|one| one.carry_out(&node));
                for answer in yard.drive(join_all(asked)) {
                    answer.unwrap_or_else(|error| panic!("{operations:?} {setup:?}: {error}"));
                }
                for operation in &operations {
                    model.apply(operation, &setup);
                }
            }
            yard.drive(node.fill(whole, Fill::Bytes, None))
                .expect("filled");
            node.set_backing(None);
            assert_holds(&yard, &node, &model, &dice);
            let extents = yard.drive(node.status(whole, usize::MAX)).expect("told");
            assert!(extents.iter().all(|extent| extent.allocated), "{extents:?}");
            yard.drive(node.close()).expect("closed");
        },
    );
}
