//! Creation of raw data on a node: failed or cancelled at every step the node is as long as it was and holds what it held;
//! done, it has its length and room, zeroes behind what it held, and all of it durably.

use std::rc::Rc;

use blockyard_simulator::trace::Happened;
use blockyard_simulator::{Disk, DiskOptions, Fault, World};
use blockyard_storage::Operation;
use blockyard_storage::error::{EIO, ENOSPC};

use super::create::{WAYS, create, order_at};
use crate::job::context::JobShared;
use crate::job::work::Stop;
use crate::jobs::create_raw::CreateRaw;
use crate::jobs::test_support::VirtualClock;
use crate::node::Node;
use crate::node::file_node::{FileNode, FileOptions};
use crate::node::raw_node::{RawNode, Window};
use crate::request::{CreatePreallocation, DetectZeroes, Discard};

const PIECE: u64 = 64 << 10;
const SIZE: u64 = 3 * PIECE + 1000;

/// A disk that holds something, below a raw node.
#[derive(Clone, Copy, Debug)]
struct Setup {
    how: CreatePreallocation,
    held_bytes: u64,
    alignment: u32,
}

/// Every way of preallocation from an empty, a shorter and a longer disk, in any bytes and in whole blocks.
fn setups() -> Vec<Setup> {
    let mut setups = Vec::new();
    for how in WAYS {
        for held_bytes in [0, PIECE + 1000, SIZE, 4 * PIECE + 8] {
            setups.extend([1, 4096].map(|alignment| Setup {
                how,
                held_bytes,
                alignment,
            }));
        }
    }
    setups
}

struct Place {
    setup: Setup,
    world: World,
    disk: Disk,
    held: Vec<u8>,
}

impl Place {
    fn new(setup: Setup) -> Self {
        let world = World::new(1);
        let options = DiskOptions {
            length_bytes: setup.held_bytes,
            request_alignment: setup.alignment,
            ..DiskOptions::default()
        };
        let disk = world.disk("node", options);
        let held: Vec<u8> = (0..setup.held_bytes)
            .map(|at| (at % 251) as u8 + 1)
            .collect();
        disk.fill(0, &held);
        Self {
            setup,
            world,
            disk,
            held,
        }
    }

    /// Runs the job with a look before each step, and judges it.
    fn create(&self, mut look: impl FnMut(&World, &JobShared)) -> Result<(), Stop> {
        let clock = VirtualClock::default();
        let file = FileNode::new("f".to_owned(), self.disk.open(), FileOptions::default());
        let (window, zeroes) = (Window::default(), DetectZeroes::Off);
        let raw = RawNode::new(
            "r".to_owned(),
            Rc::new(file),
            window,
            false,
            Discard::Ignore,
            zeroes,
        );
        assert_eq!(raw.exact_length_bytes(), self.setup.held_bytes);
        let mut work = CreateRaw::new(Rc::new(raw), SIZE, self.setup.how, PIECE);
        let result = create(&self.world, &clock, &mut work, &mut look);
        if result.is_ok() {
            self.judge_success();
        }
        result
    }

    fn judge_success(&self) {
        let kept = self.held.len().min(SIZE as usize);
        for cut in 0..4 {
            let bytes = self.disk.bytes_after_cut(cut);
            assert_eq!(bytes.len() as u64, SIZE, "{:?}", self.setup);
            assert!(bytes[..kept] == self.held[..kept], "{:?}", self.setup);
            assert!(
                bytes[kept..].iter().all(|byte| *byte == 0),
                "{:?}",
                self.setup
            );
        }
        let reserved = self.disk.allocated_bytes() >= SIZE;
        let wanted = self.setup.how != CreatePreallocation::Off;
        assert!(reserved || !wanted, "{:?}: room is reserved", self.setup);
    }

    fn assert_as_it_was(&self, what: &str) {
        assert!(self.disk.bytes() == self.held, "{:?}, {what}", self.setup);
    }
}

#[test]
fn every_nth_operation_fails() {
    for setup in setups() {
        for nth in 1.. {
            let place = Place::new(setup);
            place.world.add_fault(Fault::fails(EIO).nth(nth));
            let result = place.create(|_, _| {});
            if place.world.failures() == 0 {
                assert_eq!(result, Ok(()));
                assert!(nth > 1, "something is always done");
                break;
            }
            match result {
                Err(Stop::Failed(error)) => assert_eq!(error.errno, Some(EIO)),
                other => panic!("{setup:?} {nth}: {other:?}"),
            }
            let failed_sync = place.world.trace().entries().any(|entry| {
                entry.operation == Operation::Sync && entry.happened == Happened::Ended(Some(EIO))
            });
            // After a failed flush nothing can be changed any more, not even back.
            if !failed_sync {
                place.assert_as_it_was(&format!("{nth}"));
            }
        }
    }
}

#[test]
fn a_full_disk_leaves_the_node_as_it_was() {
    for setup in setups() {
        if setup.how == CreatePreallocation::Off || setup.held_bytes > PIECE * 2 {
            continue;
        }
        let place = Place::new(setup);
        place.disk.set_capacity(Some(2 * PIECE));
        match place.create(|_, _| {}) {
            Err(Stop::Failed(error)) => assert_eq!(error.errno, Some(ENOSPC)),
            other => panic!("{setup:?}: {other:?}"),
        }
        place.assert_as_it_was("full");
    }
}

#[test]
fn paused_and_cancelled_at_every_step() {
    for setup in setups() {
        for cancels in [false, true] {
            let mut cancelled = 0;
            for step in 0..8 {
                let place = Place::new(setup);
                let result = place.create(order_at(step, cancels));
                if let Err(stop) = result {
                    assert!(cancels && stop == Stop::Cancelled, "{stop:?}");
                    cancelled += 1;
                    place.assert_as_it_was("cancelled");
                }
            }
            let reserves = setup.how != CreatePreallocation::Off;
            assert_eq!(cancelled > 2, cancels && reserves, "{setup:?}: {cancelled}");
        }
    }
}
