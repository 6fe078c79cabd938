//! What a session does with the files: reads them for the host, and records what the host says.

use std::path::{Path, PathBuf};
use std::time::Duration;

use pika_cloud_common::digest::Digest;
use pika_cloud_common::limits::MAX_DOCUMENT_BYTES;
use pika_cloud_common::wire::{
    Ack, Archive, ErrorCode, GuestMessage, Heartbeat, HostHello, Notice, Role, SessionError, Start, write_event,
};
use pika_cloud_common::{DecodeError, RunResult, Status, paths};
use rustix::fd::{BorrowedFd, OwnedFd};
use rustix::fs::OFlags;
use rustix::process::PidfdFlags;

use super::marks::Marks;
use super::stream::refusal;
use crate::ledger::{
    self, AckFile, FileLock, Folder, Ledger, LedgerError, OWNER, OwnerFile, SESSION_LOCK, SUPERVISOR_LOCK, StreamFile,
    system,
};
use crate::session::archive::Archiver;
use crate::session::bulk::LogTail;
use crate::session::core::{Dirt, Done, Opened, Work};
use crate::session::source::{self, OpenError};
use crate::session::{EventTail, Piece, Tailed};
use crate::supervise::{self, Answer, HandOverError, InitSocket};
use crate::watch::Watch;

/// The files, as one session sees them.
pub(super) struct Files {
    root: PathBuf,
    callers: Callers,
    session: String,
    open: Option<Open>,
    /// Supervisors that this process started, to be reaped.
    children: Vec<std::process::Child>,
}

struct Open {
    ledger: Ledger,
    folder: Folder,
    stream_id: String,
    previous: bool,
    watch: Watch,
    tail: EventTail,
    logs: LogTail,
    status: Sent,
    result: Sent,
    ack: AckFile,
    /// How far the log's space was given back.
    punched: u64,
    /// Where in the file what was sent ends.
    marks: Marks,
    archive: Option<Archiver>,
    /// The terminal event was seen.
    ended: bool,
}

type Refused<T> = Result<T, SessionError>;

fn broken(error: &LedgerError) -> SessionError {
    refusal(ErrorCode::Ledger, error)
}

/// Who may have a session here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Callers {
    /// Whoever has our input and output: the transport has named this machine.
    All,
    /// Who names this machine. Whatever runs on its host can dial it over vsock, containers too; they do not know its uuid.
    Knowing,
}

impl Callers {
    /// Why there is no session with who means the machine `meant`, on the machine `own`.
    fn stranger(self, meant: Option<Digest>, own: Option<Digest>) -> Option<&'static str> {
        match (meant, own) {
            (Some(meant), Some(own)) if meant != own => {
                Some("the host means another machine: the number that it dialled is ours by now")
            }
            (None, _) if self == Self::Knowing => Some("over vsock a hello names the machine that it means"),
            (_, None) if self == Self::Knowing => Some(
                "the agent cannot read its machine's DMI product_uuid: it must run as root, on a machine that has one",
            ),
            _ => None,
        }
    }
}

impl Files {
    pub(super) fn new(root: &Path, callers: Callers) -> Self {
        Self { root: root.to_owned(), callers, session: system::random_id(), open: None, children: Vec::new() }
    }

    pub(super) fn ledger(&self) -> Option<&Ledger> {
        self.open.as_ref().map(|open| &open.ledger)
    }

