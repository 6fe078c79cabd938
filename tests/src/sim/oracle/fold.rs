//! What a journal says, read by the oracle itself from the bytes that are durable: not through the code that is tested.

use std::collections::BTreeMap;

use pika_cloud_common::verdict::Outcome;
use serde_json::Value;

use super::Violation;
use crate::sim::guest::Guest;
use crate::sim::plan::SECRET;

/// How far a log is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::sim) struct Mark {
    /// The next byte of the guest's.
    pub guest: u64,
    /// The length of ours.
    pub host: u64,
}

/// What an incarnation came to.
#[derive(Clone, Debug, Default)]
pub(in crate::sim) struct Life {
    /// The first last word of the guest: its line.
    pub terminal: Option<String>,
    /// The end that was decided.
    pub ended: Option<Outcome>,
    /// Whether the guest's last word stood in the journal before the end was decided.
    pub word_came_first: bool,
    /// Whether a command did.
    pub commanded_first: bool,
    /// Whether the workload was asked for.
    pub start_sent: bool,
    /// Whether collection was tried, and brought everything.
    pub collected: Option<bool>,
    /// The verdict, as it stands there.
    pub verdict: Option<String>,
    /// Streams that were followed.
    pub streams: Vec<String>,
}

/// One runtime's journal.
#[derive(Debug, Default)]
pub(in crate::sim) struct Fold {
    /// Whose it is.
    pub runtime_id: String,
    /// The hash of each record's line, by its number.
    pub lines: Vec<u64>,
    /// The present incarnation.
    pub incarnation: u32,
    /// All of them.
    pub lives: BTreeMap<u32, Life>,
    /// The stream that is followed, and its last event.
    pub stream: Option<(String, u64)>,
    /// The last event of each stream that was ever followed.
    pub seen: BTreeMap<String, u64>,
    /// The logs of this incarnation.
    pub logs: BTreeMap<String, Mark>,
    /// What was wanted.
    pub commanded: bool,
}

