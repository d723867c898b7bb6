//! [`Clusters`]: which clusters of a disk are still to be saved before they may change, and who is at it. Pure.
//!
//! Whoever saves clusters takes his turn first, then looks which of them are still to be saved, and says so once they are. What is
//! to be saved is what it was when the map was made, as nobody changes it before.

use std::cell::RefCell;
use std::rc::Rc;

use blockyard_storage::ByteRange;

use crate::node::dirty_map::DirtyMap;
use crate::node::turns::{Doing, Turn, Turns};

/// Which clusters are still to be saved.
pub(crate) struct Clusters {
    unsaved: RefCell<DirtyMap>,
    turns: Rc<Turns>,
}

impl Clusters {
    /// Of a disk of this length, all of which is to be saved, in clusters of `cluster_bytes` (a power of two) or, on a very long
    /// disk, more.
    pub(crate) fn new(length_bytes: u64, cluster_bytes: u64) -> Self {
        let mut unsaved = DirtyMap::new(length_bytes, cluster_bytes);
        unsaved.mark(ByteRange::new(0, length_bytes));
        Self::with(unsaved)
    }

    /// Some of which has been saved before.
    pub(crate) fn with(unsaved: DirtyMap) -> Self {
        Self {
            unsaved: unsaved.into(),
            turns: Rc::default(),
        }
    }

    /// Only what has changed according to `map`, in whole clusters, is to be saved. Nobody may have begun.
    pub(crate) fn keep_only(&self, map: &DirtyMap) {
        let mut unsaved = self.unsaved.borrow_mut();
        let mut kept = unsaved.emptied();
        kept.merge(map);
        *unsaved = kept;
    }

    /// What `map` says, in whole clusters, is to be saved as well. Nobody may have begun.
    pub(crate) fn keep_too(&self, map: &DirtyMap) {
        self.unsaved.borrow_mut().merge(map);
    }

    /// What is still to be saved, for somebody who goes on with it.
    pub(crate) fn unsaved(&self) -> DirtyMap {
        self.unsaved.borrow().clone()
    }

    /// All clusters of a disk of this length.
    pub(crate) fn all(&self, length_bytes: u64) -> DirtyMap {
        let mut all = self.unsaved.borrow().emptied();
        all.mark(ByteRange::new(0, length_bytes));
        all
    }

    /// Bytes of a cluster.
    pub(crate) fn cluster_bytes(&self) -> u64 {
        self.unsaved.borrow().granularity_bytes()
    }

    /// `range` in whole clusters of the disk.
    pub(crate) fn outward(&self, range: ByteRange) -> ByteRange {
        self.unsaved.borrow().outward(range)
    }

    /// The first clusters of `range` that are to be saved, side by side.
    pub(crate) fn first_unsaved(&self, range: ByteRange) -> Option<ByteRange> {
        self.unsaved.borrow().run_in(range)
    }

    /// Bytes of the disk that are to be saved.
    pub(crate) fn unsaved_bytes(&self) -> u64 {
        self.unsaved.borrow().dirty_bytes()
    }

    /// The same; the last cluster counts as a whole, also where the disk's end cuts it.
    pub(crate) fn unsaved_whole_bytes(&self) -> u64 {
        let unsaved = self.unsaved.borrow();
        let bytes = unsaved.dirty_bytes();
        let whole = bytes.checked_next_multiple_of(unsaved.granularity_bytes());
        whole.unwrap_or(bytes)
    }

    /// Nothing of the clusters in `range` has to be saved any more. How many bytes less are to be saved; the last cluster counts as
    /// a whole, also where the disk's end cuts it.
    pub(crate) fn set_saved(&self, range: ByteRange) -> u64 {
        let mut unsaved = self.unsaved.borrow_mut();
        let less = unsaved.clear(range);
        less.next_multiple_of(unsaved.granularity_bytes())
    }

    /// Takes a place in the order of those in the clusters of `range`.
    pub(crate) fn turn(&self, range: ByteRange, doing: Doing) -> Turn {
        self.turns.take(range, doing)
    }

    /// Whether nobody is in the clusters of `range`, or waits to be.
    pub(crate) fn is_free(&self, range: ByteRange) -> bool {
        self.turns.is_free(range)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use blockyard_simulator::{Seed, each_seed};
    use blockyard_storage::LocalFuture;

    use super::*;

    const CLUSTERS: usize = 24;
    const CLUSTER: u64 = 512;

    /// A disk, what was saved of it, and those who use both one byte a cluster.
    struct Model {
        clusters: Clusters,
        disk: RefCell<Vec<u64>>,
        saved: RefCell<Vec<Option<u64>>>,
        dice: Seed,
    }

    async fn give_way() {
        let mut gave = false;
        poll_fn(|_| match std::mem::replace(&mut gave, true) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        })
        .await;
    }

    impl Model {
        async fn dawdle(&self) {
            for _ in 0..self.dice.below(4) {
                give_way().await;
            }
        }

        fn range(&self) -> ByteRange {
            let first = self.dice.below(CLUSTERS as u64);
            let length = 1 + self.dice.below(6);
            ByteRange::new(first * CLUSTER, length * CLUSTER).clamp_end(CLUSTERS as u64 * CLUSTER)
        }

