//! Hands an accepted start to a supervisor that the init starts, outside of whatever sandbox we are in.
//!
//! ```text
//!   stream (accepted, holds the lock)              init              supervise --socket (a unit of its own)
//!     │ connects ────────────────────────────────► accepts, starts ──► its standard input is the connection
//!     │ the lock's descriptor, {version, root, start}\n ─────────────► the lock is the lock of that root?
//!     │ ◄────────────────────────────────────────────── taken\n ─────┤   (no: why, in a line)
//!     │ go\n ────────────────────────────────────────────────────────► runs it
//!     └ closes its own descriptor of the lock
//! ```
//!
//! The lock is held without a gap: by us, by the message while it is on its way, by the supervisor. Nothing is run before `go`,
//! so whatever happens, both ends know (Invariant 9):
//!
//! - We die before `go`: the supervisor reads the end, and ends. The lock is free and nothing of the run has begun: it may be
//!   accepted again.
//! - The init does not answer, or the supervisor dies, before `taken`: we still hold the lock, will never say `go`, and write
//!   down that the run failed.
//! - The supervisor dies after `go`: that is a supervisor that is gone, as everywhere.
//!
//! Every wait has the same end, [`PATIENCE`] after the first byte. Where the socket is, nothing is ever spawned instead: what we
//! spawn would be in our sandbox. A start of somebody who may not use the socket is refused before it is accepted. A host may ask
//! before a booting systemd has made the socket: where its unit is enabled, that is waited for, at most [`BOOT_PATIENCE`].

use std::ffi::OsStr;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pika_cloud_common::limits::{MAX_LINE_BYTES, PEER_TIMEOUT};
use pika_cloud_common::wire::Start;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{self, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketAddrUnix, SocketFlags, SocketType, recvmsg, sendmsg, socket_with,
};
use serde::{Deserialize, Serialize};

use crate::watch::timespec;

/// Names the socket, where it is elsewhere than in `/run/pika-guest`. Where it is set, starts go over that socket or nowhere.
pub const SOCKET_ENV: &str = "PIKA_GUEST_SUPERVISE";
/// Where the init listens for starts.
const SOCKET: &str = "/run/pika-guest/supervise.sock";

/// Of the hand-over: both ends are `pika-guest`, and need not be of one release.
const VERSION: u32 = 1;
/// How long all of it may take: less than a host waits for the next heartbeat.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a socket that an init is about to make is waited for.
const BOOT_PATIENCE: Duration = Duration::from_secs(4);
const _: () = assert!(BOOT_PATIENCE.as_secs() + PATIENCE.as_secs() < PEER_TIMEOUT.as_secs());
/// That systemd runs here, as it tells itself.
const SYSTEMD: &str = "/run/systemd/system";
/// That it is going to listen.
const ENABLED: [&str; 2] = [
    "/etc/systemd/system/sockets.target.wants/pika-guest-supervise.socket",
    "/usr/lib/systemd/system/sockets.target.wants/pika-guest-supervise.socket",
];
/// Between two looks, or two tries where the init has no room for one more connection.
const PACE: Duration = Duration::from_millis(20);
/// A start that came in a line of the session, and what stands around it.
const MAX_ORDER_BYTES: usize = 2 * MAX_LINE_BYTES;
/// Whatever is answered.
const MAX_ANSWER_BYTES: usize = 4096;
const TAKEN: &[u8] = b"taken";
const GO: &[u8] = b"go";

/// A start could not be handed over, or taken.
#[derive(Debug, thiserror::Error)]
pub enum HandOverError {
    /// It is said where the socket is, and it is not there.
    #[error("there is no {0}")]
    Missing(PathBuf),
    /// Something else is there.
    #[error("{path} is {found}, and root's socket belongs there")]
    Misplaced {
        /// Where.
        path: PathBuf,
        /// What it is.
        found: String,
    },
    /// Only root may use it.
    #[error(
        "what a host starts here is supervised by the init's units, and only root may ask them ({}): start it in a session of \
         root's, or run it yourself with `pika-guest run`",
        .0.display()
    )]
    Forbidden(PathBuf),
    /// A call failed.
    #[error("cannot {doing} {path}: {errno}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: String,
        /// Why it failed.
        errno: Errno,
    },
    /// Nothing came.
    #[error("the other end did not answer within {} s", PATIENCE.as_secs())]
    Silent,
    /// It ended.
    #[error("the other end ended without a word")]
    Gone,
    /// The supervisor does not take it.
    #[error("the supervisor says: {0}")]
    Refused(String),
    /// What came is too long.
    #[error("what came is longer than {0} bytes")]
    TooLong(usize),
    /// What came is no start, or what is to be sent cannot be written down.
    #[error("no start: {0}")]
    Malformed(#[from] serde_json::Error),
    /// The other end is of another release.
    #[error(
        "the start came in version {0} of the hand-over, this agent reads {VERSION}: the agent that serves and the one that \
         supervises are of different releases, so install one of them for both"
    )]
    Version(u32),
    /// It came without the lock.
    #[error("the start came without the supervisor's lock")]
    NoLock,
}

