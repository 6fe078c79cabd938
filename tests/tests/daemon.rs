//! The Incus daemon dies: in mid-job, in the middle of a call, for long, or before there is anything to do.
//!
//! Tests of one program share the daemon: those here have it one after the other.

#![allow(clippy::format_collect, clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pika_cloud_tests::{BARE_IMAGE, Incus, LIMIT, LabDaemon, Running, Signal, Spec, Stage, eventually, image_of};

/// All tests here share one daemon. To be taken before the stage, whose end needs that daemon.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A workload that goes on talking until its gate is opened.
fn talking() -> String {
    "echo started >> $PIKA_CLOUD_DIR/artifacts/starts; pika-guest ready
    i=0; while [ ! -e /tmp/gate ]; do i=$((i+1)); echo line $i; pika-guest progress step --message $i || exit 9; sleep 0.1; done
    echo $i > $PIKA_CLOUD_DIR/artifacts/last; exit 7"
        .to_owned()
}

/// Invariants 1, 2, 4 and 9, of a job of [`talking`].
fn check_talked(stage: &Stage, spec: &Spec) {
    let outputs = stage.outputs(spec);
    assert_eq!(outputs.text("artifacts/starts"), "started\n");
    let last: u64 = outputs.text("artifacts/last").trim().parse().unwrap();
    assert_eq!(outputs.log(), (1..=last).map(|i| format!("line {i}\n")).collect::<String>());
    let journal = stage.journal(spec);
    assert_eq!(journal.check_events(1), last + 3);
    let verdict = outputs.verdict();
    assert_eq!(*journal.verdict(1), verdict);
    assert_eq!((&verdict["verdict"], &verdict["exit_code"]), (&"failed".into(), &7.into()));
    assert_eq!(verdict["evidence"]["collection"]["complete"], true);
    stage.check_nothing_left(spec);
}

/// Waits, to the millisecond, until the journal holds `needle`.
fn watch(stage: &Stage, spec: &Spec, needle: &str) {
    let began = Instant::now();
    loop {
        let bytes = std::fs::read(stage.runtime(spec).join("journal.jsonl")).unwrap_or_default();
        if bytes.windows(needle.len()).any(|window| window == needle.as_bytes()) {
            return;
        }
        assert!(began.elapsed() < LIMIT, "no {needle} in the journal of {}", spec.id);
        std::thread::yield_now();
    }
}

#[test]
fn a_job_goes_on_when_the_daemon_is_killed_and_comes_back() {
    let _alone = alone();
    let stage = Stage::new("midjob");
    let mut daemon = LabDaemon::find();
    let spec = stage.spec(&talking());
    let running = stage.start(&spec);
    stage.wait_ready(&spec);
    for _ in 0..2 {
        daemon.restart();
        let seen = stage.journal(&spec).records.len();
        eventually("the guest is heard again", || stage.journal(&spec).records.len() > seen + 3);
    }
    stage.open_gate(&spec);
    running.finish().expect(7);
    check_talked(&stage, &spec);
}

/// Down for longer than a session lasts without a word, and than the collector's first tries.
#[test]
fn a_job_goes_on_when_the_daemon_was_down_for_long() {
    let _alone = alone();
    let stage = Stage::new("long");
    let mut daemon = LabDaemon::find();
    let live = stage.spec(&talking()).with("watchdogs.silence_secs", 60);
    let late = stage.spec(&talking()).with("watchdogs.silence_secs", 60);
    let mut running = vec![stage.start(&live)];
    let first = stage.start(&late);
    stage.wait_ready(&live);
    stage.wait_ready(&late);
    first.kill();
    daemon.kill();
    // A collector that is started now waits for the daemon as well.
    running.push(stage.start(&late));
    // Its answer of a new runtime is that nothing answers, and nothing is left of it.
    let fresh = stage.spec("echo never run");
    stage.run(&fresh).expect(125).saying(&["no Incus answers at unix:"]);
    assert!(!stage.runtime(&fresh).exists());
    stage.wait_record(&live, "unreachable", |record| record["host"]["state"] == "unreachable");
    std::thread::sleep(Duration::from_secs(2));
    daemon.start();
    daemon.wait_ready();
    for (spec, running) in [&live, &late].into_iter().zip(running) {
        stage.open_gate(spec);
        running.finish().expect(7);
        check_talked(&stage, spec);
    }
    let journal = stage.journal(&live);
    let states: Vec<&str> = journal.host("state").iter().filter_map(|state| state["state"].as_str()).collect();
    assert_eq!(states[states.len() - 4..], ["booted", "unreachable", "booted", "destroyed"]);
    // A new runtime gets its instance now.
    stage.run(&fresh).expect(0);
    stage.check_nothing_left(&fresh);
}

