//! The sessions that are open: a process each, of which at most [`MAX_SESSIONS`] live at once.
//!
//! ```text
//!   connection ── its peer may be served ── fork ── session ── ends ── reaped
//!                    │                       standard input and output: the connection
//!                    └ no: closed            standard error: ours      user: the peer's
//! ```
//!
//! Each does what `pika-guest stream` does over Incus exec, so that there is one session code to trust. What it allocates goes with
//! it, a fault in it ends one session, and nothing of another session can be in its memory, since the listener has nothing of any.
//! It is forked and no program is started in it: with one thread here that is sound, and a host hears it sooner. Which of two owners
//! counts, they settle among themselves, through the files (`session/source.rs`). It has no descriptor but those three.
//!
//! The host's session has our rights, and must name this machine: any process and any container of the host may dial, but only who
//! may ask Incus, or root, knows its uuid. Whoever dials the UNIX socket gets a session that runs as that user: a member of the
//! group can have of it what the files would give anyway, and cannot have a workload started as root.
//!
//! How it ends: by itself (the host closed, was silent, said what is no message); with `end {shutdown}` when the listener ends or
//! dies, whichever way; by KILL where it does not come to that within [`END_GRACE`]. Supervisors and workloads that a session
//! started are in kernel sessions of their own and outlive it.

use std::ffi::CStr;
use std::os::fd::IntoRawFd as _;
use std::time::{Duration, Instant};

use pika_cloud_common::wire::{ErrorCode, GuestMessage, SessionError};
use rustix::fd::OwnedFd;
use rustix::fs::{Gid, Uid};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use rustix::process::{self as kernel, Pid, Signal, WaitOptions};
use rustix::stdio::{dup2_stdin, dup2_stdout};
use rustix::thread::{set_name, set_thread_gid, set_thread_groups, set_thread_uid};

use super::files::Callers;
use super::listen::Peer;
use super::notify;
use super::say::{Seldom, say};
use super::stream::serve_stdio;
use super::unix::Credentials;
use crate::ledger::Ledger;
use crate::supervise::signals;

/// Sessions at once: an owner, one that is about to take over, and more observers than anybody has. Beyond it a connection is
/// told so, and closed.
pub const MAX_SESSIONS: usize = 16;
/// How many of them users of this machine may have: none of them keeps the host out.
pub const MAX_LOCAL_SESSIONS: usize = 8;
/// How long sessions have for their last words when the listener ends.
pub(super) const END_GRACE: Duration = Duration::from_secs(3);

/// Said to who is one too many.
fn too_many(limit: usize) -> Vec<u8> {
    let message =
        format!("the agent has as many sessions as it serves at once ({limit}); one must end before another can begin");
    let mut line = Vec::new();
    GuestMessage::Error(SessionError { code: ErrorCode::TooManySessions, message }).write(&mut line);
    line
}

/// An open session.
#[derive(Debug)]
struct Running {
    pid: Pid,
    /// Of a user of this machine.
    is_local: bool,
}

/// The open sessions.
#[derive(Debug, Default)]
pub(super) struct Sessions {
    running: Vec<Running>,
    refused: Seldom,
    too_many: Seldom,
    failed: Seldom,
}

impl Sessions {
    pub(super) fn len(&self) -> usize {
        self.running.len()
    }

