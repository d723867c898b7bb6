//! Bytes to values and back, as QMP has them: a streaming reader with QEMU's extensions, errors and limits, and its form
//! of output.

pub mod lexer;
pub mod output;
pub mod reader;
