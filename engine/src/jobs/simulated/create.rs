//! Creation of a file whose bytes are simulated while its name is real: failed or cancelled at every step it removes what
//! it made and only that.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use blockyard_ring::{HostFile, Socket};
use blockyard_simulator::{Disk, DiskOptions, Fault, World};
use blockyard_storage::buffer::BufferPool;
use blockyard_storage::error::{EIO, ENOSPC};
use blockyard_storage::{LocalFuture, Storage};

use crate::data::{CpuPool, DataContext, HostFiles};
use crate::job::context::{CancelMode, ErrorPolicies, JobShared, Report};
use crate::job::work::{Stop, Work};
use crate::jobs::create::{CreateFile, CreateFileOptions};
use crate::jobs::test_support::{Running, VirtualClock};
use crate::node::news::News;
use crate::request::CreatePreallocation;

const PIECE: u64 = 64 << 10;
const SIZE: u64 = 3 * PIECE + 512;

pub(super) const WAYS: [CreatePreallocation; 3] = [
    CreatePreallocation::Off,
    CreatePreallocation::Falloc,
    CreatePreallocation::Full,
];

/// Opens a simulated disk instead of the file; blocking calls are made at once.
struct SimulatedFiles(Disk);

impl HostFiles for SimulatedFiles {
    fn storage(&self, _: &HostFile, read_only: bool) -> Rc<dyn Storage> {
        assert!(!read_only, "a new file is written to");
        self.0.open()
    }

    fn socket(&self, _: OwnedFd) -> io::Result<Rc<dyn Socket>> {
        unreachable!("nothing is connected")
    }

    fn blocking(&self, call: Box<dyn FnOnce() + Send>) -> LocalFuture<'static, ()> {
        call();
        Box::pin(std::future::ready(()))
    }
}

/// A folder with a file that is none of the job's business, and a disk for the file to make.
struct Place {
    folder: tempfile::TempDir,
    world: World,
    disk: Disk,
    was_there: bool,
    how: CreatePreallocation,
}

impl Place {
    fn new(how: CreatePreallocation, was_there: bool) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let world = World::new(1);
        let disk = world.disk("new", DiskOptions::default());
        let place = Self {
            folder,
            world,
            disk,
            was_there,
            how,
        };
        std::fs::write(place.folder.path().join("other"), "kept").expect("written");
        if was_there {
            std::fs::write(place.path(), "old").expect("written");
        }
        place
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("new")
    }

    /// Runs the job with a look before each step, and judges it.
    fn create(&self, mut look: impl FnMut(&World, &JobShared)) -> Result<(), Stop> {
        let clock = VirtualClock::default();
        let pool = BufferPool::new(1 << 20);
        let files = Rc::new(SimulatedFiles(self.disk.clone()));
        let context = DataContext::new(
            Rc::new(clock.clone()),
            pool,
            CpuPool::on_the_spot(),
            News::channel().0,
            files,
        );
        let options = CreateFileOptions {
            filename: self.path(),
            size_bytes: SIZE,
            preallocation: self.how,
            nocow: false,
            extent_size_hint: None,
            piece_bytes: PIECE,
        };
        let mut work = CreateFile::new(options, &context);
        let result = create(&self.world, &clock, &mut work, &mut look);
        self.judge(&result);
        result
    }

    fn judge(&self, result: &Result<(), Stop>) {
        let other: &Path = &self.folder.path().join("other");
        assert_eq!(std::fs::read(other).expect("there"), b"kept");
        assert_eq!(
            self.path().exists(),
            self.was_there || result.is_ok(),
            "{result:?}"
        );
        if result.is_ok() {
            for cut in 0..4 {
                let bytes = self.disk.bytes_after_cut(cut);
                assert!(bytes.len() as u64 == SIZE, "durable with its length");
                assert!(
                    bytes.iter().all(|byte| *byte == 0),
                    "and nothing but zeroes"
                );
            }
            let reserved = self.disk.allocated_bytes() >= SIZE;
            let wanted = self.how != CreatePreallocation::Off;
            assert!(reserved || !wanted, "{:?}: room is reserved", self.how);
        }
    }
}

