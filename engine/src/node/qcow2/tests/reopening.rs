//! Nodes that are opened in another way while they are in use: requests wait, nothing that was written is lost, and what fails
//! leaves the node as it was.

use std::rc::Rc;

use blockyard_images::qcow2::Options;
use blockyard_images::qcow2::check::{Unobserved, check};
use blockyard_simulator::{Fault, Seed, each_seed};
use blockyard_storage::error::{EBADF, EIO};
use blockyard_storage::{Aligned, ByteRange, Storage};
use futures_util::future::{join, join_all};

use super::model::{Model, Operation, assert_holds};
use super::random::round;
use super::yard::{Setup, Yard};
use crate::data::NodeId;
use crate::node::Node;
use crate::node::build::NodePlan;
use crate::node::qcow2::opening::Qcow2Plan;
use crate::node::qcow2::{Qcow2Node, Qcow2Options};

const FILE: NodeId = NodeId(1);
const DATA_FILE: NodeId = NodeId(2);
const BACKING: NodeId = NodeId(3);

/// Puts new nodes for the files where they are found, and says how the image is opened on them.
pub(crate) fn plan(yard: &Yard, read_only: bool, l2_cache_bytes: u64) -> NodePlan {
    let context = &yard.context;
    context.insert_node(FILE, yard.file("file", &yard.image, read_only));
    if let Some(data) = &yard.data {
        context.insert_node(DATA_FILE, yard.file("data", data, read_only));
    }
    if let Some(backing) = yard.backing() {
        context.insert_node(BACKING, backing);
    }
    let setup = &yard.setup;
    NodePlan::Qcow2 {
        file: FILE,
        data_file: yard.data.as_ref().map(|_| DATA_FILE),
        backing: yard.base.as_ref().map(|_| BACKING),
        plan: Qcow2Plan {
            image: Options {
                read_only,
                l2_cache_bytes,
                l2_cache_entry_bytes: 512,
                lazy_refcounts: setup.lazy_refcounts,
                ..Options::default()
            },
            node: Qcow2Options {
                inactive: false,
                discard: setup.discard,
                detect_zeroes: setup.detect_zeroes,
                cache_clean_interval: None,
            },
        },
    }
}

fn assert_sound(yard: &Yard) {
    let file: Rc<dyn Storage> = Aligned::over(yard.image.open());
    let report = yard.drive(check(&file, &Unobserved)).expect("checked");
    let wrong = (report.corruptions, report.leaks, report.check_errors);
    assert_eq!(wrong, (0, 0, 0), "{:?}", yard.setup);
}

fn errno_of(yard: &Yard, node: &Rc<Qcow2Node>, operation: Operation) -> Option<i32> {
    let done = yard.drive(operation.carry_out(node));
    done.err().map(|error| error.errno())
}

#[test]
fn requests_wait_while_the_image_is_opened_in_another_way() {
    each_seed("blockyard-engine", "opened_in_another_way", 60, |seed| {
        let yard = Yard::new(Setup::random(seed));
        let dice = Seed::new(seed);
        let mut model = Model::of(&yard);
        let node = yard.open();
        let plans: Vec<NodePlan> = (0..4).map(|n| plan(&yard, false, n << 12)).collect();
        for _ in 0..5 {
            let operations = round(&dice, &yard.setup);
            let asked = operations.iter().map(|one| one.carry_out(&node));
            let changes = async {
                for plan in &plans {
                    node.reopen(&yard.context, plan).await?;
                }
                Ok::<_, crate::error::EngineError>(())
            };
            let (answers, changed) = yard.drive(join(join_all(asked), changes));
            changed.expect("changed");
            let told = node.take_reopened().expect("it was opened again");
            assert_eq!(told.options.l2_cache_bytes, 3 << 12);
            for (operation, answer) in operations.iter().zip(answers) {
                answer.unwrap_or_else(|error| panic!("{operation:?} {:?}: {error}", yard.setup));
                model.apply(operation, &yard.setup);
            }
            assert_holds(&yard, &node, &model, &dice);
        }
        // Nobody writes when a node becomes read-only; what was written is in the image then.
        let for_reading = plan(&yard, true, 1 << 20);
        yard.drive(node.reopen(&yard.context, &for_reading))
            .expect("read-only");
        assert_sound(&yard);
        assert_holds(&yard, &node, &model, &dice);
        let write = Operation::Write(ByteRange::new(0, 512), 9);
        assert_eq!(errno_of(&yard, &node, write), Some(EBADF));
        assert_sound(&yard);
    });
}

