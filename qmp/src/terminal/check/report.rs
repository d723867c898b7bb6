//! The figures of a check, for people and for programs, as `qemu-img check` prints them.

use std::path::Path;

use blockyard_engine::images::CheckView;
use serde::Serialize;
use serde_json::ser::{PrettyFormatter, Serializer};
use serde_json::{Map, Value, json};

/// What a repair has done, before the image is checked again.
pub(crate) fn repaired(corruptions: u64, leaks: u64) -> String {
    format!(
        "The following inconsistencies were found and repaired:\n\n    {leaks} leaked clusters\n    \
         {corruptions} corruptions\n\nDouble checking the fixed image now..."
    )
}

/// The figures for people.
pub(crate) fn human(view: &CheckView) -> String {
    let mut text = String::new();
    let mut paragraph = |count: u64, found: &str, means: &str| {
        if count > 0 {
            text += &format!("\n{count} {found}\n{means}");
        }
    };
    paragraph(
        view.corruptions,
        "errors were found on the image.",
        "Data may be corrupted, or further writes to the image may corrupt it.\n",
    );
    paragraph(
        view.leaks,
        "leaked clusters were found on the image.",
        "This means waste of disk space, but no harm to data.\n",
    );
    paragraph(
        view.check_errors,
        "internal errors have occurred during the check.",
        "",
    );
    if text.is_empty() {
        text += "No errors were found on the image.\n";
    }
    if view.total_clusters > 0 && view.allocated_clusters > 0 {
        let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        text += &format!(
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
            view.allocated_clusters,
            view.total_clusters,
            percent(view.allocated_clusters, view.total_clusters),
            percent(view.fragmented_clusters, view.allocated_clusters),
            percent(view.compressed_clusters, view.allocated_clusters),
        );
    }
    if view.image_end_offset > 0 {
        text += &format!("Image end offset: {}\n", view.image_end_offset);
    }
    text.truncate(text.trim_end().len());
    text
}

/// The figures for programs: those that are 0 are left out, but for the errors of the check itself.
pub(crate) fn json(view: &CheckView, file: &Path) -> String {
    let mut members = Map::new();
    let mut figure = |name: &str, number: u64, always: bool| {
        if always || number > 0 {
            members.insert(name.to_owned(), json!(number));
        }
    };
    figure("image-end-offset", view.image_end_offset, false);
    figure("compressed-clusters", view.compressed_clusters, false);
    figure("total-clusters", view.total_clusters, false);
    figure("corruptions", view.corruptions, false);
    figure("corruptions-fixed", view.corruptions_fixed, false);
    figure("check-errors", view.check_errors, true);
    figure("leaks", view.leaks, false);
    figure("leaks-fixed", view.leaks_fixed, false);
    figure("allocated-clusters", view.allocated_clusters, false);
    members.insert("filename".to_owned(), json!(file.to_string_lossy()));
    members.insert("format".to_owned(), json!("qcow2"));
    if view.fragmented_clusters > 0 {
        members.insert(
            "fragmented-clusters".to_owned(),
            json!(view.fragmented_clusters),
        );
    }
    indented(&Value::Object(members))
}

/// JSON indented by four spaces, as QEMU's tools print it.
pub(crate) fn indented(value: &Value) -> String {
    let mut bytes = Vec::new();
    let formatter = PrettyFormatter::with_indent(b"    ");
    let mut serializer = Serializer::with_formatter(&mut bytes, formatter);
    match value.serialize(&mut serializer) {
        Ok(()) => String::from_utf8_lossy(&bytes).into_owned(),
        // Numbers and strings always can be.
        Err(_) => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VIEW: CheckView = CheckView {
        image_end_offset: 655_360,
        total_clusters: 64,
        allocated_clusters: 5,
        compressed_clusters: 0,
        fragmented_clusters: 2,
        corruptions: 1,
        leaks: 0,
        check_errors: 0,
        corruptions_fixed: 0,
        leaks_fixed: 0,
    };

    #[test]
    fn figures_for_people() {
        assert_eq!(
            human(&VIEW),
            "\n1 errors were found on the image.\n\
             Data may be corrupted, or further writes to the image may corrupt it.\n\
             5/64 = 7.81% allocated, 40.00% fragmented, 0.00% compressed clusters\n\
             Image end offset: 655360"
        );
        let clean = CheckView {
            image_end_offset: 65_536,
            ..CheckView::default()
        };
        assert_eq!(
            human(&clean),
            "No errors were found on the image.\nImage end offset: 65536"
        );
    }

    #[test]
    fn figures_for_programs() {
        let text = json(&VIEW, Path::new("a.qcow2"));
        assert_eq!(
            text,
            "{\n    \"image-end-offset\": 655360,\n    \"total-clusters\": 64,\n    \"corruptions\": 1,\n    \
             \"check-errors\": 0,\n    \"allocated-clusters\": 5,\n    \"filename\": \"a.qcow2\",\n    \
             \"format\": \"qcow2\",\n    \"fragmented-clusters\": 2\n}"
        );
    }
}
