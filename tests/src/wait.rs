//! Waiting for a condition.

use std::time::{Duration, Instant};

/// Far beyond what anything takes on a slow machine: only a hang reaches it.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Between two looks.
const LOOK: Duration = Duration::from_millis(10);

/// Waits until `look` gives something; panics with `what` after `limit`.
pub fn until<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(began.elapsed() < limit, "not within {} s: {what}", limit.as_secs());
        std::thread::sleep(LOOK);
    }
}

/// Waits until `holds`, at most [`LIMIT`].
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    until(what, LIMIT, || holds().then_some(()));
}
