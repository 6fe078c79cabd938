//! When what was gathered goes to the disk, and what rests on it.

use std::collections::VecDeque;
use std::time::Duration;

use pika_cloud_common::wire::{Ack, HostMessage};

use super::{Call, Core, Effect};
use crate::journal::{Commit, HostRecord};
use crate::machine::{Guest, Input};
use crate::session::Session;

/// How long log bytes wait for more before they are synced.
const GATHER: Duration = Duration::from_millis(50);

/// The same for counts alone, where log bytes are beyond their limit: what a flood costs stays small.
const GATHER_COUNTS: Duration = Duration::from_secs(30);

/// What waits for one commit.
#[derive(Debug, Default)]
pub(super) struct Batch {
    guest: VecDeque<Guest>,
    /// What a guest may say without an event, and said since the session opened: once is enough (Invariant 5).
    said: Said,
    then: Vec<Then>,
    /// The host says hello then, in the stream that was dialled.
    opens_session: bool,
    /// What the guest may forget then, of the stream of that name.
    ack: Option<(String, Ack)>,
    /// Bytes of its records and logs.
    bytes: u64,
    /// It holds a verdict, or what follows one, and may use the room that is kept for those.
    last: bool,
}

/// What is done once a commit is durable.
#[derive(Debug)]
enum Then {
    Send(HostMessage),
    Change(Call),
    /// The verdict is durable.
    Concluded,
}

#[derive(Debug, Default)]
struct Said {
    accepted: bool,
    refused: bool,
    rewound: bool,
}

impl Batch {
    /// What the guest repeats is heard once.
    pub(super) fn hear(&mut self, guest: Guest) {
        let was_said = match guest {
            Guest::Accepted => std::mem::replace(&mut self.said.accepted, true),
            Guest::Refused(_) => std::mem::replace(&mut self.said.refused, true),
            Guest::Rewound => std::mem::replace(&mut self.said.rewound, true),
            Guest::Opened { .. } => {
                self.said = Said::default();
                false
            }
            Guest::State(_) | Guest::Progress | Guest::Terminal(_) => false,
        };
        if !was_said && self.guest.back() != Some(&guest) {
            self.guest.push_back(guest);
        }
    }

    /// How many words of the guest wait in it.
    #[cfg(test)]
    pub(super) fn words(&self) -> usize {
        self.guest.len()
    }

    /// Whether the guest's last word is in it.
    pub(super) fn has_last_word(&self) -> bool {
        self.guest.iter().any(|guest| matches!(guest, Guest::Terminal(_)))
    }

    pub(super) fn send(&mut self, message: HostMessage) {
        self.then.push(Then::Send(message));
    }

    pub(super) fn open_session(&mut self) {
        self.opens_session = true;
    }

    pub(super) fn opens_session(&self) -> bool {
        self.opens_session
    }

    pub(super) fn change(&mut self, call: Call) {
        self.then.push(Then::Change(call));
    }

    pub(super) fn conclude(&mut self) {
        self.then.push(Then::Concluded);
        self.last = true;
    }

    /// What it holds is the end of something, and must find room.
    pub(super) fn is_last(&mut self) {
        self.last = true;
    }

    pub(super) fn forget_messages(&mut self) {
        self.then.retain(|then| !matches!(then, Then::Send(_)));
    }

    pub(super) fn forget_changes(&mut self) {
        self.then.retain(|then| !matches!(then, Then::Change(_)));
    }

    pub(super) fn forget_words(&mut self) {
        self.guest.clear();
        self.said = Said::default();
    }

    /// The session is lost: that it opened is no news any more, and what was to be said in it is not said in the next one. That
    /// may be with another boot of the guest, which would start what was lost with this one (Invariant 9).
    pub(super) fn forget_session(&mut self) {
        self.forget_messages();
        (self.opens_session, self.said) = (false, Said::default());
        self.guest.retain(|guest| !matches!(guest, Guest::Opened { run_lost: false }));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.guest.is_empty() && self.then.is_empty() && !self.opens_session
    }
}

