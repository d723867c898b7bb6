//! `blockyard create`: a new image.
//!
//! ```text
//!   options -> backing looked at -> FILE made, or locked and emptied -> data file -> image -> durable
//! ```
//! Everything that can be refused is refused before a file is made or changes. What this command made it removes again when
//! it fails or is cancelled.

use std::path::{Path, PathBuf};

use blockyard_engine::error::EngineError;
use blockyard_engine::images::create::{self, check_creation};
use blockyard_engine::images::{ImageFormat, ImageReply, ImageWork, InfoSpec};
use blockyard_engine::reply::RoomView;
use blockyard_engine::request::{CreatePreallocation, CreateSpec, NamedBy, WorkSpec};
use clap::Args;

use crate::terminal::check::arguments::Format;
use crate::terminal::command;
use crate::terminal::copy::ends::{FileSystem, Target, folder_of, shown};
use crate::terminal::display::{Display, DisplayArguments};
use crate::terminal::embedded::{Embedded, IoBackend, Sharing};
use crate::terminal::exit::Exit;
use crate::terminal::images::create_options::{DATA_FILE_NODE, ImageOptions, byte_count, help};
use crate::terminal::images::info::layers_from;
use crate::terminal::images::info_report::{beside, exactly};
use crate::terminal::images::{Disk, could_not_open};

const NODE: &str = "image";
const BACKING: &str = "backing";

/// Arguments of `create`.
#[derive(Args, Debug)]
pub struct CreateArguments {
    /// Image to make
    #[arg(value_name = "FILE", required_unless_present = "options")]
    file: Option<PathBuf>,
    /// Length of its disk in bytes, with k, M, G or T for powers of 1024. Without it, that of BACKING
    #[arg(value_name = "SIZE", value_parser = byte_count)]
    size: Option<u64>,
    /// Format of FILE
    #[arg(long, short, value_enum, value_name = "FORMAT", default_value_t = Format::Raw)]
    format: Format,
    /// Options of the image: name=value, several with commas between them; `-o help` lists them
    #[arg(long = "options", short, value_name = "OPTIONS")]
    options: Vec<String>,
    /// Image that holds what the new one does not; a relative name starts in the folder of FILE
    #[arg(
        long,
        short,
        value_name = "BACKING",
        alias = "backing-file",
        requires = "backing_format"
    )]
    backing: Option<String>,
    /// Format of BACKING; it is never guessed
    #[arg(long, short = 'F', value_name = "FORMAT")]
    backing_format: Option<String>,
    /// Do not look at BACKING, which may not even exist; SIZE must be given
    #[arg(long, short = 'u')]
    backing_unsafe: bool,
    /// Overwrite FILE if it exists. Its content is lost
    #[arg(long, alias = "overwrite")]
    force: bool,
    /// Print errors only
    #[arg(long, short)]
    quiet: bool,
    /// What carries requests to the kernel; auto: io_uring where it is allowed
    #[arg(long, value_enum, value_name = "KIND", default_value_t = IoBackend::Auto)]
    io_backend: IoBackend,
}

/// A file that is going to be made.
struct New<'a> {
    path: &'a Path,
    format: Format,
    options: ImageOptions,
    size_bytes: u64,
    force: bool,
}

/// Runs `create`.
pub(crate) fn run(arguments: &CreateArguments) -> Exit {
    let display = Display::new(DisplayArguments {
        json: false,
        quiet: arguments.quiet,
    });
    if arguments
        .options
        .iter()
        .any(|text| matches!(text.as_str(), "help" | "?"))
    {
        display.result(help(arguments.format));
        return Exit::Success;
    }
    let prepared = options(arguments);
    let (path, options) = match (&arguments.file, prepared) {
        (Some(path), Ok(options)) => (path, options),
        (None, _) => {
            display.error("the name of the new image is missing");
            return Exit::Failed;
        }
        (_, Err(text)) => {
            display.error(&text);
            return Exit::Failed;
        }
    };
    let made = command::run(arguments.io_backend, display, async |embedded| {
        create(embedded, path, options, arguments).await
    });
    match made {
        Ok((text, display)) => {
            if !arguments.quiet {
                display.result(&text);
            }
            Exit::Success
        }
        Err(exit) => exit,
    }
}

