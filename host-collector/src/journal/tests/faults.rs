//! Writes and syncs that fail, and disks that are full.

use std::io::ErrorKind;

use pika_cloud_common::limits::MAX_EVENT_BYTES;
use pika_cloud_common::verdict::Collection;
use pika_cloud_common::{RuntimeSpec, State};

use super::super::RESERVE;
use super::super::store::SPARE_ROOM;
use super::memory::Memory;
use super::*;

/// Whoever reads it learns what to do.
#[test]
fn a_failure_says_the_way_out() {
    for (kind, way_out) in [
        (ErrorKind::StorageFull, ": free some space there, then run the same command again"),
        (ErrorKind::QuotaExceeded, ": free some space there, then run the same command again"),
        (ErrorKind::PermissionDenied, ": name a writable folder with --state-dir"),
        (ErrorKind::ReadOnlyFilesystem, ": name a writable folder with --state-dir"),
        (ErrorKind::NotADirectory, ""),
    ] {
        let error = JournalError::io(Path::new("/s/journal.jsonl"), "reading the journal")(kind.into());
        assert_eq!(error.to_string(), format!("/s/journal.jsonl: reading the journal: {kind}{way_out}"));
    }
}

/// A life of one commit.
fn begun(disk: &Memory) -> Journal<Memory> {
    let mut journal = Journal::open(disk.clone()).unwrap();
    journal.begin();
    journal.host(stream("s-1", 0, Digest::EMPTY_STREAM));
    journal.commit().unwrap();
    disk.0.borrow_mut().calls.clear();
    journal
}

fn calls(disk: &Memory, start: &str) -> usize {
    disk.0.borrow().calls.iter().filter(|call| call.starts_with(start)).count()
}

#[test]
fn what_failed_goes_to_a_new_segment() {
    for fault in ["append journal.jsonl", "sync journal.jsonl", "reserve journal.jsonl"] {
        let disk = Memory::default();
        let mut journal = begun(&disk);
        // A commit of its own each time, so that all kinds of numbers stand at the border.
        for round in 0..3 {
            journal.event(&event(round + 1, "starting", ""));
            journal.commit().unwrap();
        }
        disk.0.borrow_mut().calls.clear();
        journal.records.host(verdict(&"x".repeat(40_000)), now(9));
        disk.fail(fault, 1, ErrorKind::Other);
        assert_eq!(journal.commit().unwrap().segment, 2, "{fault}");
        assert!(calls(&disk, fault) <= 1, "{fault} is not repeated");
        journal.event(&event(4, "ready", ""));
        assert_eq!(journal.commit().unwrap().segment, 2);
        assert_eq!(&Store::open(disk.clone(), RUNTIME).unwrap().1, journal.view(), "{fault}");
        disk.crash();
        let mut again = Journal::open(disk.clone()).unwrap();
        assert_eq!(again.view(), journal.view(), "{fault}");
        again.host(finished());
        again.commit().unwrap();
        disk.crash();
        assert_eq!(&Store::open(disk, RUNTIME).unwrap().1, again.view(), "{fault}");
    }
}

#[test]
fn what_fails_in_the_new_segment_too_degrades() {
    let second = ["append journal.2.jsonl", "sync journal.2.jsonl", "sync_folder journal.2.jsonl"];
    for second in second {
        let disk = Memory::default();
        let mut journal = begun(&disk);
        let before = journal.view().clone();
        journal.host(finished());
        disk.fail("sync journal.jsonl", 1, ErrorKind::Other);
        disk.fail(second, 1, ErrorKind::Other);
        let error = journal.commit().unwrap_err();
        assert!(matches!(error, JournalError::Degraded { .. }), "{error}");
        let text = error.to_string();
        assert!(text.starts_with(FILE_NAME) && text.contains("run the same command again"), "{text}");
        let made = disk.0.borrow().calls.len();
        for _ in 0..2 {
            journal.host(finished());
            assert_eq!(journal.commit_as(true).unwrap_err().to_string(), error.to_string());
        }
        assert_eq!(disk.0.borrow().calls.len(), made, "nothing is tried any more");
        // The kernel's memory shows no record that the disk does not have.
        assert_eq!(Store::open(disk.clone(), RUNTIME).unwrap().1, before, "{second}");
        disk.crash();
        assert_eq!(Store::open(disk, RUNTIME).unwrap().1, before);
    }
}

#[test]
fn a_segment_that_cannot_be_begun_is_begun_under_another_number() {
    for fault in ["append journal.2.jsonl", "sync journal.2.jsonl", "sync_folder journal.2.jsonl"] {
        let disk = Memory::default();
        let mut journal = begun(&disk);
        journal.records.segment_bytes = 1;
        journal.host(finished());
        disk.fail(fault, 1, ErrorKind::Other);
        assert_eq!(journal.commit().unwrap().segment, 3, "{fault}");
        assert_eq!(disk.length("journal.2.jsonl").unwrap(), None, "{fault}: its header may be lost");
        journal.records.segment_bytes = MIB;
        journal.host(finished());
        journal.commit().unwrap();
        assert_eq!(&Store::open(disk.clone(), RUNTIME).unwrap().1, journal.view(), "{fault}");
        disk.crash();
        assert_eq!(&Store::open(disk, RUNTIME).unwrap().1, journal.view(), "{fault}");
    }
}

