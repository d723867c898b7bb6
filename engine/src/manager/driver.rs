//! The driver: runs one job's work on its data thread, reports its end, and then does what the manager says.
//!
//! A panic in the work ends here: it becomes the job's error, and every other job goes on.

use std::panic::AssertUnwindSafe;
use std::rc::Rc;

use futures_util::FutureExt;
use tokio::sync::{mpsc, oneshot};

use crate::error::JobError;
use crate::job::context::{JobContext, JobKey, Report};
use crate::job::work::{Stop, Work};

/// What the manager asks of a job whose work has ended.
pub(super) enum DriverOrder {
    /// The last chance to fail.
    Prepare(oneshot::Sender<Result<(), JobError>>),
    /// Make the result final.
    Apply(oneshot::Sender<()>),
    /// Take it back.
    Revert(oneshot::Sender<()>),
}

/// The error of a job whose code failed in a way that no input should bring about.
pub(super) fn bug(what: &str) -> JobError {
    JobError::text(format!("Internal error: {what} (this is a bug)"))
}

/// The one report of how a job's work ended. Dropped unsent, because the thread has gone, it says that: no job is left
/// running without anybody who works.
pub(super) struct EndReport {
    key: JobKey,
    reports: Option<mpsc::UnboundedSender<(JobKey, Report)>>,
}

impl EndReport {
    /// A report that is owed from now on.
    pub(super) fn owed(key: JobKey, reports: mpsc::UnboundedSender<(JobKey, Report)>) -> Self {
        let reports = Some(reports);
        Self { key, reports }
    }

    /// Pays.
    pub(super) fn send(mut self, outcome: Result<(), Stop>) {
        self.tell(outcome);
    }

    fn tell(&mut self, outcome: Result<(), Stop>) {
        if let Some(reports) = self.reports.take() {
            let _ = reports.send((self.key, Report::Ended(outcome)));
        }
    }
}

impl Drop for EndReport {
    fn drop(&mut self) {
        self.tell(Err(Stop::Failed(bug("the job's thread is gone"))));
    }
}

/// Runs `work` to its end, then serves orders until the manager lets go.
pub(super) async fn drive(
    mut work: Box<dyn Work>,
    cx: Rc<JobContext>,
    end: EndReport,
    mut orders: mpsc::UnboundedReceiver<DriverOrder>,
) {
    let outcome = AssertUnwindSafe(work.run(&cx)).catch_unwind().await;
    let outcome = outcome.unwrap_or_else(|panic| {
        let what = panic_text(&*panic);
        tracing::error!(what, "a job panicked");
        Err(Stop::Failed(bug(&format!("the job panicked: {what}"))))
    });
    end.send(outcome);
    while let Some(order) = orders.recv().await {
        match order {
            DriverOrder::Prepare(answer) => {
                let prepared = AssertUnwindSafe(work.prepare(&cx)).catch_unwind().await;
                let _ = answer.send(prepared.unwrap_or_else(|panic| {
                    Err(bug(&format!("the job panicked: {}", panic_text(&*panic))))
                }));
            }
            DriverOrder::Apply(answer) => {
                let done = std::panic::catch_unwind(AssertUnwindSafe(|| work.apply()));
                log_panic(done);
                let _ = answer.send(());
            }
            DriverOrder::Revert(answer) => {
                let done = std::panic::catch_unwind(AssertUnwindSafe(|| work.revert()));
                log_panic(done);
                let _ = answer.send(());
            }
        }
    }
}

fn log_panic(outcome: std::thread::Result<()>) {
    if let Err(panic) = outcome {
        tracing::error!(what = panic_text(&*panic), "a job panicked while it ended");
    }
}

/// What a panic says of itself.
fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    if let Some(text) = panic.downcast_ref::<&str>() {
        text
    } else if let Some(text) = panic.downcast_ref::<String>() {
        text
    } else {
        "without a message"
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use blockyard_storage::LocalFuture;
    use blockyard_storage::buffer::BufferPool;

    use super::*;
    use crate::clock::{Clock, Moment};
    use crate::job::context::{ErrorPolicies, JobShared};
    use crate::request::CopyMode;

    /// A clock that stands still.
    struct Standing;

    impl Clock for Standing {
        fn now(&self) -> Moment {
            Moment::default()
        }

        fn sleep_until(&self, _: Moment) -> LocalFuture<'static, ()> {
            Box::pin(std::future::pending())
        }
    }

    /// Panics where it is told to.
    struct Clumsy {
        in_run: bool,
    }

    impl Work for Clumsy {
        fn run<'a>(&'a mut self, _: &'a JobContext) -> LocalFuture<'a, Result<(), Stop>> {
            let stumbles = self.in_run;
            Box::pin(async move {
                assert!(!stumbles, "fell over");
                Ok(())
            })
        }

        fn prepare<'a>(&'a mut self, _: &'a JobContext) -> LocalFuture<'a, Result<(), JobError>> {
            Box::pin(async { panic!("fell at the last step") })
        }

        fn revert(&mut self) {
            panic!("fell while getting up");
        }
    }

    /// Runs `work` and then has it prepare and revert.
    async fn outcome(work: Clumsy) -> (Result<(), Stop>, Result<(), JobError>) {
        let (reports, mut heard) = mpsc::unbounded_channel();
        let (driver, orders) = mpsc::unbounded_channel();
        let (prepare, prepared) = oneshot::channel();
        let (revert, reverted) = oneshot::channel();
        let _ = driver.send(DriverOrder::Prepare(prepare));
        let _ = driver.send(DriverOrder::Revert(revert));
        drop(driver);
        let key = JobKey(1);
        let cx = JobContext::new(
            key,
            Arc::new(JobShared::new(0, CopyMode::Background)),
            reports.clone(),
            Rc::new(Standing),
            BufferPool::new(1 << 20),
            ErrorPolicies::default(),
        );
        let end = EndReport::owed(key, reports);
        drive(Box::new(work), Rc::new(cx), end, orders).await;
        reverted.await.expect("answered in spite of the panic");
        let prepared = prepared.await.expect("answered");
        match heard.recv().await {
            Some((_, Report::Ended(outcome))) => (outcome, prepared),
            other => panic!("not an end: {other:?}"),
        }
    }

    #[tokio::test]
    async fn a_panic_becomes_the_error_of_its_job() {
        let (ended, prepared) = outcome(Clumsy { in_run: true }).await;
        let text = |error: JobError| error.text;
        assert_eq!(ended, Err(Stop::Failed(bug("the job panicked: fell over"))));
        assert_eq!(
            prepared.map_err(text),
            Err(
                "Internal error: the job panicked: fell at the last step (this is a bug)"
                    .to_owned()
            )
        );
        let (ended, _) = outcome(Clumsy { in_run: false }).await;
        assert_eq!(ended, Ok(()));
    }

    #[test]
    fn a_job_whose_thread_goes_has_failed() {
        let (reports, mut heard) = mpsc::unbounded_channel();
        drop(EndReport::owed(JobKey(1), reports.clone()));
        match heard.try_recv() {
            Ok((JobKey(1), Report::Ended(outcome))) => {
                assert_eq!(outcome, Err(Stop::Failed(bug("the job's thread is gone"))));
            }
            other => panic!("not an end: {other:?}"),
        }
        EndReport::owed(JobKey(2), reports).send(Ok(()));
        let told = heard.try_recv();
        assert!(matches!(told, Ok((JobKey(2), Report::Ended(Ok(()))))));
        assert!(heard.try_recv().is_err(), "told once");
    }
}
