//! A runtime's journal, read as any tool could: JSON lines.

use std::path::{Path, PathBuf};
use std::time::Duration;

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
    /// Reads its segments, the oldest first; empty where there is none yet.
    pub fn read(runtime: &Path) -> Self {
        let mut journal = Self { lines: Vec::new(), records: Vec::new() };
        for path in segments(runtime) {
            let bytes = std::fs::read(path).unwrap_or_default();
            let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
            for line in String::from_utf8_lossy(&bytes[..whole]).lines() {
                // What is preallocated, or being written, is no record yet.
                let Ok(record) = serde_json::from_str::<Value>(line) else { break };
                // A segment counts up to where the next one begins.
                if let Some(next_n) = record["journal"]["next_n"].as_u64() {
                    let kept = journal.records.iter().position(|earlier| earlier["n"].as_u64() >= Some(next_n));
                    journal.lines.truncate(kept.unwrap_or(usize::MAX));
                    journal.records.truncate(kept.unwrap_or(usize::MAX));
                }
                journal.lines.push(line.to_owned());
                journal.records.push(record);
            }
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

    /// When the first record of an incarnation for which `is` holds was written, on the host's monotonic clock.
    pub fn at(&self, incarnation: u64, what: &str, is: impl Fn(&Value) -> bool) -> Duration {
        let found = self.records.iter().find(|record| record["inc"] == incarnation && is(record));
        let found = found.unwrap_or_else(|| panic!("no {what} of incarnation {incarnation}: {:#?}", self.lines));
        moment(found)
    }

    /// The same of the first host record that says `what`.
    pub fn host_at(&self, incarnation: u64, what: &str) -> Duration {
        self.at(incarnation, what, |record| record["host"]["what"] == what)
    }

    /// The same of the first record of a state that the host observed.
    pub fn state_at(&self, incarnation: u64, state: &str) -> Duration {
        self.at(incarnation, state, |record| record["host"]["state"] == state)
    }

    /// Whether there is a host record that says `what`.
    pub fn has(&self, what: &str) -> bool {
        !self.host(what).is_empty()
    }
}

/// When a record was written, on the host's monotonic clock.
pub fn moment(record: &Value) -> Duration {
    Duration::from_micros(record["mono"].as_u64().expect("a record has its time"))
}

/// `journal.jsonl`, `journal.2.jsonl` and so on.
fn segments(runtime: &Path) -> Vec<PathBuf> {
    let number = |path: &Path| -> Option<u64> {
        match path.file_name()?.to_str()?.strip_prefix("journal")?.strip_suffix(".jsonl")? {
            "" => Some(1),
            number => number.strip_prefix('.')?.parse().ok(),
        }
    };
    let entries = std::fs::read_dir(runtime).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut segments: Vec<(u64, PathBuf)> = entries.filter_map(|path| Some((number(&path)?, path))).collect();
    segments.sort();
    segments.into_iter().map(|(_, path)| path).collect()
}
