//! What dies on the way: the collector, the agent's stream, the writers. Nothing is lost, nothing happens twice.

#![allow(
    clippy::format_collect,
    clippy::unwrap_used,
    reason = "a test fails by panicking, and reads better than it runs fast"
)]

use std::time::Duration;

use pika_cloud_tests::{Chance, Incus, Journal, Running, Spec, Stage, eventually, until};
use serde_json::Value;

/// A workload that notes each of its starts where the host can count them, and says a little all the time.
fn counted(steps: u32) -> String {
    format!(
        "echo started >> $PIKA_CLOUD_DIR/artifacts/starts
        i=0; while [ $i -lt {steps} ]; do i=$((i+1)); echo line $i; pika-guest progress step --message $i; sleep 0.1; done
        exit 7"
    )
}

/// Invariants 1, 2 and 9, of a job of [`counted`].
fn check_counted(stage: &Stage, spec: &Spec, steps: u32) {
    let outputs = stage.outputs(spec);
    assert_eq!(outputs.text("artifacts/starts"), "started\n", "the workload was started once");
    let journal = stage.journal(spec);
    let events = journal.events(1);
    let of_kind = |kind: &str| {
        let is = |event: &&&Value| event["kind"] == kind && event["details"].get("progress").is_none();
        events.iter().filter(is).count()
    };
    assert_eq!(of_kind("starting"), 1, "once in the guest's own words");
    assert_eq!(journal.check_events(1), u64::from(steps) + 2);
    let told: Vec<&str> = events
        .iter()
        .filter_map(|event| event["message"].as_str()?.parse::<u32>().ok().and(event["message"].as_str()))
        .collect();
    assert_eq!(told, (1..=steps).map(|i| i.to_string()).collect::<Vec<_>>());
    assert_eq!(
        outputs.log(),
        (1..=steps).map(|i| format!("line {i}\n")).collect::<String>(),
        "complete, without doubles"
    );
    assert_eq!(outputs.verdict()["verdict"], "failed");
    assert_eq!(outputs.verdict()["exit_code"], 7);
    assert_eq!(*journal.verdict(1), outputs.verdict());
    assert_eq!(journal.host("accepted").len(), 1);
    stage.check_nothing_left(spec);
}

/// Invariants 1, 2, 6 and 9.
#[test]
fn a_collector_killed_at_twenty_random_moments_goes_on() {
    const STEPS: u32 = 60;
    let mut chance = Chance::new("collector");
    let stage = Stage::new("killed");
    let spec = stage.spec(&counted(STEPS));
    let mut moments = Vec::new();
    for round in 0..20 {
        let running = stage.start(&spec);
        // The job takes about 8 s; the first rounds fall into its making, the last ones into its end and beyond.
        let moment = chance.up_to(Duration::from_millis(if round < 4 { 400 } else { 900 }));
        std::thread::sleep(moment);
        running.kill();
        moments.push(moment);
    }
    println!("killed after {moments:?}; then the journal held {} records", stage.journal(&spec).records.len());
    stage.run(&spec).expect(7);
    check_counted(&stage, &spec, STEPS);
}

/// Invariant 9: between asking for the start and hearing of it.
#[test]
fn a_collector_killed_while_it_starts_the_workload_starts_it_once() {
    let mut chance = Chance::new("start");
    let stage = Stage::new("between");
    let mut unheard = 0;
    for _ in 0..8 {
        let spec = stage.spec(&counted(2));
        let running = stage.start(&spec);
        // Not through `until`: each millisecond counts here.
        let began = std::time::Instant::now();
        while !journal_holds(&stage, &spec, b"\"start_sent\"") {
            assert!(began.elapsed() < Duration::from_secs(60), "it is never started");
            std::thread::yield_now();
        }
        std::thread::sleep(chance.up_to(Duration::from_millis(6)));
        running.kill();
        let journal = stage.journal(&spec);
        assert_eq!(journal.host("start_sent").len(), 1);
        unheard += usize::from(!journal.has("accepted"));
        stage.run(&spec).expect(7);
        check_counted(&stage, &spec, 2);
    }
    println!("of 8 collectors, {unheard} died before they knew that the workload had been started");
}

fn journal_holds(stage: &Stage, spec: &Spec, needle: &[u8]) -> bool {
    let bytes = std::fs::read(stage.runtime(spec).join("journal.jsonl")).unwrap_or_default();
    bytes.windows(needle.len()).any(|window| window == needle)
}

/// Invariants 2 and 7: the end is decided, and then its collector dies.
#[test]
fn a_collector_killed_while_it_ends_a_job_keeps_to_its_end() {
    let stage = Stage::new("ending");
    // Each of them a moment at which something is durable and the next thing is not.
    for what in ["ended", "collected", "verdict"] {
        let spec = stage.spec(&counted(1));
        let running = stage.start(&spec);
        let needle = format!("\"what\":\"{what}\"");
        let began = std::time::Instant::now();
        while !journal_holds(&stage, &spec, needle.as_bytes()) {
            assert!(began.elapsed() < Duration::from_secs(60), "no {what}");
            std::thread::yield_now();
        }
        running.kill();
        stage.run(&spec).expect(7);
        check_counted(&stage, &spec, 1);
        assert_eq!(stage.journal(&spec).host("ended").len(), 1, "after a death behind `{what}`");
    }
}

