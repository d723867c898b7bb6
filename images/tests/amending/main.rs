//! Amending held against `qemu-img amend`, and whatever can happen on the way.
#![forbid(unsafe_code)]

mod by_qemu;
mod content;
mod crashes;
mod handmade;
#[path = "../checking/images.rs"]
#[expect(dead_code, reason = "the suites use different parts of it")]
mod images;
#[path = "../opening/oracle.rs"]
#[expect(dead_code, reason = "the suites use different parts of it")]
mod oracle;
mod pacing;
#[path = "../checking/verdict.rs"]
#[expect(dead_code, reason = "the suites use different parts of it")]
mod verdict;
