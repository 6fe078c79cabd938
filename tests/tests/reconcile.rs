//! What a dead collector left is brought to its end, and nothing else is touched.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime};

use pika_cloud_common::RuntimeSpec;
use pika_cloud_tests::{BARE_IMAGE, Incus, Lab, Spec, Stage, eventually, read_text};
use pika_host_collector::incus::{Client, Error, Holder, Labels, Ownership, create_request, label};
use serde_json::{Value, json};

fn parsed(spec: &Spec) -> RuntimeSpec {
    RuntimeSpec::from_json(&spec.json.to_string()).unwrap()
}

fn owner(stage: &Stage) -> String {
    read_text(&stage.state().join("id")).trim().to_owned()
}

/// Makes the instance of a spec as a collector would, stopped.
fn create(spec: &Spec, owner: &str, term: u64, now: SystemTime) {
    let ownership = Ownership { owner: owner.to_owned(), term, incarnation: 1 };
    let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let request = create_request(&parsed(spec), &ownership, now, None);
    Incus.change("POST", "/1.0/instances", Some(&request)).unwrap();
}

/// Everything of an instance that somebody could have changed.
fn snapshot(name: &str) -> Value {
    let instance = Incus.instance(name).unwrap_or_else(|| panic!("{name} is gone"));
    json!([instance["status"], instance["config"], instance["devices"], instance["created_at"]])
}

fn config(name: &str) -> BTreeMap<String, String> {
    serde_json::from_value(Incus.instance(name).unwrap()["config"].clone()).unwrap()
}

/// Every byte of the state dir by its path.
fn bytes_of(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = pika_cloud_tests::files_below(folder).into_iter();
    // Whoever looks at a lock writes its name into it.
    let files = files.filter(|path| !path.ends_with("lock"));
    files.map(|path| (path.display().to_string(), std::fs::read(&path).unwrap())).collect()
}

fn steps(stage: &Stage, args: &[&str]) -> Vec<(String, String, String)> {
    let args: Vec<&str> = ["--json", "reconcile"].iter().chain(args).copied().collect();
    let finished = stage.call(&args).expect(0);
    let row = |line: &str| {
        let row: Value = serde_json::from_str(line).unwrap();
        let text = |key: &str| row[key].as_str().unwrap().to_owned();
        (text("step"), text("what"), text("outcome"))
    };
    finished.stdout.lines().map(row).collect()
}

/// How many of a step there are.
fn count(steps: &[(String, String, String)], step: &str, outcome: &str) -> usize {
    steps.iter().filter(|(s, _, o)| s == step && o == outcome).count()
}

struct Left {
    /// Adopted: their specs and exit codes.
    adopted: Vec<(Spec, Option<i32>)>,
    /// Of them, those that wait at their gate.
    gated: Vec<Spec>,
    /// Ended without a run.
    ended: Vec<Spec>,
}

/// 50 instances in every phase in which a collector can die.
fn left_by_a_dead_collector(stage: &Stage) -> Left {
    let mut left = Left { adopted: Vec::new(), gated: Vec::new(), ended: Vec::new() };
    let gated: Vec<Spec> =
        (0..30).map(|i| stage.spec(&format!("pika-guest ready; {}; exit {}", Stage::gate(), i % 3))).collect();
    let early: Vec<Spec> = (0..10).map(|_| stage.spec("exit 7")).collect();
    let running: Vec<_> = gated.iter().map(|spec| stage.start(spec)).collect();
    for spec in &gated {
        stage.wait_ready(spec);
    }
    running.into_iter().for_each(pika_cloud_tests::Running::kill);
    // In the middle of a create or a start.
    for spec in &early {
        let running = stage.start(spec);
        eventually("the instance is there", || stage.has_instance(spec));
        running.kill();
    }
    std::thread::scope(|scope| {
        for spec in &gated[20..] {
            scope.spawn(|| Incus.stop(&spec.instance));
        }
        // These end while nobody looks.
        gated[..10].iter().for_each(|spec| stage.open_gate(spec));
    });
    left.gated.extend_from_slice(&gated[10..20]);
    for (i, spec) in gated.into_iter().enumerate() {
        let code = i32::try_from(i % 3).unwrap();
        left.adopted.push((spec, (i < 20).then_some(code)));
    }
    left.adopted.extend(early.into_iter().map(|spec| (spec, Some(7))));
    // Concluded, and its instance made again by a create that Incus finished late.
    let finished: Vec<Spec> = (0..5).map(|_| stage.spec("true")).collect();
    let runs: Vec<_> = finished.iter().map(|spec| stage.start(spec)).collect();
    for run in runs {
        run.finish().expect(0);
    }
    left.ended.extend(finished);
    // Nothing is known of these any more.
    left.ended.extend((0..5).map(|_| stage.spec("true")));
    for spec in &left.ended {
        create(spec, &owner(stage), 1, SystemTime::now());
    }
    left
}

