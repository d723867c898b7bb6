//! [`Root`]: where somebody outside of the graph reads and writes: an export, a test. It stays what it is while the graph puts it
//! on another node.
//!
//! Who changes what a root stands on drains it: new requests wait at its gate, those inside end. What has begun to change the
//! node ends also when whoever asked for it gives up, so that nothing reaches a node that the root has left. While a mirror keeps
//! writers waiting, which may take as long as its client likes, they wait here and are not inside: so nobody waits for them, and
//! they can be sent away.

use std::cell::{Cell, RefCell};
use std::pin::pin;
use std::rc::Rc;

use blockyard_storage::error::{EBADF, EPERM};
use blockyard_storage::{Buffer, ByteRange, Operation, StorageError, ZeroMode};
use futures_util::future::select;
use tokio::sync::Notify;

use crate::data::Spawner;
use crate::error::NodeError;
use crate::node::chain::{ChainExtent, chain_status};
use crate::node::gate::{Closed, Gate, Pass, Way};
use crate::node::{Node, NodeFacts, NodeTransfer};

/// A root inside the engine; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RootId(pub u64);

/// A user outside of the graph, on the data thread of its node.
pub struct Root {
    /// `None`: closed.
    node: RefCell<Option<Rc<dyn Node>>>,
    writable: bool,
    gate: Rc<Gate>,
    /// What keeps requests waiting: two for each drain.
    drained: RefCell<Vec<(Closed, Closed)>>,
    /// Nobody may wait for the end of a mirror.
    is_leaving: Cell<bool>,
    leaves: Notify,
    spawner: Spawner,
}

impl Root {
    /// A root on `node`, which changes it only if it is `writable`.
    pub fn new(node: Rc<dyn Node>, writable: bool, spawner: Spawner) -> Self {
        Self {
            node: RefCell::new(Some(node)),
            writable,
            gate: Rc::default(),
            drained: RefCell::default(),
            is_leaving: Cell::new(false),
            leaves: Notify::new(),
            spawner,
        }
    }

    /// Facts of its node as of now.
    ///
    /// # Errors
    /// `EBADF` once it is closed.
    pub fn facts(&self) -> Result<NodeFacts, NodeError> {
        let node = self.node_for(Operation::Read, ByteRange::default(), false)?;
        let facts = node.facts();
        Ok(NodeFacts {
            read_only: facts.read_only || !self.writable,
            ..facts
        })
    }

    /// Fills the whole of `into` from `offset`.
    ///
    /// # Cancel safety
    /// Nothing has changed.
    pub async fn read(&self, offset: u64, into: Buffer) -> NodeTransfer {
        let _pass = self.gate.enter(Way::Read).await;
        let range = ByteRange::new(offset, into.len() as u64);
        match self.node_for(Operation::Read, range, false) {
            Ok(node) => node.read(offset, into).await,
            Err(error) => NodeTransfer {
                buffer: into,
                outcome: Err(error),
            },
        }
    }

