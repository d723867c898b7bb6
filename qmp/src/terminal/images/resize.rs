//! `blockyard resize`: another length for the disk in an image.

use std::path::PathBuf;

use blockyard_engine::images::{ImageReply, ImageWork, NewLength, ResizeSpec, ResizeView};
use blockyard_engine::request::NamedBy;
use clap::Args;

use crate::terminal::check::arguments::Format;
use crate::terminal::command;
use crate::terminal::copy::ends::shown;
use crate::terminal::display::{Display, DisplayArguments};
use crate::terminal::embedded::{Embedded, IoBackend, Sharing};
use crate::terminal::exit::Exit;
use crate::terminal::images::Disk;
use crate::terminal::images::create_options::{PreallocationArgument, byte_count};
use crate::terminal::images::info_report::exactly;

const NODE: &str = "image";

/// Arguments of `resize`.
#[derive(Args, Debug)]
pub struct ResizeArguments {
    /// Image to change
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// New length of its disk in bytes, with k, M, G or T for powers of 1024; behind + or - so many more or fewer than now
    #[arg(value_name = "[+|-]SIZE", value_parser = new_length, allow_hyphen_values = true)]
    length: NewLength,
    /// Format of FILE. Must be given if FILE looks like another one than raw; it is never guessed
    #[arg(long, short, value_enum, value_name = "FORMAT")]
    format: Option<Format>,
    /// Allow the disk to become shorter. What is behind the new end is lost
    #[arg(long)]
    shrink: bool,
    /// Reserve the room of what is added: no, its blocks (falloc), or by writing zeroes (full)
    #[arg(long, value_enum, value_name = "MODE", default_value_t = PreallocationArgument::Off)]
    preallocation: PreallocationArgument,
    /// Print errors only
    #[arg(long, short)]
    quiet: bool,
    /// What carries requests to the kernel; auto: io_uring where it is allowed
    #[arg(long, value_enum, value_name = "KIND", default_value_t = IoBackend::Auto)]
    io_backend: IoBackend,
}

/// Runs `resize`.
pub(crate) fn run(arguments: &ResizeArguments) -> Exit {
    let display = Display::new(DisplayArguments {
        json: false,
        quiet: arguments.quiet,
    });
    let resized = command::run(arguments.io_backend, display, async |embedded| {
        resize(embedded, arguments).await
    });
    match resized {
        Ok((view, display)) => {
            if !arguments.quiet {
                display.result("Image resized.");
            }
            if view.before_bytes != view.after_bytes {
                display.note(&format!(
                    "the disk in {} has {} now, it had {}",
                    shown(&arguments.file),
                    exactly(view.after_bytes),
                    exactly(view.before_bytes)
                ));
            }
            Exit::Success
        }
        Err(exit) => exit,
    }
}

async fn resize(
    embedded: &mut Embedded,
    arguments: &ResizeArguments,
) -> Result<ResizeView, String> {
    let disk = Disk {
        node: NODE,
        path: &arguments.file,
        format: arguments.format,
        option: "-f",
        read_only: false,
        sharing: Sharing::Readers,
        named_by: NamedBy::Client,
    };
    let format = disk.open(embedded).await?;
    let work = ImageWork::Resize(ResizeSpec {
        format: format.into(),
        length: arguments.length,
        may_shrink: arguments.shrink,
        preallocation: arguments.preallocation.into(),
    });
    let resized = embedded
        .work_on_image("resize", NODE, work, |_, _| ())
        .await;
    // Only when the image is closed has everything been written.
    let closed = embedded.delete_node(NODE).await;
    let cannot = |what: &str| format!("cannot resize {}: {what}", shown(disk.path));
    match resized {
        Ok(ImageReply::Resized(view)) => {
            closed
                .map_err(|error| format!("{} was resized, but {}", shown(disk.path), error.text))?;
            Ok(view)
        }
        Ok(_) => Err(cannot("another reply (bug)")),
        Err(error) => Err(cannot(&error.text)),
    }
}

fn new_length(text: &str) -> Result<NewLength, String> {
    match (text.strip_prefix('+'), text.strip_prefix('-')) {
        (Some(more), _) => byte_count(more).map(NewLength::Longer),
        (_, Some(fewer)) => byte_count(fewer).map(NewLength::Shorter),
        _ => byte_count(text).map(NewLength::Exactly),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_absolute_or_relative() {
        assert_eq!(new_length("1k"), Ok(NewLength::Exactly(1024)));
        assert_eq!(new_length("+1k"), Ok(NewLength::Longer(1024)));
        assert_eq!(new_length("-1.5k"), Ok(NewLength::Shorter(1536)));
        for wrong in ["", "+", "-", "+-1", "--1", "1kk"] {
            assert!(new_length(wrong).is_err(), "{wrong}");
        }
    }
}
