//! Finds out where a stream stands, from `events.jsonl` alone.
//!
//! ```text
//!   fast   hint == seq of the last whole line       that line repeats the state, nothing else is read
//!   slow   hint missing or other, odd last line,    every line is judged by the reader's rule
//!          or one that says that nothing follows
//! ```

use std::ops::ControlFlow;

use pika_cloud_common::digest::Digest;
use pika_cloud_common::limits::MAX_EVENT_BYTES;
use pika_cloud_common::{Event, State};
use rustix::fd::AsFd;
use rustix::io;

use super::folder::read_at;
use super::lines::{BLOCK_BYTES, Line, LineCursor, judge};

/// Where a stream stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Last {
    /// The last event; the base's where there is none.
    pub seq: u64,
    /// The current state; `starting` before any.
    pub state: State,
    /// The event that made it, where it was read. It was not where the last line is progress and the hint is right:
    /// whoever wrote that line had looked after the documents before.
    pub state_event: Option<Event>,
}

impl Last {
    /// Whether the terminal event is there.
    pub fn is_terminal(&self) -> bool {
        self.state.is_terminal()
    }

    fn of(event: Event) -> Self {
        let (seq, state) = (event.seq, event.kind.clone());
        Self { seq, state, state_event: event.changes_state().then_some(event) }
    }
}

/// The length of the file up to and with its last newline.
pub fn end_of_whole_lines(fd: impl AsFd, len: u64) -> io::Result<u64> {
    let mut size = 4096;
    let mut end = len;
    let mut block = Vec::new();
    while end > 0 {
        let start = end.saturating_sub(size);
        // At most `size`, which fits.
        block.resize(usize::try_from(end - start).unwrap_or(0), 0);
        let read = read_at(&fd, &mut block, start)?;
        if let Some(at) = memchr::memrchr(b'\n', &block[..read]) {
            return Ok(start + at as u64 + 1);
        }
        end = start;
        size = BLOCK_BYTES as u64;
    }
    Ok(0)
}

/// Where the stream stands whose file holds whole lines up to `len`, `hint` being the number that the last writer left.
pub fn find_last(fd: impl AsFd, len: u64, base_seq: u64, hint: Option<u64>, no_result: bool) -> io::Result<Last> {
    if len == 0 {
        return Ok(Last { seq: base_seq, state: State::Starting, state_event: None });
    }
    if let Some(event) = last_line(&fd, len)? {
        let sound = Some(event.seq) == hint && event.seq > base_seq && event.kind.is_guest_emitted();
        // That nothing may follow is not taken from one line: a repeated `seq` is none that a reader counts.
        if sound && no_result && !event.kind.is_terminal() {
            return Ok(Last::of(event));
        }
    }
    find_by_scan(fd, len, base_seq)
}

/// The last line, where it is an event.
fn last_line(fd: impl AsFd, len: u64) -> io::Result<Option<Event>> {
    let mut block = Vec::new();
    for size in [4096, MAX_EVENT_BYTES as u64 + 2] {
        let start = len.saturating_sub(size);
        block.resize(usize::try_from(len - start).unwrap_or(0), 0);
        let read = read_at(&fd, &mut block, start)?;
        let Some(lines) = block[..read].strip_suffix(b"\n") else { return Ok(None) };
        match memchr::memrchr(b'\n', lines) {
            Some(at) => return Ok(Event::decode(&lines[at + 1..]).ok()),
            None if start == 0 => return Ok(Event::decode(lines).ok()),
            None => {}
        }
    }
    Ok(None)
}

/// Reads everything. The first terminal event stands, whatever comes behind it.
fn find_by_scan(fd: impl AsFd, len: u64, base_seq: u64) -> io::Result<Last> {
    let mut last = Last { seq: base_seq, state: State::Starting, state_event: None };
    for_each_event(fd, len, base_seq, |_, seq, line| {
        last.seq = seq;
        if !last.is_terminal()
            && let Ok(event) = Event::decode(line)
            && event.changes_state()
        {
            last.state = event.kind.clone();
            last.state_event = Some(event);
        }
        ControlFlow::Continue(())
    })?;
    Ok(last)
}

/// Calls `each` with offset behind the line, `seq` and line of every event that counts, up to `len`.
pub fn for_each_event(
    fd: impl AsFd,
    len: u64,
    base_seq: u64,
    mut each: impl FnMut(u64, u64, &[u8]) -> ControlFlow<()>,
) -> io::Result<()> {
    let mut cursor = LineCursor::new();
    let mut block = vec![0; usize::try_from(len).unwrap_or(BLOCK_BYTES).min(BLOCK_BYTES)];
    let mut last_seq = base_seq;
    let mut flow = ControlFlow::Continue(());
    while cursor.offset < len && flow.is_continue() {
        let want = usize::try_from(len - cursor.offset).unwrap_or(usize::MAX).min(block.len());
        let read = read_at(&fd, &mut block[..want], cursor.offset)?;
        let before = cursor.offset;
        cursor.cut(&block[..read], |offset, line| {
            if let Line::Whole(line) = line
                && flow.is_continue()
                && let Ok(head) = judge(line, base_seq, last_seq)
            {
                last_seq = head.seq;
                flow = each(offset + line.len() as u64 + 1, head.seq, line);
            }
        });
        if cursor.offset == before {
            break;
        }
    }
    Ok(())
}

/// A stream's digest at one of its events, and where that event's line ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The last event at or below the one asked for.
    pub seq: u64,
    /// The digest there.
    pub digest: Digest,
    /// The byte behind its line.
    pub end: u64,
}

/// The last event at or below `seq`, found by chaining all lines from `base` on.
pub fn mark_at(fd: impl AsFd, len: u64, base_seq: u64, base_digest: Digest, seq: u64) -> io::Result<Mark> {
    let mut mark = Mark { seq: base_seq, digest: base_digest, end: 0 };
    if seq <= base_seq {
        return Ok(mark);
    }
    for_each_event(fd, len, base_seq, |end, at, line| {
        if at > seq {
            return ControlFlow::Break(());
        }
        mark = Mark { seq: at, digest: mark.digest.chain(line), end };
        if at == seq { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    Ok(mark)
}