    /// What `range` is through all layers below, and which of them decides. As
    /// [`chain_status`](crate::node::chain::chain_status); what no layer holds is unallocated.
    ///
    /// # Errors
    /// As the node's.
    ///
    /// # Cancel safety
    /// Nothing has changed.
    pub async fn layers(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> Result<Vec<ChainExtent>, NodeError> {
        let _pass = self.gate.enter(Way::Read).await;
        let node = self.node_for(Operation::Allocation, range, false)?;
        chain_status(&node, Some(usize::MAX), range, extents_max).await
    }

    /// Writes the whole of `from` at `offset`.
    ///
    /// # Cancel safety
    /// It goes on to its end once it has begun.
    pub async fn write(&self, offset: u64, from: Buffer) -> NodeTransfer {
        let range = ByteRange::new(offset, from.len() as u64);
        match self.enter_writing(Operation::Write, range, true).await {
            Ok((pass, node)) => {
                let write = Box::pin(async move {
                    let mut written = node.write(offset, from).await;
                    drop(pass);
                    written.outcome = written.outcome.map_err(not_permitted);
                    written
                });
                self.spawner.to_the_end(write).await
            }
            Err(error) => NodeTransfer {
                buffer: from,
                outcome: Err(error),
            },
        }
    }

    /// Makes `range` read as zeroes.
    ///
    /// # Errors
    /// As the node's, and `EBADF` where it must not.
    ///
    /// # Cancel safety
    /// It goes on to its end once it has begun.
    pub async fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<(), NodeError> {
        let change = |node: Rc<dyn Node>| async move { node.zero(range, mode).await };
        self.change(Operation::Zero, range, change).await
    }

    /// Gives room back where that is possible.
    ///
    /// # Errors
    /// As [`zero`](Self::zero).
    ///
    /// # Cancel safety
    /// It goes on to its end once it has begun.
    pub async fn discard(&self, range: ByteRange) -> Result<(), NodeError> {
        let change = |node: Rc<dyn Node>| async move { node.discard(range).await };
        self.change(Operation::Discard, range, change).await
    }

    /// Makes everything that completed before this call durable.
    ///
    /// # Errors
    /// As the node's.
    ///
    /// # Cancel safety
    /// It goes on to its end once it has begun.
    pub async fn flush(&self) -> Result<(), NodeError> {
        let entered = self.enter_writing(Operation::Sync, ByteRange::default(), false);
        let (pass, node) = entered.await?;
        let flush = Box::pin(async move {
            let flushed = node.flush().await;
            drop(pass);
            flushed
        });
        self.spawner.to_the_end(flush).await
    }

    async fn change<F: Future<Output = Result<(), NodeError>> + 'static>(
        &self,
        operation: Operation,
        range: ByteRange,
        change: impl FnOnce(Rc<dyn Node>) -> F,
    ) -> Result<(), NodeError> {
        let (pass, node) = self.enter_writing(operation, range, true).await?;
        let change = change(node);
        let change = Box::pin(async move {
            let changed = change.await;
            drop(pass);
            changed.map_err(not_permitted)
        });
        self.spawner.to_the_end(change).await
    }

    /// Goes in to write, once no mirror keeps writers waiting. Its node, which lets the request in at once.
    ///
    /// # Errors
    /// `EBADF`: the request must not be made, or would have to wait where nobody may any more.
    ///
    /// # Cancel safety
    /// Nobody is inside then.
    async fn enter_writing(
        &self,
        operation: Operation,
        range: ByteRange,
        changes: bool,
    ) -> Result<(Pass, Rc<dyn Node>), NodeError> {
        loop {
            let pass = self.gate.enter(Way::Write).await;
            let node = self.node_for(operation, range, changes)?;
            let tracker = match node.tracker() {
                Some(tracker) if tracker.is_quiet() => tracker,
                _ => return Ok((pass, node)),
            };
            drop(pass);
            if self.is_leaving.get() {
                return Err(refusal(&*node, operation, range));
            }
            // By then the root may be on another node.
            let leaves = pin!(self.leaves.notified());
            select(pin!(tracker.until_loud()), leaves).await;
        }
    }

    /// Refuses every request that waits for the end of a mirror, or would have to: whoever made it is gone. Nothing of it has been
    /// done.
    pub fn leave(&self) {
        self.is_leaving.set(true);
        self.leaves.notify_waiters();
    }

    /// Its node, if the request may be made.
    fn node_for(
        &self,
        operation: Operation,
        range: ByteRange,
        changes: bool,
    ) -> Result<Rc<dyn Node>, NodeError> {
        let node = self.node.borrow().clone();
        match node {
            Some(node) if self.writable || !changes => Ok(node),
            Some(node) => Err(refusal(&*node, operation, range)),
            None => Err(NodeError {
                node: String::new(),
                source: StorageError::new(operation, range, EBADF),
            }),
        }
    }

