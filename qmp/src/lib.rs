//! The only crate that knows JSON: the QMP wire, commands, events, schema, the command line and the one-shot commands.
#![forbid(unsafe_code)]
