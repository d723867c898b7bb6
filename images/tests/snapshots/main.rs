//! Snapshots made, applied and deleted: power cuts, faults, cancellation at every step, and images that QEMU made.
#![forbid(unsafe_code)]

mod by_qemu;
mod cases;
#[path = "../amending/content.rs"]
mod content;
mod crashes;
#[path = "../amending/handmade.rs"]
mod handmade;
#[path = "../checking/images.rs"]
#[expect(dead_code, reason = "the suites use different parts of it")]
mod images;
#[path = "../opening/oracle.rs"]
#[expect(dead_code, reason = "the suites use different parts of it")]
mod oracle;
mod pacing;
mod refusals;
mod rooms;
#[path = "../checking/verdict.rs"]
#[expect(dead_code, reason = "the suites use different parts of it")]
mod verdict;
