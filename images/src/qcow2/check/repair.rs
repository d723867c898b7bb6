//! Repair: what a check finds is put right, in an order that leaves the image no worse than it was wherever it stops.
//!
//! ```text
//!   1  entries of zeroes that keep room in the middle of a cluster keep none; sync
//!   2  counts raised; sync; counts lowered; sync
//!      or, where the refcount structure cannot be trusted: a new one written to free clusters; sync; header; sync
//!   3  flags of the active tables set and cleared as the counts say; sync
//!   4  checked again; if nothing is wrong any more, the header's dirty and corrupt bits are cleared; sync
//! ```
//! Every write changes whole entries within 512-byte sectors, so that one which is torn has changed some entries and not
//! others. A count is raised before, and lowered only after, everything that depends on it; a flag that allows writing in
//! place is set only where the stored count is one, after that count is durable.
//!
//! Leaked clusters are given back only where everything that could refer to them was understood: what seems to be leaked may
//! be what a damaged entry led to. (`qemu-img check -r` gives them back all the same.)

use std::rc::Rc;

use blockyard_storage::{Buffer, ByteRange, Storage};

use super::check;
use super::findings::FindingKind;
use super::observer::{CheckStop, Observer, Report, Unobserved};
use super::read_ahead::{PIECE_BYTES, ReadAhead};
use super::rebuild::rebuild;
use super::refcounts::Leave;
use super::scan::{Extent, Scan};
use crate::error::ImageError;
use crate::qcow2::layout::header::{autoclear, incompatible};
use crate::qcow2::layout::refcounts::{put_refcount, refcount_at};
use crate::qcow2::units::Version;

/// Unit in which a medium writes at once.
const SECTOR_BYTES: usize = 512;
/// Where the feature bits stand in a header of version 3: incompatible, compatible, autoclear.
const FEATURES_OFFSET: u64 = 72;

/// How much a repair may change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Repair {
    /// Clusters that are reserved for nothing are given back.
    Leaks,
    /// Everything that can be put right.
    All,
}

/// What a repair came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Repaired {
    /// Corruptions that were put right.
    pub corruptions_fixed: u64,
    /// Leaked clusters that were given back.
    pub leaks_fixed: u64,
    /// What was found at first. Flags of tables are looked at only once the counts are right, so they are not in it.
    pub before: Report,
    /// What is left. If something was changed, this is the result of another check.
    pub after: Report,
}

impl Repaired {
    /// Whether something was changed.
    pub const fn has_fixed(&self) -> bool {
        self.corruptions_fixed > 0 || self.leaks_fixed > 0
    }
}

/// Checks an image, puts right what it finds, and checks it again. The observer hears the findings of both checks and of what
/// is done. Nobody else uses the image; `file` takes requests of any alignment.
///
/// # Errors
/// When the image is refused or cannot be read or written, when [`Repair::Leaks`] meets a refcount structure that cannot
/// be trusted, or when the observer cancels.
///
/// # Cancel safety
/// Dropping the future, like a crash or an error, leaves the image no worse than it was; repairing it again goes on.
pub async fn repair(
    file: &Rc<dyn Storage>,
    how: Repair,
    observer: &dyn Observer,
) -> Result<Repaired, CheckStop> {
    let mut scan = Scan::begin(file, observer, false).await?;
    scan.count(Extent::Whole).await?;
    scan.compare_counts(Leave::References).await?;
    scan.sink.step(0).await?;
    let before = scan.sink.report;
    let mut fixer = Fixer::new(file);
    if !scan.sink.is_blind {
        fixer.fix_counts(&mut scan, how).await?;
        if fixer.has_changed {
            scan = Scan::begin(file, observer, true).await?;
            scan.count(Extent::Whole).await?;
        }
        fixer.fix_flags(&mut scan, how).await?;
    }
    let after = match fixer.has_changed {
        true => {
            observer
                .repaired(fixer.corruptions_fixed, fixer.leaks_fixed)
                .await;
            check(file, observer).await?
        }
        false => scan.sink.report,
    };
    if after.corruptions == 0 && after.check_errors == 0 {
        fixer.clear_bits(&scan).await?;
    }
    Ok(Repaired {
        corruptions_fixed: fixer.corruptions_fixed,
        leaks_fixed: fixer.leaks_fixed,
        before,
        after,
    })
}

