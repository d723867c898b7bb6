//! What clients ask of dirty bitmaps, as plain data.

/// A bitmap by its name and that of its node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapName {
    /// Name of the node.
    pub node: String,
    /// Name of the bitmap.
    pub name: String,
}

/// One change of one bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BitmapChange {
    /// A new one, on which nothing has changed.
    Add {
        /// Which.
        bitmap: BitmapName,
        /// Bytes that one bit stands for; `None`: the node's clusters, between 4 and 64 KiB.
        granularity_bytes: Option<u32>,
        /// It is kept in the image.
        persistent: bool,
        /// It does not record.
        disabled: bool,
    },
    /// It goes, from the image as well.
    Remove(BitmapName),
    /// Nothing has changed.
    Clear(BitmapName),
    /// It records from now on.
    Enable(BitmapName),
    /// It does not record any more.
    Disable(BitmapName),
    /// What others say has changed, in one step.
    Merge {
        /// Where to.
        target: BitmapName,
        /// Where from, on the same node or other ones.
        sources: Vec<BitmapName>,
    },
}

impl BitmapChange {
    /// The node whose bitmap is changed.
    pub(crate) fn node(&self) -> &str {
        match self {
            Self::Add { bitmap, .. }
            | Self::Remove(bitmap)
            | Self::Clear(bitmap)
            | Self::Enable(bitmap)
            | Self::Disable(bitmap) => &bitmap.node,
            Self::Merge { target, .. } => &target.node,
        }
    }
}
