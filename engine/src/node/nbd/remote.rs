//! [`Remote`]: an NBD server as every thread knows it, and its open connections.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blockyard_nbd::handshake::client::Agreement;
use blockyard_nbd::transmission::{Command, Request};
use blockyard_storage::error::EIO;
use rustix::net::{SendFlags, Shutdown};

use crate::clock::Moment;
use crate::nbd::channel::SharedEncryption;
use crate::node::nbd::NbdTarget;

/// A connection whose handshake is over. With the last of its users it is closed, as the protocol wants it if no request is in
/// flight.
#[derive(Debug)]
pub struct NbdConnection {
    socket: OwnedFd,
    agreement: Agreement,
    encryption: Option<SharedEncryption>,
    /// Somebody has requests in flight.
    busy: AtomicBool,
    broken: AtomicBool,
}

impl NbdConnection {
    /// A connection that nobody uses yet.
    pub fn new(
        socket: OwnedFd,
        agreement: Agreement,
        encryption: Option<SharedEncryption>,
    ) -> Self {
        Self {
            socket,
            agreement,
            encryption,
            busy: AtomicBool::new(false),
            broken: AtomicBool::new(false),
        }
    }

    /// What the server has agreed to.
    pub fn agreement(&self) -> &Agreement {
        &self.agreement
    }

    /// What lies between plain bytes and the socket, on whichever thread.
    pub(super) fn encryption(&self) -> Option<&SharedEncryption> {
        self.encryption.as_ref()
    }

    /// The descriptor once more.
    pub(super) fn socket(&self) -> std::io::Result<OwnedFd> {
        self.socket.try_clone()
    }

    /// Has it for requests from now on; `false`: somebody else has requests in flight.
    pub(super) fn occupy(&self) -> bool {
        !self.is_broken() && !self.busy.swap(true, Ordering::AcqRel)
    }

    /// Lets others have it: nothing is in flight.
    pub(super) fn release(&self) {
        self.busy.store(false, Ordering::Release);
    }

    /// It is of no use any more.
    pub(super) fn give_up(&self) {
        self.broken.store(true, Ordering::Release);
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }
}

impl Drop for NbdConnection {
    fn drop(&mut self) {
        if !self.is_broken() && !self.busy.load(Ordering::Acquire) {
            let mut farewell = Vec::new();
            let request = Request {
                cookie: 0,
                command: Command::Disconnect,
                flags: 0,
                offset: 0,
                length_bytes: 0,
                payload_bytes: 0,
            };
            request.put_head(self.agreement.mode, &mut farewell);
            if let Some(encryption) = &self.encryption {
                farewell = encryption.last_words(&farewell);
            }
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            // A server that does not hear it notices the end all the same.
            let _ = rustix::net::send(&self.socket, &farewell, flags);
        }
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
    }
}

/// A server, what a node may count on, and what has to be remembered when the node moves.
#[derive(Debug)]
pub struct Remote {
    target: NbdTarget,
    /// What was agreed on first; every later connection has to offer it, too.
    agreement: Agreement,
    reconnect_delay: Duration,
    connections: Vec<Mutex<Option<Arc<NbdConnection>>>>,
    /// Until when requests wait in the outage that is now, in nanoseconds since the start of the data threads' clocks. 0: there is
    /// none.
    outage_until_ns: AtomicU64,
    /// The node is there. Without it nobody has to connect any more.
    closed: Arc<AtomicBool>,
    /// Counts changes: each when it is sent, and once more when it is answered.
    changes: AtomicU64,
    /// That count when a change was answered last.
    answered: AtomicU64,
    /// That count when the last flush that went well began.
    flushed: AtomicU64,
    /// Error number of a flush that failed; nothing is believed to be safe afterwards. 0: none.
    flush_errno: AtomicI32,
}

