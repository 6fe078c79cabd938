//! The host's end of a session: a plain state machine over bytes, without I/O and without a clock of its own.
//!
//! ```text
//!   bytes from the guest ─► space/filled ─► receive() ─► Received: what is new, checked against the cursor
//!   bytes to the guest   ◄─ write(HostMessage)         │
//!   Duration since start ─► tick(now) ─► ping, or SessionFault::Silent
//! ```
//!
//! The happy path: the host says hello with its cursor, the guest answers, events come with rising `seq` and are given out
//! once each. What can go wrong, and what becomes of it: an event that is known from an earlier session is skipped; one
//! that leaves out numbers is given out with their count; a line that is no event, or whose `seq` does not rise, is a
//! [`Received::BadLine`] and the session goes on; bytes that are not of the protocol, or announce more than it allows, are
//! a [`SessionFault`] and end the session, since nothing behind them can be trusted. The host dials again and goes on from
//! its cursor.

use std::collections::BTreeMap;
use std::time::Duration;

use pika_cloud_common::EventHead;
use pika_cloud_common::digest::Digest;
use pika_cloud_common::limits::{
    BAD_LINE_SAMPLE_BYTES, HEARTBEAT_INTERVAL, MAX_ARCHIVE_DEPTH, MAX_ARCHIVE_PATH_BYTES, MAX_CHUNK_BYTES,
    MAX_LOG_FILES, PEER_TIMEOUT,
};
use pika_cloud_common::wire::{
    Cursor, Decoder, EndReason, Entry, ErrorCode, Frame, FrameError, GuestHello, GuestMessage, HostHello, HostMessage,
    LogChunk, MessageError, Notice, PROTOCOL, Role, SessionError, event_line,
};
use pika_cloud_common::{RunResult, SCHEMA_VERSION, Status};

use crate::words::one_line;

/// Characters of an agent's version that are shown.
const MAX_AGENT_CHARS: usize = 64;

/// Bytes that one read asks for: more after a read that took all of it, few after one that took a small part.
const MIN_READ_BYTES: usize = 512;
const MAX_READ_BYTES: usize = 256 * 1024;

/// What the guest said that is new to the host.
#[derive(Debug)]
pub enum Received<'a> {
    /// Nothing that the host does not know already.
    Nothing,
    /// The session is open.
    Opened(Opened),
    /// The next event, as its line stands in the guest's file.
    Event {
        /// What of it was read.
        head: EventHead<'a>,
        /// How many numbers it leaves out.
        missing: u64,
        /// The line, one JSON object without a newline.
        line: &'a [u8],
        /// The stream's digest with it.
        digest: Digest,
    },
    /// What the guest sent as an event is none.
    BadLine {
        /// Why.
        reason: String,
        /// Its beginning.
        sample: String,
    },
    /// The next bytes of a log file.
    Log {
        /// Its name, one plain path component.
        file: &'a str,
        /// Where in the file they stand.
        offset: u64,
        /// The bytes, never empty.
        bytes: &'a [u8],
    },
    /// A log file more than are taken: its bytes are dropped.
    LogLeftOut,
    /// A file or folder of the archive begins, or a file goes on.
    Entry(Entry),
    /// The bytes of the entry's chunk, in order.
    EntryBytes(&'a [u8]),
    /// The guest's `status.json`.
    Status(Status),
    /// The guest's `result.json`.
    Result(RunResult),
    /// The guest says something that changes no state.
    Notice(Notice),
    /// The guest refused something.
    Refused(SessionError),
    /// The guest ends the session as it should.
    End(EndReason),
}

/// How a session opened.
#[derive(Clone, Debug)]
pub struct Opened {
    /// What the guest said.
    pub hello: GuestHello,
    /// Whether the journal is to say where the stream begins for us: it is another than the cursor's, or the first, or
    /// events behind the cursor were trimmed from it.
    pub new_stream: bool,
}

/// The session cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum SessionFault {
    /// The stream is not of this protocol.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A line that is no message.
    #[error("the guest sent what is {0}")]
    Message(MessageError),
    /// The agent speaks another version of the session protocol.
    #[error("the guest's agent {agent} speaks session protocol {found}, this host speaks {PROTOCOL}")]
    Protocol {
        /// The agent's version.
        agent: String,
        /// The protocol that it speaks.
        found: u32,
    },
    /// The agent writes documents of another version.
    #[error("the guest's agent {agent} writes documents of schema_version {found}, this host reads {SCHEMA_VERSION}")]
    Schema {
        /// The agent's version.
        agent: String,
        /// The version that it writes.
        found: u32,
    },
    /// The agent refused the session.
    #[error("the guest's agent refused the session: {}", .0.message)]
    Refused(SessionError),
    /// A message where it has no place, or with numbers that cannot be.
    #[error("the guest broke the session protocol: {0}")]
    Broken(&'static str),
    /// Nothing was heard for too long.
    #[error("the session brought nothing for {} s", PEER_TIMEOUT.as_secs())]
    Silent,
}