/// Puts the counts of an image right whose dirty bit is set, before it is used for writing. Its header has changed when
/// this returns, and is read again. Corruptions that no repair can put right do not stand in the way of using it, as with
/// QEMU; its dirty bit stays set then.
///
/// # Errors
/// When that cannot be done; the image must not be written.
///
/// # Cancel safety
/// As [`repair`].
pub async fn repair_dirty(file: &Rc<dyn Storage>) -> Result<Report, ImageError> {
    let text = "Could not repair dirty image";
    match repair(file, Repair::All, &Unobserved).await {
        Ok(repaired) if repaired.after.check_errors == 0 => Ok(repaired.after),
        Ok(_) => Err(ImageError::refused_because(
            text,
            "not everything that refers to clusters could be looked at",
        )),
        Err(CheckStop::Failed(ImageError::Refused { text: why, .. })) => {
            Err(ImageError::refused_because(text, why))
        }
        Err(CheckStop::Failed(error)) => Err(error),
        // Nobody can.
        Err(CheckStop::Cancelled) => Err(ImageError::refused(text)),
    }
}

/// Which counts are changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Direction {
    Up,
    Down,
}

/// Changes an image, and remembers what it did.
pub(in crate::qcow2) struct Fixer {
    pub(in crate::qcow2) file: Rc<dyn Storage>,
    pub(in crate::qcow2) has_changed: bool,
    pub(in crate::qcow2) corruptions_fixed: u64,
    pub(in crate::qcow2) leaks_fixed: u64,
}

impl Fixer {
    pub(in crate::qcow2) fn new(file: &Rc<dyn Storage>) -> Self {
        Self {
            file: Rc::clone(file),
            has_changed: false,
            corruptions_fixed: 0,
            leaks_fixed: 0,
        }
    }

    async fn fix_counts(&mut self, scan: &mut Scan<'_>, how: Repair) -> Result<(), CheckStop> {
        if how == Repair::All && scan.unaligned_zeroes > 0 {
            self.fix_unaligned_zeroes(scan).await?;
            // References that were wrong are gone.
            let must_rebuild = scan.must_rebuild;
            *scan = Scan::begin(&self.file, scan.sink.observer(), true).await?;
            scan.count(Extent::Whole).await?;
            scan.compare_counts(Leave::References).await?;
            scan.must_rebuild |= must_rebuild;
            scan.sink.silent = false;
        }
        let replaces_snapshots = how == Repair::All && !scan.snapshots.incomplete.is_empty();
        if scan.must_rebuild && how == Repair::Leaks {
            return Err(ImageError::refused_because(
                "need to rebuild refcount structures",
                "repairing everything, not only leaks, does that",
            )
            .into());
        }
        if scan.must_rebuild || replaces_snapshots {
            return rebuild(self, scan, replaces_snapshots).await;
        }
        let report = scan.sink.report;
        if how == Repair::All && report.corruptions > 0 {
            self.adjust_counts(scan, Direction::Up).await?;
        }
        if scan.sink.hides_references && report.leaks > 0 {
            scan.sink.found(FindingKind::LeaksKept, 1);
            scan.sink.step(0).await?;
        } else if report.leaks > 0 {
            self.adjust_counts(scan, Direction::Down).await?;
        }
        Ok(())
    }

    /// Makes the stored counts that are too low, or too high, those that the references say.
    async fn adjust_counts(
        &mut self,
        scan: &mut Scan<'_>,
        direction: Direction,
    ) -> Result<(), CheckStop> {
        let geometry = scan.geometry;
        let per_block = geometry.refcounts_per_block();
        let blocks = scan
            .references
            .counters
            .clusters()
            .div_ceil(per_block)
            .min(scan.refcount_table.len() as u64);
        let (mut index, mut fixed) = (0, 0_u64);
        while index < blocks {
            // Few enough to be listed.
            let end = blocks.min(index + 256);
            let pieces: Vec<_> = (index..end)
                .flat_map(|index| scan.block_pieces(index))
                .collect();
            index = end;
            let mut reads = ReadAhead::new(&self.file, pieces.into_iter());
            while let Some((range, first, mut buffer)) = reads.next().await? {
                let mut changed = Changed::default();
                let counts = (range.length() * 8) >> geometry.refcount_order();
                for place in 0..usize::try_from(counts).unwrap_or(0) {
                    let cluster = first + place as u64;
                    let count = refcount_at(&geometry, buffer.as_slice(), place).unwrap_or(0);
                    let references = scan.references.counters.of(cluster);
                    let wrong = match direction {
                        Direction::Up => count < references,
                        Direction::Down => count > references,
                    };
                    if wrong && cluster < scan.references.counters.clusters() {
                        // A count is at most what fits.
                        if !put_refcount(&geometry, buffer.as_mut_slice(), place, references) {
                            continue;
                        }
                        changed.bits(place << geometry.refcount_order(), geometry.refcount_bits());
                        fixed += 1;
                        let finding = FindingKind::Refcount {
                            cluster,
                            count,
                            references,
                        };
                        scan.sink.repairing(finding);
                    }
                }
                self.write_back(scan, range, &buffer, changed).await?;
                reads.give_back(buffer);
                scan.sink.step(range.length()).await?;
            }
        }
        match direction {
            Direction::Up => self.corruptions_fixed += fixed,
            Direction::Down => self.leaks_fixed += fixed,
        }
        self.sync().await
    }

