//! The session protocol, version 1: what host and guest say to each other over any byte stream.
//!
//! Both directions are newline-delimited JSON, one message a line, each an object with a single member that names it:
//!
//! ```text
//!   host   {"hello":{"protocol":1,"role":"owner","term":1,"follow":true}}
//!   guest  {"hello":{"protocol":1,"agent":"0.1.0","schema_version":1,"stream_id":"…","boot_id":"…","first_seq":1,"last_seq":0}}
//!   host   {"start":{"request_id":"job-7.1","request":{…}}}
//!   guest  {"notice":{"what":"started","request_id":"job-7.1"}}
//!   guest  {"event":{"schema_version":1,"seq":1,…}}          the line as it stands in events.jsonl
//!   host   {"ack":{"seq":1,"logs":{}}}                        after it is durable on the host
//!   guest  {"log":{"file":"guest.log","offset":0,"len":6}}    and then exactly 6 raw bytes
//! ```
//!
//! A line is at most [`MAX_LINE_BYTES`](crate::limits::MAX_LINE_BYTES); raw bytes follow `log` and `entry` only. A
//! message or a field that the reader does not know is skipped, so both may be added within a version; a message that
//! carries raw bytes needs a new version. Numbers beyond their bounds make a message malformed; texts, names and paths
//! are the reader's to check, as are the versions of the documents in `status`, `result` and `start`. What can go wrong: a line too long or not JSON ends the session, since nothing after it
//! can be trusted; the host dials again and goes on from its cursor.

mod frame;
mod guest;
mod host;

pub use frame::{Decoder, Frame, FrameError};
pub use guest::{
    EndReason, Entry, ErrorCode, GuestHello, GuestMessage, Heartbeat, LogChunk, Notice, SessionError, event_line,
    write_event,
};
pub use host::{Ack, Archive, ArchiveLimits, Cursor, Empty, HostHello, HostMessage, Role, Signal, Start};

/// What carries a session. Each carries all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// Incus `exec` runs the agent, and its standard streams are the session's.
    Exec,
    /// `AF_VSOCK` to the agent of a virtual machine on the same host.
    Vsock,
}

impl Transport {
    /// Its name in documents.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Exec => "exec",
            Self::Vsock => "vsock",
        }
    }
}

/// Whose agent speaks in a session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AgentOrigin {
    /// The image's own.
    #[default]
    Image,
    /// The host's own, which it has put into the guest.
    Host,
}

impl AgentOrigin {
    /// Its name in documents.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Image => "image",
            Self::Host => "host",
        }
    }
}

/// The version of the session protocol that this build speaks.
pub const PROTOCOL: u32 = 1;

/// A line of the session protocol could not be read.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// A message that a newer version added. It is skipped.
    #[error("unknown message `{name}`")]
    Unknown {
        /// Its name, at most 64 characters of it.
        name: String,
    },
    /// Not a message.
    #[error("not a message of the session protocol: {0}")]
    Malformed(#[from] serde_json::Error),
}

/// Decodes an externally tagged message, and tells one of an unknown name from one that is malformed.
fn decode<'a, T: serde::Deserialize<'a>>(line: &'a [u8], known: &[&str]) -> Result<T, MessageError> {
    serde_json::from_slice(line).map_err(|error| match name_of(line) {
        Some(name) if !known.contains(&name.as_str()) => {
            MessageError::Unknown { name: name.chars().take(64).collect() }
        }
        _ => MessageError::Malformed(error),
    })
}

/// The name of a message: the only member of its object.
fn name_of(line: &[u8]) -> Option<String> {
    let members: std::collections::BTreeMap<String, &serde_json::value::RawValue> =
        serde_json::from_slice(line).ok()?;
    match members.len() {
        1 => members.into_keys().next(),
        _ => None,
    }
}

/// Appends a message and its newline to `out`.
fn write(message: &impl serde::Serialize, out: &mut Vec<u8>) {
    // Writing to a Vec cannot fail, and every key of these types is a string.
    serde_json::to_writer(&mut *out, message).expect("messages are serializable");
    out.push(b'\n');
}
