//! [`ImageWatcher`]: how work on an image tells how far it is and what it finds, and hears that it is to end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blockyard_storage::ByteRange;
use tokio::sync::mpsc;

use crate::images::bitmaps::DirtyExtent;
use crate::images::check::FindingView;
use crate::images::map::MapExtent;

/// Pieces of news that wait to be taken; the work waits when there are more.
const EVENTS_MAX: usize = 4;

/// Something that work on an image tells while it goes on.
#[derive(Clone, Debug, PartialEq)]
pub enum ImageEvent {
    /// What a dirty bitmap says has changed, the next part of it.
    Dirty(Vec<DirtyExtent>),
    /// Extents of a disk that differ from what its manifest says, side by side, in the order of the disk.
    Differs(ByteRange),
    /// Findings of a check.
    Found(Vec<FindingView>),
    /// Where the next part of a disk is kept.
    Mapped(Vec<MapExtent>),
    /// A repair has put so much right and checks the image again: findings are of that check from here on.
    Repaired {
        /// Corruptions that were put right.
        corruptions: u64,
        /// Leaked clusters that were given back.
        leaks: u64,
    },
}

/// The side of the work. Clones are the same.
#[derive(Clone, Debug)]
pub struct ImageWatcher(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
    cancelled: AtomicBool,
    events: mpsc::Sender<ImageEvent>,
}

impl PartialEq for ImageWatcher {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// The side of whoever looks on. When it is dropped, the work is cancelled.
#[derive(Debug)]
pub struct ImageWatch {
    watcher: ImageWatcher,
    events: mpsc::Receiver<ImageEvent>,
}

impl ImageWatch {
    /// A pair: the first goes into the request, the second stays.
    pub fn new() -> (ImageWatcher, Self) {
        let (sender, events) = mpsc::channel(EVENTS_MAX);
        let watcher = ImageWatcher::telling(sender);
        let watch = Self {
            watcher: watcher.clone(),
            events,
        };
        (watcher, watch)
    }

    /// The next piece of news. Never ends: whoever waits for the end of the work waits for its reply as well.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn next(&mut self) -> ImageEvent {
        match self.events.recv().await {
            Some(event) => event,
            // This side holds a sender itself.
            None => std::future::pending().await,
        }
    }

    /// What has been told and not been taken yet.
    pub fn try_next(&mut self) -> Option<ImageEvent> {
        self.events.try_recv().ok()
    }

    /// Bytes done, and bytes expected in all.
    pub fn progress(&self) -> (u64, u64) {
        let shared = &self.watcher.0;
        let done = shared.done_bytes.load(Ordering::Relaxed);
        (done, shared.total_bytes.load(Ordering::Relaxed).max(done))
    }

    /// Asks the work to end early.
    pub fn cancel(&self) {
        self.watcher.0.cancelled.store(true, Ordering::Relaxed);
    }
}

impl Drop for ImageWatch {
    fn drop(&mut self) {
        self.cancel();
    }
}

impl ImageWatcher {
    /// The side of work that nobody looks on at, and nobody cancels.
    pub fn alone() -> Self {
        let (sender, _) = mpsc::channel(1);
        Self::telling(sender)
    }

    fn telling(events: mpsc::Sender<ImageEvent>) -> Self {
        Self(Arc::new(Shared {
            done_bytes: AtomicU64::new(0),
            total_bytes: AtomicU64::new(0),
            cancelled: AtomicBool::new(false),
            events,
        }))
    }

    /// So many bytes are done of so many.
    pub(crate) fn set_progress(&self, done_bytes: u64, total_bytes: u64) {
        self.0.done_bytes.store(done_bytes, Ordering::Relaxed);
        self.0.total_bytes.store(total_bytes, Ordering::Relaxed);
    }

    /// Whether to end early.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Relaxed)
    }

    /// Tells something. Waits until there is room; when nobody looks on any more, it is lost.
    pub(crate) async fn tell(&self, event: ImageEvent) {
        let _ = self.0.events.send(event).await;
    }
}
