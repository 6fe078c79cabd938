//! One session of a guest's agent: the real core of `guest_agent::session`, and a model of the shell around it.
//!
//! ```text
//!   bytes ──► decoder ──► Core ── actions ──► files, supervisor
//!                              ── work ─────► output ──► (the link takes what it has room for)
//! ```

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use pika_cloud_common::digest::Digest;
use pika_cloud_common::limits::MAX_CHUNK_BYTES;
use pika_cloud_common::wire::{
    Ack, Archive, Decoder, Entry, ErrorCode, Frame, GuestHello, GuestMessage, Heartbeat, HostHello, LogChunk, Notice,
    PROTOCOL, Role, SessionError, Start, write_event,
};
use pika_cloud_common::{SCHEMA_VERSION, paths};
use pika_guest_agent::session::core::{Action, Core, Dirt, Done, Input, Opened, Work};

use super::Machine;
use super::ledger::{Line, Stream, byte_of, time_stamp};
use super::workload::{Run, settle};

/// As in the agent: beyond this nothing more is read from the files.
const HIGH_WATER: usize = 256 * 1024;
/// Lines that are sent at once.
const BLOCK_LINES: usize = 32;

/// The agent's core counts in `Instant`s. Which one stands for the beginning of the world makes no difference to it.
static ZERO: LazyLock<Instant> = LazyLock::new(Instant::now);

fn instant(now: Duration) -> Instant {
    *ZERO + now
}

/// How an agent keeps the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// As it should.
    Honest,
    /// It says what is no protocol at all.
    Garbage,
    /// It is of a later version.
    Future,
    /// It says nothing.
    Mute,
    /// It begins well, and goes on with what is no protocol.
    Babble,
}

/// What of the files a session carries.
#[derive(Debug)]
struct Open {
    stream_id: String,
    previous: bool,
    /// The next line, counted from the stream's beginning.
    at: usize,
    last_seq: u64,
    log_sent: u64,
    status_sent: u64,
    result_sent: bool,
    archive: Option<Archiving>,
}

#[derive(Debug)]
struct Archiving {
    asked: Archive,
    at: usize,
    /// Where in the file the next chunk begins.
    offset: usize,
    bytes: u64,
}

/// A session.
#[derive(Debug)]
pub struct Session {
    /// Its number, the agent's `session`.
    pub id: u64,
    /// What the link has not taken yet.
    pub output: Vec<u8>,
    manner: Manner,
    core: Core,
    decoder: Decoder,
    open: Option<Open>,
}

impl Session {
    /// One that waits for the host's hello.
    pub fn new(id: u64, manner: Manner, now: Duration) -> Self {
        let output = if manner == Manner::Garbage { b"\x00\xff login: \n{\"what\"".to_vec() } else { Vec::new() };
        Self { id, output, manner, core: Core::new(instant(now)), decoder: Decoder::new(), open: None }
    }

    /// Whether it has ended; what is left in `output` is its last words.
    pub fn is_over(&self) -> bool {
        self.core.ending().is_some()
    }

    /// When time alone changes something.
    pub fn next_tick(&self) -> Duration {
        self.core.deadline().saturating_duration_since(*ZERO)
    }

    /// Bytes came from the host.
    pub fn feed(&mut self, bytes: &[u8], machine: &mut Machine, now: Duration) {
        self.decoder.feed(bytes);
        while !self.is_over() {
            let actions = match self.decoder.next_frame() {
                Ok(None) => return,
                Ok(Some(Frame::Line(line))) => self.core.step(Input::Line(line), instant(now)),
                Ok(Some(Frame::Bulk(_))) => Vec::new(),
                Err(error) => {
                    let refusal = SessionError { code: ErrorCode::BadMessage, message: error.to_string() };
                    self.core.step(Input::Refused(refusal), instant(now))
                }
            };
            self.act(actions, machine, now);
        }
    }

    /// The host says no more.
    pub fn host_closed(&mut self, machine: &mut Machine, now: Duration) {
        self.step(Input::HostClosed, machine, now);
    }

    /// Files changed, or time passed.
    pub fn look(&mut self, dirt: Dirt, machine: &mut Machine, now: Duration) {
        if self.open.is_some() && self.core.is_owner() && machine.files.owner.session != self.id {
            self.step(Input::Superseded, machine, now);
        }
        if dirt.any() && self.open.is_some() {
            self.step(Input::Changed(dirt), machine, now);
        }
        self.step(Input::Tick, machine, now);
    }

    /// Some of the output was taken.
    pub fn wrote(&mut self, machine: &mut Machine, now: Duration) {
        self.step(Input::Wrote, machine, now);
    }

