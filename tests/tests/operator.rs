//! An operator at work on the instance of a runtime: it is stopped, deleted, restarted, renamed or paused under us.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use pika_cloud_tests::{Incus, Signal, Spec, Stage, eventually};
use serde_json::{Value, json};

/// A workload that says a word and never ends.
const ENDLESS: &str =
    "echo begun; echo started >> $PIKA_CLOUD_DIR/artifacts/starts; pika-guest ready; while :; do sleep 1; done";

/// What an operator does to a spec's instance.
type Act<'a> = &'a dyn Fn(&Spec);

/// The `incus` command.
fn incus(args: &[&str]) {
    let output = Incus.client(args).output().unwrap();
    assert!(output.status.success(), "incus {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Gives an instance another name, as it has to be done: stopped.
fn rename(spec: &Spec, name: &str) {
    Incus.stop(&spec.instance);
    incus(&["rename", &spec.instance, name]);
}

/// The one verdict: it died of one of the causes, and what had come is kept.
fn check_died(stage: &Stage, spec: &Spec, causes: &[&str]) -> Value {
    let verdict = stage.outputs(spec).verdict();
    assert_eq!(*stage.journal(spec).verdict(1), verdict, "Invariant 2");
    assert_eq!(verdict["verdict"], "guest_died", "{verdict}");
    assert!(causes.iter().any(|cause| verdict["cause"] == *cause), "{verdict}");
    assert_eq!(verdict["evidence"]["last_event"]["kind"], "ready");
    assert_eq!(stage.outputs(spec).log(), "begun\n", "what had come is kept");
    stage.check_nothing_left(spec);
    verdict
}

/// A job in whose middle `act` happens.
fn ended_by(stage: &Stage, act: impl Fn(&Spec), causes: &[&str]) -> Value {
    let spec = stage.spec(ENDLESS);
    let running = stage.start(&spec);
    stage.wait_ready(&spec);
    act(&spec);
    running.finish().expect(126);
    check_died(stage, &spec, causes)
}

#[test]
fn an_instance_that_is_stopped_died() {
    let stage = Stage::new("stopped");
    let verdict = ended_by(&stage, |spec| Incus.stop(&spec.instance), &["instance_stopped"]);
    assert_eq!(verdict["evidence"]["instance_status"], "Stopped");
}

#[test]
fn an_instance_that_is_deleted_died() {
    let stage = Stage::new("deleted");
    // It is stopped first, and the host may see that.
    let delete = |spec: &Spec| incus(&["delete", "-f", &spec.instance]);
    ended_by(&stage, delete, &["instance_gone", "instance_stopped"]);
}

#[test]
fn an_instance_that_is_restarted_died() {
    let stage = Stage::new("restarted");
    // Whichever of the two the host happens to see first.
    ended_by(&stage, |spec| incus(&["restart", "-f", &spec.instance]), &["rebooted", "instance_stopped"]);
}

#[test]
fn an_instance_that_is_renamed_died_and_is_found_by_its_labels() {
    let stage = Stage::new("renamed");
    let (spec, other) = (stage.spec(ENDLESS), stage.spec("").instance);
    let running = stage.start(&spec);
    stage.wait_ready(&spec);
    eventually("its log is on the host", || stage.incarnation(&spec, 1).has("logs/guest.log"));
    // Only a stopped instance can be renamed, and a collector that sees it stopped destroys it at once.
    running.signal(Signal::STOP);
    rename(&spec, &other);
    running.signal(Signal::CONT);
    running.finish().expect(126);
    let verdict = check_died(&stage, &spec, &["instance_stopped"]);
    assert_eq!(verdict["evidence"]["instance_status"], "Stopped");
    assert!(Incus.instance(&other).is_none(), "it is destroyed under its other name");
}

/// Invariant 4: whatever happens while no collector looks.
#[test]
fn what_an_operator_did_unseen_is_found_later() {
    let stage = Stage::new("unseen");
    let (name, again) = (stage.spec("").instance, stage.spec("").instance);
    let cases: [(Act<'_>, &str); 5] = [
        (&|spec| Incus.stop(&spec.instance), "instance_stopped"),
        (&|spec| Incus.delete(&spec.instance), "instance_gone"),
        (&|spec| incus(&["restart", "-f", &spec.instance]), "rebooted"),
        (&|spec| rename(spec, &name), "instance_stopped"),
        // Started again under its other name it booted anew.
        (
            &|spec| {
                rename(spec, &again);
                incus(&["start", &again]);
            },
            "rebooted",
        ),
    ];
    let specs: Vec<Spec> = cases.iter().map(|_| stage.spec(ENDLESS)).collect();
    let running: Vec<_> = specs.iter().map(|spec| stage.start(spec)).collect();
    for ((running, spec), (act, _)) in running.into_iter().zip(&specs).zip(&cases) {
        stage.wait_ready(spec);
        eventually("its log is on the host", || stage.incarnation(spec, 1).has("logs/guest.log"));
        running.kill();
        act(spec);
    }
    let running: Vec<_> = specs.iter().map(|spec| stage.start(spec)).collect();
    for ((running, spec), (_, cause)) in running.into_iter().zip(&specs).zip(&cases) {
        running.finish().expect(126);
        check_died(&stage, spec, &[cause]);
        if *cause == "rebooted" {
            // Its files outlived the boot, and its workload was not started a second time (Invariant 9). The guest may end
            // the session of the earlier stream before it is asked for what it left.
            let outputs = stage.outputs(spec);
            let collection = &outputs.verdict()["evidence"]["collection"];
            if collection["complete"] == true {
                assert_eq!(outputs.text("artifacts/starts"), "started\n");
            } else {
                assert!(collection["error"].as_str().unwrap().contains("booted again"), "{collection}");
            }
            assert_eq!(stage.journal(spec).check_events(1), 2);
        }
    }
    for name in [name, again] {
        assert!(Incus.instance(&name).is_none(), "{name} is left");
    }
}

/// Invariant 4: the name is another's now, who is left alone; what was ours is destroyed under its new name.
#[test]
fn a_stranger_under_the_old_name_is_left_alone() {
    let stage = Stage::new("stranger");
    let other = stage.spec("").instance;
    let spec = stage.spec(ENDLESS);
    let running = stage.start(&spec);
    stage.wait_ready(&spec);
    running.kill();
    rename(&spec, &other);
    incus(&["create", pika_cloud_tests::BARE_IMAGE, &spec.instance]);
    let config = |name: &str| Incus.instance(name).map(|instance| instance["config"].clone());
    let before = config(&spec.instance);
    stage.run(&spec).expect(126);
    assert_eq!(stage.outputs(&spec).verdict()["cause"], "instance_stopped");
    assert_eq!(config(&spec.instance), before, "the stranger is as it was");
    assert_eq!(config(&other), None, "ours is gone");
    Incus.delete(&spec.instance);
    stage.check_nothing_left(&spec);
}

/// A pause that ends in time costs nothing.
#[test]
fn an_instance_that_is_paused_goes_on() {
    let stage = Stage::new("paused");
    let command = format!("echo begun; pika-guest ready; {}; echo thawed; exit 7", Stage::gate());
    let spec = stage.spec(&command);
    let running = stage.start(&spec);
    stage.wait_ready(&spec);
    incus(&["pause", &spec.instance]);
    eventually("Incus says so", || Incus.instance(&spec.instance).unwrap()["status"] == "Frozen");
    std::thread::sleep(std::time::Duration::from_secs(1));
    assert!(!stage.journal(&spec).has("ended"), "nothing is concluded from it");
    incus(&["start", &spec.instance]);
    stage.open_gate(&spec);
    running.finish().expect(7);
    assert_eq!(stage.outputs(&spec).log(), "begun\nthawed\n");
    assert_eq!(stage.journal(&spec).check_events(1), 3);
    stage.check_nothing_left(&spec);
}

/// An operator who ends what is kept, or changes what it may use, is in the way of nothing.
#[test]
fn what_is_kept_may_be_deleted_by_hand() {
    let stage = Stage::new("byhand");
    let spec = stage.spec("exit 3").with("policies.retention_policy", "keep_until_stopped");
    stage.run(&spec).expect(3);
    let body = json!({ "config": { "limits.memory": "512MiB", "user.note": "kept by hand" } });
    Incus.change("PATCH", &format!("/1.0/instances/{}", spec.instance), Some(&body)).unwrap();
    Incus.delete(&spec.instance);
    stage.call(&["destroy", &spec.id]).expect(0);
    assert_eq!(stage.journal(&spec).verdict(1)["verdict"], "failed");
    stage.check_nothing_left(&spec);
}
