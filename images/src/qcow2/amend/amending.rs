//! [`amend`]: from options to an image that has them.

use std::rc::Rc;

use blockyard_storage::{Buffer, Storage, StorageError};

use super::header_switch::HeaderSwitch;
use super::options::AmendOptions;
use super::shorter::Shorter;
use super::zero_clusters::ZeroClusters;
use crate::error::ImageError;
use crate::pace::{Cancelled, Pace};
use crate::qcow2::check::rebuild::{self, Room};
use crate::qcow2::check::repair::Fixer;
use crate::qcow2::check::scan::{Extent, Scan};
use crate::qcow2::check::{CheckStop, Repair, repair, repair_dirty};
use crate::qcow2::layout::header::{Access, Header};
use crate::qcow2::open::{DiskChange, OpenedImage, read_image};
use crate::qcow2::reading::read_bytes;
use crate::qcow2::units::{Compression, Geometry};
use crate::qcow2::watching::Watching;

/// Progress of another header, as it is written.
const HEADER_BYTES: u64 = 512;

/// Why an image was not amended. Its options are the old ones, unless a storage failed: then all are old or all are new.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AmendError {
    /// On request.
    #[error("Operation canceled")]
    Cancelled,
    /// It is refused, or a storage failed.
    #[error(transparent)]
    Failed(#[from] ImageError),
}

impl From<CheckStop> for AmendError {
    fn from(stop: CheckStop) -> Self {
        match stop {
            CheckStop::Cancelled => Self::Cancelled,
            CheckStop::Failed(error) => Self::Failed(error),
        }
    }
}

impl From<Cancelled> for AmendError {
    fn from(Cancelled: Cancelled) -> Self {
        Self::Cancelled
    }
}

impl From<StorageError> for AmendError {
    fn from(error: StorageError) -> Self {
        Self::Failed(error.into())
    }
}

/// Gives an image the options, all of them at once. Afterwards it has them, durably; what the guest reads is unchanged, but
/// for what a shorter disk has no more, and what another backing file shows. Nobody else changes the image, or its external
/// data file, which keeps its length; `file` takes requests of any alignment. Memory and time are those of a check
/// ([`check`](crate::qcow2::check)) where counts or zero clusters have to change or something is cut off, and nothing otherwise.
///
/// Who reads the image all the same may go on with the tables that were before: clusters that these lead to keep what is read
/// there, and nothing else is put in their place, unless the disk gets shorter.
///
/// # Errors
/// [`AmendError::Failed`] with QEMU's texts where the options are refused, before anything is changed; where the image is
/// damaged, or a storage fails. [`AmendError::Cancelled`] when `pace` says so.
///
/// # Cancel safety
/// Dropping the future leaves what a power cut leaves: all options have their old values or all have their new ones, clusters
/// may be leaked. A cancellation through [`Pace`] leaves the old ones, and gives the clusters back.
pub async fn amend(
    file: &Rc<dyn Storage>,
    options: &AmendOptions,
    pace: &dyn Pace,
) -> Result<(), AmendError> {
    let watching = Watching::new(pace);
    let mut image = read_image(&**file, Access::ReadWrite).await?;
    let mut target = options.check(&image)?;
    if image.header.is_dirty() {
        repair_dirty(file).await?;
        image = read_image(&**file, Access::ReadWrite).await?;
        target = options.check(&image)?;
        if image.header.is_dirty() {
            return Err(ImageError::refused("Could not repair dirty image").into());
        }
    }
    let shows_below =
        options.is_overlay || image.header.backing_name.is_some() || target.backing_name.is_some();
    let mut amending = Amending {
        file,
        shows_below,
        header: image.header.clone(),
        target,
        leaks: false,
    };
    let length_before = file.facts().length_bytes;
    let outcome = amending.run(&image, &watching).await;
    let cancelled = matches!(outcome, Err(AmendError::Cancelled));
    if cancelled && amending.header == image.header && !file.facts().fixed_length {
        // Nothing leads behind the old end. Best effort: it is only room.
        let _ = file.resize(length_before).await;
    }
    if amending.leaks && (outcome.is_ok() || cancelled) {
        watching.must_finish();
        let mended = repair(file, Repair::Leaks, &watching).await;
        watching.end_of_scan();
        if outcome.is_ok() {
            mended?;
        }
    }
    outcome
}

