//! Work on what strangers wrote, where a deep recursion, a panic or an endless loop cannot harm the caller.

use std::{
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

/// Room for the deepest recursion that bounded input can cause. Untouched stack takes no memory.
const STACK_BYTES: usize = 256 << 20;

/// For what no other limit stops.
const DEADLINE: Duration = Duration::from_secs(10);

/// Runs `work` on a thread of this name.
///
/// # Errors
/// Why there is no result.
pub(crate) fn isolated<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    let (sender, receiver) = mpsc::channel();
    let worker = move || {
        let _ = sender.send(work()); // nobody listens after the deadline
    };
    let thread = thread::Builder::new().name(name.into()).stack_size(STACK_BYTES);
    thread.spawn(worker).map_err(|e| format!("no thread to run it in: {e}"))?;
    receiver.recv_timeout(DEADLINE).map_err(|error| match error {
        RecvTimeoutError::Timeout => "takes too long".into(),
        RecvTimeoutError::Disconnected => "the engine failed on it".into(),
    })
}
