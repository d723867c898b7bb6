//! Amending as a job on a node: its image has the old options or the new ones, all together, whenever the power goes and
//! whatever fails; what it holds stays; who reads and writes through the node meanwhile gets what was written, and does not
//! wait for the end of a pause.

use std::cell::{Cell, RefCell};
use std::pin::pin;
use std::rc::Rc;

use blockyard_images::qcow2::check::{Report as CheckReport, Unobserved, check};
use blockyard_images::qcow2::layout::header::{Access, Header};
use blockyard_images::qcow2::units::{Compression, Version};
use blockyard_simulator::{DiskOptions, Fault, Seed, World, each_seed, run};
use blockyard_storage::Storage;
use blockyard_storage::error::{EIO, EOPNOTSUPP};
use futures_util::future::{Either, join, select};

use crate::job::context::{CancelMode, ErrorPolicies, Report};
use crate::job::work::{Stop, Work};
use crate::jobs::amend::Amend;
use crate::jobs::test_support::{Running, VirtualClock};
use crate::node::Node;
use crate::node::qcow2::Qcow2Node;
use crate::node::qcow2::tests::faults::Possible;
use crate::node::qcow2::tests::model::{Model, Operation, assert_holds};
use crate::node::qcow2::tests::yard::{DataFile, Setup, Yard};
use crate::request::AmendSpec;

/// The options of an image that can be amended.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Form {
    version: Version,
    refcount_bits: u32,
    lazy_refcounts: bool,
    size_bytes: u64,
    backing: Option<Vec<u8>>,
}

fn form(image: &[u8]) -> Form {
    let header = Header::parse(image, Access::ReadWrite).expect("it opens");
    Form {
        version: header.geometry.version(),
        refcount_bits: header.geometry.refcount_bits(),
        lazy_refcounts: header.lazy_refcounts(),
        size_bytes: header.guest_bytes(),
        backing: header.backing_name,
    }
}

pub(super) fn checked(image: &[u8]) -> CheckReport {
    let world = World::new(1);
    let disk = world.disk("image", DiskOptions::default());
    disk.fill(0, image);
    let file: Rc<dyn Storage> = disk.open();
    let report = run(check(&file, &Unobserved), || world.step());
    report.expect("it ends").expect("checked")
}

/// An image, what it holds, and how it is amended.
struct Place {
    yard: Yard,
    model: Model,
    spec: AmendSpec,
    old: Form,
    new: Form,
    /// The version may be the new one before the length is.
    is_in_two: bool,
    /// What is below would show behind the old end, which an image that stays version 2 cannot hide.
    is_refused: bool,
}

impl Place {
    /// Anything that can be; with `changes_length`, the length changes.
    fn random(seed: u64, changes_length: bool) -> Self {
        let setup = Setup {
            lazy_refcounts: false,
            ..Setup::random(seed)
        };
        Self::new(setup, changes_length)
    }

    fn new(setup: Setup, changes_length: bool) -> Self {
        let dice = Seed::new(setup.seed ^ 0xa3e2d);
        let yard = Yard::new(setup);
        let mut model = Model::of(&yard);
        let node = yard.open();
        for _ in 0..6 {
            let operation = Operation::random(&dice, &yard.setup);
            yard.drive(operation.carry_out(&node)).expect("done");
            model.apply(&operation, &yard.setup);
        }
        yard.drive(node.close()).expect("closed");
        let old = form(&yard.image.bytes());
        let mut place = Self {
            yard,
            model,
            spec: AmendSpec::default(),
            new: old.clone(),
            old,
            is_in_two: false,
            is_refused: false,
        };
        place.choose(&dice, changes_length);
        place
    }

