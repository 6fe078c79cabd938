//! `pika-guest serve`: one loop that accepts, checks who it is, and forks a process for each session.
//!
//! ```text
//!   vsock 20555 ─┐                                   ┌─► session ──► files ◄── verbs, supervisors
//!   UNIX socket ─┼─► poll ── accept ── peer? ── fork ┼─► session
//!   signals ─────┤                                   └─► …                 at most MAX_SESSIONS
//!   timers ──────┘ retry, rest, watchdog
//! ```
//!
//! It reads no byte of any connection and holds no state that matters: sessions find everything in the files, which it begins
//! before it listens. So whatever kills it, the next one goes on where it was, and supervisors and workloads, which belong to
//! nobody's session, do not notice. It has one thread, and with nothing to do it sleeps in `poll` without a deadline.
//!
//! What can go wrong with a listener: `listen.rs`. With a session: `sessions.rs`. A peer that is silent or gone, as after a
//! restored snapshot, is the session's own to notice (`session/core.rs`).
//!
//! It runs in the foreground and says what it has to say on standard error, under any init; it needs `/proc`. Files for three of
//! them are in `init/`. Under systemd the unit needs
//!
//! ```text
//!   Type=notify          READY=1 comes once it has heard itself
//!   KillMode=process     only the listener is told to end: sessions end by themselves, and workloads that are in the unit's group,
//!                        since no unit of their own starts supervisors (`supervise/handover.rs`), live on
//!   OOMPolicy=continue   a workload that dies for memory does not end the unit
//!   WatchdogSec=30       at least 20, so that it wakes up no more often than its peers' heartbeats do
//! ```

use std::path::PathBuf;
use std::time::Instant;

use pika_cloud_common::limits::VSOCK_PORT;
use pika_cloud_common::paths;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::container;
use super::listen::{Door, LONGEST_PAUSE, Place};
use super::notify::Manager;
use super::say::say;
use super::sessions::{END_GRACE, Sessions};
use super::unix::UnixError;
use crate::ledger::Ledger;
use crate::supervise::signals::Signals;
use crate::watch::timespec;

/// Connections of one listener that are taken in one turn, so that a flood of them holds up nothing else.
const ACCEPTS_A_TURN: usize = 32;

/// It could not begin.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A UNIX socket cannot be made.
    #[error(transparent)]
    Unix(#[from] UnixError),
    /// A container, and no path.
    #[error(
        "this is a container ({0}): it has no vsock of its own, and there is nothing else to listen on. Name a UNIX socket by \
         `--unix PATH`, or do not run it: a host reaches a container by Incus exec. `--port PORT` listens on the machine's vsock \
         all the same"
    )]
    Nowhere(&'static str),
    /// Signals cannot be read.
    #[error("cannot read signals: {0}")]
    Signals(std::io::Error),
}

/// Where to listen: on the vsock port that was asked for, else on the usual one where this machine has a vsock of its own; and at
/// `unix`.
pub fn places(port: Option<u32>, no_vsock: bool, unix: Option<PathBuf>) -> Result<Vec<Place>, ServeError> {
    let container = if no_vsock || port.is_some() { None } else { container::evidence() };
    match (container, &unix) {
        (Some(evidence), None) => return Err(ServeError::Nowhere(evidence)),
        (Some(evidence), Some(_)) => {
            say(&format!("does not listen on vsock: this is a container ({evidence}), which has none of its own"));
        }
        (None, _) => {}
    }
    let vsock = (!no_vsock && container.is_none()).then(|| Place::Vsock(port.unwrap_or(VSOCK_PORT)));
    Ok(vsock.into_iter().chain(unix.map(Place::Unix)).collect())
}

/// Listens at `places` until a signal ends it.
pub fn serve(places: Vec<Place>) -> Result<(), ServeError> {
    keep_descriptors();
    begin_files();
    let signals =
        Signals::of(&[libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGCHLD]).map_err(ServeError::Signals)?;
    let now = Instant::now();
    let doors = places.into_iter().map(Door::new).collect();
    let mut listener = Listener { doors, sessions: Sessions::default(), manager: Manager::new(now), signals };
    for door in &mut listener.doors {
        door.open_first(now)?;
    }
    listener.run();
    listener.end();
    Ok(())
}

