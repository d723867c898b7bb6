//! `blockyard bitmap`: the dirty bitmaps that a qcow2 image keeps: listed, dumped, and changed with the messages and exit codes of
//! `qemu-img bitmap`.

use std::path::{Path, PathBuf};

use blockyard_engine::images::{
    BitmapsSpec, DirtyExtent, ImageEvent, ImageReply, ImageWork, KeptBitmapView,
};
use blockyard_engine::request::{BackingRef, BitmapChange, BitmapName, NamedBy};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::terminal::check::arguments::{Format, Output};
use crate::terminal::check::report::indented;
use crate::terminal::command;
use crate::terminal::display::{Display, DisplayArguments};
use crate::terminal::embedded::{Embedded, IoBackend, Sharing};
use crate::terminal::exit::Exit;
use crate::terminal::images::create_options::byte_count;
use crate::terminal::images::info_report::{flags, rounded};
use crate::terminal::images::{Disk, could_not_open, sharing};

const NODE: &str = "image";
const SOURCE: &str = "source";

/// Arguments of `bitmap`.
#[derive(Args, Debug)]
pub struct BitmapArguments {
    #[command(subcommand)]
    action: Action,
}

/// What is done.
#[derive(Debug, Subcommand)]
enum Action {
    /// List all bitmaps, and how much each says has changed
    List {
        #[command(flatten)]
        look: LookArguments,
    },
    /// Add a bitmap that records from the next use on; nothing has changed yet
    Add {
        /// Bytes that one bit stands for: a power of two from 512 on. Without it, those of a cluster, between 4 and 64 KiB
        #[arg(long, short, value_name = "SIZE", value_parser = byte_count)]
        granularity: Option<u64>,
        /// Let it record nothing
        #[arg(long, visible_alias = "disable")]
        disabled: bool,
        #[command(flatten)]
        one: OneArguments,
    },
    /// Remove a bitmap, also one that is inconsistent
    Remove {
        #[command(flatten)]
        one: OneArguments,
    },
    /// Let a bitmap say that nothing has changed
    Clear {
        #[command(flatten)]
        one: OneArguments,
    },
    /// Let a bitmap record from the next use on
    Enable {
        #[command(flatten)]
        one: OneArguments,
    },
    /// Let a bitmap record nothing any more
    Disable {
        #[command(flatten)]
        one: OneArguments,
    },
    /// Add to a bitmap what others say has changed
    Merge {
        /// Image that has the SOURCEs, if it is not FILE
        #[arg(long, short = 'b', value_name = "FILE")]
        source_file: Option<PathBuf>,
        #[command(flatten)]
        one: OneArguments,
        /// Bitmaps whose changes are added
        #[arg(value_name = "SOURCE", required = true)]
        sources: Vec<String>,
    },
    /// Print what a bitmap says has changed, run by run
    Dump {
        #[command(flatten)]
        look: LookArguments,
        /// Name of the bitmap
        #[arg(value_name = "BITMAP")]
        name: String,
    },
}

/// How an image is looked at.
#[derive(Args, Debug)]
struct LookArguments {
    /// Form of the result
    #[arg(long, value_enum, value_name = "FORM", default_value_t = Output::Human)]
    output: Output,
    /// The same as --output json
    #[arg(long)]
    json: bool,
    /// Look at FILE although somebody may be writing to it: its bitmaps are out of date then
    #[arg(long, short = 'U')]
    force_share: bool,
    /// The qcow2 image
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// A bitmap that is changed.
#[derive(Args, Debug)]
struct OneArguments {
    /// The qcow2 image. Nobody else may be using it
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Name of the bitmap
    #[arg(value_name = "BITMAP")]
    name: String,
}

/// A change of one bitmap.
struct Deed<'a> {
    /// As messages name it.
    operation: &'static str,
    one: &'a OneArguments,
    change: BitmapChange,
    source_file: Option<&'a Path>,
}

