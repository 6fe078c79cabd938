//! Reading a journal: up to the last record that holds, and no wrong one.

use std::io;

use super::error::JournalError;
use super::format::{self, Header, MAX_RECORD_BYTES, NoRecord, Record, VERSION};
use super::fs::{Fs, segment_name, segment_numbers};
use super::store::{RESERVE, Segment};
use super::view::View;

/// What a crash before the first sync can leave is the first header or a part of it, and that is smaller.
const MAX_FIRST_WRITE: u64 = 4096;

/// Bytes of one read.
const READ_BYTES: usize = 256 * 1024;

/// What is there.
pub(super) struct Recovered {
    pub(super) view: View,
    /// The oldest first, as far as they count.
    pub(super) segments: Vec<Segment>,
}

/// A segment's first line.
pub(super) enum Head {
    /// It is whole; with its length.
    Whole(Header, u64),
    /// It is not: a crash came while it was made, or somebody is making it.
    Torn,
}

/// Reads lines of a file, each with where it begins.
struct Lines<'a, F> {
    fs: &'a F,
    name: &'a str,
    /// Where `bytes` begin.
    offset: u64,
    bytes: Vec<u8>,
    /// What of them was given out.
    used: usize,
}

impl<'a, F: Fs> Lines<'a, F> {
    fn from(fs: &'a F, name: &'a str, offset: u64) -> Self {
        Self { fs, name, offset, bytes: Vec::new(), used: 0 }
    }

    /// Where the next line begins.
    fn at(&self) -> u64 {
        self.offset + self.used as u64
    }

    /// The next line without its newline; `None` where no whole one is left, or none that could be a record.
    fn next(&mut self) -> io::Result<Option<&[u8]>> {
        let mut searched = 0;
        loop {
            if let Some(found) = memchr::memchr(b'\n', &self.bytes[self.used + searched..]) {
                let start = self.used;
                self.used += searched + found + 1;
                return Ok(Some(&self.bytes[start..self.used - 1]));
            }
            searched = self.bytes.len() - self.used;
            if searched > MAX_RECORD_BYTES || !self.more()? {
                return Ok(None);
            }
        }
    }

    /// Passes a piece that holds no line. Gives whether anything stands behind it.
    fn skip(&mut self) -> io::Result<bool> {
        self.used = self.bytes.len();
        self.more()
    }

    fn more(&mut self) -> io::Result<bool> {
        self.bytes.drain(..self.used);
        self.offset += self.used as u64;
        self.used = 0;
        let known = self.bytes.len();
        let start = self.offset + known as u64;
        let left = self.fs.length(self.name)?.unwrap_or(0).saturating_sub(start);
        if left == 0 {
            return Ok(false);
        }
        let want = usize::try_from(left).unwrap_or(READ_BYTES).min(READ_BYTES);
        self.bytes.resize(known + want, 0);
        let read = self.fs.read_at(self.name, start, &mut self.bytes[known..])?;
        self.bytes.truncate(known + read);
        Ok(read > 0)
    }
}

/// Reads a segment's first line.
pub(super) fn read_head<F: Fs>(fs: &F, number: u64) -> Result<Head, JournalError> {
    let name = segment_name(number);
    let mut lines = Lines::from(fs, &name, 0);
    let fail = |error| JournalError::io(&fs.path(&name), "reading the journal")(error);
    let Some(line) = lines.next().map_err(fail)? else { return Ok(Head::Torn) };
    if let Some(found) = format::version_of(line).filter(|found| *found != VERSION) {
        return Err(JournalError::Version { path: fs.path(&name), found });
    }
    match format::read_header(line) {
        Ok(header) if header.segment == number => Ok(Head::Whole(header, lines.at())),
        Err(NoRecord::Damaged) => Ok(Head::Torn),
        Ok(_) | Err(NoRecord::Foreign) => Err(JournalError::Foreign { path: fs.path(&name), line: 1 }),
    }
}

