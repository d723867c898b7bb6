//! Writers of a node beside everything that can be done to its bitmaps, in any order: what has changed while a bitmap recorded is in it,
//! and nothing else beyond its granules.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use blockyard_simulator::{Disk, DiskOptions, Fault, Seed, World, each_seed, run};
use blockyard_storage::error::EIO;
use blockyard_storage::{Buffer, ByteRange, LocalFuture, ZeroMode};
use futures_util::future::{join, join_all};

use crate::bitmap::{Bitmap, FrozenBitmap, JobEnd, Need, NodeBitmaps};
use crate::data::Spawner;
use crate::node::Node;
use crate::node::dirty_map::DirtyMap;
use crate::node::file_node::{FileNode, FileOptions};
use crate::node::recording_node::RecordingNode;
use crate::request::{BitmapMode, Discard};

/// Units in which the model counts, in bytes: those of requests.
const UNIT: u64 = 512;

/// Granules of the bitmaps, in bytes.
const GRANULARITIES: [u64; 4] = [512, 1024, 4096, 32_768];

/// What has changed, unit by unit.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Units(Vec<bool>);

impl Units {
    fn none(length: u64) -> Self {
        Self(vec![false; (length / UNIT) as usize])
    }

    fn add(&mut self, range: ByteRange) {
        let units = range.offset() / UNIT..range.end().div_ceil(UNIT);
        for unit in units {
            self.0[unit as usize] = true;
        }
    }

    fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.0.iter_mut().zip(&other.0) {
            *mine |= theirs;
        }
    }

    /// In whole granules.
    fn widened(&self, granularity: u64) -> Self {
        let granule = (granularity / UNIT) as usize;
        let whole = |units: &[bool]| vec![units.contains(&true); units.len()];
        Self(self.0.chunks(granule).flat_map(whole).collect())
    }

    fn of(map: &DirtyMap, length: u64) -> Self {
        let mut units = Self::none(length);
        let mut from = 0;
        while let Some(run) = map.run_from(from, u64::MAX) {
            units.add(run.clamp_end(length));
            from = run.end();
            if from >= length {
                break;
            }
        }
        units
    }
}

/// What is known of one bitmap.
struct Known {
    granularity: u64,
    records: bool,
    /// Exactly this has changed, in whole granules.
    dirty: Units,
    /// What a job goes by, and what has changed since.
    frozen: Option<(FrozenBitmap, Units)>,
}

