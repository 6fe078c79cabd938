//! From what a session received to records, log bytes, artifacts and what the machine should know. No decisions.

use pika_cloud_common::digest::Digest;
use pika_cloud_common::wire::Notice;
use pika_cloud_common::{EventHead, RuntimeSpec, Timestamp};

use crate::journal::{HostRecord, Journal, View};
use crate::machine::{Guest, last_word};

/// Notices and bad lines that the journal takes from one incarnation. Further ones are counted there by their last record.
const MAX_NOTES: u64 = 1000;

/// What is known of the incoming stream beside the journal.
pub(super) struct Intake {
    /// Bytes of guest records that the journal takes; terminal events are beyond it.
    max_event_bytes: u64,
    notes: u64,
    /// Events left out since the last commit.
    dropped: Option<(u64, Digest, u64)>,
}

impl Intake {
    pub(super) fn new(spec: &RuntimeSpec, view: &View) -> Self {
        Self { max_event_bytes: spec.limits.event_bytes, notes: view.bad_lines, dropped: None }
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
        if journal.view().event_bytes >= self.max_event_bytes && !terminal {
            let count = self.dropped.map_or(0, |(_, _, count)| count);
            self.dropped = Some((head.seq, digest, count + 1));
            return None;
        }
        self.flush(journal);
        if missing > 0 {
            journal.host(HostRecord::Missing { after_seq: head.seq - missing - 1, count: missing });
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
        if self.takes_note() {
            journal.host(HostRecord::BadLine { reason, sample });
        }
    }

    /// Writes down what the guest said beside its events.
    pub(super) fn notice(&mut self, journal: &mut Journal, notice: Notice) {
        if self.takes_note() {
            journal.host(HostRecord::Notice { notice });
        }
    }

    /// Writes down a document of the guest, which changes with every state.
    pub(super) fn document(&mut self, journal: &mut Journal, record: HostRecord) {
        if self.takes_note() {
            journal.host(record);
        }
    }

    /// Whether the journal takes one more note of a guest that may send millions.
    fn takes_note(&mut self) -> bool {
        self.notes += 1;
        self.notes <= MAX_NOTES
    }
}
