//! What followers see, on a real disk.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;

use pika_cloud_common::State;
use tempfile::TempDir;

use super::views::status;
use super::*;
use crate::clock::HostClock;
use crate::journal::{Commit, Committer, DiskFs, Writer, read_view};

/// A writer with the records that go to it.
struct Written {
    writer: Writer,
    records: Records,
    clock: HostClock,
}

impl Written {
    async fn open(folder: &Path) -> Self {
        Self::bounded(folder, MIB).await
    }

    async fn bounded(folder: &Path, event_bytes: u64) -> Self {
        let (mut writer, view) = Writer::open(folder, RUNTIME, Committer::start().unwrap()).unwrap();
        writer.settle().await.unwrap();
        let records = Records::new(view, event_bytes, writer.durable().borrow().length);
        Self { writer, records, clock: HostClock::open().unwrap() }
    }

    fn host(&mut self, record: HostRecord) {
        self.records.host(record, self.clock.now());
    }

    fn state(&mut self, message: String) {
        self.host(HostRecord::State { state: State::Ready, message });
    }

    fn begin(&mut self) {
        self.records.begin("v1:aa".to_owned(), 0, self.clock.now());
    }

    fn take(&mut self) -> Commit {
        self.records.take_commit(false).unwrap_or_default()
    }

    async fn commit(&mut self) {
        let commit = self.take();
        let commit = self.writer.commit(commit).await.unwrap();
        self.records.recycle(commit);
    }
}

#[tokio::test]
async fn a_follower_gives_nothing_that_is_not_durable() {
    let folder = TempDir::new().unwrap();
    let mut journal = Written::open(folder.path()).await;
    let mut follower = Follower::new(folder.path(), Some(journal.writer.durable()));
    journal.begin();
    assert_eq!(follower.try_next().unwrap(), None);
    let commit = journal.take();
    // It is in the file, and yet nobody knows whether the disk has it.
    let store = journal.writer.store().unwrap();
    store.prepare(&commit).unwrap();
    store.write(&commit).unwrap();
    assert_eq!(follower.try_next().unwrap(), None);
    drop(journal);
    let mut journal = Written::open(folder.path()).await;
    let mut follower = Follower::new(folder.path(), Some(journal.writer.durable()));
    assert_eq!(follower.try_next().unwrap().unwrap().0.n, 0);
    assert_eq!(follower.try_next().unwrap(), None);
    journal.state("more".to_owned());
    journal.commit().await;
    drop(journal);
    assert_eq!(follower.next().await.unwrap().unwrap().0.n, 1);
    assert_eq!(follower.next().await.unwrap(), None, "the writer is gone");
}

/// Invariant 1: in another process nobody says what is durable. It is made so, once for what is there, or not given.
#[test]
fn a_follower_of_another_process_makes_durable_what_it_gives() {
    let folder = TempDir::new().unwrap();
    let mut journal = Journal::open(DiskFs::new(folder.path())).unwrap();
    small_life(&mut journal);
    let mut follower = Follower::new(folder.path(), None);
    while follower.try_next().unwrap().is_some() {}
    for _ in 0..3 {
        assert_eq!((follower.try_next().unwrap(), follower.fs().reader_syncs.0), (None, 1));
    }
    journal.host(finished());
    journal.commit().unwrap();
    assert!(follower.try_next().unwrap().is_some());
    assert_eq!(follower.fs().reader_syncs.0, 2);
    journal.records.segment_bytes = 1;
    // A segment of its own is begun, whose header is made durable with it.
    journal.host(finished());
    assert_eq!(journal.commit().unwrap().segment, 2);
    follower.fs().reader_syncs.1 = true;
    for _ in 0..2 {
        assert!(matches!(follower.try_next(), Err(JournalError::Io { .. })), "what may be lost is not given");
    }
    // As it stands.
    let view = read_view(folder.path()).unwrap();
    assert_eq!(&view, journal.view());
    let mut follower = Follower::unsynced(folder.path());
    while follower.try_next().unwrap().is_some() {}
    assert_eq!(follower.fs().reader_syncs.0, 0);
}

