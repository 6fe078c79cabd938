//! A record, to bytes and back. Pure.

use pika_cloud_common::digest::Digest;
use pika_cloud_common::verdict::{Collection, Outcome};
use pika_cloud_common::wire::Notice;
use pika_cloud_common::{RunResult, State, Status, Timestamp, Verdict};
use serde::{Deserialize, Serialize, Serializer, ser};
use serde_json::value::RawValue;
use std::collections::BTreeMap;

/// The version of the format that this build reads and writes.
pub const VERSION: u32 = 1;

/// One line of a journal.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Record {
    /// Counts from 0.
    pub n: u64,
    /// When the host wrote it.
    pub at: Timestamp,
    /// The incarnation that it is about; 0 for the header.
    pub inc: u32,
    /// What it says.
    #[serde(flatten)]
    pub body: Body,
}

/// What a record says.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Body {
    /// The first record.
    Journal(Header),
    /// What the host did or saw.
    Host(HostRecord),
    /// An event of the guest, verbatim.
    Guest(GuestLine),
}

/// An event of the guest, every byte as it stands in the guest's file: blanks around it count in the stream's digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestLine(Box<str>);

impl GuestLine {
    /// The line, without its newline.
    pub fn get(&self) -> &str {
        &self.0
    }
}

impl Serialize for GuestLine {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serde_json::from_str::<&RawValue>(&self.0).map_err(ser::Error::custom)?.serialize(serializer)
    }
}

/// The first record of a journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// [`VERSION`].
    pub version: u32,
    /// Whose journal it is.
    pub runtime_id: String,
}

/// What the host did or saw.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub enum HostRecord {
    /// An incarnation begins; Incus has been asked for nothing yet.
    Requested {
        /// Of the spec that it is for.
        spec_hash: String,
    },
    /// A state that the host observed.
    State {
        /// Which.
        state: State,
        /// For a person.
        message: String,
    },
    /// A stream is followed from here on: guest records behind this one are of it.
    Stream {
        /// Which.
        stream_id: String,
        /// The boot in which it began.
        boot_id: String,
        /// The agent's version.
        agent: String,
        /// Where it begins for us: the `seq` before the first event that the guest still had.
        after_seq: u64,
        /// The stream's digest at `after_seq`.
        digest: Digest,
    },
    /// The guest is about to be asked to start its workload.
    StartSent {
        /// Runtime and incarnation.
        request_id: String,
    },
    /// The guest will not start its workload.
    StartRefused {
        /// Why.
        message: String,
    },
    /// The guest has started its workload.
    Accepted {
        /// Runtime and incarnation.
        request_id: String,
    },
    /// Log bytes up to here are durable.
    Logs {
        /// By the file's name.
        logs: BTreeMap<String, LogMark>,
    },
    /// Numbers that the guest's events left out.
    Missing {
        /// The last before them.
        after_seq: u64,
        /// How many.
        count: u64,
    },
    /// Events that are not kept, since the spec's `limits.event_bytes` was reached.
    Dropped {
        /// The last of them.
        seq: u64,
        /// The stream's digest at `seq`.
        digest: Digest,
        /// How many.
        count: u64,
    },
    /// A line that the guest sent as an event and that is none.
    BadLine {
        /// Why.
        reason: String,
        /// Its beginning.
        sample: String,
    },
    /// What the guest said beside its events.
    Notice {
        /// As it said it.
        notice: Notice,
    },
    /// The guest's `status.json`.
    Status {
        /// As it is.
        status: Box<Status>,
    },
    /// The guest's `result.json`.
    Result {
        /// As it is.
        result: Box<RunResult>,
    },
    /// The end is decided; what is left is to collect and to conclude.
    Ended {
        /// How.
        outcome: Outcome,
        /// For a person.
        message: String,
        /// What Incus or the session answered, where that led to it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<String>,
        /// Incus's own word for the instance.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        instance_status: Option<String>,
    },
    /// How far collection came.
    Collected {
        /// The figures.
        collection: Collection,
    },
    /// The verdict.
    Verdict {
        /// As it is published.
        verdict: Box<Verdict>,
    },
    /// The instance is destroyed, or kept as its policy says: the incarnation is over.
    Finished {
        /// Whether its instance is gone.
        destroyed: bool,
    },
}

/// How far a log file is on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogMark {
    /// The next byte of the guest's file.
    pub guest: u64,
    /// The length of ours: shorter where bytes were lost or left out.
    pub host: u64,
}

