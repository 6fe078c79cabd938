//! Following a journal as it grows: in this process as soon as a record is durable, from another one a little later.
//!
//! Whoever writes it in this process says how far it is durable. A follower in another one reads what may only be in the
//! kernel's memory: it makes that durable itself, through a descriptor that it had before it looked how much is there, and
//! gives out nothing of what it could not (Invariant 1). [`read_view`] asks for no such thing.

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::error::JournalError;
use super::format::{Body, HostRecord, MAX_RECORD_BYTES, Record};
use super::fs::{DiskFs, Fs as _, segment_name, segment_numbers};
use super::recover::{Head, read_head, read_record};
use super::store::Durable;
use super::view::View;

/// How often the journal of another process is looked at: at first, and where nothing came for long.
const MIN_POLL: Duration = Duration::from_millis(50);
const MAX_POLL: Duration = Duration::from_secs(1);

/// Bytes of one read.
const READ_BYTES: usize = 256 * 1024;

/// Gives a journal's records in their order, each once. It holds no descriptor while it waits.
#[derive(Debug)]
pub struct Follower {
    fs: DiskFs,
    at: Option<Position>,
    /// The number of the next record to be given.
    next_n: u64,
    /// What was known before the next record, where that is not what the last one said.
    base: Option<Box<View>>,
    unread: Vec<u8>,
    ready: VecDeque<(Record, String)>,
    /// What stands behind the records that are ready.
    failed: Option<JournalError>,
    /// Whether the last record that was given is one behind which nothing is expected.
    over: bool,
    durable: Option<watch::Receiver<Durable>>,
    /// Whether what nobody says to be durable is made so before it is given.
    syncs: bool,
    /// Since when nothing came.
    quiet_since: Option<Instant>,
}

/// Where it reads.
#[derive(Clone, Copy, Debug)]
struct Position {
    segment: u64,
    /// What is not in `unread` yet begins here.
    offset: u64,
    /// Counts from 1.
    line_number: u64,
    /// The number of the record in that line.
    n: u64,
    /// How far the segment is durable, as far as this follower made sure.
    synced: u64,
    /// Whether a later segment was there before the last look at this one: then nothing is added to it any more.
    is_left: bool,
}

impl Follower {
    /// From the journal's first record that is still there. `durable` comes from the [`Writer`](super::Writer) of this
    /// process that writes it; without it, what is there is made durable before it is given.
    pub fn new(folder: &Path, durable: Option<watch::Receiver<Durable>>) -> Self {
        Self {
            fs: DiskFs::new(folder),
            at: None,
            next_n: 0,
            base: None,
            unread: Vec::new(),
            ready: VecDeque::new(),
            failed: None,
            over: false,
            durable,
            syncs: true,
            quiet_since: None,
        }
    }

    /// The same for what may be read as it stands: it was made durable before, or nothing is done on its word.
    pub(crate) fn unsynced(folder: &Path) -> Self {
        Self { syncs: false, ..Self::new(folder, None) }
    }

    /// The next record and its line as it stands in the journal; waits for it. `None` where everything was given out and
    /// nothing more is to come: the writer of this process is gone, or the last record says that the runtime is over, or
    /// another owner's. What comes of a later incarnation is for a new follower.
    ///
    /// # Errors
    /// Where the journal cannot be read.
    pub async fn next(&mut self) -> Result<Option<(Record, String)>, JournalError> {
        loop {
            // Asked before reading: what is written behind this look wakes the wait below.
            let writer_gone = self.durable.as_mut().is_some_and(|durable| {
                durable.borrow_and_update();
                durable.has_changed().is_err()
            });
            if let Some(next) = self.try_next()? {
                return Ok(Some(next));
            }
            if self.over || writer_gone {
                return Ok(None);
            }
            let quiet = self.quiet_since.get_or_insert_with(Instant::now).elapsed();
            match &mut self.durable {
                Some(durable) => {
                    let _ = durable.changed().await;
                }
                None => tokio::time::sleep((quiet / 10).clamp(MIN_POLL, MAX_POLL)).await,
            }
        }
    }