    fn choose(&mut self, dice: &Seed, changes_length: bool) {
        let setup = &self.yard.setup;
        let lowers = setup.version == Version::V3
            && !setup.extended_l2
            && setup.data_file == DataFile::Inside
            && setup.compression == Compression::Zlib
            && dice.one_in(2);
        let rises = setup.version == Version::V2 && dice.one_in(2);
        if lowers || rises {
            self.spec.version_2 = Some(lowers);
            self.new.version = if lowers { Version::V2 } else { Version::V3 };
        }
        if self.new.version == Version::V3 {
            if dice.one_in(2) {
                self.new.refcount_bits = *dice.pick(&[8, 16, 64]);
                self.spec.refcount_bits = Some(self.new.refcount_bits.into());
            }
            self.new.lazy_refcounts = dice.one_in(2);
            self.spec.lazy_refcounts = Some(self.new.lazy_refcounts);
        } else {
            self.new.refcount_bits = 16;
            self.spec.refcount_bits = Some(16);
        }
        match dice.below(4) {
            0 => {
                self.spec.backing_file = Some(String::new());
                self.new.backing = None;
            }
            1 if setup.data_file != DataFile::Raw => {
                self.spec.backing_file = Some("../some/other.raw".to_owned());
                self.spec.backing_fmt = Some("raw".to_owned());
                self.new.backing = Some(b"../some/other.raw".to_vec());
            }
            _ => {}
        }
        if changes_length {
            let cluster = setup.cluster_bytes();
            let size = match dice.one_in(2) {
                true => 512 * dice.below(setup.size_bytes / 512),
                false => setup.size_bytes + 512 * dice.below(70 * cluster / 512),
            };
            self.spec.size = Some(size);
            self.new.size_bytes = size;
            self.is_in_two = rises && size > setup.size_bytes;
            let shown_bytes = size.min(setup.backing_bytes.unwrap_or(0));
            self.is_refused = setup.version == Version::V2
                && !rises
                && shown_bytes > setup.size_bytes.next_multiple_of(cluster);
        }
    }

    fn work(&self, node: &Rc<Qcow2Node>) -> Amend {
        Amend::new(node.clone(), &self.spec)
    }

    /// Runs the job beside a client of the node. A pause is ordered after so many steps, or a cancellation, and ends when
    /// nothing else is left to do. `None`: `goes_on` said so.
    fn run(
        &self,
        node: &Rc<Qcow2Node>,
        client: impl Future<Output = ()>,
        order: Option<(u64, bool)>,
        goes_on: impl Fn() -> bool,
    ) -> Option<Result<(), Stop>> {
        let clock = VirtualClock::default();
        let mut running = Running::new(&clock, 0, ErrorPolicies::default());
        let (cx, orders) = (&running.cx, running.orders.clone());
        let parked = Cell::new(false);
        let manager = async {
            while let Some((_, report)) = running.reports.recv().await {
                parked.set(matches!(report, Report::Parked));
            }
        };
        let mut work = self.work(node);
        let both = async {
            let both = pin!(join(work.run(cx), client));
            match select(both, pin!(manager)).await {
                Either::Left(((result, ()), _)) => result,
                Either::Right(_) => unreachable!("the manager ends last"),
            }
        };
        let world = &self.yard.world;
        let from = world.steps();
        let given = Cell::new(false);
        let ended = self.yard.drive_with(both, || {
            if !goes_on() {
                return false;
            }
            if let Some((after, cancels)) = order
                && !given.get()
                && world.steps() - from >= after
            {
                given.set(true);
                match cancels {
                    true => orders.order_cancel(CancelMode::Force),
                    false => orders.order_pause(true),
                }
            }
            let paused = orders.pause_ordered();
            world.step() || {
                orders.order_pause(false);
                paused
            }
        });
        if let Some(Ok(())) = ended {
            let progress = &orders.progress;
            assert_eq!(progress.current_bytes(), progress.total_bytes());
        }
        ended
    }

    /// Whether the job was refused, as it has to be where the new length cannot be.
    fn was_refused(&self, ended: &Result<(), Stop>) -> bool {
        match ended {
            Err(Stop::Failed(error)) if error.errno == Some(EOPNOTSUPP) => {
                assert!(self.is_refused, "{:?} {:?}", self.spec, self.yard.setup);
                true
            }
            ended => {
                assert!(ended.is_err() || !self.is_refused, "{:?}", self.spec);
                false
            }
        }
    }

