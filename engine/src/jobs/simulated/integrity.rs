//! Copies with checksums, on simulated disks: a manifest tells of the point in time that the target holds, whatever writers do, and
//! a target that loses, changes or misplaces a write fails the job, which says where.

use std::cell::Cell;
use std::rc::Rc;

use blockyard_simulator::{Seed, World, each_seed};
use blockyard_storage::{
    Buffer, ByteRange, Extent, LocalFuture, MemoryStorage, Preallocation, Storage, StorageError,
    StorageFacts, Transfer, ZeroMode,
};

use super::backup_stage::{Disks, Setup, Stage};
use super::yard::{KINDS, Kind};
use crate::data::CpuPool;
use crate::job::context::ErrorPolicies;
use crate::job::work::{Stop, Work};
use crate::jobs::backup::Backup;
use crate::jobs::integrity::Integrity;
use crate::jobs::mirror::Mirror;
use crate::jobs::test_support::{Running, VirtualClock, saver};
use crate::manifest::onto::Earlier;
use crate::manifest::sums::Summing;
use crate::manifest::text::Writer;
use crate::manifest::{EXTENT_BYTES, Recorder, sums::Summed};
use crate::node::Node;
use crate::node::file_node::{FileNode, FileOptions};
use crate::node::mirror_top::Tracker;
use crate::request::{BackupPerf, BackupSpec, MirrorSpec};

/// Of what is read and read back of a disk of this length.
pub(super) fn recorder(length_bytes: u64) -> Rc<Recorder> {
    let scratch = Rc::new(MemoryStorage::new(0));
    let cpu = CpuPool::on_the_spot();
    Rc::new(Recorder::new(length_bytes, cpu, Some(scratch), true))
}

/// The manifest of what was recorded.
pub(super) async fn manifest(recorder: &Recorder) -> String {
    let output = MemoryStorage::new(0);
    let written = recorder.write_manifest(&output).await;
    written.expect("a whole manifest");
    let length = output.facts().length_bytes as usize;
    let read = output.read(0, Buffer::zeroed(length)).await;
    String::from_utf8(read.buffer.as_slice().to_vec()).expect("a text")
}

/// The manifest of what was recorded, and of the rest what the `earlier` one says.
pub(super) async fn manifest_onto(recorder: &Recorder, earlier: &Earlier) -> String {
    let output = MemoryStorage::new(0);
    let written = recorder.write_manifest_onto(earlier, &output).await;
    written.expect("a whole manifest");
    let length = output.facts().length_bytes as usize;
    let read = output.read(0, Buffer::zeroed(length)).await;
    String::from_utf8(read.buffer.as_slice().to_vec()).expect("a text")
}

/// The manifest of a disk that held these bytes, to lay another one onto.
pub(super) fn earlier(bytes: &[u8]) -> Earlier {
    let text = manifest_of(bytes);
    let opened = blockyard_simulator::run(
        async {
            let storage = MemoryStorage::new(0);
            let written = storage.write(0, Buffer::copy_of(text.as_bytes())).await;
            written.outcome.expect("written");
            let options = FileOptions::default();
            let node = FileNode::new("earlier".to_owned(), Rc::new(storage), options);
            Earlier::open(Rc::new(node)).await
        },
        || false,
    );
    opened.expect("no waiting").expect("a manifest")
}

/// The manifest of a disk that holds these bytes.
pub(super) fn manifest_of(bytes: &[u8]) -> String {
    let mut summing = Summing::new(ByteRange::new(0, bytes.len() as u64), true);
    summing.push(bytes);
    let mut writer = Writer::new(bytes.len() as u64);
    for run in summing.take_runs() {
        match run {
            Summed::Zeroes(range) => writer.zeroes(range),
            Summed::Data(range, sums) => {
                for (extent, sum) in range.pieces(EXTENT_BYTES).zip(sums) {
                    writer.extent(extent, sum);
                }
            }
        }
    }
    writer.finish()
}

#[test]
fn a_backup_beside_writers_is_verified_and_its_manifest_tells_of_its_point_in_time() {
    let whole = Cell::new(0);
    each_seed("blockyard-engine", "a_backup_is_verified", 600, |seed| {
        let disks = Disks::random(seed);
        let cluster_bytes = *Seed::new(seed).pick(&[65536, 131_072]);
        let setup = Setup {
            cluster_bytes,
            perf: BackupPerf {
                min_cluster_size: cluster_bytes,
                ..BackupPerf::default()
            },
            ..Setup::random(seed)
        };
        let mut stage: Stage = disks.stage(setup);
        let recorder = recorder(stage.original.len() as u64);
        stage.recorder = Some(Rc::clone(&recorder));
        let ended = stage.run(|| disks.world.step());
        stage.assert_end(&ended, || disks.world.step());
        if ended.is_ok() {
            let text = blockyard_simulator::run(manifest(&recorder), || disks.world.step());
            assert_eq!(
                text,
                Some(manifest_of(&stage.original)),
                "{:?}",
                stage.setup
            );
            whole.set(whole.get() + 1);
        }
    });
    assert!(whole.get() > 250, "{}", whole.get());
}

/// What goes wrong with one change.
#[derive(Clone, Copy, Debug)]
enum Wrong {
    /// A bit of it is another one.
    Flipped,
    /// It is not there.
    Lost,
    /// It is beside the place where it should be.
    Misplaced,
}

/// A storage that gets one change wrong, and says that all is well.
struct Corrupting {
    below: Rc<dyn Storage>,
    nth: Cell<u64>,
    wrong: Wrong,
    dice: Seed,
}

impl Corrupting {
    /// Whether it is the turn of the change that goes wrong.
    fn strikes(&self) -> bool {
        let left = self.nth.get();
        self.nth.set(left.wrapping_sub(1));
        left == 0
    }
}

