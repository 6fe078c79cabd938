//! One job from its spec to its verdict.

#![allow(
    clippy::format_collect,
    clippy::unwrap_used,
    reason = "a test fails by panicking, and reads better than it runs fast"
)]

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use pika_cloud_tests::{Incus, Signal, Stage, count_in_files, eventually, processes, read_text, sha256, until};
use rustix::fs::{FlockOperation, flock};
use serde_json::{Value, json};

fn kinds(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["kind"].as_str().unwrap_or_default()).collect()
}

#[test]
fn a_job_completes_and_everything_is_on_the_host() {
    let stage = Stage::new("completes");
    let command = r#"set -e
        pika-guest progress fetch --fraction 0.25 --message 'ein Viertel' --details '{"bytes":1048576,"deep":{"ö":[1,2.50,null,"x\ty"]}}'
        pika-guest ready --message 'toolchain found'
        i=0; while [ $i -lt 300 ]; do echo "out $i"; echo "err $i" >&2; i=$((i+1)); done
        printf 'no newline at the end'
        cd $PIKA_CLOUD_DIR/artifacts
        mkdir -p dist/deep 'with space'
        printf '#!/bin/sh\necho hi\n' > dist/run.sh; chmod 755 dist/run.sh
        head -c 3000000 /dev/urandom > dist/deep/blob; chmod 640 dist/deep/blob
        : > empty; printf '<x/>' > 'with space/junit ü.xml'
        sha256sum dist/deep/blob | cut -d' ' -f1 > blob.sha256
        cp $PIKA_CLOUD_DIR/events.jsonl seen.jsonl"#;
    let spec = stage.spec(command);
    let done = stage.run(&spec).expect(0);
    let outputs = stage.outputs(&spec);

    let events = outputs.events();
    assert_eq!(kinds(&events), ["starting", "starting", "ready", "completed"]);
    assert_eq!(events[1]["message"], "ein Viertel");
    let details = json!({ "bytes": 1_048_576, "deep": { "ö": [1, 2.50, null, "x\ty"] }, "progress": { "name": "fetch", "fraction": 0.25 } });
    assert_eq!(events[1]["details"], details);
    assert_eq!(events[2]["message"], "toolchain found");
    assert_eq!(events[3]["details"]["exit_code"], 0);

    let mut log: String = (0..300).map(|i| format!("out {i}\nerr {i}\n")).collect();
    log.push_str("no newline at the end");
    assert_eq!(outputs.log(), log);
    assert_eq!(done.stdout, log, "what is printed is the log, byte for byte");

    let files = ["blob.sha256", "dist/deep/blob", "dist/run.sh", "empty", "seen.jsonl", "with space/junit ü.xml"]
        .map(str::to_owned);
    assert_eq!(outputs.artifacts(), files);
    assert_eq!(outputs.check_digests(), files.len());
    assert_eq!(sha256(&outputs.bytes("artifacts/dist/deep/blob")), outputs.text("artifacts/blob.sha256").trim());
    let mode = |name: &str| fs::metadata(outputs.path(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("artifacts/dist/run.sh"), 0o700, "executable for the owner");
    assert_eq!(mode("artifacts/dist/deep/blob"), 0o600);

    let verdict = outputs.verdict();
    assert_eq!(verdict["verdict"], "completed");
    assert_eq!(verdict["exit_code"], 0);
    assert_eq!(verdict["runtime_id"], *spec.id);
    assert_eq!(verdict["incarnation"], 1);
    assert_eq!(verdict["evidence"]["last_event"]["seq"], 4);
    let collection = &verdict["evidence"]["collection"];
    assert_eq!(collection["complete"], true);
    assert_eq!(collection["skipped"], 0);
    assert_eq!(collection["log_bytes"], log.len());
    assert_eq!(outputs.json("status.json")["state"], "completed");
    assert_eq!(outputs.json("result.json")["status"], "completed");
    assert_eq!(outputs.json("result.json")["exit_code"], 0);

    // Guest lines stand in the journal, and in what is derived from it, as they stood in the guest's file.
    let journal = stage.journal(&spec);
    assert_eq!(journal.check_events(1), 4);
    assert_eq!(journal.event_lines().join("\n") + "\n", outputs.text("events.jsonl"));
    let seen = outputs.text("artifacts/seen.jsonl");
    assert!(outputs.text("events.jsonl").starts_with(&seen), "as in the guest: {seen}");
    assert_eq!(*journal.verdict(1), verdict);
    stage.check_nothing_left(&spec);
}

#[test]
fn states_come_in_order() {
    let stage = Stage::new("states");
    let spec = stage.spec("pika-guest ready");
    stage.run(&spec).expect(0);
    let journal = stage.journal(&spec);
    let states: Vec<&str> = journal
        .records
        .iter()
        .filter_map(|record| match &record["host"] {
            Value::Null => record["guest"]["kind"].as_str(),
            host if host["what"] == "state" => host["state"].as_str(),
            host => host["what"].as_str().filter(|what| *what == "requested"),
        })
        .collect();
    let expected =
        ["requested", "provisioning", "provisioning", "booted", "starting", "ready", "completed", "destroyed"];
    assert_eq!(states, expected);
    stage.check_nothing_left(&spec);
}

/// Whoever only looks holds the lock for a moment: that is no run.
#[test]
fn a_run_again_is_not_answered_by_somebody_who_looks() {
    let stage = Stage::new("looked");
    let spec = stage.spec("echo words; exit 3");
    stage.run(&spec).expect(3);
    let lock = File::open(stage.runtime(&spec).join("lock")).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    let running = stage.start_with(&spec, &["--again"]);
    // It has met the lock several times by then.
    std::thread::sleep(Duration::from_secs(1));
    drop(lock);
    running.finish().expect(3);
    assert_eq!(stage.journal(&spec).verdict(2)["verdict"], "failed");
    stage.check_nothing_left(&spec);
}

#[test]
fn a_failed_job_passes_its_code_and_answers_it_again() {
    let stage = Stage::new("exits3");
    let command = "echo once; date > $PIKA_CLOUD_DIR/artifacts/when; cat /proc/sys/kernel/random/uuid > $PIKA_CLOUD_DIR/artifacts/uuid; exit 3";
    let spec = stage.spec(command);
    let first = stage.run(&spec).expect(3);
    let outputs = stage.outputs(&spec);
    let verdict = outputs.bytes("verdict.json");
    assert_eq!(outputs.verdict()["verdict"], "failed");
    assert_eq!(outputs.verdict()["exit_code"], 3);
    assert_eq!(outputs.log(), "once\n");
    let uuid = outputs.text("artifacts/uuid");
    let records = stage.journal(&spec).lines;
    stage.check_nothing_left(&spec);

    let second = stage.run(&spec).expect(3);
    assert_eq!(outputs.bytes("verdict.json"), verdict, "the same verdict, byte for byte");
    assert_eq!(stage.journal(&spec).lines, records, "nothing happened");
    assert!(second.took < first.took, "{:?} is no answer from the journal, the run took {:?}", second.took, first.took);
    assert!(second.stderr.contains("already ended") && second.stderr.contains("--again"), "{}", second.stderr);
    assert!(!stage.has_instance(&spec));

    stage.start_with(&spec, &["--again"]).finish().expect(3);
    assert_eq!(outputs.verdict()["incarnation"], 2);
    assert_ne!(outputs.text("artifacts/uuid"), uuid, "it ran anew");
    let kept = stage.incarnation(&spec, 1);
    assert_eq!(kept.text("artifacts/uuid"), uuid, "the outputs of the first run stay");
    assert_eq!(kept.bytes("verdict.json"), verdict);
    let journal = stage.journal(&spec);
    assert_eq!((journal.check_events(1), journal.check_events(2)), (2, 2));
    assert_eq!(*journal.verdict(2), outputs.verdict());
    stage.check_nothing_left(&spec);
}

#[test]
fn what_a_workload_says_itself_stands() {
    let stage = Stage::new("says");
    let spec = stage.spec("pika-guest completed --message 'as far as I am concerned'; exit 5");
    let spec = spec.with("policies.retention_policy", "keep_until_stopped");
    stage.run(&spec);
    let verdict = stage.outputs(&spec).verdict();
    assert_eq!(verdict["verdict"], "completed");
    assert_eq!(verdict["message"], "as far as I am concerned");
    let journal = stage.journal(&spec);
    assert_eq!(journal.check_events(1), 2);
    // The guest records the code beside the word.
    eventually("the guest's result holds the code", || {
        let result = Incus.exec_ok(&spec.instance, "cat /run/pika-cloud/result.json");
        let result: Value = serde_json::from_str(&result).unwrap();
        assert_eq!(result["status"], "completed");
        result["workload_exit_code"] == 5
    });
    stage.call(&["destroy", &spec.id]).expect(0);
    stage.check_nothing_left(&spec);

    let spec = stage.spec("pika-guest failed --exit-code 9 --details '{\"why\":\"flaky\"}'; exit 0");
    stage.run(&spec).expect(9);
    let outputs = stage.outputs(&spec);
    assert_eq!(outputs.verdict()["verdict"], "failed");
    assert_eq!(outputs.verdict()["exit_code"], 9);
    assert_eq!(outputs.events()[1]["details"]["why"], "flaky");
    stage.check_nothing_left(&spec);
}

/// Invariant 8.
#[test]
fn the_environment_reaches_the_workload_and_nobody_else() {
    let stage = Stage::new("secret");
    let secret: String = sha256(&getrandom::u64().unwrap().to_ne_bytes());
    let command = format!(
        "printf %s \"$TOKEN\" | sha256sum > $PIKA_CLOUD_DIR/artifacts/digest; pika-guest ready; {}; test \"$PLAIN\" = 'a b'",
        Stage::gate()
    );
    let spec = stage.spec(&command).with("bootstrap.env.TOKEN", &*secret).with("bootstrap.env.PLAIN", "a b");
    let running = stage.start(&spec);
    stage.wait_ready(&spec);

    // While it runs: what Incus holds of it, and what any user of the host can read of processes.
    for path in [
        format!("/1.0/instances/{}?recursion=1", spec.instance),
        "/1.0/operations?recursion=1".to_owned(),
        format!("/1.0/instances/{}/metadata", spec.instance),
    ] {
        let text = Incus.get(&path).unwrap_or_default().to_string();
        assert!(!text.contains(&secret), "{path} holds it");
    }
    let shown = Incus.client(&["config", "show", "--expanded", &spec.instance]).output().unwrap();
    assert!(shown.status.success() && !String::from_utf8_lossy(&shown.stdout).contains(&secret));
    let mut init = None;
    for pid in processes() {
        let read = |name: &str| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
        let line = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ");
        assert!(!line.contains(&secret), "process {pid} has it in its command line: {line}");
        if line.contains("forkexec") {
            assert!(!String::from_utf8_lossy(&read("environ")).contains(&secret), "forkexec has it in its environment");
        }
        if line.starts_with("/sbin/init") || line.starts_with("/bin/sh /sbin/init") || line.contains(" /sbin/init") {
            let mine = read_text(Path::new("/proc").join(pid.to_string()).join("cgroup").as_path());
            init = if mine.contains(&spec.instance) { Some(pid) } else { init };
        }
    }
    // The guest's own files, through the eyes of its first process.
    let init = init.expect("the container's first process can be seen");
    for folder in ["run", "tmp", "etc", "var", "root", "workspace", "dev/shm"] {
        let found =
            count_in_files(&Path::new("/proc").join(init.to_string()).join("root").join(folder), secret.as_bytes());
        assert!(found.is_empty(), "in the guest it stands in {found:?}");
    }
    stage.open_gate(&spec);
    running.finish().expect(0);

    let outputs = stage.outputs(&spec);
    let digest = outputs.text("artifacts/digest");
    assert_eq!(digest.split(' ').next(), Some(&*sha256(secret.as_bytes())), "it reached the workload");
    let mut found = count_in_files(&stage.state(), secret.as_bytes());
    found.extend(count_in_files(&outputs.path(""), secret.as_bytes()));
    assert!(found.is_empty(), "on the host it stands in {found:?}");
    let stored = read_text(&stage.runtime(&spec).join("spec.json"));
    assert!(stored.contains("[redacted]") && stored.contains("TOKEN"), "{stored}");
    let lab = pika_cloud_tests::Lab::get();
    let logs = count_in_files(&lab.incus_dir.join("logs"), secret.as_bytes());
    assert!(logs.is_empty(), "Incus logged it in {logs:?}");
    stage.check_nothing_left(&spec);
}

#[test]
fn a_snapshot_is_read_and_not_written() {
    let stage = Stage::new("mount");
    let source = stage.more("source");
    fs::create_dir_all(source.join("src")).unwrap();
    fs::write(source.join("src/main.c"), "int main;\n").unwrap();
    // Only the mount keeps the guest from writing: by its modes anybody may.
    for (path, mode) in [("", 0o777), ("src", 0o777), ("src/main.c", 0o666)] {
        fs::set_permissions(source.join(path), fs::Permissions::from_mode(mode)).unwrap();
    }
    let command = "cat /workspace/src/main.c || exit 10
        touch /workspace/new 2>/dev/null && exit 11
        echo x 2>/dev/null >> /workspace/src/main.c && exit 12
        mount -o remount,rw /workspace 2>/dev/null && touch /workspace/new 2>/dev/null && exit 13
        rm -f /workspace/src/main.c 2>/dev/null && exit 14
        exit 0";
    let mount = json!([{ "kind": "read_only_snapshot", "guest_path": "/workspace", "source": source }]);
    for as_root in [false, true] {
        let spec = stage.spec(command).with("mounts", mount.clone()).with("bootstrap.run_as_root", as_root);
        stage.run(&spec).expect(0);
        assert_eq!(stage.outputs(&spec).log(), "int main;\n");
        assert!(!stage.has_instance(&spec));
    }
    assert_eq!(fs::read_dir(&source).unwrap().count(), 1, "nothing was added");
    assert_eq!(read_text(&source.join("src/main.c")), "int main;\n");
}

#[test]
fn limits_are_applied() {
    let stage = Stage::new("limits");
    let spec = stage.spec(&format!("pika-guest ready; {}", Stage::gate()));
    let spec = spec.with("resources.vcpu_count", 1).with("resources.memory_mib", 96);
    let spec = spec.with("labels.team", "core").with("resources.root_disk_gib", 1);
    let running = stage.start(&spec);
    stage.wait_ready(&spec);
    let instance = Incus.instance(&spec.instance).unwrap();
    let config = &instance["config"];
    assert_eq!(config["limits.cpu"], "1");
    assert_eq!(config["limits.memory"], "96MiB");
    assert_eq!(instance["devices"]["root"]["size"], "1GiB");
    // Invariant 4 rests on these.
    assert_eq!(config["user.pika-cloud.runtime-id"], *spec.id);
    assert_eq!(config["user.pika-cloud.owner"], read_text(&stage.state().join("id")).trim());
    assert_eq!(config["user.pika-cloud.term"], "1");
    assert_eq!(config["user.pika-cloud.retention"], "destroy_on_completion");
    assert_eq!(config["user.pika-cloud.label.team"], "core");
    assert!(config["user.pika-cloud.spec-hash"].as_str().unwrap().starts_with("v1:"));
    // The kernel holds it to that, by either version of cgroups.
    let limit = ["memory/lxc.payload.NAME/memory.limit_in_bytes", "lxc.payload.NAME/memory.max"]
        .map(|path| format!("/sys/fs/cgroup/{}", path.replace("NAME", &spec.instance)))
        .into_iter()
        .find_map(|path| fs::read_to_string(path).ok())
        .expect("the container's cgroup");
    assert_eq!(limit.trim(), (96 << 20).to_string());
    stage.open_gate(&spec);
    running.finish().expect(0);
    stage.check_nothing_left(&spec);
}

#[test]
fn the_workload_runs_where_and_as_whom_the_spec_says() {
    let stage = Stage::new("where");
    let command = "echo \"$(pwd) $(id -un) $(id -u) $HOME $USER\"";
    let user = stage.spec(command).with("bootstrap.cwd", "/usr/bin");
    let root = stage.spec(command).as_root();
    let (one, other) = (stage.start(&user), stage.start(&root));
    one.finish().expect(0);
    other.finish().expect(0);
    assert_eq!(stage.outputs(&user).log(), "/usr/bin ci 1000 /workspace ci\n");
    assert_eq!(stage.outputs(&root).log(), "/ root 0 /root root\n");
    let missing = stage.spec("echo here").with("bootstrap.cwd", "/not/there");
    stage.run(&missing).expect(127);
    assert!(stage.outputs(&missing).verdict()["message"].as_str().unwrap().contains("/not/there"));
    for spec in [user, root, missing] {
        stage.check_nothing_left(&spec);
    }
}

/// Invariants 3 and 7.
#[test]
fn a_job_beyond_its_time_is_ended_and_collected() {
    let stage = Stage::new("timeout");
    let command = "trap '' TERM INT HUP
        echo begun; echo partly > $PIKA_CLOUD_DIR/artifacts/part
        while :; do sleep 100 & wait $!; done";
    let spec = stage.spec(command).with("watchdogs.run_secs", 1).with("watchdogs.stop_grace_secs", 1);
    let done = stage.run(&spec).expect(124);
    let outputs = stage.outputs(&spec);
    let verdict = outputs.verdict();
    assert_eq!(verdict["verdict"], "timed_out");
    assert_eq!(verdict["watchdog"], "run");
    assert_eq!(outputs.log(), "begun\n");
    assert_eq!(outputs.text("artifacts/part"), "partly\n");
    assert_eq!(outputs.json("result.json")["status"], "failed");
    assert_eq!(verdict["evidence"]["collection"]["complete"], true);
    assert!(done.took >= Duration::from_secs(2), "TERM after 1 s, KILL after another: {:?}", done.took);
    // The guest ends it; the host's backstop is 5 s behind.
    assert!(done.took < Duration::from_secs(7), "{:?}", done.took);
    stage.check_nothing_left(&spec);
}

#[test]
fn what_is_kept_stays_until_destroyed() {
    let stage = Stage::new("kept");
    let spec = stage.spec("echo kept > /tmp/mark").with("policies.retention_policy", "keep_until_stopped");
    stage.run(&spec).expect(0);
    assert_eq!(stage.outputs(&spec).verdict()["verdict"], "completed");
    assert_eq!(Incus.instance(&spec.instance).unwrap()["status"], "Running");
    assert_eq!(Incus.exec_ok(&spec.instance, "cat /tmp/mark"), "kept\n");
    let supervisors = "ps | grep -c '[p]ika-guest supervise' || true";
    until("the guest was released, so that its supervisor need not wait", Duration::from_secs(5), || {
        (Incus.exec_ok(&spec.instance, supervisors).trim() == "0").then_some(())
    });
    assert!(Incus.exec_ok(&spec.instance, "cat /run/pika-cloud/events.jsonl.ack").contains("released"));
    stage.run(&spec).expect(0);
    assert!(stage.has_instance(&spec), "an answer destroys nothing");
    stage.call(&["destroy", &spec.id]).expect(0);
    stage.check_nothing_left(&spec);
    stage.run(&spec).expect(0);
    assert!(!stage.has_instance(&spec), "an answer makes nothing");
}

#[test]
fn outputs_are_collected_as_the_policy_says() {
    let stage = Stage::new("collection");
    let command = |code: u8| {
        format!(
            "echo words; echo x > $PIKA_CLOUD_DIR/artifacts/{code}.txt; echo x > $PIKA_CLOUD_DIR/artifacts/other; exit {code}"
        )
    };
    let mode = |code: u8, mode: &str| stage.spec(&command(code)).with("policies.output_collection.mode", mode);
    let globbed = mode(0, "always").with("policies.output_collection.artifact_globs", json!(["*.txt"]));
    let quiet = mode(0, "always").with("policies.output_collection.include_logs", false);
    let cases = [
        (mode(0, "none"), 0, "", 0),
        (mode(4, "none"), 4, "", 0),
        (mode(0, "failure_only"), 0, "words\n", 0),
        (mode(4, "failure_only"), 4, "words\n", 2),
        (globbed, 0, "words\n", 1),
        (quiet, 0, "", 2),
    ];
    for pair in cases.chunks(3) {
        let running: Vec<_> = pair.iter().map(|(spec, ..)| stage.start(spec)).collect();
        for (running, (spec, code, log, artifacts)) in running.into_iter().zip(pair) {
            running.finish().expect(*code);
            let outputs = stage.outputs(spec);
            let shown = &spec.json["policies"];
            let found = if outputs.has("logs/guest.log") { outputs.log() } else { String::new() };
            assert_eq!(found, *log, "log with {shown}");
            assert_eq!(outputs.artifacts().len(), *artifacts, "artifacts with {shown}: {:?}", outputs.artifacts());
            assert!(!outputs.events().is_empty(), "events are kept with every policy");
            stage.check_nothing_left(spec);
        }
    }
}

/// Invariant 7.
#[test]
fn an_interrupted_job_is_cancelled_collected_and_destroyed() {
    let stage = Stage::new("interrupt");
    let command = "trap 'echo asked to go; echo late > $PIKA_CLOUD_DIR/artifacts/late; exit 0' TERM
        echo early > $PIKA_CLOUD_DIR/artifacts/early; pika-guest ready
        while :; do sleep 0.1; done";
    let spec = stage.spec(command);
    for (signal, more) in [(Signal::INT, &[][..]), (Signal::TERM, &["--again"][..])] {
        let running = stage.start_with(&spec, more);
        let incarnation = u64::try_from(more.len()).unwrap() + 1;
        stage.wait_record(&spec, "ready", |r| r["inc"] == incarnation && r["guest"]["kind"] == "ready");
        running.signal(signal);
        running.finish().expect(130);
        let outputs = stage.outputs(&spec);
        assert_eq!(outputs.verdict()["verdict"], "cancelled");
        assert!(outputs.log().ends_with("asked to go\n"), "{}", outputs.log());
        assert_eq!(outputs.artifacts(), ["early", "late"]);
        assert_eq!(outputs.verdict()["evidence"]["collection"]["complete"], true);
        stage.check_nothing_left(&spec);
    }
}

#[test]
fn a_hang_up_detaches_and_the_same_command_goes_on() {
    let stage = Stage::new("hangup");
    let spec = stage.spec(&format!("echo one; pika-guest ready; {}; echo two", Stage::gate()));
    let running = stage.start(&spec);
    stage.wait_ready(&spec);
    running.signal(Signal::HUP);
    running.finish().expect(129);
    assert_eq!(Incus.instance(&spec.instance).unwrap()["status"], "Running");
    assert!(!stage.journal(&spec).has("ended"));
    let running = stage.start(&spec);
    stage.open_gate(&spec);
    running.finish().expect(0);
    assert_eq!(stage.outputs(&spec).log(), "one\ntwo\n");
    assert_eq!(stage.journal(&spec).check_events(1), 3);
    assert_eq!(stage.journal(&spec).host("requested").len(), 1);
    stage.check_nothing_left(&spec);
}

#[test]
fn lines_and_events_arrive_while_the_workload_runs() {
    let stage = Stage::new("live");
    let command = format!(
        "for i in 1 2 3 4 5 6 7 8; do date +%s.%N; pika-guest progress step --message \"$(date +%s.%N)\"; sleep 0.2; done; {}",
        Stage::gate()
    );
    // busybox's date knows no nanoseconds; the kernel's uptime is the same for host and container, to hundredths.
    let command = command.replace("date +%s.%N", "cut -d' ' -f1 /proc/uptime");
    let spec = stage.spec(&command);
    let uptime = || -> f64 { read_text(Path::new("/proc/uptime")).split(' ').next().unwrap().parse().unwrap() };
    let now = std::time::SystemTime::now();
    let base = uptime();
    let since = |at: std::time::SystemTime| base + at.duration_since(now).map_or(0.0, |passed| passed.as_secs_f64());
    let running = stage.start(&spec);
    eventually("eight lines are printed", || running.printed().len() >= 8);
    let late = |line: &pika_cloud_tests::Line| since(line.at) - line.text.trim().parse::<f64>().unwrap();
    let lateness: Vec<f64> = running.printed().iter().map(late).collect();
    println!("log lines printed after {lateness:.3?} s");
    assert!(lateness.iter().all(|late| *late < 1.0), "{lateness:?}");
    // Progress is shown on standard error meanwhile.
    eventually("eight steps are shown", || running.said().matches("step").count() >= 8);
    assert!(!stage.journal(&spec).has("ended"), "the workload still runs");
    stage.open_gate(&spec);
    running.finish().expect(0);
    let arrived = |record: &Value| {
        let at = pika_cloud_common::Timestamp::clone(&serde_json::from_value(record["at"].clone()).unwrap());
        let emitted =
            pika_cloud_common::Timestamp::clone(&serde_json::from_value(record["guest"]["timestamp"].clone()).unwrap());
        (at.to_string(), emitted.to_string())
    };
    for record in stage.journal(&spec).records.iter().filter(|record| record.get("guest").is_some()) {
        let (at, emitted) = arrived(record);
        let late = seconds(&at) - seconds(&emitted);
        assert!((-0.1..1.0).contains(&late), "emitted at {emitted}, on the host at {at}");
    }
    stage.check_nothing_left(&spec);
}

/// Seconds within the day, of a time stamp in UTC.
fn seconds(timestamp: &str) -> f64 {
    let time = timestamp.split('T').nth(1).unwrap().trim_end_matches('Z');
    let parts: Vec<f64> = time.split(':').map(|part| part.parse().unwrap()).collect();
    parts[0] * 3600.0 + parts[1] * 60.0 + parts[2]
}

#[test]
fn json_is_the_journal_line_by_line() {
    let stage = Stage::new("json");
    let spec = stage.spec("echo words; pika-guest progress a; pika-guest ready");
    let done = stage.start_with(&spec, &["--json"]).finish().expect(0);
    let journal = stage.journal(&spec);
    let printed: Vec<&str> = done.stdout.lines().collect();
    let of_incarnation = |(line, record): (&'_ String, &Value)| (record["inc"] == 1).then_some(line.clone());
    let wanted: Vec<String> = journal.lines.iter().zip(&journal.records).filter_map(of_incarnation).collect();
    assert_eq!(printed, wanted, "all that is of the incarnation");
    for line in printed {
        serde_json::from_str::<Value>(line).unwrap();
    }
    stage.check_nothing_left(&spec);
}

#[test]
fn a_second_interrupt_leaves_at_once() {
    let stage = Stage::new("leave");
    let spec =
        stage.spec("trap '' TERM; pika-guest ready; while :; do sleep 1; done").with("watchdogs.stop_grace_secs", 60);
    let running = stage.start(&spec);
    stage.wait_ready(&spec);
    running.signal(Signal::INT);
    eventually("it says what it does", || running.said().contains("once more to leave at once"));
    running.signal(Signal::INT);
    running.finish_within(Duration::from_secs(20)).expect(130).saying(&["pika-cloud destroy"]);
    assert!(stage.has_instance(&spec), "it is left as it is");
    stage.call(&["destroy", &spec.id]).expect(0);
    assert_eq!(stage.journal(&spec).verdict(1)["verdict"], "cancelled");
    stage.check_nothing_left(&spec);
}