impl Remote {
    /// A server to which `first` leads, over up to `connections` of them where it can do with several.
    pub fn new(
        target: NbdTarget,
        first: NbdConnection,
        reconnect_delay: Duration,
        connections: usize,
    ) -> Self {
        use blockyard_nbd::constants::transmission_flags::CAN_MULTI_CONN;
        let agreement = first.agreement().clone();
        let several = agreement.flags & CAN_MULTI_CONN != 0;
        let count = if several { connections.max(1) } else { 1 };
        let mut first = Some(Arc::new(first));
        let connections = (0..count).map(|_| Mutex::new(first.take())).collect();
        Self {
            target,
            agreement,
            reconnect_delay,
            connections,
            outage_until_ns: AtomicU64::new(0),
            closed: Arc::default(),
            changes: AtomicU64::new(0),
            answered: AtomicU64::new(0),
            flushed: AtomicU64::new(0),
            flush_errno: AtomicI32::new(0),
        }
    }

    pub(super) fn target(&self) -> &NbdTarget {
        &self.target
    }

    /// What the node may count on.
    pub fn agreement(&self) -> &Agreement {
        &self.agreement
    }

    pub(super) fn reconnect_delay(&self) -> Duration {
        self.reconnect_delay
    }

    pub(super) fn closed(&self) -> &Arc<AtomicBool> {
        &self.closed
    }

    /// How many connections there may be.
    pub(super) fn connections_max(&self) -> usize {
        self.connections.len()
    }

