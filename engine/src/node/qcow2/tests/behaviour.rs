//! What clients are told, and what is asked of the nodes below.

use std::rc::Rc;

use blockyard_simulator::each_seed;
use blockyard_storage::error::{EINVAL, EIO, ENOMEDIUM, EOPNOTSUPP};
use blockyard_storage::{Buffer, ByteRange, ZeroMode};

use super::model::{Model, Operation, content};
use super::yard::{DataFile, Setup, Yard};
use crate::event::EventKind;
use crate::node::Node;
use crate::node::blkdebug_node::{BlkdebugNode, BlkdebugOptions, SharedFaults};
use crate::node::chain::{Content, chain_status};
use crate::node::fault_rules::FaultRules;
use crate::node::qcow2::Qcow2Node;
use crate::request::{Discard, InjectError};

const CLUSTER: u64 = 4096;

fn setup() -> Setup {
    Setup::new(1, 12)
}

fn at(cluster: u64, clusters: u64) -> ByteRange {
    ByteRange::new(cluster * CLUSTER, clusters * CLUSTER)
}

/// Asks, and fails with an error number.
fn errno(yard: &Yard, node: &Rc<Qcow2Node>, operation: &Operation) -> Option<i32> {
    let answer = yard.drive(operation.carry_out(node));
    answer.err().map(|error| error.errno())
}

/// Writes the first clusters and then makes the entry of the third nonsense.
fn with_nonsense(yard: &Yard) {
    let node = yard.open();
    assert_eq!(errno(yard, &node, &Operation::Write(at(0, 4), 1)), None);
    yard.drive(node.close()).expect("closed");
    let bytes = yard.image.bytes();
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    let l1 = usize::try_from(word(40)).expect("small");
    let l2 = word(l1) & 0x00ff_ffff_ffff_fe00;
    yard.image
        .fill(l2 + 16, &(1_u64 << 63 | 0x5200).to_be_bytes());
}

#[test]
fn what_contradicts_itself_ends_the_image_and_is_told_once() {
    let yard = Yard::new(setup());
    with_nonsense(&yard);
    let node = yard.open();
    assert_eq!(errno(&yard, &node, &Operation::Read(at(0, 2))), None);
    assert_eq!(errno(&yard, &node, &Operation::Read(at(2, 1))), Some(EIO));
    let text = "Cluster allocation offset 0x5200 unaligned (L2 offset: 0x4000, L2 index: 0x2)";
    assert_eq!(
        yard.news(),
        [EventKind::BlockImageCorrupted {
            node_name: "image".to_owned(),
            message: text.to_owned(),
            offset: None,
            size: None,
            fatal: true,
        }]
    );
    for operation in [
        Operation::Read(at(0, 1)),
        Operation::Read(at(2, 1)),
        Operation::Write(at(0, 1), 2),
        Operation::Compress(at(9, 1), 2),
        Operation::Zero(at(0, 1), true),
        Operation::Discard(at(0, 1)),
        Operation::Flush,
    ] {
        let refused = errno(&yard, &node, &operation);
        assert_eq!(refused, Some(ENOMEDIUM), "{operation:?}");
    }
    let resized = yard.drive(node.resize(1 << 20));
    assert_eq!(resized.map_err(|error| error.errno()), Err(ENOMEDIUM));
    assert!(yard.drive(node.status(at(0, 1), 1)).is_err());
    assert_eq!(yard.news(), []);
}

#[test]
fn an_image_that_is_only_read_goes_on() {
    let yard = Yard::new(setup());
    with_nonsense(&yard);
    let node = yard.open_read_only();
    for _ in 0..2 {
        assert_eq!(errno(&yard, &node, &Operation::Read(at(2, 1))), Some(EIO));
        assert_eq!(errno(&yard, &node, &Operation::Read(at(0, 2))), None);
    }
    let told = yard.news();
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(matches!(
        told[0],
        EventKind::BlockImageCorrupted { fatal: false, .. }
    ));
}

