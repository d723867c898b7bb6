//! Chains on storage that is far away, and chains of many layers: how long jobs within them take, and in how much memory.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use blockyard_simulator::{DiskOptions, run};
use blockyard_storage::{Buffer, ByteRange, LocalFuture, ZeroMode};

use crate::clock::Clock;
use crate::error::NodeError;
use crate::job::context::ErrorPolicies;
use crate::job::work::Work;
use crate::jobs::commit::Commit;
use crate::jobs::stream::Stream;
use crate::jobs::test_support::{Running, VirtualClock};
use crate::node::qcow2::tests::yard::{Setup, Yard};
use crate::node::{Node, NodeFacts, NodeTransfer, StatusExtent};

/// How long each request takes.
const LATENCY: Duration = Duration::from_millis(10);

/// Length of the disks.
const LENGTH_BYTES: u64 = 32 << 20;

/// A node that is far away, once it has been opened.
struct FarNode {
    child: Rc<dyn Node>,
    clock: VirtualClock,
    is_far: Rc<Cell<bool>>,
}

impl FarNode {
    async fn travel(&self) {
        if self.is_far.get() {
            let moment = self.clock.now().after(LATENCY);
            self.clock.sleep_until(moment).await;
        }
    }
}

impl Node for FarNode {
    fn name(&self) -> String {
        self.child.name()
    }

    fn facts(&self) -> NodeFacts {
        self.child.facts()
    }

    fn status(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> LocalFuture<'_, Result<Vec<StatusExtent>, NodeError>> {
        self.child.status(range, extents_max)
    }

    fn read(&self, offset: u64, into: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(async move {
            self.travel().await;
            self.child.read(offset, into).await
        })
    }

    fn write(&self, offset: u64, from: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(async move {
            self.travel().await;
            self.child.write(offset, from).await
        })
    }

    fn zero(&self, range: ByteRange, mode: ZeroMode) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            self.travel().await;
            self.child.zero(range, mode).await
        })
    }

    fn grows(&self) -> bool {
        self.child.grows()
    }

    fn write_growing(&self, offset: u64, from: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(async move {
            self.travel().await;
            self.child.write_growing(offset, from).await
        })
    }

    fn zero_growing(
        &self,
        range: ByteRange,
        mode: ZeroMode,
    ) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            self.travel().await;
            self.child.zero_growing(range, mode).await
        })
    }

    fn discard(&self, range: ByteRange) -> LocalFuture<'_, Result<(), NodeError>> {
        self.child.discard(range)
    }

    fn flush(&self) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            self.travel().await;
            self.child.flush().await
        })
    }

    fn resize(&self, length_bytes: u64) -> LocalFuture<'_, Result<(), NodeError>> {
        self.child.resize(length_bytes)
    }
}

/// An image of this length, of clusters of this size.
fn image(cluster_bits: u32, length_bytes: u64) -> Yard {
    Yard::new(Setup {
        size_bytes: length_bytes,
        ..Setup::new(7, cluster_bits)
    })
}

/// A buffer that tells where it belongs.
fn content(offset: u64, length: usize) -> Buffer {
    let mut buffer = Buffer::zeroed(length);
    for (place, byte) in buffer.as_mut_slice().iter_mut().enumerate() {
        *byte = 1 + ((offset + place as u64) / 512 % 251) as u8;
    }
    buffer
}

