//! The contract's files: who may write them when, and what a reader finds after a crash.
//!
//! ```text
//!   flock events.jsonl.seq ─┐
//!                           │ 1 events.jsonl.stream   a new stream's id, synced, before its first event
//!                           │ 2 events.jsonl          the batch, one append
//!     one writer at a time  │ 3 events.jsonl.seq      the last seq, as older helpers keep it
//!                           │ 4 result.json           after the terminal event only
//!                           │ 5 status.json           after a state event only
//!   unlocked ───────────────┘
//! ```
//!
//! The terminal event is the commit point. Killed
//!
//! - before 2: nothing happened.
//! - within 2: whole lines count, the torn last one is cut by the next writer; the verb has not returned.
//! - between 2 and 3: the number is too low, so the next writer reads the file instead, and mends 4 and 5 too.
//! - between 3 and 5: the last line is a state event, so the next writer or stream compares the documents with it.
//!
//! Hence a progress event is only ever appended after the documents were seen to agree, and where the last line is
//! progress they do.
//!
//! A full file system (`room.rs`) refuses progress first, then states, and a terminal event last: room for that is kept. An
//! event that does not fit is cut again, so no reader finds half of one.

mod append;
mod caps;
mod error;
mod folder;
mod format;
pub mod lines;
mod lock;
pub mod own_caps;
mod room;
mod rotate;
pub mod scan;
pub mod system;
mod trim;

pub use append::{Appended, Draft, What};
pub use error::LedgerError;
pub use folder::Folder;
pub(crate) use folder::{read_at, write_all};
pub use format::{AckFile, OWNER, OwnerFile, SESSION_LOCK, SUPERVISOR_LOCK, StreamFile};
pub use lock::FileLock;
pub use rotate::{open_previous, prune_previous, was_requested};
pub use trim::{TrimPoint, find_trim_point, trim_log};

use std::path::PathBuf;

use pika_cloud_common::limits::MAX_COUNT;
use pika_cloud_common::{Event, paths};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{self, OFlags};

use self::scan::Last;

/// The contract's files below one root.
#[derive(Debug)]
pub struct Ledger {
    folder: Folder,
    boot_id: String,
}

impl Ledger {
    /// Where the root is: `PIKA_CLOUD_DIR`, or `/run/pika-cloud`.
    pub fn root_path() -> PathBuf {
        let named = std::env::var_os(paths::ROOT_ENV).filter(|path| !path.is_empty());
        named.map_or_else(|| PathBuf::from(paths::ROOT), PathBuf::from)
    }

    /// Opens the root, made where it is missing.
    pub fn open() -> Result<Self, LedgerError> {
        Self::open_at(&Self::root_path())
    }

    /// Opens the root at `path`, made where it is missing.
    pub fn open_at(path: &std::path::Path) -> Result<Self, LedgerError> {
        Ok(Self { folder: Folder::open_or_create(path)?, boot_id: system::boot_id() })
    }

    /// The root.
    pub fn folder(&self) -> &Folder {
        &self.folder
    }

    /// This boot.
    pub fn boot_id(&self) -> &str {
        &self.boot_id
    }

    /// Takes the writers' lock and finds out where the stream stands. A stream of another boot is moved aside, a missing
    /// one begun, a torn last line cut.
    pub fn lock(&self) -> Result<Locked<'_>, LedgerError> {
        let lock = FileLock::take(&self.folder, paths::EVENTS_SEQ)?;
        let stream = rotate::current_stream(&self.folder, &self.boot_id)?;
        Locked::new(self, lock, stream)
    }

    /// Takes the lock under which owners change.
    pub fn lock_session(&self) -> Result<FileLock, LedgerError> {
        FileLock::take(&self.folder, SESSION_LOCK)
    }
}

