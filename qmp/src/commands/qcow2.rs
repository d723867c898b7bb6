//! How the description of a `qcow2` node becomes a request.

use blockyard_engine::request::{
    BackingRef, EncryptionFormat, OverlapCheckSpec, OverlapTemplate, Qcow2Spec,
};

use crate::commands::nodes::{reference, reference_or_null};
use crate::error::QmpError;
use crate::schema::fields::Fields;

const TEMPLATES: &[(&str, OverlapTemplate)] = &[
    ("none", OverlapTemplate::None),
    ("constant", OverlapTemplate::Constant),
    ("cached", OverlapTemplate::Cached),
    ("all", OverlapTemplate::All),
];

/// Reads the checked description of a node at this depth of nesting.
///
/// # Errors
/// As [`node_spec`](crate::commands::nodes::node_spec).
pub(super) fn qcow2(mut fields: Fields, depth: usize) -> Result<Qcow2Spec, QmpError> {
    let encrypt = fields.object("encrypt").and_then(|encrypt| {
        let formats = [EncryptionFormat::Aes, EncryptionFormat::Luks].map(|one| (one.name(), one));
        encrypt.word("format", &formats)
    });
    Ok(Qcow2Spec {
        overlap_check: overlap_check(&mut fields),
        lazy_refcounts: fields.flag("lazy-refcounts"),
        pass_discard_request: fields.flag("pass-discard-request"),
        pass_discard_snapshot: fields.flag("pass-discard-snapshot"),
        pass_discard_other: fields.flag("pass-discard-other"),
        discard_no_unref: fields.flag("discard-no-unref"),
        cache_size: fields.int("cache-size"),
        l2_cache_size: fields.int("l2-cache-size"),
        l2_cache_entry_size: fields.int("l2-cache-entry-size"),
        refcount_cache_size: fields.int("refcount-cache-size"),
        cache_clean_interval: fields.int("cache-clean-interval"),
        encrypt,
        data_file: match fields.has("data-file") {
            true => Some(reference(&mut fields, "data-file", depth)?),
            false => None,
        },
        backing: match fields.has("backing") {
            true => match reference_or_null(&mut fields, "backing", depth)? {
                Some(node) => BackingRef::Node(node),
                None => BackingRef::Nothing,
            },
            false => BackingRef::FromImage,
        },
        file: reference(&mut fields, "file", depth)?,
    })
}

fn overlap_check(fields: &mut Fields) -> OverlapCheckSpec {
    // One of the words alone stands for the template.
    if let Some(template) = fields.word("overlap-check", TEMPLATES) {
        return OverlapCheckSpec {
            template: Some(template),
            ..OverlapCheckSpec::usual()
        };
    }
    let Some(flags) = fields.object("overlap-check") else {
        return OverlapCheckSpec::usual();
    };
    OverlapCheckSpec {
        template: flags.word("template", TEMPLATES),
        main_header: flags.flag("main-header"),
        active_l1: flags.flag("active-l1"),
        active_l2: flags.flag("active-l2"),
        refcount_table: flags.flag("refcount-table"),
        refcount_block: flags.flag("refcount-block"),
        snapshot_table: flags.flag("snapshot-table"),
        inactive_l1: flags.flag("inactive-l1"),
        inactive_l2: flags.flag("inactive-l2"),
        bitmap_directory: flags.flag("bitmap-directory"),
    }
}

#[cfg(test)]
mod tests {
    use blockyard_engine::request::{DriverSpec, NodeRef};

    use super::*;
    use crate::commands::nodes::node_spec;
    use crate::keyval;
    use crate::schema::nodes::OPTIONS;

    fn read(text: &str) -> Result<Qcow2Spec, String> {
        let fields = keyval::read(text, Some("driver"), &OPTIONS).map_err(|error| error.text)?;
        match node_spec(fields).map_err(|error| error.text)?.driver {
            DriverSpec::Qcow2(spec) => Ok(*spec),
            other => panic!("not qcow2: {other:?}"),
        }
    }

    fn name(node: &str) -> NodeRef {
        NodeRef::Name(node.to_owned())
    }

