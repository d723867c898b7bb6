//! `blockyard map`: where the bytes of a disk are kept.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use blockyard_engine::images::{ImageEvent, ImageReply, ImageWork, MapExtent, MapSpec};
use blockyard_engine::reply::{FormatSpecific, ImageView};
use blockyard_engine::request::NamedBy;
use clap::Args;

use crate::terminal::check::arguments::{Format, Output};
use crate::terminal::command;
use crate::terminal::copy::ends::shown;
use crate::terminal::display::{Display, DisplayArguments};
use crate::terminal::embedded::{Embedded, IoBackend};
use crate::terminal::exit::Exit;
use crate::terminal::images::create_options::byte_count;
use crate::terminal::images::info_report::beside;
use crate::terminal::images::{Disk, sharing};

const NODE: &str = "image";

/// Arguments of `map`.
#[derive(Args, Debug)]
pub struct MapArguments {
    /// Image to look at
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Format of FILE. Must be given if FILE looks like another one than raw; it is never guessed
    #[arg(long, short, value_enum, value_name = "FORMAT")]
    format: Option<Format>,
    /// Begin at this byte of the disk
    #[arg(long, short, value_name = "OFFSET", value_parser = byte_count, default_value = "0")]
    start_offset: u64,
    /// Look at so many bytes at most
    #[arg(long, short = 'l', value_name = "LENGTH", value_parser = byte_count)]
    max_length: Option<u64>,
    /// Form of the result
    #[arg(long, value_enum, value_name = "FORM", default_value_t = Output::Human)]
    output: Output,
    /// The same as --output json
    #[arg(long)]
    json: bool,
    /// Look at FILE although somebody may be writing to it. What is shown may not be so any more
    #[arg(long, short = 'U')]
    force_share: bool,
    /// What carries requests to the kernel; auto: io_uring where it is allowed
    #[arg(long, value_enum, value_name = "KIND", default_value_t = IoBackend::Auto)]
    io_backend: IoBackend,
}

/// Runs `map`.
pub(crate) fn run(arguments: &MapArguments) -> Exit {
    let display = Display::new(DisplayArguments {
        json: false,
        // The result comes bit by bit.
        quiet: true,
    });
    let mapped = command::run(arguments.io_backend, display, async |embedded| {
        map(embedded, arguments).await
    });
    mapped.map_or_else(|exit| exit, |_| Exit::Success)
}

async fn map(embedded: &mut Embedded, arguments: &MapArguments) -> Result<(), String> {
    let disk = Disk {
        node: NODE,
        path: &arguments.file,
        format: arguments.format,
        option: "-f",
        read_only: true,
        sharing: sharing(arguments.force_share),
        named_by: NamedBy::Client,
    };
    disk.open(embedded).await?;
    let cannot = |text: &str| format!("cannot map {}: {text}", shown(&arguments.file));
    let view = embedded.image_view(NODE).await;
    let view = view.map_err(|error| cannot(&error.text))?;
    let layers = || std::iter::successors(Some(&view), |view| view.backing_image.as_deref());
    let mut printer = match arguments.json || arguments.output == Output::Json {
        true => Printer::Json { last: None },
        false => Printer::Human {
            files: layers().map(file).collect(),
        },
    };
    printer.begin(&embedded.display);
    let work = ImageWork::Map(MapSpec {
        start: arguments.start_offset,
        length_bytes: arguments.max_length,
        holes_from_clusters: layers().map(holes_from_clusters).collect(),
    });
    let mapped = embedded
        .work_on_image("map", NODE, work, |display, event| {
            if let ImageEvent::Mapped(extents) = event {
                printer.print(display, &extents);
            }
        })
        .await;
    match mapped {
        Ok(ImageReply::Mapped) => {
            printer.end(&embedded.display, arguments.start_offset);
            Ok(())
        }
        Ok(_) => Err(cannot("another reply (bug)")),
        Err(error) => Err(cannot(&error.text)),
    }
}

/// From how many clusters in use on an image takes much less room than it would with data in each, as after preallocation of
/// metadata: qemu-img looks for holes in those, and only in those, with this margin.
fn holes_from_clusters(layer: &ImageView) -> Option<u64> {
    let cluster_bytes = layer.cluster_size_bytes?.max(1);
    let facts = fs::metadata(&*layer.file()).ok()?;
    let room = facts.blocks().saturating_mul(512) / cluster_bytes;
    Some(room.saturating_add(2).max(room.saturating_mul(10) / 9))
}

