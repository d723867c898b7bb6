//! Where clients run: one thread, which leaves at once when the work is done.

/// Runs `work` to its end on this thread. A read of standard input that is still waiting then does not hold up the end.
///
/// # Errors
/// A text for the user: the kernel gives no means to wait.
pub fn run<T>(work: impl Future<Output = T>) -> Result<T, String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start: {error}"))?;
    let outcome = runtime.block_on(work);
    runtime.shutdown_background();
    Ok(outcome)
}
