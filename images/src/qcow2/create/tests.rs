//! Plans against lengths that qemu-img 10.0 gave its images, refusals against its texts, and images on memory.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use blockyard_storage::{Buffer, ByteRange, LocalFuture, MemoryStorage, Storage};
use proptest::prelude::*;

use super::*;
use crate::pace::{Cancelled, Pace, Unwatched};
use crate::qcow2::check::{Unobserved, check};
use crate::qcow2::layout::entries::{Cluster, L1Entry, l2_entry_at, word_at};
use crate::qcow2::layout::header::{Access, Header};
use crate::qcow2::layout::refcounts::refcount_at;
use crate::qcow2::open::read_image;
use crate::qcow2::units::{Compression, Geometry, HostOffset, Version};

/// `cluster_bits`, `refcount_order`, extended L2 entries, `preallocation=metadata`, length of the disk, entries of the L1
/// table, length of the file.
const BY_QEMU: [(u32, u32, bool, bool, u64, u64, u64); 44] = [
    (9, 0, false, false, 0, 0, 1536),
    (9, 0, false, false, 512, 1, 1544),
    (9, 0, false, false, 1 << 20, 32, 1792),
    (9, 0, false, false, 1 << 30, 32_768, 263_680),
    (9, 4, false, false, 1 << 30, 32_768, 264_704),
    (9, 6, false, false, 1 << 30, 32_768, 267_776),
    (9, 0, false, true, 1 << 20, 32, 1_067_008),
    (9, 3, false, true, 5 << 20, 160, 5_338_112),
    (9, 4, false, true, 1_049_088, 33, 1_072_128),
    (9, 6, false, true, 1 << 20, 32, 1_083_904),
    (9, 4, false, true, 0, 0, 1536),
    (10, 1, false, true, 3 << 20, 24, 3_174_400),
    (10, 2, false, true, 5_243_904, 41, 5_292_032),
    (10, 5, false, true, 4 << 20, 32, 4_247_552),
    (10, 6, false, false, 100 << 30, 819_200, 6_607_872),
    (12, 4, false, false, 1 << 40, 524_288, 4_206_592),
    (12, 6, false, true, 64 << 20, 32, 67_387_392),
    (12, 0, false, true, 1_073_742_336, 513, 1_075_900_416),
    (12, 4, false, true, 64 << 20, 32, 67_289_088),
    (14, 4, true, false, 1 << 40, 65_536, 573_440),
    (14, 4, true, true, 1_049_088, 1, 1_131_008),
    (14, 6, true, true, 67_112_960, 5, 67_293_184),
    (14, 4, false, true, 1 << 30, 32, 1_074_462_720),
    (16, 4, false, false, 0, 0, 196_608),
    (16, 4, false, false, 512, 1, 196_616),
    (16, 4, false, false, 512 << 20, 1, 196_616),
    (16, 4, false, false, (512 << 20) + 512, 2, 196_624),
    (16, 4, false, false, 1 << 40, 2048, 212_992),
    (16, 4, false, false, 1 << 50, 2_097_152, 16_973_824),
    (16, 6, false, false, 1 << 51, 4_194_304, 33_751_040),
    (16, 4, false, true, 4 << 20, 1, 4_521_984),
    (16, 4, false, true, 512, 1, 393_216),
    (16, 0, false, true, 1 << 30, 2, 1_074_135_040),
    (16, 6, false, true, (8 << 30) + 512, 17, 8_592_424_960),
    (16, 4, true, true, 512, 1, 329_728),
    (16, 4, true, true, 1_073_940_480, 5, 1_074_530_304),
    (16, 4, true, false, 1 << 48, 1_048_576, 8_585_216),
    (18, 2, false, true, 10 << 30, 2, 10_738_991_104),
    (21, 4, false, false, 0, 0, 6_291_456),
    (21, 4, false, false, 1 << 60, 2_097_152, 23_068_672),
    (21, 6, false, true, 3 << 30, 1, 3_231_711_232),
    (21, 0, true, true, 5 << 20, 1, 15_728_640),
    (21, 4, false, true, 512, 1, 12_582_912),
    (21, 4, false, false, 1 << 61, 4_194_304, 39_845_888),
];

fn geometry(cluster_bits: u32, refcount_order: u32, extended_l2: bool) -> Geometry {
    Geometry::new(Version::V3, cluster_bits, refcount_order, extended_l2).expect("allowed")
}

const METADATA: Placement = Placement::InImage {
    whole_clusters: false,
};

