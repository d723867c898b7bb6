//! Compressed clusters: decompressed and compressed by the threads for such work, many at once.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use blockyard_images::qcow2::CompressedRun;
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

/// Bytes of clusters that one thread compresses at a time, where clusters are shorter.
const COMPRESSED_BYTES: u64 = 64 << 10;

/// Bytes that are compressed by several threads and then written together, where clusters are shorter.
const WRITTEN_BYTES: u64 = 1 << 20;

/// The guest bytes of a cluster, and what they were compressed to; `None`: that would not be shorter.
type Made = (ByteRange, Option<Vec<u8>>);

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
                let (piece, _) = rest.split_at(cluster_bytes.max(WRITTEN_BYTES));
                let bytes = &bytes[place_in(range, piece)];
                Ok((piece, Box::pin(self.compress_run(piece, bytes)) as _))
            },
            |()| {},
        )
        .await
    }

    /// Writes clusters that follow each other, of which the end of the disk may cut something off from the last.
    async fn compress_run(&self, range: ByteRange, bytes: &[u8]) -> Result<(), NodeError> {
        let cluster_bytes = self.image.geometry().cluster_bytes();
        let made = RefCell::new(Vec::new());
        in_pieces(
            range,
            async |rest| {
                let (piece, _) = rest.split_at(cluster_bytes.max(COMPRESSED_BYTES));
                let bytes = &bytes[place_in(range, piece)];
                Ok((piece, Box::pin(self.compress_clusters(piece, bytes)) as _))
            },
            |clusters| made.borrow_mut().extend(clusters),
        )
        .await?;
        let mut made = made.into_inner();
        made.sort_by_key(|(cluster, _): &Made| cluster.offset());
        // Neighbours that are stored in the same way are written together.
        let runs: Vec<&[Made]> = made
            .chunk_by(|(_, one), (_, next)| one.is_some() == next.is_some())
            .collect();
        let next = Cell::new(0);
        in_pieces(
            range,
            async |_| {
                let run = runs.get(next.get()).copied().unwrap_or_default();
                next.set(next.get() + 1);
                let covered = covered(run);
                let bytes = &bytes[place_in(range, covered)];
                Ok((covered, Box::pin(self.write_run(covered, run, bytes)) as _))
            },
            |()| {},
        )
        .await
    }

    /// Compresses clusters, all on one thread; `None` for one that does not get shorter.
    async fn compress_clusters(
        &self,
        range: ByteRange,
        bytes: &[u8],
    ) -> Result<Vec<Made>, NodeError> {
        let cluster_bytes = to_usize(self.image.geometry().cluster_bytes());
        let mut padded = bytes.to_vec();
        padded.resize(bytes.len().next_multiple_of(cluster_bytes), 0);
        let compression = self.image.header().compression;
        let work = self.cpu.run(move |codec| {
            let mut room = vec![0; cluster_bytes.saturating_sub(1)];
            let clusters = padded.chunks_exact(cluster_bytes);
            let streams = clusters.map(|cluster| {
                let length = codec.compress(compression, cluster, &mut room)?;
                Some(room[..length].to_vec())
            });
            streams.collect::<Vec<_>>()
        });
        let Some(streams) = work.await else {
            return Err(self.error(Operation::Write, Some(range), EIO));
        };
        let clusters = range.pieces(cluster_bytes as u64);
        Ok(clusters.zip(streams).collect())
    }

    /// Writes clusters that are all compressed, or all as they are in `bytes`.
    async fn write_run(
        &self,
        range: ByteRange,
        run: &[Made],
        bytes: &[u8],
    ) -> Result<(), NodeError> {
        let streams: Vec<&[u8]> = run.iter().filter_map(|(_, made)| made.as_deref()).collect();
        if streams.is_empty() {
            let plain = Buffer::copy_of(bytes);
            return self.write_range(range, plain).await.outcome;
        }
        let geometry = self.image.geometry();
        let first = geometry.guest_cluster(GuestOffset(range.offset()));
        let lengths: Vec<u64> = streams.iter().map(|stream| stream.len() as u64).collect();
        let failed = |error| self.failed(error, Operation::Write, Some(range));
        let prepared = self.image.prepare_compressed(first, &lengths).await;
        let reservation = prepared.map_err(failed)?;
        for (cluster, _) in run {
            let cluster = geometry.guest_cluster(GuestOffset(cluster.offset()));
            self.decompressed.forget(cluster);
        }
        let file = &self.files.file;
        for CompressedRun {
            at,
            clusters,
            length_bytes,
        } in reservation.runs()
        {
            let mut together = self.scratch(length_bytes);
            let mut rest = together.as_mut_slice();
            for stream in streams.get(clusters).unwrap_or_default() {
                let (front, behind) = rest.split_at_mut(stream.len());
                front.copy_from_slice(stream);
                rest = behind;
            }
            self.announce(DebugEvent::WriteCompressed);
            if let Err(error) = file.write(at.0, together).await.outcome {
                reservation.give_back();
                return Err(file.node_error(&error));
            }
        }
        self.image
            .publish_compressed(reservation)
            .await
            .map_err(failed)
    }
}

/// The guest bytes of clusters that follow each other.
fn covered(run: &[Made]) -> ByteRange {
    match run {
        [(first, _), .., (last, _)] => ByteRange::between(first.offset(), last.end()),
        [(only, _)] => *only,
        [] => ByteRange::default(),
    }
}
