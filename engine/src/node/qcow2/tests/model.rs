//! What an image has to hold after each operation.

use std::rc::Rc;

use blockyard_images::qcow2::units::Version;
use blockyard_simulator::Seed;
use blockyard_storage::{Buffer, ByteRange, ZeroMode};

use super::yard::{DataFile, Setup, Yard};
use crate::error::NodeError;
use crate::node::qcow2::Qcow2Node;
use crate::node::{Fill, Node};
use crate::request::Discard;

/// One request.
#[derive(Clone, Debug)]
pub(crate) enum Operation {
    Read(ByteRange),
    Write(ByteRange, u8),
    Zero(ByteRange, bool),
    Discard(ByteRange),
    Compress(ByteRange, u8),
    Fill(ByteRange, Fill),
    Flush,
}

impl Operation {
    /// Which bytes it is about.
    pub(crate) fn range(&self) -> ByteRange {
        match self {
            Operation::Read(range)
            | Operation::Write(range, _)
            | Operation::Zero(range, _)
            | Operation::Discard(range)
            | Operation::Fill(range, _)
            | Operation::Compress(range, _) => *range,
            Operation::Flush => ByteRange::default(),
        }
    }

    pub(crate) fn random(dice: &Seed, setup: &Setup) -> Self {
        let size = setup.size_bytes;
        let cluster = setup.cluster_bytes();
        let unit = *dice.pick(&[1, 512, 4096, cluster / 32, cluster]);
        let unit = unit.max(1);
        let start = dice.below(size) / unit * unit;
        let longest = *dice.pick(&[unit, 3 * unit, cluster, 5 * cluster, size]);
        let length = (1 + dice.below(longest)).next_multiple_of(unit);
        let range = ByteRange::new(start, length).clamp_end(size);
        let value = 1 + dice.below(250) as u8;
        match dice.below(13) {
            0 | 1 => Operation::Read(range),
            2 | 3 => Operation::Zero(range, dice.one_in(2)),
            4 => Operation::Discard(range),
            5 | 6 if setup.data_file == DataFile::Inside => {
                let whole = range.align_outward(cluster).clamp_end(size);
                Operation::Compress(whole, value)
            }
            7 => Operation::Write(range, 0),
            8 => Operation::Flush,
            9 => Operation::Fill(range, Fill::Bytes),
            _ => Operation::Write(range, value),
        }
    }

    /// Asks the node.
    pub(crate) async fn carry_out(&self, node: &Qcow2Node) -> Result<Option<Vec<u8>>, NodeError> {
        let length = self.range().length() as usize;
        let offset = self.range().offset();
        match self {
            Operation::Read(_) => {
                let mut into = Buffer::zeroed(length);
                into.as_mut_slice().fill(0xa5);
                let read = node.read(offset, into).await;
                read.outcome?;
                return Ok(Some(read.buffer.as_slice().to_vec()));
            }
            Operation::Write(range, value) => {
                let bytes = Buffer::copy_of(&content(*range, *value));
                node.write(offset, bytes).await.outcome?;
            }
            Operation::Compress(range, value) => {
                let bytes = Buffer::copy_of(&content(*range, *value));
                node.write_compressed(offset, bytes).await.outcome?;
            }
            Operation::Zero(range, may_unmap) => {
                let mode = ZeroMode {
                    may_unmap: *may_unmap,
                    no_fallback: false,
                };
                node.zero(*range, mode).await?;
            }
            Operation::Discard(range) => node.discard(*range).await?,
            Operation::Fill(range, with) => node.fill(*range, *with, None).await?,
            Operation::Flush => node.flush().await?,
        }
        Ok(None)
    }
}

