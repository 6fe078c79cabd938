//! What a crash, a disk and an editor can do to a journal, and what its followers see.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use pika_cloud_common::digest::Digest;
use pika_cloud_common::verdict::{Collection, Evidence, Outcome};
use pika_cloud_common::wire::{GuestMessage, Notice};
use pika_cloud_common::{EventHead, SCHEMA_VERSION, State, Timestamp, Verdict};
use proptest::prelude::*;
use tempfile::TempDir;

use super::format::{self, Body, HostRecord, LogMark, MAX_RECORD_BYTES};
use super::recover::recover;
use super::write::FILE_NAME;
use super::{Committer, Follower, Journal, JournalError, Record, View};

const RUNTIME: &str = "job-7";

fn committer() -> Committer {
    Committer::start().unwrap()
}

fn open(folder: &Path) -> Result<Journal, JournalError> {
    Journal::open(folder, RUNTIME, committer())
}

fn event(seq: u64, kind: &str, details: &str) -> String {
    format!(
        r#"{{"schema_version":1,"seq":{seq},"timestamp":"2026-01-31T12:00:00.000000Z","kind":"{kind}","message":"m{seq}"{details}}}"#
    )
}

/// As the driver does with what the session gives it.
fn add_event(journal: &mut Journal, line: &str) {
    let head = EventHead::decode(line.as_bytes()).unwrap();
    let cursor = journal.view().cursor.clone();
    let (seq, before) = cursor.map_or((0, Digest::EMPTY_STREAM), |cursor| (cursor.seq, cursor.digest));
    if head.seq > seq + 1 {
        journal.host(HostRecord::Missing { after_seq: seq, count: head.seq - seq - 1 });
    }
    let at = Timestamp::from_unix(1_800_000_000, 5);
    journal.guest(&at, &head, line.as_bytes(), before.chain(line.as_bytes()));
}

fn stream(stream_id: &str, after_seq: u64, digest: Digest) -> HostRecord {
    let (stream_id, boot_id, agent) = (stream_id.to_owned(), "boot-1".to_owned(), "0.1.0".to_owned());
    HostRecord::Stream { stream_id, boot_id, agent, after_seq, digest }
}

fn logs(guest: u64, host: u64) -> HostRecord {
    HostRecord::Logs { logs: BTreeMap::from([("guest.log".to_owned(), LogMark { guest, host })]) }
}

fn verdict(message: &str) -> HostRecord {
    HostRecord::Verdict {
        verdict: Box::new(Verdict {
            schema_version: SCHEMA_VERSION,
            runtime_id: RUNTIME.to_owned(),
            incarnation: 1,
            outcome: Outcome::Failed { exit_code: Some(3) },
            decided_at: Timestamp::from_unix(1, 2),
            message: message.to_owned(),
            evidence: Evidence::default(),
            extra: serde_json::Map::default(),
        }),
    }
}

