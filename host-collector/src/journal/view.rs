//! What a journal says, folded into one value. The collector appends to its journal and to this together, so that what it
//! knows while it runs is what it would know after a crash.

use std::collections::BTreeMap;
use std::time::Duration;

use pika_cloud_common::digest::Digest;
use pika_cloud_common::verdict::{Collection, LastEvent, Outcome};
use pika_cloud_common::wire::{AgentOrigin, Cursor, Notice, Transport};
use pika_cloud_common::{Command, Event, EventHead, RunResult, State, Status, Timestamp, Verdict};
use serde::{Deserialize, Serialize};

use super::format::{Body, HostRecord, Record};
use crate::clock::{Now, timestamp, wall_of};

/// No clock of ours is that far off.
const TEN_YEARS: Duration = Duration::from_secs(10 * 366 * 86_400);

/// When something was recorded: on both clocks, to the microsecond.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// The host's monotonic clock, since its boot.
    #[serde(with = "micros")]
    pub mono: Duration,
    /// Since 1970-01-01T00:00:00Z.
    #[serde(with = "micros")]
    pub wall: Duration,
    /// In which of the host's boots, as [`View::host_boots`] counts them.
    pub boot: u32,
}

impl Moment {
    /// As a document shows it.
    pub fn timestamp(&self) -> Timestamp {
        timestamp(self.wall)
    }
}

/// Over a boot of the host.
fn since_an_earlier_boot(moment: &Moment, now: Now) -> Duration {
    now.wall.saturating_sub(moment.wall).min(TEN_YEARS).max(now.mono)
}

/// What of a duration a record keeps.
fn whole_micros(duration: Duration) -> Duration {
    Duration::from_micros(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX))
}

/// Durations as whole microseconds.
mod micros {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        u64::deserialize(deserializer).map(Duration::from_micros)
    }
}

/// A document of the guest as a string that holds its JSON: as a value, one that is nested as deep as a reader takes would be
/// a level too deep in what stands around it.
mod as_text {
    use serde::de::{DeserializeOwned, Error as _};
    use serde::{Deserialize, Deserializer, Serialize, Serializer, ser::Error as _};

    #[expect(clippy::ref_option, reason = "the form that serde asks for")]
    pub(super) fn serialize<T: Serialize, S: Serializer>(
        document: &Option<T>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let text = document.as_ref().map(serde_json::to_string).transpose().map_err(S::Error::custom)?;
        text.serialize(serializer)
    }

    pub(super) fn deserialize<'de, T: DeserializeOwned, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<T>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| serde_json::from_str(&text)).transpose().map_err(D::Error::custom)
    }
}

/// The end of an incarnation, decided and not yet concluded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
    pub at: Moment,
}

/// That the guest was asked to start its workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartSent {
    /// Runtime and incarnation.
    pub request_id: String,
    /// In which stream.
    pub stream_id: String,
    /// When.
    pub at: Moment,
}

/// That the instance is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Since when.
    pub at: Moment,
    /// For how long; without it, until somebody stops it.
    pub for_secs: Option<u64>,
}

/// That the incarnation is over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finished {
    /// Since when.
    pub at: Moment,
    /// Whether its instance is gone.
    pub destroyed: bool,
    /// When the next incarnation begins, in milliseconds from `at`.
    pub restart_in_ms: Option<u64>,
}

/// That another owner acts on the instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakenOver {
    /// Who.
    pub owner: String,
    /// Its term.
    pub term: u64,
}

