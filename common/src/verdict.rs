//! `verdict.json`: what the host concludes. It never forges a guest's words, it quotes them as evidence.

use serde::{Deserialize, Serialize};

use crate::document::{self, DecodeError, Extra, SCHEMA_VERSION};
use crate::event::State;
use crate::limits::MAX_DOCUMENT_BYTES;
use crate::timestamp::Timestamp;

/// How an incarnation ended. There is exactly one, and it never changes once it is published.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Verdict {
    /// The version of the contract, [`SCHEMA_VERSION`].
    #[cfg_attr(feature = "schema", schemars(extend("const" = 1)))]
    pub schema_version: u32,
    /// Whose.
    pub runtime_id: String,
    /// Counts from 1 within a runtime.
    pub incarnation: u32,
    /// The conclusion.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// When the host decided.
    pub decided_at: Timestamp,
    /// For a person.
    pub message: String,
    /// What it rests on.
    pub evidence: Evidence,
    /// What this version does not know.
    #[serde(flatten, deserialize_with = "extra")]
    pub extra: Extra,
}

/// A flattened enum leaves its fields to whatever is flattened next; they are no extra ones.
fn extra<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Extra, D::Error> {
    let mut fields = Extra::deserialize(deserializer)?;
    for name in ["verdict", "exit_code", "watchdog", "cause"] {
        fields.shift_remove(name);
    }
    Ok(fields)
}

impl Verdict {
    /// Reads a `verdict.json`.
    pub fn decode(text: &[u8]) -> Result<Self, DecodeError> {
        document::decode("verdict.json", SCHEMA_VERSION, MAX_DOCUMENT_BYTES, text)
    }

    /// Checks the version of one that did not come through [`Verdict::decode`], such as the body of a message.
    pub fn check_version(&self) -> Result<(), DecodeError> {
        document::check_version("verdict.json", u64::from(self.schema_version), SCHEMA_VERSION)
    }

    /// Whether a caller may rely on the workload's success and on its outputs: its [exit code](Self::exit_code) is 0.
    ///
    /// That is more than `completed`, which is the guest's word alone: a workload may exit with another code after it, and
    /// outputs may be missing.
    pub fn is_success(&self) -> bool {
        self.exit_code() == 0
    }

    /// What a process that stands for this runtime, such as a CI job's, exits with, as people know these codes:
    ///
    /// | code | verdict |
    /// |---|---|
    /// | 0 | `completed`, all outputs that were asked for are on the host |
    /// | 1 to 255 | `failed` with the workload's own code (1 where it gave none, or said `failed` and exited with 0); `completed`, and exited with another code than 0 |
    /// | 124 | [`EXIT_TIMED_OUT`]: `timed_out`, whichever watchdog |
    /// | 125 | [`EXIT_FAILED`]: `provision_failed`, or `completed` with outputs that are not all on the host |
    /// | 126 | [`EXIT_LOST`]: `guest_died`, `unreachable` |
    /// | 130 | [`EXIT_CANCELLED`]: `cancelled` |
    ///
    /// A workload's code that no process can exit with becomes 255. Codes above 123 may be the workload's own as well;
    /// [`Verdict::outcome`] tells them apart.
    pub fn exit_code(&self) -> u8 {
        let complete = !matches!(self.evidence.collection, Some(Collection { complete: false, .. }));
        let own = |code: i32| u8::try_from(code).unwrap_or(255);
        match &self.outcome {
            Outcome::Completed { exit_code: None | Some(0) } if !complete => EXIT_FAILED,
            Outcome::Completed { exit_code } => own(exit_code.unwrap_or(0)),
            // Whoever said `failed` did not succeed.
            Outcome::Failed { exit_code } => own(exit_code.unwrap_or(1)).max(1),
            Outcome::TimedOut { .. } => EXIT_TIMED_OUT,
            Outcome::GuestDied { .. } | Outcome::Unreachable => EXIT_LOST,
            Outcome::ProvisionFailed => EXIT_FAILED,
            Outcome::Cancelled => EXIT_CANCELLED,
        }
    }
}

/// Exit code: a watchdog ended it, as with `timeout`.
pub const EXIT_TIMED_OUT: u8 = 124;
/// Exit code: pika-cloud itself could not do what was asked, as with `docker run`.
pub const EXIT_FAILED: u8 = 125;
/// Exit code: the guest died or was lost.
pub const EXIT_LOST: u8 = 126;
/// Exit code: its end was asked for; 128 and SIGINT.
pub const EXIT_CANCELLED: u8 = 130;

/// The conclusion of a [`Verdict`], under `verdict`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Outcome {
    /// The guest said `completed`.
    Completed {
        /// The workload's exit code, where it gave one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        exit_code: Option<i32>,
    },
    /// The guest said `failed`.
    Failed {
        /// The workload's exit code, where it gave one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        exit_code: Option<i32>,
    },
    /// A watchdog ended it.
    TimedOut {
        /// Which.
        watchdog: Watchdog,
    },
    /// The instance, its agent or its supervisor ended without a terminal event.
    GuestDied {
        /// What the host saw.
        cause: DeathCause,
    },
    /// The guest was not heard any more, and its instance still ran.
    Unreachable,
    /// Incus could not create or start the instance, or the instance has no usable agent.
    ProvisionFailed,
    /// A person or a program asked for its end.
    Cancelled,
}

