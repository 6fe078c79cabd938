//! What the listener says to people, on standard error. It never waits for whoever reads that, and never floods them.

use std::io::Write as _;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How often the same kind of thing is said.
const INTERVAL: Duration = Duration::from_secs(60);

/// Says `what`. Where it cannot be taken at once it is lost: a log that nobody reads must not stop a listener.
pub(super) fn say(what: &str) {
    let stderr = std::io::stderr();
    let ready = poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    if ready == Ok(1) {
        let _ = stderr.lock().write_all(format!("pika-guest: {what}\n").as_bytes());
    }
}

/// Something that a peer may cause as often as it likes, and that is said once in [`INTERVAL`].
#[derive(Debug, Default)]
pub(super) struct Seldom {
    said: Option<Instant>,
    /// Since then.
    unsaid: u64,
}

impl Seldom {
    /// Says `what`, or counts it.
    pub(super) fn say(&mut self, what: &str, now: Instant) {
        if let Some(line) = self.line(what, now) {
            say(&line);
        }
    }

    fn line(&mut self, what: &str, now: Instant) -> Option<String> {
        if self.said.is_some_and(|said| now < said + INTERVAL) {
            self.unsaid += 1;
            return None;
        }
        self.said = Some(now);
        Some(match std::mem::take(&mut self.unsaid) {
            0 => what.to_owned(),
            unsaid => format!("{what} ({unsaid} more since it was last said)"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_counted() {
        let (mut seldom, now) = (Seldom::default(), Instant::now());
        assert_eq!(seldom.line("no", now).as_deref(), Some("no"));
        for _ in 0..1000 {
            assert_eq!(seldom.line("no", now + INTERVAL / 2), None);
        }
        assert_eq!(seldom.line("no", now + INTERVAL).as_deref(), Some("no (1000 more since it was last said)"));
        assert_eq!(seldom.line("no", now + 2 * INTERVAL).as_deref(), Some("no"));
    }
}
