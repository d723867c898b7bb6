//! Internal snapshots between all other operations, each against a plain array of its own.

use std::cell::Cell;
use std::process::Command;
use std::rc::Rc;

use blockyard_images::pace::Unwatched;
use blockyard_images::qcow2::layout::header::Access;
use blockyard_images::qcow2::open::read_image;
use blockyard_images::qcow2::snapshot::{
    NewSnapshot, SnapshotChoice, SnapshotError, apply, create, delete,
};
use blockyard_simulator::{Seed, each_seed};
use blockyard_storage::{ByteRange, Storage};

use crate::sequences::{Run, Step, tool};
use crate::setup::{Setup, all_bytes, now};

/// Most snapshots of one image.
const SNAPSHOTS_MAX: u64 = 5;

impl Run {
    /// Makes, applies or deletes a snapshot of the closed image.
    fn change_snapshots(&mut self, seed: &Seed) {
        now(self.mover.image.close()).expect("closed");
        self.check_file();
        let file: Rc<dyn Storage> = self.file.clone();
        let discards = seed.one_in(2);
        let count = self.snapshots.len() as u64;
        let index = seed.below(count.max(1)) as usize;
        match seed.below(5) {
            0 | 1 if count < SNAPSHOTS_MAX => {
                let new = NewSnapshot {
                    name: format!("made by {}", seed.below(3)).into_bytes(),
                    date_seconds: 1,
                    ..NewSnapshot::default()
                };
                match now(create(&file, &new, discards, &Unwatched)) {
                    Ok(_) => self.snapshots.push(self.model.disk.clone()),
                    Err(error) => self.expect_refusal(&error),
                }
            }
            2 | 3 if count > 0 => {
                let choice = self.choice(index);
                match now(apply(&file, &choice, discards, &Unwatched)) {
                    Ok(()) => self.model.disk = self.snapshots[index].clone(),
                    Err(error) => self.expect_refusal(&error),
                }
            }
            _ if count > 0 => {
                let choice = self.choice(index);
                match now(delete(&file, &choice, discards, &Unwatched)) {
                    Ok(_) => drop(self.snapshots.remove(index)),
                    Err(error) => self.expect_refusal(&error),
                }
            }
            _ => {}
        }
        self.check_file();
        self.open();
    }

    /// The snapshot at `index` of the table, by its id.
    fn choice(&self, index: usize) -> SnapshotChoice {
        let image = now(read_image(&*self.file, Access::ReadOnly)).expect("sound");
        SnapshotChoice::IdOrName(image.snapshots[index].id.clone())
    }

    /// What may stand in the way: a data file, counts that are too narrow, and a device without room.
    fn expect_refusal(&self, error: &SnapshotError) {
        let text = error.to_string();
        let refused = match text.as_str() {
            "Operation not supported" => self.setup.has_data_file(),
            // Several compressed clusters in one have counted up already.
            "Invalid argument" => self.setup.create.refcount_bits <= 4,
            "No space left on device" => self.setup.device.is_some(),
            _ => false,
        };
        assert!(refused, "{text}");
    }
}

fn random_run(number: u64) -> Run {
    let seed = Seed::new(number);
    let mut setup = Setup::by(&seed, !number.is_multiple_of(16));
    if seed.one_in(2) {
        // More of those where snapshots are possible.
        setup.create.data_file_name = None;
        setup.create.data_file_raw = false;
    }
    let mut run = Run::new(setup);
    for _ in 0..4 + seed.below(60) {
        if seed.one_in(5) {
            run.change_snapshots(&seed);
            continue;
        }
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
fn each_snapshot_is_an_array_of_bytes() {
    each_seed(
        "blockyard-images",
        "each_snapshot_is_an_array_of_bytes",
        200,
        |number| {
            random_run(number);
        },
    );
}

#[test]
fn qemu_img_finds_the_same_snapshots() {
    let Some(qemu_img) = tool("qemu-img", "qemu-utils") else {
        return;
    };
    let folder = tempfile::tempdir().expect("a folder");
    let looked_at = Cell::new(0);
    each_seed(
        "blockyard-images",
        "qemu_img_finds_the_same_snapshots",
        30,
        |number| {
            let run = random_run(2_000_000 + number);
            let put = |name: &str, bytes: &[u8]| {
                std::fs::write(folder.path().join(name), bytes).expect("written");
            };
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
            let image = all_bytes(&run.file);
            put("image", &image);
            if let Some(data) = &run.data {
                put("data", &all_bytes(data));
            }
            if let Some(below) = &run.setup.below {
                let mut below = below.to_vec();
                below.resize(below.len().next_multiple_of(512), 0);
                put("below", &below);
            }
            check(&["check", "-f", "qcow2", "image"]);
            let opened = now(read_image(&*run.file, Access::ReadOnly)).expect("sound");
            for (snapshot, wanted) in opened.snapshots.iter().zip(&run.snapshots) {
                looked_at.set(looked_at.get() + 1);
                if wanted.is_empty() {
                    continue;
                }
                put("wanted", wanted);
                let id = String::from_utf8_lossy(&snapshot.id).into_owned();
                let l = format!("snapshot.id={id}");
                // It takes the disk of a snapshot to be as long as that in use.
                if wanted.len() == run.model.disk.len() {
                    check(&[
                        "convert", "-f", "qcow2", "-l", &l, "-O", "raw", "image", "held",
                    ]);
                    check(&["compare", "-f", "raw", "-F", "raw", "held", "wanted"]);
                }
                if run.setup.create.refcount_bits < 4 {
                    // It counts what is applied before it gives up what was there, which may be too much.
                    continue;
                }
                // QEMU applies a snapshot that was made here.
                put("image", &image);
                check(&["snapshot", "-a", &id, "image"]);
                check(&["check", "-f", "qcow2", "image"]);
                check(&["compare", "-f", "qcow2", "-F", "raw", "image", "wanted"]);
                put("image", &image);
            }
            // And deletes them all.
            for snapshot in &opened.snapshots {
                let name = String::from_utf8_lossy(&snapshot.name).into_owned();
                check(&["snapshot", "-d", &name, "image"]);
            }
            check(&["check", "-f", "qcow2", "image"]);
            if !run.model.disk.is_empty() {
                put("wanted", &run.model.disk);
                check(&["compare", "-f", "qcow2", "-F", "raw", "image", "wanted"]);
            }
        },
    );
    assert!(looked_at.get() > 10, "{looked_at:?}");
}