impl Action {
    /// What is to be changed; `None`: something is to be shown.
    fn deed(&self) -> Option<Deed<'_>> {
        let named = |one: &OneArguments| BitmapName {
            node: NODE.to_owned(),
            name: one.name.clone(),
        };
        let (operation, one, change) = match self {
            Self::List { .. } | Self::Dump { .. } => return None,
            Self::Add {
                granularity,
                disabled,
                one,
            } => {
                let change = BitmapChange::Add {
                    bitmap: named(one),
                    // What is longer is refused as the largest is that no image keeps.
                    granularity_bytes: granularity.map(|size| u32::try_from(size).unwrap_or(1)),
                    persistent: true,
                    disabled: *disabled,
                };
                ("add", one, change)
            }
            Self::Remove { one } => ("remove", one, BitmapChange::Remove(named(one))),
            Self::Clear { one } => ("clear", one, BitmapChange::Clear(named(one))),
            Self::Enable { one } => ("enable", one, BitmapChange::Enable(named(one))),
            Self::Disable { one } => ("disable", one, BitmapChange::Disable(named(one))),
            Self::Merge {
                source_file,
                one,
                sources,
            } => {
                let node = if source_file.is_some() { SOURCE } else { NODE };
                let source = |name: &String| BitmapName {
                    node: node.to_owned(),
                    name: name.clone(),
                };
                let change = BitmapChange::Merge {
                    target: named(one),
                    sources: sources.iter().map(source).collect(),
                };
                return Some(Deed {
                    operation: "merge",
                    one,
                    change,
                    source_file: source_file.as_deref(),
                });
            }
        };
        Some(Deed {
            operation,
            one,
            change,
            source_file: None,
        })
    }
}

/// Runs `bitmap`.
pub(crate) fn run(arguments: &BitmapArguments) -> Exit {
    let display = Display::new(DisplayArguments {
        json: false,
        quiet: true,
    });
    let done = command::run(IoBackend::Auto, display, async |embedded| {
        match (&arguments.action, arguments.action.deed()) {
            (_, Some(deed)) => change(embedded, deed).await,
            (Action::Dump { look, name }, None) => dump(embedded, look, name).await,
            (Action::List { look }, None) => list(embedded, look).await,
            _ => Ok(()),
        }
    });
    done.map_or_else(|exit| exit, |_| Exit::Success)
}

fn disk<'a>(node: &'static str, path: &'a Path, read_only: bool, sharing: Sharing) -> Disk<'a> {
    Disk {
        node,
        path,
        format: Some(Format::Qcow2),
        option: "",
        read_only,
        sharing,
        named_by: NamedBy::Client,
    }
}

/// Changes one bitmap; the image has it when this ends.
async fn change(embedded: &Embedded, deed: Deed<'_>) -> Result<(), String> {
    let Deed {
        operation,
        one,
        change,
        source_file,
    } = deed;
    let image = disk(NODE, &one.file, false, Sharing::Readers);
    image.open_alone(embedded).await?;
    if let Some(source) = source_file {
        let source = disk(SOURCE, source, true, Sharing::Readers);
        source.open_alone(embedded).await?;
    }
    let failed = |error: &str| {
        let name = &one.name;
        format!("Operation {operation} on bitmap {name} failed: {error}")
    };
    let changed = embedded.change_bitmap(change).await;
    changed.map_err(|error| failed(&error.text))?;
    // What is closed only could fail without being told.
    let stored = embedded
        .make_qcow2_read_only(&image.file(), BackingRef::Nothing)
        .await;
    stored.map_err(|error| failed(&error.text))
}

