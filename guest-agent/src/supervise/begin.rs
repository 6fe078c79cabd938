//! How the supervisor of an accepted start begins: by the init where that listens for starts, else as our own child.
//!
//! ```text
//!   accepted ── the init's socket? ── yes ──► handed over (`handover.rs`)
//!                                  └─ no  ──► spawned: our own binary, detached, the lock inherited, the start in memory
//! ```
//!
//! Whoever begins it keeps its own descriptor of the lock until that is done, and writes the terminal event where it cannot be.

use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use pika_cloud_common::wire::Start;
use pika_cloud_common::{State, paths};
use rustix::fd::{AsFd as _, FromRawFd as _, OwnedFd};
use rustix::fs::{FlockOperation, MemfdFlags, Mode, OFlags};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::process::setsid;
use serde_json::json;

use super::handover::{self, HandOverError, InitSocket};
use super::job::{Job, run_job};
use super::signals;
use crate::ledger::{self, Draft, FileLock, Ledger, LedgerError, SUPERVISOR_LOCK, What};

/// No supervisor could be had.
#[derive(Debug, thiserror::Error)]
pub enum BeginError {
    /// Our own program could not be started.
    #[error("the supervisor could not be started: {0}")]
    Spawn(#[from] std::io::Error),
    /// The init's socket did not do.
    #[error(
        "the supervisor could not be started: {0}; see `systemctl status pika-guest-supervise.socket` and `journalctl --unit \
         'pika-guest-supervise@*'`"
    )]
    HandOver(#[from] HandOverError),
}

/// What was handed over cannot be supervised.
#[derive(Debug, thiserror::Error)]
pub enum SuperviseError {
    /// The files could not be used.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// Nothing that can be run came.
    #[error(transparent)]
    HandOver(#[from] HandOverError),
}

/// Has an accepted start supervised. Gives the supervisor where it is a child of ours.
pub fn begin(
    socket: Result<Option<InitSocket>, HandOverError>,
    root: &Path,
    lock: &FileLock,
    start: &Start,
) -> Result<Option<Child>, BeginError> {
    match socket? {
        Some(socket) => Ok(socket.hand_over(root, lock.as_fd(), start).map(|()| None)?),
        None => Ok(spawn(root, lock, start).map(Some)?),
    }
}

/// Ends a run that nobody could be had for. The lock is still ours, so that it is nobody else's.
pub fn give_up(ledger: &Ledger, _lock: &FileLock, error: &BeginError) -> Result<(), LedgerError> {
    let details = Some(json!({ "exit_code": 126 }));
    let failed = Draft { what: What::State(State::Failed), message: error.to_string(), details };
    match ledger.lock()?.append_one(failed) {
        // The next writer or stream mends what does not follow from it yet; and whoever said the last word has said it.
        Ok(_) | Err(LedgerError::NotDerived { .. } | LedgerError::AlreadyTerminal { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Starts our own binary, detached, with the lock. What it is to run goes through memory that only the two can see: neither
/// arguments nor environment nor a file name it.
fn spawn(root: &Path, lock: &FileLock, start: &Start) -> std::io::Result<Child> {
    let text = serde_json::to_vec(start)?;
    let memory = rustix::fs::memfd_create(c"pika-guest-start", MemfdFlags::CLOEXEC)?;
    ledger::write_all(&memory, &text)?;
    rustix::fs::seek(&memory, rustix::fs::SeekFrom::Start(0))?;
    let number = lock.as_fd().as_raw_fd().to_string();
    let mut command = Command::new("/proc/self/exe");
    command.arg0("pika-guest").arg("supervise").arg("--lock-fd").arg(number);
    command.env(paths::ROOT_ENV, root).current_dir("/");
    command.stdin(Stdio::from(memory)).stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: both are async-signal-safe, and nothing is allocated.
    unsafe {
        command.pre_exec(|| {
            signals::unblock_all();
            Ok(setsid().map(|_| ())?)
        });
    }
    // Without CLOEXEC meanwhile: this process has one thread, so nothing else is spawned.
    fcntl_setfd(lock, FdFlags::empty())?;
    let child = command.spawn();
    let _ = fcntl_setfd(lock, FdFlags::CLOEXEC);
    child
}

/// The supervisor that was spawned: runs what it was given to its end; gives the workload's exit code.
pub fn supervise_spawned(ledger: &Ledger, lock_fd: i32) -> Result<i32, LedgerError> {
    // SAFETY: F_SETFD touches no memory; on a number that is not open it fails.
    if lock_fd <= 2 || unsafe { libc::fcntl(lock_fd, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return Err(not_the_lock(ledger)(Errno::BADF));
    }
    // SAFETY: it is open, as was just seen; whoever started us opened it for us, and nothing else here uses it.
    let lock = take_over(ledger, unsafe { OwnedFd::from_raw_fd(lock_fd) })?;
    let start = serde_json::from_reader(std::io::stdin().lock())
        .map_err(|source| LedgerError::Malformed { path: "standard input".into(), source })?;
    run_job(ledger, lock, &Job::of(start))
}

/// The supervisor that an init started, with a connection for its standard input: runs what is handed over to its end.
pub fn supervise_handed_over() -> Result<(), SuperviseError> {
    let (taken, (ledger, lock)) = handover::take(std::io::stdin().as_fd(), |taken, lock| {
        let ledger = Ledger::open_at(&taken.root)?;
        let lock = take_over(&ledger, lock)?;
        Ok::<_, SuperviseError>((ledger, lock))
    })?;
    close_stdin();
    run_job(&ledger, lock, &Job::of(taken.start))?;
    Ok(())
}

/// Nobody is at the other end any more. Best effort: what it would keep is a connection that nobody reads.
fn close_stdin() {
    if let Ok(null) = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
        let _ = rustix::stdio::dup2_stdin(&null);
    }
}

/// The descriptor, where it holds the supervisor's lock.
fn take_over(ledger: &Ledger, lock: OwnedFd) -> Result<OwnedFd, LedgerError> {
    let failed = || not_the_lock(ledger);
    let given = rustix::fs::fstat(&lock).map_err(failed())?;
    let (_, own) = ledger.folder().open_or_create_file(SUPERVISOR_LOCK, OFlags::RDWR)?;
    if (given.st_dev, given.st_ino) != (own.st_dev, own.st_ino) {
        return Err(failed()(Errno::BADF));
    }
    // It is held already; one that is not, and that another holds, is refused.
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(failed())?;
    Ok(lock)
}

fn not_the_lock(ledger: &Ledger) -> impl FnOnce(Errno) -> LedgerError + use<> {
    LedgerError::io("take over", ledger.folder().path_of(SUPERVISOR_LOCK))
}
