//! Races between one write and one copy of the same range, in each order that matters.

use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use blockyard_simulator::{Disk, DiskOptions, Fault, World};
use blockyard_storage::error::ENOSPC;
use blockyard_storage::{Buffer, ByteRange, Operation};

use super::{Doing, MirrorTop, OtherSide, Tracker};
use crate::node::file_node::{FileNode, FileOptions};
use crate::node::{Node, NodeTransfer};

const GRANULE: u64 = 4096;
const LENGTH: u64 = 4 * GRANULE;

struct Yard {
    world: World,
    source: Disk,
    target: Disk,
    target_node: Rc<dyn Node>,
    tracker: Rc<Tracker>,
    top: MirrorTop,
}

fn poll<T>(future: Pin<&mut impl Future<Output = T>>) -> Poll<T> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

impl Yard {
    fn new(writes_both: bool) -> Self {
        let world = World::new(1);
        let disk = |name| {
            let options = DiskOptions {
                length_bytes: LENGTH,
                ..DiskOptions::default()
            };
            world.disk(name, options)
        };
        let node = |disk: &Disk| -> Rc<dyn Node> {
            let options = FileOptions::default();
            Rc::new(FileNode::new("file".to_owned(), disk.open(), options))
        };
        let (source, target) = (disk("source"), disk("target"));
        let (source_node, target_node) = (node(&source), node(&target));
        let tracker = Rc::new(Tracker::new(LENGTH, GRANULE));
        tracker.show_other_side(OtherSide {
            target: target_node.clone(),
            bring_over: Rc::new(|_| unreachable!("nothing is discarded")),
            unit_bytes: 1,
            may_unmap: true,
        });
        tracker.set_writes_both(writes_both);
        let top = MirrorTop::new("top".to_owned(), source_node, tracker.clone());
        Self {
            world,
            source,
            target,
            target_node,
            tracker,
            top,
        }
    }

    /// Ends everything that waits for a disk, and what comes of it.
    fn ends<T>(&self, mut future: Pin<&mut impl Future<Output = T>>) -> T {
        loop {
            if let Poll::Ready(value) = poll(future.as_mut()) {
                return value;
            }
            assert!(self.world.step(), "waits for something else");
        }
    }

    fn write(&self, byte: u8) -> impl Future<Output = NodeTransfer> {
        let bytes = Buffer::copy_of(&[byte; GRANULE as usize]);
        self.top.write(GRANULE, bytes)
    }

    fn range() -> ByteRange {
        ByteRange::new(GRANULE, GRANULE)
    }

    /// The byte of the range on both sides.
    fn bytes(&self) -> (u8, u8) {
        let at = GRANULE as usize;
        (self.source.bytes()[at], self.target.bytes()[at])
    }
}

#[test]
fn a_write_behind_the_reading_of_a_copy_has_its_range_copied_again() {
    let yard = Yard::new(false);
    yard.tracker.mark(Yard::range());
    let run = yard.tracker.take_run(0, LENGTH, 1);
    assert_eq!(run, Some((Yard::range(), GRANULE)));
    let turn = yard.tracker.turn(Yard::range(), Doing::Copy);
    yard.ends(pin!(turn.come()));
    let old = Buffer::copy_of(&[0; GRANULE as usize]);
    let mut write = pin!(yard.write(7));
    yard.ends(write.as_mut()).outcome.expect("written");
    let copy = yard.target_node.write(GRANULE, old);
    yard.ends(pin!(copy)).outcome.expect("written");
    drop(turn);
    assert_eq!(yard.bytes(), (7, 0));
    assert_eq!(yard.tracker.dirty_bytes(), GRANULE);
}

#[test]
fn a_write_that_goes_on_while_its_mark_is_taken_marks_again() {
    let yard = Yard::new(false);
    let mut write = pin!(yard.write(7));
    assert!(poll(write.as_mut()).is_pending(), "issued");
    assert!(yard.tracker.take_run(0, LENGTH, 1).is_some());
    assert_eq!(yard.tracker.dirty_bytes(), 0);
    yard.ends(write.as_mut()).outcome.expect("written");
    assert_eq!(yard.tracker.dirty_bytes(), GRANULE);
}

#[test]
fn a_write_to_both_sides_waits_for_the_copy_that_is_there() {
    let yard = Yard::new(true);
    let turn = yard.tracker.turn(Yard::range(), Doing::Copy);
    yard.ends(pin!(turn.come()));
    let mut write = pin!(yard.write(7));
    assert!(poll(write.as_mut()).is_pending());
    assert!(!yard.world.step(), "no disk has been asked");
    drop(turn);
    yard.ends(write.as_mut()).outcome.expect("written");
    assert_eq!(yard.bytes(), (7, 7));
    assert_eq!(yard.tracker.dirty_bytes(), 0);
}