/// What a write with `value` puts there: bytes that tell where they belong, or zeroes. Every third value does not get
/// shorter when it is compressed.
pub(crate) fn content(range: ByteRange, value: u8) -> Vec<u8> {
    (range.offset()..range.end())
        .map(|offset| match value {
            0 => 0,
            value if value.is_multiple_of(3) => {
                let mixed = (offset ^ u64::from(value)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                (mixed >> 56) as u8
            }
            value => value.wrapping_add((offset / 512) as u8),
        })
        .collect()
}

/// The bytes of the guest's disk.
#[derive(Clone)]
pub(crate) struct Model {
    pub(crate) bytes: Vec<u8>,
}

impl Model {
    /// What a new image shows.
    pub(crate) fn of(yard: &Yard) -> Self {
        let mut bytes = yard.base_bytes.clone();
        bytes.resize(yard.setup.size_bytes as usize, 0);
        Self { bytes }
    }

    pub(crate) fn slice(&self, range: ByteRange) -> &[u8] {
        &self.bytes[range.offset() as usize..range.end() as usize]
    }

    fn fill(&mut self, range: ByteRange, bytes: &[u8]) {
        self.bytes[range.offset() as usize..range.end() as usize].copy_from_slice(bytes);
    }

    /// What is there after an operation has ended well.
    pub(crate) fn apply(&mut self, operation: &Operation, setup: &Setup) {
        match operation {
            Operation::Read(_) | Operation::Fill(..) | Operation::Flush => {}
            Operation::Write(range, value) | Operation::Compress(range, value) => {
                self.fill(*range, &content(*range, *value));
            }
            Operation::Zero(range, _) => self.fill(*range, &content(*range, 0)),
            Operation::Discard(range) => {
                let gone = discarded(*range, setup);
                self.fill(gone, &content(gone, 0));
            }
        }
    }
}

/// What reads as zeroes after a discard of `range`.
fn discarded(range: ByteRange, setup: &Setup) -> ByteRange {
    let ignored = setup.discard == Discard::Ignore
        || setup.version == Version::V2 && setup.backing_bytes.is_some();
    if ignored {
        return ByteRange::default();
    }
    let cluster = setup.cluster_bytes();
    let end = match range.end() >= setup.size_bytes {
        true => range.end().next_multiple_of(cluster),
        false => range.end(),
    };
    let whole = ByteRange::between(range.offset(), end).align_inward(cluster);
    whole.clamp_end(setup.size_bytes)
}

/// The node holds what the model says, read in pieces of any length.
pub(crate) fn assert_holds(yard: &Yard, node: &Rc<Qcow2Node>, model: &Model, dice: &Seed) {
    let mut rest = ByteRange::new(0, model.bytes.len() as u64);
    while !rest.is_empty() {
        let longest = *dice.pick(&[1000, 10_000, 1 << 20]);
        let (piece, after) = rest.split_at(1 + dice.below(longest));
        rest = after;
        let read = yard.drive(Operation::Read(piece).carry_out(node));
        let read = read.expect("readable").expect("bytes");
        assert!(read == model.slice(piece), "{piece} of {:?}", yard.setup);
    }
}

/// What the node says of itself agrees with the model: zeroes are zeroes, what it does not hold is the backing's.
pub(crate) fn assert_status(yard: &Yard, node: &Rc<Qcow2Node>, model: &Model, dice: &Seed) {
    let mut rest = ByteRange::new(0, model.bytes.len() as u64);
    while !rest.is_empty() {
        let extents_max = 1 + dice.below(5) as usize;
        let extents = yard.drive(node.status(rest, extents_max)).expect("told");
        assert!(
            (1..=extents_max).contains(&extents.len()),
            "{:?}",
            yard.setup
        );
        for extent in extents {
            assert_eq!(extent.range.offset(), rest.offset());
            rest = ByteRange::between(extent.range.end(), rest.end());
            let zero = model.slice(extent.range).iter().all(|byte| *byte == 0);
            assert!(zero || !extent.zero, "{extent:?} of {:?}", yard.setup);
            if !extent.allocated {
                let mut below = yard.base_bytes.clone();
                below.resize(model.bytes.len(), 0);
                let place = extent.range.offset() as usize..extent.range.end() as usize;
                assert!(model.slice(extent.range) == &below[place], "{extent:?}");
            }
        }
    }
}
