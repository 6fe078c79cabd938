//! Lines of a journal, to bytes and back. Pure.

use pika_cloud_common::digest::Digest;
use pika_cloud_common::verdict::{Collection, Outcome};
use pika_cloud_common::wire::{AgentOrigin, Notice, Transport};
use pika_cloud_common::{Command, RunResult, State, Status, Timestamp, Verdict};
use serde::{Deserialize, Serialize, Serializer, ser};
use serde_json::value::RawValue;
use std::collections::BTreeMap;

use super::view::View;
use crate::clock::{Now, timestamp};

/// The version of the format that this build reads and writes.
pub const VERSION: u32 = 3;

/// One record of a journal.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Record {
    /// Counts from 0, over all segments.
    pub n: u64,
    /// When the host wrote it.
    pub at: Timestamp,
    /// The same on the host's monotonic clock, in microseconds since its boot.
    pub mono: u64,
    /// The incarnation that it is about; 0 before the first.
    pub inc: u32,
    /// What it says.
    #[serde(flatten)]
    pub body: Body,
}

/// What a record says.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Body {
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

/// The first line of a segment, which is no record.
#[derive(Clone, Debug, PartialEq)]
pub struct Header {
    /// Whose journal it is.
    pub runtime_id: String,
    /// Which segment: the number in its file's name.
    pub segment: u64,
    /// The number of its first record.
    pub next_n: u64,
    /// What all records before `next_n` say; without one, the segment goes on where the one before it has to be read to.
    pub snapshot: Option<Box<View>>,
}

