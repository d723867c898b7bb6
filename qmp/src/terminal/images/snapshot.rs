//! `blockyard snapshot`: internal snapshots of a qcow2 image, with the output and exit codes of `qemu-img snapshot`; or an
//! external one, which is a new image on the old one.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use blockyard_engine::images::info::SnapshotInfo;
use blockyard_engine::images::{
    ImageFormat, ImageReply, ImageWork, InfoSpec, SnapshotChange, SnapshotSpec,
};
use blockyard_engine::reply::RoomView;
use blockyard_engine::request::{Discard, NamedBy};
use clap::Args;
use serde_json::json;

use crate::replies;
use crate::terminal::check::arguments::{Format, Output};
use crate::terminal::check::report::indented;
use crate::terminal::command;
use crate::terminal::copy::ends::shown;
use crate::terminal::display::{Display, DisplayArguments};
use crate::terminal::embedded::{Embedded, ImageFile, IoBackend, Sharing};
use crate::terminal::exit::Exit;
use crate::terminal::images::create::plan_overlay;
use crate::terminal::images::create_options::ImageOptions;
use crate::terminal::images::info_report::{snapshots_human, snapshots_json};
use crate::terminal::images::{Disk, could_not_open, sharing};
use crate::terminal::room;

const NODE: &str = "image";

/// Arguments of `snapshot`.
#[derive(Args, Debug)]
pub struct SnapshotArguments {
    /// Image whose snapshots they are
    #[arg(value_name = "FILE")]
    file: PathBuf,
    #[command(flatten)]
    deed: DeedArguments,
    /// Format of FILE; it is never guessed. Images of other formats than qcow2 have no snapshots
    #[arg(long, short, value_enum, value_name = "FORMAT", default_value_t = Format::Qcow2)]
    format: Format,
    /// Options of NEW, as for `create`: name=value, several with commas between them
    #[arg(long = "options", short, value_name = "OPTIONS", requires = "overlay")]
    options: Vec<String>,
    /// Say how much room it would take at most, and change nothing
    #[arg(long, conflicts_with = "list")]
    dry_run: bool,
    /// Begin although the file system has too little room for what may be needed
    #[arg(long)]
    force: bool,
    /// Form of the list, and of what --dry-run says
    #[arg(long, value_enum, value_name = "FORM", default_value_t = Output::Human)]
    output: Output,
    /// The same as --output json
    #[arg(long)]
    json: bool,
    /// List the snapshots of FILE although somebody may be writing to it
    #[arg(long, short = 'U', conflicts_with_all = ["apply", "create", "delete", "overlay"])]
    force_share: bool,
    /// Print errors only
    #[arg(long, short)]
    quiet: bool,
    /// What carries requests to the kernel; auto: io_uring where it is allowed
    #[arg(long, value_enum, value_name = "KIND", default_value_t = IoBackend::Auto)]
    io_backend: IoBackend,
}

/// What is to be done.
#[derive(Args, Debug)]
#[group(multiple = false)]
struct DeedArguments {
    /// List all snapshots, which is also what is done if nothing is said
    #[arg(long, short)]
    list: bool,
    /// Give the disk content and length of this snapshot. What it holds is lost, unless another snapshot has it
    #[arg(long, short, value_name = "ID|NAME")]
    apply: Option<String>,
    /// Make a snapshot of the disk
    #[arg(long, short, value_name = "NAME")]
    create: Option<String>,
    /// Delete this snapshot, the first of that name
    #[arg(long, short, value_name = "NAME")]
    delete: Option<String>,
    /// Make NEW, a qcow2 image on FILE that shows what FILE does: FILE is the snapshot, and must not change from now on
    #[arg(long, value_name = "NEW")]
    overlay: Option<PathBuf>,
}

/// What is done, and why it could not be.
struct Deed {
    change: SnapshotChange,
    /// As messages begin.
    told: String,
    /// Why images without snapshots refuse it, in the words of qemu-img.
    unsupported: &'static str,
}

impl DeedArguments {
    fn deed(&self) -> Option<Deed> {
        let told = |verb: &str, name: &str| format!("Could not {verb} snapshot '{name}'");
        if let Some(name) = &self.create {
            let now = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default();
            return Some(Deed {
                told: told("create", name),
                unsupported: "Operation not supported",
                change: SnapshotChange::Create {
                    name: name.clone(),
                    date_seconds: u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
                    date_nanoseconds: now.subsec_nanos(),
                },
            });
        }
        if let Some(name) = &self.apply {
            return Some(Deed {
                told: told("apply", name),
                unsupported: "Block driver does not support snapshots",
                change: SnapshotChange::Apply {
                    id_or_name: name.clone(),
                },
            });
        }
        let name = self.delete.as_ref()?;
        Some(Deed {
            told: told("delete", name),
            unsupported: "snapshot not found",
            change: SnapshotChange::Delete { name: name.clone() },
        })
    }
}