impl SessionFault {
    /// Whether another session with the same agent cannot go better.
    pub fn is_final(&self) -> bool {
        match self {
            Self::Protocol { .. } | Self::Schema { .. } => true,
            Self::Refused(error) => matches!(error.code, ErrorCode::UnsupportedProtocol | ErrorCode::StaleTerm),
            Self::Frame(_) | Self::Message(_) | Self::Broken(_) | Self::Silent => false,
        }
    }
}

/// The host's end of one session.
#[derive(Debug)]
pub struct Session {
    decoder: Decoder,
    /// Bytes that the next read asks for.
    read_bytes: usize,
    cursor: Option<Cursor>,
    /// The last `seq` that came in this session, known before or not.
    last_seq: u64,
    open: bool,
    bulk: Bulk,
    /// Raw bytes that the last line announced.
    announced: u64,
    heard_at: Duration,
    pinged_at: Duration,
    opened_at: Duration,
}

/// Whose raw bytes come next.
#[derive(Debug)]
enum Bulk {
    /// A log's, from this offset.
    Log { file: String, offset: u64 },
    /// The archive's.
    Entry,
    /// Nobody's: read and dropped.
    Dropped,
}

impl Session {
    /// Opens an owner's session that follows, and gives the host's hello. `cursor` is what the host has durably; `machine` is
    /// the digest of the machine's uuid, where another one may answer.
    pub fn open(term: u64, cursor: Option<Cursor>, machine: Option<Digest>, now: Duration) -> (Self, HostMessage) {
        let (role, follow) = (Role::Owner, true);
        let hello = HostHello { protocol: PROTOCOL, role, term, machine, after: cursor.clone(), follow };
        let session = Self {
            decoder: Decoder::new(),
            read_bytes: MIN_READ_BYTES,
            cursor,
            last_seq: 0,
            open: false,
            bulk: Bulk::Dropped,
            announced: 0,
            heard_at: now,
            pinged_at: now,
            opened_at: now,
        };
        (session, HostMessage::Hello(hello))
    }

    /// Whether the guest has said hello.
    pub fn is_open(&self) -> bool {
        self.open
    }

    /// How far the host has received the stream, durably or not.
    pub fn cursor(&self) -> Option<&Cursor> {
        self.cursor.as_ref()
    }

    /// When the guest was last heard.
    pub fn heard_at(&self) -> Duration {
        self.heard_at
    }

    /// Whether it has been open for so long that whatever ends it says nothing against the agent.
    pub fn has_held(&self, now: Duration) -> bool {
        self.open && now.saturating_sub(self.opened_at) >= PEER_TIMEOUT
    }

    /// Where to read into; followed by [`Session::filled`].
    pub fn space(&mut self) -> &mut [u8] {
        self.decoder.space(self.read_bytes)
    }

    /// `n` bytes were read.
    pub fn filled(&mut self, n: usize, now: Duration) {
        self.decoder.filled(n);
        if n >= self.read_bytes {
            self.read_bytes = (self.read_bytes * 4).min(MAX_READ_BYTES);
        } else if n < self.read_bytes / 16 {
            self.read_bytes = (n * 2).max(MIN_READ_BYTES);
        }
        self.heard_at = now;
    }

    /// Nothing was read up to now, by the host's own choice: that is no silence of the guest's.
    pub fn excuse_silence(&mut self, now: Duration) {
        self.heard_at = self.heard_at.max(now);
    }

    /// When [`Session::tick`] wants to be called again.
    pub fn next_tick(&self) -> Duration {
        (self.pinged_at + HEARTBEAT_INTERVAL).min(self.heard_at + PEER_TIMEOUT)
    }

    /// What is due: a ping to send.
    ///
    /// # Errors
    /// [`SessionFault::Silent`] where the guest was not heard for [`PEER_TIMEOUT`].
    pub fn tick(&mut self, now: Duration) -> Result<Option<HostMessage>, SessionFault> {
        if now >= self.heard_at + PEER_TIMEOUT {
            return Err(SessionFault::Silent);
        }
        if now < self.pinged_at + HEARTBEAT_INTERVAL {
            return Ok(None);
        }
        self.pinged_at = now;
        Ok(Some(HostMessage::Ping(pika_cloud_common::wire::Empty {})))
    }

