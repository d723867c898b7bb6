//! Bitmaps kept in images: loaded and stored, power cuts and faults at every step, images of QEMU and for QEMU, hostile ones.
#![forbid(unsafe_code)]

mod activity;
mod bits;
mod by_qemu;
mod crashes;
mod limits;
#[path = "../opening/oracle.rs"]
#[expect(dead_code, reason = "the suites use different parts of it")]
mod oracle;
mod storing;
#[path = "../checking/verdict.rs"]
#[expect(dead_code, reason = "the suites use different parts of it")]
mod verdict;
