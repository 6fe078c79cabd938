//! One session after the other: opening it, taking what the guest says into records, logs and artifacts, and losing it.

use pika_cloud_common::digest::Digest;
use pika_cloud_common::spec::Incus;
use pika_cloud_common::wire::{EndReason, Entry, ErrorCode, Notice, SessionError};

use super::acks::Acks;
use super::commit::Batch;
use super::route::{Peer, Way, is_still_at, stranger};
use super::{Call, Core, Effect, Outputs, Seen};
use crate::bake::bake_command;
use crate::journal::HostRecord;
use crate::machine::{CallFailure, Found, Guest, Input, SessionLoss};
use crate::session::{Opened, Received, Session, SessionFault};
use crate::words::one_line;

/// Streams that an incarnation may have: its own, and what an image or an earlier boot left before it.
const MAX_STREAMS: u32 = 16;

/// Of a guest's reason not to start its workload.
const MAX_REFUSAL_CHARS: usize = 1024;

impl Core {
    /// There is a stream to the agent. The cursor in the hello acknowledges all that is before it, so that it waits until that
    /// is durable (Invariant 1); nothing new comes meanwhile, since no session is there to bring it.
    pub(super) fn connected(&mut self) {
        self.flush_logs();
        self.next_commit.open_session();
    }

    /// Whether there is a stream in which nothing was said yet.
    pub(super) fn waits_to_open(&self) -> bool {
        self.next_commit.opens_session() || self.in_commit.as_ref().is_some_and(Batch::opens_session)
    }

    pub(super) fn open_session(&mut self) {
        let view = self.records.view();
        let cursor = view.cursor.clone().filter(|cursor| self.stream.left.as_ref() != Some(&cursor.stream_id));
        let machine = self.peer.machine();
        let (session, hello) = Session::open(view.term, cursor, machine, self.now.mono);
        self.session = Some(session);
        self.acks = Acks::new();
        self.instance_status = Some("Running".to_owned());
        self.send(hello);
    }

    /// A dial brought no session: by this way and with this agent there is none to be had. Where there is another, that is no
    /// loss.
    pub(super) fn session_missed(&mut self, loss: SessionLoss) {
        let next = self.route.missed(loss);
        self.hang_up();
        match next {
            Ok(way) => self.dial_by(way),
            Err(SessionLoss::Refused(message)) => self.unfit(message),
            Err(loss) => self.no_session(loss),
        }
    }

    /// There is no session any more, or none that began.
    pub(super) fn session_lost(&mut self, loss: SessionLoss) {
        if !self.has_session() {
            return self.session_missed(loss);
        }
        let held = self.session.as_ref().is_some_and(|session| session.has_held(self.now.mono));
        self.route.lost(&loss, held);
        self.hang_up();
        self.no_session(match loss {
            // It was there a moment ago.
            SessionLoss::NoAgent(message) => SessionLoss::Lost(message),
            loss => loss,
        });
    }

    /// The agent does not fit. What to bake the image from anew is Incus's to say.
    fn unfit(&mut self, message: String) {
        let id = self.calls.new_id();
        self.peer = Peer::Unfit { id, message };
        self.effects.push_back(Effect::Call(id, Call::Look { instance: self.instance.clone(), search: false }));
    }

    /// Nothing is left to be tried for now.
    fn no_session(&mut self, loss: SessionLoss) {
        if self.collecting.is_some() {
            self.collecting_lost(loss);
        } else {
            self.step(Input::NoSession(loss));
        }
    }

    /// Whether a session is open with our instance.
    pub(super) fn has_session(&self) -> bool {
        self.session.as_ref().is_some_and(Session::is_open) && matches!(self.peer, Peer::Ours)
    }

    fn fault(&mut self, fault: &SessionFault) {
        let message = fault.to_string();
        self.session_lost(match fault {
            // Who has it now is read from the instance's labels; a guest that only says so breaks the contract.
            SessionFault::Refused(SessionError { code: ErrorCode::StaleTerm, .. }) => SessionLoss::Broken(message),
            fault if fault.is_final() => SessionLoss::Refused(message),
            SessionFault::Silent => SessionLoss::Lost(message),
            SessionFault::Refused(SessionError { code, .. }) if passes(*code) => SessionLoss::Lost(message),
            _ => SessionLoss::Broken(message),
        });
    }

