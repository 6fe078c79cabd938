//! Deadlines: each fires within a second of its time, with the right verdict, and what the guest still has is collected.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use pika_cloud_tests::{
    ENDLESS, Image, Incus, Journal, Outputs, Spec, Stage, archivist, entry, eventually, moment, monotonic, played_by,
};
use serde_json::Value;

/// A workload that leaves a line and a file, and then goes on with `rest`.
fn leaving(rest: &str) -> String {
    format!("echo begun; echo partly > $PIKA_CLOUD_DIR/artifacts/part; {rest}")
}

/// Goes on for ever, and ends at TERM with a word.
const LOOP: &str = "trap 'echo asked to go; exit 0' TERM; while :; do sleep 0.05; done";

/// Invariant 3: what began at `since` was decided `secs` later, and less than a second beyond that.
fn check_fired(what: &str, since: Duration, decided: Duration, secs: u64) {
    let took = decided.saturating_sub(since);
    println!("{what}: {:.3} s after its deadline", took.as_secs_f64() - Duration::from_secs(secs).as_secs_f64());
    assert!(took + Duration::from_millis(1) >= Duration::from_secs(secs), "{what}: early, after {took:?}");
    assert!(took < Duration::from_secs(secs + 1), "{what}: late, after {took:?}");
}

/// The one verdict, which names the watchdog.
fn check_timed_out(stage: &Stage, spec: &Spec, watchdog: &str) -> (Journal, Value) {
    let (journal, verdict) = (stage.journal(spec), stage.outputs(spec).verdict());
    assert_eq!(*journal.verdict(1), verdict, "Invariant 2");
    assert_eq!((&verdict["verdict"], &verdict["watchdog"]), (&"timed_out".into(), &watchdog.into()), "{verdict}");
    assert_eq!(verdict["evidence"]["instance_status"], "Running", "{verdict}");
    (journal, verdict)
}

/// Invariant 7: what [`leaving`] left.
fn check_collected(outputs: &Outputs, log: &str) {
    // A shell also says what else a signal ended.
    assert_eq!(outputs.log().replace("Terminated\n", ""), log);
    assert_eq!(outputs.text("artifacts/part"), "partly\n");
    assert_eq!(outputs.check_digests(), outputs.artifacts().len());
    let collection = &outputs.verdict()["evidence"]["collection"];
    assert_eq!(collection["complete"], true, "{collection}");
    assert_eq!(collection["log_bytes"], outputs.log().len());
}

#[test]
fn an_agent_that_never_answers_is_waited_for_until_boot_secs() {
    let stage = Stage::new("boot");
    let image = Image::with_agent("#!/bin/sh\nexec sleep 1000\n");
    let spec = stage.spec("echo never run").with("incus.image_alias", &*image.alias);
    let spec = spec.with("watchdogs.boot_secs", 2).with("watchdogs.collect_secs", 1);
    stage.run(&spec).expect(124);
    let (journal, verdict) = check_timed_out(&stage, &spec, "boot");
    let (started, ended) = (journal.host_at(1, "instance_starting"), journal.host_at(1, "ended"));
    check_fired("boot", started, ended, 2);
    // It is tried all the same, within its own budget.
    assert_eq!(verdict["evidence"]["collection"]["complete"], false);
    check_fired("collect", ended, journal.host_at(1, "collected"), 1);
    assert!(!journal.has("start_sent"));
    stage.check_nothing_left(&spec);
}

#[test]
fn a_workload_that_is_not_ready_in_time_is_ended_and_collected() {
    let stage = Stage::new("ready");
    let late = stage.spec(&leaving(LOOP)).with("watchdogs.ready_secs", 1);
    let ready = stage.spec(&leaving("pika-guest ready; sleep 2; exit 5")).with("watchdogs.ready_secs", 1);
    let done = stage.spec(&leaving("exit 6")).with("watchdogs.ready_secs", 1);
    let running = [&late, &ready, &done].map(|spec| stage.start(spec));
    for (running, code) in running.into_iter().zip([124, 5, 6]) {
        running.finish().expect(code);
    }
    let (journal, verdict) = check_timed_out(&stage, &late, "ready");
    check_fired("ready", journal.state_at(1, "booted"), journal.host_at(1, "ended"), 1);
    assert_eq!(verdict["evidence"]["last_event"]["kind"], "completed", "it was asked to go, and went");
    check_collected(&stage.outputs(&late), "begun\nasked to go\n");
    for spec in [&ready, &done] {
        assert_eq!(stage.outputs(spec).verdict()["verdict"], "failed", "ready or done in time");
        check_collected(&stage.outputs(spec), "begun\n");
    }
    for spec in [late, ready, done] {
        stage.check_nothing_left(&spec);
    }
}

