//! What happens when a runtime ends: restarts, what is kept and for how long, and commands at any moment.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use pika_cloud_tests::{ENDLESS, Finished, Incus, LIMIT, Lab, Running, Spec, Stage, archivist, played_by};
use pika_host_collector::{Cloud, Config};
use serde_json::{Value, json};

/// A spec with a restart policy whose rests are short and whose incarnations all count.
fn restarted(stage: &Stage, command: &str, policy: &str, max_restarts: u32) -> Spec {
    let spec = stage.spec(command).with("policies.restart_policy", policy);
    spec.with("policies.max_restarts", max_restarts).with("policies.restart_backoff_cap_secs", 60)
}

/// One verdict for each incarnation, with the count of restarts that led to it.
fn check_incarnations(stage: &Stage, spec: &Spec, verdicts: &[&str]) {
    let journal = stage.journal(spec);
    let mut logs = std::collections::BTreeSet::new();
    assert_eq!(journal.host("requested").len(), verdicts.len(), "incarnations");
    for (restarts, expected) in verdicts.iter().enumerate() {
        let incarnation = restarts as u64 + 1;
        let verdict = journal.verdict(incarnation);
        assert_eq!(verdict["verdict"], *expected, "incarnation {incarnation}");
        let count = if restarts == 0 { Value::Null } else { json!(restarts) };
        assert_eq!(verdict["evidence"]["restarts"], count, "incarnation {incarnation}");
        journal.check_events(incarnation);
        let outputs = stage.incarnation(spec, u32::try_from(incarnation).unwrap());
        assert_eq!(outputs.verdict(), *verdict, "incarnation {incarnation}");
        assert!(logs.insert(outputs.log()), "each has its own outputs: {logs:?}");
    }
}

/// How long incarnation after incarnation waited for its turn.
fn rests(stage: &Stage, spec: &Spec, incarnations: u64) -> Vec<Duration> {
    let journal = stage.journal(spec);
    let rest = |next: u64| journal.host_at(next, "requested").saturating_sub(journal.host_at(next - 1, "finished"));
    (2..=incarnations).map(rest).collect()
}

/// Counts its incarnations on the instance's disk; needs root.
const COUNT: &str = "n=$(cat /root/count 2>/dev/null || echo 0); n=$((n+1)); echo $n > /root/count; echo try $n; cat /proc/sys/kernel/random/boot_id > $PIKA_CLOUD_DIR/artifacts/boot;";

#[test]
fn what_fails_is_restarted_after_longer_and_longer_rests() {
    let stage = Stage::new("onfailure");
    let command = "cat /proc/sys/kernel/random/uuid; test -e /etc/old && exit 9; touch /etc/old; exit 4";
    let spec = restarted(&stage, command, "on_failure", 2).as_root();
    stage.run(&spec).expect(4);
    check_incarnations(&stage, &spec, &["failed", "failed", "failed"]);
    let rests = rests(&stage, &spec, 3);
    println!("rests: {rests:?}");
    for (rest, secs) in rests.iter().zip([1, 2]) {
        assert!(*rest + Duration::from_millis(1) >= Duration::from_secs(secs), "{rests:?}");
        assert!(*rest < Duration::from_secs(secs + 1), "Invariant 3: {rests:?}");
    }
    let journal = stage.journal(&spec);
    let codes: Vec<&Value> = (1..=3).map(|incarnation| &journal.verdict(incarnation)["exit_code"]).collect();
    assert_eq!(codes, [4, 4, 4], "each in an instance of its own");
    stage.check_nothing_left(&spec);
}

