//! Who may run a workload here, and what became of one that nobody supervises any more.

use pika_cloud_common::request::REQUEST_SCHEMA_VERSION;
use pika_cloud_common::wire::Start;
use pika_cloud_common::{GuestRequest, State, paths};
use rustix::fs::OFlags;
use rustix::process::{self as kernel, Flock, FlockType, Pid, PidfdFlags, Signal};
use serde_json::json;

use super::signals;
use crate::ledger::{self, Draft, FileLock, Ledger, LedgerError, Locked, SUPERVISOR_LOCK, What};

/// A request id longer than this is refused.
const MAX_REQUEST_ID_BYTES: usize = 256;
/// Seconds beyond this are taken for a mistake: a hundred years.
const MAX_SECS: u64 = 100 * 366 * 86_400;

/// What becomes of a `start`.
#[derive(Debug)]
pub enum Answer {
    /// Accepted, durably; its supervisor is to be started with this lock.
    Accepted(FileLock),
    /// It was accepted before.
    Already,
    /// Another runs.
    Busy,
    /// It cannot be run, whatever is tried.
    Bad(String),
}

/// Decides about a `start`, and records it where it is accepted.
pub fn accept<'a>(mut locked: Locked<'a>, start: &Start) -> Result<(Locked<'a>, Answer), LedgerError> {
    if locked.stream().request_id.as_deref() == Some(start.request_id.as_str()) {
        settle_lost(&mut locked)?;
        return accept_again(locked);
    }
    // One that ran before the guest booted again, in files that outlived that, is not run once more (Invariant 9).
    if ledger::was_requested(locked.ledger().folder(), &start.request_id) {
        return Ok((locked, Answer::Already));
    }
    if let Err(reason) = check(start) {
        return Ok((locked, Answer::Bad(reason)));
    }
    let (mut locked, lock) = match prepare_run(locked)? {
        (locked, Some(lock)) => (locked, lock),
        (locked, None) => return Ok((locked, Answer::Busy)),
    };
    write_request(locked.ledger(), &start.request)?;
    locked.update_stream(|stream| {
        stream.request_id = Some(start.request_id.clone());
        // Its supervisor says so itself, as the first thing: until then nothing of the workload was started.
        stream.supervised = false;
    })?;
    Ok((locked, Answer::Accepted(lock)))
}

/// A request that was accepted before. Whoever accepted it may have died before its supervisor began: then it is started
/// now, and still once (Invariant 9). A supervisor that is on its way holds the lock already.
fn accept_again(locked: Locked<'_>) -> Result<(Locked<'_>, Answer), LedgerError> {
    if locked.stream().supervised || locked.last().is_terminal() {
        return Ok((locked, Answer::Already));
    }
    let lock = FileLock::try_take(locked.ledger().folder(), SUPERVISOR_LOCK)?;
    Ok((locked, lock.map_or(Answer::Already, Answer::Accepted)))
}

/// Makes way for a new run: takes the supervisor's lock, ends a run that was lost, and begins the next stream where this
/// one has ended. `None` where somebody holds the lock.
pub fn prepare_run(mut locked: Locked<'_>) -> Result<(Locked<'_>, Option<FileLock>), LedgerError> {
    let Some(lock) = FileLock::try_take(locked.ledger().folder(), SUPERVISOR_LOCK)? else {
        return Ok((locked, None));
    };
    if locked.stream().supervised && !locked.last().is_terminal() {
        locked.append_one(lost())?;
    }
    if locked.last().is_terminal() {
        locked = locked.begin_next_stream()?;
    }
    Ok((locked, Some(lock)))
}

/// Writes `failed {supervisor_lost}` where a run was started, has not ended, and nobody supervises it. Says whether.
pub fn settle_lost(locked: &mut Locked<'_>) -> Result<bool, LedgerError> {
    let begun = locked.stream().supervised;
    settle(locked, begun)
}

/// The same where the run was accepted, and whoever accepted it sees that no supervisor came of it.
pub fn settle_abandoned(locked: &mut Locked<'_>) -> Result<bool, LedgerError> {
    let accepted = locked.stream().supervised || locked.stream().request_id.is_some();
    settle(locked, accepted)
}

fn settle(locked: &mut Locked<'_>, is_owed: bool) -> Result<bool, LedgerError> {
    if !is_owed || locked.last().is_terminal() {
        return Ok(false);
    }
    // Under the ledger's lock, as everybody who takes it does: nobody finds it held by this look.
    if FileLock::try_take(locked.ledger().folder(), SUPERVISOR_LOCK)?.is_none() {
        return Ok(false);
    }
    match locked.append_one(lost()) {
        // The next writer or stream mends what does not follow from it yet.
        Ok(_) | Err(LedgerError::NotDerived { .. }) => Ok(true),
        Err(error) => Err(error),
    }
}

fn lost() -> Draft {
    Draft {
        what: What::State(State::Failed),
        message: "the supervisor of the workload ended without a word".to_owned(),
        details: Some(json!({ "supervisor_lost": true })),
    }
}