/// What is handed over.
#[derive(Serialize)]
struct Order<'a> {
    version: u32,
    root: &'a Path,
    start: &'a Start,
}

/// What was handed over.
#[derive(Deserialize)]
pub(super) struct Taken {
    /// Where the contract's files are.
    pub(super) root: PathBuf,
    /// What is to be run.
    pub(super) start: Start,
}

/// The init's socket, looked at and held.
#[derive(Debug)]
pub struct InitSocket {
    fd: OwnedFd,
    path: PathBuf,
}

impl InitSocket {
    /// Finds it. `None` where this init has none.
    pub fn find() -> Result<Option<Self>, HandOverError> {
        let named = std::env::var_os(SOCKET_ENV).filter(|path| !path.is_empty());
        let path = Path::new(named.as_deref().unwrap_or(OsStr::new(SOCKET)));
        let deadline = Instant::now() + BOOT_PATIENCE;
        loop {
            let found = Self::find_at(path, named.is_some());
            let is_missing = matches!(found, Ok(None) | Err(HandOverError::Missing(_)));
            if !is_missing || Instant::now() >= deadline || !is_about_to_be(Path::new("/")) {
                return found;
            }
            std::thread::sleep(PACE);
        }
    }

    fn find_at(path: &Path, must_be: bool) -> Result<Option<Self>, HandOverError> {
        let failed = |doing| io_error(doing, path);
        let fd = match fs::open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()) {
            Err(Errno::NOENT | Errno::NOTDIR) if must_be => return Err(HandOverError::Missing(path.to_owned())),
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            other => other.map_err(failed("look at"))?,
        };
        let stat = fs::fstat(&fd).map_err(failed("look at"))?;
        let own = rustix::process::geteuid();
        let misplaced = |found| Err(HandOverError::Misplaced { path: path.to_owned(), found });
        if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
            return misplaced("no socket".to_owned());
        }
        if stat.st_uid != own.as_raw() {
            return match stat.st_uid {
                0 => Err(HandOverError::Forbidden(path.to_owned())),
                uid => misplaced(format!("user {uid}'s")),
            };
        }
        Ok(Some(Self { fd, path: path.to_owned() }))
    }

    /// Hands over `start`, about the files at `root`, with the lock. When it returns without an error, a supervisor has it.
    pub(super) fn hand_over(&self, root: &Path, lock: BorrowedFd<'_>, start: &Start) -> Result<(), HandOverError> {
        let mut order = serde_json::to_vec(&Order { version: VERSION, root, start })?;
        order.push(b'\n');
        let deadline = Instant::now() + PATIENCE;
        let peer = Peer { fd: self.dial(deadline)?, deadline };
        peer.send(&order, Some(lock))?;
        let (answer, _) = peer.read_line(MAX_ANSWER_BYTES)?;
        if answer != TAKEN {
            return Err(HandOverError::Refused(String::from_utf8_lossy(&answer).into_owned()));
        }
        peer.send(&line(GO), None)
    }

    fn dial(&self, deadline: Instant) -> Result<OwnedFd, HandOverError> {
        let failed = || io_error("connect to", &self.path);
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(failed())?;
        // The very socket that was looked at, whatever its path says by now.
        let address = SocketAddrUnix::new(format!("/proc/self/fd/{}", self.fd.as_raw_fd())).map_err(failed())?;
        loop {
            match rustix::net::connect(&socket, &address) {
                Ok(()) => return Ok(socket),
                Err(Errno::AGAIN | Errno::INTR) if Instant::now() < deadline => std::thread::sleep(PACE),
                Err(errno) => return Err(failed()(errno)),
            }
        }
    }
}

/// The supervisor's end: takes what was handed over on `connection`, once `check` has found the lock to be the right one. Gives it
/// when `go` was said.
pub(super) fn take<T, E>(
    connection: BorrowedFd<'_>,
    check: impl FnOnce(&Taken, OwnedFd) -> Result<T, E>,
) -> Result<(Taken, T), E>
where
    E: From<HandOverError> + std::fmt::Display,
{
    let peer = Peer { fd: connection, deadline: Instant::now() + PATIENCE };
    let checked = read_order(&peer).map_err(E::from).and_then(|(taken, lock)| {
        let checked = check(&taken, lock)?;
        Ok((taken, checked))
    });
    match checked {
        Ok(found) => {
            peer.send(&line(TAKEN), None)?;
            let (word, _) = peer.read_line(MAX_ANSWER_BYTES)?;
            if word == GO { Ok(found) } else { Err(HandOverError::Gone.into()) }
        }
        Err(error) => {
            let text: String = error.to_string().replace('\n', " ").chars().take(MAX_ANSWER_BYTES / 8).collect();
            // Best effort: it is in our own log, too.
            let _ = peer.send(&line(text.as_bytes()), None);
            Err(error)
        }
    }
}

