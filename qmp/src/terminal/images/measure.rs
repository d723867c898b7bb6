//! `blockyard measure`: how much room an image will need.

use std::path::PathBuf;

use blockyard_engine::images::measure::measure_size;
use blockyard_engine::images::{
    ImageReply, ImageWork, InfoSpec, MeasureSpec, MeasureTarget, MeasureView,
};
use blockyard_engine::request::NamedBy;
use clap::Args;
use serde_json::{Map, json};

use crate::terminal::check::arguments::{Format, Output};
use crate::terminal::check::report::indented;
use crate::terminal::copy::ends::shown;
use crate::terminal::display::{Display, DisplayArguments};
use crate::terminal::embedded::{Cache, Embedded, EngineArguments, IoBackend, with_engine};
use crate::terminal::exit::Exit;
use crate::terminal::images::create_options::{ImageOptions, byte_count};
use crate::terminal::images::{Disk, sharing};

const NODE: &str = "source";

/// Arguments of `measure`.
#[derive(Args, Debug)]
pub struct MeasureArguments {
    /// Image whose content the new one will have
    #[arg(value_name = "FILE", required_unless_present = "size")]
    file: Option<PathBuf>,
    /// Length of the new image's disk, instead of FILE; nothing is written to it yet
    #[arg(long, short, value_name = "SIZE", value_parser = byte_count, conflicts_with = "file")]
    size: Option<u64>,
    /// Format of FILE. Must be given if FILE looks like another one than raw; it is never guessed
    #[arg(
        long,
        short,
        value_enum,
        value_name = "FORMAT",
        conflicts_with = "size"
    )]
    format: Option<Format>,
    /// Format of the new image
    #[arg(long, short = 'O', value_enum, value_name = "FORMAT", default_value_t = Format::Raw)]
    target_format: Format,
    /// Options of the new image, as for `create`: name=value, several with commas between them
    #[arg(long = "options", short, value_name = "OPTIONS")]
    options: Vec<String>,
    /// Form of the result
    #[arg(long, value_enum, value_name = "FORM", default_value_t = Output::Human)]
    output: Output,
    /// The same as --output json
    #[arg(long)]
    json: bool,
    /// Look at FILE although somebody may be writing to it
    #[arg(long, short = 'U', conflicts_with = "size")]
    force_share: bool,
    /// What carries requests to the kernel; auto: io_uring where it is allowed
    #[arg(long, value_enum, value_name = "KIND", default_value_t = IoBackend::Auto)]
    io_backend: IoBackend,
}

/// Runs `measure`.
pub(crate) fn run(arguments: &MeasureArguments) -> Exit {
    let is_json = arguments.json || arguments.output == Output::Json;
    let display = Display::new(DisplayArguments {
        json: false,
        quiet: is_json,
    });
    let (measured, display) = match (measure_target(arguments), &arguments.file) {
        (Err(text), _) => (Err(text), display),
        (Ok(target), None) => {
            let measured = measure_size(&target, arguments.size.unwrap_or(0));
            (measured.map_err(|error| error.to_string()), display)
        }
        (Ok(target), Some(file)) => {
            let engine = EngineArguments {
                cache: Cache::Writeback,
                io_backend: arguments.io_backend,
            };
            let disk = Disk {
                node: NODE,
                path: file,
                format: arguments.format,
                option: "-f",
                read_only: true,
                sharing: sharing(arguments.force_share),
                named_by: NamedBy::Client,
            };
            let measured = with_engine(engine, display, async |mut embedded| {
                let measured = measure(&mut embedded, &disk, target).await;
                let cancelled = embedded.interrupt.is_asked();
                let measured = measured.map_err(|text| (!cancelled).then_some(text));
                (measured, embedded.display)
            });
            match measured {
                Ok((Err(None), display)) => {
                    display.error("measure cancelled");
                    return Exit::Cancelled;
                }
                Ok((measured, display)) => (measured.map_err(Option::unwrap_or_default), display),
                Err((text, display)) => (Err(text), display),
            }
        }
    };
    match measured {
        Ok(view) => {
            display.result(&if is_json { as_json(view) } else { human(view) });
            Exit::Success
        }
        Err(text) => {
            display.error(&text);
            Exit::Failed
        }
    }
}

fn measure_target(arguments: &MeasureArguments) -> Result<MeasureTarget, String> {
    let options = ImageOptions::read(&arguments.options, arguments.target_format)?;
    Ok(match arguments.target_format {
        Format::Raw => MeasureTarget::Raw,
        Format::Qcow2 => MeasureTarget::Qcow2(Box::new(options.qcow2_spec(String::new(), 0))),
    })
}

async fn measure(
    embedded: &mut Embedded,
    disk: &Disk<'_>,
    target: MeasureTarget,
) -> Result<MeasureView, String> {
    let cannot =
        |error: &dyn std::fmt::Display| format!("cannot measure {}: {error}", shown(disk.path));
    let format = disk.format()?;
    let bitmaps = match format {
        Format::Raw => None,
        Format::Qcow2 => bitmaps(embedded, disk).await?,
    };
    disk.open(embedded).await?;
    let work = ImageWork::Measure(MeasureSpec { target, bitmaps });
    let measured = embedded
        .work_on_image("measure", NODE, work, |_, _| ())
        .await;
    match measured {
        Ok(ImageReply::Measured(view)) => Ok(view),
        Ok(_) => Err(cannot(&"another reply (bug)")),
        Err(error) => Err(cannot(&error)),
    }
}

/// The bitmaps in an image; `None`: it cannot have any.
async fn bitmaps(
    embedded: &mut Embedded,
    disk: &Disk<'_>,
) -> Result<Option<Vec<(u64, u64)>>, String> {
    const HEADER: &str = "header";
    let file = Disk {
        node: HEADER,
        ..disk.clone()
    };
    file.open_file(embedded).await?;
    let work = ImageWork::Info(InfoSpec {
        format: Some(Format::Qcow2.into()),
    });
    let looked = embedded
        .work_on_image("measure", HEADER, work, |_, _| ())
        .await;
    let closed = embedded.delete_node(HEADER).await;
    let cannot = |error| format!("cannot measure {}: {error}", shown(disk.path));
    let looked = looked.map_err(cannot)?;
    closed.map_err(cannot)?;
    let info = match looked {
        ImageReply::Described(view) => view.qcow2.and_then(|image| image.version_3),
        _ => None,
    };
    let size_of = |bitmap: &blockyard_engine::images::info::BitmapInfo| {
        (bitmap.granularity_bytes, bitmap.name.len() as u64)
    };
    Ok(info.map(|info| info.bitmaps.iter().map(size_of).collect()))
}

fn human(view: MeasureView) -> String {
    let mut text = format!(
        "required size: {}\nfully allocated size: {}",
        view.required_bytes, view.fully_allocated_bytes
    );
    if let Some(bytes) = view.bitmaps_bytes {
        text += &format!("\nbitmaps size: {bytes}");
    }
    text
}

fn as_json(view: MeasureView) -> String {
    let mut members = Map::new();
    if let Some(bytes) = view.bitmaps_bytes {
        members.insert("bitmaps".to_owned(), json!(bytes));
    }
    members.insert("required".to_owned(), json!(view.required_bytes));
    members.insert(
        "fully-allocated".to_owned(),
        json!(view.fully_allocated_bytes),
    );
    indented(&members.into())
}