/// Invariant 4.
#[test]
fn fifty_instances_of_a_dead_collector_are_reconciled_and_five_foreign_ones_are_left_alone() {
    let stage = Stage::new("fifty");
    let left = left_by_a_dead_collector(&stage);
    let foreign: Vec<Spec> = (0..5).map(|_| stage.spec("true").with("watchdogs.run_secs", 1)).collect();
    for (i, spec) in foreign.iter().enumerate() {
        let plain = json!({
            "name": spec.instance, "type": "container", "source": { "type": "image", "alias": BARE_IMAGE },
            "config": if i == 1 { json!({ label("owner"): owner(&stage), label("runtime-id"): spec.id }) } else { json!({}) },
        });
        match i {
            0 | 1 => Incus.change("POST", "/1.0/instances", Some(&plain)).unwrap(),
            // The last one expired long ago.
            4 => create(spec, "another", 1, SystemTime::UNIX_EPOCH),
            _ => create(spec, "another", 1, SystemTime::now()),
        }
    }
    let before: Vec<Value> = foreign.iter().map(|spec| snapshot(&spec.instance)).collect();
    let all = || left.adopted.iter().map(|(spec, _)| spec).chain(&left.ended);
    assert_eq!(all().count(), 50);

    let (known, instances) = (bytes_of(&stage.state()), all().map(|s| snapshot(&s.instance)).collect::<Vec<_>>());
    let planned = steps(&stage, &["--dry-run"]);
    assert_eq!(count(&planned, "adopt", "planned"), 40, "{planned:?}");
    let of_ours = |step: &str| {
        planned
            .iter()
            .filter(|(s, what, _)| s == step && all().any(|spec| what.ends_with(&format!("/{}", spec.instance))))
            .count()
    };
    assert_eq!((of_ours("end"), of_ours("report")), (10, 0), "{planned:?}");
    assert_eq!(bytes_of(&stage.state()), known, "a dry run touches nothing");
    assert_eq!(all().map(|spec| snapshot(&spec.instance)).collect::<Vec<_>>(), instances);

    let began = std::time::Instant::now();
    let reconciling = pika_cloud_tests::Running::start(&mut stage.cloud(&["reconcile"]));
    left.gated.iter().for_each(|spec| stage.open_gate(spec));
    let finished = reconciling.finish().expect(0);
    println!("reconciled 50 instances in {:.1} s", began.elapsed().as_secs_f64());
    for (spec, code) in &left.adopted {
        let verdict = stage.incarnation(spec, 1).verdict();
        match code {
            Some(0) => assert_eq!(verdict["verdict"], "completed", "{verdict}"),
            Some(code) => assert_eq!((&verdict["verdict"], &verdict["exit_code"]), (&json!("failed"), &json!(code))),
            None => assert_eq!(verdict["verdict"], "guest_died", "{verdict}"),
        }
        assert!(finished.stdout.contains(&format!("runtime {} ", spec.id)), "{}", finished.stdout);
        stage.check_nothing_left(spec);
    }
    for spec in &left.ended {
        assert!(!stage.has_instance(spec), "{} is left", spec.instance);
        assert!(finished.stdout.contains(&format!("/{} ", spec.instance)), "{}", finished.stdout);
    }
    assert_eq!(foreign.iter().map(|spec| snapshot(&spec.instance)).collect::<Vec<_>>(), before);
    let again = steps(&stage, &[]);
    assert!(again.iter().all(|(step, ..)| step == "report"), "{again:?}");
}

