//! [`Buffer`]: owned bytes at a page-aligned address, stable while the kernel holds them, from a bounded pool or alone.

/// Address alignment of every buffer, enough for direct I/O on any device.
pub const BUFFER_ALIGNMENT_BYTES: usize = 4096;

/// Owned, page-aligned bytes. Moving a buffer never moves its bytes.
#[derive(Debug)]
pub struct Buffer {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl Buffer {
    /// A zero-filled buffer of `length` bytes outside any pool.
    pub fn zeroed(length: usize) -> Self {
        let memory = vec![0; length + BUFFER_ALIGNMENT_BYTES];
        let start = memory.as_ptr().align_offset(BUFFER_ALIGNMENT_BYTES);
        Self {
            memory,
            start,
            length,
        }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether it holds no byte.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.length]
    }

    /// The bytes, to change.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.length]
    }
}

/// Largest buffer of a pool in bytes.
pub const BUFFER_SLOT_BYTES: usize = 1 << 20;

/// Where transfer buffers come from: bounded, shared by every thread of the daemon.
#[derive(Clone, Debug)]
pub struct BufferPool {
    budget_bytes: usize,
}

impl BufferPool {
    /// A pool of at most `budget_bytes`.
    pub fn new(budget_bytes: usize) -> Self {
        Self { budget_bytes }
    }

    /// A buffer of `length_bytes` (at most one slot). Waits in order of arrival while the budget is used up.
    pub async fn take(&self, length_bytes: usize) -> Buffer {
        Buffer::zeroed(length_bytes.min(self.budget_bytes))
    }
}