/// All options together, wherever they were given.
fn options(arguments: &CreateArguments) -> Result<ImageOptions, String> {
    let mut options = ImageOptions::read(&arguments.options, arguments.format)?;
    if options.size_bytes.is_some() && arguments.size.is_some() {
        return Err("The image size must be specified only once".to_owned());
    }
    options.size_bytes = options.size_bytes.or(arguments.size);
    if arguments.backing.is_some() {
        if arguments.format == Format::Raw {
            return Err("A raw image has no backing file; say -f qcow2".to_owned());
        }
        if options.backing_file.is_some() {
            return Err("The backing file must be specified only once".to_owned());
        }
        options.backing_file.clone_from(&arguments.backing);
    }
    if arguments.backing_format.is_some() {
        options.backing_format.clone_from(&arguments.backing_format);
    }
    if options.backing_file.is_some() && options.backing_format.is_none() {
        return Err(
            "The format of the backing file is missing; say -F raw or -F qcow2, it is never guessed"
                .to_owned(),
        );
    }
    Ok(options)
}

async fn create(
    embedded: &mut Embedded,
    path: &Path,
    mut options: ImageOptions,
    arguments: &CreateArguments,
) -> Result<String, String> {
    let backing_bytes = match &options.backing_file {
        Some(backing) if !arguments.backing_unsafe => {
            let format = options.backing_format.as_deref().unwrap_or_default();
            Some(look_at_backing(embedded, path, backing, format).await?)
        }
        _ => None,
    };
    let size_bytes = options.size_bytes.or(backing_bytes);
    let size_bytes = size_bytes.ok_or("Image creation needs a size parameter")?;
    // Disks are whole sectors long.
    let size_bytes = size_bytes
        .checked_next_multiple_of(blockyard_engine::limits::SECTOR_BYTES)
        .ok_or("The image size is too large")?;
    options.size_bytes = Some(size_bytes);
    let new = New {
        path,
        format: arguments.format,
        options,
        size_bytes,
        force: arguments.force,
    };
    let below = new.below(embedded).await;
    new.make(embedded, &below).await?;
    let mut text = format!(
        "Created {}: {}, {}",
        shown(path),
        match arguments.format {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        },
        exactly(size_bytes)
    );
    if let Some(backing) = &new.options.backing_file {
        text += &format!(", on '{backing}'");
    }
    Ok(text)
}

/// A new image on an existing one, as long as that and without any content of its own: an external snapshot.
pub(crate) struct Overlay<'a> {
    new: New<'a>,
    /// As it names the image below it.
    backing: String,
    /// What it takes.
    pub(crate) room: RoomView,
}

/// Looks at what is there for a new image on `image`; nothing is made yet.
///
/// # Errors
/// For the user: why there can be no such image. Nothing that exists is overwritten.
pub(crate) async fn plan_overlay<'a>(
    embedded: &mut Embedded,
    path: &'a Path,
    image: &Path,
    image_format: Format,
    mut options: ImageOptions,
) -> Result<Overlay<'a>, String> {
    let format = match image_format {
        Format::Raw => "raw",
        Format::Qcow2 => "qcow2",
    };
    let name = name_from(path, image)?;
    let length_bytes = look_at_backing(embedded, path, &name, format).await?;
    let size_bytes = options.size_bytes.unwrap_or(length_bytes);
    let size_bytes = size_bytes
        .checked_next_multiple_of(blockyard_engine::limits::SECTOR_BYTES)
        .ok_or("The image size is too large")?;
    options.size_bytes = Some(size_bytes);
    options.backing_file = Some(name.clone());
    options.backing_format = Some(format.to_owned());
    let data_file = options.data_file.as_deref();
    for file in [Some(path), data_file].into_iter().flatten() {
        if file.symlink_metadata().is_ok() {
            return Err(format!("{} exists already", shown(file)));
        }
    }
    let room = room_of_new(path, &options, size_bytes)?;
    let new = New {
        path,
        format: Format::Qcow2,
        options,
        size_bytes,
        force: false,
    };
    Ok(Overlay {
        new,
        backing: name,
        room,
    })
}

