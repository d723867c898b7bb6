//! [`RoomAhead`]: disk blocks behind the last cluster, reserved for many small writes at once.
//!
//! A small write to a new cluster would have the host file system find blocks for these few bytes alone and move the end of the
//! file each time, one write after the other. Reserved in one go, the writes that follow find both done. What is reserved and
//! never used stays a tail of the file that no table knows: at most [`RESERVED_BYTES`], or an eighth of what small writes have
//! brought so far, up to [`RESERVED_BYTES_MAX`].

use std::cell::Cell;

use blockyard_images::qcow2::reserve::Reservation;
use blockyard_storage::{ByteRange, Preallocation, Storage};

use crate::node::qcow2::mover::Mover;

/// Bytes that are reserved at a time, until many small writes have come.
const RESERVED_BYTES: u64 = 1 << 20;

/// Bytes that are reserved at a time, at most.
const RESERVED_BYTES_MAX: u64 = 8 << 20;

/// What part of the small writes so far is reserved for the next ones, once that is more.
const RESERVED_PART: u64 = 8;

/// Longest write that does not find blocks for itself.
const SMALL_BYTES_MAX: u64 = 256 << 10;

/// What was reserved of an image's file.
#[derive(Default)]
pub(super) struct RoomAhead {
    /// First byte behind it.
    end: Cell<u64>,
    /// Bytes of the small writes of whole clusters. No more is reserved for the next ones: most images get few of them.
    whole_bytes: Cell<u64>,
    /// The file cannot reserve, or its disk is full: writes take what they need.
    given_up: Cell<bool>,
}

impl Mover {
    /// Reserves blocks for clusters that lie behind the end of the file and are written few at a time or in part only. Whether that
    /// works or not, the write can go on: bytes that others write there meanwhile stay.
    pub(super) async fn reserve_ahead(&self, room: &Reservation) {
        let is_whole = room.fill_before().is_empty() && room.fill_after().is_empty();
        let is_long = is_whole && room.range().length() > SMALL_BYTES_MAX;
        let ahead = &self.ahead;
        // An image below has no room but where zeroes are written.
        let is_in_image = self.files.file.node().facts().cluster_size_bytes.is_some();
        let needless = is_long || !room.reads_zero() || self.files.data_file.is_some();
        if needless || is_in_image || ahead.given_up.get() {
            return;
        }
        let start = room.at_of(room.fill_before().offset()).0;
        let end = room.at_of(room.fill_after().end()).0;
        let reserved_bytes = match is_whole {
            true => {
                let before = ahead.whole_bytes.get();
                let now = before.saturating_add(room.range().length());
                ahead.whole_bytes.set(now);
                let part = (before / RESERVED_PART).clamp(RESERVED_BYTES, RESERVED_BYTES_MAX);
                before.min(part)
            }
            false => RESERVED_BYTES,
        };
        if end <= ahead.end.get() || reserved_bytes == 0 {
            return;
        }
        let start = start.max(ahead.end.get());
        let range = ByteRange::between(start, end.saturating_add(reserved_bytes));
        ahead.end.set(range.end());
        let reserved = self.files.file.preallocate(range, Preallocation::Falloc);
        if let Err(error) = reserved.await {
            tracing::debug!(%error, node = self.name, "no blocks are reserved for new clusters");
            ahead.given_up.set(true);
        }
    }
}
