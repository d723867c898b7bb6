//! How an image is used, from what a client says and what its header says. Pure.

use std::time::Duration;

use blockyard_images::ImageError;
use blockyard_images::qcow2::asked::{Asked, Encryption};
use blockyard_images::qcow2::layout::header::Header;
use blockyard_images::qcow2::options::Options;
use blockyard_images::qcow2::overlap::{Metadata, OverlapChecks};

use crate::graph::options::Resolved;
use crate::node::qcow2::Qcow2Options;
use crate::request::{Discard, EncryptionFormat, OverlapCheckSpec, OverlapTemplate, Qcow2Spec};

/// How an image with this header is used.
///
/// # Errors
/// What the client wants does not fit together, or not to the image.
pub(super) fn image_options(
    spec: &Qcow2Spec,
    header: &Header,
    resolved: Resolved,
) -> Result<(Options, Qcow2Options), ImageError> {
    let settled = asked(spec).settle(header)?;
    let unmaps = resolved.discard == Discard::Unmap;
    let image = Options {
        read_only: resolved.read_only,
        lazy_refcounts: settled.lazy_refcounts,
        l2_cache_bytes: settled.l2_cache_bytes,
        l2_cache_entry_bytes: settled.l2_cache_entry_bytes,
        refcount_cache_bytes: settled.refcount_cache_bytes,
        discard_no_unref: settled.discard_no_unref,
        pass_discard_request: spec.pass_discard_request.unwrap_or(unmaps),
        pass_discard_snapshot: spec.pass_discard_snapshot.unwrap_or(true),
        pass_discard_other: spec.pass_discard_other.unwrap_or(false),
        overlap_checks: overlap_checks(&spec.overlap_check),
        ..Options::default()
    };
    let clean = settled.cache_clean_interval_seconds;
    let node = Qcow2Options {
        inactive: resolved.inactive,
        discard: resolved.discard,
        detect_zeroes: resolved.detect_zeroes,
        cache_clean_interval: (clean > 0).then(|| Duration::from_secs(u64::from(clean))),
    };
    Ok((image, node))
}

fn asked(spec: &Qcow2Spec) -> Asked {
    Asked {
        cache_bytes: spec.cache_size,
        l2_cache_bytes: spec.l2_cache_size,
        l2_cache_entry_bytes: spec.l2_cache_entry_size,
        refcount_cache_bytes: spec.refcount_cache_size,
        cache_clean_interval_seconds: spec.cache_clean_interval,
        lazy_refcounts: spec.lazy_refcounts,
        discard_no_unref: spec.discard_no_unref,
        encryption: spec.encrypt.map(|format| match format {
            EncryptionFormat::Aes => Encryption::Aes,
            EncryptionFormat::Luks => Encryption::Luks,
        }),
        // Whether it may be there is seen after it has been opened, as in QEMU.
        data_file: false,
    }
}

fn overlap_checks(spec: &OverlapCheckSpec) -> OverlapChecks {
    let template = match spec.template.unwrap_or(OverlapTemplate::Cached) {
        OverlapTemplate::None => OverlapChecks::NONE,
        OverlapTemplate::Constant => OverlapChecks::CONSTANT,
        OverlapTemplate::Cached => OverlapChecks::CACHED,
        OverlapTemplate::All => OverlapChecks::ALL,
    };
    let chosen = [
        (Metadata::Header, spec.main_header),
        (Metadata::ActiveL1, spec.active_l1),
        (Metadata::ActiveL2, spec.active_l2),
        (Metadata::RefcountTable, spec.refcount_table),
        (Metadata::RefcountBlock, spec.refcount_block),
        (Metadata::SnapshotTable, spec.snapshot_table),
        (Metadata::InactiveL1, spec.inactive_l1),
        (Metadata::InactiveL2, spec.inactive_l2),
        (Metadata::BitmapDirectory, spec.bitmap_directory),
    ];
    chosen.into_iter().fold(template, |checks, (kind, chosen)| {
        chosen.map_or(checks, |protected| checks.with(kind, protected))
    })
}