impl Overlay<'_> {
    /// Makes it. Returns what to tell.
    ///
    /// # Errors
    /// For the user; nothing has changed then, and nothing new is left.
    pub(crate) async fn make(&self, embedded: &mut Embedded) -> Result<String, String> {
        // Nothing is overwritten.
        self.new.make(embedded, &[]).await?;
        let of_what = self.what();
        Ok(format!(
            "Created {of_what}, which must not change from now on"
        ))
    }

    /// What it is, for people.
    pub(crate) fn what(&self) -> String {
        format!(
            "{}: qcow2, {}, on '{}'",
            shown(self.new.path),
            exactly(self.new.size_bytes),
            self.backing
        )
    }
}

/// What the files of a new image take where they will be.
///
/// # Errors
/// For the user: there can be no such image.
fn room_of_new(path: &Path, options: &ImageOptions, size_bytes: u64) -> Result<RoomView, String> {
    let spec = options.qcow2_spec(NODE.to_owned(), size_bytes);
    let needed = create::room_of_new(&spec);
    let needed = needed.map_err(|error| format!("{}: {error}", path.display()))?;
    let of_image = FileSystem::of(path);
    let of_data = match &options.data_file {
        Some(data_file) => FileSystem::of(data_file),
        None => of_image,
    };
    let in_image = needed.metadata_bytes.saturating_add(needed.data_bytes);
    let is_enough = |system: Option<FileSystem>, bytes: u64| match bytes {
        0 => Some(true),
        bytes => system.map(|system| bytes <= system.free_bytes),
    };
    let id = |system: Option<FileSystem>| system.map(|system| system.id);
    let fits = match id(of_image) == id(of_data) {
        true => is_enough(of_image, in_image.saturating_add(needed.data_file_bytes)),
        false => match (
            is_enough(of_image, in_image),
            is_enough(of_data, needed.data_file_bytes),
        ) {
            (Some(false), _) | (_, Some(false)) => Some(false),
            (Some(true), Some(true)) => Some(true),
            _ => None,
        },
    };
    Ok(RoomView {
        data_bytes: needed.data_bytes.saturating_add(needed.data_file_bytes),
        metadata_bytes: needed.metadata_bytes,
        bitmaps_bytes: 0,
        free_bytes: of_data.map(|system| system.free_bytes),
        fits,
    })
}

/// Makes a qcow2 image of these options in a file that was claimed for it and that nobody else uses. What was in it is lost.
///
/// # Errors
/// For the user; the file has no content then, or that of no image.
pub(crate) async fn make_in(
    embedded: &mut Embedded,
    target: &Target,
    options: ImageOptions,
    size_bytes: u64,
) -> Result<(), String> {
    let new = New {
        path: &target.path,
        format: Format::Qcow2,
        options: ImageOptions {
            size_bytes: Some(size_bytes),
            ..options
        },
        size_bytes,
        force: false,
    };
    new.fill(embedded, target, None).await
}

/// Whether an image of these options can be made.
///
/// # Errors
/// For the user.
pub(crate) fn check_options(options: &ImageOptions, size_bytes: u64) -> Result<(), String> {
    let checked = check_creation(&options.qcow2_spec(NODE.to_owned(), size_bytes));
    checked.map_err(|error| error.text)
}

/// The name of an image as one beside it, or elsewhere, is to say it: without folder, or from the root on.
///
/// # Errors
/// For the user: there is no such folder, or no such name.
pub(crate) fn name_from(new: &Path, image: &Path) -> Result<String, String> {
    let cannot = |path: &Path, error: &dyn std::fmt::Display| format!("{}: {error}", shown(path));
    let folder = |path: &Path| {
        let folder = folder_of(path).canonicalize();
        folder.map_err(|error| cannot(path, &crate::error::reason(&error)))
    };
    let file = image
        .file_name()
        .ok_or_else(|| cannot(image, &"it is no file"))?;
    let (of_new, of_image) = (folder(new)?, folder(image)?);
    let name = match of_new == of_image {
        true => PathBuf::from(file),
        false => of_image.join(file),
    };
    let name = name.into_os_string().into_string();
    let name = name.map_err(|_| cannot(image, &"its name is no UTF-8"))?;
    // Else what is before the colon would be a protocol.
    let is_bare = !name.starts_with('/') && name.contains(':');
    Ok(if is_bare { format!("./{name}") } else { name })
}

