//! Tells systemd, or whoever set `NOTIFY_SOCKET`, how the listener is. Where nobody did, nothing is sent.
//!
//! ```text
//!   waits for a driver   STATUS=…, EXTEND_TIMEOUT_USEC=…      so that the start is not given up meanwhile
//!   hears its own dial   READY=1, STATUS=…
//!   every half WATCHDOG_USEC   WATCHDOG=1                     from the one loop that also accepts
//!   is told to end       STOPPING=1
//! ```
//!
//! Never waited for: a service manager that hangs is no reason not to serve. That is why the few bytes are sent from here: the
//! usual crate for it waits for room in the manager's queue. Best effort, but for `READY=1`: one that found no room, while a
//! machine boots and all of its services speak, is said again until it did.

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
    ready: Ready,
    status: String,
}

/// Whether it was said that all is well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ready {
    NotYet,
    /// All is well, and that found no room.
    Unsaid,
    Said,
}

/// How long it takes until there may be room in the manager's queue.
const AGAIN: Duration = Duration::from_millis(500);

impl Manager {
    pub(super) fn new(now: Instant) -> Self {
        let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
        let ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let limit = number("WATCHDOG_USEC").filter(|&limit| ours && limit > 1).map(Duration::from_micros);
        Self {
            socket: std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()),
            watchdog: limit.map(|limit| (limit / 2, now)),
            ready: Ready::NotYet,
            status: String::new(),
        }
    }

    /// Says what is due; gives when something is due again, [`Manager::tell`] included.
    pub(super) fn tick(&mut self, now: Instant) -> Option<Instant> {
        let ready = (self.ready == Ready::Unsaid).then(|| now + AGAIN);
        ready.into_iter().chain(self.keep_alive(now)).min()
    }

    /// Says that it lives, where that is due; gives when it is due again.
    fn keep_alive(&mut self, now: Instant) -> Option<Instant> {
        let (every, due) = self.watchdog?;
        if now < due {
            return Some(due);
        }
        self.watchdog = Some((every, now + every));
        self.send("WATCHDOG=1\n");
        Some(now + every)
    }

    /// Says how things are, where that changed, and once all is well that it is ready.
    pub(super) fn tell(&mut self, ready: bool, status: &str) {
        // A line each: what is in a path must not become another.
        let status = status.replace('\n', " ");
        let is_news = status != self.status;
        self.status = status;
        if ready && self.ready != Ready::Said {
            let is_said = self.send(&format!("READY=1\nSTATUS={}\n", self.status));
            self.ready = if is_said { Ready::Said } else { Ready::Unsaid };
            return;
        }
        if self.ready == Ready::Unsaid {
            self.ready = Ready::NotYet;
        }
        if is_news {
            self.send(&format!("STATUS={}\n", self.status));
        }
    }

    /// Asks to be waited for that much longer, unless it is ready.
    pub(super) fn ask_for(&self, time: Duration) {
        if self.ready != Ready::Said {
            self.send(&format!("EXTEND_TIMEOUT_USEC={}\n", time.as_micros()));
        }
    }

    /// Says that the end has begun.
    pub(super) fn stopping(&mut self) {
        self.watchdog = None;
        self.send("STOPPING=1\n");
    }

    /// Whether nothing is left to be said: also where nobody listens at all.
    fn send(&self, text: &str) -> bool {
        let sent = self.socket.as_ref().map(|name| send(name.as_bytes(), text.as_bytes()));
        !matches!(sent, Some(Err(errno)) if has_no_room(errno))
    }
}

/// Whether that may be otherwise in a moment: whatever else is wrong with a socket's name, no other try mends.
const fn has_no_room(errno: Errno) -> bool {
    matches!(errno, Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM | Errno::INTR | Errno::MFILE | Errno::NFILE)
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
