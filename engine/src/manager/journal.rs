//! [`Journal`]: record, act, answer. What was asked of each job, how far it got for certain, and how it ended, written
//! before a client hears of it. This one is kept in memory; it is forgotten with the daemon.

use std::cell::RefCell;
use std::collections::BTreeMap;

use crate::error::JobError;
use crate::job::context::{Cursor, JobKey};
use crate::request::JobSpec;

/// What is known of one job.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    /// What was asked.
    pub(super) request: JobSpec,
    /// Up to where the target is durable.
    pub(super) cursor: Option<Cursor>,
    /// How it ended.
    pub(super) end: Option<Result<(), JobError>>,
}

/// The record of all jobs that are not dismissed; as many entries as there are jobs.
#[derive(Default)]
pub(super) struct Journal {
    entries: RefCell<BTreeMap<JobKey, Entry>>,
}

impl Journal {
    /// A job was asked for.
    pub(super) fn begin(&self, key: JobKey, request: &JobSpec) {
        let entry = Entry {
            request: request.clone(),
            cursor: None,
            end: None,
        };
        self.entries.borrow_mut().insert(key, entry);
    }

    /// A job has got so far for certain.
    pub(super) fn remember(&self, key: JobKey, cursor: Cursor) {
        if let Some(entry) = self.entries.borrow_mut().get_mut(&key) {
            entry.cursor = Some(cursor);
        }
    }

    /// A job is over.
    pub(super) fn end(&self, key: JobKey, outcome: Result<(), JobError>) {
        if let Some(entry) = self.entries.borrow_mut().get_mut(&key) {
            entry.end = Some(outcome);
        }
    }

    /// A job's result is no longer needed. Returns what was known, for the log.
    pub(super) fn forget(&self, key: JobKey) -> Option<Entry> {
        self.entries.borrow_mut().remove(&key)
    }
}