/// What a request was about, and the rest of it.
type Abandoned = (ByteRange, LocalFuture<'static, ()>);

/// A node, its bitmaps, and what is known of them.
struct Scene {
    seed: u64,
    dice: Seed,
    world: World,
    node: RecordingNode,
    bitmaps: Arc<NodeBitmaps>,
    known: RefCell<BTreeMap<String, Known>>,
    length: u64,
    /// Requests that nobody waits for any more.
    abandoned: Rc<RefCell<Vec<Abandoned>>>,
    /// Which request is being abandoned.
    abandons: Rc<Cell<ByteRange>>,
}

/// How often what happened.
#[derive(Default)]
struct Tally {
    settled: Cell<usize>,
    merged: Cell<usize>,
    abandoned: Cell<usize>,
    refused: Cell<usize>,
}

impl Scene {
    fn new(seed: u64) -> Self {
        let dice = Seed::new(seed ^ 0xb17a);
        let world = World::new(seed);
        let length = UNIT * (1 + dice.below(400));
        let options = DiskOptions {
            length_bytes: length,
            ..DiskOptions::default()
        };
        let disk: Disk = world.disk("disk", options);
        if dice.one_in(2) {
            world.add_fault(Fault::fails(EIO).one_in(10));
        }
        let file = FileNode::new(
            "file".to_owned(),
            disk.open(),
            FileOptions {
                // Where discards do nothing, nothing changes.
                discard: Discard::Unmap,
                ..FileOptions::default()
            },
        );
        let bitmaps = Arc::new(NodeBitmaps::default());
        let abandoned = Rc::<RefCell<Vec<Abandoned>>>::default();
        let abandons = Rc::new(Cell::new(ByteRange::default()));
        let (taken, whose) = (Rc::clone(&abandoned), Rc::clone(&abandons));
        let spawner = Spawner::new(move |work| taken.borrow_mut().push((whose.get(), work)));
        Self {
            seed,
            dice,
            world,
            node: RecordingNode::new(Rc::new(file), Arc::clone(&bitmaps), spawner),
            bitmaps,
            known: RefCell::default(),
            length,
            abandoned,
            abandons,
        }
    }

    /// A request has ended just now.
    fn changed(&self, range: ByteRange) {
        for known in self
            .known
            .borrow_mut()
            .values_mut()
            .filter(|known| known.records)
        {
            let mut units = Units::none(self.length);
            units.add(range);
            let units = units.widened(known.granularity);
            match &mut known.frozen {
                Some((_, since)) => since.merge(&units),
                None => known.dirty.merge(&units),
            }
        }
    }

    async fn dawdle(&self) {
        for _ in 0..self.dice.below(4) {
            let mut gave = false;
            poll_fn(|cx| match std::mem::replace(&mut gave, true) {
                true => Poll::Ready(()),
                false => {
                    cx.waker().wake_by_ref();
                    Poll::Pending
                }
            })
            .await;
        }
    }

    async fn write_this_and_that(&self, tally: &Tally) {
        for _ in 0..10 {
            self.dawdle().await;
            let first = self.dice.below(self.length / UNIT);
            let (range, _) = ByteRange::between(first * UNIT, self.length)
                .split_at(UNIT * (1 + self.dice.below(60)));
            let bytes = Buffer::zeroed(range.length() as usize);
            let mode = ZeroMode {
                may_unmap: self.dice.one_in(2),
                no_fallback: false,
            };
            let kind = self.dice.below(4);
            let request = async {
                // Also one that fails may have changed something.
                match kind {
                    0 => drop(self.node.zero(range, mode).await),
                    1 => drop(self.node.discard(range).await),
                    _ => drop(self.node.write(range.offset(), bytes).await),
                }
            };
            let mut request = pin!(request);
            let patience = match self.dice.one_in(6) {
                true => self.dice.below(4),
                false => u64::MAX,
            };
            let mut polls = 0;
            let ended = poll_fn(|cx| {
                if polls > patience {
                    return Poll::Ready(false);
                }
                polls += 1;
                if patience < u64::MAX {
                    cx.waker().wake_by_ref();
                }
                request.as_mut().poll(cx).map(|()| true)
            })
            .await;
            if ended {
                self.changed(range);
            } else {
                tally.abandoned.set(tally.abandoned.get() + 1);
                self.abandons.set(range);
                // Dropped at the end of this turn, before anything else happens.
            }
        }
    }

    /// Requests that nobody waits for go on to their end; whether one has come there.
    fn go_on_with_abandoned(&self) -> bool {
        let mut all = std::mem::take(&mut *self.abandoned.borrow_mut());
        let before = all.len();
        let mut cx = Context::from_waker(Waker::noop());
        all.retain_mut(|(range, work)| {
            let goes_on = work.as_mut().poll(&mut cx).is_pending();
            if !goes_on {
                self.changed(*range);
            }
            goes_on
        });
        let has_ended = all.len() < before;
        self.abandoned.borrow_mut().append(&mut all);
        has_ended
    }

    /// Does this and that to the bitmaps, and looks at all of them each time.
    async fn change_bitmaps(&self, tally: &Tally) {
        for _ in 0..60 {
            self.dawdle().await;
            let name = format!("b{}", self.dice.below(4));
            match self.known.borrow().get(&name) {
                None => {}
                Some(known) if known.frozen.is_some() => {
                    let refused = self.bitmaps.check(&name, Need::Change).is_err();
                    assert!(refused, "it is in use, seed {}", self.seed);
                    tally.refused.set(tally.refused.get() + 1);
                }
                Some(_) => self.bitmaps.check(&name, Need::Change).expect("is there"),
            }
            self.change_one(&name, tally);
            self.look();
        }
        let names: Vec<String> = self.known.borrow().keys().cloned().collect();
        for name in names {
            self.settle(&name, tally);
        }
    }

    fn change_one(&self, name: &str, tally: &Tally) {
        let mut all = self.known.borrow_mut();
        let Some(known) = all.get_mut(name) else {
            let granularity = *self.dice.pick(&GRANULARITIES);
            let mut bitmap = Bitmap::new(name.to_owned(), self.length, granularity);
            let records = !self.dice.one_in(4);
            bitmap.set_recording(records);
            self.bitmaps.add(bitmap).expect("a new name");
            let known = Known {
                granularity,
                records,
                dirty: Units::none(self.length),
                frozen: None,
            };
            all.insert(name.to_owned(), known);
            return;
        };
        if known.frozen.is_some() {
            drop(all);
            if self.dice.one_in(3) {
                self.settle(name, tally);
            }
            return;
        }
        let change = |act: &dyn Fn(&mut Bitmap)| {
            let changed = self.bitmaps.with(name, Need::Change, |bitmap| act(bitmap));
            changed.expect("nobody uses it");
        };
        match self.dice.below(8) {
            0 => {
                change(&Bitmap::clear);
                known.dirty = Units::none(self.length);
            }
            1 => {
                change(&|bitmap| bitmap.set_recording(true));
                known.records = true;
            }
            2 => {
                change(&|bitmap| bitmap.set_recording(false));
                known.records = false;
            }
            3 => {
                self.bitmaps.take_out(name).expect("is there");
                all.remove(name);
            }
            4 | 5 => {
                let mode = *self.dice.pick(&[
                    BitmapMode::OnSuccess,
                    BitmapMode::Always,
                    BitmapMode::Never,
                ]);
                let frozen = self.bitmaps.freeze(name, mode).expect("nobody uses it");
                let seen = Units::of(frozen.map(), self.length);
                assert_eq!(seen, known.dirty, "what a job goes by, seed {}", self.seed);
                known.frozen = Some((frozen, Units::none(self.length)));
            }
            _ => {
                let other = format!("b{}", self.dice.below(4));
                let Some(source) = all.get(&other).filter(|source| source.frozen.is_none()) else {
                    return;
                };
                let dirty = source.dirty.clone();
                let map = self
                    .bitmaps
                    .with(&other, Need::Read, |bitmap| bitmap.map().clone());
                let map = map.expect("nobody uses it");
                let merged = self
                    .bitmaps
                    .with(name, Need::Change, |bitmap| bitmap.merge(&map));
                merged.expect("nobody uses it");
                let known = all.get_mut(name).expect("is there");
                known.dirty.merge(&dirty.widened(known.granularity));
                tally.merged.set(tally.merged.get() + 1);
            }
        }
    }

    /// A job that goes by a bitmap ends, in one way or another.
    fn settle(&self, name: &str, tally: &Tally) {
        let mut all = self.known.borrow_mut();
        let Some(known) = all.get_mut(name) else {
            return;
        };
        let Some((frozen, since)) = known.frozen.take() else {
            return;
        };
        tally.settled.set(tally.settled.get() + 1);
        let before = std::mem::replace(&mut known.dirty, since);
        let is_kept = frozen.mode() == BitmapMode::Never;
        match self.dice.below(4) {
            0 => {
                frozen.settle(JobEnd::Success);
                if is_kept {
                    known.dirty.merge(&before);
                }
            }
            1 => {
                // Some of it is not on the target.
                let mut missing = frozen.map().emptied();
                let run = frozen
                    .map()
                    .run_from(self.dice.below(self.length), u64::MAX);
                if let Some(run) = run.filter(|_| self.dice.one_in(2)) {
                    missing.mark(run);
                }
                frozen.settle(JobEnd::Part(&missing));
                match frozen.mode() {
                    BitmapMode::Always => known.dirty.merge(&Units::of(&missing, self.length)),
                    _ => known.dirty.merge(&before),
                }
            }
            2 => {
                frozen.settle(JobEnd::Failure);
                known.dirty.merge(&before);
            }
            // Nobody has said how it ended.
            _ => known.dirty.merge(&before),
        }
    }

    /// All bitmaps are as they have to be.
    fn look(&self) {
        for (name, known) in self.known.borrow().iter() {
            if known.frozen.is_some() {
                continue;
            }
            let seen = self.bitmaps.with(name, Need::Read, |bitmap| {
                assert_eq!(bitmap.records(), known.records);
                Units::of(bitmap.map(), self.length)
            });
            let seen = seen.expect("nobody uses it");
            assert_eq!(seen, known.dirty, "{name}, seed {}", self.seed);
        }
    }
}

#[test]
fn what_changes_while_a_bitmap_records_is_in_it_and_nothing_else() {
    let tally = Tally::default();
    each_seed(
        "blockyard-engine",
        "what_changes_while_a_bitmap_records",
        500,
        |seed| {
            let scene = Scene::new(seed);
            let writers = (0..3).map(|_| scene.write_this_and_that(&tally));
            let all = join(join_all(writers), scene.change_bitmaps(&tally));
            let ended = run(all, || scene.go_on_with_abandoned() || scene.world.step());
            ended.expect("nothing hangs");
            while scene.world.step() || scene.go_on_with_abandoned() {}
            assert!(scene.abandoned.borrow().is_empty());
            scene.look();
        },
    );
    let counts = [
        &tally.settled,
        &tally.merged,
        &tally.abandoned,
        &tally.refused,
    ];
    let counts = counts.map(Cell::get);
    assert!(counts.iter().all(|count| *count > 500), "{counts:?}");
}
