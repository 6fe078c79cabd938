//! What the guest says.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::MessageError;
use crate::digest::Digest;
use crate::result::RunResult;
use crate::status::Status;

/// A message from the guest to the host.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum GuestMessage {
    /// Answers the host's hello.
    Hello(GuestHello),
    /// An event, as its line stands in `events.jsonl`.
    Event(#[cfg_attr(feature = "schema", schemars(with = "crate::event::Event"))] Box<RawValue>),
    /// `status.json`, when it changed.
    Status(Status),
    /// `result.json`, when it is there.
    Result(RunResult),
    /// Log bytes follow.
    Log(LogChunk),
    /// A file's bytes follow, or a folder is named.
    Entry(Entry),
    /// The agent lives.
    Heartbeat(Heartbeat),
    /// Something that the host should know and that changes no state.
    Notice(Notice),
    /// What the host asked for was refused.
    Error(SessionError),
    /// The last line of a session that ends as it should.
    End(EndReason),
}

/// What stands around an event's line in the stream.
const EVENT_PREFIX: &[u8] = b"{\"event\":";
const EVENT_SUFFIX: &[u8] = b"}";

/// The event's line inside a line of the stream, where it is an event message in the form that [`write_event`] gives
/// it. The hot path of a host: no JSON is read here, and what comes out is to be checked as an event.
pub fn event_line(line: &[u8]) -> Option<&[u8]> {
    line.strip_prefix(EVENT_PREFIX)?.strip_suffix(EVENT_SUFFIX)
}

/// Appends an event message with its newline. `line` is a line of `events.jsonl` that holds one JSON object.
pub fn write_event(line: &[u8], out: &mut Vec<u8>) {
    out.reserve(EVENT_PREFIX.len() + line.len() + EVENT_SUFFIX.len() + 1);
    out.extend_from_slice(EVENT_PREFIX);
    out.extend_from_slice(line);
    out.extend_from_slice(EVENT_SUFFIX);
    out.push(b'\n');
}

impl GuestMessage {
    const NAMES: [&str; 10] =
        ["hello", "event", "status", "result", "log", "entry", "heartbeat", "notice", "error", "end"];

    /// Reads a line, without its newline.
    pub fn decode(line: &[u8]) -> Result<Self, MessageError> {
        super::decode(line, &Self::NAMES)
    }

    /// Appends the line and its newline to `out`. The raw bytes of `log` and `entry` are the caller's to append.
    pub fn write(&self, out: &mut Vec<u8>) {
        super::write(self, out);
    }
}

/// Answers the host's hello.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct GuestHello {
    /// The version of the protocol, [`PROTOCOL`](super::PROTOCOL).
    pub protocol: u32,
    /// The agent's version.
    pub agent: String,
    /// The version of event, status and result that it writes.
    pub schema_version: u32,
    /// The stream that this session carries.
    pub stream_id: String,
    /// The kernel's `boot_id` when that stream began.
    pub boot_id: String,
    /// The machine's DMI `product_uuid`, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine_uuid: Option<String>,
    /// The first event that is still in the file; `last_seq + 1` where none is.
    #[serde(deserialize_with = "crate::bounded::count")]
    #[cfg_attr(feature = "schema", schemars(range(max = crate::limits::MAX_COUNT)))]
    pub first_seq: u64,
    /// The stream's digest before `first_seq`, where earlier events were trimmed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_digest: Option<Digest>,
    /// The last event; 0 where there was none.
    #[serde(deserialize_with = "crate::bounded::count")]
    #[cfg_attr(feature = "schema", schemars(range(max = crate::limits::MAX_COUNT)))]
    pub last_seq: u64,
    /// The request that was started in this stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
}

/// `len` raw bytes of a log file follow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct LogChunk {
    /// Its name in `logs/`.
    pub file: String,
    /// Where in the file they begin.
    #[serde(deserialize_with = "crate::bounded::count")]
    #[cfg_attr(feature = "schema", schemars(range(max = crate::limits::MAX_COUNT)))]
    pub offset: u64,
    /// How many follow, at most [`MAX_CHUNK_BYTES`](crate::limits::MAX_CHUNK_BYTES).
    #[serde(deserialize_with = "crate::bounded::chunk_len")]
    #[cfg_attr(feature = "schema", schemars(range(max = crate::limits::MAX_CHUNK_BYTES)))]
    pub len: u64,
}

/// A folder, or `len` raw bytes of a file that follow.
///
/// A file comes in chunks, in order and without a hole; the last one carries the file's digest. `size` is what the file
/// had when it was opened: a file that shrinks under the archive ends early, one that grows is cut there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Entry {
    /// Below `artifacts/`, its components joined by `/`.
    pub path: String,
    /// Whether it is a folder; a folder has no bytes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub folder: bool,
    /// Permission bits. The host keeps the executable one and nothing else.
    pub mode: u32,
    /// The file's size in bytes.
    #[serde(deserialize_with = "crate::bounded::count")]
    #[cfg_attr(feature = "schema", schemars(range(max = crate::limits::MAX_COUNT)))]
    pub size: u64,
    /// Where in the file this chunk begins.
    #[serde(default, deserialize_with = "crate::bounded::count")]
    #[cfg_attr(feature = "schema", schemars(range(max = crate::limits::MAX_COUNT)))]
    pub offset: u64,
    /// How many raw bytes follow, at most [`MAX_CHUNK_BYTES`](crate::limits::MAX_CHUNK_BYTES).
    #[serde(default, deserialize_with = "crate::bounded::chunk_len")]
    #[cfg_attr(feature = "schema", schemars(range(max = crate::limits::MAX_CHUNK_BYTES)))]
    pub len: u64,
    /// Of all the file's bytes that were sent; its presence ends the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
}

