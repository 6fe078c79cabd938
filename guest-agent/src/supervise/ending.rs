//! How a workload ended, as its terminal event says it.
//!
//! ```text
//!   details {"exit_code": 137, "signal": 9, "oom_kill": true, "full": ["/run"], "timed_out": {"watchdog": "run", "secs": 60}}
//! ```
//!
//! All but `exit_code` only where there is something to say. [`pika_cloud_common::Event`] documents them.

use std::path::Path;
use std::time::Duration;

use pika_cloud_common::paths;
use rustix::process::WaitIdStatus;
use serde_json::{Map, Value, json};

use super::disk;
use super::memory::KillCounter;
use crate::ledger::Ledger;

/// The exit code of a workload that its time limit ended.
const TIMED_OUT: i32 = 124;
/// The exit code of a shell whose command was killed.
const KILLED: i32 = 128 + libc::SIGKILL;

/// How a workload ended.
#[derive(Debug)]
pub(super) struct Ending {
    pub(super) code: i32,
    pub(super) message: String,
    pub(super) details: Map<String, Value>,
}

impl Ending {
    /// It never ran.
    pub(super) fn not_started(code: i32, message: String) -> Self {
        Self::new(code, message, [])
    }

    fn new<const N: usize>(code: i32, message: String, more: [(&str, Value); N]) -> Self {
        let mut details = Map::new();
        details.insert("exit_code".to_owned(), json!(code));
        details.extend(more.map(|(name, value)| (name.to_owned(), value)));
        Self { code, message, details }
    }

    /// What its main process's end says, and the time limit that came before it.
    pub(super) fn of(status: &WaitIdStatus, timed_out: Option<Duration>) -> Self {
        if let Some(limit) = timed_out {
            let secs = limit.as_secs();
            let more = [("timed_out", json!({ "watchdog": "run", "secs": secs }))];
            return Self::new(TIMED_OUT, format!("the workload ran longer than {secs} s and was ended"), more);
        }
        if let Some(signal) = status.terminating_signal() {
            let message = format!("the workload was ended by signal {signal}");
            return Self::new(128 + signal, message, [("signal", json!(signal))]);
        }
        let code = status.exit_status().unwrap_or(0);
        Self::new(code, format!("the workload exited with code {code}"), [])
    }

    /// Adds what the kernel says about memory. `killed_by_us` where the end is one that was asked for.
    pub(super) fn with_memory(mut self, counter: &KillCounter, killed_by_us: bool) -> Self {
        let was_killed = self.code == KILLED && !killed_by_us;
        match counter.rose() {
            // Of another process beside the main one, too: what failed may have failed for that.
            Some(true) if self.code != 0 => {
                self.details.insert("oom_kill".to_owned(), json!(true));
                self.message += if was_killed {
                    ": the kernel killed it for memory"
                } else {
                    ": the kernel killed a process of its control group for memory"
                };
            }
            Some(false) if was_killed => {
                self.details.insert("oom_kill".to_owned(), json!(false));
                self.message += ": killed, and not for memory";
            }
            None if was_killed => self.message += ": killed, cause unknown",
            _ => {}
        }
        self
    }

    /// Adds which file systems are full.
    pub(super) fn with_disk(mut self, ledger: &Ledger) -> Self {
        let root = ledger.folder().path();
        let full = disk::full(&[root, &root.join(paths::ARTIFACTS_DIR), Path::new("/")]);
        if !full.is_empty() {
            if self.code != 0 {
                self.message += "; full at its end: ";
                self.message += &full.join(", ");
            }
            self.details.insert("full".to_owned(), json!(full));
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(code: i32, counter: &KillCounter, killed_by_us: bool) -> (String, Option<Value>) {
        let ending = Ending::new(code, "it ended".to_owned(), []).with_memory(counter, killed_by_us);
        assert_eq!((ending.code, &ending.details["exit_code"]), (code, &json!(code)));
        (ending.message, ending.details.get("oom_kill").cloned())
    }

    #[test]
    fn only_the_kernels_count_is_evidence() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("memory.events");
        std::fs::write(&file, "oom_kill 2\n").unwrap();
        let counter = |before| KillCounter { place: Some(file.clone()), before };
        let said = |message: &str, claim: Option<bool>| (format!("it ended{message}"), claim.map(Value::from));
        for (before, code, killed_by_us, expected) in [
            (Some(1), 137, false, said(": the kernel killed it for memory", Some(true))),
            (Some(2), 137, false, said(": killed, and not for memory", Some(false))),
            (None, 137, false, said(": killed, cause unknown", None)),
            // A part of it was killed, whatever the rest made of that.
            (Some(1), 3, false, said(": the kernel killed a process of its control group for memory", Some(true))),
            (Some(1), 137, true, said(": the kernel killed a process of its control group for memory", Some(true))),
            (Some(2), 3, false, said("", None)),
            (None, 3, false, said("", None)),
            (Some(2), 137, true, said("", None)),
            (None, 137, true, said("", None)),
            // What succeeded was not hurt.
            (Some(1), 0, false, said("", None)),
        ] {
            assert_eq!(ended(code, &counter(before), killed_by_us), expected, "{before:?} {code} {killed_by_us}");
        }
        let nowhere = KillCounter { place: None, before: None };
        assert_eq!(ended(137, &nowhere, false), said(": killed, cause unknown", None));
    }
}
