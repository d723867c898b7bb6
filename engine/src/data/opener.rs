//! [`ReactorOpener`]: host files as storages of this thread's reactor.

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use blockyard_ring::{HostFile, Reactor, Socket};
use blockyard_storage::{LocalFuture, Storage};

use crate::data::context::HostFiles;

/// Opens host files on the reactor of one data thread.
pub(super) struct ReactorOpener {
    reactor: Rc<Reactor>,
}

impl ReactorOpener {
    /// An opener for `reactor`.
    pub(super) fn new(reactor: Rc<Reactor>) -> Self {
        Self { reactor }
    }
}

impl HostFiles for ReactorOpener {
    fn storage(&self, file: &HostFile, read_only: bool) -> Rc<dyn Storage> {
        self.reactor.file(file.clone(), read_only)
    }

    fn socket(&self, socket: OwnedFd) -> io::Result<Rc<dyn Socket>> {
        self.reactor.socket(socket)
    }

    fn blocking(&self, call: Box<dyn FnOnce() + Send>) -> LocalFuture<'static, ()> {
        self.reactor.blocking(call)
    }
}
