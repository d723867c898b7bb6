//! What an image says of itself, for people and for programs, as `qemu-img info` prints it.

use std::path::Path;

use blockyard_engine::images::info::{BitmapInfo, Compression, ImageInfo, SnapshotInfo};
use blockyard_engine::reply::{FormatSpecific, ImageView};
use serde_json::{Map, Value, json};

use crate::replies;
use crate::terminal::check::report::indented;
use crate::terminal::images::info::Described;

const NANOSECONDS: u64 = 1_000_000_000;

/// For programs: one image, or a list.
pub(crate) fn json(layers: &[Described], is_list: bool) -> String {
    indented(&match layers {
        [only] if !is_list => value(only),
        _ => layers.iter().map(value).collect(),
    })
}

fn value(described: &Described) -> Value {
    let view = &described.view;
    let mut file = replies::image(&described.file);
    file["children"] = json!([]);
    let mut members = Map::new();
    let mut member = |name: &str, value: Value| {
        members.insert(name.to_owned(), value);
    };
    member("children", json!([{ "name": "file", "info": file }]));
    let qcow2 = view.qcow2.as_ref();
    if let Some(format) = qcow2.and_then(|image| image.backing_format.as_ref()) {
        member("backing-filename-format", json!(format));
    }
    if let Some(image) = qcow2.filter(|image| !image.snapshots.is_empty()) {
        member("snapshots", image.snapshots.iter().map(snapshot).collect());
    }
    member("virtual-size", json!(view.virtual_size_bytes));
    member("filename", json!(described.path.to_string_lossy()));
    if let Some(image) = qcow2 {
        member("cluster-size", json!(image.cluster_bytes));
    }
    member("format", json!(format_name(qcow2)));
    if let Some(size) = described.file.actual_size_bytes {
        member("actual-size", json!(size));
    }
    if let Some(image) = qcow2 {
        let data = format_specific(image);
        member("format-specific", json!({ "type": "qcow2", "data": data }));
        if let Some(backing) = &image.backing_file {
            member(
                "full-backing-filename",
                json!(beside(&described.path, backing)),
            );
            member("backing-filename", json!(backing));
        }
        if image.encrypted {
            member("encrypted", json!(true));
        }
    }
    member("dirty-flag", json!(qcow2.is_some_and(|image| image.dirty)));
    Value::Object(members)
}

fn snapshot(snapshot: &SnapshotInfo) -> Value {
    let mut value = json!({
        "vm-clock-nsec": snapshot.vm_clock_nanoseconds % NANOSECONDS,
        "name": snapshot.name,
        "date-sec": snapshot.date_seconds,
        "date-nsec": snapshot.date_nanoseconds,
        "vm-clock-sec": snapshot.vm_clock_nanoseconds / NANOSECONDS,
        "id": snapshot.id,
        "vm-state-size": snapshot.vm_state_bytes,
    });
    if let Some(count) = snapshot.icount {
        value["icount"] = json!(count);
    }
    value
}

fn format_specific(image: &ImageInfo) -> Value {
    let mut data = json!({
        "compat": compat(image),
        "compression-type": compression(image),
    });
    if let Some(info) = &image.version_3 {
        data["lazy-refcounts"] = json!(info.lazy_refcounts);
        if !info.bitmaps.is_empty() {
            let bitmap = |bitmap: &BitmapInfo| {
                json!({
                    "flags": flags(bitmap),
                    "name": bitmap.name,
                    "granularity": bitmap.granularity_bytes,
                })
            };
            data["bitmaps"] = info.bitmaps.iter().map(bitmap).collect();
        }
    }
    data["refcount-bits"] = json!(image.refcount_bits);
    if let Some(info) = &image.version_3 {
        if let Some(name) = &info.data_file {
            data["data-file"] = json!(name);
        }
        if let Some(is_raw) = info.data_file_raw {
            data["data-file-raw"] = json!(is_raw);
        }
        data["corrupt"] = json!(info.corrupt);
        data["extended-l2"] = json!(info.extended_l2);
    }
    data
}

/// The flags of a bitmap, by their names.
pub(crate) fn flags(bitmap: &BitmapInfo) -> Vec<&'static str> {
    let flags = [("in-use", bitmap.in_use), ("auto", bitmap.auto)];
    let set = flags.iter().filter(|(_, set)| *set);
    set.map(|(name, _)| *name).collect()
}

