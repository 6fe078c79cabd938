//! Advisory locks on files, waited for with a bound.
//!
//! ```text
//!   open NAME ── flock (tried again and again, at most LOCK_TIMEOUT) ── is NAME still that file? ── held until dropped
//!                                                                         └ no: it was replaced; open it anew
//! ```
//!
//! A lock is never waited for inside the kernel, where nothing could end the wait: it is tried with growing, uneven pauses,
//! so that many waiters do not march in step.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use pika_cloud_common::limits::LOCK_TIMEOUT;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{self, AtFlags, FlockOperation, OFlags, Stat};
use rustix::io::Errno;

use super::error::LedgerError;
use super::folder::Folder;

const FIRST_PAUSE: Duration = Duration::from_micros(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(2);

/// A file that we hold the lock of. It is free again when this is dropped or the process ends.
#[derive(Debug)]
pub struct FileLock {
    fd: OwnedFd,
    size: u64,
}

impl FileLock {
    /// Takes the lock on `name`, made where it is missing; waits for it at most [`LOCK_TIMEOUT`].
    pub fn take(folder: &Folder, name: &str) -> Result<Self, LedgerError> {
        let deadline = Instant::now() + LOCK_TIMEOUT;
        let mut pause = FIRST_PAUSE;
        loop {
            match Self::try_take(folder, name)? {
                Some(lock) => return Ok(lock),
                None if Instant::now() >= deadline => {
                    return Err(LedgerError::LockBusy { path: folder.path_of(name) });
                }
                None => {}
            }
            std::thread::sleep(uneven(pause));
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Takes the lock on `name` if nobody holds it.
    pub fn try_take(folder: &Folder, name: &str) -> Result<Option<Self>, LedgerError> {
        loop {
            let (fd, opened) = folder.open_or_create_file(name, OFlags::RDWR)?;
            match fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(LedgerError::io("lock", folder.path_of(name))(errno)),
            }
            if let Some(size) = size_if_still(folder, name, &opened)? {
                return Ok(Some(Self { fd, size }));
            }
        }
    }

    /// The file's size when the lock was taken.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The descriptor that holds the lock, to be handed to another process.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }
}

impl AsFd for FileLock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The size of `name`, where it is still the file that was opened: a lock on one that was replaced keeps nobody out.
fn size_if_still(folder: &Folder, name: &str, opened: &Stat) -> Result<Option<u64>, LedgerError> {
    match fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(now) if (now.st_dev, now.st_ino) == (opened.st_dev, opened.st_ino) => {
            Ok(Some(u64::try_from(now.st_size).unwrap_or(0)))
        }
        Ok(_) | Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(LedgerError::io("look at", folder.path_of(name))(errno)),
    }
}

/// Between a half and three halves of `pause`.
fn uneven(pause: Duration) -> Duration {
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.subsec_nanos());
    let spread = nanos.wrapping_mul(2_654_435_761) ^ std::process::id().wrapping_mul(40_503);
    pause / 2 + pause.mul_f32(f32::from(u16::try_from(spread >> 16).unwrap_or(0)) / 65_536.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_replaced_is_no_lock() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open_or_create(dir.path()).unwrap();
        let (_fd, opened) = folder.open_or_create_file("lock", OFlags::RDWR).unwrap();
        std::fs::write(dir.path().join("lock"), "17").unwrap();
        assert_eq!(size_if_still(&folder, "lock", &opened).unwrap(), Some(2));
        folder.replace("lock", b"17", false).unwrap();
        assert_eq!(size_if_still(&folder, "lock", &opened).unwrap(), None);
        folder.remove_file("lock").unwrap();
        assert_eq!(size_if_still(&folder, "lock", &opened).unwrap(), None);
    }

    #[test]
    fn pauses_are_uneven_and_bounded() {
        for _ in 0..100 {
            let pause = uneven(LONGEST_PAUSE);
            assert!(pause >= LONGEST_PAUSE / 2 && pause <= LONGEST_PAUSE * 3 / 2, "{pause:?}");
        }
    }
}
