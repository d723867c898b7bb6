//! [`Publisher`]: every event, in one order, to every listener.

use std::cell::RefCell;
use std::time::SystemTime;

use crate::event::{Event, EventKind};

/// Called for every event, in order, on the manager's thread. Must not block.
pub(crate) type Listener = Box<dyn Fn(&Event) + Send>;

/// The listeners.
#[derive(Default)]
pub(super) struct Publisher {
    listeners: RefCell<Vec<Listener>>,
}

impl Publisher {
    /// Lets `listener` hear everything from now on.
    pub(super) fn add(&self, listener: Listener) {
        self.listeners.borrow_mut().push(listener);
    }

    /// Tells everybody.
    pub(super) fn publish(&self, kind: EventKind) {
        let event = Event {
            time: SystemTime::now(),
            kind,
        };
        tracing::debug!(event = ?event.kind, "event");
        for listener in self.listeners.borrow().iter() {
            listener(&event);
        }
    }
}
