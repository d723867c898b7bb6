//! Internal snapshots of nodes in use: requests wait, none fails, and nothing that was written is lost.

use std::rc::Rc;

use blockyard_images::qcow2::check::{Unobserved, check};
use blockyard_images::qcow2::snapshot::{NewSnapshot, SnapshotChoice};
use blockyard_simulator::{Fault, Seed, each_seed};
use blockyard_storage::error::EIO;
use blockyard_storage::{Aligned, ByteRange, Storage};
use futures_util::future::{join, join_all};

use super::model::{Model, Operation, assert_holds};
use super::random::round;
use super::yard::{DataFile, Setup, Yard};
use crate::node::qcow2::Qcow2Node;
use crate::node::{AmendStop, Node, SnapshotChange};

pub(super) fn create(name: &str) -> SnapshotChange {
    SnapshotChange::Create(NewSnapshot {
        name: name.as_bytes().to_vec(),
        ..NewSnapshot::default()
    })
}

fn delete(name: &str) -> SnapshotChange {
    SnapshotChange::Delete(SnapshotChoice::Name(name.as_bytes().to_vec()))
}

/// Names of the snapshots that the graph is told of.
fn told(node: &Rc<Qcow2Node>) -> Vec<String> {
    let reopened = node.take_reopened().expect("it was opened again");
    let snapshots = reopened.info.snapshots.into_iter();
    snapshots.map(|snapshot| snapshot.name).collect()
}

fn setup(seed: u64) -> Setup {
    Setup {
        refcount_bits: 16,
        data_file: DataFile::Inside,
        ..Setup::random(seed)
    }
}

#[test]
fn requests_wait_while_snapshots_change() {
    each_seed("blockyard-engine", "requests_wait_while", 60, |seed| {
        let yard = Yard::new(setup(seed));
        let dice = Seed::new(seed);
        let mut model = Model::of(&yard);
        let node = yard.open();
        for _ in 0..6 {
            let operations = round(&dice, &yard.setup);
            let asked = operations.iter().map(|one| one.carry_out(&node));
            let changes = async {
                for change in [
                    create("a"),
                    create("b"),
                    delete("a"),
                    delete("b"),
                    create("c"),
                ] {
                    node.change_snapshots(change).await?;
                }
                node.change_snapshots(delete("c")).await
            };
            let (answers, changed) = yard.drive(join(join_all(asked), changes));
            changed.expect("changed");
            assert_eq!(told(&node), Vec::<String>::new());
            for (operation, answer) in operations.iter().zip(answers) {
                answer.unwrap_or_else(|error| panic!("{operation:?} {:?}: {error}", yard.setup));
                model.apply(operation, &yard.setup);
            }
            assert_holds(&yard, &node, &model, &dice);
        }
        yard.drive(node.close()).expect("closed");
        let file: Rc<dyn Storage> = Aligned::over(yard.image.open());
        let report = yard.drive(check(&file, &Unobserved)).expect("checked");
        let wrong = (report.corruptions, report.leaks, report.check_errors);
        assert_eq!(wrong, (0, 0, 0), "{:?}", yard.setup);
    });
}

#[test]
fn what_is_refused_leaves_the_node_as_it_was() {
    let yard = Yard::new(Setup::new(3, 12));
    let node = yard.open();
    let range = ByteRange::new(0, 8192);
    let write = Operation::Write(range, 7);
    yard.drive(write.carry_out(&node)).expect("written");
    let refused = yard.drive(node.change_snapshots(delete("a")));
    let text = "snapshot not found".to_owned();
    assert_eq!(refused, Err(AmendStop::Refused(text)));
    // Wherever it fails, the node goes on or says that it cannot.
    for nth in 1..60 {
        let yard = Yard::new(Setup::new(nth, 12));
        let node = yard.open();
        yard.drive(write.carry_out(&node)).expect("written");
        yard.world.add_fault(Fault::fails(EIO).nth(nth));
        let changed = yard.drive(node.change_snapshots(create("a")));
        if yard.world.failures() == 0 {
            changed.expect("changed");
            assert!(nth > 10, "{nth}");
            return;
        }
        // Nor does it write what it knew of the image before.
        let _ = yard.drive(node.resize(yard.setup.size_bytes + 4096));
        drop(node);
        yard.cut_power();
        let file: Rc<dyn Storage> = Aligned::over(yard.image.open());
        let report = yard.drive(check(&file, &Unobserved)).expect("checked");
        assert_eq!(report.corruptions, 0, "fault {nth}");
        let node = yard.open();
        let read = yard.drive(Operation::Read(ByteRange::new(0, 4096)).carry_out(&node));
        read.expect("it opens and can be read");
    }
    panic!("it fails for ever");
}
