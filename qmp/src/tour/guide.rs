//! The way through the tour: from the folder to the summary.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Map, json};

use crate::client::runtime;
use crate::control::table::columns;
use crate::error::reason;
use crate::signals::Signals;
use crate::size;
use crate::terminal::display::{Display, DisplayArguments, duration_shown};
use crate::terminal::exit::{Exit, after_help};
use crate::tour::daemon::{Daemon, LOG, SOCKET, TRANSCRIPT};
use crate::tour::scratch::{IMAGE, IMAGE_BYTES, Scratch};
use crate::tour::stage::{SOURCE, Shown, Stage, Trouble};
use crate::tour::steps::STEPS;

/// What `blockyard tour` is asked.
#[derive(Args, Debug)]
#[command(after_help = after_help(EXAMPLES))]
pub struct TourArguments {
    /// Work in this folder, which is empty or not there yet [default: a new one among the temporary files]
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
    /// Keep the copies, too, not only the sample image and the transcript
    #[arg(long)]
    keep: bool,
}

const EXAMPLES: &str = "  blockyard tour
  blockyard tour --directory /var/tmp/tour --keep";

/// Runs the command.
pub fn run(arguments: &TourArguments) -> Exit {
    let mut display = Display::new(DisplayArguments::default());
    let scratch = match Scratch::create(arguments.directory.as_deref()) {
        Ok(scratch) => scratch,
        Err(text) => {
            display.error(&text);
            return Exit::Failed;
        }
    };
    let outcome = runtime::run(lead(arguments, &scratch, &mut display)).flatten();
    let exit = outcome.unwrap_or_else(|text| {
        display.error(&text);
        Exit::Failed
    });
    if exit != Exit::Success {
        let shown = scratch.folder().display();
        display.error(&format!(
            "everything so far is in {shown}, see {TRANSCRIPT} and {LOG}"
        ));
    }
    exit
}

async fn lead(
    arguments: &TourArguments,
    scratch: &Scratch,
    display: &mut Display,
) -> Result<Exit, String> {
    let mut signals = Signals::new().map_err(|error| error.to_string())?;
    let folder = scratch.folder().display();
    display.result(&format!(
        "Sample image {IMAGE} ({}) in {folder}",
        size::shown(IMAGE_BYTES)
    ));
    scratch
        .write_image()
        .map_err(|error| format!("cannot write {IMAGE}: {}", reason(&error)))?;
    let (daemon, client) = tokio::select! {
        started = Daemon::start(scratch) => started?,
        () = signals.next() => return Ok(cancelled(display)),
    };
    display.result(&format!("Daemon {} on {SOCKET} there", daemon.pid()));
    let mut stage = Stage::new(client, display, scratch);
    let shown = tokio::select! {
        shown = steps(&mut stage) => shown,
        () = signals.next() => {
            let display = stage.display;
            daemon.stop().await;
            return Ok(cancelled(display));
        }
    };
    let Stage {
        client, display, ..
    } = stage;
    let ended = match &shown {
        Ok(_) => daemon.ended().await,
        Err(_) => {
            daemon.stop().await;
            Ok(())
        }
    };
    let transcript = client
        .close()
        .map_or(Ok(()), |transcript| transcript.finish());
    let rows = shown?;
    ended?;
    transcript.map_err(|error| format!("{TRANSCRIPT}: {error}"))?;
    if !arguments.keep {
        remove_copies(scratch.folder())?;
    }
    display.result("");
    display.result(&columns(&rows));
    display.result("");
    display.result(&what_next(scratch));
    Ok(Exit::Success)
}

fn cancelled(display: &Display) -> Exit {
    display.error("cancelled; the daemon has ended");
    Exit::Cancelled
}