#[test]
fn files_are_as_long_as_those_of_qemu() {
    for (bits, order, extended, preallocated, size, l1_entries, length) in BY_QEMU {
        let placement = if preallocated {
            METADATA
        } else {
            Placement::None
        };
        let plan = CreatePlan::new(geometry(bits, order, extended), size, placement);
        let plan = plan.expect("possible");
        let image = (bits, order, extended, preallocated, size);
        assert_eq!(plan.l1_entries(), l1_entries, "{image:?}");
        assert_eq!(plan.file_bytes(), length, "{image:?}");
    }
}

#[test]
fn a_refcount_table_of_many_clusters_lies_in_one_piece() {
    // QEMU moves the table and leaves holes when it becomes too small: 33_691_648 and 68_478_976 bytes.
    for (size, placement, clusters, length) in [
        (128 << 30, Placement::None, 5, 33_689_600),
        (64 << 20, METADATA, 9, 68_446_720),
    ] {
        let plan = CreatePlan::new(geometry(9, 4, false), size, placement).expect("possible");
        assert_eq!(plan.refcount_table(), HostOffset(512));
        assert_eq!(plan.refcount_table_clusters().0, clusters);
        assert_eq!(plan.file_bytes(), length);
    }
}

#[test]
fn the_usual_image_has_its_parts_where_qemu_puts_them() {
    let plan = CreatePlan::new(geometry(16, 4, false), 4 << 20, METADATA).expect("possible");
    assert_eq!(plan.refcount_table(), HostOffset(1 << 16));
    assert_eq!(plan.refcount_blocks_start(), HostOffset(2 << 16));
    assert_eq!(plan.l1_table(), HostOffset(3 << 16));
    assert_eq!(plan.l2_tables_start(), HostOffset(4 << 16));
    assert_eq!(plan.data(), ByteRange::new(5 << 16, 4 << 20));
}

fn text(options: &CreateOptions) -> String {
    options.plan().expect_err("refused").to_string()
}

#[test]
fn refusals_have_the_words_of_qemu() {
    type Change = fn(&mut CreateOptions);
    const CASES: [(Change, &str); 24] = [
        (
            |o| o.size_bytes = 513,
            "Image size must be a multiple of 512 bytes",
        ),
        (
            |o| o.size_bytes = u64::MAX,
            "Image size must be a multiple of 512 bytes",
        ),
        (
            |o| o.size_bytes = 1 << 63,
            "Could not resize image: Image size cannot be negative",
        ),
        (
            |o| o.size_bytes = (1 << 63) - 512,
            "Could not resize image: offset(9223372036854775296) exceeds maximum(9223372035781033984)",
        ),
        (
            |o| o.size_bytes = 0x7fff_ffff_c000_0000,
            "Could not resize image: Failed to grow the L1 table: File too large",
        ),
        (
            |o| {
                o.cluster_bytes = 512;
                o.size_bytes = (128 << 30) + 512;
            },
            "Could not resize image: Failed to grow the L1 table: File too large",
        ),
        (
            |o| o.cluster_bytes = 0,
            "Cluster size must be a power of two between 512 and 2048k",
        ),
        (
            |o| o.cluster_bytes = 513,
            "Cluster size must be a power of two between 512 and 2048k",
        ),
        (
            |o| o.cluster_bytes = 256,
            "Cluster size must be a power of two between 512 and 2048k",
        ),
        (
            |o| o.cluster_bytes = 4 << 20,
            "Cluster size must be a power of two between 512 and 2048k",
        ),
        (
            |o| o.refcount_bits = 0,
            "Refcount width must be a power of two and may not exceed 64 bits",
        ),
        (
            |o| o.refcount_bits = 3,
            "Refcount width must be a power of two and may not exceed 64 bits",
        ),
        (
            |o| o.refcount_bits = 128,
            "Refcount width must be a power of two and may not exceed 64 bits",
        ),
        (
            |o| {
                o.version = Version::V2;
                o.refcount_bits = 8;
            },
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)",
        ),
        (
            |o| {
                o.version = Version::V2;
                o.lazy_refcounts = true;
                o.compression = Compression::Zstd;
            },
            "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)",
        ),
        (
            |o| {
                o.version = Version::V2;
                o.extended_l2 = true;
                o.cluster_bytes = 1;
            },
            "Extended L2 entries are only supported with compatibility level 1.1 and above (use version=v3 or greater)",
        ),
        (
            |o| {
                o.version = Version::V2;
                o.data_file_name = Some(b"d".to_vec());
                o.compression = Compression::Zstd;
            },
            "External data files are only supported with compatibility level 1.1 and above (use version=v3 or greater)",
        ),
        (
            |o| {
                o.version = Version::V2;
                o.compression = Compression::Zstd;
            },
            "Non-zlib compression type is only supported with compatibility level 1.1 and above (use version=v3 or greater)",
        ),
        (
            |o| {
                o.extended_l2 = true;
                o.cluster_bytes = 8192;
            },
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
        ),
        (
            |o| {
                o.backing_name = Some(Vec::new());
                o.preallocation = ImagePreallocation::Metadata;
            },
            "Backing file and preallocation can only be used at the same time if extended_l2 is on",
        ),
        (
            |o| o.backing_format = Some("raw".to_owned()),
            "Backing format cannot be used without backing file",
        ),
        (
            |o| o.data_file_raw = true,
            "data-file-raw requires data-file",
        ),
        (
            |o| {
                o.data_file_raw = true;
                o.data_file_name = Some(b"d".to_vec());
                o.backing_name = Some(b"b".to_vec());
            },
            "Backing file and data-file-raw cannot be used at the same time",
        ),
        (
            |o| {
                o.cluster_bytes = 512;
                o.data_file_name = Some(vec![b'd'; 500]);
            },
            "Could not update qcow2 header: No space left on device",
        ),
    ];
    for (change, expected) in CASES {
        let mut options = CreateOptions::new(1 << 20);
        change(&mut options);
        assert_eq!(text(&options), expected);
    }
}

