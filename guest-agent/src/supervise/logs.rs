//! The workload's output, appended to `logs/guest.log` up to a cap.
//!
//! What the owner has acknowledged does not count: it is punched out of the file by the owner's stream, and offsets stay.
//! At the cap output is dropped and counted; the workload never waits for us.

use std::time::{Duration, Instant};

use pika_cloud_common::limits::MAX_UNACKED_LOG_BYTES;
use pika_cloud_common::paths;
use rustix::fd::OwnedFd;
use rustix::fs::{self, OFlags};

use crate::ledger::{AckFile, Ledger, LedgerError, own_caps, system, write_all};

/// A log smaller than this is never at a cap, and so often the cap is looked at again.
const STEP: u64 = 1024 * 1024;
/// How often the acknowledgement is read while output is dropped.
const RECHECK: Duration = Duration::from_millis(100);

/// The log of one workload.
#[derive(Debug)]
pub(super) struct Log {
    fd: OwnedFd,
    stream_id: String,
    size: u64,
    /// The log may grow up to here without looking again.
    room_to: u64,
    /// Dropped since it was last told.
    dropped: u64,
    looked: Option<Instant>,
}

impl Log {
    /// Opens it for the stream of that id.
    pub(super) fn open(ledger: &Ledger, stream_id: &str) -> Result<Self, LedgerError> {
        let logs = ledger.folder().child_or_create(paths::LOGS_DIR)?;
        let (fd, stat) = logs.open_or_create_file(paths::GUEST_LOG, OFlags::WRONLY | OFlags::APPEND)?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        Ok(Self { fd, stream_id: stream_id.to_owned(), size, room_to: size.max(STEP), dropped: 0, looked: None })
    }

    /// Takes output: writes it, or drops and counts it. Tells how much was dropped before where there is room again.
    pub(super) fn take(&mut self, ledger: &Ledger, output: &[u8]) -> Option<u64> {
        let len = output.len() as u64;
        if self.size + len > self.room_to && !self.find_room(ledger, len) {
            self.dropped += len;
            return None;
        }
        let told = self.dropped();
        if let Some(dropped) = told
            && self.write(format!("[pika-guest: {dropped} bytes of output were dropped here]\n").as_bytes()) > 0
        {
            self.dropped += len;
            return None;
        }
        self.dropped = self.write(output);
        told
    }

    /// A line of our own, where there is room.
    pub(super) fn say(&mut self, text: &str) {
        self.write(format!("[pika-guest: {text}]\n").as_bytes());
    }

    /// What was dropped and not told of yet.
    pub(super) fn dropped(&self) -> Option<u64> {
        Some(self.dropped).filter(|&dropped| dropped > 0)
    }

    /// Says how many bytes are not there.
    fn write(&mut self, output: &[u8]) -> u64 {
        if write_all(&self.fd, output).is_ok() {
            self.size += output.len() as u64;
            return 0;
        }
        // No space: some of it may be there. Find out where the file ends, and look for room before the next.
        let size = fs::fstat(&self.fd).map_or(self.size, |stat| u64::try_from(stat.st_size).unwrap_or(0));
        let got = size.saturating_sub(self.size);
        self.size = size;
        self.room_to = size;
        (output.len() as u64).saturating_sub(got)
    }

    fn find_room(&mut self, ledger: &Ledger, len: u64) -> bool {
        if self.looked.is_some_and(|looked| self.dropped > 0 && looked.elapsed() < RECHECK) {
            return false;
        }
        self.looked = Some(Instant::now());
        let acked = AckFile::read(ledger.folder(), &self.stream_id).logs.get(paths::GUEST_LOG).copied();
        let waiting = self.size.saturating_sub(acked.unwrap_or(0));
        let mut cap = own_caps::lower(own_caps::LOGS_ENV, MAX_UNACKED_LOG_BYTES);
        if let Some(limit) = system::memory_limit() {
            cap = cap.min(limit / 4);
        }
        if let Ok(space) = fs::fstatvfs(&self.fd) {
            let free = space.f_bavail.saturating_mul(space.f_frsize);
            cap = cap.min(free.saturating_add(waiting) / 2);
        }
        let left = cap.saturating_sub(waiting);
        self.room_to = self.size + left.min(STEP.max(len));
        left >= len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_the_cap_output_is_dropped_and_told() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open_at(dir.path()).unwrap();
        let path = dir.path().join("logs/guest.log");
        std::fs::create_dir(dir.path().join("logs")).unwrap();
        // Without a byte on disk, and as much as may wait.
        std::fs::File::create(&path).unwrap().set_len(MAX_UNACKED_LOG_BYTES - 10).unwrap();
        let mut log = Log::open(&ledger, "stream").unwrap();
        log.room_to = 0;
        assert_eq!(log.take(&ledger, b"ten bytes."), None);
        assert_eq!(log.take(&ledger, b"eleven byte"), None);
        assert_eq!(log.take(&ledger, b"x"), None);
        assert_eq!(log.dropped(), Some(12));
        // The owner has some of it by now.
        let logs = std::collections::BTreeMap::from([(paths::GUEST_LOG.to_owned(), 1000)]);
        AckFile { stream_id: "stream".to_owned(), logs, ..AckFile::default() }.write(ledger.folder()).unwrap();
        log.looked = None;
        assert_eq!(log.take(&ledger, b"again"), Some(12));
        assert_eq!(log.dropped(), None);
        let said = b"ten bytes.[pika-guest: 12 bytes of output were dropped here]\nagain";
        let mut tail = vec![0; said.len()];
        let fd = std::fs::File::open(&path).unwrap();
        crate::ledger::read_at(&fd, &mut tail, MAX_UNACKED_LOG_BYTES - 10).unwrap();
        assert_eq!(tail, said);
    }
}
