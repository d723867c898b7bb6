//! A disk shown as it was, beside writers and without a job: every read sees what was there when the filter came, or fails because
//! that is not known any more. It is shown by a node for that, or by the target itself, which stands on the disk then.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use blockyard_simulator::{Fault, each_seed, run};
use blockyard_storage::error::{EACCES, EIO, EOPNOTSUPP};
use blockyard_storage::{Buffer, ByteRange, Operation};
use futures_util::future::{join, join_all};

use super::backup_stage::{Disks, Setup, Stage};
use crate::data::Spawner;
use crate::node::Node;
use crate::node::chain::{Content, chain_status};
use crate::node::copy_before_write::{
    CbwNodeOptions, CopyBeforeWrite, Destination, Progress, Saver, SnapshotAccess,
    SnapshotAccessOptions,
};
use crate::node::qcow2::tests::yard::{DataFile, Setup as ImageSetup, Yard as ImageYard};
use crate::node::recording_node::RecordingNode;
use crate::node::transfer::Writing;
use crate::request::{CbwOptions, DetectZeroes, Discard, OnCbwError};

const UNMAPS: SnapshotAccessOptions = SnapshotAccessOptions {
    read_only: false,
    discard: Discard::Unmap,
};

fn begin(stage: &Stage, saver: &Saver) {
    let unit_bytes = stage.target.facts().cluster_size_bytes;
    let destination = Destination {
        recorder: None,
        source: stage.source.clone(),
        target: stage.target.clone(),
        layers_max: None,
        how: Writing {
            unit_bytes: unit_bytes.map_or(1, u64::from),
            compress: false,
            may_unmap: false,
        },
    };
    saver.begin(destination, |_, _, _| {});
}

fn shown(stage: &Stage) -> Rc<dyn Node> {
    let filter = CopyBeforeWrite::new("cbw".to_owned(), stage.source.clone(), stage.saver.clone());
    Rc::new(SnapshotAccess::new(
        "shown".to_owned(),
        Rc::new(filter),
        UNMAPS,
    ))
}

/// What readers have met with.
#[derive(Default)]
struct Met {
    /// How often one was refused because nobody knows what was there.
    refused: Cell<usize>,
    /// What readers have given up.
    given_up: RefCell<Vec<ByteRange>>,
}

/// Reads here and there, and gives some of it up if the stage's seed wants that.
async fn read_this_and_that(stage: &Stage, shown: &Rc<dyn Node>, met: &Met) {
    let gives_up = shown.name() == "shown" && stage.setup.seed.is_multiple_of(3);
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
            Ok(()) => {
                assert!(
                    read.buffer.as_slice() == &stage.original[place],
                    "{range} is not what it was, {:?}",
                    stage.setup
                );
                if gives_up && stage.dice.one_in(4) {
                    met.given_up.borrow_mut().push(range);
                    let discarded = shown.discard(range).await;
                    assert!(discarded.is_ok() || stage.setup.only_target_fails);
                }
            }
            Err(error) if error.errno() == EACCES => {
                let given_up = met.given_up.borrow();
                let is_given_up = given_up.iter().any(|given| given.overlaps(&range));
                assert!(is_given_up || stage.saver.broken().is_some());
                met.refused.set(met.refused.get() + 1);
            }
            Err(error) => assert_eq!(error.errno(), EIO),
        }
    }
}

fn fleece(disks: &Disks, setup: Setup) -> Met {
    let stage = disks.stage(setup);
    begin(&stage, &stage.saver);
    let shown = shown(&stage);
    beside_writers(&stage, &shown, || disks.world.step())
}

fn beside_writers(stage: &Stage, shown: &Rc<dyn Node>, step: impl Fn() -> bool) -> Met {
    let met = Met::default();
    let writers = join_all((0..stage.setup.writers).map(|me| stage.write_this_and_that(me)));
    let readers = join_all((0..3).map(|_| read_this_and_that(stage, shown, &met)));
    let ended = run(join(writers, readers), || step() || stage.clock.advance());
    assert!(ended.is_some(), "somebody hangs: {:?}", stage.setup);
    let source = run(stage.contents(&stage.source), &step);
    stage.assert_known(0, &source.expect("read"), "in the end");
    met
}

#[test]
fn what_was_there_is_seen_beside_writers() {
    each_seed("blockyard-engine", "what_was_there_is_seen", 600, |seed| {
        let disks = Disks::random(seed);
        let met = fleece(&disks, Setup::random(seed));
        assert!(met.refused.get() == 0 || !met.given_up.borrow().is_empty());
    });
}

/// An image on the very disk that is saved into it shows the disk as it was, as far as it has been saved and as far as it has not.
#[test]
fn a_target_that_stands_on_the_disk_shows_what_it_was() {
    each_seed(
        "blockyard-engine",
        "a_target_that_stands_on_the_disk",
        600,
        |seed| {
            let disks = Disks::random(seed);
            let scratch = ImageYard::new(ImageSetup {
                alignment: 1,
                backing_bytes: None,
                data_file: DataFile::Inside,
                size_bytes: disks.source.bytes().len() as u64,
                ..ImageSetup::random(seed)
            });
            let source = disks.node(&disks.source, "source");
            let file = scratch.file("file", &scratch.image, false);
            let image = scratch.open_over(file, Some(source.clone()));
            let target = RecordingNode::new(image, Arc::default(), Spawner::new(drop));
            let target: Rc<dyn Node> = Rc::new(target);
            let setup = Setup::random(seed);
            let stage = Stage::new(setup, disks.source.bytes(), source, target.clone());
            begin(&stage, &stage.saver);
            let met = beside_writers(&stage, &target, || {
                let worlds = [&disks.world, &scratch.world];
                let first = usize::from(disks.world.steps().is_multiple_of(2));
                worlds[first].step() || worlds[1 - first].step()
            });
            assert_eq!(met.refused.get(), 0);
        },
    );
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
        refused.set(refused.get() + fleece(&disks, setup).refused.get());
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
    let shown: Rc<dyn Node> = Rc::new(SnapshotAccess::new("shown".to_owned(), filter, UNMAPS));
    let seen = run(stage.contents(&shown), || disks.world.step()).expect("read");
    assert!(seen == stage.original);
}

#[test]
fn only_a_filter_knows_what_was_there() {
    let disks = Disks::random(2);
    let stage = disks.stage(Setup::random(2));
    let shown = SnapshotAccess::new("shown".to_owned(), stage.source.clone(), UNMAPS);
    let read = run(shown.read(0, Buffer::zeroed(512)), || false).expect("at once");
    assert_eq!(read.outcome.map_err(|error| error.errno()), Err(EOPNOTSUPP));
    let written = run(shown.write(0, Buffer::zeroed(512)), || false).expect("at once");
    assert_eq!(
        written.outcome.map_err(|error| error.errno()),
        Err(EOPNOTSUPP)
    );
}
