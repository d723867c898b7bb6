//! A peer that may say anything, to a server and to a client, as the tests of `nbd/tests/conversations/` do.
//!
//! ```text
//! mkdir -p corpus/peer
//! BLOCKYARD_CORPUS=$PWD/corpus/peer cargo test -p blockyard-nbd sound_conversations --manifest-path ../../Cargo.toml
//! cargo +nightly fuzz run peer -- -max_len=8192 -rss_limit_mb=512 -timeout=5
//! ```
//! What it found is tried again with `BLOCKYARD_FOUND=$PWD/artifacts/peer`.
#![no_main]

#[path = "../../tests/conversations/any_bytes.rs"]
mod any_bytes;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| any_bytes::try_everything(bytes));
