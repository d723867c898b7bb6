//! `blockyard check`: one image checked, and repaired if wanted, with the output and exit codes of `qemu-img check`.

pub(crate) mod arguments;
pub(crate) mod report;

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::process::ExitCode;

use blockyard_engine::error::EngineError;
use blockyard_engine::images::{
    CheckSpec, CheckView, FindingView, ImageEvent, ImageReply, ImageWork,
};
use blockyard_engine::request::{Discard, NamedBy};

use crate::terminal::check::arguments::{CheckArguments, Format};
use crate::terminal::check::report::{human, json, repaired};
use crate::terminal::copy::ends::cannot_use;
use crate::terminal::display::{Display, DisplayArguments};
use crate::terminal::embedded::{
    Cache, CameTo, Embedded, EngineArguments, ImageFile, Sharing, with_engine,
};
use crate::terminal::exit::Exit;

/// Name of the node that the image's file is on.
const NODE: &str = "image";

/// Corruptions are left.
const CORRUPT: u8 = 2;
/// Only leaked clusters are left.
const LEAKS: u8 = 3;
/// Images of this format have nothing to check.
const UNSUPPORTED: u8 = 63;

/// What the exit codes mean, for `--help`.
pub(crate) const EXIT_CODES: [(u8, &str); 6] = [
    (0, "nothing is wrong, or all of it was repaired"),
    (
        1,
        "the check failed; a message says why. Also for a wrong command line",
    ),
    (
        CORRUPT,
        "the image is corrupt: data is lost, or will be when it is written",
    ),
    (LEAKS, "clusters are leaked: room is wasted, data is safe"),
    (UNSUPPORTED, "images of this format cannot be checked"),
    (
        130,
        "cancelled by Ctrl-C, SIGTERM or SIGHUP; repairing again goes on",
    ),
];

/// How a check ended.
enum Checked {
    /// With figures.
    Done(CheckView),
    /// Without, and this is why.
    Failed(String),
    Unsupported,
    Cancelled,
}

impl CameTo for Checked {
    fn is_success(&self) -> bool {
        matches!(self, Checked::Done(_))
    }
}

/// Runs `check`.
pub(crate) fn run(arguments: &CheckArguments) -> ExitCode {
    // Progress is for people: the figures of qemu-img come in one piece.
    let display = Display::new(DisplayArguments {
        json: false,
        quiet: arguments.quiet || arguments.is_json(),
    });
    let engine = EngineArguments {
        // Tables are read twice.
        cache: Cache::Writeback,
        io_backend: arguments.io_backend,
    };
    let checked = with_engine(engine, display, async |mut embedded| {
        let checked = check(&mut embedded, arguments).await;
        (checked, embedded.display)
    });
    let (checked, display) =
        checked.unwrap_or_else(|(text, display)| (Checked::Failed(text), display));
    finish(arguments, &checked, &display).into()
}

async fn check(embedded: &mut Embedded, arguments: &CheckArguments) -> Checked {
    let shown = format!("'{}'", arguments.file.display());
    let cannot =
        |what: &str, error: EngineError| Checked::Failed(format!("cannot {what} {shown}: {error}"));
    let is_device =
        fs::metadata(&arguments.file).is_ok_and(|facts| facts.file_type().is_block_device());
    let repair = arguments.repair.map(Into::into);
    let file = ImageFile {
        name: NODE,
        path: arguments.file.clone(),
        is_device,
        read_only: repair.is_none(),
        sharing: match arguments.force_share {
            true => Sharing::Everything,
            false => Sharing::Readers,
        },
        discard: Discard::Ignore,
        named_by: NamedBy::Client,
    };
    if let Err(error) = embedded.add_image_file(&file).await {
        return Checked::Failed(cannot_use(&arguments.file, &error.to_string()));
    }
    if arguments.format == Format::Raw {
        return Checked::Unsupported;
    }
    let work = ImageWork::Check(CheckSpec { repair });
    let is_json = arguments.is_json();
    let done = embedded
        .work_on_image("check", NODE, work, |display, event| match event {
            ImageEvent::Found(findings) => {
                findings
                    .iter()
                    .for_each(|finding| display.line(&line(finding)));
            }
            ImageEvent::Repaired { corruptions, leaks } if !is_json => {
                display.result(&repaired(corruptions, leaks));
            }
            ImageEvent::Repaired { .. }
            | ImageEvent::Mapped(_)
            | ImageEvent::Dirty(_)
            | ImageEvent::Differs(_) => {}
        })
        .await;
    match done {
        Ok(ImageReply::Checked(view)) => Checked::Done(view),
        Ok(_) => cannot("check", EngineError::generic("another reply (bug)")),
        Err(_) if embedded.interrupt.is_asked() => Checked::Cancelled,
        Err(error) if repair.is_some() => cannot("repair", error),
        Err(error) => cannot("check", error),
    }
}

/// What is printed of a finding: what QEMU prints, and how often it counts.
fn line(finding: &FindingView) -> String {
    match finding.times {
        0 | 1 => finding.text.clone(),
        times => format!("{} ({times} times)", finding.text),
    }
}

/// Prints what it came to. Returns the exit code.
fn finish(arguments: &CheckArguments, checked: &Checked, display: &Display) -> u8 {
    match checked {
        Checked::Done(view) => {
            if arguments.is_json() {
                display.result(&json(view, &arguments.file));
            } else if !arguments.quiet {
                display.result(&human(view));
            }
            if view.check_errors > 0 {
                display.error("the check could not look at everything");
            }
            exit_code(view)
        }
        Checked::Failed(text) => {
            display.error(text);
            Exit::Failed.code()
        }
        Checked::Unsupported => {
            display.error("images of format raw have nothing to check");
            UNSUPPORTED
        }
        Checked::Cancelled => {
            display.error("check cancelled");
            Exit::Cancelled.code()
        }
    }
}

/// The exit code of `qemu-img check` for figures.
const fn exit_code(view: &CheckView) -> u8 {
    if view.check_errors > 0 {
        Exit::Failed.code()
    } else if view.corruptions > 0 {
        CORRUPT
    } else if view.leaks > 0 {
        LEAKS
    } else {
        Exit::Success.code()
    }
}
