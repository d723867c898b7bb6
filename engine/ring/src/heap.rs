//! The heap of the process.

/// Lets all threads share one heap; to be called before there are others.
///
/// glibc gives each thread a heap of its own, which grows by one page and one system call at a time and never shrinks: a
/// long QMP message then costs a call for every 4 KiB of what it becomes. Small blocks come from a cache of each thread
/// either way.
pub fn share_one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a number in the allocator; no memory is touched, and no other thread runs yet to see it change.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
