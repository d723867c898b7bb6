//! Opening qcow2 images: what QEMU makes is understood, what QEMU refuses is refused, whatever the bytes.
#![forbid(unsafe_code)]

mod asked;
mod costs;
mod extension_rows;
mod header_rows;
mod headers;
mod hostile;
mod images;
mod info;
mod oracle;
mod rows;
mod stale_bitmaps;
mod storages;
mod table_rows;
