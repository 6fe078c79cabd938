//! The guest's files, in memory: what `guest_agent::ledger` keeps, without a disk under it.
//!
//! ```text
//!   Files ─ current: Stream ─ lines (events with their digests, and what is none), log, documents, acknowledgement
//!         ├ previous: streams that were moved aside, the newest last
//!         └ owner: the session that acknowledges, and the highest term that was here
//! ```

use std::rc::Rc;
use std::time::Duration;

use pika_cloud_common::State;
use pika_cloud_common::digest::Digest;

use crate::sim::random::Random;

/// How many earlier streams are kept.
const KEPT_STREAMS: usize = 2;

/// A line of `events.jsonl`.
#[derive(Clone, Debug)]
pub enum Line {
    /// An event.
    Event(Event),
    /// Something else.
    Bad(Rc<str>),
}

/// An event that was given a number.
#[derive(Clone, Debug)]
pub struct Event {
    /// The number.
    pub seq: u64,
    /// The line without its newline.
    pub text: Rc<str>,
    /// The stream's digest with it.
    pub digest: Digest,
}

/// A file below `artifacts/`.
#[derive(Clone, Debug)]
pub struct Artifact {
    /// Below `artifacts/`.
    pub path: String,
    /// Its bytes.
    pub size: usize,
}

/// One stream with everything that belongs to it.
#[derive(Clone, Debug)]
pub struct Stream {
    /// Its `stream_id`.
    pub id: String,
    /// The boot in which it began.
    pub boot_id: String,
    /// What its log's bytes are made from.
    pub key: u64,
    /// The last event that was trimmed, and the digest with it.
    pub base: (u64, Digest),
    /// How many lines were trimmed.
    pub trimmed: usize,
    /// What is left.
    pub lines: Vec<Line>,
    /// The last number that was given.
    pub last_seq: u64,
    /// The last state that was entered.
    pub state: Option<State>,
    /// Changes of `status.json`.
    pub status_version: u64,
    /// The terminal event: its state, and the exit code.
    pub terminal: Option<(State, Option<i32>)>,
    /// The request that was accepted.
    pub request_id: Option<String>,
    /// Its supervisor has begun.
    pub supervised: bool,
    /// Bytes of `guest.log`.
    pub log: u64,
    /// Below this its bytes were given back.
    pub hole: u64,
    /// What the owner has.
    pub acked_seq: u64,
    /// How much of the log it has.
    pub acked_log: u64,
    /// The guest may go.
    pub released: bool,
    /// What is below `artifacts/`.
    pub artifacts: Vec<Artifact>,
}

/// The session that is the owner's.
#[derive(Clone, Debug, Default)]
pub struct Owner {
    /// The highest term that was here.
    pub term: u64,
    /// Which session.
    pub session: u64,
    /// Of which stream.
    pub stream_id: String,
}

/// All files of one guest.
#[derive(Clone, Debug, Default)]
pub struct Files {
    /// The stream that is written.
    pub current: Option<Stream>,
    /// Earlier ones.
    pub previous: Vec<Stream>,
    /// Who owns it.
    pub owner: Owner,
}

/// The byte at `offset` of what was made from `key`.
pub fn byte_of(key: u64, offset: u64) -> u8 {
    let mixed = (key ^ (offset >> 3)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> ((offset & 7) * 8)).to_le_bytes()[0]
}

impl Files {
    /// The stream that is written in this boot: begun where there is none, and where it is of another boot.
    pub fn stream(&mut self, boot_id: &str, random: &mut Random) -> &mut Stream {
        if self.current.as_ref().is_none_or(|stream| stream.boot_id != boot_id) {
            self.begin(boot_id, random);
        }
        self.current.as_mut().expect("it was just begun")
    }

    /// Moves the stream aside and begins the next.
    pub fn begin(&mut self, boot_id: &str, random: &mut Random) {
        if let Some(over) = self.current.take() {
            self.previous.push(over);
            let too_many = self.previous.len().saturating_sub(KEPT_STREAMS);
            self.previous.drain(..too_many);
        }
        self.current = Some(Stream::new(boot_id, random));
    }

    /// A stream that is still there, and whether it is an earlier one.
    pub fn find(&mut self, id: &str) -> Option<(&mut Stream, bool)> {
        if self.current.as_ref().is_some_and(|stream| stream.id == id) {
            return self.current.as_mut().map(|stream| (stream, false));
        }
        self.previous.iter_mut().find(|stream| stream.id == id).map(|stream| (stream, true))
    }
}

/// What an event says beside its number.
#[derive(Clone, Debug)]
pub struct Words<'a> {
    /// Its kind.
    pub kind: State,
    /// For a person.
    pub message: &'a str,
    /// JSON, or nothing.
    pub details: &'a str,
}

impl Stream {
    fn new(boot_id: &str, random: &mut Random) -> Self {
        let key = random.number();
        Self {
            id: format!("{key:016x}{:016x}", random.number()),
            boot_id: boot_id.to_owned(),
            key,
            base: (0, Digest::EMPTY_STREAM),
            trimmed: 0,
            lines: Vec::new(),
            last_seq: 0,
            state: None,
            status_version: 0,
            terminal: None,
            request_id: None,
            supervised: false,
            log: 0,
            hole: 0,
            acked_seq: 0,
            acked_log: 0,
            released: false,
            artifacts: Vec::new(),
        }
    }

    /// The digest at the end of what was written.
    pub fn digest(&self) -> Digest {
        self.digest_at(self.last_seq).unwrap_or(self.base.1)
    }

    /// The digest at `seq`, where it is not trimmed and was given.
    pub fn digest_at(&self, seq: u64) -> Option<Digest> {
        if seq == self.base.0 {
            return Some(self.base.1);
        }
        self.events().rev().find(|event| event.seq == seq).map(|event| event.digest)
    }

