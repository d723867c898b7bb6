//! What comes before the first change and after the last: the dirty bit, and closing.

use crate::error::ImageError;
use crate::qcow2::image::Qcow2;
use crate::qcow2::layout::header::incompatible;

/// Commits that closing takes at most: each may free what the one before has unlinked, and freeing may have to wait for room
/// in the cache.
const COMMITS_MAX: usize = 64;

impl Qcow2 {
    /// Before anything is changed: what waits to be freed stays bounded, and an image with lazy counts says that it is in use.
    pub(super) async fn before_change(&self) -> Result<(), ImageError> {
        if self.state.has_much_unlinked() {
            self.commit().await?;
        }
        if self.state.options.lazy_refcounts && !self.header().is_dirty() {
            self.write_header(|header| header.incompatible |= incompatible::DIRTY)
                .await?;
        }
        Ok(())
    }

    /// Makes everything durable, gives back what was given up, and says that the reference counts are right. Nothing else may be
    /// in flight. The image can be used on afterwards.
    ///
    /// # Errors
    /// As [`flush`](Self::flush).
    pub async fn close(&self) -> Result<(), ImageError> {
        if self.state.options.read_only {
            return Ok(());
        }
        for _ in 0..COMMITS_MAX {
            self.commit_counts().await?;
            let unlinked = !self.state.unlinked.borrow().is_empty();
            if !unlinked && !self.state.counts.blocks.has_changes() {
                break;
            }
        }
        if self.header().is_dirty() && self.state.options.lazy_refcounts {
            self.write_header(|header| header.incompatible &= !incompatible::DIRTY)
                .await?;
        }
        Ok(())
    }
}
