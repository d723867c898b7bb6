//! One operation after the other, against a plain array: thousands of sequences, each an image of its own.
//! `BLOCKYARD_SEEDS=100000` tries as many, `BLOCKYARD_SEED=7` that one alone.

use std::path::Path;
use std::process::Command;
use std::rc::Rc;

use blockyard_images::qcow2::Qcow2;
use blockyard_images::qcow2::layout::header::{Access, Header};
use blockyard_images::qcow2::units::{GuestCluster, Version};
use blockyard_simulator::{Seed, each_seed};
use blockyard_storage::{Buffer, ByteRange, MemoryStorage, Storage};

use crate::disk_model::{guest_bytes, guest_bytes_of};
use crate::mover::Mover;
use crate::recount::{bytes, recount, snapshot_tables};
use crate::setup::{Setup, all_bytes, now, patches};
use crate::snapshot;

/// What a guest does.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Write(u64, Vec<u8>),
    WriteCompressed(GuestCluster, Vec<u8>),
    Zero(ByteRange, bool),
    Discard(ByteRange),
    Fill(ByteRange, bool),
    Read(ByteRange),
    Flush,
    Clean,
    Resize(u64),
    Reopen,
}

impl Step {
    /// Any step on a disk of `length` bytes.
    pub(crate) fn by(seed: &Seed, setup: &Setup, length: u64) -> Self {
        let cluster_bytes = setup.create.cluster_bytes;
        let range = || range_of(seed, length, cluster_bytes);
        match seed.below(20) {
            0..6 => {
                let range = range();
                Self::Write(range.offset(), patches(seed, range.length() as usize))
            }
            6 | 7 if !setup.has_data_file() && length > 0 => {
                let cluster = seed.below(length.div_ceil(cluster_bytes));
                let start = cluster * cluster_bytes;
                let count = (cluster_bytes * (1 + seed.below(3))).min(length - start);
                Self::WriteCompressed(GuestCluster(cluster), patches(seed, count as usize))
            }
            6..9 => Self::Zero(range(), true),
            9 | 10 => Self::Zero(range(), false),
            11..13 => Self::Discard(range()),
            13 => Self::Fill(range(), seed.below(2) == 0),
            14..16 => Self::Read(range()),
            16 => Self::Flush,
            17 => Self::Clean,
            18 => {
                let clusters = length.div_ceil(cluster_bytes) + 4;
                Self::Resize(seed.below(clusters * cluster_bytes / 512 + 1) * 512)
            }
            _ => Self::Reopen,
        }
    }
}

/// Any range of a disk: often of whole clusters, often of any bytes.
pub(crate) fn range_of(seed: &Seed, length: u64, cluster_bytes: u64) -> ByteRange {
    let start = seed.below(length);
    let longest = match seed.below(3) {
        0 => 1024,
        1 => cluster_bytes * 2,
        _ => cluster_bytes * 6,
    };
    let range = ByteRange::new(start, 1 + seed.below(longest));
    let unit = *seed.pick(&[
        1,
        512,
        512,
        cluster_bytes / 32,
        cluster_bytes,
        cluster_bytes,
    ]);
    range.align_outward(unit.max(1)).clamp_end(length)
}

/// The guest's disk, and what each step makes of it.
pub(crate) struct Model {
    pub(crate) disk: Vec<u8>,
    pub(crate) ignores_discard: bool,
    pub(crate) cluster_bytes: u64,
}

impl Model {
    pub(crate) fn of(setup: &Setup) -> Self {
        Self {
            disk: setup.disk(),
            ignores_discard: setup.create.version == Version::V2 && setup.below.is_some(),
            cluster_bytes: setup.create.cluster_bytes,
        }
    }

    pub(crate) fn put(&mut self, offset: u64, bytes: &[u8]) {
        self.disk[offset as usize..offset as usize + bytes.len()].copy_from_slice(bytes);
    }

    pub(crate) fn zero(&mut self, range: ByteRange) {
        self.disk[range.offset() as usize..range.end() as usize].fill(0);
    }

    /// The bytes that a discard takes.
    pub(crate) fn discarded(&self, range: ByteRange) -> ByteRange {
        let length = self.disk.len() as u64;
        let end = match range.end() == length {
            true => range.align_outward(self.cluster_bytes).end(),
            false => range.end(),
        };
        let whole = ByteRange::between(range.offset(), end).align_inward(self.cluster_bytes);
        match self.ignores_discard {
            true => ByteRange::default(),
            false => whole.clamp_end(length),
        }
    }

