//! [`amend`]: from options to an image that has them.

use std::rc::Rc;

use blockyard_storage::{Storage, StorageError};

use super::header_switch::HeaderSwitch;
use super::options::AmendOptions;
use super::zero_clusters::ZeroClusters;
use crate::error::ImageError;
use crate::pace::{Cancelled, Pace};
use crate::qcow2::check::rebuild::{self, Room};
use crate::qcow2::check::repair::Fixer;
use crate::qcow2::check::scan::{Extent, Scan};
use crate::qcow2::check::{CheckStop, Repair, Unobserved, repair, repair_dirty};
use crate::qcow2::layout::header::{Access, Header};
use crate::qcow2::open::{OpenedImage, read_image};
use crate::qcow2::reading::read_bytes;
use crate::qcow2::units::{Compression, Geometry, Version};
use crate::qcow2::watching::Watching;

/// Progress of another header, as it is written.
const HEADER_BYTES: u64 = 512;

/// Why an image was not amended. Each of its options has the old or the new value.
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

/// Gives an image the options, all but the length of its disk. Afterwards it has them, durably; what the guest reads is
/// unchanged. Nobody else uses the image; `file` takes requests of any alignment. Memory and time are those of a check
/// ([`check`](crate::qcow2::check)) where counts or zero clusters have to change, and nothing otherwise.
///
/// # Errors
/// [`AmendError::Failed`] with QEMU's texts where the options are refused, before anything is changed; where the image is
/// damaged, or a storage fails. [`AmendError::Cancelled`] when `pace` says so.
///
/// # Cancel safety
/// Dropping the future leaves what a power cut leaves: each option has its old or its new value, clusters may be leaked. A
/// cancellation through [`Pace`] gives them back.
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
    let mut amending = Amending {
        file,
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
        let mended = repair(file, Repair::Leaks, &Unobserved).await;
        if outcome.is_ok() {
            mended?;
        }
    }
    outcome
}

struct Amending<'a> {
    file: &'a Rc<dyn Storage>,
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
        let is_downgrade = new.version() < old.version();
        let completes_snapshots = new.version() > old.version()
            && image
                .snapshots
                .iter()
                .any(|snapshot| snapshot.disk_bytes.is_none());
        let renews = old.refcount_order() != new.refcount_order() || completes_snapshots;
        // Whether there is a way is known before anything is written.
        self.way_to(&self.target).await?;
        if renews || is_downgrade {
            self.recount(renews, completes_snapshots, watching).await?;
        }
        watching.expect(HEADER_BYTES);
        watching.checkpoint().await?;
        self.switch(self.target.clone()).await?;
        watching.done(HEADER_BYTES);
        Ok(())
    }

    /// Everything that needs all references to be known.
    async fn recount(
        &mut self,
        renews: bool,
        completes_snapshots: bool,
        watching: &Watching<'_>,
    ) -> Result<(), AmendError> {
        let mut scan = Scan::begin(self.file, watching, true).await?;
        let extent = Extent::WithoutRefcounts {
            snapshot_table: completes_snapshots,
        };
        scan.count(extent).await?;
        scan.read_refcount_table().await?;
        refuse_damaged(&scan)?;
        refuse_narrow(&scan, self.target.geometry)?;
        let mut fixer = Fixer::new(self.file);
        let is_downgrade = self.target.geometry.version() < self.header.geometry.version();
        let mut room = Room::of(&scan);
        let zeroes = match is_downgrade {
            true => ZeroClusters::find(&mut scan, &mut room).await?,
            false => ZeroClusters::default(),
        };
        if is_downgrade && zeroes.has_compressed && self.header.compression != Compression::Zlib {
            let text = "Cannot downgrade an image with zstd compression type and existing compressed clusters";
            return Err(ImageError::refused(text).into());
        }
        if renews || zeroes.clusters > 0 {
            let snapshots = match completes_snapshots {
                true => Some(scan.complete_snapshot_table().await?),
                false => None,
            };
            let geometry = self.target.geometry;
            let plan = room.plan(&mut scan, geometry, snapshots.as_ref().map(Vec::len))?;
            rebuild::write(&mut fixer, &mut scan, &plan, snapshots.as_deref()).await?;
            fixer.sync().await?;
            scan.sink.step(0).await?;
            plan.place_in(&mut self.target);
            let mut next = self.target.clone();
            if is_downgrade {
                next = with_width(&self.header, geometry)?;
                plan.place_in(&mut next);
            }
            self.leaks |= zeroes.clusters > 0;
            self.switch(next).await?;
        }
        if zeroes.entries > 0 {
            zeroes.replace(&mut scan, &mut fixer).await?;
            self.leaks = zeroes.gives_up;
        }
        watching.end_of_scan();
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

/// The header of version 3 with counts of another width.
fn with_width(header: &Header, geometry: Geometry) -> Result<Header, ImageError> {
    let wide = Geometry::new(
        Version::V3,
        geometry.cluster_bits(),
        geometry.refcount_order(),
        geometry.extended_l2(),
    );
    let geometry = wide.ok_or_else(|| ImageError::refused("Refcount width does not fit"))?;
    Ok(Header {
        geometry,
        ..header.clone()
    })
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
