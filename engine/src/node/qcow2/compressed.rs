//! Compressed clusters: decompressed and compressed by the threads for such work, many at once.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use blockyard_images::qcow2::layout::entries::CompressedAt;
use blockyard_images::qcow2::units::{GuestCluster, GuestOffset};
use blockyard_storage::error::{EINVAL, EIO, EOPNOTSUPP};
use blockyard_storage::{Buffer, ByteRange, Operation, Storage};

use crate::error::NodeError;
use crate::node::NodeTransfer;
use crate::node::fault_rules::DebugEvent;
use crate::node::qcow2::mover::Mover;
use crate::node::qcow2::pieces::{in_pieces, place_in, to_usize};

/// Decompressed clusters that one node keeps: sequential reads of less than a cluster come back for the rest of it.
const KEPT_MAX: usize = 2;

/// The clusters that were decompressed last.
///
/// An entry is good as long as the image maps its cluster to its place: what is there cannot change before somebody has
/// taken that room anew, for which nobody may look at it any more, and whoever does that for the same cluster calls
/// [`forget`](Self::forget).
#[derive(Default)]
pub(super) struct ClusterCache(RefCell<VecDeque<Kept>>);

struct Kept {
    cluster: GuestCluster,
    place: CompressedAt,
    bytes: Rc<Vec<u8>>,
}

impl ClusterCache {
    fn find(&self, cluster: GuestCluster, place: CompressedAt) -> Option<Rc<Vec<u8>>> {
        let kept = self.0.borrow();
        let found = kept
            .iter()
            .find(|kept| (kept.cluster, kept.place) == (cluster, place));
        found.map(|kept| Rc::clone(&kept.bytes))
    }

    /// Keeps a cluster; the caller holds a lease on its place.
    fn keep(&self, cluster: GuestCluster, place: CompressedAt, bytes: Rc<Vec<u8>>) {
        let mut kept = self.0.borrow_mut();
        kept.retain(|kept| kept.cluster != cluster);
        if kept.len() >= KEPT_MAX {
            kept.pop_front();
        }
        kept.push_back(Kept {
            cluster,
            place,
            bytes,
        });
    }

    /// The cluster gets other compressed bytes.
    fn forget(&self, cluster: GuestCluster) {
        self.0.borrow_mut().retain(|kept| kept.cluster != cluster);
    }

    /// Keeps nothing any more.
    pub(super) fn clear(&self) {
        self.0.borrow_mut().clear();
    }
}

impl Mover {
    /// Reads `range`, which is part of one compressed cluster, at `place`. The caller holds a lease on that.
    pub(super) async fn read_compressed(
        &self,
        range: ByteRange,
        place: CompressedAt,
        mut into: Buffer,
    ) -> NodeTransfer {
        let geometry = self.image.geometry();
        let cluster = geometry.guest_cluster(GuestOffset(range.offset()));
        let whole = ByteRange::new(geometry.guest_offset(cluster).0, geometry.cluster_bytes());
        let found = match self.decompressed.find(cluster, place) {
            Some(bytes) => Ok(bytes),
            None => self.decompress(range, place).await.map(Rc::new),
        };
        let outcome = found.map(|bytes| {
            into.as_mut_slice()
                .copy_from_slice(&bytes[place_in(whole, range)]);
            if range != whole {
                self.decompressed.keep(cluster, place, bytes);
            }
        });
        NodeTransfer {
            buffer: into,
            outcome,
        }
    }