    /// The next record that is there already.
    ///
    /// # Errors
    /// Where the journal cannot be read, is of another version, or was edited.
    pub fn try_next(&mut self) -> Result<Option<(Record, String)>, JournalError> {
        while self.ready.is_empty() && self.failed.is_none() {
            match self.read() {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => self.failed = Some(error),
            }
        }
        match (self.ready.pop_front(), &self.failed) {
            (Some(next), _) => {
                self.over = is_final(&next.0);
                self.quiet_since = None;
                Ok(Some(next))
            }
            (None, Some(error)) => Err(error.clone()),
            (None, None) => {
                // One that waits holds little.
                self.unread.shrink_to_fit();
                self.ready = VecDeque::new();
                Ok(None)
            }
        }
    }

    /// What was known before the record that [`Follower::next`] gave last, or before the first that it is going to give,
    /// where that is not what the records before it said: old segments are removed as a journal grows. Whoever folds
    /// records into a view begins anew with it.
    pub fn take_base(&mut self) -> Option<View> {
        self.base.take().map(|view| *view)
    }

    #[cfg(test)]
    pub(super) fn fs(&mut self) -> &mut DiskFs {
        &mut self.fs
    }

    #[cfg(test)]
    pub(super) fn quiet_for(&self) -> Option<Duration> {
        self.quiet_since.map(|since| since.elapsed())
    }