    /// While nothing is read, since the disk has enough to do, no guest is silent.
    pub(super) fn excuse_silence(&mut self) {
        let reads = self.wants_read();
        if let Some(session) = self.session.as_mut().filter(|_| !reads) {
            session.excuse_silence(self.now.mono);
            self.machine.excuse_silence(self.now.mono);
        }
    }

    /// Pings a guest, and gives up one that is silent.
    pub(super) fn tick_session(&mut self) {
        match self.session.as_mut().map(|session| session.tick(self.now.mono)) {
            Some(Ok(Some(ping))) => self.send(ping),
            Some(Err(fault)) => self.fault(&fault),
            Some(Ok(None)) | None => {}
        }
    }

    /// Takes what was read, up to the last whole message.
    pub(super) fn take_in(&mut self, n: usize, outputs: &mut impl Outputs) {
        let Some(session) = &mut self.session else { return };
        session.filled(n, self.now.mono);
        // Bytes before a hello may come from anything; they keep no silent guest alive.
        if self.has_session() {
            self.step(Input::Heard);
        }
        self.take_messages(outputs);
    }

    fn take_messages(&mut self, outputs: &mut impl Outputs) {
        loop {
            match self.take_next(outputs) {
                Ok(Taken::Nothing) => return self.tick_stopping(),
                Ok(Taken::More) => {}
                Ok(Taken::Refused(error)) => self.refused(error),
                Ok(Taken::End(reason)) => return self.ended_by_guest(reason),
                Ok(Taken::Archived { skipped, problem }) => self.archived(skipped, problem),
                Ok(Taken::Stranger(message)) => return self.session_lost(SessionLoss::Lost(message)),
                Err(fault) => return self.fault(&fault),
            }
        }
    }

    /// The next thing that the session has, into records, logs and artifacts.
    fn take_next(&mut self, outputs: &mut impl Outputs) -> Result<Taken, SessionFault> {
        if self.peer.is_asked() {
            return Ok(Taken::Nothing);
        }
        let (keeps_logs, takes_entries) = (self.keeps_logs(), self.takes_entries());
        let Self { session, records, logs, intake, next_commit, now, .. } = self;
        let Some(session) = session else { return Ok(Taken::Nothing) };
        let Some(received) = session.receive()? else { return Ok(Taken::Nothing) };
        match received {
            Received::Event { head, missing, line, digest } => {
                if let Some(guest) = intake.event(records, *now, (&head, missing, digest), line) {
                    next_commit.hear(guest);
                }
            }
            Received::Log { file, offset, bytes } if keeps_logs => logs.append(records, file, offset, bytes),
            Received::Log { file, offset, bytes } => logs.skip(file, offset + bytes.len() as u64),
            Received::LogLeftOut => logs.leave_out(),
            Received::Entry(entry) if takes_entries => outputs.entry(&entry),
            Received::EntryBytes(bytes) if takes_entries => outputs.bytes(bytes),
            Received::Entry(_) | Received::EntryBytes(_) | Received::Nothing => {}
            Received::BadLine { reason, sample } => intake.bad_line(records, reason, sample, *now),
            Received::Status(status) => {
                if records.view().status.as_ref() != Some(&status) {
                    intake.document(records, HostRecord::Status { status: Box::new(status) }, *now);
                }
            }
            Received::Result(result) => {
                let wanted = self.spec.policies.output_collection.include_result;
                if wanted && records.view().result.as_ref() != Some(&result) {
                    intake.document(records, HostRecord::Result { result: Box::new(result) }, *now);
                }
            }
            Received::Opened(opened) => return Ok(self.said_hello(opened)),
            Received::Notice(notice) => return Ok(self.notice(notice)),
            Received::Refused(error) => return Ok(Taken::Refused(error)),
            Received::End(reason) => return Ok(Taken::End(reason)),
        }
        Ok(Taken::More)
    }