/// What an earlier collector wrote and never synced cannot be written again from here.
#[test]
fn what_was_recovered_and_cannot_be_synced_degrades() {
    let disk = Memory::default();
    begun(&disk);
    for settles in [true, false] {
        let (mut store, view) = Store::open(disk.clone(), RUNTIME).unwrap();
        let mut records = Records::new(view, MIB, store.filled());
        records.host(finished(), now(9));
        disk.fail("sync journal.jsonl", 1, ErrorKind::Other);
        let failed =
            if settles { store.settle() } else { store.commit(&records.take_commit(false).unwrap()).map(|_| ()) };
        assert!(matches!(failed, Err(JournalError::Degraded { .. })));
        assert!(store.needs_sync());
    }
}

/// Invariant 2: a full disk loses no verdict.
#[test]
fn a_full_disk_leaves_room_for_a_verdict() {
    let disk = Memory::default();
    let mut journal = begun(&disk);
    let room = disk.0.borrow().reserved[FILE_NAME];
    disk.0.borrow_mut().room = Some(room);
    let failed = loop {
        let restart = journal.view().clone();
        journal.host(HostRecord::BadLine { reason: "x".repeat(1000), sample: String::new() });
        if let Err(error) = journal.commit() {
            assert_eq!(Store::open(disk.clone(), RUNTIME).unwrap().1, restart);
            break error;
        }
    };
    let JournalError::Degraded { source, .. } = &failed else { panic!("{failed}") };
    assert_eq!(source.kind(), ErrorKind::StorageFull);
    // The next start finds it, whatever it writes before, and even where a segment would be due.
    let mut journal = Journal::open(disk.clone()).unwrap();
    journal.records.segment_bytes = 1;
    journal.host(verdict(&"x".repeat(5000)));
    journal.commit_as(true).unwrap();
    journal.host(HostRecord::Kept { for_secs: None });
    journal.commit_as(true).unwrap();
    journal.host(finished());
    journal.commit_as(true).unwrap();
    assert_eq!(disk.names(), [FILE_NAME]);
    disk.crash();
    let (_, view) = Store::open(disk.clone(), RUNTIME).unwrap();
    assert_eq!(&view, journal.view());
}

