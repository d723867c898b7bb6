//! [`DataRun`]: the run of data in which a file was asked last, so that a walk through it asks its file system once for each run
//! instead of once for each step.

use std::sync::{Mutex, MutexGuard, PoisonError};

use blockyard_storage::ByteRange;

/// What is known to be data. Clones of a file share one.
///
/// What others punch out of the file meanwhile goes on being called data, which reads as the zeroes that it is: never wrong, only
/// copied without need.
#[derive(Debug, Default)]
pub(crate) struct DataRun(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    run: Option<ByteRange>,
    /// Changes so far that may have made a hole.
    changes: u64,
}

impl DataRun {
    /// Whether all of `range` is data.
    pub(crate) fn contains(&self, range: ByteRange) -> bool {
        let known = self.lock();
        known.run.is_some_and(|run| run.contains(&range))
    }

    /// To be asked for before the file system is asked, and given to [`learned`](Self::learned) with the answer.
    pub(crate) fn changes(&self) -> u64 {
        self.lock().changes
    }

    /// `run` is data, unless a hole may have been made since there were so many changes.
    pub(crate) fn learned(&self, run: ByteRange, changes: u64) {
        let mut known = self.lock();
        if known.changes == changes {
            known.run = Some(run);
        }
    }

    /// Something may make a hole. To be called before it begins and again when it has ended.
    pub(crate) fn forget(&self) {
        let mut known = self.lock();
        known.run = None;
        known.changes += 1;
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_have_become_a_hole_is_asked_for_again() {
        let run = DataRun::default();
        let asked = ByteRange::new(4096, 4096);
        assert!(!run.contains(asked));

        let before = run.changes();
        run.learned(ByteRange::new(0, 8192), before);
        assert!(run.contains(asked));
        assert!(!run.contains(ByteRange::new(4096, 8192)));

        run.forget();
        assert!(!run.contains(asked));
        // An answer from before the change.
        run.learned(ByteRange::new(0, 8192), before);
        assert!(!run.contains(asked));
        // A question that was asked while the change was on its way.
        let beside = run.changes();
        run.forget();
        run.learned(ByteRange::new(0, 8192), beside);
        assert!(!run.contains(asked));
    }
}
