//! An image whose bytes may be anything: opened, read, checked, repaired, written, as the tests of `images/tests/in_use/` do.
//!
//! ```text
//! mkdir corpus/image
//! BLOCKYARD_CORPUS=$PWD/corpus/image cargo test -p blockyard-images sound_images --manifest-path ../../Cargo.toml
//! cargo +nightly fuzz run image -- -max_len=262144 -rss_limit_mb=512 -timeout=20
//! ```
//! What it found is tried again with `BLOCKYARD_FOUND=$PWD/artifacts/image`. Without `cargo fuzz`, its flags do the same: `RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4
//! -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table" cargo +nightly run --release
//! --target x86_64-unknown-linux-gnu -- corpus/image -max_len=262144`.
#![no_main]

#[path = "../../tests/in_use/any_bytes.rs"]
mod any_bytes;
#[path = "../../tests/in_use/mover.rs"]
mod mover;
#[path = "../../tests/in_use/recount.rs"]
mod recount;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| any_bytes::try_everything(bytes));
