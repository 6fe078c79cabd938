//! From what a session received to records, log bytes, artifacts and what the machine should know. No decisions.

use pika_cloud_common::digest::Digest;
use pika_cloud_common::wire::Notice;
use pika_cloud_common::{EventHead, RuntimeSpec, Timestamp};

use crate::journal::{HostRecord, Journal};
use crate::machine::{Guest, last_word};

/// Journal bytes for what a guest says beside its events; beyond it, nothing of that kind is written down (Invariant 5).
const MAX_NOTE_BYTES: usize = 4 * 1024 * 1024;
/// The same for its `status.json` and `result.json`, so that chatter costs no result.
const MAX_DOCUMENT_BYTES: usize = 4 * 1024 * 1024;

/// What is known of the incoming stream beside the journal.
pub(super) struct Intake {
    /// Bytes of guest records that the journal takes; terminal events are beyond it.
    max_event_bytes: u64,
    notes: Budget,
    documents: Budget,
    /// Events left out since the last commit.
    dropped: Option<(u64, Digest, u64)>,
}

impl Intake {
    pub(super) fn new(spec: &RuntimeSpec) -> Self {
        Self {
            max_event_bytes: spec.limits.event_bytes,
            notes: Budget(MAX_NOTE_BYTES),
            documents: Budget(MAX_DOCUMENT_BYTES),
            dropped: None,
        }
    }

    /// Takes an event into the journal, and tells what it means to the machine.
    pub(super) fn event(
        &mut self,
        journal: &mut Journal,
        at: &Timestamp,
        (head, missing, digest): (&EventHead<'_>, u64, Digest),
        line: &[u8],
    ) -> Option<Guest> {
        let terminal = matches!(&*head.kind, "failed" | "completed");
        // Only the first last word is beyond the limit: what comes behind it has no meaning.
        let exempt = terminal && journal.view().terminal.is_none();
        if journal.view().event_bytes >= self.max_event_bytes && !exempt {
            let count = self.dropped.map_or(0, |(_, _, count)| count);
            self.dropped = Some((head.seq, digest, count + 1));
            return None;
        }
        self.flush(journal);
        if missing > 0 {
            self.notes.spend(journal, HostRecord::Missing { after_seq: head.seq - missing - 1, count: missing });
        }
        let before = journal.view().state.clone();
        let had_terminal = journal.view().terminal.is_some();
        journal.guest(at, head, line, digest);
        let view = journal.view();
        match &view.terminal {
            Some(event) if !had_terminal => Some(Guest::Terminal(last_word(event))),
            _ if view.state != before => view.state.clone().map(Guest::State),
            _ => None,
        }
    }

    /// Whether events were left out that are not written down yet.
    pub(super) fn has_dropped(&self) -> bool {
        self.dropped.is_some()
    }

    /// Writes down how many events were left out, where some were.
    pub(super) fn flush(&mut self, journal: &mut Journal) {
        if let Some((seq, digest, count)) = self.dropped.take() {
            journal.host(HostRecord::Dropped { seq, digest, count });
        }
    }

    /// Writes down a line that was no event.
    pub(super) fn bad_line(&mut self, journal: &mut Journal, reason: String, sample: String) {
        self.notes.spend(journal, HostRecord::BadLine { reason, sample });
    }

    /// Writes down what the guest said beside its events.
    pub(super) fn notice(&mut self, journal: &mut Journal, notice: Notice) {
        self.notes.spend(journal, HostRecord::Notice { notice });
    }

    /// Writes down a document of the guest, which changes with every state.
    pub(super) fn document(&mut self, journal: &mut Journal, record: HostRecord) {
        self.documents.spend(journal, record);
    }
}

/// Bytes that are left for records of one kind.
struct Budget(usize);

impl Budget {
    /// Writes a record down, if something is left.
    fn spend(&mut self, journal: &mut Journal, record: HostRecord) {
        if self.0 > 0 {
            let before = journal.pending();
            journal.host(record);
            self.0 = self.0.saturating_sub(journal.pending() - before);
        }
    }
}