fn hash(line: &str) -> u64 {
    line.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// The number of a record, or `None` for a segment's header.
pub(in crate::sim) fn number_of(line: &str) -> Option<usize> {
    line.strip_prefix("{\"n\":")?.split(',').next()?.parse().ok()
}

/// The number of the first record behind a header.
pub(in crate::sim) fn next_of_header(line: &str) -> Option<usize> {
    line.split("\"next_n\":").nth(1)?.split([',', '}']).next()?.parse().ok()
}

/// The guest's line in a record, where it is one of an event.
fn guest_line(line: &str) -> Option<&str> {
    let (head, rest) = line.split_once(",\"guest\":")?;
    if head.contains("\"host\"") {
        return None;
    }
    rest.rsplit_once(",\"crc\":\"").map(|(line, _)| line)
}

fn seq_of(line: &str) -> u64 {
    line.split("\"seq\":").nth(1).and_then(|rest| rest.split(',').next()).and_then(|seq| seq.parse().ok()).unwrap_or(0)
}

impl Fold {
    /// The present incarnation's life.
    pub(in crate::sim) fn life(&mut self) -> &mut Life {
        self.lives.entry(self.incarnation).or_default()
    }

    /// Takes a record in that is durable.
    pub(in crate::sim) fn take(&mut self, line: &str, guest: &Guest) -> Result<(), Violation> {
        let Some(n) = number_of(line) else { return Ok(()) };
        if let Some(known) = self.lines.get(n) {
            if *known == hash(line) {
                return Ok(());
            }
            return Err(Violation::of(1, format!("record {n} is another than it was: {line}")));
        }
        if n != self.lines.len() {
            return Err(Violation::of(1, format!("record {n} follows {} in the journal", self.lines.len())));
        }
        if line.contains(SECRET) {
            return Err(Violation::of(8, "the secret is in the journal".to_owned()));
        }
        self.lines.push(hash(line));
        match guest_line(line) {
            Some(event) => self.event(event, guest),
            None => self.host(line, guest),
        }
    }

    /// Invariant 1: each event once, in order, as the guest said it.
    fn event(&mut self, line: &str, guest: &Guest) -> Result<(), Violation> {
        let seq = seq_of(line);
        let Some((stream, last)) = &mut self.stream else {
            return Err(Violation::of(1, format!("event {seq} is of no stream")));
        };
        if seq != *last + 1 {
            return Err(Violation::of(1, format!("event {seq} of {stream} follows {last} in the journal")));
        }
        *last = seq;
        let told = guest.machine.truth.get(stream);
        let at = usize::try_from(seq - 1).unwrap_or(usize::MAX);
        let was_said = told.is_some_and(|told| {
            told.lines.get(at).is_some_and(|said| **said == *line)
                || told.unsaid.iter().any(|(unsaid, said)| *unsaid == seq && **said == *line)
        });
        if !was_said {
            return Err(Violation::of(1, format!("the guest never said event {seq} of {stream} like this: {line}")));
        }
        let seen = self.seen.entry(stream.clone()).or_default();
        *seen = (*seen).max(seq);
        // The last word of a stream that was begun for another request is none for this incarnation.
        let ours = told.is_some_and(|told| {
            told.request_id.as_deref() == Some(&format!("{}.{}", self.runtime_id, self.incarnation))
        });
        if ours && (line.contains("\"kind\":\"completed\"") || line.contains("\"kind\":\"failed\"")) {
            let incarnation = self.life();
            if incarnation.terminal.is_none() {
                incarnation.word_came_first = incarnation.ended.is_none();
                incarnation.terminal = Some(line.to_owned());
            }
        }
        Ok(())
    }

    fn host(&mut self, line: &str, guest: &Guest) -> Result<(), Violation> {
        let what = crate::sim::shell::what(line);
        if matches!(what, "state" | "status" | "result" | "notice" | "bad_line" | "accepted" | "host_boot") {
            return Ok(());
        }
        let Ok(record) = serde_json::from_str::<Value>(line) else {
            return Err(Violation::of(1, format!("a record is no JSON: {line}")));
        };
        let host = &record["host"];
        match what {
            "requested" => {
                self.incarnation += 1;
                if record["inc"].as_u64() != Some(u64::from(self.incarnation)) {
                    return Err(Violation::of(2, format!("incarnation {} begins out of order", record["inc"])));
                }
                (self.stream, self.logs) = (None, BTreeMap::new());
                self.commanded = false;
                self.life();
            }
            "stream" => self.begin_stream(host)?,
            "missing" => {
                let stream = self.stream.as_ref().map(|(stream, _)| stream.clone()).unwrap_or_default();
                return Err(Violation::of(1, format!("events of {stream} are missing: {host}")));
            }
            "start_sent" => self.life().start_sent = true,
            "command" => self.commanded = true,
            "logs" => self.take_logs(host),
            "ended" => self.end(host, guest)?,
            "collected" => {
                let complete = host["collection"]["complete"].as_bool().unwrap_or(false);
                self.life().collected = Some(complete);
            }
            "verdict" => self.verdict(host)?,
            _ => {}
        }
        Ok(())
    }

    fn begin_stream(&mut self, host: &Value) -> Result<(), Violation> {
        let id = host["stream_id"].as_str().unwrap_or_default().to_owned();
        let after = host["after_seq"].as_u64().unwrap_or(0);
        let seen = self.seen.get(&id).copied().unwrap_or(0);
        if after > seen {
            let text = format!("stream {id} is followed behind {after}, and the journal has it up to {seen} only");
            return Err(Violation::of(1, text));
        }
        self.life().streams.push(id.clone());
        self.stream = Some((id, after));
        Ok(())
    }

    fn take_logs(&mut self, host: &Value) {
        let Some(logs) = host["logs"].as_object() else { return };
        for (name, mark) in logs {
            let number = |key: &str| mark[key].as_u64().unwrap_or(0);
            self.logs.insert(name.clone(), Mark { guest: number("guest"), host: number("host") });
        }
    }

    fn end(&mut self, host: &Value, _: &Guest) -> Result<(), Violation> {
        let Ok(outcome) = serde_json::from_value::<Outcome>(host["outcome"].clone()) else {
            return Err(Violation::of(2, format!("an end without an outcome: {host}")));
        };
        let (incarnation, commanded) = (self.incarnation, self.commanded);
        let life = self.life();
        if life.ended.is_some() {
            return Err(Violation::of(2, format!("incarnation {incarnation} ended twice")));
        }
        life.ended = Some(outcome);
        life.commanded_first = commanded;
        Ok(())
    }

    /// Invariant 2: one verdict, which says what was decided.
    fn verdict(&mut self, host: &Value) -> Result<(), Violation> {
        let incarnation = self.incarnation;
        let verdict = &host["verdict"];
        let outcome = serde_json::from_value::<Outcome>(verdict.clone()).ok();
        let life = self.life();
        if life.verdict.is_some() {
            return Err(Violation::of(2, format!("incarnation {incarnation} has two verdicts")));
        }
        if outcome.is_none() || outcome != life.ended {
            let text = format!("the verdict of incarnation {incarnation} is {outcome:?}, decided was {:?}", life.ended);
            return Err(Violation::of(2, text));
        }
        life.verdict = Some(verdict.to_string());
        Ok(())
    }
}