#[test]
fn compressed_writes_take_whole_clusters_where_anything_is_compressed() {
    let yard = Yard::new(Setup {
        size_bytes: 5 * CLUSTER + 1024,
        ..setup()
    });
    let node = yard.open();
    let compress = |range| errno(&yard, &node, &Operation::Compress(range, 1));
    for (offset, length) in [(1, 4096), (0, 100), (512, 3584), (0, 4096 + 512)] {
        assert_eq!(compress(ByteRange::new(offset, length)), Some(EINVAL));
    }
    assert_eq!(compress(at(0, 2)), None);
    assert_eq!(compress(ByteRange::new(4 * CLUSTER, CLUSTER + 1024)), None);
    let last = ByteRange::new(5 * CLUSTER, 1024);
    assert_eq!(compress(last), None);
    let read = yard.drive(Operation::Read(last).carry_out(&node));
    assert_eq!(read.expect("readable"), Some(content(last, 1)));

    let outside = Yard::new(Setup {
        data_file: DataFile::Outside,
        ..setup()
    });
    let node = outside.open();
    let refused = errno(&outside, &node, &Operation::Compress(at(0, 1), 1));
    assert_eq!(refused, Some(EOPNOTSUPP));
    let raw = outside.file("raw", &outside.image, false);
    let written = outside.drive(raw.write_compressed(0, Buffer::zeroed(4096)));
    assert_eq!(
        written.outcome.map_err(|error| error.errno()),
        Err(EOPNOTSUPP)
    );
}

#[test]
fn compressed_clusters_take_less_room_and_stubborn_ones_no_more() {
    let yard = Yard::new(Setup::new(1, 16));
    let node = yard.open();
    let cluster = |number: u64| ByteRange::new(number << 16, 1 << 16);
    let room = |operation| {
        let before = yard.image.bytes().len();
        assert_eq!(errno(&yard, &node, &operation), None);
        yard.image.bytes().len() - before
    };
    room(Operation::Compress(cluster(0), 1));
    assert!(room(Operation::Compress(cluster(1), 1)) < 1 << 15);
    // Noise: as good as one that nobody tried to compress.
    let noise = |range: ByteRange| -> Vec<u8> {
        let mix = |at: u64| at.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ at >> 3;
        let twice = |at: u64| mix(mix(at) >> 7).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (range.offset()..range.end())
            .map(|at| (twice(at) >> 40) as u8)
            .collect()
    };
    let bytes = noise(cluster(2));
    let written = yard.drive(node.write_compressed(2 << 16, Buffer::copy_of(&bytes)));
    assert_eq!(written.outcome, Ok(()));
    let extents = yard.drive(node.status(cluster(2), 1)).expect("told");
    assert!(extents[0].allocated && !extents[0].zero);
    let read = yard.drive(Operation::Read(cluster(2)).carry_out(&node));
    assert!(read.expect("readable") == Some(bytes));
    yard.drive(node.close()).expect("closed");
}

#[test]
fn a_compressed_cluster_is_read_once_for_all_of_its_small_reads() {
    let yard = Yard::new(Setup::new(1, 16));
    let node = yard.open();
    let cluster = ByteRange::new(0, 1 << 16);
    assert_eq!(errno(&yard, &node, &Operation::Compress(cluster, 1)), None);
    let before = yard.world.steps();
    for piece in cluster.pieces(4096) {
        let read = yard.drive(Operation::Read(piece).carry_out(&node));
        assert!(read.expect("readable") == Some(content(piece, 1)));
    }
    assert_eq!(yard.world.steps() - before, 1);
    // Others take its place, and what was overwritten does not come back.
    assert_eq!(errno(&yard, &node, &Operation::Compress(cluster, 2)), None);
    let piece = ByteRange::new(5000, 100);
    let read = yard.drive(Operation::Read(piece).carry_out(&node));
    assert!(read.expect("readable") == Some(content(piece, 2)));
}

/// A fault that an event arms, once.
fn armed_by(event: &str) -> InjectError {
    InjectError {
        event: event.to_owned(),
        errno: Some(77),
        once: Some(true),
        ..InjectError::default()
    }
}

