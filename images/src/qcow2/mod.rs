//! qcow2, versions 2 and 3: where guest bytes live, and room for new ones.
//!
//! Spec: the public document "qcow2" (docs/interop in QEMU's tree); section names are cited where code obeys them.

pub mod check;
pub mod compressed;
pub mod create;
pub mod layout;
pub mod units;