/// Reads the next record of a segment; `None` where its checksum does not fit. `line_number` counts from 1.
pub(super) fn read_record<F: Fs>(
    (fs, number, line_number): (&F, u64, u64),
    next_n: u64,
    line: &[u8],
) -> Result<Option<Record>, JournalError> {
    match format::read(line) {
        Ok(record) if record.n == next_n => Ok(Some(record)),
        Err(NoRecord::Damaged) => Ok(None),
        Ok(_) | Err(NoRecord::Foreign) => {
            Err(JournalError::Foreign { path: fs.path(&segment_name(number)), line: line_number })
        }
    }
}

/// A segment of the chain that is read.
struct Link {
    number: u64,
    header: Header,
    /// Where its records begin.
    start: u64,
}

/// Reads what is there and cuts what a crash left.
pub(super) fn recover<F: Fs>(fs: &mut F, runtime_id: &str) -> Result<Recovered, JournalError> {
    let names = fs.list().map_err(|error| JournalError::io(&fs.path(""), "reading the folder")(error))?;
    let numbers = segment_numbers(&names);
    let (chain, torn) = chain(fs, runtime_id, &numbers)?;
    let Some((first, _)) = chain.split_first() else {
        begin_anew(fs, &numbers)?;
        return Ok(Recovered { view: View::default(), segments: Vec::new() });
    };
    let base = first.number;
    let (view, kept, end) = fold(fs, &chain)?;
    // Invariant 1: what stands behind a gap is never taken for what comes after it, and never thrown away.
    for link in &chain[kept..] {
        set_aside(fs, link.number, 0)?;
    }
    for number in torn {
        set_aside(fs, number, 0)?;
    }
    let Link { number: newest, start: header, .. } = chain[kept - 1];
    set_aside(fs, newest, end)?;
    let mut segments = Vec::new();
    for number in numbers.into_iter().filter(|number| *number < base) {
        segments.push(Segment { number, header: 0, length: length(fs, number)? });
    }
    for link in &chain[..kept - 1] {
        segments.push(Segment { number: link.number, header: link.start, length: length(fs, link.number)? });
    }
    segments.push(Segment { number: newest, header, length: end });
    Ok(Recovered { view, segments })
}

/// The segments from the newest on that has all before it in its snapshot, and those in between whose header is torn.
fn chain<F: Fs>(fs: &F, runtime_id: &str, numbers: &[u64]) -> Result<(Vec<Link>, Vec<u64>), JournalError> {
    let (mut chain, mut torn) = (Vec::new(), Vec::new());
    for number in numbers.iter().rev().copied() {
        let Head::Whole(header, start) = read_head(fs, number)? else {
            torn.push(number);
            continue;
        };
        if header.runtime_id != runtime_id {
            return Err(JournalError::OtherRuntime {
                path: fs.path(&segment_name(number)),
                found: header.runtime_id,
                wanted: runtime_id.to_owned(),
            });
        }
        let is_base = header.snapshot.is_some() || header.next_n == 0;
        chain.push(Link { number, header, start });
        if is_base {
            chain.reverse();
            return Ok((chain, torn));
        }
    }
    match chain.last() {
        // It goes on where something went on that is not there.
        Some(link) => Err(JournalError::Damaged { path: fs.path(&segment_name(link.number)) }),
        None => Ok((chain, torn)),
    }
}

/// Folds a chain up to its first gap: what it says, how many segments of it hold, and where the last of those ends.
fn fold<F: Fs>(fs: &F, chain: &[Link]) -> Result<(View, usize, u64), JournalError> {
    let mut view = View::default();
    let mut end = 0;
    for (index, link) in chain.iter().enumerate() {
        if let Some(snapshot) = &link.header.snapshot {
            view.clone_from(snapshot);
            view.next_n = link.header.next_n;
        }
        if view.next_n != link.header.next_n {
            return Ok((view, index, end));
        }
        let until = chain.get(index + 1).map_or(u64::MAX, |next| next.header.next_n);
        end = fold_segment(fs, link, until, &mut view)?;
    }
    Ok((view, chain.len(), end))
}