impl Core {
    /// Hands what was gathered to the disk, unless it is busy with the last. Where nothing has to be written, what waited
    /// for a commit goes on at once.
    pub(super) fn settle(&mut self) {
        if self.logs.is_dirty() {
            // Also while the disk is busy: what waited for that has waited.
            let pause = if self.logs.is_full() { GATHER_COUNTS } else { GATHER };
            self.gather_until.get_or_insert(self.now.mono + pause);
        }
        while self.in_commit.is_none() {
            self.gather();
            // What the guest says last leads to a verdict, and so does all that comes after it: a full disk loses none.
            let view = self.records.view();
            let last = self.next_commit.last || view.terminal.is_some() || view.ended.is_some();
            let commit = if self.records.has_records() { self.records.take_commit(last) } else { None };
            if commit.is_none() && self.next_commit.is_empty() {
                return;
            }
            let mut batch = std::mem::take(&mut self.next_commit);
            let cursor = self.records.view().cursor.as_ref();
            batch.ack = cursor.map(|c| (c.stream_id.clone(), Ack { seq: c.seq, logs: c.logs.clone() }));
            batch.bytes = commit.as_ref().map_or(0, Commit::bytes);
            match commit {
                Some(commit) => {
                    self.in_commit = Some(batch);
                    self.effects.push_back(Effect::Commit(commit));
                }
                None => self.finish(batch),
            }
        }
    }

    /// Log bytes wait a little for more of their kind, so that a chatty guest costs neither a sync nor a record for every
    /// line. What is the last of something takes them along.
    fn gather(&mut self) {
        let is_due = self.gather_until.is_some_and(|due| due <= self.now.mono);
        if self.logs.is_dirty() && (is_due || self.next_commit.last) {
            self.flush_logs();
        }
    }

    /// Writes down how far the logs are.
    pub(super) fn flush_logs(&mut self) {
        self.gather_until = None;
        if let Some(logs) = self.logs.take_dirty() {
            self.records.host(HostRecord::Logs { logs }, self.now);
        }
    }

    /// What was gathered is durable: the guest may forget it, and the machine may rest on it.
    pub(super) fn finish(&mut self, batch: Batch) {
        if batch.opens_session {
            self.open_session();
        }
        let is_last = batch.last || batch.has_last_word();
        if let Some((stream_id, durable)) = batch.ack {
            self.acks.owe(stream_id, durable, batch.bytes);
            self.acknowledge(is_last);
        }
        for then in batch.then {
            match then {
                Then::Send(message) => self.send(message),
                Then::Change(call) => self.change(call),
                Then::Concluded => {
                    self.effects.push_back(Effect::Derive { incarnation: self.records.view().incarnation });
                    self.step(Input::Concluded);
                }
            }
        }
        for guest in batch.guest {
            self.step(Input::Guest(guest));
        }
        for input in std::mem::take(&mut self.held) {
            self.step(input);
        }
    }

    /// The stream of the session that is open, with our machine.
    pub(super) fn open_stream(&self) -> Option<&str> {
        let session = self.session.as_ref().filter(|_| self.has_session());
        session.and_then(Session::cursor).map(|cursor| cursor.stream_id.as_str())
    }

    /// Tells the guest what is durable, where that is due.
    pub(super) fn acknowledge(&mut self, at_once: bool) {
        let Some(stream_id) = self.open_stream().map(str::to_owned) else { return };
        if let Some(ack) = self.acks.take_due(&stream_id, at_once, self.now.mono) {
            self.send(HostMessage::Ack(ack));
        }
    }

    /// Sends a message, where there is a session.
    pub(super) fn send(&mut self, message: HostMessage) {
        if self.session.is_some() {
            self.effects.push_back(Effect::Send(message));
        }
    }
}
