//! Changes of the header while the image is in use. Only its first sector changes, which no power cut tears.

use std::rc::Rc;

use blockyard_storage::{Buffer, StorageError};

use crate::error::ImageError;
use crate::qcow2::image::{Health, ImageState, Qcow2};
use crate::qcow2::layout::header::Header;
use crate::qcow2::units::Version;

/// What no power cut tears.
const SECTOR_BYTES: usize = 512;

impl Qcow2 {
    /// Changes fields of the header, on the medium when this ends.
    pub(super) async fn write_header(
        &self,
        change: impl FnOnce(&mut Header) + 'static,
    ) -> Result<(), ImageError> {
        let state = Rc::clone(&self.state);
        let done = self
            .serial
            .run(move || Box::pin(async move { state.write_header(change).await }))
            .await;
        done.unwrap_or_else(|| Err(interrupted()))
    }
}

impl ImageState {
    /// Changes fields of the header, on the medium when this ends. Nothing else may write metadata meanwhile.
    pub(super) async fn write_header(
        &self,
        change: impl FnOnce(&mut Header),
    ) -> Result<(), ImageError> {
        let mut header = self.header.borrow().clone();
        change(&mut header);
        let read = self.file.read(0, Buffer::zeroed(SECTOR_BYTES)).await;
        read.outcome?;
        let mut sector = read.buffer;
        put_fields(sector.as_mut_slice(), &header);
        self.file.write(0, sector).await.outcome?;
        self.sync().await?;
        *self.header.borrow_mut() = header;
        Ok(())
    }

    /// Makes everything durable that was written to the image file. A failure is the end of all writing.
    pub(super) async fn sync(&self) -> Result<(), ImageError> {
        self.synced(self.file.sync().await)
    }

    /// The same with the external data file.
    pub(super) async fn sync_data_file(&self) -> Result<(), ImageError> {
        match &self.data_file {
            Some(data_file) => self.synced(data_file.sync().await),
            None => Ok(()),
        }
    }

    fn synced(&self, outcome: Result<(), StorageError>) -> Result<(), ImageError> {
        let Err(error) = outcome else {
            return Ok(());
        };
        let mut health = self.health.borrow_mut();
        if *health == Health::Sound {
            *health = Health::Unflushed(error.to_string());
        }
        Err(error.into())
    }
}

/// Puts those fields there that change while an image is in use. All else stays byte for byte, whoever wrote it.
///
/// Spec: qcow2, "Header".
fn put_fields(sector: &mut [u8], header: &Header) {
    let mut put = |offset: usize, bytes: &[u8]| {
        if let Some(place) = sector.get_mut(offset..offset + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    put(24, &header.size_bytes.to_be_bytes());
    put(36, &header.l1_entries.to_be_bytes());
    put(40, &header.l1_table.0.to_be_bytes());
    put(48, &header.refcount_table.0.to_be_bytes());
    put(56, &header.refcount_table_clusters.to_be_bytes());
    if header.geometry.version() == Version::V3 {
        put(72, &header.incompatible.to_be_bytes());
        put(80, &header.compatible.to_be_bytes());
        put(88, &header.autoclear.to_be_bytes());
    }
}

/// Work that had to end did not.
pub(super) fn interrupted() -> ImageError {
    ImageError::Broken("a change of its metadata did not end".to_owned())
}
