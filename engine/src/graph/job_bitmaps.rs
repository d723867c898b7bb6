//! Bitmaps of jobs: which arguments fit together, in QEMU's words and order.

use crate::bitmap::Need;
use crate::data::NodeId;
use crate::error::EngineError;
use crate::graph::Graph;
use crate::request::{BackupSpec, BitmapMode, SyncMode};

impl Graph {
    /// Looks at what a backup is told of bitmaps; what becomes of the one that is named.
    ///
    /// # Errors
    /// In QEMU's words.
    pub(super) fn check_backup_bitmap(
        &self,
        spec: &BackupSpec,
        source: NodeId,
    ) -> Result<Option<BitmapMode>, EngineError> {
        let bitmaps = self.bitmaps_on(source)?;
        let name = spec.bitmap.as_deref();
        let is_there = name.is_some_and(|name| bitmaps.has(name));
        let mode = mode_of(spec.sync, name, is_there, spec.bitmap_mode)?;
        if let Some(name) = name {
            bitmaps.check(name, Need::Read)?;
        }
        check_use(spec.sync, mode)?;
        if name.is_none() && spec.bitmap_mode.is_some() {
            let text = "Cannot specify bitmap sync mode without a bitmap";
            return Err(EngineError::generic(text));
        }
        Ok(mode)
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
pub(super) const fn word(sync: SyncMode) -> &'static str {
    match sync {
        SyncMode::Full => "full",
        SyncMode::Top => "top",
        SyncMode::None => "none",
        SyncMode::Incremental => "incremental",
        SyncMode::Bitmap => "bitmap",
    }
}