    /// Keeps new requests waiting, and waits until those inside have ended. Lasts until it is [`released`](Self::release) as often.
    ///
    /// # Cancel safety
    /// It is not drained then.
    pub async fn drain(&self) {
        let writes = self.gate.close_again(Way::Write).await;
        let reads = self.gate.close_again(Way::Read).await;
        self.drained.borrow_mut().push((writes, reads));
    }

    /// Takes one drain back: with the last one requests go on, on the node that the root is on then.
    pub fn release(&self) {
        drop(self.drained.borrow_mut().pop());
    }

    /// Puts the root on another node. Requests that are inside stay where they are.
    pub fn put_on(&self, node: Rc<dyn Node>) {
        let mut place = self.node.borrow_mut();
        // Closed is closed.
        if place.is_some() {
            *place = Some(node);
        }
    }

    /// Refuses every further request, and waits until those inside have ended.
    ///
    /// # Cancel safety
    /// It is closed then, but something may be inside.
    pub async fn close(&self) {
        self.node.borrow_mut().take();
        self.leave();
        // Those that wait in front are let in to be refused.
        drop(self.gate.close_again(Way::Write).await);
        drop(self.gate.close_again(Way::Read).await);
    }
}

/// Its user may write, but not now.
fn not_permitted(mut error: NodeError) -> NodeError {
    if error.source.errno == EBADF {
        error.source.errno = EPERM;
    }
    error
}