    /// The image has its old options or the new ones, and is sound; `true`: the new ones.
    fn judge(&self, image: &[u8]) -> bool {
        let form = form(image);
        let between = Form {
            size_bytes: self.old.size_bytes,
            ..self.new.clone()
        };
        let is_new = form == self.new;
        let is_between = self.is_in_two && form == between;
        assert!(
            is_new || form == self.old || is_between,
            "{form:?} of {:?} by {:?}",
            self.yard.setup,
            self.spec
        );
        let header = Header::parse(image, Access::ReadWrite).expect("it opens");
        if header.is_dirty() {
            // Counts are late; opening it puts them right.
            return is_new;
        }
        let report = checked(image);
        let wrong = (report.corruptions, report.check_errors);
        assert_eq!(wrong, (0, 0), "{:?} {:?}", self.yard.setup, self.spec);
        is_new
    }

    /// The image as it is now, newly opened.
    fn open(&mut self) -> Rc<Qcow2Node> {
        let form = form(&self.yard.image.bytes());
        let setup = &mut self.yard.setup;
        setup.version = form.version;
        setup.discard_no_unref &= form.version == Version::V3;
        setup.size_bytes = form.size_bytes;
        self.yard.open()
    }

    /// What a disk of this length holds.
    fn expected(&self, size_bytes: u64) -> Model {
        let mut model = self.model.clone();
        model.bytes.resize(size_bytes as usize, 0);
        model
    }

    /// Closed and opened again, the image holds what it has to.
    fn assert_holds_at_end(&mut self, node: Rc<Qcow2Node>, dice: &Seed) {
        self.yard.drive(node.close()).expect("closed");
        drop(node);
        let image = self.yard.image.bytes();
        self.judge(&image);
        assert_eq!(checked(&image).leaks, 0, "{:?}", self.spec);
        let node = self.open();
        let model = self.expected(self.yard.setup.size_bytes);
        assert_holds(&self.yard, &node, &model, dice);
    }
}

async fn nobody() {}

/// A request whose outcome does not depend on the version.
fn request(dice: &Seed, setup: &Setup) -> Operation {
    loop {
        match Operation::random(dice, setup) {
            Operation::Discard(_) => {}
            operation => return operation,
        }
    }
}

#[test]
fn readers_and_writers_get_what_was_written_while_orders_come() {
    let (amended, cancelled) = (Cell::new(0), Cell::new(0));
    each_seed("blockyard-engine", "readers_and_writers_get", 200, |seed| {
        let dice = Seed::new(seed);
        let mut place = Place::random(seed, false);
        let node = place.yard.open();
        let order = dice.one_in(2).then(|| (dice.below(80), dice.one_in(3)));
        let model = RefCell::new(place.model.clone());
        let setup = place.yard.setup.clone();
        let client = async {
            for _ in 0..12 {
                let operation = request(&dice, &setup);
                let read = operation.carry_out(&node).await.expect("nothing fails");
                model.borrow_mut().apply(&operation, &setup);
                if let Some(read) = read {
                    let model = model.borrow();
                    assert!(read == model.slice(operation.range()), "{operation:?}");
                }
            }
        };
        let ended = place.run(&node, client, order, || true);
        let ended = ended.unwrap_or_else(|| panic!("waits for ever: {:?}", place.spec));
        place.model = model.into_inner();
        let is_new = place.judge(&place.yard.image.bytes());
        match ended {
            Ok(()) => assert!(is_new, "{:?}", place.spec),
            Err(Stop::Cancelled) => {
                assert!(order.is_some_and(|(_, cancels)| cancels));
                assert!(!is_new || place.old == place.new);
                cancelled.set(cancelled.get() + 1);
            }
            Err(stop) => panic!("{stop:?} {:?} {:?}", place.spec, setup),
        }
        amended.set(amended.get() + u64::from(is_new));
        place.assert_holds_at_end(node, &dice);
    });
    if std::env::var_os("BLOCKYARD_SEED").is_none() {
        let (amended, cancelled) = (amended.get(), cancelled.get());
        assert!(amended > 50 && cancelled > 3, "{amended} {cancelled}");
    }
}

