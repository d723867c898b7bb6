//! Clusters that are given up: when their counts are lowered, and when they may be used again.
//!
//! ```text
//!   unlinked   nothing in memory leads there; something on the medium may
//!   retired    nothing on the medium leads there; somebody who looked it up before may still read or write it
//!   released   nobody does: it is discarded in the file where that is wanted, its count is lowered, it may be used again
//! ```

use blockyard_storage::ByteRange;

use crate::qcow2::free_list::{Free, FreeList, Why};
use crate::qcow2::image::ImageState;
use crate::qcow2::layout::entries::CompressedAt;
use crate::qcow2::refcounts::{Lowered, Peeked};
use crate::qcow2::units::{ClusterCount, HostCluster, HostOffset};

/// Runs of clusters that may wait for their unlinking to be durable, before it is made so.
const UNLINKED_MAX: usize = 4096;

/// Of the disk, one part in so many may be given up before it is made durable.
const GIVEN_UP_PART: u64 = 8;

/// And one in so many in any case: a large disk that is trimmed as a whole is not flushed at every turn.
const GIVEN_UP_PART_MIN: u64 = 64;

/// Bytes that may be on any disk.
const GIVEN_UP_BYTES_MIN: u64 = 1 << 20;

/// Runs of clusters that may wait for leases as runs, of 24 bytes each; what is more takes a bit for each cluster.
const RETIRED_MAX: usize = 65_536;

/// Why counts cannot be lowered now.
enum Obstacle {
    /// There is no room in the cache before a commit.
    Full,
    /// They cannot be read.
    Unreadable,
}

impl ImageState {
    /// A run of clusters is not referred to any more by what is in memory.
    pub(super) fn unlink(&self, first: HostCluster, count: ClusterCount, why: Why) {
        let free = Free { first, count, why };
        self.unlinked.borrow_mut().push(free);
    }

    /// The cluster that begins at `at` is not referred to any more.
    pub(super) fn unlink_cluster(&self, at: HostOffset, why: Why) {
        self.unlink(self.geometry.host_cluster(at), ClusterCount(1), why);
    }

    /// A compressed cluster is not referred to any more: every host cluster it touches has one reference less.
    pub(super) fn unlink_compressed(&self, place: CompressedAt, why: Why) {
        let first = self.geometry.host_cluster(place.at);
        let last = place.at.plus(place.length_bytes.saturating_sub(1));
        let count = self.geometry.host_cluster(last).0.saturating_sub(first.0) + 1;
        self.unlink(first, ClusterCount(count), why);
    }

    /// So much room comes back once a commit has made it durable that nothing leads there.
    pub(super) fn gives_up_room(&self, bytes: u64) {
        let before = self.given_up_bytes.get();
        self.given_up_bytes.set(before.saturating_add(bytes));
    }

    /// Whether so much was given up that it should be made durable, by whoever has the time.
    pub(super) fn has_unlinked(&self) -> bool {
        self.has_unlinked_beyond(UNLINKED_MAX / 2, self.given_up_bytes_max())
    }

    /// Whether twice as much was, which a change has to wait for.
    pub(super) fn has_much_unlinked(&self) -> bool {
        let bytes = self.given_up_bytes_max().saturating_mul(2);
        self.has_unlinked_beyond(UNLINKED_MAX, bytes)
    }

    fn has_unlinked_beyond(&self, runs: usize, bytes: u64) -> bool {
        self.given_up_bytes.get() > bytes || self.unlinked.borrow().runs() > runs
    }

    fn given_up_bytes_max(&self) -> u64 {
        let disk = self.header.borrow().guest_bytes();
        let part = (disk / GIVEN_UP_PART).max(GIVEN_UP_BYTES_MIN);
        let limit = self.options.given_up_bytes_max.min(part);
        limit.max(disk / GIVEN_UP_PART_MIN)
    }