#[test]
fn a_kept_instance_is_booted_anew_until_its_workload_succeeds() {
    let stage = Stage::new("reused");
    let spec = restarted(&stage, &format!("{COUNT} [ $n -ge 3 ] || exit 4"), "on_failure", 5).as_root();
    let spec = spec.with("policies.retention_policy", "keep_until_stopped");
    stage.run(&spec).expect(0);
    check_incarnations(&stage, &spec, &["failed", "failed", "completed"]);
    let boots: Vec<String> = (1..=3).map(|i| stage.incarnation(&spec, i).text("artifacts/boot")).collect();
    assert!(boots[0] != boots[1] && boots[1] != boots[2], "each has a boot of its own: {boots:?}");
    let journal = stage.journal(&spec);
    let created = |record: &&Value| record["host"]["message"] == "creating the instance";
    assert_eq!(journal.records.iter().filter(created).count(), 1, "all in one instance");
    assert_eq!(journal.host("instance_starting").len(), 3);
    assert_eq!(Incus.exec_ok(&spec.instance, "cat /root/count"), "3\n");
    stage.call(&["destroy", &spec.id]).expect(0);
    stage.check_nothing_left(&spec);
}

#[test]
fn always_restarts_what_completed_and_never_nothing() {
    let stage = Stage::new("always");
    let always =
        restarted(&stage, COUNT, "always", 1).as_root().with("policies.retention_policy", "keep_until_stopped");
    let never = restarted(&stage, "echo once; exit 4", "never", 5);
    let fine = restarted(&stage, "echo once", "on_failure", 5);
    let running = [&always, &never, &fine].map(|spec| stage.start(spec));
    for (running, code) in running.into_iter().zip([0, 4, 0]) {
        running.finish().expect(code);
    }
    check_incarnations(&stage, &always, &["completed", "completed"]);
    check_incarnations(&stage, &never, &["failed"]);
    check_incarnations(&stage, &fine, &["completed"]);
    stage.call(&["stop", &always.id]).expect(0);
    for spec in [always, never, fine] {
        stage.check_nothing_left(&spec);
    }
}

/// Who asked for an end does not want it undone.
#[test]
fn a_cancelled_incarnation_is_the_last() {
    let stage = Stage::new("last");
    let command = format!("{COUNT} [ $n -ge 2 ] || exit 4; pika-guest ready; while :; do sleep 1; done");
    let spec = restarted(&stage, &command, "always", 5).as_root();
    let spec = spec.with("policies.retention_policy", "keep_until_stopped");
    let running = stage.start(&spec);
    stage.wait_record(&spec, "the second is ready", |r| r["inc"] == 2 && r["guest"]["kind"] == "ready");
    stage.call(&["stop", &spec.id]).expect(0);
    running.finish().expect(130);
    let journal = stage.journal(&spec);
    assert_eq!(journal.host("requested").len(), 2);
    assert_eq!(
        (&journal.verdict(1)["verdict"], &journal.verdict(2)["verdict"]),
        (&"failed".into(), &"cancelled".into())
    );
    stage.check_nothing_left(&spec);
}

/// Invariants 3 and 4.
#[test]
fn debug_keep_keeps_for_its_time() {
    let stage = Stage::new("debug");
    // How long Incus takes for a destruction here and now is not what this is about, so that it is measured beside it.
    let beside = stage.spec("exit 4").with("policies.retention_policy", "debug_keep");
    stage.run(&beside).expect(4);
    let destroying = stage.call(&["destroy", &beside.id]).expect(0).took;
    let spec = stage.spec("echo kept > /tmp/mark; exit 4").with("policies.retention_policy", "debug_keep");
    let spec = spec.with("policies.debug_keep_secs", 3);
    stage.run(&spec).expect(4);
    assert_eq!(Incus.instance(&spec.instance).unwrap()["status"], "Running");
    assert_eq!(Incus.exec_ok(&spec.instance, "cat /tmp/mark"), "kept\n");
    let view = drive(&stage, &spec);
    let journal = stage.journal(&spec);
    assert_eq!(view.verdict.map(|verdict| serde_json::to_value(verdict).unwrap()).as_ref(), Some(journal.verdict(1)));
    assert_eq!(journal.host("kept")[0]["for_secs"], 3);
    let kept = journal.host_at(1, "finished").saturating_sub(journal.host_at(1, "kept"));
    println!("kept for {kept:?}");
    let latest = Duration::from_secs(3 + 1) + 2 * destroying;
    assert!(kept >= Duration::from_secs(3) && kept < latest, "{kept:?}, and a destruction took {destroying:?}");
    assert_eq!(journal.host("finished")[0]["destroyed"], true);
    stage.check_nothing_left(&spec);

    // What is kept for long goes when its destruction is asked for, and a time that passed unwatched has passed.
    let overdue = stage.spec("exit 4").with("policies.retention_policy", "debug_keep");
    let overdue = overdue.with("policies.debug_keep_secs", 1);
    let long = stage.spec("exit 4").with("policies.retention_policy", "debug_keep");
    for spec in [&overdue, &long] {
        stage.run(spec).expect(4);
    }
    std::thread::sleep(Duration::from_secs(1));
    drive(&stage, &overdue);
    stage.call(&["destroy", &long.id]).expect(0);
    for spec in [overdue, long] {
        stage.check_nothing_left(&spec);
    }
}

