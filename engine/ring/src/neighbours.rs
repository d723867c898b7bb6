//! [`Neighbours`]: short transfers that go on in a file where the one before ends become one transfer for the kernel.
//!
//! One request of 1 MiB is less work than sixteen of 64 KiB, for this thread, for the file system and for the disk. Each transfer
//! keeps its buffer and its answer: what is not done by the joint one, for whatever reason, goes by itself, so that it fails or stops short by
//! what its own bytes do. Transfers that are in flight at once have no order among them, so none is lost.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use io_uring::squeue;

use crate::entries::{Direction, Target};

/// Transfers up to this length are short.
pub(crate) const SHORT_BYTES_MAX: u32 = 64 << 10;

/// Bytes of a joint transfer at most: with more, the first would wait long for the last.
const JOINT_BYTES_MAX: u64 = 1 << 20;

/// Transfers that become one at most.
const JOINED_MAX: usize = 64;

/// Joint transfers that are open at once: one each way for each of a few files.
const OPEN_MAX: usize = 8;

/// One transfer, ready to go by itself.
#[derive(Debug)]
pub(crate) struct Single {
    /// Its place in the table of what is in flight.
    pub(crate) number: usize,
    pub(crate) address: *mut u8,
    pub(crate) length: u32,
    pub(crate) offset: u64,
    pub(crate) entry: squeue::Entry,
}

/// Neighbours on one file, at least one.
#[derive(Debug)]
pub(crate) struct Joint {
    direction: Direction,
    /// Keeps the descriptor open.
    file: Arc<OwnedFd>,
    target: Target,
    offset: u64,
    end: u64,
    singles: Vec<Single>,
    vectors: Vec<libc::iovec>,
}

/// What has been queued and is not let go yet, as neighbours of it may follow.
#[derive(Debug, Default)]
pub(crate) struct Neighbours {
    open: Vec<Joint>,
}

impl Neighbours {
    /// Adds a transfer, behind its neighbour if that is here. What comes back can wait no longer: no neighbour fits there any more, or room
    /// is needed.
    pub(crate) fn add(
        &mut self,
        direction: Direction,
        file: &Arc<OwnedFd>,
        target: Target,
        single: Single,
    ) -> Option<Joint> {
        let mut places = self.open.iter();
        let known = places.position(|joint| joint.is_on(direction, file));
        if let Some(place) = known
            && self.open[place].takes(&single)
        {
            self.open[place].push(single);
            let is_full = self.open[place].is_full();
            return is_full.then(|| self.open.remove(place));
        }
        let leaving = known.or_else(|| (self.open.len() == OPEN_MAX).then_some(0));
        let leaving = leaving.map(|place| self.open.remove(place));
        self.open.push(Joint::new(direction, file, target, single));
        leaving
    }

    /// The next one that is open, which no neighbour will follow.
    pub(crate) fn close_one(&mut self) -> Option<Joint> {
        let is_any = !self.open.is_empty();
        is_any.then(|| self.open.remove(0))
    }
}

impl Joint {
    fn new(direction: Direction, file: &Arc<OwnedFd>, target: Target, single: Single) -> Self {
        let mut joint = Self {
            direction,
            file: file.clone(),
            target,
            offset: single.offset,
            end: single.offset,
            singles: Vec::new(),
            vectors: Vec::new(),
        };
        joint.push(single);
        joint
    }

    fn is_on(&self, direction: Direction, file: &Arc<OwnedFd>) -> bool {
        self.direction == direction && Arc::ptr_eq(&self.file, file)
    }

    fn takes(&self, single: &Single) -> bool {
        self.end == single.offset
            && self.length() + u64::from(single.length) <= JOINT_BYTES_MAX
            && self.singles.len() < JOINED_MAX
    }

    fn is_full(&self) -> bool {
        self.length() == JOINT_BYTES_MAX || self.singles.len() == JOINED_MAX
    }

    fn push(&mut self, single: Single) {
        self.end += u64::from(single.length);
        self.vectors.push(libc::iovec {
            iov_base: single.address.cast(),
            iov_len: single.length as usize,
        });
        self.singles.push(single);
    }

    /// Bytes of all.
    pub(crate) fn length(&self) -> u64 {
        self.end - self.offset
    }

    /// The file they are on.
    pub(crate) fn file(&self) -> &Arc<OwnedFd> {
        &self.file
    }

    /// The only one there is, if no neighbour came.
    pub(crate) fn alone(&self) -> Option<&Single> {
        match &self.singles[..] {
            [single] => Some(single),
            _ => None,
        }
    }

    /// All of them as one, which has the addresses that are in here: it has to be kept until that has ended.
    pub(crate) fn entry(&self) -> squeue::Entry {
        self.target
            .vectored_entry(self.direction, &self.vectors, self.offset)
    }

