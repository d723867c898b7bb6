//! Serves QMP to any number of clients at once: a reader, an executor and a writer per connection.

pub mod clients;
pub mod connection;
pub mod outbox;
