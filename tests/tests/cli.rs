//! Each command of `pika-cloud` once, as a user meets it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::{Command, Stdio};

use pika_cloud_tests::{Incus, Lab, Running, Stage, eventually};
use serde_json::Value;

#[test]
fn a_live_runtime_is_watched_inspected_listed_and_read() {
    let stage = Stage::new("live");
    let spec = stage.spec(&format!(
        "echo one; pika-guest ready; {}; echo two; echo x > $PIKA_CLOUD_DIR/artifacts/x; exit 4",
        Stage::gate()
    ));
    let running = stage.start(&spec);
    stage.wait_ready(&spec);
    let mut watching = Running::start(&mut stage.cloud(&["watch", &spec.id]));
    let mut following = Running::start(&mut stage.cloud(&["logs", "-f", &spec.id]));
    eventually("watch shows where it is", || watching.said().contains("ready"));
    eventually("logs -f prints what is there", || following.printed().iter().any(|line| line.text == "one\n"));
    assert_eq!(stage.call(&["logs", &spec.id]).expect(0).stdout, "one\n");

    let shown = stage.call(&["inspect", &spec.id]).expect(0).stdout;
    for word in [&*spec.id, "ready", "Running", "exec", "last_seq"] {
        assert!(shown.contains(word), "{word}: {shown}");
    }
    let document: Value = serde_json::from_str(&stage.call(&["--json", "inspect", &spec.id]).expect(0).stdout).unwrap();
    assert_eq!(document["state"], "ready");
    assert_eq!(document["instance_status"], "Running");
    assert_eq!(document["last_seq"], 2);
    assert_eq!(document["verdict"], Value::Null);
    assert_eq!(document["spec"]["identity"]["runtime_id"], *spec.id);
    let listed = stage.call(&["list"]).expect(0).stdout;
    assert!(listed.lines().any(|line| line.starts_with(&spec.id) && line.contains("ready")), "{listed}");

    // What is on the host so far can be had at any time.
    let early = stage.more("early");
    stage.call(&["collect", &spec.id, "--output", early.to_str().unwrap()]).expect(0);
    assert_eq!(std::fs::read_to_string(early.join("events.jsonl")).unwrap().lines().count(), 2);
    assert_eq!(std::fs::read_to_string(early.join("logs/guest.log")).unwrap(), "one\n");

    assert!(watching.is_running() && following.is_running());
    stage.open_gate(&spec);
    running.finish().expect(4);
    let watched = watching.finish().expect(4).saying(&["failed", "exit code 4"]);
    assert_eq!(watched.stdout, "one\ntwo\n");
    assert_eq!(following.finish().expect(0).stdout, "one\ntwo\n");

    stage.call(&["watch", &spec.id]).expect(4);
    let late = stage.more("late");
    stage.call(&["collect", &spec.id, "--output", late.to_str().unwrap()]).expect(0);
    let output = stage.outputs(&spec);
    for name in [
        "events.jsonl",
        "status.json",
        "result.json",
        "verdict.json",
        "logs/guest.log",
        "artifacts/x",
        "artifacts.sha256",
    ] {
        assert_eq!(std::fs::read(late.join(name)).unwrap(), output.bytes(name), "{name}");
    }
    let document: Value = serde_json::from_str(&stage.call(&["--json", "inspect", &spec.id]).expect(0).stdout).unwrap();
    assert_eq!(document["verdict"], output.verdict());
    assert_eq!(document["instance_status"], Value::Null);
    let rows: Value = serde_json::from_str(&stage.call(&["--json", "list"]).expect(0).stdout).unwrap();
    assert_eq!(rows[0]["runtime_id"], *spec.id, "{rows}");
    stage.check_nothing_left(&spec);
}

#[test]
fn a_live_runtime_is_destroyed_from_another_process() {
    let stage = Stage::new("destroy");
    let spec =
        stage.spec("echo begun; echo x > $PIKA_CLOUD_DIR/artifacts/x; pika-guest ready; while :; do sleep 1; done");
    let running = stage.start(&spec);
    stage.wait_ready(&spec);
    stage.call(&["destroy", &spec.id]).expect(0).saying(&["destroyed", "stay in the state dir"]);
    assert!(!stage.has_instance(&spec));
    running.finish().expect(130);
    let outputs = stage.outputs(&spec);
    assert_eq!(outputs.verdict()["verdict"], "cancelled");
    assert_eq!(outputs.artifacts(), ["x"]);
    stage.check_nothing_left(&spec);
    // Again: nothing is left to be done.
    stage.call(&["destroy", &spec.id]).expect(0);
}

