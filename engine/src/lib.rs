//! Jobs on images: data threads, node graph, jobs and their manager.
#![forbid(unsafe_code)]
