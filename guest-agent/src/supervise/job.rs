//! One workload: its start, its output, its signals, its time limit, its end.
//!
//! ```text
//!                     poll: signals, main process, output, deadline
//!   Running ── time is up ──► TERM to the group ── grace ──► KILL to the group
//!      │                                                        │
//!      └── main process ended ──► drain the output, at most DRAIN ──► KILL what is left of the group ──► terminal event
//! ```

use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

use pika_cloud_common::limits::RELEASE_TIMEOUT;
use pika_cloud_common::wire::Start;
use pika_cloud_common::{State, paths};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, FromRawFd as _, OwnedFd};
use rustix::fs::{FlockOperation, MemfdFlags, OFlags};
use rustix::io::Errno;
use rustix::process::{self as kernel, Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use serde_json::{Value, json};

use super::ending::Ending;
use super::logs::Log;
use super::memory::{self, KillCounter};
use super::mounts;
use super::signals::{self, Signals};
use super::spawn::{self, What};
use crate::ledger::{self, AckFile, Draft, FileLock, Ledger, LedgerError, OwnerFile};
use crate::watch::{Watch, timespec};

/// How long output of processes that outlive the main one is waited for, before and again after they are killed.
const DRAIN: Duration = Duration::from_millis(500);
/// How long the terminal event is tried.
const PATIENCE: Duration = Duration::from_secs(30);
/// How much output is read at once.
const BLOCK_BYTES: usize = 64 * 1024;

/// A workload, and how it is ended.
#[derive(Debug)]
pub struct Job {
    /// What to run.
    pub what: What,
    /// When it is ended.
    pub timeout: Option<Duration>,
    /// How long between TERM and KILL.
    pub stop_grace: Duration,
    /// Folders that must be mounted before it begins. The time that this takes is the workload's.
    pub mounts: Vec<String>,
    /// How long to stay after its end for an owner to have everything, where one was seen.
    pub wait_release: Duration,
}

impl Job {
    /// What a session asked for.
    pub fn of(start: Start) -> Self {
        let request = start.request;
        Self {
            what: What::Shell {
                command: request.command,
                as_root: request.run_as_root,
                env: start.env,
                cwd: start.cwd,
            },
            timeout: Some(request.timeout_secs).filter(|&secs| secs > 0).map(Duration::from_secs),
            stop_grace: Duration::from_secs(start.stop_grace_secs),
            mounts: start.mounts,
            wait_release: RELEASE_TIMEOUT,
        }
    }
}

/// Starts the supervisor of an accepted request: our own binary, detached, with the lock handed over. What it is to run
/// goes through memory that only the two can see: neither arguments nor environment nor a file name it.
pub fn spawn_supervisor(root: &std::path::Path, lock: FileLock, start: &Start) -> std::io::Result<std::process::Child> {
    let text = serde_json::to_vec(start)?;
    let memory = rustix::fs::memfd_create(c"pika-guest-start", MemfdFlags::CLOEXEC)?;
    ledger::write_all(&memory, &text)?;
    rustix::fs::seek(&memory, rustix::fs::SeekFrom::Start(0))?;
    let lock = lock.into_fd();
    // Without CLOEXEC from here on: this process has one thread, so nothing else is spawned in between.
    rustix::io::fcntl_setfd(&lock, rustix::io::FdFlags::empty())?;
    let mut command = std::process::Command::new("/proc/self/exe");
    command.arg0("pika-guest").arg("supervise").arg("--lock-fd").arg(lock.as_raw_fd().to_string());
    command.env(paths::ROOT_ENV, root).current_dir("/");
    command.stdin(Stdio::from(memory)).stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: both are async-signal-safe, and nothing is allocated.
    unsafe {
        command.pre_exec(|| {
            signals::unblock_all();
            Ok(kernel::setsid().map(|_| ())?)
        });
    }
    command.spawn()
}

/// The supervisor's side of [`spawn_supervisor`].
pub fn supervise_handed_over(ledger: &Ledger, lock_fd: i32) -> Result<i32, LedgerError> {
    let lock = take_over_lock(ledger, lock_fd)?;
    let start = serde_json::from_reader(std::io::stdin().lock())
        .map_err(|source| LedgerError::Malformed { path: "standard input".into(), source })?;
    run_job(ledger, lock, &Job::of(start))
}

/// The descriptor of that number, where it is the supervisor's lock.
fn take_over_lock(ledger: &Ledger, lock_fd: i32) -> Result<OwnedFd, LedgerError> {
    let failed = || LedgerError::io("take over", ledger.folder().path_of(ledger::SUPERVISOR_LOCK));
    // SAFETY: F_SETFD touches no memory; on a number that is not open it fails.
    if lock_fd <= 2 || unsafe { libc::fcntl(lock_fd, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return Err(failed()(Errno::BADF));
    }
    // SAFETY: it is open, as was just seen; whoever started us opened it for us, and nothing else here uses it.
    let lock = unsafe { OwnedFd::from_raw_fd(lock_fd) };
    let given = rustix::fs::fstat(&lock).map_err(failed())?;
    let (_, own) = ledger.folder().open_or_create_file(ledger::SUPERVISOR_LOCK, OFlags::RDWR)?;
    if (given.st_dev, given.st_ino) == (own.st_dev, own.st_ino) { Ok(lock) } else { Err(failed()(Errno::BADF)) }
}

/// Runs a workload to its terminal event; gives its exit code.
pub fn run_job(ledger: &Ledger, lock: OwnedFd, job: &Job) -> Result<i32, LedgerError> {
    let signals = Signals::block()
        .map_err(|error| LedgerError::io("read", "signals")(Errno::from_io_error(&error).unwrap_or(Errno::IO)))?;
    // Best effort: who asks for our process id finds none without it, and cannot send signals.
    let _ = rustix::fs::fcntl_lock(&lock, FlockOperation::NonBlockingLockExclusive);
    let mut locked = ledger.lock()?;
    if !locked.stream().supervised {
        locked.update_stream(|stream| stream.supervised = true)?;
    }
    let starting = Draft { what: ledger::What::State(State::Starting), message: String::new(), details: None };
    locked.append_one(starting)?;
    let stream_id = locked.stream().stream_id.clone();
    drop(locked);

    let mut log = None;
    let ending = match Log::open(ledger, &stream_id) {
        Err(error) => Ending::not_started(126, format!("the log cannot be written: {error}")),
        Ok(opened) => run_workload(ledger, job, &signals, log.insert(opened)),
    };
    let ending = ending.with_disk(ledger);
    let code = ending.code;
    finish_with_patience(ledger, log.as_mut(), &ending)?;
    // The terminal event is there: another run may begin while we wait.
    drop(lock);
    wait_for_release(ledger, &stream_id, job.wait_release);
    ledger::prune_previous(ledger.folder());
    Ok(code)
}

/// Runs the workload to its own end.
fn run_workload(ledger: &Ledger, job: &Job, signals: &Signals, log: &mut Log) -> Ending {
    let began = Instant::now();
    let time_is_up = job.timeout.and_then(|timeout| began.checked_add(timeout));
    if let Err(error) = mounts::wait_for(&job.mounts, signals, time_is_up) {
        log.say(&error.to_string());
        return Ending::not_started(126, error.to_string());
    }
    let kills = KillCounter::begin();
    let spawned = match spawn::spawn(ledger, &job.what) {
        Ok(spawned) => spawned,
        Err(error) => {
            log.say(&error.to_string());
            return Ending::not_started(error.exit_code(), error.to_string());
        }
    };
    memory::protect_self();
    let pid = Pid::from_child(&spawned.child);
    let pidfd = match kernel::pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(errno) => {
            let _ = kernel::kill_process_group(pid, Signal::KILL);
            return Ending::not_started(126, format!("the workload cannot be watched: {errno}"));
        }
    };
    let mut running = Running { ledger, job, signals, log, pid, pidfd, output: Some(spawned.output), killed: false };
    let ending = running.run(time_is_up);
    ending.with_memory(&kills, running.killed)
}

/// Writes the terminal event, again and again where that fails: without it the run would count as lost.
fn finish_with_patience(ledger: &Ledger, mut log: Option<&mut Log>, ending: &Ending) -> Result<(), LedgerError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match finish(ledger, log.as_deref_mut(), ending) {
            // The next writer or stream mends what does not follow from it yet.
            Ok(()) | Err(LedgerError::NotDerived { .. }) => return Ok(()),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(500)),
        }
    }
}

