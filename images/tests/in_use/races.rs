//! A write against a discard: what somebody still writes to or reads from is not used for anything else.

use std::rc::Rc;

use blockyard_images::qcow2::create::CreateOptions;
use blockyard_images::qcow2::units::HostOffset;
use blockyard_images::qcow2::{Options, Qcow2, Source, WritePlan};
use blockyard_storage::{Buffer, ByteRange, MemoryStorage, Storage};

use crate::mover::Mover;
use crate::recount::recount;
use crate::setup::{Setup, all_bytes, now};

const CLUSTER: u64 = 65_536;

struct Race {
    file: Rc<MemoryStorage>,
    mover: Mover,
}

fn cluster(index: u64) -> ByteRange {
    ByteRange::new(index * CLUSTER, CLUSTER)
}

impl Race {
    /// An image whose first cluster is written and durable.
    fn new() -> Self {
        Self::with(false)
    }

    fn with(extended_l2: bool) -> Self {
        let mut create = CreateOptions::new(64 * CLUSTER);
        create.extended_l2 = extended_l2;
        let setup = Setup {
            create,
            options: Options {
                pass_discard_request: true,
                ..Options::default()
            },
            below: None,
            skips_zeroes: false,
            device: None,
        };
        let (file, _) = setup.memory();
        let storage = Rc::clone(&file) as Rc<dyn Storage>;
        let image = now(Qcow2::open(storage, None, setup.options)).expect("sound");
        let race = Self {
            file,
            mover: Mover::new(image, None, false),
        };
        race.write(0, 1);
        race.flush();
        race
    }

    fn write(&self, index: u64, value: u8) {
        let bytes = vec![value; CLUSTER as usize];
        now(self.mover.write(index * CLUSTER, &bytes)).expect("written");
    }

    fn flush(&self) {
        now(self.mover.image.flush()).expect("flushed");
    }

    fn discard(&self, index: u64) {
        now(self.mover.discard(cluster(index))).expect("discarded");
        self.flush();
    }

    fn place(&self, index: u64) -> HostOffset {
        let extent = self.mover.image.map_now(cluster(index)).expect("in memory");
        match extent.expect("sound").source {
            Source::Data { at } => at,
            other => panic!("{other:?}"),
        }
    }

    fn holds(&self, index: u64, value: u8) {
        let read = now(self.mover.read(cluster(index))).expect("read");
        assert!(read.iter().all(|byte| *byte == value), "cluster {index}");
    }

    /// Writes other clusters and says where they are.
    fn write_others(&self) -> Vec<HostOffset> {
        (1..8).for_each(|index| self.write(index, 10 + index as u8));
        self.flush();
        (1..8).map(|index| self.place(index)).collect()
    }

    fn others_are_whole(&self) {
        (1..8).for_each(|index| self.holds(index, 10 + index as u8));
    }

    fn ends_sound(self, leaks: usize) {
        now(self.mover.image.close()).expect("closed");
        let findings = recount(&all_bytes(&self.file));
        assert_eq!(findings.corruptions, Vec::<String>::new());
        assert_eq!(findings.leaks.len(), leaks);
    }
}

#[test]
fn a_write_in_place_keeps_its_cluster_until_it_is_done() {
    let race = Race::new();
    let held = race.place(0);
    let writing = race
        .mover
        .image
        .prepare_write_now(cluster(0))
        .expect("in place");
    assert_eq!(writing.at(), held);
    race.discard(0);
    assert!(
        !race.write_others().contains(&held),
        "somebody writes there"
    );
    // The write gets to the disk only now.
    let late = Buffer::copy_of(&vec![2; CLUSTER as usize]);
    now(race.file.write(held.0, late)).outcome.expect("memory");
    writing.done();
    race.others_are_whole();
    race.holds(0, 0);
    race.flush();
    race.write(20, 3);
    assert_eq!(race.place(20), held, "nobody writes there any more");
    race.holds(20, 3);
    race.others_are_whole();
    race.ends_sound(0);
}

