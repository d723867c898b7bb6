//! Every n-th operation fails, by every errno, kind of operation and policy; disks that are full; storms of faults.

use blockyard_simulator::{Fault, each_seed};
use blockyard_storage::Operation;
use blockyard_storage::error::{EIO, ENOSPC};

use super::yard::{BLOCK, KINDS, Kind, Nothing, POLICIES, Setup, Watch, Yard};
use crate::job::error_policy::{ErrorAction, OnError, Side};
use crate::job::work::Stop;

/// What may fail, and on which side.
const FAILING: [(Side, Operation); 6] = [
    (Side::Source, Operation::Read),
    (Side::Source, Operation::Allocation),
    (Side::Target, Operation::Write),
    (Side::Target, Operation::Zero),
    (Side::Target, Operation::Allocation),
    (Side::Target, Operation::Sync),
];

/// Runs with the n-th operation failing for n from 1 until nothing fails any more. How many did.
fn sweep(setup: &Setup, side: Side, operation: Operation, errno: i32) -> u64 {
    for nth in 1.. {
        let yard = Yard::new(setup.clone());
        let disk = match side {
            Side::Source => &yard.source,
            Side::Target => &yard.target,
        };
        yard.world
            .add_fault(Fault::fails(errno).of(operation).on(disk).nth(nth));
        let ended = yard.run(&mut Nothing);
        let result = ended.result.expect("the power stays");
        if yard.world.failures() == 0 {
            assert_eq!(result, Ok(()));
            assert_eq!(ended.told.errors, []);
            return nth - 1;
        }
        let what = format!("{setup:?}, {side:?} {operation:?} {nth}");
        if operation == Operation::Allocation {
            // What cannot be told is copied, or zeroed: nothing is wrong with that.
            assert_eq!((result, ended.told.errors), (Ok(()), vec![]), "{what}");
            continue;
        }
        let stops = match setup.policy {
            OnError::Report => Some(ErrorAction::Report),
            OnError::Ignore => Some(ErrorAction::Ignore),
            OnError::Stop => Some(ErrorAction::Stop),
            _ if errno == ENOSPC => Some(ErrorAction::Stop),
            _ => Some(ErrorAction::Report),
        };
        let first = ended
            .told
            .errors
            .first()
            .unwrap_or_else(|| panic!("{what}: unheard of"));
        assert_eq!((first.0, Some(first.1)), (side, stops), "{what}");
        match (first.1, operation) {
            (ErrorAction::Report, _) => match result {
                Err(Stop::Failed(error)) => assert_eq!(error.errno, Some(errno), "{what}"),
                other => panic!("{what}: {other:?}"),
            },
            // Never again a success: the client has to give up.
            (_, Operation::Sync) => assert_eq!(result, Err(Stop::Cancelled), "{what}"),
            (action, _) => {
                assert_eq!(result, Ok(()), "{what}");
                assert_eq!(
                    ended.told.parked,
                    usize::from(action == ErrorAction::Stop),
                    "{what}"
                );
                assert_eq!(ended.told.errors.len(), 1, "{what}");
            }
        }
    }
    unreachable!("a job makes so many requests and no more")
}

#[test]
fn every_nth_operation_fails_under_every_policy() {
    for kind in KINDS {
        for policy in POLICIES {
            for errno in [EIO, ENOSPC] {
                for (side, operation) in FAILING {
                    let count = sweep(&Setup::new(3, kind, policy), side, operation, errno);
                    let syncs = if kind == Kind::Mirror { 2 } else { 1 };
                    let least = match operation {
                        Operation::Sync => syncs,
                        Operation::Allocation if side == Side::Source => 1,
                        _ => 2,
                    };
                    assert!(
                        count >= least,
                        "{kind:?}: {count} times {side:?} {operation:?}"
                    );
                }
            }
        }
    }
}

