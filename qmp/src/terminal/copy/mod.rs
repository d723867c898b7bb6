//! `blockyard backup` and `blockyard mirror`: one image or device copied, without a daemon.
//!
//! ```text
//!   look at both files -> lock SRC -> make or empty DST -> lock DST -> job -> exact length, sync -> verify
//! ```
//! Nothing changes before SRC is known to be readable and not in use. DST is removed again only if this command made it.

pub(crate) mod arguments;
pub(crate) mod ends;
pub(crate) mod job;
pub(crate) mod verify;

use std::time::Instant;

use serde_json::json;

use crate::error::reason;
use crate::size;
use crate::terminal::copy::arguments::{CopyArguments, CopyKind, Preallocation};
use crate::terminal::copy::ends::{Source, Target, shown};
use crate::terminal::copy::job::{Copied, CopyOptions, add_source, add_target, copy_across};
use crate::terminal::copy::verify::{Compared, compare};
use crate::terminal::display::{Display, Ended, Fact, Outcome};
use crate::terminal::embedded::{Embedded, with_engine};
use crate::terminal::exit::Exit;

/// Runs `backup` or `mirror`.
pub(crate) fn run(kind: CopyKind, arguments: &CopyArguments) -> Exit {
    let display = Display::new(arguments.display);
    if let Err(text) = arguments.check() {
        display.error(&text);
        return Exit::Usage;
    }
    let started = Instant::now();
    let copied = with_engine(arguments.engine, display, async |mut embedded| {
        let copied = copy(&mut embedded, kind, arguments).await;
        (copied, embedded.display)
    });
    let (copied, mut display) = match copied {
        Ok(ended) => ended,
        Err((text, display)) => (Copied::refused(text), display),
    };
    let exit = copied.outcome.exit();
    let paths = [("source", &arguments.source), ("target", &arguments.target)];
    let paths = paths.map(|(key, path)| Fact {
        key,
        value: json!(path.to_string_lossy()),
        text: String::new(),
    });
    display.ended(&Ended {
        id: kind.name(),
        outcome: copied.outcome,
        bytes: copied.bytes,
        took: Some(copied.took.unwrap_or_else(|| started.elapsed())),
        facts: copied.facts.into_iter().chain(paths).collect(),
    });
    exit
}

async fn copy(embedded: &mut Embedded, kind: CopyKind, arguments: &CopyArguments) -> Copied {
    let source = match look_at_source(arguments) {
        Ok(source) => source,
        Err(text) => return Copied::refused(text),
    };
    if let Err(text) = add_source(embedded, &source).await {
        return Copied::refused(text);
    }
    let target = match Target::claim(&arguments.target, arguments.force, Some(&source)) {
        Ok(target) => target,
        Err(text) => return Copied::refused(text),
    };
    if target.is_device && arguments.preallocation != Preallocation::Off {
        return Copied::refused("--preallocation is for files, a device has all its room");
    }
    let mut copied = copy_onto(
        embedded,
        &arguments.options(kind),
        arguments.verify,
        &source,
        &target,
    )
    .await;
    if copied.outcome != Outcome::Completed {
        copied.clean_up(&target, arguments.keep_partial);
    }
    copied
}

async fn copy_onto(
    embedded: &mut Embedded,
    options: &CopyOptions,
    verifies: bool,
    source: &Source,
    target: &Target,
) -> Copied {
    if target.is_device && target.device_bytes != source.size_bytes() {
        embedded.display.note(&format!(
            "{} is longer than {}; what is behind the copy stays as it is",
            shown(&target.path),
            shown(&source.path)
        ));
    }
    if let Err(copied) = add_target(embedded, options, source, target).await {
        return copied;
    }
    let mut copied = copy_across(embedded, options, source, target).await;
    if copied.outcome != Outcome::Completed {
        // A source that was cut short fails to read, and this says more than that it did.
        if copied.outcome != Outcome::Cancelled
            && let Err(text) = source.was_modified()
        {
            copied.outcome = Outcome::failed(text);
        }
        return copied;
    }
    if let Some(allocated) = target.allocated_bytes() {
        let text = format!("{} on disk", size::shown(allocated));
        copied.tell("allocated-bytes", allocated, text);
    }
    if verifies {
        verify(embedded, source, target, &mut copied);
    }
    match source.was_modified() {
        Ok(false) => {}
        Ok(true) => embedded.display.note(&format!(
            "{} was written to while it was copied; the copy may hold a mixture of old and new",
            shown(&source.path)
        )),
        Err(text) => copied.outcome = Outcome::failed(text),
    }
    copied
}

fn look_at_source(arguments: &CopyArguments) -> Result<Source, String> {
    let source = Source::open(&arguments.source)?;
    if arguments.source_format.is_none()
        && let Some(format) = source.looks_like()?
    {
        return Err(format!(
            "{} looks like a {format} image, which is not a raw disk; say --source-format raw to copy \
             the file byte for byte",
            shown(&source.path)
        ));
    }
    Ok(source)
}

/// Compares both sides; the outcome is another one if they differ.
fn verify(embedded: &mut Embedded, source: &Source, target: &Target, copied: &mut Copied) {
    let (display, interrupt) = (&mut embedded.display, &embedded.interrupt);
    let compared = compare(
        &source.file,
        &target.file,
        source.length_bytes,
        |done_bytes| {
            display.phase("verify", done_bytes, source.length_bytes);
            !interrupt.is_asked()
        },
    );
    embedded.display.forget("verify");
    let outcome = match compared {
        Ok(Compared::Equal) => {
            copied.tell("verified", true, "verified".to_owned());
            return;
        }
        Ok(Compared::Stopped) => Outcome::Cancelled,
        Ok(Compared::DiffersAt(offset)) => Outcome::Failed {
            error: format!(
                "{} differs from {}",
                shown(&target.path),
                shown(&source.path)
            ),
            failed_at: Some(format!("first at byte {offset}")),
        },
        Err(unreadable) => {
            let path = if unreadable.is_source {
                &source.path
            } else {
                &target.path
            };
            Outcome::Failed {
                error: format!("cannot read {}: {}", shown(path), reason(&unreadable.error)),
                failed_at: Some(format!("at byte {} or behind it", unreadable.offset)),
            }
        }
    };
    copied.outcome = outcome;
    copied.tell("verified", false, String::new());
}