        /// Saves what is left of a range in its turn; every so often something fails on the way.
        async fn save(&self, range: ByteRange) -> Result<(), ()> {
            let turn = self.clusters.turn(range, Doing::Copy);
            turn.come().await;
            let mut rest = range;
            while let Some(run) = self.clusters.first_unsaved(rest) {
                let (one, _) = run.split_at(CLUSTER);
                let index = (one.offset() / CLUSTER) as usize;
                let read = self.disk.borrow()[index];
                self.dawdle().await;
                if self.dice.one_in(10) {
                    return Err(());
                }
                let before = self.saved.borrow_mut()[index].replace(read);
                assert!(before.is_none_or(|before| before == read), "saved twice");
                assert_eq!(self.clusters.set_saved(one), CLUSTER);
                rest = ByteRange::between(one.end(), range.end());
            }
            Ok(())
        }

        async fn write(&self, value: u64) {
            let range = self.range();
            if self.clusters.first_unsaved(range).is_some() && self.save(range).await.is_err() {
                return;
            }
            if !self.clusters.is_free(range) {
                self.clusters.turn(range, Doing::Overwrite).come().await;
            }
            for index in range.offset() / CLUSTER..range.end() / CLUSTER {
                self.disk.borrow_mut()[index as usize] = value;
            }
        }

        async fn read_old(&self) {
            let range = self.range();
            let turn = self.clusters.turn(range, Doing::ReadOld);
            turn.come().await;
            for index in range.offset() / CLUSTER..range.end() / CLUSTER {
                let one = ByteRange::new(index * CLUSTER, CLUSTER);
                let is_saved = self.clusters.first_unsaved(one).is_none();
                self.dawdle().await;
                let read = match is_saved {
                    true => self.saved.borrow()[index as usize].expect("saved"),
                    false => self.disk.borrow()[index as usize],
                };
                assert_eq!(read, index, "what was there at first");
            }
        }

        async fn copy_all(&self) {
            for range in ByteRange::new(0, CLUSTERS as u64 * CLUSTER).pieces(4 * CLUSTER) {
                while self.save(range).await.is_err() {
                    give_way().await;
                }
                self.dawdle().await;
            }
        }
    }

    #[test]
    fn everything_is_saved_once_and_as_it_was() {
        each_seed(
            "blockyard-engine",
            "everything_is_saved_once",
            2000,
            |seed| {
                let model = Model {
                    clusters: Clusters::new(CLUSTERS as u64 * CLUSTER, CLUSTER),
                    disk: (0..CLUSTERS as u64).collect::<Vec<_>>().into(),
                    saved: vec![None; CLUSTERS].into(),
                    dice: Seed::new(seed),
                };
                let mut all: Vec<LocalFutureOf<'_>> = vec![Box::pin(model.copy_all())];
                for writer in 0..4 {
                    let model = &model;
                    all.push(Box::pin(async move {
                        for nth in 0..6 {
                            model.write(1000 + writer * 10 + nth).await;
                            model.dawdle().await;
                        }
                    }));
                    all.push(Box::pin(async move {
                        for _ in 0..4 {
                            model.read_old().await;
                            model.dawdle().await;
                        }
                    }));
                }
                let mut polls = 0;
                while !all.is_empty() {
                    polls += 1;
                    assert!(polls < 100_000, "somebody waits for ever");
                    let place = model.dice.below(all.len() as u64) as usize;
                    let mut one = pin!(&mut all[place]);
                    let polled = one.as_mut().poll(&mut Context::from_waker(Waker::noop()));
                    if polled.is_ready() {
                        drop(all.swap_remove(place));
                    }
                }
                let saved: Vec<u64> = model.saved.borrow().iter().flatten().copied().collect();
                assert_eq!(saved, (0..CLUSTERS as u64).collect::<Vec<_>>());
                assert_eq!(model.clusters.unsaved_bytes(), 0);
            },
        );
    }

    type LocalFutureOf<'a> = LocalFuture<'a, ()>;

    #[test]
    fn only_what_has_changed_is_kept_in_whole_clusters() {
        let clusters = Clusters::new(10_000, 4096);
        let mut map = DirtyMap::exactly(10_000, 512);
        map.mark(ByteRange::new(9_999, 1));
        clusters.keep_only(&map);
        assert_eq!(clusters.unsaved_bytes(), 10_000 - 8192);
        assert_eq!(clusters.unsaved_whole_bytes(), 4096);
        map.mark(ByteRange::new(4_095, 2));
        clusters.keep_only(&map);
        assert_eq!(clusters.unsaved_whole_bytes(), 3 * 4096);
        clusters.keep_only(&DirtyMap::exactly(10_000, 1 << 20));
        assert_eq!(clusters.unsaved_bytes(), 0);
    }

    #[test]
    fn the_cluster_that_the_end_cuts_counts_as_a_whole() {
        let clusters = Clusters::new(10_000, 4096);
        assert_eq!(clusters.unsaved_bytes(), 10_000);
        assert_eq!(clusters.set_saved(ByteRange::new(8192, 1808)), 4096);
        assert_eq!(clusters.set_saved(ByteRange::new(0, 10_000)), 8192);
        assert_eq!(clusters.set_saved(ByteRange::new(0, 10_000)), 0);
    }
}