#[test]
fn names_that_do_not_fit_are_quoted() {
    let mut options = CreateOptions::new(1 << 20);
    options.backing_name = Some(vec![b'z'; 1024]);
    let quoted = "z".repeat(1024);
    let assign = "Could not assign backing file";
    assert_eq!(
        text(&options),
        format!("{assign} '{quoted}' with format '(null)': Invalid argument")
    );
    options.backing_name = Some(vec![b'z'; 900]);
    options.plan().expect("it fits");
    options.cluster_bytes = 512;
    options.backing_format = Some("raw".to_owned());
    let quoted = "z".repeat(900);
    assert_eq!(
        text(&options),
        format!("{assign} '{quoted}' with format 'raw': No space left on device")
    );
}

#[test]
fn reference_counts_that_no_table_holds_are_too_many() {
    let mut options = CreateOptions::new(33 << 30);
    options.cluster_bytes = 512;
    options.refcount_bits = 64;
    options.plan().expect("only the L1 table is counted");
    for (preallocation, step) in [
        (ImagePreallocation::Metadata, "Allocating clusters failed"),
        (
            ImagePreallocation::Full,
            "Failed to resize refcount structures",
        ),
    ] {
        options.preallocation = preallocation;
        let expected = format!("Could not resize image: {step}: File too large");
        assert_eq!(text(&options), expected);
    }
    let mut options = CreateOptions::new(1 << 60);
    options.cluster_bytes = 2 << 20;
    options.preallocation = ImagePreallocation::Metadata;
    assert_eq!(
        text(&options),
        "Could not resize image: Allocating clusters failed: File too large"
    );
}

/// Runs what never waits.
fn now<T>(future: impl Future<Output = T>) -> T {
    let mut cx = Context::from_waker(Waker::noop());
    match std::pin::pin!(future).poll(&mut cx) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("it waits"),
    }
}

fn read(storage: &dyn Storage, offset: u64, length: u64) -> Vec<u8> {
    let into = Buffer::zeroed(usize::try_from(length).expect("short"));
    let read = now(storage.read(offset, into));
    read.outcome.expect("read");
    read.buffer.as_slice().to_vec()
}

fn write(storage: &dyn Storage, offset: u64, bytes: &[u8]) {
    let written = now(storage.write(offset, Buffer::copy_of(bytes)));
    written.outcome.expect("written");
}