#[test]
fn a_pause_that_writers_meet_makes_way_for_them() {
    for after in 0..60 {
        let place = Place {
            spec: AmendSpec {
                refcount_bits: Some(64),
                ..AmendSpec::default()
            },
            ..Place::random(3, false)
        };
        let node = place.yard.open();
        let written = Cell::new(false);
        let client = async {
            let operation = Operation::Write(blockyard_storage::ByteRange::new(0, 512), 9);
            operation.carry_out(&node).await.expect("written");
            written.set(true);
        };
        let clock = VirtualClock::default();
        let mut running = Running::new(&clock, 0, ErrorPolicies::default());
        let orders = running.orders.clone();
        let (parked, ended) = (Cell::new(false), Cell::new(false));
        let mut work = place.work(&node);
        let world = &place.yard.world;
        let from = world.steps();
        let all = async {
            let cx = &running.cx;
            let job = async {
                let result = work.run(cx).await;
                ended.set(true);
                result
            };
            let reports = async {
                while let Some((_, report)) = running.reports.recv().await {
                    parked.set(matches!(report, Report::Parked));
                }
            };
            let both = pin!(join(job, client));
            match select(both, pin!(reports)).await {
                Either::Left(((result, ()), _)) => result,
                Either::Right(_) => unreachable!("the job has the other end"),
            }
        };
        let result = place.yard.drive_with(all, || {
            if world.steps() - from >= after && !parked.get() && !ended.get() {
                orders.order_pause(true);
            }
            world.step() || {
                // The job is parked, or over, and the writer has not waited for it to go on.
                assert!(
                    written.get(),
                    "a writer waits for a pause to end, after {after}"
                );
                let paused = orders.pause_ordered();
                orders.order_pause(false);
                parked.set(true);
                paused
            }
        });
        assert_eq!(result, Some(Ok(())), "{after}");
        assert_eq!(form(&place.yard.image.bytes()).refcount_bits, 64);
    }
}

#[test]
fn a_power_cut_leaves_the_old_or_the_new_and_all_that_was_flushed() {
    each_seed("blockyard-engine", "a_power_cut_leaves", 200, |seed| {
        let dice = Seed::new(seed);
        let changes_length = dice.one_in(2);
        let mut place = Place::random(seed, changes_length);
        let node = place.yard.open();
        let possible = RefCell::new(Possible::new(place.model.clone()));
        let setup = place.yard.setup.clone();
        let client = async {
            for _ in 0..(if changes_length { 0 } else { 8 }) {
                let operation = request(&dice, &setup);
                possible.borrow_mut().may(&operation, &setup);
                operation.carry_out(&node).await.expect("nothing fails");
                if let Operation::Flush = operation {
                    let newest = possible.borrow().newest().bytes.clone();
                    possible.borrow_mut().settle(newest);
                }
            }
        };
        let world = &place.yard.world;
        let end = world.steps() + dice.below(120);
        let ended = place.run(&node, client, None, || world.steps() < end);
        for cut in 0..3 {
            place.judge(&place.yard.image.bytes_after_cut(cut));
        }
        drop(node);
        place.yard.cut_power();
        let is_new = place.judge(&place.yard.image.bytes());
        if let Some(ended) = &ended {
            assert!(is_new || place.was_refused(ended), "{ended:?}");
        }
        let node = place.open();
        let size_bytes = place.yard.setup.size_bytes;
        if changes_length {
            assert_holds(&place.yard, &node, &place.expected(size_bytes), &dice);
            return;
        }
        let all = Operation::Read(blockyard_storage::ByteRange::new(0, size_bytes));
        let read = place.yard.drive(all.carry_out(&node));
        let bytes = read.expect("readable").expect("bytes");
        possible.borrow().assert_allows(&bytes, &setup);
    });
}