    /// Reads a piece, and says whether there may be more.
    fn read(&mut self) -> Result<bool, JournalError> {
        let Some(at) = self.at else { return self.enter_after(0) };
        let name = segment_name(at.segment);
        let durable = self.durable.as_ref().map(|durable| *durable.borrow());
        let limit = match durable {
            Some(durable) if durable.segment == at.segment => durable.length,
            None if self.syncs => match self.sync_up_to(at) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => at.offset,
                synced => synced.map_err(JournalError::io(&self.fs.path(&name), "making the journal durable"))?,
            },
            _ => u64::MAX,
        };
        let Some(at) = self.at else { return Ok(false) };
        let known = self.unread.len();
        let want = usize::try_from(limit.saturating_sub(at.offset)).unwrap_or(usize::MAX).min(READ_BYTES);
        self.unread.resize(known + want, 0);
        let read = match self.fs.read_at(&name, at.offset, &mut self.unread[known..]) {
            // It was removed, since the journal is beyond its bound: it goes on with what is left.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.unread.clear();
                return self.enter_after(at.segment);
            }
            read => read.map_err(JournalError::io(&self.fs.path(&name), "reading the journal"))?,
        };
        self.unread.truncate(known + read);
        let at = Position { offset: at.offset + read as u64, ..at };
        self.at = Some(at);
        if self.cut_lines(at) && read > 0 {
            return Ok(true);
        }
        if !self.ready.is_empty() || self.failed.is_some() {
            return Ok(true);
        }
        self.leave(durable)
    }

    /// Up to where the segment is durable; asks the disk where all of that was read.
    fn sync_up_to(&mut self, at: Position) -> io::Result<u64> {
        if at.offset < at.synced {
            return Ok(at.synced);
        }
        let synced = self.fs.sync_for_reader(&segment_name(at.segment), at.offset)?;
        self.at = Some(Position { synced, ..at });
        Ok(synced)
    }

    /// Nothing more is in this segment now: whether it goes on in a later one.
    pub(super) fn leave(&mut self, durable: Option<Durable>) -> Result<bool, JournalError> {
        let Some(at) = &mut self.at else { return Ok(false) };
        let segment = at.segment;
        let has_later = if let Some(durable) = durable {
            durable.segment > segment
        } else {
            let length = self.fs.length(&segment_name(segment + 1));
            length.map_err(JournalError::io(&self.fs.path(""), "reading the folder"))?.is_some()
        };
        if !has_later {
            return Ok(false);
        }
        // What was written here before the later one was made may have come after the last look.
        if !std::mem::replace(&mut at.is_left, true) {
            return Ok(true);
        }
        self.enter_after(segment)
    }

    /// Goes on in the first segment behind `segment` that can be read from here. `false` where there is none yet.
    fn enter_after(&mut self, segment: u64) -> Result<bool, JournalError> {
        let names = self.fs.list().map_err(JournalError::io(&self.fs.path(""), "reading the folder"))?;
        let last = self.durable.as_ref().map_or(u64::MAX, |durable| durable.borrow().segment);
        let mut gap = None;
        for number in segment_numbers(&names).into_iter().filter(|number| (segment + 1..=last).contains(number)) {
            let (header, offset) = match read_head(&self.fs, number)? {
                Head::Whole(header, offset) => (header, offset),
                // It is being made, or a crash left it, and then a later one is there.
                Head::Torn => continue,
            };
            if header.next_n > self.next_n {
                // What lies between was removed; what it said is in the snapshot.
                let Some(snapshot) = header.snapshot else {
                    gap = Some(number);
                    continue;
                };
                self.base = Some(snapshot);
                self.next_n = header.next_n;
            }
            self.enter(number, offset, header.next_n)?;
            return Ok(true);
        }
        match gap {
            Some(number) => Err(JournalError::Damaged { path: self.fs.path(&segment_name(number)) }),
            None => Ok(false),
        }
    }

    /// Goes on in a segment whose records begin at `offset`, with the name and the header that a follower of another process
    /// makes durable as well.
    fn enter(&mut self, segment: u64, offset: u64, n: u64) -> Result<(), JournalError> {
        let mut synced = 0;
        if self.syncs && self.durable.is_none() {
            let name = segment_name(segment);
            let made = self.fs.sync_for_reader(&name, 0).and_then(|length| {
                self.fs.sync_folder(&name)?;
                Ok(length)
            });
            synced = match made {
                // It was removed meanwhile; the read behind this one finds what is left.
                Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
                made => made.map_err(JournalError::io(&self.fs.path(&name), "making the journal durable"))?,
            };
        }
        self.unread = Vec::new();
        self.at = Some(Position { segment, offset, line_number: 2, n, synced, is_left: false });
        Ok(())
    }

    /// Begins in the newest segment that says all that was before it, where there is one.
    fn enter_newest(&mut self) -> Result<(), JournalError> {
        let names = self.fs.list().map_err(JournalError::io(&self.fs.path(""), "reading the folder"))?;
        for number in segment_numbers(&names).into_iter().rev() {
            let Head::Whole(header, offset) = read_head(&self.fs, number)? else { continue };
            if let Some(snapshot) = header.snapshot {
                self.base = Some(snapshot);
                self.next_n = header.next_n;
                return self.enter(number, offset, header.next_n);
            }
        }
        Ok(())
    }

    /// Whole lines become records. What is not intact yet is being written, or will be cut: it is read again from its
    /// start, and that is told by `false`.
    fn cut_lines(&mut self, mut at: Position) -> bool {
        let mut start = 0;
        let mut goes_on = true;
        while let Some(end) = memchr::memchr(b'\n', &self.unread[start..]).map(|end| start + end) {
            let line = &self.unread[start..end];
            match read_record((&self.fs, at.segment, at.line_number), at.n, line) {
                // A commit that failed in one segment stands in the next as well.
                Ok(Some(record)) if record.n == self.next_n => {
                    self.next_n += 1;
                    self.ready.push_back((record, String::from_utf8_lossy(line).into_owned()));
                }
                Ok(Some(_)) => {}
                Ok(None) => {
                    goes_on = false;
                    break;
                }
                Err(error) => {
                    self.failed = Some(error);
                    return false;
                }
            }
            start = end + 1;
            (at.n, at.line_number) = (at.n + 1, at.line_number + 1);
        }
        // Zeros behind a crash have no end that could be waited for.
        let left = &self.unread[start..];
        if !goes_on || left.len() > MAX_RECORD_BYTES || left.starts_with(b"\0") {
            at.offset -= left.len() as u64;
            // What comes in its place is durable by itself only.
            at.synced = at.offset;
            self.unread.clear();
            goes_on = false;
        } else {
            self.unread.drain(..start);
        }
        self.at = Some(at);
        goes_on
    }
}

/// Whether nothing is expected behind a record.
fn is_final(record: &Record) -> bool {
    matches!(record.body, Body::Host(HostRecord::Finished { restart_in_ms: None, .. } | HostRecord::TakenOver { .. }))
}

/// What a journal says now, read without touching it: it may be another process that writes it. The newest snapshot says all
/// that was before it.
///
/// It may say what is not durable yet, and what a crash takes back: nothing that cannot be undone is done on its word alone.
///
/// # Errors
/// Where it cannot be read, is of another version, or was edited.
pub fn read_view(folder: &Path) -> Result<View, JournalError> {
    let mut follower = Follower::unsynced(folder);
    follower.enter_newest()?;
    let mut view = View::default();
    loop {
        let next = follower.try_next()?;
        if let Some(base) = follower.take_base() {
            view = base;
        }
        let Some((record, _)) = next else { return Ok(view) };
        view.apply(&record);
    }
}