/// Invariants 4 and 6: while a collector drives a runtime, nobody else acts on it.
#[test]
fn a_runtime_that_is_driven_is_left_alone() {
    let stage = Stage::new("driven");
    let spec = stage.spec(&format!("pika-guest ready; {}", Stage::gate()));
    let running = stage.start(&spec);
    stage.wait_ready(&spec);
    let seen = steps(&stage, &[]);
    assert!(!seen.iter().any(|(_, what, _)| what.contains(&spec.id)), "{seen:?}");
    stage.open_gate(&spec);
    running.finish().expect(0);
    stage.check_nothing_left(&spec);
}

/// Invariant 6.
#[test]
fn a_runtime_of_another_state_dir_is_taken_over_and_driven_to_its_end() {
    let (stage, other) = (Stage::new("heir"), Stage::new("gone"));
    let spec = other.spec(&format!(
        "echo started >> $PIKA_CLOUD_DIR/artifacts/starts; pika-guest ready; {}; echo end; exit 7",
        Stage::gate()
    ));
    let running = other.start(&spec);
    other.wait_ready(&spec);
    running.kill();
    let seen = steps(&stage, &[]);
    let what = format!("instance default/{}", spec.instance);
    assert!(seen.contains(&("report".to_owned(), what, "done".to_owned())), "{seen:?}");
    stage.call(&["reconcile", "--take-over", "nobody"]).expect(125).saying(&["nobody", "not reconciled"]);
    assert_eq!(config(&spec.instance)[&label("owner")], owner(&other));

    let taking = pika_cloud_tests::Running::start(&mut stage.cloud(&["reconcile", "--take-over", &spec.id]));
    eventually("it is taken", || Labels::read(&config(&spec.instance)).unwrap().term == 2);
    let labels = Labels::read(&config(&spec.instance)).unwrap();
    assert_eq!((labels.owner, labels.incarnation), (owner(&stage), 1));
    // Whoever held it finds that out, and does nothing.
    let seen = steps(&other, &[]);
    assert!(seen.iter().all(|(step, ..)| step == "report"), "{seen:?}");
    stage.open_gate(&spec);
    taking.finish().expect(0);
    let outputs = stage.incarnation(&spec, 1);
    assert_eq!(outputs.verdict()["exit_code"], 7);
    assert_eq!(outputs.text("artifacts/starts"), "started\n", "it was started once");
    assert_eq!(outputs.log(), "end\n");
    stage.check_nothing_left(&spec);
}

/// Makes what another state dir left ours, as a collector does that dies right behind that one call.
fn take_and_die(spec: &Spec, heir: &Stage) {
    let change = json!({ "config": { label("owner"): owner(heir), label("term"): "2" } });
    Incus.change("PATCH", &format!("/1.0/instances/{}", spec.instance), Some(&change)).unwrap();
}

/// What another state dir runs and its collector died of; the gate is closed.
fn left_running(other: &Stage, spec: &Spec, more: &[&str]) {
    let running = other.start_with(spec, more);
    other.wait_record(spec, "ready", |r| r["guest"]["kind"] == "ready" && (more.is_empty() || r["inc"] == 2));
    running.kill();
}

/// Runs it to its end here, so that this state dir has a finished runtime of that name.
fn run_here(stage: &Stage, spec: &Spec) {
    let running = stage.start(spec);
    stage.wait_ready(spec);
    stage.open_gate(spec);
    running.finish().expect(7);
    assert!(!stage.has_instance(spec));
}

