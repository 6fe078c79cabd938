//! The files of one runtime's journal, over any [`Fs`].
//!
//! ```text
//!            prepare              barrier           write            settle
//!   commit ─ log bytes, header ── sync them ── records, reserve ── sync ── durable, old segments go
//!                 │                   │               │              │
//!                 └─ of a log: ───────┤               └──── fails ───┴─► renew: header + the commit in the next segment
//!                    degraded         └─ of a header: renew                        └─ fails ─► degraded
//! ```
//!
//! The steps are apart, so that one sync can serve many stores. Nothing that failed is done again on the same file: the
//! kernel may have dropped what it could not write, and would call the next sync a success.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

use pika_cloud_common::limits::MAX_EVENT_BYTES;
use serde_json::value::RawValue;

use super::error::JournalError;
use super::format;
use super::fs::{Fs, segment_name};
use super::records::{Commit, MAX_CONSOLE_BYTES, MAX_TEXT_BYTES, log_path};
use super::recover::{Recovered, recover};
use super::view::View;

/// Room that is kept beyond a journal's end, so that a full disk loses no verdict: the longest guest's last word, or the end of
/// a console in its place, and the longest records from the end of an incarnation to the end of everything.
///
/// | record | quotes |
/// |---|---|
/// | the terminal event | itself; the console is quoted only where there is none |
/// | `status`, `result` | themselves, as far as they are short: a guest whose last documents are long may have no verdict before there is room |
/// | `ended` | a message, an error and Incus's word |
/// | `collected` | an error |
/// | `verdict` | the five of the above and the last event, file systems, and the console |
/// | `kept`, `state`, `finished`, `taken_over` | nothing; with what stands around all of these, `FRAMES` |
pub const RESERVE: u64 = (EVENT_OR_CONSOLE + DOCUMENTS + 10 * MAX_TEXT_BYTES + MAX_FULL_BYTES + FRAMES) as u64;

/// The longest event, or the longest console twice: in its record and in the verdict.
const EVENT_OR_CONSOLE: usize =
    if MAX_EVENT_BYTES > 2 * MAX_CONSOLE_BYTES { MAX_EVENT_BYTES } else { 2 * MAX_CONSOLE_BYTES };

/// A guest's last documents, both together.
const DOCUMENTS: usize = 16 * 1024;

/// A verdict names eight file systems of 256 bytes, which are twice that where all is escaped.
const MAX_FULL_BYTES: usize = 4 * 1024;

/// What stands around the quotes of some records: names, numbers, and ids of a spec.
const FRAMES: usize = 8 * 1024;

/// Room that is taken beyond it, so that not every commit has to ask.
pub(super) const SPARE_ROOM: u64 = 32 * 1024;

/// How far a journal is durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Durable {
    /// The newest segment; 0 before the first.
    pub segment: u64,
    /// Its length.
    pub length: u64,
}

/// The journal of one runtime, as files.
#[derive(Debug)]
pub struct Store<F> {
    fs: F,
    runtime_id: String,
    /// The oldest first, each with its length as far as it counts.
    segments: Vec<Segment>,
    /// Whether what was recovered may be of a collector that died between its write and its sync.
    needs_sync: bool,
    /// The newest segment has room up to here.
    reserved: u64,
    /// Log files that were looked at since this was opened.
    logs: BTreeSet<String>,
    /// The next segment's number: that of a file that was tried is not used again.
    next_number: u64,
    /// What the commit under way came to so far.
    progress: Progress,
    failed: Option<JournalError>,
}

/// What a commit came to so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Progress {
    /// It goes to the newest segment.
    #[default]
    Appends,
    /// It began a segment, whose header is written.
    Began,
    /// It went to a segment of its own, since it failed in the one before, and is durable there.
    Renewed,
}

/// A segment's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) number: u64,
    /// Bytes of its header; 0 where nobody asks any more.
    pub(super) header: u64,
    pub(super) length: u64,
}

impl<F: Fs> Store<F> {
    /// Reads what is there, and cuts what a crash left behind it. What is given may not be acted on or published before
    /// [`Store::settle`], or a commit, has made it durable.
    ///
    /// # Errors
    /// Where the file system refuses, or the journal is of another version or runtime, was edited, or is damaged where no
    /// crash damages it.
    pub fn open(mut fs: F, runtime_id: &str) -> Result<(Self, View), JournalError> {
        let Recovered { view, segments } = recover(&mut fs, runtime_id)?;
        let needs_sync = !segments.is_empty();
        let store = Self {
            fs,
            runtime_id: runtime_id.to_owned(),
            needs_sync,
            reserved: 0,
            logs: BTreeSet::new(),
            next_number: segments.last().map_or(1, |newest| newest.number + 1),
            segments,
            progress: Progress::default(),
            failed: None,
        };
        Ok((store, view))
    }

