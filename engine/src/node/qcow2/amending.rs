//! Amending the image of a node: it is written back, changed below the node, and opened again. Readers go on with what they
//! know of it until then, as nothing that they are led to is given up before; writers wait.
//!
//! A pause would keep writers waiting for as long as it lasts. So when somebody wants to write during one, what was made so
//! far is given back, the writers go on with the old image, and when the job goes on it begins anew.

use std::cell::{Cell, RefCell};
use std::pin::pin;
use std::rc::Rc;

use blockyard_images::qcow2::amend::{AmendError, AmendOptions, amend};
use blockyard_images::qcow2::info::ImageInfo;
use blockyard_images::qcow2::layout::header::Access;
use blockyard_images::qcow2::open::{OpenedImage, read_image};
use blockyard_images::qcow2::units::Version;
use blockyard_images::qcow2::{Options, Qcow2};
use blockyard_images::{Cancelled, ImageError, Pace};
use blockyard_storage::{ByteRange, LocalFuture, Operation, Storage};
use futures_util::future::{Either, select};

use crate::node::gate::{Gate, Way};
use crate::node::qcow2::Qcow2Node;
use crate::node::qcow2::mover::Mover;
use crate::node::qcow2::recording;
use crate::node::{AmendStop, Reopened};

impl Qcow2Node {
    /// See [`Node::amend`](crate::node::Node::amend).
    pub(super) async fn amend_image(
        &self,
        options: &AmendOptions,
        pace: &dyn Pace,
    ) -> Result<(), AmendStop> {
        loop {
            let closed = self.gate.close(Way::Write).await;
            let pace = YieldingPace::new(pace, &self.gate);
            let outcome = self.amend_alone(options, &pace).await;
            drop(closed);
            let Some(rest_of_pause) = pace.left.take() else {
                return outcome;
            };
            let resumed = rest_of_pause.await;
            match (outcome, resumed) {
                (Err(AmendStop::Cancelled), Ok(())) => pace.give_up(),
                (outcome, _) => return outcome,
            }
        }
    }

    /// With nobody who writes.
    async fn amend_alone(&self, options: &AmendOptions, pace: &dyn Pace) -> Result<(), AmendStop> {
        let mut old = self.mover();
        old.close().await.map_err(AmendStop::Failed)?;
        let before = old.read_anew().await?;
        let wanted = options.check(&before);
        let wanted = wanted.map_err(|error| old.amend_stop(error))?;
        let options = AmendOptions {
            is_overlay: old.backing().is_some(),
            is_recorded: self.bitmaps.is_recorded(),
            ..options.clone()
        };
        let (old_bytes, new_bytes) = (before.header.guest_bytes(), wanted.guest_bytes());
        self.check_kept(&wanted, old_bytes)
            .map_err(AmendStop::Refused)?;
        if new_bytes > old_bytes && options.grows_behind(&before.header, old.below_bytes()) {
            let but_the_length = AmendOptions {
                size_bytes: None,
                ..options.clone()
            };
            self.amend_closed(&old, &but_the_length, pace).await?;
            old = self.mover();
        }
        if new_bytes > old_bytes {
            old.prepare_growth(new_bytes, pace).await?;
            old.close().await.map_err(AmendStop::Failed)?;
        }
        self.amend_closed(&old, &options, pace).await?;
        if new_bytes < old_bytes {
            let new = self.mover();
            let given_back = new.image.give_back_the_end().await;
            given_back.map_err(|error| new.amend_stop(error))?;
        }
        Ok(())
    }

    /// Amends an image that has been written back, and goes on with what it is then.
    async fn amend_closed(
        &self,
        old: &Mover,
        options: &AmendOptions,
        pace: &dyn Pace,
    ) -> Result<(), AmendStop> {
        old.away.set(true);
        let file: Rc<dyn Storage> = old.files.file.clone();
        let amended = amend(&file, options, pace).await;
        let reopened = reopen(Some(&self.gate), &self.mover, &self.amended, old).await;
        if reopened.is_ok() {
            // Nobody has written meanwhile.
            recording::continues(&self.mover().image, &self.bitmaps);
        }
        match amended {
            Ok(()) => reopened,
            Err(error) => Err(old.stop_of(error)),
        }
    }
}

/// Goes on with what the image is now. Nobody is using the node but readers, whom `gate` keeps out for a moment; `None`: there
/// are none. Where it fails, the node refuses everything from then on: what it knows of the image is what was there before.
pub(super) async fn reopen(
    gate: Option<&Rc<Gate>>,
    mover: &RefCell<Rc<Mover>>,
    amended: &RefCell<Option<Reopened>>,
    old: &Mover,
) -> Result<(), AmendStop> {
    let outcome = open_anew(gate, mover, amended, old).await;
    if outcome.is_err() {
        old.lost.set(true);
    }
    outcome
}

