//! Bad input: a message that names the thing and the way out, exit code 125, and nothing half done.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use pika_cloud_tests::{BARE_IMAGE, Finished, Image, Incus, Lab, Running, Spec, Stage};
use serde_json::json;

const NOBODY: u32 = 65534;

/// That pika-cloud refused, saying all of `words`, before it touched anything.
fn refused(stage: &Stage, spec: &Spec, done: Finished, words: &[&str]) {
    let done = done.expect(125).saying(&["pika-cloud: error: "]).saying(words);
    assert!(!done.stderr.contains("panicked"), "{}", done.stderr);
    assert!(!stage.has_instance(spec), "an instance was made");
    assert!(!stage.runtime(spec).exists(), "a runtime was begun: {}", done.stderr);
    stage.check_folders();
}

#[test]
fn every_field_that_is_wrong_is_named_at_once() {
    let stage = Stage::new("fields");
    let spec = stage.spec("true");
    let wrong = json!({
        "identity": { "runtime_id": "../up", "instance_name": "1_b-" },
        "incus": { "project": "", "profile": "a\u{7}b", "image_alias": "", "instance_type": "virtual_machine", "csm": true, "target": "m2", "extra_profiles": [""] },
        "resources": { "vcpu_count": 0, "memory_mib": 1, "root_disk_gib": 0 },
        "mounts": [
            { "kind": "persistent_volume", "guest_path": "/run/x", "source": "a/b/c", "mode": "read_write", "required": false },
            { "kind": "read_only_snapshot", "guest_path": "/a/../b", "source": "/srv", "mode": "read_write" },
            { "kind": "floppy", "guest_path": "/c", "source": "/srv" }
        ],
        "paths": { "state_dir": "/elsewhere" },
        "policies": { "restart_policy": "sometimes", "max_restarts": 0, "restart_backoff_secs": 9, "restart_backoff_cap_secs": 8, "retention_policy": "debug_keep", "debug_keep_secs": 0, "output_collection": { "artifact_globs": ["/etc/*", "../*"] } },
        "entry_command": " ",
        "bootstrap": { "env": { "1A": "x", "PIKA_CLOUD_DIR": "/x" }, "cwd": "here", "user": "joe", "files": { "a": 1 }, "secrets": { "b": 2 } },
        "watchdogs": { "boot_secs": 0, "silence_secs": 1, "run_secs": 0, "ready_secs": 0, "progress_secs": 9, "progress_cap_secs": 8, "collect_secs": "soon" },
        "limits": { "artifact_files": 1_000_000_000, "event_bytes": 1 },
        "devices": [1],
        "labels": { "a b": "c" },
        "lables": {}
    });
    let file = stage.more("file");
    fs::write(&file, wrong.to_string()).unwrap();
    let done = stage.call(&["run", file.to_str().unwrap()]);
    let fields = [
        "identity.runtime_id",
        "identity.instance_name",
        "incus.project",
        "incus.profile",
        "incus.extra_profiles[0]",
        "incus.image_alias",
        "incus.csm",
        "incus.target",
        "resources.vcpu_count",
        "resources.memory_mib",
        "resources.root_disk_gib",
        "mounts[0].guest_path",
        "mounts[0].source",
        "mounts[0].required",
        "mounts[1].guest_path",
        "mounts[1].mode",
        "mounts[2].kind",
        "paths.state_dir",
        "policies.restart_policy",
        "policies.max_restarts",
        "policies.restart_backoff_cap_secs",
        "policies.debug_keep_secs",
        "policies.output_collection.artifact_globs[0]",
        "policies.output_collection.artifact_globs[1]",
        "entry_command",
        "bootstrap.env.1A",
        "bootstrap.env.PIKA_CLOUD_DIR",
        "bootstrap.cwd",
        "bootstrap.user",
        "bootstrap.files",
        "bootstrap.secrets",
        "watchdogs.boot_secs",
        "watchdogs.silence_secs",
        "watchdogs.run_secs",
        "watchdogs.ready_secs",
        "watchdogs.progress_cap_secs",
        "watchdogs.collect_secs",
        "limits.artifact_files",
        "limits.event_bytes",
        "devices",
        "labels[\"a b\"]",
        "lables",
    ];
    for field in fields {
        assert!(done.stderr.contains(&format!("\n  {field}: ")), "{field} is not named:\n{}", done.stderr);
    }
    assert_eq!(done.stderr.matches("\n  ").count(), fields.len(), "each once, and nothing else:\n{}", done.stderr);
    refused(&stage, &spec, done, &[&file.display().to_string(), "not implemented yet"]);
    assert!(stage.call(&["list"]).expect(0).stdout.lines().count() == 1, "no runtime is listed");
}

