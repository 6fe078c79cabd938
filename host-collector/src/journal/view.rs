//! What a journal says, folded into one value. The collector appends to its journal and to this together, so that what it
//! knows while it runs is what it would know after a crash.

use std::collections::BTreeMap;

use pika_cloud_common::digest::Digest;
use pika_cloud_common::verdict::{Collection, LastEvent, Outcome};
use pika_cloud_common::wire::{Cursor, Notice};
use pika_cloud_common::{Event, EventHead, RunResult, State, Status, Timestamp, Verdict};

use serde::Deserialize;
use serde_json::value::RawValue;

use super::format::{Body, HostRecord, Record};

/// The end of an incarnation, decided and not yet concluded.
#[derive(Clone, Debug, PartialEq)]
pub struct Ended {
    /// How.
    pub outcome: Outcome,
    /// For a person.
    pub message: String,
    /// What Incus or the session answered.
    pub error: Option<String>,
    /// Incus's own word for the instance.
    pub instance_status: Option<String>,
    /// When it was decided.
    pub at: Timestamp,
}

/// That the guest was asked to start its workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartSent {
    /// Runtime and incarnation.
    pub request_id: String,
    /// In which stream.
    pub stream_id: String,
    /// When.
    pub at: Timestamp,
}

/// What is known of a runtime's current incarnation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    /// Counts from 1; 0 before the first.
    pub incarnation: u32,
    /// The number of the next record.
    pub next_n: u64,
    /// When it was requested.
    pub requested_at: Option<Timestamp>,
    /// The state that was entered last, by host or guest.
    pub state: Option<State>,
    /// How far the stream is in the journal, and the logs beside it.
    pub cursor: Option<Cursor>,
    /// Streams that were followed so far.
    pub streams: u32,
    /// The hash of the spec that it was begun for.
    pub spec_hash: Option<String>,
    /// The boot in which the stream began.
    pub boot_id: Option<String>,
    /// The agent's version.
    pub agent: Option<String>,
    /// Whether, and when, the guest was asked to start its workload.
    pub start_sent: Option<StartSent>,
    /// Whether the guest said that it had.
    pub accepted: bool,
    /// The terminal event of the guest.
    pub terminal: Option<Event>,
    /// The guest's `status.json`, as last seen.
    pub status: Option<Status>,
    /// The guest's `result.json`, as last seen.
    pub result: Option<RunResult>,
    /// The end, once decided.
    pub ended: Option<Ended>,
    /// How far collection came, once it was tried.
    pub collection: Option<Collection>,
    /// The verdict.
    pub verdict: Option<Verdict>,
    /// Whether the incarnation is over.
    pub finished: bool,
    /// Bytes of guest records.
    pub event_bytes: u64,
    /// Lines that were no events.
    pub bad_lines: u64,
    /// Events or log bytes that are missing.
    pub gaps: u64,
    /// The length of each log file on the host, as far as it is durable.
    pub log_lengths: BTreeMap<String, u64>,
    guest_state: Option<State>,
    last_line: Vec<u8>,
}

/// Whether an event's `details` hold `progress`, without reading what it holds.
fn is_progress(line: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Probe<'a> {
        #[serde(borrow)]
        details: Option<&'a RawValue>,
    }
    #[derive(Deserialize)]
    struct Details<'a> {
        #[serde(borrow)]
        progress: Option<&'a RawValue>,
    }
    let details = serde_json::from_slice::<Probe<'_>>(line).ok().and_then(|probe| probe.details);
    let details = details.and_then(|details| serde_json::from_str::<Details<'_>>(details.get()).ok());
    details.is_some_and(|details| details.progress.is_some())
}

impl View {
    /// Takes a record in.
    pub fn apply(&mut self, record: &Record) {
        self.next_n = record.n + 1;
        match &record.body {
            Body::Journal(_) => {}
            Body::Host(host) => self.apply_host(record.inc, &record.at, host),
            Body::Guest(line) => self.recover_guest(line.get().as_bytes()),
        }
    }

    /// The last event of the guest.
    pub fn last_event(&self) -> Option<LastEvent> {
        let event = Event::decode(&self.last_line).ok()?;
        Some(LastEvent { seq: event.seq, kind: event.kind, message: event.message })
    }

    /// Takes in an event that stands in the journal, and was checked before it was written.
    fn recover_guest(&mut self, line: &[u8]) {
        let Ok(head) = EventHead::decode(line) else { return };
        let before = self.cursor.as_ref().map_or(Digest::EMPTY_STREAM, |cursor| cursor.digest);
        self.apply_guest(&head, line, before.chain(line));
    }

