//! `blockyard backup` and `blockyard mirror`: one image or device copied, without a daemon.
//!
//! ```text
//!   look at both files -> lock SRC -> make or empty DST -> lock DST -> job, which verifies -> exact length, sync
//! ```
//! Nothing changes before SRC is known to be readable and not in use. DST is removed again only if this command made it.

pub(crate) mod arguments;
pub(crate) mod ends;
mod images;
pub(crate) mod job;

use std::fs;
use std::time::Instant;

use serde_json::json;

use crate::size;
use crate::terminal::check::arguments::Format;
use crate::terminal::copy::arguments::{Asked, CopyArguments, Preallocation};
use crate::terminal::copy::ends::{Source, Target, shown};
use crate::terminal::copy::job::{Copied, CopyOptions, add_source, add_target, copy_across};
use crate::terminal::display::{Display, Ended, Fact, Outcome};
use crate::terminal::embedded::{Embedded, with_engine};
use crate::terminal::exit::Exit;

/// Runs `backup` or `mirror`.
pub(crate) fn run(asked: &Asked<'_>) -> Exit {
    let arguments = asked.copy;
    let display = Display::new(arguments.display);
    if let Err(text) = asked.check() {
        display.error(&text);
        return Exit::Usage;
    }
    let started = Instant::now();
    let copied = with_engine(arguments.engine, display, async |mut embedded| {
        let copied = match is_of_raw(asked) {
            true => copy(&mut embedded, asked).await,
            false => images::copy(&mut embedded, asked).await,
        };
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
        id: asked.kind.name(),
        outcome: copied.outcome,
        bytes: copied.bytes,
        took: Some(copied.took.unwrap_or_else(|| started.elapsed())),
        facts: copied.facts.into_iter().chain(paths).collect(),
    });
    exit
}

/// Whether no side is a qcow2 image: bytes of files are copied then.
fn is_of_raw(asked: &Asked<'_>) -> bool {
    let formats = [asked.source_format(), Some(asked.target_format())];
    !formats.contains(&Some(Format::Qcow2))
}

async fn copy(embedded: &mut Embedded, asked: &Asked<'_>) -> Copied {
    let arguments = asked.copy;
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
    let options = arguments.options(asked.kind);
    let mut copied = match check_manifest(&options, &source, &target) {
        Ok(()) => copy_onto(embedded, &options, &source, &target).await,
        Err(text) => Copied::refused(text),
    };
    if copied.outcome != Outcome::Completed {
        copied.clean_up(&target, arguments.keep_partial);
        copied.remove_manifest(&options);
    }
    copied
}

async fn copy_onto(
    embedded: &mut Embedded,
    options: &CopyOptions,
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
    let verifies = options.integrity.verify;
    check_unmodified(embedded, source, target, verifies, &mut copied);
    copied
}

/// Tells if somebody has written to a source that is only read here, which is no good if the copy `is_verified`.
fn check_unmodified(
    embedded: &Embedded,
    source: &Source,
    target: &Target,
    is_verified: bool,
    copied: &mut Copied,
) {
    match source.was_modified() {
        Ok(false) if is_verified => copied.tell("verified", true, "verified".to_owned()),
        Ok(false) => {}
        Ok(true) if is_verified => {
            copied.outcome = Outcome::failed(format!(
                "{} was written to while it was copied, so that {} may hold a mixture of old and new",
                shown(&source.path),
                shown(&target.path)
            ));
            copied.tell("verified", false, String::new());
        }
        Ok(true) => embedded.display.note(&format!(
            "{} was written to while it was copied; the copy may hold a mixture of old and new",
            shown(&source.path)
        )),
        Err(text) => copied.outcome = Outcome::failed(text),
    }
}

/// That the manifest takes no other file's place but a manifest's.
fn check_manifest(options: &CopyOptions, source: &Source, target: &Target) -> Result<(), String> {
    let Some(path) = &options.integrity.manifest else {
        return Ok(());
    };
    let Ok(facts) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !options.integrity.replaces_manifest {
        return Err(format!(
            "{} exists already; --force overwrites it",
            shown(path)
        ));
    }
    let is_either = fs::metadata(path)
        .is_ok_and(|facts| source.is_file_of(&facts) || target.is_file_of(&facts));
    match facts.is_file() && !is_either {
        true => Ok(()),
        false => Err(format!(
            "{} cannot be overwritten by a manifest",
            shown(path)
        )),
    }
}

fn look_at_source(arguments: &CopyArguments) -> Result<Source, String> {
    let source = Source::open(&arguments.source)?;
    if arguments.source_format.is_none()
        && let Some(format) = source.looks_like()?
    {
        return Err(format!(
            "{} looks like a {format} image, which is not a raw disk; say --source-format raw to copy \
             the file byte for byte{}",
            shown(&source.path),
            match format {
                "qcow2" => ", or qcow2 to copy the disk in it",
                _ => "",
            }
        ));
    }
    Ok(source)
}