#[test]
fn a_spec_that_is_not_json_is_told_with_line_and_column() {
    let stage = Stage::new("syntax");
    let spec = stage.spec("true");
    let file = stage.more("file");
    for (text, words) in [
        ("{\n  \"identity\": {\n    \"runtime_id\": \"a\" \"b\"\n", ["not JSON", "line 3 column 23"]),
        ("", ["not JSON", "line 1 column 0"]),
        ("{\"labels\": {\"a\": \"b\", \"a\": \"c\"}}", ["given twice", "line 1"]),
        ("[]", ["the spec", "an object"]),
    ] {
        fs::write(&file, text).unwrap();
        let done = stage.call(&["run", file.to_str().unwrap()]);
        refused(&stage, &spec, done, &words);
    }
    fs::write(&file, [0xff, 0xfe]).unwrap();
    refused(&stage, &spec, stage.call(&["run", file.to_str().unwrap()]), &["cannot be read", "file"]);
}

#[test]
fn a_spec_file_that_is_missing_is_named() {
    let stage = Stage::new("nofile");
    let spec = stage.spec("true");
    let done = stage.call(&["run", "/not/there.json"]);
    refused(&stage, &spec, done, &["/not/there.json", "No such file"]);
    let folder = stage.more("file");
    fs::create_dir(&folder).unwrap();
    refused(&stage, &spec, stage.call(&["run", folder.to_str().unwrap()]), &[folder.to_str().unwrap(), "directory"]);
}

#[test]
fn a_wrong_call_says_how_it_is_called() {
    let stage = Stage::new("usage");
    stage.call(&["run"]).expect(125).saying(&["Usage:", "<SPEC>"]);
    stage.call(&["rnu", "x"]).expect(125).saying(&["rnu", "--help"]);
    let mut elsewhere = Command::new(&Lab::get().cloud);
    elsewhere.args(["--incus", "tcp:1.2.3.4", "doctor"]);
    Running::start(&mut elsewhere).finish().expect(125).saying(&["tcp:1.2.3.4", "unix:"]);
    for verb in ["inspect", "watch", "logs", "destroy"] {
        stage.call(&[verb, "nobody-knows-it"]).expect(125).saying(&["nobody-knows-it", "pika-cloud list"]);
        stage.call(&[verb, "../../etc"]).expect(125).saying(&["no runtime"]);
    }
}

/// `pika-cloud run` with another socket than the private Incus's.
fn run_with_socket(stage: &Stage, spec: &Spec, socket: &Path) -> Command {
    let mut command = Command::new(&Lab::get().cloud);
    command.arg("--incus").arg(format!("unix:{}", socket.display()));
    command.arg("--state-dir").arg(stage.state()).arg("run").arg(stage.write(spec));
    command
}

#[test]
fn no_incus_at_the_socket_is_told() {
    let stage = Stage::new("nosocket");
    let spec = stage.spec("true");
    let socket = stage.more("absent.socket");
    let done = Running::start(&mut run_with_socket(&stage, &spec, &socket)).finish();
    refused(&stage, &spec, done, &[socket.to_str().unwrap(), "systemctl start incus", "apt install incus", "--incus"]);
    // A socket whose daemon is gone.
    let dead = stage.more("file");
    drop(std::os::unix::net::UnixListener::bind(&dead).unwrap());
    let done = Running::start(&mut run_with_socket(&stage, &spec, &dead)).finish();
    refused(&stage, &spec, done, &["no Incus answers", dead.to_str().unwrap()]);
}

/// As the user `nobody`, who may enter the stage's folder and use a copy of the program.
fn as_nobody(stage: &Stage, command: &mut Command) -> Finished {
    fs::set_permissions(stage.path(""), Permissions::from_mode(0o777)).unwrap();
    Running::start(command.uid(NOBODY).gid(NOBODY)).finish()
}

/// A copy of `pika-cloud` that anybody can run, wherever the original lies.
fn program_for_all(stage: &Stage) -> PathBuf {
    let folder = stage.more("bare");
    fs::create_dir(&folder).unwrap();
    let program = folder.join("pika-cloud");
    fs::copy(&Lab::get().cloud, &program).unwrap();
    fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    program
}