    /// Finds the stream for the host's hello.
    pub(super) fn open(&mut self, hello: &HostHello) -> Refused<Opened> {
        // Before anything is written down or told: an owner that means another machine is no owner of ours.
        let own = system::machine_uuid().map(|uuid| Digest::of(uuid.as_bytes()));
        if let Some(message) = self.callers.stranger(hello.machine, own) {
            return Err(SessionError { code: ErrorCode::AnotherMachine, message: message.to_owned() });
        }
        let ledger = Ledger::open_at(&self.root).map_err(|error| broken(&error))?;
        let watch = Watch::new(ledger.folder());
        let (source, mut opened) = source::open(&ledger, hello, &self.session).map_err(|error| match &error {
            OpenError::StaleTerm { .. } => refusal(ErrorCode::StaleTerm, &error),
            OpenError::Ledger(error) => broken(error),
        })?;
        // Without logs the events still come.
        let logs = source.folder.child(paths::LOGS_DIR).ok().flatten();
        let (after, logs_after) = (source.after, source.logs.clone());
        let mut open = Open {
            ack: AckFile::read(&source.folder, &source.stream_id),
            tail: EventTail::new(source.after),
            folder: source.folder,
            stream_id: source.stream_id,
            previous: source.previous,
            logs: LogTail::new(None, source.logs),
            status: Sent::default(),
            result: Sent::default(),
            archive: None,
            ended: false,
            punched: 0,
            marks: Marks::default(),
            ledger,
            watch,
        };
        if let Some(logs) = logs {
            open.watch.add(&logs);
            open.logs.attach(logs);
        }
        if hello.role == Role::Owner && hello.after.is_some() {
            // What an owner goes on behind, it has.
            open.record_ack(&Ack { seq: after, logs: logs_after }, &self.session)?;
            opened.acked_seq = opened.acked_seq.max(after);
        }
        self.open = Some(open);
        Ok(opened)
    }

    /// Does a piece of the core's work.
    pub(super) fn perform(&mut self, work: Work, ack: Option<&Ack>, out: &mut Vec<u8>) -> Refused<Done> {
        let session = &self.session;
        let Some(open) = &mut self.open else { return Ok(Done::Nothing) };
        match work {
            Work::Heartbeat => {
                let beat = Heartbeat { seq: open.tail.last_seq(), uptime: system::uptime_secs() };
                GuestMessage::Heartbeat(beat).write(out);
                self.children.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
                open.settle_unsupervised();
                if !open.previous {
                    open.check_place().map_err(|error| broken(&error))?;
                }
                open.trim();
                Ok(Done::Nothing)
            }
            Work::Ack => ack.map_or(Ok(Done::Nothing), |ack| open.record_ack(ack, session)),
            Work::Events => open.send_events(out).map_err(|error| broken(&error)),
            Work::Status => {
                open.send_status(out);
                Ok(Done::Nothing)
            }
            Work::Result => {
                open.send_result(out);
                Ok(Done::Nothing)
            }
            Work::Log => Ok(if open.logs.send(out) { Done::More } else { Done::Nothing }),
            Work::Archive => {
                let more = open.archive.as_mut().is_some_and(|archive| archive.send(out));
                if !more {
                    open.archive = None;
                }
                Ok(if more { Done::More } else { Done::Nothing })
            }
        }
    }

    /// Starts a workload, at most once for its request id.
    pub(super) fn start(&mut self, start: &Start) -> Refused<GuestMessage> {
        let Some(open) = &self.open else { return Err(not_open()) };
        let ledger = &open.ledger;
        let socket = InitSocket::find();
        if let Err(error @ HandOverError::Forbidden(_)) = &socket {
            return Err(refusal(ErrorCode::BadRequest, error));
        }
        let guard = open.owner_lock(&self.session)?;
        let locked = ledger.lock().map_err(|error| broken(&error))?;
        let (locked, answer) = supervise::accept(locked, start).map_err(|error| broken(&error))?;
        let request_id = start.request_id.clone();
        let lock = match answer {
            Answer::Accepted(lock) => lock,
            Answer::Already => return Ok(GuestMessage::Notice(Notice::AlreadyStarted { request_id })),
            Answer::Busy => return Err(refusal(ErrorCode::Busy, &LedgerError::Supervised)),
            Answer::Bad(message) => return Err(SessionError { code: ErrorCode::BadRequest, message }),
        };
        open.own(locked.stream());
        // Nobody has to wait for an init: who holds the supervisor's lock is the only one that may go on.
        drop((locked, guard));
        match supervise::begin(socket, ledger.folder().path(), &lock, start) {
            Ok(child) => self.children.extend(child),
            Err(error) => supervise::give_up(ledger, &lock, &error).map_err(|error| broken(&error))?,
        }
        Ok(GuestMessage::Notice(Notice::Started { request_id }))
    }

