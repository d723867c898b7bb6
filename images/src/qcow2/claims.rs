//! [`Claim`]: clusters that were free and are meant for something, until that leads to them.

use std::rc::Rc;

use crate::error::ImageError;
use crate::qcow2::image::{ImageState, Qcow2};
use crate::qcow2::refcounts::{Counted, Run};
use crate::qcow2::units::{ClusterCount, HostCluster};

/// Clusters that are in nobody's tables yet. Given back when it is dropped.
pub(super) struct Claim {
    state: Rc<ImageState>,
    run: Run,
    held: bool,
    /// Somebody may be writing to them.
    written: bool,
}

impl Qcow2 {
    /// Takes a run of free clusters, `wanted` at most and as many of them as there are together.
    ///
    /// # Errors
    /// `ENOSPC` where the file cannot grow any more, `EFBIG` where the format has no place for them.
    pub(super) async fn claim(&self, wanted: ClusterCount) -> Result<Claim, ImageError> {
        let mut tried_to_free = false;
        loop {
            match self.state.claim_now(wanted)? {
                Counted::Done(run) => return Ok(self.state.claimed(run)),
                Counted::Load(at) => self.load_counts(at).await?,
                Counted::Write => self.commit_counts().await?,
                Counted::Reserve(cluster) => self.reserve_table(cluster).await?,
                Counted::GrowTable => self.grow_refcount_table().await?,
                Counted::Wait => self.wait_for_claims().await,
                Counted::Full if tried_to_free => return Err(self.state.no_room().into()),
                Counted::Full => {
                    // What was given up lately may be used again once that is durable.
                    tried_to_free = true;
                    self.commit().await?;
                    self.state.counts.cursor.set(HostCluster(1));
                }
            }
        }
    }
}

impl ImageState {
    /// A claim on a run that [`claim_now`](Self::claim_now) has found.
    pub(super) fn claimed(self: &Rc<Self>, run: Run) -> Claim {
        Claim {
            state: Rc::clone(self),
            run,
            held: true,
            written: false,
        }
    }

    /// A claim on a cluster that [`claim_cluster`](Self::claim_cluster) has taken.
    pub(super) fn claimed_cluster(self: &Rc<Self>, cluster: HostCluster) -> Claim {
        self.claimed_run(cluster, ClusterCount(1))
    }

    /// A claim on clusters whose counts are 1 already.
    pub(super) fn claimed_run(self: &Rc<Self>, first: HostCluster, count: ClusterCount) -> Claim {
        self.claimed(Run {
            first,
            count,
            reads_zero: false,
        })
    }
}

impl Claim {
    /// The first cluster.
    pub(super) const fn first(&self) -> HostCluster {
        self.run.first
    }

    /// How many clusters.
    pub(super) const fn count(&self) -> ClusterCount {
        self.run.count
    }

    /// Nobody has ever written there: it reads as zeroes.
    pub(super) const fn reads_zero(&self) -> bool {
        self.run.reads_zero
    }

    /// Somebody writes there from now on: until [`settled`](Self::settled), dropping this keeps the clusters from being used
    /// again.
    pub(super) fn writing(&mut self) {
        self.written = true;
    }

    /// Nobody writes there any more.
    pub(super) fn settled(&mut self) {
        self.written = false;
    }

    /// They are in a table now: it is not for this claim to give them back.
    pub(super) fn keep(mut self) {
        self.held = false;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.held {
            return;
        }
        let Run { first, count, .. } = self.run;
        if self.written {
            self.state.strayed.borrow_mut().insert(first, count);
        } else {
            self.state.give_back(first, count);
        }
    }
}
