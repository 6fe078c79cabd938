//! Appending, and making it durable: one thread for all runtimes of a process.
//!
//! ```text
//!   driver A ─ records ─► buffer ─ start_commit ─┐
//!   driver B ─ records ─► buffer ─ start_commit ─┼─► committer thread: write all, fdatasync each ─► answers
//!   driver C …                                   ┘
//! ```
//!
//! A driver never waits for a disk while it reads: it gathers the next records while the last ones are being written. A
//! write or sync that failed is never repeated, since the kernel may have dropped the pages; the journal takes nothing
//! more then, and the next start finds a valid prefix.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};

use pika_cloud_common::digest::Digest;
use pika_cloud_common::limits::BAD_LINE_SAMPLE_BYTES;
use pika_cloud_common::{EventHead, Timestamp};
use tokio::sync::{oneshot, watch};

use super::error::JournalError;
use super::format::{self, Body, Header, HostRecord, MAX_RECORD_BYTES, Record, VERSION};
use super::recover::recover;
use super::view::View;
use crate::clock::now;
use crate::state_dir::RuntimeLock;

/// The journal's file in a runtime's folder.
pub(crate) const FILE_NAME: &str = "journal.jsonl";

/// One thread that makes the journals of a process durable.
#[derive(Clone, Debug)]
pub struct Committer {
    jobs: mpsc::Sender<Job>,
}

struct Job {
    journal: Arc<File>,
    bytes: Vec<u8>,
    /// Log files that the records speak of: synced before them.
    logs: Vec<Arc<File>>,
    /// Held until the bytes are written: whoever opens the journal next must find them all, or none to come.
    _lock: Option<Arc<RuntimeLock>>,
    done: oneshot::Sender<(io::Result<()>, Vec<u8>)>,
    /// Hears of it at once, so that followers do not wait for the driver's turn.
    durable: Arc<watch::Sender<u64>>,
}

impl Committer {
    /// Starts the thread; it ends with the last clone of its committer.
    ///
    /// # Errors
    /// Where no thread can be had.
    pub fn start() -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        std::thread::Builder::new().name("journal".to_owned()).spawn(move || {
            while let Ok(first) = queue.recv() {
                // Whatever queued up while the disk was busy goes with it: all writes first, so that the syncs share.
                let jobs: Vec<Job> = std::iter::once(first).chain(queue.try_iter()).collect();
                let written: Vec<io::Result<()>> = jobs.iter().map(Job::write).collect();
                for (job, written) in jobs.into_iter().zip(written) {
                    let result = written.and_then(|()| job.journal.sync_data());
                    if result.is_ok() {
                        job.durable.send_modify(|length| *length += job.bytes.len() as u64);
                    }
                    // A driver that is gone does not want to know.
                    let _ = job.done.send((result, job.bytes));
                }
            }
        })?;
        Ok(Self { jobs })
    }
}

impl Job {
    fn write(&self) -> io::Result<()> {
        for log in &self.logs {
            log.sync_data()?;
        }
        (&*self.journal).write_all(&self.bytes)
    }
}

/// The journal of one runtime.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: Arc<File>,
    committer: Committer,
    view: View,
    buffer: Vec<u8>,
    spare: Vec<u8>,
    in_flight: Option<InFlight>,
    failed: bool,
    durable: Arc<watch::Sender<u64>>,
    lock: Option<Arc<RuntimeLock>>,
}

#[derive(Debug)]
struct InFlight {
    done: oneshot::Receiver<(io::Result<()>, Vec<u8>)>,
}

