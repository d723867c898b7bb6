//! `bench`: figures that belong together, and nothing left behind however it ends.

use std::fs;

use rustix::process::Signal;
use serde_json::Value;

use crate::place::{Loop, MIB, Place, Running, can_mount, code, complaint, events};

#[test]
fn every_round_is_measured() {
    let place = Place::new();
    for job in ["backup", "mirror"] {
        let options = [
            "--json", "--quiet", "--size", "5M", "--rounds", "3", "--job", job,
        ];
        let output = place.succeed(&[&["bench"][..], &options].concat());
        let all = events(&output.stdout);
        assert_eq!(all.len(), 1, "{all:?}");
        let end = &all[0];
        assert_eq!(
            (&end["event"], &end["job"]),
            (&"completed".into(), &job.into()),
            "{end}"
        );
        let rounds = end["rounds"].as_array().expect("a list");
        assert_eq!(rounds.len(), 3);
        for round in rounds.iter().chain([&end["median"]]) {
            let figure = |name: &str| round[name].as_f64().expect("a number");
            assert_eq!(round["bytes"], 5 * MIB, "{round}");
            assert!(
                figure("seconds") > 0.0 && figure("cpu-seconds") > 0.0,
                "{round}"
            );
            assert!(figure("requests") >= 5.0, "{round}");
            assert!(figure("latency-p50-us") > 0.0, "{round}");
            assert!(
                figure("latency-p99-us") >= figure("latency-p50-us"),
                "{round}"
            );
            assert!(
                figure("latency-max-us") >= figure("latency-p99-us"),
                "{round}"
            );
            assert!(figure("peak-memory-bytes") > 0.0, "{round}");
        }
        let seconds = |round: &Value| round["seconds"].as_f64().expect("a number");
        let mut walls: Vec<f64> = rounds.iter().map(seconds).collect();
        walls.sort_by(f64::total_cmp);
        assert_eq!(seconds(&end["median"]), walls[1]);
        assert!(end["source-file-system"].is_string(), "{end}");
    }
    assert!(place.names().is_empty(), "{:?}", place.names());
}

#[test]
fn people_get_a_table() {
    let place = Place::new();
    let output = place.succeed(&[
        "bench",
        "--size",
        "3M",
        "--rounds",
        "2",
        "--cache",
        "writeback",
    ]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 5, "{text}");
    assert!(lines[0].starts_with("backup of 3.0 MiB in '.' ("), "{text}");
    assert!(lines[0].contains("page cache"), "{text}");
    let first: Vec<&str> = lines
        .iter()
        .skip(1)
        .map(|line| line.split(' ').next().expect("a word"))
        .collect();
    assert_eq!(first, ["round", "1", "2", "median"]);
}

#[test]
fn named_files_are_measured_and_kept() {
    let place = Place::new();
    let bytes = place.data("source", 2 * MIB + 7);
    place.succeed(&["bench", "--rounds", "2", "source", "target"]);
    assert!(place.read("target") == bytes);
    place.fail(
        &["bench", "source", "target"],
        "'target' exists already; --force",
    );
    place.fail(
        &["bench", "--force", "source", "source"],
        "are the same file",
    );
    place.succeed(&["bench", "--force", "--rounds", "1", "source", "target"]);
    assert!(place.read("target") == bytes && place.read("source") == bytes);
    assert_eq!(place.names(), ["source", "target"]);
}

#[test]
fn every_round_onto_a_device_is_a_whole_copy() {
    if !can_mount() {
        return;
    }
    let place = Place::new();
    let bytes = place.data("source", 4 * MIB);
    place.data("disk", 4 * MIB + 512);
    let Some(device) = Loop::over(&place.path("disk")) else {
        return;
    };
    let output = place.succeed(&["bench", "--json", "--force", "source", &device.path]);
    let end = events(&output.stdout).pop().expect("an event");
    for round in end["rounds"].as_array().expect("a list") {
        assert!(round["requests"].as_u64() >= Some(4), "{end}");
    }
    assert!(place.read("disk")[..bytes.len()] == bytes[..]);
}

#[test]
fn nothing_stays_behind_when_it_is_cancelled() {
    let place = Place::new();
    place.data("source", 64 * MIB);
    for arguments in [
        &["bench", "--size", "64M"][..],
        &["bench", "source", "target"],
    ] {
        let running = Running::start(&place, arguments);
        running.signal(Signal::INT);
        let (code, last) = running.end();
        assert_eq!((code, &last["event"]), (130, &"cancelled".into()), "{last}");
        assert_eq!(place.names(), ["source"], "{arguments:?}");
    }
}

#[test]
fn wrong_arguments_are_told() {
    let place = Place::new();
    place.data("source", 100);
    for arguments in [
        &["source"][..],
        &["--size", "0"],
        &["--size", "much"],
        &["--rounds", "0"],
        &["--job", "commit"],
        &["--force"],
        &["--size", "1M", "source", "target"],
    ] {
        let output = place.run(&[&["bench"][..], arguments].concat());
        assert_eq!(code(&output), 2, "{arguments:?}: {}", complaint(&output));
    }
    fs::write(place.path("file"), "").expect("written");
    place.fail(
        &["bench", "--directory", "file"],
        "cannot use 'file': Not a directory",
    );
    place.fail(
        &["bench", "--directory", "none"],
        "cannot use 'none': No such file or directory",
    );
    let output = place.succeed(&["bench", "--help"]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("Exit codes:"));
    assert_eq!(place.names(), ["file", "source"]);
}