/// What is known of a runtime's current incarnation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct View {
    /// Counts from 1; 0 before the first.
    pub incarnation: u32,
    /// The number of the next record.
    pub next_n: u64,
    /// The owner's term that this collector acts in; stays over incarnations.
    pub term: u64,
    /// The host's boot that wrote the last records; stays over incarnations.
    pub host_boot: Option<String>,
    /// How many boots of the host wrote records: a [`Moment`] is of the present one if it names this number.
    pub host_boots: u32,
    /// When it was requested.
    pub requested_at: Option<Moment>,
    /// Restarts in a row that led to it.
    pub restarts: u32,
    /// The state that was entered last, by host or guest.
    pub state: Option<State>,
    /// When Incus was last about to be asked to start the instance.
    pub starting_at: Option<Moment>,
    /// When the agent was first heard.
    pub booted_at: Option<Moment>,
    /// Whether the workload said that it is ready.
    pub is_ready: bool,
    /// When the last progress came.
    pub progress_at: Option<Moment>,
    /// How far the stream is in the journal, and the logs beside it.
    pub cursor: Option<Cursor>,
    /// Streams that were followed so far.
    pub streams: u32,
    /// The hash of the spec that it was begun for.
    pub spec_hash: Option<String>,
    /// The guest's boot in which the stream began.
    pub boot_id: Option<String>,
    /// The agent's version.
    pub agent: Option<String>,
    /// By which way the last session came.
    pub transport: Option<Transport>,
    /// Whose agent it was with.
    #[serde(default)]
    pub agent_origin: Option<AgentOrigin>,
    /// Whether, and when, the guest was asked to start its workload.
    pub start_sent: Option<StartSent>,
    /// When the guest said that it had.
    pub accepted_at: Option<Moment>,
    /// The terminal event of the guest. A snapshot holds it as text, in which nothing is nested deeper than in its line.
    #[serde(with = "as_text")]
    pub terminal: Option<Event>,
    /// The guest's `status.json`, as last seen.
    pub status: Option<Status>,
    /// The guest's `result.json`, as last seen.
    pub result: Option<RunResult>,
    /// What a user wants: the most of it.
    pub command: Option<Command>,
    /// The end, once decided.
    pub ended: Option<Ended>,
    /// The end of the console, where the agent was never heard.
    pub console: Option<String>,
    /// How far collection came, once it was tried.
    pub collection: Option<Collection>,
    /// The verdict.
    pub verdict: Option<Verdict>,
    /// That the instance is kept.
    pub kept: Option<Kept>,
    /// That the incarnation is over.
    pub finished: Option<Finished>,
    /// That another owner acts on the instance.
    pub taken_over: Option<TakenOver>,
    /// Bytes of guest records.
    pub event_bytes: u64,
    /// Lines that were no events.
    pub bad_lines: u64,
    /// Events or log bytes that are missing.
    pub gaps: u64,
    /// The length of each log file on the host, as far as it is durable.
    pub log_lengths: BTreeMap<String, u64>,
    guest_state: Option<State>,
    last_line: String,
}

impl Default for View {
    fn default() -> Self {
        Self {
            incarnation: 0,
            next_n: 0,
            term: 1,
            host_boot: None,
            host_boots: 0,
            requested_at: None,
            restarts: 0,
            state: None,
            starting_at: None,
            booted_at: None,
            is_ready: false,
            progress_at: None,
            cursor: None,
            streams: 0,
            spec_hash: None,
            boot_id: None,
            agent: None,
            transport: None,
            agent_origin: None,
            start_sent: None,
            accepted_at: None,
            terminal: None,
            status: None,
            result: None,
            command: None,
            ended: None,
            console: None,
            collection: None,
            verdict: None,
            kept: None,
            finished: None,
            taken_over: None,
            event_bytes: 0,
            bad_lines: 0,
            gaps: 0,
            log_lengths: BTreeMap::new(),
            guest_state: None,
            last_line: String::new(),
        }
    }
}

impl View {
    /// Whether nothing more happens by itself: the instance is kept, or gone, and no restart follows; or another has it.
    pub fn is_settled(&self) -> bool {
        let is_finished = self.finished.as_ref().is_some_and(|finished| finished.restart_in_ms.is_none());
        is_finished || self.kept.is_some() || self.taken_over.is_some()
    }

    /// Takes a record in.
    pub fn apply(&mut self, record: &Record) {
        self.next_n = record.n + 1;
        let wall = wall_of(record.at.as_str()).unwrap_or_default();
        let at = Moment { mono: Duration::from_micros(record.mono), wall, boot: self.host_boots };
        match &record.body {
            Body::Host(host) => self.apply_host(record.inc, at, host),
            Body::Guest(line) => self.recover_guest(at, line.get()),
        }
    }

