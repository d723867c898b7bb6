//! `blockyard info`: what an image says of itself.

use std::path::{Path, PathBuf};

use blockyard_engine::error::EngineError;
use blockyard_engine::images::{ImageReply, ImageWork, InfoSpec, InfoView};
use blockyard_engine::reply::ImageView;
use clap::Args;

use crate::terminal::check::arguments::{Format, Output};
use crate::terminal::copy::ends::{Source, shown};
use crate::terminal::display::{Display, DisplayArguments};
use crate::terminal::embedded::{Cache, Embedded, EngineArguments, IoBackend, with_engine};
use crate::terminal::exit::Exit;
use crate::terminal::images::info_report::{human, json};
use crate::terminal::images::{Disk, could_not_open, sharing};

const NODE: &str = "image";

/// Arguments of `info`.
#[derive(Args, Debug)]
pub struct InfoArguments {
    /// Image to look at
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Format of FILE. Without it, what begins like a qcow2 image is shown as one, everything else as raw
    #[arg(long, short, value_enum, value_name = "FORMAT")]
    format: Option<Format>,
    /// Form of the result
    #[arg(long, value_enum, value_name = "FORM", default_value_t = Output::Human)]
    output: Output,
    /// The same as --output json
    #[arg(long)]
    json: bool,
    /// Look at FILE although somebody may be writing to it. What is shown may not be so any more
    #[arg(long, short = 'U')]
    force_share: bool,
}

/// An image and its file, as they are shown.
#[derive(Debug)]
pub(crate) struct Described {
    /// Its name as the user wrote it.
    pub(crate) path: PathBuf,
    pub(crate) view: InfoView,
    /// The file that it is in.
    pub(crate) file: ImageView,
}

/// Runs `info`.
pub(crate) fn run(arguments: &InfoArguments) -> Exit {
    let display = Display::new(DisplayArguments {
        json: false,
        quiet: true,
    });
    let engine = EngineArguments {
        cache: Cache::Writeback,
        // A few small reads.
        io_backend: IoBackend::Threads,
    };
    let described = with_engine(engine, display, async |mut embedded| {
        let described = describe(&mut embedded, arguments).await;
        (described, embedded.display)
    });
    let (described, display) = described.unwrap_or_else(|(text, display)| (Err(text), display));
    match described {
        Ok(described) => {
            for finding in &described.view.findings {
                display.error(&format!("warning: {}: {finding}", shown(&described.path)));
            }
            let is_json = arguments.json || arguments.output == Output::Json;
            display.result(&match is_json {
                true => json(&described),
                false => human(&described),
            });
            Exit::Success
        }
        Err(text) => {
            display.error(&text);
            Exit::Failed
        }
    }
}

async fn describe(embedded: &mut Embedded, arguments: &InfoArguments) -> Result<Described, String> {
    let looks_like = Source::open(&arguments.file)?.looks_like()?;
    let disk = Disk {
        node: NODE,
        path: &arguments.file,
        format: arguments.format,
        option: "-f",
        read_only: true,
        sharing: sharing(arguments.force_share),
    };
    disk.open_file(embedded).await?;
    let format = arguments.format.map(Into::into);
    let view = look(embedded, &arguments.file, InfoSpec { format }).await?;
    if let (None, None, Some(other)) = (format, &view.qcow2, looks_like) {
        embedded.display.error(&format!(
            "warning: {} looks like a {other} image, a format that is not supported; it is shown as raw",
            shown(&arguments.file)
        ));
    }
    let file = embedded.image_view(NODE).await;
    let file = file.map_err(|error| could_not_open(&arguments.file, error))?;
    Ok(Described {
        path: arguments.file.clone(),
        view,
        file,
    })
}

async fn look(embedded: &mut Embedded, path: &Path, spec: InfoSpec) -> Result<InfoView, String> {
    let work = ImageWork::Info(spec);
    let looked = embedded.work_on_image("info", NODE, work, |_, _| ()).await;
    match looked {
        Ok(ImageReply::Described(view)) => Ok(*view),
        Ok(_) => Err(could_not_open(
            path,
            EngineError::generic("another reply (bug)"),
        )),
        Err(error) => Err(could_not_open(path, error)),
    }
}
