//! What the tasks tell while they work: one plain line a step, with the seconds since the start, on standard error.
//!
//! A closed standard error is never a failure: the guard has to finish its work when nobody reads any more.

use std::io::{self, Write};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

static STARTED: OnceLock<SystemTime> = OnceLock::new();

/// Sets the clock that the lines show; the guard is given that of the task it guards.
pub(crate) fn start(at_millis: Option<u64>) {
    let at = at_millis.map_or_else(SystemTime::now, |millis| UNIX_EPOCH + Duration::from_millis(millis));
    // A second call changes nothing: the first start is the task's.
    let _ = STARTED.set(at);
}

/// The start as milliseconds since 1970, to hand to another process.
pub(crate) fn started_millis() -> u128 {
    STARTED.get().and_then(|at| at.duration_since(UNIX_EPOCH).ok()).unwrap_or_default().as_millis()
}

/// Tells a step.
pub(crate) fn step(text: &str) {
    let elapsed = STARTED.get().and_then(|at| at.elapsed().ok()).unwrap_or_default();
    let _ = writeln!(io::stderr(), "[{:6.1} s] {text}", elapsed.as_secs_f64());
}

/// Tells why the task stops.
pub(crate) fn error(text: &str) {
    let _ = writeln!(io::stderr(), "xtask: {text}");
}