    /// When something is taken in that is recorded now.
    pub(super) fn moment(&self, now: Now) -> Moment {
        Moment { mono: whole_micros(now.mono), wall: whole_micros(now.wall), boot: self.host_boots }
    }

    /// How long ago something was, for whoever writes the journal, and told it of this boot. In the same boot of the host the monotonic clock says it; over a boot, wall time does,
    /// which may have been set anew: never less than this boot has lasted, and never more than ten years.
    pub fn ago(&self, moment: &Moment, now: Now) -> Duration {
        if moment.boot == self.host_boots {
            return now.mono.saturating_sub(moment.mono);
        }
        since_an_earlier_boot(moment, now)
    }

    /// As [`View::ago`], where nothing was written in this boot of the host, or nobody knows whether: `boot_id` names it.
    pub fn ago_in(&self, moment: &Moment, boot_id: &str, now: Now) -> Duration {
        if self.host_boot.as_deref() == Some(boot_id) {
            return self.ago(moment, now);
        }
        since_an_earlier_boot(moment, now)
    }

    /// The same without the guest's `status.json` and `result.json`.
    pub(super) fn without_documents(&self) -> Self {
        Self { status: None, result: None, ..self.clone() }
    }

    /// The last event of the guest.
    pub fn last_event(&self) -> Option<LastEvent> {
        let event = Event::decode(self.last_line.as_bytes()).ok()?;
        Some(LastEvent { seq: event.seq, kind: event.kind, message: event.message })
    }

    /// Takes in an event that stands in the journal, and was checked before it was written.
    fn recover_guest(&mut self, at: Moment, line: &str) {
        let Ok(head) = EventHead::decode(line.as_bytes()) else { return };
        let before = self.cursor.as_ref().map_or(Digest::EMPTY_STREAM, |cursor| cursor.digest);
        self.apply_guest(at, &head, line, before.chain(line.as_bytes()));
    }

    /// Takes an event in. `digest` is the stream's with it.
    pub(super) fn apply_guest(&mut self, at: Moment, head: &EventHead<'_>, line: &str, digest: Digest) {
        self.event_bytes += line.len() as u64;
        self.last_line.clear();
        self.last_line.push_str(line);
        if let Some(cursor) = &mut self.cursor {
            (cursor.seq, cursor.digest) = (head.seq, digest);
        }
        if head.has_progress {
            self.progress_at = Some(at);
        }
        self.apply_kind(&head.kind, line.as_bytes(), head.has_progress);
    }

    /// An event that repeats the state is the usual one, and is not read any further; before any state, progress repeats
    /// `starting`.
    fn apply_kind(&mut self, kind: &str, line: &[u8], progress: bool) {
        match &self.guest_state {
            Some(state) if state.as_str() == kind => return,
            None if kind == State::Starting.as_str() && progress => return,
            _ => {}
        }
        let Ok(event) = Event::decode(line) else { return };
        if event.changes_state() {
            self.guest_state = Some(event.kind.clone());
            self.state = Some(event.kind.clone());
            self.is_ready |= event.kind == State::Ready;
            if event.kind.is_terminal() && self.terminal.is_none() {
                self.terminal = Some(event);
            }
        }
    }

