//! Opening qcow2 images: what QEMU makes is understood, what QEMU refuses is refused, whatever the bytes.
#![forbid(unsafe_code)]

mod headers;
mod oracle;
