//! Making an image on simulated disks: whenever the power goes, and whatever fails, the file is the old image, the new one,
//! or none.

use blockyard_simulator::trace::Happened;
use blockyard_simulator::{Disk, DiskOptions, Fault, World};
use blockyard_storage::error::{EIO, ENOSPC, errno_text};
use blockyard_storage::{Buffer, MemoryStorage, Operation, Storage};

use super::*;
use crate::pace::Unwatched;
use crate::qcow2::layout::header::MAGIC;
use crate::qcow2::units::Version;

const PREALLOCATIONS: [ImagePreallocation; 4] = [
    ImagePreallocation::Off,
    ImagePreallocation::Metadata,
    ImagePreallocation::Falloc,
    ImagePreallocation::Full,
];

/// What the file holds before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Before {
    Nothing,
    Bytes,
    Image,
    LongerImage,
}

const BEFORE: [Before; 4] = [
    Before::Nothing,
    Before::Bytes,
    Before::Image,
    Before::LongerImage,
];

/// The bytes of an image, made without any trouble on a file that held `held`.
fn made_on(creation: &Creation, held: &[u8]) -> Vec<u8> {
    let image = MemoryStorage::new(0);
    let data = MemoryStorage::new(0);
    let has_data_file = creation.header().has_data_file();
    let data_file = has_data_file.then_some(&data as &dyn Storage);
    let bytes = blockyard_simulator::run(
        async {
            image.write(0, Buffer::copy_of(held)).await.outcome?;
            create(creation, &image, data_file, &Unwatched)
                .await
                .expect("made");
            let length = usize::try_from(image.facts().length_bytes).expect("short");
            let read = image.read(0, Buffer::zeroed(length)).await;
            read.outcome.map(|()| read.buffer.as_slice().to_vec())
        },
        || false,
    );
    bytes.expect("it never waits").expect("read")
}

fn held(before: Before) -> Vec<u8> {
    let mut options = CreateOptions::new(before as u64 * (100 << 10));
    options.version = Version::V2;
    options.cluster_bytes = 1024;
    match before {
        Before::Nothing => Vec::new(),
        Before::Bytes => vec![0xee; 5000],
        Before::Image => made_on(&options.plan().expect("possible"), &[]),
        Before::LongerImage => {
            options.preallocation = ImagePreallocation::Metadata;
            made_on(&options.plan().expect("possible"), &[])
        }
    }
}

struct Place {
    creation: Creation,
    world: World,
    image: Disk,
    data: Disk,
    old: Vec<u8>,
    new: Vec<u8>,
}

const DATA: [u8; 3000] = [0xdd; 3000];

impl Place {
    fn new(preallocation: ImagePreallocation, before: Before, with_data_file: bool) -> Self {
        let mut options = CreateOptions::new(100_352);
        options.cluster_bytes = 512;
        options.preallocation = preallocation;
        options.data_file_name = with_data_file.then(|| b"data".to_vec());
        // Longer than a sector.
        if !with_data_file {
            options.cluster_bytes = 1024;
            if preallocation == ImagePreallocation::Off {
                options.backing_name = Some(vec![b'b'; 700]);
            }
        }
        let creation = options.plan().expect("possible");
        let world = World::new(1);
        let image = world.disk("image", DiskOptions::default());
        let data = world.disk("data", DiskOptions::default());
        let old = held(before);
        image.fill(0, &old);
        data.fill(0, &DATA);
        let new = made_on(&creation, &old);
        Self {
            creation,
            world,
            image,
            data,
            old,
            new,
        }
    }

    /// Makes the image with a look before each step; nothing is in flight afterwards.
    fn make(&self, mut look: impl FnMut(&Self)) -> Result<(), CreateError> {
        let (image, data) = (self.image.open(), self.data.open());
        let has_data_file = self.creation.header().has_data_file();
        let data_file = has_data_file.then_some(&*data as &dyn Storage);
        let made = blockyard_simulator::run(
            create(&self.creation, &*image, data_file, &Unwatched),
            || {
                look(self);
                self.world.step()
            },
        );
        assert_eq!(self.world.in_flight(), 0);
        made.expect("it does not hang")
    }