fn namesake(stage: &Stage) -> Spec {
    stage
        .spec(&format!("echo started >> $PIKA_CLOUD_DIR/artifacts/starts; pika-guest ready; {}; exit 7", Stage::gate()))
}

/// Invariant 4: what this state dir knows is of an earlier life of that name, and says nothing about this one.
#[test]
fn a_finished_namesake_does_not_end_what_another_state_dir_runs() {
    let (stage, other) = (Stage::new("namesake"), Stage::new("namesake2"));
    let spec = namesake(&stage);
    run_here(&stage, &spec);
    let (folder, aside) = (stage.runtime(&spec), stage.more("aside"));
    left_running(&other, &spec, &[]);
    let before = snapshot(&spec.instance);
    let refused = stage.call(&["reconcile", "--take-over", &spec.id]).expect(125);
    assert!(refused.stdout.contains("an earlier runtime"), "{}", refused.stdout);
    assert!(refused.stdout.contains("--state-dir"), "the way out: {}", refused.stdout);
    assert_eq!(snapshot(&spec.instance), before, "its workload runs, and it is its owner's");
    assert_eq!(stage.journal(&spec).host("finished").len(), 1);
    // The way out.
    std::fs::rename(&folder, &aside).unwrap();
    let taking = pika_cloud_tests::Running::start(&mut stage.cloud(&["reconcile", "--take-over", &spec.id]));
    eventually("it is taken", || Labels::read(&config(&spec.instance)).unwrap().term == 2);
    stage.open_gate(&spec);
    taking.finish().expect(0);
    assert_eq!(stage.incarnation(&spec, 1).verdict()["exit_code"], 7);
    assert_eq!(stage.incarnation(&spec, 1).text("artifacts/starts"), "started\n");
    stage.check_nothing_left(&spec);
}

/// Invariants 4 and 7: whatever of a take-over is on the disk here, the next start goes on with it.
#[test]
fn a_take_over_that_was_cut_short_is_gone_on_with() {
    // Nothing is on the disk.
    let (stage, other) = (Stage::new("cut"), Stage::new("cut2"));
    stage.call(&["list"]).expect(0);
    let fresh = namesake(&other);
    left_running(&other, &fresh, &[]);
    take_and_die(&fresh, &stage);
    // As much, and a runtime of that name is finished here.
    let known = namesake(&other);
    run_here(&stage, &known);
    run_here(&other, &known);
    left_running(&other, &known, &["--again"]);
    take_and_die(&known, &stage);
    // The spec is, the journal is not.
    let begun = namesake(&other);
    left_running(&other, &begun, &[]);
    let taking = pika_cloud_tests::Running::start(&mut stage.cloud(&["reconcile", "--take-over", &begun.id]));
    eventually("it is begun here", || stage.runtime(&begun).join("spec.json").exists());
    taking.kill();
    let _ = std::fs::remove_file(stage.runtime(&begun).join("journal.jsonl"));

    let reconciling = pika_cloud_tests::Running::start(&mut stage.cloud(&["reconcile"]));
    for (spec, incarnation) in [(fresh, 1), (known, 2), (begun, 1)] {
        eventually("it is begun here", || stage.runtime(&spec).join("spec.json").exists());
        assert!(stage.has_instance(&spec), "{}", spec.id);
        stage.open_gate(&spec);
        let outputs = stage.incarnation(&spec, incarnation);
        eventually("its verdict", || outputs.path("verdict.json").exists());
        assert_eq!(outputs.verdict()["exit_code"], 7, "{}", spec.id);
        assert_eq!(outputs.text("artifacts/starts"), "started\n", "{}", spec.id);
        eventually("it is destroyed", || !stage.has_instance(&spec));
    }
    reconciling.finish().expect(0);
}

/// Invariant 4: what is to be ended needs no room for a run.
#[test]
fn an_instance_without_a_journal_is_ended_on_a_full_disk() {
    let stage = Stage::new("full");
    std::fs::create_dir_all(stage.state()).unwrap();
    let _mounted = Mounted::small_at(&stage.state());
    let spec = stage.spec("true");
    stage.run(&spec).expect(125).saying(&["bytes are free"]);
    create(&spec, &owner(&stage), 1, SystemTime::now());
    let ended = stage.call(&["reconcile"]).expect(0);
    assert!(!stage.has_instance(&spec), "{}", ended.stdout);
}