    /// How far it is written: durable, once [`Store::needs_sync`] is false.
    pub fn durable(&self) -> Durable {
        self.newest().map_or(Durable::default(), |newest| Durable { segment: newest.number, length: newest.length })
    }

    /// Bytes of records in the newest segment.
    pub fn filled(&self) -> u64 {
        self.newest().map_or(0, |newest| newest.length - newest.header)
    }

    /// Whether what was recovered is not known to be durable yet.
    pub fn needs_sync(&self) -> bool {
        self.needs_sync
    }

    /// The file system under it.
    pub fn fs(&self) -> &F {
        &self.fs
    }

    /// The same, to change it.
    pub fn fs_mut(&mut self) -> &mut F {
        &mut self.fs
    }

    /// Makes what was recovered durable.
    ///
    /// # Errors
    /// Where it cannot be synced: then nobody knows what of it will be there after a crash.
    pub fn settle(&mut self) -> Result<(), JournalError> {
        self.check()?;
        if self.needs_sync
            && let Some(newest) = self.newest()
        {
            let name = segment_name(newest.number);
            let synced = self.fs.sync(&name).and_then(|()| self.fs.sync_folder(&name));
            synced.map_err(|error| self.degrade(error))?;
        }
        self.needs_sync = false;
        Ok(())
    }

    /// Cuts the current incarnation's log files to what the journal says of them, and gives those that are shorter, as
    /// somebody made them, with their lengths.
    ///
    /// # Errors
    /// Where the file system refuses.
    pub fn cut_logs(&mut self, view: &View) -> Result<BTreeMap<String, u64>, JournalError> {
        let mut shorter = BTreeMap::new();
        for (name, length) in &view.log_lengths {
            let path = log_path(view.incarnation, name);
            let found = self.place_log(&path, *length).map_err(self.io(&path, "cutting a log"))?;
            if found < *length {
                shorter.insert(name.clone(), found);
            }
        }
        Ok(shorter)
    }

    /// Makes a commit durable: all the steps, one after the other.
    ///
    /// # Errors
    /// [`JournalError::Degraded`], from the first failure that no new segment mends on; nothing of the commit counts then.
    pub fn commit(&mut self, commit: &Commit) -> Result<Durable, JournalError> {
        if self.prepare(commit)? > 0 {
            self.barrier(commit)?;
        }
        if self.write(commit)? > 0 {
            self.sync(commit)?;
        }
        Ok(self.finish(commit))
    }

    /// Writes what has to be durable before the records are written: log bytes that they speak of, and the header of the
    /// segment that they begin. Gives in how many files.
    ///
    /// # Errors
    /// As [`Store::commit`].
    pub(super) fn prepare(&mut self, commit: &Commit) -> Result<usize, JournalError> {
        self.check()?;
        for log in &commit.logs {
            let done = self.place_log(&log.name, log.offset).and_then(|_| self.fs.append(&log.name, &log.bytes));
            done.map_err(|error| self.degrade(error))?;
        }
        let begins = commit.segment.is_some() || self.segments.is_empty();
        if begins && !commit.records.is_empty() {
            self.begin_segment(commit)?;
        }
        Ok(usize::from(self.progress == Progress::Began) + commit.logs.len())
    }

    /// Makes what was prepared durable.
    ///
    /// # Errors
    /// As [`Store::commit`].
    pub(super) fn barrier(&mut self, commit: &Commit) -> Result<(), JournalError> {
        for log in &commit.logs {
            self.fs.sync(&log.name).map_err(|error| self.degrade(error))?;
        }
        if self.progress == Progress::Began {
            let name = segment_name(self.durable().segment);
            if let Err(error) = self.fs.sync(&name).and_then(|()| self.fs.sync_folder(&name)) {
                self.renew(commit, &error)?;
            }
        }
        Ok(())
    }