#[cfg(test)]
mod tests {
    use blockyard_images::qcow2::layout::extensions::Extensions;
    use blockyard_images::qcow2::units::{Compression, Geometry, HostOffset, Version};

    use super::*;
    use crate::request::{CommonOptions, NodeRef};

    fn header() -> Header {
        Header {
            geometry: Geometry::new(Version::V3, 16, 4, false).expect("in range"),
            size_bytes: 1 << 20,
            crypt_method: 0,
            l1_entries: 1,
            l1_table: HostOffset(0x30000),
            refcount_table: HostOffset(0x10000),
            refcount_table_clusters: 1,
            snapshots: 0,
            snapshot_table: HostOffset(0),
            backing_name: None,
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            compression: Compression::Zlib,
            extra: Vec::new(),
            extensions: Extensions::default(),
        }
    }

    fn options(spec: &Qcow2Spec, discard: Discard) -> Result<(Options, Qcow2Options), ImageError> {
        let common = CommonOptions {
            discard: Some(discard),
            ..CommonOptions::default()
        };
        let resolved = Resolved::new(common, None).expect("fits");
        image_options(spec, &header(), resolved)
    }

    #[test]
    fn what_is_not_said_follows_from_image_and_node() {
        let spec = Qcow2Spec::over(NodeRef::Name("f".to_owned()));
        let (image, node) = options(&spec, Discard::Ignore).expect("fits");
        let expected = Options {
            l2_cache_bytes: 131_072,
            ..Options::default()
        };
        assert_eq!(image, expected);
        assert_eq!(node.cache_clean_interval, Some(Duration::from_secs(600)));
        let (image, node) = options(&spec, Discard::Unmap).expect("fits");
        assert!(image.pass_discard_request && node.discard == Discard::Unmap);
    }

    #[test]
    fn what_a_client_says_reaches_the_image() {
        let spec = Qcow2Spec {
            lazy_refcounts: Some(true),
            pass_discard_request: Some(false),
            pass_discard_snapshot: Some(false),
            pass_discard_other: Some(true),
            discard_no_unref: Some(true),
            l2_cache_size: Some(70_000),
            l2_cache_entry_size: Some(512),
            refcount_cache_size: Some(1 << 20),
            cache_clean_interval: Some(0),
            ..Qcow2Spec::over(NodeRef::Name("f".to_owned()))
        };
        let (image, node) = options(&spec, Discard::Unmap).expect("fits");
        let expected = Options {
            read_only: false,
            lazy_refcounts: true,
            // All tables of the disk.
            l2_cache_bytes: 65_536,
            l2_cache_entry_bytes: 512,
            refcount_cache_bytes: 1 << 20,
            discard_no_unref: true,
            pass_discard_request: false,
            pass_discard_snapshot: false,
            pass_discard_other: true,
            overlap_checks: OverlapChecks::CACHED,
            ..Options::default()
        };
        assert_eq!(image, expected);
        assert_eq!(node.cache_clean_interval, None);
        let encrypted = Qcow2Spec {
            encrypt: Some(EncryptionFormat::Luks),
            ..spec
        };
        let refused = options(&encrypted, Discard::Unmap).expect_err("not encrypted");
        assert_eq!(
            refused.to_string(),
            "No encryption in image header, but options specified format 'luks'"
        );
    }

    #[test]
    fn overlap_checks_begin_with_a_set_and_change_it() {
        let usual = OverlapCheckSpec::usual();
        assert_eq!(overlap_checks(&usual), OverlapChecks::CACHED);
        let changed = OverlapCheckSpec {
            template: Some(OverlapTemplate::None),
            main_header: Some(true),
            inactive_l2: Some(false),
            ..usual
        };
        let expected = OverlapChecks::NONE.with(Metadata::Header, true);
        assert_eq!(overlap_checks(&changed), expected);
        let less = OverlapCheckSpec {
            template: Some(OverlapTemplate::All),
            inactive_l2: Some(false),
            ..usual
        };
        assert_eq!(overlap_checks(&less), OverlapChecks::CACHED);
    }
}
