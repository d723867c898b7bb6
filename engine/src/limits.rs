//! Every maximum of the engine, and the asserts that relate them.

/// Bytes of all transfer buffers of the daemon together.
pub const BUFFER_BUDGET_BYTES: usize = 48 << 20;

/// Bytes of all buffers of exports together, besides [`CLIENT_OWN_BYTES`] for each connection. They have a pool of their own: a writer that
/// waits for a job's copy holds its buffer, and the copy must get one.
pub const EXPORT_BUDGET_BYTES: usize = 64 << 20;

/// Bytes of those that one connection holds at most.
pub const CLIENT_SHARE_BYTES: usize = 8 << 20;

/// Bytes of the one buffer of a connection that no other can take: what it goes on with, in pieces, where all others are taken.
pub const CLIENT_OWN_BYTES: usize = 64 << 10;

/// Connections to the NBD server at once, whatever its client allows; those beyond wait to be let in. Each has a buffer of its own,
/// 32 KiB received ahead, as much again of heads that are not sent, and 256 KiB where it is encrypted: 400 MiB for all of them. In the
/// kernel each takes 512 KiB of replies that a client on a UNIX socket does not read.
pub const CONNECTIONS_MAX: usize = 1024;

/// Requests of one connection that are carried out at once; those behind are not read yet.
pub const CLIENT_REQUESTS_MAX: usize = 16;

/// Connections whose clients have not chosen an export yet.
pub const HALF_OPEN_MAX: usize = 100;

/// Largest request a job makes, in bytes; one slot of the buffer pool.
pub const COPY_CHUNK_BYTES: u64 = 1 << 20;

/// Bytes of the transfer buffers of one filter that saves what is about to be changed. Each has its own: what it waits for may be
/// such a filter, too.
pub const CBW_BUFFERS_BYTES: usize = 8 << 20;

/// Extents asked for at once when mapping a source.
pub const STATUS_EXTENTS_MAX: usize = 256;

/// Levels of nested inline node definitions.
pub const NODE_DEPTH_MAX: usize = 32;

/// Layers of a backing chain. Requests pass from layer to layer on one stack.
pub const CHAIN_LAYERS_MAX: usize = 256;

/// Tables of all images that one command opens, in bytes: a chain of images that claim large tables must not take all memory.
/// The tables of a chain of 256 layers of 8 TiB with clusters of 64 KiB take 288 MiB.
pub const OPENED_TABLES_BYTES_MAX: u64 = 1 << 30;

/// Longest node name in bytes.
pub const NODE_NAME_BYTES_MAX: usize = 31;

/// Granularity of the length of every node, in bytes.
pub const SECTOR_BYTES: u64 = 512;

/// Largest length of a node in bytes.
pub const NODE_LENGTH_MAX: u64 = 0x7fff_ffff_c000_0000;

/// Largest alignment that a `blkdebug` node can demand, in bytes: unaligned requests are widened in memory.
pub const BLKDEBUG_ALIGN_MAX_BYTES: u64 = 1 << 20;

/// Longest file of rules of a `blkdebug` node, in bytes.
pub const FAULT_CONFIG_BYTES_MAX: usize = 64 << 10;

const _: () = assert!(CLIENT_OWN_BYTES <= CLIENT_SHARE_BYTES);
const _: () = assert!(COPY_CHUNK_BYTES as usize * 4 <= BUFFER_BUDGET_BYTES);
const _: () = assert!(COPY_CHUNK_BYTES.is_multiple_of(SECTOR_BYTES));