    async fn decompress(
        &self,
        range: ByteRange,
        place: CompressedAt,
    ) -> Result<Vec<u8>, NodeError> {
        self.announce(DebugEvent::ReadCompressed);
        let file = &self.files.file;
        // At most two clusters, as a descriptor cannot say more.
        let buffer = self.scratch(place.length_bytes);
        let read = file.read(place.at.0, buffer).await;
        read.outcome.map_err(|error| file.node_error(&error))?;
        let compression = self.image.header().compression;
        let cluster_bytes = to_usize(self.image.geometry().cluster_bytes());
        let work = self.cpu.run(move |codec| {
            let mut cluster = vec![0; cluster_bytes];
            let done = codec.decompress(compression, read.buffer.as_slice(), &mut cluster);
            done.map(|()| cluster)
        });
        match work.await {
            Some(Ok(cluster)) => Ok(cluster),
            Some(Err(error)) => {
                let at = place.at.0;
                tracing::error!(%error, node = self.name, at, "a cluster cannot be read");
                Err(self.error(Operation::Read, Some(range), EIO))
            }
            None => Err(self.error(Operation::Read, Some(range), EIO)),
        }
    }

    /// See [`Node::write_compressed`](crate::node::Node::write_compressed).
    pub(super) async fn compress_and_write(&self, offset: u64, from: Buffer) -> NodeTransfer {
        let range = ByteRange::new(offset, from.len() as u64);
        let refusal = self.refusal(Operation::Write, range).or_else(|| {
            let cluster_bytes = self.image.geometry().cluster_bytes();
            let whole = range.offset().is_multiple_of(cluster_bytes)
                && (range.end().is_multiple_of(cluster_bytes) || range.end() == self.length());
            let errno = match () {
                () if self.files.data_file.is_some() => EOPNOTSUPP,
                () if !whole => EINVAL,
                () => return None,
            };
            Some(self.error(Operation::Write, Some(range), errno))
        });
        let outcome = match (refusal, self.zeroes_instead(from.as_slice())) {
            (Some(error), _) => Err(error),
            (None, Some(mode)) => self.zero(range, mode).await,
            (None, None) => self.compress_pieces(range, from.as_slice()).await,
        };
        NodeTransfer {
            buffer: from,
            outcome,
        }
    }

    async fn compress_pieces(&self, range: ByteRange, bytes: &[u8]) -> Result<(), NodeError> {
        let cluster_bytes = self.image.geometry().cluster_bytes();
        in_pieces(
            range,
            async |rest| {
                let (piece, _) = rest.split_at(cluster_bytes);
                let bytes = &bytes[place_in(range, piece)];
                Ok((piece, Box::pin(self.compress_cluster(piece, bytes)) as _))
            },
            |()| {},
        )
        .await
    }

    /// Writes one cluster, of which the end of the disk may cut something off.
    async fn compress_cluster(&self, piece: ByteRange, bytes: &[u8]) -> Result<(), NodeError> {
        let geometry = self.image.geometry();
        let cluster_bytes = to_usize(geometry.cluster_bytes());
        let mut padded = bytes.to_vec();
        padded.resize(cluster_bytes, 0);
        let compression = self.image.header().compression;
        let work = self.cpu.run(move |codec| {
            let mut made = Buffer::zeroed(cluster_bytes.saturating_sub(1));
            let length = codec.compress(compression, &padded, made.as_mut_slice())?;
            made.set_length(length);
            Some(made)
        });
        let Some(made) = work.await else {
            return Err(self.error(Operation::Write, Some(piece), EIO));
        };
        let Some(made) = made else {
            let plain = Buffer::copy_of(bytes);
            return self.write_range(piece, plain).await.outcome;
        };
        let cluster = geometry.guest_cluster(GuestOffset(piece.offset()));
        let failed = |error| self.failed(error, Operation::Write, Some(piece));
        let prepared = self.image.prepare_compressed(cluster, made.len() as u64);
        let reservation = prepared.await.map_err(failed)?;
        self.decompressed.forget(cluster);
        self.announce(DebugEvent::WriteCompressed);
        let file = &self.files.file;
        let written = file.write(reservation.at().0, made).await;
        if let Err(error) = written.outcome {
            reservation.give_back();
            return Err(file.node_error(&error));
        }
        self.image
            .publish_compressed(reservation)
            .await
            .map_err(failed)
    }
}