    /// Writes the sectors of a piece that have changed.
    pub(in crate::qcow2) async fn write_back(
        &mut self,
        scan: &Scan<'_>,
        range: ByteRange,
        buffer: &Buffer,
        changed: Changed,
    ) -> Result<(), CheckStop> {
        let Some(bytes) = changed.sectors(buffer.len()) else {
            return Ok(());
        };
        let offset = range.offset() + bytes.start as u64;
        let bytes = buffer.as_slice().get(bytes).unwrap_or(&[]);
        self.write(scan, offset, bytes).await
    }

    /// Writes some bytes. Before the first write of all, the header stops saying what only those know who wrote it.
    pub(in crate::qcow2) async fn write(
        &mut self,
        scan: &Scan<'_>,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), CheckStop> {
        self.begin(scan).await?;
        let range = ByteRange::new(offset, bytes.len() as u64);
        for piece in range.pieces(PIECE_BYTES) {
            let from = usize::try_from(piece.offset() - offset).unwrap_or(usize::MAX);
            let length = usize::try_from(piece.length()).unwrap_or(0);
            let part = bytes.get(from..).and_then(|rest| rest.get(..length));
            let buffer = Buffer::copy_of(part.unwrap_or(&[]));
            self.file.write(piece.offset(), buffer).await.outcome?;
        }
        Ok(())
    }

    /// What comes before the first write of all.
    pub(in crate::qcow2) async fn begin(&mut self, scan: &Scan<'_>) -> Result<(), CheckStop> {
        if !self.has_changed {
            self.has_changed = true;
            self.forget_unknown_features(scan).await?;
        }
        Ok(())
    }

    /// Makes what was written durable.
    pub(in crate::qcow2) async fn sync(&self) -> Result<(), CheckStop> {
        if self.has_changed {
            self.file.sync().await?;
        }
        Ok(())
    }

    /// Spec: qcow2, "Header": autoclear bits that are not known are cleared before anything else is written. What is recorded of the
    /// disk's changes stays true: a repair changes nothing that the disk shows.
    async fn forget_unknown_features(&self, scan: &Scan<'_>) -> Result<(), CheckStop> {
        let known = scan.header.autoclear & (autoclear::KNOWN | autoclear::ACTIVITY);
        if known == scan.header.autoclear || scan.geometry.version() == Version::V2 {
            return Ok(());
        }
        let buffer = Buffer::copy_of(&known.to_be_bytes());
        self.file
            .write(FEATURES_OFFSET + 16, buffer)
            .await
            .outcome?;
        Ok(self.file.sync().await?)
    }

    /// Says in the header that nothing is wrong any more.
    async fn clear_bits(&mut self, scan: &Scan<'_>) -> Result<(), CheckStop> {
        let bits = scan.header.incompatible;
        let sound = bits & !(incompatible::DIRTY | incompatible::CORRUPT);
        if bits == sound || scan.geometry.version() == Version::V2 {
            return Ok(());
        }
        self.write(scan, FEATURES_OFFSET, &sound.to_be_bytes())
            .await?;
        self.sync().await
    }
}

/// Which bytes of a piece have changed.
#[derive(Clone, Copy, Default)]
pub(in crate::qcow2) struct Changed(Option<(usize, usize)>);

impl Changed {
    /// So many bits from a bit on have changed.
    pub(in crate::qcow2) fn bits(&mut self, bit: usize, bits: u32) {
        let end = bit.saturating_add(usize::try_from(bits).unwrap_or(0));
        self.bytes(bit / 8, end.div_ceil(8));
    }

    /// The bytes from `start` up to `end` have changed.
    pub(in crate::qcow2) fn bytes(&mut self, start: usize, end: usize) {
        let (first, last) = self.0.unwrap_or((start, end));
        self.0 = Some((first.min(start), last.max(end)));
    }

    /// The sectors that hold them.
    fn sectors(self, length: usize) -> Option<std::ops::Range<usize>> {
        let (first, end) = self.0?;
        let start = first / SECTOR_BYTES * SECTOR_BYTES;
        Some(start..end.next_multiple_of(SECTOR_BYTES).min(length))
    }
}
