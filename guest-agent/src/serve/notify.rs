//! Tells systemd, or whoever set `NOTIFY_SOCKET`, how the listener is. Where nobody did, nothing is sent.
//!
//! ```text
//!   waits for a driver   STATUS=…, EXTEND_TIMEOUT_USEC=…      so that the start is not given up meanwhile
//!   hears its own dial   READY=1, STATUS=…
//!   every half WATCHDOG_USEC   WATCHDOG=1                     from the one loop that also accepts
//!   is told to end       STOPPING=1
//! ```
//!
//! Best effort: a service manager that does not listen is no reason not to serve.

use std::time::{Duration, Instant};

use sd_notify::NotifyState;

/// What is between us and a service manager, to be kept from sessions and workloads.
pub(super) const ENVIRONMENT: [&str; 6] =
    ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"];

/// The service manager, where there is one.
#[derive(Debug)]
pub(super) struct Manager {
    /// How often it wants to hear from us, and when next.
    watchdog: Option<(Duration, Instant)>,
    ready: bool,
    status: String,
}

impl Manager {
    pub(super) fn new(now: Instant) -> Self {
        let every = sd_notify::watchdog_enabled().map(|limit| limit / 2).filter(|every| !every.is_zero());
        Self { watchdog: every.map(|every| (every, now)), ready: false, status: String::new() }
    }

    /// Says that it lives, where that is due; gives when it is due again.
    pub(super) fn tick(&mut self, now: Instant) -> Option<Instant> {
        let (every, due) = self.watchdog.as_mut()?;
        if now >= *due {
            *due = now + *every;
            send(&[NotifyState::Watchdog]);
        }
        Some(*due)
    }

    /// Says how things are, where that changed, and the first time that all is well that it is ready.
    pub(super) fn tell(&mut self, ready: bool, status: &str) {
        // A line each: what is in a path must not become another.
        let status = status.replace('\n', " ");
        let ready = ready && !self.ready;
        if ready {
            self.ready = true;
            send(&[NotifyState::Ready, NotifyState::Status(&status)]);
        } else if status != self.status {
            send(&[NotifyState::Status(&status)]);
        }
        self.status = status;
    }

    /// Asks to be waited for that much longer, unless it is ready.
    pub(super) fn ask_for(&self, time: Duration) {
        if !self.ready {
            send(&[NotifyState::ExtendTimeoutUsec(u32::try_from(time.as_micros()).unwrap_or(u32::MAX))]);
        }
    }

    /// Says that the end has begun.
    pub(super) fn stopping(&mut self) {
        self.watchdog = None;
        send(&[NotifyState::Stopping]);
    }
}

fn send(states: &[NotifyState<'_>]) {
    let _ = sd_notify::notify(states);
}