    /// Writes the records. Gives how many files are still to be synced for that.
    ///
    /// # Errors
    /// As [`Store::commit`].
    pub(super) fn write(&mut self, commit: &Commit) -> Result<usize, JournalError> {
        self.check()?;
        if self.progress == Progress::Renewed {
            return Ok(0);
        }
        if commit.records.is_empty() {
            return Ok(usize::from(self.needs_sync));
        }
        let Durable { segment, length } = self.durable();
        let name = segment_name(segment);
        let written = self.keep_room(&name, length + commit.records.len() as u64, commit.last);
        if let Err(error) = &written
            && is_full(error)
        {
            return Err(self.degrade(io::Error::from(error.kind())));
        }
        if let Err(error) = written.and_then(|()| self.fs.append(&name, &commit.records)) {
            self.renew(commit, &error)?;
            return Ok(0);
        }
        Ok(1)
    }

    /// Makes the records durable.
    ///
    /// # Errors
    /// As [`Store::commit`].
    pub(super) fn sync(&mut self, commit: &Commit) -> Result<(), JournalError> {
        let name = segment_name(self.durable().segment);
        // Whoever began this segment may have died before its name was durable.
        let synced =
            self.fs.sync(&name).and_then(|()| if self.needs_sync { self.fs.sync_folder(&name) } else { Ok(()) });
        match synced {
            Ok(()) => Ok(()),
            Err(error) => self.renew(commit, &error),
        }
    }

    /// The commit is durable: it counts, and what it made superfluous goes.
    pub(super) fn finish(&mut self, commit: &Commit) -> Durable {
        let progress = std::mem::take(&mut self.progress);
        self.needs_sync = false;
        if let Some(newest) = self.segments.last_mut()
            && progress != Progress::Renewed
        {
            newest.length += commit.records.len() as u64;
        }
        if let Some(segment) = &commit.segment
            && progress != Progress::Appends
        {
            self.remove_oldest(segment.keep_bytes);
        }
        if commit.finishes {
            self.release_room();
        }
        self.durable()
    }

    /// Puts a log file's end where the next bytes belong, and gives the length that it had; what is missing stays so.
    fn place_log(&mut self, name: &str, offset: u64) -> io::Result<u64> {
        if !self.logs.insert(name.to_owned()) {
            return Ok(offset);
        }
        let found = self.fs.length(name)?.unwrap_or(0);
        if offset == 0 {
            // Nothing durable speaks of it: it is new, or of a collector that died while it made it.
            self.make_log(name)?;
        }
        if found > offset {
            self.fs.truncate(name, offset)?;
        }
        Ok(found)
    }

    /// Makes a log file, and its name and those of the folders in it durable.
    fn make_log(&mut self, name: &str) -> io::Result<()> {
        self.fs.append(name, b"")?;
        let mut made = Some(name);
        while let Some(name) = made {
            self.fs.sync_folder(name)?;
            made = name.rsplit_once('/').map(|(folder, _)| folder);
        }
        Ok(())
    }

    fn newest(&self) -> Option<Segment> {
        self.segments.last().copied()
    }

    /// Writes the header of the segment that a commit begins. Where the disk is full the present one goes on instead: a
    /// rotation can wait, a verdict cannot.
    fn begin_segment(&mut self, commit: &Commit) -> Result<(), JournalError> {
        let (number, header) = self.header(commit);
        match self.fs.append(&segment_name(number), &header) {
            Ok(()) => {
                let length = header.len() as u64;
                self.segments.push(Segment { number, header: length, length });
                self.reserved = 0;
                self.progress = Progress::Began;
                Ok(())
            }
            Err(error) if is_full(&error) && !self.segments.is_empty() => {
                // Where that fails too, a torn header stays, which recovery removes.
                if self.fs.remove(&segment_name(number)).is_ok() {
                    self.next_number = number;
                }
                Ok(())
            }
            Err(error) => {
                let _ = self.fs.remove(&segment_name(number));
                self.renew(commit, &error)
            }
        }
    }

    fn header(&mut self, commit: &Commit) -> (u64, Vec<u8>) {
        let number = self.next_number;
        self.next_number += 1;
        let snapshot: Option<&RawValue> = commit.segment.as_ref().map(|segment| &*segment.snapshot);
        (number, format::write_header(&self.runtime_id, number, commit.first_n, snapshot))
    }

