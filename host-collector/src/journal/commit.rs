//! Making records durable: one thread for all runtimes of a process.
//!
//! ```text
//!   driver A ─ Commit ─┐
//!   driver B ─ Commit ─┼─► thread: prepare all, sync; write all, sync; publish, answer
//!   driver C …         ┘
//! ```
//!
//! A driver never waits for a disk while it reads: it gathers the next records while the last ones are being written. What
//! queued up while the disk was busy goes together, and from [`SYNC_ALL_FROM`] on with one sync for all.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};

use tokio::sync::{oneshot, watch};

use super::error::JournalError;
use super::fs::{DiskFs, FIRST_SEGMENT, Fs as _};
use super::records::Commit;
use super::store::{Durable, Store};
use super::view::View;
use crate::state_dir::RuntimeLock;

/// From so many files on, one `syncfs` serves all of them, whether they are of many runtimes or the many logs of one. Measured on ext4: an `fdatasync` takes 3 ms for each of 16 files
/// (48 ms), one `syncfs` 5 ms for them and 26 ms for 256; fewer are not worth waiting for what others have written there.
const SYNC_ALL_FROM: usize = 16;

/// So many commits go together: answers must not wait for a queue that never ends.
const MAX_TOGETHER: usize = 1024;

/// One thread that makes the journals of a process durable.
#[derive(Clone, Debug)]
pub struct Committer {
    jobs: mpsc::Sender<Job>,
}

/// A store, what it should write, and who wants to know.
#[derive(Debug)]
struct Job {
    store: Store<DiskFs>,
    commit: Commit,
    /// Held until the bytes are written: whoever opens the journal next must find them all, or none to come.
    _lock: Option<Arc<RuntimeLock>>,
    /// Hears of it at once, so that followers do not wait for the driver's turn.
    durable: Arc<watch::Sender<Durable>>,
    done: oneshot::Sender<Answer>,
    result: Result<(), JournalError>,
}

#[derive(Debug)]
struct Answer {
    store: Store<DiskFs>,
    commit: Commit,
    result: Result<(), JournalError>,
}

impl Committer {
    /// Starts the thread; it ends with the last clone of its committer.
    ///
    /// # Errors
    /// Where no thread can be had.
    pub fn start() -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        std::thread::Builder::new().name("journal".to_owned()).spawn(move || {
            let (mut volumes, mut together) = (Volumes::default(), Vec::new());
            while let Ok(first) = queue.recv() {
                together.push(first);
                together.extend(queue.try_iter().take(MAX_TOGETHER - 1));
                commit_all(&mut together, &mut volumes);
                together.drain(..).for_each(Job::answer);
            }
        })?;
        Ok(Self { jobs })
    }
}

impl Job {
    /// Takes a step, unless an earlier one failed. Gives how many files are to be synced.
    fn step(&mut self, step: impl FnOnce(&mut Store<DiskFs>, &Commit) -> Result<usize, JournalError>) -> usize {
        if self.result.is_err() {
            return 0;
        }
        let done = step(&mut self.store, &self.commit);
        self.result = done.as_ref().map(|_| ()).map_err(Clone::clone);
        done.unwrap_or(0)
    }

    /// How many files it writes at most: its segment, and each of its logs.
    fn files(&self) -> usize {
        self.commit.logs.len() + 1
    }

    fn answer(mut self) {
        if self.result.is_ok() {
            let durable = self.store.finish(&self.commit);
            self.durable.send_replace(durable);
        }
        let Self { store, commit, result, done, .. } = self;
        // A driver that is gone does not want to know.
        let _ = done.send(Answer { store, commit, result });
    }
}

/// All steps of some commits: each step for all of them before the next.
fn commit_all(jobs: &mut [Job], volumes: &mut Volumes) {
    let shares = jobs.iter().map(Job::files).sum::<usize>() >= SYNC_ALL_FROM;
    let devices: Vec<Option<u64>> =
        jobs.iter().map(|job| if shares { volumes.open(job.store.fs()) } else { None }).collect();
    let steps: [(Step, Sync); 2] = [(Store::prepare, Store::barrier), (Store::write, Store::sync)];
    for (step, sync) in steps {
        let mut unsynced = Vec::new();
        for (job, device) in jobs.iter_mut().zip(&devices) {
            unsynced.push(job.step(step));
            if device.is_some() {
                // They are too many to be kept open.
                job.store.fs_mut().close();
            }
        }
        volumes.sync(&devices, &mut unsynced);
        for (job, _) in jobs.iter_mut().zip(unsynced).filter(|(_, files)| *files > 0) {
            job.step(|store, commit| sync(store, commit).map(|()| 0));
        }
    }
    for job in jobs {
        job.store.fs_mut().close();
    }
}