    pub(crate) fn apply(&mut self, step: &Step) {
        match step {
            Step::Write(offset, bytes) => self.put(*offset, bytes),
            Step::WriteCompressed(cluster, bytes) => {
                self.put(cluster.0 * self.cluster_bytes, bytes)
            }
            Step::Zero(range, _) => self.zero(*range),
            Step::Discard(range) => self.zero(self.discarded(*range)),
            Step::Resize(length) => self.disk.resize(*length as usize, 0),
            Step::Fill(..) | Step::Read(_) | Step::Flush | Step::Clean | Step::Reopen => {}
        }
    }
}

/// An image, what was done to it, and what it has to hold.
pub(crate) struct Run {
    pub(crate) setup: Setup,
    pub(crate) file: Rc<MemoryStorage>,
    pub(crate) data: Option<Rc<MemoryStorage>>,
    pub(crate) mover: Mover,
    pub(crate) model: Model,
    /// What the internal snapshots hold, in the order of their table.
    pub(crate) snapshots: Vec<Vec<u8>>,
}

impl Run {
    pub(crate) fn new(setup: Setup) -> Self {
        let (file, data) = setup.memory();
        Self {
            mover: mover(&setup, &file, data.as_ref()),
            model: Model::of(&setup),
            setup,
            file,
            data,
            snapshots: Vec::new(),
        }
    }

    pub(crate) fn step(&mut self, step: &Step) {
        let mover = &self.mover;
        match step {
            Step::Write(offset, bytes) => now(mover.write(*offset, bytes)).expect("written"),
            Step::WriteCompressed(cluster, bytes) => {
                now(mover.write_compressed(*cluster, bytes)).expect("written");
            }
            Step::Zero(range, may_unmap) => now(mover.zero(*range, *may_unmap)).expect("zeroed"),
            Step::Discard(range) => now(mover.discard(*range)).expect("discarded"),
            Step::Fill(range, by_zeroes) => {
                now(mover.fill(*range, *by_zeroes)).expect("filled");
                assert!(now(mover.holds(*range)).expect("mapped"), "not filled");
            }
            Step::Read(range) => {
                let read = now(mover.read(*range)).expect("read");
                let wanted = &self.model.disk[range.offset() as usize..range.end() as usize];
                assert!(read == wanted, "{range:?} is not what was written");
            }
            Step::Flush => now(mover.image.flush()).expect("flushed"),
            Step::Clean => mover.image.clean_caches(),
            Step::Resize(length) if self.has_fixed_length() => {
                let refused = now(mover.image.resize(*length, 0)).expect_err("it has snapshots");
                let text = "Can't resize a v2 image which has snapshots";
                assert_eq!(refused.to_string(), text);
                return;
            }
            Step::Resize(length) => self.resize(*length),
            Step::Reopen => {
                now(mover.image.close()).expect("closed");
                self.check_file();
                self.take_snapshot();
                self.open();
            }
        }
        self.model.apply(step);
    }

    /// Opens the image again.
    pub(crate) fn open(&mut self) {
        self.mover = mover(&self.setup, &self.file, self.data.as_ref());
    }

    fn has_fixed_length(&self) -> bool {
        !self.snapshots.is_empty() && self.setup.create.version == Version::V2
    }

    /// Takes a snapshot sometimes, if there is none.
    fn take_snapshot(&mut self) {
        let file = all_bytes(&self.file);
        let wanted = self.model.disk.first() > Some(&128) && self.setup.device.is_none();
        if let Some(shared) = wanted.then(|| snapshot::take(&file)).flatten() {
            let copy = Buffer::copy_of(&shared);
            now(self.file.write(0, copy)).outcome.expect("memory");
            self.snapshots.push(self.model.disk.clone());
            self.check_file();
        }
    }

    fn check_snapshots(&self, file: &[u8], below: &[u8]) {
        let header = Header::parse(file, Access::ReadWrite).expect("sound");
        let tables = snapshot_tables(file, &header);
        assert_eq!(tables.len(), self.snapshots.len());
        for (l1, snapshot) in tables.into_iter().zip(&self.snapshots) {
            let held = guest_bytes_of(file, None, below, l1, snapshot.len() as u64);
            assert!(held == *snapshot, "a snapshot has changed");
        }
    }

    fn resize(&mut self, length: u64) {
        let old = self.mover.image.length_bytes();
        now(self.mover.image.resize(length, 0)).expect("resized");
        // What comes in reads as zeroes, whatever is below and in the last cluster: that is the node's part.
        if length > old {
            now(self.mover.zero(ByteRange::between(old, length), false)).expect("zeroed");
        }
    }