    /// Passes a signal on to the workload; where none runs, nothing is done.
    pub(super) fn signal(&self, number: i32) -> Refused<()> {
        let Some(open) = &self.open else { return Err(not_open()) };
        let _guard = open.owner_lock(&self.session)?;
        supervise::signal_supervisor(&open.ledger, number);
        Ok(())
    }

    /// Records that the guest may power off.
    pub(super) fn release(&mut self) -> Refused<()> {
        let Some(open) = &mut self.open else { return Err(not_open()) };
        let _guard = open.owner_lock(&self.session)?;
        open.ack.released = true;
        open.ack.write(&open.ledger_folder()?).map_err(|error| broken(&error))
    }

    /// Begins an archive.
    pub(super) fn archive(&mut self, asked: &Archive) -> Refused<()> {
        let Some(open) = &mut self.open else { return Err(not_open()) };
        // Where nothing is asked for, what is wrong with the folder is in nobody's way.
        let artifacts = if asked.globs.is_empty() { Ok(None) } else { open.folder.child(paths::ARTIFACTS_DIR) };
        let artifacts = artifacts.map_err(|error| refusal(ErrorCode::Archive, &error))?;
        let archiver = Archiver::new(artifacts.map(Folder::into_fd), asked);
        open.archive = Some(archiver.map_err(|error| refusal(ErrorCode::Archive, &error))?);
        Ok(())
    }

    /// The supervisor's process, readable once it has ended.
    pub(super) fn watch_supervisor(&self) -> Option<OwnedFd> {
        let open = self.open.as_ref().filter(|open| !open.previous)?;
        let pid = supervise::supervisor_pid(&open.ledger)?;
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()?;
        (supervise::supervisor_pid(&open.ledger) == Some(pid)).then_some(pidfd)
    }

    /// Ends a run whose supervisor is gone.
    pub(super) fn settle_lost(&mut self) -> Refused<()> {
        self.children.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
        let Some(open) = &self.open else { return Ok(()) };
        let settled = open.ledger.lock().and_then(|mut locked| supervise::settle_abandoned(&mut locked));
        settled.map(|_| ()).map_err(|error| broken(&error))
    }

    pub(super) fn watch_fd(&self) -> Option<BorrowedFd<'_>> {
        self.open.as_ref()?.watch.fd()
    }

    pub(super) fn interval(&self) -> Option<Duration> {
        self.open.as_ref()?.watch.interval()
    }

    /// What changed since the last time, and whether the owner may have.
    pub(super) fn changes(&mut self) -> (Dirt, bool) {
        let Some(open) = &mut self.open else { return (Dirt::default(), false) };
        let (mut dirt, mut owner) = (Dirt::default(), false);
        let all = open.watch.drain(|name| match std::str::from_utf8(name).unwrap_or_default() {
            // Its stream's file tells whether another has begun.
            paths::EVENTS | paths::EVENTS_STREAM => dirt.events = true,
            paths::STATUS => dirt.status = true,
            paths::RESULT => dirt.result = true,
            OWNER => owner = true,
            // Files of `logs/` have any name; those of the agent's own begin with a dot or belong to it.
            name if name.starts_with('.') || is_our_own(name) => {}
            _ => dirt.logs = true,
        });
        if all { (Dirt::ALL, true) } else { (dirt, owner) }
    }

    /// Whether another session of an owner took over.
    pub(super) fn is_superseded(&self) -> bool {
        let Some(open) = &self.open else { return false };
        OwnerFile::read(open.ledger.folder()).is_some_and(|owner| owner.session != self.session)
    }
}

/// Files in the root that say nothing to a host.
fn is_our_own(name: &str) -> bool {
    matches!(name, paths::EVENTS_SEQ | paths::EVENTS_ACK | SESSION_LOCK | SUPERVISOR_LOCK)
}

