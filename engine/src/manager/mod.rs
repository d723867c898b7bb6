//! Who owns a job's state: one thread, one table, one place where a status changes.
//!
//! ```text
//!   EngineHandle --Request--> dispatch --> start | verbs | queries
//!                                             |        |
//!                                        orders (JobShared: pause, cancel, complete, speed)
//!                                             v        v
//!   listeners <--Event-- publisher <-- lifecycle <--Report-- driver on a data thread (runs the Work)
//! ```
//!
//! A verb changes no status: it changes orders, the work reaches a checkpoint and reports, and only then does the
//! lifecycle take the step and publish it. The status never claims what is not yet so. Everything here runs on the
//! manager's thread; borrows of the table never cross an await.

#[cfg(test)]
mod checkpoint_cuts;
mod checkpoints;
mod decisions;
mod dispatch;
mod driver;
mod journal;
mod lifecycle;
mod publisher;
mod record;
mod start;
mod transaction;
mod verbs;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use blockyard_storage::buffer::BufferPool;
use tokio::sync::{Mutex, Notify, RwLock, mpsc};

use crate::data::ThreadSet;
use crate::event::EventKind;
use crate::export::Exports;
use crate::graph::Graph;
use crate::job::context::{JobKey, Report};

pub(crate) use dispatch::{Call, keep_records_short, serve};

/// The manager: every job, and what jobs need.
pub(crate) struct Manager {
    jobs: RefCell<record::JobTable>,
    publisher: Rc<publisher::Publisher>,
    journal: journal::Journal,
    graph: Rc<Graph>,
    exports: Rc<Exports>,
    threads: ThreadSet,
    pool: BufferPool,
    reports: mpsc::UnboundedSender<(JobKey, Report)>,
    /// Told after every change of a job that somebody may wait for.
    changed: Notify,
    /// The daemon is ending: nothing new is begun.
    ending: Cell<bool>,
    /// Those that have begun.
    checkpoints: checkpoints::Checkpoints,
    /// Had alone by a transaction, and shared by commands that must not come between its actions.
    transacting: RwLock<()>,
    /// Held by the transaction that is carried out.
    transaction: Mutex<()>,
}

impl Manager {
    /// A manager without jobs. Reports of its jobs' work arrive at the other end of `reports`.
    pub(crate) fn with(
        graph: Rc<Graph>,
        threads: ThreadSet,
        pool: BufferPool,
        reports: mpsc::UnboundedSender<(JobKey, Report)>,
    ) -> Self {
        let publisher = Rc::new(publisher::Publisher::default());
        let news = Rc::clone(&publisher);
        let exports = Exports::new(Rc::clone(&graph), move |kind| news.publish(kind));
        Self {
            jobs: RefCell::default(),
            publisher,
            journal: journal::Journal::default(),
            graph,
            exports: Rc::new(exports),
            threads,
            pool,
            reports,
            changed: Notify::new(),
            ending: Cell::new(false),
            checkpoints: checkpoints::Checkpoints::default(),
            transacting: RwLock::new(()),
            transaction: Mutex::new(()),
        }
    }

    /// Tells every listener what a node has told.
    pub(crate) fn tell(&self, news: EventKind) {
        self.publisher.publish(news);
    }
}
