//! Checkpoints of three images on simulated disks whose power goes at every step of begin, commit and abort, and of what is done about
//! them afterwards: once all is open again, all of them are at one checkpoint, and no change since then is missing.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use blockyard_simulator::{Seed, each_seed, run};
use blockyard_storage::{Buffer, ByteRange};
use futures_util::future::{join, join_all};
use tempfile::{TempDir, tempdir, tempdir_in};

use crate::bitmap::{Bitmap, Need, NodeBitmaps, Succession};
use crate::checkpoint::CheckpointDiskSpec;
use crate::graph::{PendingDisk, changed_since};
use crate::manager::decisions::{self, Decision};
use crate::node::Node;
use crate::node::build::build;
use crate::node::dirty_map::DirtyMap;
use crate::node::qcow2::tests::reopening::plan;
use crate::node::qcow2::tests::yard::{Setup, Yard};
use crate::state::StateDir;

const DISKS: usize = 3;
const GRANULE: u64 = 512;
const OLD: &str = "c1";
const NEW: &str = "c2";

/// What a client does about the checkpoint that it has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Commit,
    Abort,
    /// It goes on fetching.
    None,
}

/// Three disks and what is known of them.
struct Disks {
    yards: Vec<Yard>,
    dice: Seed,
    _folder: TempDir,
    state: StateDir,
    /// What the disks were when the older checkpoint began, and when the new one did.
    at_old: RefCell<Vec<Vec<u8>>>,
    at_new: RefCell<Vec<Vec<u8>>>,
    /// The commit has been answered.
    is_committed: Cell<bool>,
    /// It has been asked for.
    is_asked: Cell<bool>,
}

struct Opened {
    node: Rc<dyn Node>,
    bitmaps: Arc<NodeBitmaps>,
}

impl Opened {
    async fn content(&self) -> Vec<u8> {
        let length = self.node.facts().length_bytes as usize;
        let read = self.node.read(0, Buffer::zeroed(length)).await;
        read.outcome.expect("read");
        read.buffer.as_slice().to_vec()
    }

    fn map(&self, name: &str) -> Option<DirtyMap> {
        let map = self.bitmaps.with(name, Need::Read, |one| one.map().clone());
        map.ok()
    }

    async fn write(&self, dice: &Seed) {
        let length = self.node.facts().length_bytes;
        let offset = GRANULE * dice.below(length / GRANULE);
        let bytes = [1 + dice.below(255) as u8; GRANULE as usize];
        let wrote = self.node.write(offset, Buffer::copy_of(&bytes)).await;
        wrote.outcome.expect("written");
        if dice.one_in(3) {
            self.node.flush().await.expect("flushed");
        }
    }
}

impl Disks {
    fn new(seed: u64) -> Self {
        let folder = tempdir_in("/dev/shm").or_else(|_| tempdir());
        let folder = folder.expect("a folder");
        let dice = Seed::new(seed ^ 0x0c4e_c4b0);
        let yard = |nth| {
            Yard::new(Setup {
                size_bytes: GRANULE * (8 + dice.below(60)),
                alignment: *dice.pick(&[1, 512]),
                lazy_refcounts: dice.one_in(4),
                ..Setup::new(seed * 10 + nth, *dice.pick(&[9, 12, 16]))
            })
        };
        Self {
            yards: (0..DISKS as u64).map(yard).collect(),
            state: StateDir::open_here(folder.path()).expect("made"),
            _folder: folder,
            dice,
            at_old: RefCell::default(),
            at_new: RefCell::default(),
            is_committed: Cell::new(false),
            is_asked: Cell::new(false),
        }
    }

    fn steps(&self) -> u64 {
        self.yards.iter().map(|yard| yard.world.steps()).sum()
    }

    /// Runs `work` until the power goes: at this step of any disk, or because the state directory is left without.
    fn drive<T>(&self, work: impl Future<Output = T>, until: u64) -> Option<T> {
        run(work, || {
            let first = self.dice.below(DISKS as u64) as usize;
            let mut yards = self.yards.iter().cycle().skip(first).take(DISKS);
            self.steps() < until
                && yards.any(|yard| yard.world.step() || yard.go_on_with_what_is_left())
        })
    }

    fn cut_power(&self) {
        self.yards.iter().for_each(Yard::cut_power);
        self.state.stop_after(u64::MAX);
    }

