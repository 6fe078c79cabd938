//! Appends events and writes the documents that follow from them.

use pika_cloud_common::document::Extra;
use pika_cloud_common::limits::{MAX_COUNT, MAX_DOCUMENT_BYTES, MAX_EVENT_BYTES};
use pika_cloud_common::{Event, EventHead, ResultStatus, RunResult, SCHEMA_VERSION, State, Status, paths};
use rustix::io::{self, Errno};
use serde::Serialize;
use serde_json::{Value, json};

use super::error::LedgerError;
use super::room::Claim;
use super::{Locked, caps, room, system};

/// What an event is to say.
#[derive(Clone, Debug, PartialEq)]
pub enum What {
    /// The runtime enters this state.
    State(State),
    /// Progress: repeats the current state, and may be refused at the cap.
    Progress,
    /// A notice: repeats the current state.
    Notice,
}

/// An event that has no `seq` yet.
#[derive(Clone, Debug, PartialEq)]
pub struct Draft {
    /// What it is to say.
    pub what: What,
    /// For a person.
    pub message: String,
    /// For a program.
    pub details: Option<Value>,
}

impl Draft {
    fn is_terminal(&self) -> bool {
        matches!(&self.what, What::State(state) if state.is_terminal())
    }

    /// What it may use of the room that is kept; `last` where the batch ends the stream.
    fn claim(&self, last: bool) -> Claim {
        match self.what {
            What::Progress => Claim::Progress,
            // A few bytes that tell what is missing, with the last word.
            What::Notice if last => Claim::Terminal,
            What::State(_) if self.is_terminal() => Claim::Terminal,
            What::State(_) | What::Notice => Claim::State,
        }
    }
}

/// How far a batch came.
#[derive(Debug)]
pub struct Appended {
    /// How many of the drafts are in the file.
    pub count: usize,
    /// The last event in the file.
    pub last_seq: u64,
    /// Why the next one is not, where one is not.
    pub refusal: Option<LedgerError>,
}

impl Appended {
    /// The last event's `seq`, where all of the batch was taken.
    pub fn all(self) -> Result<u64, LedgerError> {
        match self.refusal {
            None => Ok(self.last_seq),
            Some(refusal) => Err(refusal),
        }
    }
}

/// The lines of a batch, before they are written.
#[derive(Default)]
struct Batch {
    bytes: Vec<u8>,
    /// For each event: where its line ends, and itself where it changes the state.
    ends: Vec<(usize, Option<Event>)>,
    /// A notice stands before the drafts.
    notices: usize,
}