fn refusal(node: &dyn Node, operation: Operation, range: ByteRange) -> NodeError {
    NodeError {
        node: node.name(),
        source: StorageError::new(operation, range, EBADF),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::VecDeque;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use blockyard_simulator::{DiskOptions, World};
    use blockyard_storage::LocalFuture;

    use super::*;
    use crate::node::file_node::{FileNode, FileOptions};
    use crate::node::mirror_top::{MirrorTop, Tracker};

    fn poll<T>(future: std::pin::Pin<&mut impl Future<Output = T>>) -> Poll<T> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    /// Two disks of 8 KiB, a root on the first, and what was handed to the spawner.
    struct Yard {
        world: World,
        disks: [blockyard_simulator::Disk; 2],
        root: Root,
        abandoned: Rc<RefCell<VecDeque<LocalFuture<'static, ()>>>>,
    }

    impl Yard {
        fn new(writable: bool) -> Self {
            let world = World::new(1);
            let disk = |name| {
                let options = DiskOptions {
                    length_bytes: 8192,
                    ..DiskOptions::default()
                };
                world.disk(name, options)
            };
            let disks = [disk("one"), disk("other")];
            let abandoned = Rc::new(RefCell::new(VecDeque::new()));
            let taken = abandoned.clone();
            let spawner = Spawner::new(move |work| taken.borrow_mut().push_back(work));
            let root = Root::new(node(&disks[0]), writable, spawner);
            Self {
                world,
                disks,
                root,
                abandoned,
            }
        }
    }

    fn node(disk: &blockyard_simulator::Disk) -> Rc<dyn Node> {
        let options = FileOptions::default();
        Rc::new(FileNode::new("file".to_owned(), disk.open(), options))
    }

    #[test]
    fn a_request_that_waits_goes_to_the_node_that_the_root_is_on_then() {
        let yard = Yard::new(true);
        let mut first = pin!(yard.root.write(0, Buffer::copy_of(&[1; 512])));
        assert!(poll(first.as_mut()).is_pending());
        {
            let mut drain = pin!(yard.root.drain());
            assert!(poll(drain.as_mut()).is_pending(), "one is inside");
            while yard.world.step() {
                assert!(poll(first.as_mut()).is_ready() || yard.world.in_flight() > 0);
            }
            assert!(poll(drain.as_mut()).is_ready());
        }
        assert!(poll(pin!(yard.root.drain())).is_ready(), "once more");
        let mut late = pin!(yard.root.write(512, Buffer::copy_of(&[2; 512])));
        assert!(poll(late.as_mut()).is_pending());
        yard.root.put_on(node(&yard.disks[1]));
        yard.root.release();
        assert!(poll(late.as_mut()).is_pending(), "drained twice");
        assert!(!yard.world.step(), "nothing was asked of a disk");
        yard.root.release();
        while poll(late.as_mut()).is_pending() {
            assert!(yard.world.step());
        }
        assert_eq!(yard.disks[0].bytes()[..1024], [[1; 512], [0; 512]].concat());
        assert_eq!(yard.disks[1].bytes()[..1024], [[0; 512], [2; 512]].concat());
    }

    #[test]
    fn a_write_that_is_abandoned_keeps_the_root_undrained_until_it_ends() {
        let yard = Yard::new(true);
        {
            let mut write = pin!(yard.root.write(0, Buffer::copy_of(&[1; 512])));
            assert!(poll(write.as_mut()).is_pending());
        }
        let mut drain = pin!(yard.root.drain());
        assert!(poll(drain.as_mut()).is_pending(), "it is still on its way");
        let rest = yard.abandoned.borrow_mut().pop_front();
        let mut rest = pin!(rest.expect("handed over"));
        while poll(rest.as_mut()).is_pending() {
            assert!(yard.world.step());
        }
        assert!(poll(drain.as_mut()).is_ready());
        assert_eq!(yard.disks[0].bytes()[0], 1);
    }

    #[test]
    fn what_is_not_allowed_is_refused_and_so_is_everything_once_it_is_closed() {
        let yard = Yard::new(false);
        let errno = |answer: Poll<Result<(), NodeError>>| match answer {
            Poll::Ready(Err(error)) => error.errno(),
            other => panic!("not refused: {other:?}"),
        };
        let discard = poll(pin!(yard.root.discard(ByteRange::new(0, 512))));
        assert_eq!(errno(discard), EBADF);
        assert!(yard.root.facts().expect("open").read_only);
        let mut waiting = pin!(async {
            yard.root.drain().await;
            yard.root.read(0, Buffer::zeroed(512)).await.outcome
        });
        assert!(poll(waiting.as_mut()).is_pending());
        assert!(poll(pin!(yard.root.close())).is_ready());
        yard.root.release();
        assert_eq!(errno(poll(waiting.as_mut())), EBADF);
        assert_eq!(yard.root.facts().map_err(|error| error.errno()), Err(EBADF));
    }

    #[test]
    fn who_waits_for_a_mirror_is_not_inside_and_can_be_sent_away() {
        let yard = Yard::new(true);
        let tracker = Rc::new(Tracker::new(8192, 4096));
        let source = node(&yard.disks[0]);
        let filter = MirrorTop::new("filter".to_owned(), source, Rc::clone(&tracker));
        yard.root.put_on(Rc::new(filter));
        let Poll::Ready(quiet) = poll(pin!(tracker.quiet())) else {
            panic!("nobody writes");
        };
        let mut stays = pin!(yard.root.write(0, Buffer::copy_of(&[1; 512])));
        let mut flushes = pin!(yard.root.flush());
        assert!(poll(stays.as_mut()).is_pending());
        assert!(poll(flushes.as_mut()).is_pending());
        assert!(poll(pin!(yard.root.drain())).is_ready(), "nobody is inside");
        yard.root.release();
        drop(quiet);
        while poll(stays.as_mut()).is_pending() {
            assert!(yard.world.step());
        }
        assert_eq!(yard.disks[0].bytes()[..512], [1; 512]);
        let Poll::Ready(_quiet) = poll(pin!(tracker.quiet())) else {
            panic!("the flush has not begun");
        };
        let mut leaves = pin!(yard.root.write(0, Buffer::copy_of(&[2; 512])));
        assert!(poll(leaves.as_mut()).is_pending());
        yard.root.leave();
        for outcome in [
            poll(leaves.as_mut()).map(|left| left.outcome),
            poll(flushes),
        ] {
            match outcome {
                Poll::Ready(Err(error)) => assert_eq!(error.errno(), EBADF),
                other => panic!("not refused: {other:?}"),
            }
        }
        assert!(!yard.world.step(), "nothing was asked of a disk");
    }
}