/// Invariant 4: by the command that an operator has.
#[test]
fn what_is_kept_beyond_its_time_is_destroyed_by_reconcile() {
    let stage = Stage::new("outlived");
    let spec = stage.spec("exit 4").with("policies.retention_policy", "debug_keep");
    let (overdue, kept) = (spec.with("policies.debug_keep_secs", 1), stage.spec("exit 4"));
    let kept = kept.with("policies.retention_policy", "debug_keep");
    for spec in [&overdue, &kept] {
        stage.run(spec).expect(4);
    }
    std::thread::sleep(Duration::from_secs(1));
    stage.call(&["reconcile"]).expect(0);
    stage.check_nothing_left(&overdue);
    assert!(stage.has_instance(&kept), "its time is not over");
    stage.call(&["destroy", &kept.id]).expect(0);
}

/// What cannot be run again is not thrown away for it.
#[test]
fn a_kept_instance_stays_where_the_next_run_cannot_begin() {
    let stage = Stage::new("missing");
    let spec = stage.spec("exit 4").with("policies.retention_policy", "keep_until_stopped");
    stage.run(&spec).expect(4);
    let broken = spec.clone().with("incus.image_alias", "nobody-has-it");
    for again in [&["--again"][..], &["--again"]] {
        stage.start_with(&broken, again).finish().expect(125).saying(&["nobody-has-it"]);
        assert_eq!(Incus.instance(&spec.instance).unwrap()["status"], "Running");
    }
    // Nor where somebody keeps its time.
    let config = Config { incus_socket: Lab::get().socket.clone(), state_dir: stage.state(), ..Config::default() };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let cloud = runtime.block_on(async { Cloud::connect(&config).unwrap() });
    let driven = runtime.spawn({
        let (cloud, id) = (cloud.clone(), spec.id.clone());
        async move { cloud.drive(&id).await.map(drop) }
    });
    pika_cloud_tests::eventually("it is driven", || {
        std::fs::read_to_string(stage.runtime(&spec).join("lock"))
            .is_ok_and(|holder| holder.trim() == std::process::id().to_string())
    });
    stage.start_with(&broken, &["--again"]).finish().expect(125);
    assert_eq!(Incus.instance(&spec.instance).unwrap()["status"], "Running");
    stage.call(&["stop", &spec.id]).expect(0);
    runtime.block_on(driven).unwrap().unwrap();
    stage.check_nothing_left(&spec);
}