#[test]
fn no_permission_on_the_socket_is_told() {
    let stage = Stage::new("nobody");
    let spec = stage.spec("true");
    // The private daemon's own socket lies where only root gets; this one anybody finds, and only root may open.
    let socket = stage.more("file");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    fs::set_permissions(&socket, Permissions::from_mode(0o660)).unwrap();
    let mut command = Command::new(program_for_all(&stage));
    let file = stage.write(&spec);
    command.arg("--incus").arg(format!("unix:{}", socket.display())).arg("--state-dir").arg(stage.state());
    let done = as_nobody(&stage, command.arg("run").arg(file));
    refused(&stage, &spec, done, &["no permission", socket.to_str().unwrap(), "incus-admin"]);
}

#[test]
fn a_state_dir_that_cannot_be_written_is_told() {
    let stage = Stage::new("readonly");
    let spec = stage.spec("true");
    fs::create_dir(stage.state()).unwrap();
    fs::set_permissions(stage.state(), Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new(program_for_all(&stage));
    let file = stage.write(&spec);
    command.arg("--incus").arg(format!("unix:{}", Lab::get().socket.display())).arg("--state-dir").arg(stage.state());
    let done = as_nobody(&stage, command.arg("run").arg(file));
    refused(&stage, &spec, done, &[stage.state().to_str().unwrap(), "Permission denied", "--state-dir"]);
    // A file in its place.
    fs::remove_dir_all(stage.state()).unwrap();
    fs::write(stage.state(), "").unwrap();
    refused(&stage, &spec, stage.run(&spec), &[stage.state().to_str().unwrap(), "--state-dir"]);
}

/// A tmpfs of a test's own; dropping it unmounts it.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(at: PathBuf, options: &str) -> Self {
        fs::create_dir_all(&at).unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&at).status().unwrap();
        assert!(mounted.success(), "mount a tmpfs at {}", at.display());
        Self(at)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_state_dir_is_told() {
    let stage = Stage::new("full");
    let spec = stage.spec("true");
    let _tmpfs = Tmpfs::mount(stage.state(), "size=1m");
    fs::write(stage.state().join("ballast"), vec![0; 900 * 1024]).unwrap();
    refused(&stage, &spec, stage.run(&spec), &[stage.state().to_str().unwrap(), "free", "--state-dir"]);
}

/// Invariant 2: a disk that fills up under a run costs no verdict, and destroys nothing that is not yet safe.
#[test]
fn a_state_dir_that_fills_up_under_a_run_is_told_and_gone_on_from() {
    let stage = Stage::new("fills");
    let command = format!(
        "echo begun; pika-guest ready; {}; head -c 40000000 /dev/zero | tr '\\0' x; echo; exit 7",
        Stage::gate()
    );
    let spec = stage.spec(&command);
    let _tmpfs = Tmpfs::mount(stage.state(), "size=24m");
    let running = stage.start(&spec);
    stage.wait_ready(&spec);
    stage.open_gate(&spec);
    let done = running.finish().expect(125);
    done.saying(&["No space left", "free some space"]);
    assert!(stage.has_instance(&spec), "what is not on the host is not destroyed");
    let grown = Command::new("mount").args(["-o", "remount,size=256m"]).arg(stage.state()).status().unwrap();
    assert!(grown.success());
    stage.run(&spec).expect(7);
    let log = stage.outputs(&spec).bytes("logs/guest.log");
    assert_eq!(log.len(), "begun\n".len() + 40_000_000 + 1);
    assert_eq!(stage.journal(&spec).check_events(1), 3);
    stage.check_nothing_left(&spec);
}

#[test]
fn what_the_spec_names_and_incus_lacks_is_told() {
    let stage = Stage::new("missing");
    let cases: [(&str, &[&str]); 4] = [
        ("incus.image_alias", &["image `not-there`", "project `default`", "incus image import"]),
        ("incus.project", &["project `not-there`", "incus project create not-there"]),
        ("incus.profile", &["profile `not-there`", "incus profile create not-there"]),
        ("incus.extra_profiles", &["profile `not-there`", "incus profile list"]),
    ];
    for (field, words) in cases {
        let spec = stage.spec("true");
        let value = if field == "incus.extra_profiles" { json!(["not-there"]) } else { json!("not-there") };
        let spec = spec.with(field, value);
        refused(&stage, &spec, stage.run(&spec), words);
    }
    let spec = stage.spec("true");
    let source = stage.more("absent");
    let mount = json!([{ "kind": "read_only_snapshot", "guest_path": "/workspace", "source": source }]);
    let spec = spec.with("mounts", mount);
    refused(&stage, &spec, stage.run(&spec), &["mounts[0].source", source.to_str().unwrap(), "no folder"]);
}

