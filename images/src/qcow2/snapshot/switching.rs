//! [`Switching`]: from one state of an image to another that shares its clusters, with one write of the header.

use std::rc::Rc;

use blockyard_storage::{ByteRange, Storage, StorageError};

use super::changing::SnapshotError;
use super::own_tables::{OwnTables, put_l1_flags};
use crate::error::ImageError;
use crate::qcow2::amend::header_switch::HeaderSwitch;
use crate::qcow2::check::CheckStop;
use crate::qcow2::check::counters::Counters;
use crate::qcow2::check::rebuild::{self, Room};
use crate::qcow2::check::repair::Fixer;
use crate::qcow2::check::scan::{Extent, Scan};
use crate::qcow2::layout::header::{Header, autoclear};
use crate::qcow2::layout::snapshots::{SNAPSHOT_TABLE_BYTES_MAX, Snapshot};
use crate::qcow2::open::OpenedImage;
use crate::qcow2::reading::read_bytes;
use crate::qcow2::units::{HostCluster, HostOffset};
use crate::qcow2::watching::Watching;

/// Most bytes that are discarded at once.
const DISCARD_BYTES_MAX: u64 = 1 << 30;

/// What an image is going to be. Its L1 tables lead to L2 tables that are there.
pub(super) struct Goal {
    /// Length of the disk in bytes.
    pub(super) size_bytes: u64,
    /// The L1 table of the disk.
    pub(super) l1: Vec<u64>,
    /// All snapshots.
    pub(super) snapshots: Vec<Snapshot>,
    /// The last of them is new: so many entries from the front of [`l1`](Self::l1) are its own L1 table.
    pub(super) new_l1_entries: Option<usize>,
}

impl Goal {
    /// The image as it is. Snapshots that do not say how long their disk is say so from now on: it is as long as the image's,
    /// which may get another length.
    pub(super) fn of(image: &OpenedImage) -> Self {
        let mut snapshots = image.snapshots.clone();
        for snapshot in &mut snapshots {
            snapshot
                .disk_bytes
                .get_or_insert(image.header.guest_bytes());
        }
        Self {
            size_bytes: image.header.size_bytes,
            l1: image.l1_table.clone(),
            snapshots,
            new_l1_entries: None,
        }
    }

    pub(super) fn table_of_snapshots(&self) -> Result<Vec<u8>, ImageError> {
        let mut table = Vec::new();
        for snapshot in &self.snapshots {
            table.extend(snapshot.encode()?);
            if table.len() as u64 > SNAPSHOT_TABLE_BYTES_MAX {
                return Err(ImageError::refused_because(
                    "File too large",
                    format!(
                        "the snapshot table would take more than {SNAPSHOT_TABLE_BYTES_MAX} bytes"
                    ),
                ));
            }
        }
        Ok(table)
    }
}

/// An image on the way to its goal.
pub(super) struct Switching<'a> {
    file: &'a Rc<dyn Storage>,
    goal: Goal,
    /// The header that is going to be written.
    header: Header,
    fixer: Fixer,
    /// Runs of clusters that tables were put into: the first of each, and how many.
    placed: Vec<(u64, u64)>,
    has_begun_to_switch: bool,
}

impl<'a> Switching<'a> {
    /// Nothing is written yet.
    ///
    /// # Errors
    /// When the goal cannot be described.
    pub(super) fn new(
        file: &'a Rc<dyn Storage>,
        image: &OpenedImage,
        goal: Goal,
    ) -> Result<Self, ImageError> {
        let too_many = |_| ImageError::refused("File too large");
        let mut header = image.header.clone();
        header.size_bytes = goal.size_bytes;
        header.l1_entries = u32::try_from(goal.l1.len()).map_err(too_many)?;
        header.snapshots = u32::try_from(goal.snapshots.len()).map_err(too_many)?;
        // What is recorded of the disk's changes stays true as long as it shows the same. The others are cleared with the first write.
        let shows_the_same =
            goal.l1 == image.l1_table && goal.size_bytes == image.header.size_bytes;
        header.autoclear &= match shows_the_same {
            true => autoclear::KNOWN | autoclear::ACTIVITY,
            false => autoclear::KNOWN,
        };
        goal.table_of_snapshots()?;
        Ok(Self {
            file,
            goal,
            header,
            fixer: Fixer::new(file),
            placed: Vec::new(),
            has_begun_to_switch: false,
        })
    }

