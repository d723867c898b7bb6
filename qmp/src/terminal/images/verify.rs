//! `blockyard verify`: whether an image still holds what a checksum manifest says.

use std::path::PathBuf;
use std::process::ExitCode;

use blockyard_engine::images::{ImageEvent, ImageReply, ImageWork, VerifySpec, VerifyView};
use blockyard_engine::request::NamedBy;
use clap::Args;

use crate::terminal::check::arguments::{Format, Output};
use crate::terminal::copy::ends::shown;
use crate::terminal::display::{Display, DisplayArguments};
use crate::terminal::embedded::{Embedded, EngineArguments, with_engine};
use crate::terminal::exit::Exit;
use crate::terminal::images::{Disk, sharing};

const TARGET: &str = "target";
const MANIFEST: &str = "manifest";

/// Some of it differs.
const DIFFERENT: u8 = 1;
/// Nobody can tell: the command line is wrong, something cannot be opened or read, or the manifest is damaged.
const UNKNOWN: u8 = 2;

/// What the exit codes mean, for `--help`.
pub(crate) const EXIT_CODES: [(u8, &str); 4] = [
    (0, "the image holds what the manifest says"),
    (DIFFERENT, "it does not; what differs is printed"),
    (
        UNKNOWN,
        "a wrong command line, a damaged manifest, or something cannot be opened or read",
    ),
    (130, "cancelled by Ctrl-C, SIGTERM or SIGHUP"),
];

/// Arguments of `verify`.
#[derive(Args, Debug)]
pub struct VerifyArguments {
    /// The image to look at
    #[arg(value_name = "TARGET")]
    target: PathBuf,
    /// What --manifest of backup or mirror, or x-manifest of a daemon's job, has written
    #[arg(value_name = "MANIFEST")]
    manifest: PathBuf,
    /// Format of TARGET. Must be given if TARGET looks like another one than raw; it is never guessed
    #[arg(long, short, value_enum, value_name = "FORMAT")]
    format: Option<Format>,
    /// What is printed
    #[arg(long, value_enum, value_name = "FORM", default_value_t = Output::Human)]
    output: Output,
    /// The same as --output json
    #[arg(long)]
    json: bool,
    /// Print errors only
    #[arg(long, short)]
    quiet: bool,
    /// Read TARGET although somebody may be writing to it
    #[arg(long, short = 'U')]
    force_share: bool,
    #[command(flatten)]
    engine: EngineArguments,
}

impl VerifyArguments {
    fn is_json(&self) -> bool {
        self.json || self.output == Output::Json
    }
}

/// Why there is no result.
enum Stopped {
    Failed(String),
    Cancelled,
}

/// Runs `verify`.
pub(crate) fn run(arguments: &VerifyArguments) -> ExitCode {
    let display = Display::new(DisplayArguments {
        json: false,
        quiet: arguments.quiet || arguments.is_json(),
    });
    let verified = with_engine(arguments.engine, display, async |mut embedded| {
        let verified = verify(&mut embedded, arguments).await;
        (verified, embedded.display)
    });
    let (verified, display) =
        verified.unwrap_or_else(|(text, display)| (Err(Stopped::Failed(text)), display));
    finish(arguments, verified, &display).into()
}

async fn verify(
    embedded: &mut Embedded,
    arguments: &VerifyArguments,
) -> Result<VerifyView, Stopped> {
    let disk = |node, path, format, sharing| Disk {
        node,
        path,
        format,
        option: "-f",
        read_only: true,
        sharing,
        named_by: NamedBy::Client,
    };
    let share = sharing(arguments.force_share);
    let target = disk(TARGET, &arguments.target, arguments.format, share);
    target.open(embedded).await.map_err(Stopped::Failed)?;
    let manifest = disk(
        MANIFEST,
        &arguments.manifest,
        Some(Format::Raw),
        sharing(false),
    );
    manifest.open(embedded).await.map_err(Stopped::Failed)?;
    let work = ImageWork::Verify(VerifySpec {
        manifest: MANIFEST.to_owned(),
    });
    let (is_json, quiet) = (arguments.is_json(), arguments.quiet);
    // An array bit by bit: each run is printed once it is known that another one follows.
    let (mut last, mut begun): (Option<String>, bool) = (None, false);
    let done = embedded.work_on_image("verify", TARGET, work, |display, event| {
        let ImageEvent::Differs(run) = event else {
            return;
        };
        let (start, length) = (run.offset(), run.length());
        if is_json {
            let run = format!(r#"{{ "start": {start}, "length": {length}}}"#);
            if let Some(last) = last.replace(run) {
                display.result(&format!("{}{last},", if begun { "" } else { "[" }));
                begun = true;
            }
        } else if !quiet {
            display.result(&format!("Differs: {length} bytes at offset {start}"));
        }
    });
    let done = done.await;
    match done {
        Ok(ImageReply::Verified(view)) => {
            if is_json {
                let front = if begun { "" } else { "[" };
                let last = last.unwrap_or_default();
                embedded.display.result(&format!("{front}{last}]"));
            }
            Ok(view)
        }
        Ok(_) => Err(Stopped::Failed("another reply (bug)".to_owned())),
        Err(_) if embedded.interrupt.is_asked() => Err(Stopped::Cancelled),
        Err(error) => Err(Stopped::Failed(error.text)),
    }
}

/// Prints what it came to. Returns the exit code.
fn finish(
    arguments: &VerifyArguments,
    verified: Result<VerifyView, Stopped>,
    display: &Display,
) -> u8 {
    let view = match verified {
        Ok(view) => view,
        Err(Stopped::Failed(text)) => {
            display.error(&text);
            return UNKNOWN;
        }
        Err(Stopped::Cancelled) => {
            display.error("verify cancelled");
            return Exit::Cancelled.code();
        }
    };
    let (target, is_silent) = (
        shown(&arguments.target),
        arguments.quiet || arguments.is_json(),
    );
    if view.disk_bytes > view.manifest_bytes && !is_silent {
        display.result(&format!(
            "{target} is longer than what the manifest tells of; what is behind byte {} was not looked at",
            view.manifest_bytes
        ));
    }
    match view.differing_bytes {
        0 => {
            if !is_silent {
                display.result(&format!("{target} holds what the manifest says."));
            }
            0
        }
        bytes => {
            if !is_silent {
                display.result(&format!(
                    "{target} differs in {bytes} bytes, in whole extents."
                ));
            }
            DIFFERENT
        }
    }
}
