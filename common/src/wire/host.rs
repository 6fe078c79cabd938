//! What the host says.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::MessageError;
use crate::digest::Digest;
use crate::request::GuestRequest;

/// A message from the host to the guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum HostMessage {
    /// Opens the session; the first line, always.
    Hello(HostHello),
    /// Everything up to here is durable on the host. The owner's only.
    Ack(Ack),
    /// Starts the workload, at most once for a `request_id`. The owner's only.
    Start(Start),
    /// Sends a signal to the workload's process group. The owner's only.
    Signal(Signal),
    /// Asks for the artifacts.
    Archive(Archive),
    /// Result, logs and outputs are durable on the host: the guest may power off. The owner's only.
    Release(Empty),
    /// The host lives.
    Ping(Empty),
}

impl HostMessage {
    const NAMES: [&str; 7] = ["hello", "ack", "start", "signal", "archive", "release", "ping"];

    /// Reads a line, without its newline.
    pub fn decode(line: &[u8]) -> Result<Self, MessageError> {
        super::decode(line, &Self::NAMES)
    }

    /// Appends the line and its newline to `out`.
    pub fn write(&self, out: &mut Vec<u8>) {
        super::write(self, out);
    }
}

/// A message without content.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Empty {}

/// Opens a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct HostHello {
    /// The version of the protocol, [`PROTOCOL`](super::PROTOCOL).
    pub protocol: u32,
    /// What this session may do.
    pub role: Role,
    /// Raised at each take-over; the guest refuses an owner with a lower one than it has seen.
    #[serde(default)]
    pub term: u64,
    /// The machine that is meant, where the host dialled a number that may be another's by now: the digest of its DMI
    /// `product_uuid` in lower case, of which another machine learns nothing. An agent elsewhere refuses the session before it
    /// takes note of it. Over vsock it must be there: whatever runs on the host can dial, and this it does not know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<Digest>,
    /// From where to go on; absent on the first session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<Cursor>,
    /// Whether to stay for what comes, or end after what is there.
    #[serde(default)]
    pub follow: bool,
}

/// What a session may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Acknowledges, starts, signals and releases. A newer owner supersedes an older one.
    Owner,
    /// Reads.
    Observer,
}

/// How far a host has a stream, durably.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Cursor {
    /// Which stream.
    pub stream_id: String,
    /// The last event.
    #[serde(deserialize_with = "crate::bounded::count")]
    #[cfg_attr(feature = "schema", schemars(range(max = crate::limits::MAX_COUNT)))]
    pub seq: u64,
    /// The stream's digest at `seq`, see [`Digest::chain`].
    pub digest: Digest,
    /// The next byte of each log file.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub logs: BTreeMap<String, u64>,
}

/// What is durable on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Ack {
    /// The last event.
    #[serde(deserialize_with = "crate::bounded::count")]
    #[cfg_attr(feature = "schema", schemars(range(max = crate::limits::MAX_COUNT)))]
    pub seq: u64,
    /// The next byte of each log file of which more is durable than the session's earlier ones said.
    #[serde(default)]
    pub logs: BTreeMap<String, u64>,
}

/// Starts the workload. Its `Debug` form shows the names of the environment only.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Start {
    /// Runtime and incarnation. The same id again answers `already_started` and starts nothing.
    pub request_id: String,
    /// What to run; the guest writes it to `guest-request.json`.
    pub request: GuestRequest,
    /// The workload's environment beside what the agent sets. Never written to a file.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// The workload's working folder; `/` where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Folders that must be mounted before the workload begins, absolute. In a virtual machine Incus's own agent mounts them,
    /// at some time after the boot.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<String>,
    /// Seconds between TERM and KILL.
    #[serde(default = "Start::default_stop_grace_secs")]
    pub stop_grace_secs: u64,
}

impl std::fmt::Debug for Start {
    // Invariant 8: what a user put into the environment is in no log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Start")
            .field("request_id", &self.request_id)
            .field("request", &self.request)
            .field("env", &self.env.keys())
            .field("cwd", &self.cwd)
            .field("mounts", &self.mounts)
            .field("stop_grace_secs", &self.stop_grace_secs)
            .finish()
    }
}

impl Start {
    /// Seconds between TERM and KILL where the host does not say.
    pub fn default_stop_grace_secs() -> u64 {
        10
    }
}

/// Sends a signal to the workload's process group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Signal {
    /// `TERM`, `INT`, `HUP`, `QUIT`, `KILL`, `USR1` or `USR2`.
    pub name: String,
}

/// Asks for the artifacts: regular files and folders whose path below `artifacts/` matches one of the globs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Archive {
    /// Read by [`Globs`](crate::glob::Globs). `**` means all.
    pub globs: Vec<String>,
    /// Where to stop.
    pub limits: ArchiveLimits,
    /// Goes on behind this path: entries come in the bytewise order of their paths' components.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
}

/// Bounds of one collection; that something lies beyond them is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ArchiveLimits {
    /// Files and folders, with the files that do not fit. The archive ends with the last of them.
    pub max_files: u64,
    /// Bytes of all files together. One that does not fit is left out; those behind it may.
    pub max_bytes: u64,
}