fn write_request(ledger: &Ledger, request: &GuestRequest) -> Result<(), LedgerError> {
    let malformed = |source| LedgerError::Malformed { path: ledger.folder().path_of(paths::REQUEST), source };
    let mut text = serde_json::to_vec(request).map_err(malformed)?;
    text.push(b'\n');
    ledger.folder().replace(paths::REQUEST, &text, false)
}

/// What can be known of a request before anything is started.
fn check(start: &Start) -> Result<(), String> {
    let request = &start.request;
    if request.schema_version != REQUEST_SCHEMA_VERSION {
        return Err(format!(
            "the request has schema_version {}, this agent reads {REQUEST_SCHEMA_VERSION}: update the older of the two",
            request.schema_version
        ));
    }
    if start.request_id.is_empty() || start.request_id.len() > MAX_REQUEST_ID_BYTES {
        return Err(format!("a request_id has 1 to {MAX_REQUEST_ID_BYTES} bytes"));
    }
    if request.timeout_secs > MAX_SECS || start.stop_grace_secs > MAX_SECS {
        return Err("timeout_secs and stop_grace_secs are at most 100 years; 0 is no timeout".to_owned());
    }
    if request.command.is_empty() || request.command.contains('\0') {
        return Err("the command is empty or contains a NUL".to_owned());
    }
    let bad_name = |name: &str| name.is_empty() || name.contains(['=', '\0']);
    if let Some((name, _)) = start.env.iter().find(|(name, value)| bad_name(name) || value.contains('\0')) {
        return Err(format!("`{}` cannot be an environment variable", name.escape_default()));
    }
    if let Some(mount) = start.mounts.iter().find(|mount| !mount.starts_with('/')) {
        return Err(format!("the mount `{}` is not an absolute path", mount.escape_default()));
    }
    match &start.cwd {
        Some(cwd) if !cwd.starts_with('/') || cwd.contains('\0') => {
            Err(format!("the working folder `{}` is not an absolute path", cwd.escape_default()))
        }
        _ => Ok(()),
    }
}

/// The process that supervises, as the kernel says: it holds a record lock on the supervisor's lock file, beside the
/// flock, so that its id needs no trust in what a file says.
pub fn supervisor_pid(ledger: &Ledger) -> Option<Pid> {
    let (fd, _) = ledger.folder().open_file(SUPERVISOR_LOCK, OFlags::RDWR).ok()??;
    let mut probe = Flock::from(FlockType::WriteLock);
    probe.length = 1;
    kernel::fcntl_getlk(&fd, &probe).ok()??.pid
}

/// Sends the supervisor what it is to pass on. Without a supervisor nothing is done: the run has just ended.
pub fn signal_supervisor(ledger: &Ledger, number: i32) -> bool {
    let number = if number == libc::SIGKILL { signals::kill_request() } else { number };
    let Some(pid) = supervisor_pid(ledger) else { return false };
    let Ok(pidfd) = kernel::pidfd_open(pid, PidfdFlags::empty()) else { return false };
    // The id could have been given to another process between the two calls; not if it still holds the lock.
    if supervisor_pid(ledger) != Some(pid) {
        return false;
    }
    // SAFETY: the number is one of libc's signals, and glibc's own two are not among those that we send.
    let signal = unsafe { Signal::from_raw_unchecked(number) };
    kernel::pidfd_send_signal(&pidfd, signal).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(request_id: &str) -> Start {
        let text = format!(
            r#"{{"request_id":"{request_id}","request":{{"schema_version":2,"command":"true","timeout_secs":0,"run_as_root":true}}}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    /// Invariant 9, where the guest boots again and its files outlive that.
    #[test]
    fn a_request_of_an_earlier_stream_is_not_run_again() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open_at(&folder.path().join("run")).unwrap();
        let answer = |id: &str| accept(ledger.lock().unwrap(), &start(id)).unwrap().1;
        assert!(matches!(answer("job.1"), Answer::Accepted(_)));
        ledger.lock().unwrap().update_stream(|stream| stream.boot_id = "an earlier boot".to_owned()).unwrap();
        assert_eq!(ledger.lock().unwrap().stream().request_id, None);
        assert!(matches!(answer("job.1"), Answer::Already));
        assert!(matches!(answer("job.2"), Answer::Accepted(_)));
    }

    /// Invariant 9, where the stream that accepted a request dies before its supervisor exists.
    #[test]
    fn an_acceptance_that_nothing_came_of_is_started_by_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open_at(&folder.path().join("run")).unwrap();
        let answer = |id: &str| accept(ledger.lock().unwrap(), &start(id)).unwrap().1;
        let Answer::Accepted(lock) = answer("job.1") else { panic!("the first is accepted") };
        // Its supervisor is on its way: the lock is handed over, and never free.
        assert!(matches!(answer("job.1"), Answer::Already));
        assert!(matches!(answer("job.2"), Answer::Busy));
        drop(lock);
        let Answer::Accepted(lock) = answer("job.1") else { panic!("nothing came of it, so it is started now") };
        // The supervisor begins, and dies: from here on the run is lost, and never started again.
        ledger.lock().unwrap().update_stream(|stream| stream.supervised = true).unwrap();
        assert!(matches!(answer("job.1"), Answer::Already));
        drop(lock);
        assert!(matches!(answer("job.1"), Answer::Already));
        assert!(ledger.lock().unwrap().last().is_terminal());
    }
}
