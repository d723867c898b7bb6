//! [`JobTable`]: what a client knows of a daemon's jobs, from queries and from events. No I/O but the queries.

use std::collections::HashSet;
use std::time::Duration;

use serde_json::{Map, Value};

use crate::client::connection::{Client, Event};
use crate::client::error::CallError;

/// One job, as of the last query or event.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Job {
    /// Its id.
    pub id: String,
    /// `backup`, `mirror`, ...; empty until a query has told.
    pub job_type: String,
    /// QEMU's name of its status.
    pub status: String,
    /// Progress in the job's own unit, which is bytes for all but QEMU's creation of images.
    pub current: u64,
    /// What `current` will be at the end, as far as is known now.
    pub total: u64,
    /// Limit in bytes per second, 0 for none; `None` for jobs that have no such thing.
    pub speed: Option<u64>,
    /// Why it failed.
    pub error: Option<String>,
    /// It has ended by being cancelled.
    pub cancelled: bool,
    /// It stays pending until somebody finalizes it.
    finalized_by_hand: bool,
    /// When it was created, by the daemon's clock, if that was seen.
    created: Option<Duration>,
    /// When its status last changed.
    changed: Option<Duration>,
    /// Its end is in [`JobTable::take_ended`], or was.
    told: bool,
}

impl Job {
    /// Whether it has ended, and everything is known about how.
    pub fn has_ended(&self) -> bool {
        self.told
    }

    /// Whether it goes no further before it is told to.
    pub fn waits_for_orders(&self) -> bool {
        match self.status.as_str() {
            "ready" | "standby" => true,
            "pending" => self.finalized_by_hand,
            _ => false,
        }
    }

    /// From its creation to the last change of its status, if both were seen.
    pub fn took(&self) -> Option<Duration> {
        self.changed?.checked_sub(self.created?)
    }

    fn figures(&mut self, answer: &Value, [current, total]: [&str; 2]) {
        self.current = answer[current].as_u64().unwrap_or(self.current);
        self.total = answer[total].as_u64().unwrap_or(self.total);
        if let Some(job_type) = answer["type"].as_str() {
            self.job_type = job_type.to_owned();
        }
        if let Some(error) = answer["error"].as_str() {
            self.error = Some(error.to_owned());
        }
    }
}

/// All jobs, in the order of their first appearance.
#[derive(Debug, Default)]
pub struct JobTable {
    jobs: Vec<Job>,
    ended: Vec<Job>,
}

impl JobTable {
    /// Every job that exists.
    pub fn jobs(&self) -> &[Job] {
        &self.jobs
    }

    /// Jobs that have ended since this was last asked; each is given out once, whether it is dismissed later or not.
    pub fn take_ended(&mut self) -> Vec<Job> {
        std::mem::take(&mut self.ended)
    }

    /// Asks the daemon, and takes events that came before its answers.
    ///
    /// # Errors
    /// The daemon's refusal, or the end of the connection.
    ///
    /// # Cancel safety
    /// Nothing has been taken when the future is dropped.
    pub async fn refresh(&mut self, client: &mut Client) -> Result<(), CallError> {
        let block_jobs = client.execute("query-block-jobs", Map::new()).await?;
        let jobs = client.execute("query-jobs", Map::new()).await?;
        let mut overtaken = HashSet::new();
        while let Some(event) = client.kept_event() {
            overtaken.extend(self.take(&event));
        }
        self.answer(&jobs, &block_jobs, &overtaken);
        Ok(())
    }

    /// Takes an event. That a job has concluded needs a [`refresh`](Self::refresh) to be complete: only queries tell errors
    /// of all jobs. Returns the id of the job, if it is about one.
    pub fn take(&mut self, event: &Event) -> Option<String> {
        let data = &event.data;
        let id = data["id"].as_str().or(data["device"].as_str())?;
        match event.name.as_str() {
            "JOB_STATUS_CHANGE" => match data["status"].as_str() {
                Some("null") => {
                    self.entry(id).changed = event.time;
                    self.remove(id);
                }
                Some("created") => {
                    // The id was another job's.
                    self.remove(id);
                    let job = self.entry(id);
                    "created".clone_into(&mut job.status);
                    (job.created, job.changed) = (event.time, event.time);
                }
                Some(status) => {
                    let job = self.entry(id);
                    status.clone_into(&mut job.status);
                    job.changed = event.time;
                }
                None => {}
            },
            "BLOCK_JOB_COMPLETED" | "BLOCK_JOB_CANCELLED" | "BLOCK_JOB_READY" => {
                let job = self.entry(id);
                job.figures(data, ["offset", "len"]);
                job.cancelled |= event.name == "BLOCK_JOB_CANCELLED";
            }
            _ => return None,
        }
        Some(id.to_owned())
    }

