//! Leases: whoever knows where bytes are on the host holds one, so that what is freed meanwhile is not used again before.
//!
//! Leases of one era are one counter: taking one costs an increment. When something is freed, the era ends; what was freed
//! in it waits until every lease of it and of the eras before has been dropped.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

/// Keeps clusters as they are until it is dropped.
#[derive(Clone, Debug)]
pub struct Lease {
    _era: Rc<Era>,
}

#[derive(Debug)]
struct Era;

/// Eras, and what waits for their ends.
pub(super) struct Leases<T> {
    now: RefCell<Rc<Era>>,
    waiting: RefCell<VecDeque<(Rc<Era>, T)>>,
}

impl<T> Default for Leases<T> {
    fn default() -> Self {
        Self {
            now: RefCell::new(Rc::new(Era)),
            waiting: RefCell::default(),
        }
    }
}

impl<T> Leases<T> {
    /// A lease on everything that is in use now.
    pub(super) fn take(&self) -> Lease {
        Lease {
            _era: Rc::clone(&self.now.borrow()),
        }
    }

    /// `freed` waits until every lease taken so far has been dropped.
    pub(super) fn retire(&self, freed: T) {
        let era = self.now.replace(Rc::new(Era));
        self.waiting.borrow_mut().push_back((era, freed));
    }

    /// What was released comes first the next time.
    pub(super) fn put_back(&self, freed: T) {
        let nobody = Rc::new(Era);
        self.waiting.borrow_mut().push_front((nobody, freed));
    }

    /// Everything that waits.
    pub(super) fn fold_waiting<R>(&self, first: R, fold: impl FnMut(R, &T) -> R) -> R {
        let waiting = self.waiting.borrow();
        waiting.iter().map(|(_, freed)| freed).fold(first, fold)
    }

    /// Everything that waits becomes one, and waits for every lease that any of it waits for.
    pub(super) fn join_waiting(&self, mut join: impl FnMut(&mut T, T))
    where
        T: Default,
    {
        let mut waiting = self.waiting.borrow_mut();
        let mut all = T::default();
        for (_, freed) in waiting.iter_mut() {
            join(&mut all, std::mem::take(freed));
        }
        if let Some((_, last)) = waiting.back_mut() {
            *last = all;
        }
        // What is last waits for the eras in front of it, as far as somebody holds a lease of them.
        let mut behind = waiting.len();
        waiting.retain(|(era, _)| {
            behind -= 1;
            behind == 0 || Rc::strong_count(era) > 1
        });
    }

    /// The next that nobody holds any more, in the order in which they were retired.
    pub(super) fn next_released(&self) -> Option<T> {
        let mut waiting = self.waiting.borrow_mut();
        let (era, _) = waiting.front()?;
        if Rc::strong_count(era) > 1 {
            return None;
        }
        waiting.pop_front().map(|(_, freed)| freed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_freed_waits_for_every_lease_taken_before() {
        let leases = Leases::default();
        let first = leases.take();
        leases.retire(1);
        let second = leases.take();
        leases.retire(2);
        let _third = leases.take();
        drop(second);
        assert_eq!(leases.next_released(), None, "the first lease is older");
        let copy = first.clone();
        drop(first);
        assert_eq!(leases.next_released(), None);
        drop(copy);
        assert_eq!(leases.next_released(), Some(1));
        assert_eq!(leases.next_released(), Some(2));
        assert_eq!(leases.next_released(), None);
    }
    #[test]
    fn what_is_joined_waits_for_the_leases_of_all() {
        let leases = Leases::default();
        let first = leases.take();
        leases.retire(vec![1]);
        leases.retire(vec![2]);
        let third = leases.take();
        leases.retire(vec![3]);
        leases.join_waiting(Vec::extend);
        assert_eq!(leases.fold_waiting(0, |sum, _| sum + 1), 2, "one is held");
        drop(third);
        assert_eq!(leases.next_released(), None, "the first lease is older");
        leases.retire(vec![4]);
        leases.put_back(vec![0]);
        assert_eq!(leases.next_released(), Some(vec![0]));
        drop(first);
        let released: Vec<_> = std::iter::from_fn(|| leases.next_released()).collect();
        assert_eq!(released, [vec![], vec![1, 2, 3], vec![4]]);
    }
}