const fn compat(image: &ImageInfo) -> &'static str {
    match image.version_3 {
        Some(_) => "1.1",
        None => "0.10",
    }
}

const fn compression(image: &ImageInfo) -> &'static str {
    match image.compression {
        Compression::Zlib => "zlib",
        Compression::Zstd => "zstd",
    }
}

const fn format_name(qcow2: Option<&ImageInfo>) -> &'static str {
    match qcow2 {
        Some(_) => "qcow2",
        None => "raw",
    }
}

/// For people.
pub(crate) fn human(layers: &[Described]) -> String {
    let layers: Vec<String> = layers.iter().map(layer).collect();
    layers.join("\n\n")
}

fn layer(described: &Described) -> String {
    let view = &described.view;
    let mut lines = vec![
        format!("image: {}", described.path.display()),
        format!("file format: {}", format_name(view.qcow2.as_ref())),
        format!("virtual size: {}", exactly(view.virtual_size_bytes)),
        disk_size(&described.file),
    ];
    if let Some(image) = &view.qcow2 {
        add_image(&mut lines, image, &described.path);
    }
    lines.push("Child node '/file':".to_owned());
    add_file(&mut lines, &described.file);
    lines.join("\n")
}

fn add_image(lines: &mut Vec<String>, image: &ImageInfo, path: &Path) {
    if image.encrypted {
        lines.push("encrypted: yes".to_owned());
    }
    lines.push(format!("cluster_size: {}", image.cluster_bytes));
    if image.dirty {
        lines.push("cleanly shut down: no".to_owned());
    }
    if let Some(backing) = &image.backing_file {
        let full = beside(path, backing);
        let actual = match full == *backing {
            true => String::new(),
            false => format!(" (actual path: {full})"),
        };
        lines.push(format!("backing file: {backing}{actual}"));
        if let Some(format) = &image.backing_format {
            lines.push(format!("backing file format: {format}"));
        }
    }
    if !image.snapshots.is_empty() {
        lines.push(snapshots_human(&image.snapshots));
    }
    lines.push("Format specific information:".to_owned());
    let mut fact = |text: String| lines.push(format!("    {text}"));
    fact(format!("compat: {}", compat(image)));
    fact(format!("compression type: {}", compression(image)));
    if let Some(info) = &image.version_3 {
        fact(format!("lazy refcounts: {}", info.lazy_refcounts));
        if !info.bitmaps.is_empty() {
            fact("bitmaps:".to_owned());
        }
        for (index, bitmap) in info.bitmaps.iter().enumerate() {
            fact(format!("    [{index}]:"));
            fact("        flags:".to_owned());
            for (index, flag) in flags(bitmap).iter().enumerate() {
                fact(format!("            [{index}]: {flag}"));
            }
            fact(format!("        name: {}", bitmap.name));
            fact(format!("        granularity: {}", bitmap.granularity_bytes));
        }
    }
    fact(format!("refcount bits: {}", image.refcount_bits));
    if let Some(info) = &image.version_3 {
        if let Some(name) = &info.data_file {
            fact(format!("data file: {name}"));
        }
        if let Some(is_raw) = info.data_file_raw {
            fact(format!("data file raw: {is_raw}"));
        }
        fact(format!("corrupt: {}", info.corrupt));
        fact(format!("extended l2: {}", info.extended_l2));
    }
}

/// The list of snapshots for people; empty if there are none.
pub(crate) fn snapshots_human(snapshots: &[SnapshotInfo]) -> String {
    if snapshots.is_empty() {
        return String::new();
    }
    let titles = ["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"];
    let mut lines = vec!["Snapshot list:".to_owned(), snapshot_line(titles)];
    lines.extend(snapshots.iter().map(|snapshot| {
        snapshot_line([
            &snapshot.id,
            &snapshot.name,
            &rounded(snapshot.vm_state_bytes),
            &date(snapshot.date_seconds),
            &clock(snapshot.vm_clock_nanoseconds),
            &snapshot
                .icount
                .map_or("--".to_owned(), |count| count.to_string()),
        ])
    }));
    lines.join("\n")
}

/// The same for programs: the member `snapshots` of what `info` prints.
pub(crate) fn snapshots_json(snapshots: &[SnapshotInfo]) -> String {
    indented(&snapshots.iter().map(snapshot).collect())
}