#[test]
fn a_read_keeps_its_cluster_until_its_lease_goes() {
    let race = Race::new();
    let held = race.place(0);
    let reading = race.mover.image.map_now(cluster(0)).expect("in memory");
    race.discard(0);
    assert!(!race.write_others().contains(&held), "somebody reads there");
    let read = now(race.file.read(held.0, Buffer::zeroed(CLUSTER as usize)));
    assert!(
        read.buffer.as_slice().iter().all(|byte| *byte == 1),
        "discarded too early"
    );
    drop(reading);
    race.flush();
    let read = now(race.file.read(held.0, Buffer::zeroed(CLUSTER as usize)));
    assert!(
        read.buffer.as_slice().iter().all(|byte| *byte == 0),
        "not discarded"
    );
    race.write(20, 3);
    assert_eq!(race.place(20), held);
    race.ends_sound(0);
}

#[test]
fn a_write_that_was_given_up_keeps_its_cluster_for_good() {
    let race = Race::new();
    let held = race.place(0);
    drop(
        race.mover
            .image
            .prepare_write_now(cluster(0))
            .expect("in place"),
    );
    race.discard(0);
    assert!(!race.write_others().contains(&held));
    let WritePlan::Allocate(new) = now(race.mover.image.prepare_write(cluster(20))).expect("room")
    else {
        panic!("nothing is there yet");
    };
    let strayed = new.at();
    drop(new);
    race.write(21, 4);
    assert_ne!(race.place(21), strayed);
    race.others_are_whole();
    race.ends_sound(2);
}

#[test]
fn room_that_is_given_back_is_used_again_at_once() {
    let race = Race::new();
    let reserve = || match now(race.mover.image.prepare_write(cluster(20))).expect("room") {
        WritePlan::Allocate(new) => new,
        WritePlan::InPlace(_) => panic!("nothing is there yet"),
    };
    let first = reserve();
    let at = first.at();
    first.give_back();
    let second = reserve();
    assert_eq!(second.at(), at);
    second.give_back();
    race.write_others();
    race.others_are_whole();
    race.ends_sound(0);
}

#[test]
fn nothing_is_used_again_before_its_unlinking_is_durable() {
    let race = Race::new();
    let held = race.place(0);
    now(race.mover.discard(cluster(0))).expect("discarded");
    race.write(1, 11);
    assert_ne!(race.place(1), held, "the medium still leads there");
    race.flush();
    race.write(2, 12);
    assert_eq!(race.place(2), held);
    race.ends_sound(0);
}

/// The first subcluster of a cluster, and a piece of the second.
const SUBCLUSTER: u64 = CLUSTER / 32;

#[test]
fn edges_of_a_write_that_was_given_up_come_back_to_nobody() {
    for extended_l2 in [false, true] {
        let race = Race::with(extended_l2);
        if extended_l2 {
            now(race.mover.write(9 * CLUSTER, &[1; SUBCLUSTER as usize])).expect("written");
        } else {
            race.write(9, 1);
            now(race.mover.zero(cluster(9), false)).expect("zeroed");
        }
        // A few bytes in room that is kept: the bytes around them are to be written too.
        let wanted = ByteRange::new(9 * CLUSTER + SUBCLUSTER + 512, 512);
        let WritePlan::Allocate(kept) = now(race.mover.image.prepare_write(wanted)).expect("room")
        else {
            panic!("nothing is there yet");
        };
        let before = kept.fill_before();
        assert!(!before.is_empty());
        let (at, late) = (
            kept.at_of(before.offset()),
            Buffer::zeroed(before.length() as usize),
        );
        drop(kept);
        let written = now(race.mover.write(before.offset(), &[7; 512]));
        // The edge gets to the disk only now.
        now(race.file.write(at.0, late)).outcome.expect("memory");
        let read = now(race.mover.read(ByteRange::new(before.offset(), 512))).expect("read");
        match written {
            Ok(()) => assert_eq!(read, [7; 512], "undone by a write that was given up"),
            Err(error) => assert!(extended_l2, "{error}"),
        }
        race.write_others();
        race.others_are_whole();
    }
}
