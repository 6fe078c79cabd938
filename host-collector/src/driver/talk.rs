//! One session after the other: opening it, taking what the guest says into journal, logs and artifacts, and losing it.

use pika_cloud_common::Timestamp;
use pika_cloud_common::digest::Digest;
use pika_cloud_common::wire::{EndReason, ErrorCode, HostMessage, Notice, Role, SessionError};

use super::link::Live;
use super::{Driver, Op};
use crate::error::Error;
use crate::journal::HostRecord;
use crate::machine::{Guest, Input, SessionLoss};
use crate::session::{Opened, Received, Session, SessionFault};
use crate::transport::{AgentEnd, Link};

/// Streams that an incarnation may have: its own, and what an image or an earlier boot left before it.
const MAX_STREAMS: u32 = 16;

impl Driver {
    /// Sends a message. A guest that does not read is one that is not heard.
    pub(super) async fn send(&mut self, message: &HostMessage) -> Result<(), Error> {
        let unread = self.live.as_ref().is_some_and(|live| !live.send(message));
        if unread { Box::pin(self.fault(SessionFault::Silent)).await } else { Ok(()) }
    }

    pub(super) async fn open_session(&mut self, link: Link) -> Result<(), Error> {
        // The cursor that the guest is told is the journal's.
        self.flush_gathered();
        let (session, hello) = Session::open(Role::Owner, 1, self.journal.view().cursor.clone(), true, self.now());
        self.live = Some(Live::new(session, link));
        self.instance_status = Some("Running".to_owned());
        self.send(&hello).await
    }

    /// There is no session any more, or there was none to be had.
    pub(super) async fn session_lost(&mut self, loss: SessionLoss) -> Result<(), Error> {
        self.hang_up();
        if self.collecting.is_some() {
            return self.collecting_lost(loss).await;
        }
        self.step(Input::NoSession(loss)).await
    }

    pub(super) async fn fault(&mut self, fault: SessionFault) -> Result<(), Error> {
        let message = fault.to_string();
        let loss = match fault {
            fault if fault.is_final() => SessionLoss::Refused(message),
            SessionFault::Silent | SessionFault::Refused(SessionError { code: ErrorCode::Superseded, .. }) => {
                SessionLoss::Lost(message)
            }
            _ => SessionLoss::Broken(message),
        };
        self.session_lost(loss).await
    }

    /// Takes what was read, up to the last whole message.
    pub(super) async fn read(&mut self, read: std::io::Result<usize>) -> Result<(), Error> {
        let n = match read {
            Ok(n @ 1..) => n,
            Ok(_) => {
                self.ended_by_guest();
                return Ok(());
            }
            Err(error) => return self.session_lost(SessionLoss::Lost(error.to_string())).await,
        };
        let now = self.now();
        let Some(live) = &mut self.live else { return Ok(()) };
        live.session.filled(n, now);
        // Bytes before a hello may come from anything; they keep no silent guest alive.
        if live.session.is_open() {
            self.step(Input::Heard).await?;
        }
        let at = crate::clock::now();
        loop {
            match self.take_next(&at) {
                Ok(Taken::Nothing) => return Ok(()),
                Ok(Taken::More) => {}
                Ok(Taken::Refused(error)) => self.refused(error).await?,
                Ok(Taken::End(reason)) => return self.session_lost(ended(reason)).await,
                Ok(Taken::Archived(notice)) => self.archived(&notice).await?,
                Ok(Taken::Output(error)) => return Err(error),
                Err(fault) => return self.fault(fault).await,
            }
        }
    }

    /// The next thing that the session has, into journal, logs and artifacts.
    fn take_next(&mut self, at: &Timestamp) -> Result<Taken, SessionFault> {
        let Self { live, journal, logs, intake, collecting, next_commit, .. } = self;
        let Some(live) = live else { return Ok(Taken::Nothing) };
        let Some(received) = live.session.receive()? else { return Ok(Taken::Nothing) };
        match received {
            Received::Nothing => {}
            Received::Event { head, missing, line, digest } => {
                next_commit.guest.extend(intake.event(journal, at, (&head, missing, digest), line));
            }
            Received::Log { file, offset, bytes } => {
                if !self.keeps_logs {
                    logs.skip(file, offset + bytes.len() as u64);
                } else if let Err(source) = logs.append(file, offset, bytes) {
                    return Ok(Taken::Output(Error::Outputs { path: logs.folder().join(file), source }));
                }
            }
            Received::Entry(entry) => {
                if let Some(collecting) = collecting {
                    collecting.entry(&entry);
                }
            }
            Received::EntryBytes(bytes) => {
                if let Some(collecting) = collecting {
                    collecting.bytes(bytes);
                }
            }
            Received::BadLine { reason, sample } => intake.bad_line(journal, reason, sample),
            Received::Status(status) => {
                if journal.view().status.as_ref() != Some(&status) {
                    intake.document(journal, HostRecord::Status { status: Box::new(status) });
                }
            }
            Received::Result(result) => {
                let wanted = self.spec.policies.output_collection.include_result;
                if wanted && journal.view().result.as_ref() != Some(&result) {
                    intake.document(journal, HostRecord::Result { result: Box::new(result) });
                }
            }
            Received::Opened(opened) => self.opened(&opened),
            Received::Notice(notice) => return Ok(self.notice(notice)),
            Received::Refused(error) => return Ok(Taken::Refused(error)),
            Received::End(reason) => return Ok(Taken::End(reason)),
        }
        Ok(Taken::More)
    }

