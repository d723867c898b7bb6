//! [`Scan`]: one pass over all metadata that counts every reference.

use std::rc::Rc;

use blockyard_storage::{ByteRange, Storage};

use super::observer::{CheckStop, Observer, Sink};
use super::read_ahead::read_all;
use super::references::{CLUSTERS_MAX, References};
use super::snapshots::SnapshotTable;
use super::sweep::Covered;
use super::tables::Tables;
use crate::error::ImageError;
use crate::qcow2::layout::header::{Access, Header};
use crate::qcow2::units::{Geometry, HostOffset};

/// Bytes that hold every field of a header up to its length.
const HEADER_START_BYTES: u64 = 112;

/// An image that is looked at, and what was found out so far.
pub(in crate::qcow2) struct Scan<'a> {
    pub(in crate::qcow2) file: Rc<dyn Storage>,
    pub(in crate::qcow2) header: Header,
    pub(in crate::qcow2) geometry: Geometry,
    pub(in crate::qcow2) references: References,
    pub(in crate::qcow2) tables: Tables,
    pub(in crate::qcow2) snapshots: SnapshotTable,
    /// The clusters of the active L1 table, and how many L1 tables each belongs to.
    pub(in crate::qcow2) active_l1: Vec<Covered>,
    /// The refcount table; what lies behind the end of the file is zeroes.
    pub(in crate::qcow2) refcount_table: Vec<u64>,
    pub(in crate::qcow2) sink: Sink<'a>,
    /// Runs of refcount blocks that cannot be read.
    pub(in crate::qcow2) unreadable_blocks: u64,
    /// The refcount structure cannot be repaired where it is.
    pub(in crate::qcow2) must_rebuild: bool,
    /// Entries of zeroes that keep room in the middle of a cluster.
    pub(in crate::qcow2) unaligned_zeroes: u64,
}

/// Which references a scan counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::qcow2) enum Extent {
    /// All.
    Whole,
    /// All but those to a refcount structure that is going to be replaced, and, if `snapshot_table` says so, to the snapshot
    /// table with it.
    WithoutRefcounts {
        /// The snapshot table is going to be replaced, too.
        snapshot_table: bool,
    },
}

impl<'a> Scan<'a> {
    /// Reads the header. With `silent`, findings are counted and not told.
    ///
    /// # Errors
    /// When the image is refused, or its file is too long to be checked.
    pub(in crate::qcow2) async fn begin(
        file: &Rc<dyn Storage>,
        observer: &'a dyn Observer,
        silent: bool,
    ) -> Result<Self, CheckStop> {
        let header = read_header(file).await?;
        Self::begin_as(file, header, observer, silent)
    }

    /// The same with a header that does not stand in the file yet: what the image is going to be.
    ///
    /// # Errors
    /// When its file is too long to be checked.
    pub(in crate::qcow2) fn begin_as(
        file: &Rc<dyn Storage>,
        header: Header,
        observer: &'a dyn Observer,
        silent: bool,
    ) -> Result<Self, CheckStop> {
        let geometry = header.geometry;
        let file_bytes = file.facts().length_bytes;
        let clusters = geometry.clusters_for(file_bytes).0;
        if clusters > CLUSTERS_MAX {
            return Err(ImageError::refused_because(
                "File too large",
                format!("the image file has {clusters} clusters, {CLUSTERS_MAX} can be checked"),
            )
            .into());
        }
        let mut sink = Sink::new(observer, silent);
        sink.report.total_clusters = geometry.clusters_for(header.guest_bytes()).0;
        sink.total_bytes = header.l1_table_bytes() + header.refcount_table_bytes();
        Ok(Self {
            file: Rc::clone(file),
            geometry,
            references: References::new(geometry, file_bytes),
            tables: Tables::new(geometry, file_bytes),
            snapshots: SnapshotTable::default(),
            active_l1: Vec::new(),
            refcount_table: Vec::new(),
            sink,
            unreadable_blocks: 0,
            must_rebuild: false,
            unaligned_zeroes: 0,
            header,
        })
    }

    /// Counts every reference that there is.
    ///
    /// # Errors
    /// When something cannot be read, is refused, or the observer cancels.
    ///
    /// # Cancel safety
    /// Changes nothing; the scan is of no further use when the future is dropped.
    pub(in crate::qcow2) async fn count(&mut self, extent: Extent) -> Result<(), CheckStop> {
        let (cluster_bytes, header) = (self.geometry.cluster_bytes(), self.header.clone());
        self.read_snapshots().await?;
        self.references
            .add(HostOffset(0), cluster_bytes, 1, &mut self.sink);
        self.count_l1_tables().await?;
        self.sink.total_bytes = self.expected_bytes();
        self.count_l2_tables().await?;
        let without_snapshot_table = Extent::WithoutRefcounts {
            snapshot_table: true,
        };
        if extent != without_snapshot_table {
            self.references.add(
                header.snapshot_table,
                self.snapshots.length_bytes,
                1,
                &mut self.sink,
            );
        }
        if extent == Extent::Whole {
            self.references.add(
                header.refcount_table,
                header.refcount_table_bytes(),
                1,
                &mut self.sink,
            );
        }
        if let Some(crypto) = header.extensions.crypto {
            self.references
                .add(crypto.at, crypto.length_bytes, 1, &mut self.sink);
        }
        self.count_bitmaps().await?;
        if extent == Extent::Whole {
            self.read_refcount_table().await?;
            self.count_refcount_blocks().await?;
        }
        self.sink.step(0).await
    }

    /// Bytes of metadata from here on, as far as known.
    fn expected_bytes(&self) -> u64 {
        let (all, active) = self.tables.bytes();
        let clusters = self.references.counters.clusters();
        let counts = clusters.saturating_mul(u64::from(self.geometry.refcount_bits())) / 8;
        [
            all,
            active,
            counts,
            self.header.refcount_table_bytes(),
            self.header.l1_table_bytes(),
        ]
        .iter()
        .fold(self.sink.done_bytes, |sum, bytes| {
            sum.saturating_add(*bytes)
        })
    }

    /// The part of some bytes that is in the file, up to the end of its last cluster.
    pub(in crate::qcow2) fn in_file(&self, at: HostOffset, length_bytes: u64) -> ByteRange {
        let end = self
            .references
            .file_bytes()
            .next_multiple_of(self.geometry.cluster_bytes());
        ByteRange::new(at.0, length_bytes).clamp_end(end)
    }
}

/// Reads the header of an image that may be damaged.
///
/// # Errors
/// When it cannot be read or is refused.
pub(in crate::qcow2) async fn read_header(file: &Rc<dyn Storage>) -> Result<Header, CheckStop> {
    let start = read_all(file, ByteRange::new(0, HEADER_START_BYTES)).await?;
    let cluster_bytes = Header::cluster_bytes_of(&start)?;
    let cluster = read_all(file, ByteRange::new(0, cluster_bytes)).await?;
    Ok(Header::parse(&cluster, Access::Check)?)
}