/// Between the head of a record and an event of the guest.
const GUEST_KEY: &[u8] = b",\"guest\":";

/// Between a record's content and its checksum.
const CRC_KEY: &[u8] = b",\"crc\":\"";
/// Bytes of `,"crc":"xxxxxxxx"}`.
const CRC_BYTES: usize = CRC_KEY.len() + 8 + 2;

/// A line of the journal is at most this long: the largest guest line, escaped nowhere, and room for what stands around it.
pub(super) const MAX_RECORD_BYTES: usize = 2 * 1024 * 1024;

/// Appends a record of the host.
pub(super) fn write_host(n: u64, at: &Timestamp, inc: u32, body: &Body, out: &mut Vec<u8>) {
    let start = out.len();
    let record = Record { n, at: at.clone(), inc, body: body.clone() };
    // Writing to a Vec cannot fail, and all keys are strings.
    serde_json::to_writer(&mut *out, &record).expect("records are serializable");
    out.pop();
    seal(start, out);
}

/// Appends a record with an event of the guest, verbatim.
pub(super) fn write_guest(n: u64, at: &Timestamp, inc: u32, line: &[u8], out: &mut Vec<u8>) {
    use std::io::Write as _;
    let start = out.len();
    // Writing to a Vec cannot fail.
    let _ = write!(out, "{{\"n\":{n},\"at\":\"{at}\",\"inc\":{inc}");
    out.extend_from_slice(GUEST_KEY);
    out.extend_from_slice(line);
    seal(start, out);
}

/// Closes the object that begins at `start` and lacks its brace with the checksum of what is there.
fn seal(start: usize, out: &mut Vec<u8>) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let crc = crc32fast::hash(&out[start..]);
    out.extend_from_slice(CRC_KEY);
    out.extend((0..8).rev().map(|nibble| HEX[(crc >> (nibble * 4)) as usize & 15]));
    out.extend_from_slice(b"\"}\n");
}

/// Why bytes are no record.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NoRecord {
    /// The checksum is missing or does not fit.
    Damaged,
    /// It fits, and yet the content is not a record of this version.
    Foreign,
}

/// Reads a line, without its newline, whose checksum fits.
pub(super) fn read(line: &[u8]) -> Result<Record, NoRecord> {
    let content = intact_content(line).ok_or(NoRecord::Damaged)?;
    serde_json::from_slice::<Flat>(line).ok().and_then(|flat| flat.into_record(content)).ok_or(NoRecord::Foreign)
}

/// What stands before the checksum at the end of a line, where it fits.
fn intact_content(line: &[u8]) -> Option<&[u8]> {
    let (content, tail) = line.split_at(line.len().checked_sub(CRC_BYTES)?);
    let digits = tail.strip_prefix(CRC_KEY)?.strip_suffix(b"\"}")?;
    let crc = u32::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    (crc == crc32fast::hash(content)).then_some(content)
}

/// The version that a journal's first line names, whatever else of it this build can read.
pub(super) fn version_of(line: &[u8]) -> Option<u32> {
    #[derive(Deserialize)]
    struct Probe {
        journal: ProbedHeader,
    }
    #[derive(Deserialize)]
    struct ProbedHeader {
        version: u32,
    }
    serde_json::from_slice::<Probe>(line).ok().map(|probe| probe.journal.version)
}

/// A record as it stands in its line: serde cannot keep a verbatim value inside of a flattened one.
#[derive(Deserialize)]
struct Flat<'a> {
    n: u64,
    at: Timestamp,
    inc: u32,
    journal: Option<Header>,
    host: Option<HostRecord>,
    #[serde(borrow)]
    guest: Option<&'a RawValue>,
}

impl Flat<'_> {
    fn into_record(self, content: &[u8]) -> Option<Record> {
        let body = match (self.journal, self.host, self.guest) {
            (Some(header), None, None) => Body::Journal(header),
            (None, Some(host), None) => Body::Host(host),
            (None, None, Some(event)) => Body::Guest(guest_line(content, event.get())?),
            _ => return None,
        };
        Some(Record { n: self.n, at: self.at, inc: self.inc, body })
    }
}

/// The guest's line with the blanks around its event, which a JSON reader leaves out. It is the last member.
fn guest_line(content: &[u8], event: &str) -> Option<GuestLine> {
    let at = memchr::memmem::find(content, GUEST_KEY)? + GUEST_KEY.len();
    let line = std::str::from_utf8(&content[at..]).ok()?;
    (line.trim_ascii() == event).then(|| GuestLine(line.into()))
}