/// Reads the whole image by its own header, and holds it against its plan.
fn judge(creation: &Creation, image: &dyn Storage) {
    let plan = creation.plan();
    let geometry = plan.geometry();
    let cluster = geometry.cluster_bytes();
    let opened = now(read_image(image, Access::ReadWrite)).expect("sound");
    let header = opened.header;
    assert_eq!(&header, creation.header());
    let table = read(
        image,
        header.refcount_table.0,
        header.refcount_table_bytes(),
    );
    let mut counted = 0;
    for index in 0..table.len() / 8 {
        let block = word_at(&table, index).expect("inside");
        if block == 0 {
            continue;
        }
        assert_eq!(block % cluster, 0);
        let bytes = read(image, block, cluster);
        for place in 0..usize::try_from(geometry.refcounts_per_block()).expect("small") {
            let count = refcount_at(geometry, &bytes, place).expect("inside");
            let expected = u64::from(counted < plan.used_clusters().0);
            assert_eq!(count, expected, "cluster {counted}");
            counted += 1;
        }
    }
    assert!(counted >= plan.used_clusters().0);
    let l1 = read(image, header.l1_table.0, header.l1_table_bytes());
    let mut places = 0;
    for index in 0..l1.len() / 8 {
        let entry = L1Entry(word_at(&l1, index).expect("inside"));
        let Some(at) = entry.table() else { continue };
        assert!(entry.is_copied());
        let table = read(image, at.0, cluster);
        for place in 0..usize::try_from(geometry.l2_entries()).expect("small") {
            let entry = l2_entry_at(geometry, &table, place).expect("inside");
            if entry.word == 0 {
                continue;
            }
            assert!(entry.is_copied() && !entry.is_invalid(geometry));
            let guest = (index as u64 * geometry.l2_entries() + place as u64) * cluster;
            let expected = match header.has_data_file() {
                true => guest,
                false => plan.data().offset() + guest,
            };
            if expected > 0 {
                let at = HostOffset(expected);
                assert_eq!(entry.cluster(geometry), Cluster::Allocated { at });
            }
            places += 1;
        }
    }
    let expected = match plan.l2_tables().0 {
        0 => 0,
        _ => geometry.clusters_for(plan.size_bytes()).0,
    };
    assert_eq!(places, expected);
}