/// Looks at the bitmaps of an image.
async fn look(
    embedded: &mut Embedded,
    look: &LookArguments,
    spec: BitmapsSpec,
    mut told: impl FnMut(&Display, &[DirtyExtent]),
) -> Result<Vec<KeptBitmapView>, String> {
    let cannot = |why: &str| match &spec {
        BitmapsSpec::List => could_not_open(&look.file, why),
        BitmapsSpec::Dump { name } => format!("Operation dump on bitmap {name} failed: {why}"),
    };
    let disk = disk(NODE, &look.file, true, sharing(look.force_share));
    disk.open_file(embedded).await?;
    let work = ImageWork::Bitmaps(spec.clone());
    let seen = embedded
        .work_on_image("bitmap", NODE, work, |display, event| {
            if let ImageEvent::Dirty(extents) = event {
                told(display, &extents);
            }
        })
        .await;
    match seen {
        Ok(ImageReply::Bitmaps(all)) => Ok(all),
        Ok(_) => Err(cannot("another reply (bug)")),
        Err(error) => Err(cannot(&error.text)),
    }
}

async fn list(embedded: &mut Embedded, arguments: &LookArguments) -> Result<(), String> {
    let all = look(embedded, arguments, BitmapsSpec::List, |_, _| ()).await?;
    let text = match arguments.is_json() {
        true => indented(&all.iter().map(described).collect()),
        false => table(&all),
    };
    if !text.is_empty() {
        embedded.display.result(&text);
    }
    for one in &all {
        if let Some(problem) = &one.problem {
            embedded.display.error(&format!("warning: {problem}"));
        }
    }
    Ok(())
}

async fn dump(
    embedded: &mut Embedded,
    arguments: &LookArguments,
    name: &str,
) -> Result<(), String> {
    let is_json = arguments.is_json();
    // An array bit by bit: each run is printed once it is known that another one follows.
    let mut last: Option<String> = None;
    let mut begun = false;
    let spec = BitmapsSpec::Dump {
        name: name.to_owned(),
    };
    look(embedded, arguments, spec, |display, extents| {
        if !begun && !is_json {
            display.result(&format!("{:<16}{}", "Offset", "Length"));
            begun = true;
        }
        for extent in extents {
            let DirtyExtent {
                start,
                length_bytes,
            } = extent;
            if !is_json {
                display.result(&format!("{start:<#16x}{length_bytes:#x}"));
                continue;
            }
            let run = format!(r#"{{ "start": {start}, "length": {length_bytes}}}"#);
            if let Some(last) = last.replace(run) {
                display.result(&format!("{}{last},", if begun { "" } else { "[" }));
                begun = true;
            }
        }
    })
    .await?;
    if is_json {
        let front = if begun { "" } else { "[" };
        let last = last.unwrap_or_default();
        embedded.display.result(&format!("{front}{last}]"));
    }
    Ok(())
}

impl LookArguments {
    fn is_json(&self) -> bool {
        self.json || self.output == Output::Json
    }
}

/// A bitmap for programs, as `info` has it, and how much it says has changed.
fn described(one: &KeptBitmapView) -> Value {
    json!({
        "flags": flags(&one.info),
        "name": one.info.name,
        "granularity": one.info.granularity_bytes,
        "dirty-bytes": one.dirty_bytes,
    })
}

/// All bitmaps for people; empty if there are none.
fn table(all: &[KeptBitmapView]) -> String {
    if all.is_empty() {
        return String::new();
    }
    let line = |columns: [&str; 4]| {
        let [name, granularity, changed, state] = columns;
        format!("{name:<24} {granularity:>11} {changed:>9}  {state}")
    };
    let mut lines = vec![line(["BITMAP", "GRANULARITY", "CHANGED", "STATE"])];
    lines.extend(all.iter().map(|one| {
        let state = match (one.info.in_use, &one.problem, one.info.auto) {
            (true, ..) => "inconsistent",
            (_, Some(_), _) => "unreadable",
            (.., true) => "recording",
            (.., false) => "disabled",
        };
        let changed = one.dirty_bytes.map_or("?".to_owned(), rounded);
        let granularity = rounded(one.info.granularity_bytes);
        line([&one.info.name, &granularity, &changed, state])
    }));
    lines.join("\n")
}
