//! A place to listen at, through everything that can be wrong with it.
//!
//! ```text
//!             cannot listen: wait, twice as long each time
//!              ┌───┐
//!   start ──► Closed ── listens ──► Unheard ── its own dial arrives ──► Heard
//!              ▲                    │  ▲ └ not yet: dial again               │
//!              │                    └──┘                                    │
//!              └──────────────── the listener itself broke ◄────────────────┘
//! ```
//!
//! An unheard listener is served as well as any; it only does not count as ready. Where the kernel has no loopback for vsock
//! nothing can be dialled, and a listener is taken for heard.
//!
//! What goes wrong:
//!
//! - No vsock, since its driver comes late or never: `Closed`, said once, and once more when it is there. A driver that is late
//!   by some time is found after at most that time again, or [`LONGEST_PAUSE`].
//! - The UNIX path cannot be used: refused at the start with its reason, since only a person can mend it; later as with vsock.
//! - No descriptors or memory for a connection: it stays in the kernel's queue, and nothing is accepted for a pause.
//! - A peer that has gone before it was accepted: passed over.

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::fd::{AsFd as _, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{SocketAddrAny, SocketFlags, acceptfrom_with};

use super::say::say;
use super::unix::{self, Credentials, UnixError, UnixSocket};
use super::vsock;

/// Connections that wait in the kernel's queue; more are turned away by it.
const BACKLOG: i32 = 64;
/// The first wait after something failed.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// The longest one.
pub(super) const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// `AF_VSOCK`, at a port.
    Vsock(u32),
    /// A UNIX socket, at a path.
    Unix(PathBuf),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vsock(port) => write!(f, "vsock port {port}"),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

/// Who is at the other end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Peer {
    /// The machine that we run on.
    Host,
    /// Another machine, or a process of this one, over vsock.
    Stranger {
        /// The CID that it comes from.
        cid: u32,
    },
    /// A process of this machine, over the UNIX socket.
    Local(Credentials),
}

/// Waits that grow.
#[derive(Debug)]
struct Pauses(Duration);

impl Pauses {
    const NEW: Self = Self(FIRST_PAUSE);

    fn next(&mut self) -> Duration {
        let pause = self.0;
        self.0 = (pause * 2).min(LONGEST_PAUSE);
        pause
    }
}

#[derive(Debug)]
enum Listener {
    Vsock(OwnedFd),
    Unix(UnixSocket),
}

/// How many of our own dials are known by their ports: more do not wait at once, since their pauses grow.
const MAX_OWN_PORTS: usize = 16;

#[derive(Debug)]
enum State {
    Closed,
    /// With a dial of our own that is on its way, kept until one arrives.
    Unheard(Listener, Option<OwnedFd>),
    Heard(Listener),
}

/// A place, and how it is there.
#[derive(Debug)]
pub(super) struct Door {
    place: Place,
    state: State,
    /// The ports that our own dials over vsock came from, the last ones. On a slow machine a second is made before the first is
    /// accepted, and arrives after it was heard.
    own_ports: Vec<u32>,
    pauses: Pauses,
    /// When to try again what did not work.
    due: Option<Instant>,
    /// Nothing is accepted until then.
    rest_until: Option<Instant>,
    /// That it does not work was said.
    complained: bool,
}

impl Door {
    pub(super) fn new(place: Place) -> Self {
        let (state, pauses) = (State::Closed, Pauses::NEW);
        Self { place, state, own_ports: Vec::new(), pauses, due: None, rest_until: None, complained: false }
    }

    pub(super) fn place(&self) -> &Place {
        &self.place
    }

    /// Whether it listens, and has heard itself where that is possible.
    pub(super) fn is_ready(&self) -> bool {
        matches!(self.state, State::Heard(_))
    }

    /// Listens for the first time; gives an error where waiting would mend nothing.
    pub(super) fn open_first(&mut self, now: Instant) -> Result<(), UnixError> {
        if let Place::Unix(path) = &self.place {
            let listener = Listener::Unix(UnixSocket::listen_at(path, BACKLOG)?);
            self.opened(listener, now);
            return Ok(());
        }
        self.open(now);
        Ok(())
    }

    /// Does what is due; gives when something is due again.
    pub(super) fn tend(&mut self, now: Instant) -> Option<Instant> {
        if self.rest_until.is_some_and(|until| now >= until) {
            self.rest_until = None;
        }
        if self.due.is_some_and(|due| now >= due) {
            match self.state {
                State::Closed => self.open(now),
                State::Unheard(..) => self.dial_self(now),
                State::Heard(_) => self.due = None,
            }
        }
        self.due.into_iter().chain(self.rest_until).min()
    }