#[test]
fn fault_scripts_hear_of_what_an_image_does() {
    let cases: [(&str, &[Operation], Operation); 11] = [
        ("write_aio", &[], Operation::Write(at(0, 1), 1)),
        ("pwritev", &[], Operation::Write(at(0, 1), 1)),
        (
            "read_aio",
            &[Operation::Write(at(0, 1), 1)],
            Operation::Read(at(0, 1)),
        ),
        (
            "write_aio",
            &[Operation::Write(at(0, 1), 1)],
            Operation::Write(at(0, 1), 2),
        ),
        (
            "cow_read",
            &[Operation::Compress(at(0, 1), 1)],
            Operation::Write(ByteRange::new(5, 5), 1),
        ),
        (
            "read_compressed",
            &[Operation::Compress(at(0, 1), 1)],
            Operation::Read(at(0, 1)),
        ),
        ("write_compressed", &[], Operation::Compress(at(0, 1), 1)),
        ("pwritev", &[], Operation::Compress(at(0, 1), 1)),
        (
            "flush_to_os",
            &[Operation::Write(at(0, 1), 1)],
            Operation::Flush,
        ),
        (
            "flush_to_disk",
            &[Operation::Write(at(0, 1), 1)],
            Operation::Flush,
        ),
        (
            "pwritev_done",
            &[Operation::Write(at(0, 1), 1)],
            Operation::Flush,
        ),
    ];
    for (event, before, fails) in cases {
        let yard = Yard::new(setup());
        let rules = FaultRules::new(&[armed_by(event)], Vec::new()).expect("rules");
        let faults = SharedFaults::new(rules);
        let file = yard.file("file", &yard.image, false);
        let options = BlkdebugOptions {
            discard: Discard::Unmap,
            ..BlkdebugOptions::default()
        };
        // Opened and filled without the filter.
        let node = yard.open();
        for operation in before {
            assert_eq!(errno(&yard, &node, operation), None);
        }
        if !matches!(fails, Operation::Flush) {
            yard.drive(node.close()).expect("closed");
        }
        let filter = BlkdebugNode::new("filter".to_owned(), file, options, faults);
        let node = yard.open_over(Rc::new(filter), None);
        if matches!(fails, Operation::Flush) && event != "pwritev_done" {
            // Something has to be there to be flushed: what this writes is not what fails.
            let written = errno(&yard, &node, &Operation::Write(at(7, 1), 1));
            assert_eq!(written, None, "{event}");
        }
        let mut failed = errno(&yard, &node, &fails);
        if event == "pwritev_done" {
            // Armed by the end of a write, it strikes the next request.
            assert_eq!(failed, None);
            assert_eq!(errno(&yard, &node, &Operation::Write(at(9, 1), 1)), None);
            failed = errno(&yard, &node, &Operation::Read(at(9, 1)));
        }
        assert_eq!(failed, Some(77), "{event}: {fails:?}");
    }
}

#[test]
fn a_chain_of_images_reads_and_tells_what_its_layers_hold() {
    let base = Yard::new(Setup {
        backing_bytes: Some(3 * CLUSTER),
        size_bytes: 12 * CLUSTER,
        ..setup()
    });
    let below = base.open();
    for operation in [
        Operation::Write(at(2, 3), 1),
        Operation::Zero(at(6, 1), false),
    ] {
        assert_eq!(errno(&base, &below, &operation), None);
    }
    let top = Yard::new(Setup {
        seed: 2,
        backing_bytes: Some(12 * CLUSTER),
        size_bytes: 16 * CLUSTER,
        ..setup()
    });
    let file = top.file("file", &top.image, false);
    let node = top.open_over(file, Some(below.clone()));
    // Both worlds go on together.
    let both = |operation: Operation| {
        let answer = blockyard_simulator::run(operation.carry_out(&node), || {
            let here = top.world.step();
            base.world.step() || here
        });
        answer.expect("ends").expect("done")
    };
    both(Operation::Write(at(1, 1), 2));
    both(Operation::Write(ByteRange::new(4 * CLUSTER + 100, 10), 3));
    both(Operation::Zero(at(3, 1), false));
    let mut expected = base.base_bytes.clone();
    expected.resize(16 * CLUSTER as usize, 0);
    for (range, value) in [
        (at(2, 3), 1),
        (at(6, 1), 0),
        (at(1, 1), 2),
        (ByteRange::new(4 * CLUSTER + 100, 10), 3),
        (at(3, 1), 0),
    ] {
        let place = range.offset() as usize..range.end() as usize;
        expected[place].copy_from_slice(&content(range, value));
    }
    let read = both(Operation::Read(at(0, 16)));
    assert!(read == Some(expected));
    let chain: Rc<dyn Node> = node.clone();
    let told = blockyard_simulator::run(chain_status(&chain, None, at(0, 16), 99), || {
        let here = top.world.step();
        base.world.step() || here
    });
    let told = told.expect("ends").expect("told");
    let told: Vec<_> = told
        .iter()
        .map(|extent| {
            (
                extent.range.offset() / CLUSTER,
                extent.content,
                extent.depth,
            )
        })
        .filter(|(cluster, ..)| *cluster > 0)
        .collect();
    assert_eq!(
        told,
        [
            (1, Content::Data, 0),
            (2, Content::Data, 1),
            (3, Content::Zero, 0),
            (4, Content::Data, 0),
            (5, Content::Zero, 2),
            (6, Content::Zero, 1),
            (7, Content::Zero, 2),
            (12, Content::Zero, 1),
        ]
    );
}