    async fn open(&self) -> Vec<Opened> {
        let mut all = Vec::new();
        for yard in &self.yards {
            let bitmaps = Arc::new(NodeBitmaps::recorded_in(Some(self.state.clone())));
            let plan = plan(yard, false, 1 << 16);
            let built = build(&yard.context, "image", &plan, Arc::clone(&bitmaps)).await;
            let node = built.expect("an image").node;
            all.push(Opened { node, bitmaps });
        }
        all
    }

    /// The older checkpoint, which all disks are at.
    async fn begin_old(&self) {
        let all = self.open().await;
        for disk in &all {
            let length = disk.node.facts().length_bytes;
            let mut bitmap = Bitmap::new(OLD.to_owned(), length, GRANULE);
            bitmap.keep();
            disk.bitmaps.add(bitmap).expect("added");
            disk.node.record_bitmaps().await;
            let content = disk.content().await;
            self.at_old.borrow_mut().push(content);
        }
        join_all(all.iter().map(|disk| disk.write(&self.dice))).await;
    }

    /// A client begins a checkpoint beside writers, and does with it what it does.
    async fn session(&self, end: End) {
        let all = self.open().await;
        join_all(all.iter().map(|disk| disk.write(&self.dice))).await;
        let mut pending = Vec::new();
        // Writers are drained meanwhile.
        let mut contents = Vec::new();
        for disk in &all {
            contents.push(disk.content().await);
            pending.push(self.begin(disk));
        }
        self.at_new.replace(contents);
        join_all(all.iter().map(|disk| disk.write(&self.dice))).await;
        let writes = join_all(all.iter().map(|disk| disk.write(&self.dice)));
        match end {
            End::Commit => {
                self.is_asked.set(true);
                join(writes, self.commit(&all, pending)).await;
                self.is_committed.set(true);
            }
            End::Abort => {
                pending.into_iter().for_each(PendingDisk::abort);
                writes.await;
            }
            End::None => drop(writes.await),
        }
        join_all(all.iter().map(|disk| disk.write(&self.dice))).await;
        if self.dice.one_in(3) {
            for disk in &all {
                disk.node.flush().await.expect("flushed");
                disk.node.store_bitmaps().await.expect("stored");
                disk.node.close().await.expect("closed");
            }
        }
    }

    /// As [`Graph::begin_on_disk`](crate::graph::Graph::begin_on_disk).
    fn begin(&self, disk: &Opened) -> PendingDisk {
        let spec = CheckpointDiskSpec {
            node: "image".to_owned(),
            bitmap: NEW.to_owned(),
            previous: Some(OLD.to_owned()),
            granularity_bytes: None,
        };
        let before = changed_since(&disk.bitmaps, Some(OLD)).expect("it records");
        let length = disk.node.facts().length_bytes;
        let new = Bitmap::new(NEW.to_owned(), length, GRANULE);
        disk.bitmaps.add(new).expect("added");
        let begun = PendingDisk::begin("x", &spec, Arc::clone(&disk.bitmaps), before, true);
        begun.expect("begun")
    }

    fn decision(disk: usize) -> Decision {
        Decision {
            path: format!("/{disk}").into_bytes(),
            identity: (0, disk as u64),
            bitmap: NEW.to_owned(),
            previous: Some(OLD.to_owned()),
            granularity_bytes: GRANULE,
            keep_previous: false,
        }
    }

    /// As the manager's, in its order: decided, then in memory, then image by image.
    async fn commit(&self, all: &[Opened], mut pending: Vec<PendingDisk>) {
        let mut left: Vec<Decision> = (0..DISKS).map(Self::decision).collect();
        let decided = decisions::write(&self.state, &left).await;
        decided.expect("written");
        for disk in &mut pending {
            disk.commit(false).expect("there");
        }
        for (number, disk) in all.iter().enumerate() {
            let removed = disk.node.remove_bitmap(OLD.as_bytes().to_vec()).await;
            removed.expect("removed");
            disk.bitmaps.take_out(OLD).expect("there");
            disk.node.record_bitmaps().await;
            if disk.bitmaps.is_recorded() {
                left.retain(|one| *one != Self::decision(number));
            }
        }
        let done = decisions::write(&self.state, &left).await;
        done.expect("written");
    }

