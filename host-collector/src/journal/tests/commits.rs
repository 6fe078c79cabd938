//! The committer, on a real disk.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use pika_cloud_common::State;
use tempfile::TempDir;

use super::*;
use crate::journal::{Committer, DiskFs, Writer};
use crate::state_dir::RuntimeFolder;

fn open(folder: &Path, committer: &Committer) -> (Writer, Records) {
    let (writer, view) = Writer::open(folder, RUNTIME, committer.clone()).unwrap();
    let filled = writer.durable().borrow().length;
    (writer, Records::new(view, MIB, filled))
}

/// More at once than one sync each is for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_journals_share_a_committer() {
    let committer = Committer::start().unwrap();
    let tasks: Vec<_> = (0..24)
        .map(|_| {
            let committer = committer.clone();
            tokio::spawn(async move {
                let folder = TempDir::new().unwrap();
                let (mut writer, mut records) = open(folder.path(), &committer);
                records.begin("v1:aa".to_owned(), 0, now(1));
                for seq in 1..40 {
                    records.host(HostRecord::Missing { after_seq: seq, count: 1 }, now(seq));
                    records.log("guest.log", b"line\n");
                    records.host(logs(seq * 5, seq * 5), now(seq));
                    let commit = writer.commit(records.take_commit(false).unwrap()).await.unwrap();
                    records.recycle(commit);
                    assert_eq!(writer.durable().borrow().length, bytes_of(folder.path()).len() as u64);
                }
                drop(writer);
                let (mut again, view) = Store::open(DiskFs::new(folder.path()), RUNTIME).unwrap();
                assert_eq!(&view, records.view());
                assert!(again.cut_logs(&view).unwrap().is_empty());
                assert_eq!(fs::read(folder.path().join("1/logs/guest.log")).unwrap().len(), 195);
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
}

#[tokio::test]
async fn records_may_be_added_while_a_commit_is_under_way() {
    let folder = TempDir::new().unwrap();
    let (mut writer, mut records) = open(folder.path(), &Committer::start().unwrap());
    records.begin("v1:aa".to_owned(), 0, now(1));
    writer.start(records.take_commit(false).unwrap()).unwrap();
    assert!(writer.is_committing());
    records.host(finished(), now(2));
    assert!(records.pending() > 0);
    writer.commit(records.take_commit(false).unwrap()).await.unwrap();
    assert!(!writer.is_committing() && records.take_commit(false).is_none());
    assert_eq!(follow_all(folder.path()).unwrap().len(), 2);
}

#[tokio::test]
async fn files_are_their_owners_alone_and_follow_no_link() {
    let folder = TempDir::new().unwrap();
    let (mut writer, mut records) = open(folder.path(), &Committer::start().unwrap());
    records.begin("v1:aa".to_owned(), 0, now(1));
    records.log("guest.log", b"x");
    writer.commit(records.take_commit(false).unwrap()).await.unwrap();
    let mode = |name: &str| fs::metadata(folder.path().join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!([mode(FILE_NAME), mode("1/logs/guest.log"), mode("1"), mode("1/logs")], [0o600, 0o600, 0o700, 0o700]);
    let elsewhere = folder.path().join("elsewhere");
    fs::write(&elsewhere, "not ours").unwrap();
    std::os::unix::fs::symlink(&elsewhere, folder.path().join("1/logs/link.log")).unwrap();
    records.log("link.log", b"x");
    assert!(writer.commit(records.take_commit(false).unwrap()).await.is_err());
    assert_eq!(fs::read(&elsewhere).unwrap(), b"not ours");
}

/// Invariant 6: whoever opens the journal next finds all that was written, and none to come.
#[tokio::test]
async fn the_lock_is_held_as_long_as_the_journal_lives() {
    let folder = TempDir::new().unwrap();
    let runtime = RuntimeFolder::new(folder.path(), RUNTIME);
    runtime.make().unwrap();
    let (mut writer, _) = open(runtime.path(), &Committer::start().unwrap());
    writer.hold(runtime.lock().unwrap().unwrap());
    assert!(runtime.lock().unwrap().is_err());
    drop(writer);
    assert!(runtime.lock().unwrap().is_ok());
}

#[tokio::test]
async fn room_is_taken_and_given_back_on_the_disk() {
    let folder = TempDir::new().unwrap();
    let (mut writer, mut records) = open(folder.path(), &Committer::start().unwrap());
    records.begin("v1:aa".to_owned(), 0, now(1));
    writer.commit(records.take_commit(false).unwrap()).await.unwrap();
    let probe = fs::File::create(folder.path().join("probe")).unwrap();
    if rustix::fs::fallocate(&probe, rustix::fs::FallocateFlags::KEEP_SIZE, 0, super::super::RESERVE).is_err() {
        eprintln!("skipped: the file system of {} reserves nothing", folder.path().display());
        return;
    }
    let allocated = || fs::metadata(folder.path().join(FILE_NAME)).unwrap().blocks() * 512;
    assert!(allocated() >= super::super::RESERVE, "{}", allocated());
    records.host(finished(), now(2));
    writer.commit(records.take_commit(true).unwrap()).await.unwrap();
    assert!(allocated() < super::super::RESERVE, "{}", allocated());
}

/// Ten thousand idle runtimes cost no descriptor for their journals.
#[tokio::test]
async fn no_descriptor_stays_open_between_commits() {
    let folder = TempDir::new().unwrap();
    let committer = Committer::start().unwrap();
    let mut writers = Vec::new();
    for number in 0..40 {
        let folder = folder.path().join(number.to_string());
        fs::create_dir(&folder).unwrap();
        let (mut writer, mut records) = open(&folder, &committer);
        records.begin("v1:aa".to_owned(), 0, now(1));
        writer.start(records.take_commit(false).unwrap()).unwrap();
        writers.push((writer, Follower::new(&folder, None)));
    }
    for (writer, follower) in &mut writers {
        writer.committed().await.unwrap();
        assert!(follower.try_next().unwrap().is_some() && follower.try_next().unwrap().is_none());
    }
    let open = fs::read_dir("/proc/self/fd").unwrap().filter_map(|fd| fs::read_link(fd.unwrap().path()).ok());
    let ours: Vec<_> = open.filter(|path| path.starts_with(folder.path())).collect();
    // One for the whole file system, where many wait.
    assert!(ours.len() <= 1, "{ours:?}");
}

/// The folder of the test below, in the process that it starts.
const FULL_FOLDER: &str = "PIKA_TEST_FULL_FOLDER";

/// Runs under a limit of file sizes, which the kernel enforces as it does a full disk: in the middle of a write.
#[tokio::test]
async fn full_disk_child() {
    let Some(folder) = std::env::var_os(FULL_FOLDER) else { return };
    let folder = Path::new(&folder);
    let (mut writer, mut records) = open(folder, &Committer::start().unwrap());
    let mut follower = Follower::new(folder, Some(writer.durable()));
    // What does not fit in one segment goes to the next, and one record that fits in none ends it.
    for round in 0..40 {
        let message = "x".repeat(1000);
        records.host(HostRecord::State { state: State::Ready, message }, now(round));
        writer.commit(records.take_commit(false).unwrap()).await.unwrap();
    }
    let durable = *writer.durable().borrow();
    assert!(durable.segment > 1, "{durable:?}");
    records.host(verdict(&"x".repeat(30_000)), now(50));
    let failed = writer.commit(records.take_commit(false).unwrap()).await.unwrap_err();
    assert!(matches!(failed, JournalError::Degraded { .. }), "{failed}");
    records.host(finished(), now(51));
    let again = writer.commit(records.take_commit(true).unwrap()).await.unwrap_err();
    assert_eq!((again.to_string(), *writer.durable().borrow()), (failed.to_string(), durable), "nothing is published");
    let mut seen = 0;
    while let Some((record, _)) = follower.try_next().unwrap() {
        assert_eq!(record.n, seen);
        seen += 1;
    }
    fs::write(folder.join("seen"), seen.to_string()).unwrap();
}

#[test]
fn a_write_that_fails_is_told_and_publishes_nothing() {
    let folder = TempDir::new().unwrap();
    let status = std::process::Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 48; exec \"$@\"", "sh"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "journal::tests::commits::full_disk_child", "--nocapture"])
        .env(FULL_FOLDER, folder.path())
        .stdout(std::process::Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    let seen = fs::read_to_string(folder.path().join("seen")).unwrap();
    let (_, view) = Store::open(DiskFs::new(folder.path()), RUNTIME).unwrap();
    assert_eq!((view.next_n.to_string(), seen.as_str()), (seen.clone(), "40"));
}
