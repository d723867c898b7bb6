//! [`Stage`]: what a step works with: the daemon, a display, the folder.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::client::connection::Client;
use crate::client::error::CallError;
use crate::client::jobs::Job;
use crate::control::watch::Watch;
use crate::size;
use crate::terminal::display::{Display, duration_shown};
use crate::tour::compare::{self, Equal};
use crate::tour::scratch::{IMAGE, Scratch};

/// The node of the sample image.
pub const SOURCE: &str = "disk";

/// How long something stays that passes too quickly to be seen.
const LINGER: Duration = Duration::from_secs(1);

/// Why a step did not do what it was to show.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    /// The daemon refused, or has gone.
    #[error(transparent)]
    Call(#[from] CallError),
    /// A job failed.
    #[error("job '{id}' failed: {error}")]
    Failed {
        /// The job.
        id: String,
        /// Its error.
        error: String,
    },
    /// Something is not as it should be.
    #[error("{0}")]
    Wrong(String),
}

/// What a step has shown.
#[derive(Clone, Debug)]
pub struct Shown {
    /// Bytes that its main job dealt with.
    pub bytes: u64,
    /// How long that took.
    pub took: Option<Duration>,
    /// What was found out about the result.
    pub verified: String,
}

/// The daemon, a display and a folder, for steps.
pub struct Stage<'a> {
    /// Speaks with the daemon.
    pub client: Client,
    /// For people.
    pub display: &'a mut Display,
    /// Where everything is.
    pub scratch: &'a Scratch,
    watch: Watch,
}

impl<'a> Stage<'a> {
    /// Sets up the stage.
    pub fn new(client: Client, display: &'a mut Display, scratch: &'a Scratch) -> Self {
        Self {
            client,
            display,
            scratch,
            watch: Watch::default(),
        }
    }

    /// Tells what happens now.
    pub fn say(&mut self, text: &str) {
        self.display.result(&format!("  {text}"));
        if let Some(transcript) = self.client.transcript() {
            transcript.remark(text);
        }
    }

    /// Lets a person look at what the display shows now; programs need no time for that.
    pub async fn linger(&self) {
        if std::io::stderr().is_terminal() {
            tokio::time::sleep(LINGER).await;
        }
    }

    /// Carries out a command, in sight of the user.
    ///
    /// # Errors
    /// The daemon's refusal, or its end.
    pub async fn run(&mut self, command: &str, arguments: Value) -> Result<Value, Trouble> {
        let arguments = match arguments {
            Value::Object(arguments) => arguments,
            _ => Map::new(),
        };
        self.display
            .result(&format!("  -> {}", typed(command, &arguments)));
        Ok(self.client.execute(command, arguments).await?)
    }

    /// Shows a job until it is as wanted, or has ended well.
    ///
    /// # Errors
    /// It failed, there is none, or the daemon has gone.
    pub async fn until(&mut self, id: &str, wanted: impl Fn(&Job) -> bool) -> Result<Job, Trouble> {
        let reached = self
            .watch
            .until(&mut self.client, self.display, id, wanted)
            .await?;
        let job = reached.ok_or_else(|| Trouble::Wrong(format!("there is no job '{id}'")))?;
        match &job.error {
            Some(error) => Err(Trouble::Failed {
                id: id.to_owned(),
                error: error.clone(),
            }),
            None => Ok(job),
        }
    }

    /// Shows a job until it has ended well, and tells what it did.
    ///
    /// # Errors
    /// It failed, there is none, or the daemon has gone.
    pub async fn finish(&mut self, id: &str) -> Result<Job, Trouble> {
        let job = self.until(id, Job::has_ended).await?;
        self.display.forget(id);
        if job.cancelled {
            return Err(Trouble::Wrong(format!("job '{id}' was cancelled")));
        }
        let took = job
            .took()
            .map(|took| format!(" in {}", duration_shown(took)));
        let took = took.unwrap_or_default();
        self.say(&format!("{id}: {}{took}", size::shown(job.current)));
        Ok(job)
    }

    /// Creates an image of the sample's length by a job, and opens it as a node of its own name.
    ///
    /// # Errors
    /// The daemon's refusal, the job's failure, or the daemon's end.
    pub async fn target(&mut self, name: &str, bytes: u64) -> Result<PathBuf, Trouble> {
        let file = format!("{name}.raw");
        self.create(json!({"driver": "file", "filename": file, "size": bytes}))
            .await?;
        self.run(
            "blockdev-add",
            json!({"driver": "file", "node-name": name, "filename": file}),
        )
        .await?;
        Ok(self.scratch.path(&file))
    }

    /// Creates a file or an image by a job.
    ///
    /// # Errors
    /// The daemon's refusal, the job's failure, or the daemon's end.
    pub async fn create(&mut self, options: Value) -> Result<(), Trouble> {
        let arguments = json!({"job-id": "create", "options": options});
        self.run("blockdev-create", arguments).await?;
        self.until("create", Job::has_ended).await?;
        self.display.forget("create");
        self.run("job-dismiss", json!({"id": "create"})).await?;
        Ok(())
    }

    /// Closes a copy and compares it with the sample.
    ///
    /// # Errors
    /// They differ, or the daemon refuses.
    pub async fn verify_copy(&mut self, node: &str, copy: PathBuf) -> Result<String, Trouble> {
        self.run("blockdev-del", json!({"node-name": node})).await?;
        let source = self.scratch.path(IMAGE);
        let Equal {
            length_bytes,
            stored_bytes,
        } = self.check(move || compare::copies(&source, &copy)).await?;
        Ok(format!(
            "{} equal, {} of them stored, holes kept",
            size::shown(length_bytes),
            size::shown(stored_bytes)
        ))
    }

    /// Reads files, on a thread where that holds nobody up.
    ///
    /// # Errors
    /// What `check` finds.
    pub async fn check<T: Send + 'static>(
        &mut self,
        check: impl FnOnce() -> Result<T, String> + Send + 'static,
    ) -> Result<T, Trouble> {
        let checked = tokio::task::spawn_blocking(check).await;
        checked
            .map_err(|error| Trouble::Wrong(error.to_string()))?
            .map_err(Trouble::Wrong)
    }
}

/// A command as it can be typed behind `blockyard qmp SOCKET`.
fn typed(command: &str, arguments: &Map<String, Value>) -> String {
    let mut text = command.to_owned();
    for (key, value) in arguments {
        flatten(&mut text, key, value);
    }
    text
}

fn flatten(text: &mut String, key: &str, value: &Value) {
    match value {
        Value::Object(members) => {
            for (member, value) in members {
                flatten(text, &format!("{key}.{member}"), value);
            }
        }
        Value::String(string) => *text += &format!(" {key}={string}"),
        other => *text += &format!(" {key}={other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::arguments::Call;

    #[test]
    fn what_is_shown_can_be_typed() {
        let arguments =
            json!({"job-id": "c", "options": {"driver": "file", "size": 8}, "on": true});
        let Value::Object(arguments) = arguments else {
            panic!("an object")
        };
        let line = typed("x", &arguments);
        assert_eq!(
            line,
            "x job-id=c options.driver=file options.size=8 on=true"
        );
        let call = Call::parse_line(&line).expect("read").expect("a command");
        assert_eq!(call.arguments, arguments);
    }
}