#[test]
fn many_requests_are_on_their_way_to_what_is_far() {
    let requests = 2 * (LENGTH_BYTES / (512 << 10)) as u32;
    for (cluster_bits, commits) in [(16, false), (16, true), (21, false), (12, false)] {
        let clock = VirtualClock::default();
        let yard = image(cluster_bits, LENGTH_BYTES);
        let options = DiskOptions {
            length_bytes: LENGTH_BYTES,
            ..DiskOptions::default()
        };
        let raw = yard.world.disk("raw", options);
        let is_far = Rc::new(Cell::new(false));
        let far = |child: Rc<dyn Node>| -> Rc<dyn Node> {
            Rc::new(FarNode {
                child,
                clock: clock.clone(),
                is_far: Rc::clone(&is_far),
            })
        };
        let base = far(yard.file("raw", &raw, false));
        let file = yard.file("file", &yard.image, false);
        let mut work: Box<dyn Work> = match commits {
            false => {
                raw.fill(0, content(0, LENGTH_BYTES as usize).as_slice());
                let device = yard.open_over(far(file), Some(base));
                Box::new(Stream::new(device, 2))
            }
            true => {
                // Filled where it is near.
                let near = yard.open_over(file.clone(), Some(base.clone()));
                for piece in ByteRange::new(0, LENGTH_BYTES).pieces(1 << 20) {
                    let bytes = content(piece.offset(), 1 << 20);
                    let written = yard.drive(near.write(piece.offset(), bytes));
                    written.outcome.expect("written");
                }
                yard.drive(near.close()).expect("closed");
                let top = yard.open_over(far(file), Some(base.clone()));
                Box::new(Commit::new(top, base, 1, LENGTH_BYTES))
            }
        };
        is_far.set(true);
        let running = Running::new(&clock, 0, ErrorPolicies::default());
        let pool = running.cx.pool().clone();
        let (start, most) = (clock.now(), Cell::new(0));
        let ended = running.drive(
            &mut *work,
            |_| {},
            |_| {
                most.set(most.get().max(pool.in_use_bytes()));
                yard.world.step() || clock.advance()
            },
        );
        assert_eq!(ended, Some(Ok(())));
        let (took, serial) = (clock.now().since(start), LATENCY * requests);
        assert!(took * 6 <= serial, "{cluster_bits}: {took:?} of {serial:?}");
        let most = most.get();
        assert!(
            ((4 << 20)..=(16 << 20)).contains(&most),
            "{cluster_bits}: {most} bytes"
        );
    }
}

#[test]
fn two_hundred_layers_are_streamed_and_committed() {
    const LAYERS: usize = 200;
    const CLUSTER: u64 = 4096;
    for commits in [false, true] {
        let yards: Vec<Yard> = (0..LAYERS)
            .map(|_| image(12, LAYERS as u64 * CLUSTER))
            .collect();
        let step = || yards.iter().any(|yard| yard.world.step());
        let mut nodes: Vec<Rc<dyn Node>> = Vec::new();
        // Each layer holds a cluster of its own.
        for (level, yard) in yards.iter().enumerate() {
            let file = yard.file("file", &yard.image, false);
            let node = yard.open_over(file, nodes.last().cloned());
            let offset = level as u64 * CLUSTER;
            let bytes = content(offset, CLUSTER as usize);
            let written = yard.drive(node.write(offset, bytes));
            written.outcome.expect("written");
            nodes.push(node);
        }
        let top = nodes.last().expect("a layer").clone();
        let base = nodes[0].clone();
        let length = LAYERS as u64 * CLUSTER;
        let mut work: Box<dyn Work> = match commits {
            false => Box::new(Stream::new(top.clone(), LAYERS)),
            true => Box::new(Commit::new(top.clone(), base.clone(), LAYERS - 1, length)),
        };
        let clock = VirtualClock::default();
        let running = Running::new(&clock, 0, ErrorPolicies::default());
        let ended = running.drive(&mut *work, |_| {}, |_| step() || clock.advance());
        assert_eq!(ended, Some(Ok(())));
        top.set_backing(None);
        let filled = if commits { base } else { top };
        let read = filled.read(0, Buffer::zeroed(length as usize));
        let read = run(read, step).expect("it ends");
        read.outcome.expect("readable");
        let expected = content(0, length as usize);
        assert!(read.buffer.as_slice() == expected.as_slice(), "{commits}");
    }
}