/// Takes a segment's records in, and says where what holds of it ends.
fn fold_segment<F: Fs>(fs: &F, from: &Link, until: u64, view: &mut View) -> Result<u64, JournalError> {
    let name = segment_name(from.number);
    let mut lines = Lines::from(fs, &name, from.start);
    let (mut end, mut line_number) = (from.start, 2);
    while view.next_n < until {
        let line = lines.next().map_err(|error| JournalError::io(&fs.path(&name), "reading the journal")(error))?;
        let Some(line) = line else { break };
        let Some(record) = read_record((fs, from.number, line_number), view.next_n, line)? else { break };
        view.apply(&record);
        (end, line_number) = (lines.at(), line_number + 1);
    }
    Ok(end)
}

/// Nothing holds. A crash before the first sync leaves that, and then Incus was asked for nothing.
fn begin_anew<F: Fs>(fs: &mut F, numbers: &[u64]) -> Result<(), JournalError> {
    for number in numbers.iter().copied() {
        let name = segment_name(number);
        let has_more = length(fs, number)? > MAX_FIRST_WRITE || has_intact(fs, number, 0)?;
        if has_more {
            return Err(JournalError::Damaged { path: fs.path(&name) });
        }
        fs.remove(&name).map_err(|error| JournalError::io(&fs.path(&name), "removing a torn journal")(error))?;
    }
    Ok(())
}

/// Cuts a segment where what holds of it ends. Lines that are intact and stand behind are of damage, not of a crash alone:
/// they go to a file beside it.
fn set_aside<F: Fs>(fs: &mut F, number: u64, end: u64) -> Result<(), JournalError> {
    let name = segment_name(number);
    let length = length(fs, number)?;
    if length <= end && end > 0 {
        return Ok(());
    }
    if has_intact(fs, number, end)? {
        let aside = format!("journal.{number}.damaged-at-{end}");
        tracing::warn!(
            "{}: damaged at byte {end}: the {} bytes from there on are kept as {aside}, and count no more",
            fs.path(&name).display(),
            length - end,
        );
        copy(fs, &name, &aside, end)
            .map_err(|error| JournalError::io(&fs.path(&aside), "keeping what is damaged")(error))?;
    }
    let cut = if end == 0 {
        fs.remove(&name)
    } else {
        // A cut gives back the room that is kept for a verdict: it is taken again, as far as it is still there.
        fs.truncate(&name, end).map(|()| drop(fs.reserve(&name, end + RESERVE)))
    };
    cut.map_err(|error| JournalError::io(&fs.path(&name), "cutting a torn end off the journal")(error))
}

/// Copies a file from an offset on, durably.
fn copy<F: Fs>(fs: &mut F, from: &str, to: &str, mut offset: u64) -> io::Result<()> {
    if fs.length(to)?.is_some() {
        // A crash came while it was made, and the original is still there.
        fs.remove(to)?;
    }
    let mut piece = vec![0; READ_BYTES];
    loop {
        let read = fs.read_at(from, offset, &mut piece)?;
        if read == 0 {
            fs.sync(to)?;
            return fs.sync_folder(to);
        }
        fs.append(to, &piece[..read])?;
        offset += read as u64;
    }
}

/// Whether a line behind `from` is whole and of a journal.
fn has_intact<F: Fs>(fs: &F, number: u64, from: u64) -> Result<bool, JournalError> {
    let name = segment_name(number);
    let mut lines = Lines::from(fs, &name, from);
    let fail = |error| JournalError::io(&fs.path(&name), "reading the journal")(error);
    loop {
        match lines.next().map_err(fail)?.map(format::is_intact) {
            Some(true) => return Ok(true),
            Some(false) => {}
            None if lines.skip().map_err(fail)? => {}
            None => return Ok(false),
        }
    }
}

fn length<F: Fs>(fs: &F, number: u64) -> Result<u64, JournalError> {
    let name = segment_name(number);
    let length = fs.length(&name).map_err(|error| JournalError::io(&fs.path(&name), "reading the journal")(error))?;
    Ok(length.unwrap_or(0))
}