/// Invariants 4 and 7: whatever a collector that died was about to put in its place keeps nobody from going on.
#[test]
fn what_a_dead_collector_was_writing_is_in_nobodys_way() {
    let stage = Stage::new("debris");
    let spec =
        stage.spec(&format!("pika-guest ready; echo done > $PIKA_CLOUD_DIR/artifacts/done; {}; exit 3", Stage::gate()));
    let running = stage.start(&spec);
    stage.wait_ready(&spec);
    running.kill();
    // No machine has a process of that number.
    let outputs = stage.runtime(&spec).join("1");
    let debris = |name: &str| outputs.join(format!(".{name}.4194305.7.new"));
    std::fs::create_dir_all(debris("artifacts.partial").join("folder")).unwrap();
    std::fs::write(debris("artifacts.partial").join("folder/file"), "half").unwrap();
    std::fs::create_dir_all(outputs.join("artifacts.partial/folder")).unwrap();
    for file in ["artifacts.sha256", "events.jsonl", "verdict.json"] {
        std::fs::write(debris(file), "half").unwrap();
    }
    let again = stage.start(&spec);
    stage.open_gate(&spec);
    again.finish().expect(3);
    assert_eq!(stage.outputs(&spec).artifacts(), ["done"]);
    let left: Vec<_> = std::fs::read_dir(&outputs).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    let is_debris = |name: &std::ffi::OsString| name.to_string_lossy().starts_with('.') || name == "artifacts.partial";
    assert!(!left.iter().any(is_debris), "{left:?}");
    stage.check_nothing_left(&spec);
}

/// Invariant 1: the stream is a mirror; losing it loses nothing.
#[test]
fn a_killed_stream_is_resumed_without_a_hole() {
    const EVENTS: u64 = 20_000;
    let mut chance = Chance::new("stream");
    let stage = Stage::new("stream");
    let command = format!(
        "echo started >> $PIKA_CLOUD_DIR/artifacts/starts
        b=0; while [ $b -lt 100 ]; do
            i=0; while [ $i -lt {} ]; do echo \"{{\\\"kind\\\":\\\"progress\\\",\\\"name\\\":\\\"n\\\",\\\"message\\\":\\\"$((b*{0}+i+1))\\\"}}\"; i=$((i+1)); done | pika-guest emit || exit 9
            echo batch $b; b=$((b+1)); sleep 0.02
        done",
        EVENTS / 100
    );
    let spec = stage.spec(&command);
    let running = stage.start(&spec);
    stage.wait_event(&spec, "the first batch", |event| event["message"] == "1");
    let mut kills = 0;
    while !stage.journal(&spec).has("ended") && kills < 6 {
        std::thread::sleep(chance.up_to(Duration::from_millis(700)));
        // By its name in the guest, as an out-of-memory killer would hit it: the supervisor is left alone.
        let killed = Incus.exec(&spec.instance, "for p in $(pidof pika-guest exe); do tr '\\0' ' ' < /proc/$p/cmdline | grep -q '^pika-guest stream' && kill -9 $p && echo killed; done; true");
        kills += usize::from(String::from_utf8_lossy(&killed.stdout).contains("killed"));
    }
    assert!(kills >= 2, "the stream was killed {kills} times only");
    println!("killed the stream {kills} times");
    running.finish().expect(0);
    let journal = stage.journal(&spec);
    assert_eq!(journal.check_events(1), EVENTS + 2);
    let messages: Vec<u64> =
        journal.events(1).iter().filter_map(|event| event["message"].as_str()?.parse().ok()).collect();
    assert!(messages.iter().copied().eq(1..=EVENTS), "each once, in order");
    let outputs = stage.outputs(&spec);
    assert_eq!(outputs.text("artifacts/starts"), "started\n");
    assert_eq!(outputs.log(), (0..100).map(|b| format!("batch {b}\n")).collect::<String>());
    assert_eq!(outputs.verdict()["verdict"], "completed");
    assert_eq!(journal.host("accepted").len(), 1);
    stage.check_nothing_left(&spec);
}

/// `ensure` returns once the workload runs; `run` takes it over and ends it.
#[test]
fn a_runtime_that_was_ensured_is_taken_over() {
    let stage = Stage::new("ensured");
    let spec = stage.spec(&format!("echo started >> $PIKA_CLOUD_DIR/artifacts/starts; {}; exit 7", Stage::gate()));
    let file = stage.write(&spec).display().to_string();
    stage.call(&["ensure", &file]).expect(0).saying(&["was started"]);
    stage.call(&["ensure", &file]).expect(0).saying(&["was running already"]);
    let running = stage.start(&spec);
    stage.open_gate(&spec);
    running.finish().expect(7);
    assert_eq!(stage.outputs(&spec).text("artifacts/starts"), "started\n");
    stage.check_nothing_left(&spec);
    stage.call(&["ensure", &file]).expect(0).saying(&["has ended"]);
    assert!(!stage.has_instance(&spec));
}