    /// Room for what comes behind `end`. Invariant 2: a verdict finds it on a full disk.
    fn keep_room(&mut self, name: &str, end: u64, last: bool) -> io::Result<()> {
        if end + RESERVE <= self.reserved {
            return Ok(());
        }
        // More, so that not every commit has to ask; where that is not there, what is needed.
        let taken = [end + RESERVE + SPARE_ROOM, end + RESERVE]
            .into_iter()
            .map(|up_to| self.fs.reserve(name, up_to).map(|()| up_to));
        let mut full = None;
        for taken in taken {
            match taken {
                Ok(up_to) => {
                    self.reserved = up_to;
                    return Ok(());
                }
                Err(error) if is_full(&error) => full = Some(error),
                Err(error) => return Err(error),
            }
        }
        full.filter(|_| !last).map_or(Ok(()), Err)
    }

    fn release_room(&mut self) {
        if let Some(newest) = self.newest()
            && let Err(error) = self.fs.truncate(&segment_name(newest.number), newest.length)
        {
            tracing::warn!("{}: room could not be given back: {error}", self.name_of(newest).display());
        }
        self.reserved = 0;
    }

    /// Invariant 5: all segments together are bounded. The newest two stay whatever they are.
    fn remove_oldest(&mut self, keep_bytes: u64) {
        if let [.., before, _] = self.segments[..] {
            let _ = self.fs.truncate(&segment_name(before.number), before.length);
        }
        while self.segments.len() > 2 && self.segments.iter().map(|segment| segment.length).sum::<u64>() > keep_bytes {
            let oldest = self.segments.remove(0);
            if let Err(error) = self.fs.remove(&segment_name(oldest.number)) {
                tracing::warn!("{}: an old segment could not be removed: {error}", self.name_of(oldest).display());
            }
        }
    }

    /// Writes a commit that failed to a segment of its own, durably.
    fn renew(&mut self, commit: &Commit, cause: &io::Error) -> Result<(), JournalError> {
        tracing::warn!("{}: {cause}: the journal goes on in a new segment", self.path().display());
        if self.needs_sync {
            // What was recovered is not known to be on the disk, and cannot be made to be any more.
            return Err(self.degrade(io::Error::new(cause.kind(), cause.to_string())));
        }
        self.drop_begun();
        self.cut_back();
        let (number, mut bytes) = self.header(commit);
        let (name, header) = (segment_name(number), bytes.len() as u64);
        bytes.extend_from_slice(&commit.records);
        let length = bytes.len() as u64;
        self.reserved = 0;
        let written = self.fs.append(&name, &bytes).and_then(|()| self.keep_room(&name, length, commit.last));
        let durable = written.and_then(|()| self.fs.sync(&name)).and_then(|()| self.fs.sync_folder(&name));
        if let Err(error) = durable {
            // Whoever opens the journal next would find in the kernel's memory what the disk does not have.
            let _ = self.fs.remove(&name);
            return Err(self.degrade(error));
        }
        self.segments.push(Segment { number, header, length });
        self.progress = Progress::Renewed;
        Ok(())
    }

    /// Removes a segment that this commit began: the disk may lack its header, and would never be asked for it again.
    fn drop_begun(&mut self) {
        if self.progress == Progress::Began
            && let Some(begun) = self.segments.pop()
        {
            let _ = self.fs.remove(&segment_name(begun.number));
            self.progress = Progress::Appends;
        }
    }

    /// Cuts what failed off the newest segment, so that nobody reads from the kernel's memory what the disk does not have.
    fn cut_back(&mut self) {
        if let Some(newest) = self.newest() {
            let name = segment_name(newest.number);
            // A cut gives back the room that is kept for a verdict, so none is made where nothing was written.
            if self.fs.length(&name).is_ok_and(|length| length > Some(newest.length)) {
                // Where that fails too, the next segment's header says how far this one counts.
                let _ = self.fs.truncate(&name, newest.length);
            }
        }
    }

    /// Nothing more is taken from here on.
    fn degrade(&mut self, source: io::Error) -> JournalError {
        self.drop_begun();
        self.cut_back();
        let error = JournalError::Degraded { path: self.path(), source: Arc::new(source) };
        self.failed.insert(error).clone()
    }

    fn check(&self) -> Result<(), JournalError> {
        self.failed.clone().map_or(Ok(()), Err)
    }

    fn path(&self) -> std::path::PathBuf {
        self.fs.path(&segment_name(self.newest().map_or(1, |newest| newest.number)))
    }

    fn name_of(&self, segment: Segment) -> std::path::PathBuf {
        self.fs.path(&segment_name(segment.number))
    }

    fn io(&self, name: &str, doing: &'static str) -> impl FnOnce(io::Error) -> JournalError + use<F> {
        JournalError::io(&self.fs.path(name), doing)
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
