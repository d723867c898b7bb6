//! Jobs on images: data threads, node graph, jobs and their manager.
//!
//! Layers, lowest first; a line imports only lines above it:
//! `error`, `clock`, `limits` < `throttle`, `tls` < `request`, `reply`, `event` and `job` (status, verb, progress, speed, error policy) <
//! `bitmap` (what has changed on a node) < `nbd` (what NBD's server and client share), `node` (what moves bytes, on a data thread) < `job::context`, `job::work` < `jobs` (copier, backup, mirror, create)
//! and `images` (work that is no job) <
//! `data` (the threads) < `graph` (names, edges, permissions; on the manager's thread) < `export` < `manager` < `engine`.
//!
//! No JSON here, and no type of this crate is serializable: the front-end converts by hand.
#![forbid(unsafe_code)]

mod backup;
pub mod bitmap;
mod blkdebug;
mod checkpoint;
pub mod clock;
mod create;
pub mod data;
pub mod engine;
pub mod error;
pub mod event;
mod event_loop;
mod export;
pub mod graph;
pub mod image_policy;
pub mod images;
pub mod job;
pub mod jobs;
pub mod limits;
mod manager;
pub(crate) mod manifest;
mod mirror;
pub mod nbd;
pub mod node;
mod object_spec;
mod qcow2;
pub mod reply;
pub mod request;
pub mod root_handle;
pub mod sockets;
mod state;
pub mod throttle;
pub mod tls;
mod within_chain;