    /// Takes an event in. `digest` is the stream's with it.
    pub(super) fn apply_guest(&mut self, head: &EventHead<'_>, line: &[u8], digest: Digest) {
        self.event_bytes += line.len() as u64;
        self.last_line.clear();
        self.last_line.extend_from_slice(line);
        if let Some(cursor) = &mut self.cursor {
            (cursor.seq, cursor.digest) = (head.seq, digest);
        }
        self.apply_kind(&head.kind, line);
    }

    /// An event that repeats the state is the usual one, and is not read any further; before any state, progress repeats
    /// `starting`.
    fn apply_kind(&mut self, kind: &str, line: &[u8]) {
        match &self.guest_state {
            Some(state) if state.as_str() == kind => return,
            None if kind == State::Starting.as_str() && is_progress(line) => return,
            _ => {}
        }
        let Ok(event) = Event::decode(line) else { return };
        if event.changes_state() {
            self.guest_state = Some(event.kind.clone());
            self.state = Some(event.kind.clone());
            if event.kind.is_terminal() && self.terminal.is_none() {
                self.terminal = Some(event);
            }
        }
    }

    fn apply_host(&mut self, incarnation: u32, at: &Timestamp, record: &HostRecord) {
        match record {
            HostRecord::Requested { spec_hash } => {
                *self = Self {
                    incarnation,
                    next_n: self.next_n,
                    requested_at: Some(at.clone()),
                    spec_hash: Some(spec_hash.clone()),
                    state: Some(State::Requested),
                    ..Self::default()
                };
            }
            HostRecord::State { state, .. } => self.state = Some(state.clone()),
            HostRecord::Stream { stream_id, boot_id, agent, after_seq, digest } => {
                self.begin_stream(stream_id, *after_seq, *digest);
                self.streams += 1;
                self.boot_id = Some(boot_id.clone());
                self.agent = Some(agent.clone());
            }
            HostRecord::StartSent { request_id } => {
                let stream_id = self.cursor.as_ref().map(|c| c.stream_id.clone()).unwrap_or_default();
                self.start_sent = Some(StartSent { request_id: request_id.clone(), stream_id, at: at.clone() });
            }
            HostRecord::StartRefused { .. } => {}
            HostRecord::Accepted { .. } => self.accepted = true,
            HostRecord::Logs { logs } => {
                if let Some(cursor) = &mut self.cursor {
                    cursor.logs.extend(logs.iter().map(|(file, mark)| (file.clone(), mark.guest)));
                }
                self.log_lengths.extend(logs.iter().map(|(file, mark)| (file.clone(), mark.host)));
            }
            HostRecord::Missing { count, .. } => self.gaps = self.gaps.saturating_add(*count),
            HostRecord::Dropped { seq, digest, count } => {
                self.gaps = self.gaps.saturating_add(*count);
                if let Some(cursor) = &mut self.cursor {
                    (cursor.seq, cursor.digest) = (*seq, *digest);
                }
            }
            HostRecord::BadLine { .. } => self.bad_lines += 1,
            HostRecord::Notice { notice } => self.apply_notice(notice),
            HostRecord::Status { status } => self.status = Some((**status).clone()),
            HostRecord::Result { result } => self.result = Some((**result).clone()),
            HostRecord::Ended { outcome, message, error, instance_status } => {
                self.ended = Some(Ended {
                    outcome: outcome.clone(),
                    message: message.clone(),
                    error: error.clone(),
                    instance_status: instance_status.clone(),
                    at: at.clone(),
                });
            }
            HostRecord::Collected { collection } => self.collection = Some(collection.clone()),
            HostRecord::Verdict { verdict } => self.verdict = Some((**verdict).clone()),
            HostRecord::Finished { .. } => self.finished = true,
        }
    }

    /// A stream goes on behind what was trimmed of it, or another one begins, whose logs begin anew.
    fn begin_stream(&mut self, stream_id: &str, seq: u64, digest: Digest) {
        let logs = match self.cursor.take() {
            Some(cursor) if cursor.stream_id == stream_id => {
                self.gaps = self.gaps.saturating_add(seq.saturating_sub(cursor.seq));
                cursor.logs
            }
            _ => {
                self.guest_state = None;
                BTreeMap::new()
            }
        };
        self.cursor = Some(Cursor { stream_id: stream_id.to_owned(), seq, digest, logs });
    }

    fn apply_notice(&mut self, notice: &Notice) {
        match notice {
            Notice::BadLine { .. } => self.bad_lines += 1,
            Notice::Gap { .. } | Notice::LogGap { .. } => self.gaps += 1,
            _ => {}
        }
    }
}
