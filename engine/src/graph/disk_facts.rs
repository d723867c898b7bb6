//! What queries show of a host file and only its file system knows. Asked where it may block, never on the manager's thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blockyard_ring::{HostFile, file_attributes};

/// How long a query waits for one file; without an answer it leaves out what it does not know.
const ANSWER_WAIT: Duration = Duration::from_secs(1);

/// What a file system says of one file now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct DiskFacts {
    /// Room that the file takes.
    pub(super) allocated_bytes: Option<u64>,
    /// Hint for its extents, where there is one.
    pub(super) extent_size_hint_bytes: Option<u32>,
}

/// One question at a time about one file: a file system that does not answer holds one thread, however often it is asked.
#[derive(Clone, Debug, Default)]
pub(super) struct DiskQuestion {
    asked: Arc<AtomicBool>,
}

impl DiskQuestion {
    /// Asks, and waits for the answer for a while.
    ///
    /// # Cancel safety
    /// The answer is lost; the next question is asked once it has come.
    pub(super) async fn ask(&self, file: HostFile) -> DiskFacts {
        self.ask_by(move || DiskFacts {
            allocated_bytes: file.allocated_bytes().ok(),
            extent_size_hint_bytes: file_attributes::extent_size_hint(file.descriptor())
                .ok()
                .flatten(),
        })
        .await
    }

    async fn ask_by(&self, look: impl FnOnce() -> DiskFacts + Send + 'static) -> DiskFacts {
        if self.asked.swap(true, Ordering::AcqRel) {
            return DiskFacts::default();
        }
        let asked = self.asked.clone();
        let looking = tokio::task::spawn_blocking(move || {
            let facts = look();
            asked.store(false, Ordering::Release);
            facts
        });
        match tokio::time::timeout(ANSWER_WAIT, looking).await {
            Ok(Ok(facts)) => facts,
            Ok(Err(_)) | Err(_) => DiskFacts::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[tokio::test]
    async fn a_file_system_that_does_not_answer_holds_one_thread_and_nobody_for_long() {
        let question = DiskQuestion::default();
        let known = DiskFacts {
            allocated_bytes: Some(1),
            extent_size_hint_bytes: None,
        };
        let (answer, stuck) = channel::<()>();
        let first = question.ask_by(move || {
            // Ends when the other side goes.
            let _ = stuck.recv();
            known
        });
        assert_eq!(first.await, DiskFacts::default());
        let second = question.ask_by(|| panic!("asked while the first question is open"));
        assert_eq!(second.await, DiskFacts::default());
        drop(answer);
        loop {
            let facts = question.ask_by(move || known).await;
            if facts == known {
                break;
            }
            tokio::task::yield_now().await;
        }
    }
}