    /// Whether the image is what it was, for sure.
    pub(super) const fn is_unchanged(&self) -> bool {
        !self.has_begun_to_switch
    }

    /// The snapshots of the goal.
    pub(super) fn into_snapshots(self) -> Vec<Snapshot> {
        self.goal.snapshots
    }

    /// Goes all the way; durable afterwards.
    ///
    /// # Errors
    /// When the image is damaged, its counts are too narrow, there is no room, something cannot be read or written, or
    /// `watching` cancels. But for a failure to write the header, the image is what it was.
    pub(super) async fn run(
        &mut self,
        image: &OpenedImage,
        discards: bool,
        watching: &Watching<'_>,
    ) -> Result<(), SnapshotError> {
        // Whether there is a way is known before anything is written.
        self.way_from(&image.header).await?;
        let (present, done_bytes) = self.put_tables(image, watching).await?;
        let mut scan = Scan::begin_as(self.file, self.header.clone(), watching, true)?;
        scan.sink.done_bytes = done_bytes;
        scan.sink.total_bytes += done_bytes;
        let extent = Extent::WithoutRefcounts {
            snapshot_table: false,
        };
        scan.count(extent).await?;
        self.refuse(&scan)?;
        let mut room = Room::beside(present, &scan);
        self.give_own_tables(&mut scan, &mut room).await?;
        let geometry = scan.geometry;
        let plan = room.plan(&mut scan, geometry, None)?;
        rebuild::write(&mut self.fixer, &mut scan, &plan, None).await?;
        self.fixer.sync().await?;
        scan.sink.step(0).await?;
        plan.place_in(&mut self.header);
        let way = self.way_from(&image.header).await?;
        self.has_begun_to_switch = true;
        way.go(self.file).await?;
        if discards {
            self.discard(&scan, room.present()).await;
        }
        Ok(())
    }

    async fn way_from(&self, old: &Header) -> Result<HeaderSwitch, ImageError> {
        let cluster_bytes = usize::try_from(old.geometry.cluster_bytes()).unwrap_or(0);
        let text = "Could not read qcow2 header";
        let now = read_bytes(&**self.file, 0, cluster_bytes, text).await?;
        HeaderSwitch::plan(now, old, &self.header)
    }

    /// Counts the image as it is and puts the tables of the goal into free clusters. Returns the counts, those tables
    /// included, and how many bytes were looked at.
    async fn put_tables(
        &mut self,
        image: &OpenedImage,
        watching: &Watching<'_>,
    ) -> Result<(Counters, u64), CheckStop> {
        let mut old = Scan::begin_as(self.file, image.header.clone(), watching, true)?;
        old.count(Extent::Whole).await?;
        refuse_damaged(&old)?;
        let mut room = Room::beside(Counters::default(), &old);
        let l1 = bytes_of(&self.goal.l1);
        self.header.l1_table = self.put(&mut old, &mut room, l1).await?;
        if let Some(entries) = self.goal.new_l1_entries {
            let copy = bytes_of(self.goal.l1.get(..entries).unwrap_or(&[]));
            let at = self.put(&mut old, &mut room, copy).await?;
            if let Some(new) = self.goal.snapshots.last_mut() {
                new.l1_table = at;
                // At most those of the active table.
                new.l1_entries = u32::try_from(entries).unwrap_or(0);
            }
        }
        let table = self.goal.table_of_snapshots()?;
        self.header.snapshot_table = self.put(&mut old, &mut room, table).await?;
        Ok((old.references.counters, old.sink.done_bytes))
    }

