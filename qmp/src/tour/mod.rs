//! `blockyard tour`: every kind of job that exists, once, on a daemon of its own, with every result read and compared.
//!
//! A new kind of job is one more file in `steps` and its line in the table there.

pub mod compare;
pub mod daemon;
pub mod files;
pub mod guide;
pub mod scratch;
pub mod stage;
pub mod steps;