    /// Each, and whether it was done whole by a joint transfer that has ended with `result`: a count, or a negative error number.
    pub(crate) fn ended(self, result: i32) -> impl Iterator<Item = (Single, bool)> {
        let done = u64::try_from(result).unwrap_or(0);
        let done_to = self.offset + done;
        self.singles.into_iter().map(move |single| {
            let is_done = single.offset + u64::from(single.length) <= done_to;
            (single, is_done)
        })
    }
}

#[cfg(test)]
mod tests {
    use io_uring::opcode;

    use super::*;

    fn file() -> Arc<OwnedFd> {
        Arc::new(std::fs::File::open("/dev/null").expect("opened").into())
    }

    fn single(number: usize, offset: u64, length: u32) -> Single {
        Single {
            number,
            address: std::ptr::null_mut(),
            length,
            offset,
            entry: opcode::Nop::new().build(),
        }
    }

    /// Adds one; the numbers of what had to be let go.
    fn add(
        neighbours: &mut Neighbours,
        direction: Direction,
        file: &Arc<OwnedFd>,
        single: Single,
    ) -> Vec<usize> {
        let target = Target::of(file, None);
        let joint = neighbours.add(direction, file, target, single);
        joint.map(numbers).unwrap_or_default()
    }

    fn numbers(joint: Joint) -> Vec<usize> {
        assert_eq!(joint.vectors.len(), joint.singles.len());
        let lengths: u64 = joint.singles.iter().map(|one| u64::from(one.length)).sum();
        assert_eq!(lengths, joint.length());
        joint.singles.iter().map(|single| single.number).collect()
    }

    fn rest(neighbours: &mut Neighbours) -> Vec<Vec<usize>> {
        std::iter::from_fn(|| neighbours.close_one().map(numbers)).collect()
    }

    #[test]
    fn only_what_goes_on_where_the_last_one_ends_the_same_way_in_the_same_file_is_joined() {
        use Direction::{Read, Write};
        let (one, other) = (file(), file());
        let mut neighbours = Neighbours::default();
        assert!(add(&mut neighbours, Read, &one, single(1, 0, 4096)).is_empty());
        assert!(add(&mut neighbours, Write, &one, single(2, 4096, 4096)).is_empty());
        assert!(add(&mut neighbours, Read, &other, single(3, 4096, 4096)).is_empty());
        assert!(add(&mut neighbours, Read, &one, single(4, 4096, 512)).is_empty());
        assert!(add(&mut neighbours, Read, &one, single(5, 4608, 512)).is_empty());
        // A gap, the same bytes again, and the neighbour in front.
        let gone = add(&mut neighbours, Read, &one, single(6, 8192, 512));
        assert_eq!(gone, [1, 4, 5]);
        assert_eq!(add(&mut neighbours, Read, &one, single(7, 8192, 512)), [6]);
        assert_eq!(add(&mut neighbours, Read, &one, single(8, 7680, 512)), [7]);
        let left = rest(&mut neighbours);
        assert_eq!(left, [vec![2], vec![3], vec![8]]);
        assert!(neighbours.close_one().is_none());
    }

    #[test]
    fn neither_bytes_nor_transfers_nor_files_become_too_many() {
        let file_of = |_| file();
        let one = file();
        let mut neighbours = Neighbours::default();
        for (length, many) in [(64 << 10, 16), (4096, 64), (40 << 10, 25)] {
            let mut seen = Vec::new();
            for nth in 0..many * 2 {
                let place = nth as u64 * u64::from(length);
                let gone = add(
                    &mut neighbours,
                    Direction::Read,
                    &one,
                    single(nth, place, length),
                );
                seen.extend((!gone.is_empty()).then_some(gone));
            }
            seen.extend(rest(&mut neighbours));
            let wanted: Vec<Vec<usize>> = vec![(0..many).collect(), (many..2 * many).collect()];
            assert_eq!(seen, wanted, "of {length} bytes");
        }
        let files: Vec<_> = (0..OPEN_MAX).map(file_of).collect();
        for (nth, one) in files.iter().enumerate() {
            assert!(add(&mut neighbours, Direction::Read, one, single(nth, 0, 512)).is_empty());
        }
        let gone = add(&mut neighbours, Direction::Read, &one, single(100, 0, 512));
        assert_eq!(gone, [0]);
    }

    #[test]
    fn what_a_joint_transfer_has_not_done_whole_goes_by_itself() {
        let one = file();
        for (result, done) in [
            (12288, 3),
            (12287, 2),
            (8192, 2),
            (4097, 1),
            (4095, 0),
            (0, 0),
            (-libc::EIO, 0),
        ] {
            let target = Target::of(&one, None);
            let mut joint = Joint::new(Direction::Read, &one, target, single(0, 512, 4096));
            joint.push(single(1, 4608, 4096));
            joint.push(single(2, 8704, 4096));
            let ended: Vec<_> = joint
                .ended(result)
                .map(|(one, done)| (one.number, done))
                .collect();
            let wanted: Vec<_> = (0..3).map(|nth| (nth, nth < done)).collect();
            assert_eq!(ended, wanted, "{result}");
        }
    }
}