/// Blocks larger than sectors: edges are read first, and what a block has too much at the end is cut off again.
#[test]
fn every_nth_operation_fails_on_disks_that_take_whole_blocks_only() {
    for seed in 0..12 {
        for policy in [OnError::Report, OnError::Stop] {
            let setup = Setup {
                alignment: 4096,
                odd_length: true,
                ..Setup::new(seed, Kind::Mirror, policy)
            };
            for operation in [Operation::Read, Operation::Write, Operation::Resize] {
                sweep(&setup, Side::Target, operation, EIO);
            }
        }
    }
}

#[test]
fn where_sharing_fails_everything_is_copied() {
    for kind in KINDS {
        // A backup does not try before it begins.
        for nth in 1..if kind == Kind::Backup { 3 } else { 4 } {
            let yard = Yard::new(Setup {
                shares: true,
                speed: 1 << 20,
                ..Setup::new(nth, kind, OnError::Report)
            });
            let failing = Fault::fails(EIO).of(Operation::Share).nth(nth);
            yard.world.add_fault(failing);
            let ended = yard.run(&mut Nothing);
            assert_eq!(yard.world.failures(), 1, "{kind:?} {nth}");
            assert_eq!(ended.result, Some(Ok(())), "{kind:?} {nth}");
            assert_eq!(ended.told.errors, [], "nothing was wrong with copying");
        }
    }
}

/// Adds room when an error is heard of.
struct AddsRoom;

impl Watch for AddsRoom {
    fn error(&mut self, yard: &Yard) {
        let more = yard.target.allocated_bytes() + 4 * BLOCK;
        yard.target.set_capacity(Some(more));
    }
}

#[test]
fn a_full_target_waits_for_room_and_the_copy_is_right() {
    for kind in KINDS {
        for policy in POLICIES {
            let mut was_full = 0;
            for blocks in 0..48 {
                let mut setup = Setup::new(11, kind, policy);
                setup.windowed = blocks % 2 == 0;
                let yard = Yard::new(setup);
                let room = yard.target.allocated_bytes() + blocks * BLOCK;
                yard.target.set_capacity(Some(room));
                let ended = yard.run(&mut AddsRoom);
                let result = ended.result.expect("the power stays");
                let Some((side, action, error)) = ended.told.errors.first() else {
                    assert_eq!(result, Ok(()), "enough room");
                    continue;
                };
                was_full += 1;
                assert!(*side == Side::Target && error.is_no_space(), "{error}");
                if policy == OnError::Report {
                    assert_eq!(*action, ErrorAction::Report);
                    assert!(
                        matches!(result, Err(Stop::Failed(error)) if error.errno == Some(ENOSPC))
                    );
                } else {
                    assert_eq!(result, Ok(()), "{kind:?} {policy:?} {blocks}");
                    let parks = ended.told.parked > 0;
                    assert_eq!(parks, *action == ErrorAction::Stop, "{kind:?} {policy:?}");
                }
            }
            assert!(
                was_full > 3 && was_full < 48,
                "{was_full} of 48 disks were full"
            );
        }
    }
}

#[test]
fn storms_of_faults_never_end_in_wrong_bytes() {
    each_seed("blockyard-engine", "storms_of_faults", 1200, |seed| {
        let yard = Yard::new(Setup::random(seed));
        let one_in = 4 + seed % 40;
        yard.world.add_fault(Fault::slow(5).one_in(3));
        for operation in [
            Operation::Read,
            Operation::Write,
            Operation::Zero,
            Operation::Allocation,
            Operation::Resize,
            Operation::Share,
            Operation::Discard,
        ] {
            let errno = if seed % 3 == 0 { ENOSPC } else { EIO };
            yard.world
                .add_fault(Fault::fails(errno).of(operation).one_in(one_in));
        }
        let failing_sync = Fault::fails(EIO).of(Operation::Sync).one_in(8);
        yard.world.add_fault(failing_sync);
        yard.run(&mut Nothing);
    });
}
