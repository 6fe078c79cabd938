//! Tells systemd, or whoever set `NOTIFY_SOCKET`, how the listener is. Where nobody did, nothing is sent.
//!
//! ```text
//!   waits for a driver   STATUS=…, EXTEND_TIMEOUT_USEC=…      so that the start is not given up meanwhile
//!   hears its own dial   READY=1, STATUS=…
//!   every half WATCHDOG_USEC   WATCHDOG=1                     from the one loop that also accepts
//!   is told to end       STOPPING=1
//! ```
//!
//! Best effort, and never waited for: a service manager that hangs is no reason not to serve. That is why the few bytes are sent
//! from here: the usual crate for it waits for room in the manager's queue.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt as _;
use std::time::{Duration, Instant};

use rustix::io::{self, Errno};
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sendto, socket_with};

/// What is between us and a service manager, to be kept from sessions and workloads.
pub(super) const ENVIRONMENT: [&str; 6] =
    ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"];

/// The service manager, where there is one.
#[derive(Debug)]
pub(super) struct Manager {
    /// Its socket: a path, or behind an `@` an abstract name.
    socket: Option<OsString>,
    /// How often it wants to hear from us, and when next.
    watchdog: Option<(Duration, Instant)>,
    ready: bool,
    status: String,
}

impl Manager {
    pub(super) fn new(now: Instant) -> Self {
        let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
        let ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let limit = number("WATCHDOG_USEC").filter(|&limit| ours && limit > 1).map(Duration::from_micros);
        Self {
            socket: std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()),
            watchdog: limit.map(|limit| (limit / 2, now)),
            ready: false,
            status: String::new(),
        }
    }

    /// Says that it lives, where that is due; gives when it is due again.
    pub(super) fn tick(&mut self, now: Instant) -> Option<Instant> {
        let (every, due) = self.watchdog?;
        if now < due {
            return Some(due);
        }
        self.watchdog = Some((every, now + every));
        self.send("WATCHDOG=1\n");
        Some(now + every)
    }

    /// Says how things are, where that changed, and the first time that all is well that it is ready.
    pub(super) fn tell(&mut self, ready: bool, status: &str) {
        // A line each: what is in a path must not become another.
        let status = status.replace('\n', " ");
        let ready = ready && !self.ready;
        if ready {
            self.ready = true;
            self.send(&format!("READY=1\nSTATUS={status}\n"));
        } else if status != self.status {
            self.send(&format!("STATUS={status}\n"));
        }
        self.status = status;
    }

    /// Asks to be waited for that much longer, unless it is ready.
    pub(super) fn ask_for(&self, time: Duration) {
        if !self.ready {
            self.send(&format!("EXTEND_TIMEOUT_USEC={}\n", time.as_micros()));
        }
    }

    /// Says that the end has begun.
    pub(super) fn stopping(&mut self) {
        self.watchdog = None;
        self.send("STOPPING=1\n");
    }

    fn send(&self, text: &str) {
        if let Some(name) = &self.socket {
            let _ = send(name.as_bytes(), text.as_bytes());
        }
    }
}

fn send(name: &[u8], text: &[u8]) -> io::Result<usize> {
    let address = match name {
        [b'@', name @ ..] => SocketAddrUnix::new_abstract_name(name)?,
        [b'/', ..] => SocketAddrUnix::new(name)?,
        _ => return Err(Errno::AFNOSUPPORT),
    };
    let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    sendto(socket, text, SendFlags::DONTWAIT | SendFlags::NOSIGNAL, &address)
}
