//! `blockyard qmp`: commands for a running daemon, one from the command line or any number from standard input.

use std::io::{self, IsTerminal, Write};

use clap::Args;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::client::arguments::Call;
use crate::client::connection::Client;
use crate::client::error::CallError;
use crate::client::runtime;
use crate::control::target::Target;
use crate::control::watch::{Watch, ended, outcome};
use crate::terminal::display::{Display, DisplayArguments, Outcome};
use crate::terminal::exit::{Exit, after_help};

const PROMPT: &str = "qmp> ";

/// What `blockyard qmp` is asked.
#[derive(Args, Debug)]
#[command(after_help = after_help(EXAMPLES), after_long_help = format!("{VALUES}\n{}", after_help(EXAMPLES)))]
pub struct QmpArguments {
    #[command(flatten)]
    target: Target,
    /// What to carry out; a whole QMP message in JSON will do, too
    command: Option<String>,
    /// The command's arguments: KEY=VALUE with dotted keys, or one JSON object
    #[arg(value_name = "KEY=VALUE")]
    arguments: Vec<String>,
    /// Print each result on one line
    #[arg(long)]
    compact: bool,
    /// Print events, one a line, until interrupted
    #[arg(long)]
    events: bool,
    /// Wait for the job that the command starts: until it has ended, or needs orders (ready, pending)
    #[arg(long, conflicts_with = "events")]
    wait: bool,
}

