//! Jobs on simulated disks: the real works over real nodes, with faults, orders and power cuts at every step.

mod amend;
mod backup_bitmaps;
mod backup_chains;
mod backup_stage;
mod backup_writers;
mod bitmap_operations;
mod chain;
mod chain_jobs;
mod chain_speed;
mod copy_on_read;
mod create;
mod create_qcow2;
mod create_raw;
mod faults;
mod fleecing;
mod images;
mod integrity;
mod orders;
mod power;
mod rebase;
mod writers;
mod yard;
