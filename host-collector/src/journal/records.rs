//! Gathering records: the fold of what was said so far, and the bytes that say it. No clock and no file.

use std::collections::BTreeMap;

use pika_cloud_common::EventHead;
use pika_cloud_common::digest::Digest;
use pika_cloud_common::limits::BAD_LINE_SAMPLE_BYTES;
use serde_json::value::RawValue;

use super::format::{self, Clocks, HostRecord, MAX_RECORD_BYTES, MAX_SNAPSHOT_BYTES, Record, Stamp};
use super::view::View;
use crate::clock::Now;

/// Bytes of a segment, as far as the spec's `limits.event_bytes` does not say less or more.
const MIN_SEGMENT_BYTES: u64 = 64 * 1024;
const MAX_SEGMENT_BYTES: u64 = 16 * 1024 * 1024;

/// What a record quotes of a guest, a session or Incus, in bytes of JSON. Longer texts are cut.
pub(super) const MAX_TEXT_BYTES: usize = 2 * 1024;

/// The same for the end of a console: 4096 characters of any script.
pub(super) const MAX_CONSOLE_BYTES: usize = 16 * 1024;

/// What has to become durable together.
#[derive(Debug, Default)]
pub struct Commit {
    /// Whole lines.
    pub records: Vec<u8>,
    /// Appended and synced before the records, which speak of them.
    pub logs: Vec<LogBytes>,
    /// Where the records begin a segment.
    pub segment: Option<NewSegment>,
    /// The number of the first record.
    pub first_n: u64,
    /// Whether the room that is kept for a verdict may be used up.
    pub last: bool,
    /// Whether nothing is expected behind it, so that the room can be given back.
    pub finishes: bool,
}

impl Commit {
    /// Bytes of its records and logs.
    pub(crate) fn bytes(&self) -> u64 {
        (self.records.len() + self.logs.iter().map(|log| log.bytes.len()).sum::<usize>()) as u64
    }
}

/// Bytes for one of an incarnation's log files.
#[derive(Debug)]
pub struct LogBytes {
    /// The file's name in the runtime's folder, such as `1/logs/guest.log`.
    pub name: String,
    /// Where they begin in it: what stands behind is of a crash, and is cut.
    pub offset: u64,
    /// They.
    pub bytes: Vec<u8>,
}

/// A segment that begins with what all earlier records say, so that they are not needed any more.
#[derive(Debug)]
pub struct NewSegment {
    /// The view, as JSON.
    pub snapshot: Box<RawValue>,
    /// The oldest segments go while all together are larger.
    pub keep_bytes: u64,
}

/// What is known of one runtime, and what of it is not handed out to be written yet.
#[derive(Debug)]
pub struct Records {
    view: View,
    buffer: Vec<u8>,
    first_n: u64,
    logs: Vec<LogBytes>,
    /// Where the next bytes of each log file of this incarnation belong.
    log_ends: BTreeMap<String, u64>,
    segment: Option<NewSegment>,
    /// Bytes of the present segment behind its header: a large view alone is no reason for another one.
    filled: u64,
    /// How large it becomes.
    pub(super) segment_bytes: u64,
    event_bytes: u64,
    finishes: bool,
    spare: Vec<u8>,
    clocks: Clocks,
}

impl Records {
    /// Goes on behind what was recovered. `event_bytes` is the spec's limit, which bounds all segments together
    /// (Invariant 5); `filled` is [`Store::filled`](super::Store::filled).
    pub fn new(view: View, event_bytes: u64, filled: u64) -> Self {
        Self {
            first_n: view.next_n,
            log_ends: view.log_lengths.clone(),
            view,
            buffer: Vec::new(),
            logs: Vec::new(),
            segment: None,
            filled,
            segment_bytes: (event_bytes / 8).clamp(MIN_SEGMENT_BYTES, MAX_SEGMENT_BYTES),
            event_bytes,
            finishes: false,
            spare: Vec::new(),
            clocks: Clocks::default(),
        }
    }

    /// What the journal says, with what is not durable yet.
    pub fn view(&self) -> &View {
        &self.view
    }

    /// Bytes that no commit has taken yet.
    pub fn pending(&self) -> usize {
        self.buffer.len() + self.logs.iter().map(|log| log.bytes.len()).sum::<usize>()
    }