    /// Does what there is room for.
    pub fn work(&mut self, machine: &mut Machine, now: Duration) {
        while self.output.len() < HIGH_WATER {
            let Some(work) = self.core.next_work(instant(now)) else { return };
            if work.is_bulk() && !self.output.is_empty() {
                return;
            }
            match self.perform(work, machine, now) {
                Ok(done) => self.step(Input::Did(work, done), machine, now),
                Err(refusal) => self.step(Input::Refused(refusal), machine, now),
            }
            match self.manner {
                Manner::Mute => self.output.clear(),
                Manner::Babble if machine.random.chance(100) => {
                    self.output.extend_from_slice(b"{\"log\": \"what?\"}\n");
                }
                Manner::Honest | Manner::Garbage | Manner::Future | Manner::Babble => {}
            }
        }
    }

    fn step(&mut self, input: Input<'_>, machine: &mut Machine, now: Duration) {
        let actions = self.core.step(input, instant(now));
        self.act(actions, machine, now);
    }

    fn act(&mut self, actions: Vec<Action>, machine: &mut Machine, now: Duration) {
        for action in actions {
            let done = match action {
                Action::Say(message) => {
                    self.say(&message);
                    Ok(None)
                }
                Action::Open(hello) => self.open(&hello, machine, now).map(|opened| Some(Input::Opened(opened))),
                Action::Start(start) => self.start(&start, machine, now).map(|answer| {
                    self.say(&GuestMessage::Notice(answer));
                    None
                }),
                Action::Signal(number) => self.check_owner(machine).map(|()| {
                    machine.signal(number, now);
                    None
                }),
                Action::Archive(asked) => {
                    if let Some(open) = &mut self.open {
                        open.archive = Some(Archiving { asked, at: 0, offset: 0, bytes: 0 });
                    }
                    Ok(None)
                }
                Action::Release => self.check_owner(machine).map(|()| {
                    if let Some((stream, _)) = self.open.as_ref().and_then(|open| machine.files.find(&open.stream_id)) {
                        stream.released = true;
                    }
                    None
                }),
            };
            match done {
                Ok(None) => {}
                Ok(Some(input)) => self.step(input, machine, now),
                Err(refusal) => self.step(Input::Refused(refusal), machine, now),
            }
        }
    }

    fn say(&mut self, message: &GuestMessage) {
        message.write(&mut self.output);
    }

    fn check_owner(&self, machine: &Machine) -> Result<(), SessionError> {
        if machine.files.owner.session == self.id {
            return Ok(());
        }
        Err(SessionError { code: ErrorCode::Superseded, message: "a newer session of an owner took over".to_owned() })
    }

    fn open(&mut self, hello: &HostHello, machine: &mut Machine, now: Duration) -> Result<Opened, SessionError> {
        if let (Some(meant), Some(uuid)) = (hello.machine, &machine.uuid)
            && Digest::of(uuid.as_bytes()) != meant
        {
            let message = "the host means another machine".to_owned();
            return Err(SessionError { code: ErrorCode::AnotherMachine, message });
        }
        let owner = hello.role == Role::Owner;
        let seen = machine.files.owner.term;
        if owner && hello.term < seen {
            let message = format!("this owner's term is {}, and one of term {seen} was here", hello.term);
            return Err(SessionError { code: ErrorCode::StaleTerm, message });
        }
        machine.settle(false, now);
        let cursor = hello.after.as_ref();
        let uuid = machine.uuid.clone();
        let previous = cursor.is_some_and(|cursor| machine.files.previous.iter().any(|s| s.id == cursor.stream_id));
        let id = match cursor {
            Some(cursor) if previous => cursor.stream_id.clone(),
            _ => machine.stream().id.clone(),
        };
        let Some((stream, _)) = machine.files.find(&id) else {
            return Err(SessionError { code: ErrorCode::Ledger, message: "the stream is gone".to_owned() });
        };
        let (mut after, mut log_sent, mut notices) = (stream.base.0, 0, Vec::new());
        if let Some(cursor) = cursor.filter(|cursor| cursor.stream_id == id) {
            let logs = cursor.logs.get(paths::GUEST_LOG).copied().unwrap_or(0);
            if cursor.seq < stream.base.0 {
                notices.push(Notice::Gap { first_seq: stream.base.0 + 1 });
                log_sent = logs;
            } else if stream.digest_at(cursor.seq) == Some(cursor.digest) {
                (after, log_sent) = (cursor.seq, logs);
            } else {
                notices.push(Notice::Rewound { last_seq: stream.last_seq });
            }
        }
        let opened = Opened { hello: self.hello(stream, uuid), notices, previous, acked_seq: stream.acked_seq };
        if owner && cursor.is_some() {
            stream.acked_seq = stream.acked_seq.max(after);
            stream.acked_log = stream.acked_log.max(log_sent);
        }
        let at = stream.place_behind(after);
        if owner {
            let term = hello.term;
            machine.files.owner = super::ledger::Owner { term, session: self.id, stream_id: id.clone() };
        }
        self.open = Some(Open {
            stream_id: id,
            previous,
            at,
            last_seq: after,
            log_sent,
            status_sent: 0,
            result_sent: false,
            archive: None,
        });
        Ok(opened)
    }