    /// Writes a table to free clusters; one without entries is nowhere.
    async fn put(
        &mut self,
        old: &mut Scan<'_>,
        room: &mut Room,
        mut table: Vec<u8>,
    ) -> Result<HostOffset, CheckStop> {
        let geometry = old.geometry;
        let clusters = geometry.clusters_for(table.len() as u64).0;
        if clusters == 0 {
            return Ok(HostOffset(0));
        }
        let first = room.take(old, clusters)?;
        self.placed.push((first, clusters));
        let padded = clusters.saturating_mul(geometry.cluster_bytes());
        table.resize(usize::try_from(padded).unwrap_or(table.len()), 0);
        let at = geometry.host_offset(HostCluster(first));
        self.fixer.write(old, at.0, &table).await?;
        old.sink.step(padded).await?;
        Ok(at)
    }

    /// Refuses an image that is damaged, or whose counts are too narrow for the goal.
    fn refuse(&self, scan: &Scan<'_>) -> Result<(), ImageError> {
        let report = scan.sink.report;
        if scan.sink.overflows > 0 && report.corruptions == scan.sink.overflows {
            return Err(ImageError::refused_because(
                "Invalid argument",
                format!(
                    "a cluster would have more than {} references, the most that {} bits can count",
                    scan.geometry.refcount_max(),
                    scan.geometry.refcount_bits()
                ),
            ));
        }
        refuse_damaged(scan)?;
        let counters = &scan.references.counters;
        let alone = |cluster| counters.of(cluster) == 1;
        let mut placed = self.placed.iter();
        match placed.all(|(first, clusters)| (*first..first.saturating_add(*clusters)).all(alone)) {
            true => Ok(()),
            false => Err(damaged(
                "it changes meanwhile, or something leads behind its end",
            )),
        }
    }

    /// Gives the disk L2 tables with the right flags, and all L1 tables what they are going to hold.
    async fn give_own_tables(
        &mut self,
        scan: &mut Scan<'_>,
        room: &mut Room,
    ) -> Result<(), CheckStop> {
        let own = OwnTables::make(scan, room, &mut self.fixer).await?;
        let mut copy = self
            .goal
            .new_l1_entries
            .and_then(|entries| self.goal.l1.get(..entries))
            .map(<[u64]>::to_vec);
        own.lead(scan, &mut self.goal.l1);
        if let (Some(copy), Some(new)) = (&mut copy, self.goal.snapshots.last()) {
            own.lead(scan, copy);
            self.fixer
                .write(scan, new.l1_table.0, &bytes_of(copy))
                .await?;
        }
        put_l1_flags(scan, &mut self.goal.l1);
        let l1 = bytes_of(&self.goal.l1);
        self.fixer.write(scan, self.header.l1_table.0, &l1).await
    }

    /// Gives back the room of clusters that were in use and are not any more. It is no more than room: what fails is let be.
    async fn discard(&self, scan: &Scan<'_>, present: &Counters) {
        let cluster_bytes = scan.geometry.cluster_bytes();
        let counters = &scan.references.counters;
        let is_gone = |cluster| present.of(cluster) > 0 && counters.of(cluster) == 0;
        let mut from = 0;
        while let Some(first) = present.next_counted(from) {
            let mut end = first;
            while is_gone(end) {
                end += 1;
            }
            from = end.max(first + 1);
            let run = ByteRange::new(first * cluster_bytes, (end - first) * cluster_bytes);
            for piece in run.pieces(DISCARD_BYTES_MAX) {
                let discarded: Result<(), StorageError> = self.file.discard(piece).await;
                if discarded.is_err() {
                    return;
                }
            }
        }
    }
}

fn bytes_of(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

fn refuse_damaged(scan: &Scan<'_>) -> Result<(), ImageError> {
    let report = scan.sink.report;
    match report.corruptions > 0 || report.check_errors > 0 {
        true => Err(damaged(&format!(
            "{} corruptions, {} places could not be looked at",
            report.corruptions, report.check_errors
        ))),
        false => Ok(()),
    }
}

fn damaged(why: &str) -> ImageError {
    ImageError::refused_because("The image is damaged, repair it first", why)
}