    /// All images are opened, and what was decided is done, as the manager does it.
    async fn recover(&self) -> Vec<Opened> {
        let all = self.open().await;
        let mut left = decisions::read(&self.state).await.expect("read");
        for (number, disk) in all.iter().enumerate() {
            let Some(place) = left.iter().position(|one| *one == Self::decision(number)) else {
                continue;
            };
            let how = Succession {
                bitmap: NEW,
                previous: Some(OLD),
                granularity_bytes: GRANULE,
                keep_previous: false,
            };
            disk.bitmaps.succeed(how, disk.node.facts().length_bytes);
            let removed = disk.node.remove_bitmap(OLD.as_bytes().to_vec()).await;
            removed.expect("removed");
            disk.node.record_bitmaps().await;
            if disk.bitmaps.is_recorded() {
                left.remove(place);
            }
        }
        let done = decisions::write(&self.state, &left).await;
        done.expect("written");
        all
    }

    /// All disks are at one of both, which is not the wrong one.
    async fn look(&self, all: &[Opened], told: &str) -> &'static str {
        let names = |disk: &Opened| {
            let views = disk.bitmaps.views().into_iter();
            let mut names: Vec<_> = views.filter_map(|view| view.name).collect();
            names.sort();
            names
        };
        let shown: Vec<_> = all.iter().map(names).collect();
        let is = |name: &str| shown.iter().all(|names| *names == [name]);
        let (name, befores) = match () {
            () if is(NEW) && self.is_asked.get() => (NEW, &self.at_new),
            () if is(OLD) && !self.is_committed.get() => (OLD, &self.at_old),
            () => panic!("{told}: {shown:?}"),
        };
        let befores = befores.borrow().clone();
        for (number, (disk, before)) in all.iter().zip(&befores).enumerate() {
            let map = disk.map(name);
            let map = map.unwrap_or_else(|| panic!("{told}: inconsistent on {number}"));
            let now = disk.content().await;
            for (index, (old, new)) in before.chunks(512).zip(now.chunks(512)).enumerate() {
                let granule = ByteRange::new(index as u64 * GRANULE, GRANULE);
                let is_marked = old == new || map.run_in(granule).is_some();
                assert!(is_marked, "{told}: {granule:?} of disk {number} is missed");
            }
        }
        name
    }
}

/// How often the new checkpoint was found, the old one, and what was cut twice.
#[derive(Default)]
struct Seen([Cell<u32>; 3]);

/// One life of three disks, whose power goes where `cut` says: after so many steps of the disks, or works of the state directory.
/// Whether it went before the end.
fn try_cut(seed: u64, end: End, cut: (Option<u64>, Option<u64>), seen: &Seen) -> bool {
    let told = format!("seed {seed} {end:?} cut {cut:?}");
    let disks = Disks::new(seed);
    disks.drive(disks.begin_old(), u64::MAX).expect("begun");
    disks.cut_power();
    let until = cut.0.map_or(u64::MAX, |steps| disks.steps() + steps);
    disks.state.stop_after(cut.1.unwrap_or(u64::MAX));
    let ended = disks.drive(disks.session(end), until);
    disks.cut_power();
    // While it is made good the power may go again.
    while disks.dice.one_in(2) {
        let until = disks.steps() + disks.dice.below(100);
        if disks.dice.one_in(2) {
            disks.state.stop_after(disks.dice.below(20));
        }
        let recovered = disks.drive(disks.recover(), until);
        if recovered.is_none() {
            seen.0[2].set(seen.0[2].get() + 1);
        }
        drop(recovered);
        disks.cut_power();
    }
    let name = disks.drive(
        async {
            let all = disks.recover().await;
            disks.look(&all, &told).await
        },
        u64::MAX,
    );
    let name = name.expect("it is made good");
    let place = usize::from(name == OLD);
    seen.0[place].set(seen.0[place].get() + 1);
    ended.is_none()
}

#[test]
fn all_disks_are_at_one_checkpoint_wherever_the_power_goes() {
    let seen = Seen::default();
    each_seed("blockyard-engine", "all_disks_are_at_one", 12, |seed| {
        let end = [End::Commit, End::Commit, End::Abort, End::None][seed as usize % 4];
        // Each step of the disks, and each work of the state directory, one after the other.
        let mut steps = 0;
        while try_cut(seed, end, (Some(steps), None), &seen) {
            steps += 1;
        }
        let mut works = 0;
        while try_cut(seed, end, (None, Some(works)), &seen) {
            works += 1;
        }
        assert!(steps > 20 && works > 10, "{steps} {works}");
    });
    let seen: Vec<u32> = seen.0.iter().map(Cell::get).collect();
    assert!(seen.iter().all(|count| *count > 20), "{seen:?}");
}
