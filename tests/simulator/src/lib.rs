//! A storage that owns its faults: pending and durable bytes, torn writes, injected errors, all from one seed.
#![forbid(unsafe_code)]