    fn hello(&self, stream: &Stream, machine_uuid: Option<String>) -> GuestHello {
        GuestHello {
            protocol: if self.manner == Manner::Future { PROTOCOL + 1 } else { PROTOCOL },
            agent: "0.1.0".to_owned(),
            schema_version: SCHEMA_VERSION,
            stream_id: stream.id.clone(),
            boot_id: stream.boot_id.clone(),
            machine_uuid,
            first_seq: stream.base.0 + 1,
            first_digest: (stream.base.0 > 0).then_some(stream.base.1),
            last_seq: stream.last_seq,
            request_id: stream.request_id.clone(),
        }
    }

    /// As `supervise::accept` decides it.
    fn start(&mut self, start: &Start, machine: &mut Machine, now: Duration) -> Result<Notice, SessionError> {
        self.check_owner(machine)?;
        let request_id = start.request_id.clone();
        let held = machine.run.as_ref().is_some_and(Run::holds_lock);
        if machine.stream().request_id.as_ref() == Some(&request_id) {
            machine.settle(false, now);
            let stream = machine.stream();
            if stream.supervised || stream.terminal.is_some() || held {
                return Ok(Notice::AlreadyStarted { request_id });
            }
        } else {
            if machine.files.previous.iter().any(|stream| stream.request_id.as_ref() == Some(&request_id)) {
                return Ok(Notice::AlreadyStarted { request_id });
            }
            if held {
                return Err(SessionError { code: ErrorCode::Busy, message: "another runs".to_owned() });
            }
            machine.settle(false, now);
            if machine.stream().terminal.is_some() {
                machine.begin_stream();
            }
            machine.stream().request_id = Some(request_id.clone());
            machine.stream().supervised = false;
        }
        let id = machine.stream().id.clone();
        machine.files.owner.stream_id.clone_from(&id);
        let grace = start.stop_grace_secs;
        machine.run = Some(Run::new(&id, start.request.timeout_secs, grace, now, &mut machine.random));
        Ok(Notice::Started { request_id })
    }

    fn perform(&mut self, work: Work, machine: &mut Machine, now: Duration) -> Result<Done, SessionError> {
        let Some(open) = &mut self.open else { return Ok(Done::Nothing) };
        if work == Work::Heartbeat {
            let uptime = now.saturating_sub(machine.booted_at).as_secs();
            GuestMessage::Heartbeat(Heartbeat { seq: open.last_seq, uptime }).write(&mut self.output);
            machine.settle(true, now);
            return Ok(Done::Nothing);
        }
        let ack = self.core.pending_ack().cloned();
        if work == Work::Ack {
            if machine.files.owner.session != self.id {
                let message = "a newer session of an owner took over".to_owned();
                return Err(SessionError { code: ErrorCode::Superseded, message });
            }
            if let Some(ack) = ack {
                open.record(&ack, machine);
            }
            return Ok(Done::Nothing);
        }
        let current = machine.files.current.as_ref().map(|stream| stream.id.clone());
        let Some((stream, _)) = machine.files.find(&open.stream_id) else {
            return Err(SessionError { code: ErrorCode::Ledger, message: "the stream is gone".to_owned() });
        };
        let moved = !open.previous && current.as_ref() != Some(&stream.id);
        let out = &mut self.output;
        Ok(match work {
            Work::Events => open.events(stream, moved, out),
            Work::Status => open.status(stream, now, out),
            Work::Result => open.result(stream, now, out),
            Work::Log => open.log(stream, out),
            Work::Archive => open.archive(stream, &mut machine.archived, out),
            Work::Heartbeat | Work::Ack => Done::Nothing,
        })
    }
}

impl Open {
    fn record(&mut self, ack: &Ack, machine: &mut Machine) {
        let trims = machine.random.chance(machine.trims_per_mille);
        let Some((stream, previous)) = machine.files.find(&self.stream_id) else { return };
        stream.acked_seq = stream.acked_seq.max(ack.seq.min(self.last_seq));
        if let Some(log) = ack.logs.get(paths::GUEST_LOG) {
            stream.acked_log = stream.acked_log.max((*log).min(self.log_sent));
        }
        if trims && !previous {
            stream.trim();
        }
    }

