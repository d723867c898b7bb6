//! Whether what has been written to an image recently is recorded somewhere: a name in its header, and a bit that everybody clears who
//! writes without knowing it.
//!
//! Somebody outside (the engine, in a directory of its own) records which parts of the disk may have changed since the bitmaps
//! were stored. After a crash that record makes good bitmaps of those that are still in use; but only if nobody else has written
//! meanwhile. The specification has the means for that: an autoclear bit that a program does not know is cleared by it before
//! it writes anything. So the record goes under a name that is in the header as an extension, and the bit vouches for it. Both come
//! with one write of the header's first sector, and go with one.
//!
//! Spec: qcow2, "Header" (`autoclear_features`), "Header extensions".

use std::rc::Rc;

use blockyard_storage::{Buffer, ByteRange, Operation};

use crate::error::ImageError;
use crate::qcow2::amend::header_switch::HeaderSwitch;
use crate::qcow2::header_updates::interrupted;
use crate::qcow2::image::{Health, ImageState, Qcow2};
use crate::qcow2::layout::extensions::ActivityId;
use crate::qcow2::layout::header::{Header, autoclear};
use crate::qcow2::units::Version;

impl Qcow2 {
    /// From now on all changes of the disk are recorded under `id`, and those that were under way have been: the header says so,
    /// durably. Nothing here lets that go before bitmaps are stored.
    ///
    /// # Errors
    /// Refused where the header has no room for it, or cannot say it (version 2); `EBADF` for a read-only image; what the storage
    /// says. What is recorded under the old name, if there was one, counts on then; if not even that is known, the image takes no
    /// change any more.
    ///
    /// # Cancel safety
    /// The old name or the new one counts.
    pub async fn begin_activity(&self, id: ActivityId) -> Result<(), ImageError> {
        if self.geometry().version() == Version::V2 {
            return Err(ImageError::refused(
                "An image of version 2 has no bits that others clear",
            ));
        }
        self.switch_activity(Some(id)).await
    }

    /// Changes of the disk are not recorded any more: the header says so, durably.
    ///
    /// # Errors
    /// As [`begin_activity`](Self::begin_activity).
    ///
    /// # Cancel safety
    /// It says so or not.
    pub async fn end_activity(&self) -> Result<(), ImageError> {
        let is_there = {
            let header = self.header();
            let says_so = header.autoclear & autoclear::ACTIVITY != 0;
            says_so || header.extensions.activity.is_some()
        };
        match is_there {
            true => self.switch_activity(None).await,
            false => Ok(()),
        }
    }

    /// Changes are recorded under the name that the header has, by somebody who has begun that when the image was open elsewhere.
    pub fn continue_activity(&self) {
        let is_recorded = self.header().activity().is_some();
        self.state.activity_goes_on.set(is_recorded);
    }

    async fn switch_activity(&self, id: Option<ActivityId>) -> Result<(), ImageError> {
        self.state
            .check_unlimited(Operation::Write, ByteRange::default())?;
        let state = Rc::clone(&self.state);
        let switched = self
            .serial
            .run(move || Box::pin(async move { state.switch_activity(id).await }))
            .await;
        self.told(async { switched.unwrap_or_else(|| Err(interrupted())) })
            .await
    }
}

impl ImageState {
    /// Nothing else writes metadata meanwhile.
    async fn switch_activity(&self, id: Option<ActivityId>) -> Result<(), ImageError> {
        self.check_sound()?;
        let mut new = self.header.borrow().clone();
        new.extensions.activity = id;
        new.autoclear &= !autoclear::ACTIVITY;
        if id.is_some() {
            new.autoclear |= autoclear::ACTIVITY;
        }
        self.switch_header(new).await?;
        self.activity_goes_on.set(id.is_some());
        Ok(())
    }

    /// Lets another header count. Nothing else writes metadata meanwhile; what the new one leads to is durable.
    pub(super) async fn switch_header(&self, new: Header) -> Result<(), ImageError> {
        let old = self.header.borrow().clone();
        let cluster_bytes = usize::try_from(self.geometry.cluster_bytes()).unwrap_or(0);
        let read = self.file.read(0, Buffer::zeroed(cluster_bytes)).await;
        read.outcome?;
        let way = HeaderSwitch::plan(read.buffer.as_slice().to_vec(), &old, &new)?;
        if let Err(error) = way.go(&self.file).await {
            // Which header counts is not known: another change could build upon the wrong one.
            let mut health = self.health.borrow_mut();
            if *health == Health::Sound {
                *health = Health::Unflushed(error.to_string());
            }
            return Err(error.into());
        }
        *self.header.borrow_mut() = new;
        Ok(())
    }

    /// Bits of the header that have to be cleared before anything changes.
    pub(super) fn broken_promises(&self, to_clear: u64) -> u64 {
        match self.activity_goes_on.get() {
            true => to_clear & !autoclear::ACTIVITY,
            false => to_clear,
        }
    }
}