    /// Whether there are records. Log bytes alone make no commit worth its sync: they count once a record says so.
    pub fn has_records(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// Begins the next incarnation, after `restarts` in a row.
    pub fn begin(&mut self, spec_hash: String, restarts: u32, now: Now) {
        self.begin_at(self.view.incarnation.saturating_add(1), spec_hash, restarts, now);
    }

    /// Begins that very incarnation: those before it were another collector's, and are told nowhere here.
    pub fn begin_at(&mut self, incarnation: u32, spec_hash: String, restarts: u32, now: Now) {
        self.log_ends.clear();
        self.append(incarnation, &HostRecord::Requested { spec_hash, restarts }, now);
    }

    /// Says which boot of the host writes from here on, where it is another than before.
    pub fn boot(&mut self, boot_id: &str, now: Now) {
        if self.view.host_boot.as_deref() != Some(boot_id) {
            self.host(HostRecord::HostBoot { boot_id: boot_id.to_owned() }, now);
        }
    }

    /// Adds what the host did or saw. Words of guests, sessions and Incus are quoted up to `MAX_TEXT_BYTES`.
    pub fn host(&mut self, mut record: HostRecord, now: Now) {
        clip_texts(&mut record);
        self.append(self.view.incarnation, &record, now);
    }

    /// Adds an event of the guest. `head` was read from `line`, and `digest` is the stream's with it.
    pub fn guest(&mut self, now: Now, head: &EventHead<'_>, line: &[u8], digest: Digest) {
        let Ok(text) = std::str::from_utf8(line) else {
            // Whoever read a head from it looked at all of it.
            return self.host(unreadable(line), now);
        };
        self.rotate();
        let stamp = self.stamp(self.view.incarnation, now);
        format::write_guest(stamp, &mut self.clocks, line, &mut self.buffer);
        self.view.next_n += 1;
        self.view.apply_guest(self.view.moment(now), head, text, digest);
    }

    /// Adds bytes to the end of one of the incarnation's log files. They count only once a [`HostRecord::Logs`] says so.
    pub fn log(&mut self, name: &str, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let end = self.log_ends.entry(name.to_owned()).or_default();
        let path = log_path(self.view.incarnation, name);
        match self.logs.iter_mut().find(|log| log.name == path) {
            Some(log) => log.bytes.extend_from_slice(bytes),
            None => self.logs.push(LogBytes { name: path, offset: *end, bytes: bytes.to_vec() }),
        }
        *end += bytes.len() as u64;
    }

    /// Says that a log file is shorter than the journal says, as [`Store::cut_logs`](super::Store::cut_logs) found it.
    pub fn log_found(&mut self, name: &str, length: u64) {
        self.log_ends.insert(name.to_owned(), length);
    }

    /// Everything that was added, to be made durable; `None` where there is nothing. `last` is for a verdict and what leads to
    /// it: it may use the room that is kept for it.
    pub fn take_commit(&mut self, last: bool) -> Option<Commit> {
        if self.buffer.is_empty() && self.logs.is_empty() {
            return None;
        }
        let records = std::mem::replace(&mut self.buffer, std::mem::take(&mut self.spare));
        self.filled += records.len() as u64;
        let first_n = std::mem::replace(&mut self.first_n, self.view.next_n);
        Some(Commit {
            records,
            logs: std::mem::take(&mut self.logs),
            segment: self.segment.take(),
            first_n,
            last,
            finishes: std::mem::take(&mut self.finishes),
        })
    }

    /// Takes the buffer of a commit that is done back, where there is more to write: ten thousand runtimes that wait keep no
    /// memory for what they once had to say.
    pub fn recycle(&mut self, commit: Commit) {
        if self.buffer.is_empty() {
            (self.buffer, self.spare) = (Vec::new(), Vec::new());
        } else {
            self.spare = commit.records;
            self.spare.clear();
        }
    }

    fn stamp(&self, inc: u32, now: Now) -> Stamp {
        Stamp { n: self.view.next_n, now, inc }
    }

    /// Writes a record, and takes it in as it reads: what is known now is what would be known after a crash.
    fn append(&mut self, inc: u32, record: &HostRecord, now: Now) {
        self.rotate();
        let (stamp, start) = (self.stamp(inc, now), self.buffer.len());
        format::write_host(stamp, record, &mut self.buffer);
        if self.read_back(start).is_none() {
            let record = unreadable(&self.buffer[start..]);
            self.buffer.truncate(start);
            format::write_host(stamp, &record, &mut self.buffer);
        }
        let Some(record) = self.read_back(start) else { return self.buffer.truncate(start) };
        self.finishes = match &record.body {
            format::Body::Host(HostRecord::Finished { restart_in_ms: None, .. }) => true,
            format::Body::Host(HostRecord::Requested { .. }) => false,
            _ => self.finishes,
        };
        self.view.apply(&record);
    }

    fn read_back(&self, start: usize) -> Option<Record> {
        let line = self.buffer[start..].strip_suffix(b"\n")?;
        if line.len() < MAX_RECORD_BYTES { format::read(line).ok() } else { None }
    }

    /// Where the present segment is full, what was handed out is what the next one begins with. It is read back too.
    fn rotate(&mut self) {
        if !self.buffer.is_empty() || self.filled < self.segment_bytes {
            return;
        }
        self.filled = 0;
        if let Some((snapshot, view)) = snapshot(&self.view) {
            self.view = view;
            self.segment = Some(NewSegment { snapshot, keep_bytes: self.event_bytes });
        }
    }
}

/// A view for a segment's first line, and as that reads. Invariant 5: a segment begins whatever the guest said, or the one
/// before it would grow without a bound. All that a view may hold fits; where it holds more, such as what an earlier release
/// took, it goes on without the guest's documents, which the segments before have.
fn snapshot(view: &View) -> Option<(Box<RawValue>, View)> {
    let read_back = |view: &View| {
        let snapshot = serde_json::value::to_raw_value(view).ok()?;
        let fits = snapshot.get().len() <= MAX_SNAPSHOT_BYTES;
        let view = serde_json::from_str(snapshot.get()).ok().filter(|_| fits)?;
        Some((snapshot, view))
    };
    read_back(view).or_else(|| read_back(&view.without_documents()))
}

/// Invariant 5: whatever a record quotes is bounded where it is written, and with that what a verdict takes on a full disk.
fn clip_texts(record: &mut HostRecord) {
    match record {
        HostRecord::State { message, .. } | HostRecord::StartRefused { message } => clip(message),
        HostRecord::BadLine { reason, sample } => [reason, sample].into_iter().for_each(clip),
        HostRecord::Ended { message, error, instance_status, .. } => {
            [Some(message), error.as_mut(), instance_status.as_mut()].into_iter().flatten().for_each(clip);
        }
        HostRecord::Console { tail } => clip_to(tail, MAX_CONSOLE_BYTES),
        HostRecord::Collected { collection } => collection.error.as_mut().into_iter().for_each(clip),
        _ => {}
    }
}

/// Cuts a text where it is longer than [`MAX_TEXT_BYTES`].
pub(crate) fn clip(text: &mut String) {
    clip_to(text, MAX_TEXT_BYTES);
}

/// Cuts a text that takes more bytes in JSON, escapes and all, and says so.
fn clip_to(text: &mut String, max_bytes: usize) {
    const CUT: &str = "…";
    let mut taken = 0;
    let mut fits = 0;
    for (at, c) in text.char_indices() {
        taken += match c {
            '"' | '\\' | '\n' | '\r' | '\t' | '\u{8}' | '\u{c}' => 2,
            '\0'..='\u{1f}' => 6,
            c => c.len_utf8(),
        };
        if taken + CUT.len() <= max_bytes {
            fits = at + c.len_utf8();
        }
        if taken > max_bytes {
            text.truncate(fits);
            text.push_str(CUT);
            return;
        }
    }
}

/// Where a log file is in the runtime's folder.
pub(super) fn log_path(incarnation: u32, name: &str) -> String {
    format!("{incarnation}/logs/{name}")
}

/// In the place of a document of the guest that no reader of journals would take, such as one that is nested too deep.
fn unreadable(line: &[u8]) -> HostRecord {
    let sample = String::from_utf8_lossy(&line[..line.len().min(BAD_LINE_SAMPLE_BYTES)]).into_owned();
    HostRecord::BadLine { reason: "it is nested too deep, or too long, for the journal".to_owned(), sample }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_incarnation_that_another_collector_counted_is_one_record() {
        let mut records = Records::new(View::default(), 1 << 20, 0);
        records.begin_at(2_000_000_000, "v1:aa".to_owned(), 0, Now::default());
        assert_eq!((records.view().incarnation, records.view().next_n), (2_000_000_000, 1));
        assert!(records.pending() < 1000);
    }

    #[test]
    fn a_segment_is_an_eighth_of_the_bound_within_limits() {
        let segment_bytes = |event_bytes| Records::new(View::default(), event_bytes, 0).segment_bytes;
        assert_eq!([0, 1 << 20, 1 << 40].map(segment_bytes), [64 << 10, 128 << 10, 16 << 20]);
    }

    #[test]
    fn room_is_not_given_back_where_the_next_incarnation_begins_at_once() {
        let mut records = Records::new(View::default(), 1 << 20, 0);
        let over = || HostRecord::Finished { destroyed: true, restart_in_ms: None };
        records.begin("v1:aa".to_owned(), 0, Now::default());
        records.host(over(), Now::default());
        assert!(records.take_commit(true).unwrap().finishes);
        records.host(over(), Now::default());
        records.begin("v1:aa".to_owned(), 0, Now::default());
        assert!(!records.take_commit(true).unwrap().finishes);
    }

    #[test]
    fn a_buffer_is_used_again_while_there_is_more_to_say_and_given_back_behind_it() {
        let mut records = Records::new(View::default(), 1 << 20, 0);
        let now = Now::default();
        records.begin("v1:aa".to_owned(), 0, now);
        let first = records.take_commit(false).unwrap();
        let used = first.records.as_ptr();
        records.host(HostRecord::InstanceStarting {}, now);
        records.recycle(first);
        let second = records.take_commit(false).unwrap();
        assert_eq!(records.buffer.as_ptr(), used);
        records.recycle(second);
        assert_eq!(records.buffer.capacity() + records.spare.capacity(), 0);
    }
}
