//! SIGINT, SIGTERM and SIGHUP are noted, so that a task ends in order: its child first, then its private Incus.
//!
//! Nothing depends on it. Killed outright, the task is cleared up after by its [`crate::guard`]; the note only lets
//! the task wait until that is done and say so.

use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

pub(crate) const SIGHUP: i32 = 1;
pub(crate) const SIGINT: i32 = 2;
pub(crate) const SIGTERM: i32 = 15;

static FIRST: AtomicI32 = AtomicI32::new(0);
static COUNT: AtomicU32 = AtomicU32::new(0);

unsafe extern "C" {
    fn signal(number: i32, handler: extern "C" fn(i32)) -> usize;
}

extern "C" fn note(number: i32) {
    // The first one counts for the exit code; a second one means that the user is out of patience.
    let _ = FIRST.compare_exchange(0, number, Ordering::Relaxed, Ordering::Relaxed);
    COUNT.fetch_add(1, Ordering::Relaxed);
}

/// From here on the three signals are noted instead of ending the process. Programs it starts get the default back.
pub(crate) fn install() {
    for number in [SIGHUP, SIGINT, SIGTERM] {
        // SAFETY: `signal` is the C library's own, with its C signature (the handler as a function pointer, the old
        // one given back as a word that is not used), and `note` only touches atomics, which a handler may.
        unsafe { signal(number, note) };
    }
}

/// The first signal that came, if any.
pub(crate) fn pending() -> Option<i32> {
    match FIRST.load(Ordering::Relaxed) {
        0 => None,
        number => Some(number),
    }
}

/// How many signals came.
pub(crate) fn count() -> u32 {
    COUNT.load(Ordering::Relaxed)
}
