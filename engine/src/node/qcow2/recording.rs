//! The bitmaps that an image keeps, written down outside of it while it may be written, so that they are good after a crash.
//!
//! ```text
//!   1  a field of bits begins under a new name; changes are recorded there as well from now on
//!   2  what is under way is set in it; what has ended before is made durable; the bitmaps are written down as they are now
//!   3  the image's header leads to the new name
//!   4  what was there under other names goes
//! ```
//! Whatever fails or is killed in between, the header leads to something that is complete, or to nothing. Where the state directory
//! cannot be written, the image does without: its bitmaps are inconsistent after a crash, as QEMU's are.

use std::fmt::Write;
use std::io;

use blockyard_images::ImageError;
use blockyard_images::qcow2::Qcow2;
use blockyard_images::qcow2::layout::extensions::ActivityId;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::bitmap::{BitmapInMemory, NodeBitmaps, Regions, decode, encode};
use crate::state::{LEFT_SUFFIX, MARKS_SUFFIX, MarkField, RecordKind, StateDir};

const KIND: RecordKind = RecordKind::Bitmaps;

/// Memory of the bitmaps of one image that are written down, in bytes.
const WRITTEN_DOWN_BYTES_MAX: u64 = 256 << 20;

/// What was written down of the bitmaps of an image that a crash has left, with all that may have changed since; `None` if nothing was,
/// or not by us, or somebody else has written to the image.
///
/// # Errors
/// Something may be there, and cannot be read now: it is good as long as nobody writes to the image.
pub(super) async fn recover(
    image: &Qcow2,
    bitmaps: &NodeBitmaps,
) -> io::Result<Option<Vec<BitmapInMemory>>> {
    let (Some(state), Some(id)) = (bitmaps.state(), image.header().activity()) else {
        return Ok(None);
    };
    if state.is_held(&name_of(id)) {
        // Of another image, of which this one is a copy, which is being written.
        return Ok(None);
    }
    let read = async {
        let Some(content) = state.read(KIND, &name_of(id)).await? else {
            return Ok(None);
        };
        let field = state.read_marked(KIND, &field_name_of(id)).await?;
        Ok::<_, io::Error>(field.map(|(_, field)| (content, field)))
    };
    let (content, field) = match read.await {
        Ok(Some(found)) => found,
        Ok(None) => {
            tracing::warn!(name = name_of(id), "bitmaps were written down elsewhere");
            return Ok(None);
        }
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            tracing::warn!(%error, name = name_of(id), "what was written down of bitmaps is lost");
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    if let Err(error) = state.remove(KIND, &left_name_of(id)).await {
        tracing::warn!(%error, "it is not noted that an image has been opened");
    }
    let length_bytes = image.length_bytes();
    let recovered = decode(&content, &field, length_bytes);
    match &recovered {
        Some(all) => tracing::info!(bitmaps = all.len(), "bitmaps are good after a crash"),
        None => tracing::warn!(
            name = name_of(id),
            "what was written down of bitmaps is none"
        ),
    }
    Ok(recovered)
}

/// Goes on recording changes for an image that has been brought up anew, or begins to.
pub(super) async fn go_on(image: &Qcow2, bitmaps: &NodeBitmaps) {
    if !continues(image, bitmaps) {
        write_down(image, bitmaps).await;
    }
}

/// Whether changes of an image that has been brought up anew are recorded as its header says; then that goes on.
pub(super) fn continues(image: &Qcow2, bitmaps: &NodeBitmaps) -> bool {
    let recorded_as = bitmaps.recorded_as();
    let is_recorded = recorded_as.is_some() && recorded_as == image.header().activity();
    if is_recorded {
        image.continue_activity();
    }
    is_recorded
}

/// Writes down what the image is to keep, as it is now, and records what changes from now on, if there is a place for that.
pub(super) async fn write_down(image: &Qcow2, bitmaps: &NodeBitmaps) {
    let Some(state) = bitmaps.state() else {
        return;
    };
    let _alone = bitmaps.write_down_alone().await;
    bitmaps.set_given_up(false);
    let before = image.header().activity();
    let outcome = match bitmaps.to_store() {
        kept if kept.is_empty() => Ok(None),
        _ => begin(state, image, bitmaps).await.map(Some),
    };
    match outcome {
        Ok(Some(id)) => {
            let others = bitmaps.keep_field(Some(id));
            forget(state, before.into_iter().chain(others)).await;
        }
        Ok(None) => {
            if let Err(error) = give_up_alone(image, bitmaps).await {
                tracing::error!(%error, "an image still says that its changes are recorded");
            }
        }
        Err(reason) => {
            tracing::warn!(%reason, "bitmaps of an image will be lost if the daemon is killed");
            if let Err(error) = give_up_alone(image, bitmaps).await {
                tracing::error!(%error, "an image still says that its changes are recorded");
            }
        }
    }
}

/// Lets the image say that changes are not recorded any more, and ends it.
///
/// # Errors
/// What the image says: it takes no change any more then.
pub(super) async fn give_up(image: &Qcow2, bitmaps: &NodeBitmaps) -> Result<(), ImageError> {
    let _alone = bitmaps.write_down_alone().await;
    give_up_alone(image, bitmaps).await
}

async fn give_up_alone(image: &Qcow2, bitmaps: &NodeBitmaps) -> Result<(), ImageError> {
    let before = image.header().activity();
    image.end_activity().await?;
    end(bitmaps, before).await;
    Ok(())
}

/// The image does not say any more that changes are recorded, which it did as `before`.
pub(super) async fn end(bitmaps: &NodeBitmaps, before: Option<ActivityId>) {
    let others = bitmaps.keep_field(None);
    if let Some(state) = bitmaps.state() {
        forget(state, before.into_iter().chain(others)).await;
    }
}

/// Steps 1 to 3. The new name.
async fn begin(
    state: &StateDir,
    image: &Qcow2,
    bitmaps: &NodeBitmaps,
) -> Result<ActivityId, String> {
    let length_bytes = image.length_bytes();
    let regions = Regions::of(length_bytes, state.region_bytes());
    let failed = |error: io::Error| {
        // It may be another time.
        bitmaps.set_given_up(true);
        text(error)
    };
    let id = new_id().map_err(text)?;
    let field = MarkField::new(regions.bits());
    let name = field_name_of(id);
    let field = state.write_marked(KIND, &name, Vec::new(), field);
    let field = field.await.map_err(failed)?;
    let held = state.hold(&name_of(id));
    let under_way = bitmaps.add_field(id, regions, field.clone(), held);
    let written = async {
        for bits in under_way {
            field.mark(bits).await.map_err(failed)?;
        }
        // Bitmaps may have been cleared since: what a crash takes back of what they said would be in none of them.
        image.flush().await.map_err(text)?;
        let kept = bitmaps.to_store();
        let memory = kept.iter().map(|bitmap| bitmap.map.memory_bytes());
        let bytes: u64 = memory.sum();
        if bytes > WRITTEN_DOWN_BYTES_MAX {
            return Err(format!("they take {bytes} bytes of memory"));
        }
        let name = name_of(id);
        let content = move || encode(length_bytes, regions, &kept);
        let written = state.write_made(KIND, &name, content).await;
        written.map_err(failed)?;
        image.begin_activity(id).await.map_err(text)
    };
    match written.await {
        Ok(()) => Ok(id),
        Err(reason) if image.header().activity() == Some(id) => Err(reason),
        Err(reason) => {
            // Nothing leads there.
            bitmaps.drop_field(id);
            forget(state, [id]).await;
            Err(reason)
        }
    }
}

/// Takes away what nothing leads to any more, but for what another image is recorded as.
async fn forget(state: &StateDir, ids: impl IntoIterator<Item = ActivityId>) {
    for id in ids {
        if state.is_held(&name_of(id)) {
            continue;
        }
        for name in [name_of(id), field_name_of(id), left_name_of(id)] {
            if let Err(error) = state.remove(KIND, &name).await {
                tracing::warn!(%error, name, "a file of the state directory is left over");
            }
        }
    }
}

fn new_id() -> io::Result<ActivityId> {
    let mut id = [0; 16];
    let filled = getrandom(&mut id, GetRandomFlags::empty())?;
    match filled == id.len() {
        true => Ok(ActivityId(id)),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

fn name_of(ActivityId(id): ActivityId) -> String {
    id.iter().fold(String::new(), |mut name, byte| {
        // A string takes everything.
        let _ = write!(name, "{byte:02x}");
        name
    })
}

fn field_name_of(id: ActivityId) -> String {
    format!("{}{MARKS_SUFFIX}", name_of(id))
}

fn left_name_of(id: ActivityId) -> String {
    format!("{}{LEFT_SUFFIX}", name_of(id))
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}