    /// The next thing that the guest said; `None` until more bytes are filled in.
    ///
    /// # Errors
    /// Where the session cannot go on.
    pub fn receive(&mut self) -> Result<Option<Received<'_>>, SessionFault> {
        let announced = std::mem::take(&mut self.announced);
        if announced > 0 {
            self.decoder.expect_bulk(announced);
        }
        let line = match self.decoder.next_frame()? {
            None => return Ok(None),
            Some(Frame::Bulk(bytes)) => return Ok(Some(bulk(&mut self.bulk, self.cursor.as_mut(), bytes))),
            Some(Frame::Line(line)) => line,
        };
        if !self.open {
            let opened = hello(&mut self.cursor, line)?;
            self.open = true;
            return Ok(Some(Received::Opened(opened)));
        }
        let Some(cursor) = self.cursor.as_mut() else { return Err(SessionFault::Broken("no stream")) };
        if let Some(line) = event_line(line) {
            return Ok(Some(event(cursor, &mut self.last_seq, line)));
        }
        let message = match GuestMessage::decode(line) {
            Ok(message) => message,
            Err(MessageError::Unknown { .. }) => return Ok(Some(Received::Nothing)),
            Err(error) => return Err(SessionFault::Message(error)),
        };
        let received = match message {
            GuestMessage::Hello(_) => return Err(SessionFault::Broken("a second hello")),
            // In another form than `event_line` reads; our agents do not write it, and it is not worth a second path.
            GuestMessage::Event(_) => return Err(SessionFault::Broken("an event in a form of its own")),
            GuestMessage::Log(chunk) => {
                self.announced = chunk.len;
                let (received, owner) = log(cursor, chunk)?;
                self.bulk = owner;
                received
            }
            GuestMessage::Entry(entry) => {
                check_entry(&entry)?;
                self.announced = entry.len;
                self.bulk = Bulk::Entry;
                Received::Entry(entry)
            }
            GuestMessage::Status(status) => match status.check_version() {
                Ok(()) => Received::Status(status),
                Err(error) => bad_line(error.to_string(), line),
            },
            GuestMessage::Result(result) => match result.check_version() {
                Ok(()) => Received::Result(result),
                Err(error) => bad_line(error.to_string(), line),
            },
            GuestMessage::Heartbeat(_) => Received::Nothing,
            GuestMessage::Notice(notice) => Received::Notice(notice),
            GuestMessage::Error(error) => Received::Refused(error),
            GuestMessage::End(reason) => Received::End(reason),
        };
        Ok(Some(received))
    }
}

/// A log's header: whose its bytes are. Where they are known already they are dropped, and where some are left out that is
/// told.
fn log(cursor: &mut Cursor, chunk: LogChunk) -> Result<(Received<'static>, Bulk), SessionFault> {
    let LogChunk { file, offset, len } = chunk;
    if len > MAX_CHUNK_BYTES as u64 {
        return Err(SessionFault::Broken("a log chunk beyond the limit"));
    }
    if !is_plain_name(&file) {
        return Err(SessionFault::Broken("a log file's name is no plain name"));
    }
    let Some(end) = offset.checked_add(len) else {
        return Err(SessionFault::Broken("a log offset beyond all numbers"));
    };
    let known = cursor.logs.get(&file).copied();
    if known.is_none() && cursor.logs.len() >= MAX_LOG_FILES {
        return Ok((Received::LogLeftOut, Bulk::Dropped));
    }
    let next = known.unwrap_or(0);
    if offset < next {
        // What overlaps was sent before the guest knew how far we are.
        return if end <= next {
            Ok((Received::Nothing, Bulk::Dropped))
        } else {
            Err(SessionFault::Broken("log chunks overlap"))
        };
    }
    cursor.logs.insert(file.clone(), offset);
    let received = if offset > next {
        Received::Notice(Notice::LogGap { file: file.clone(), from: next, to: offset })
    } else {
        Received::Nothing
    };
    Ok((received, Bulk::Log { file, offset }))
}

/// Raw bytes, given to whom they were announced for.
fn bulk<'a>(bulk: &'a mut Bulk, cursor: Option<&mut Cursor>, bytes: &'a [u8]) -> Received<'a> {
    match bulk {
        Bulk::Log { file, offset } => {
            let at = *offset;
            *offset += bytes.len() as u64;
            if let Some(next) = cursor.and_then(|cursor| cursor.logs.get_mut(file)) {
                *next = *offset;
            }
            Received::Log { file, offset: at, bytes }
        }
        Bulk::Entry => Received::EntryBytes(bytes),
        Bulk::Dropped => Received::Nothing,
    }
}