#[test]
fn progress_is_waited_for_anew_after_each_step_and_under_a_cap() {
    let stage = Stage::new("progress");
    let steps = "for i in 1 2 3 4; do pika-guest progress step --message $i; sleep 0.5; done";
    let stalled = stage.spec(&leaving(&format!("{steps}; {LOOP}"))).with("watchdogs.progress_secs", 1);
    let slow = leaving("trap 'echo asked to go; exit 0' TERM; while :; do pika-guest progress step; sleep 0.2; done");
    let capped = stage.spec(&slow).with("watchdogs.progress_secs", 1).with("watchdogs.progress_cap_secs", 3);
    let running = [&stalled, &capped].map(|spec| stage.start(spec));
    for running in running {
        running.finish().expect(124);
    }

    let (journal, verdict) = check_timed_out(&stage, &stalled, "progress");
    let last = journal.at(1, "last step", |record| record["guest"]["message"] == "4");
    check_fired("progress", last, journal.host_at(1, "ended"), 1);
    assert!(
        last.saturating_sub(journal.host_at(1, "start_sent")) > Duration::from_secs(1),
        "the steps moved the deadline"
    );
    assert!(verdict["message"].as_str().unwrap().contains("progress_secs"), "{verdict}");

    let (journal, verdict) = check_timed_out(&stage, &capped, "progress");
    check_fired("progress_cap", journal.host_at(1, "start_sent"), journal.host_at(1, "ended"), 3);
    assert!(verdict["message"].as_str().unwrap().contains("progress_cap_secs"), "{verdict}");
    for spec in [stalled, capped] {
        check_collected(&stage.outputs(&spec), "begun\nasked to go\n");
        stage.check_nothing_left(&spec);
    }
}

#[test]
fn a_workload_beyond_run_secs_is_ended_in_the_guest() {
    let stage = Stage::new("run");
    let polite = stage.spec(&leaving(LOOP));
    let stubborn = stage.spec(&leaving("trap '' TERM; while :; do sleep 0.05; done"));
    let [polite, stubborn] =
        [polite, stubborn].map(|spec| spec.with("watchdogs.run_secs", 1).with("watchdogs.stop_grace_secs", 1));
    let running = [&polite, &stubborn].map(|spec| stage.start(spec));
    for running in running {
        running.finish().expect(124);
    }
    for (spec, secs, log) in [(&polite, 1, "begun\nasked to go\n"), (&stubborn, 2, "begun\n")] {
        let (journal, verdict) = check_timed_out(&stage, spec, "run");
        check_fired("run", journal.host_at(1, "accepted"), journal.host_at(1, "ended"), secs);
        assert_eq!(verdict["evidence"]["last_event"]["kind"], "failed", "in the guest's own words");
        assert_eq!(stage.outputs(spec).json("result.json")["details"]["timed_out"]["watchdog"], "run");
        check_collected(&stage.outputs(spec), log);
        stage.check_nothing_left(spec);
    }
}

#[test]
fn the_host_ends_what_a_guest_without_its_supervisor_does_not() {
    let stage = Stage::new("backstop");
    let seen = "until grep -q begun $PIKA_CLOUD_DIR/logs/guest.log; do sleep 0.01; done";
    let stopped = stage.spec(&leaving(&format!("{seen}; kill -STOP $PPID; sleep 1000"))).as_root();
    let stopped = stopped.with("watchdogs.run_secs", 1).with("watchdogs.stop_grace_secs", 0);
    let killed = stage.spec(&leaving(&format!("{seen}; kill -9 $PPID; sleep 1000"))).as_root();
    let killed = killed.with("watchdogs.run_secs", 60);
    let running = [&stopped, &killed].map(|spec| stage.start(spec));
    for (running, code) in running.into_iter().zip([124, 126]) {
        running.finish().expect(code);
    }
    let (journal, verdict) = check_timed_out(&stage, &stopped, "run");
    // run_secs, stop_grace_secs, and 5 s for the guest's own word.
    check_fired("run's backstop", journal.host_at(1, "start_sent"), journal.host_at(1, "ended"), 6);
    assert_eq!(verdict["evidence"]["last_event"]["kind"], "starting");

    let verdict = stage.outputs(&killed).verdict();
    assert_eq!(verdict["verdict"], "guest_died", "{verdict}");
    assert_eq!(verdict["cause"], "supervisor_lost", "{verdict}");
    for spec in [stopped, killed] {
        check_collected(&stage.outputs(&spec), "begun\n");
        stage.check_nothing_left(&spec);
    }
}

