//! Nodes over NBD: who may be asked for, by whom it is in use, and when nobody uses it any more.
//!
//! ```text
//!   listener -> handshake (server's thread) -> connection (data thread of the export's node) -> root
//!                    |                                |
//!                    +--------- Directory ------------+   shared with the manager
//! ```

mod block_status;
mod connection;
mod memory;
mod outbox;
mod requests;
pub(super) mod server;
mod talk;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blockyard_nbd::{ExportDirectory, ExportFacts, Session};
use blockyard_storage::buffer::BufferPool;
use tokio::sync::watch;

use crate::bitmap::HeldBitmap;
use crate::graph::RootPlace;
use crate::limits::EXPORT_BUDGET_BYTES;

/// What every thread knows of one export.
pub(super) struct NbdExport {
    /// What clients ask for.
    pub(super) name: String,
    /// What they are told.
    pub(super) facts: ExportFacts,
    /// Where it reads and writes.
    place: RootPlace,
    /// Every write is flushed before it is answered.
    writethrough: bool,
    /// What has changed since when, in the order of `facts`.
    bitmaps: Vec<HeldBitmap>,
    use_: watch::Sender<Use>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Use {
    clients: usize,
    is_closing: bool,
}

/// One client's use of an export; ends when it is dropped.
struct Attendance(Arc<NbdExport>);

impl NbdExport {
    /// An export that nobody uses.
    pub(super) fn new(
        name: String,
        facts: ExportFacts,
        place: RootPlace,
        writethrough: bool,
        bitmaps: Vec<HeldBitmap>,
    ) -> Self {
        Self {
            name,
            facts,
            place,
            writethrough,
            bitmaps,
            use_: watch::Sender::default(),
        }
    }

    /// Clients now.
    pub(super) fn clients(&self) -> usize {
        self.use_.borrow().clients
    }

    /// Lets nobody in any more, and asks those who are in to leave.
    pub(super) fn close(&self) {
        self.use_.send_modify(|now| now.is_closing = true);
    }

    /// Waits until nobody uses it.
    pub(super) async fn until_unused(&self) {
        let mut watched = self.use_.subscribe();
        // The sender lives as long as this.
        let _ = watched.wait_for(|now| now.clients == 0).await;
    }

    /// Waits until it is closed.
    async fn until_closing(&self) {
        let mut watched = self.use_.subscribe();
        let _ = watched.wait_for(|now| now.is_closing).await;
    }

    /// Lets a client in, unless it is closed.
    fn enter(self: &Arc<Self>) -> Option<Attendance> {
        let entered = self.use_.send_if_modified(|now| {
            if now.is_closing {
                return false;
            }
            now.clients += 1;
            true
        });
        entered.then(|| Attendance(Arc::clone(self)))
    }
}

impl Drop for Attendance {
    fn drop(&mut self) {
        self.0.use_.send_modify(|now| now.clients -= 1);
    }
}

/// All exports that clients may ask for, oldest first; shared by the manager and the server's thread.
#[derive(Clone)]
pub(super) struct Directory {
    exports: Arc<Mutex<Vec<Arc<NbdExport>>>>,
    /// Where requests of all clients get memory from.
    pool: BufferPool,
}

impl Directory {
    /// A directory without exports.
    pub(super) fn new() -> Self {
        Self {
            exports: Arc::default(),
            pool: BufferPool::new(EXPORT_BUDGET_BYTES),
        }
    }

    /// Takes an export in, unless there is one of its name.
    pub(super) fn insert(&self, export: &Arc<NbdExport>) -> bool {
        let mut exports = self.lock();
        let is_free = exports.iter().all(|other| other.name != export.name);
        if is_free {
            exports.push(Arc::clone(export));
        }
        is_free
    }

    /// Lets nobody find this export any more.
    pub(super) fn remove(&self, export: &Arc<NbdExport>) {
        self.lock().retain(|other| !Arc::ptr_eq(other, export));
    }

    /// Lets a client use what it has agreed on, if that is still there.
    fn enter(&self, session: &Session) -> Option<Attendance> {
        let exports = self.lock();
        let named = |export: &&Arc<NbdExport>| export.name == session.export_name;
        let export = exports.iter().find(named)?;
        // One that has come in its place is another.
        if export.facts != session.facts {
            return None;
        }
        export.enter()
    }

    /// What it holds is whole whatever has happened to who held the lock.
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<NbdExport>>> {
        self.exports.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ExportDirectory for Directory {
    fn list(&self) -> Vec<(String, Option<String>)> {
        let exports = self.lock();
        let listed = exports
            .iter()
            .map(|export| (export.name.clone(), export.facts.description.clone()));
        listed.collect()
    }

    fn find(&self, name: &str) -> Option<ExportFacts> {
        let exports = self.lock();
        let found = exports.iter().find(|export| export.name == name);
        found.map(|export| export.facts.clone())
    }
}
