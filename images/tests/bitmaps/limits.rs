//! Images that claim more than they hold, and the limits of what can be kept.

use blockyard_images::ImageError;
use blockyard_images::qcow2::create::CreateOptions;
use blockyard_images::qcow2::layout::header::{Access, Header};
use blockyard_images::qcow2::{Options, Qcow2};
use blockyard_storage::Storage;

use crate::bits::{Bits, Wanted, kept, memory, new_image, now, store, with_image};

const MIB: u64 = 1 << 20;

fn usual(name: &'static str) -> Wanted {
    Wanted {
        name,
        granularity_bytes: 512,
        auto: true,
        bits: Bits::of(16 * MIB, 512, &[(0, 1), (8000, 9000)]),
    }
}

fn image() -> Vec<u8> {
    let mut options = CreateOptions::new(16 * MIB);
    options.cluster_bytes = 512;
    with_image(&new_image(&options), async |image| {
        store(image, &[usual("a"), usual("b")])
            .await
            .expect("stored");
    })
}

/// Where the directory, the first table, and that table's first word are.
fn places(image: &[u8]) -> (usize, usize, u64) {
    let header = Header::parse(image, Access::ReadWrite).expect("it opens");
    let directory = header.extensions.bitmaps.expect("there").directory.0 as usize;
    let word = |at: usize| {
        let bytes: [u8; 8] = image[at..at + 8].try_into().expect("8 bytes");
        u64::from_be_bytes(bytes)
    };
    let table = word(directory) as usize;
    (directory, table, word(table))
}

fn refused(image: &[u8]) -> String {
    match kept(image) {
        Err(ImageError::Refused { text, .. }) => text,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn what_is_not_there_is_no_clean_bitmap() {
    let sound = image();
    let (directory, table, first) = places(&sound);
    let with = |at: usize, word: u64| {
        let mut image = sound.clone();
        image[at..at + 8].copy_from_slice(&word.to_be_bytes());
        image
    };
    let bits = "Could not read bitmap 'a' from image: Invalid argument";
    let of_table = "Could not read bitmap_table table from image for bitmap 'a': Invalid argument";
    let end = sound.len() as u64;
    assert_eq!(refused(&with(table, end.next_multiple_of(512))), bits);
    assert_eq!(refused(&with(table, 1 << 50)), bits);
    assert_eq!(refused(&with(table, first | 1)), of_table);
    assert_eq!(refused(&with(table, 2)), of_table);
    assert_eq!(refused(&with(table + 8, 1 << 63)), of_table);
    // The table behind the end is refused when the image is opened for writing, and when it is loaded.
    let moved = with(directory, end.next_multiple_of(512));
    assert!(kept(&moved).is_err());
    // All clusters of both in one place: more than the file has.
    let mut shared = sound.clone();
    for at in 0..8 {
        shared[table + at * 8..table + at * 8 + 8].copy_from_slice(&first.to_be_bytes());
    }
    assert!(
        kept(&shared).is_ok(),
        "as long as it is no longer than the file"
    );
    let mut options = CreateOptions::new(1 << 32);
    options.cluster_bytes = 4096;
    let large = with_image(&new_image(&options), async |image| {
        let one = Wanted {
            bits: Bits::of(1 << 32, 512, &[(0, 1)]),
            ..usual("a")
        };
        store(image, &[one]).await.expect("stored");
    });
    let (_, table, first) = places(&large);
    let mut shared = large.clone();
    for at in 0..256 {
        shared[table + at * 8..table + at * 8 + 8].copy_from_slice(&first.to_be_bytes());
    }
    assert_eq!(refused(&shared), bits);
}

/// Opens an image and asks whether a new bitmap could be kept.
fn check_new(
    options: &CreateOptions,
    name: &str,
    granularity_bytes: u64,
    others: &[usize],
) -> Option<String> {
    let file: std::rc::Rc<dyn Storage> = memory(&new_image(options));
    let image = now(Qcow2::open(file, None, Options::default())).expect("it opens");
    let others = others.iter().copied();
    let checked = image.check_new_bitmap(name.as_bytes(), granularity_bytes, others);
    checked.err().map(|error| error.to_string())
}

#[test]
fn each_limit_is_where_the_format_has_it() {
    let usual = CreateOptions::new(64 * MIB);
    let told = |granularity_bytes| check_new(&usual, "b", granularity_bytes, &[]);
    assert_eq!(told(512), None);
    assert_eq!(told(1 << 31), None);
    let text = "Granularity exceeds maximum (2147483648 bytes)";
    assert_eq!(told(1 << 32).as_deref(), Some(text));
    let text = "Granularity is under minimum (512 bytes)";
    assert_eq!(told(256).as_deref(), Some(text));
    // 2^32 bits are 512 MiB.
    let text = "Too much space will be occupied by the bitmap. Use larger granularity";
    let of = |size_bytes| check_new(&CreateOptions::new(size_bytes), "b", 512, &[]);
    assert_eq!(of(1 << 41), None);
    assert_eq!(of((1 << 41) + 512).as_deref(), Some(text));
    let name = "n".repeat(1024);
    let text = "Name length exceeds maximum (1023 characters)";
    assert_eq!(check_new(&usual, &name, 512, &[]).as_deref(), Some(text));
    assert_eq!(check_new(&usual, &name[1..], 512, &[]), None);
    let text = "Maximum number of persistent bitmaps is already reached";
    assert_eq!(check_new(&usual, "b", 512, &[1; 65_534]), None);
    assert_eq!(
        check_new(&usual, "b", 512, &[1; 65_535]).as_deref(),
        Some(text)
    );
    // 64,095 entries of 1,048 bytes are the most.
    let text = "Not enough space in the bitmap directory";
    let fitting = vec![1023; 64_035];
    let most = 1024 * 65_535 / 1048;
    assert_eq!(
        check_new(&usual, &name[1..], 512, &fitting[..most - 1]),
        None
    );
    assert_eq!(
        check_new(&usual, &name[1..], 512, &fitting[..most]).as_deref(),
        Some(text)
    );
}
