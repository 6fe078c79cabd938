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
}

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
    /// Between two progress events.
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
    /// The last event in the journal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_event: Option<LastEvent>,
    /// Incus's own word for the instance, when the host last read it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance_status: Option<String>,
    /// What Incus or the session answered, where an error led to the verdict.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// How far collection came; absent where nothing was to be collected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collection: Option<Collection>,
    /// Lines of `events.jsonl` that were no events.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub bad_lines: u64,
    /// Events or log bytes that the guest says it lost or left out.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub gaps: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
fn is_zero(n: &u64) -> bool {
    *n == 0
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
    /// Why it is not complete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}