    fn place(&self, index: usize) -> Option<MutexGuard<'_, Option<Arc<NbdConnection>>>> {
        let place = self.connections.get(index)?;
        Some(place.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A connection that is open, as far as is known.
    pub(super) fn connection(&self, index: usize) -> Option<Arc<NbdConnection>> {
        let connection = self.place(index)?.clone();
        connection.filter(|connection| !connection.is_broken())
    }

    /// Puts a new connection in the place of one that broke or is somebody else's.
    ///
    /// # Errors
    /// The export is not what it was.
    pub(super) fn replace(&self, index: usize, new: NbdConnection) -> Result<(), String> {
        self.check_same(new.agreement())?;
        if let Some(mut place) = self.place(index) {
            *place = Some(Arc::new(new));
        }
        self.connected();
        Ok(())
    }

    /// Somebody wants a connection and finds none: until when everybody waits for one. An outage has one delay, which begins with
    /// the first who notices; whoever comes behind its end does not wait.
    pub(super) fn outage_until(&self, now: Moment) -> Moment {
        let nanos = |moment: Moment| u64::try_from(moment.since_start().as_nanos());
        let until_ns = nanos(now.after(self.reconnect_delay)).unwrap_or(u64::MAX);
        let (none, new) = (0, until_ns.max(1));
        let told =
            self.outage_until_ns
                .compare_exchange(none, new, Ordering::AcqRel, Ordering::Acquire);
        Moment::new(Duration::from_nanos(told.err().unwrap_or(new)))
    }

    /// There is a connection: the next outage is another one.
    pub(super) fn connected(&self) {
        if self.outage_until_ns.load(Ordering::Relaxed) != 0 {
            self.outage_until_ns.store(0, Ordering::Release);
        }
    }

    fn check_same(&self, new: &Agreement) -> Result<(), String> {
        use blockyard_nbd::constants::transmission_flags as flags;
        let minimum =
            |agreement: &Agreement| agreement.block_sizes.map_or(1, |sizes| sizes.minimum);
        let maximum = |agreement: &Agreement| {
            agreement
                .block_sizes
                .map_or(u32::MAX, |sizes| sizes.maximum)
        };
        let mut needed = flags::SEND_FLUSH | flags::SEND_TRIM | flags::SEND_WRITE_ZEROES;
        if self.connections_max() > 1 {
            // Else a flush on one connection would tell nothing of what was written on another.
            needed |= flags::CAN_MULTI_CONN;
        }
        let needed = self.agreement.flags & needed;
        let less = new.length_bytes != self.agreement.length_bytes
            || new.flags & needed != needed
            || new.flags & flags::READ_ONLY & !self.agreement.flags != 0
            || minimum(new) > minimum(&self.agreement)
            || maximum(new) < maximum(&self.agreement);
        if less {
            return Err("The export is not what it was before the connection broke".to_owned());
        }
        Ok(())
    }

    /// A change is about to be sent. Whatever becomes of it, some of it may be there.
    pub(super) fn writes(&self) {
        self.changes.fetch_add(1, Ordering::AcqRel);
    }

    /// The server has answered a change.
    pub(super) fn wrote(&self) {
        let before = self.changes.fetch_add(1, Ordering::AcqRel);
        self.answered
            .fetch_max(before.saturating_add(1), Ordering::AcqRel);
    }

    /// What a flush that begins now makes safe; `None`: it has nothing to do.
    pub(super) fn flushing(&self) -> Option<u64> {
        let changes = self.changes.load(Ordering::Acquire);
        (changes > self.flushed.load(Ordering::Acquire)).then_some(changes)
    }

    /// A flush went well; what it [began with](Self::flushing).
    pub(super) fn flushed(&self, changes: u64) {
        self.flushed.fetch_max(changes, Ordering::AcqRel);
    }

    /// Whether something that the server has answered is not known to be safe.
    pub(super) fn is_unflushed(&self) -> bool {
        self.answered.load(Ordering::Acquire) > self.flushed.load(Ordering::Acquire)
    }

    /// A connection broke: without a delay nobody has said that the server can be trusted to be the same afterwards, so what
    /// it has not flushed counts as lost.
    pub(super) fn connection_lost(&self) {
        if self.reconnect_delay.is_zero() && self.is_unflushed() && self.flush_errno().is_none() {
            tracing::error!(
                "writes that an NBD server had answered may be lost with its connection: the node takes no more \
                 of them (with a reconnect-delay the server is trusted to have kept them)"
            );
            self.flush_failed(EIO);
        }
    }

    /// Nothing is believed to be safe from now on.
    pub(super) fn flush_failed(&self, errno: i32) {
        let none = 0;
        let _ = self
            .flush_errno
            .compare_exchange(none, errno, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Why nothing is safe any more.
    pub(super) fn flush_errno(&self) -> Option<i32> {
        let errno = self.flush_errno.load(Ordering::Acquire);
        (errno != 0).then_some(errno)
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use blockyard_nbd::Mode;
    use blockyard_nbd::constants::transmission_flags::{CAN_MULTI_CONN, SEND_FLUSH};
    use blockyard_nbd::handshake::client::Wishes;

    use super::*;
    use crate::sockets::Address;

    fn connection(flags: u16) -> NbdConnection {
        let (socket, _) = UnixStream::pair().expect("a pair");
        let agreement = Agreement {
            mode: Mode::Simple,
            length_bytes: 4096,
            flags,
            block_sizes: None,
            context: None,
        };
        NbdConnection::new(socket.into(), agreement, None)
    }

    #[test]
    fn an_outage_has_one_delay() {
        let target = target();
        let remote = Remote::new(target, connection(0), Duration::from_secs(5), 1);
        let at = |seconds| Moment::new(Duration::from_secs(seconds));
        for (now, until) in [(10, 15), (12, 15), (300, 15)] {
            assert_eq!(remote.outage_until(at(now)), at(until), "{now}");
        }
        remote.connected();
        let (now, delay) = (Duration::new(301, 999_999), Duration::from_secs(5));
        let until = Moment::new(now + delay);
        assert_eq!(
            remote.outage_until(Moment::new(now)),
            until,
            "not a moment less"
        );
        remote.connected();
        assert_eq!(remote.outage_until(at(301)), at(306));
        remote.replace(0, connection(0)).expect("the same");
        assert_eq!(remote.outage_until(at(302)), at(307));
    }

    fn target() -> NbdTarget {
        NbdTarget {
            address: Address::Path("none".to_owned()),
            wishes: Wishes {
                export_name: String::new(),
                context: "base:allocation".to_owned(),
                tls: false,
                mode_max: Mode::Simple,
            },
            encryption: None,
        }
    }

    #[test]
    fn several_connections_stay_with_a_server_whose_flushes_are_for_all_of_them() {
        let target = target();
        let both = SEND_FLUSH | CAN_MULTI_CONN;
        for (connections, flags, is_taken) in [
            (1, SEND_FLUSH, true),
            (2, SEND_FLUSH, false),
            (2, both, true),
            (1, CAN_MULTI_CONN, false),
        ] {
            let delay = Duration::from_secs(1);
            let remote = Remote::new(target.clone(), connection(both), delay, connections);
            let taken = remote.replace(0, connection(flags));
            assert_eq!(taken.is_ok(), is_taken, "{connections}, {flags:#x}");
        }
    }
}
