//! Room in the file system that is kept for the last words, since a workload may fill `/run` at any moment.
//!
//! ```text
//!   events.jsonl           │ whole lines │ len + BEHIND_STATES │ len + BEHIND_PROGRESS │   allocated behind the file's end
//!                                        └ only terminal events └ states too            └ everything
//!   events.jsonl.reserve   an allocated file, which becomes the temporary file of a document where a new one finds no room
//! ```
//!
//! The blocks behind the end belong to the file already (`fallocate` that keeps the size), so no other writer can take
//! them between a look and a write. Before an event is appended, what must stay free behind it is allocated; where that
//! fails, progress is refused and counted first, states next, and a terminal event is written into what was kept for it.
//! Then the rest is given back, so that `result.json` and `status.json` find room. Killed anywhere, the room stays or is
//! allocated by the next writer; a cut of a torn line gives it back, and the next event takes it again.
//!
//! Where the file system cannot allocate ahead, an event that finds no room fails as a whole, and a supervisor tries its
//! last one again for a while. Where no names are left (inodes), the terminal event needs none; the documents follow when
//! there are some.

use pika_cloud_common::limits::MAX_EVENT_BYTES;
use rustix::fd::OwnedFd;
use rustix::fs::{self, FallocateFlags, OFlags};
use rustix::io::Errno;

use super::Locked;
use super::folder::Folder;

/// The reserve for documents.
pub(super) const RESERVE: &str = "events.jsonl.reserve";
/// What it holds: more than the documents of a supervisor's events and the agent's own small files take.
const RESERVE_BYTES: u64 = 16 * 1024;
const PAGE_BYTES: u64 = 4096;

/// The longest event, and a notice in front of it.
const BEHIND_STATES: u64 = MAX_EVENT_BYTES as u64 + PAGE_BYTES;
/// The same for the states before it.
const BEHIND_PROGRESS: u64 = 2 * BEHIND_STATES;

/// What an event may use of the room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    Progress,
    State,
    Terminal,
}

/// Whether it is for want of room that something failed.
pub(super) fn is_full(errno: Errno) -> bool {
    matches!(errno, Errno::NOSPC | Errno::DQUOT)
}

/// Bytes that a file has on the disk, which for one without holes may be more than its size.
pub(super) fn allocated(stat: &fs::Stat) -> u64 {
    // The kernel counts in units of 512 bytes whatever the file system's blocks are.
    u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512)
}

impl Locked<'_> {
    /// Whether `batch` bytes may be appended, with what has to stay free behind them.
    pub(super) fn has_room(&mut self, batch: usize, claim: Claim) -> bool {
        let end = self.len + batch as u64;
        match claim {
            Claim::Progress => self.allocate_to(end + BEHIND_PROGRESS),
            // As much as progress must leave, while there is that much.
            Claim::State => self.allocate_to(end + BEHIND_PROGRESS) || self.allocate_to(end + BEHIND_STATES),
            // The write itself says whether there is room.
            Claim::Terminal => true,
        }
    }

    fn allocate_to(&mut self, end: u64) -> bool {
        let end = end.next_multiple_of(PAGE_BYTES);
        if end <= self.allocated {
            return true;
        }
        match allocate(&self.events, self.len, end - self.len) {
            Ok(()) => {
                self.allocated = end;
                true
            }
            Err(errno) => !is_full(errno),
        }
    }

    /// Gives back what lies behind the last event.
    pub(super) fn give_back(&mut self) {
        // Best effort: it is room for others, and nothing hangs on it.
        let _ = fs::ftruncate(&self.events, self.len);
        self.allocated = 0;
    }
}

/// Makes the reserve for documents, or what there is room for. Best effort.
pub(super) fn keep_reserve(folder: &Folder) {
    let Ok((fd, stat)) = folder.open_or_create_file(RESERVE, OFlags::WRONLY) else { return };
    let held = allocated(&stat);
    let mut wanted = RESERVE_BYTES;
    while wanted > held && allocate(&fd, 0, wanted).is_err_and(is_full) {
        wanted -= PAGE_BYTES;
    }
}

/// The reserve with `content` in it, under the name `tmp`.
pub(super) fn use_reserve(folder: &Folder, tmp: &str, content: &[u8]) -> Result<OwnedFd, Errno> {
    if content.len() as u64 > RESERVE_BYTES {
        return Err(Errno::NOSPC);
    }
    fs::renameat(folder, RESERVE, folder, tmp)?;
    let opened = folder.open_file(tmp, OFlags::WRONLY).ok().flatten();
    let (fd, _) = opened.ok_or(Errno::NOSPC)?;
    super::write_all(&fd, content)?;
    fs::ftruncate(&fd, content.len() as u64)?;
    Ok(fd)
}

/// Takes blocks for `length` bytes from `offset` on; the file's size stays.
fn allocate(fd: &OwnedFd, offset: u64, length: u64) -> Result<(), Errno> {
    loop {
        match fs::fallocate(fd, FallocateFlags::KEEP_SIZE, offset, length) {
            Err(Errno::INTR) => {}
            done => return done,
        }
    }
}