    fn apply_host(&mut self, incarnation: u32, at: Moment, record: &HostRecord) {
        match record {
            HostRecord::Requested { spec_hash, restarts } => self.begin(incarnation, at, spec_hash, *restarts),
            HostRecord::HostBoot { boot_id } => {
                self.host_boot = Some(boot_id.clone());
                self.host_boots = self.host_boots.saturating_add(1);
            }
            HostRecord::InstanceStarting {} => self.starting_at = Some(at),
            HostRecord::State { state, .. } => {
                if *state == State::Provisioning {
                    // It is made or started once more; what was started before is gone.
                    self.starting_at = None;
                }
                if *state == State::Booted && self.booted_at.is_none() {
                    self.booted_at = Some(at);
                }
                // A guest that is heard again is where it was; only its own words change that.
                let back = self
                    .guest_state
                    .clone()
                    .filter(|_| *state == State::Booted && self.state == Some(State::Unreachable));
                self.state = Some(back.unwrap_or_else(|| state.clone()));
            }
            HostRecord::Stream { stream_id, boot_id, agent, after_seq, digest } => {
                self.begin_stream(stream_id, *after_seq, *digest);
                self.streams += 1;
                self.boot_id = Some(boot_id.clone());
                self.agent = Some(agent.clone());
            }
            HostRecord::Session { transport, agent } => {
                (self.transport, self.agent_origin) = (Some(*transport), Some(*agent));
            }
            HostRecord::StartSent { request_id } => {
                let stream_id = self.cursor.as_ref().map(|c| c.stream_id.clone()).unwrap_or_default();
                self.start_sent = Some(StartSent { request_id: request_id.clone(), stream_id, at });
            }
            HostRecord::StartRefused { .. } => {}
            HostRecord::Accepted { .. } => self.accepted_at = Some(at),
            HostRecord::Logs { logs } => {
                if let Some(cursor) = &mut self.cursor {
                    cursor.logs.extend(logs.iter().map(|(file, mark)| (file.clone(), mark.guest)));
                }
                self.log_lengths.extend(logs.iter().map(|(file, mark)| (file.clone(), mark.host)));
            }
            HostRecord::Missing { count, .. } => self.gaps = self.gaps.saturating_add(*count),
            HostRecord::BadLine { .. } => self.bad_lines += 1,
            HostRecord::Notice { notice } => self.apply_notice(notice),
            HostRecord::Status { status } => self.status = Some((**status).clone()),
            HostRecord::Result { result } => self.result = Some((**result).clone()),
            HostRecord::Command { command } => self.command = self.command.max(Some(*command)),
            HostRecord::Term { term } => {
                self.term = *term;
                // Under a higher one it was taken back.
                self.taken_over.take_if(|taken| taken.term < *term);
            }
            HostRecord::TakenOver { owner, term } => {
                self.taken_over = Some(TakenOver { owner: owner.clone(), term: *term });
            }
            HostRecord::Ended { .. }
            | HostRecord::Console { .. }
            | HostRecord::Collected { .. }
            | HostRecord::Verdict { .. }
            | HostRecord::Kept { .. }
            | HostRecord::Finished { .. } => self.apply_end(at, record),
        }
    }

    /// All is new but what is the runtime's own.
    fn begin(&mut self, incarnation: u32, at: Moment, spec_hash: &str, restarts: u32) {
        *self = Self {
            incarnation,
            next_n: self.next_n,
            term: self.term,
            host_boot: self.host_boot.take(),
            host_boots: self.host_boots,
            requested_at: Some(at),
            restarts,
            spec_hash: Some(spec_hash.to_owned()),
            state: Some(State::Requested),
            ..Self::default()
        };
    }

    /// What ends an incarnation, in its order.
    fn apply_end(&mut self, at: Moment, record: &HostRecord) {
        match record {
            HostRecord::Ended { outcome, message, error, instance_status } => {
                self.ended = Some(Ended {
                    outcome: outcome.clone(),
                    message: message.clone(),
                    error: error.clone(),
                    instance_status: instance_status.clone(),
                    at,
                });
            }
            HostRecord::Console { tail } => self.console = Some(tail.clone()),
            HostRecord::Collected { collection } => self.collection = Some(collection.clone()),
            HostRecord::Verdict { verdict } => self.verdict = Some((**verdict).clone()),
            HostRecord::Kept { for_secs } => self.kept = Some(Kept { at, for_secs: *for_secs }),
            HostRecord::Finished { destroyed, restart_in_ms } => {
                self.finished = Some(Finished { at, destroyed: *destroyed, restart_in_ms: *restart_in_ms });
            }
            _ => {}
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