    /// The file is the old image, the new one, or none; the data file holds what it held.
    fn judge(&self, image: &[u8], data: &[u8], what: &str) {
        if image.starts_with(&MAGIC.to_be_bytes()) {
            assert!(
                image == self.old || image == self.new,
                "{what}: an image, but which?"
            );
        }
        assert!(data.starts_with(&DATA), "{what}: data of others");
        assert!(data[DATA.len()..].iter().all(|byte| *byte == 0), "{what}");
    }

    fn failed_flush(&self) -> bool {
        self.world.trace().entries().any(|entry| {
            let failed = matches!(entry.happened, Happened::Ended(Some(_)));
            failed && entry.operation == Operation::Sync
        })
    }

    fn judge_cuts(&self, what: &str) {
        for cut in 0..4 {
            let (image, data) = (
                self.image.bytes_after_cut(cut),
                self.data.bytes_after_cut(cut),
            );
            self.judge(&image, &data, what);
        }
    }
}

/// Every setup there is.
fn each(test: impl Fn(ImagePreallocation, Before, bool)) {
    for preallocation in PREALLOCATIONS {
        for before in BEFORE {
            for with_data_file in [false, true] {
                test(preallocation, before, with_data_file);
            }
        }
    }
}

#[test]
fn the_power_goes_at_every_step() {
    each(|preallocation, before, with_data_file| {
        let what = format!("{preallocation:?} {before:?} {with_data_file}");
        let place = Place::new(preallocation, before, with_data_file);
        place.make(|place| place.judge_cuts(&what)).expect("made");
        for cut in 0..4 {
            assert!(
                place.image.bytes_after_cut(cut) == place.new,
                "{what}: durable"
            );
        }
    });
}

#[test]
fn every_nth_operation_fails() {
    each(|preallocation, before, with_data_file| {
        for errno in [EIO, ENOSPC] {
            for nth in 1.. {
                let what = format!("{preallocation:?} {before:?} {with_data_file} {nth}");
                let place = Place::new(preallocation, before, with_data_file);
                place.world.add_fault(Fault::fails(errno).nth(nth));
                let made = place.make(|place| place.judge_cuts(&what));
                if place.world.failures() == 0 {
                    assert_eq!(made, Ok(()), "{what}");
                    assert!(nth > 5, "something is always done");
                    break;
                }
                place.judge_cuts(&what);
                let (image, data) = (place.image.bytes(), place.data.bytes());
                place.judge(&image, &data, &what);
                if made.is_ok() {
                    // That the old header could not be read is no reason to give up.
                    assert!(nth == 1 && image == place.new, "{what}");
                    continue;
                }
                let error = made.expect_err("failed").to_string();
                assert!(error.ends_with(&errno_text(errno)), "{what}: {error}");
                // A failed flush forbids all further changes, also those that would take it back.
                let poisoned = place.failed_flush();
                let sound = image == place.old || poisoned && image == place.new;
                let none = !image.starts_with(&MAGIC.to_be_bytes());
                assert!(sound || none, "{what}: it says no");
                if !poisoned {
                    assert_eq!(image.len(), place.old.len(), "{what}: {error}");
                    assert_eq!(data.len(), DATA.len(), "{what}: {error}");
                }
            }
        }
    });
}

#[test]
fn a_full_disk_ends_it_without_an_image() {
    for preallocation in PREALLOCATIONS {
        for before in BEFORE {
            let what = format!("{preallocation:?} {before:?}");
            let place = Place::new(preallocation, before, false);
            place.image.set_capacity(Some(4096));
            let made = place.make(|place| place.judge_cuts(&what));
            if let Err(error) = made {
                assert!(error.to_string().ends_with(&errno_text(ENOSPC)), "{error}");
                let image = place.image.bytes();
                assert!(image == place.old || !image.starts_with(&MAGIC.to_be_bytes()));
                assert_eq!(image.len(), place.old.len(), "{what}");
            } else {
                let had_room = place.old.len() >= place.new.len();
                let reserves = preallocation >= ImagePreallocation::Falloc;
                assert!(had_room || !reserves, "{what}");
            }
        }
    }
}