    /// Takes the results of both queries. A daemon with more than one thread may answer before an event is raised, and send
    /// the answer after it: what they say of jobs with events meanwhile is left to the next query.
    fn answer(&mut self, jobs: &Value, block_jobs: &Value, overtaken: &HashSet<String>) {
        let jobs = jobs.as_array().map(Vec::as_slice).unwrap_or_default();
        let block_jobs = block_jobs.as_array().map(Vec::as_slice).unwrap_or_default();
        let listed = |id: &str| jobs.iter().any(|answer| answer["id"] == id);
        let known: Vec<String> = self.jobs.iter().map(|job| job.id.clone()).collect();
        for id in known.iter().filter(|id| !overtaken.contains(*id)) {
            if !listed(id) {
                self.remove(id);
            }
        }
        for answer in jobs {
            let Some(id) = answer["id"].as_str().filter(|id| !overtaken.contains(*id)) else {
                continue;
            };
            let job = self.entry(id);
            job.status = answer["status"].as_str().unwrap_or_default().to_owned();
            job.figures(answer, ["current-progress", "total-progress"]);
            if let Some(block_job) = block_jobs.iter().find(|job| job["device"] == id) {
                job.speed = block_job["speed"].as_u64();
                job.finalized_by_hand = block_job["auto-finalize"] == false;
            }
            if job.status == "concluded" && !job.told {
                job.told = true;
                let ended = job.clone();
                self.ended.push(ended);
            }
        }
    }

    fn remove(&mut self, id: &str) {
        if let Some(place) = self.jobs.iter().position(|job| job.id == id) {
            let mut job = self.jobs.remove(place);
            if !job.told {
                job.told = true;
                self.ended.push(job);
            }
        }
    }

    fn entry(&mut self, id: &str) -> &mut Job {
        let place = self.jobs.iter().position(|job| job.id == id);
        let place = place.unwrap_or_else(|| {
            self.jobs.push(Job {
                id: id.to_owned(),
                ..Job::default()
            });
            self.jobs.len() - 1
        });
        &mut self.jobs[place]
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(name: &str, data: Value) -> Event {
        Event {
            name: name.to_owned(),
            message: json!({"event": name, "data": data}),
            data,
            time: None,
        }
    }

    fn status(id: &str, status: &str) -> Event {
        event("JOB_STATUS_CHANGE", json!({"id": id, "status": status}))
    }

    fn listed(id: &str, status: &str, error: Option<&str>) -> Value {
        let mut job = json!({"id": id, "type": "backup", "status": status,
            "current-progress": 10, "total-progress": 100});
        if let Some(error) = error {
            job["error"] = json!(error);
        }
        json!([job])
    }

    fn answer(table: &mut JobTable, jobs: &Value, block_jobs: &Value) {
        table.answer(jobs, block_jobs, &HashSet::new());
    }

    #[test]
    fn an_answer_that_was_overtaken_is_not_believed() {
        let mut table = JobTable::default();
        answer(&mut table, &listed("a", "running", None), &json!([]));
        let overtaken = table.take(&status("a", "null")).into_iter().collect();
        assert_eq!(table.take_ended().len(), 1);
        table.answer(&listed("a", "concluded", None), &json!([]), &overtaken);
        assert_eq!((table.take_ended(), table.jobs()), (vec![], &[][..]));
        let overtaken = table.take(&status("a", "created")).into_iter().collect();
        table.answer(&json!([]), &json!([]), &overtaken);
        assert_eq!(table.jobs().len(), 1);
    }

    #[test]
    fn an_end_is_seen_by_event_or_by_absence() {
        let mut table = JobTable::default();
        answer(
            &mut table,
            &listed("a", "running", None),
            &json!([{"device": "a", "speed": 5}]),
        );
        assert_eq!(table.jobs()[0].speed, Some(5));
        table.take(&status("b", "created"));
        table.take(&event(
            "BLOCK_JOB_COMPLETED",
            json!({"type": "mirror", "device": "b", "len": 7, "offset": 3, "speed": 0, "error": "no"}),
        ));
        table.take(&status("b", "null"));
        let ended = table.take_ended();
        assert_eq!(ended.len(), 1);
        assert_eq!((ended[0].current, ended[0].total), (3, 7));
        assert_eq!(ended[0].error.as_deref(), Some("no"));
        answer(&mut table, &json!([]), &json!([]));
        assert_eq!(table.take_ended().len(), 1);
        assert_eq!(table.jobs(), []);
    }

    #[test]
    fn a_concluded_job_is_told_once_with_its_error() {
        let mut table = JobTable::default();
        table.take(&status("a", "concluded"));
        assert_eq!(table.take_ended(), []);
        assert!(!table.jobs()[0].has_ended(), "why is not known yet");
        answer(
            &mut table,
            &listed("a", "concluded", Some("no")),
            &json!([]),
        );
        let ended = table.take_ended();
        assert_eq!(ended.len(), 1);
        assert_eq!(ended[0].error.as_deref(), Some("no"));
        answer(
            &mut table,
            &listed("a", "concluded", Some("no")),
            &json!([]),
        );
        table.take(&status("a", "null"));
        assert_eq!(table.take_ended(), []);
    }

    #[test]
    fn a_job_takes_from_creation_to_its_last_change() {
        let mut table = JobTable::default();
        for (second, status_then) in [(5, "created"), (6, "running"), (9, "concluded")] {
            table.take(&Event {
                time: Some(Duration::from_secs(second)),
                ..status("a", status_then)
            });
        }
        assert_eq!(table.jobs()[0].took(), Some(Duration::from_secs(4)));
        table.take(&status("b", "running"));
        assert_eq!(table.jobs()[1].took(), None);
    }

    #[test]
    fn an_id_used_again_is_another_job() {
        let mut table = JobTable::default();
        answer(&mut table, &listed("a", "running", None), &json!([]));
        table.take(&status("a", "created"));
        assert_eq!(table.take_ended().len(), 1);
        assert_eq!(table.jobs()[0].current, 0);
    }
}