/// A file system of a mebibyte, for as long as it lives.
struct Mounted(std::path::PathBuf);

impl Mounted {
    fn small_at(folder: &Path) -> Self {
        let mut mount = std::process::Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=1m", "pika-test"]).arg(folder);
        assert!(mount.status().unwrap().success());
        Self(folder.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// What `inspect` says of a runtime's instance.
fn status(stage: &Stage, spec: &Spec) -> Value {
    let finished = stage.call(&["--json", "inspect", &spec.id]).expect(0);
    let inspection: Value = serde_json::from_str(&finished.stdout).unwrap();
    inspection["instance_status"].clone()
}

#[test]
fn an_instance_is_told_from_a_stranger_of_its_name() {
    let stage = Stage::new("stranger");
    let spec = stage.spec("exit 4").with("policies.retention_policy", "keep_until_stopped");
    stage.run(&spec).expect(4);
    assert_eq!(status(&stage, &spec), "Running");
    Incus.stop(&spec.instance);
    // Deleted with the stage, whatever becomes of the test.
    let renamed = stage.spec("true").instance;
    let body = json!({ "name": renamed });
    Incus.change("POST", &format!("/1.0/instances/{}", spec.instance), Some(&body)).unwrap();
    assert_eq!(status(&stage, &spec), "Stopped", "a person gave it another name");
    let plain =
        json!({ "name": spec.instance, "type": "container", "source": { "type": "image", "alias": BARE_IMAGE } });
    Incus.change("POST", "/1.0/instances", Some(&plain)).unwrap();
    Incus
        .change("PUT", &format!("/1.0/instances/{}/state", spec.instance), Some(&json!({ "action": "start" })))
        .unwrap();
    assert_eq!(status(&stage, &spec), "Stopped", "the other one is a stranger's");
    stage.call(&["destroy", &spec.id]).expect(0);
    assert!(Incus.instance(&renamed).is_none());
    assert_eq!(status(&stage, &spec), Value::Null);
    assert_eq!(Incus.instance(&spec.instance).unwrap()["status"], "Running");
}

/// Invariant 9: what stopped while nobody held it is not started again.
#[test]
fn a_stopped_instance_that_is_taken_over_is_ended_and_not_started_again() {
    let (stage, other) = (Stage::new("heir2"), Stage::new("gone2"));
    let spec = other.spec(&format!("pika-guest ready; {}", Stage::gate()));
    let running = other.start(&spec);
    other.wait_ready(&spec);
    running.kill();
    Incus.stop(&spec.instance);
    stage.call(&["reconcile", "--take-over", &spec.id]).expect(0);
    assert_eq!(stage.incarnation(&spec, 1).verdict()["verdict"], "guest_died");
    assert!(stage.journal(&spec).events(1).is_empty());
    stage.check_nothing_left(&spec);
}

fn volume_path(name: &str) -> String {
    format!("/1.0/storage-pools/default/volumes/custom/{name}")
}

/// A volume outlives its instances; an orphan is reported, and deleted only where that is asked for.
#[test]
fn a_volume_is_kept_for_its_runtime_and_an_orphan_is_deleted_on_request() {
    let stage = Stage::new("volume");
    let volume = |spec: &Spec, name: &str| {
        let mount = json!({ "kind": "persistent_volume", "guest_path": "/data", "source": name, "mode": "read_write" });
        spec.clone().with("mounts", json!([mount])).as_root()
    };
    let spec = stage.spec("cat /data/runs; echo run >> /data/runs");
    let name = format!("{}-data", spec.id);
    let spec = volume(&spec, &name);
    stage.run(&spec).expect(0);
    assert!(Incus.get(&volume_path(&name)).is_some(), "it is not deleted with its instance");
    let again = stage.start_with(&spec, &["--again"]).finish().expect(0);
    assert_eq!(again.stdout, "run\n", "the next incarnation finds what the last one wrote");

    // Neither another runtime nor another state dir gets it, nor does anyone get what is not ours.
    let thief = volume(&stage.spec("true"), &name);
    let finished = stage.run(&thief).expect(125);
    finished.saying(&[&name, "belongs to runtime", "left alone"]);
    let other = Stage::new("volume2");
    other.run(&spec).expect(125).saying(&[&name, "another state dir"]);
    let plain = format!("{name}-plain");
    Incus.change("POST", "/1.0/storage-pools/default/volumes/custom", Some(&json!({ "name": plain }))).unwrap();
    stage.run(&volume(&stage.spec("true"), &plain)).expect(125).saying(&[&plain, "not made by pika-cloud"]);

    let what = format!("volume default/{name} (default)");
    let is_there = |seen: Vec<(String, String, String)>| seen.into_iter().find(|(_, named, _)| *named == what);
    assert_eq!(is_there(steps(&stage, &["--delete-orphan-volumes"])), None, "its runtime is known here");
    std::fs::remove_dir_all(stage.runtime(&spec)).unwrap();
    assert_eq!(is_there(steps(&stage, &[])).unwrap().0, "report");
    assert_eq!(is_there(steps(&stage, &["--dry-run", "--delete-orphan-volumes"])).unwrap().2, "planned");
    assert!(Incus.get(&volume_path(&name)).is_some());
    let (step, _, outcome) = is_there(steps(&stage, &["--delete-orphan-volumes"])).unwrap();
    assert_eq!((step.as_str(), outcome.as_str()), ("delete", "done"));
    assert!(Incus.get(&volume_path(&name)).is_none());
    assert!(Incus.get(&volume_path(&plain)).is_some());
    Incus.change("DELETE", &volume_path(&plain), None).unwrap();
}

/// Invariant 6: of eight that take over at once, one wins.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_take_over_has_one_winner() {
    const RACERS: u64 = 8;
    let stage = Stage::new("race");
    let spec = stage.spec("true");
    create(&spec, "gone", 1, SystemTime::now());
    let client = Client::unix(&Lab::get().socket);
    for term in 1..=10 {
        let from = Labels::read(&config(&spec.instance)).unwrap();
        let expected = Holder { owner: from.owner, term };
        let racers = (0..RACERS).map(|racer| {
            let (client, expected, name) = (client.clone(), expected.clone(), spec.instance.clone());
            tokio::spawn(async move { client.take_over("default", &name, &format!("racer-{racer}"), &expected).await })
        });
        let mut winners = Vec::new();
        for (racer, task) in racers.collect::<Vec<_>>().into_iter().enumerate() {
            match task.await.unwrap() {
                Ok(won) => winners.push((racer, won)),
                Err(error) => assert!(matches!(error, Error::TakeOverLost { .. }), "{error}"),
            }
        }
        let labels = Labels::read(&config(&spec.instance)).unwrap();
        assert_eq!(winners.len(), 1, "{winners:?}");
        assert_eq!((labels.owner, labels.term), (format!("racer-{}", winners[0].0), term + 1));
        assert_eq!(winners[0].1, term + 1);
    }
}

/// A change that Incus makes to an instance beside us is no lost race; a stop under way is waited for.
#[tokio::test]
async fn a_busy_instance_is_taken_over_all_the_same() {
    let stage = Stage::new("busy");
    let spec = stage.spec("true");
    create(&spec, "gone", 1, SystemTime::now());
    let client = Client::unix(&Lab::get().socket);
    client.start_instance("default", &spec.instance).await.unwrap();
    let expected = Holder { owner: "gone".to_owned(), term: 1 };
    let (stopped, taken) = tokio::join!(client.stop_instance("default", &spec.instance), async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        client.take_over("default", &spec.instance, "us", &expected).await
    });
    stopped.unwrap();
    assert_eq!(taken.unwrap(), 2);
}