#[test]
fn version_2_refuses_a_length_that_shows_what_is_below_and_stays_as_it_was() {
    let refused = Cell::new(0);
    each_seed("blockyard-engine", "version_2_refuses_a", 60, |seed| {
        let dice = Seed::new(seed);
        let setup = Setup {
            seed,
            version: Version::V2,
            ..Setup::new(seed, *dice.pick(&[9, 12, 16]))
        };
        // One cluster of the base, or many, behind the end.
        let behind = 512 * (1 + dice.below(40 * setup.cluster_bytes() / 512));
        let backing_bytes = Some(setup.size_bytes + behind);
        let mut place = Place::new(
            Setup {
                backing_bytes,
                ..setup
            },
            true,
        );
        let node = place.yard.open();
        let old = place.yard.image.bytes();
        let ended = place.run(&node, nobody(), None, || true);
        if place.was_refused(&ended.expect("it ends")) {
            refused.set(refused.get() + 1);
            assert!(place.yard.image.bytes() == old, "{:?}", place.spec);
        }
        place.assert_holds_at_end(node, &dice);
    });
    if std::env::var_os("BLOCKYARD_SEED").is_none() {
        assert!(refused.get() > 10, "{}", refused.get());
    }
}

#[test]
fn whichever_operation_fails_the_image_is_whole() {
    each_seed(
        "blockyard-engine",
        "whichever_operation_fails_the",
        20,
        |seed| {
            for nth in 1.. {
                let dice = Seed::new(seed);
                let mut place = Place::random(seed, dice.one_in(2));
                let node = place.yard.open();
                let world = place.yard.world.clone();
                world.add_fault(Fault::fails(EIO).nth(nth));
                let ended = place.run(&node, nobody(), None, || true);
                let ended = ended.expect("it ends");
                let is_refused = place.was_refused(&ended);
                let has_failed = world.failures() > 0;
                for cut in 0..2 {
                    place.judge(&place.yard.image.bytes_after_cut(cut));
                }
                let is_new = place.judge(&place.yard.image.bytes());
                match ended {
                    Ok(()) => assert!(is_new, "{nth}"),
                    Err(Stop::Failed(error)) => {
                        assert!(has_failed || is_refused, "{nth} {error:?}");
                    }
                    Err(stop) => panic!("{stop:?}"),
                }
                drop(node);
                place.yard.cut_power();
                let node = place.open();
                let model = place.expected(place.yard.setup.size_bytes);
                assert_holds(&place.yard, &node, &model, &dice);
                if !has_failed {
                    break;
                }
            }
        },
    );
}

#[test]
fn cancelled_or_paused_at_every_step_with_another_length() {
    let cancelled = Cell::new(0);
    each_seed("blockyard-engine", "cancelled_or_paused_at", 12, |seed| {
        for cancels in [false, true] {
            for after in (0..).step_by(5) {
                let dice = Seed::new(seed);
                let mut place = Place::random(seed, true);
                let node = place.yard.open();
                let from = place.yard.world.steps();
                let ended = place.run(&node, nobody(), Some((after, cancels)), || true);
                let is_new = place.judge(&place.yard.image.bytes());
                let is_over = place.yard.world.steps() - from <= after;
                let ended = ended.expect("it ends");
                match ended {
                    Ok(()) => assert!(is_new),
                    ended if place.was_refused(&ended) => assert!(!is_new),
                    Err(Stop::Cancelled) => {
                        assert!(cancels && (!is_new || place.old == place.new));
                        cancelled.set(cancelled.get() + 1);
                    }
                    Err(stop) => panic!("{stop:?} {:?}", place.spec),
                }
                // The node goes on, whatever it is now.
                place.assert_holds_at_end(node, &dice);
                if is_over {
                    break;
                }
            }
        }
    });
    if std::env::var_os("BLOCKYARD_SEED").is_none() {
        assert!(cancelled.get() > 20, "{}", cancelled.get());
    }
}