/// Finds out how long the disk of a backing file is.
async fn look_at_backing(
    embedded: &mut Embedded,
    image: &Path,
    name: &str,
    format: &str,
) -> Result<u64, String> {
    let format = match format {
        "raw" => Format::Raw,
        "qcow2" => Format::Qcow2,
        other => return Err(format!("Unknown driver '{other}'")),
    };
    let path = PathBuf::from(beside(image, name));
    let advice = |text: String| format!("{text}\nCould not open backing image.");
    let disk = Disk {
        node: BACKING,
        path: &path,
        format: Some(format),
        option: "-F",
        read_only: true,
        sharing: Sharing::Readers,
        named_by: NamedBy::Client,
    };
    disk.format().map_err(advice)?;
    disk.open_file(embedded).await.map_err(advice)?;
    let work = ImageWork::Info(InfoSpec {
        format: Some(format.into()),
    });
    let looked = embedded
        .work_on_image("create", BACKING, work, |_, _| ())
        .await;
    let failed = |error: EngineError| advice(could_not_open(&path, error));
    let looked = looked.map_err(failed)?;
    embedded.delete_node(BACKING).await.map_err(failed)?;
    match looked {
        ImageReply::Described(view) => Ok(view.virtual_size_bytes),
        _ => Err("another reply (bug)".to_owned()),
    }
}

impl New<'_> {
    /// The images that it is going to stand on, as far as any of them could be overwritten.
    async fn below(&self, embedded: &mut Embedded) -> Vec<PathBuf> {
        let data_file = self.options.data_file.as_deref();
        let overwrites = self.force && (self.path.exists() || data_file.is_some_and(Path::exists));
        let format = match self.options.backing_format.as_deref() {
            Some("qcow2") => ImageFormat::Qcow2,
            _ => ImageFormat::Raw,
        };
        match &self.options.backing_file {
            Some(backing) if overwrites => {
                let top = PathBuf::from(beside(self.path, backing));
                layers_from(embedded, top, format).await
            }
            _ => Vec::new(),
        }
    }

    /// Makes it, unless it would take the place of one of those `below` it.
    async fn make(&self, embedded: &mut Embedded, below: &[PathBuf]) -> Result<(), String> {
        if self.format == Format::Qcow2 {
            let spec = self.options.qcow2_spec(NODE.to_owned(), self.size_bytes);
            let cannot = |error: EngineError| format!("{}: {error}", self.path.display());
            check_creation(&spec).map_err(cannot)?;
        }
        let target = Target::claim(self.path, self.force, None)?;
        let data_file = match &self.options.data_file {
            Some(path) => match Target::claim(path, self.force, None) {
                Ok(data_file) => Some(data_file),
                Err(text) => return Err(cleaned_up(text, [Some(&target), None])),
            },
            None => None,
        };
        let distinct = check_distinct(&target, data_file.as_ref(), below);
        let made = match distinct {
            Ok(()) => self.fill(embedded, &target, data_file.as_ref()).await,
            Err(text) => Err(text),
        };
        made.map_err(|text| cleaned_up(text, [Some(&target), data_file.as_ref()]))
    }

    async fn fill(
        &self,
        embedded: &mut Embedded,
        target: &Target,
        data_file: Option<&Target>,
    ) -> Result<(), String> {
        if self.format == Format::Raw && target.is_device {
            return Err(format!(
                "{} is a block device and raw already: there is nothing to make",
                shown(self.path)
            ));
        }
        let (size_bytes, preallocation) = match self.format {
            Format::Raw => (self.size_bytes, self.options.preallocation),
            Format::Qcow2 => (0, None),
        };
        for file in [Some(target), data_file].into_iter().flatten() {
            if !file.is_device {
                let work = WorkSpec::Create(CreateSpec::File {
                    filename: file.path.clone(),
                    size: size_bytes,
                    preallocation,
                    nocow: self.options.nocow,
                    extent_size_hint: self.options.extent_size_hint,
                });
                self.run(embedded, work).await?;
            }
        }
        if self.format == Format::Qcow2 {
            self.write_header(embedded, target, data_file).await?;
        }
        for file in [data_file, Some(target)].into_iter().flatten() {
            file.make_durable(None)?;
        }
        Ok(())
    }

    /// Makes the image in its empty file.
    async fn write_header(
        &self,
        embedded: &mut Embedded,
        target: &Target,
        data_file: Option<&Target>,
    ) -> Result<(), String> {
        let open = |node, path| Disk {
            node,
            path,
            format: Some(Format::Raw),
            option: "-f",
            read_only: false,
            sharing: Sharing::Readers,
            named_by: NamedBy::Client,
        };
        open(NODE, &target.path).open_file(embedded).await?;
        if let Some(data_file) = data_file {
            let disk = open(DATA_FILE_NODE, &data_file.path);
            disk.open_file(embedded).await?;
        }
        let spec = self.options.qcow2_spec(NODE.to_owned(), self.size_bytes);
        let work = WorkSpec::Create(CreateSpec::Qcow2(Box::new(spec)));
        self.run(embedded, work).await?;
        let nodes = [data_file.map(|_| DATA_FILE_NODE), Some(NODE)];
        for node in nodes.into_iter().flatten() {
            let closed = embedded.delete_node(node).await;
            closed.map_err(|error| format!("{}: {error}", self.path.display()))?;
        }
        Ok(())
    }

    async fn run(&self, embedded: &mut Embedded, work: WorkSpec) -> Result<(), String> {
        let takes_long = self
            .options
            .preallocation
            .unwrap_or(CreatePreallocation::Off)
            != CreatePreallocation::Off;
        let said = |text: String| format!("{}: {text}", self.path.display());
        let job = embedded.run_job("create", work, takes_long).await;
        let job = job.map_err(|error| said(error.text))?;
        job.error.map_or(Ok(()), |error| Err(said(error)))
    }
}

