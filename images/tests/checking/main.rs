//! The check of qcow2 images held against `qemu-img check`: the same findings on what QEMU makes and on every damage to it.
#![forbid(unsafe_code)]

mod damages;
mod handmade;
mod hostile;
mod images;
#[path = "../opening/oracle.rs"]
#[expect(dead_code, reason = "the suites use different parts of it")]
mod oracle;
mod random;
mod repairing;
mod verdict;
