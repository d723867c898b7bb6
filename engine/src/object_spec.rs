//! Objects as clients describe them, and values that they give to properties, as plain data.

use crate::error::EngineError;
use crate::event_loop::EventLoopSpec;
use crate::throttle::limits::{LimitsChange, NewLimits};
use crate::tls::authorization::{Authorization, Rule};
use crate::tls::credentials::X509Spec;

/// An object to create.
#[derive(Clone, Debug, PartialEq)]
pub struct ObjectSpec {
    /// Its id.
    pub id: String,
    /// Its type and properties.
    pub kind: ObjectKind,
}

/// The object types there are.
#[derive(Clone, Debug, PartialEq)]
pub enum ObjectKind {
    /// A data thread.
    Iothread(EventLoopSpec),
    /// Nodes that share limits.
    ThrottleGroup(Box<NewLimits>),
    /// Certificates and keys.
    X509(Box<X509Spec>),
    /// Another kind of secrets for TLS, by the name of its type. It is refused.
    OtherCredentials(&'static str),
    /// Who may come in.
    Authorization(Authorization),
}

/// A value that a client gives to a property, as each of the types it might be wanted as, or why it is none.
#[derive(Clone, Debug, PartialEq)]
pub struct GivenValue {
    /// A number.
    pub int: Result<i64, EngineError>,
    /// A string.
    pub text: Result<String, EngineError>,
    /// Limits of a group.
    pub limits: Result<Box<LimitsChange>, EngineError>,
    /// Rules of who may come in.
    pub rules: Result<Vec<Rule>, EngineError>,
}
