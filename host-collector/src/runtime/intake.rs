//! From what a session received to records and what the machine should know. No decisions.

use pika_cloud_common::EventHead;
use pika_cloud_common::digest::Digest;
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

    /// Writes down a document of the guest, which changes with every state.
    pub(super) fn document(&mut self, records: &mut Records, record: HostRecord, now: Now) {
        self.documents.spend(records, record, now);
    }
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
