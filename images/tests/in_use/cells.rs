//! [`Cells`]: what each small piece of the guest's disk may hold, while requests are under way, fail, or are lost.

use std::cell::RefCell;
use std::rc::Rc;

use blockyard_storage::ByteRange;

/// Requests of these tests begin and end at multiples of this; no disk tears it.
pub(crate) const CELL_BYTES: u64 = 64;

/// Something that a cell was asked to hold.
#[derive(Clone, Copy, Debug)]
struct Put {
    value: u8,
    number: u64,
    /// When the request ended well; not at all while it is under way, and for one that failed.
    ended: Option<u64>,
    /// It was given up while it was under way: it may take effect at any time.
    strays: bool,
}

/// The cells of a disk. Each holds one byte's value many times.
pub(crate) struct Cells {
    state: RefCell<State>,
}

struct State {
    now: u64,
    /// From the last that is known to be durable to the last one issued.
    cells: Vec<Vec<Put>>,
}

/// A request on its way. Dropping it says that nobody waits for it any more.
pub(crate) struct Issued {
    cells: Rc<Cells>,
    range: ByteRange,
    number: u64,
    has_ended: bool,
}

/// A flush on its way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flushing {
    since: u64,
}

impl Cells {
    /// A disk that durably holds `bytes`.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        let cells = bytes.chunks(CELL_BYTES as usize).map(|cell| {
            assert!(cell.iter().all(|byte| *byte == cell[0]), "one value a cell");
            vec![Put {
                value: cell[0],
                number: 0,
                ended: Some(0),
                strays: false,
            }]
        });
        Self {
            state: RefCell::new(State {
                now: 1,
                cells: cells.collect(),
            }),
        }
    }

    /// The disk durably holds `bytes` and nothing is under way.
    pub(crate) fn settle(&self, bytes: &[u8]) {
        self.state.replace(Self::of(bytes).state.into_inner());
    }

    fn indices(range: ByteRange) -> std::ops::Range<usize> {
        assert!(range.is_aligned(CELL_BYTES));
        (range.offset() / CELL_BYTES) as usize..(range.end() / CELL_BYTES) as usize
    }

    /// `range` is asked to hold `value`.
    pub(crate) fn issue(self: &Rc<Self>, range: ByteRange, value: u8) -> Issued {
        let mut state = self.state.borrow_mut();
        state.now += 1;
        let number = state.now;
        for cell in &mut state.cells[Self::indices(range)] {
            cell.push(Put {
                value,
                number,
                ended: None,
                strays: false,
            });
        }
        Issued {
            cells: Rc::clone(self),
            range,
            number,
            has_ended: false,
        }
    }

    /// A flush begins.
    pub(crate) fn flush(&self) -> Flushing {
        let mut state = self.state.borrow_mut();
        state.now += 1;
        Flushing { since: state.now }
    }

    /// The flush has ended well: what had ended before it began is durable.
    pub(crate) fn flushed(&self, flushing: Flushing) {
        let mut state = self.state.borrow_mut();
        for cell in &mut state.cells {
            let durable = cell
                .iter()
                .rposition(|put| put.ended.is_some_and(|at| at <= flushing.since));
            let durable = cell[durable.unwrap_or(0)].number;
            cell.retain(|put| put.strays || put.number >= durable);
        }
    }

    /// Whether `bytes` of `range` can be what a reader sees, who began when nothing was under way there.
    pub(crate) fn may_read(&self, range: ByteRange, bytes: &[u8]) -> Result<(), String> {
        self.check(range, bytes, |cell| {
            let last = cell.iter().rposition(|put| put.ended.is_some());
            last.unwrap_or(0)
        })
    }

    /// Whether `bytes` can be what is left of the disk after a power cut.
    pub(crate) fn may_be_left(&self, bytes: &[u8]) -> Result<(), String> {
        let whole = ByteRange::new(0, bytes.len() as u64);
        self.check(whole, bytes, |_| 0)
    }

    fn check(
        &self,
        range: ByteRange,
        bytes: &[u8],
        from: impl Fn(&[Put]) -> usize,
    ) -> Result<(), String> {
        let state = self.state.borrow();
        let indices = Self::indices(range);
        for (index, held) in indices.zip(bytes.chunks(CELL_BYTES as usize)) {
            let cell = &state.cells[index];
            let from = from(cell);
            let allowed = cell.iter().enumerate();
            let mut allowed = allowed.filter(|(place, put)| *place >= from || put.strays);
            if !allowed.any(|(_, put)| held.iter().all(|byte| *byte == put.value)) {
                return Err(format!(
                    "cell {index} at {:#x} holds {:?}, from {from} of {cell:?} is allowed",
                    index as u64 * CELL_BYTES,
                    &held[..4]
                ));
            }
        }
        Ok(())
    }
}

impl Issued {
    /// It has ended well: readers see it from now on.
    pub(crate) fn done(mut self) {
        self.has_ended = true;
        let mut state = self.cells.state.borrow_mut();
        state.now += 1;
        let now = state.now;
        for cell in &mut state.cells[Cells::indices(self.range)] {
            for put in cell.iter_mut().filter(|put| put.number == self.number) {
                put.ended = Some(now);
            }
        }
    }

    /// It has ended, and nobody knows how far it came.
    pub(crate) fn failed(mut self) {
        self.has_ended = true;
    }
}

impl Drop for Issued {
    fn drop(&mut self) {
        if self.has_ended {
            return;
        }
        let mut state = self.cells.state.borrow_mut();
        for cell in &mut state.cells[Cells::indices(self.range)] {
            for put in cell.iter_mut().filter(|put| put.number == self.number) {
                put.strays = true;
            }
        }
    }
}