    /// Begins a session with `peer` over `fd`, or closes it.
    pub(super) fn begin(&mut self, fd: OwnedFd, peer: &Peer, now: Instant) {
        let identity = match identity_for(peer, kernel::geteuid()) {
            Ok(identity) => identity,
            Err(reason) => return self.refused.say(&format!("refused a connection {reason}"), now),
        };
        let is_local = matches!(peer, Peer::Local(_));
        if let Some(limit) = self.full(is_local) {
            // Best effort, and never waited for: the kernel takes so little at once or not at all.
            let _ = send(&fd, &too_many(limit), SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
            return self.too_many.say(&format!("refused a connection: there are {limit} sessions"), now);
        }
        match fork(fd, peer, identity) {
            Ok(pid) => self.running.push(Running { pid, is_local }),
            Err(error) => self.failed.say(&format!("cannot begin a session: {error}"), now),
        }
    }

    /// The limit that leaves no room for one more.
    fn full(&self, is_local: bool) -> Option<usize> {
        let local = self.running.iter().filter(|session| session.is_local).count();
        if self.running.len() >= MAX_SESSIONS {
            Some(MAX_SESSIONS)
        } else {
            (is_local && local >= MAX_LOCAL_SESSIONS).then_some(MAX_LOCAL_SESSIONS)
        }
    }

    /// Takes note of all that have ended.
    pub(super) fn reap(&mut self, now: Instant) {
        loop {
            match kernel::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    let was_session = self.running.iter().position(|session| session.pid == pid);
                    if let Some(at) = was_session {
                        self.running.swap_remove(at);
                    }
                    if let (Some(_), Some(signal)) = (was_session, status.terminating_signal()) {
                        self.failed.say(&format!("a session was ended by signal {signal}"), now);
                    }
                }
                Err(Errno::INTR) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }

    /// Asks all to end.
    pub(super) fn ask_to_end(&self) {
        self.signal(Signal::TERM);
    }

    /// Ends those that did not.
    pub(super) fn kill(&self) {
        if !self.running.is_empty() {
            say(&format!("{} sessions did not end by themselves", self.running.len()));
        }
        self.signal(Signal::KILL);
    }

    fn signal(&self, signal: Signal) {
        for session in &self.running {
            // Not reaped yet, so that its number is still its own.
            let _ = kernel::kill_process(session.pid, signal);
        }
    }
}

/// Whom a session runs as, where that is not ourselves.
#[derive(Debug, PartialEq, Eq)]
struct Identity {
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
}

/// Whom a session with `peer` runs as, where we are `own`; an error says why it may have none.
fn identity_for(peer: &Peer, own: Uid) -> Result<Option<Identity>, String> {
    match peer {
        Peer::Host => Ok(None),
        Peer::Stranger { cid } => Err(format!("from vsock CID {cid}: only the host (CID 2) is served")),
        Peer::Local(Credentials { uid, .. }) if uid.is_root() || *uid == own => Ok(None),
        Peer::Local(Credentials { uid, gid, groups, .. }) if own.is_root() => {
            Ok(Some(Identity { uid: *uid, gid: *gid, groups: groups.clone() }))
        }
        Peer::Local(Credentials { uid, .. }) => {
            Err(format!("of user {}: the agent runs as user {} and cannot become another", uid.as_raw(), own.as_raw()))
        }
    }
}

/// How a session's process is called beside the listener's.
const PROCESS_NAME: &CStr = c"pika-session";

/// Forks the process of a session with `peer` over `fd`.
fn fork(fd: OwnedFd, peer: &Peer, identity: Option<Identity>) -> std::io::Result<Pid> {
    let listener = kernel::getpid();
    // SAFETY: this process has one thread, so that its child may do whatever it may.
    match unsafe { libc::fork() } {
        0 => std::process::exit(session(fd, peer, identity, listener)),
        child => Pid::from_raw(child).filter(|_| child > 0).ok_or_else(std::io::Error::last_os_error),
    }
}

/// The whole life of a session's process; gives its exit code.
fn session(fd: OwnedFd, peer: &Peer, identity: Option<Identity>, listener: Pid) -> i32 {
    if let Err(error) = leave_listener(fd, identity, listener) {
        say(&format!("a session could not begin: {error}"));
        return 1;
    }
    let callers = if *peer == Peer::Host { Callers::Knowing } else { Callers::All };
    serve_stdio(&Ledger::root_path(), callers);
    0
}

/// Keeps nothing of the listener but its standard error.
fn leave_listener(fd: OwnedFd, identity: Option<Identity>, listener: Pid) -> std::io::Result<()> {
    dup2_stdin(&fd)?;
    dup2_stdout(&fd)?;
    // Closed with the others: here nothing owns a descriptor any more.
    let _ = fd.into_raw_fd();
    close_others()?;
    for name in notify::ENVIRONMENT {
        // SAFETY: nobody reads the environment meanwhile: there is one thread.
        unsafe { std::env::remove_var(name) };
    }
    let _ = set_name(PROCESS_NAME);
    if let Some(Identity { uid, gid, groups }) = identity {
        set_thread_groups(&groups)?;
        set_thread_gid(gid)?;
        set_thread_uid(uid)?;
    }
    // After the change of user, which clears it. A listener that is killed leaves no session that nobody counts.
    kernel::set_parent_process_death_signal(Some(Signal::TERM))?;
    if kernel::getppid() != Some(listener) {
        return Err(Errno::SRCH.into());
    }
    signals::unblock_all();
    Ok(())
}

/// Closes every descriptor but the standard ones.
fn close_others() -> std::io::Result<()> {
    // Listed first: the list itself is read through one of them.
    let names: Vec<_> = std::fs::read_dir("/proc/self/fd")?.flatten().map(|entry| entry.file_name()).collect();
    for number in names.iter().filter_map(|name| name.to_str()?.parse::<i32>().ok()).filter(|&number| number > 2) {
        // SAFETY: whoever owned it is the listener, which this process never becomes again: nothing of it is used or dropped.
        unsafe { libc::close(number) };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local(uid: u32) -> Peer {
        let (gid, groups) = (Gid::from_raw(uid + 1), vec![Gid::from_raw(996)]);
        Peer::Local(Credentials { pid: 7, uid: Uid::from_raw(uid), gid, groups })
    }

    #[test]
    fn a_session_has_the_rights_of_who_dialled() {
        let (root, agent) = (Uid::ROOT, Uid::from_raw(990));
        for own in [root, agent] {
            assert_eq!(identity_for(&Peer::Host, own), Ok(None));
            assert_eq!(identity_for(&local(0), own), Ok(None));
            for cid in [0, 1, 3, u32::MAX] {
                assert!(identity_for(&Peer::Stranger { cid }, own).is_err());
            }
        }
        let identity = identity_for(&local(1000), root).unwrap().unwrap();
        assert_eq!((identity.uid.as_raw(), identity.gid.as_raw()), (1000, 1001));
        assert_eq!(identity.groups, [Gid::from_raw(996)]);
        assert_eq!(identity_for(&local(990), agent), Ok(None));
        assert!(identity_for(&local(1000), agent).is_err());
    }

    #[test]
    fn users_of_the_machine_leave_room_for_the_host() {
        let session = |is_local| Running { pid: kernel::getpid(), is_local };
        let mut sessions = Sessions::default();
        sessions.running.extend((0..MAX_LOCAL_SESSIONS).map(|_| session(true)));
        assert_eq!((sessions.full(true), sessions.full(false)), (Some(MAX_LOCAL_SESSIONS), None));
        sessions.running.extend((MAX_LOCAL_SESSIONS..MAX_SESSIONS).map(|_| session(false)));
        assert_eq!((sessions.full(true), sessions.full(false)), (Some(MAX_SESSIONS), Some(MAX_SESSIONS)));
    }

    #[test]
    fn one_too_many_is_told_in_words_of_the_protocol() {
        let line = too_many(16);
        let line = line.strip_suffix(b"\n").unwrap();
        let GuestMessage::Error(error) = GuestMessage::decode(line).unwrap() else { panic!("{line:?}") };
        assert_eq!(error.code, ErrorCode::TooManySessions);
        assert!(error.message.contains("(16)"), "{}", error.message);
    }
}
