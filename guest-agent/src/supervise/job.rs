//! One workload: its start, its output, its signals, its time limit, its end.
//!
//! ```text
//!                     poll: signals, main process, output, deadline
//!   Running ── time is up, or the init says TERM ──► TERM to the group ── grace ──► KILL to the group
//!      │                                                                              │
//!      └── main process ended ──► drain the output, at most DRAIN ──► KILL what is left of the group ──► terminal event
//! ```

use std::time::{Duration, Instant};

use pika_cloud_common::State;
use pika_cloud_common::limits::RELEASE_TIMEOUT;
use pika_cloud_common::wire::Start;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd as _, OwnedFd};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use rustix::process::{self as kernel, Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use serde_json::{Value, json};

use super::ending::Ending;
use super::logs::Log;
use super::memory::{self, KillCounter};
use super::mounts;
use super::signals::{Received, Signals};
use super::spawn::{self, What};
use crate::ledger::{self, AckFile, Draft, Ledger, LedgerError, OwnerFile};
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
    let mut running =
        Running { ledger, job, signals, log, pid, pidfd, output: Some(spawned.output), killed: false, kill_at: None };
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
    /// The init has asked for the end, and no longer waits than that.
    kill_at: Option<Instant>,
}

impl Running<'_> {
    fn run(&mut self, mut deadline: Option<Instant>) -> Ending {
        let mut timed_out = None;
        loop {
            if self.wait(deadline.into_iter().chain(self.kill_at).min()) {
                break;
            }
            let is_due = |at: Option<Instant>| at.is_some_and(|at| Instant::now() >= at);
            if is_due(self.kill_at) {
                self.kill();
                self.kill_at = None;
            }
            if is_due(deadline) {
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
            while let Some(received) = self.signals.next() {
                self.pass_on(received);
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

    /// Of whom asks for nothing but the signal, that is all that is done. An init that asks for the end kills everything some
    /// time later, us too: before that we end the workload, so that how it ended is written down.
    fn pass_on(&mut self, Received { number, from_init }: Received) {
        if number == libc::SIGKILL {
            return self.kill();
        }
        self.send(number);
        if number == libc::SIGTERM && from_init && self.kill_at.is_none() {
            self.kill_at = Instant::now().checked_add(self.job.stop_grace);
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