/// The agent lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Heartbeat {
    /// The last event in the file.
    #[serde(deserialize_with = "crate::bounded::count")]
    #[cfg_attr(feature = "schema", schemars(range(max = crate::limits::MAX_COUNT)))]
    pub seq: u64,
    /// Seconds since the guest booted.
    pub uptime: u64,
}

/// Something that the host should know and that changes no state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(tag = "what", rename_all = "snake_case")]
pub enum Notice {
    /// The request was accepted, durably, and its supervisor runs.
    Started {
        /// The id in `start`.
        request_id: String,
    },
    /// The request had been accepted before; nothing was started.
    AlreadyStarted {
        /// The id in `start`.
        request_id: String,
    },
    /// Events between the cursor and `first_seq` are gone: trimmed after the owner acknowledged them, or lost.
    Gap {
        /// The first event that is still there.
        #[serde(deserialize_with = "crate::bounded::count")]
        #[cfg_attr(feature = "schema", schemars(range(max = crate::limits::MAX_COUNT)))]
        first_seq: u64,
    },
    /// A line of `events.jsonl` is no event. It is left out.
    BadLine {
        /// Where in the file it begins.
        #[serde(deserialize_with = "crate::bounded::count")]
        #[cfg_attr(feature = "schema", schemars(range(max = crate::limits::MAX_COUNT)))]
        offset: u64,
        /// Its length.
        #[serde(deserialize_with = "crate::bounded::count")]
        #[cfg_attr(feature = "schema", schemars(range(max = crate::limits::MAX_COUNT)))]
        bytes: u64,
        /// Why it is none.
        reason: String,
        /// Its beginning, with what is no text replaced.
        sample: String,
    },
    /// Log bytes are gone: dropped at the cap, or the file was cut by the workload.
    LogGap {
        /// The log file.
        file: String,
        /// The first missing byte.
        #[serde(deserialize_with = "crate::bounded::count")]
        #[cfg_attr(feature = "schema", schemars(range(max = crate::limits::MAX_COUNT)))]
        from: u64,
        /// The first byte that is there again.
        #[serde(deserialize_with = "crate::bounded::count")]
        #[cfg_attr(feature = "schema", schemars(range(max = crate::limits::MAX_COUNT)))]
        to: u64,
    },
    /// The cursor does not fit the stream: the guest was restored to an earlier state.
    Rewound {
        /// The guest's last event.
        #[serde(deserialize_with = "crate::bounded::count")]
        #[cfg_attr(feature = "schema", schemars(range(max = crate::limits::MAX_COUNT)))]
        last_seq: u64,
    },
    /// A file that matched is left out of the archive.
    Skipped {
        /// Its path below `artifacts/`.
        path: String,
        /// Why.
        reason: String,
    },
    /// The archive has been sent.
    ArchiveDone {
        /// Files and folders sent.
        #[serde(deserialize_with = "crate::bounded::count")]
        #[cfg_attr(feature = "schema", schemars(range(max = crate::limits::MAX_COUNT)))]
        files: u64,
        /// Bytes sent.
        #[serde(deserialize_with = "crate::bounded::count")]
        #[cfg_attr(feature = "schema", schemars(range(max = crate::limits::MAX_COUNT)))]
        bytes: u64,
        /// Entries that matched and were left out.
        #[serde(deserialize_with = "crate::bounded::count")]
        #[cfg_attr(feature = "schema", schemars(range(max = crate::limits::MAX_COUNT)))]
        skipped: u64,
        /// Whether something is missing that was asked for: it is beyond a limit, or could not be had. Links and special files
        /// are not.
        truncated: bool,
        /// What is missing, and why: the first such thing, and whether there were too many files besides.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        problem: Option<String>,
    },
    /// Of a newer version.
    #[serde(other)]
    Unknown,
}

/// What the host asked for was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct SessionError {
    /// For a program.
    pub code: ErrorCode,
    /// For a person.
    pub message: String,
}

/// Why something was refused. All but `busy`, `not_owner` and `archive` end the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The agent does not speak the host's protocol; the message names both versions.
    UnsupportedProtocol,
    /// A line that is no message, or one out of place.
    BadMessage,
    /// Another owner with a higher term was here.
    StaleTerm,
    /// A newer session of an owner took over.
    Superseded,
    /// The host means another machine.
    AnotherMachine,
    /// The agent serves as many sessions as it does at once.
    TooManySessions,
    /// Only an owner may ask for that.
    NotOwner,
    /// Another request is running.
    Busy,
    /// The request cannot be started, whatever is tried.
    BadRequest,
    /// The archive could not be made; the message says how far it came.
    Archive,
    /// The guest's files cannot be read or written: no terminal event can come.
    Ledger,
    /// Of a newer version.
    #[serde(other)]
    Unknown,
}

/// Why a session ends as it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(tag = "reason", rename_all = "snake_case")]
pub enum EndReason {
    /// The host did not ask to follow, and has all that is there.
    Done,
    /// A new stream began; dial again for it.
    NewStream,
    /// The agent was asked to end.
    Shutdown,
    /// Of a newer version.
    #[serde(other)]
    Unknown,
}
