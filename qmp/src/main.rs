//! The program: start, signals, exit codes.
#![forbid(unsafe_code)]

fn main() {}