fn any_options() -> impl Strategy<Value = CreateOptions> {
    let formats = (9_u32..=21, 0_u32..=6, any::<bool>(), any::<bool>());
    let content = (0_u64..4096, 0_u8..4, 0_u8..4, any::<bool>());
    (formats, content).prop_map(|((bits, order, extended, lazy), content)| {
        let (sectors, preallocation, names, raw) = content;
        // Enough for several L2 tables of small clusters.
        let size_bytes = (sectors * 512) << (bits.saturating_sub(12) / 2);
        let mut options = CreateOptions::new(size_bytes);
        options.cluster_bytes = 1 << bits;
        options.refcount_bits = 1 << order;
        options.extended_l2 = extended && bits >= 14;
        options.lazy_refcounts = lazy;
        options.preallocation = [
            ImagePreallocation::Off,
            ImagePreallocation::Metadata,
            ImagePreallocation::Falloc,
            ImagePreallocation::Full,
        ][usize::from(preallocation)];
        if names == 1 {
            options.data_file_name = Some(b"data".to_vec());
            options.data_file_raw = raw;
        }
        let placed = options.preallocation != ImagePreallocation::Off;
        if names == 2 && (options.extended_l2 || !placed) {
            options.backing_name = Some(b"base".to_vec());
            options.backing_format = raw.then(|| "qcow2".to_owned());
        }
        options
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn images_of_every_kind_are_sound(options in any_options(), held in 0_u64..1 << 20) {
        let creation = options.plan().expect("possible");
        let plan = creation.plan();
        let image = MemoryStorage::new(0);
        // Whatever was there does not show.
        for piece in ByteRange::new(0, held).pieces(1 << 16) {
            write(&image, piece.offset(), &vec![0xee; usize::try_from(piece.length()).expect("short")]);
        }
        let data = options.data_file_name.is_some().then(|| MemoryStorage::new(0));
        if let Some(data) = &data {
            write(data, 0, &[0xdd; 1000]);
        }
        let data_file = data.as_ref().map(|data| data as &dyn Storage);
        now(create(&creation, &image, data_file, &Unwatched)).expect("made");
        judge(&creation, &image);
        let copy: Rc<dyn Storage> = Rc::new(image.clone());
        let report = now(check(&copy, &Unobserved)).expect("checked");
        prop_assert_eq!((report.corruptions, report.leaks, report.check_errors), (0, 0, 0));
        prop_assert_eq!(report.image_end_offset, plan.used_clusters().0 * plan.geometry().cluster_bytes());
        prop_assert_eq!(image.facts().length_bytes, plan.file_bytes().max(held));
        let seen = plan.data().clamp_end(plan.data().offset() + (1 << 20));
        prop_assert!(read(&image, seen.offset(), seen.length()).iter().all(|byte| *byte == 0));
        if let Some(data) = &data {
            prop_assert_eq!(data.facts().length_bytes, plan.data_file_bytes().max(1000));
            prop_assert_eq!(read(data, 0, 1000), vec![0xdd; 1000]);
        }
    }

    #[test]
    fn tables_are_the_same_in_pieces_of_any_size(
        bits in 9_u32..=16, order in 0_u32..=6, clusters in 1_u64..3000, cut in 0_u64..200,
    ) {
        let plan = CreatePlan::new(geometry(bits, order, false), clusters << bits, METADATA);
        let plan = plan.expect("possible");
        for table in [Table::RefcountTable, Table::RefcountBlocks, Table::L1, Table::L2] {
            let range = plan.table(table);
            let mut whole = vec![0xee; usize::try_from(range.length()).expect("short")];
            plan.fill(table, 0, &mut whole);
            let cut = usize::try_from(cut * 16).expect("short").min(whole.len());
            let mut behind = vec![0xee; whole.len() - cut];
            plan.fill(table, cut as u64, &mut behind);
            prop_assert_eq!(&whole[cut..], &behind[..]);
        }
    }
}

/// Counts checkpoints, and cancels at one of them.
#[derive(Default)]
struct Watch {
    expected: Cell<u64>,
    done: Cell<u64>,
    checkpoints: Cell<u64>,
    cancel_at: Option<u64>,
    lengths: RefCell<Vec<u64>>,
}

impl Pace for Watch {
    fn expect(&self, bytes: u64) {
        self.expected.set(self.expected.get() + bytes);
    }

    fn done(&self, bytes: u64) {
        self.done.set(self.done.get() + bytes);
        self.lengths.borrow_mut().push(bytes);
    }

    fn checkpoint(&self) -> LocalFuture<'_, Result<(), Cancelled>> {
        let number = self.checkpoints.replace(self.checkpoints.get() + 1);
        let cancelled = self.cancel_at == Some(number);
        Box::pin(async move { if cancelled { Err(Cancelled) } else { Ok(()) } })
    }
}

#[test]
fn progress_ends_at_its_total_and_goes_in_pieces() {
    for preallocation in [
        ImagePreallocation::Off,
        ImagePreallocation::Metadata,
        ImagePreallocation::Falloc,
        ImagePreallocation::Full,
    ] {
        let mut options = CreateOptions::new(70 << 20);
        options.preallocation = preallocation;
        let creation = options.plan().expect("possible");
        let image = MemoryStorage::new(0);
        write(&image, 0, &vec![0xee; 3 << 20]);
        let watch = Watch::default();
        now(create(&creation, &image, None, &watch)).expect("made");
        assert_eq!(watch.done.get(), watch.expected.get(), "{preallocation:?}");
        let longest = watch.lengths.borrow().iter().copied().max();
        assert!(longest <= Some(64 << 20));
        if preallocation >= ImagePreallocation::Falloc {
            assert!(watch.expected.get() > 70 << 20, "the room counts");
        }
    }
}

#[test]
fn cancelled_anywhere_nothing_of_it_is_left() {
    for preallocation in [ImagePreallocation::Metadata, ImagePreallocation::Full] {
        let mut options = CreateOptions::new(40 << 20);
        options.preallocation = preallocation;
        let old = options.plan().expect("possible");
        options.data_file_name = Some(b"data".to_vec());
        let with_data_file = options.plan().expect("possible");
        for (creation, has_data_file) in [(&old, false), (&with_data_file, true)] {
            let mut cancelled = 0;
            for cancel_at in 0.. {
                let image = MemoryStorage::new(100_000);
                write(&image, 0, old.header_bytes());
                let data = MemoryStorage::new(5000);
                let data_file = has_data_file.then_some(&data as &dyn Storage);
                let watch = Watch {
                    cancel_at: Some(cancel_at),
                    ..Watch::default()
                };
                let made = now(create(creation, &image, data_file, &watch));
                if made.is_ok() {
                    break;
                }
                cancelled += 1;
                assert_eq!(made, Err(CreateError::Cancelled(Cancelled)));
                assert_eq!(image.facts().length_bytes, 100_000);
                assert_eq!(data.facts().length_bytes, 5000);
                let start = read(&image, 0, 65_536);
                // Cancelled before the first change, it is what it was.
                let intact = Header::parse(&start, Access::Metadata).is_ok();
                assert_eq!(intact, cancel_at == 0, "{cancel_at}");
            }
            assert!(cancelled > 4, "{cancelled}");
        }
    }
}

#[test]
fn a_file_that_cannot_become_long_enough_is_left_alone() {
    let creation = CreateOptions::new(1 << 30).plan().expect("possible");
    let image = MemoryStorage::new(100_352).fixed_length();
    write(&image, 0, &[1; 512]);
    let error = now(create(&creation, &image, None, &Unwatched)).expect_err("too short");
    let text = "Could not resize image: Cannot grow device files";
    assert_eq!(error.to_string(), text);
    assert_eq!(read(&image, 0, 512), [1; 512]);
    let device = MemoryStorage::new(1 << 20).fixed_length();
    now(create(&creation, &device, None, &Unwatched)).expect("long enough");
    judge(&creation, &device);
}
