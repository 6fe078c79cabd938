//! Decides what a session does next. No I/O and no clock here: what happened comes in as an [`Input`] with the time, what
//! is to be done goes out as [`Action`]s, and [`Core::next_work`] says what to send.
//!
//! ```text
//!   AwaitHello ── hello ──► Opening ── opened ──► Streaming ── all sent, end of input, error, silence ──► Ended
//!       └ no hello in time        └ refused      or shutdown; work, in this order:
//!                                                             heartbeat when due, acknowledgement, events,
//!                                                             status, result, then one chunk of log or archive
//! ```
//!
//! Bulk never waits in front of an event: the shell asks for log and archive work only when all else is written out, and
//! each such work is one chunk.

use std::time::{Duration, Instant};

use pika_cloud_common::limits::{HEARTBEAT_INTERVAL, PEER_TIMEOUT};
use pika_cloud_common::wire::{
    Ack, Archive, EndReason, ErrorCode, GuestHello, GuestMessage, HostHello, HostMessage, MessageError, Notice,
    PROTOCOL, Role, SessionError, Start,
};

use crate::supervise::signals;

/// What happened.
#[derive(Debug)]
pub enum Input<'a> {
    /// A line came from the host.
    Line(&'a [u8]),
    /// The host will say no more.
    HostClosed,
    /// [`Action::Open`] was done.
    Opened(Opened),
    /// Something in the files changed.
    Changed(Dirt),
    /// A piece of [`Work`] was done.
    Did(Work, Done),
    /// Another session of an owner took over.
    Superseded,
    /// The agent is to end.
    Shutdown,
    /// An action was refused.
    Refused(SessionError),
    /// Output was taken by the host's side.
    Wrote,
    /// Nothing; time went on.
    Tick,
}

/// A session that can begin.
#[derive(Debug)]
pub struct Opened {
    /// What to answer.
    pub hello: GuestHello,
    /// What to say about the cursor.
    pub notices: Vec<Notice>,
    /// The stream is an earlier one: the session ends when all of it was sent, and for an owner acknowledged.
    pub previous: bool,
    /// How far the owner had acknowledged it.
    pub acked_seq: u64,
}

/// What is to be looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dirt {
    /// `events.jsonl`.
    pub events: bool,
    /// `status.json`.
    pub status: bool,
    /// `result.json`.
    pub result: bool,
    /// `logs/`.
    pub logs: bool,
}

impl Dirt {
    /// All of it.
    pub const ALL: Self = Self { events: true, status: true, result: true, logs: true };

    /// Adds what `other` names.
    pub fn add(&mut self, other: Self) {
        self.events |= other.events;
        self.status |= other.status;
        self.result |= other.result;
        self.logs |= other.logs;
    }

    /// Whether there is any.
    pub fn any(self) -> bool {
        self != Self::default()
    }
}

/// A piece of work, small enough that nothing urgent waits long for its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Say that we live.
    Heartbeat,
    /// Record the acknowledgement.
    Ack,
    /// Send a block of events.
    Events,
    /// Send `status.json` if it is another than before.
    Status,
    /// Send `result.json` if it is another than before.
    Result,
    /// Send a chunk of a log.
    Log,
    /// Send a piece of the archive.
    Archive,
}

impl Work {
    /// Log and archive: only when everything before is written out.
    pub fn is_bulk(self) -> bool {
        matches!(self, Self::Log | Self::Archive)
    }
}

/// What a piece of work came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// There may be more of it at once.
    More,
    /// No more for now.
    Nothing,
    /// Events: up to here, and there is no more for now.
    EventsTo(u64),
    /// Events: up to here, and there may be more.
    MoreEvents(u64),
    /// Events: the stream is over, another has begun.
    NewStream(u64),
}

