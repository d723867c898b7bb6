//! [`Pace`]: how long work tells how far it is, and hears that it shall stop or wait. No clock: whoever drives it has one.

use blockyard_storage::LocalFuture;

/// The work was told to end early.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("Operation canceled")]
pub struct Cancelled;

/// Who watches work in bounded pieces.
pub trait Pace {
    /// So many bytes more are to be done than were known of before.
    fn expect(&self, bytes: u64);

    /// So many bytes of the expected ones are done.
    fn done(&self, bytes: u64);

    /// Called between two pieces, with nothing in flight: may take as long as the work is to pause.
    fn checkpoint(&self) -> LocalFuture<'_, Result<(), Cancelled>>;
}

/// Nobody watches: never pauses, never cancels.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unwatched;

impl Pace for Unwatched {
    fn expect(&self, _: u64) {}

    fn done(&self, _: u64) {}

    fn checkpoint(&self) -> LocalFuture<'_, Result<(), Cancelled>> {
        Box::pin(std::future::ready(Ok(())))
    }
}
