//! [`Clients`]: who hears events. Every event is written once per output form and shared by all.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blockyard_engine::event::Event;

use crate::events;
use crate::server::outbox::Outbox;
use crate::wire::output::render;

/// The connections of all monitors.
#[derive(Debug, Default)]
pub struct Clients {
    list: Mutex<Vec<Client>>,
}

#[derive(Debug)]
struct Client {
    outbox: Arc<Outbox>,
    pretty: bool,
    /// Has negotiated, and hears events from then on.
    hears: bool,
}

impl Clients {
    fn list(&self) -> MutexGuard<'_, Vec<Client>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a client in; it hears nothing yet.
    pub fn enter(&self, outbox: Arc<Outbox>, pretty: bool) {
        self.list().push(Client {
            outbox,
            pretty,
            hears: false,
        });
    }

    /// Lets a client hear events from now on.
    pub fn hear(&self, outbox: &Arc<Outbox>) {
        for client in self.list().iter_mut() {
            if Arc::ptr_eq(&client.outbox, outbox) {
                client.hears = true;
            }
        }
    }

    /// Forgets a client.
    pub fn leave(&self, outbox: &Arc<Outbox>) {
        self.list()
            .retain(|client| !Arc::ptr_eq(&client.outbox, outbox));
    }

    /// Tells an event to everybody who hears. Never waits for any of them.
    pub fn tell(&self, event: &Event) {
        let list = self.list();
        if !list.iter().any(|client| client.hears) {
            return;
        }
        let message = events::message(event);
        let mut forms: [Option<Vec<u8>>; 2] = [None, None];
        for client in list.iter().filter(|client| client.hears) {
            let form = &mut forms[usize::from(client.pretty)];
            let bytes = form.get_or_insert_with(|| render(&message, client.pretty));
            client.outbox.push(&bytes[..]);
        }
    }

    /// Closes everybody's queue: what is in it is still sent.
    pub fn close_all(&self) {
        for client in self.list().iter() {
            client.outbox.close();
        }
    }

    /// Whether nobody is connected.
    pub fn is_empty(&self) -> bool {
        self.list().is_empty()
    }
}