impl Journal {
    /// Opens the journal in `folder`, or begins one. The caller holds the runtime's lock.
    ///
    /// # Errors
    /// Where the file system refuses, or the journal is of another version or runtime, or was edited.
    pub fn open(folder: &Path, runtime_id: &str, committer: Committer) -> Result<Self, JournalError> {
        let path = folder.join(FILE_NAME);
        let fail = |doing| JournalError::io(&path, doing);
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&path)
            .map_err(fail("opening the journal"))?;
        let (view, valid) = recover(&mut file, &path, runtime_id)?;
        file.set_len(valid).map_err(fail("cutting a torn end off the journal"))?;
        // An earlier collector may have died between its write and its sync.
        file.sync_data().map_err(fail("syncing the journal"))?;
        let durable = Arc::new(watch::channel(valid).0);
        let mut journal = Self {
            path: path.clone(),
            file: Arc::new(file),
            committer,
            view,
            buffer: Vec::new(),
            spare: Vec::new(),
            in_flight: None,
            failed: false,
            durable,
            lock: None,
        };
        if valid == 0 {
            journal.append(0, &Body::Journal(Header { version: VERSION, runtime_id: runtime_id.to_owned() }));
        }
        Ok(journal)
    }

    /// Takes the runtime's lock over, for as long as this journal lives or a write of it is under way.
    pub(crate) fn hold(&mut self, lock: RuntimeLock) {
        self.lock = Some(Arc::new(lock));
    }

    /// What the journal says, with what is not durable yet.
    pub fn view(&self) -> &View {
        &self.view
    }

    /// The file's length up to which it is durable; changes with each commit.
    pub fn durable(&self) -> watch::Receiver<u64> {
        self.durable.subscribe()
    }

    /// Begins the next incarnation.
    pub fn begin(&mut self, spec_hash: String) {
        let body = Body::Host(HostRecord::Requested { spec_hash });
        self.append(self.view.incarnation + 1, &body);
    }

    /// Adds what the host did or saw.
    pub fn host(&mut self, record: HostRecord) {
        self.append(self.view.incarnation, &Body::Host(record));
    }

    /// Adds an event of the guest. `head` was read from `line`, and `digest` is the stream's with it.
    pub fn guest(&mut self, at: &Timestamp, head: &EventHead<'_>, line: &[u8], digest: Digest) {
        format::write_guest(self.view.next_n, at, self.view.incarnation, line, &mut self.buffer);
        self.view.next_n += 1;
        self.view.apply_guest(head, line, digest);
    }

    /// Writes a record, and takes it in as it reads: what is known now is what would be known after a crash.
    fn append(&mut self, incarnation: u32, body: &Body) {
        let (n, at, start) = (self.view.next_n, now(), self.buffer.len());
        format::write_host(n, &at, incarnation, body, &mut self.buffer);
        let record = self.read_back(start).unwrap_or_else(|| {
            let body = Body::Host(unreadable(&self.buffer[start..]));
            self.buffer.truncate(start);
            format::write_host(n, &at, incarnation, &body, &mut self.buffer);
            Record { n, at, inc: incarnation, body }
        });
        self.view.apply(&record);
    }

    fn read_back(&self, start: usize) -> Option<Record> {
        let line = self.buffer[start..].strip_suffix(b"\n")?;
        if line.len() < MAX_RECORD_BYTES { format::read(line).ok() } else { None }
    }

    /// Bytes that no commit has taken yet.
    pub fn pending(&self) -> usize {
        self.buffer.len()
    }

    /// Whether a commit is under way.
    pub fn is_committing(&self) -> bool {
        self.in_flight.is_some()
    }

    /// Hands what was added to the committer. `logs` are files that it speaks of.
    ///
    /// # Errors
    /// Where an earlier commit failed.
    ///
    /// # Panics
    /// Where a commit is under way: the caller's order is wrong.
    pub fn start_commit(&mut self, logs: Vec<Arc<File>>) -> Result<(), JournalError> {
        assert!(self.in_flight.is_none(), "one commit at a time");
        if self.failed {
            return Err(JournalError::Degraded { path: self.path.clone() });
        }
        let bytes = std::mem::replace(&mut self.buffer, std::mem::take(&mut self.spare));
        let (sender, done) = oneshot::channel();
        let (journal, durable) = (Arc::clone(&self.file), Arc::clone(&self.durable));
        let job = Job { journal, bytes, logs, _lock: self.lock.clone(), done: sender, durable };
        if self.committer.jobs.send(job).is_err() {
            return Err(self.broken("handing records to the journal's thread", io::Error::other("it ended")));
        }
        self.in_flight = Some(InFlight { done });
        Ok(())
    }

    /// Waits for the commit under way, and publishes what it made durable. Never ready where there is none. Cancelling
    /// loses nothing: the next call goes on waiting.
    ///
    /// # Errors
    /// Where it could not be written or synced.
    pub async fn committed(&mut self) -> Result<(), JournalError> {
        let Some(in_flight) = &mut self.in_flight else { return std::future::pending().await };
        let answer = (&mut in_flight.done).await;
        self.in_flight = None;
        match answer {
            Ok((Ok(()), mut spare)) => {
                spare.clear();
                self.spare = spare;
                Ok(())
            }
            Ok((Err(error), _)) => Err(self.broken("writing the journal", error)),
            Err(_) => Err(self.broken("writing the journal", io::Error::other("its thread ended"))),
        }
    }

    /// Makes everything that was added durable.
    ///
    /// # Errors
    /// Where it could not be written or synced.
    pub async fn commit(&mut self) -> Result<(), JournalError> {
        if self.is_committing() {
            self.committed().await?;
        }
        if self.pending() > 0 {
            self.start_commit(Vec::new())?;
            self.committed().await?;
        }
        Ok(())
    }

    fn broken(&mut self, doing: &'static str, source: io::Error) -> JournalError {
        self.failed = true;
        JournalError::io(&self.path, doing)(source)
    }
}

/// In the place of a document of the guest that no reader of journals would take, such as one that is nested too deep.
fn unreadable(line: &[u8]) -> HostRecord {
    let sample = String::from_utf8_lossy(&line[..line.len().min(BAD_LINE_SAMPLE_BYTES)]).into_owned();
    HostRecord::BadLine { reason: "it is nested too deep, or too long, for the journal".to_owned(), sample }
}
