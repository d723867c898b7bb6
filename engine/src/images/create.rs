//! What can be said of a new image before a file is made for it.

use crate::error::EngineError;
use crate::images::refused;
use crate::jobs::create_qcow2::create_options;
use crate::request::CreateQcow2Spec;

/// Whether there can be such an image, as far as its files have no say in it.
///
/// # Errors
/// In QEMU's words, with what says more in brackets.
pub fn check_creation(spec: &CreateQcow2Spec) -> Result<(), EngineError> {
    create_options(spec).plan().map(drop).map_err(refused)
}