/// Invariant 5: whatever a workload leaves, and however often it begins anew.
#[test]
fn outputs_of_old_incarnations_are_removed() {
    let stage = Stage::new("pruned");
    let left = |spec: &Spec| -> Vec<u32> {
        let entries = std::fs::read_dir(stage.runtime(spec)).unwrap().flatten();
        let mut left: Vec<u32> =
            entries.filter_map(|entry| entry.file_name().to_str().and_then(|name| name.parse().ok())).collect();
        left.sort_unstable();
        left
    };
    let spec = restarted(&stage, "echo x > $PIKA_CLOUD_DIR/artifacts/x; exit 4", "on_failure", 2);
    let spec = spec.with("limits.incarnations", 1);
    stage.run(&spec).expect(4);
    assert_eq!(left(&spec), [2, 3]);
    let again = stage.spec("exit 4").with("limits.incarnations", 2);
    for (incarnation, expected) in [(1, &[1][..]), (2, &[1, 2]), (3, &[1, 2, 3]), (4, &[2, 3, 4])] {
        stage.start_with(&again, &["--again"]).finish().expect(4);
        assert_eq!(left(&again), expected, "incarnation {incarnation}");
    }
    for spec in [spec, again] {
        stage.check_nothing_left(&spec);
    }
}

/// Drives a runtime until nothing is left to do, as a server does.
fn drive(stage: &Stage, spec: &Spec) -> pika_host_collector::journal::View {
    let config = Config { incus_socket: Lab::get().socket.clone(), state_dir: stage.state(), ..Config::default() };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let cloud = Cloud::connect(&config).unwrap();
        tokio::time::timeout(Duration::from_secs(30), cloud.drive(&spec.id)).await.expect("it comes to an end").unwrap()
    })
}

/// What the three commands leave of a runtime that its policy keeps until it is stopped.
const COMMANDS: [(&str, bool); 3] = [("cancel", true), ("stop", false), ("destroy", false)];

/// After a command came from another process: the one verdict, and what is left of the instance.
fn check_commanded(stage: &Stage, spec: &Spec, verdict: &str, is_kept: bool) {
    let journal = stage.journal(spec);
    let inc = journal.host("requested").len() as u64;
    assert_eq!(journal.verdict(inc)["verdict"], verdict, "{}", spec.id);
    assert_eq!(stage.has_instance(spec), is_kept, "{}", spec.id);
    if is_kept {
        stage.call(&["destroy", &spec.id]).expect(0);
    }
    let journal = stage.journal(spec);
    assert_eq!(journal.host("finished").last().unwrap()["destroyed"], true, "{}", spec.id);
    assert_eq!(journal.host("state").last().unwrap()["state"], "destroyed", "{}", spec.id);
    stage.check_nothing_left(spec);
}

/// Starts a spec for each command, waits for `moment`, gives the command by another process, and waits for both.
fn command_each(stage: &Stage, make: impl Fn() -> Spec, moment: impl Fn(&Spec)) -> Vec<(Spec, bool, Finished)> {
    let specs: Vec<_> = COMMANDS.iter().map(|command| (*command, make())).collect();
    let running: Vec<Running> = specs.iter().map(|(_, spec)| stage.start(spec)).collect();
    let commands = specs.iter().map(|((command, _), spec)| {
        moment(spec);
        Running::start(&mut stage.cloud(&[command, &spec.id]))
    });
    let commands: Vec<Running> = commands.collect();
    for command in commands {
        command.finish().expect(0);
    }
    let done = running.into_iter().map(Running::finish);
    done.zip(specs).map(|(done, ((_, is_kept), spec))| (spec, is_kept, done)).collect()
}

fn kept(spec: Spec) -> Spec {
    spec.with("policies.retention_policy", "keep_until_stopped").with("watchdogs.collect_secs", 2)
}

#[test]
fn commands_before_there_is_an_instance() {
    let stage = Stage::new("before");
    for (command, _) in COMMANDS {
        let spec = kept(stage.spec("echo never run"));
        let running = stage.start(&spec);
        // Not through `until`: each millisecond counts here.
        let began = Instant::now();
        while !stage.journal(&spec).has("requested") {
            assert!(began.elapsed() < LIMIT, "it is never requested");
            std::thread::yield_now();
        }
        running.kill();
        stage.call(&[command, &spec.id]).expect(0);
        let journal = stage.journal(&spec);
        assert_eq!(journal.verdict(1)["verdict"], "cancelled", "{command}");
        assert!(!journal.has("start_sent"), "{command}: nothing was started");
        // Cancelled, what its collector had made by then is kept as its policy says; if it had made anything.
        stage.call(&["destroy", &spec.id]).expect(0);
        assert!(!stage.has_instance(&spec));
        stage.run(&spec).expect(130);
        stage.check_nothing_left(&spec);
    }
}

