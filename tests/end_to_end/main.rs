//! The built daemon, driven from outside: over sockets, by real clients, and side by side with qemu-storage-daemon.
#![forbid(unsafe_code)]

mod abuse;
mod amend;
mod bench;
mod blkdebug;
mod chains;
mod check;
mod client;
mod client_tools;
mod command_line;
mod connections;
mod create_qcow2;
mod create_raw;
mod daemon;
mod flows;
mod host_device;
mod image_commands;
mod image_names;
mod images;
mod lifetimes;
mod locks;
mod long_chains;
mod mutations;
mod nodes;
mod normal;
mod one_shot;
mod oracle;
mod place;
mod python_client;
mod schema;
mod script;
mod tools;
mod tour;
mod verbs;
mod wire;
mod without_ring;