impl Outcome {
    /// The name of the conclusion in the document.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Completed { .. } => "completed",
            Self::Failed { .. } => "failed",
            Self::TimedOut { .. } => "timed_out",
            Self::GuestDied { .. } => "guest_died",
            Self::Unreachable => "unreachable",
            Self::ProvisionFailed => "provision_failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// A deadline that the host (or for `run` the guest) enforces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Watchdog {
    /// From the start of the instance to the agent's first word.
    Boot,
    /// From `booted` to `ready`.
    Ready,
    /// Between two heartbeats.
    Silence,
    /// From the start of the workload or its last progress event to the next, or to its end.
    Progress,
    /// From the start of the workload to its end.
    Run,
    /// For the collection of outputs.
    Collect,
}

impl Watchdog {
    /// The name in the documents.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Boot => "boot",
            Self::Ready => "ready",
            Self::Silence => "silence",
            Self::Progress => "progress",
            Self::Run => "run",
            Self::Collect => "collect",
        }
    }
}

/// How a guest ended without a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum DeathCause {
    /// The instance stopped.
    InstanceStopped,
    /// The instance is in Incus's `ERROR` state.
    InstanceError,
    /// The instance is gone.
    InstanceGone,
    /// The instance booted again, and the run did not survive that.
    Rebooted,
    /// The supervisor of the workload died before its terminal event.
    SupervisorLost,
    /// The guest's files or its agent no longer keep the contract.
    ContractBroken,
    /// The guest went back to an earlier snapshot.
    Rewound,
}

/// What a verdict rests on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Evidence {
    /// The signal that ended the workload, where the guest said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// Whether the kernel killed a process of the workload for memory: true or false only as its cgroup's own counter of
    /// such kills says. Absent where nobody could read one: then a workload that was killed was `killed, cause unknown`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oom_kill: Option<bool>,
    /// File systems of the guest that were full at the workload's end, by where they are mounted or used, such as `/run`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub full: Vec<String>,
    /// The last event in the journal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_event: Option<LastEvent>,
    /// Incus's own word for the instance, when the host last read it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance_status: Option<String>,
    /// What Incus or the session answered, where an error led to the verdict.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The end of what the instance said on its console, where its agent was never heard. As all that a guest says, it may be
    /// anything; control characters are left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<String>,
    /// How far collection came; absent where nothing was to be collected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collection: Option<Collection>,
    /// Lines of `events.jsonl` that were no events.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub bad_lines: u64,
    /// Events or log bytes that the guest says it lost or left out.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub gaps: u64,
    /// Restarts in a row that led to this incarnation; 0 for one that was asked for.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub restarts: u32,
}

fn is_zero<N: Default + PartialEq>(n: &N) -> bool {
    *n == N::default()
}

/// The last event that the host has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct LastEvent {
    /// Its number in the stream.
    #[serde(deserialize_with = "crate::bounded::seq")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = crate::limits::MAX_COUNT)))]
    pub seq: u64,
    /// Its kind.
    pub kind: State,
    /// Its message.
    pub message: String,
}

/// How far collection came.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Collection {
    /// Whether all that was asked for is on the host.
    pub complete: bool,
    /// Artifact files on the host.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Files that matched and were left out, each for a reason in the journal.
    pub skipped: u64,
    /// Log bytes on the host.
    pub log_bytes: u64,
    /// Whether the logs go on beyond `limits.log_bytes`. That alone leaves the collection complete.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub log_cut: bool,
    /// Why it is not complete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(outcome: Outcome, complete: bool) -> u8 {
        let collection = Collection { complete, ..Collection::default() };
        let verdict = Verdict {
            schema_version: SCHEMA_VERSION,
            runtime_id: "job".into(),
            incarnation: 1,
            outcome,
            decided_at: Timestamp::from_unix(0, 0),
            message: String::new(),
            evidence: Evidence { collection: Some(collection), ..Evidence::default() },
            extra: Extra::default(),
        };
        assert_eq!(verdict.is_success(), verdict.exit_code() == 0);
        verdict.exit_code()
    }

    #[test]
    fn exit_codes_are_those_that_people_know() {
        assert_eq!(code(Outcome::Completed { exit_code: Some(0) }, true), 0);
        assert_eq!(code(Outcome::Completed { exit_code: None }, true), 0);
        assert_eq!(code(Outcome::Completed { exit_code: Some(0) }, false), 125);
        assert_eq!(code(Outcome::Completed { exit_code: None }, false), 125);
        assert_eq!(code(Outcome::Completed { exit_code: Some(5) }, true), 5);
        assert_eq!(code(Outcome::Failed { exit_code: Some(3) }, true), 3);
        assert_eq!(code(Outcome::Failed { exit_code: Some(3) }, false), 3);
        assert_eq!(code(Outcome::Failed { exit_code: None }, true), 1);
        assert_eq!(code(Outcome::Failed { exit_code: Some(0) }, true), 1);
        assert_eq!(code(Outcome::Failed { exit_code: Some(-7) }, true), 255);
        assert_eq!(code(Outcome::TimedOut { watchdog: Watchdog::Run }, true), 124);
        assert_eq!(code(Outcome::ProvisionFailed, true), 125);
        assert_eq!(code(Outcome::GuestDied { cause: DeathCause::InstanceGone }, false), 126);
        assert_eq!(code(Outcome::Unreachable, false), 126);
        assert_eq!(code(Outcome::Cancelled, true), 130);
    }
}