const VALUES: &str = "\
Arguments:
  A VALUE that is JSON is taken as that: 8, true, null, [1, 2], {\"a\": 1}.
  Every other VALUE is the string it is. Double quotes force a string; the
  shell needs a pair around them: node-name='\"8\"'.
  Dotted keys nest: options.size=1048576; numbers in them make lists.
  Errors are printed as the daemon gives them, class first.
  quit returns when the daemon has ended and let go of its images.
";

const EXAMPLES: &str = "  blockyard qmp qmp.sock query-jobs
  blockyard qmp qmp.sock blockdev-add driver=file node-name=disk filename=disk.raw
  blockyard qmp qmp.sock blockdev-create job-id=new \\
      options='{\"driver\": \"file\", \"filename\": \"copy.raw\", \"size\": 1048576}' --wait
  blockyard qmp qmp.sock blockdev-backup job-id=b device=disk target=copy sync=full --wait
  blockyard qmp qmp.sock '{\"execute\": \"query-version\"}'
  blockyard qmp qmp.sock                 # asks for commands
  blockyard qmp qmp.sock < script        # one command a line
  blockyard qmp localhost:4444 --events";

/// Runs the command.
pub fn run(arguments: &QmpArguments) -> Exit {
    let call = match &arguments.command {
        Some(command) => match Call::parse(command, &arguments.arguments) {
            Ok(call) => Some(call),
            Err(text) => {
                complain(&text);
                return Exit::Usage;
            }
        },
        None => None,
    };
    runtime::run(speak(arguments, call)).unwrap_or_else(|text| {
        complain(&text);
        Exit::Failed
    })
}

async fn speak(arguments: &QmpArguments, call: Option<Call>) -> Exit {
    let client = match arguments.target.connect().await {
        Ok(client) => client,
        Err(error) => {
            complain(&error.to_string());
            return Exit::Failed;
        }
    };
    let mut speaker = Speaker {
        client,
        compact: arguments.compact,
        wait: arguments.wait,
        quitting: false,
        failed: false,
    };
    let outcome = match call {
        Some(call) => speaker.single(&call, arguments.events).await,
        None => speaker.lines(arguments.events).await,
    };
    match outcome {
        // The reader of our output has left, and with it the reason to go on.
        Err(End::Unread) => {}
        Err(End::Lost(_)) if speaker.quitting => {}
        Err(End::Lost(error)) => {
            complain(&error);
            speaker.failed = true;
        }
        Ok(()) => {}
    }
    if speaker.failed {
        Exit::Failed
    } else {
        Exit::Success
    }
}

/// Why nothing further can be done.
enum End {
    /// Standard output is closed.
    Unread,
    /// The connection is.
    Lost(String),
}

impl From<io::Error> for End {
    fn from(_: io::Error) -> Self {
        Self::Unread
    }
}

struct Speaker {
    client: Client,
    compact: bool,
    wait: bool,
    /// The daemon was told to end; nobody is there for what comes behind that.
    quitting: bool,
    /// Something that was asked for was not done.
    failed: bool,
}

impl Speaker {
    async fn single(&mut self, call: &Call, events: bool) -> Result<(), End> {
        self.perform(call, "").await?;
        if !events {
            return Ok(());
        }
        loop {
            self.event().await?;
        }
    }

    /// Commands from standard input until its end; with `events` it goes on after that.
    async fn lines(&mut self, events: bool) -> Result<(), End> {
        let at_terminal = io::stdin().is_terminal();
        let talk = at_terminal && !events;
        let mut lines = BufReader::new(tokio::io::stdin()).lines();
        let mut reads = !at_terminal || talk;
        let mut number = 0_u64;
        if talk {
            self.introduce()?;
        }
        while reads || events {
            tokio::select! {
                line = lines.next_line(), if reads => match line {
                    Ok(Some(line)) => {
                        number += 1;
                        let place = if talk { String::new() } else { format!("line {number}: ") };
                        self.line(&line, &place).await?;
                        while let Some(event) = self.client.kept_event() {
                            if talk || events {
                                print(&event.message, true)?;
                            }
                        }
                        if self.quitting {
                            return Ok(());
                        }
                    }
                    Ok(None) => reads = false,
                    Err(error) => {
                        complain(&format!("standard input: {error}"));
                        self.failed = true;
                        reads = false;
                    }
                },
                event = self.client.event() => {
                    let event = event.map_err(|error| End::Lost(error.to_string()))?;
                    if talk {
                        write!(io::stdout(), "\r")?;
                    }
                    if talk || events {
                        print(&event.message, true)?;
                    }
                }
            }
            if talk && reads {
                prompt()?;
            }
        }
        if talk {
            writeln!(io::stdout())?;
        }
        Ok(())
    }

    async fn line(&mut self, line: &str, place: &str) -> Result<(), End> {
        match Call::parse_line(line) {
            Ok(Some(call)) => self.perform(&call, place).await,
            Ok(None) => Ok(()),
            Err(text) => {
                complain(&format!("{place}{text}"));
                self.failed = true;
                Ok(())
            }
        }
    }

    /// Carries out a command and prints its result; `place` stands before an error.
    async fn perform(&mut self, call: &Call, place: &str) -> Result<(), End> {
        self.quitting = call.command == "quit";
        let arguments = call.arguments.clone();
        match self.client.execute(&call.command, arguments).await {
            Ok(_) if self.wait && job_of(call).is_some() => self.wait_for_job(call, place).await,
            Ok(result) => {
                print(&result, self.compact)?;
                if self.quitting {
                    self.client.until_ended().await;
                }
                Ok(())
            }
            Err(CallError::Refused(refusal)) => {
                complain(&format!("{place}{refusal}"));
                self.failed = true;
                Ok(())
            }
            Err(CallError::Lost(error)) => {
                let command = &call.command;
                Err(End::Lost(format!(
                    "{place}{error} before it answered {command}"
                )))
            }
        }
    }

    async fn wait_for_job(&mut self, call: &Call, place: &str) -> Result<(), End> {
        let Some(id) = job_of(call) else {
            return Ok(());
        };
        let mut display = Display::new(DisplayArguments {
            json: self.compact,
            quiet: false,
        });
        let mut watch = Watch::default();
        let waited = watch.until(&mut self.client, &mut display, id, |job| {
            job.waits_for_orders()
        });
        let lost =
            |error: CallError| End::Lost(format!("{place}{error} while job '{id}' was running"));
        match waited.await.map_err(lost)? {
            Some(job) if job.has_ended() => {
                self.failed |= outcome(&job) != Outcome::Completed;
                display.ended(&ended(&job));
            }
            Some(job) => {
                display.forget(id);
                display.result(&if display.is_json() {
                    json!({"event": job.status, "id": id}).to_string()
                } else {
                    format!("{id}: {}, waits for orders", job.status)
                });
            }
            None => display.note(&format!("{place}there is no job '{id}' to wait for")),
        }
        Ok(())
    }

    async fn event(&mut self) -> Result<(), End> {
        let event = self.client.event().await;
        let event = event.map_err(|error| End::Lost(error.to_string()))?;
        Ok(print(&event.message, true)?)
    }

    fn introduce(&self) -> io::Result<()> {
        let version = &self.client.greeting()["QMP"]["version"];
        let part = |name: &str| version["qemu"][name].as_u64().unwrap_or(0);
        let mut output = io::stdout();
        writeln!(
            output,
            "Connected to {} ({}, QMP of QEMU {}.{}.{}).\n\
             COMMAND KEY=VALUE... or a QMP message; query-commands lists them; Ctrl-D ends.",
            self.client.address(),
            version["package"].as_str().unwrap_or("unknown").trim(),
            part("major"),
            part("minor"),
            part("micro"),
        )?;
        prompt()
    }
}

/// The job that a command is about.
fn job_of(call: &Call) -> Option<&str> {
    ["job-id", "id", "device"]
        .into_iter()
        .find_map(|key| call.arguments.get(key).and_then(Value::as_str))
}

fn prompt() -> io::Result<()> {
    let mut output = io::stdout();
    write!(output, "{PROMPT}")?;
    output.flush()
}

fn print(value: &Value, compact: bool) -> io::Result<()> {
    let mut output = io::stdout().lock();
    if compact {
        writeln!(output, "{value}")?;
    } else {
        writeln!(output, "{value:#}")?;
    }
    output.flush()
}

fn complain(text: &str) {
    // There is nowhere left to say that this cannot be said.
    let _ = writeln!(io::stderr(), "blockyard: {text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_job_of_a_command_is_the_most_precise_name() {
        let job = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
            let call = Call::parse("x", &words).expect("a call");
            job_of(&call).map(str::to_owned)
        };
        assert_eq!(job(&["device=d", "job-id=j"]).as_deref(), Some("j"));
        assert_eq!(job(&["device=d"]).as_deref(), Some("d"));
        assert_eq!(job(&["node-name=n"]), None);
    }
}