/// What is to be done.
#[derive(Debug)]
pub enum Action {
    /// Find the stream, and answer with [`Input::Opened`] or [`Input::Refused`].
    Open(HostHello),
    /// Send this.
    Say(GuestMessage),
    /// Start a workload.
    Start(Box<Start>),
    /// Pass a signal on, by its number.
    Signal(i32),
    /// Begin an archive.
    Archive(Archive),
    /// The guest may power off.
    Release,
}

/// Why a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// All was sent.
    Done,
    /// The host closed its side.
    HostClosed,
    /// The host was silent for too long.
    PeerLost,
    /// The agent was asked to end.
    Shutdown,
    /// Something was refused.
    Refused(ErrorCode),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    AwaitHello,
    Opening,
    Streaming,
    Ended(Ending),
}

/// The decisions of one session.
#[derive(Debug)]
pub struct Core {
    phase: Phase,
    role: Role,
    follow: bool,
    input_closed: bool,
    /// When the host counts as dead.
    peer_deadline: Instant,
    next_heartbeat: Instant,
    dirt: Dirt,
    archiving: bool,
    /// Not yet recorded.
    ack: Option<Ack>,
    acked_seq: u64,
    sent_seq: u64,
    /// No event will follow in this stream; another one has begun, or it is an earlier one.
    last_stream: bool,
    previous: bool,
    /// The run that is in it, where it is an earlier one.
    earlier_run: Option<String>,
}

impl Core {
    /// A session of which nothing is known yet.
    pub fn new(now: Instant) -> Self {
        Self {
            phase: Phase::AwaitHello,
            role: Role::Observer,
            follow: false,
            input_closed: false,
            peer_deadline: now + PEER_TIMEOUT,
            next_heartbeat: now + HEARTBEAT_INTERVAL,
            dirt: Dirt::default(),
            archiving: false,
            ack: None,
            acked_seq: 0,
            sent_seq: 0,
            last_stream: false,
            previous: false,
            earlier_run: None,
        }
    }

    /// Takes note of what happened.
    pub fn step(&mut self, input: Input<'_>, now: Instant) -> Vec<Action> {
        let mut actions = match input {
            _ if self.ending().is_some() => Vec::new(),
            Input::Line(line) => self.on_line(line, now),
            Input::HostClosed => self.on_closed(),
            Input::Opened(opened) => self.on_opened(opened, now),
            Input::Changed(dirt) => {
                self.dirt.add(dirt);
                Vec::new()
            }
            Input::Did(work, done) => self.on_did(work, done, now),
            Input::Superseded => self.refuse(error(ErrorCode::Superseded, "a newer session of an owner took over")),
            Input::Shutdown => self.on_shutdown(),
            Input::Refused(refusal) => self.refuse(refusal),
            Input::Wrote => {
                if !self.follow {
                    self.peer_deadline = now + PEER_TIMEOUT;
                }
                Vec::new()
            }
            Input::Tick => Vec::new(),
        };
        if self.ending().is_none() && now >= self.peer_deadline {
            self.phase = Phase::Ended(Ending::PeerLost);
        }
        if let Some(reason) = self.complete() {
            self.phase = Phase::Ended(Ending::Done);
            actions.push(Action::Say(GuestMessage::End(reason)));
        }
        actions
    }

    /// What to send next; `None` where there is nothing for now.
    pub fn next_work(&self, now: Instant) -> Option<Work> {
        if self.phase != Phase::Streaming {
            return None;
        }
        let work = [
            (now >= self.next_heartbeat, Work::Heartbeat),
            (self.ack.is_some(), Work::Ack),
            (self.dirt.events, Work::Events),
            (self.dirt.status, Work::Status),
            (self.dirt.result, Work::Result),
            (self.dirt.logs, Work::Log),
            (self.archiving, Work::Archive),
        ];
        work.into_iter().find_map(|(wanted, work)| wanted.then_some(work))
    }

    /// When something is due by itself.
    pub fn deadline(&self) -> Instant {
        match self.phase {
            Phase::Streaming => self.next_heartbeat.min(self.peer_deadline),
            _ => self.peer_deadline,
        }
    }

