//! Signals as something to poll for: blocked for the process, read from a descriptor.

use std::io;
use std::os::fd::FromRawFd as _;

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};

/// What a supervisor passes on to its workload's process group.
const FORWARDED: [i32; 6] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2];

/// Sent to a supervisor it means KILL for the workload's process group, since KILL itself would end the supervisor.
pub fn kill_request() -> i32 {
    libc::SIGRTMIN() + 9
}

/// The number of the signal of that name, as a session may send it.
pub fn by_name(name: &str) -> Option<i32> {
    Some(match name {
        "TERM" => libc::SIGTERM,
        "INT" => libc::SIGINT,
        "HUP" => libc::SIGHUP,
        "QUIT" => libc::SIGQUIT,
        "KILL" => libc::SIGKILL,
        "USR1" => libc::SIGUSR1,
        "USR2" => libc::SIGUSR2,
        _ => return None,
    })
}

/// A signal that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// `KILL` where a supervisor was asked for that.
    pub number: i32,
    /// It came from the first process of this machine or container.
    pub from_init: bool,
}

/// Signals that are from now on read instead of delivered.
#[derive(Debug)]
pub struct Signals {
    fd: OwnedFd,
}

impl Signals {
    /// Those that a supervisor passes on.
    pub fn block() -> io::Result<Self> {
        Self::of(&[&FORWARDED[..], &[kill_request()]].concat())
    }

    /// Blocks `signals`, by their numbers in libc, for this process, which must have no other thread.
    pub fn of(signals: &[i32]) -> io::Result<Self> {
        // Whoever ignores it hands that on, and then children cannot be waited for.
        // SAFETY: it sets no handler of ours, and there is no other thread.
        unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
        let mut set = empty_set();
        for &signal in signals {
            // SAFETY: `set` is an initialised signal set; a number that is none is refused.
            unsafe { libc::sigaddset(&raw mut set, signal) };
        }
        // SAFETY: `set` is an initialised signal set; the old mask is not asked for.
        let masked = unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        // SAFETY: `set` is an initialised signal set; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if masked != 0 || fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel gave out `fd` just now, and nothing else owns it.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// The next signal that came.
    pub fn next(&self) -> Option<Received> {
        // The kernel's `signalfd_siginfo` is 128 bytes long: the number, an error, a code, the sender, each of four bytes, …
        let mut info = [0u8; 128];
        let Ok(128) = rustix::io::read(&self.fd, &mut info) else { return None };
        let word = |at: usize| i32::from_ne_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]]);
        let number = if word(0) == kill_request() { libc::SIGKILL } else { word(0) };
        Some(Received { number, from_init: word(12) == 1 })
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Lets every signal through again: what is spawned starts with an empty mask.
pub(crate) fn unblock_all() {
    let set = empty_set();
    // SAFETY: `set` is an initialised signal set; the old mask is not asked for. Async-signal-safe.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut()) };
}

fn empty_set() -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the whole set.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        set.assume_init()
    }
}
