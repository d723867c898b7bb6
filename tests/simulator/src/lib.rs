//! A storage that owns its faults: pending and durable bytes, torn writes, injected errors, operations that end in any
//! order, all from one seed.
//!
//! A [`World`] holds any number of disks, one order of events and one power cut for all of them. Nothing ends by itself:
//! a test polls its futures ([`run`]) and calls [`World::step`] when none of them can go on. The same seed gives the same run.
//!
//! ```text
//!   future polled -> issued, its faults decided -> waits in the world
//!   step          -> one waiting operation, chosen by the seed, takes effect and ends; its bytes are visible, pending
//!   sync ends     -> what had ended before it was issued is durable
//!   power cut     -> durable bytes, and of everything pending or waiting: kept, lost or torn, each by itself
//! ```
//! Short transfers, `EINTR` and `EAGAIN` have no place here: the host's storage resolves them below the trait, so they
//! are proved in `engine/ring`.
#![forbid(unsafe_code)]

mod change;
pub mod disk;
pub mod executor;
pub mod faults;
pub mod seed;
pub mod storage;
pub mod trace;
pub mod world;

pub use disk::{Disk, DiskOptions};
pub use executor::run;
pub use faults::Fault;
pub use seed::{Seed, each_seed};
pub use storage::SimulatedStorage;
pub use world::World;