/// Runs the work of a creation with a look before each step; nothing is in flight when it is parked or has ended.
pub(super) fn create(
    world: &World,
    clock: &VirtualClock,
    work: &mut dyn Work,
    look: &mut dyn FnMut(&World, &JobShared),
) -> Result<(), Stop> {
    let running = Running::new(clock, 0, ErrorPolicies::default());
    let orders = running.orders.clone();
    let parked_is_quiet = |report: &Report| {
        if matches!(report, Report::Parked) {
            assert_eq!(world.in_flight(), 0, "parked with something in flight");
        }
    };
    let result = running.drive(work, parked_is_quiet, |orders| {
        look(world, orders);
        world.step()
    });
    let result = result.expect("it does not hang");
    assert_eq!(world.in_flight(), 0);
    let progress = &orders.progress;
    assert!(progress.current_bytes() <= progress.total_bytes());
    if result.is_ok() {
        assert_eq!(progress.current_bytes(), progress.total_bytes());
    }
    result
}

/// Orders a pause or a cancel once `step` is reached.
pub(super) fn order_at(step: u64, cancels: bool) -> impl FnMut(&World, &JobShared) {
    let mut given = false;
    move |world, orders| {
        if !std::mem::replace(&mut given, world.steps() >= step) && given {
            match cancels {
                true => orders.order_cancel(CancelMode::Force),
                false => orders.order_pause(true),
            }
        }
    }
}

#[test]
fn every_nth_operation_fails() {
    for how in WAYS {
        for was_there in [false, true] {
            for errno in [EIO, ENOSPC] {
                for nth in 1.. {
                    let place = Place::new(how, was_there);
                    place.world.add_fault(Fault::fails(errno).nth(nth));
                    let result = place.create(|_, _| {});
                    if place.world.failures() == 0 {
                        assert_eq!(result, Ok(()));
                        // Resize, reserve four pieces, flush.
                        let operations = if how == CreatePreallocation::Off {
                            2
                        } else {
                            6
                        };
                        assert_eq!(nth - 1, operations, "{how:?}");
                        break;
                    }
                    match result {
                        Err(Stop::Failed(error)) => assert_eq!(error.errno, Some(errno)),
                        other => panic!("{how:?} {nth}: {other:?}"),
                    }
                }
            }
        }
    }
}

#[test]
fn a_full_disk_leaves_no_file_behind() {
    for how in [CreatePreallocation::Falloc, CreatePreallocation::Full] {
        let place = Place::new(how, false);
        place.disk.set_capacity(Some(2 * PIECE));
        match place.create(|_, _| {}) {
            Err(Stop::Failed(error)) => assert_eq!(error.errno, Some(ENOSPC)),
            other => panic!("{how:?}: {other:?}"),
        }
    }
}

#[test]
fn paused_and_cancelled_at_every_step() {
    for how in WAYS {
        for was_there in [false, true] {
            for cancels in [false, true] {
                let mut cancelled = 0;
                for step in 0..8 {
                    let place = Place::new(how, was_there);
                    let result = place.create(order_at(step, cancels));
                    match result {
                        Ok(()) => {}
                        Err(stop) => {
                            assert!(cancels && stop == Stop::Cancelled, "{stop:?}");
                            cancelled += 1;
                        }
                    }
                }
                let reserves = how != CreatePreallocation::Off;
                assert_eq!(cancelled > 3, cancels && reserves, "{how:?}: {cancelled}");
            }
        }
    }
}

/// What somebody else has put there meanwhile under the same name is none of the job's business.
#[test]
fn a_failed_job_removes_only_the_file_that_it_has_made() {
    for how in WAYS {
        let place = Place {
            // Something is there in the end.
            was_there: true,
            ..Place::new(how, false)
        };
        let (theirs, name) = (place.folder.path().join("theirs"), place.path());
        place.world.add_fault(Fault::fails(EIO).nth(2));
        let result = place.create(|_, _| {
            if name.exists() && !theirs.exists() {
                std::fs::write(&theirs, "theirs").expect("written");
                std::fs::hard_link(&theirs, place.folder.path().join("link")).expect("linked");
                std::fs::rename(place.folder.path().join("link"), &name).expect("replaced");
            }
        });
        assert!(
            matches!(result, Err(Stop::Failed(_))),
            "{how:?}: {result:?}"
        );
        assert_eq!(std::fs::read(&name).expect("there"), b"theirs", "{how:?}");
    }
}