fn not_open() -> SessionError {
    SessionError { code: ErrorCode::BadMessage, message: "the session is not open yet".to_owned() }
}

impl Open {
    /// The lock under which this session is known to be the owner's.
    fn owner_lock(&self, session: &str) -> Refused<FileLock> {
        let guard = self.ledger.lock_session().map_err(|error| broken(&error))?;
        match OwnerFile::read(self.ledger.folder()) {
            Some(owner) if owner.session != session => {
                let message = "a newer session of an owner took over".to_owned();
                Err(SessionError { code: ErrorCode::Superseded, message })
            }
            _ => Ok(guard),
        }
    }

    /// This session owns the stream that a start began, too. Best effort: it is written again at the next hello.
    fn own(&self, stream: &StreamFile) {
        if let Some(mut owner) =
            OwnerFile::read(self.ledger.folder()).filter(|owner| owner.stream_id != stream.stream_id)
        {
            owner.stream_id.clone_from(&stream.stream_id);
            let _ = owner.write(self.ledger.folder());
        }
    }

    /// The folder that holds this stream's files by now: it may have been moved aside since.
    fn ledger_folder(&self) -> Refused<Folder> {
        let root = || Folder::open_or_create(self.ledger.folder().path());
        let find = || match StreamFile::read(self.ledger.folder())? {
            Some(stream) if stream.stream_id != self.stream_id => {
                match ledger::open_previous(self.ledger.folder(), &self.stream_id)? {
                    Some((folder, _)) => Ok(folder),
                    None => root(),
                }
            }
            _ => root(),
        };
        find().map_err(|error| broken(&error))
    }

    /// What is mounted over the event file makes no event that could be watched, nor does what becomes of the folder itself: one that
    /// is open stays, out of everybody's reach, with nothing more to come.
    fn check_place(&self) -> Result<(), LedgerError> {
        self.folder.check_there()?;
        self.folder.open_file(paths::EVENTS, OFlags::RDONLY).map(|_| ())
    }

    /// Ends a run whose supervisor died so early that nobody could watch it. Best effort: the next heartbeat tries again.
    fn settle_unsupervised(&self) {
        let is_owed = |now: StreamFile| now.supervised || now.request_id.is_some();
        let owed = || StreamFile::read(self.ledger.folder()).ok().flatten().is_some_and(is_owed);
        if !self.ended && !self.previous && owed() && supervise::supervisor_pid(&self.ledger).is_none() {
            let _ = self.ledger.lock().and_then(|mut locked| supervise::settle_abandoned(&mut locked));
        }
    }

    fn record_ack(&mut self, ack: &Ack, session: &str) -> Refused<Done> {
        let guard = self.owner_lock(session)?;
        let before = self.ack.clone();
        // Never beyond what was sent: an acknowledgement allows trimming.
        self.ack.seq = self.ack.seq.max(ack.seq.min(self.tail.last_seq()));
        for (file, offset) in &ack.logs {
            let sent = self.logs.sent(file);
            if sent > 0 {
                let acked = self.ack.logs.entry(file.clone()).or_default();
                *acked = (*acked).max((*offset).min(sent));
            }
        }
        if self.ack != before {
            // Best effort: where it cannot be written for want of space, trimming by it may make some.
            let _ = self.ack.write(&self.ledger_folder()?);
        }
        drop(guard);
        self.trim();
        Ok(Done::Nothing)
    }

    /// Gives back what is acknowledged. Best effort: what cannot be trimmed now is tried again with the next
    /// acknowledgement, and the caps hold meanwhile.
    fn trim(&mut self) {
        if self.previous {
            return;
        }
        let acked = self.ack.logs.get(paths::GUEST_LOG).copied().unwrap_or(0);
        self.punched = ledger::trim_log(&self.ledger, acked, self.punched);
        let Some(near) = self.marks.acked(self.ack.seq) else { return };
        let Ok(Some(stream)) = StreamFile::read(self.ledger.folder()) else { return };
        if stream.stream_id == self.stream_id
            && let Ok(Some(point)) = ledger::find_trim_point(self.ledger.folder(), &stream, near)
            && self.ledger.lock().and_then(|locked| locked.trim(&point)).is_ok()
        {
            self.marks.cut(point.bytes());
        }
    }

