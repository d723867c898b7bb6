//! `blockyard jobs`: the jobs of a running daemon, once or as they go on, and orders for them.

use std::collections::HashMap;

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use crate::client::connection::Client;
use crate::client::error::CallError;
use crate::client::runtime;
use crate::control::table;
use crate::control::target::Target;
use crate::control::watch::{Watch, ended, outcome};
use crate::size;
use crate::terminal::display::{Display, DisplayArguments, Outcome};
use crate::terminal::exit::{Exit, after_help};

/// What `blockyard jobs` is asked.
#[derive(Args, Debug)]
#[command(after_help = after_help(EXAMPLES))]
pub struct JobsArguments {
    #[command(flatten)]
    target: Target,
    /// Follow the jobs until all have ended
    #[arg(long)]
    watch: bool,
    /// With --watch: go on when there are no jobs any more
    #[arg(long, requires = "watch")]
    follow: bool,
    #[command(flatten)]
    display: DisplayArguments,
    #[command(subcommand)]
    order: Option<Order>,
}

/// What can be done with one job.
#[derive(Debug, Subcommand)]
enum Order {
    /// Let a job rest
    Pause {
        /// The job
        id: String,
    },
    /// Let a job that rests go on
    Resume {
        /// The job
        id: String,
    },
    /// End a job early; its target is then incomplete
    Cancel {
        /// The job
        id: String,
    },
    /// End a mirror that is ready
    Complete {
        /// The job
        id: String,
    },
    /// Let a job that is pending take effect
    Finalize {
        /// The job
        id: String,
    },
    /// Remove a job that has concluded, and its error with it
    Dismiss {
        /// The job
        id: String,
    },
    /// Limit what a job moves in a second
    Speed {
        /// The job
        id: String,
        /// Bytes per second, as 500k, 100M or 1.5G; 0 for no limit
        #[arg(value_parser = limit)]
        limit: i64,
    },
}

const EXAMPLES: &str = "  blockyard jobs qmp.sock
  blockyard jobs qmp.sock --watch
  blockyard jobs qmp.sock --json | jq -r .status
  blockyard jobs qmp.sock pause backup0
  blockyard jobs qmp.sock speed backup0 100M";

impl Order {
    fn command(&self) -> (&'static str, Map<String, Value>) {
        let (command, key, id) = match self {
            Self::Pause { id } => ("job-pause", "id", id),
            Self::Resume { id } => ("job-resume", "id", id),
            Self::Cancel { id } => ("job-cancel", "id", id),
            Self::Complete { id } => ("job-complete", "id", id),
            Self::Finalize { id } => ("job-finalize", "id", id),
            Self::Dismiss { id } => ("job-dismiss", "id", id),
            Self::Speed { id, .. } => ("block-job-set-speed", "device", id),
        };
        let mut arguments = Map::from_iter([(key.to_owned(), json!(id))]);
        if let Self::Speed { limit, .. } = self {
            arguments.insert("speed".to_owned(), json!(limit));
        }
        (command, arguments)
    }
}

fn limit(text: &str) -> Result<i64, String> {
    size::parse(text)
        .and_then(|bytes| i64::try_from(bytes).ok())
        .ok_or_else(|| format!("expected {}", size::EXPECTED))
}

/// Runs the command.
pub fn run(arguments: &JobsArguments) -> Exit {
    let mut display = Display::new(arguments.display);
    let outcome = runtime::run(work(arguments, &mut display)).flatten();
    outcome.unwrap_or_else(|text| {
        display.error(&text);
        Exit::Failed
    })
}

async fn work(arguments: &JobsArguments, display: &mut Display) -> Result<Exit, String> {
    let connected = arguments.target.connect().await;
    let mut client = connected.map_err(|error| error.to_string())?;
    if let Some(order) = &arguments.order {
        let (command, arguments) = order.command();
        let done = client.execute(command, arguments).await;
        done.map_err(|error| error.to_string())?;
        return Ok(Exit::Success);
    }
    if arguments.watch {
        return watch(&mut client, display, arguments.follow).await;
    }
    let mut watch = Watch::default();
    let listed = watch.refresh(&mut client).await;
    listed.map_err(|error| error.to_string())?;
    if display.is_json() {
        for job in watch.jobs() {
            display.result(&table::value(job).to_string());
        }
    } else if watch.jobs().is_empty() {
        display.note(&format!("{}: there are no jobs", client.address()));
    } else {
        display.result(&table::text(watch.jobs()));
    }
    Ok(Exit::Success)
}

/// Follows all jobs to their end.
async fn watch(client: &mut Client, display: &mut Display, follow: bool) -> Result<Exit, String> {
    let mut watch = Watch::default();
    let mut limits = HashMap::new();
    let mut exit = Exit::Success;
    let mut first = true;
    loop {
        let news = if first {
            watch.refresh(client).await
        } else {
            watch.news(client).await
        };
        for job in watch.take_ended() {
            limits.remove(&job.id);
            if outcome(&job) != Outcome::Completed {
                exit = Exit::Failed;
            }
            display.ended(&ended(&job));
        }
        if let Err(error) = news {
            return lost(&error, &watch, exit, display);
        }
        for job in watch.jobs() {
            let Some(speed) = job.speed else { continue };
            let before = limits.insert(job.id.clone(), speed).unwrap_or(0);
            if before != speed && !display.is_json() {
                display.note(&format!("{}: limit {}", job.id, table::limit(speed)));
            }
        }
        watch.show(display);
        let over = watch.jobs().iter().all(|job| job.has_ended());
        if over && !follow {
            if first && watch.jobs().is_empty() {
                display.note(&format!("{}: there are no jobs", client.address()));
            }
            return Ok(exit);
        }
        first = false;
    }
}

/// The daemon has gone. That is an error if it has left something unfinished.
fn lost(error: &CallError, watch: &Watch, exit: Exit, display: &Display) -> Result<Exit, String> {
    let unfinished = watch.jobs().iter().filter(|job| !job.has_ended());
    let unfinished: Vec<_> = unfinished.map(|job| job.id.as_str()).collect();
    if unfinished.is_empty() {
        display.note(&error.to_string());
        return Ok(exit);
    }
    Err(format!("{error}; unfinished: {}", unfinished.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_sizes() {
        assert_eq!(limit("100M"), Ok(100 << 20));
        assert_eq!(limit("0"), Ok(0));
        assert_eq!(limit("7E"), Ok(7 << 60));
        for text in ["9E", "-1", "fast", ""] {
            assert!(limit(text).is_err(), "{text}");
        }
    }
}