/// Runs `snapshot`.
pub(crate) fn run(arguments: &SnapshotArguments) -> Exit {
    let lists = arguments.deed.deed().is_none() && arguments.deed.overlay.is_none();
    let display = Display::new(DisplayArguments {
        json: false,
        quiet: arguments.quiet || lists || arguments.dry_run,
    });
    if lists && arguments.dry_run {
        display.error("--dry-run is of -a, -c, -d and --overlay: a list changes nothing");
        return Exit::Failed;
    }
    let done = command::run(arguments.io_backend, display, async |embedded| {
        match (arguments.deed.deed(), &arguments.deed.overlay) {
            (Some(deed), _) => change(embedded, arguments, deed).await,
            (None, Some(new)) => overlay(embedded, arguments, new).await,
            (None, None) => list(embedded, arguments).await,
        }
    });
    match done {
        Ok((list, display)) => {
            let is_asked_for = lists || arguments.dry_run && arguments.is_json();
            if !list.is_empty() && (is_asked_for || !arguments.quiet) {
                display.result(&list);
            }
            Exit::Success
        }
        Err(exit) => exit,
    }
}

async fn open(
    embedded: &Embedded,
    arguments: &SnapshotArguments,
    read_only: bool,
) -> Result<(), String> {
    let disk = Disk {
        node: NODE,
        path: &arguments.file,
        format: Some(arguments.format),
        option: "-f",
        read_only,
        sharing: match read_only {
            true => sharing(arguments.force_share),
            false => Sharing::Readers,
        },
        named_by: NamedBy::Client,
    };
    let file = ImageFile {
        discard: Discard::Unmap,
        ..disk.file()
    };
    let opened = embedded.add_image_file(&file).await;
    opened.map_err(|error| could_not_open(disk.path, &error))
}

async fn change(
    embedded: &mut Embedded,
    arguments: &SnapshotArguments,
    deed: Deed,
) -> Result<String, String> {
    open(embedded, arguments, arguments.dry_run).await?;
    let Deed {
        change,
        told,
        unsupported,
    } = deed;
    if arguments.format != Format::Qcow2 {
        return Err(format!("{told}: {unsupported}"));
    }
    let work = ImageWork::Snapshot(SnapshotSpec {
        change,
        dry_run: arguments.dry_run,
        force: arguments.force,
    });
    let changed = embedded
        .work_on_image("snapshot", NODE, work, |_, _| ())
        .await;
    match changed {
        Ok(ImageReply::Snapshots(view)) if view.is_done => Ok(String::new()),
        Ok(ImageReply::Snapshots(view)) if arguments.dry_run => {
            let what = format!("{}: copies no data", shown(&arguments.file));
            Ok(arguments.planned(&what, &view.room))
        }
        Ok(ImageReply::Snapshots(view)) => Err(format!(
            "{told}: {}",
            room::too_little(&arguments.file, &view.room)
        )),
        Ok(_) => Err(format!("{told}: another reply (bug)")),
        Err(error) => Err(format!("{told}: {error}")),
    }
}

/// An external snapshot.
async fn overlay(
    embedded: &mut Embedded,
    arguments: &SnapshotArguments,
    new: &Path,
) -> Result<String, String> {
    let options = ImageOptions::read(&arguments.options, Format::Qcow2)?;
    if options.backing_file.is_some() || options.backing_format.is_some() {
        return Err("The backing file is FILE; -o cannot name another one".to_owned());
    }
    let (file, format) = (&arguments.file, arguments.format);
    let overlay = plan_overlay(embedded, new, file, format, options).await?;
    if arguments.dry_run {
        let what = format!("{}; copies no data", overlay.what());
        return Ok(arguments.planned(&what, &overlay.room));
    }
    if overlay.room.fits == Some(false) && !arguments.force {
        return Err(room::too_little(new, &overlay.room));
    }
    overlay.make(embedded).await
}

impl SnapshotArguments {
    fn is_json(&self) -> bool {
        self.json || self.output == Output::Json
    }

    /// What --dry-run says.
    fn planned(&self, what: &str, room: &RoomView) -> String {
        if !self.is_json() {
            return format!("{what}{}", room::told(room));
        }
        let mut report = json!({"dry-run": true, "bytes-to-copy": 0, "bytes-to-zero": 0});
        replies::add_room(&mut report, room);
        indented(&report)
    }
}

async fn list(embedded: &mut Embedded, arguments: &SnapshotArguments) -> Result<String, String> {
    open(embedded, arguments, true).await?;
    let snapshots = match arguments.format {
        Format::Raw => Vec::new(),
        Format::Qcow2 => snapshots_of(embedded, arguments).await?,
    };
    Ok(match arguments.is_json() {
        true => snapshots_json(&snapshots),
        false => snapshots_human(&snapshots),
    })
}

async fn snapshots_of(
    embedded: &mut Embedded,
    arguments: &SnapshotArguments,
) -> Result<Vec<SnapshotInfo>, String> {
    let work = ImageWork::Info(InfoSpec {
        format: Some(ImageFormat::Qcow2),
    });
    let told = embedded
        .work_on_image("snapshot", NODE, work, |_, _| ())
        .await;
    let cannot = |why: &str| could_not_open(&arguments.file, why);
    match told {
        Ok(ImageReply::Described(view)) => {
            Ok(view.qcow2.map(|image| image.snapshots).unwrap_or_default())
        }
        Ok(_) => Err(cannot("another reply (bug)")),
        Err(error) => Err(cannot(&error.text)),
    }
}