/// The contract's files while we hold the writers' lock.
#[derive(Debug)]
pub struct Locked<'a> {
    ledger: &'a Ledger,
    lock: FileLock,
    hint: Option<u64>,
    hint_bytes: u64,
    stream: StreamFile,
    events: OwnedFd,
    len: u64,
    allocated: u64,
    last: Last,
}

impl<'a> Locked<'a> {
    fn new(ledger: &'a Ledger, lock: FileLock, stream: StreamFile) -> Result<Self, LedgerError> {
        let folder = &ledger.folder;
        let reading = |errno| LedgerError::io("read", folder.path_of(paths::EVENTS))(errno);
        let mut text = [0; 24];
        let read = read_at(&lock, &mut text, 0).map_err(LedgerError::io("read", folder.path_of(paths::EVENTS_SEQ)))?;
        let hint = format::parse_hint(&text[..read]);
        let access = OFlags::RDWR | OFlags::APPEND;
        let found = folder.open_file(paths::EVENTS, access)?;
        let removed = found.is_none();
        let (events, stat) = found.map_or_else(|| folder.open_or_create_file(paths::EVENTS, access), Ok)?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let len = scan::end_of_whole_lines(&events, size).map_err(reading)?;
        let mut allocated = room::allocated(&stat);
        if len < size {
            // With the torn line goes what was allocated behind it.
            allocated = 0;
            fs::ftruncate(&events, len).map_err(LedgerError::io("cut", folder.path_of(paths::EVENTS)))?;
        }
        let no_result = fs::accessat(folder, paths::RESULT, fs::Access::EXISTS, fs::AtFlags::empty()).is_err();
        let mut last = scan::find_last(&events, len, stream.base.seq, hint, no_result).map_err(reading)?;
        if removed {
            // Somebody removed the file. What it held is lost; its numbers are not given again.
            last.seq = last.seq.max(hint.unwrap_or(0).min(MAX_COUNT));
        }
        Ok(Self { ledger, hint, hint_bytes: lock.size(), lock, stream, events, len, allocated, last })
    }

    /// Moves this stream's files aside and begins the next one.
    pub fn begin_next_stream(self) -> Result<Self, LedgerError> {
        let stream = rotate::begin_next(&self.ledger.folder, self.stream, &self.ledger.boot_id)?;
        Locked::new(self.ledger, self.lock, stream)
    }

    /// The stream that the files hold.
    pub fn stream(&self) -> &StreamFile {
        &self.stream
    }

    /// Changes what the stream's file says, durably.
    pub fn update_stream(&mut self, change: impl FnOnce(&mut StreamFile)) -> Result<(), LedgerError> {
        let mut stream = self.stream.clone();
        change(&mut stream);
        stream.write(&self.ledger.folder)?;
        self.stream = stream;
        Ok(())
    }

    /// Where the stream stands.
    pub fn last(&self) -> &Last {
        &self.last
    }

    /// The terminal event, if there is one.
    pub fn terminal(&self) -> Option<&Event> {
        self.last.state_event.as_ref().filter(|event| event.kind.is_terminal())
    }

    /// Bytes of `events.jsonl`, all of them whole lines.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether no event is in the file.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The contract's files.
    pub fn ledger(&self) -> &'a Ledger {
        self.ledger
    }

    /// `events.jsonl`.
    pub fn events(&self) -> impl AsFd {
        &self.events
    }

    fn set_hint(&mut self, seq: u64) -> Result<(), LedgerError> {
        if self.hint == Some(seq) {
            return Ok(());
        }
        let text = seq.to_string();
        let failed = LedgerError::io("write", self.ledger.folder.path_of(paths::EVENTS_SEQ));
        let written = rustix::io::pwrite(&self.lock, text.as_bytes(), 0).and_then(|_| {
            if self.hint_bytes > text.len() as u64 { fs::ftruncate(&self.lock, text.len() as u64) } else { Ok(()) }
        });
        written.map_err(failed)?;
        self.hint = Some(seq);
        self.hint_bytes = text.len() as u64;
        Ok(())
    }
}