fn read_order<F: AsFd>(peer: &Peer<F>) -> Result<(Taken, OwnedFd), HandOverError> {
    #[derive(Deserialize)]
    struct Head {
        version: u32,
    }
    let (order, lock) = peer.read_line(MAX_ORDER_BYTES)?;
    let Head { version } = serde_json::from_slice(&order)?;
    if version != VERSION {
        return Err(HandOverError::Version(version));
    }
    Ok((serde_json::from_slice(&order)?, lock.ok_or(HandOverError::NoLock)?))
}

/// The other end of a connection, and until when it is waited for.
struct Peer<F> {
    fd: F,
    deadline: Instant,
}

impl<F: AsFd> Peer<F> {
    /// Sends all of `bytes`, a descriptor with the first of them.
    fn send(&self, mut bytes: &[u8], mut with: Option<BorrowedFd<'_>>) -> Result<(), HandOverError> {
        while !bytes.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds = with.as_slice();
            if !fds.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(fds));
            }
            match sendmsg(&self.fd, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(sent) => {
                    bytes = &bytes[sent..];
                    with = None;
                }
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT)?,
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(HandOverError::Gone),
                Err(errno) => return Err(io_error("write to", Path::new("the other end"))(errno)),
            }
        }
        Ok(())
    }

    /// Reads a line of at most `limit` bytes, and the descriptor that came with it, if one did.
    fn read_line(&self, limit: usize) -> Result<(Vec<u8>, Option<OwnedFd>), HandOverError> {
        let (mut line, mut with) = (Vec::new(), None);
        let mut block = vec![0; 16 * 1024];
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let read = match recvmsg(&self.fd, &mut [IoSliceMut::new(&mut block)], &mut control, flags) {
                Ok(message) => message.bytes,
                Err(Errno::AGAIN) => {
                    self.wait(PollFlags::IN)?;
                    continue;
                }
                Err(Errno::INTR) => continue,
                Err(Errno::CONNRESET) => return Err(HandOverError::Gone),
                Err(errno) => return Err(io_error("read from", Path::new("the other end"))(errno)),
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(fds) = message {
                    with = fds.last().or(with);
                }
            }
            if read == 0 {
                return Err(HandOverError::Gone);
            }
            line.extend_from_slice(&block[..read]);
            if line.ends_with(b"\n") {
                line.pop();
                return Ok((line, with));
            }
            if line.len() > limit {
                return Err(HandOverError::TooLong(limit));
            }
        }
    }

    fn wait(&self, what: PollFlags) -> Result<(), HandOverError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        match poll(&mut [PollFd::new(&self.fd, what)], Some(&timespec(left))) {
            Ok(0) => Err(HandOverError::Silent),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(io_error("wait for", Path::new("the other end"))(errno)),
        }
    }
}

/// Whether a systemd boots that has a socket unit to start.
fn is_about_to_be(root: &Path) -> bool {
    let is = |path: &str| root.join(path.trim_start_matches('/')).symlink_metadata().is_ok();
    is(SYSTEMD) && ENABLED.iter().any(|path| is(path))
}

fn line(text: &[u8]) -> Vec<u8> {
    [text, b"\n"].concat()
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(Errno) -> HandOverError + use<> {
    let path = path.display().to_string();
    move |errno| HandOverError::Io { doing, path, errno }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_waited_for_where_systemd_is_going_to_make_it() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path.trim_start_matches('/'));
        for wants in ENABLED {
            assert!(!is_about_to_be(root.path()));
            let wants = at(wants);
            std::fs::create_dir_all(wants.parent().unwrap()).unwrap();
            // As systemd makes it, to where the unit is in that root.
            std::os::unix::fs::symlink("/nowhere/pika-guest-supervise.socket", &wants).unwrap();
            assert!(!is_about_to_be(root.path()), "under another init");
            std::fs::create_dir_all(at(SYSTEMD)).unwrap();
            assert!(is_about_to_be(root.path()));
            std::fs::remove_file(wants).unwrap();
            assert!(!is_about_to_be(root.path()));
            std::fs::remove_dir(at(SYSTEMD)).unwrap();
        }
    }
}
