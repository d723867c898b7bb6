//! `blockyard compare`: whether two images hold the same disk.

use std::path::PathBuf;
use std::process::ExitCode;

use blockyard_engine::images::{CompareSpec, CompareView, Difference, ImageReply, ImageWork};
use blockyard_engine::request::NamedBy;
use clap::Args;

use crate::terminal::check::arguments::Format;
use crate::terminal::copy::ends::shown;
use crate::terminal::display::{Display, DisplayArguments};
use crate::terminal::embedded::{Embedded, EngineArguments, with_engine};
use crate::terminal::exit::Exit;
use crate::terminal::images::{Disk, sharing};

const ONE: &str = "first";
const OTHER: &str = "second";

/// They differ, or the command line is wrong.
const DIFFERENT: u8 = 1;
/// One of them cannot be opened.
const NOT_OPENED: u8 = 2;
/// One of them cannot tell what it holds.
const NOT_ASKED: u8 = 3;
/// One of them cannot be read.
const NOT_READ: u8 = 4;

/// What the exit codes mean, for `--help`.
pub(crate) const EXIT_CODES: [(u8, &str); 6] = [
    (0, "the images are identical"),
    (
        DIFFERENT,
        "the images differ. Also for a wrong command line",
    ),
    (NOT_OPENED, "an image cannot be opened"),
    (NOT_ASKED, "an image cannot tell where it holds data"),
    (NOT_READ, "an image cannot be read"),
    (130, "cancelled by Ctrl-C, SIGTERM or SIGHUP"),
];

/// Arguments of `compare`.
#[derive(Args, Debug)]
pub struct CompareArguments {
    /// The one image
    #[arg(value_name = "FILE1")]
    one: PathBuf,
    /// The other image
    #[arg(value_name = "FILE2")]
    other: PathBuf,
    /// Format of FILE1. Must be given if FILE1 looks like another one than raw; it is never guessed
    #[arg(
        long = "a-format",
        short = 'f',
        alias = "format",
        value_enum,
        value_name = "FORMAT"
    )]
    one_format: Option<Format>,
    /// Format of FILE2, in the same way
    #[arg(long = "b-format", short = 'F', value_enum, value_name = "FORMAT")]
    other_format: Option<Format>,
    /// Fail also if their lengths differ, or one holds data or zeroes where the other holds nothing
    #[arg(long, short)]
    strict: bool,
    /// Print errors only
    #[arg(long, short)]
    quiet: bool,
    /// Read images although somebody may be writing to them. They may change meanwhile
    #[arg(long, short = 'U')]
    force_share: bool,
    #[command(flatten)]
    engine: EngineArguments,
}

/// Why there is no result.
enum Stopped {
    NotOpened(String),
    Failed(String),
    Cancelled,
}

/// Runs `compare`.
pub(crate) fn run(arguments: &CompareArguments) -> ExitCode {
    let display = Display::new(DisplayArguments {
        json: false,
        quiet: arguments.quiet,
    });
    let compared = with_engine(arguments.engine, display, async |mut embedded| {
        let compared = compare(&mut embedded, arguments).await;
        (compared, embedded.display)
    });
    let (compared, display) =
        compared.unwrap_or_else(|(text, display)| (Err(Stopped::NotOpened(text)), display));
    finish(arguments, compared, &display).into()
}

async fn compare(
    embedded: &mut Embedded,
    arguments: &CompareArguments,
) -> Result<CompareView, Stopped> {
    let disk = |node, path, format, option| Disk {
        node,
        path,
        format,
        option,
        read_only: true,
        sharing: sharing(arguments.force_share),
        named_by: NamedBy::Client,
    };
    for disk in [
        disk(ONE, &arguments.one, arguments.one_format, "-f"),
        disk(OTHER, &arguments.other, arguments.other_format, "-F"),
    ] {
        disk.open(embedded).await.map_err(Stopped::NotOpened)?;
    }
    let work = ImageWork::Compare(CompareSpec {
        other: OTHER.to_owned(),
        strict: arguments.strict,
    });
    match embedded
        .work_on_image("compare", ONE, work, |_, _| ())
        .await
    {
        Ok(ImageReply::Compared(view)) => Ok(view),
        Ok(_) => Err(Stopped::Failed("another reply (bug)".to_owned())),
        Err(_) if embedded.interrupt.is_asked() => Err(Stopped::Cancelled),
        Err(error) => Err(Stopped::Failed(error.text)),
    }
}

/// Prints what it came to, in the words of qemu-img. Returns the exit code.
fn finish(
    arguments: &CompareArguments,
    compared: Result<CompareView, Stopped>,
    display: &Display,
) -> u8 {
    let say = |text: &str| {
        if !arguments.quiet {
            display.result(text);
        }
    };
    let view = match compared {
        Ok(view) => view,
        Err(Stopped::NotOpened(text) | Stopped::Failed(text)) => {
            display.error(&text);
            return NOT_OPENED;
        }
        Err(Stopped::Cancelled) => {
            display.error("compare cancelled");
            return Exit::Cancelled.code();
        }
    };
    if passed_the_shorter_end(&view) {
        say("Warning: Image size mismatch!");
    }
    match view.difference {
        None => {
            say("Images are identical.");
            return 0;
        }
        Some(Difference::Length) => say("Strict mode: Image size mismatch!"),
        Some(Difference::Allocation { offset }) => {
            say(&format!(
                "Strict mode: Offset {offset} block status mismatch!"
            ));
        }
        Some(Difference::Content { offset }) => {
            say(&format!("Content mismatch at offset {offset}!"));
        }
        Some(Difference::Unreadable {
            first,
            reading,
            offset,
            reason,
        }) => {
            let path = shown(if first {
                &arguments.one
            } else {
                &arguments.other
            });
            let (what, code) = match reading {
                true => (
                    format!("Error while reading offset {offset} of {path}: {reason}"),
                    NOT_READ,
                ),
                false => (
                    format!("cannot find out what {path} holds at offset {offset}: {reason}"),
                    NOT_ASKED,
                ),
            };
            display.error(&what);
            return code;
        }
    }
    DIFFERENT
}

/// Whether everything up to the end of the shorter one is the same, and the other one goes on.
fn passed_the_shorter_end(view: &CompareView) -> bool {
    let [one, two] = view.lengths_bytes;
    let passed = match view.difference {
        None => true,
        Some(Difference::Content { offset } | Difference::Unreadable { offset, .. }) => {
            offset >= one.min(two)
        }
        Some(Difference::Length | Difference::Allocation { .. }) => false,
    };
    passed && one != two
}
