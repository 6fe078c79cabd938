//! Following a journal as it grows: in this process as soon as a record is durable, from another one a little later.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::format::{self, MAX_RECORD_BYTES, Record};
use super::write::{FILE_NAME, JournalError};

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
    ready: VecDeque<(Record, String)>,
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
            ready: VecDeque::new(),
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
    /// Where the journal cannot be read.
    pub fn try_next(&mut self) -> Result<Option<(Record, String)>, JournalError> {
        if self.ready.is_empty() {
            self.read().map_err(|source| JournalError::Io {
                path: self.path.clone(),
                doing: "reading the journal",
                source: Arc::new(source),
            })?;
        }
        Ok(self.ready.pop_front())
    }

    fn read(&mut self) -> io::Result<()> {
        if self.file.is_none() {
            match File::open(&self.path) {
                Ok(file) => self.file = Some(file),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        let Some(file) = &self.file else { return Ok(()) };
        let limit = self.durable.as_ref().map_or(u64::MAX, |durable| *durable.borrow());
        let known = self.unread.len();
        let want = usize::try_from(limit.saturating_sub(self.offset)).unwrap_or(usize::MAX).min(READ_BYTES);
        self.unread.resize(known + want, 0);
        let read = file.read_at(&mut self.unread[known..], self.offset)?;
        self.unread.truncate(known + read);
        self.offset += read as u64;
        self.cut_lines()
    }

    /// Whole lines become records. One that is not intact yet is being written; it is read again from its start.
    fn cut_lines(&mut self) -> io::Result<()> {
        let mut start = 0;
        while let Some(at) = memchr::memchr(b'\n', &self.unread[start..]) {
            let line = &self.unread[start..start + at];
            let Ok(record) = format::read(line) else {
                self.offset -= (self.unread.len() - start) as u64;
                self.unread.clear();
                return Ok(());
            };
            self.ready.push_back((record, String::from_utf8_lossy(line).into_owned()));
            start += at + 1;
        }
        self.unread.drain(..start);
        if self.unread.len() > MAX_RECORD_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a record longer than any record may be"));
        }
        Ok(())
    }
}
