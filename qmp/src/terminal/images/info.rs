//! `blockyard info`: what an image says of itself.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use blockyard_engine::error::EngineError;
use blockyard_engine::images::info::{Below, NamedImage, backing_of};
use blockyard_engine::images::{ImageFormat, ImageReply, ImageWork, InfoSpec, InfoView};
use blockyard_engine::limits::CHAIN_LAYERS_MAX;
use blockyard_engine::reply::ImageView;
use blockyard_engine::request::NamedBy;
use clap::Args;

use crate::terminal::check::arguments::{Format, Output};
use crate::terminal::copy::ends::{Source, shown};
use crate::terminal::display::{Display, DisplayArguments};
use crate::terminal::embedded::{Cache, Embedded, EngineArguments, IoBackend, with_engine};
use crate::terminal::exit::Exit;
use crate::terminal::images::info_report::{human, json};
use crate::terminal::images::{Disk, could_not_open, image_policy, sharing};

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
    /// Show the images below FILE, too, as the headers name them: plain files whose format is stated. For a qcow2 image only
    /// with -f qcow2, as it decides which files are opened
    #[arg(long)]
    backing_chain: bool,
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
    /// What whoever names it says of what is below it.
    below: Below,
}

impl Described {
    /// The image below it, if there is one.
    ///
    /// # Errors
    /// Why it is not followed.
    pub(crate) fn below(&self) -> Result<Option<NamedImage>, EngineError> {
        match (&self.view.qcow2, &self.below) {
            (None, _) | (_, Below::Nothing) => Ok(None),
            (_, Below::Image(image)) => Ok(Some((**image).clone())),
            (Some(info), Below::AsNamed) => backing_of(&self.path, info, &image_policy()),
        }
    }
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
        Ok(layers) => {
            for layer in &layers {
                for finding in &layer.view.findings {
                    display.error(&format!("warning: {}: {finding}", shown(&layer.path)));
                }
            }
            let is_json = arguments.json || arguments.output == Output::Json;
            display.result(&match is_json {
                true => json(&layers, arguments.backing_chain),
                false => human(&layers),
            });
            Exit::Success
        }
        Err(text) => {
            display.error(&text);
            Exit::Failed
        }
    }
}

/// The image, and those below it if they are wanted.
async fn describe(
    embedded: &mut Embedded,
    arguments: &InfoArguments,
) -> Result<Vec<Described>, String> {
    let file = &arguments.file;
    let looks_like = Source::open(file)?.looks_like()?;
    let format = arguments.format.map(Into::into);
    let share = arguments.force_share;
    let top = describe_one(embedded, file, format, share, NamedBy::Client).await?;
    if let (None, None, Some(other)) = (format, &top.view.qcow2, looks_like) {
        embedded.display.error(&format!(
            "warning: {} looks like a {other} image, a format that is not supported; it is shown as raw",
            shown(file)
        ));
    }
    let mut layers = vec![top];
    let mut seen = HashSet::from([identity(file)?]);
    while let Some(layer) = layers.last().filter(|_| arguments.backing_chain) {
        let Some(below) = layer.below().map_err(|error| error.text)? else {
            break;
        };
        if format.is_none() {
            return Err(format!(
                "{} names a backing file; say -f qcow2 to follow what it names",
                shown(file)
            ));
        }
        if layers.len() > CHAIN_LAYERS_MAX {
            let text = format!("more than {CHAIN_LAYERS_MAX} images are below it");
            return Err(could_not_open(file, text));
        }
        let next = describe_named(embedded, below, share).await?;
        if !seen.insert(identity(&next.path)?) {
            return Err(format!(
                "Backing file {} creates an infinite loop.",
                shown(&next.path)
            ));
        }
        layers.push(next);
    }
    Ok(layers)
}

/// Which file it is, whatever its name.
pub(crate) fn identity(path: &Path) -> Result<(u64, u64), String> {
    let facts = fs::metadata(path).map_err(|error| could_not_open(path, error))?;
    Ok((facts.dev(), facts.ino()))
}

/// Looks at one image, and at nothing that it names.
///
/// # Errors
/// For the user.
pub(crate) async fn describe_one(
    embedded: &mut Embedded,
    path: &Path,
    format: Option<ImageFormat>,
    force_share: bool,
    named_by: NamedBy,
) -> Result<Described, String> {
    let disk = Disk {
        node: NODE,
        path,
        format: None,
        option: "-f",
        read_only: true,
        sharing: sharing(force_share),
        named_by,
    };
    disk.open_file(embedded).await?;
    let view = look(embedded, path, InfoSpec { format }).await;
    let file = embedded.image_view(NODE).await;
    let closed = embedded.delete_node(NODE).await;
    let view = view?;
    let file = file.map_err(|error| could_not_open(path, error))?;
    closed.map_err(|error| could_not_open(path, error))?;
    Ok(Described {
        path: path.to_owned(),
        view,
        file,
        below: Below::AsNamed,
    })
}

/// The same for one that an image names.
///
/// # Errors
/// For the user.
pub(crate) async fn describe_named(
    embedded: &mut Embedded,
    image: NamedImage,
    force_share: bool,
) -> Result<Described, String> {
    let by_image = NamedBy::Image { folder: None };
    let format = Some(image.format);
    let described = describe_one(embedded, &image.path, format, force_share, by_image).await?;
    Ok(Described {
        below: image.below,
        ..described
    })
}

/// An image and those below it, as far as they can be opened.
pub(crate) async fn layers_from(
    embedded: &mut Embedded,
    top: PathBuf,
    format: ImageFormat,
) -> Vec<PathBuf> {
    let mut layers = Vec::new();
    let mut next = Some(NamedImage {
        path: top,
        format,
        below: Below::AsNamed,
    });
    while let Some(image) = next.take()
        && layers.len() <= CHAIN_LAYERS_MAX
    {
        layers.push(image.path.clone());
        let described = describe_named(embedded, image, true).await;
        next = described
            .ok()
            .and_then(|layer| layer.below().ok().flatten());
    }
    layers
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