    /// What to wait for, unless it rests or is closed.
    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.listener().filter(|_| self.rest_until.is_none())
    }

    fn listener(&self) -> Option<BorrowedFd<'_>> {
        match &self.state {
            State::Closed => None,
            State::Unheard(listener, _) | State::Heard(listener) => Some(match listener {
                Listener::Vsock(fd) => fd.as_fd(),
                Listener::Unix(socket) => socket.fd.as_fd(),
            }),
        }
    }

    fn open(&mut self, now: Instant) {
        let opened = match &self.place {
            Place::Vsock(port) => {
                vsock::listen_on(*port, BACKLOG).map(Listener::Vsock).map_err(|errno| explain(errno).to_owned())
            }
            Place::Unix(path) => {
                UnixSocket::listen_at(path, BACKLOG).map(Listener::Unix).map_err(|error| error.to_string())
            }
        };
        match opened {
            Ok(listener) => self.opened(listener, now),
            Err(reason) => self.try_later(&format!("cannot listen on {}: {reason}", self.place), now),
        }
    }

    fn opened(&mut self, listener: Listener, now: Instant) {
        say(&format!("listens on {}", self.place));
        self.complained = false;
        self.pauses = Pauses::NEW;
        self.due = None;
        // Dials of an earlier listener went with it.
        self.own_ports.clear();
        self.state = State::Unheard(listener, None);
        self.dial_self(now);
    }

    fn dial_self(&mut self, now: Instant) {
        let State::Unheard(listener, _) = &self.state else { return };
        let dialled = match (listener, &self.place) {
            (Listener::Vsock(_), Place::Vsock(port)) => vsock::dial_self(*port),
            (Listener::Unix(socket), _) => socket.dial().map(|fd| Some((fd, 0))),
            (Listener::Vsock(_), Place::Unix(_)) => Ok(None),
        };
        match dialled {
            Ok(None) => self.heard(),
            Ok(Some((fd, port))) => {
                let again = self.due.is_some();
                if let State::Unheard(_, probe) = &mut self.state {
                    *probe = Some(fd);
                }
                if self.own_ports.len() == MAX_OWN_PORTS {
                    self.own_ports.remove(0);
                }
                self.own_ports.push(port);
                // The first one needs no word: it arrives with the next turn of the loop.
                let trouble = format!("does not hear itself on {}", self.place);
                if again { self.try_later(&trouble, now) } else { self.due = Some(now + self.pauses.next()) }
            }
            Err(errno) => self.try_later(&format!("cannot dial itself on {}: {errno}", self.place), now),
        }
    }

    fn heard(&mut self) {
        self.state = match std::mem::replace(&mut self.state, State::Closed) {
            State::Unheard(listener, _) => State::Heard(listener),
            // An earlier dial of ours arrived before.
            other => other,
        };
        self.due = None;
        self.pauses = Pauses::NEW;
        self.complained = false;
    }

    fn try_later(&mut self, trouble: &str, now: Instant) {
        if !std::mem::replace(&mut self.complained, true) {
            say(&format!("{trouble}; it is tried again until it works"));
        }
        self.due = Some(now + self.pauses.next());
    }

    /// The next connection; `None` where there is none for now. Our own dials are taken note of and passed over.
    pub(super) fn accept(&mut self, now: Instant) -> Option<(OwnedFd, Peer)> {
        loop {
            match acceptfrom_with(self.listener()?, SocketFlags::CLOEXEC) {
                Ok((fd, address)) => {
                    self.accepts_again();
                    match self.peer(&fd, address.as_ref()) {
                        Dialler::Peer(peer) => return Some((fd, peer)),
                        Dialler::Ourselves => self.heard(),
                        Dialler::Unknown => {}
                    }
                }
                Err(Errno::AGAIN) => return None,
                // Of a connection that has gone already.
                Err(Errno::INTR | Errno::CONNABORTED | Errno::CONNRESET | Errno::PROTO | Errno::TIMEDOUT) => {}
                Err(errno @ (Errno::BADF | Errno::INVAL | Errno::NOTSOCK | Errno::OPNOTSUPP)) => {
                    self.state = State::Closed;
                    self.try_later(&format!("{} can accept no more: {errno}", self.place), now);
                    return None;
                }
                // No descriptors, no memory, or whatever else: it is not tried again at once.
                Err(errno) => {
                    if !std::mem::replace(&mut self.complained, true) {
                        say(&format!("cannot accept on {}: {errno}; connections wait until it can", self.place));
                    }
                    self.rest_until = Some(now + self.pauses.next());
                    return None;
                }
            }
        }
    }

    fn accepts_again(&mut self) {
        if matches!(self.state, State::Heard(_)) {
            self.pauses = Pauses::NEW;
            if std::mem::take(&mut self.complained) {
                say(&format!("accepts on {} again", self.place));
            }
        }
    }

    fn peer(&self, fd: &OwnedFd, address: Option<&SocketAddrAny>) -> Dialler {
        let listener = match &self.state {
            State::Closed => return Dialler::Unknown,
            State::Unheard(listener, _) | State::Heard(listener) => listener,
        };
        match listener {
            Listener::Unix(_) => match unix::credentials(fd) {
                Ok(peer) if peer.pid == rustix::process::getpid().as_raw_pid() => Dialler::Ourselves,
                Ok(peer) => Dialler::Peer(Peer::Local(peer)),
                Err(_) => Dialler::Unknown,
            },
            Listener::Vsock(_) => match address.and_then(vsock::Address::read) {
                Some(address) => vsock_peer(address, &self.own_ports),
                None => Dialler::Unknown,
            },
        }
    }
}

