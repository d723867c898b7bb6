//! The steps of the tour: one file each, and this table.

mod backup;
mod chain;
mod create;
mod failure;
mod mirror;
mod qcow2;

use std::pin::Pin;

use crate::tour::stage::{Shown, Stage, Trouble};

/// One thing that is shown.
pub struct Step {
    /// The command it is about, or a word for it.
    pub name: &'static str,
    /// What it shows.
    pub about: &'static str,
    /// Shows it. The stage is afterwards as it was before, but for files.
    pub run: for<'s, 'a> fn(&'s mut Stage<'a>) -> Running<'s>,
}

/// A step on its way.
pub type Running<'s> = Pin<Box<dyn Future<Output = Result<Shown, Trouble>> + 's>>;

/// All steps, in order.
pub static STEPS: &[Step] = &[
    create::STEP,
    backup::STEP,
    qcow2::STEP,
    chain::STEP,
    mirror::STEP,
    failure::STEP,
];
