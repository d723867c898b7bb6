//! `blockyard rebase`: an image is put on another backing file, with the messages and exit codes of `qemu-img rebase`.

use std::path::{Path, PathBuf};

use blockyard_engine::images::{ImageReply, ImageWork, RebaseSpec, RebaseView};
use blockyard_engine::request::NamedBy;
use clap::Args;
use serde_json::{Value, json};

use crate::replies;
use crate::size;
use crate::terminal::chain::check_marks;
use crate::terminal::check::arguments::Format;
use crate::terminal::check::report::indented;
use crate::terminal::command;
use crate::terminal::copy::ends::shown;
use crate::terminal::display::{Display, DisplayArguments};
use crate::terminal::embedded::{Embedded, IoBackend, Sharing};
use crate::terminal::exit::Exit;
use crate::terminal::images::info_report::beside;
use crate::terminal::images::{Disk, could_not_open};
use crate::terminal::room;

const NODE: &str = "image";
const BACKING: &str = "backing";

/// Arguments of `rebase`.
#[derive(Args, Debug)]
pub struct RebaseArguments {
    /// Image that gets another backing file
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The new backing file, as the header is to name it: a relative name starts in the folder of FILE. An empty one: none
    #[arg(long, short, value_name = "BACKING", alias = "backing-file")]
    backing: Option<String>,
    /// Format of BACKING; it is never guessed
    #[arg(long, short = 'F', value_name = "FORMAT")]
    backing_format: Option<String>,
    /// Format of FILE; it is never guessed. Images of other formats than qcow2 have no backing file
    #[arg(long, short, value_enum, value_name = "FORMAT", default_value_t = Format::Qcow2)]
    format: Format,
    /// Change only what the header says, and look at no backing file, which may not even exist. FILE shows something else
    /// afterwards, unless BACKING shows what the old backing file does
    #[arg(long = "unsafe", short = 'u')]
    header_only: bool,
    /// Say how much would be written, and change nothing. Takes the same time, as both backing files are compared
    #[arg(long)]
    dry_run: bool,
    /// Begin although the file system has too little room for what may be needed
    #[arg(long)]
    force: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Print errors only
    #[arg(long, short)]
    quiet: bool,
    /// What carries requests to the kernel; auto: io_uring where it is allowed
    #[arg(long, value_enum, value_name = "KIND", default_value_t = IoBackend::Auto)]
    io_backend: IoBackend,
}

/// Runs `rebase`.
pub(crate) fn run(arguments: &RebaseArguments) -> Exit {
    let display = Display::new(DisplayArguments {
        json: false,
        quiet: arguments.quiet || arguments.json,
    });
    let spec = match spec(arguments) {
        Ok(spec) => spec,
        Err(text) => {
            display.error(&text);
            return Exit::Failed;
        }
    };
    let name = spec.backing_file.clone();
    let rebased = command::run(arguments.io_backend, display, async |embedded| {
        rebase(embedded, arguments, spec).await
    });
    let (view, display) = match rebased {
        Ok(done) => done,
        Err(exit) => return exit,
    };
    if !view.is_done && !arguments.dry_run {
        display.error(&room::too_little(&arguments.file, &view.room));
        return Exit::Failed;
    }
    match (arguments.json, arguments.quiet) {
        (true, _) => display.result(&indented(&report(arguments, view))),
        (false, false) => display.result(&human(arguments, &name, view)),
        (false, true) => {}
    }
    Exit::Success
}

/// Everything that can be refused before a file is opened.
fn spec(arguments: &RebaseArguments) -> Result<RebaseSpec, String> {
    let Some(name) = arguments.backing.clone() else {
        return Err(
            "Must specify backing file (-b); an empty name (-b '') takes it away".to_owned(),
        );
    };
    let could_not = |why: &str| format!("Could not change the backing file to '{name}': {why}");
    if arguments.format != Format::Qcow2 {
        return Err(could_not("Operation not supported"));
    }
    match arguments.backing_format.as_deref() {
        Some("raw" | "qcow2") => {}
        Some(other) => return Err(format!("Invalid format name: '{other}'")),
        None if name.is_empty() => {}
        None => return Err(could_not("backing format must be specified")),
    }
    Ok(RebaseSpec {
        backing: None,
        backing_file: name,
        backing_format: arguments.backing_format.clone(),
        keeps_content: !arguments.header_only,
        dry_run: arguments.dry_run,
        force: arguments.force,
    })
}

