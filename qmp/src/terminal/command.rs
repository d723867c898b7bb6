//! How a command on images without a daemon begins and ends: an engine of its own, the result or why there is none, the exit code.

use crate::terminal::display::Display;
use crate::terminal::embedded::{Cache, Embedded, EngineArguments, IoBackend, with_engine};
use crate::terminal::exit::Exit;

/// Runs a command on images, whose tables are looked at often and so come from the page cache. What it came to, and where to tell
/// that.
///
/// # Errors
/// How the program is to end; why has been told.
pub(crate) fn run<T>(
    io_backend: IoBackend,
    display: Display,
    command: impl AsyncFnOnce(&mut Embedded) -> Result<T, String>,
) -> Result<(T, Display), Exit> {
    let engine = EngineArguments {
        cache: Cache::Writeback,
        io_backend,
    };
    let ended = with_engine(engine, display, async move |mut embedded| {
        let ended = command(&mut embedded).await;
        let cancelled = embedded.interrupt.is_asked();
        (ended.map_err(|text| (text, cancelled)), embedded.display)
    });
    let (ended, display) = ended.unwrap_or_else(|(text, display)| (Err((text, false)), display));
    ended
        .map_err(|(text, cancelled)| {
            display.error(&text);
            match cancelled {
                true => Exit::Cancelled,
                false => Exit::Failed,
            }
        })
        .map(|done| (done, display))
}