/// A whole small life, committed in several steps; gives the durable length and the view after each.
async fn small_life(folder: &Path) -> Vec<(u64, View)> {
    let mut journal = open(folder).unwrap();
    let mut synced = Vec::new();
    let steps: [&dyn Fn(&mut Journal); 5] = [
        &|journal| journal.begin("v1:aa".to_owned()),
        &|journal| {
            journal.host(stream("s-1", 0, Digest::EMPTY_STREAM));
            journal.host(HostRecord::StartSent { request_id: "job-7.1".to_owned() });
        },
        &|journal| {
            add_event(journal, &event(1, "starting", ""));
            add_event(journal, &event(2, "starting", r#","details":{"progress":{"name":"compile €"}}"#));
            journal.host(logs(10, 10));
        },
        &|journal| add_event(journal, &event(3, "failed", r#","details":{"exit_code":3}"#)),
        &|journal| journal.host(verdict("it failed")),
    ];
    for step in steps {
        step(&mut journal);
        journal.commit().await.unwrap();
        synced.push((*journal.durable().borrow(), journal.view().clone()));
    }
    synced
}

fn bytes_of(folder: &Path) -> Vec<u8> {
    fs::read(folder.join(FILE_NAME)).unwrap()
}

fn put(folder: &Path, bytes: &[u8]) {
    fs::write(folder.join(FILE_NAME), bytes).unwrap();
}

/// How many whole lines there are.
fn lines_of(bytes: &[u8]) -> usize {
    bytes.split(|byte| *byte == b'\n').count() - 1
}

fn records(bytes: &[u8]) -> Vec<Record> {
    let lines = bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    lines.map(|line| format::read(line).unwrap()).collect()
}

/// The view after each number of records.
fn prefix_views(bytes: &[u8]) -> Vec<View> {
    let mut view = View::default();
    let mut views = vec![view.clone()];
    for record in records(bytes) {
        view.apply(&record);
        views.push(view.clone());
    }
    views
}

fn follow_all(folder: &Path) -> Result<Vec<Record>, JournalError> {
    let mut follower = Follower::new(folder, None);
    let mut records = Vec::new();
    while let Some((record, _)) = follower.try_next()? {
        records.push(record);
    }
    Ok(records)
}

// Format.

#[tokio::test]
async fn records_read_back_as_they_were_written() {
    let folder = TempDir::new().unwrap();
    small_life(folder.path()).await;
    let bytes = bytes_of(folder.path());
    let mut again = Vec::new();
    for record in records(&bytes) {
        match &record.body {
            Body::Guest(line) => {
                format::write_guest(record.n, &record.at, record.inc, line.get().as_bytes(), &mut again);
            }
            body => format::write_host(record.n, &record.at, record.inc, body, &mut again),
        }
        let line = serde_json::to_string(&record).unwrap();
        assert!(again.ends_with(b"\"}\n"), "{line}");
        assert!(String::from_utf8_lossy(&again).contains(line.strip_suffix('}').unwrap()), "{line}");
    }
    assert_eq!(again, bytes);
    assert!(records(&bytes).iter().map(|record| record.n).eq(0..9));
}

/// A writer of foreign images may end its lines with `\r\n`; the guest's digest is over all of the line.
#[tokio::test]
async fn blanks_around_an_event_are_kept() {
    let folder = TempDir::new().unwrap();
    let mut journal = open(folder.path()).unwrap();
    journal.begin("v1:aa".to_owned());
    journal.host(stream("s-1", 0, Digest::EMPTY_STREAM));
    let lines = [format!(" {}\t", event(1, "starting", "")), format!("{}\r", event(2, "ready", ""))];
    for line in &lines {
        add_event(&mut journal, line);
    }
    journal.commit().await.unwrap();
    let live = journal.view().clone();
    drop(journal);
    assert_eq!(open(folder.path()).unwrap().view(), &live);
    let kept = follow_all(folder.path()).unwrap().into_iter().filter_map(|record| match record.body {
        Body::Guest(event) => Some(event.get().to_owned()),
        _ => None,
    });
    assert!(kept.eq(lines));
}

#[test]
fn an_event_that_looks_like_a_record_stays_an_event() {
    let mut line = Vec::new();
    let details = r#","details":{"guest":{"crc":"00000000"},"host":{"what":"finished","destroyed":true}}"#;
    let event = event(1, "ready", details);
    format::write_guest(4, &Timestamp::from_unix(0, 0), 1, event.as_bytes(), &mut line);
    let record = format::read(line.strip_suffix(b"\n").unwrap()).unwrap();
    let Body::Guest(read) = record.body else { panic!("a guest record") };
    assert_eq!(read.get(), event);
}

// Crashes.

#[tokio::test]
async fn every_cut_gives_a_valid_prefix() {
    let folder = TempDir::new().unwrap();
    let synced = small_life(folder.path()).await;
    let bytes = bytes_of(folder.path());
    let views = prefix_views(&bytes);
    let committer = committer();
    for cut in 0..=bytes.len() {
        put(folder.path(), &bytes[..cut]);
        let mut journal = Journal::open(folder.path(), RUNTIME, committer.clone()).unwrap();
        let whole = lines_of(&bytes[..cut]);
        // Where nothing whole is left it begins anew, with its header.
        assert_eq!(journal.view(), &views[whole.max(1)], "cut at {cut}");
        let (kept, _) = synced.iter().rfind(|(length, _)| *length <= cut as u64).cloned().unwrap_or_default();
        assert!(*journal.durable().borrow() >= kept, "cut at {cut} lost what was synced");
        journal.host(HostRecord::Finished { destroyed: true });
        let live = journal.view().clone();
        if cut % 16 == 0 {
            journal.commit().await.unwrap();
            drop(journal);
            let again = Journal::open(folder.path(), RUNTIME, committer.clone()).unwrap();
            assert_eq!(again.view(), &live, "after a cut at {cut}");
        }
    }
}

#[tokio::test]
async fn zeros_behind_the_last_sync_are_cut() {
    for zeros in [1, 100, 4096, 3 * MAX_RECORD_BYTES] {
        let folder = TempDir::new().unwrap();
        let synced = small_life(folder.path()).await;
        let mut bytes = bytes_of(folder.path());
        bytes.resize(bytes.len() + zeros, 0);
        // The size may reach the disk before the data, and other data after a hole of it.
        bytes.extend_from_slice(b"}}\n{\"n\":");
        put(folder.path(), &bytes);
        let seen = follow_all(folder.path()).unwrap();
        assert_eq!(seen.len(), 9, "{zeros} zeros");
        let journal = open(folder.path()).unwrap();
        let (length, view) = synced.last().unwrap();
        assert_eq!((journal.view(), bytes_of(folder.path()).len() as u64), (view, *length));
    }
}

#[test]
fn a_crash_at_the_very_beginning_begins_anew() {
    for left in [&b""[..], b"{", b"\0\0\0\0", &[0; 4096], b"{\"n\":0,\"at\":\"2026\0\0\0\0\n", b"\n\n"] {
        let folder = TempDir::new().unwrap();
        put(folder.path(), left);
        let journal = open(folder.path()).unwrap();
        assert_eq!((journal.view().next_n, journal.view().incarnation), (1, 0), "{left:?}");
    }
}

/// Every bit of every byte: what is recovered is a prefix of what was written, or nothing is touched.
#[tokio::test]
async fn a_flipped_bit_never_makes_a_wrong_record() {
    let folder = TempDir::new().unwrap();
    small_life(folder.path()).await;
    let bytes = bytes_of(folder.path());
    let (views, written) = (prefix_views(&bytes), records(&bytes));
    let path = folder.path().join(FILE_NAME);
    let mut file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    for (at, byte) in bytes.iter().enumerate() {
        // All eight are flipped, though not all at each byte: that is a matter of the test's time.
        for bit in [at % 8, (at * 3 + 1) % 8] {
            file.write_all_at(&[byte ^ (1 << bit)], at as u64).unwrap();
            let line = lines_of(&bytes[..at]);
            match recover(&mut file, &path, RUNTIME) {
                Ok((view, valid)) => {
                    assert_eq!(view, views[usize::try_from(view.next_n).unwrap()], "bit {bit} of byte {at}");
                    // A digit of a checksum may change its case.
                    assert!(valid <= at as u64 || view == views[views.len() - 1], "bit {bit} of byte {at}");
                    assert!(view.next_n > 0, "bit {bit} of byte {at}: all was thrown away");
                }
                Err(JournalError::Damaged { .. } | JournalError::Version { .. }) => assert_eq!(line, 0),
                Err(error) => panic!("bit {bit} of byte {at}: {error}"),
            }
            if at % 3 > 0 {
                continue;
            }
            for record in follow_all(folder.path()).unwrap_or_default() {
                assert_eq!(record, written[usize::try_from(record.n).unwrap()], "bit {bit} of byte {at}");
            }
        }
        file.write_all_at(&[*byte], at as u64).unwrap();
    }
}

#[tokio::test]
async fn a_damaged_first_line_is_no_reason_to_forget_the_rest() {
    let folder = TempDir::new().unwrap();
    small_life(folder.path()).await;
    let mut bytes = bytes_of(folder.path());
    bytes[3] ^= 1;
    put(folder.path(), &bytes);
    let error = open(folder.path()).unwrap_err();
    assert!(matches!(error, JournalError::Damaged { .. }), "{error}");
    assert!(error.to_string().contains("backup"), "{error}");
    assert_eq!(bytes_of(folder.path()), bytes, "nothing is touched");
    let large = vec![b'x'; 5000];
    put(folder.path(), &large);
    assert!(matches!(open(folder.path()), Err(JournalError::Damaged { .. })));
    assert_eq!(bytes_of(folder.path()), large, "what is no journal is not emptied");
}

// Whose journal, and which version.

/// A header as another release might write it.
fn header(version: u32, runtime_id: &str) -> Vec<u8> {
    let mut line = Vec::new();
    let header = super::Header { version, runtime_id: runtime_id.to_owned() };
    format::write_host(0, &Timestamp::from_unix(0, 0), 0, &Body::Journal(header), &mut line);
    line
}

#[test]
fn another_version_is_refused_by_both_names() {
    let newer_form = b"{\"journal\":{\"version\":2,\"id\":\"job-7\"},\"sum\":\"blake3:77\"}\n".to_vec();
    for bytes in [header(2, RUNTIME), newer_form] {
        let folder = TempDir::new().unwrap();
        put(folder.path(), &bytes);
        for error in [open(folder.path()).unwrap_err(), follow_all(folder.path()).unwrap_err()] {
            assert!(matches!(error, JournalError::Version { found: 2, .. }), "{error}");
            assert!(error.to_string().contains("version 2, this build reads 1"), "{error}");
        }
        assert_eq!(bytes_of(folder.path()), bytes, "nothing is touched");
    }
}

#[test]
fn the_journal_of_another_runtime_is_refused() {
    let folder = TempDir::new().unwrap();
    put(folder.path(), &header(1, "job-8"));
    let error = open(folder.path()).unwrap_err();
    assert!(matches!(&error, JournalError::OtherRuntime { found, .. } if found == "job-8"), "{error}");
}

/// Edited by somebody who knows how to mend the checksum: told with its line, and never cut off.
#[tokio::test]
async fn lines_that_were_edited_are_told() {
    let folder = TempDir::new().unwrap();
    small_life(folder.path()).await;
    let whole = bytes_of(folder.path());
    let lines: Vec<&[u8]> = whole.split_inclusive(|byte| *byte == b'\n').collect();
    let at = Timestamp::from_unix(0, 0);
    let unknown = sealed(r#"{"n":3,"at":"2026-01-31T12:00:00Z","inc":1,"host":{"what":"rebooted"}"#);
    let twice =
        sealed(r#"{"n":3,"at":"2026-01-31T12:00:00Z","inc":1,"guest":{},"host":{"what":"finished","destroyed":true}"#);
    let shifted = sealed(r#"{"guest":{"seq":1},"n":3,"at":"2026-01-31T12:00:00Z","inc":1"#);
    let not_last = sealed(r#"{"n":3,"at":"2026-01-31T12:00:00Z","inc":1,"guest":{"seq":1},"more":1"#);
    let mut second_header = Vec::new();
    let body = Body::Journal(super::Header { version: 1, runtime_id: RUNTIME.to_owned() });
    format::write_host(3, &at, 0, &body, &mut second_header);
    let no_header = {
        let mut line = Vec::new();
        format::write_host(0, &at, 1, &Body::Host(HostRecord::Finished { destroyed: true }), &mut line);
        line
    };
    let cases: [(u64, Vec<&[u8]>); 7] = [
        (4, [&lines[..3], &[&unknown]].concat()),
        (4, [&lines[..3], &[&twice]].concat()),
        (4, [&lines[..3], &[&shifted]].concat()),
        (4, [&lines[..3], &[&not_last]].concat()),
        (4, [&lines[..3], &lines[4..]].concat()),
        (4, [&lines[..3], &[&second_header]].concat()),
        (1, vec![&no_header]),
    ];
    for (number, edited) in cases {
        let bytes = edited.concat();
        put(folder.path(), &bytes);
        for error in [open(folder.path()).unwrap_err(), follow_all(folder.path()).unwrap_err()] {
            assert!(matches!(error, JournalError::Foreign { line, .. } if line == number), "{error}");
        }
        assert_eq!(bytes_of(folder.path()), bytes, "nothing is touched");
    }
    // A line twice is out of order as well.
    put(folder.path(), &[lines[0], lines[1], lines[1]].concat());
    assert!(matches!(open(folder.path()), Err(JournalError::Foreign { line: 3, .. })));
}

fn sealed(content: &str) -> Vec<u8> {
    format!("{content},\"crc\":\"{:08x}\"}}\n", crc32fast::hash(content.as_bytes())).into_bytes()
}

// What is known live is what is known after a crash.

#[derive(Clone, Debug)]
enum Op {
    Begin,
    Host(HostRecord),
    Event {
        kind: &'static str,
        details: &'static str,
        gap: u64,
        blank: &'static str,
    },
    /// As a session does after a trim: the digest is the guest's own.
    Trim(u64),
    Dropped(u64),
    Commit,
}

fn host_record() -> impl Strategy<Value = HostRecord> {
    let text = || ".{0,12}";
    prop_oneof![
        (prop::sample::select(&State::KNOWN[..]), text())
            .prop_map(|(state, message)| HostRecord::State { state, message }),
        text().prop_map(|name| HostRecord::State { state: State::from_name(&name), message: name }),
        ("[ab]", 0u64..5).prop_map(|(id, seq)| stream(&id, seq, Digest::of(&[1]))),
        text().prop_map(|request_id| HostRecord::StartSent { request_id }),
        text().prop_map(|request_id| HostRecord::Accepted { request_id }),
        text().prop_map(|message| HostRecord::StartRefused { message }),
        prop::collection::btree_map("[a-c]\\.log", (0u64..1 << 53, any::<u64>()), 0..3).prop_map(|logs| {
            let mark = |(guest, host)| LogMark { guest, host };
            HostRecord::Logs { logs: logs.into_iter().map(|(name, both)| (name, mark(both))).collect() }
        }),
        (text(), text()).prop_map(|(reason, sample)| HostRecord::BadLine { reason, sample }),
        text().prop_map(|file| HostRecord::Notice { notice: Notice::LogGap { file, from: 1, to: 2 } }),
        Just(HostRecord::Notice { notice: Notice::Unknown }),
        (text(), any::<f64>().prop_filter("JSON has no others", |number| number.is_finite())).prop_map(status),
        (text(), any::<i32>()).prop_map(|(message, code)| result(&message, code)),
        (text(), prop::option::of(text())).prop_map(|(message, error)| HostRecord::Ended {
            outcome: Outcome::Completed { exit_code: Some(0) },
            message,
            error,
            instance_status: None,
        }),
        any::<bool>().prop_map(|complete| HostRecord::Collected {
            collection: Collection { complete, files: 3, ..Collection::default() }
        }),
        text().prop_map(|message| verdict(&message)),
        any::<bool>().prop_map(|destroyed| HostRecord::Finished { destroyed }),
    ]
}

fn status((message, number): (String, f64)) -> HostRecord {
    let text = serde_json::json!({
        "schema_version": 1, "state": "ready", "updated_at": "2026-01-31T12:00:00+02:00", "message": message,
        "details": {"z": number, "a": [null, u64::MAX, i64::MIN]}, "later": {"x": message},
    });
    HostRecord::Status { status: Box::new(serde_json::from_value(text).unwrap()) }
}

fn result(message: &str, exit_code: i32) -> HostRecord {
    let text = serde_json::json!({
        "schema_version": 1, "status": "failed", "finished_at": "2026-01-31T12:00:00Z", "message": message,
        "exit_code": exit_code,
    });
    HostRecord::Result { result: Box::new(serde_json::from_value(text).unwrap()) }
}

fn op() -> impl Strategy<Value = Op> {
    let kind = prop::sample::select(vec!["starting", "ready", "failed", "completed", "later", "booted"]);
    let details = prop::sample::select(vec![
        "",
        r#","details":{"progress":{"name":"a"}}"#,
        r#","details":{"exit_code":3,"x":1e15}"#,
        r#","boot_id":"b","more":[]"#,
    ]);
    prop_oneof![
        1 => Just(Op::Begin),
        6 => host_record().prop_map(Op::Host),
        8 => (kind, details, prop::sample::select(vec![0u64, 0, 0, 4]), prop::sample::select(vec!["", " ", "\r"]))
            .prop_map(|(kind, details, gap, blank)| Op::Event { kind, details, gap, blank }),
        1 => (1u64..9).prop_map(Op::Trim),
        1 => (1u64..9).prop_map(Op::Dropped),
        2 => Just(Op::Commit),
    ]
}

async fn run(journal: &mut Journal, op: Op) {
    let seq = journal.view().cursor.as_ref().map_or(0, |cursor| cursor.seq);
    match op {
        Op::Begin => journal.begin("v1:bb".to_owned()),
        Op::Host(record) => journal.host(record),
        Op::Event { kind, details, gap, blank } => {
            let line = format!("{blank}{}{blank}", event(seq + 1 + gap, kind, details));
            add_event(journal, &line);
        }
        Op::Trim(count) => {
            let id = journal.view().cursor.as_ref().map_or("a".to_owned(), |cursor| cursor.stream_id.clone());
            journal.host(stream(&id, seq + count, Digest::of(b"trimmed")));
        }
        Op::Dropped(count) => {
            journal.host(HostRecord::Dropped { seq: seq + count, digest: Digest::of(b"dropped"), count });
        }
        Op::Commit => journal.commit().await.unwrap(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_live_view_is_the_recovered_one(ops in prop::collection::vec(op(), 1..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let folder = TempDir::new().unwrap();
            let mut journal = open(folder.path()).unwrap();
            for op in ops {
                run(&mut journal, op).await;
            }
            journal.commit().await.unwrap();
            let live = journal.view().clone();
            drop(journal);
            assert_eq!(open(folder.path()).unwrap().view(), &live);
            let mut followed = View::default();
            follow_all(folder.path()).unwrap().iter().for_each(|record| followed.apply(record));
            assert_eq!(followed, live);
        });
    }
}

/// A guest may nest its documents as deep as the session's reader takes them; the journal stands around them.
#[tokio::test]
async fn no_document_of_a_guest_makes_a_journal_unreadable() {
    let folder = TempDir::new().unwrap();
    let mut journal = open(folder.path()).unwrap();
    journal.begin("v1:aa".to_owned());
    let mut taken = 0;
    for depth in 100..130 {
        let nested = format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        let line = format!(
            r#"{{"status":{{"schema_version":1,"state":"ready","updated_at":"2026-01-31T12:00:00Z","message":"","details":{nested}}}}}"#
        );
        let Ok(GuestMessage::Status(status)) = GuestMessage::decode(line.as_bytes()) else { break };
        taken += 1;
        journal.host(HostRecord::Status { status: Box::new(status) });
    }
    assert!(taken > 10);
    assert_eq!(journal.view().bad_lines, 1, "the deepest one is told as what it is");
    journal.commit().await.unwrap();
    let live = journal.view().clone();
    drop(journal);
    assert_eq!(open(folder.path()).unwrap().view(), &live);
}

#[tokio::test]
async fn a_view_says_what_was_recorded() {
    let folder = TempDir::new().unwrap();
    small_life(folder.path()).await;
    let mut journal = open(folder.path()).unwrap();
    let view = journal.view();
    let sent = view.start_sent.as_ref().unwrap();
    assert_eq!((sent.request_id.as_str(), sent.stream_id.as_str()), ("job-7.1", "s-1"));
    assert_eq!((view.incarnation, view.accepted, view.finished), (1, false, false));
    assert_eq!((view.state.as_ref(), view.last_event().unwrap().seq), (Some(&State::Failed), 3));
    assert_eq!(view.terminal.as_ref().unwrap().exit_code(), Some(3));
    assert_eq!((view.boot_id.as_deref(), view.agent.as_deref()), (Some("boot-1"), Some("0.1.0")));
    journal.host(HostRecord::Accepted { request_id: "job-7.1".to_owned() });
    journal.host(HostRecord::Notice { notice: Notice::Gap { first_seq: 9 } });
    journal.host(HostRecord::BadLine { reason: String::new(), sample: String::new() });
    journal.host(HostRecord::Missing { after_seq: 3, count: 5 });
    journal.host(HostRecord::Finished { destroyed: false });
    let view = journal.view();
    assert_eq!((view.accepted, view.gaps, view.bad_lines, view.finished), (true, 6, 1, true));
    journal.begin("v1:bb".to_owned());
    let view = journal.view();
    assert_eq!((view.incarnation, view.next_n, view.state.as_ref()), (2, 15, Some(&State::Requested)));
    assert_eq!((&view.cursor, view.accepted, &view.verdict, view.gaps), (&None, false, &None, 0), "all else is new");
}

#[tokio::test]
async fn a_new_stream_begins_its_logs_anew_and_a_trimmed_one_does_not() {
    let folder = TempDir::new().unwrap();
    let mut journal = open(folder.path()).unwrap();
    journal.begin("v1:aa".to_owned());
    journal.host(stream("s-1", 0, Digest::EMPTY_STREAM));
    journal.host(logs(10, 12));
    journal.host(stream("s-1", 7, Digest::of(b"x")));
    let cursor = journal.view().cursor.clone().unwrap();
    assert_eq!((cursor.seq, cursor.digest, cursor.logs["guest.log"]), (7, Digest::of(b"x"), 10));
    assert_eq!(journal.view().gaps, 7);
    journal.host(stream("s-2", 0, Digest::EMPTY_STREAM));
    assert!(journal.view().cursor.as_ref().unwrap().logs.is_empty());
    assert_eq!(journal.view().log_lengths["guest.log"], 12, "the host's file goes on");
}

// Followers.

#[tokio::test]
async fn a_follower_gives_nothing_that_is_not_durable() {
    let folder = TempDir::new().unwrap();
    let mut journal = open(folder.path()).unwrap();
    let mut follower = Follower::new(folder.path(), Some(journal.durable()));
    journal.begin("v1:aa".to_owned());
    assert_eq!(follower.try_next().unwrap(), None);
    journal.start_commit(Vec::new()).unwrap();
    // It is in the file long before this ends, and yet nobody knows whether the disk has it.
    while bytes_of(folder.path()).is_empty() {
        std::thread::yield_now();
    }
    assert_eq!(follower.try_next().unwrap(), None);
    journal.committed().await.unwrap();
    assert_eq!(follower.try_next().unwrap().unwrap().0.n, 0);
    assert_eq!(follower.try_next().unwrap().unwrap().0.n, 1);
    assert_eq!(follower.try_next().unwrap(), None);
    journal.host(HostRecord::Finished { destroyed: true });
    journal.commit().await.unwrap();
    drop(journal);
    assert_eq!(follower.next().await.unwrap().unwrap().0.n, 2);
    assert_eq!(follower.next().await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn followers_get_every_record_once_and_in_order() {
    const COUNT: u64 = 3000;
    let folder = TempDir::new().unwrap();
    let mut journal = open(folder.path()).unwrap();
    let beside = Follower::new(folder.path(), Some(journal.durable()));
    let elsewhere = Follower::new(folder.path(), None);
    let read = |mut follower: Follower| {
        tokio::spawn(async move {
            for n in 0..COUNT {
                let (record, line) = follower.next().await.unwrap().unwrap();
                assert_eq!(record.n, n);
                assert_eq!(format::read(line.as_bytes()).unwrap(), record);
            }
            follower
        })
    };
    let (beside, elsewhere) = (read(beside), read(elsewhere));
    journal.begin("v1:aa".to_owned());
    let mut at = 2;
    while at < COUNT {
        for _ in 0..(at % 7).min(COUNT - at) {
            journal.host(HostRecord::State { state: State::Ready, message: "x".repeat(usize::try_from(at).unwrap()) });
            at += 1;
        }
        if at % 7 == 0 && at < COUNT {
            journal.host(HostRecord::Finished { destroyed: false });
            at += 1;
        }
        journal.commit().await.unwrap();
    }
    let mut beside = beside.await.unwrap();
    assert_eq!(elsewhere.await.unwrap().try_next().unwrap(), None);
    drop(journal);
    assert_eq!(beside.next().await.unwrap(), None, "the writer is gone");
}

/// A record longer than one read is given like any other.
#[tokio::test]
async fn long_records_are_followed() {
    let folder = TempDir::new().unwrap();
    let mut journal = open(folder.path()).unwrap();
    journal.begin("v1:aa".to_owned());
    journal.host(status(("x".repeat(1_500_000), 1.0)));
    journal.host(HostRecord::Finished { destroyed: true });
    journal.commit().await.unwrap();
    assert_eq!(journal.view().bad_lines, 1, "3 MB are beyond a record");
    journal.host(status(("x".repeat(400_000), 1.0)));
    journal.host(HostRecord::Finished { destroyed: true });
    journal.commit().await.unwrap();
    assert_eq!(follow_all(folder.path()).unwrap().len(), 6);
    let mut follower = Follower::new(folder.path(), Some(journal.durable()));
    drop(journal);
    let mut count = 0;
    while follower.next().await.unwrap().is_some() {
        count += 1;
    }
    assert_eq!(count, 6);
}

#[test]
fn a_line_that_is_being_written_is_waited_for() {
    let folder = TempDir::new().unwrap();
    let line = |n| {
        let mut line = Vec::new();
        let body = match n {
            0 => Body::Journal(super::Header { version: 1, runtime_id: RUNTIME.to_owned() }),
            _ => Body::Host(HostRecord::State { state: State::Ready, message: format!("number {n}") }),
        };
        format::write_host(n, &Timestamp::from_unix(n, 0), 1, &body, &mut line);
        line
    };
    let path = folder.path().join(FILE_NAME);
    let mut follower = Follower::new(folder.path(), None);
    assert_eq!(follower.try_next().unwrap(), None, "there is no file yet");
    let mut file = File::create(&path).unwrap();
    let (zeroth, first) = (line(0), line(1));
    file.write_all(&zeroth).unwrap();
    file.write_all(&first[..20]).unwrap();
    assert_eq!(follower.try_next().unwrap().unwrap().0.n, 0);
    assert_eq!(follower.try_next().unwrap(), None);
    // The writer dies; the next one cuts the torn line and writes another in its place.
    file.set_len(zeroth.len() as u64).unwrap();
    let mut file = OpenOptions::new().append(true).open(&path).unwrap();
    let mut other = Vec::new();
    let body = Body::Host(HostRecord::Finished { destroyed: true });
    format::write_host(1, &Timestamp::from_unix(77, 0), 1, &body, &mut other);
    file.write_all(&other).unwrap();
    assert_eq!(follower.try_next().unwrap().unwrap().0.body, body);
    // A page that has not arrived reads as zeros.
    let second = line(2);
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
    small_life(folder.path()).await;
    let mut bytes = bytes_of(folder.path());
    bytes.extend_from_slice(&sealed(r#"{"n":9,"at":"2026-01-31T12:00:00Z","inc":1,"host":{"what":"later"}"#));
    put(folder.path(), &bytes);
    let mut follower = Follower::new(folder.path(), None);
    for n in 0..9 {
        assert_eq!(follower.try_next().unwrap().unwrap().0.n, n);
    }
    assert!(matches!(follower.try_next(), Err(JournalError::Foreign { line: 10, .. })));
    assert!(matches!(follower.next().await, Err(JournalError::Foreign { line: 10, .. })));
}

// Commits.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_journals_share_a_committer() {
    let committer = committer();
    let tasks: Vec<_> = (0..12)
        .map(|_| {
            let committer = committer.clone();
            tokio::spawn(async move {
                let folder = TempDir::new().unwrap();
                let mut journal = Journal::open(folder.path(), RUNTIME, committer).unwrap();
                journal.begin("v1:aa".to_owned());
                for seq in 1..40 {
                    journal.host(HostRecord::Missing { after_seq: seq, count: 1 });
                    journal.commit().await.unwrap();
                    assert_eq!(*journal.durable().borrow(), bytes_of(folder.path()).len() as u64);
                }
                let live = journal.view().clone();
                drop(journal);
                assert_eq!(open(folder.path()).unwrap().view(), &live);
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
    let mut journal = open(folder.path()).unwrap();
    journal.begin("v1:aa".to_owned());
    journal.start_commit(Vec::new()).unwrap();
    assert!(journal.is_committing());
    journal.host(HostRecord::Finished { destroyed: true });
    assert!(journal.pending() > 0);
    journal.commit().await.unwrap();
    assert_eq!((journal.pending(), journal.is_committing()), (0, false));
    assert_eq!(follow_all(folder.path()).unwrap().len(), 3);
}

/// A log that cannot be synced takes the record that speaks of it down with it.
#[tokio::test]
async fn a_record_is_not_written_before_its_logs_are_synced() {
    let folder = TempDir::new().unwrap();
    let mut journal = open(folder.path()).unwrap();
    journal.begin("v1:aa".to_owned());
    journal.commit().await.unwrap();
    let before = bytes_of(folder.path());
    let (pipe, _other) = rustix::pipe::pipe().unwrap();
    journal.host(logs(5, 5));
    journal.start_commit(vec![std::sync::Arc::new(File::from(pipe))]).unwrap();
    assert!(matches!(journal.committed().await, Err(JournalError::Io { .. })));
    assert_eq!(bytes_of(folder.path()), before);
    journal.host(HostRecord::Finished { destroyed: true });
    assert!(matches!(journal.commit().await, Err(JournalError::Degraded { .. })));
}

/// The folder of the test below, in the process that it starts.
const FULL_FOLDER: &str = "PIKA_TEST_FULL_FOLDER";

/// Runs under a limit of file sizes, which the kernel enforces as it does a full disk: in the middle of a write.
#[tokio::test]
async fn full_disk_child() {
    let Some(folder) = std::env::var_os(FULL_FOLDER) else { return };
    let mut journal = open(Path::new(&folder)).unwrap();
    journal.begin("v1:aa".to_owned());
    journal.commit().await.unwrap();
    let mut follower = Follower::new(Path::new(&folder), Some(journal.durable()));
    let failed = loop {
        let durable = *journal.durable().borrow();
        journal.host(HostRecord::State { state: State::Ready, message: "x".repeat(1000) });
        if let Err(error) = journal.commit().await {
            assert_eq!(*journal.durable().borrow(), durable, "nothing is published");
            break error;
        }
    };
    let JournalError::Io { source, .. } = &failed else { panic!("{failed}") };
    assert_eq!(source.kind(), std::io::ErrorKind::FileTooLarge, "{failed}");
    assert!(failed.to_string().contains("journal.jsonl"), "{failed}");
    for _ in 0..2 {
        journal.host(HostRecord::Finished { destroyed: true });
        let error = journal.commit().await.unwrap_err();
        assert!(matches!(error, JournalError::Degraded { .. }), "{error}");
        assert!(error.to_string().contains("start again"), "{error}");
    }
    let mut seen = 0;
    while let Some((record, _)) = follower.try_next().unwrap() {
        assert!(!matches!(record.body, Body::Host(HostRecord::Finished { .. })));
        seen += 1;
    }
    assert!(seen >= 3, "{seen}");
    fs::write(Path::new(&folder).join("seen"), seen.to_string()).unwrap();
}

#[test]
fn a_write_that_fails_is_told_and_publishes_nothing() {
    let folder = TempDir::new().unwrap();
    let status = std::process::Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 8; exec \"$@\"", "sh"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "journal::tests::full_disk_child", "--nocapture"])
        .env(FULL_FOLDER, folder.path())
        .stdout(std::process::Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    let seen: u64 = fs::read_to_string(folder.path().join("seen")).unwrap().parse().unwrap();
    assert_eq!(open(folder.path()).unwrap().view().next_n, seen, "the next start goes on behind what was published");
}
