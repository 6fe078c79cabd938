//! Following a journal as it grows: in this process as soon as a record is durable, from another one a little later.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::watch;

use super::error::JournalError;
use super::format::{MAX_RECORD_BYTES, Record};
use super::recover::Sequence;
use super::write::FILE_NAME;

/// How often the journal of another process is looked at.
const POLL: Duration = Duration::from_millis(50);

/// Bytes of one read.
const READ_BYTES: usize = 256 * 1024;

/// Gives a journal's records in their order, each once.
#[derive(Debug)]
pub struct Follower {
    path: PathBuf,
    file: Option<File>,
    offset: u64,
    unread: Vec<u8>,
    sequence: Sequence,
    ready: VecDeque<(Record, String)>,
    /// What stands behind the records that are ready.
    failed: Option<JournalError>,
    durable: Option<watch::Receiver<u64>>,
}

impl Follower {
    /// From the journal's first record. `durable` comes from the [`Journal`](super::Journal) of this process that writes it.
    pub fn new(folder: &Path, durable: Option<watch::Receiver<u64>>) -> Self {
        Self {
            path: folder.join(FILE_NAME),
            file: None,
            offset: 0,
            unread: Vec::new(),
            sequence: Sequence::default(),
            ready: VecDeque::new(),
            failed: None,
            durable,
        }
    }

    /// The next record and its line as it stands in the journal; waits for it. `None` where the writer of this process is
    /// gone and everything was given out.
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
            match &mut self.durable {
                Some(_) if writer_gone => return Ok(None),
                Some(durable) => {
                    let _ = durable.changed().await;
                }
                None => tokio::time::sleep(POLL).await,
            }
        }
    }

    /// The next record that is there already.
    ///
    /// # Errors
    /// Where the journal cannot be read, is of another version, or was edited.
    pub fn try_next(&mut self) -> Result<Option<(Record, String)>, JournalError> {
        while self.ready.is_empty() && self.failed.is_none() {
            let more = self.read().map_err(JournalError::io(&self.path, "reading the journal"))?;
            if !more {
                break;
            }
        }
        match (self.ready.pop_front(), &self.failed) {
            (None, Some(error)) => Err(error.clone()),
            (next, _) => Ok(next),
        }
    }

    /// Reads a piece, and says whether there may be more.
    fn read(&mut self) -> io::Result<bool> {
        if self.file.is_none() {
            match File::open(&self.path) {
                Ok(file) => self.file = Some(file),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        let Some(file) = &self.file else { return Ok(false) };
        let limit = self.durable.as_ref().map_or(u64::MAX, |durable| *durable.borrow());
        let known = self.unread.len();
        let want = usize::try_from(limit.saturating_sub(self.offset)).unwrap_or(usize::MAX).min(READ_BYTES);
        self.unread.resize(known + want, 0);
        let read = file.read_at(&mut self.unread[known..], self.offset)?;
        self.unread.truncate(known + read);
        self.offset += read as u64;
        Ok(self.cut_lines() && read > 0)
    }

    /// Whole lines become records. What is not intact yet is being written, or will be cut: it is read again from its
    /// start, and that is told by `false`.
    fn cut_lines(&mut self) -> bool {
        let mut start = 0;
        while let Some(at) = memchr::memchr(b'\n', &self.unread[start..]) {
            let line = &self.unread[start..start + at];
            match self.sequence.next(line, &self.path) {
                Ok(Some(record)) => self.ready.push_back((record, String::from_utf8_lossy(line).into_owned())),
                Ok(None) => return self.step_back(start),
                Err(error) => {
                    self.failed = Some(error);
                    return false;
                }
            }
            start += at + 1;
        }
        // Zeros behind a crash have no end that could be waited for.
        let hopeless = self.unread.len() - start > MAX_RECORD_BYTES || self.unread[start..].starts_with(b"\0");
        if hopeless {
            return self.step_back(start);
        }
        self.unread.drain(..start);
        true
    }

    fn step_back(&mut self, start: usize) -> bool {
        self.offset -= (self.unread.len() - start) as u64;
        self.unread.clear();
        false
    }
}
