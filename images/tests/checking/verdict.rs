//! What a check says, ours and QEMU's, in one form that can be compared.

use std::cell::RefCell;
use std::rc::Rc;

use blockyard_images::qcow2::check::{CheckStop, Finding, Observer, Report, check};
use blockyard_simulator::run;
use blockyard_storage::{Buffer, LocalFuture, MemoryStorage, Storage};

use crate::oracle::Oracle;

/// Figures and lines of a check; `Err`: it came to no figures.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Verdict {
    pub(crate) report: Report,
    /// Sorted, because tables are gone through in another order.
    pub(crate) lines: Vec<String>,
}

/// Keeps all findings.
#[derive(Default)]
pub(crate) struct Listener {
    found: RefCell<Vec<Finding>>,
}

impl Observer for Listener {
    fn found(&self, findings: Vec<Finding>) -> LocalFuture<'_, ()> {
        self.found.borrow_mut().extend(findings);
        Box::pin(std::future::ready(()))
    }

    fn repaired(&self, _: u64, _: u64) -> LocalFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }

    fn progress(&self, done_bytes: u64, total_bytes: u64) {
        assert!(done_bytes <= total_bytes);
    }

    fn is_cancelled(&self) -> bool {
        false
    }
}

impl Listener {
    /// Shows every finding.
    pub(crate) fn each(&self, mut look: impl FnMut(&Finding)) {
        self.found.borrow().iter().for_each(&mut look);
    }

    /// Each finding as often as it counts, as QEMU prints it.
    pub(crate) fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for finding in self.found.borrow().iter() {
            for _ in 0..finding.times {
                lines.extend(lines_of(finding));
            }
        }
        lines
    }
}

fn lines_of(finding: &Finding) -> Vec<String> {
    use blockyard_images::qcow2::check::FindingKind::RefcountUnknown;
    let RefcountUnknown { first, clusters } = finding.kind else {
        return vec![finding.to_string()];
    };
    (first..first + clusters)
        .map(|cluster| format!("Can't get refcount for cluster {cluster}: Input/output error"))
        .collect()
}

/// A storage with these bytes.
pub(crate) fn storage(image: &[u8]) -> Rc<dyn Storage> {
    let storage = MemoryStorage::new(0);
    let written = run(storage.write(0, Buffer::copy_of(image)), || false);
    written.expect("at once").outcome.expect("written");
    Rc::new(storage)
}

/// Our check.
pub(crate) fn ours(image: &[u8]) -> Result<Verdict, String> {
    let listener = Listener::default();
    let file = storage(image);
    let report = run(check(&file, &listener), || false).expect("nothing waits");
    let report = report.map_err(|stop| match stop {
        CheckStop::Cancelled => "cancelled".to_owned(),
        CheckStop::Failed(error) => error.to_string(),
    })?;
    let mut lines = listener.lines();
    lines.sort();
    Ok(Verdict { report, lines })
}

/// QEMU's check, of the file's present content.
pub(crate) fn theirs(oracle: &Oracle, name: &str) -> Result<Verdict, String> {
    let output = oracle.run("qemu-img", &["check", "-f", "qcow2", "--output=json", name]);
    // QEMU ends this warning without a line break.
    let told = String::from_utf8_lossy(&output.stderr).replace(" to fix.", " to fix.\n");
    let json = String::from_utf8_lossy(&output.stdout).into_owned();
    if !json.contains("check-errors") {
        return Err(told);
    }
    let figure = |name: &str| {
        let found = json.split(&format!("\"{name}\": ")).nth(1);
        found.map_or(0, |text| {
            let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
            digits.parse().expect("a number")
        })
    };
    let report = Report {
        image_end_offset: figure("image-end-offset"),
        total_clusters: figure("total-clusters"),
        allocated_clusters: figure("allocated-clusters"),
        compressed_clusters: figure("compressed-clusters"),
        fragmented_clusters: figure("fragmented-clusters"),
        corruptions: figure("corruptions"),
        leaks: figure("leaks"),
        check_errors: figure("check-errors"),
    };
    let mut lines: Vec<String> = told.lines().filter(is_finding).map(str::to_owned).collect();
    lines.sort();
    Ok(Verdict { report, lines })
}

/// Whether a line is about one thing that was found, and not advice or a summary.
fn is_finding(line: &&str) -> bool {
    ![
        "qemu-img: ",
        "qcow2: ",
        "Use qemu-img amend",
        "Some clusters may be",
    ]
    .iter()
    .any(|start| line.starts_with(start))
        && !line.is_empty()
}

/// Compares two verdicts and shows where they differ.
pub(crate) fn assert_same(ours: &Verdict, theirs: &Verdict, told: &str) {
    if ours == theirs {
        return;
    }
    let only = |one: &Verdict, other: &Verdict| {
        let mut rest = other.lines.clone();
        let mut only = Vec::new();
        for line in &one.lines {
            match rest.iter().position(|other| other == line) {
                Some(place) => drop(rest.swap_remove(place)),
                None => only.push(line.clone()),
            }
        }
        only.truncate(8);
        only
    };
    panic!(
        "{told}\n ours only: {:#?}\n theirs only: {:#?}\n{:?}\n{:?}",
        only(ours, theirs),
        only(theirs, ours),
        ours.report,
        theirs.report
    );
}