impl Locked<'_> {
    /// Appends `drafts` in order, by one write, up to the first that is refused.
    pub fn append(&mut self, drafts: &[Draft]) -> Result<Appended, LedgerError> {
        let last = drafts.iter().any(Draft::is_terminal);
        if self.last.is_terminal() {
            self.mend()?;
        } else if !matches!(drafts.first(), Some(Draft { what: What::State(_), .. })) {
            // The last word does not wait for room for an earlier document; its own takes that one's place.
            self.mend_status().or_else(|error| if last && error.is_full() { Ok(()) } else { Err(error) })?;
        }
        let mut cap = caps::Cap::of(self);
        let mut batch = Batch::default();
        let mut place = Place { seq: self.last.seq, state: self.last.state.clone() };
        let dropped = caps::take_dropped(self);
        if let Some(count) = dropped.filter(|_| !place.state.is_terminal() && cap.admits(self, 512, true)) {
            let notice = caps::drop_notice(count);
            if self.has_room(512, notice.claim(last)) {
                self.add(&mut batch, &mut place, &notice)?;
                batch.notices = 1;
            }
        }
        let mut refusal = None;
        for draft in drafts {
            if let Err(error) = self.try_add(&mut batch, &mut place, &mut cap, (draft, last)) {
                refusal = Some(error);
                break;
            }
        }
        let is_progress =
            drafts.get(batch.ends.len() - batch.notices).is_some_and(|draft| draft.what == What::Progress);
        let no_room = is_progress && matches!(refusal, Some(LedgerError::NoRoom { .. }));
        if no_room || matches!(refusal, Some(LedgerError::Capped { .. })) {
            let told = batch.notices == 1;
            caps::count_dropped(self, if told { 1 } else { dropped.unwrap_or(0) + 1 })?;
        } else if batch.notices == 1 {
            caps::forget_dropped(self)?;
        }
        let wanted = drafts.len();
        self.commit(batch, refusal, wanted)
    }

    /// Appends one event.
    pub fn append_one(&mut self, draft: Draft) -> Result<u64, LedgerError> {
        self.append(&[draft])?.all()
    }

    fn try_add(
        &mut self,
        batch: &mut Batch,
        place: &mut Place,
        cap: &mut caps::Cap,
        (draft, last): (&Draft, bool),
    ) -> Result<(), LedgerError> {
        if place.state.is_terminal() {
            return Err(LedgerError::AlreadyTerminal { state: place.state.to_string(), seq: place.seq });
        }
        let before = batch.bytes.len();
        let saved = place.clone();
        self.add(batch, place, draft)?;
        let refusal = if !cap.admits(self, batch.bytes.len(), draft.what != What::Progress) {
            cap.refusal(self)
        } else if !self.has_room(batch.bytes.len(), draft.claim(last)) {
            LedgerError::NoRoom { path: self.events_path() }
        } else {
            return Ok(());
        };
        batch.bytes.truncate(before);
        batch.ends.pop();
        *place = saved;
        Err(refusal)
    }

    /// Puts the draft's line into the batch and moves `place` behind it.
    fn add(&self, batch: &mut Batch, place: &mut Place, draft: &Draft) -> Result<(), LedgerError> {
        let seq = Some(place.seq + 1).filter(|&seq| seq <= MAX_COUNT);
        let seq = seq.ok_or_else(|| LedgerError::SeqExhausted { path: self.events_path() })?;
        let kind = match &draft.what {
            What::State(state) => state.clone(),
            What::Progress | What::Notice => place.state.clone(),
        };
        let event = Event {
            schema_version: SCHEMA_VERSION,
            seq,
            timestamp: system::now(),
            kind,
            message: draft.message.clone(),
            boot_id: Some(self.ledger.boot_id.clone()),
            details: draft.details.clone(),
            extra: Extra::new(),
        };
        let before = batch.bytes.len();
        to_json(&event, &mut batch.bytes);
        let bytes = batch.bytes.len() - before;
        if bytes > MAX_EVENT_BYTES {
            batch.bytes.truncate(before);
            return Err(LedgerError::TooLong { bytes });
        }
        if let Err(source) = EventHead::decode(&batch.bytes[before..]) {
            let source = LedgerError::Unreadable { source };
            batch.bytes.truncate(before);
            return Err(source);
        }
        batch.bytes.push(b'\n');
        place.seq = seq;
        let changes = event.changes_state();
        if changes {
            place.state = event.kind.clone();
        }
        batch.ends.push((batch.bytes.len(), changes.then_some(event)));
        Ok(())
    }

    /// Writes the batch, and what follows from the part of it that got in.
    fn commit(
        &mut self,
        batch: Batch,
        mut refusal: Option<LedgerError>,
        wanted: usize,
    ) -> Result<Appended, LedgerError> {
        let notices = batch.notices;
        let mut count = batch.ends.len();
        if !batch.bytes.is_empty() {
            let (written, errno) = match io::write(&self.events, &batch.bytes) {
                Ok(written) => (written, Errno::NOSPC),
                Err(errno) => (0, errno),
            };
            if written < batch.bytes.len() {
                count = batch.ends.iter().take_while(|(end, _)| *end <= written).count();
                // Whole lines may have been read by now and stay; the torn one goes.
                let whole = count.checked_sub(1).map_or(0, |last| batch.ends[last].0);
                let _ = rustix::fs::ftruncate(&self.events, self.len + whole as u64);
                self.allocated = 0;
                let written = count.saturating_sub(notices);
                refusal = Some(LedgerError::Partial { path: self.events_path(), errno, written, wanted });
            }
        }
        if let Some(at) = count.checked_sub(1) {
            self.len += batch.ends[at].0 as u64;
            self.last.seq += count as u64;
            let changed = batch.ends.into_iter().take(count).filter_map(|(_, event)| event).next_back();
            let seq = self.last.seq;
            self.set_hint(seq)
                .and_then(|()| self.enter(changed))
                .map_err(|source| LedgerError::NotDerived { seq, source: Box::new(source) })?;
        }
        Ok(Appended { count: count.saturating_sub(notices), last_seq: self.last.seq, refusal })
    }

    /// Writes the documents of a new state.
    fn enter(&mut self, changed: Option<Event>) -> Result<(), LedgerError> {
        let Some(event) = changed else { return Ok(()) };
        self.last.state = event.kind.clone();
        if event.kind.is_terminal() {
            self.give_back();
        }
        let written = self.write_documents(&event);
        self.last.state_event = Some(event);
        written
    }

    fn write_documents(&self, event: &Event) -> Result<(), LedgerError> {
        let folder = &self.ledger.folder;
        if let Some(result) = result_of(event) {
            folder.replace(paths::RESULT, &document(&result), false)?;
        }
        folder.replace(paths::STATUS, &document(&status_of(event)), false)
    }

    /// Makes `result.json` and `status.json` agree with the events, where a writer died between them, and sees to the room
    /// that is kept.
    pub fn mend(&mut self) -> Result<(), LedgerError> {
        room::keep_reserve(&self.ledger.folder);
        if let Some(event) = &self.last.state_event
            && let Some(wanted) = result_of(event)
        {
            let folder = &self.ledger.folder;
            let found = folder.read(paths::RESULT, MAX_DOCUMENT_BYTES).ok().flatten();
            let found = found.and_then(|text| RunResult::decode(&text).ok());
            let agrees = |found: &RunResult| found.status == wanted.status && found.finished_at == wanted.finished_at;
            if !found.as_ref().is_some_and(agrees) {
                folder.replace(paths::RESULT, &document(&wanted), false)?;
            }
        }
        self.mend_status()?;
        self.set_hint(self.last.seq)
    }

    /// Makes `status.json` agree with the last state event, where that was read.
    fn mend_status(&mut self) -> Result<(), LedgerError> {
        let Some(event) = &self.last.state_event else { return Ok(()) };
        let folder = &self.ledger.folder;
        let found = folder.read(paths::STATUS, MAX_DOCUMENT_BYTES).ok().flatten();
        let found = found.and_then(|text| Status::decode(&text).ok());
        let agrees = |found: &Status| found.state == event.kind && found.updated_at == event.timestamp;
        if !found.as_ref().is_some_and(agrees) {
            folder.replace(paths::STATUS, &document(&status_of(event)), false)?;
        }
        Ok(())
    }

    /// Records in `result.json` and `status.json` the exit code of a workload that had said its last word before.
    pub fn note_exit_code(&mut self, code: i32) -> Result<(), LedgerError> {
        let folder = &self.ledger.folder;
        self.mend()?;
        if let Some(text) = folder.read(paths::RESULT, MAX_DOCUMENT_BYTES)?
            && let Ok(mut result) = RunResult::decode(&text)
        {
            result.extra.insert("workload_exit_code".to_owned(), json!(code));
            folder.replace(paths::RESULT, &document(&result), false)?;
        }
        if let Some(text) = folder.read(paths::STATUS, MAX_DOCUMENT_BYTES)?
            && let Ok(mut status) = Status::decode(&text)
        {
            status.extra.insert("workload_exit_code".to_owned(), json!(code));
            folder.replace(paths::STATUS, &document(&status), false)?;
        }
        Ok(())
    }

    pub(super) fn events_path(&self) -> std::path::PathBuf {
        self.ledger.folder.path_of(paths::EVENTS)
    }
}