/// The longest that may lead to a verdict and come behind it, the guest's words and everybody else's, in every script and with
/// everything escaped. Invariants 2 and 5.
#[test]
fn the_longest_verdict_finds_room_on_a_full_disk() {
    let long = |text: &str| text.repeat(300_000 / text.len());
    let full = format!("[{}]", vec![format!("\"{}\"", r#"\""#.repeat(256)); 8].join(","));
    let head = format!(r#","details":{{"full":{full},"x":""#);
    let filler = "x".repeat(MAX_EVENT_BYTES - event(1, "failed", &format!("{head}\"}}")).len());
    let last_word = event(1, "failed", &format!("{head}{filler}\"}}"));
    assert_eq!(last_word.len(), MAX_EVENT_BYTES);
    for (text, speaks) in [("x", true), ("\u{1}", true), ("\"", false), ("\u{10348}", false)] {
        let disk = Memory::default();
        let mut journal = begun(&disk);
        let room = disk.0.borrow().reserved[FILE_NAME];
        disk.0.borrow_mut().room = Some(room);
        while journal.commit().is_ok() {
            journal.host(HostRecord::BadLine { reason: "x".repeat(1000), sample: String::new() });
        }
        let mut journal = Journal::open(disk.clone()).unwrap();
        let write = |journal: &mut Journal<Memory>, record| {
            journal.host(record);
            journal.commit_as(true).unwrap();
        };
        if speaks {
            journal.event(&last_word);
            journal.commit_as(true).unwrap();
        } else {
            write(&mut journal, HostRecord::Console { tail: text.repeat(4096) });
        }
        let outcome = Outcome::Failed { exit_code: Some(3) };
        let (message, error) = (long(text), Some(long(text)));
        let ended = HostRecord::Ended { outcome, message, error: error.clone(), instance_status: error.clone() };
        write(&mut journal, ended);
        let collection = Collection { error, ..Collection::default() };
        write(&mut journal, HostRecord::Collected { collection });
        let verdict = Box::new(crate::outputs::verdict(&RuntimeSpec::default(), journal.view()));
        assert_eq!(verdict.evidence.full.len(), if speaks { 8 } else { 0 });
        for record in [HostRecord::Verdict { verdict }, HostRecord::Kept { for_secs: Some(1) }, finished()] {
            write(&mut journal, record);
        }
        assert!(journal.store.filled() < RESERVE + SPARE_ROOM);
        disk.crash();
        assert_eq!(&Store::open(disk, RUNTIME).unwrap().1, journal.view(), "{text:?}");
    }
}

/// Invariant 5: what is quoted is cut between two characters, and says so.
#[test]
fn words_that_are_quoted_are_cut() {
    for text in ["x", "\u{1}", "é", "\u{10348}", "\n"] {
        let mut journal = begun(&Memory::default());
        let message = |length: usize| HostRecord::State { state: State::Booted, message: text.repeat(length) };
        journal.host(message(2048 / (serde_json::to_string(text).unwrap().len() - 2)));
        let end = journal.records.pending();
        journal.host(message(1_000_000));
        let line = journal.records.take_commit(false).unwrap().records;
        let whole = String::from_utf8(line[..end].to_vec()).unwrap();
        let cut = String::from_utf8(line[end..].to_vec()).unwrap();
        assert!(!whole.contains('…') && cut.contains("…\"") && cut.len() <= whole.len() + 8, "{text:?}");
    }
}

#[test]
fn where_little_room_is_left_what_is_needed_is_taken() {
    let disk = Memory::default();
    let mut journal = begun(&disk);
    let full = || verdict(&"x".repeat(40_000));
    journal.host(full());
    let end = journal.store.durable().length + journal.records.pending() as u64;
    disk.0.borrow_mut().room = Some(end + RESERVE);
    journal.commit().unwrap();
    assert_eq!(disk.0.borrow().reserved[FILE_NAME], end + RESERVE);
    journal.host(full());
    assert!(matches!(journal.commit(), Err(JournalError::Degraded { .. })));
}

#[test]
fn room_is_kept_while_a_runtime_lives_and_given_back_when_it_is_over() {
    let disk = Memory::default();
    let mut journal = begun(&disk);
    let reserves = calls(&disk, "reserve");
    for seq in 1..200 {
        journal.event(&event(seq, "starting", ""));
        let durable = journal.commit().unwrap();
        let room = disk.0.borrow().reserved[FILE_NAME];
        let least = durable.length + RESERVE;
        assert!((least..=least + SPARE_ROOM).contains(&room));
    }
    assert!(calls(&disk, "reserve") - reserves < 6, "not for every commit");
    journal.host(HostRecord::Finished { destroyed: true, restart_in_ms: Some(5) });
    journal.commit().unwrap();
    assert!(disk.0.borrow().reserved.contains_key(FILE_NAME), "another incarnation follows");
    journal.host(finished());
    journal.commit().unwrap();
    assert!(!disk.0.borrow().reserved.contains_key(FILE_NAME));
}

/// A log that cannot be synced takes the record that speaks of it down with it.
#[test]
fn a_record_is_not_written_before_its_logs_are_synced() {
    for fault in ["append 1/logs/guest.log", "sync 1/logs/guest.log", "sync_folder 1"] {
        let disk = Memory::default();
        let mut journal = begun(&disk);
        let before = disk.get(FILE_NAME);
        disk.fail(fault, 1, ErrorKind::Other);
        journal.records.log("guest.log", b"hello");
        journal.host(logs(5, 5));
        assert!(matches!(journal.commit(), Err(JournalError::Degraded { .. })), "{fault}");
        assert_eq!(disk.get(FILE_NAME), before);
    }
}

#[test]
fn log_bytes_stand_where_the_journal_says() {
    let disk = Memory::default();
    let mut journal = begun(&disk);
    disk.put("1/logs/guest.log", b"of a crash before the first mark");
    journal.records.log("guest.log", b"hel");
    journal.records.log("guest.log", b"lo");
    journal.host(logs(5, 5));
    journal.commit().unwrap();
    disk.crash();
    assert_eq!(disk.get("1/logs/guest.log"), b"hello");
    journal.records.log("guest.log", b" world");
    let commit = journal.records.take_commit(false).unwrap();
    journal.store.prepare(&commit).unwrap();
    assert_eq!(disk.get("1/logs/guest.log"), b"hello world");
    // The collector dies before the mark is written.
    let mut journal = Journal::open(disk.clone()).unwrap();
    let view = journal.view().clone();
    assert!(journal.store.cut_logs(&view).unwrap().is_empty());
    assert_eq!(disk.get("1/logs/guest.log"), b"hello");
    disk.put("1/logs/guest.log", b"he");
    let mut journal = Journal::open(disk.clone()).unwrap();
    assert_eq!(journal.store.cut_logs(&view).unwrap(), BTreeMap::from([("guest.log".to_owned(), 2)]));
    journal.records.log_found("guest.log", 2);
    journal.records.log("guest.log", b"[removed]");
    journal.commit().unwrap();
    assert_eq!(disk.get("1/logs/guest.log"), b"he[removed]");
}