fn add_file(lines: &mut Vec<String>, file: &ImageView) {
    let mut fact = |text: String| lines.push(format!("    {text}"));
    fact(format!("filename: {}", file.filename));
    fact(format!("protocol type: {}", file.format));
    fact(format!("file length: {}", exactly(file.virtual_size_bytes)));
    fact(disk_size(file));
    if let Some(FormatSpecific::File {
        extent_size_hint: Some(hint),
    }) = &file.format_specific
    {
        fact("Format specific information:".to_owned());
        fact(format!("    extent size hint: {hint}"));
    }
}

fn disk_size(file: &ImageView) -> String {
    match file.actual_size_bytes {
        Some(bytes) => format!("disk size: {}", rounded(bytes)),
        None => "disk size: unavailable".to_owned(),
    }
}

fn snapshot_line([id, tag, size, date, clock, icount]: [&str; 6]) -> String {
    format!("{id:<7} {tag:<16} {size:>8} {date:>19} {clock:>15} {icount:>10}")
}

/// Where a name in an image leads, seen from here: a relative one is beside the image.
pub(crate) fn beside(image: &Path, name: &str) -> String {
    let is_protocol = name
        .find([':', '/'])
        .is_some_and(|place| name[place..].starts_with(':'));
    let image = image.to_string_lossy();
    match image.rfind('/') {
        Some(slash) if !is_protocol && !name.starts_with('/') => {
            format!("{}{name}", &image[..=slash])
        }
        _ => name.to_owned(),
    }
}

/// `1 MiB (1048576 bytes)`.
pub(crate) fn exactly(bytes: u64) -> String {
    format!("{} ({bytes} bytes)", rounded(bytes))
}

/// Three digits that count, in the unit that leaves less than 1000 before the point, as QEMU shows sizes.
pub(crate) fn rounded(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    let mut value = bytes as f64;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let shown = match value {
        // Nothing but 0 is below 0.97.
        0.5..1.0 => format!("{value:.3}"),
        0.0..10.0 => format!("{value:.2}"),
        10.0..100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    };
    let shown = match shown.contains('.') {
        true => shown.trim_end_matches('0').trim_end_matches('.'),
        false => &shown,
    };
    // As C prints three digits of it.
    let shown = if shown == "1000" { "1e+03" } else { shown };
    format!("{shown} {}", UNITS[unit])
}

/// Day and time in UTC.
fn date(seconds: u32) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days are counted from March on, so that the leap day is the last of its year.
    let days = days + 719_468;
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year_of_era + u32::from(month <= 2);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    format!(
        "{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{:02}",
        second % 60
    )
}

/// Hours, minutes, seconds and milliseconds.
fn clock(nanoseconds: u64) -> String {
    let seconds = nanoseconds / NANOSECONDS;
    format!(
        "{:04}:{:02}:{:02}.{:03}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        nanoseconds / 1_000_000 % 1000
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits() {
        for (bytes, expected) in [
            (0, "0 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (221_184, "216 KiB"),
            (459_264, "448 KiB"),
            (1_000_000, "977 KiB"),
            (1023 << 10, "0.999 MiB"),
            (100 << 30, "100 GiB"),
            (12_345_678, "11.8 MiB"),
        ] {
            assert_eq!(rounded(bytes), expected, "{bytes}");
        }
    }

    #[test]
    fn dates_and_clocks() {
        assert_eq!(date(0), "1970-01-01 00:00:00");
        assert_eq!(date(951_782_400), "2000-02-29 00:00:00");
        assert_eq!(date(1_795_678_777), "2026-11-26 07:39:37");
        assert_eq!(date(u32::MAX), "2106-02-07 06:28:15");
        assert_eq!(clock(0), "0000:00:00.000");
        assert_eq!(clock(3_723_004_000_000), "0001:02:03.004");
    }

    #[test]
    fn names_are_beside_the_image() {
        for (image, name, expected) in [
            ("a.qcow2", "b", "b"),
            ("x/a.qcow2", "b", "x/b"),
            ("/x/a.qcow2", "../b", "/x/../b"),
            ("x/a.qcow2", "/b", "/b"),
            ("x/a.qcow2", "nbd:host", "nbd:host"),
            ("x/a.qcow2", "./nbd:host", "x/./nbd:host"),
        ] {
            assert_eq!(beside(Path::new(image), name), expected);
        }
    }
}