#[test]
fn room_that_is_reserved_changes_nothing_that_is_read() {
    use blockyard_storage::Preallocation;
    let yard = Yard::new(Setup {
        backing_bytes: Some(3 * CLUSTER),
        ..setup()
    });
    let node = yard.open();
    for operation in [
        Operation::Write(at(4, 1), 1),
        Operation::Compress(at(5, 1), 1),
        Operation::Zero(at(6, 1), true),
    ] {
        assert_eq!(errno(&yard, &node, &operation), None);
    }
    let all = Operation::Read(at(0, 20));
    let before = yard.drive(all.carry_out(&node)).expect("readable");
    let reserved = yard.drive(node.preallocate(at(0, 20), Preallocation::Falloc));
    assert_eq!(reserved, Ok(()));
    assert!(yard.drive(all.carry_out(&node)).expect("readable") == before);
    let extents = yard.drive(node.status(at(0, 20), 9)).expect("told");
    assert!(extents.len() == 1 && extents[0].allocated && !extents[0].zero);
    assert_eq!(
        yard.drive(node.preallocate(at(1, 3), Preallocation::Full)),
        Ok(())
    );
    let read = yard.drive(Operation::Read(at(1, 3)).carry_out(&node));
    assert!(read.expect("readable") == Some(vec![0; 3 * CLUSTER as usize]));
}

#[test]
fn room_that_is_reserved_keeps_what_is_written_meanwhile() {
    use blockyard_storage::Preallocation;
    use futures_util::future::{join, join_all};
    each_seed("blockyard-engine", "room_that_is_reserved", 40, |seed| {
        let yard = Yard::new(Setup {
            backing_bytes: (seed % 2 == 0).then_some(3 * CLUSTER),
            ..Setup::new(seed, 12)
        });
        let node = yard.open();
        let mut model = Model::of(&yard);
        let writes: Vec<_> = (0..20)
            .map(|cluster| Operation::Write(at(cluster, 1), 1))
            .collect();
        let written = join_all(writes.iter().map(|write| write.carry_out(&node)));
        let reserved = node.preallocate(at(0, 20), Preallocation::Falloc);
        let (written, reserved) = yard.drive(join(written, reserved));
        assert_eq!(reserved, Ok(()));
        for (write, answer) in writes.iter().zip(written) {
            answer.expect("written");
            model.apply(write, &yard.setup);
        }
        let read = yard.drive(Operation::Read(at(0, 20)).carry_out(&node));
        assert!(read.expect("readable").as_deref() == Some(model.slice(at(0, 20))));
    });
}

#[test]
fn clusters_that_were_only_assigned_are_zeroes() {
    const LARGE: u64 = 1 << 16;
    let yard = Yard::new(Setup {
        size_bytes: 60 * LARGE,
        ..Setup::new(1, 16)
    });
    let at = |cluster: u64, clusters: u64| ByteRange::new(cluster * LARGE, clusters * LARGE);
    let node = yard.open();
    let all = at(0, 60);
    assert_eq!(errno(&yard, &node, &Operation::Write(all, 1)), None);
    yard.drive(node.close()).expect("closed");
    let told = |zero: bool, range: ByteRange| crate::node::StatusExtent {
        range,
        zero,
        allocated: true,
    };
    let status = |extents_max| yard.drive(node.status(all, extents_max)).expect("told");
    assert_eq!(status(9), [told(false, all)]);
    // As an image is that was made so: the file has holes where the guest has written nothing.
    let data = yard.drive(node.image().map(at(20, 1))).expect("mapped");
    let blockyard_images::qcow2::Source::Data { at: place } = data.source else {
        panic!("it was written");
    };
    let file = yard.file("file", &yard.image, false);
    let hole = ByteRange::new(place.0, 30 * LARGE);
    assert_eq!(yard.drive(file.discard(hole)), Ok(()));
    let expected = [
        told(false, at(0, 20)),
        told(true, at(20, 30)),
        told(false, at(50, 10)),
    ];
    assert_eq!(status(9), expected);
    assert_eq!(status(2), expected[..2]);
    let read = yard.drive(Operation::Read(at(20, 30)).carry_out(&node));
    assert!(read.expect("readable") == Some(vec![0; 30 * LARGE as usize]));
}

#[test]
fn no_fallback_means_that_nothing_is_written() {
    let yard = Yard::new(Setup {
        backing_bytes: Some(20 * CLUSTER),
        ..setup()
    });
    let node = yard.open();
    assert_eq!(errno(&yard, &node, &Operation::Write(at(0, 1), 1)), None);
    let mode = ZeroMode {
        may_unmap: true,
        no_fallback: true,
    };
    assert_eq!(yard.drive(node.zero(at(0, 2), mode)), Ok(()));
    assert_eq!(errno(&yard, &node, &Operation::Write(at(0, 1), 1)), None);
    let part = yard.drive(node.zero(ByteRange::new(5, 100), mode));
    assert_eq!(part.map_err(|error| error.errno()), Err(EOPNOTSUPP));
}