    fn opened(&mut self, opened: &Opened) {
        let hello = &opened.hello;
        let ours = hello.request_id.as_deref() == Some(self.request_id().as_str());
        let run_lost =
            self.journal.view().start_sent.as_ref().is_some_and(|sent| !ours && sent.stream_id != hello.stream_id);
        // A guest of ours begins few streams in one incarnation; one that goes on beginning them lost its run (Invariant 5).
        let run_lost = run_lost || self.journal.view().streams >= MAX_STREAMS;
        if opened.new_stream {
            // What is pending is of the stream before: behind the record below it would be taken for the new one's.
            self.flush_gathered();
            let cursor = self.live.as_ref().and_then(|live| live.session.cursor());
            self.journal.host(HostRecord::Stream {
                stream_id: hello.stream_id.clone(),
                boot_id: hello.boot_id.clone(),
                agent: hello.agent.chars().take(64).collect(),
                after_seq: cursor.map_or(0, |cursor| cursor.seq),
                digest: cursor.map_or(Digest::EMPTY_STREAM, |cursor| cursor.digest),
            });
        }
        if self.collecting.is_some() {
            self.request_archive();
        } else {
            self.next_commit.hear(Guest::Opened { run_lost });
        }
    }

    fn notice(&mut self, notice: Notice) -> Taken {
        match &notice {
            Notice::Started { request_id } | Notice::AlreadyStarted { request_id } => {
                if *request_id == self.request_id() && !self.journal.view().accepted {
                    self.journal.host(HostRecord::Accepted { request_id: request_id.clone() });
                }
                self.next_commit.hear(Guest::Accepted);
            }
            Notice::Rewound { .. } => self.next_commit.hear(Guest::Rewound),
            Notice::ArchiveDone { .. } => return Taken::Archived(notice),
            _ => {}
        }
        if !matches!(notice, Notice::Started { .. } | Notice::AlreadyStarted { .. }) {
            self.intake.notice(&mut self.journal, notice);
        }
        Taken::More
    }

    async fn refused(&mut self, error: SessionError) -> Result<(), Error> {
        match error.code {
            ErrorCode::Busy | ErrorCode::BadRequest => {
                let refused = HostRecord::StartRefused { message: error.message.clone() };
                self.intake.document(&mut self.journal, refused);
                self.next_commit.hear(Guest::Refused(error.message));
                Ok(())
            }
            ErrorCode::Archive => self.archive_failed(error.message).await,
            ErrorCode::StaleTerm | ErrorCode::UnsupportedProtocol => {
                self.session_lost(SessionLoss::Refused(error.message)).await
            }
            ErrorCode::Superseded => self.session_lost(SessionLoss::Lost(error.message)).await,
            ErrorCode::Ledger | ErrorCode::BadMessage | ErrorCode::NotOwner | ErrorCode::Unknown => {
                self.session_lost(SessionLoss::Broken(error.message)).await
            }
        }
    }

    /// The guest's side ended without a word. Why is Incus's to say, and is asked beside everything else.
    fn ended_by_guest(&mut self) {
        let Some(live) = self.live.take() else { return };
        self.ops.spawn(async move {
            let end = live.diagnosis.explain().await;
            live.hang_up().await;
            Op::Lost(match end {
                AgentEnd::Missing { code } => SessionLoss::NoAgent(format!(
                    "exec of `pika-guest stream` ended with {code}: the image has no agent at a place in its PATH"
                )),
                AgentEnd::Ended { code, stderr } => SessionLoss::Lost(match code {
                    Some(code) => format!("the agent's stream ended with {code}: {stderr}"),
                    None => format!("the agent's stream ended: {stderr}"),
                }),
            })
        });
    }
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
    Archived(Notice),
    /// The host could not keep it.
    Output(Error),
}

fn ended(reason: EndReason) -> SessionLoss {
    match reason {
        EndReason::NewStream => SessionLoss::NewStream,
        EndReason::Done | EndReason::Shutdown | EndReason::Unknown => {
            SessionLoss::Lost("the agent ended the session".to_owned())
        }
    }
}