    /// Why the session is over, once it is.
    pub fn ending(&self) -> Option<Ending> {
        match self.phase {
            Phase::Ended(ending) => Some(ending),
            _ => None,
        }
    }

    /// The acknowledgement that is to be recorded.
    pub fn pending_ack(&self) -> Option<&Ack> {
        self.ack.as_ref()
    }

    /// Whether this session is the owner's.
    pub fn is_owner(&self) -> bool {
        self.role == Role::Owner
    }

    fn on_line(&mut self, line: &[u8], now: Instant) -> Vec<Action> {
        self.peer_deadline = now + PEER_TIMEOUT;
        match HostMessage::decode(line) {
            Ok(message) => self.on_message(message),
            // A newer host says more than we know.
            Err(MessageError::Unknown { .. }) => Vec::new(),
            Err(malformed) => self.refuse(error(ErrorCode::BadMessage, &malformed.to_string())),
        }
    }

    fn on_message(&mut self, message: HostMessage) -> Vec<Action> {
        let message = match (self.phase, message) {
            (Phase::AwaitHello, HostMessage::Hello(hello)) => return self.on_hello(hello),
            (Phase::AwaitHello, _) => {
                return self.refuse(error(ErrorCode::BadMessage, "the first message must be `hello`"));
            }
            (_, HostMessage::Hello(_)) => {
                return self.refuse(error(ErrorCode::BadMessage, "`hello` opens a session, and this one is open"));
            }
            (_, message) => message,
        };
        match message {
            HostMessage::Ping(_) | HostMessage::Hello(_) => Vec::new(),
            HostMessage::Archive(archive) => self.on_archive(archive),
            _ if self.role != Role::Owner => {
                self.refuse(error(ErrorCode::NotOwner, "only an owner's session may ask for that"))
            }
            HostMessage::Ack(ack) => self.on_ack(ack),
            // Invariant 9: it was started, and did not outlive its stream.
            HostMessage::Start(start) if self.earlier_run.as_ref() == Some(&start.request_id) => {
                vec![Action::Say(GuestMessage::Notice(Notice::AlreadyStarted { request_id: start.request_id }))]
            }
            HostMessage::Start(start) => vec![Action::Start(Box::new(start))],
            HostMessage::Signal(signal) => {
                if let Some(number) = signals::by_name(&signal.name) {
                    return vec![Action::Signal(number)];
                }
                let name: String = signal.name.chars().take(32).collect();
                self.refuse(error(ErrorCode::BadRequest, &format!("no signal `{name}` is passed on")))
            }
            HostMessage::Release(_) => vec![Action::Release],
        }
    }

    fn on_hello(&mut self, hello: HostHello) -> Vec<Action> {
        if hello.protocol != PROTOCOL {
            let message = format!(
                "the host speaks session protocol {}, this agent ({}) speaks {PROTOCOL}: update the older of the two",
                hello.protocol,
                env!("CARGO_PKG_VERSION")
            );
            return self.refuse(error(ErrorCode::UnsupportedProtocol, &message));
        }
        (self.phase, self.role, self.follow) = (Phase::Opening, hello.role, hello.follow);
        vec![Action::Open(hello)]
    }

    fn on_opened(&mut self, opened: Opened, now: Instant) -> Vec<Action> {
        self.phase = Phase::Streaming;
        self.dirt = Dirt::ALL;
        self.next_heartbeat = now + HEARTBEAT_INTERVAL;
        // Opening may have waited for a lock.
        self.peer_deadline = now + PEER_TIMEOUT;
        (self.previous, self.last_stream) = (opened.previous, opened.previous);
        self.earlier_run = opened.hello.request_id.clone().filter(|_| opened.previous);
        self.acked_seq = opened.acked_seq;
        self.sent_seq = opened.hello.first_seq.saturating_sub(1);
        let mut messages = vec![GuestMessage::Hello(opened.hello)];
        messages.extend(opened.notices.into_iter().map(GuestMessage::Notice));
        messages.into_iter().map(Action::Say).collect()
    }