/// A profile of a test's own; dropping it deletes it.
struct Profile(String);

impl Drop for Profile {
    fn drop(&mut self) {
        let _ = Incus.change("DELETE", &format!("/1.0/profiles/{}", self.0), None);
    }
}

#[test]
fn an_incus_that_runs_no_virtual_machines_is_told() {
    let drivers = Incus.get("/1.0").unwrap()["environment"]["driver"].to_string();
    if drivers.contains("qemu") {
        println!("not run: this Incus runs virtual machines (its drivers are {drivers})");
        return;
    }
    let stage = Stage::new("drivers");
    let spec = stage.spec("true").with("incus.instance_type", "virtual_machine");
    refused(&stage, &spec, stage.run(&spec), &["driver for virtual machines", "vhost_vsock", "\"container\""]);
}

#[test]
fn a_profile_without_a_root_disk_is_told() {
    let stage = Stage::new("rootless");
    let spec = stage.spec("true");
    let profile = Profile(spec.id.clone());
    Incus.change("POST", "/1.0/profiles", Some(&json!({ "name": profile.0 }))).unwrap();
    let spec = spec.with("incus.profile", &*profile.0);
    let words = [&format!("root disk of profile `{}`", profile.0), "incus profile device add", "incus storage list"];
    refused(&stage, &spec, stage.run(&spec), &words);
}

/// Invariant 4.
#[test]
fn an_instance_that_is_not_ours_is_left_untouched() {
    let stage = Stage::new("foreign");
    let spec = stage.spec("true");
    let body =
        json!({ "name": spec.instance, "type": "container", "source": { "type": "image", "alias": BARE_IMAGE } });
    Incus.change("POST", "/1.0/instances", Some(&body)).unwrap();
    let before = Incus.instance(&spec.instance).unwrap();
    for _ in 0..2 {
        let done = stage.run(&spec).expect(125);
        done.saying(&[&spec.instance, "not made by pika-cloud", "left alone", "identity.instance_name"]);
    }
    stage.call(&["destroy", &spec.id]).expect(125);
    let after = Incus.instance(&spec.instance).unwrap();
    assert_eq!(after["config"], before["config"]);
    assert_eq!((&after["status"], &after["created_at"]), (&before["status"], &before["created_at"]));
    assert!(!stage.runtime(&spec).exists(), "a runtime was begun");
}

#[test]
fn another_spec_for_a_runtime_is_told_with_what_differs() {
    let stage = Stage::new("differs");
    let spec = stage.spec(&format!("pika-guest ready; {}", Stage::gate())).with("bootstrap.env.A", "1");
    let running = stage.start(&spec);
    stage.wait_ready(&spec);
    let other = spec.clone().with("entry_command", "true").with("resources.memory_mib", 64);
    let words = [&*spec.id, "another spec", "entry_command", "resources.memory_mib", "pika-cloud destroy"];
    // While it is driven by another, and when it is over.
    stage.run(&other).expect(125).saying(&words);
    stage.open_gate(&spec);
    running.finish().expect(0);
    let records = stage.journal(&spec).lines.len();
    stage.run(&other).expect(125).saying(&words);
    assert_eq!(stage.journal(&spec).lines.len(), records);
    // A secret's value is no difference: it is in no hash.
    stage.run(&spec.clone().with("bootstrap.env.A", "2")).expect(0).saying(&["already ended"]);
    stage.check_nothing_left(&spec);
}

/// That the runtime ended before anything ran in it, with a verdict that says why.
fn not_provided(stage: &Stage, spec: &Spec, words: &[&str]) {
    stage.run(spec).expect(125);
    let outputs = stage.outputs(spec);
    let verdict = outputs.verdict();
    assert_eq!(verdict["verdict"], "provision_failed", "{verdict}");
    let text = verdict.to_string();
    for word in words {
        assert!(text.contains(word), "`{word}` is not in {text}");
    }
    stage.check_nothing_left(spec);
}