impl Storage for Corrupting {
    fn facts(&self) -> StorageFacts {
        self.below.facts()
    }

    fn read(&self, offset: u64, into: Buffer) -> LocalFuture<'_, Transfer> {
        self.below.read(offset, into)
    }

    fn write(&self, offset: u64, mut from: Buffer) -> LocalFuture<'_, Transfer> {
        let length = from.len() as u64;
        if !self.strikes() {
            return self.below.write(offset, from);
        }
        match self.wrong {
            Wrong::Flipped => {
                let place = self.dice.below(length) as usize;
                from.as_mut_slice()[place] ^= 1 << self.dice.below(8);
                self.below.write(offset, from)
            }
            Wrong::Misplaced if offset >= length => self.below.write(offset - length, from),
            Wrong::Misplaced | Wrong::Lost => Box::pin(std::future::ready(Transfer {
                buffer: from,
                outcome: Ok(()),
            })),
        }
    }

    fn zero(&self, range: ByteRange, mode: ZeroMode) -> LocalFuture<'_, Result<(), StorageError>> {
        match self.strikes() {
            true => Box::pin(std::future::ready(Ok(()))),
            false => self.below.zero(range, mode),
        }
    }

    fn discard(&self, range: ByteRange) -> LocalFuture<'_, Result<(), StorageError>> {
        self.below.discard(range)
    }

    fn allocation(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> LocalFuture<'_, Result<Vec<Extent>, StorageError>> {
        self.below.allocation(range, extents_max)
    }

    fn resize(&self, length_bytes: u64) -> LocalFuture<'_, Result<(), StorageError>> {
        self.below.resize(length_bytes)
    }

    fn preallocate(
        &self,
        range: ByteRange,
        how: Preallocation,
    ) -> LocalFuture<'_, Result<(), StorageError>> {
        self.below.preallocate(range, how)
    }

    fn sync(&self) -> LocalFuture<'_, Result<(), StorageError>> {
        self.below.sync()
    }
}

fn work(
    kind: Kind,
    source: Rc<dyn Node>,
    target: Rc<dyn Node>,
    clock: &VirtualClock,
) -> Box<dyn Work> {
    let length = source.facts().length_bytes;
    // Without a manifest, as a client who wants to be sure of the copy alone.
    let recorder = Recorder::new(length, CpuPool::on_the_spot(), None, true);
    let integrity = Integrity::with_recorder(Some(Rc::new(recorder)));
    match kind {
        Kind::Backup => {
            let saver = saver(&source, &target, clock);
            let backup = Backup::new(source, target, saver, None, BackupSpec::default());
            Box::new(backup.keeping(integrity))
        }
        Kind::Mirror => {
            let tracker = Rc::new(Tracker::new(length, 65536));
            let spec = MirrorSpec::default();
            let mirror = Mirror::new(source, target, tracker, None, &spec);
            Box::new(mirror.keeping(integrity))
        }
    }
}

#[test]
fn a_target_that_corrupts_fails_the_job_which_says_where() {
    let failed = Cell::new(0);
    each_seed("blockyard-engine", "a_target_that_corrupts", 600, |seed| {
        let dice = Seed::new(seed);
        let world = World::new(seed);
        let options = blockyard_simulator::DiskOptions {
            length_bytes: 512 * (20 + dice.below(5000)),
            ..Default::default()
        };
        let (source, target) = (
            world.disk("source", options.clone()),
            world.disk("target", options.clone()),
        );
        for disk in [&source, &target] {
            for run in ByteRange::new(0, options.length_bytes).pieces(49_152) {
                if dice.one_in(2) {
                    let bytes: Vec<u8> = (0..run.length()).map(|_| dice.any() as u8).collect();
                    disk.fill(run.offset(), &bytes);
                }
            }
        }
        let corrupting = Rc::new(Corrupting {
            below: target.open(),
            nth: Cell::new(dice.below(8)),
            wrong: *dice.pick(&[Wrong::Flipped, Wrong::Lost, Wrong::Misplaced]),
            dice: Seed::new(seed ^ 0xbad),
        });
        let node = |name: &str, storage| -> Rc<dyn Node> {
            Rc::new(FileNode::new(
                name.to_owned(),
                storage,
                FileOptions::default(),
            ))
        };
        let clock = VirtualClock::default();
        let kind = *dice.pick(&KINDS);
        let nodes = (node("source", source.open()), node("target", corrupting));
        let mut work = work(kind, nodes.0, nodes.1, &clock);
        let running = Running::new(&clock, 0, ErrorPolicies::default());
        let pauses = dice.one_in(2);
        let ended = running.drive(
            &mut *work,
            |_| {},
            |orders| {
                // It may be over before anybody was quiet.
                orders.order_pause(pauses && dice.one_in(4));
                world.step() || clock.advance()
            },
        );
        let ended = ended.expect("it ends");
        let (old, new) = (source.bytes(), target.bytes());
        let differs = old.iter().zip(&new).position(|(old, new)| old != new);
        match (differs, ended) {
            (None, ended) => assert_eq!(ended, Ok(()), "{kind:?}"),
            (Some(at), Err(Stop::Failed(error))) => {
                let range = error.range.expect("a place");
                assert!(
                    range.contains(&ByteRange::new(at as u64, 1)),
                    "{at}: {error:?}"
                );
                assert_eq!(error.node.as_deref(), Some("target"));
                let text = "The target does not hold what was read from the source: ";
                assert!(error.text.starts_with(text), "{}", error.text);
                failed.set(failed.get() + 1);
            }
            (Some(at), ended) => panic!("byte {at} is wrong, and {ended:?}, {kind:?}"),
        }
    });
    assert!(failed.get() > 300, "{}", failed.get());
}
