//! Memory and disk of a guest that ran out of them: the evidence tells why, and the workload's own end arrives.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use pika_cloud_tests::{Spec, Stage, played_by};
use serde_json::{Value, json};

/// Mounts the control groups that count memory, as an image with an init of its own does, by whichever version is here.
const MOUNT_CGROUPS: &str = "if [ ! -d /sys/fs/cgroup/memory ] && [ ! -e /sys/fs/cgroup/memory.events ]; then
        if grep -q ':memory:' /proc/self/cgroup; then
            mount -t tmpfs none /sys/fs/cgroup && mkdir /sys/fs/cgroup/memory
            mount -t cgroup -o memory none /sys/fs/cgroup/memory
        else
            mount -t cgroup2 none /sys/fs/cgroup
        fi
    fi";

/// Makes `/run` a small file system of its own, as it is in most images.
const MOUNT_RUN: &str = "grep -q ' /run ' /proc/mounts || mount -t tmpfs -o size=2m,mode=755 none /run";

/// Eats memory until it is killed.
const EAT: &str = "tail -c 2000000000 /dev/zero";

/// A job of the guest's root in little memory, in an instance that is `prepared` before its agent says a word.
fn job(stage: &Stage, prepared: &str, command: &str) -> Spec {
    let agent = format!("{prepared}\nexec /usr/bin/pika-guest \"$@\"");
    let spec = played_by(stage, stage.spec(&format!("echo begun; pika-guest ready; {command}")), &agent).as_root();
    // One that does not end by itself must not hold up the tests.
    spec.with("resources.memory_mib", 64).with("watchdogs.run_secs", 60)
}

/// Runs jobs at once; gives their verdicts, each of which rests on the guest's own word.
fn run_all(stage: &Stage, specs: &[(Spec, i32)]) -> Vec<Value> {
    let running: Vec<_> = specs.iter().map(|(spec, _)| stage.start(spec)).collect();
    let done = running.into_iter().zip(specs).map(|(running, (spec, code))| {
        running.finish().expect(*code);
        let (journal, verdict) = (stage.journal(spec), stage.outputs(spec).verdict());
        assert_eq!(*journal.verdict(1), verdict, "Invariant 2");
        // Its agent and its supervisor outlived what was killed.
        journal.check_events(1);
        assert_eq!(verdict["evidence"]["last_event"]["message"], verdict["message"]);
        assert_eq!(verdict["exit_code"], *code, "{verdict}");
        stage.check_nothing_left(spec);
        println!("{verdict}");
        verdict
    });
    done.collect()
}

fn message(verdict: &Value) -> &str {
    verdict["message"].as_str().unwrap()
}

#[test]
fn a_kill_for_memory_is_told_by_the_counter_of_its_control_group() {
    let stage = Stage::new("memory");
    let specs = [
        (job(&stage, MOUNT_CGROUPS, &format!("exec {EAT}")), 137),
        (job(&stage, MOUNT_CGROUPS, &format!("{EAT}; exit 3")), 3),
        (job(&stage, MOUNT_CGROUPS, "kill -9 $$"), 137),
        (job(&stage, ":", &format!("exec {EAT}")), 137),
    ];
    let verdicts = run_all(&stage, &specs);
    for verdict in &verdicts {
        assert_eq!(verdict["verdict"], "failed", "{verdict}");
    }
    let oom_kill: Vec<&Value> = verdicts.iter().map(|verdict| &verdict["evidence"]["oom_kill"]).collect();
    assert_eq!(oom_kill, [&json!(true), &json!(true), &json!(false), &Value::Null]);
    let signal: Vec<&Value> = verdicts.iter().map(|verdict| &verdict["evidence"]["signal"]).collect();
    assert_eq!(signal, [&json!(9), &Value::Null, &json!(9), &json!(9)]);
    assert!(message(&verdicts[0]).contains("killed it for memory"), "{}", verdicts[0]);
    assert!(message(&verdicts[1]).contains("for memory"), "{}", verdicts[1]);
    assert!(message(&verdicts[2]).contains("not for memory"), "{}", verdicts[2]);
    assert!(message(&verdicts[3]).contains("killed, cause unknown"), "{}", verdicts[3]);
    for (spec, _) in &specs {
        assert!(stage.outputs(spec).log().starts_with("begun\n"));
    }
}

#[test]
fn the_workload_is_the_kernels_first_choice() {
    let stage = Stage::new("score");
    let spec = stage.spec("cat /proc/self/oom_score_adj /proc/$PPID/oom_score_adj").as_root();
    stage.run(&spec).expect(0);
    let log = stage.outputs(&spec).log();
    let scores: Vec<i32> = log.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(scores[0], 1000);
    assert!(scores[1] <= 0, "its supervisor goes last: {scores:?}");
    stage.check_nothing_left(&spec);
}

#[test]
fn the_end_of_a_job_finds_room_in_a_full_run() {
    let stage = Stage::new("full");
    let eat_disk = "cat /dev/zero > /run/fill 2> /dev/null; echo lost; pika-guest progress lost";
    let specs = [
        (job(&stage, MOUNT_RUN, &format!("{eat_disk}; exit 7")), 7),
        (job(&stage, MOUNT_RUN, &format!("{eat_disk}; exit 0")), 0),
        (job(&stage, MOUNT_RUN, &format!("{eat_disk}; rm /run/fill; exit 7")), 7),
    ];
    let verdicts = run_all(&stage, &specs);
    let full: Vec<&Value> = verdicts.iter().map(|verdict| &verdict["evidence"]["full"]).collect();
    assert_eq!(full, [&json!(["/run"]), &json!(["/run"]), &Value::Null]);
    assert_eq!(verdicts[1]["verdict"], "completed");
    assert!(message(&verdicts[0]).contains("/run"), "{}", verdicts[0]);
    for ((spec, code), verdict) in specs.iter().zip(&verdicts) {
        let outputs = stage.outputs(spec);
        assert!(outputs.log().starts_with("begun\n"), "{}", outputs.log());
        assert_eq!(outputs.json("result.json")["exit_code"], *code);
        assert_eq!(verdict["evidence"]["collection"]["complete"], true);
    }
}
