//! What is known live is what is known after a crash.

use pika_cloud_common::Command;
use pika_cloud_common::State;
use pika_cloud_common::verdict::Collection;
use pika_cloud_common::wire::{GuestMessage, Notice};
use proptest::prelude::*;

use super::memory::Memory;
use super::*;
use crate::journal::Moment;

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
        (text(), any::<i32>().prop_map(|number| f64::from(number) / 8.0)).prop_map(status),
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
        (any::<bool>(), prop::option::of(any::<u64>()))
            .prop_map(|(destroyed, restart_in_ms)| HostRecord::Finished { destroyed, restart_in_ms }),
        prop::option::of(any::<u64>()).prop_map(|for_secs| HostRecord::Kept { for_secs }),
        prop::sample::select(vec![Command::Cancel, Command::Stop, Command::Destroy])
            .prop_map(|command| HostRecord::Command { command }),
        "[ab]".prop_map(|boot_id| HostRecord::HostBoot { boot_id }),
        (text(), any::<u64>()).prop_map(|(owner, term)| HostRecord::TakenOver { owner, term }),
        any::<u64>().prop_map(|term| HostRecord::Term { term }),
        Just(HostRecord::InstanceStarting {}),
    ]
}

pub(super) fn status((message, number): (String, f64)) -> HostRecord {
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
        2 => Just(Op::Commit),
    ]
}