/// In the middle of calls whose outcome nobody tells then: it is read.
#[test]
fn a_daemon_killed_in_the_middle_of_a_call_leaves_nothing_half_done() {
    const CREATE: &str = "creating the instance";
    let _alone = alone();
    let stage = Stage::new("calls");
    let mut daemon = LabDaemon::find();
    let moments = [
        (CREATE, &[0, 40][..]),
        ("\"what\":\"instance_starting\"", &[0, 40]),
        // A forced stop takes most of a second, a deletion a moment.
        ("\"what\":\"verdict\"", &[100]),
    ];
    for (needle, delays) in moments {
        for delay in delays.iter().copied().map(Duration::from_millis) {
            let spec = stage.spec("echo started >> $PIKA_CLOUD_DIR/artifacts/starts; exit 7");
            let running = stage.start(&spec);
            watch(&stage, &spec, needle);
            std::thread::sleep(delay);
            daemon.restart();
            let done = running.finish();
            println!("{} ms after {needle}: {:?} after {:.1} s", delay.as_millis(), done.code, done.took.as_secs_f64());
            let verdict = stage.outputs(&spec).verdict();
            assert_eq!(*stage.journal(&spec).verdict(1), verdict);
            stage.check_nothing_left(&spec);
            if needle == CREATE && done.code == Some(125) {
                // Incus keeps what it had of an instance, which cannot be started.
                assert_eq!(verdict["verdict"], "provision_failed", "{verdict}");
                assert!(verdict["evidence"]["error"].is_string(), "{verdict}");
            } else {
                done.expect(7);
                assert_eq!(stage.outputs(&spec).text("artifacts/starts"), "started\n");
                assert_eq!(stage.journal(&spec).check_events(1), 2);
            }
        }
    }
}

/// Commands wait for the daemon, too.
#[test]
fn a_job_is_ended_while_the_daemon_is_down() {
    let _alone = alone();
    let stage = Stage::new("down");
    let mut daemon = LabDaemon::find();
    let spec = || stage.spec("pika-guest ready; while :; do sleep 1; done").with("watchdogs.collect_secs", 20);
    let (interrupted, destroyed) = (spec(), spec());
    let running = [stage.start(&interrupted), stage.start(&destroyed)];
    stage.wait_ready(&interrupted);
    stage.wait_ready(&destroyed);
    daemon.kill();
    let [one, other] = running;
    one.signal(Signal::INT);
    other.kill();
    let destroy = Running::start(&mut stage.cloud(&["destroy", &destroyed.id]));
    stage.wait_record(&interrupted, "its end", |record| record["host"]["what"] == "ended");
    stage.wait_record(&destroyed, "its end", |record| record["host"]["what"] == "ended");
    daemon.start();
    daemon.wait_ready();
    one.finish().expect(130);
    destroy.finish().expect(0);
    for spec in [interrupted, destroyed] {
        assert_eq!(stage.journal(&spec).verdict(1)["verdict"], "cancelled");
        assert!(Incus.instance(&spec.instance).is_none());
        stage.check_nothing_left(&spec);
    }
}

/// What a bake could not remove without a daemon, the next reconciliation removes.
#[test]
fn a_bake_that_loses_the_daemon_moves_no_alias_and_is_reconciled() {
    let _alone = alone();
    let stage = Stage::new("bake-daemon");
    let mut daemon = LabDaemon::find();
    let image = stage.alias("ci");
    stage.bake(BARE_IMAGE, &image.alias, &[]).expect(0);
    let before = image_of(&image.alias).unwrap().fingerprint;
    for step in ["creating the builder", "putting in pika-guest", "publishing the image"] {
        let baking = Running::start(&mut stage.bake_command(BARE_IMAGE, &image.alias, &[]));
        eventually(step, || baking.said().contains(step));
        daemon.kill();
        let failed = baking.finish().expect(125);
        assert!(failed.stderr.contains("pika-cloud reconcile"), "it says what is left: {}", failed.stderr);
        daemon.start();
        daemon.wait_ready();
        assert_eq!(image_of(&image.alias).unwrap().fingerprint, before);
        stage.call(&["reconcile"]).expect(0);
        stage.check_baked(1);
    }
    stage.bake(BARE_IMAGE, &image.alias, &[]).expect(0);
    stage.check_baked(1);
}