    /// Whoever answered over vsock must be the machine that was dialled.
    fn said_hello(&mut self, opened: Opened) -> Taken {
        match std::mem::take(&mut self.peer) {
            Peer::Dialled(address) => {
                if let Some(stranger) = stranger(&address, &opened) {
                    return Taken::Stranger(stranger);
                }
                let id = self.calls.new_id();
                self.peer = Peer::Asked { id, address, opened: Box::new(opened) };
                self.effects.push_back(Effect::Call(id, Call::Look { instance: self.instance.clone(), search: false }));
                Taken::Nothing
            }
            Peer::Ours | Peer::Asked { .. } | Peer::Unfit { .. } => {
                self.opened(opened);
                Taken::More
            }
        }
    }

    /// Incus said what it has of the instance whose agent answered.
    pub(super) fn identified(&mut self, looked: Result<Option<Seen>, CallFailure>) {
        let (address, opened) = match std::mem::take(&mut self.peer) {
            Peer::Asked { address, opened, .. } => (address, opened),
            Peer::Unfit { message, .. } => {
                let base = looked.ok().flatten().and_then(|seen| seen.base_alias);
                let message = format!("{message}: {}", bake_again(base.as_deref(), &self.spec.incus));
                return self.no_session(SessionLoss::Refused(message));
            }
            Peer::Ours | Peer::Dialled(_) => return,
        };
        let is_it = matches!(&looked, Ok(Some(seen)) if is_still_at(&address, seen));
        if is_it && looked.map(|seen| self.found(seen)) == Ok(Found::Running) {
            self.opened(*opened);
            // What came with the hello. Nothing was asked for yet that could bring artifacts.
            return self.take_messages(&mut Nowhere);
        }
        let message = format!("CID {} is not known to be this instance's any more", address.cid);
        self.session_missed(SessionLoss::Lost(message));
    }

    /// Writes down which stream it is, and tells the machine.
    fn opened(&mut self, opened: Opened) {
        let Opened { hello, new_stream } = opened;
        self.route.opened();
        let Way { transport, agent } = self.route.last();
        let (view, agent) = (self.records.view(), agent.origin());
        if (view.transport, view.agent_origin) != (Some(transport), Some(agent)) {
            self.intake.document(&mut self.records, HostRecord::Session { transport, agent }, self.now);
        }
        let view = self.records.view();
        let ours = hello.request_id.as_deref() == Some(self.request_id().as_str());
        // What another request's run says is nothing of this incarnation's: a guest that was restored to it is not ours.
        let run_lost = hello.request_id.is_some() && !ours;
        let began_anew = view.start_sent.as_ref().is_some_and(|sent| !ours && sent.stream_id != hello.stream_id);
        let run_lost = run_lost || began_anew;
        // A guest of ours begins few streams in one incarnation; one that goes on beginning them lost its run (Invariant 5).
        let run_lost = run_lost || (new_stream && view.streams >= MAX_STREAMS);
        // It may say that itself, but only after this: what was asked for would be started once more (Invariant 9).
        let is_behind =
            self.session.as_ref().and_then(Session::cursor).is_some_and(|cursor| hello.last_seq < cursor.seq);
        let is_rewound = is_behind || (view.accepted_at.is_some() && !ours);
        self.stream.ours = ours;
        if new_stream {
            // What is pending is of the stream before: behind the record below it would be taken for the new one's.
            self.flush_logs();
            let cursor = self.session.as_ref().and_then(Session::cursor);
            let (after_seq, digest) = cursor.map_or((0, Digest::EMPTY_STREAM), |cursor| (cursor.seq, cursor.digest));
            self.record(HostRecord::Stream {
                stream_id: hello.stream_id,
                boot_id: hello.boot_id,
                agent: hello.agent,
                after_seq,
                digest,
            });
        }
        if self.collecting.is_some() {
            if began_anew {
                self.collects_from_another_boot();
            }
            self.stop_and_archive();
        } else if is_rewound && !run_lost {
            self.next_commit.hear(Guest::Rewound);
        } else {
            self.next_commit.hear(Guest::Opened { run_lost });
        }
    }

