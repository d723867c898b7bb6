//! [`Channel`]: the bytes of one NBD connection as the protocol sees them, on a data thread.
//!
//! What lies between them and the socket is this file's business: nothing yet. One receive and one send may be in flight at a
//! time.

use std::rc::Rc;

use blockyard_ring::{Fill, Part, Received, Sent, Socket};
use blockyard_storage::Buffer;

/// A connection. Both sides see its end when it is dropped.
pub struct Channel {
    socket: Rc<dyn Socket>,
}

impl Channel {
    /// A connection whose bytes go over the socket as they are.
    pub fn plain(socket: Rc<dyn Socket>) -> Self {
        Self { socket }
    }

    /// Receives into `into[from..]`, which is not empty. As [`Socket::receive`].
    ///
    /// # Cancel safety
    /// Bytes may be lost: the connection is of no use afterwards but to be shut down.
    pub async fn receive(&self, into: Buffer, from: usize, fill: Fill) -> Received {
        self.socket.receive(into, from, fill).await
    }

    /// Sends all of these parts, in one go as far as the kernel takes them. As [`Socket::send`].
    ///
    /// # Cancel safety
    /// A part of it may have been sent: the connection is of no use afterwards but to be shut down.
    pub async fn send(&self, parts: Vec<Part>) -> Sent {
        self.socket.send(parts, 0).await
    }

    /// Ends both directions: whatever is in flight ends.
    pub fn shutdown(&self) {
        self.socket.shutdown();
    }

    /// Leaves the connection open when this is dropped. As [`Socket::keep`].
    pub fn keep(&self) {
        self.socket.keep();
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use blockyard_ring::BackendChoice;
    use blockyard_storage::buffer::BufferPool;

    use super::*;
    use crate::data::ThreadSet;
    use crate::node::news::News;

    #[test]
    fn bytes_cross_on_a_data_thread() {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.expect("a runtime").block_on(async {
            for backend in [BackendChoice::Auto, BackendChoice::Threads] {
                let pool = BufferPool::new(1 << 20);
                let threads = ThreadSet::start(1, backend, pool, News::channel().0);
                let threads = threads.expect("a thread");
                let thread = threads.choose();
                let (here, there) = UnixStream::pair().expect("a pair");
                let serve = threads.run(thread, move |context| {
                    Box::pin(async move {
                        let socket = context.files().socket(OwnedFd::from(there));
                        let channel = Channel::plain(socket.expect("a socket"));
                        let buffer = Buffer::zeroed(5);
                        let received = channel.receive(buffer, 0, Fill::All).await;
                        assert_eq!(received.outcome, Ok(5));
                        let parts = vec![Part::Bytes(vec![9]), Part::Buffer(received.buffer)];
                        channel.send(parts).await.outcome
                    })
                });
                let ask = threads.run(thread, move |context| {
                    Box::pin(async move {
                        let socket = context.files().socket(OwnedFd::from(here));
                        let channel = Channel::plain(socket.expect("a socket"));
                        let sent = channel.send(vec![Part::Bytes(b"hello".to_vec())]).await;
                        assert_eq!(sent.outcome, Ok(()));
                        let received = channel.receive(Buffer::zeroed(6), 0, Fill::All).await;
                        received.buffer.as_slice().to_vec()
                    })
                });
                let (served, asked) = tokio::join!(serve, ask);
                assert_eq!(served, Ok(Ok(())));
                assert_eq!(asked.expect("answered"), b"\x09hello");
                threads.end();
            }
        });
    }
}
