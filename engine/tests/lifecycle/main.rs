//! The life of jobs as a client of the engine sees it: every verb in every status it can be found in, the order of events,
//! both ways to end.
#![forbid(unsafe_code)]

mod groups;
mod order;
mod states;
mod yard;
