//! From what a session received to records and what the machine should know. No decisions.

use pika_cloud_common::EventHead;
use pika_cloud_common::digest::Digest;
use pika_cloud_common::limits;
use pika_cloud_common::wire::Notice;

use crate::clock::Now;
use crate::journal::{HostRecord, Records};
use crate::machine::{Guest, last_word};

/// Journal bytes for what a guest says beside its events; beyond it, nothing of that kind is written down (Invariant 5).
const MAX_NOTE_BYTES: usize = 4 * 1024 * 1024;
/// The same for its `status.json` and `result.json`, so that chatter costs no result.
const MAX_DOCUMENT_BYTES: usize = 4 * 1024 * 1024;

/// What is known of the incoming stream beside the journal.
#[derive(Debug)]
pub(super) struct Intake {
    notes: Budget,
    documents: Budget,
}

impl Default for Intake {
    fn default() -> Self {
        Self { notes: Budget(MAX_NOTE_BYTES), documents: Budget(MAX_DOCUMENT_BYTES) }
    }
}

impl Intake {
    /// Takes an event into the journal, and tells what it means to the machine.
    pub(super) fn event(
        &mut self,
        records: &mut Records,
        now: Now,
        (head, missing, digest): (&EventHead<'_>, u64, Digest),
        line: &[u8],
    ) -> Option<Guest> {
        if missing > 0 {
            let left_out = HostRecord::Missing { after_seq: head.seq - missing - 1, count: missing };
            self.notes.spend(records, left_out, now);
        }
        let before = records.view().state.clone();
        let had_terminal = records.view().terminal.is_some();
        let progress_before = records.view().progress_at;
        records.guest(now, head, line, digest);
        let view = records.view();
        match &view.terminal {
            Some(event) if !had_terminal => Some(Guest::Terminal(last_word(event))),
            _ if view.state != before => view.state.clone().map(Guest::State),
            _ if view.progress_at != progress_before => Some(Guest::Progress),
            _ => None,
        }
    }

    /// Writes down a line that was no event.
    pub(super) fn bad_line(&mut self, records: &mut Records, reason: String, sample: String, now: Now) {
        self.notes.spend(records, HostRecord::BadLine { reason, sample }, now);
    }

    /// Writes down what the guest said beside its events.
    pub(super) fn notice(&mut self, records: &mut Records, notice: Notice, now: Now) {
        self.notes.spend(records, HostRecord::Notice { notice }, now);
    }

    /// Writes down a document of the guest, which changes with every state. Invariant 5: what counts is its length as it is
    /// written here, since a guest's own form of a number may be much shorter.
    pub(super) fn document(&mut self, records: &mut Records, record: HostRecord, now: Now) {
        let (name, length) = match &record {
            HostRecord::Status { status } => ("status.json", length(status)),
            HostRecord::Result { result } => ("result.json", length(result)),
            _ => ("", 0),
        };
        // With the newline behind it in the file that is derived.
        if length >= limits::MAX_DOCUMENT_BYTES {
            let limit = limits::MAX_DOCUMENT_BYTES;
            let reason = format!("{name} is {length} bytes long with its numbers in full, at most {limit} are kept");
            return self.bad_line(records, reason, String::new(), now);
        }
        self.documents.spend(records, record, now);
    }
}

/// A document's bytes as JSON.
fn length(document: &impl serde::Serialize) -> usize {
    serde_json::to_vec(document).map_or(usize::MAX, |text| text.len())
}

/// Bytes that are left for records of one kind.
#[derive(Debug)]
struct Budget(usize);

impl Budget {
    /// Writes a record down, if something is left.
    fn spend(&mut self, records: &mut Records, record: HostRecord, now: Now) {
        if self.0 > 0 {
            let before = records.pending();
            records.host(record, now);
            self.0 = self.0.saturating_sub(records.pending() - before);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use pika_cloud_common::limits::{MAX_DOCUMENT_BYTES, MAX_EVENT_BYTES, MAX_LOG_FILES};
    use pika_cloud_common::{RunResult, Status};

    use super::*;
    use crate::journal::{LogMark, View};

    fn status(details: &str) -> HostRecord {
        let head = r#"{"schema_version":1,"state":"ready","updated_at":"2026-01-31T12:00:00Z","message":"","details":"#;
        HostRecord::Status { status: Box::new(Status::decode(format!("{head}{details}}}").as_bytes()).unwrap()) }
    }

    fn result(details: &str) -> HostRecord {
        let head =
            r#"{"schema_version":1,"status":"failed","finished_at":"2026-01-31T12:00:00Z","message":"","details":"#;
        HostRecord::Result { result: Box::new(RunResult::decode(format!("{head}{details}}}").as_bytes()).unwrap()) }
    }

    /// So many bytes of what is written in few bytes by a guest, and in many here.
    fn numbers(bytes: usize) -> String {
        format!("[{}1]", "1e15,".repeat(bytes / 5))
    }

    fn begun() -> Records {
        let mut records = Records::new(View::default(), 0, 0);
        records.begin("v1:aa".to_owned(), 0, Now::default());
        records
    }

    /// Invariant 5.
    #[test]
    fn what_counts_of_a_document_is_its_length_here() {
        let (mut intake, mut records) = (Intake::default(), begun());
        let long = numbers(MAX_DOCUMENT_BYTES - 1000);
        intake.document(&mut records, status(&long), Now::default());
        intake.document(&mut records, result(&long), Now::default());
        let view = records.view();
        assert_eq!((&view.status, &view.result, view.bad_lines), (&None, &None, 2));
        let commit = String::from_utf8(records.take_commit(false).unwrap().records).unwrap();
        assert!(commit.contains("result.json is ") && commit.len() < 2000, "{commit}");
        intake.document(&mut records, status(&numbers(MAX_DOCUMENT_BYTES / 4)), Now::default());
        assert!(records.view().status.is_some());
    }

    /// Invariant 5: with the most of everything that a guest can have written down, a segment still ends, and nothing is left
    /// out of the next one.
    #[test]
    fn the_largest_view_begins_a_segment() {
        let (mut intake, mut records) = (Intake::default(), begun());
        let now = Now::default();
        let quotes = r#"\""#.repeat((MAX_DOCUMENT_BYTES - 1000) / 2);
        let documents = [status(&format!("\"{quotes}\"")), result(&format!("\"{quotes}\""))];
        for document in documents {
            intake.document(&mut records, document, now);
        }
        let digest = Digest::EMPTY_STREAM;
        let stream_id = "\"".repeat(128);
        let stream =
            HostRecord::Stream { boot_id: stream_id.clone(), stream_id, agent: "\"".repeat(64), after_seq: 0, digest };
        records.host(stream, now);
        let mark = LogMark { guest: limits::MAX_COUNT, host: limits::MAX_COUNT };
        let logs: BTreeMap<_, _> =
            (0..MAX_LOG_FILES).map(|file| (format!("{file:02}{}", "\"".repeat(253)), mark)).collect();
        records.host(HostRecord::Logs { logs }, now);
        let head =
            r#"{"schema_version":1,"seq":1,"timestamp":"2026-01-31T12:00:00Z","kind":"failed","message":"","details":"#;
        let line = format!("{head}{}}}", numbers(MAX_EVENT_BYTES - 200));
        let head = EventHead::decode(line.as_bytes()).unwrap();
        intake.event(&mut records, now, (&head, 0, digest), line.as_bytes());
        records.take_commit(false).unwrap();
        let before = records.view().clone();
        records.host(HostRecord::InstanceStarting {}, now);
        let after = records.view();
        assert!(before.status.is_some() && before.result.is_some() && before.terminal.is_some());
        assert_eq!((&after.status, &after.result, &after.terminal), (&before.status, &before.result, &before.terminal));
        assert_eq!(after.next_n, before.next_n + 1);
        let segment = records.take_commit(false).unwrap().segment.expect("the segment was full");
        assert!(segment.snapshot.get().len() > 700_000, "{}", segment.snapshot.get().len());
    }
}
