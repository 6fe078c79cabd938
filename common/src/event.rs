//! An event: one line of `events.jsonl`.

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use crate::document::{self, DecodeError, Extra, SCHEMA_VERSION};
use crate::limits::MAX_EVENT_BYTES;
use crate::timestamp::Timestamp;

mod head;
mod quick;

pub use head::EventHead;

/// Where a runtime stands. The vocabulary stays this small; what more a workload has to say is progress.
///
/// A state that this build does not know is kept as [`State::Unknown`], so that a newer guest never breaks an older host.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Host: the spec was accepted.
    Requested,
    /// Host: Incus is creating and starting the instance.
    Provisioning,
    /// Host: the agent answered.
    Booted,
    /// Guest: the workload is being started.
    Starting,
    /// Guest: the workload says that it is ready, whatever that means to it.
    Ready,
    /// Guest: the workload ended without success. Terminal.
    Failed,
    /// Guest: the workload ended with success. Terminal.
    Completed,
    /// Host: no heartbeat.
    Unreachable,
    /// Host: the instance is stopped.
    Stopped,
    /// Host: the instance is gone.
    Destroyed,
    /// A state of a newer version, by its name.
    Unknown(String),
}

impl State {
    /// Every state that this version knows.
    pub const KNOWN: [Self; 10] = [
        Self::Requested,
        Self::Provisioning,
        Self::Booted,
        Self::Starting,
        Self::Ready,
        Self::Failed,
        Self::Completed,
        Self::Unreachable,
        Self::Stopped,
        Self::Destroyed,
    ];

    /// The name in the documents.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Requested => "requested",
            Self::Provisioning => "provisioning",
            Self::Booted => "booted",
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Failed => "failed",
            Self::Completed => "completed",
            Self::Unreachable => "unreachable",
            Self::Stopped => "stopped",
            Self::Destroyed => "destroyed",
            Self::Unknown(name) => name,
        }
    }

    /// The state of that name.
    pub fn from_name(name: &str) -> Self {
        Self::KNOWN.into_iter().find(|s| s.as_str() == name).unwrap_or_else(|| Self::Unknown(name.to_owned()))
    }

    /// After such an event the guest's ledger takes no other.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Failed | Self::Completed)
    }

    /// Whether a guest may emit it; the others are what a host observes.
    pub fn is_guest_emitted(&self) -> bool {
        matches!(self, Self::Starting | Self::Ready | Self::Failed | Self::Completed)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for State {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for State {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self::from_name(&Cow::<str>::deserialize(deserializer)?))
    }
}

#[cfg(feature = "schema")]
impl schemars::JsonSchema for State {
    fn schema_name() -> Cow<'static, str> {
        "State".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        let known: Vec<_> = Self::KNOWN.iter().map(Self::as_str).collect();
        schemars::json_schema!({
            "type": "string",
            "description": "One of the known states, or the name of one that a newer version added.",
            "examples": known,
        })
    }
}

/// One event of a guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Event {
    /// The version of the contract, [`SCHEMA_VERSION`].
    #[cfg_attr(feature = "schema", schemars(extend("const" = 1)))]
    pub schema_version: u32,
    /// Counts from 1 within a stream, without a hole, up to [`MAX_COUNT`](crate::limits::MAX_COUNT).
    #[serde(deserialize_with = "crate::bounded::seq")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = crate::limits::MAX_COUNT)))]
    pub seq: u64,
    /// When it was given its `seq`.
    pub timestamp: Timestamp,
    /// The state that it enters, or for progress and notices the state that it repeats.
    pub kind: State,
    /// For a person.
    pub message: String,
    /// The kernel's `boot_id` at that time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<String>,
    /// Anything. `progress` and `notice` in it mark an event that changes no state; what a supervisor says at the end
    /// stands in it beside whatever the workload gave:
    ///
    /// | name | in | what |
    /// |---|---|---|
    /// | `progress` | progress | `{name, fraction?}`, the fraction from 0 to 1 |
    /// | `notice` | notices | `{dropped_events}` or `{dropped_log_bytes}`: how much was left out at a cap or for want of room |
    /// | `exit_code` | terminal | the workload's exit code; 128 and the signal where one ended it |
    /// | `signal` | terminal | the signal that ended the main process |
    /// | `oom_kill` | terminal | `true`: the workload failed, and the kernel's count of processes killed for memory in its control group rose; `false`: it was killed by a signal that nobody asked for, and the count stayed; absent where that was not so, or nobody could read the count |
    /// | `full` | terminal | file systems that were full at the end, by where they are mounted: of the contract's files, of the artifacts, and `/` |
    /// | `timed_out` | terminal | `{watchdog: "run", secs}`: the time limit ended it |
    /// | `supervisor_lost` | terminal | `true`: the supervisor died, and its successor writes this |
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub details: Option<Value>,
    /// What this version does not know.
    #[serde(flatten)]
    pub extra: Extra,
}

impl Event {
    /// Reads a line of `events.jsonl`, without its newline.
    pub fn decode(line: &[u8]) -> Result<Self, DecodeError> {
        document::decode("event", SCHEMA_VERSION, MAX_EVENT_BYTES, line)
    }

    /// Checks the version of one that did not come through [`Event::decode`], such as the body of a message.
    pub fn check_version(&self) -> Result<(), DecodeError> {
        document::check_version("event", u64::from(self.schema_version), SCHEMA_VERSION)
    }

    /// Whether it changes the state. It does not where its kind is unknown, nor where `details` holds `progress` or
    /// `notice`; a terminal kind always does.
    pub fn changes_state(&self) -> bool {
        let repeats = |details: &Value| details.get("progress").is_some() || details.get("notice").is_some();
        self.kind.is_terminal() || (self.kind.is_guest_emitted() && !self.details.as_ref().is_some_and(repeats))
    }

    /// `details.progress`, where it is a progress event.
    pub fn progress(&self) -> Option<&Value> {
        self.details.as_ref()?.get("progress")
    }

    /// `details.exit_code`, where the terminal event carries one.
    pub fn exit_code(&self) -> Option<i32> {
        self.details.as_ref()?.get("exit_code")?.as_i64()?.try_into().ok()
    }
}
