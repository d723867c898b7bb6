//! What can be said of a new image before a file is made for it.

use blockyard_images::qcow2::create::ImagePreallocation;

use crate::error::EngineError;
use crate::images::plan::BLOCK_BYTES;
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

/// What a new image takes on its file system, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NewImageRoom {
    /// Its own file, for tables.
    pub metadata_bytes: u64,
    /// Its own file, for the disk's data, as far as that is reserved.
    pub data_bytes: u64,
    /// The file that takes the disk's data instead, as far as that is reserved.
    pub data_file_bytes: u64,
}

/// What such an image takes.
///
/// # Errors
/// As [`check_creation`].
pub fn room_of_new(spec: &CreateQcow2Spec) -> Result<NewImageRoom, EngineError> {
    let options = create_options(spec);
    let creation = options.plan().map_err(refused)?;
    let (plan, preallocation) = (creation.plan(), creation.preallocation());
    let is_reserved = preallocation >= ImagePreallocation::Falloc;
    let has_data_file = options.data_file_name.is_some();
    let whole_blocks = |bytes: u64| bytes.div_ceil(BLOCK_BYTES).saturating_mul(BLOCK_BYTES);
    let reserved = |bytes: u64, where_to: bool| match is_reserved && where_to {
        true => whole_blocks(bytes),
        false => 0,
    };
    Ok(NewImageRoom {
        metadata_bytes: whole_blocks(plan.metadata().length()),
        data_bytes: reserved(plan.data().length(), !has_data_file),
        data_file_bytes: reserved(plan.data_file_bytes(), has_data_file),
    })
}
