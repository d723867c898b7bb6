//! Objects as clients describe them, and values that they give to properties, as plain data.

use crate::error::EngineError;
use crate::event_loop::EventLoopSpec;
use crate::throttle::limits::{LimitsChange, NewLimits};

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
}

/// A value that a client gives to a property, as each of the types it might be wanted as, or why it is none.
#[derive(Clone, Debug, PartialEq)]
pub struct GivenValue {
    /// A number.
    pub int: Result<i64, EngineError>,
    /// Limits of a group.
    pub limits: Result<Box<LimitsChange>, EngineError>,
}