/// However much there is to write down.
#[test]
fn a_workload_that_never_stops_talking_is_ensured() {
    let stage = Stage::new("chatty");
    let command = "yes 'a line of some length, so that there is always more of it' &
        while :; do echo '{\"kind\":\"progress\",\"name\":\"n\"}'; done | pika-guest emit";
    let spec = stage.spec(command);
    let file = stage.write(&spec).display().to_string();
    let ensured = Running::start(&mut stage.cloud(&["ensure", &file]));
    ensured.finish_within(Duration::from_secs(20)).expect(0).saying(&["was started"]);
    stage.call(&["destroy", &spec.id]).expect(0);
    stage.check_nothing_left(&spec);
}

/// A job that ended while nobody looked is found ended, with all that it left.
#[test]
fn a_job_that_ended_unseen_is_collected_later() {
    let stage = Stage::new("unseen");
    let spec = stage.spec(&format!("{}; echo late; echo late > $PIKA_CLOUD_DIR/artifacts/late; exit 7", Stage::gate()));
    let running = stage.start(&spec);
    stage.wait_record(&spec, "accepted", |record| record["host"]["what"] == "accepted");
    running.kill();
    stage.open_gate(&spec);
    eventually("the workload has ended", || {
        Incus.exec_ok(&spec.instance, "cat /run/pika-cloud/status.json").contains("\"failed\"")
    });
    assert!(!stage.journal(&spec).has("ended"));
    stage.run(&spec).expect(7);
    let outputs = stage.outputs(&spec);
    assert_eq!(outputs.log(), "late\n");
    assert_eq!(outputs.artifacts(), ["late"]);
    assert_eq!(stage.journal(&spec).check_events(1), 2);
    stage.check_nothing_left(&spec);
}

/// Invariant 3: a deadline that passed while no collector ran counts at the next start, as soon as the guest was
/// heard.
#[test]
fn a_deadline_that_passed_unwatched_ends_the_job_at_once() {
    let stage = Stage::new("overdue");
    // The guest cannot enforce it: its supervisor is stopped.
    let spec = stage.spec("pika-guest ready; kill -STOP $PPID; sleep 1000");
    let spec = spec.with("watchdogs.run_secs", 1).with("watchdogs.stop_grace_secs", 0).as_root();
    let spec = spec.with("watchdogs.collect_secs", 5);
    let running = stage.start(&spec);
    stage.wait_ready(&spec);
    running.kill();
    let started = stage.journal(&spec).host("start_sent").len();
    assert_eq!(started, 1);
    // The host's own deadline is run_secs, the grace and 5 s.
    std::thread::sleep(Duration::from_secs(6));
    let running = stage.start(&spec);
    until("the end is decided", Duration::from_secs(3), || stage.journal(&spec).has("ended").then_some(()));
    running.finish().expect(124);
    assert_eq!(stage.outputs(&spec).verdict()["verdict"], "timed_out");
    stage.check_nothing_left(&spec);
}

/// A journal cut at any byte, as a crash of the machine may leave it, is a prefix that a run goes on from.
#[test]
fn a_journal_with_a_torn_end_goes_on() {
    let mut chance = Chance::new("torn");
    let stage = Stage::new("torn");
    let spec = stage.spec(&format!(
        "echo started >> $PIKA_CLOUD_DIR/artifacts/starts; pika-guest ready; {}; exit 7",
        Stage::gate()
    ));
    let running = stage.start(&spec);
    stage.wait_ready(&spec);
    running.kill();
    let path = stage.runtime(&spec).join("journal.jsonl");
    let whole = std::fs::read(&path).unwrap();
    let accepted = String::from_utf8_lossy(&whole).find("\"accepted\"").unwrap();
    // Behind the start, somewhere in what follows; then zeros, as a file system leaves them.
    let most = u64::try_from(whole.len() - accepted).unwrap();
    let cut = accepted + usize::try_from(chance.next_u64() % most).unwrap();
    let mut torn = whole[..cut].to_vec();
    torn.resize(cut + 777, 0);
    std::fs::write(&path, torn).unwrap();
    assert!(Journal::read(&stage.runtime(&spec)).records.len() >= 5);
    let running: Running = stage.start(&spec);
    stage.wait_ready(&spec);
    stage.open_gate(&spec);
    running.finish().expect(7);
    assert_eq!(stage.outputs(&spec).text("artifacts/starts"), "started\n");
    assert_eq!(stage.journal(&spec).check_events(1), 3);
    stage.check_nothing_left(&spec);
}
