//! Bytes to documents, values to bytes, as QMP has them: a streaming reader with QEMU's extensions, errors and limits, and
//! its form of output.
//!
//! The way of a message: [`lexer`] -> [`grammar`], with [`strings`] -> [`document`], under the limits of [`reader`].

pub mod document;
pub mod grammar;
pub mod lexer;
pub mod output;
pub mod reader;
#[cfg(test)]
mod reader_tests;
pub mod strings;