async fn open_anew(
    gate: Option<&Rc<Gate>>,
    mover: &RefCell<Rc<Mover>>,
    amended: &RefCell<Option<Reopened>>,
    old: &Mover,
) -> Result<(), AmendStop> {
    let opened = old.read_anew().await?;
    let info = ImageInfo::of(&opened);
    let options = options_for(old, &opened);
    let format = opened.header.extensions.backing_format.clone();
    let backing = opened.header.backing_name.clone();
    let reopened = Reopened {
        info,
        backing: backing.map(|name| (name, format)),
        options,
    };
    let file: Rc<dyn Storage> = old.files.file.clone();
    let data_file = old.files.data_file.clone();
    let data_file = data_file.map(|data_file| data_file as Rc<dyn Storage>);
    let image = Qcow2::new(file, data_file, opened, options);
    let image = image.map_err(|error| old.amend_stop(error))?;
    // What a reader is led to by the old image may be used for something else once the new one is there.
    let _closed = match gate {
        Some(gate) => Some(gate.close(Way::Read).await),
        None => None,
    };
    mover.replace(Rc::new(old.reopened(image)));
    amended.replace(Some(reopened));
    Ok(())
}

impl Mover {
    async fn read_anew(&self) -> Result<OpenedImage, AmendStop> {
        let opened = read_image(&*self.files.file, Access::ReadWrite).await;
        opened.map_err(|error| self.amend_stop(error))
    }

    /// All that a longer disk needs, but for its length in the header.
    async fn prepare_growth(&self, length_bytes: u64, pace: &dyn Pace) -> Result<(), AmendStop> {
        let known = self.check_known(Operation::Resize, ByteRange::new(0, length_bytes));
        known.map_err(AmendStop::Failed)?;
        let zeroed = self.zero_behind_end(length_bytes).await;
        zeroed.map_err(AmendStop::Failed)?;
        let below_bytes = self.below_bytes();
        let prepared = self.image.prepare_growth(length_bytes, below_bytes, pace);
        prepared.await.map_err(|error| self.stop_of(error))
    }

    fn stop_of(&self, error: AmendError) -> AmendStop {
        match error {
            AmendError::Cancelled => AmendStop::Cancelled,
            AmendError::Failed(error) => self.amend_stop(error),
        }
    }

    pub(super) fn amend_stop(&self, error: ImageError) -> AmendStop {
        match error {
            ImageError::Refused { text, detail } => {
                let detail = detail.unwrap_or_default();
                tracing::info!(node = self.name, text, detail, "an image is not amended");
                AmendStop::Refused(text)
            }
            error => AmendStop::Failed(self.failed(error, Operation::Write, None)),
        }
    }
}

/// How the image was used, as far as it can be used like that.
fn options_for(old: &Mover, opened: &OpenedImage) -> Options {
    let header = &opened.header;
    let mut options = *old.image.options();
    if options.lazy_refcounts == old.image.header().lazy_refcounts() {
        options.lazy_refcounts = header.lazy_refcounts();
    }
    if header.geometry.version() == Version::V2 {
        options.lazy_refcounts = false;
        options.discard_no_unref = false;
    }
    options
}

/// Ends the work when somebody wants to write while it is paused.
struct YieldingPace<'a> {
    pace: &'a dyn Pace,
    gate: &'a Gate,
    expected_bytes: Cell<u64>,
    /// What is left of such a pause.
    left: RefCell<Option<LocalFuture<'a, Result<(), Cancelled>>>>,
}

impl<'a> YieldingPace<'a> {
    fn new(pace: &'a dyn Pace, gate: &'a Gate) -> Self {
        Self {
            pace,
            gate,
            expected_bytes: Cell::new(0),
            left: RefCell::default(),
        }
    }

    /// What was expected and not done is not going to be.
    fn give_up(&self) {
        self.pace.done(self.expected_bytes.take());
    }
}

impl Pace for YieldingPace<'_> {
    fn expect(&self, bytes: u64) {
        let expected = self.expected_bytes.get();
        self.expected_bytes.set(expected.saturating_add(bytes));
        self.pace.expect(bytes);
    }

    fn done(&self, bytes: u64) {
        let expected = self.expected_bytes.get();
        self.expected_bytes.set(expected.saturating_sub(bytes));
        self.pace.done(bytes);
    }

    fn checkpoint(&self) -> LocalFuture<'_, Result<(), Cancelled>> {
        Box::pin(async move {
            if self.left.borrow().is_some() {
                // What is finished all the same keeps writers waiting for as short as possible.
                return Err(Cancelled);
            }
            let wanted = pin!(self.gate.wanted(Way::Write));
            match select(self.pace.checkpoint(), wanted).await {
                Either::Left((outcome, _)) => outcome,
                Either::Right(((), rest_of_pause)) => {
                    self.left.replace(Some(rest_of_pause));
                    Err(Cancelled)
                }
            }
        })
    }
}