    fn send_events(&mut self, out: &mut Vec<u8>) -> Result<Done, LedgerError> {
        let mut bad = BadLines::default();
        let ended = &mut self.ended;
        let tailed = self.tail.read(&self.folder, |piece| match piece {
            Piece::Event { line, terminal, .. } => {
                *ended |= terminal;
                bad.tell(out);
                write_event(line, out);
            }
            Piece::Bad { offset, bytes, reason, sample } => bad.add(offset, bytes, reason, sample),
        })?;
        bad.tell(out);
        let seq = self.tail.last_seq();
        self.marks.add(seq, self.tail.offset());
        match tailed {
            Tailed::More => Ok(Done::MoreEvents(seq)),
            Tailed::AtEnd => Ok(Done::EventsTo(seq)),
            Tailed::Replaced => match StreamFile::read(&self.folder)? {
                Some(stream) if stream.stream_id == self.stream_id && !stream.retiring => {
                    self.tail.reopen();
                    self.marks = Marks::default();
                    Ok(Done::MoreEvents(seq))
                }
                Some(stream) if stream.stream_id != self.stream_id => Ok(Done::NewStream(seq)),
                _ => Ok(Done::EventsTo(seq)),
            },
        }
    }

    fn send_status(&mut self, out: &mut Vec<u8>) {
        if let Some(status) = self.status.changed(&self.folder, paths::STATUS, Status::decode, out) {
            GuestMessage::Status(status).write(out);
        }
    }

    fn send_result(&mut self, out: &mut Vec<u8>) {
        if let Some(result) = self.result.changed(&self.folder, paths::RESULT, RunResult::decode, out) {
            GuestMessage::Result(result).write(out);
        }
    }
}

/// A document as it was last sent.
#[derive(Default)]
struct Sent {
    text: Vec<u8>,
    trouble: String,
}

impl Sent {
    /// The document, where it is another than before. Something odd in its place is left out, and said once: the events
    /// say all of it too.
    fn changed<T>(
        &mut self,
        folder: &Folder,
        name: &str,
        decode: impl FnOnce(&[u8]) -> Result<T, DecodeError>,
        out: &mut Vec<u8>,
    ) -> Option<T> {
        let reason = match folder.read(name, MAX_DOCUMENT_BYTES) {
            Ok(None) => return None,
            Ok(Some(text)) if text == self.text => return None,
            Ok(Some(text)) => match decode(&text) {
                Ok(document) => {
                    self.text = text;
                    self.trouble.clear();
                    return Some(document);
                }
                Err(error) => error.to_string(),
            },
            Err(error) => error.to_string(),
        };
        if reason != self.trouble {
            self.trouble.clone_from(&reason);
            GuestMessage::Notice(Notice::Skipped { path: name.to_owned(), reason }).write(out);
        }
        None
    }
}

/// Bad lines in a row, told as one: a flood of them costs one notice a block at most.
#[derive(Default)]
struct BadLines {
    count: u64,
    offset: u64,
    bytes: u64,
    reason: String,
    sample: String,
}

impl BadLines {
    fn add(&mut self, offset: u64, bytes: u64, reason: String, sample: &[u8]) {
        if self.count == 0 {
            (self.offset, self.reason) = (offset, reason);
            self.sample = String::from_utf8_lossy(sample).into_owned();
        }
        self.count += 1;
        self.bytes = offset + bytes - self.offset;
    }

    fn tell(&mut self, out: &mut Vec<u8>) {
        if self.count == 0 {
            return;
        }
        let BadLines { count, offset, bytes, mut reason, sample } = std::mem::take(self);
        if count > 1 {
            reason = format!("{count} lines in a row are no events; the first: {reason}");
        }
        GuestMessage::Notice(Notice::BadLine { offset, bytes, reason, sample }).write(out);
    }
}