    #[test]
    fn both_spellings_say_the_same() {
        let json = read(
            r#"{"driver": "qcow2", "node-name": "n", "file": "f", "backing": {"driver": "raw", "file": "b"},
                "data-file": "d", "lazy-refcounts": true, "pass-discard-request": false,
                "pass-discard-snapshot": false, "pass-discard-other": true, "discard-no-unref": true,
                "overlap-check": {"template": "none", "main-header": true, "inactive-l2": false},
                "cache-size": 7, "l2-cache-size": 6, "l2-cache-entry-size": 5, "refcount-cache-size": 4,
                "cache-clean-interval": 3, "encrypt": {"format": "luks", "key-secret": "s"}}"#,
        );
        let options = read(
            "qcow2,node-name=n,file=f,backing.driver=raw,backing.file=b,data-file=d,lazy-refcounts=on,\
             pass-discard-request=off,pass-discard-snapshot=off,pass-discard-other=on,\
             discard-no-unref=on,overlap-check.template=none,overlap-check.main-header=on,\
             overlap-check.inactive-l2=off,cache-size=7,l2-cache-size=6,l2-cache-entry-size=5,\
             refcount-cache-size=4,cache-clean-interval=3,encrypt.format=luks,encrypt.key-secret=s",
        );
        assert_eq!(json, options);
        let spec = json.expect("read");
        assert_eq!(spec.file, name("f"));
        assert_eq!(spec.data_file, Some(name("d")));
        let BackingRef::Node(NodeRef::Inline(backing)) = spec.backing else {
            panic!("inline")
        };
        let DriverSpec::Raw { file, .. } = backing.driver else {
            panic!("raw")
        };
        assert_eq!(file, name("b"));
        let overlap_check = OverlapCheckSpec {
            template: Some(OverlapTemplate::None),
            main_header: Some(true),
            inactive_l2: Some(false),
            ..OverlapCheckSpec::usual()
        };
        assert_eq!(spec.overlap_check, overlap_check);
        let sizes = (
            spec.cache_size,
            spec.l2_cache_size,
            spec.l2_cache_entry_size,
        );
        assert_eq!(sizes, (Some(7), Some(6), Some(5)));
        let sizes = (spec.refcount_cache_size, spec.cache_clean_interval);
        assert_eq!(sizes, (Some(4), Some(3)));
        assert_eq!(spec.encrypt, Some(EncryptionFormat::Luks));
        let flags = (
            spec.lazy_refcounts,
            spec.pass_discard_request,
            spec.pass_discard_snapshot,
            spec.pass_discard_other,
            spec.discard_no_unref,
        );
        let (on, off) = (Some(true), Some(false));
        assert_eq!(flags, (on, off, off, on, on));
    }

    #[test]
    fn a_backing_is_a_node_nothing_or_left_to_the_image() {
        let backing = |text: &str| {
            let text = format!(r#"{{"driver": "qcow2", "node-name": "n", "file": "f"{text}}}"#);
            read(&text).map(|spec| spec.backing)
        };
        assert_eq!(backing(""), Ok(BackingRef::FromImage));
        assert_eq!(backing(r#", "backing": null"#), Ok(BackingRef::Nothing));
        // An old spelling of null.
        assert_eq!(backing(r#", "backing": """#), Ok(BackingRef::Nothing));
        let named = backing(r#", "backing": "b""#);
        assert_eq!(named, Ok(BackingRef::Node(name("b"))));
        assert_eq!(
            backing(r#", "backing": 5"#),
            Err("Invalid parameter type for 'backing', expected: BlockdevRefOrNull".to_owned())
        );
        assert_eq!(
            backing(r#", "backing": {}"#),
            Err("Parameter 'backing.driver' is missing".to_owned())
        );
    }

    #[test]
    fn a_word_stands_for_a_whole_overlap_check() {
        let check = |text: &str| {
            let text = format!("qcow2,node-name=n,file=f{text}");
            read(&text).map(|spec| spec.overlap_check)
        };
        let template = |template| OverlapCheckSpec {
            template: Some(template),
            ..OverlapCheckSpec::usual()
        };
        assert_eq!(check(""), Ok(OverlapCheckSpec::usual()));
        for (word, meant) in TEMPLATES {
            assert_eq!(
                check(&format!(",overlap-check={word}")),
                Ok(template(*meant))
            );
        }
        assert_eq!(
            check(",overlap-check=some"),
            Err("Parameter 'overlap-check' does not accept value 'some'".to_owned())
        );
    }
}