    /// Clusters that were given up and are counted yet: they wait for a commit, or for leases.
    pub(super) fn given_up(&self) -> ClusterCount {
        let unlinked = self.unlinked.borrow().clusters().0;
        let add = |sum: u64, frees: &FreeList| sum.saturating_add(frees.clusters().0);
        ClusterCount(self.leases.fold_waiting(unlinked, add))
    }

    /// Nothing on the medium leads to `frees` any more. However much waits because somebody holds a lease, none of it is lost.
    pub(super) fn retire(&self, frees: FreeList) {
        if frees.is_empty() {
            return;
        }
        self.leases.retire(frees);
        let runs = self.leases.fold_waiting(0, |sum, frees| sum + frees.runs());
        if runs > RETIRED_MAX {
            self.leases.join_waiting(|all: &mut FreeList, frees| {
                all.append(frees);
                all.mark();
            });
        }
    }

    /// Lowers the counts of everything that was given up and that nobody looks at any more. What there is no room for in the cache
    /// comes first the next time, what cannot be read is tried again after the next commit. To be called by who writes metadata.
    pub(super) async fn free_released(&self) {
        while let Some(mut frees) = self.leases.next_released() {
            frees.sort();
            while let Some(free) = frees.pop() {
                match self.free(free).await {
                    Ok(()) => {}
                    Err((left, Obstacle::Unreadable)) => self.unlinked.borrow_mut().push(left),
                    Err((left, Obstacle::Full)) => {
                        frees.push(left);
                        self.leases.put_back(frees);
                        return;
                    }
                }
            }
        }
    }

    /// Frees a run, or as much as it can: what is left is told, and why.
    async fn free(&self, free: Free) -> Result<(), (Free, Obstacle)> {
        let mut left = free;
        let discards = match free.why {
            Why::Request => self.options.pass_discard_request,
            Why::Other => self.options.pass_discard_other,
        };
        while left.count.0 > 0 {
            let done = match self.peek(left.first, left.count) {
                Peeked::Load(at) => match self.load_for_change(at).await {
                    Ok(()) => continue,
                    Err(obstacle) => return Err((left, obstacle)),
                },
                // Counted as free already, or not counted at all: the image is not sound, and nothing is lost by leaving it.
                Peeked::Unused(count) => count,
                Peeked::Shared(count) => match self.lower(left.first, count) {
                    Lowered::Done => count,
                    Lowered::Load => continue,
                },
                Peeked::Last(count) => {
                    self.forget_compressed_end(left.first, count);
                    if discards {
                        let at = self.geometry.host_offset(left.first);
                        let length = count.0.saturating_mul(self.geometry.cluster_bytes());
                        // Only room is lost where it fails.
                        let _ = self.file.discard(ByteRange::new(at.0, length)).await;
                    }
                    match self.lower(left.first, count) {
                        Lowered::Done => count,
                        Lowered::Load => continue,
                    }
                }
            };
            left.first = left.first.plus(done);
            left.count.0 = left.count.0.saturating_sub(done.0.max(1));
        }
        Ok(())
    }

    /// Reads a slice of counts into the cache. Counts that were changed are written first where they take all of it.
    async fn load_for_change(&self, at: HostOffset) -> Result<(), Obstacle> {
        loop {
            match self.load(at, &self.counts.blocks).await {
                Ok(true) => return Ok(()),
                Ok(false) if self.write_counts_back().await => {}
                Ok(false) => return Err(Obstacle::Full),
                Err(_) => return Err(Obstacle::Unreadable),
            }
        }
    }

    /// No further compressed cluster goes into a cluster that is being given up.
    fn forget_compressed_end(&self, first: HostCluster, count: ClusterCount) {
        let end = self.compressed_end.get();
        let inside = end.is_some_and(|end| {
            let cluster = self.geometry.host_cluster(end);
            cluster >= first && cluster < first.plus(count)
        });
        if inside {
            self.compressed_end.set(None);
        }
    }
}
