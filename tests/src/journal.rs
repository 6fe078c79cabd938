//! A runtime's journal, read as any tool could: JSON lines.

use std::path::Path;

use serde_json::Value;

/// The records of a journal, as far as they are whole lines.
#[derive(Debug)]
pub struct Journal {
    /// The lines.
    pub lines: Vec<String>,
    /// The same, decoded.
    pub records: Vec<Value>,
}

impl Journal {
    /// Reads it; empty where there is none yet.
    pub fn read(runtime: &Path) -> Self {
        let bytes = std::fs::read(runtime.join("journal.jsonl")).unwrap_or_default();
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        let text = String::from_utf8_lossy(&bytes[..whole]).into_owned();
        let mut journal = Self { lines: Vec::new(), records: Vec::new() };
        for line in text.lines() {
            // What is preallocated, or being written, is no record yet.
            let Ok(record) = serde_json::from_str(line) else { break };
            journal.lines.push(line.to_owned());
            journal.records.push(record);
        }
        journal
    }

    /// Host records that say `what`.
    pub fn host(&self, what: &str) -> Vec<&Value> {
        self.records.iter().map(|record| &record["host"]).filter(|host| host["what"] == what).collect()
    }

    /// Guest events of an incarnation, in the order of the journal.
    pub fn events(&self, incarnation: u64) -> Vec<&Value> {
        let guest = |record: &&Value| record["inc"] == incarnation && record.get("guest").is_some();
        self.records.iter().filter(guest).map(|record| &record["guest"]).collect()
    }

    /// The lines of those events, as they stood in the guest's file.
    pub fn event_lines(&self) -> Vec<&str> {
        let cut = |line: &'_ str| -> Option<(usize, usize)> {
            let from = line.find(",\"guest\":")? + ",\"guest\":".len();
            Some((from, line.rfind(",\"crc\":\"")?))
        };
        self.lines.iter().filter_map(|line| cut(line).map(|(from, to)| &line[from..to])).collect()
    }

    /// Invariant 1: the events of the incarnation are numbered from 1 without a hole, each once, in order. Gives their
    /// count.
    pub fn check_events(&self, incarnation: u64) -> u64 {
        let mut count = 0;
        for event in self.events(incarnation) {
            count += 1;
            assert_eq!(event["seq"], count, "the journal's {count}th event is {event}");
        }
        assert!(self.host("missing").is_empty(), "events are missing: {:?}", self.host("missing"));
        assert!(self.host("dropped").is_empty(), "events were dropped: {:?}", self.host("dropped"));
        count
    }

    /// Invariant 2: the one verdict of an incarnation.
    pub fn verdict(&self, incarnation: u64) -> &Value {
        let mine = |record: &&Value| record["inc"] == incarnation && record["host"]["what"] == "verdict";
        let verdicts: Vec<&Value> = self.records.iter().filter(mine).collect();
        assert_eq!(verdicts.len(), 1, "verdicts of incarnation {incarnation}: {verdicts:?}");
        &verdicts[0]["host"]["verdict"]
    }

    /// Whether there is a host record that says `what`.
    pub fn has(&self, what: &str) -> bool {
        !self.host(what).is_empty()
    }
}