#[test]
fn an_image_without_an_agent_is_told() {
    let stage = Stage::new("noagent");
    let spec = stage.spec("true").with("incus.image_alias", BARE_IMAGE).with("incus.agent", "baked");
    not_provided(&stage, &spec, &["pika-guest", "127", "pika-cloud bake", "`auto`"]);
}

#[test]
fn an_agent_of_another_protocol_is_told_with_both_versions() {
    let stage = Stage::new("protocol");
    let hello = r#"{"hello":{"protocol":7,"agent":"9.9.9","schema_version":1,"stream_id":"s","boot_id":"b","first_seq":1,"last_seq":0}}"#;
    let refusal =
        r#"{"error":{"code":"unsupported_protocol","message":"this agent speaks protocol 7, the host speaks 1"}}"#;
    for answer in [hello, refusal] {
        let image = Image::with_agent(&format!("#!/bin/sh\nread hello\necho '{answer}'\nsleep 30\n"));
        let spec = stage.spec("true").with("incus.image_alias", &*image.alias);
        not_provided(&stage, &spec, &["protocol", "7", "1"]);
    }
}

#[test]
fn an_agent_of_another_schema_is_told_with_both_versions() {
    let stage = Stage::new("schema");
    let hello = r#"{"hello":{"protocol":1,"agent":"9.9.9","schema_version":3,"stream_id":"s","boot_id":"b","first_seq":1,"last_seq":0}}"#;
    let image = Image::with_agent(&format!("#!/bin/sh\nread hello\necho '{hello}'\nsleep 30\n"));
    let spec = stage.spec("true").with("incus.image_alias", &*image.alias);
    not_provided(&stage, &spec, &["9.9.9", "schema_version", "3", "1"]);
}

/// What a workload does wrong is told to the workload.
#[test]
fn verbs_refuse_what_is_wrong() {
    let stage = Stage::new("verbs");
    let command = r#"try() { "$@" 2> /tmp/said; echo "$? $(tail -n 1 /tmp/said)"; }
        try pika-guest ready --details '{"a":'
        try pika-guest progress
        PIKA_CLOUD_DIR=/proc/none try pika-guest ready
        printf '{"schema_version":9,"command":"true","timeout_secs":0,"run_as_root":false}' > /tmp/request
        PIKA_CLOUD_DIR=/tmp/other try pika-guest run --request /tmp/request
        export PIKA_CLOUD_DIR=/tmp/third
        try pika-guest completed
        try pika-guest ready"#;
    let spec = stage.spec(command);
    stage.run(&spec).expect(0);
    let log = stage.outputs(&spec).log();
    let said: Vec<&str> = log.lines().collect();
    let expected: [(&str, &[&str]); 6] = [
        ("65", &["JSON", "column"]),
        ("64", &[]),
        ("73", &["/proc/none"]),
        ("65", &["9", "2", "version"]),
        ("0", &[]),
        ("69", &["already", "completed"]),
    ];
    for (line, (code, words)) in said.iter().zip(expected) {
        assert!(line.starts_with(&format!("{code} ")), "{code} expected: {line}");
        for word in words {
            assert!(line.contains(word), "`{word}` is not in: {line}");
        }
    }
    assert_eq!(said.len(), expected.len(), "{log}");
    assert_eq!(stage.journal(&spec).check_events(1), 2);
    stage.check_nothing_left(&spec);
}

#[test]
fn an_output_folder_that_cannot_be_written_is_told() {
    let stage = Stage::new("output");
    let spec = stage.spec("exit 0");
    let file = stage.write(&spec);
    let blocked = stage.more("file");
    fs::write(&blocked, "a file").unwrap();
    let done = stage.call(&["run", file.to_str().unwrap(), "--output", blocked.join("out").to_str().unwrap()]);
    done.expect(125).saying(&[blocked.to_str().unwrap(), "--output"]);
    assert!(!stage.runtime(&spec).exists(), "no job is run for outputs that have no place");
    // Where it turns out afterwards, the outputs are in the state dir all the same.
    let foreign = stage.more("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("verdict.json"), "somebody's").unwrap();
    let done = stage.call(&["run", file.to_str().unwrap(), "--output", foreign.to_str().unwrap()]);
    done.expect(125).saying(&[foreign.to_str().unwrap(), &format!("pika-cloud collect {} --output", spec.id)]);
    stage.check_nothing_left(&spec);
    stage.call(&["collect", &spec.id, "--output", stage.more("collected").to_str().unwrap()]).expect(0);
    assert!(stage.more("collected/verdict.json").exists());
}
