//! The agent's own small files beside `events.jsonl`.
//!
//! ```text
//!   events.jsonl.stream   {"version":1,"stream_id":"…","boot_id":"…","base":{"seq":0,"digest":"0…"},"request_id":"…","supervised":true}
//!   events.jsonl.ack      {"stream_id":"…","seq":17,"logs":{"guest.log":4096},"released":true}
//!   session.owner         {"term":1,"session":"…","stream_id":"…"}
//!   events.jsonl.seq      17            no newline; older helpers read and write it too
//!   events.jsonl.dropped  3             progress events that were refused at the cap and not yet told of
//! ```
//!   events.jsonl.reserve                room for one of the documents; see `room`
//!
//! The first is durable before the first event; the others may be lost with the power. Each is replaced as a whole.

use std::collections::BTreeMap;

use pika_cloud_common::digest::Digest;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::error::LedgerError;
use super::folder::Folder;

/// The session that owns the runtime.
pub const OWNER: &str = "session.owner";
/// Held for a moment by a stream that changes [`OWNER`] or the acknowledgement.
pub const SESSION_LOCK: &str = "session.lock";
/// Held by a supervisor for its life.
pub const SUPERVISOR_LOCK: &str = "supervisor.lock";
/// Progress events that were refused at the cap and not yet told of.
pub(super) const DROPPED: &str = "events.jsonl.dropped";

/// The version of the files described here.
const VERSION: u32 = 1;
/// None of these files comes near it; a larger one is not ours.
const MAX_BYTES: usize = 64 * 1024;

/// `events.jsonl.stream`: which stream `events.jsonl` holds, and from where on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamFile {
    version: u32,
    /// 128 random bits in hexadecimal digits.
    pub stream_id: String,
    /// The boot in which it began.
    pub boot_id: String,
    /// What was before the first event in the file.
    pub base: Base,
    /// The request that was accepted in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// A supervisor was started for it, so that without one and without a terminal event the run is lost.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub supervised: bool,
    /// Its files are being moved aside; whoever finds this set goes on with that.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub retiring: bool,
}

/// The point up to which a stream's events were trimmed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// The last event that is gone; 0 where none is.
    pub seq: u64,
    /// The stream's digest there.
    pub digest: Digest,
}

impl StreamFile {
    /// A stream that begins now.
    pub fn new(stream_id: String, boot_id: String) -> Self {
        let base = Base { seq: 0, digest: Digest::EMPTY_STREAM };
        Self { version: VERSION, stream_id, boot_id, base, request_id: None, supervised: false, retiring: false }
    }

    /// Reads it from `folder`.
    pub fn read(folder: &Folder) -> Result<Option<Self>, LedgerError> {
        read_json(folder, pika_cloud_common::paths::EVENTS_STREAM)
    }

    /// Writes it to `folder`, durably.
    pub fn write(&self, folder: &Folder) -> Result<(), LedgerError> {
        write_json(folder, pika_cloud_common::paths::EVENTS_STREAM, self, true)
    }
}

/// `events.jsonl.ack`: how far the owner has the stream, durably.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AckFile {
    /// Which stream.
    pub stream_id: String,
    /// The last event.
    pub seq: u64,
    /// The next byte of each log file.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub logs: BTreeMap<String, u64>,
    /// The owner has the result and the outputs too: the guest may power off.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub released: bool,
}

impl AckFile {
    /// Reads it from `folder`; one of another stream, or a damaged one, counts as none.
    pub fn read(folder: &Folder, stream_id: &str) -> Self {
        let found = read_json::<Self>(folder, pika_cloud_common::paths::EVENTS_ACK).ok().flatten();
        found
            .filter(|ack| ack.stream_id == stream_id)
            .unwrap_or_else(|| Self { stream_id: stream_id.to_owned(), ..Self::default() })
    }

    /// Writes it to `folder`, under the session lock.
    pub fn write(&self, folder: &Folder) -> Result<(), LedgerError> {
        write_json(folder, pika_cloud_common::paths::EVENTS_ACK, self, false)
    }
}

/// `session.owner`: the session that owns the runtime.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnerFile {
    /// The highest term of an owner so far.
    pub term: u64,
    /// The session, by a random id.
    pub session: String,
    /// The stream that it was given.
    pub stream_id: String,
}

impl OwnerFile {
    /// Reads it from `folder`; a damaged one counts as none.
    pub fn read(folder: &Folder) -> Option<Self> {
        read_json(folder, OWNER).ok().flatten()
    }

    /// Writes it to `folder`, under the session lock.
    pub fn write(&self, folder: &Folder) -> Result<(), LedgerError> {
        write_json(folder, OWNER, self, false)
    }
}

/// The number in `events.jsonl.seq`, as older helpers write it.
pub(super) fn parse_hint(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.trim().parse().ok()
}

fn read_json<T: DeserializeOwned>(folder: &Folder, name: &str) -> Result<Option<T>, LedgerError> {
    let Some(text) = folder.read(name, MAX_BYTES)? else { return Ok(None) };
    let malformed = |source| LedgerError::Malformed { path: folder.path_of(name), source };
    serde_json::from_slice(&text).map(Some).map_err(malformed)
}

fn write_json(folder: &Folder, name: &str, value: &impl Serialize, sync: bool) -> Result<(), LedgerError> {
    let malformed = |source| LedgerError::Malformed { path: folder.path_of(name), source };
    folder.replace(name, &serde_json::to_vec(value).map_err(malformed)?, sync)
}
