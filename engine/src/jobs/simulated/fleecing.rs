//! A disk shown as it was, beside writers and without a job: every read sees what was there when the filter came, or fails because
//! that is not known any more.

use std::cell::Cell;
use std::pin::pin;
use std::rc::Rc;

use blockyard_simulator::{Fault, each_seed, run};
use blockyard_storage::error::{EACCES, EIO, EOPNOTSUPP};
use blockyard_storage::{Buffer, ByteRange, Operation};
use futures_util::future::{join, join_all};

use super::backup_stage::{Disks, Setup, Stage};
use crate::node::Node;
use crate::node::chain::{Content, chain_status};
use crate::node::copy_before_write::{
    CbwNodeOptions, CopyBeforeWrite, Destination, Progress, Saver, SnapshotAccess,
};
use crate::node::transfer::Writing;
use crate::request::{CbwOptions, DetectZeroes, Discard, OnCbwError};

fn begin(stage: &Stage, saver: &Saver) {
    let destination = Destination {
        source: stage.source.clone(),
        target: stage.target.clone(),
        layers_max: None,
        how: Writing {
            unit_bytes: 1,
            compress: false,
            may_unmap: false,
        },
    };
    saver.begin(destination, |_, _, _| {});
}

fn shown(stage: &Stage) -> Rc<dyn Node> {
    let filter = CopyBeforeWrite::new("cbw".to_owned(), stage.source.clone(), stage.saver.clone());
    Rc::new(SnapshotAccess::new("shown".to_owned(), Rc::new(filter)))
}

/// Reads here and there. How often it was refused, because nobody knows what was there.
async fn read_this_and_that(stage: &Stage, shown: &Rc<dyn Node>, refused: &Cell<usize>) {
    let length = stage.original.len() as u64;
    for _ in 0..stage.setup.operations {
        let start = stage.dice.below(length);
        let longest = 1 + stage.dice.below(40_000);
        let (range, _) = ByteRange::between(start, length).split_at(longest);
        let place = range.offset() as usize..range.end() as usize;
        if stage.dice.one_in(4) {
            let told = chain_status(shown, None, range, 8).await;
            for extent in told.unwrap_or_default() {
                let place = extent.range.offset() as usize..extent.range.end() as usize;
                let is_zero = stage.original[place].iter().all(|byte| *byte == 0);
                assert!(is_zero || extent.content == Content::Data, "{extent:?}");
            }
            continue;
        }
        let buffer = Buffer::zeroed(range.length() as usize);
        let read = shown.read(range.offset(), buffer).await;
        assert_eq!(
            read.buffer.len() as u64,
            range.length(),
            "all of the buffer"
        );
        match read.outcome {
            Ok(()) => assert!(
                read.buffer.as_slice() == &stage.original[place],
                "{range} is not what it was, {:?}",
                stage.setup
            ),
            Err(error) if error.errno() == EACCES => {
                assert!(stage.saver.broken().is_some());
                refused.set(refused.get() + 1);
            }
            Err(error) => assert_eq!(error.errno(), EIO),
        }
    }
}

fn fleece(disks: &Disks, setup: Setup) -> usize {
    let stage = disks.stage(setup);
    begin(&stage, &stage.saver);
    let shown = shown(&stage);
    let refused = Cell::new(0);
    let writers = join_all((0..stage.setup.writers).map(|me| stage.write_this_and_that(me)));
    let readers = join_all((0..3).map(|_| read_this_and_that(&stage, &shown, &refused)));
    let all = pin!(join(writers, readers));
    let ended = run(all, || disks.world.step() || stage.clock.advance());
    assert!(ended.is_some(), "somebody hangs: {:?}", stage.setup);
    let source = run(stage.contents(&stage.source), || disks.world.step());
    stage.assert_known(0, &source.expect("read"), "in the end");
    refused.get()
}

#[test]
fn what_was_there_is_seen_beside_writers() {
    each_seed("blockyard-engine", "what_was_there_is_seen", 600, |seed| {
        let disks = Disks::random(seed);
        assert_eq!(fleece(&disks, Setup::random(seed)), 0);
    });
}

#[test]
fn nothing_wrong_is_seen_when_saving_fails() {
    let refused = Cell::new(0);
    each_seed("blockyard-engine", "nothing_wrong_is_seen", 400, |seed| {
        let disks = Disks::random(seed);
        for operation in [Operation::Read, Operation::Write, Operation::Zero] {
            let fault = Fault::fails(EIO).of(operation).on(&disks.target);
            disks.world.add_fault(fault.one_in(10 + seed % 20));
        }
        let on_error = match seed % 2 {
            0 => OnCbwError::BreakSnapshot,
            _ => OnCbwError::BreakGuestWrite,
        };
        let setup = Setup {
            cbw: CbwOptions {
                on_error,
                timeout_seconds: 0,
            },
            only_target_fails: true,
            ..Setup::random(seed)
        };
        refused.set(refused.get() + fleece(&disks, setup));
    });
    assert!(refused.get() > 100, "{} refused", refused.get());
}

/// As a node does that moves to another thread.
#[test]
fn a_filter_that_comes_again_goes_on_where_it_was() {
    let disks = Disks::random(1);
    let stage = disks.stage(Setup::random(1));
    begin(&stage, &stage.saver);
    let progress = Progress::default();
    let options = CbwNodeOptions {
        read_only: false,
        discard: Discard::Ignore,
        detect_zeroes: DetectZeroes::Off,
    };
    let (length, cluster) = (
        stage.source.facts().length_bytes,
        stage.saver.clusters().cluster_bytes(),
    );
    let filter = CopyBeforeWrite::new("cbw".to_owned(), stage.source.clone(), stage.saver.clone())
        .with_options(options, progress.clone());
    let write = |filter: Rc<CopyBeforeWrite>, offset, byte| {
        let written = filter.write(offset, Buffer::copy_of(&[byte; 512]));
        let written = run(written, || disks.world.step()).expect("it ends");
        written.outcome.expect("written");
    };
    let filter = Rc::new(filter);
    write(filter.clone(), 0, 1);
    run(filter.close(), || false)
        .expect("at once")
        .expect("closed");
    let (surroundings, cbw) = (stage.surroundings(), CbwOptions::default());
    let saver = Rc::new(Saver::resumed(
        &progress,
        (length, cluster),
        cbw,
        surroundings,
    ));
    begin(&stage, &saver);
    let filter = CopyBeforeWrite::new("cbw".to_owned(), stage.source.clone(), saver);
    let filter = Rc::new(filter.with_options(options, progress));
    write(filter.clone(), 0, 2);
    write(filter.clone(), length - 512, 3);
    let shown: Rc<dyn Node> = Rc::new(SnapshotAccess::new("shown".to_owned(), filter));
    let seen = run(stage.contents(&shown), || disks.world.step()).expect("read");
    assert!(seen == stage.original);
}

#[test]
fn only_a_filter_knows_what_was_there() {
    let disks = Disks::random(2);
    let stage = disks.stage(Setup::random(2));
    let shown = SnapshotAccess::new("shown".to_owned(), stage.source.clone());
    let read = run(shown.read(0, Buffer::zeroed(512)), || false).expect("at once");
    assert_eq!(read.outcome.map_err(|error| error.errno()), Err(EOPNOTSUPP));
    let written = run(shown.write(0, Buffer::zeroed(512)), || false).expect("at once");
    assert_eq!(
        written.outcome.map_err(|error| error.errno()),
        Err(EOPNOTSUPP)
    );
}