type Step = fn(&mut Store<DiskFs>, &Commit) -> Result<usize, JournalError>;
type Sync = fn(&mut Store<DiskFs>, &Commit) -> Result<(), JournalError>;

/// One descriptor for each file system, kept: the kernel tells a write that failed to every descriptor that was open then.
#[derive(Default)]
struct Volumes(BTreeMap<u64, File>);

impl Volumes {
    /// Which file system a store is on, with a descriptor of it that is older than what is going to be written.
    fn open(&mut self, fs: &DiskFs) -> Option<u64> {
        let device = fs.device().ok()?;
        if let Entry::Vacant(vacant) = self.0.entry(device) {
            vacant.insert(fs.folder().ok()?);
        }
        Some(device)
    }

    /// Syncs those file systems on which enough files are unsynced. Where that fails, the kernel still knows which file it was: each is
    /// then synced by itself, and the one whose bytes are lost says so.
    fn sync(&self, devices: &[Option<u64>], unsynced: &mut [usize]) {
        for (device, folder) in &self.0 {
            let here: Vec<&mut usize> = devices
                .iter()
                .zip(&mut *unsynced)
                .filter(|(on, _)| **on == Some(*device))
                .map(|(_, files)| files)
                .collect();
            let files: usize = here.iter().map(|files| **files).sum();
            if files >= SYNC_ALL_FROM && rustix::fs::syncfs(folder).is_ok() {
                for unsynced in here {
                    *unsynced = 0;
                }
            }
        }
    }
}

/// The journal of one runtime, written through a [`Committer`].
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    /// Away while a commit is under way.
    store: Option<Store<DiskFs>>,
    in_flight: Option<oneshot::Receiver<Answer>>,
    committer: Committer,
    durable: Arc<watch::Sender<Durable>>,
    lock: Option<Arc<RuntimeLock>>,
}