/// That neither file takes the other one's place or that of an image below.
fn check_distinct(
    target: &Target,
    data_file: Option<&Target>,
    below: &[PathBuf],
) -> Result<(), String> {
    if let Some(data_file) = data_file
        && target.is_at(&data_file.path)
    {
        return Err(format!(
            "{} and its data file {} are the same file",
            shown(&target.path),
            shown(&data_file.path)
        ));
    }
    for file in [Some(target), data_file].into_iter().flatten() {
        if let Some(needed) = below.iter().find(|layer| file.is_at(layer)) {
            return Err(format!(
                "{} cannot be overwritten: the new image is to stand on it ({})",
                shown(&file.path),
                shown(needed)
            ));
        }
    }
    Ok(())
}

/// Removes what was made, and says so.
fn cleaned_up(mut text: String, files: [Option<&Target>; 2]) -> String {
    for file in files.into_iter().flatten() {
        let path = shown(&file.path);
        text += &match file.remove() {
            Ok(true) => continue,
            Ok(false) if file.is_new => format!("; {path} is gone"),
            Ok(false) if file.is_device || !file.has_changed() => continue,
            Ok(false) => format!("; {path} stays, without its old content"),
            Err(error) => format!("; {error}"),
        };
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overlay_names_its_image_as_it_will_be_looked_for() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = folder.path().canonicalize().expect("exists");
        std::fs::create_dir(root.join("sub")).expect("new");
        let name = |new: &str, image: &str| name_from(&root.join(new), &root.join(image));
        assert_eq!(name("new", "image").as_deref(), Ok("image"));
        assert_eq!(name("sub/../new", "image").as_deref(), Ok("image"));
        assert_eq!(name("new", "a:b").as_deref(), Ok("./a:b"));
        let outside = format!("{}/image", root.display());
        assert_eq!(name("sub/new", "image"), Ok(outside));
        assert!(name("nowhere/new", "image").is_err());
    }
}
