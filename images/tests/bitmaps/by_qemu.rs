//! Images to and fro: QEMU reads and rewrites what was stored here, and what QEMU has stored is loaded here.

use blockyard_images::qcow2::create::CreateOptions;

use crate::bits::{Bits, Wanted, all_kept, kept, new_image, store, with_image};
use crate::oracle::Oracle;

const MIB: u64 = 1 << 20;
const NAME: &str = "image.qcow2";

fn check(oracle: &Oracle, told: &str) {
    let said = oracle.qemu_img(&["check", NAME]);
    assert!(said.contains("No errors were found"), "{told}: {said}");
}

#[test]
fn qemu_rewrites_what_was_stored_here() {
    let Some(oracle) = Oracle::find() else {
        return;
    };
    for (disk_bytes, cluster_bytes, granularity_bytes, set) in [
        (64 * MIB, 65_536, 65_536, vec![(0, 1), (5, 9), (1023, 1024)]),
        (
            64 * MIB,
            512,
            512,
            vec![(1, 4095), (4096, 8192), (40_000, 131_072)],
        ),
        (3 * MIB + 512, 4096, 1024, vec![(0, 3073)]),
        (3 * MIB + 512, 4096, 1024, vec![(3072, 3073)]),
        (
            1 << 40,
            2 * MIB,
            4096,
            vec![(0, 1 << 24), (1 << 27, (1 << 27) + 3)],
        ),
    ] {
        let told = format!("{disk_bytes} {cluster_bytes} {granularity_bytes}");
        let mut options = CreateOptions::new(disk_bytes);
        options.cluster_bytes = cluster_bytes;
        let wanted = |name, auto| Wanted {
            name,
            granularity_bytes,
            auto,
            bits: Bits::of(disk_bytes, granularity_bytes, &set),
        };
        let both = [wanted("ours", true), wanted("frozen", false)];
        let image = with_image(&new_image(&options), async |image| {
            store(image, &both).await.expect("stored");
        });
        oracle.write(NAME, &image);
        check(&oracle, &told);
        let granularity = granularity_bytes.to_string();
        let add = ["bitmap", "--add", "-g", &granularity, NAME, "theirs"];
        oracle.qemu_img(&add);
        oracle.qemu_img(&["bitmap", "--merge", "frozen", NAME, "theirs"]);
        oracle.qemu_img(&["bitmap", "--clear", NAME, "frozen"]);
        check(&oracle, &told);
        let mut expected = all_kept(&[wanted("ours", true), wanted("theirs", true)]);
        let clear = Wanted {
            bits: Bits::of(disk_bytes, granularity_bytes, &[]),
            ..wanted("frozen", false)
        };
        expected.extend(all_kept(&[clear]));
        let theirs = oracle.read(NAME);
        assert!(kept(&theirs).expect(&told) == expected, "{told}");
        // And back again: what QEMU has left is taken over.
        let again = with_image(&theirs, async |image| {
            image.mark_bitmaps_in_use().await.expect("marked");
            store(image, &both).await.expect("stored");
            let removed = image.remove_bitmap(b"theirs").await;
            assert_eq!(removed, Ok(true));
        });
        oracle.write(NAME, &again);
        check(&oracle, &told);
        assert!(kept(&again).expect(&told) == all_kept(&both), "{told}");
    }
}

#[test]
fn what_a_guest_of_qemu_has_changed_is_loaded() {
    let Some(oracle) = Oracle::find() else {
        return;
    };
    for options in ["cluster_size=512", "cluster_size=64k", "lazy_refcounts=on"] {
        oracle.qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, NAME, "8M"]);
        oracle.qemu_img(&["bitmap", "--add", "-g", "512", NAME, "fine"]);
        oracle.qemu_img(&["bitmap", "--add", "-g", "1M", NAME, "coarse"]);
        oracle.qemu_img(&["bitmap", "--add", "--disable", NAME, "frozen"]);
        let writes = [
            "-c",
            "write 512 1k",
            "-c",
            "write -z 4M 3M",
            "-c",
            "write 8191k 1k",
            NAME,
        ];
        let written = oracle.run("qemu-io", &writes);
        assert!(written.status.success(), "{written:?}");
        let wanted = |name, granularity_bytes, auto, set: &[(u64, u64)]| Wanted {
            name,
            granularity_bytes,
            auto,
            bits: Bits::of(8 * MIB, granularity_bytes, set),
        };
        let expected = all_kept(&[
            wanted(
                "fine",
                512,
                true,
                &[(1, 3), (8192, 14_336), (16_382, 16_384)],
            ),
            wanted("coarse", MIB, true, &[(0, 1), (4, 8)]),
            wanted("frozen", 65_536, false, &[]),
        ]);
        let mut found = kept(&oracle.read(NAME)).expect("it opens");
        // A cluster smaller than 4 KiB has a granularity of its own.
        if options == "cluster_size=512" {
            let frozen = found.remove("frozen").expect("there");
            assert_eq!(frozen.granularity_bytes, 4096);
            found.insert("frozen".to_owned(), expected["frozen"].clone());
        }
        assert!(found == expected, "{options}: {found:?}");
    }
}
