//! The kernel, fenced: io_uring and its thread-pool twin behind the one `Storage` trait.
//!
//! The only crate of the workspace with unsafe code. It knows no runtime, no image format and no job.