impl Writer {
    /// Opens the journal in `folder`, or begins one. The caller holds the runtime's lock, and settles the journal before it
    /// acts on what it says.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open(folder: &Path, runtime_id: &str, committer: Committer) -> Result<(Self, View), JournalError> {
        let (store, view) = Store::open(DiskFs::new(folder), runtime_id)?;
        // Nothing of it is published before it is known to be durable.
        let durable = if store.needs_sync() { Durable::default() } else { store.durable() };
        let durable = Arc::new(watch::channel(durable).0);
        let path = store.fs().path(FIRST_SEGMENT);
        Ok((Self { path, store: Some(store), in_flight: None, committer, durable, lock: None }, view))
    }

    /// Takes the runtime's lock over, for as long as this journal lives or a write of it is under way.
    pub fn hold(&mut self, lock: RuntimeLock) {
        self.lock = Some(Arc::new(lock));
    }

    /// How far the journal is durable; changes with each commit.
    pub fn durable(&self) -> watch::Receiver<Durable> {
        self.durable.subscribe()
    }

    /// The files, while no commit is under way.
    pub fn store(&mut self) -> Option<&mut Store<DiskFs>> {
        self.store.as_mut()
    }

    /// Whether a commit is under way.
    pub fn is_committing(&self) -> bool {
        self.in_flight.is_some()
    }

    /// Hands a commit to the thread. An empty one makes what was recovered durable.
    ///
    /// # Errors
    /// Where the thread is gone.
    ///
    /// # Panics
    /// Where a commit is under way: the caller's order is wrong.
    pub fn start(&mut self, commit: Commit) -> Result<(), JournalError> {
        assert!(self.in_flight.is_none(), "one commit at a time");
        let Some(store) = self.store.take() else { return Err(self.thread_ended()) };
        let (done, answer) = oneshot::channel();
        let (lock, durable) = (self.lock.clone(), Arc::clone(&self.durable));
        let job = Job { store, commit, _lock: lock, durable, done, result: Ok(()) };
        self.committer.jobs.send(job).map_err(|_| self.thread_ended())?;
        self.in_flight = Some(answer);
        Ok(())
    }

    fn thread_ended(&self) -> JournalError {
        JournalError::io(&self.path, "handing records to the journal's thread")(io::Error::other("it ended"))
    }

    /// Waits for the commit under way, and gives its buffers back. Never ready where there is none. Cancelling loses
    /// nothing: the next call goes on waiting.
    ///
    /// # Errors
    /// As [`Store::commit`].
    pub async fn committed(&mut self) -> Result<Commit, JournalError> {
        let Some(answer) = &mut self.in_flight else { return std::future::pending().await };
        let answer = answer.await;
        self.in_flight = None;
        let Answer { store, commit, result } = answer.map_err(|_| self.thread_ended())?;
        self.store = Some(store);
        result.map(|()| commit)
    }

    /// Makes a commit durable.
    ///
    /// # Errors
    /// As [`Store::commit`].
    pub async fn commit(&mut self, commit: Commit) -> Result<Commit, JournalError> {
        if self.is_committing() {
            self.committed().await?;
        }
        self.start(commit)?;
        self.committed().await
    }

    /// Makes what was recovered durable, where a commit has not done that yet. Many that do this at once share one sync.
    ///
    /// # Errors
    /// As [`Store::commit`].
    pub async fn settle(&mut self) -> Result<(), JournalError> {
        self.commit(Commit::default()).await.map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use tempfile::TempDir;

    use super::*;
    use crate::clock::Now;
    use crate::journal::{LogBytes, Records};

    /// A commit to a journal of its own.
    fn job(folder: &Path) -> Job {
        let (store, view) = Store::open(DiskFs::new(folder), "job-7").unwrap();
        let mut records = Records::new(view, 1 << 20, 0);
        records.begin("v1:aa".to_owned(), 0, Now::default());
        let commit = records.take_commit(false).unwrap();
        let (durable, done) = (Arc::new(watch::channel(Durable::default()).0), oneshot::channel().0);
        Job { store, commit, _lock: None, durable, done, result: Ok(()) }
    }

    #[test]
    fn many_share_a_sync_and_few_do_not() {
        for count in [SYNC_ALL_FROM - 1, SYNC_ALL_FROM] {
            let folders: Vec<_> = (0..count).map(|_| TempDir::new().unwrap()).collect();
            let mut jobs: Vec<_> = folders.iter().map(|folder| job(folder.path())).collect();
            let mut volumes = Volumes::default();
            commit_all(&mut jobs, &mut volumes);
            assert!(jobs.iter().all(|job| job.result.is_ok()));
            assert_eq!(volumes.0.len(), usize::from(count >= SYNC_ALL_FROM), "for {count}");
        }
    }

    /// A guest that writes a byte to each of its logs keeps nobody waiting for as many syncs.
    #[test]
    fn many_logs_of_one_share_a_sync_too() {
        let folder = TempDir::new().unwrap();
        let mut jobs = vec![job(folder.path())];
        let log = |file: usize| LogBytes { name: format!("1/logs/{file}.log"), offset: 0, bytes: b"x".to_vec() };
        jobs[0].commit.logs = (1..SYNC_ALL_FROM).map(log).collect();
        let mut volumes = Volumes::default();
        commit_all(&mut jobs, &mut volumes);
        assert!(jobs[0].result.is_ok() && folder.path().join("1/logs/15.log").exists());
        assert_eq!(volumes.0.len(), 1);
        let here = volumes.0.keys().next().copied();
        let mut unsynced = [SYNC_ALL_FROM - 1];
        volumes.sync(&[here], &mut unsynced);
        assert_eq!(unsynced, [SYNC_ALL_FROM - 1], "they are not enough");
        volumes.sync(&[here, here], &mut [SYNC_ALL_FROM - 1, 1]);
        let mut unsynced = [SYNC_ALL_FROM];
        volumes.sync(&[here], &mut unsynced);
        assert_eq!(unsynced, [0]);
    }

    /// Those that wait on one file system are enough, or each of them is synced by itself; nobody else is taken for synced.
    #[test]
    fn a_shared_sync_is_for_enough_on_one_file_system() {
        let folder = TempDir::new().unwrap();
        let mut volumes = Volumes::default();
        let here = volumes.open(&DiskFs::new(folder.path()));
        assert_eq!(here, Some(std::fs::metadata(folder.path()).unwrap().dev()));
        assert_eq!(volumes.open(&DiskFs::new(&folder.path().join("gone"))), None);
        for (wait, are_done, elsewhere) in [(SYNC_ALL_FROM, 0, 1), (SYNC_ALL_FROM - 1, 1, 1), (SYNC_ALL_FROM - 1, 0, 2)]
        {
            let (mut devices, mut unsynced) = (vec![here; wait + are_done], vec![1; wait]);
            devices.resize(wait + are_done + elsewhere, None);
            unsynced.resize(wait + are_done, 0);
            unsynced.resize(wait + are_done + elsewhere, 1);
            let left = |unsynced: &[usize]| unsynced.iter().filter(|files| **files > 0).count();
            volumes.sync(&devices, &mut unsynced);
            let expected = if wait >= SYNC_ALL_FROM { elsewhere } else { wait + elsewhere };
            assert_eq!(left(&unsynced), expected, "{wait} and {are_done} of {}", devices.len());
        }
    }
}