/// The file that holds the data of a layer.
fn file(layer: &ImageView) -> String {
    match &layer.format_specific {
        Some(FormatSpecific::Qcow2 {
            version_3: Some(info),
            ..
        }) => match &info.data_file {
            Some(data_file) => beside(Path::new(&*layer.file()), data_file),
            None => layer.file().into_owned(),
        },
        _ => layer.file().into_owned(),
    }
}

/// How extents are printed.
enum Printer {
    /// A list with a line for each, as `qemu-img map --output=json` prints them.
    Json {
        /// The line that is printed when it is known whether another one follows.
        last: Option<String>,
    },
    /// A table of those with data, as `qemu-img map` prints it.
    Human { files: Vec<String> },
}

impl Printer {
    fn begin(&self, display: &Display) {
        if let Printer::Human { .. } = self {
            display.result(&row(["Offset", "Length", "Mapped to", "File"]));
        }
    }

    fn print(&mut self, display: &Display, extents: &[MapExtent]) {
        let mut lines = Vec::with_capacity(extents.len());
        match self {
            Printer::Json { last } => {
                for extent in extents {
                    let before = match last.take() {
                        Some(line) => {
                            lines.push(line + ",");
                            ""
                        }
                        None => "[",
                    };
                    *last = Some(format!("{before}{}", json(extent)));
                }
            }
            Printer::Human { files } => {
                for extent in extents.iter().filter(|extent| extent.data && !extent.zero) {
                    let depth = usize::try_from(extent.depth).unwrap_or(usize::MAX);
                    let place = match extent.offset {
                        Some(offset) => hexadecimal(offset),
                        None if extent.compressed => "compressed".to_owned(),
                        None => "unknown".to_owned(),
                    };
                    lines.push(row([
                        &hexadecimal(extent.start),
                        &hexadecimal(extent.length_bytes),
                        &place,
                        files.get(depth).map_or("", String::as_str),
                    ]));
                }
            }
        }
        if !lines.is_empty() {
            display.result(&lines.join("\n"));
        }
    }

    /// `start`: where it began.
    fn end(self, display: &Display, start: u64) {
        match self {
            // Where there is nothing, qemu-img says so in an entry.
            Printer::Json { last } => {
                let last = last.unwrap_or_else(|| format!("[{}", json(&nothing_at(start))));
                display.result(&(last + "]"));
            }
            Printer::Human { .. } => {}
        }
    }
}

fn nothing_at(start: u64) -> MapExtent {
    MapExtent {
        start,
        length_bytes: 0,
        depth: 0,
        present: false,
        zero: false,
        data: false,
        compressed: false,
        offset: None,
    }
}

fn json(extent: &MapExtent) -> String {
    let offset = extent
        .offset
        .map(|offset| format!(", \"offset\": {offset}"));
    format!(
        "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \"data\": {}, \"compressed\": \
         {}{}}}",
        extent.start,
        extent.length_bytes,
        extent.depth,
        extent.present,
        extent.zero,
        extent.data,
        extent.compressed,
        offset.unwrap_or_default()
    )
}

fn row([offset, length, place, file]: [&str; 4]) -> String {
    format!("{offset:<16}{length:<16}{place:<16}{file}")
}

/// As C's `%#x` prints it: 0 without a prefix.
fn hexadecimal(number: u64) -> String {
    match number {
        0 => "0".to_owned(),
        other => format!("{other:#x}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_those_of_qemu_img() {
        let extent = MapExtent {
            start: 0,
            length_bytes: 65_536,
            depth: 1,
            present: true,
            zero: false,
            data: true,
            compressed: false,
            offset: Some(327_680),
        };
        assert_eq!(
            json(&extent),
            "{ \"start\": 0, \"length\": 65536, \"depth\": 1, \"present\": true, \"zero\": false, \"data\": true, \
             \"compressed\": false, \"offset\": 327680}"
        );
        assert_eq!(
            row([
                &hexadecimal(0),
                &hexadecimal(65_536),
                &hexadecimal(327_680),
                "top"
            ]),
            "0               0x10000         0x50000         top"
        );
    }
}
