//! Tests of the codec: both ways, and bytes that somebody made to do harm.

use proptest::prelude::*;

use super::*;

const BOTH: [Compression; 2] = [Compression::Zlib, Compression::Zstd];

/// Every cluster size there is.
fn cluster_sizes() -> impl Iterator<Item = usize> {
    (9..=21).map(|bits| 1 << bits)
}

/// Bytes of few values, which get shorter.
fn text(length: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 29) as u8
    };
    (0..length).map(|_| next()).collect()
}

/// Bytes that do not get shorter.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 88_172_645_463_325_252_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..length).map(|_| next()).collect()
}

fn compressed(compression: Compression, cluster: &[u8]) -> Option<Vec<u8>> {
    let mut into = vec![0; cluster.len() - 1];
    let length = ClusterCodec::new().compress(compression, cluster, &mut into)?;
    into.truncate(length);
    Some(into)
}

fn decompressed(
    compression: Compression,
    bytes: &[u8],
    cluster_bytes: usize,
) -> Result<Vec<u8>, DecompressError> {
    let mut cluster = vec![0xa5; cluster_bytes];
    ClusterCodec::new().decompress(compression, bytes, &mut cluster)?;
    Ok(cluster)
}

/// A zstd frame without content size that asks for a window of `1 << window_log` bytes: runs of `value`.
fn zstd_runs(window_log: u8, runs: &[(usize, u8)]) -> Vec<u8> {
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, (window_log - 10) << 3];
    for (number, (length, value)) in runs.iter().enumerate() {
        let last = u32::from(number + 1 == runs.len());
        let header = (u32::try_from(*length).expect("a block") << 3) | 1 << 1 | last;
        frame.extend_from_slice(&header.to_le_bytes()[..3]);
        frame.push(*value);
    }
    frame
}

fn skippable(length: usize) -> Vec<u8> {
    let mut frame = vec![0x50, 0x2a, 0x4d, 0x18];
    frame.extend_from_slice(&u32::try_from(length).expect("short").to_le_bytes());
    frame.resize(frame.len() + length, 0xff);
    frame
}

#[test]
fn clusters_of_every_size_come_back_by_one_codec() {
    let mut codec = ClusterCodec::new();
    for length in cluster_sizes().chain(cluster_sizes()) {
        for compression in BOTH {
            let cluster = text(length);
            let mut into = vec![0; length - 1];
            let made = codec
                .compress(compression, &cluster, &mut into)
                .expect("gets shorter");
            assert!(
                codec
                    .compress(compression, &noise(length), &mut into.clone())
                    .is_none()
            );
            // As it stands in a file: up to the end of a sector, other bytes behind.
            into.truncate(made);
            into.resize(made.next_multiple_of(512), 0xff);
            let mut back = vec![0xa5; length];
            codec
                .decompress(compression, &into, &mut back)
                .expect("its own work");
            assert_eq!(back, cluster, "{compression:?} {length}");
            assert!(
                codec
                    .decompress(compression, &[0xff; 600], &mut back)
                    .is_err()
            );
        }
    }
}

#[test]
fn what_does_not_get_shorter_is_left_alone() {
    for compression in BOTH {
        for length in cluster_sizes() {
            assert_eq!(compressed(compression, &noise(length)), None);
        }
        let cluster = text(65536);
        let made = compressed(compression, &cluster).expect("gets shorter");
        let mut codec = ClusterCodec::new();
        for room in [0, 1, 100, made.len() - 1] {
            let mut into = vec![0; room];
            assert_eq!(codec.compress(compression, &cluster, &mut into), None);
        }
        let mut into = vec![0; 65535];
        assert_eq!(
            codec.compress(compression, &cluster, &mut into),
            Some(made.len()),
            "a failure leaves nothing behind"
        );
    }
}

#[test]
fn a_codec_outlives_many_clusters_that_do_not_get_shorter() {
    for compression in BOTH {
        for cluster_bytes in cluster_sizes().take_while(|bytes| *bytes <= 64 << 10) {
            let mut codec = ClusterCodec::new();
            let mut into = vec![0; cluster_bytes - 1];
            let many = noise((1 << 20).max(8 * cluster_bytes));
            for cluster in many.chunks(cluster_bytes) {
                assert_eq!(codec.compress(compression, cluster, &mut into), None);
            }
            let cluster = text(cluster_bytes);
            let length = codec.compress(compression, &cluster, &mut into);
            let length = length.expect("it gets shorter");
            let held = decompressed(compression, &into[..length], cluster_bytes);
            assert_eq!(held, Ok(cluster));
        }
    }
}