/// Who dialled.
#[derive(Debug, PartialEq, Eq)]
enum Dialler {
    Peer(Peer),
    /// It is our own dial.
    Ourselves,
    /// The kernel does not say; not to be served.
    Unknown,
}

/// Who dialled from `address`, where our own dials come from `own_ports`.
fn vsock_peer(address: vsock::Address, own_ports: &[u32]) -> Dialler {
    match address.cid {
        vsock::CID_HOST => Dialler::Peer(Peer::Host),
        vsock::CID_LOCAL if own_ports.contains(&address.port) => Dialler::Ourselves,
        cid => Dialler::Peer(Peer::Stranger { cid }),
    }
}

fn explain(errno: Errno) -> &'static str {
    match errno {
        Errno::AFNOSUPPORT => "the kernel has no vsock (yet); its module is `vsock`",
        Errno::ADDRINUSE => "another process listens there",
        Errno::ACCESS | Errno::PERM => "no permission (ports below 1024 are root's)",
        _ => "the kernel refused",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_hosts_cid_is_the_host() {
        let from = |cid, port| vsock_peer(vsock::Address { cid, port }, &[999, 1000]);
        assert_eq!(from(2, 1000), Dialler::Peer(Peer::Host));
        assert_eq!((from(1, 999), from(1, 1000)), (Dialler::Ourselves, Dialler::Ourselves));
        for (cid, port) in [(1, 1001), (0, 1000), (3, 1000), (u32::MAX, 1000)] {
            assert_eq!(from(cid, port), Dialler::Peer(Peer::Stranger { cid }));
        }
        assert_eq!(vsock_peer(vsock::Address { cid: 1, port: 0 }, &[]), Dialler::Peer(Peer::Stranger { cid: 1 }));
    }

    #[test]
    fn what_does_not_work_is_tried_again_ever_more_rarely() {
        let begin = Instant::now();
        let mut door = Door::new(Place::Vsock(20555));
        door.open_first(begin).unwrap();
        let (mut now, mut pauses) = (begin, Vec::new());
        for _ in 0..12 {
            let due = door.tend(now).unwrap();
            pauses.push(due - now);
            now = due;
        }
        assert_eq!(pauses[..3], [FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE]);
        assert_eq!(pauses[11], LONGEST_PAUSE);
        assert!(!door.is_ready() && door.fd().is_none());
    }

    /// As where a driver comes late: the door was closed, and its first dial is no second one.
    #[test]
    fn a_door_that_opens_late_has_nothing_to_complain_of() {
        let folder = tempfile::tempdir().unwrap();
        let mut door = Door::new(Place::Unix(folder.path().canonicalize().unwrap().join("s")));
        let now = Instant::now();
        door.try_later("not yet", now);
        assert!(door.complained);
        assert!(door.tend(now + FIRST_PAUSE).is_some());
        assert!(door.fd().is_some() && !door.complained);
    }

    /// A slow machine dials a second time before it comes to accept the first dial.
    #[test]
    fn a_unix_door_hears_itself_however_often_it_dialled() {
        for is_slow in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let mut door = Door::new(Place::Unix(folder.path().canonicalize().unwrap().join("s")));
            let now = Instant::now();
            door.open_first(now).unwrap();
            if is_slow {
                door.tend(now + FIRST_PAUSE);
            }
            assert!(!door.is_ready());
            assert!(door.accept(now).is_none());
            assert!(door.is_ready(), "slow: {is_slow}");
            assert_eq!(door.tend(now), None);
        }
    }
}
