//! Images in use, moved by a small node of the test: against a plain array, on disks that fail and lose power, beside
//! `qemu-img`.

mod disk_model;
mod mover;
mod recount;
mod sequences;
mod setup;
