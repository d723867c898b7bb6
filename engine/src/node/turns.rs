//! [`Turns`]: who may go on in a range of a disk that is copied while others write to it. Whoever comes is behind all that came
//! before and must not be there at the same time.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

use blockyard_storage::ByteRange;

/// What somebody does in a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Doing {
    /// Writes to the source, and has the range copied later.
    Write,
    /// Writes to both sides.
    WriteBoth,
    /// Copies from the source to the target what is there when its turn has come.
    Copy,
    /// Brings over what was known of the source before: that it reads as zeroes.
    CopyKnown,
    /// Reads what the source holds, which nobody may change meanwhile.
    ReadOld,
    /// Is about to change what has been copied before.
    Overwrite,
    /// Gives up what has been copied, or was to be.
    GiveUp,
}

impl Doing {
    /// Whether two must not be in one range at the same time. Who writes to the source only marks the range when he is done, so
    /// copies before that do not matter.
    fn excludes(self, other: Doing) -> bool {
        match (self.as_copy(), other.as_copy()) {
            (Doing::WriteBoth | Doing::GiveUp, _) | (_, Doing::WriteBoth | Doing::GiveUp) => true,
            (Doing::Copy, Doing::Copy) => true,
            // Before it has been copied nobody can tell where it is to be read.
            (Doing::ReadOld, Doing::Copy | Doing::Overwrite) => true,
            (Doing::Copy | Doing::Overwrite, Doing::ReadOld) => true,
            _ => false,
        }
    }

    /// Whatever is copied, it is in the same one's way.
    fn as_copy(self) -> Self {
        match self {
            Doing::CopyKnown => Doing::Copy,
            other => other,
        }
    }
}

/// Everybody in the order in which they came.
#[derive(Default)]
pub(crate) struct Turns {
    list: RefCell<Vec<Entry>>,
    next_id: Cell<u64>,
}

struct Entry {
    id: u64,
    range: ByteRange,
    doing: Doing,
    has_come: bool,
    waker: Option<Waker>,
}

/// A place in the order, kept until it is dropped.
#[must_use = "others do not wait any more"]
pub struct Turn {
    turns: Rc<Turns>,
    id: u64,
}

impl Turns {
    /// Takes a place behind everybody.
    pub(crate) fn take(self: &Rc<Self>, range: ByteRange, doing: Doing) -> Turn {
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        self.list.borrow_mut().push(Entry {
            id,
            range,
            doing,
            has_come: false,
            waker: None,
        });
        Turn {
            turns: Rc::clone(self),
            id,
        }
    }

    /// Whether nobody is in `range`, or waits to be.
    pub(crate) fn is_free(&self, range: ByteRange) -> bool {
        let list = self.list.borrow();
        !list.iter().any(|entry| entry.range.overlaps(&range))
    }

    /// Whether somebody waits for his turn to bring over what he knew of something of `range`.
    pub(crate) fn known_copy_waits(&self, range: ByteRange) -> bool {
        let list = self.list.borrow();
        let mut waiting = list.iter().filter(|entry| !entry.has_come);
        waiting.any(|entry| entry.doing == Doing::CopyKnown && entry.range.overlaps(&range))
    }
}

impl Turn {
    /// Whether somebody waits who could go on in part of this range otherwise.
    pub(crate) fn is_waited_for(&self) -> bool {
        let list = self.turns.list.borrow();
        let mut entries = list.iter().skip_while(|entry| entry.id != self.id);
        entries.next().is_some_and(|mine| {
            entries.any(|other| {
                !other.has_come
                    && other.range.overlaps(&mine.range)
                    && other.doing.excludes(mine.doing)
            })
        })
    }

    /// Waits until nobody is in front who must not be there at the same time.
    ///
    /// # Cancel safety
    /// The place is kept.
    pub(crate) async fn come(&self) {
        poll_fn(|cx| {
            let mut list = self.turns.list.borrow_mut();
            let Some(place) = list.iter().position(|entry| entry.id == self.id) else {
                return Poll::Ready(());
            };
            let (before, rest) = list.split_at_mut(place);
            let Some(mine) = rest.first_mut() else {
                return Poll::Ready(());
            };
            let is_in_the_way = |other: &Entry| {
                other.range.overlaps(&mine.range) && other.doing.excludes(mine.doing)
            };
            if before.iter().any(is_in_the_way) {
                mine.waker = Some(cx.waker().clone());
                return Poll::Pending;
            }
            mine.has_come = true;
            Poll::Ready(())
        })
        .await;
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let waiting: Vec<Waker> = {
            let mut list = self.turns.list.borrow_mut();
            list.retain(|entry| entry.id != self.id);
            let waiting = list.iter_mut().filter_map(|entry| entry.waker.take());
            waiting.collect()
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::Context;

    use super::*;

    fn comes(turn: &Turn) -> bool {
        let mut come = pin!(turn.come());
        come.as_mut()
            .poll(&mut Context::from_waker(Waker::noop()))
            .is_ready()
    }

    #[test]
    fn nobody_overtakes_whom_he_excludes() {
        let turns = Rc::new(Turns::default());
        let take = |offset, doing| turns.take(ByteRange::new(offset, 10), doing);
        let copy = take(0, Doing::Copy);
        assert!(comes(&copy));
        let (write, both) = (take(5, Doing::Write), take(5, Doing::WriteBoth));
        assert!(comes(&write), "a copy does not mind");
        assert!(!comes(&both));
        let next = take(12, Doing::CopyKnown);
        assert!(!comes(&next), "behind the write to both sides");
        assert!(turns.known_copy_waits(ByteRange::new(21, 1)));
        assert!(
            !turns.known_copy_waits(ByteRange::new(0, 10)),
            "only one that has come"
        );
        assert!(!comes(&take(20, Doing::WriteBoth)));
        drop(copy);
        assert!(!comes(&both), "the write is still there");
        drop(write);
        assert!(comes(&both));
        assert!(!comes(&next));
        drop(both);
        assert!(comes(&next));
        assert!(!turns.known_copy_waits(ByteRange::new(0, 100)));
    }

    #[test]
    fn what_is_read_is_not_changed_meanwhile() {
        let turns = Rc::new(Turns::default());
        let take = |offset, doing| turns.take(ByteRange::new(offset, 10), doing);
        let (read, other_read) = (take(0, Doing::ReadOld), take(5, Doing::ReadOld));
        assert!(comes(&read) && comes(&other_read));
        assert!(!read.is_waited_for());
        let (copy, overwrite) = (take(5, Doing::Copy), take(0, Doing::Overwrite));
        assert!(!comes(&copy) && !comes(&overwrite));
        assert!(read.is_waited_for() && other_read.is_waited_for());
        let late = take(8, Doing::ReadOld);
        drop(read);
        assert!(!comes(&copy) && !comes(&overwrite) && !comes(&late));
        drop(other_read);
        assert!(
            comes(&copy) && comes(&overwrite),
            "they do not mind each other"
        );
        assert!(!comes(&late), "behind the copy");
        assert!(copy.is_waited_for() && overwrite.is_waited_for());
        drop((copy, overwrite));
        assert!(comes(&late) && !turns.is_free(ByteRange::new(17, 1)));
        assert!(turns.is_free(ByteRange::new(0, 8)));
    }
}