fn run(journal: &mut Journal<Memory>, op: Op) {
    let seq = journal.view().cursor.as_ref().map_or(0, |cursor| cursor.seq);
    match op {
        Op::Begin => journal.begin(),
        Op::Host(record) => journal.host(record),
        Op::Event { kind, details, gap, blank } => {
            let line = format!("{blank}{}{blank}", event(seq + 1 + gap, kind, details));
            journal.event(&line);
        }
        Op::Trim(count) => {
            let id = journal.view().cursor.as_ref().map_or("a".to_owned(), |cursor| cursor.stream_id.clone());
            journal.host(stream(&id, seq + count, Digest::of(b"trimmed")));
        }
        Op::Commit => {
            journal.commit().unwrap();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    /// Over segments whose oldest are removed: what a snapshot says is what all records say.
    #[test]
    fn a_live_view_is_the_recovered_one(ops in prop::collection::vec(op(), 1..60), segment_bytes in 200u64..4000) {
        let disk = Memory::default();
        let mut journal = Journal::bounded(disk.clone(), 6000).unwrap();
        journal.records.segment_bytes = segment_bytes;
        for op in ops {
            run(&mut journal, op);
        }
        journal.commit().unwrap();
        let (_, recovered) = Store::open(disk.clone(), RUNTIME).unwrap();
        assert_eq!(&recovered, journal.view());
        let mut folded = View::default();
        for record in records(&journal.lines) {
            folded.apply(&record);
        }
        assert_eq!(&folded, journal.view());
        disk.crash();
        let (_, recovered) = Store::open(disk, RUNTIME).unwrap();
        assert_eq!(recovered, folded);
    }
}

/// Invariant 5.
#[test]
fn all_segments_together_stay_within_their_bound() {
    let disk = Memory::default();
    let mut journal = Journal::bounded(disk.clone(), MIB).unwrap();
    journal.begin();
    journal.host(stream("s-1", 0, Digest::EMPTY_STREAM));
    let details = format!(r#","details":{{"progress":{{"name":"{}"}}}}"#, "x".repeat(1000));
    for seq in 1..6000 {
        journal.event(&event(seq, "starting", &details));
        if seq % 7 == 0 {
            journal.commit().unwrap();
            let total: usize = disk.0.borrow().files.values().map(Vec::len).sum();
            assert!(total as u64 <= MIB + MIB / 8 + RECORD_SLACK, "{total}");
        }
    }
    journal.commit().unwrap();
    assert!(disk.names().len() > 4 && !disk.names().contains(&FILE_NAME.to_owned()), "{:?}", disk.names());
    let (store, view) = Store::open(disk, RUNTIME).unwrap();
    assert_eq!((&view, store.durable()), (journal.view(), journal.store.durable()));
    assert_eq!(view.cursor.unwrap().seq, 5999);
}

/// Invariant 5, over collectors: what the last one left counts.
#[test]
fn the_bound_holds_over_collectors() {
    const BOUND: u64 = 100_000;
    let disk = Memory::default();
    for round in 0..40 {
        let mut journal = Journal::bounded(disk.clone(), BOUND).unwrap();
        journal.records.segment_bytes = 10_000;
        if round == 0 {
            journal.begin();
        }
        for _ in 0..10 {
            journal.host(HostRecord::BadLine { reason: "x".repeat(1000), sample: String::new() });
            journal.commit().unwrap();
        }
        let total: usize = disk.0.borrow().files.values().map(Vec::len).sum();
        assert!(total as u64 <= BOUND + RECORD_SLACK, "{total} in round {round}");
    }
    assert!(disk.names().len() > 5, "{:?}", disk.names());
}

/// As long as all together are not larger than the bound; and the newest two whatever they are.
#[test]
fn old_segments_stay_as_long_as_they_may() {
    let left = |event_bytes| {
        let disk = Memory::default();
        for _ in 0..4 {
            let mut journal = Journal::bounded(disk.clone(), event_bytes).unwrap();
            journal.records.segment_bytes = 1;
            journal.host(finished());
            journal.commit().unwrap();
        }
        let total = disk.0.borrow().files.values().map(|bytes| bytes.len() as u64).sum();
        (disk.names(), total)
    };
    let all = ["journal.2.jsonl", "journal.3.jsonl", "journal.4.jsonl", FILE_NAME];
    let (names, total): (_, u64) = left(u64::MAX);
    assert_eq!(names, all);
    assert_eq!(left(total).0, all);
    assert_eq!(left(total - 1).0, all[..3]);
    assert_eq!(left(0).0, all[1..3]);
}

/// The next collector does not fill a segment once more.
#[test]
fn a_segment_that_is_full_is_left() {
    let disk = Memory::default();
    small_life(&mut Journal::open(disk.clone()).unwrap());
    let filled = Store::open(disk.clone(), RUNTIME).unwrap().0.filled();
    let bytes = disk.get(FILE_NAME);
    let header = bytes.iter().position(|byte| *byte == b'\n').unwrap() + 1;
    assert_eq!(filled + header as u64, bytes.len() as u64);
    for (segment_bytes, segment) in [(filled + 1, 1), (filled, 2)] {
        let files = disk.0.borrow().files.clone();
        let mut journal = Journal::open(disk.clone()).unwrap();
        journal.records.segment_bytes = segment_bytes;
        journal.host(finished());
        assert_eq!(journal.commit().unwrap().segment, segment, "{segment_bytes}");
        disk.0.borrow_mut().files = files;
    }
}

/// Invariant 5: a segment that could not be left would grow for good. What no release of ours takes from a guest any more goes
/// with the segments that said it.
#[test]
fn a_view_that_is_too_large_goes_on_without_the_guests_documents() {
    let disk = Memory::default();
    let mut journal = Journal::bounded(disk.clone(), 1 << 40).unwrap();
    journal.begin();
    let large = "x".repeat(800_000);
    for document in [status((large.clone(), 1.0)), result(&large, 1), verdict("it failed")] {
        journal.host(document);
    }
    journal.commit().unwrap();
    journal.records.segment_bytes = 1;
    journal.host(finished());
    assert_eq!(journal.commit().unwrap().segment, 2);
    let view = Store::open(disk, RUNTIME).unwrap().1;
    assert_eq!(&view, journal.view());
    assert_eq!((view.status, view.result, view.verdict.unwrap().message.as_str()), (None, None, "it failed"));
}

/// A terminal event, nested as deep as a line may be, stands in a snapshot.
#[test]
fn no_event_of_a_guest_stops_the_rotation() {
    let disk = Memory::default();
    let mut journal = Journal::open(disk.clone()).unwrap();
    journal.begin();
    journal.host(stream("s-1", 0, Digest::EMPTY_STREAM));
    let nested = |depth| format!(r#","details":{}{}"#, "[".repeat(depth), "]".repeat(depth));
    let line = |depth| event(1, "failed", &nested(depth));
    let depth = (1..200).rev().find(|depth| EventHead::decode(line(*depth).as_bytes()).is_ok()).unwrap();
    journal.event(&line(depth));
    journal.commit().unwrap();
    journal.records.segment_bytes = 1;
    journal.host(finished());
    assert_eq!(journal.commit().unwrap().segment, 2, "{depth} deep");
    let view = Store::open(disk, RUNTIME).unwrap().1;
    assert_eq!(&view, journal.view());
    assert!(view.terminal.unwrap().details.is_some());
}

/// Records fill a segment, its header does not: a large view would begin one with every commit.
#[test]
fn a_large_view_is_not_written_with_every_commit() {
    let disk = Memory::default();
    let mut journal = Journal::bounded(disk.clone(), 0).unwrap();
    journal.begin();
    journal.host(status(("x".repeat(200_000), 1.0)));
    for _ in 0..3 {
        for _ in 0..3 {
            journal.host(HostRecord::InstanceStarting {});
            assert!(journal.commit().unwrap().segment <= 2);
        }
        let Journal { store, .. } = journal;
        assert!(store.filled() < 200_000 || store.durable().segment == 1);
        journal = Journal::bounded(disk.clone(), 0).unwrap();
    }
    assert_eq!(disk.names(), ["journal.2.jsonl", FILE_NAME]);
}

/// What one commit may add.
const RECORD_SLACK: u64 = 32 * 1024;

/// A guest may nest its documents as deep as the session's reader takes them; the journal stands around them.
#[test]
fn no_document_of_a_guest_makes_a_journal_unreadable() {
    let disk = Memory::default();
    let mut journal = Journal::open(disk.clone()).unwrap();
    journal.begin();
    let mut taken = 0;
    for depth in 100..130 {
        let nested = format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        let line = format!(
            r#"{{"status":{{"schema_version":1,"state":"ready","updated_at":"2026-01-31T12:00:00Z","message":"","details":{nested}}}}}"#
        );
        let Ok(GuestMessage::Status(status)) = GuestMessage::decode(line.as_bytes()) else { break };
        taken += 1;
        journal.host(HostRecord::Status { status: Box::new(status) });
        journal.commit().unwrap();
    }
    assert!(taken > 10);
    assert_eq!(journal.view().bad_lines, 1, "the deepest one is told as what it is");
    // And it stands in a snapshot.
    journal.records.segment_bytes = 1;
    journal.host(finished());
    assert_eq!(journal.commit().unwrap().segment, 2);
    assert_eq!(&Store::open(disk, RUNTIME).unwrap().1, journal.view());
}

#[test]
fn a_view_says_what_was_recorded() {
    let disk = Memory::default();
    small_life(&mut Journal::open(disk.clone()).unwrap());
    let bytes = disk.get(FILE_NAME);
    let mut journal = Journal::open(disk).unwrap();
    let view = journal.view();
    let sent = view.start_sent.as_ref().unwrap();
    assert_eq!((sent.request_id.as_str(), sent.stream_id.as_str()), ("job-7.1", "s-1"));
    assert_eq!((view.incarnation, view.accepted_at, &view.finished, view.term), (1, None, &None, 1));
    assert_eq!((view.state.as_ref(), view.last_event().unwrap().seq), (Some(&State::Failed), 3));
    assert_eq!(view.terminal.as_ref().unwrap().exit_code(), Some(3));
    assert_eq!((view.boot_id.as_deref(), view.agent.as_deref()), (Some("boot-1"), Some("0.1.0")));
    assert_eq!(view.progress_at.unwrap().mono, now(5).mono);
    let lines = records(&bytes).into_iter().filter_map(|record| match record.body {
        Body::Guest(line) => Some(line.get().len() as u64),
        Body::Host(_) => None,
    });
    assert_eq!(view.event_bytes, lines.sum::<u64>());
    journal.secs = 100;
    journal.host(HostRecord::Accepted { request_id: "job-7.1".to_owned() });
    journal.host(HostRecord::Notice { notice: Notice::Gap { first_seq: 9 } });
    journal.host(HostRecord::BadLine { reason: String::new(), sample: String::new() });
    journal.host(HostRecord::Notice {
        notice: Notice::BadLine { offset: 7, bytes: 9, reason: String::new(), sample: String::new() },
    });
    journal.host(HostRecord::Missing { after_seq: 3, count: 5 });
    for state in [State::Booted, State::Unreachable, State::Booted] {
        journal.host(HostRecord::State { state, message: String::new() });
    }
    for command in [Command::Cancel, Command::Destroy, Command::Stop] {
        journal.host(HostRecord::Command { command });
    }
    journal.host(HostRecord::Kept { for_secs: Some(9) });
    journal.host(HostRecord::Term { term: 4 });
    journal.host(HostRecord::HostBoot { boot_id: "h".to_owned() });
    journal.records.boot("h", now(120));
    journal.host(finished());
    let view = journal.view();
    assert_eq!((view.gaps, view.bad_lines, view.command), (6, 2, Some(Command::Destroy)));
    let secs = |moment: Moment| moment.mono.as_secs();
    assert_eq!(
        (secs(view.accepted_at.unwrap()), secs(view.booted_at.unwrap()), secs(view.kept.as_ref().unwrap().at)),
        (101, 106, 112)
    );
    assert_eq!((view.finished.as_ref().unwrap().at.boot, view.host_boots), (1, 1));
    assert!(!view.is_ready);
    let next_n = view.next_n;
    journal.records.begin("v1:bb".to_owned(), 3, now(200));
    let view = journal.view();
    assert_eq!((view.incarnation, view.next_n, view.state.as_ref()), (2, next_n + 1, Some(&State::Requested)));
    assert_eq!((&view.cursor, view.accepted_at, &view.verdict, view.gaps), (&None, None, &None, 0), "all else is new");
    assert_eq!((view.restarts, view.term, view.host_boots, view.command), (3, 4, 1, None));
    assert_eq!((view.spec_hash.as_deref(), secs(view.requested_at.unwrap())), (Some("v1:bb"), 200));
}

/// Progress changes no state, nor does a kind that the guest said before; its last word always does.
#[test]
fn a_state_is_what_the_guest_entered_last() {
    let progress = r#","details":{"progress":{"name":"a"}}"#;
    let mut journal = Journal::open(Memory::default()).unwrap();
    let mut says = |kind: &str, details: &str| {
        journal.begin();
        journal.host(stream("s-1", 0, Digest::EMPTY_STREAM));
        for (seq, (kind, details)) in (1..).zip([(kind, details), ("ready", "")]) {
            journal.event(&event(seq, kind, details));
            if seq == 1 {
                let view = journal.view();
                let first = (view.state.clone().unwrap(), view.terminal.is_some());
                journal.host(HostRecord::State { state: State::Booted, message: String::new() });
                if kind != "ready" {
                    return (first, None);
                }
            }
        }
        ((State::Ready, false), journal.view().state.clone())
    };
    assert_eq!(says("starting", "").0, (State::Starting, false));
    assert_eq!(says("starting", progress).0, (State::Requested, false));
    assert_eq!(says("failed", progress).0, (State::Failed, true));
    assert_eq!(says("ready", "").1, Some(State::Booted), "said again, it is no news");
}

/// Silence says nothing of the workload.
#[test]
fn a_guest_that_is_heard_again_is_where_it_was() {
    let mut journal = Journal::open(Memory::default()).unwrap();
    let enters = |state| HostRecord::State { state, message: String::new() };
    for (says, is) in [(Some("ready"), State::Ready), (None, State::Booted)] {
        journal.begin();
        journal.host(enters(State::Booted));
        journal.host(stream("s-1", 0, Digest::EMPTY_STREAM));
        if let Some(kind) = says {
            journal.event(&event(1, kind, ""));
        }
        journal.host(enters(State::Unreachable));
        assert_eq!(journal.view().state, Some(State::Unreachable));
        journal.host(enters(State::Booted));
        assert_eq!(journal.view().state, Some(is));
    }
    // Another stream is of another run, which has said nothing.
    journal.begin();
    journal.host(stream("s-1", 0, Digest::EMPTY_STREAM));
    journal.event(&event(1, "ready", ""));
    journal.host(enters(State::Unreachable));
    journal.host(stream("s-2", 0, Digest::EMPTY_STREAM));
    journal.host(enters(State::Booted));
    assert_eq!(journal.view().state, Some(State::Booted));
}

/// It is made or started once more: what was started before is gone.
#[test]
fn an_instance_that_is_provided_again_was_not_started() {
    let mut journal = Journal::open(Memory::default()).unwrap();
    journal.begin();
    let enters = |state| HostRecord::State { state, message: String::new() };
    for (record, is_started) in [
        (enters(State::Provisioning), false),
        (HostRecord::InstanceStarting {}, true),
        (enters(State::Booted), true),
        (enters(State::Provisioning), false),
    ] {
        journal.host(record);
        assert_eq!(journal.view().starting_at.is_some(), is_started);
    }
}

#[test]
fn a_take_over_ends_with_a_higher_term() {
    let mut journal = Journal::open(Memory::default()).unwrap();
    journal.begin();
    journal.host(HostRecord::TakenOver { owner: "other".to_owned(), term: 3 });
    for (term, is_taken) in [(2, true), (3, true), (4, false)] {
        journal.host(HostRecord::Term { term });
        assert_eq!(journal.view().taken_over.is_some(), is_taken, "in term {term}");
    }
}

/// Each by itself.
#[test]
fn a_runtime_is_settled_once_nothing_more_happens_by_itself() {
    for (record, is_settled) in [
        (HostRecord::Finished { destroyed: true, restart_in_ms: Some(5) }, false),
        (verdict("it failed"), false),
        (finished(), true),
        (HostRecord::Kept { for_secs: Some(9) }, true),
        (HostRecord::TakenOver { owner: "other".to_owned(), term: 2 }, true),
    ] {
        let mut journal = Journal::open(Memory::default()).unwrap();
        journal.begin();
        assert!(!journal.view().is_settled());
        journal.host(record);
        assert_eq!(journal.view().is_settled(), is_settled, "{:?}", journal.view());
    }
}

#[test]
fn a_new_stream_begins_its_logs_anew_and_a_trimmed_one_does_not() {
    let mut journal = Journal::open(Memory::default()).unwrap();
    journal.begin();
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

#[test]
fn progress_is_what_stands_in_the_details() {
    let mut journal = Journal::open(Memory::default()).unwrap();
    journal.begin();
    journal.host(stream("s-1", 0, Digest::EMPTY_STREAM));
    let mut seq = 0;
    let mut counts = |journal: &mut Journal<Memory>, details: &str| {
        seq += 1;
        journal.event(&event(seq, "ready", details));
        journal.view().progress_at.is_some_and(|at| at.mono.as_secs() == journal.secs)
    };
    for (details, is_progress) in [
        (r#","details":{"x":"progress"}"#, false),
        (r#","details":{"x":1,"progress":{"name":"a"}}"#, true),
        (r#","progress":{"name":"a"}"#, false),
        (r#","details":{"x":{"progress":1}}"#, false),
        (r#","details":{"progress":{"name":"a"}}"#, true),
    ] {
        assert_eq!(counts(&mut journal, details), is_progress, "{details}");
    }
    assert!(journal.view().is_ready);
}

/// A deadline goes on over a boot of the host, and over a clock that was set.
#[test]
fn how_long_ago_something_was() {
    let at = |mono, wall| Now { mono: Duration::from_secs(mono), wall: Duration::from_secs(wall) };
    let mut view = View::default();
    let mut records = Records::new(View::default(), MIB, 0);
    records.boot("first", at(1, 1000));
    records.host(HostRecord::InstanceStarting {}, at(100, 1100));
    let moment = records.view().starting_at.unwrap();
    records.view().clone_into(&mut view);
    assert_eq!(view.ago(&moment, at(160, 0)).as_secs(), 60, "the clock was set back, and nobody cares");
    assert_eq!(view.ago(&moment, at(160, 1 << 40)).as_secs(), 60);
    assert_eq!(view.ago(&moment, at(99, 1100)).as_secs(), 0);
    // Whoever only reads says which boot this is.
    assert_eq!(view.ago_in(&moment, "first", at(160, 0)).as_secs(), 60);
    assert_eq!(view.ago_in(&moment, "second", at(10, 1510)).as_secs(), 410);
    records.boot("second", at(5, 1500));
    view.clone_from(records.view());
    assert_eq!(view.ago(&moment, at(10, 1510)).as_secs(), 410);
    assert_eq!(view.ago(&moment, at(10, 900)).as_secs(), 10, "no less than this boot has lasted");
    assert_eq!(view.ago(&moment, at(10, 1 << 40)), Duration::from_secs(10 * 366 * 86_400));
}