#[test]
fn a_runtime_that_nobody_drives_is_destroyed() {
    let stage = Stage::new("orphan");
    let spec = stage.spec("pika-guest ready; while :; do sleep 1; done");
    let running = stage.start(&spec);
    stage.wait_ready(&spec);
    running.kill();
    stage.call(&["destroy", &spec.id]).expect(0);
    assert_eq!(stage.journal(&spec).verdict(1)["verdict"], "cancelled");
    stage.check_nothing_left(&spec);
    stage.run(&spec).expect(130).saying(&["already ended"]);
}

#[test]
fn the_doctor_finds_this_host_well_and_others_ill() {
    let stage = Stage::new("doctor");
    let well = stage.call(&["doctor"]).expect(0).stdout;
    for word in ["state dir", "Incus 6", "storage pools: default", "root disk"] {
        assert!(well.contains(word), "{word}: {well}");
    }
    assert!(well.lines().all(|line| line.starts_with("ok ")), "{well}");
    let drivers = Incus.get("/1.0").unwrap()["environment"]["driver"].to_string();
    let machines = if drivers.contains("qemu") { "can be dialled over vsock" } else { "containers only" };
    assert!(well.contains(machines), "Incus's drivers are {drivers}: {well}");
    let mut command = Command::new(&Lab::get().cloud);
    command.args(["--incus", "unix:/not/there.socket", "--state-dir", "/proc/none", "doctor"]);
    let ill = Running::start(&mut command).finish().expect(1).stdout;
    assert_eq!(ill.matches("missing").count(), 2, "{ill}");
    assert_eq!(ill.matches("mend it").count(), 2, "{ill}");
    assert!(ill.contains("apt install incus") && ill.contains("--state-dir"), "{ill}");
}

#[test]
fn schemas_and_completions_are_printed() {
    let stage = Stage::new("schema");
    let names = stage.call(&["schema"]).expect(0).stdout;
    assert!(names.lines().count() >= 5, "{names}");
    for name in names.lines() {
        let name = name.split_whitespace().next().unwrap();
        let schema: Value = serde_json::from_str(&stage.call(&["schema", name]).expect(0).stdout).unwrap();
        assert!(schema["$schema"].is_string(), "{name}");
    }
    stage.call(&["schema", "nonsense"]).expect(125).saying(&["nonsense"]);
    for shell in ["bash", "zsh", "fish"] {
        assert!(stage.call(&["completions", shell]).expect(0).stdout.contains("pika-cloud"), "{shell}");
    }
    assert!(!stage.state().exists(), "neither needs a state dir");
    let help = stage.call(&["--help"]).expect(0).stdout;
    for word in ["run", "watch", "destroy", "Exit codes", "124"] {
        assert!(help.contains(word), "{word}");
    }
}

/// The spec comes on standard input, Incus and state dir from the environment.
#[test]
fn a_spec_is_read_from_standard_input() {
    let stage = Stage::new("stdin");
    let spec = stage.spec("echo hello");
    let file = std::fs::File::open(stage.write(&spec)).unwrap();
    let mut command = Command::new(&Lab::get().cloud);
    command.env("PIKA_CLOUD_STATE_DIR", stage.state()).env_remove("INCUS_SOCKET");
    command.env("INCUS_DIR", &Lab::get().incus_dir).args(["run", "-"]).stdin(file);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.stdout, b"hello\n");
    // Plain lines where there is no terminal.
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.lines().all(|line| line.starts_with("pika-cloud: ")) && !said.contains('\x1b'), "{said}");
    assert_eq!(Incus.instance(&spec.instance), None);
    stage.check_nothing_left(&spec);
}

/// `pika-cloud run … | head -1`: a reader that has seen enough ends no job.
#[test]
fn a_reader_that_goes_away_ends_no_job() {
    let stage = Stage::new("pipe");
    let spec = stage.spec(&format!(
        "echo one; pika-guest ready; {}; i=0; while [ $i -lt 5000 ]; do i=$((i+1)); echo line $i; done",
        Stage::gate()
    ));
    let mut child = stage.run_command(&spec, &[]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    stage.wait_ready(&spec);
    drop((child.stdout.take(), child.stderr.take()));
    stage.open_gate(&spec);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(stage.outputs(&spec).log().lines().count(), 5001);
    stage.check_nothing_left(&spec);
}
