//! [`Watch`]: follows the jobs of a daemon by its events and a few queries a second, and shows them.

use std::time::{Duration, Instant};

use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::client::connection::Client;
use crate::client::error::CallError;
use crate::client::jobs::{Job, JobTable};
use crate::terminal::display::{Display, Ended, Figures, Outcome};

/// Between two queries.
const PERIOD: Duration = Duration::from_millis(250);

/// What is known of a daemon's jobs, kept up to date.
#[derive(Debug)]
pub struct Watch {
    table: JobTable,
    ticks: Interval,
}

impl Default for Watch {
    fn default() -> Self {
        let mut ticks = interval(PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            table: JobTable::default(),
            ticks,
        }
    }
}

impl Watch {
    /// Jobs as far as is known.
    pub fn jobs(&self) -> &[Job] {
        self.table.jobs()
    }

    /// Takes the events that have come already, and asks for the rest.
    ///
    /// # Errors
    /// The end of the connection, or a daemon that refuses to list its jobs.
    pub async fn refresh(&mut self, client: &mut Client) -> Result<(), CallError> {
        while let Some(event) = client.kept_event() {
            self.table.take(&event);
        }
        self.table.refresh(client).await
    }

    /// Waits for an event or for the time of the next query.
    ///
    /// # Errors
    /// The end of the connection, or a daemon that refuses to list its jobs.
    pub async fn news(&mut self, client: &mut Client) -> Result<(), CallError> {
        tokio::select! {
            event = client.event() => {
                self.table.take(&event?);
            }
            _ = self.ticks.tick() => {}
        }
        // Also after an event: only a query tells how far a job is, and why it failed.
        self.refresh(client).await
    }

    /// Shows every job that has not ended.
    pub fn show(&self, display: &mut Display) {
        let now = Instant::now();
        for job in self.jobs().iter().filter(|job| !job.has_ended()) {
            display.progress(&figures(job), now);
        }
    }

    /// Jobs that have ended since this was last asked.
    pub fn take_ended(&mut self) -> Vec<Job> {
        self.table.take_ended()
    }

    /// Shows a job until it is as wanted or has ended. `None`: there is no such job. Ends of other jobs are forgotten.
    ///
    /// # Errors
    /// The end of the connection, or a daemon that refuses to list its jobs.
    pub async fn until(
        &mut self,
        client: &mut Client,
        display: &mut Display,
        id: &str,
        wanted: impl Fn(&Job) -> bool,
    ) -> Result<Option<Job>, CallError> {
        self.refresh(client).await?;
        loop {
            if let Some(job) = self.take_ended().into_iter().find(|job| job.id == id) {
                return Ok(Some(job));
            }
            let Some(job) = self.jobs().iter().find(|job| job.id == id) else {
                return Ok(None);
            };
            // A total of one step is no measure of anything.
            if job.total > 1 && !job.has_ended() {
                display.progress(&figures(job), Instant::now());
            }
            if job.has_ended() || wanted(job) {
                return Ok(Some(job.clone()));
            }
            self.news(client).await?;
        }
    }
}

/// How a job has ended.
pub fn outcome(job: &Job) -> Outcome {
    match &job.error {
        // Its error says no more than that.
        _ if job.cancelled => Outcome::Cancelled,
        Some(error) => Outcome::failed(error),
        None => Outcome::Completed,
    }
}

/// An end, for a display.
pub fn ended(job: &Job) -> Ended<'_> {
    Ended {
        id: &job.id,
        outcome: outcome(job),
        bytes: job.current,
        took: job.took(),
        facts: Vec::new(),
    }
}

fn figures(job: &Job) -> Figures<'_> {
    Figures {
        id: &job.id,
        status: &job.status,
        current_bytes: job.current,
        total_bytes: job.total,
    }
}