/// Where the stream will stand behind the lines of a batch.
#[derive(Clone)]
struct Place {
    seq: u64,
    state: State,
}

fn status_of(event: &Event) -> Status {
    Status {
        schema_version: SCHEMA_VERSION,
        state: event.kind.clone(),
        updated_at: event.timestamp.clone(),
        message: event.message.clone(),
        boot_id: event.boot_id.clone(),
        details: event.details.clone(),
        extra: Extra::new(),
    }
}

fn result_of(event: &Event) -> Option<RunResult> {
    let status = match event.kind {
        State::Completed => ResultStatus::Completed,
        State::Failed => ResultStatus::Failed,
        _ => return None,
    };
    Some(RunResult {
        schema_version: SCHEMA_VERSION,
        status,
        finished_at: event.timestamp.clone(),
        message: event.message.clone(),
        exit_code: event.exit_code(),
        details: event.details.clone(),
        extra: Extra::new(),
    })
}

fn document(value: &impl Serialize) -> Vec<u8> {
    let mut text = Vec::with_capacity(512);
    to_json(value, &mut text);
    text.push(b'\n');
    text
}

fn to_json(value: &impl Serialize, out: &mut Vec<u8>) {
    // Writing to a Vec cannot fail, and every key of the contract's documents is a string.
    serde_json::to_writer(out, value).expect("documents are serializable");
}