/// The first line of a session: the guest's hello, or its refusal.
fn hello(cursor: &mut Option<Cursor>, line: &[u8]) -> Result<Opened, SessionFault> {
    let mut hello = match GuestMessage::decode(line) {
        Ok(GuestMessage::Hello(hello)) => hello,
        Ok(GuestMessage::Error(error)) => return Err(SessionFault::Refused(error)),
        Ok(_) => return Err(SessionFault::Broken("no hello at first")),
        Err(error) => return Err(SessionFault::Message(error)),
    };
    hello.agent = one_line(&hello.agent).chars().take(MAX_AGENT_CHARS).collect();
    if hello.protocol != PROTOCOL {
        return Err(SessionFault::Protocol { agent: hello.agent, found: hello.protocol });
    }
    if hello.schema_version != SCHEMA_VERSION {
        return Err(SessionFault::Schema { agent: hello.agent, found: hello.schema_version });
    }
    if hello.stream_id.is_empty() || hello.stream_id.len() > 128 || hello.boot_id.len() > 128 {
        return Err(SessionFault::Broken("a stream_id or boot_id of impossible length"));
    }
    let another = cursor.as_ref().is_none_or(|cursor| cursor.stream_id != hello.stream_id);
    if another {
        *cursor = Some(Cursor {
            stream_id: hello.stream_id.clone(),
            seq: 0,
            digest: Digest::EMPTY_STREAM,
            logs: BTreeMap::new(),
        });
    }
    let trimmed = skip_trimmed(cursor.as_mut(), &hello);
    Ok(Opened { hello, new_stream: another || trimmed })
}

/// Whether what lies between the cursor and the guest's first event was trimmed; the digest goes on from the guest's own.
fn skip_trimmed(cursor: Option<&mut Cursor>, hello: &GuestHello) -> bool {
    if let (Some(cursor), Some(digest)) = (cursor, hello.first_digest)
        && hello.first_seq.saturating_sub(1) > cursor.seq
    {
        (cursor.seq, cursor.digest) = (hello.first_seq - 1, digest);
        return true;
    }
    false
}

/// An event: checked, and given out where it is new.
fn event<'a>(cursor: &mut Cursor, last_seq: &mut u64, line: &'a [u8]) -> Received<'a> {
    let head = match EventHead::decode(line) {
        Ok(head) => head,
        Err(error) => return bad_line(error.to_string(), line),
    };
    if head.seq <= *last_seq {
        return bad_line(format!("seq {} comes after {last_seq}", head.seq), line);
    }
    *last_seq = head.seq;
    if head.seq <= cursor.seq {
        return Received::Nothing;
    }
    let missing = head.seq - cursor.seq - 1;
    cursor.digest = cursor.digest.chain(line);
    cursor.seq = head.seq;
    Received::Event { head, missing, line, digest: cursor.digest }
}

fn bad_line(reason: String, line: &[u8]) -> Received<'static> {
    let sample = String::from_utf8_lossy(&line[..line.len().min(BAD_LINE_SAMPLE_BYTES)]).into_owned();
    Received::BadLine { reason, sample }
}

/// An entry's numbers and path, before a single byte of it is taken.
fn check_entry(entry: &Entry) -> Result<(), SessionFault> {
    let plain = entry.path.len() <= MAX_ARCHIVE_PATH_BYTES && entry.path.split('/').all(is_plain_name);
    if !plain {
        return Err(SessionFault::Broken("an archive path that is not plain"));
    }
    if entry.path.split('/').count() > MAX_ARCHIVE_DEPTH {
        return Err(SessionFault::Broken("an archive path that is too deep"));
    }
    if entry.len > MAX_CHUNK_BYTES as u64 || entry.offset.checked_add(entry.len).is_none() {
        return Err(SessionFault::Broken("an archive chunk beyond the limit"));
    }
    if entry.folder && entry.len > 0 {
        return Err(SessionFault::Broken("a folder with bytes"));
    }
    Ok(())
}

/// One component of a path that can be made on the host as it is.
fn is_plain_name(name: &str) -> bool {
    (1..=255).contains(&name.len())
        && name != "."
        && name != ".."
        && !name.contains('/')
        && !name.chars().any(char::is_control)
}

#[cfg(test)]
mod tests;