/// Runs every step and ends the daemon; returns the rows of the summary.
async fn steps(stage: &mut Stage<'_>) -> Result<Vec<[String; 5]>, String> {
    let told = |error: Trouble| error.to_string();
    let open = json!({"driver": "file", "node-name": SOURCE, "filename": IMAGE, "read-only": true});
    stage.run("blockdev-add", open).await.map_err(told)?;
    let mut rows = vec![["STEP", "BYTES", "TIME", "RATE", "VERIFIED"].map(str::to_owned)];
    for (index, step) in STEPS.iter().enumerate() {
        let heading = format!(
            "{}/{} {}: {}",
            index + 1,
            STEPS.len(),
            step.name,
            step.about
        );
        stage.display.result("");
        stage.display.result(&heading);
        if let Some(transcript) = stage.client.transcript() {
            transcript.remark(&heading);
        }
        let shown = (step.run)(stage).await;
        let shown = shown.map_err(|error| format!("{}: {error}", step.name))?;
        stage.say(&format!("verified: {}", shown.verified));
        rows.push(row(step.name, &shown));
    }
    let quit = stage.client.execute("quit", Map::new()).await;
    quit.map_err(|error| error.to_string())?;
    Ok(rows)
}

fn row(name: &str, shown: &Shown) -> [String; 5] {
    let bytes = match shown.bytes {
        0 => "-".to_owned(),
        bytes => size::shown(bytes),
    };
    let rate = shown.took.filter(|took| !took.is_zero()).map(|took| {
        let rate = shown.bytes as f64 / took.as_secs_f64();
        format!("{}/s", size::shown(rate as u64))
    });
    let none = || "-".to_owned();
    [
        name.to_owned(),
        bytes,
        shown.took.map_or_else(none, duration_shown),
        rate.unwrap_or_else(none),
        shown.verified.clone(),
    ]
}

/// Removes every image but the sample.
fn remove_copies(folder: &Path) -> Result<(), String> {
    let told = |error: std::io::Error| format!("{}: {error}", folder.display());
    for entry in std::fs::read_dir(folder).map_err(told)? {
        let path = entry.map_err(told)?.path();
        let formats = ["raw", "qcow2"].map(OsStr::new);
        let is_image = path
            .extension()
            .is_some_and(|extension| formats.contains(&extension));
        if is_image && path.file_name() != Some(OsStr::new(IMAGE)) {
            std::fs::remove_file(&path).map_err(told)?;
        }
    }
    Ok(())
}

/// Commands that work now, in this order, with what is there.
fn what_next(scratch: &Scratch) -> String {
    let folder = quoted(scratch.folder().as_os_str());
    let alias = match path_of_program() {
        Some(path) => format!("\n  alias blockyard={}", quoted(path.as_os_str())),
        None => String::new(),
    };
    format!(
        "Every QMP message, in order:
  less {folder}/{TRANSCRIPT}
Next, a copy without a daemon, then a daemon of your own and a copy that you steer (--help tells more):
  cd {folder}{alias}
  blockyard backup --verify {IMAGE} first.raw
  blockyard daemon --blockdev file,node-name=disk,filename={IMAGE} \\
      --chardev socket,id=qmp,path={SOCKET},server=on,wait=off --monitor qmp --daemonize
  blockyard qmp {SOCKET} blockdev-create job-id=c options.driver=file \\
      options.filename=$PWD/copy.raw options.size={IMAGE_BYTES} --wait
  blockyard qmp {SOCKET} blockdev-add driver=file node-name=copy filename=$PWD/copy.raw
  blockyard qmp {SOCKET} blockdev-backup job-id=b device=disk target=copy sync=full speed=10000000
  blockyard jobs {SOCKET} --watch
  blockyard qmp {SOCKET} quit
When you have seen enough:
  rm -r {folder}"
    )
}

/// Where this program is; `None` if its name is enough.
fn path_of_program() -> Option<PathBuf> {
    let given = std::env::args_os().next().unwrap_or_default();
    let by_name = !given.as_encoded_bytes().contains(&b'/');
    std::env::current_exe().ok().filter(|_| !by_name)
}

/// A word as a shell takes it.
fn quoted(word: &OsStr) -> String {
    let text = word.to_string_lossy();
    let plain =
        |character: char| character.is_ascii_alphanumeric() || "/._-+:@%".contains(character);
    if !text.is_empty() && text.chars().all(plain) {
        return text.into_owned();
    }
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_shell() {
        assert_eq!(quoted(OsStr::new("/tmp/a-b_1.raw")), "/tmp/a-b_1.raw");
        assert_eq!(quoted(OsStr::new("a b")), "'a b'");
        assert_eq!(quoted(OsStr::new("it's")), "'it'\\''s'");
    }
}