    fn events(&self) -> impl DoubleEndedIterator<Item = &Event> {
        self.lines.iter().filter_map(|line| match line {
            Line::Event(event) => Some(event),
            Line::Bad(_) => None,
        })
    }

    /// Gives the next event its number; `None` where the stream has said its last word.
    pub fn append(&mut self, words: &Words<'_>, now: Duration) -> Option<&Event> {
        if self.terminal.is_some() {
            return None;
        }
        let (seq, digest) = (self.last_seq + 1, self.digest());
        let text = self.text(seq, words, now);
        let event = Event { seq, digest: digest.chain(text.as_bytes()), text: text.into() };
        self.last_seq = seq;
        let repeats = words.details.contains("\"progress\"") || words.details.contains("\"notice\"");
        if words.kind.is_terminal() || !repeats {
            self.state = Some(words.kind.clone());
            self.status_version += 1;
        }
        if words.kind.is_terminal() {
            self.terminal = Some((words.kind.clone(), exit_code(words.details)));
        }
        self.lines.push(Line::Event(event));
        match self.lines.last() {
            Some(Line::Event(event)) => Some(event),
            _ => None,
        }
    }

    fn text(&self, seq: u64, words: &Words<'_>, now: Duration) -> String {
        let Words { kind, message, details } = words;
        let at = time_stamp(now);
        let boot_id = &self.boot_id;
        let details = if details.is_empty() { String::new() } else { format!(",\"details\":{details}") };
        format!(
            "{{\"schema_version\":1,\"seq\":{seq},\"timestamp\":\"{at}\",\"kind\":\"{kind}\",\"message\":\"{message}\",\
             \"boot_id\":\"{boot_id}\"{details}}}"
        )
    }

    /// The line at a place that counts from the stream's beginning.
    pub fn line(&self, at: usize) -> Option<&Line> {
        self.lines.get(at.checked_sub(self.trimmed)?)
    }

    /// Where the first line behind `seq` stands.
    pub fn place_behind(&self, seq: u64) -> usize {
        let behind = self.lines.iter().rposition(|line| matches!(line, Line::Event(event) if event.seq <= seq));
        self.trimmed + behind.map_or(0, |at| at + 1)
    }

    /// Gives back what the owner has.
    pub fn trim(&mut self) {
        let cut = self.place_behind(self.acked_seq) - self.trimmed;
        if let Some(digest) = self.digest_at(self.acked_seq) {
            self.base = (self.acked_seq, digest);
            self.lines.drain(..cut);
            self.trimmed += cut;
        }
        self.hole = self.acked_log;
    }
}

/// Of details that this model wrote.
fn exit_code(details: &str) -> Option<i32> {
    let rest = details.split("\"exit_code\":").nth(1)?;
    rest.split([',', '}']).next()?.parse().ok()
}

/// A time of the guest: it counts from the beginning of 2026, whatever the host believes.
pub fn time_stamp(now: Duration) -> String {
    let secs = now.as_secs();
    let (hour, minute, second) = (secs / 3600 % 24, secs / 60 % 60, secs % 60);
    format!("2026-01-{:02}T{hour:02}:{minute:02}:{second:02}.{:06}Z", 1 + secs / 86_400 % 28, now.subsec_micros())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn say(stream: &mut Stream, kind: State, details: &str) -> Option<u64> {
        stream.append(&Words { kind, message: "m", details }, Duration::from_secs(61)).map(|event| event.seq)
    }

    #[test]
    fn what_is_written_are_events_of_the_contract() {
        let mut files = Files::default();
        let stream = files.stream("boot", &mut Random::new(1));
        assert_eq!(say(stream, State::Starting, ""), Some(1));
        assert_eq!(say(stream, State::Starting, r#"{"progress":{"name":"half","fraction":0.5}}"#), Some(2));
        assert_eq!(say(stream, State::Failed, r#"{"exit_code":5}"#), Some(3));
        assert_eq!(say(stream, State::Ready, ""), None);
        assert_eq!((stream.status_version, stream.terminal.clone()), (2, Some((State::Failed, Some(5)))));
        let mut digest = Digest::EMPTY_STREAM;
        for event in stream.events() {
            let read = pika_cloud_common::Event::decode(event.text.as_bytes()).unwrap();
            assert_eq!(read.seq, event.seq);
            digest = digest.chain(event.text.as_bytes());
            assert_eq!(digest, event.digest);
        }
    }

    #[test]
    fn trimming_keeps_numbers_places_and_digests() {
        let mut files = Files::default();
        let stream = files.stream("boot", &mut Random::new(1));
        for _ in 0..3 {
            say(stream, State::Ready, "");
            stream.lines.push(Line::Bad("no event".into()));
        }
        let second = stream.digest_at(2);
        stream.acked_seq = 2;
        stream.trim();
        assert_eq!((stream.base.0, Some(stream.base.1), stream.trimmed), (2, second, 3));
        assert_eq!(stream.place_behind(2), 3);
        assert!(matches!(stream.line(4), Some(Line::Event(event)) if event.seq == 3));
        assert_eq!(say(stream, State::Ready, ""), Some(4));
    }

    #[test]
    fn another_boot_begins_another_stream() {
        let (mut files, mut random) = (Files::default(), Random::new(1));
        let first = files.stream("one", &mut random).id.clone();
        let second = files.stream("two", &mut random).id.clone();
        assert_eq!(files.find(&first).map(|(_, previous)| previous), Some(true));
        assert_eq!(files.find(&second).map(|(_, previous)| previous), Some(false));
    }
}