/// A journal may have grown to a gigabyte, of which the last of its segments says all.
#[test]
fn a_view_is_read_from_the_newest_snapshot_on() {
    let folder = TempDir::new().unwrap();
    let mut journal = Journal::bounded(DiskFs::new(folder.path()), 1 << 40).unwrap();
    small_life(&mut journal);
    journal.records.segment_bytes = 1;
    journal.begin();
    journal.commit().unwrap();
    assert!(folder.path().join("journal.2.jsonl").exists());
    // Whoever would read the first one, would read that it was edited.
    let mut bytes = bytes_of(folder.path());
    bytes.extend_from_slice(&sealed(r#"{"n":8,"at":"2026-01-31T12:00:00Z","mono":5,"inc":1,"host":{"what":"later"}"#));
    put(folder.path(), &bytes);
    assert!(follow_all(folder.path()).is_err());
    assert_eq!(&read_view(folder.path()).unwrap(), journal.view());
    // A later one that goes on without a snapshot is read too.
    let mut line = Vec::new();
    let stamp = format::Stamp { n: journal.view().next_n, now: now(99), inc: 2 };
    format::write_host(stamp, &finished(), &mut line);
    let header = format::write_header(RUNTIME, 3, journal.view().next_n, None);
    fs::write(folder.path().join("journal.3.jsonl"), [header, line].concat()).unwrap();
    assert!(read_view(folder.path()).unwrap().finished.is_some());
}

#[tokio::test]
async fn a_follower_gives_nothing_behind_what_is_durable() {
    let folder = TempDir::new().unwrap();
    let mut journal = Written::open(folder.path()).await;
    journal.begin();
    journal.commit().await;
    journal.state("not yet".to_owned());
    let commit = journal.take();
    journal.writer.store().unwrap().write(&commit).unwrap();
    let mut follower = Follower::new(folder.path(), Some(journal.writer.durable()));
    assert_eq!(follower.try_next().unwrap().unwrap().0.n, 0);
    assert_eq!(follower.try_next().unwrap(), None);
}

#[tokio::test]
async fn what_was_recovered_is_not_followed_before_it_is_settled() {
    let folder = TempDir::new().unwrap();
    let mut journal = Written::open(folder.path()).await;
    journal.begin();
    journal.commit().await;
    drop(journal);
    let (mut writer, view) = Writer::open(folder.path(), RUNTIME, Committer::start().unwrap()).unwrap();
    let mut follower = Follower::new(folder.path(), Some(writer.durable()));
    assert_eq!((view.next_n, follower.try_next().unwrap()), (1, None));
    writer.settle().await.unwrap();
    assert_eq!(follower.try_next().unwrap().unwrap().0.n, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn followers_get_every_record_once_and_in_order_over_all_segments() {
    const COUNT: u64 = 1500;
    let folder = TempDir::new().unwrap();
    // Nothing is removed.
    let mut journal = Written::bounded(folder.path(), 1 << 40).await;
    journal.records.segment_bytes = 20_000;
    let beside = Follower::new(folder.path(), Some(journal.writer.durable()));
    let elsewhere = Follower::new(folder.path(), None);
    let read = |mut follower: Follower| {
        tokio::spawn(async move {
            for n in 0..COUNT {
                let (record, line) = follower.next().await.unwrap().unwrap();
                assert_eq!(record.n, n);
                assert_eq!(format::read(line.as_bytes()).unwrap(), record);
                assert!(follower.take_base().is_none());
            }
            follower
        })
    };
    let (beside, elsewhere) = (read(beside), read(elsewhere));
    journal.begin();
    for n in 1..COUNT {
        journal.state("x".repeat(usize::try_from(n).unwrap()));
        if n % 7 == 0 {
            journal.commit().await;
        }
    }
    journal.commit().await;
    assert!(journal.writer.durable().borrow().segment > 10);
    let mut beside = beside.await.unwrap();
    assert_eq!(elsewhere.await.unwrap().try_next().unwrap(), None);
    assert_eq!(&read_view(folder.path()).unwrap(), journal.records.view());
    drop(journal);
    assert_eq!(beside.next().await.unwrap(), None, "the writer is gone");
}

/// Old segments are removed while somebody reads them: the next one begins with what they said.
#[tokio::test]
async fn a_follower_that_is_too_slow_goes_on_from_a_snapshot() {
    let folder = TempDir::new().unwrap();
    let mut journal = Written::bounded(folder.path(), 60_000).await;
    journal.records.segment_bytes = 20_000;
    journal.begin();
    journal.commit().await;
    let mut slow = Follower::new(folder.path(), None);
    let mut view = View::default();
    view.apply(&slow.try_next().unwrap().unwrap().0);
    for n in 1..200 {
        journal.state(format!("{n} {}", "x".repeat(1000)));
        journal.commit().await;
    }
    assert!(!folder.path().join(FILE_NAME).exists());
    let mut jumps = 0;
    while let Some((record, _)) = slow.try_next().unwrap() {
        if let Some(base) = slow.take_base() {
            (view, jumps) = (base, jumps + 1);
        }
        assert_eq!(record.n, view.next_n);
        view.apply(&record);
    }
    assert_eq!((&view, jumps), (journal.records.view(), 1));
    let found = Written::open(folder.path()).await;
    assert_eq!(found.records.view(), &view);
}

#[tokio::test]
async fn a_commit_that_was_written_twice_is_given_once() {
    let folder = TempDir::new().unwrap();
    let mut journal = Written::open(folder.path()).await;
    journal.begin();
    journal.commit().await;
    journal.state("twice".to_owned());
    let commit = journal.take();
    drop(journal);
    let mut disk = DiskFs::new(folder.path());
    disk.append(FILE_NAME, &commit.records).unwrap();
    let mut follower = Follower::new(folder.path(), None);
    assert_eq!(follower.try_next().unwrap().unwrap().0.n, 0);
    let header = format::write_header(RUNTIME, 2, commit.first_n, None);
    disk.append("journal.2.jsonl", &[header, commit.records].concat()).unwrap();
    assert_eq!(follower.try_next().unwrap().unwrap().0.n, 1);
    assert_eq!(follower.try_next().unwrap(), None);
    let mut journal = Written::open(folder.path()).await;
    journal.state("once".to_owned());
    journal.commit().await;
    assert_eq!(follower.try_next().unwrap().unwrap().0.n, 2);
    assert_eq!(follow_all(folder.path()).unwrap().len(), 3);
}

/// Also in another process, which cannot see whether the writer is gone.
#[tokio::test]
async fn a_follower_ends_with_its_runtime() {
    let folder = TempDir::new().unwrap();
    let mut journal = Written::open(folder.path()).await;
    journal.begin();
    journal.host(HostRecord::Finished { destroyed: true, restart_in_ms: Some(10) });
    journal.begin();
    journal.host(finished());
    journal.begin();
    journal.host(finished());
    journal.commit().await;
    for durable in [None, Some(journal.writer.durable())] {
        let mut follower = Follower::new(folder.path(), durable);
        for n in 0..6 {
            assert_eq!(follower.next().await.unwrap().unwrap().0.n, n, "what is there is given");
        }
        assert_eq!(follower.next().await.unwrap(), None);
        assert_eq!(follower.next().await.unwrap(), None);
    }
    journal.begin();
    journal.host(HostRecord::TakenOver { owner: "other".to_owned(), term: 2 });
    journal.commit().await;
    let mut follower = Follower::new(folder.path(), None);
    for _ in 0..8 {
        follower.next().await.unwrap().unwrap();
    }
    assert_eq!(follower.next().await.unwrap(), None);
}

#[tokio::test(start_paused = true)]
async fn a_follower_of_a_quiet_journal_looks_ever_less_often() {
    let folder = TempDir::new().unwrap();
    let mut follower = Follower::new(folder.path(), None);
    let began = tokio::time::Instant::now();
    let waits = tokio::time::timeout(Duration::from_secs(3600), follower.next());
    assert!(waits.await.is_err());
    assert!(began.elapsed() >= Duration::from_secs(3600));
    let quiet = follower.quiet_for().unwrap();
    assert!(quiet >= Duration::from_secs(3598), "{quiet:?}");
}

#[tokio::test(start_paused = true)]
async fn what_comes_soon_is_seen_soon() {
    let folder = TempDir::new().unwrap();
    let mut follower = Follower::new(folder.path(), None);
    let began = tokio::time::Instant::now();
    let comes = async {
        tokio::time::sleep(Duration::from_millis(220)).await;
        small_life(&mut Journal::open(DiskFs::new(folder.path())).unwrap());
    };
    let (next, ()) = tokio::join!(follower.next(), comes);
    assert_eq!((next.unwrap().unwrap().0.n, began.elapsed().as_millis() / 50), (0, 5));
}

/// A record longer than one read is given like any other.
#[tokio::test]
async fn long_records_are_followed() {
    let folder = TempDir::new().unwrap();
    let mut journal = Written::bounded(folder.path(), 1 << 30).await;
    journal.begin();
    journal.host(status(("x".repeat(1_500_000), 1.0)));
    assert_eq!(journal.records.view().bad_lines, 1, "3 MB are beyond a record");
    journal.host(status(("x".repeat(900_000), 1.0)));
    assert!(journal.records.view().status.is_some(), "1.8 MB are not");
    journal.host(finished());
    journal.commit().await;
    assert_eq!(follow_all(folder.path()).unwrap().len(), 4);
    assert_eq!(&read_view(folder.path()).unwrap(), journal.records.view());
}

fn line(n: u64, message: &str) -> Vec<u8> {
    let mut line = Vec::new();
    let record = HostRecord::State { state: State::Ready, message: message.to_owned() };
    format::write_host(format::Stamp { n, now: now(n), inc: 1 }, &record, &mut line);
    line
}

/// Whatever a writer that died left behind, the next one cuts it.
#[test]
fn what_stands_in_the_place_of_what_was_cut_is_given() {
    for left in [vec![0; 10_000], vec![b'x'; 3 * format::MAX_RECORD_BYTES / 2], b"torn\n".to_vec()] {
        let folder = TempDir::new().unwrap();
        let whole = [format::write_header(RUNTIME, 1, 0, None), line(0, "zeroth")].concat();
        put(folder.path(), &[&whole[..], &left].concat());
        let mut follower = Follower::new(folder.path(), None);
        assert_eq!(follower.try_next().unwrap().unwrap().0.n, 0);
        assert_eq!(follower.try_next().unwrap(), None);
        put(folder.path(), &[whole, line(1, "instead of it")].concat());
        assert_eq!(follower.try_next().unwrap().unwrap().0.n, 1);
    }
}

/// Another process may write to a segment and begin the next between a look at the one and a look for the other.
#[test]
fn a_segment_is_looked_at_once_more_before_it_is_left() {
    let folder = TempDir::new().unwrap();
    let mut disk = DiskFs::new(folder.path());
    put(folder.path(), &[format::write_header(RUNTIME, 1, 0, None), line(0, "zeroth")].concat());
    let mut follower = Follower::new(folder.path(), None);
    assert_eq!(follower.try_next().unwrap().unwrap().0.n, 0);
    assert_eq!(follower.try_next().unwrap(), None);
    disk.append(FILE_NAME, &line(1, "first")).unwrap();
    disk.append("journal.2.jsonl", &[format::write_header(RUNTIME, 2, 2, None), line(2, "second")].concat()).unwrap();
    assert!(follower.leave(None).unwrap());
    for n in 1..3 {
        assert_eq!(follower.try_next().unwrap().unwrap().0.n, n);
    }
}

#[test]
fn a_segment_that_cannot_be_read_is_not_taken_for_gone() {
    let folder = TempDir::new().unwrap();
    small_life(&mut Journal::open(DiskFs::new(folder.path())).unwrap());
    let mut follower = Follower::new(folder.path(), None);
    while follower.try_next().unwrap().is_some() {}
    fs::remove_file(folder.path().join(FILE_NAME)).unwrap();
    assert_eq!(follower.try_next().unwrap(), None, "it is gone");
    let mut follower = Follower::new(folder.path(), None);
    small_life(&mut Journal::open(DiskFs::new(folder.path())).unwrap());
    while follower.try_next().unwrap().is_some() {}
    fs::remove_file(folder.path().join(FILE_NAME)).unwrap();
    fs::create_dir(folder.path().join(FILE_NAME)).unwrap();
    assert!(matches!(follower.try_next(), Err(JournalError::Io { .. })));
}

#[test]
fn a_line_that_is_being_written_is_waited_for() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join(FILE_NAME);
    let mut follower = Follower::new(folder.path(), None);
    assert_eq!(follower.try_next().unwrap(), None, "there is no file yet");
    let mut file = File::create(&path).unwrap();
    let header = format::write_header(RUNTIME, 1, 0, None);
    file.write_all(&header[..30]).unwrap();
    assert_eq!(follower.try_next().unwrap(), None);
    file.write_all(&header[30..]).unwrap();
    let (zeroth, first) = (line(0, "zeroth"), line(1, "lost"));
    file.write_all(&zeroth).unwrap();
    file.write_all(&first[..20]).unwrap();
    assert_eq!(follower.try_next().unwrap().unwrap().0.n, 0);
    assert_eq!(follower.try_next().unwrap(), None);
    // The writer dies; the next one cuts the torn line and writes another in its place.
    file.set_len((header.len() + zeroth.len()) as u64).unwrap();
    let mut file = OpenOptions::new().append(true).open(&path).unwrap();
    file.write_all(&line(1, "instead of it")).unwrap();
    assert!(follower.try_next().unwrap().unwrap().1.contains("instead"));
    // A page that has not arrived reads as zeros.
    let second = line(2, "second");
    let at = fs::metadata(&path).unwrap().len();
    file.write_all(&vec![0; second.len() - 1]).unwrap();
    file.write_all(b"\n").unwrap();
    assert_eq!(follower.try_next().unwrap(), None);
    OpenOptions::new().write(true).open(&path).unwrap().write_all_at(&second, at).unwrap();
    assert_eq!(follower.try_next().unwrap().unwrap().0.n, 2);
}

#[tokio::test]
async fn what_stands_before_an_edited_line_is_given_first() {
    let folder = TempDir::new().unwrap();
    small_life(&mut Journal::open(DiskFs::new(folder.path())).unwrap());
    let mut bytes = bytes_of(folder.path());
    bytes.extend_from_slice(&sealed(r#"{"n":8,"at":"2026-01-31T12:00:00Z","mono":5,"inc":1,"host":{"what":"later"}"#));
    put(folder.path(), &bytes);
    let mut follower = Follower::new(folder.path(), None);
    for n in 0..8 {
        assert_eq!(follower.try_next().unwrap().unwrap().0.n, n);
    }
    assert!(matches!(follower.try_next(), Err(JournalError::Foreign { line: 10, .. })));
    assert!(matches!(follower.next().await, Err(JournalError::Foreign { line: 10, .. })));
}