/// Writes the terminal event. Where the workload said its last word itself, that stands, and the code is recorded with it.
fn finish(ledger: &Ledger, log: Option<&mut Log>, ending: &Ending) -> Result<(), LedgerError> {
    let mut locked = ledger.lock()?;
    let mut drafts = Vec::new();
    if let Some(dropped) = log.as_deref().and_then(Log::dropped) {
        drafts.push(drop_notice(dropped));
    }
    let state = if ending.code == 0 { State::Completed } else { State::Failed };
    drafts.push(Draft {
        what: ledger::What::State(state),
        message: ending.message.clone(),
        details: Some(Value::Object(ending.details.clone())),
    });
    match locked.append(&drafts)?.all() {
        Err(LedgerError::AlreadyTerminal { state, seq }) => {
            locked.note_exit_code(ending.code)?;
            drop(locked);
            if let Some(log) = log {
                log.say(&format!(
                    "the workload ended with exit code {}; it had said `{state}` itself (event {seq}), and that stands",
                    ending.code
                ));
            }
            Ok(())
        }
        other => other.map(|_| ()),
    }
}

fn drop_notice(dropped: u64) -> Draft {
    Draft {
        what: ledger::What::Notice,
        message: format!("{dropped} bytes of output were dropped, too many waited for the host"),
        details: Some(json!({ "notice": { "dropped_log_bytes": dropped } })),
    }
}

