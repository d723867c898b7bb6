//! The room that a command takes on a file system, for people.

use std::path::Path;

use blockyard_engine::reply::RoomView;

use crate::size;
use crate::terminal::copy::ends::shown;

/// What is taken, and whether there is enough. Comes behind something else.
pub(crate) fn told(room: &RoomView) -> String {
    let needed = room.needed_bytes();
    if needed == 0 {
        return "; takes no more room".to_owned();
    }
    let mut parts = format!(
        "data {}, tables {}",
        size::shown(room.data_bytes),
        size::shown(room.metadata_bytes)
    );
    if room.bitmaps_bytes > 0 {
        parts += &format!(", bitmaps {}", size::shown(room.bitmaps_bytes));
    }
    let mut text = format!("; takes up to {} more ({parts})", size::shown(needed));
    if let Some(free) = room.free_bytes {
        text += &format!(", {} free", size::shown(free));
    }
    if room.fits == Some(false) {
        text += ": not enough";
    }
    text
}

/// Why a command does not begin.
pub(crate) fn too_little(path: &Path, room: &RoomView) -> String {
    format!(
        "{} may take {} bytes more, and its file system has {} free; --force begins all the same",
        shown(path),
        room.needed_bytes(),
        room.free_bytes.unwrap_or(0)
    )
}
