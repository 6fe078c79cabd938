//! Removes what the owner has acknowledged from the front of `events.jsonl` and of the log.
//!
//! ```text
//!   events.jsonl   │ acknowledged │ waiting │            base moves up in the stream file (synced),
//!   .….tmp                        │ waiting │ ─ renamed ─► events.jsonl
//!   logs/guest.log │ hole         │ waiting │            offsets stay
//! ```
//!
//! Killed between the stream file and the rename, the file still begins below its base; readers leave those lines out.
//! A reader that has the old file open reads it to its end, which no writer touches any more, then finds the new one.

use pika_cloud_common::paths;
use rustix::fd::OwnedFd;
use rustix::fs::{self, FallocateFlags, OFlags};
use rustix::io::Errno;

use super::error::LedgerError;
use super::folder::{Folder, read_at, write_all};
use super::format::{Base, StreamFile};
use super::lines::BLOCK_BYTES;
use super::scan::{self, Mark};
use super::{Ledger, Locked};

/// Less than this is not worth a new file.
const TRIM_BYTES: u64 = 4 * 1024 * 1024;
/// Holes begin and end where the file system's blocks do.
const PAGE_BYTES: u64 = 4096;

/// Where the acknowledged part of `events.jsonl` ends. Found without the lock: what lies in front of an acknowledged
/// event never changes.
#[derive(Debug)]
pub struct TrimPoint {
    base: Base,
    mark: Mark,
    file: (u64, u64),
}

impl TrimPoint {
    /// How many bytes go.
    pub fn bytes(&self) -> u64 {
        self.mark.end
    }
}

/// Finds where `seq` ends in the current file, where that is worth a trim. `near` is where it is thought to end.
pub fn find_trim_point(
    folder: &Folder,
    stream: &StreamFile,
    (seq, near): (u64, u64),
) -> Result<Option<TrimPoint>, LedgerError> {
    let Some((fd, stat)) = folder.open_file(paths::EVENTS, OFlags::RDONLY)? else { return Ok(None) };
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    // All in front of it is read for its digest: not for nothing.
    if !is_worth_it(near, size) {
        return Ok(None);
    }
    let reading = |errno| LedgerError::io("read", folder.path_of(paths::EVENTS))(errno);
    let len = scan::end_of_whole_lines(&fd, size).map_err(reading)?;
    let mark = scan::mark_at(&fd, len, stream.base.seq, stream.base.digest, seq).map_err(reading)?;
    Ok(is_worth_it(mark.end, len).then_some(TrimPoint {
        base: stream.base.clone(),
        mark,
        file: (stat.st_dev, stat.st_ino),
    }))
}

/// Whether a file of `len` bytes is to be trimmed at `end`: what is copied is never more than what is given back.
fn is_worth_it(end: u64, len: u64) -> bool {
    end >= TRIM_BYTES && end >= len / 2
}

impl Locked<'_> {
    /// Removes the events up to `point`. Nothing is done where they were trimmed meanwhile.
    pub fn trim(mut self, point: &TrimPoint) -> Result<(), LedgerError> {
        let folder = &self.ledger.folder;
        let failed = |doing, errno| LedgerError::io(doing, folder.path_of(paths::EVENTS))(errno);
        let stat = fs::fstat(&self.events).map_err(|errno| failed("look at", errno))?;
        let same = (stat.st_dev, stat.st_ino) == point.file && self.stream.base == point.base;
        if !same || point.mark.end > self.len {
            return Ok(());
        }
        let tmp = format!(".{}.tmp", paths::EVENTS);
        folder.remove_file(&tmp)?;
        let copy = folder.create_file(&tmp, OFlags::WRONLY).map_err(|errno| failed("trim", errno))?;
        if let Err(errno) = copy_range(&self.events, &copy, point.mark.end, self.len) {
            folder.remove_file(&tmp)?;
            return Err(failed("trim", errno));
        }
        self.update_stream(|stream| {
            stream.base.seq = point.mark.seq;
            stream.base.digest = point.mark.digest;
        })?;
        let folder = &self.ledger.folder;
        fs::renameat(folder, &tmp, folder, paths::EVENTS)
            .map_err(LedgerError::io("replace", folder.path_of(paths::EVENTS)))
    }
}

fn copy_range(from: &OwnedFd, to: &OwnedFd, mut start: u64, end: u64) -> Result<(), Errno> {
    let mut block = vec![0; BLOCK_BYTES];
    while start < end {
        let want = usize::try_from(end - start).unwrap_or(BLOCK_BYTES).min(BLOCK_BYTES);
        let read = read_at(from, &mut block[..want], start)?;
        if read == 0 {
            return Err(Errno::IO);
        }
        write_all(to, &block[..read])?;
        start += read as u64;
    }
    Ok(())
}

/// Gives back the space of the log up to `acked`, of which `punched` was given back before; says how far it is now.
/// Where the file system has no holes, nothing is given back.
pub fn trim_log(ledger: &Ledger, acked: u64, punched: u64) -> u64 {
    let end = acked - acked % PAGE_BYTES;
    if end < punched + TRIM_BYTES {
        return punched;
    }
    let Ok(Some(logs)) = ledger.folder.child(paths::LOGS_DIR) else { return punched };
    let Ok(Some((fd, _))) = logs.open_file(paths::GUEST_LOG, OFlags::WRONLY) else { return punched };
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match fs::fallocate(&fd, hole, punched, end - punched) {
        Ok(()) => end,
        Err(_) => punched,
    }
}