/// Waits for the owner to have everything, where an owner of this stream was seen.
fn wait_for_release(ledger: &Ledger, stream_id: &str, wait: Duration) {
    let deadline = Instant::now() + wait;
    let watch = Watch::new(ledger.folder());
    loop {
        let owned = OwnerFile::read(ledger.folder()).is_some_and(|owner| owner.stream_id == stream_id);
        if !owned || AckFile::read(ledger.folder(), stream_id).released || Instant::now() >= deadline {
            return;
        }
        watch.wait(deadline);
    }
}

/// A workload that runs.
struct Running<'a> {
    ledger: &'a Ledger,
    job: &'a Job,
    signals: &'a Signals,
    log: &'a mut Log,
    pid: Pid,
    pidfd: OwnedFd,
    /// Until its last writer has closed it.
    output: Option<OwnedFd>,
    /// A KILL was sent while its main process ran.
    killed: bool,
}

impl Running<'_> {
    fn run(&mut self, mut deadline: Option<Instant>) -> Ending {
        let mut timed_out = None;
        loop {
            if self.wait(deadline) {
                break;
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                if timed_out.is_none() {
                    timed_out = self.job.timeout;
                    self.send(libc::SIGTERM);
                    deadline = Instant::now().checked_add(self.job.stop_grace);
                } else {
                    self.kill();
                    deadline = None;
                }
            }
        }
        // Left unreaped, so that the group's number stays taken until the group was killed.
        let left = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        let status = kernel::waitid(WaitId::PidFd(self.pidfd.as_fd()), left);
        self.drain();
        self.send(libc::SIGKILL);
        self.drain();
        let _ = kernel::waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED);
        match status {
            Ok(Some(status)) => Ending::of(&status, timed_out),
            // Cannot happen to a child of ours; a verdict must come all the same.
            _ => Ending::not_started(126, "the end of the workload could not be observed".to_owned()),
        }
    }

    /// Waits for something to do, and does it; says whether the main process has ended.
    fn wait(&mut self, deadline: Option<Instant>) -> bool {
        let timeout = deadline.map(|deadline| timespec(deadline.saturating_duration_since(Instant::now())));
        let mut fds = vec![PollFd::new(self.signals, PollFlags::IN), PollFd::new(&self.pidfd, PollFlags::IN)];
        if let Some(output) = &self.output {
            fds.push(PollFd::new(output, PollFlags::IN));
        }
        if poll(&mut fds, timeout.as_ref()).is_err() {
            return false;
        }
        let ready = |at: usize| fds.get(at).is_some_and(|fd| !fd.revents().is_empty());
        let (signalled, ended, output) = (ready(0), ready(1), ready(2));
        drop(fds);
        if signalled {
            while let Some(signal) = self.signals.next() {
                if signal == libc::SIGKILL { self.kill() } else { self.send(signal) }
            }
        }
        if output {
            self.read_output();
        }
        ended
    }

    /// Reads what the output holds for as long as it comes, at most [`DRAIN`].
    fn drain(&mut self) {
        let deadline = Instant::now() + DRAIN;
        while let Some(output) = &self.output {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut fds = [PollFd::new(output, PollFlags::IN)];
            if left.is_zero() || !matches!(poll(&mut fds, Some(&timespec(left))), Ok(1) | Err(Errno::INTR)) {
                return;
            }
            self.read_output();
        }
    }

    fn read_output(&mut self) {
        let Some(output) = &self.output else { return };
        let mut block = vec![0; BLOCK_BYTES];
        match rustix::io::read(output, &mut block) {
            Ok(0) => self.output = None,
            Ok(read) => {
                if let Some(dropped) = self.log.take(self.ledger, &block[..read]) {
                    // Best effort: the log itself says so too.
                    let _ = self.ledger.lock().and_then(|mut locked| locked.append_one(drop_notice(dropped)));
                }
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.output = None,
        }
    }

    fn kill(&mut self) {
        self.killed = true;
        self.send(libc::SIGKILL);
    }

    /// Sends a signal to the workload's process group.
    fn send(&self, number: i32) {
        // SAFETY: the number is one of libc's signals, and none of glibc's own two.
        let signal = unsafe { Signal::from_raw_unchecked(number) };
        let _ = kernel::kill_process_group(self.pid, signal);
    }
}