#[test]
fn a_collection_without_an_end_is_ended() {
    let stage = Stage::new("endless");
    let script = archivist(&format!("{}{ENDLESS}", entry("good", "good")));
    let spec = played_by(&stage, stage.spec("echo never run"), &script).with("watchdogs.collect_secs", 2);
    stage.run(&spec).expect(125).saying(&["collect_secs"]);
    let (journal, outputs) = (stage.journal(&spec), stage.outputs(&spec));
    check_fired("collect", journal.host_at(1, "ended"), journal.host_at(1, "collected"), 2);
    let verdict = outputs.verdict();
    assert_eq!(verdict["verdict"], "completed", "the guest's own word stands");
    let collection = &verdict["evidence"]["collection"];
    assert_eq!(collection["complete"], false);
    assert!(collection["error"].as_str().unwrap().contains("collect_secs"), "{collection}");
    assert_eq!(outputs.text("artifacts/good"), "good", "what came whole is kept");
    assert_eq!(outputs.check_digests(), outputs.artifacts().len());
    stage.check_nothing_left(&spec);
}

/// Invariant 3: silence is noticed, and its end as well.
#[test]
fn a_frozen_guest_is_unreachable_until_it_is_heard_again() {
    let stage = Stage::new("frozen");
    let command = leaving(&format!("pika-guest ready; {}; echo thawed", Stage::gate()));
    let spec = || stage.spec(&command).with("watchdogs.collect_secs", 3);
    let (lost, back) = (spec(), spec());
    let running = [stage.start(&lost), stage.start(&back)];
    let frozen = [&lost, &back].map(|spec| {
        stage.wait_ready(spec);
        assert!(Incus.client(&["pause", &spec.instance]).status().unwrap().success());
        monotonic()
    });
    stage.wait_record(&back, "unreachable", |record| record["host"]["state"] == "unreachable");
    assert!(Incus.client(&["start", &back.instance]).status().unwrap().success());
    let thawed = monotonic();
    let newest = || {
        let newest = stage.journal(&back).host("state").last().map(|state| state["state"].clone());
        newest == Some(Value::from("booted"))
    };
    eventually("it is heard again", newest);
    stage.open_gate(&back);
    let [one, other] = running;
    other.finish().expect(0);
    check_collected(&stage.outputs(&back), "begun\nthawed\n");
    let journal = stage.journal(&back);
    let states: Vec<&Value> = journal.host("state").iter().map(|state| &state["state"]).collect();
    assert_eq!(states[states.len() - 4..], ["booted", "unreachable", "booted", "destroyed"]);
    let heard = |record: &&Value| record["host"]["message"] == "the guest is heard again";
    let heard = moment(journal.records.iter().find(heard).unwrap());
    let heard = heard.saturating_sub(thawed);
    assert!(heard < Duration::from_secs(6), "within a heartbeat and a second: {heard:?}");

    one.finish().expect(126);
    let journal = stage.journal(&lost);
    let verdict = stage.outputs(&lost).verdict();
    assert_eq!(*journal.verdict(1), verdict);
    assert_eq!(verdict["verdict"], "unreachable");
    assert_eq!(verdict["evidence"]["instance_status"], "Frozen");
    assert_eq!(verdict["evidence"]["last_event"]["kind"], "ready");
    assert_eq!(stage.outputs(&lost).log(), "begun\n", "what had come is kept");
    // The guest was last heard up to a heartbeat before it was frozen: that much earlier the verdict may be, and the state.
    let ended = journal.host_at(1, "ended").saturating_sub(frozen[0]);
    assert!(ended > Duration::from_secs(14) && ended < Duration::from_secs(21), "silence_secs is 20: {ended:?}");
    for (spec, frozen) in [&lost, &back].into_iter().zip(frozen) {
        let unreachable = stage.journal(spec).state_at(1, "unreachable").saturating_sub(frozen);
        assert!(unreachable < Duration::from_secs(17), "three heartbeats: {unreachable:?}");
        stage.check_nothing_left(spec);
    }
}
