//! What can go wrong with the contract's files.

use std::path::{Path, PathBuf};

use pika_cloud_common::DecodeError;
use pika_cloud_common::limits::{LOCK_TIMEOUT, MAX_EVENT_BYTES};
use rustix::fs::FileType;
use rustix::io::Errno;

/// A file of the contract could not be used, or an event was refused.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// A call of the operating system failed.
    #[error("cannot {doing} {}: {errno}{}", path.display(), advice(*errno))]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        errno: Errno,
    },
    /// Something else stands where a file of the contract belongs.
    #[error("{} is {found}, and {expected} belongs there: remove it and try again", path.display())]
    Misplaced {
        /// Where.
        path: PathBuf,
        /// What is there.
        found: &'static str,
        /// What belongs there.
        expected: &'static str,
    },
    /// A folder of the contract was removed or replaced while it was in use.
    #[error("{} was removed or replaced while it was in use: what it had is lost", path.display())]
    Removed {
        /// Which.
        path: PathBuf,
    },
    /// Another writer held the lock all the time.
    #[error("{} was locked by another writer for {} s: end that process, or try again", path.display(), LOCK_TIMEOUT.as_secs())]
    LockBusy {
        /// The lock.
        path: PathBuf,
    },
    /// The stream has ended.
    #[error(
        "the runtime is already `{state}` (event {seq}): no event may follow a terminal one; a new run begins a new stream"
    )]
    AlreadyTerminal {
        /// The terminal state.
        state: String,
        /// The terminal event.
        seq: u64,
    },
    /// An event line would be longer than a reader takes.
    #[error(
        "the event would be {bytes} bytes long, at most {MAX_EVENT_BYTES} are allowed: shorten its message or details"
    )]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// A reader would not take the event for one.
    #[error("no reader would take the event: {source}; nest its details less deeply")]
    Unreadable {
        /// What a reader says.
        source: DecodeError,
    },
    /// The cap on events that nobody has taken yet is reached.
    #[error(
        "the event was dropped: {held} bytes of events wait for the host, at most {cap} are kept; it is counted, \
         try again when the host has caught up"
    )]
    Capped {
        /// Bytes in the file.
        held: u64,
        /// The cap.
        cap: u64,
    },
    /// The file system is full, and what room is left is kept for more important events.
    #[error(
        "cannot append to {}: its file system is full, and what is left there is kept for how the run ends: free some space",
        path.display()
    )]
    NoRoom {
        /// The event file.
        path: PathBuf,
    },
    /// The last `seq` is the highest that there is.
    #[error("{}: the last event has the highest seq that there is, no other can follow", path.display())]
    SeqExhausted {
        /// The event file.
        path: PathBuf,
    },
    /// Only some of a batch could be written.
    #[error("cannot append to {}: {errno}; {written} of {wanted} events were written{}", path.display(), advice(*errno))]
    Partial {
        /// The event file.
        path: PathBuf,
        /// Why the rest is missing.
        errno: Errno,
        /// Whole events that were written.
        written: usize,
        /// Events in the batch.
        wanted: usize,
    },
    /// The event is written, a document that follows from it is not.
    #[error("event {seq} is written, but not what follows from it: {source}; the next writer mends it")]
    NotDerived {
        /// The event.
        seq: u64,
        /// What failed.
        source: Box<LedgerError>,
    },
    /// A document of the contract is not readable.
    #[error("{}: {source}", path.display())]
    Document {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        source: DecodeError,
    },
    /// A file of the agent's own is not readable.
    #[error("{} is malformed ({source}): remove it, and a new stream begins", path.display())]
    Malformed {
        /// Which.
        path: PathBuf,
        /// What the parser says.
        source: serde_json::Error,
    },
    /// A workload runs already.
    #[error("another workload is being supervised here: wait for its end, or send it a signal")]
    Supervised,
}

impl LedgerError {
    pub(crate) fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(Errno) -> Self {
        let path = path.into();
        move |errno| Self::Io { doing, path, errno }
    }

    pub(crate) fn misplaced(path: &Path, found: FileType, expected: &'static str) -> Self {
        Self::Misplaced { path: path.to_owned(), found: name_of(found), expected }
    }

    /// Whether it failed for want of room in the file system.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::NoRoom { .. }) || self.errno().is_some_and(super::room::is_full)
    }

    /// The operating system's own reason, where there is one.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Io { errno, .. } | Self::Partial { errno, .. } => Some(*errno),
            Self::NotDerived { source, .. } => source.errno(),
            _ => None,
        }
    }
}

fn name_of(found: FileType) -> &'static str {
    match found {
        FileType::RegularFile => "a regular file",
        FileType::Directory => "a folder",
        FileType::Symlink => "a symbolic link",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::CharacterDevice | FileType::BlockDevice => "a device",
        FileType::Unknown => "of an unknown type",
    }
}

/// The way out, where the reason names one.
fn advice(errno: Errno) -> &'static str {
    match errno {
        Errno::ACCESS | Errno::PERM => ": run as root, or as a member of the group `pika-cloud`",
        Errno::ROFS => ": set PIKA_CLOUD_DIR to a folder that can be written",
        Errno::NOSPC | Errno::DQUOT => ": free some space in that file system",
        _ => "",
    }
}