#[test]
fn deflate_reaches_back_no_further_than_4_kib() {
    // The same 5,000 bytes again and again: worth a reference for whoever may look back that far.
    let cluster: Vec<u8> = noise(5000).into_iter().cycle().take(65536).collect();
    let far = |window_bits| {
        let level = flate2::Compression::new(DEFLATE_LEVEL);
        let mut into = vec![0; 70_000];
        let mut deflate = Compress::new_with_window_bits(level, false, window_bits);
        let ended = deflate.compress(&cluster, &mut into, FlushCompress::Finish);
        assert_eq!(ended.ok(), Some(Status::StreamEnd));
        into.truncate(deflate.total_out() as usize);
        into
    };
    assert!(far(15).len() < 8192, "the check has teeth");
    assert_eq!(compressed(Compression::Zlib, &cluster), None);
    // 3,500 bytes back is near enough.
    let near: Vec<u8> = noise(3500).into_iter().cycle().take(65536).collect();
    assert!(compressed(Compression::Zlib, &near).is_some_and(|bytes| bytes.len() < 8192));
    assert_eq!(
        decompressed(Compression::Zlib, &far(15), 65536),
        Ok(cluster),
        "but any window is read"
    );
}

#[test]
fn every_end_that_comes_too_early_is_an_error() {
    for compression in BOTH {
        let cluster = text(4096);
        let whole = compressed(compression, &cluster).expect("gets shorter");
        for length in 0..whole.len() {
            let read = decompressed(compression, &whole[..length], 4096);
            if let Ok(read) = read {
                // All bytes were there already, only the mark of the end was not.
                assert_eq!(compression, Compression::Zlib);
                assert_eq!(read, cluster);
            }
        }
        let shorter = compressed(compression, &cluster[..4000]).expect("gets shorter");
        assert_eq!(
            decompressed(compression, &shorter, 4096),
            Err(DecompressError::Short {
                made_bytes: 4000,
                cluster_bytes: 4096
            })
        );
    }
}

#[test]
fn bombs_fill_a_cluster_and_no_more() {
    let bomb = text(100);
    let level = flate2::Compression::new(DEFLATE_LEVEL);
    let mut deflate = Compress::new_with_window_bits(level, false, 15);
    let mut stream = vec![0; 1 << 20];
    let long: Vec<u8> = bomb.iter().copied().cycle().take(16 << 20).collect();
    assert_eq!(
        deflate
            .compress(&long, &mut stream, FlushCompress::Finish)
            .ok(),
        Some(Status::StreamEnd)
    );
    assert_eq!(
        decompressed(Compression::Zlib, &stream, 65536),
        Ok(long[..65536].to_vec())
    );
    // 1 GiB in 32 KiB.
    let runs = vec![(128 << 10, 7); 8192];
    assert!(matches!(
        decompressed(Compression::Zstd, &zstd_runs(30, &runs), 2 << 20),
        Err(DecompressError::Damaged(_))
    ));
}

#[test]
fn zstd_windows_cost_nothing_and_impossible_ones_are_refused() {
    for window_log in [10, 23, 27, 31] {
        let frame = zstd_runs(window_log, &[(1000, 1), (24, 2)]);
        let mut expected = vec![1; 1000];
        expected.resize(1024, 2);
        assert_eq!(decompressed(Compression::Zstd, &frame, 1024), Ok(expected));
    }
    let beyond = zstd_runs(41, &[(1024, 1)]);
    assert!(decompressed(Compression::Zstd, &beyond, 1024).is_err());
}

#[test]
fn zstd_frames_follow_each_other() {
    let runs = |length, value| zstd_runs(10, &[(length, value)]);
    let joined = [
        skippable(100),
        runs(512, 1),
        skippable(0),
        runs(0, 9),
        runs(512, 2),
    ]
    .concat();
    let mut expected = vec![1; 512];
    expected.resize(1024, 2);
    for behind in [vec![], vec![0xff; 300], skippable(7), runs(1024, 3)] {
        let bytes = [joined.clone(), behind].concat();
        assert_eq!(
            decompressed(Compression::Zstd, &bytes, 1024).as_ref(),
            Ok(&expected)
        );
    }
    for bad in [
        skippable(100),
        [runs(512, 1), vec![0xff; 300]].concat(),
        [runs(512, 1), runs(513, 2)].concat(),
        // Made with a dictionary, number 0x55.
        vec![0x28, 0xb5, 0x2f, 0xfd, 1, 0, 0x55, 3, 0x20, 0, 1],
        // A skippable frame that claims more than there is.
        vec![0x50, 0x2a, 0x4d, 0x18, 0xff, 0xff, 0xff, 0xff, 0],
    ] {
        assert!(
            decompressed(Compression::Zstd, &bad, 1024).is_err(),
            "{bad:x?}"
        );
    }
}

proptest! {
    #[test]
    fn no_bytes_do_harm(bytes in prop::collection::vec(any::<u8>(), 0..2000), magic: bool) {
        let mut bytes = bytes;
        if magic {
            bytes.splice(..0, [0x28, 0xb5, 0x2f, 0xfd]);
        }
        for compression in BOTH {
            let _ = decompressed(compression, &bytes, 4096);
        }
    }

    #[test]
    fn damage_never_panics(place in 0_usize..1 << 16, flip in 1_u8..) {
        for compression in BOTH {
            let mut bytes = compressed(compression, &text(4096)).expect("gets shorter");
            let place = place % bytes.len();
            bytes[place] ^= flip;
            let _ = decompressed(compression, &bytes, 4096);
        }
    }
}