async fn rebase(
    embedded: &mut Embedded,
    arguments: &RebaseArguments,
    mut spec: RebaseSpec,
) -> Result<RebaseView, String> {
    let image = Disk {
        node: NODE,
        path: &arguments.file,
        format: Some(arguments.format),
        option: "-f",
        read_only: arguments.dry_run,
        sharing: Sharing::Readers,
        named_by: NamedBy::Client,
    };
    match arguments.header_only {
        true => image.open_alone(embedded).await?,
        false => {
            image.open(embedded).await?;
        }
    }
    if arguments.dry_run {
        let marks = check_marks(embedded, NODE).await;
        marks.map_err(|error| could_not_open(&arguments.file, error))?;
    }
    let path = PathBuf::from(beside(&arguments.file, &spec.backing_file));
    if spec.keeps_content && !spec.backing_file.is_empty() {
        open_backing(embedded, &path, &spec).await?;
        spec.backing = Some(BACKING.to_owned());
    }
    let work = ImageWork::Rebase(spec);
    let rebased = embedded
        .work_on_image("rebase", NODE, work, |_, _| ())
        .await;
    match rebased {
        Ok(ImageReply::Rebased(view)) => Ok(view),
        Ok(_) => Err("another reply (bug)".to_owned()),
        Err(error) => Err(format!("{}{}", error.text, left(arguments))),
    }
}

/// What a rebase that has not come to its end leaves, for whoever reads why.
fn left(arguments: &RebaseArguments) -> String {
    if arguments.dry_run || arguments.header_only {
        return String::new();
    }
    // What has been copied is the image's own from then on.
    format!(
        "; {} is on its old backing file and shows what it did, a part of what differs may have been copied into it \
         already, and the same command goes on with the rest",
        shown(&arguments.file)
    )
}

async fn open_backing(embedded: &Embedded, path: &Path, spec: &RebaseSpec) -> Result<(), String> {
    let backing = Disk {
        node: BACKING,
        path,
        format: Some(match spec.backing_format.as_deref() {
            Some("raw") => Format::Raw,
            _ => Format::Qcow2,
        }),
        option: "-F",
        read_only: true,
        sharing: Sharing::Readers,
        named_by: NamedBy::Client,
    };
    let opened = backing.open(embedded).await;
    let could_not =
        |text: String| format!("Could not open new backing file {}: {text}", shown(path));
    opened.map(drop).map_err(could_not)
}

fn report(arguments: &RebaseArguments, view: RebaseView) -> Value {
    let mut report = json!({
        "dry-run": arguments.dry_run,
        "bytes-to-copy": view.copied_bytes,
        "bytes-to-zero": view.zeroed_bytes,
    });
    if arguments.dry_run && !arguments.header_only {
        replies::add_room(&mut report, &view.room);
        // As they were called before.
        report["bytes-needed"] = json!(view.room.needed_bytes());
        report["bytes-free"] = json!(view.room.free_bytes);
        report["fits"] = json!(view.room.fits);
    }
    report
}

fn human(arguments: &RebaseArguments, name: &str, view: RebaseView) -> String {
    let moved = match (arguments.header_only, view.copied_bytes, view.zeroed_bytes) {
        (true, ..) => "nothing was compared".to_owned(),
        (false, 0, 0) => "nothing is copied".to_owned(),
        (false, copied, zeroed) => format!(
            "{} copied into it, {} zeroed",
            size::shown(copied),
            size::shown(zeroed)
        ),
    };
    let on = match name {
        "" => "no backing file".to_owned(),
        name => format!("'{name}'"),
    };
    let file = shown(&arguments.file);
    match arguments.dry_run {
        true => {
            let room = match arguments.header_only {
                true => String::new(),
                false => room::told(&view.room),
            };
            format!("{file} would be put on {on}: {moved}{room}")
        }
        false => format!("{file} is on {on} now: {moved}"),
    }
}