    fn on_closed(&mut self) -> Vec<Action> {
        self.input_closed = true;
        // What a host that does not follow asked for is still sent; one that follows is gone.
        if self.follow || self.phase == Phase::AwaitHello {
            self.phase = Phase::Ended(Ending::HostClosed);
        }
        Vec::new()
    }

    /// The host dials again for what is not sent yet; it is in the files.
    fn on_shutdown(&mut self) -> Vec<Action> {
        let open = self.phase == Phase::Streaming;
        self.phase = Phase::Ended(Ending::Shutdown);
        if open { vec![Action::Say(GuestMessage::End(EndReason::Shutdown))] } else { Vec::new() }
    }

    fn on_ack(&mut self, ack: Ack) -> Vec<Action> {
        match &mut self.ack {
            Some(waiting) => {
                waiting.seq = waiting.seq.max(ack.seq);
                waiting.logs.extend(ack.logs);
            }
            None => self.ack = Some(ack),
        }
        Vec::new()
    }

    fn on_archive(&mut self, archive: Archive) -> Vec<Action> {
        if self.archiving {
            let busy = error(ErrorCode::Archive, "an archive is being sent already");
            return vec![Action::Say(GuestMessage::Error(busy))];
        }
        self.archiving = true;
        vec![Action::Archive(archive)]
    }

    fn on_did(&mut self, work: Work, done: Done, now: Instant) -> Vec<Action> {
        let more = done == Done::More;
        match work {
            Work::Heartbeat => self.next_heartbeat = now + HEARTBEAT_INTERVAL,
            Work::Ack => {
                if let Some(ack) = self.ack.take() {
                    self.acked_seq = self.acked_seq.max(ack.seq);
                }
            }
            Work::Events => self.on_events(done),
            Work::Status => self.dirt.status = more,
            Work::Result => self.dirt.result = more,
            Work::Log => self.dirt.logs = more,
            Work::Archive => self.archiving = more,
        }
        Vec::new()
    }

    fn on_events(&mut self, done: Done) {
        match done {
            Done::MoreEvents(seq) => self.sent_seq = seq,
            Done::EventsTo(seq) => (self.sent_seq, self.dirt.events) = (seq, false),
            Done::NewStream(seq) => {
                (self.sent_seq, self.dirt.events, self.last_stream) = (seq, false, true);
                // The documents of the new stream have these names now.
                (self.dirt.status, self.dirt.result) = (false, false);
            }
            Done::More => {}
            Done::Nothing => self.dirt.events = false,
        }
    }

    /// Says why, and ends the session where the refusal is of that kind.
    fn refuse(&mut self, refusal: SessionError) -> Vec<Action> {
        if refusal.code == ErrorCode::Archive {
            self.archiving = false;
        }
        if !matches!(refusal.code, ErrorCode::Busy | ErrorCode::NotOwner | ErrorCode::Archive) {
            self.phase = Phase::Ended(Ending::Refused(refusal.code));
        }
        vec![Action::Say(GuestMessage::Error(refusal))]
    }

    /// Why the session ends as it should, where it does now.
    fn complete(&self) -> Option<EndReason> {
        if self.phase != Phase::Streaming || self.dirt.any() || self.archiving || self.ack.is_some() {
            return None;
        }
        if self.previous && self.follow && self.role == Role::Owner && self.acked_seq < self.sent_seq {
            return None;
        }
        if self.last_stream {
            return Some(EndReason::NewStream);
        }
        (!self.follow).then_some(EndReason::Done)
    }

    /// How long until the next heartbeat at most, for a shell that must look by itself.
    pub fn until_deadline(&self, now: Instant) -> Duration {
        self.deadline().saturating_duration_since(now)
    }
}

fn error(code: ErrorCode, message: &str) -> SessionError {
    SessionError { code, message: message.to_owned() }
}

#[cfg(test)]
mod tests;