    /// The file is a sound image without leaks that holds what was written. It has been closed.
    pub(crate) fn check_file(&self) {
        let file = all_bytes(&self.file);
        let findings = recount(&file);
        assert_eq!(findings.corruptions, Vec::<String>::new());
        assert_eq!(findings.leaks, Vec::<u64>::new(), "leaks");
        let data = self.data.as_ref().map(|data| all_bytes(data));
        let below = self.setup.below.as_deref().map_or(&[][..], |below| below);
        let disk = guest_bytes(&file, data.as_deref(), below);
        assert!(
            disk == self.model.disk,
            "the file does not hold what was written"
        );
        if let (true, Some(data)) = (self.setup.create.data_file_raw, &data) {
            let held = bytes(data, 0, disk.len() as u64);
            assert!(held == disk, "the data file is not what the guest sees");
        }
        self.check_snapshots(&file, below);
        let header = Header::parse(&file, Access::ReadWrite).expect("sound");
        assert!(!header.is_dirty());
    }

    /// Writes all files of the image to a folder, and what it has to hold.
    pub(crate) fn write_to(&self, folder: &Path) {
        let put = |name: &str, bytes: &[u8]| {
            std::fs::write(folder.join(name), bytes).expect("written");
        };
        put("image", &all_bytes(&self.file));
        put("wanted", &self.model.disk);
        if let Some(data) = &self.data {
            put("data", &all_bytes(data));
        }
        if let Some(below) = &self.setup.below {
            let mut below = below.to_vec();
            below.resize(below.len().next_multiple_of(512), 0);
            put("below", &below);
        }
    }
}

fn mover(setup: &Setup, file: &Rc<MemoryStorage>, data: Option<&Rc<MemoryStorage>>) -> Mover {
    let file: Rc<dyn Storage> = Rc::clone(file) as Rc<dyn Storage>;
    let data = data.map(|data| Rc::clone(data) as Rc<dyn Storage>);
    let image = now(Qcow2::open(file, data, setup.options)).expect("sound");
    Mover::new(image, setup.below.clone(), setup.skips_zeroes)
}

/// Any image after any steps, closed.
pub(crate) fn random_run(number: u64) -> Run {
    let seed = Seed::new(number);
    let mut run = Run::new(Setup::by(&seed, !number.is_multiple_of(16)));
    for _ in 0..2 + seed.below(60) {
        let length = run.model.disk.len() as u64;
        let step = Step::by(&seed, &run.setup, length);
        run.step(&step);
    }
    let whole = ByteRange::new(0, run.model.disk.len() as u64);
    run.step(&Step::Read(whole));
    run.step(&Step::Reopen);
    run.step(&Step::Read(whole));
    run
}

#[test]
fn an_image_is_an_array_of_bytes() {
    each_seed(
        "blockyard-images",
        "an_image_is_an_array_of_bytes",
        2000,
        |number| {
            random_run(number);
        },
    );
}

#[test]
fn what_is_below_can_go_when_everything_is_filled() {
    each_seed(
        "blockyard-images",
        "what_is_below_can_go_when_everything_is_filled",
        300,
        |number| {
            let mut run = random_run(2_000_000 + number);
            let whole = ByteRange::new(0, run.model.disk.len() as u64);
            if whole.is_empty() || !run.snapshots.is_empty() {
                return;
            }
            run.step(&Step::Fill(whole, number.is_multiple_of(2)));
            let rubbish = vec![0xee; run.model.disk.len() + 5000];
            run.setup.below = Some(Rc::new(rubbish));
            run.step(&Step::Reopen);
            run.step(&Step::Read(whole));
        },
    );
}

#[test]
fn qemu_img_finds_the_same_image_sound() {
    let Some(qemu_img) = tool("qemu-img", "qemu-utils") else {
        return;
    };
    let folder = tempfile::tempdir().expect("a folder");
    each_seed(
        "blockyard-images",
        "qemu_img_finds_the_same_image_sound",
        60,
        |number| {
            let run = random_run(1_000_000 + number);
            run.write_to(folder.path());
            let check = |arguments: &[&str]| {
                let output = Command::new(&qemu_img)
                    .args(arguments)
                    .current_dir(folder.path())
                    .output()
                    .expect("it runs");
                let text = String::from_utf8_lossy(&output.stdout).into_owned();
                let errors = String::from_utf8_lossy(&output.stderr).into_owned();
                assert!(output.status.success(), "{arguments:?}: {text}{errors}");
            };
            check(&["check", "-f", "qcow2", "image"]);
            if !run.model.disk.is_empty() {
                check(&["compare", "-f", "qcow2", "-F", "raw", "image", "wanted"]);
            }
        },
    );
}

/// Where a program is; without it the test is skipped aloud, or fails where everything has to be there.
pub(crate) fn tool(name: &str, package: &str) -> Option<std::path::PathBuf> {
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&folders)
        .map(|folder: std::path::PathBuf| folder.join(name))
        .find(|path: &std::path::PathBuf| Path::is_file(path));
    if found.is_none() {
        let must = std::env::var("CI").is_ok_and(|value| value == "true");
        assert!(!must, "{name} is missing: install the package {package}");
        eprintln!("skipped: {name} is missing, it is in the package {package}");
    }
    found
}
