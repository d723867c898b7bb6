//! Images in use, moved by a small node of the test: against a plain array, on disks that fail and lose power, beside
//! `qemu-img`.

mod any_bytes;
mod cache;
mod cells;
mod corruption;
mod disk_model;
mod faults;
mod giving_up;
mod hostile;
mod mover;
mod mutations;
#[path = "../opening/images.rs"]
#[expect(dead_code, reason = "only whole images are wanted here")]
mod opened_images;
mod power;
mod races;
mod recount;
mod second_reader;
mod sequences;
mod setup;
mod shared;
mod snapshot;
mod snapshots;
mod yard;