/// Begins the contract's files before anybody can dial, as whoever comes first does: no session has to make them while its host
/// waits, and workloads that may not make them find them. What is wrong with them, each session tells its host.
fn begin_files() {
    let begun = Ledger::open().and_then(|ledger| {
        for name in [paths::LOGS_DIR, paths::ARTIFACTS_DIR] {
            ledger.folder().child_or_create(name)?;
        }
        ledger.lock().map(drop)
    });
    if let Err(error) = begun {
        say(&format!("the contract's files cannot be begun yet: {error}"));
    }
}

/// Whatever we were started with goes no further than to us.
fn keep_descriptors() {
    // SAFETY: it sets flags of descriptors and touches no memory. Best effort: kernels before 5.11 refuse.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
}

struct Listener {
    doors: Vec<Door>,
    sessions: Sessions,
    manager: Manager,
    signals: Signals,
}

impl Listener {
    fn run(&mut self) {
        loop {
            let now = Instant::now();
            let due = self.doors.iter_mut().filter_map(|door| door.tend(now)).min();
            self.tell();
            let due = due.into_iter().chain(self.manager.tick(now)).min();
            if self.wait(due) {
                return;
            }
        }
    }

    /// Says how things are.
    fn tell(&mut self) {
        let ready = self.doors.iter().all(Door::is_ready);
        let places = |ready: bool| {
            let places = self.doors.iter().filter(|door| door.is_ready() == ready);
            places.map(|door| door.place().to_string()).collect::<Vec<_>>().join(", ")
        };
        let status = match self.sessions.len() {
            _ if !ready => format!("waits for {}", places(false)),
            1 => format!("listens on {}; 1 session", places(true)),
            count => format!("listens on {}; {count} sessions", places(true)),
        };
        self.manager.tell(ready, &status);
        if !ready {
            self.manager.ask_for(2 * LONGEST_PAUSE);
        }
    }

    /// Waits for something to happen, at most until `due`, and does what follows; says whether it is to end.
    fn wait(&mut self, due: Option<Instant>) -> bool {
        let timeout = due.map(|due| timespec(due.saturating_duration_since(Instant::now())));
        let open: Vec<usize> = (0..self.doors.len()).filter(|&at| self.doors[at].fd().is_some()).collect();
        let sources: Vec<_> = open.iter().filter_map(|&at| self.doors[at].fd()).collect();
        let mut fds = vec![PollFd::new(&self.signals, PollFlags::IN)];
        fds.extend(sources.iter().map(|fd| PollFd::new(fd, PollFlags::IN)));
        if !matches!(poll(&mut fds, timeout.as_ref()), Ok(_) | Err(Errno::INTR)) {
            // For want of memory; never spin.
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        drop(sources);
        if ready[0] && self.take_signals() {
            return true;
        }
        for (&at, _) in open.iter().zip(&ready[1..]).filter(|(_, ready)| **ready) {
            self.accept(at);
        }
        false
    }

    /// Says whether one of them ends us.
    fn take_signals(&mut self) -> bool {
        let mut end = false;
        while let Some(signal) = self.signals.next() {
            end |= signal.number != libc::SIGCHLD;
        }
        self.sessions.reap(Instant::now());
        end
    }

    fn accept(&mut self, at: usize) {
        for _ in 0..ACCEPTS_A_TURN {
            let now = Instant::now();
            let Some((fd, peer)) = self.doors[at].accept(now) else { return };
            self.sessions.begin(fd, &peer, now);
        }
    }

    /// Ends listeners and sessions, and never a workload.
    fn end(mut self) {
        say("ends, with its sessions; workloads go on");
        self.manager.stopping();
        self.doors.clear();
        self.sessions.ask_to_end();
        self.reap_until(Instant::now() + END_GRACE);
        self.sessions.kill();
        self.reap_until(Instant::now() + END_GRACE);
    }

    fn reap_until(&mut self, deadline: Instant) {
        loop {
            self.sessions.reap(Instant::now());
            let left = deadline.saturating_duration_since(Instant::now());
            if self.sessions.len() == 0 || left.is_zero() {
                return;
            }
            let _ = poll(&mut [PollFd::new(&self.signals, PollFlags::IN)], Some(&timespec(left)));
            while self.signals.next().is_some() {}
        }
    }
}
