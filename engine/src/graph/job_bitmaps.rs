//! Bitmaps of jobs: which arguments fit together, in QEMU's words and order.

use std::sync::Arc;

use crate::bitmap::{FrozenBitmap, Need};
use crate::data::NodeId;
use crate::error::EngineError;
use crate::graph::Graph;
use crate::request::{BitmapMode, SyncMode};

impl Graph {
    /// Looks at what a job is told of bitmaps; what becomes of the one that is named.
    ///
    /// # Errors
    /// In QEMU's words.
    pub(super) fn check_job_bitmap(
        &self,
        source: NodeId,
        sync: SyncMode,
        name: Option<&str>,
        asked: Option<BitmapMode>,
    ) -> Result<Option<BitmapMode>, EngineError> {
        let bitmaps = self.bitmaps_on(source)?;
        let is_there = name.is_some_and(|name| bitmaps.has(name));
        let mode = mode_of(sync, name, is_there, asked)?;
        if let Some(name) = name {
            bitmaps.check(name, Need::Read)?;
        }
        check_use(sync, mode)?;
        if name.is_none() && asked.is_some() {
            let text = "Cannot specify bitmap sync mode without a bitmap";
            return Err(EngineError::generic(text));
        }
        Ok(mode)
    }

    /// That a bitmap can be changed, if it is going to be.
    ///
    /// # Errors
    /// In QEMU's words.
    pub(super) fn check_change_of_bitmap(
        &self,
        source: NodeId,
        name: Option<&str>,
        mode: Option<BitmapMode>,
    ) -> Result<(), EngineError> {
        match (name, mode) {
            (Some(name), Some(BitmapMode::OnSuccess | BitmapMode::Always)) => {
                self.bitmaps_on(source)?.check(name, Need::Change)
            }
            _ => Ok(()),
        }
    }

    /// Freezes the bitmap of a job, if it has one.
    ///
    /// # Errors
    /// It cannot be used any more.
    pub(super) fn freeze_for_job(
        &self,
        source: NodeId,
        name: Option<&str>,
        mode: Option<BitmapMode>,
    ) -> Result<Option<Arc<FrozenBitmap>>, EngineError> {
        let Some((name, mode)) = name.zip(mode) else {
            return Ok(None);
        };
        let frozen = self.bitmaps_on(source)?.freeze(name, mode)?;
        Ok(Some(Arc::new(frozen)))
    }
}

/// What becomes of the bitmap.
fn mode_of(
    sync: SyncMode,
    name: Option<&str>,
    is_there: bool,
    asked: Option<BitmapMode>,
) -> Result<Option<BitmapMode>, EngineError> {
    let refused = |text: String| Err(EngineError::generic(text));
    if matches!(sync, SyncMode::Incremental | SyncMode::Bitmap) && name.is_none() {
        return refused(format!(
            "must provide a valid bitmap name for '{}' sync mode",
            word(sync)
        ));
    }
    let asked = match (sync, asked) {
        (SyncMode::Incremental, None) => Some(BitmapMode::OnSuccess),
        (SyncMode::Incremental, Some(mode)) if mode != BitmapMode::OnSuccess => {
            return refused(
                "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'".into(),
            );
        }
        _ => asked,
    };
    match (name, asked) {
        (Some(name), _) if !is_there => refused(format!("Bitmap '{name}' could not be found")),
        (Some(_), None) => refused("Bitmap sync mode must be given when providing a bitmap".into()),
        (Some(_), Some(mode)) => Ok(Some(mode)),
        (None, _) => Ok(None),
    }
}

/// Fails if nothing would come of the bitmap.
fn check_use(sync: SyncMode, mode: Option<BitmapMode>) -> Result<(), EngineError> {
    let text = match (sync, mode) {
        (SyncMode::None, Some(_)) => {
            "sync mode 'none' does not produce meaningful bitmap outputs".to_owned()
        }
        (SyncMode::Full | SyncMode::Top, Some(BitmapMode::Never)) => format!(
            "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode '{}'",
            word(sync)
        ),
        _ => return Ok(()),
    };
    Err(EngineError::generic(text))
}

/// What clients call it.
const fn word(sync: SyncMode) -> &'static str {
    match sync {
        SyncMode::Full => "full",
        SyncMode::Top => "top",
        SyncMode::None => "none",
        SyncMode::Incremental => "incremental",
        SyncMode::Bitmap => "bitmap",
    }
}
