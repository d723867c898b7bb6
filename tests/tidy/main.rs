//! The repository checks itself: the fences between packages, and that the documents name what is there.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};

/// Folder of a package's sources, and words that must not stand in them outside comments.
const FENCES: &[(&str, &[&str])] = &[
    (
        "images/storage/src",
        &[
            "tokio",
            "io_uring",
            "serde",
            "blockyard_ring",
            "blockyard_engine",
            "unsafe {",
        ],
    ),
    (
        "images/src",
        &[
            "tokio",
            "io_uring",
            "serde",
            "std::time",
            "std::fs",
            "unsafe {",
        ],
    ),
    (
        "nbd/src",
        &[
            "tokio",
            "io_uring",
            "serde",
            "std::time",
            "std::fs",
            "std::net",
            "std::os",
            "std::io",
            "std::thread",
            "blockyard_storage",
            "blockyard_engine",
            "unsafe {",
        ],
    ),
    (
        "engine/ring/src",
        &["tokio", "blockyard_images", "blockyard_engine", "serde"],
    ),
    (
        "engine/src",
        &["serde", "io_uring::", "unsafe {", "blockyard_qmp"],
    ),
    (
        "qmp/src",
        &[
            "blockyard_ring",
            "blockyard_storage",
            "blockyard_images",
            "dyn Node",
            "unsafe {",
        ],
    ),
    (
        "tests/simulator/src",
        &["tokio", "blockyard_ring", "blockyard_engine", "unsafe {"],
    ),
];

/// Longest source file in lines.
const LINES_MAX: usize = 700;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every source file below a folder of the repository, build results left out.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder").flatten() {
            let path = entry.path();
            let name = entry.file_name();
            if path.is_dir() && name != "target" && !name.to_string_lossy().starts_with('.') {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn packages_do_not_mention_what_is_not_theirs() {
    for (folder, words) in FENCES {
        for path in sources(&root().join(folder)) {
            for (number, line) in read(&path).lines().enumerate() {
                let code = line.split("//").next().unwrap_or("");
                for word in *words {
                    assert!(
                        !code.contains(word),
                        "{}:{}: '{word}' must not stand in {folder}",
                        path.display(),
                        number + 1
                    );
                }
            }
        }
    }
}

#[test]
fn unsafe_code_is_forbidden_everywhere_but_in_the_ring() {
    for package in [
        "images/storage/src",
        "images/src",
        "nbd/src",
        "engine/src",
        "qmp/src",
        "tests/simulator/src",
    ] {
        let path = root().join(package).join("lib.rs");
        assert!(
            read(&path).contains("#![forbid(unsafe_code)]"),
            "{}",
            path.display()
        );
    }
}

#[test]
fn every_source_file_says_what_it_is_and_stays_short() {
    for path in sources(root()) {
        let text = read(&path);
        assert!(
            text.starts_with("//!"),
            "{}: begin with its promise",
            path.display()
        );
        let lines = text.lines().count();
        assert!(
            lines <= LINES_MAX,
            "{}: {lines} lines, is it still one purpose?",
            path.display()
        );
        for stub in ["todo!", "unimplemented!", "#[ignore"] {
            let quoted = format!("\"{stub}");
            assert!(
                !text.replace(&quoted, "").contains(stub),
                "{}: {stub}: finish it or leave it out",
                path.display()
            );
        }
    }
}

#[test]
fn the_architecture_names_every_folder() {
    let document = read(&root().join("docs/ARCHITECTURE.md"));
    let mut folders: Vec<PathBuf> = sources(root())
        .into_iter()
        .filter_map(|path| path.parent().map(Path::to_owned))
        .collect();
    folders.dedup();
    for folder in folders {
        let name = folder
            .strip_prefix(root())
            .expect("below the root")
            .display()
            .to_string();
        let name = name.strip_suffix("/src").unwrap_or(&name).to_owned();
        assert!(
            document.contains(&format!("`{name}/`")),
            "docs/ARCHITECTURE.md does not name `{name}/`"
        );
    }
}

#[test]
fn the_architecture_shows_the_steps_of_the_job_machine() {
    use blockyard_engine::job::status::STEPS;
    let document = read(&root().join("docs/ARCHITECTURE.md"));
    for (from, step, to) in STEPS {
        let row = format!("| {} | {step:?} | {} |", from.name(), to.name());
        assert!(
            document.contains(&row),
            "docs/ARCHITECTURE.md lacks the row {row}"
        );
    }
    assert_eq!(
        document.matches("| Fail |").count(),
        6,
        "rows that are not steps any more"
    );
}

#[test]
fn the_compatibility_tables_hold_every_command_and_event() {
    use blockyard_qmp::{commands, schema::protocol::EVENTS};
    let document = read(&root().join("docs/COMPATIBILITY.md"));
    // The names are the odd pieces between backquotes in a row's first column.
    let rows: Vec<&str> = document
        .lines()
        .filter_map(|line| line.strip_prefix('|')?.split('|').next())
        .flat_map(|column| column.split('`').skip(1).step_by(2))
        .collect();
    let events = EVENTS.iter().map(|event| event.name);
    for name in commands::names().chain(events) {
        let count = rows.iter().filter(|row| **row == name).count();
        assert_eq!(count, 1, "rows of docs/COMPATIBILITY.md that hold `{name}`");
    }
}

/// A tool that a test asks for by name, and that `tests/run` does not install, fails that test on every fresh machine.
#[test]
fn what_tests_ask_for_is_installed_before_them() {
    let install = read(&root().join("tests/run"));
    let mut asked = 0;
    for path in sources(root()) {
        let text = read(&path);
        for call in text.split("have(\"").skip(1) {
            let mut quoted = call.split('"');
            let (tool, _, package) = (quoted.next(), quoted.next(), quoted.next());
            let (tool, package) = (tool.unwrap_or_default(), package.unwrap_or_default());
            if package.is_empty() || package.contains(char::is_whitespace) {
                continue;
            }
            asked += 1;
            assert!(
                install.contains(&format!("[{tool}]={package}\n")),
                "{}: tests/run does not install {tool} of {package}",
                path.display()
            );
        }
    }
    assert!(asked > 10, "only {asked} tools are asked for");
}