    /// The guest has nothing more in this session.
    fn ended_by_guest(&mut self, reason: EndReason) {
        let loss = match reason {
            EndReason::NewStream => {
                self.stream_over();
                SessionLoss::NewStream
            }
            EndReason::Done | EndReason::Shutdown | EndReason::Unknown => {
                SessionLoss::Lost("the agent ended the session".to_owned())
            }
        };
        self.session_lost(loss);
    }

    /// All of the stream is here, and another has begun, by a boot or by another run: ours was lost if it was in it and
    /// said no last word.
    fn stream_over(&mut self) {
        let view = self.records.view();
        if !self.stream.ours {
            self.stream.left = view.cursor.as_ref().map(|cursor| cursor.stream_id.clone());
        } else if view.terminal.is_none() && self.collecting.is_none() {
            self.next_commit.hear(Guest::Opened { run_lost: true });
        }
    }

    fn notice(&mut self, notice: Notice) -> Taken {
        match &notice {
            Notice::Started { request_id } | Notice::AlreadyStarted { request_id } => {
                if *request_id == self.request_id() && self.records.view().accepted_at.is_none() {
                    self.record(HostRecord::Accepted { request_id: request_id.clone() });
                }
                self.next_commit.hear(Guest::Accepted);
                return Taken::More;
            }
            Notice::Rewound { .. } => self.next_commit.hear(Guest::Rewound),
            Notice::ArchiveDone { skipped, truncated, problem, .. } => {
                let problem = problem.as_deref().map(one_line);
                let untold = || truncated.then(|| "the agent does not say which, or why".to_owned());
                return Taken::Archived { skipped: *skipped, problem: problem.or_else(untold) };
            }
            _ => {}
        }
        self.intake.notice(&mut self.records, notice, self.now);
        Taken::More
    }

    fn refused(&mut self, error: SessionError) {
        match error.code {
            ErrorCode::Busy | ErrorCode::BadRequest => {
                let message: String = error.message.chars().take(MAX_REFUSAL_CHARS).collect();
                let refused = HostRecord::StartRefused { message: message.clone() };
                self.intake.document(&mut self.records, refused, self.now);
                self.next_commit.hear(Guest::Refused(message));
            }
            ErrorCode::Archive => self.archive_failed(error.message),
            ErrorCode::UnsupportedProtocol => self.session_lost(SessionLoss::Refused(error.message)),
            code if passes(code) => self.session_lost(SessionLoss::Lost(error.message)),
            ErrorCode::Superseded
            | ErrorCode::AnotherMachine
            | ErrorCode::TooManySessions
            | ErrorCode::StaleTerm
            | ErrorCode::Ledger
            | ErrorCode::BadMessage
            | ErrorCode::NotOwner
            | ErrorCode::Unknown => self.session_lost(SessionLoss::Broken(error.message)),
        }
    }
}

/// What mends an image whose agent is of another release.
fn bake_again(base: Option<&str>, incus: &Incus) -> String {
    let command = bake_command(base, &incus.image_alias, &incus.project);
    format!("bake the image again with an agent of this release ({command})")
}

/// Whether a refusal says nothing against the guest: the next session may go better.
fn passes(code: ErrorCode) -> bool {
    matches!(code, ErrorCode::Superseded | ErrorCode::AnotherMachine | ErrorCode::TooManySessions)
}

/// What was taken from a session.
enum Taken {
    /// All that was read.
    Nothing,
    /// One thing; there may be more.
    More,
    /// The guest refused something.
    Refused(SessionError),
    /// The guest ended the session.
    End(EndReason),
    /// The archive is over.
    Archived { skipped: u64, problem: Option<String> },
    /// It is not with our machine: why.
    Stranger(String),
}

/// For artifacts that nobody asked for.
struct Nowhere;

impl Outputs for Nowhere {
    fn entry(&mut self, _: &Entry) {}

    fn bytes(&mut self, _: &[u8]) {}
}
