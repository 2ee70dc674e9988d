//! Ctrl-C as a flag: what runs looks at it and ends in good order. A second Ctrl-C while it is still
//! set ends the program at once.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use anyhow::Context;

/// Exit status of a program ended by SIGINT, as shells have it: 128 + 2.
const EXIT_INTERRUPTED: i32 = 130;

/// Installs the handler and returns the flag it sets.
pub fn flag() -> anyhow::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let seen = flag.clone();
    ctrlc::set_handler(move || {
        if seen.swap(true, Ordering::Relaxed) {
            exit();
        }
    })
    .context("cannot listen for Ctrl-C")?;
    Ok(flag)
}

/// Ends the program as Ctrl-C does.
pub fn exit() -> ! {
    std::process::exit(EXIT_INTERRUPTED)
}