/// Two nodes on one image, of which one at a time is active, as on two hosts.
#[test]
fn an_image_goes_to_and_fro_between_two_nodes() {
    each_seed("blockyard-engine", "handed_over", 40, |seed| {
        let yard = Yard::new(Setup::random(seed));
        let dice = Seed::new(seed);
        let mut model = Model::of(&yard);
        let nodes = [yard.open_read_only(), yard.open_read_only()];
        let become_active = |node: &Rc<Qcow2Node>, active: bool| {
            let mut plan = plan(&yard, false, 1 << 12);
            plan.set_access(false, !active);
            yard.drive(node.reopen(&yard.context, &plan))
                .expect("opened");
        };
        nodes.iter().for_each(|node| become_active(node, false));
        for turn in 0..6 {
            let node = &nodes[turn % 2];
            become_active(node, true);
            assert_holds(&yard, node, &model, &dice);
            for operation in round(&dice, &yard.setup) {
                yard.drive(operation.carry_out(node)).expect("done");
                model.apply(&operation, &yard.setup);
            }
            become_active(node, false);
            assert_sound(&yard);
            // Not even by closing it is an image written that is somebody else's.
            let written = yard.world.steps();
            let write = Operation::Write(ByteRange::new(0, 512), 9);
            assert_eq!(errno_of(&yard, node, write), Some(EBADF));
            yard.drive(node.flush()).expect("nothing to do");
            yard.drive(node.store_bitmaps()).expect("nothing to do");
            assert_eq!(yard.world.steps(), written);
        }
        let last = yard.open();
        assert_holds(&yard, &last, &model, &dice);
    });
}

/// Opens an image for writing that was lost in use, so that it is repaired, while the n-th operation fails. Whether it did.
fn opening_fails_at(nth: Option<u64>) -> bool {
    let yard = Yard::new(Setup {
        backing_bytes: Some(40 << 9),
        lazy_refcounts: true,
        ..Setup::new(7, 9)
    });
    let dice = Seed::new(7);
    let mut model = Model::of(&yard);
    {
        let node = yard.open();
        let write = Operation::Write(ByteRange::new(512, 3000), 7);
        yard.drive(write.carry_out(&node)).expect("written");
        yard.drive(node.flush()).expect("durable");
        model.apply(&write, &yard.setup);
    }
    let node = yard.open_read_only();
    let for_writing = plan(&yard, false, 1 << 20);
    if let Some(nth) = nth {
        yard.world.add_fault(Fault::fails(EIO).nth(nth));
    }
    let opened = yard.drive(node.reopen(&yard.context, &for_writing));
    let write = Operation::Write(ByteRange::new(0, 512), 9);
    if yard.world.failures() > 0 {
        assert!(opened.is_err(), "failure {nth:?}");
        assert_eq!(errno_of(&yard, &node, write), Some(EBADF));
        assert_holds(&yard, &node, &model, &dice);
        return true;
    }
    opened.expect("writable");
    if nth.is_none() {
        yard.drive(write.carry_out(&node)).expect("written");
        model.apply(&write, &yard.setup);
        assert_holds(&yard, &node, &model, &dice);
        yard.drive(node.close()).expect("closed");
        assert_sound(&yard);
    }
    false
}

#[test]
fn a_node_that_cannot_be_opened_for_writing_stays_readable() {
    assert!(!opening_fails_at(None));
    let failed = (1..500).take_while(|nth| opening_fails_at(Some(*nth)));
    let failed = failed.count();
    assert!((20..499).contains(&failed), "{failed}");
}
