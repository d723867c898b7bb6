//! What NBD's server and client share: the way bytes of a connection take on a data thread.

pub mod channel;
