//! Opening disks of other hosts: on threads of their own, with a deadline.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use blockyard_nbd::Mode;
use blockyard_nbd::constants::{STRING_BYTES_MAX, transmission_flags};
use blockyard_nbd::handshake::client::Wishes;

use crate::error::EngineError;
use crate::graph::Graph;
use crate::graph::add::Leaf;
use crate::graph::filenames::FileName;
use crate::graph::host_files::OPEN_WAIT;
use crate::graph::options::Resolved;
use crate::node::build::NodePlan;
use crate::node::file_node::FileOptions;
use crate::node::nbd::{NbdConnection, NbdEncryption, NbdTarget, Remote, connect_until};
use crate::request::NbdSpec;
use crate::sockets::Address;

/// Connections where the server can do with several, unless the client says how many.
const CONNECTIONS: u32 = 1;
/// Most connections of one node.
const CONNECTIONS_MAX: u32 = 16;

impl Graph {
    /// Connects to a server.
    ///
    /// # Errors
    /// In QEMU's words where it has some.
    pub(super) async fn open_nbd(
        &self,
        spec: NbdSpec,
        resolved: Resolved,
    ) -> Result<Leaf, EngineError> {
        let encryption = self.nbd_encryption(&spec)?;
        let target = target_of(&spec, encryption)?;
        let connections = spec.connections.unwrap_or(CONNECTIONS);
        if !(1..=CONNECTIONS_MAX).contains(&connections) {
            return Err(EngineError::generic(format!(
                "x-connections must be between 1 and {CONNECTIONS_MAX}"
            )));
        }
        let open_timeout = Duration::from_secs(u64::from(spec.open_timeout_seconds.unwrap_or(0)));
        let first = connected(&target, open_timeout).await?;
        if spec.x_dirty_bitmap.is_some() && first.agreement().context.is_none() {
            let text = "Could not open image: Invalid argument";
            return Err(EngineError::generic(text));
        }
        let delay = Duration::from_secs(u64::from(spec.reconnect_delay_seconds.unwrap_or(0)));
        let connections = usize::try_from(connections).unwrap_or(1);
        let remote = Arc::new(Remote::new(target, first, delay, connections));
        let read_only = nbd_access(&remote, resolved)?;
        let options = FileOptions {
            read_only,
            discard: resolved.discard,
            detect_zeroes: resolved.detect_zeroes,
            no_flush: resolved.cache_no_flush,
        };
        Ok(Leaf {
            read_only,
            exclusive: false,
            locked: None,
            filename: FileName::of_nbd(&spec),
            plan: NodePlan::Nbd { remote, options },
        })
    }

    /// How the connections to a server are encrypted, and what it has to be called then.
    ///
    /// # Errors
    /// In QEMU's words: there are no such credentials.
    fn nbd_encryption(&self, spec: &NbdSpec) -> Result<Option<NbdEncryption>, EngineError> {
        let Some(id) = &spec.tls_creds else {
            if spec.tls_hostname.is_some() {
                let text = "'tls-hostname' is of no use without 'tls-creds'";
                return Err(EngineError::generic(text));
            }
            return Ok(None);
        };
        let credentials = self.credentials(id)?;
        credentials.check_client().map_err(EngineError::generic)?;
        let hostname = spec.tls_hostname.clone().or(match &spec.server {
            Address::Host { host, .. } => Some(host.clone()),
            _ => None,
        });
        Ok(Some(NbdEncryption {
            credentials,
            hostname,
        }))
    }
}

/// Whether a node is read-only whose server may not take writes.
///
/// # Errors
/// The node is to be written.
pub(super) fn nbd_access(remote: &Remote, resolved: Resolved) -> Result<bool, EngineError> {
    let protected = remote.agreement().flags & transmission_flags::READ_ONLY != 0;
    if protected && !resolved.read_only && !resolved.auto_read_only {
        let text = "Could not open image: Permission denied";
        return Err(EngineError::generic(text));
    }
    Ok(protected || resolved.read_only)
}

/// # Errors
/// In QEMU's words: what cannot be asked for.
fn target_of(spec: &NbdSpec, encryption: Option<NbdEncryption>) -> Result<NbdTarget, EngineError> {
    let export_name = spec.export.clone().unwrap_or_default();
    if export_name.len() > STRING_BYTES_MAX {
        return Err(EngineError::generic(
            "export name too long to send to server",
        ));
    }
    let context = spec.x_dirty_bitmap.clone();
    let context = context.unwrap_or_else(|| "base:allocation".to_owned());
    if context.len() > STRING_BYTES_MAX {
        return Err(EngineError::generic(
            "x-dirty-bitmap query too long to send to server",
        ));
    }
    Ok(NbdTarget {
        address: spec.server.clone(),
        wishes: Wishes {
            export_name,
            context,
            tls: encryption.is_some(),
            mode_max: Mode::Extended,
        },
        encryption,
    })
}

/// Tells a thread that nobody waits for it any more.
struct GivenUp(Arc<AtomicBool>);

impl Drop for GivenUp {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// The first connection, tried again for as long as `open_timeout`.
async fn connected(
    target: &NbdTarget,
    open_timeout: Duration,
) -> Result<NbdConnection, EngineError> {
    let given_up = GivenUp(Arc::default());
    let (target, told) = (target.clone(), Arc::clone(&given_up.0));
    let connecting = tokio::task::spawn_blocking(move || {
        let now = Instant::now();
        let deadline = now + open_timeout + OPEN_WAIT;
        connect_until(&target, now + open_timeout, deadline, &told)
    });
    let connected = connecting.await;
    let connected = connected.unwrap_or_else(|_| Err("connecting failed (bug)".to_owned()));
    connected.map_err(EngineError::generic)
}
