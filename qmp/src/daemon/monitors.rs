//! Chardevs at work: those that were opened, and the monitors that speak QMP on them.

use std::io;
use std::time::Duration;

use blockyard_engine::sockets::{Address, Listener, connect};
use tokio::task::JoinSet;

use crate::daemon::chardev::{Backend, Chardev, Role};
use crate::daemon::sockets::{Halves, halves};
use crate::server::connection::{Service, serve};

/// How long accepting pauses when the kernel has no room for another connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// An opened chardev.
pub struct Open {
    /// Its id.
    pub id: String,
    channel: Channel,
}

impl Open {
    /// Whether it is standard input and output.
    pub fn is_stdio(&self) -> bool {
        matches!(self.channel, Channel::Stdio)
    }
}

enum Channel {
    Stdio,
    Null,
    Listening {
        listener: Listener,
        first: Option<Halves>,
    },
    Connecting {
        address: Address,
        reconnect: Option<Duration>,
        first: Option<Halves>,
    },
}

/// Opens a chardev: its socket is bound, or connected. A server that was asked to wait has its first client.
///
/// # Errors
/// A text for the user.
///
/// # Cancel safety
/// A socket that was bound is closed again.
pub async fn open(chardev: Chardev) -> Result<Open, String> {
    let channel = match chardev.backend {
        Backend::Stdio => Channel::Stdio,
        Backend::Null => Channel::Null,
        Backend::Socket {
            address,
            role: Role::Server { wait },
        } => {
            let listener = Listener::bind(&address).await?;
            let first = if wait {
                tracing::info!(id = %chardev.id, "waiting for a client");
                let first = listener.accept().await;
                Some(halves(first.map_err(|error| error.to_string())?))
            } else {
                None
            };
            Channel::Listening { listener, first }
        }
        Backend::Socket {
            address,
            role: Role::Client { reconnect },
        } => {
            let first = match (connect(&address).await, reconnect) {
                (Ok(stream), _) => Some(halves(stream)),
                (Err(text), None) => return Err(text),
                (Err(text), Some(_)) => {
                    tracing::warn!(id = %chardev.id, "{text}, will try again");
                    None
                }
            };
            Channel::Connecting {
                address,
                reconnect,
                first,
            }
        }
    };
    Ok(Open {
        id: chardev.id,
        channel,
    })
}

/// Serves QMP on a chardev for as long as the future is polled.
pub async fn run(open: Open, pretty: bool, service: Service) {
    match open.channel {
        Channel::Null => {}
        Channel::Stdio => {
            let input = Box::new(tokio::io::stdin());
            let output = Box::new(tokio::io::stdout());
            serve(service, input, output, pretty, true).await;
        }
        Channel::Listening { listener, first } => listen(listener, first, pretty, service).await,
        Channel::Connecting {
            address,
            reconnect,
            first,
        } => call(&address, reconnect, first, pretty, service).await,
    }
}

async fn listen(listener: Listener, first: Option<Halves>, pretty: bool, service: Service) {
    let mut connections = JoinSet::new();
    if let Some((input, output)) = first {
        connections.spawn(serve(service.clone(), input, output, pretty, false));
    }
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(stream) => {
                    let (input, output) = halves(stream);
                    connections.spawn(serve(service.clone(), input, output, pretty, false));
                }
                Err(error) => {
                    tracing::warn!(%error, "a client cannot be let in");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            // Reaped as they end, so that the set does not grow.
            Some(_) = connections.join_next() => {}
            () = service.until_ended() => break,
        }
    }
    // Nobody can get in any more; those who are in get what is on its way to them.
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn call(
    address: &Address,
    reconnect: Option<Duration>,
    mut next: Option<Halves>,
    pretty: bool,
    service: Service,
) {
    loop {
        if let Some((input, output)) = next.take() {
            serve(service.clone(), input, output, pretty, false).await;
        }
        let Some(pause) = reconnect else { return };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = service.until_ended() => return,
        }
        match connect(address).await {
            Ok(stream) => next = Some(halves(stream)),
            Err(text) => tracing::debug!("{text}, will try again"),
        }
    }
}

/// As many descriptors as the system allows: every client needs one.
///
/// # Errors
/// The kernel's.
pub fn raise_descriptor_limit() -> io::Result<()> {
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current = limit.maximum;
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit)?;
    Ok(())
}
