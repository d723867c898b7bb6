//! Filling: what the image does not hold itself is put into it, unseen by the guest, so that what is below can go.
//!
//! Whatever a guest has written stays: a filler takes its turn as every writer of a cluster does, and then looks again.

use blockyard_storage::{ByteRange, Operation};

use crate::error::ImageError;
use crate::qcow2::image::Qcow2;
use crate::qcow2::lookup::Source;
use crate::qcow2::open::DiskChange;
use crate::qcow2::reserve::{RESERVATION_BYTES_MAX, Reservation, WritePlan};
use crate::qcow2::units::Version;
use crate::qcow2::zero::{Change, Zeroing};

/// What the front of a range needs to be held by the image itself.
#[derive(Debug)]
pub enum Filling {
    /// Nothing: it is, as data or zeroes.
    Held(ByteRange),
    /// The bytes that are below, in the place of the reservation; others wait for it meanwhile.
    Room(Reservation),
}

impl Qcow2 {
    /// What has to be done for the front of `range` to be held by the image itself. The range is widened to whole subclusters
    /// (without extended L2 entries: clusters) and ends at the end of the disk. Waits for others who change the same clusters.
    ///
    /// # Errors
    /// As [`prepare_write`](Self::prepare_write).
    ///
    /// # Cancel safety
    /// As [`prepare_write`](Self::prepare_write).
    pub async fn prepare_fill(&self, range: ByteRange) -> Result<Filling, ImageError> {
        self.state.check_change(Operation::Write, range)?;
        let range = self.widened(range);
        self.told(self.find_gap(range)).await
    }

    async fn find_gap(&self, range: ByteRange) -> Result<Filling, ImageError> {
        // What is held needs no turn, and never becomes less than that by others who fill.
        let found = self.find(range).await?;
        if found.source != Source::Unallocated {
            return Ok(Filling::Held(found.range));
        }
        drop(found);
        self.before_change(DiskChange::Content).await?;
        let range = range.split_at(RESERVATION_BYTES_MAX).0;
        let turn = self.state.turns.enter(self.state.slice_span(range)).await;
        // The disk may have become shorter meanwhile.
        self.state.check_change(Operation::Write, range)?;
        let found = self.find(range).await?;
        if found.source != Source::Unallocated {
            return Ok(Filling::Held(found.range));
        }
        match self.reserve_in_turn(found.range, turn).await? {
            WritePlan::Allocate(room) => Ok(Filling::Room(room)),
            WritePlan::InPlace(place) => {
                // Nobody else may have put it there.
                let range = place.range();
                place.done();
                Ok(Filling::Held(range))
            }
        }
    }

    /// Makes what the image does not hold of the front of `range` read as zeroes, whatever is below; all else stays. Widened as
    /// for [`prepare_fill`](Self::prepare_fill). [`Zeroing::Write`]: this image has no such zeroes, they are to be filled in as
    /// data. Visible at once, durable with the next [`flush`](Self::flush).
    ///
    /// # Errors
    /// As [`prepare_write`](Self::prepare_write).
    ///
    /// # Cancel safety
    /// As [`zero`](Self::zero).
    pub async fn fill_zeroes(&self, range: ByteRange) -> Result<Zeroing, ImageError> {
        self.state.check_change(Operation::Zero, range)?;
        let range = self.widened(range);
        if !self.has_zeroes() {
            return Ok(Zeroing::Write(range));
        }
        self.before_change(DiskChange::Content).await?;
        let filled = self.change_front(range, Change::Fill);
        self.told(filled).await.map(Zeroing::Done)
    }

    /// Whether [`fill_zeroes`](Self::fill_zeroes) can be done without data. Who reads a raw data file as it is would miss them.
    pub fn has_zeroes(&self) -> bool {
        self.state.geometry.version() == Version::V3
            && !self.state.header.borrow().is_data_file_raw()
    }

    fn widened(&self, range: ByteRange) -> ByteRange {
        range
            .align_outward(self.state.geometry.subcluster_bytes())
            .clamp_end(self.length_bytes())
    }
}
