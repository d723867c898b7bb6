//! [`ClusterCodec`]: one cluster compressed or decompressed, in memory, with contexts that are kept from one to the next.
//!
//! Promises: output is exactly one cluster or an error, whatever the bytes are; memory beside the two buffers of the caller
//! does not depend on them. What QEMU reads is read alike, and QEMU reads what is written here.
//!
//! Spec: qcow2, "Compressed Clusters Descriptor", "Header" (`compression_type`).

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};
use zstd::zstd_safe::{CCtx, CParameter, DCtx, find_frame_compressed_size, get_error_name};

use crate::qcow2::units::Compression;

/// Window written: strict readers allow for no more.
const DEFLATE_WINDOW_BITS_WRITTEN: u8 = 12;

/// Window read: the largest there is, as some writers used more than they should have.
const DEFLATE_WINDOW_BITS_READ: u8 = 15;

/// QEMU's level, which is the library's default.
const DEFLATE_LEVEL: u32 = 6;

/// One below QEMU's, the library's default of 3: 13 % to 23 % less time, up to 4 % more bytes (docs/ARCHITECTURE.md).
const ZSTD_LEVEL: i32 = 2;

/// Why the bytes of a compressed cluster do not make a cluster.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DecompressError {
    /// They end before the cluster is full.
    #[error("The compressed data ends after {made_bytes} of {cluster_bytes} bytes")]
    Short {
        /// Bytes that they make.
        made_bytes: usize,
        /// Bytes of a cluster.
        cluster_bytes: usize,
    },
    /// They are no such stream, or not all of one.
    #[error("The compressed data is damaged: {0}")]
    Damaged(String),
}

/// Compresses and decompresses clusters, one at a time. Whoever has many of them keeps one of these: its contexts cost
/// more than a small cluster.
#[derive(Default)]
pub struct ClusterCodec {
    deflate: Option<Compress>,
    inflate: Option<Decompress>,
    zstd_writer: Option<CCtx<'static>>,
    zstd_reader: Option<DCtx<'static>>,
}

impl ClusterCodec {
    /// A codec; contexts are made when they are needed first.
    pub fn new() -> Self {
        Self::default()
    }

    /// Compresses `cluster` into the front of `into` and returns how many bytes that took. `None`: it does not get shorter
    /// than `into`, whose content is unspecified then, and is better stored as it is.
    pub fn compress(
        &mut self,
        compression: Compression,
        cluster: &[u8],
        into: &mut [u8],
    ) -> Option<usize> {
        match compression {
            Compression::Zlib => self.deflate(cluster, into),
            Compression::Zstd => self.compress_zstd(cluster, into),
        }
    }

    /// Fills the whole of `cluster` with what `bytes` decompress to. Bytes behind the end of the stream are ignored: a
    /// descriptor counts whole sectors.
    ///
    /// # Errors
    /// When they make less than a cluster or are damaged; the content of `cluster` is unspecified then. A zstd frame that
    /// makes more counts as damaged; of a deflate stream the front is taken, as QEMU does both.
    pub fn decompress(
        &mut self,
        compression: Compression,
        bytes: &[u8],
        cluster: &mut [u8],
    ) -> Result<(), DecompressError> {
        match compression {
            Compression::Zlib => self.inflate(bytes, cluster),
            Compression::Zstd => self.decompress_zstd(bytes, cluster),
        }
    }

    fn deflate(&mut self, cluster: &[u8], into: &mut [u8]) -> Option<usize> {
        let deflate = self.deflate.get_or_insert_with(|| {
            let level = flate2::Compression::new(DEFLATE_LEVEL);
            Compress::new_with_window_bits(level, false, DEFLATE_WINDOW_BITS_WRITTEN)
        });
        deflate.reset();
        let status = deflate.compress(cluster, into, FlushCompress::Finish);
        match status {
            Ok(Status::StreamEnd) => usize::try_from(deflate.total_out()).ok(),
            Ok(_) | Err(_) => {
                if !ends_for_nobody(deflate, cluster) {
                    self.deflate = None;
                }
                None
            }
        }
    }

    fn inflate(&mut self, bytes: &[u8], cluster: &mut [u8]) -> Result<(), DecompressError> {
        let inflate = self.inflate.get_or_insert_with(|| {
            Decompress::new_with_window_bits(false, DEFLATE_WINDOW_BITS_READ)
        });
        inflate.reset(false);
        let status = inflate.decompress(bytes, cluster, FlushDecompress::Finish);
        let made_bytes = usize::try_from(inflate.total_out()).unwrap_or(usize::MAX);
        if let Err(error) = status {
            return Err(DecompressError::Damaged(error.to_string()));
        }
        if made_bytes != cluster.len() {
            return Err(DecompressError::Short {
                made_bytes,
                cluster_bytes: cluster.len(),
            });
        }
        Ok(())
    }

    fn compress_zstd(&mut self, cluster: &[u8], into: &mut [u8]) -> Option<usize> {
        if self.zstd_writer.is_none() {
            let mut context = CCtx::try_create()?;
            context
                .set_parameter(CParameter::CompressionLevel(ZSTD_LEVEL))
                .ok()?;
            self.zstd_writer = Some(context);
        }
        self.zstd_writer.as_mut()?.compress2(into, cluster).ok()
    }

    /// Frame by frame, each straight into its place: then no window is kept in memory, however large the one that a frame
    /// asks for.
    fn decompress_zstd(&mut self, bytes: &[u8], cluster: &mut [u8]) -> Result<(), DecompressError> {
        let damaged = |code| DecompressError::Damaged(get_error_name(code).to_owned());
        if self.zstd_reader.is_none() {
            self.zstd_reader = DCtx::try_create();
        }
        let Some(reader) = self.zstd_reader.as_mut() else {
            return Err(DecompressError::Damaged("no memory to read it".to_owned()));
        };
        let cluster_bytes = cluster.len();
        let (mut rest, mut room) = (bytes, cluster);
        while !room.is_empty() {
            if rest.is_empty() {
                return Err(DecompressError::Short {
                    made_bytes: cluster_bytes - room.len(),
                    cluster_bytes,
                });
            }
            let frame_bytes = find_frame_compressed_size(rest).map_err(damaged)?;
            let (frame, after) = rest.split_at(frame_bytes.min(rest.len()));
            let made_bytes = reader.decompress(room, frame).map_err(damaged)?;
            // A frame has a header, so this ends; `made_bytes` is at most the room that was given.
            rest = after;
            room = room.split_at_mut(made_bytes.min(room.len())).1;
        }
        Ok(())
    }
}

/// Brings a stream that did not fit to its end; `false`: it cannot be. Left in the middle, zlib-rs (0.6.8) counts what it had given
/// out as room that is taken in its buffer, also after a reset, and panics when several such streams have taken all of it.
fn ends_for_nobody(deflate: &mut Compress, cluster: &[u8]) -> bool {
    let mut nowhere = [0; 4096];
    loop {
        let (taken, made) = (deflate.total_in(), deflate.total_out());
        let rest = usize::try_from(taken)
            .ok()
            .and_then(|taken| cluster.get(taken..));
        let Some(rest) = rest else { return false };
        match deflate.compress(rest, &mut nowhere, FlushCompress::Finish) {
            Ok(Status::StreamEnd) => return true,
            Ok(_) if deflate.total_out() > made => {}
            Ok(_) | Err(_) => return false,
        }
    }
}

#[cfg(test)]
#[path = "compressed_tests.rs"]
mod tests;