    fn events(&mut self, stream: &Stream, moved: bool, out: &mut Vec<u8>) -> Done {
        for _ in 0..BLOCK_LINES {
            self.at = self.at.max(stream.trimmed);
            match stream.line(self.at) {
                None if moved => return Done::NewStream(self.last_seq),
                None => return Done::EventsTo(self.last_seq),
                Some(Line::Event(event)) => {
                    self.last_seq = event.seq;
                    write_event(event.text.as_bytes(), out);
                }
                Some(Line::Bad(text)) => {
                    let (offset, bytes) = (self.at as u64, text.len() as u64);
                    let (reason, sample) = ("not an event".to_owned(), text.to_string());
                    GuestMessage::Notice(Notice::BadLine { offset, bytes, reason, sample }).write(out);
                }
            }
            self.at += 1;
        }
        Done::MoreEvents(self.last_seq)
    }

    fn status(&mut self, stream: &Stream, now: Duration, out: &mut Vec<u8>) -> Done {
        if let Some(state) = stream.state.as_ref().filter(|_| stream.status_version > self.status_sent) {
            self.status_sent = stream.status_version;
            let at = time_stamp(now);
            let line = format!(
                "{{\"status\":{{\"schema_version\":1,\"state\":\"{state}\",\"updated_at\":\"{at}\",\"message\":\"\"}}}}\n"
            );
            out.extend_from_slice(line.as_bytes());
        }
        Done::Nothing
    }

    fn result(&mut self, stream: &Stream, now: Duration, out: &mut Vec<u8>) -> Done {
        if let Some((state, code)) = stream.terminal.as_ref().filter(|_| !self.result_sent) {
            self.result_sent = true;
            let at = time_stamp(now);
            let code = code.map_or_else(String::new, |code| format!(",\"exit_code\":{code}"));
            let line = format!(
                "{{\"result\":{{\"schema_version\":1,\"status\":\"{state}\",\"finished_at\":\"{at}\",\"message\":\"\"{code}}}}}\n"
            );
            out.extend_from_slice(line.as_bytes());
        }
        Done::Nothing
    }

    fn log(&mut self, stream: &Stream, out: &mut Vec<u8>) -> Done {
        let (from, end) = (self.log_sent, stream.log);
        if from >= end {
            return Done::Nothing;
        }
        let file = paths::GUEST_LOG.to_owned();
        if from < stream.hole {
            GuestMessage::Notice(Notice::LogGap { file, from, to: stream.hole }).write(out);
            self.log_sent = stream.hole;
            return Done::More;
        }
        let len = (end - from).min(MAX_CHUNK_BYTES as u64);
        GuestMessage::Log(LogChunk { file, offset: from, len }).write(out);
        out.extend((from..from + len).map(|at| byte_of(stream.key, at)));
        self.log_sent = from + len;
        Done::More
    }

    fn archive(&mut self, stream: &Stream, archived: &mut Vec<(String, u64, u64)>, out: &mut Vec<u8>) -> Done {
        let Some(archiving) = &mut self.archive else { return Done::Nothing };
        let Archiving { asked, at, offset, bytes } = archiving;
        let next = stream.artifacts.get(*at).filter(|_| !asked.globs.is_empty());
        let truncated = next.is_some_and(|file| {
            *at as u64 >= asked.limits.max_files || (*offset == 0 && *bytes + file.size as u64 > asked.limits.max_bytes)
        });
        let Some(file) = next.filter(|_| !truncated) else {
            let files = if asked.globs.is_empty() { 0 } else { *at as u64 };
            archived.push((stream.id.clone(), self.last_seq, self.log_sent));
            GuestMessage::Notice(Notice::ArchiveDone { files, bytes: *bytes, skipped: 0, truncated, problem: None })
                .write(out);
            self.archive = None;
            return Done::Nothing;
        };
        let key = stream.key ^ (*at as u64 + 1);
        let content: Vec<u8> = (0..file.size as u64).map(|at| byte_of(key, at)).collect();
        let len = (file.size - *offset).min(MAX_CHUNK_BYTES);
        let ended = *offset + len == file.size;
        let entry = Entry {
            path: file.path.clone(),
            folder: false,
            mode: 0o644,
            size: file.size as u64,
            offset: *offset as u64,
            len: len as u64,
            digest: ended.then(|| Digest::of(&content)),
        };
        GuestMessage::Entry(entry).write(out);
        out.extend_from_slice(&content[*offset..*offset + len]);
        *bytes += len as u64;
        (*at, *offset) = if ended { (*at + 1, 0) } else { (*at, *offset + len) };
        Done::More
    }
}

/// What the machine does for a session.
impl Machine {
    /// Ends a run that was lost; `abandoned` also one that was accepted and never began.
    pub(super) fn settle(&mut self, abandoned: bool, now: Duration) {
        // Whoever takes the ledger's lock moves a stream of another boot aside first.
        self.stream();
        let Self { files, run, .. } = self;
        let Some(stream) = &mut files.current else { return };
        let owed = stream.supervised || (abandoned && stream.request_id.is_some());
        if settle(stream, run.as_ref(), owed, now) {
            self.changed();
        }
    }
}
