//! A runtime's log as it grows. What is given is durable: the journal says how far each file is, and the file is read up to
//! there and no further.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use crate::error::Error;
use crate::journal::{Body, Follower, HostRecord};

/// Bytes that are read at once.
const CHUNK_BYTES: u64 = 64 * 1024;

/// Reads a log file of the state dir piece by piece, as far as it is durable.
#[derive(Debug)]
pub struct LogReader {
    path: PathBuf,
    read: u64,
}

impl LogReader {
    /// From the beginning of a file, which need not be there yet.
    pub fn new(path: PathBuf) -> Self {
        Self { path, read: 0 }
    }

    /// The next piece, up to `end` of the file; empty where all of that was read. A file that somebody shortened or removed
    /// has nothing more.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub fn read_up_to(&mut self, end: u64) -> io::Result<Vec<u8>> {
        let want = end.saturating_sub(self.read).min(CHUNK_BYTES);
        if want == 0 {
            return Ok(Vec::new());
        }
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        // At most a chunk.
        let mut piece = vec![0; usize::try_from(want).unwrap_or_default()];
        let read = file.read_at(&mut piece, self.read)?;
        piece.truncate(read);
        self.read += read as u64;
        Ok(piece)
    }
}

/// Follows one log file of one incarnation, whoever drives it.
#[derive(Debug)]
pub struct LogFollower {
    follower: Follower,
    reader: LogReader,
    incarnation: u32,
    file: String,
    /// How far it is durable.
    end: u64,
    /// Nothing more is expected than what is durable.
    is_over: bool,
    /// Whether the last record says that another owner has it.
    is_anothers: bool,
    /// The runtime's.
    folder: PathBuf,
}

impl LogFollower {
    /// `folder` is the runtime's.
    pub(super) fn new(folder: PathBuf, follower: Follower, reader: LogReader, incarnation: u32, file: String) -> Self {
        Self { follower, reader, incarnation, file, end: 0, is_over: false, is_anothers: false, folder }
    }

    /// The next bytes, never empty; waits for them. `None` where the incarnation is over and everything was given out.
    ///
    /// # Errors
    /// Where the journal or the file cannot be read.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, Error> {
        loop {
            let piece = self.reader.read_up_to(self.end);
            let piece = piece.map_err(|source| Error::Outputs { path: self.reader.path.clone(), source })?;
            if !piece.is_empty() {
                return Ok(Some(piece));
            }
            if self.is_over {
                return Ok(None);
            }
            let Some((record, _)) = self.follower.next().await? else {
                if self.is_anothers {
                    return Ok(None);
                }
                // Whoever drove it in this process let go of it; the next one may be in another. What the journal says again from
                // its beginning on is known here.
                self.follower = Follower::new(&self.folder, None);
                continue;
            };
            self.is_anothers = matches!(record.body, Body::Host(HostRecord::TakenOver { .. }));
            // What the removed segments said, a verdict among it, is in the snapshot that took their place.
            if let Some(base) = self.follower.take_base().filter(|base| base.incarnation == self.incarnation) {
                self.end = base.log_lengths.get(&self.file).copied().unwrap_or(self.end);
                self.is_over = base.verdict.is_some();
            }
            match record.body {
                _ if record.inc > self.incarnation => return Ok(None),
                Body::Host(HostRecord::Logs { logs }) if record.inc == self.incarnation => {
                    self.end = logs.get(&self.file).map_or(self.end, |mark| mark.host);
                }
                // All that it said was durable, and given out, before.
                Body::Host(HostRecord::Verdict { .. }) if record.inc == self.incarnation => return Ok(None),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::clock::Now;
    use crate::journal::{Committer, LogMark, Records, Writer};

    /// What is written is given out once the journal says so, and the end with the verdict's incarnation.
    #[tokio::test]
    async fn a_log_is_given_out_as_it_becomes_durable() {
        let folder = tempfile::tempdir().unwrap();
        let (mut writer, view) = Writer::open(folder.path(), "job-7", Committer::start().unwrap()).unwrap();
        let mut records = Records::new(view, 1 << 20, 0);
        records.begin("v1:x".to_owned(), 0, Now::default());
        let follower = Follower::new(folder.path(), Some(writer.durable()));
        let path = folder.path().join("1/logs/guest.log");
        let mut log =
            LogFollower::new(folder.path().to_owned(), follower, LogReader::new(path), 1, "guest.log".to_owned());
        let mark = |end| BTreeMap::from([("guest.log".to_owned(), LogMark { guest: end, host: end })]);
        for (text, end) in [(&b"one\n"[..], 4), (b"two\n", 8)] {
            records.log("guest.log", text);
            records.host(HostRecord::Logs { logs: mark(end) }, Now::default());
            writer.commit(records.take_commit(false).unwrap()).await.unwrap();
            assert_eq!(log.next().await.unwrap().as_deref(), Some(text));
        }
        // Bytes that no record speaks of are nobody's yet.
        records.log("guest.log", b"three\n");
        records.begin("v1:x".to_owned(), 1, Now::default());
        writer.commit(records.take_commit(false).unwrap()).await.unwrap();
        assert_eq!(log.next().await.unwrap(), None, "a later incarnation is another log");
    }

    /// `ensure` drives a runtime until its workload runs, and lets go of it; whoever follows its log does not.
    #[tokio::test]
    async fn a_log_is_followed_from_one_writer_to_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let committer = Committer::start().unwrap();
        let open = || Writer::open(folder.path(), "job-7", committer.clone()).unwrap();
        let path = folder.path().join("1/logs/guest.log");
        let mark = |end| BTreeMap::from([("guest.log".to_owned(), LogMark { guest: end, host: end })]);
        let mut log = None;
        for (text, end) in [(&b"one\n"[..], 4), (b"two\n", 8), (b"three\n", 14)] {
            let (mut writer, view) = open();
            let mut records = Records::new(view, 1 << 20, 0);
            if end == 4 {
                records.begin("v1:x".to_owned(), 0, Now::default());
            }
            let log = log.get_or_insert_with(|| {
                let follower = Follower::new(folder.path(), Some(writer.durable()));
                let reader = LogReader::new(path.clone());
                LogFollower::new(folder.path().to_owned(), follower, reader, 1, "guest.log".to_owned())
            });
            records.log("guest.log", text);
            records.host(HostRecord::Logs { logs: mark(end) }, Now::default());
            writer.commit(records.take_commit(false).unwrap()).await.unwrap();
            drop(writer);
            assert_eq!(log.next().await.unwrap().as_deref(), Some(text));
        }
        let (mut writer, view) = open();
        let mut records = Records::new(view, 1 << 20, 0);
        let taken = HostRecord::TakenOver { owner: "another".to_owned(), term: 2 };
        records.host(taken, Now::default());
        writer.commit(records.take_commit(false).unwrap()).await.unwrap();
        assert_eq!(log.unwrap().next().await.unwrap(), None, "it is another's");
    }
}