#[test]
fn a_copy_waits_for_the_write_to_both_sides_and_is_not_the_last_word() {
    let yard = Yard::new(true);
    let mut write = pin!(yard.write(7));
    assert!(poll(write.as_mut()).is_pending(), "issued");
    // It reads what is there at its turn, unless it knew before.
    for (doing, dirty_bytes) in [(Doing::Copy, 0), (Doing::CopyKnown, GRANULE)] {
        let turn = yard.tracker.turn(Yard::range(), doing);
        {
            let mut come = pin!(turn.come());
            assert!(poll(come.as_mut()).is_pending());
            yard.ends(write.as_mut()).outcome.expect("written");
            assert!(poll(come.as_mut()).is_ready());
        }
        assert_eq!(yard.tracker.dirty_bytes(), dirty_bytes, "{doing:?}");
        drop(turn);
        write.set(yard.write(8));
        assert!(poll(write.as_mut()).is_pending(), "issued");
    }
}

#[test]
fn what_was_looked_at_is_overtaken_and_what_is_not_planned_is_clean() {
    let yard = Yard::new(true);
    yard.tracker.mark(ByteRange::new(0, LENGTH));
    yard.ends(pin!(yard.write(7))).outcome.expect("written");
    assert_eq!(yard.tracker.dirty_bytes(), LENGTH - GRANULE);
    yard.tracker.mark(Yard::range());
    // It is going to be looked at.
    let nothing = ByteRange::default();
    yard.tracker.set_planned(Yard::range(), nothing);
    yard.ends(pin!(yard.write(8))).outcome.expect("written");
    assert!(!yard.tracker.is_overtaken(Yard::range()));
    yard.tracker.set_planned(Yard::range(), Yard::range());
    assert!(!yard.tracker.is_overtaken(Yard::range()));
    yard.ends(pin!(yard.write(9))).outcome.expect("written");
    assert!(yard.tracker.is_overtaken(Yard::range()));
    assert!(!yard.tracker.is_overtaken(ByteRange::new(0, GRANULE)));
    assert_eq!(yard.tracker.dirty_bytes(), LENGTH, "who plans it clears it");
    assert_eq!(yard.bytes(), (9, 9));
    yard.tracker.looks_again();
    assert!(!yard.tracker.is_overtaken(Yard::range()));
    for _ in 0..200 {
        yard.ends(pin!(yard.write(9))).outcome.expect("written");
    }
    assert!(yard.tracker.is_overtaken(Yard::range()));
    yard.tracker.mark_overtaken(ByteRange::new(0, LENGTH));
    assert_eq!(yard.tracker.dirty_bytes(), LENGTH);
    yard.tracker.set_planned(nothing, nothing);
    assert!(!yard.tracker.is_overtaken(Yard::range()));
    // A part of a granule says nothing of the rest.
    let part = yard.top.write(0, Buffer::copy_of(&[1; 512]));
    yard.ends(pin!(part)).outcome.expect("written");
    assert_eq!(yard.tracker.dirty_bytes(), LENGTH);
    assert_eq!(yard.tracker.take_change(), LENGTH as i64);
}

#[test]
fn a_target_that_fails_is_the_jobs_business() {
    let yard = Yard::new(true);
    let fails = Fault::fails(ENOSPC).of(Operation::Write).on(&yard.target);
    yard.world.add_fault(fails.nth(1));
    yard.ends(pin!(yard.write(7))).outcome.expect("written");
    assert_eq!(yard.tracker.dirty_bytes(), GRANULE);
    let failure = yard.tracker.take_failure().expect("told");
    assert_eq!(failure.errno(), ENOSPC);
}

#[test]
fn who_waits_at_the_end_is_served_by_the_target() {
    let yard = Yard::new(true);
    let Poll::Ready(quiet) = poll(pin!(yard.tracker.quiet())) else {
        panic!("nobody is inside");
    };
    let (mut write, mut flush) = (pin!(yard.write(7)), pin!(yard.top.flush()));
    assert!(poll(write.as_mut()).is_pending() && poll(flush.as_mut()).is_pending());
    assert!(!yard.world.step(), "no disk has been asked");
    yard.tracker.go_over_to(yard.target_node.clone());
    drop(quiet);
    yard.ends(write.as_mut()).outcome.expect("written");
    yard.ends(flush.as_mut()).expect("flushed");
    assert_eq!(yard.bytes(), (0, 7));
    assert_eq!(yard.target.durable_bytes()[GRANULE as usize], 7);
    assert_eq!(yard.tracker.dirty_bytes(), 0);
}
