//! Options that do not fit to an image are refused with QEMU's words.

use blockyard_images::qcow2::asked::{Asked, Encryption};
use blockyard_images::qcow2::layout::header::{Access, Header};

use crate::images::Image;
use crate::oracle::{Oracle, Write};

/// Options, the same as JSON, and what is said of them for version 2 and version 3.
fn rows() -> Vec<(Asked, &'static str, [Option<&'static str>; 2])> {
    const LAZY: &str =
        "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level";
    const NO_UNREF: &str = "discard-no-unref is only supported since qcow2 version 3";
    const ENTRY: &str =
        "L2 cache entry size must be a power of two between 512 and the cluster size (4096)";
    const INTERVAL: &str = "Cache clean interval too big";
    const REFCOUNTS: &str = "Refcount cache size too big";
    let nothing = Asked::default();
    let both = |text| [Some(text), Some(text)];
    let entry = |bytes| Asked {
        l2_cache_entry_bytes: Some(bytes),
        ..nothing
    };
    let interval = |seconds| Asked {
        cache_clean_interval_seconds: Some(seconds),
        ..nothing
    };
    let lazy = Asked {
        lazy_refcounts: Some(true),
        ..nothing
    };
    let caches = |total, l2, refcounts| Asked {
        cache_bytes: total,
        l2_cache_bytes: l2,
        refcount_cache_bytes: refcounts,
        ..nothing
    };
    let some = Some(1 << 20);
    vec![
        (nothing, "", [None; 2]),
        (lazy, r#","lazy-refcounts":true"#, [Some(LAZY), None]),
        (
            Asked {
                lazy_refcounts: Some(false),
                ..nothing
            },
            r#","lazy-refcounts":false"#,
            [None; 2],
        ),
        (
            Asked {
                discard_no_unref: Some(true),
                ..nothing
            },
            r#","discard-no-unref":true"#,
            [Some(NO_UNREF), None],
        ),
        (
            Asked {
                discard_no_unref: Some(true),
                ..lazy
            },
            r#","discard-no-unref":true,"lazy-refcounts":true"#,
            [Some(LAZY), None],
        ),
        (entry(0), r#","l2-cache-entry-size":0"#, both(ENTRY)),
        (entry(256), r#","l2-cache-entry-size":256"#, both(ENTRY)),
        (entry(512), r#","l2-cache-entry-size":512"#, [None; 2]),
        (entry(513), r#","l2-cache-entry-size":513"#, both(ENTRY)),
        (entry(8192), r#","l2-cache-entry-size":8192"#, both(ENTRY)),
        (
            entry(-1),
            r#","l2-cache-entry-size":-1"#,
            both("Value '-1' is out of range for parameter 'l2-cache-entry-size'"),
        ),
        (
            caches(Some(-7), None, None),
            r#","cache-size":-7"#,
            both("Value '-7' is out of range for parameter 'cache-size'"),
        ),
        (
            caches(some, some, some),
            r#","cache-size":1048576,"l2-cache-size":1048576,"refcount-cache-size":1048576"#,
            both(
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
            ),
        ),
        (
            caches(some, Some((1 << 20) + 1), None),
            r#","cache-size":1048576,"l2-cache-size":1048577"#,
            both("l2-cache-size may not exceed cache-size"),
        ),
        (
            caches(some, None, Some((1 << 20) + 1)),
            r#","cache-size":1048576,"refcount-cache-size":1048577"#,
            both("refcount-cache-size may not exceed cache-size"),
        ),
        (
            caches(some, some, None),
            r#","cache-size":1048576,"l2-cache-size":1048576"#,
            [None; 2],
        ),
        (
            caches(None, Some(i64::MAX), None),
            r#","l2-cache-size":9223372036854775807"#,
            [None; 2],
        ),
        (
            caches(None, None, Some(i64::MAX)),
            r#","refcount-cache-size":9223372036854775807"#,
            both(REFCOUNTS),
        ),
        (
            caches(Some(i64::MAX), None, None),
            r#","cache-size":9223372036854775807"#,
            both(REFCOUNTS),
        ),
        (interval(0), r#","cache-clean-interval":0"#, [None; 2]),
        (
            interval(i64::from(u32::MAX)),
            r#","cache-clean-interval":4294967295"#,
            [None; 2],
        ),
        (
            interval(1 << 32),
            r#","cache-clean-interval":4294967296"#,
            both(INTERVAL),
        ),
        (
            interval(-1),
            r#","cache-clean-interval":-1"#,
            both(INTERVAL),
        ),
        (
            Asked {
                cache_clean_interval_seconds: Some(-1),
                ..lazy
            },
            r#","cache-clean-interval":-1,"lazy-refcounts":true"#,
            both(INTERVAL),
        ),
        (
            Asked {
                encryption: Some(Encryption::Luks),
                ..nothing
            },
            r#","encrypt":{"format":"luks","key-secret":"x"}"#,
            both("No encryption in image header, but options specified format 'luks'"),
        ),
        (
            Asked {
                data_file: true,
                ..nothing
            },
            r#","data-file":{"driver":"null-co"}"#,
            both("'data-file' can only be set for images with an external data file"),
        ),
    ]
}

fn images() -> [Image; 2] {
    let mut version_2 = Image::version_2();
    version_2.put(72, &[0; 8]);
    [version_2, Image::valid()]
}

#[test]
fn options_that_do_not_fit_are_refused() {
    for (index, image) in images().into_iter().enumerate() {
        let header = Header::parse(&image.0, Access::ReadOnly).expect("it is valid");
        for (asked, json, texts) in rows() {
            let said = asked.settle(&header).err().map(|error| error.to_string());
            assert_eq!(said.as_deref(), texts[index], "{json}, image {index}");
        }
    }
}

#[test]
fn encryption_must_be_the_one_of_the_image() {
    let mut header = Header::parse(&Image::valid().0, Access::ReadOnly).expect("it is valid");
    for (method, asked, text) in [
        (1, Encryption::Aes, None),
        (
            1,
            Encryption::Luks,
            Some("Header reported 'aes' encryption format but options specify 'luks'"),
        ),
        (
            2,
            Encryption::Aes,
            Some("Header reported 'luks' encryption format but options specify 'aes'"),
        ),
    ] {
        header.crypt_method = method;
        let asked = Asked {
            encryption: Some(asked),
            ..Asked::default()
        };
        let said = asked.settle(&header).err().map(|error| error.to_string());
        assert_eq!(said.as_deref(), text);
    }
}

#[test]
fn qemu_refuses_the_same_options_with_the_same_words() {
    let Some(oracle) = Oracle::find() else {
        return;
    };
    for (index, image) in images().into_iter().enumerate() {
        oracle.write("image.qcow2", &image.0);
        let rows = rows();
        let asked: Vec<_> = rows
            .iter()
            .map(|(_, json, _)| ("image.qcow2".to_owned(), (*json).to_owned()))
            .collect();
        let said = oracle.open_texts_with(&asked, Write::No);
        for ((_, json, texts), said) in rows.iter().zip(said) {
            assert_eq!(said.as_deref(), texts[index], "{json}, image {index}");
        }
    }
}
