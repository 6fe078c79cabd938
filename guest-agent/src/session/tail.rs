//! Reads `events.jsonl` as it grows, across trimming and across the start of a new stream.
//!
//! ```text
//!   read ── a block ── lines ── events (seq above the last one) and bad lines
//!    └ nothing new ── is the name still this file? ── no ── Replaced: the caller says whether it is the same stream
//! ```

use pika_cloud_common::limits::BAD_LINE_SAMPLE_BYTES;
use pika_cloud_common::paths;
use rustix::fd::OwnedFd;
use rustix::fs::{self, AtFlags, OFlags};

use crate::ledger::lines::{BLOCK_BYTES, Line, LineCursor, Unfit, judge};
use crate::ledger::{Folder, LedgerError};

/// One line of the file.
#[derive(Debug)]
pub enum Piece<'a> {
    /// An event that counts, with its `seq` and whether its kind ends the stream.
    Event {
        /// Its number.
        seq: u64,
        /// Whether it is a terminal one.
        terminal: bool,
        /// The line, without its newline.
        line: &'a [u8],
    },
    /// A line that is left out.
    Bad {
        /// Where in the file it begins.
        offset: u64,
        /// Its length.
        bytes: u64,
        /// Why.
        reason: String,
        /// Its beginning.
        sample: &'a [u8],
    },
}

/// What a read came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tailed {
    /// There may be more at once.
    More,
    /// Nothing more for now.
    AtEnd,
    /// Nothing more, and another file has the name by now.
    Replaced,
}

/// Reads `events.jsonl` as it grows.
#[derive(Debug)]
pub struct EventTail {
    file: Option<OpenFile>,
    cursor: LineCursor,
    /// Lines up to here are left out without a word.
    base_seq: u64,
    last_seq: u64,
    block: Vec<u8>,
}

#[derive(Debug)]
struct OpenFile {
    fd: OwnedFd,
    dev: u64,
    ino: u64,
}

impl EventTail {
    /// Gives out the events behind `after`.
    pub fn new(after: u64) -> Self {
        Self { file: None, cursor: LineCursor::new(), base_seq: after, last_seq: after, block: Vec::new() }
    }

    /// The last event that was given out.
    pub fn last_seq(&self) -> u64 {
        self.last_seq
    }

    /// Where in the file the lines that were read end.
    pub fn offset(&self) -> u64 {
        self.cursor.offset
    }

    /// Goes on in the file that has the name now: the same stream, trimmed.
    pub fn reopen(&mut self) {
        (self.file, self.cursor, self.base_seq) = (None, LineCursor::new(), self.last_seq);
    }

    /// Begins anew in the file that has the name now: another stream.
    pub fn begin(&mut self, after: u64) {
        (self.last_seq, self.base_seq) = (after, after);
        self.reopen();
    }

    /// Reads one block and gives out its lines.
    pub fn read(&mut self, folder: &Folder, mut each: impl FnMut(Piece<'_>)) -> Result<Tailed, LedgerError> {
        if self.file.is_none() {
            let Some((fd, stat)) = folder.open_file(paths::EVENTS, OFlags::RDONLY)? else { return Ok(Tailed::AtEnd) };
            self.file = Some(OpenFile { fd, dev: stat.st_dev, ino: stat.st_ino });
        }
        let Some(file) = &self.file else { return Ok(Tailed::AtEnd) };
        self.block.resize(BLOCK_BYTES, 0);
        let reading = LedgerError::io("read", folder.path_of(paths::EVENTS));
        let read = match rustix::io::pread(&file.fd, &mut self.block[..], self.cursor.offset) {
            Err(rustix::io::Errno::INTR) => return Ok(Tailed::More),
            other => other.map_err(reading)?,
        };
        let before = self.cursor.offset;
        let (base_seq, last_seq) = (self.base_seq, &mut self.last_seq);
        self.cursor.cut(&self.block[..read], |offset, line| match line {
            Line::Whole(line) => give(base_seq, last_seq, offset, line, &mut each),
            Line::TooLong { bytes, sample } => {
                let reason = "longer than an event may be".to_owned();
                each(Piece::Bad { offset, bytes, reason, sample });
            }
        });
        if read == BLOCK_BYTES || self.cursor.offset > before {
            return Ok(if read == BLOCK_BYTES { Tailed::More } else { Tailed::AtEnd });
        }
        self.look_again(folder)
    }

    /// Nothing new was there: has the file been cut, or another taken its place?
    fn look_again(&mut self, folder: &Folder) -> Result<Tailed, LedgerError> {
        let Some(file) = &self.file else { return Ok(Tailed::AtEnd) };
        let own = fs::fstat(&file.fd).map_err(LedgerError::io("look at", folder.path_of(paths::EVENTS)))?;
        if u64::try_from(own.st_size).unwrap_or(0) < self.cursor.offset {
            // Cut below what was read: whoever did that broke the contract. What counts is found by its seq.
            (self.cursor, self.base_seq) = (LineCursor::new(), self.last_seq);
            return Ok(Tailed::More);
        }
        match fs::statat(folder, paths::EVENTS, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(now) if (now.st_dev, now.st_ino) == (file.dev, file.ino) => Ok(Tailed::AtEnd),
            Ok(_) => Ok(Tailed::Replaced),
            Err(rustix::io::Errno::NOENT) => Ok(Tailed::AtEnd),
            Err(errno) => Err(LedgerError::io("look at", folder.path_of(paths::EVENTS))(errno)),
        }
    }
}

fn give(base_seq: u64, last_seq: &mut u64, offset: u64, line: &[u8], each: &mut impl FnMut(Piece<'_>)) {
    match judge(line, base_seq, *last_seq) {
        Ok(head) => {
            *last_seq = head.seq;
            let terminal = matches!(&*head.kind, "completed" | "failed");
            each(Piece::Event { seq: head.seq, terminal, line });
        }
        Err(Unfit::Trimmed) => {}
        Err(Unfit::NoEvent(reason)) => {
            let sample = &line[..line.len().min(BAD_LINE_SAMPLE_BYTES)];
            each(Piece::Bad { offset, bytes: line.len() as u64, reason, sample });
        }
    }
}
