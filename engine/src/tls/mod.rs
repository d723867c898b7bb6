//! TLS for NBD: who we are, whom we believe, who may come in. Files are read when an object is made; what follows knows no socket:
//! a [`Session`](session::Session) takes bytes in and gives bytes out.

pub mod authorization;
pub mod certificate;
pub mod credentials;
mod der;
pub mod session;
#[cfg(test)]
pub(crate) mod session_tests;
mod verifiers;