#[test]
fn commands_while_it_boots() {
    let stage = Stage::new("boots");
    let make = || kept(played_by(&stage, stage.spec("echo never run"), "exec sleep 1000"));
    let moment = |spec: &Spec| stage.wait_record(spec, "it boots", |r| r["host"]["what"] == "instance_starting");
    for (spec, is_kept, done) in command_each(&stage, make, moment) {
        done.expect(130);
        assert!(!stage.journal(&spec).has("start_sent"), "nothing was started");
        check_commanded(&stage, &spec, "cancelled", is_kept);
    }
}

/// Invariant 7.
#[test]
fn commands_while_it_runs() {
    let stage = Stage::new("runs");
    let command = "trap 'echo asked to go; exit 0' TERM; echo x > $PIKA_CLOUD_DIR/artifacts/x; pika-guest ready; while :; do sleep 1000 & wait $!; done";
    let make = || kept(stage.spec(command));
    for (spec, is_kept, done) in command_each(&stage, make, |spec| stage.wait_ready(spec)) {
        done.expect(130);
        let outputs = stage.outputs(&spec);
        assert!(outputs.log().ends_with("asked to go\n"), "{}", outputs.log());
        assert_eq!(outputs.artifacts(), ["x"]);
        check_commanded(&stage, &spec, "cancelled", is_kept);
    }
}

/// Invariant 2: the end is decided already.
#[test]
fn commands_while_it_collects() {
    let stage = Stage::new("collects");
    let make =
        || kept(played_by(&stage, stage.spec("echo never run"), &archivist(ENDLESS))).with("watchdogs.collect_secs", 5);
    let moment = |spec: &Spec| stage.wait_record(spec, "its end", |r| r["host"]["what"] == "ended");
    for (spec, is_kept, done) in command_each(&stage, make, moment) {
        // Its outputs are not all there.
        done.expect(125);
        check_commanded(&stage, &spec, "completed", is_kept);
    }
}

#[test]
fn commands_while_it_is_kept() {
    let stage = Stage::new("kept");
    for (command, is_kept) in COMMANDS {
        let spec = kept(stage.spec("exit 4"));
        stage.run(&spec).expect(4);
        let before = stage.journal(&spec).verdict(1).clone();
        stage.call(&[command, &spec.id]).expect(0);
        assert_eq!(*stage.journal(&spec).verdict(1), before, "Invariant 2");
        check_commanded(&stage, &spec, "failed", is_kept);
        stage.call(&[command, &spec.id]).expect(0);
        stage.run(&spec).expect(4);
    }
    // And where somebody drives it on.
    let spec = kept(stage.spec("exit 4"));
    stage.run(&spec).expect(4);
    std::thread::scope(|scope| {
        let driven = scope.spawn(|| drive(&stage, &spec));
        stage.call(&["stop", &spec.id]).expect(0);
        driven.join().unwrap();
    });
    check_commanded(&stage, &spec, "failed", false);
}

#[test]
fn commands_while_it_rests() {
    let stage = Stage::new("rests");
    let make = || {
        let spec = kept(restarted(&stage, "exit 4", "always", 5));
        spec.with("policies.restart_backoff_secs", 50)
    };
    let moment = |spec: &Spec| stage.wait_record(spec, "its rest", |r| !r["host"]["restart_in_ms"].is_null());
    for (spec, is_kept, done) in command_each(&stage, make, moment) {
        done.expect(4);
        assert_eq!(stage.journal(&spec).host("requested").len(), 1, "it does not begin anew");
        check_commanded(&stage, &spec, "failed", is_kept);
    }
}