struct Amending<'a> {
    file: &'a Rc<dyn Storage>,
    /// What is unallocated does not read as zeroes.
    shows_below: bool,
    /// As it stands in the file.
    header: Header,
    /// As it shall be.
    target: Header,
    /// Clusters are counted that nothing leads to.
    leaks: bool,
}

impl Amending<'_> {
    async fn run(
        &mut self,
        image: &OpenedImage,
        watching: &Watching<'_>,
    ) -> Result<(), AmendError> {
        let (old, new) = (self.header.geometry, self.target.geometry);
        let (old_bytes, new_bytes) = (self.header.guest_bytes(), self.target.guest_bytes());
        if u64::from(self.header.l1_entries) < old.l1_entries_for(new_bytes) {
            let text = "The tables of the image are not prepared for a longer disk";
            return Err(ImageError::refused(text).into());
        }
        let completes_snapshots = new.version() > old.version()
            && image
                .snapshots
                .iter()
                .any(|snapshot| snapshot.disk_bytes.is_none());
        // Whether there is a way is known before anything is written.
        self.way_to(&self.target).await?;
        if new.version() < old.version() {
            self.replace_zero_clusters(watching).await?;
        }
        let mut shorter = match new_bytes < old_bytes {
            true => Some(Shorter::find(self.file, image, new_bytes).await?),
            false => None,
        };
        let moves_tables = shorter.as_ref().is_some_and(Shorter::needs_room);
        if old.refcount_order() != new.refcount_order() || completes_snapshots || moves_tables {
            self.renew(completes_snapshots, shorter.as_mut(), watching)
                .await?;
        }
        if let Some(shorter) = &shorter {
            shorter.place_in(&mut self.target);
        }
        watching.expect(HEADER_BYTES);
        watching.checkpoint().await?;
        if new_bytes != old_bytes {
            self.mark_bitmaps(image.clone()).await?;
        }
        self.switch(self.target.clone()).await?;
        self.leaks |= shorter.is_some();
        watching.done(HEADER_BYTES);
        Ok(())
    }

    /// Leaves nothing in the tables that version 2 cannot say. Everything that needs all references to be known is refused
    /// before.
    async fn replace_zero_clusters(&mut self, watching: &Watching<'_>) -> Result<(), AmendError> {
        let mut scan = self.scan(false, watching).await?;
        refuse_narrow(&scan, self.target.geometry)?;
        let mut fixer = Fixer::new(self.file);
        let mut room = Room::of(&scan);
        let zeroes = ZeroClusters::find(&mut scan, &mut room, self.shows_below).await?;
        if zeroes.has_compressed && self.header.compression != Compression::Zlib {
            let text = "Cannot downgrade an image with zstd compression type and existing compressed clusters";
            return Err(ImageError::refused(text).into());
        }
        if zeroes.clusters > 0 {
            // They are counted before tables lead to them. Nothing else about the image changes.
            let geometry = self.header.geometry;
            let plan = room.plan(&mut scan, geometry, None)?;
            rebuild::write(&mut fixer, &mut scan, &plan, None).await?;
            fixer.sync().await?;
            scan.sink.step(0).await?;
            plan.place_in(&mut self.target);
            let mut next = self.header.clone();
            plan.place_in(&mut next);
            self.leaks = true;
            self.switch(next).await?;
        }
        if zeroes.entries > 0 {
            zeroes.replace(&mut scan, &mut fixer).await?;
            self.leaks = zeroes.gives_up;
        }
        watching.end_of_scan();
        Ok(())
    }

    /// Makes what the new header leads to instead of what is: counts, the snapshot table, the tables of a shorter disk.
    async fn renew(
        &mut self,
        completes_snapshots: bool,
        mut shorter: Option<&mut Shorter>,
        watching: &Watching<'_>,
    ) -> Result<(), AmendError> {
        let mut scan = self.scan(completes_snapshots, watching).await?;
        refuse_narrow(&scan, self.target.geometry)?;
        let mut fixer = Fixer::new(self.file);
        let mut room = Room::of(&scan);
        if let Some(shorter) = &mut shorter {
            shorter.take_room(&mut scan, &mut room)?;
        }
        let snapshots = match completes_snapshots {
            true => Some(scan.complete_snapshot_table().await?),
            false => None,
        };
        let geometry = self.target.geometry;
        let plan = room.plan(&mut scan, geometry, snapshots.as_ref().map(Vec::len))?;
        rebuild::write(&mut fixer, &mut scan, &plan, snapshots.as_deref()).await?;
        if let Some(shorter) = shorter {
            shorter.write(&scan, &mut fixer).await?;
        }
        fixer.sync().await?;
        scan.sink.step(0).await?;
        plan.place_in(&mut self.target);
        watching.end_of_scan();
        Ok(())
    }

    /// All references of a sound image, but for those to what takes the place of its counts.
    async fn scan<'w>(
        &self,
        completes_snapshots: bool,
        watching: &'w Watching<'_>,
    ) -> Result<Scan<'w>, AmendError> {
        let mut scan = Scan::begin(self.file, watching, true).await?;
        let extent = Extent::WithoutRefcounts {
            snapshot_table: completes_snapshots,
        };
        scan.count(extent).await?;
        scan.read_refcount_table().await?;
        refuse_damaged(&scan)?;
        Ok(scan)
    }

    /// Bitmaps of a disk of another length are of no use.
    async fn mark_bitmaps(&self, mut image: OpenedImage) -> Result<(), AmendError> {
        let changes = image.mark_before(DiskChange::Length)?;
        for overwrite in &changes.overwrites {
            let bytes = Buffer::copy_of(&overwrite.bytes);
            self.file.write(overwrite.at.0, bytes).await.outcome?;
        }
        if !changes.overwrites.is_empty() {
            self.file.sync().await?;
        }
        Ok(())
    }

    async fn way_to(&self, next: &Header) -> Result<HeaderSwitch, ImageError> {
        let cluster_bytes = usize::try_from(self.header.geometry.cluster_bytes()).unwrap_or(0);
        let now = read_bytes(
            &**self.file,
            0,
            cluster_bytes,
            "Could not read qcow2 header",
        )
        .await?;
        HeaderSwitch::plan(now, &self.header, next)
    }

    /// Another header takes effect.
    async fn switch(&mut self, next: Header) -> Result<(), AmendError> {
        if next == self.header {
            return Ok(());
        }
        let way = self.way_to(&next).await?;
        way.go(self.file).await?;
        self.header = next;
        Ok(())
    }
}

fn refuse_damaged(scan: &Scan<'_>) -> Result<(), ImageError> {
    let report = scan.sink.report;
    if report.corruptions > 0 || report.check_errors > 0 {
        return Err(ImageError::refused_because(
            "The image is damaged, repair it first",
            format!(
                "{} corruptions, {} places could not be looked at",
                report.corruptions, report.check_errors
            ),
        ));
    }
    Ok(())
}

/// Refuses counts that are too narrow for the references.
fn refuse_narrow(scan: &Scan<'_>, geometry: Geometry) -> Result<(), ImageError> {
    if geometry.refcount_bits() >= scan.geometry.refcount_bits() {
        return Ok(());
    }
    let mut from = 0;
    while let Some(cluster) = scan.references.counters.next_counted(from) {
        let references = scan.references.counters.of(cluster);
        if references > geometry.refcount_max() {
            return Err(ImageError::refused(format!(
                "Cannot decrease refcount entry width to {} bits: Cluster at offset {:#x} has a refcount of {references}",
                geometry.refcount_bits(),
                cluster << geometry.cluster_bits()
            )));
        }
        from = cluster + 1;
    }
    Ok(())
}
