//! Creation of an image on a node: failed or cancelled at every step the node is no image and as long as it was; done, the
//! image is whole and durable. The order of its writes has tests of its own where it is written.

use std::rc::Rc;

use blockyard_images::qcow2::layout::header::{Access, Header};
use blockyard_simulator::trace::Happened;
use blockyard_simulator::{Disk, DiskOptions, Fault, World};
use blockyard_storage::Operation;
use blockyard_storage::error::{EIO, ENOSPC};

use super::create::{create, order_at};
use crate::job::context::JobShared;
use crate::job::work::Stop;
use crate::jobs::create_qcow2::CreateQcow2;
use crate::jobs::test_support::VirtualClock;
use crate::node::Node;
use crate::node::file_node::{FileNode, FileOptions};
use crate::node::raw_node::{RawNode, Window};
use crate::request::{CreatePreallocation, CreateQcow2Spec, DetectZeroes, Discard, NodeRef};

const SIZE: u64 = 100_352;
const DATA: [u8; 3000] = [0xdd; 3000];

/// How the disks are, and what is wanted.
#[derive(Clone, Copy, Debug)]
struct Setup {
    preallocation: CreatePreallocation,
    held_bytes: usize,
    alignment: u32,
    has_data_file: bool,
}

fn setups() -> Vec<Setup> {
    let mut setups = Vec::new();
    for preallocation in [
        CreatePreallocation::Off,
        CreatePreallocation::Metadata,
        CreatePreallocation::Falloc,
        CreatePreallocation::Full,
    ] {
        for held_bytes in [0, 5000] {
            for (alignment, has_data_file) in [(1, true), (1, false), (4096, false), (4096, true)] {
                setups.push(Setup {
                    preallocation,
                    held_bytes,
                    alignment,
                    has_data_file,
                });
            }
        }
    }
    setups
}

struct Place {
    setup: Setup,
    world: World,
    image: Disk,
    data: Disk,
}

impl Place {
    fn new(setup: Setup) -> Self {
        let world = World::new(1);
        let options = || DiskOptions {
            request_alignment: setup.alignment,
            ..DiskOptions::default()
        };
        let (image, data) = (
            world.disk("image", options()),
            world.disk("data", options()),
        );
        image.fill(0, &vec![0xee; setup.held_bytes]);
        data.fill(0, &DATA);
        Self {
            setup,
            world,
            image,
            data,
        }
    }

    fn spec(&self) -> CreateQcow2Spec {
        let named = |name: &str| NodeRef::Name(name.to_owned());
        CreateQcow2Spec {
            file: named("image"),
            data_file: self.setup.has_data_file.then(|| named("data")),
            data_file_raw: false,
            extended_l2: false,
            size: SIZE,
            version_2: false,
            backing_file: None,
            backing_fmt: None,
            encrypt: None,
            cluster_size: Some(1024),
            preallocation: Some(self.setup.preallocation),
            lazy_refcounts: false,
            refcount_bits: None,
            zstd: true,
        }
    }

    /// Runs the job with a look before each step, and judges it.
    fn create(&self, mut look: impl FnMut(&World, &JobShared)) -> Result<(), Stop> {
        let clock = VirtualClock::default();
        let file = |name: &str, disk: &Disk| -> Rc<dyn Node> {
            Rc::new(FileNode::new(
                name.to_owned(),
                disk.open(),
                FileOptions::default(),
            ))
        };
        let raw = RawNode::new(
            "image".to_owned(),
            file("below", &self.image),
            Window::default(),
            false,
            Discard::Unmap,
            DetectZeroes::Off,
        );
        let data = file("data", &self.data);
        let data_file = self.setup.has_data_file.then_some((data, &b"data.raw"[..]));
        let mut work = CreateQcow2::new(&self.spec(), Rc::new(raw), data_file);
        let result = create(&self.world, &clock, &mut work, &mut look);
        self.judge(&result);
        result
    }

    fn judge(&self, result: &Result<(), Stop>) {
        let setup = self.setup;
        for cut in 0..3 {
            let image = self.image.bytes_after_cut(cut);
            let header = Header::parse(&image, Access::ReadWrite);
            if result.is_ok() {
                let header = header.expect("an image");
                assert_eq!(header.guest_bytes(), SIZE);
                assert_eq!(header.has_data_file(), setup.has_data_file);
                let places = setup.preallocation != CreatePreallocation::Off;
                let minimum = if places && !setup.has_data_file {
                    SIZE
                } else {
                    0
                };
                assert!(image.len() as u64 > minimum);
            } else {
                assert!(header.is_err() || self.failed_flush(), "{setup:?}");
            }
            let data = self.data.bytes_after_cut(cut);
            assert!(data.starts_with(&DATA), "{setup:?}");
        }
        if result.is_err() && !self.failed_flush() {
            assert_eq!(self.image.bytes().len(), setup.held_bytes, "{setup:?}");
            assert_eq!(self.data.bytes().len(), DATA.len(), "{setup:?}");
        }
    }

    /// After a failed flush nothing can be changed any more, not even back.
    fn failed_flush(&self) -> bool {
        self.world.trace().entries().any(|entry| {
            let failed = matches!(entry.happened, Happened::Ended(Some(_)));
            failed && entry.operation == Operation::Sync
        })
    }
}

#[test]
fn every_nth_operation_fails() {
    for setup in setups() {
        for nth in 1.. {
            let place = Place::new(setup);
            place.world.add_fault(Fault::fails(EIO).nth(nth));
            let result = place.create(|_, _| {});
            if place.world.failures() == 0 {
                assert_eq!(result, Ok(()));
                assert!(nth > 5, "something is always done");
                break;
            }
            match result {
                Err(Stop::Failed(error)) => {
                    assert_eq!(error.errno, Some(EIO));
                    let node = error.node.as_deref();
                    assert!(matches!(node, Some("below" | "data")), "{node:?}");
                }
                // That the old header could not be read is no reason to give up.
                Ok(()) => assert_eq!((nth, setup.held_bytes), (1, 5000)),
                Err(Stop::Cancelled) => panic!("{setup:?} {nth}: nobody cancelled"),
            }
        }
    }
}

#[test]
fn a_full_disk_leaves_no_image() {
    for setup in setups() {
        if setup.preallocation < CreatePreallocation::Falloc || setup.has_data_file {
            continue;
        }
        let place = Place::new(setup);
        place.image.set_capacity(Some(64 << 10));
        match place.create(|_, _| {}) {
            Err(Stop::Failed(error)) => assert_eq!(error.errno, Some(ENOSPC)),
            other => panic!("{setup:?}: {other:?}"),
        }
    }
}

#[test]
fn paused_and_cancelled_at_every_step() {
    for setup in setups() {
        for cancels in [false, true] {
            let mut cancelled = 0;
            for step in 0..24 {
                let place = Place::new(setup);
                let result = place.create(order_at(step, cancels));
                if let Err(stop) = result {
                    assert!(cancels && stop == Stop::Cancelled, "{stop:?}");
                    cancelled += 1;
                }
            }
            assert_eq!(cancelled > 2, cancels, "{setup:?}: {cancelled}");
        }
    }
}