/// What the host did or saw.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub enum HostRecord {
    /// An incarnation begins; Incus has been asked for nothing yet.
    Requested {
        /// Of the spec that it is for.
        spec_hash: String,
        /// Restarts in a row that led to it.
        restarts: u32,
    },
    /// What follows was written in another boot of the host than what stands before.
    HostBoot {
        /// The kernel's name of it.
        boot_id: String,
    },
    /// Incus is about to be asked to start the instance.
    InstanceStarting {},
    /// A user wants something.
    Command {
        /// What.
        command: Command,
    },
    /// Which of the owner's terms this collector acts in.
    Term {
        /// Counts from 1.
        term: u64,
    },
    /// Another owner acts on the instance: nothing more is done to it from here.
    TakenOver {
        /// Who.
        owner: String,
        /// Its term.
        term: u64,
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
    /// Sessions come by another way than the last one did, or are with another agent.
    Session {
        /// Which way.
        transport: Transport,
        /// Whose agent.
        #[serde(default)]
        agent: AgentOrigin,
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
    /// The end of what the instance said on its console, where its agent was never heard.
    Console {
        /// Without control characters.
        tail: String,
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
    /// The instance is kept, as its policy says.
    Kept {
        /// For so long; without it, until somebody stops it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        for_secs: Option<u64>,
    },
    /// The incarnation is over.
    Finished {
        /// Whether its instance is gone.
        destroyed: bool,
        /// When the next incarnation begins, in milliseconds from here; without it, none does.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        restart_in_ms: Option<u64>,
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

/// A snapshot is at most this long: the rest of its line is for what stands around it.
pub(super) const MAX_SNAPSHOT_BYTES: usize = MAX_RECORD_BYTES - 4 * 1024;

/// Where and when a record is written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stamp {
    pub(super) n: u64,
    pub(super) now: Now,
    pub(super) inc: u32,
}

impl Stamp {
    fn mono(&self) -> u64 {
        u64::try_from(self.now.mono.as_micros()).unwrap_or(u64::MAX)
    }
}

/// Appends a record of the host.
pub(super) fn write_host(stamp: Stamp, record: &HostRecord, out: &mut Vec<u8>) {
    #[derive(Serialize)]
    struct Line<'a> {
        n: u64,
        at: Timestamp,
        mono: u64,
        inc: u32,
        host: &'a HostRecord,
    }
    let start = out.len();
    let Stamp { n, now, inc } = stamp;
    let line = Line { n, at: timestamp(now.wall), mono: stamp.mono(), inc, host: record };
    // Writing to a Vec cannot fail, and all keys are strings.
    serde_json::to_writer(&mut *out, &line).expect("records are serializable");
    out.pop();
    seal(start, out);
}

/// What stands in a record of a guest between its number and its event, as it was last written: all events of one read have
/// the same.
#[derive(Debug, Default)]
pub(super) struct Clocks {
    now: Now,
    inc: u32,
    text: String,
}

impl Clocks {
    fn text(&mut self, stamp: Stamp) -> &str {
        let Stamp { now, inc, .. } = stamp;
        if self.text.is_empty() || (self.inc, self.now) != (inc, now) {
            (self.inc, self.now) = (inc, now);
            self.text = format!(",\"at\":\"{}\",\"mono\":{},\"inc\":{inc}", timestamp(now.wall), stamp.mono());
        }
        &self.text
    }
}

/// Appends a record with an event of the guest, verbatim.
pub(super) fn write_guest(stamp: Stamp, clocks: &mut Clocks, line: &[u8], out: &mut Vec<u8>) {
    use std::io::Write as _;
    let start = out.len();
    // Writing to a Vec cannot fail.
    let _ = write!(out, "{{\"n\":{}", stamp.n);
    out.extend_from_slice(clocks.text(stamp).as_bytes());
    out.extend_from_slice(GUEST_KEY);
    out.extend_from_slice(line);
    seal(start, out);
}

/// A segment's first line. `snapshot` is a view as JSON.
pub(super) fn write_header(runtime_id: &str, segment: u64, next_n: u64, snapshot: Option<&RawValue>) -> Vec<u8> {
    #[derive(Serialize)]
    struct Line<'a> {
        journal: Inner<'a>,
    }
    #[derive(Serialize)]
    struct Inner<'a> {
        version: u32,
        runtime_id: &'a str,
        segment: u64,
        next_n: u64,
        #[serde(skip_serializing_if = "Option::is_none")]
        snapshot: Option<&'a RawValue>,
    }
    let line = Line { journal: Inner { version: VERSION, runtime_id, segment, next_n, snapshot } };
    // All keys are strings.
    let mut out = serde_json::to_vec(&line).expect("headers are serializable");
    out.pop();
    seal(0, &mut out);
    out
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

/// Whether a line is of a journal, whatever it says.
pub(super) fn is_intact(line: &[u8]) -> bool {
    intact_content(line).is_some()
}

/// Reads a segment's first line, without its newline, whose checksum fits.
pub(super) fn read_header(line: &[u8]) -> Result<Header, NoRecord> {
    #[derive(Deserialize)]
    struct Line<'a> {
        #[serde(borrow)]
        journal: Inner<'a>,
    }
    // The snapshot is read by itself: documents of a guest stand in it no deeper than in their records.
    #[derive(Deserialize)]
    struct Inner<'a> {
        runtime_id: String,
        segment: u64,
        next_n: u64,
        #[serde(borrow)]
        snapshot: Option<&'a RawValue>,
    }
    intact_content(line).ok_or(NoRecord::Damaged)?;
    let Line { journal } = serde_json::from_slice(line).map_err(|_| NoRecord::Foreign)?;
    let snapshot = match journal.snapshot {
        Some(snapshot) => Some(serde_json::from_str(snapshot.get()).map_err(|_| NoRecord::Foreign)?),
        None => None,
    };
    Ok(Header { runtime_id: journal.runtime_id, segment: journal.segment, next_n: journal.next_n, snapshot })
}

/// The version that a segment's first line names, whatever else of it this build can read.
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
    mono: u64,
    inc: u32,
    host: Option<HostRecord>,
    #[serde(borrow)]
    guest: Option<&'a RawValue>,
}

impl Flat<'_> {
    fn into_record(self, content: &[u8]) -> Option<Record> {
        let body = match (self.host, self.guest) {
            (Some(host), None) => Body::Host(host),
            (None, Some(event)) => Body::Guest(guest_line(content, event.get())?),
            _ => return None,
        };
        Some(Record { n: self.n, at: self.at, mono: self.mono, inc: self.inc, body })
    }
}

/// The guest's line with the blanks around its event, which a JSON reader leaves out. It is the last member.
fn guest_line(content: &[u8], event: &str) -> Option<GuestLine> {
    let at = memchr::memmem::find(content, GUEST_KEY)? + GUEST_KEY.len();
    let line = std::str::from_utf8(&content[at..]).ok()?;
    (line.trim_ascii() == event).then(|| GuestLine(line.into()))
}
