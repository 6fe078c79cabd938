//! A guest whose root means harm. Its own runtime gets a verdict, the host keeps its memory and its files, the instance is
//! destroyed, and a job beside it notices nothing.

#![allow(
    clippy::format_collect,
    clippy::unwrap_used,
    reason = "a test fails by panicking, and reads better than it runs fast"
)]

use std::time::Duration;

use pika_cloud_tests::{DONE, Finished, HELLO, Running, Spec, Stage, archivist, entry, files_below, played_by};
use serde_json::{Value, json};

/// What `pika-cloud` may hold at once, built without optimisation (Invariant 5).
const MAX_PEAK_KIB: u64 = 128 * 1024;

/// A well-behaved job that runs beside a hostile one.
struct Bystander {
    spec: Spec,
    running: Running,
}

impl Bystander {
    fn start(stage: &Stage) -> Self {
        let command = "i=0; while [ $i -lt 20 ]; do i=$((i+1)); echo fine $i; pika-guest progress step || exit 1; sleep 0.05; done
            echo fine > $PIKA_CLOUD_DIR/artifacts/fine";
        let spec = stage.spec(command);
        Self { running: stage.start(&spec), spec }
    }

    /// That it noticed nothing.
    fn check(self, stage: &Stage) {
        let done = self.running.finish().expect(0);
        assert!(done.peak_kib < MAX_PEAK_KIB);
        let outputs = stage.outputs(&self.spec);
        assert_eq!(outputs.log(), (1..=20).map(|i| format!("fine {i}\n")).collect::<String>());
        assert_eq!(outputs.artifacts(), ["fine"]);
        assert_eq!(stage.journal(&self.spec).check_events(1), 22);
        stage.check_nothing_left(&self.spec);
    }
}

/// What must hold however a hostile job ended.
fn check(stage: &Stage, spec: &Spec, done: &Finished) -> Value {
    let verdict = stage.outputs(spec).verdict();
    println!("{}: {verdict}, {:.1} s, {} MiB", spec.id, done.took.as_secs_f64(), done.peak_kib / 1024);
    assert!(done.peak_kib > 0 && done.peak_kib < MAX_PEAK_KIB, "{} MiB", done.peak_kib / 1024);
    assert!(!done.stderr.contains("panicked"), "{}", done.stderr);
    assert_eq!(*stage.journal(spec).verdict(1), verdict, "Invariant 2");
    stage.check_nothing_left(spec);
    // Only regular files and folders, wherever the guest's bytes went.
    for folder in [stage.state(), stage.outputs(spec).path("")] {
        for path in files_below(&folder) {
            let kind = std::fs::symlink_metadata(&path).unwrap().file_type();
            assert!(kind.is_file(), "{} is no regular file", path.display());
        }
    }
    verdict
}

/// Runs hostile jobs at once, beside a bystander; gives each one's code and verdict.
fn run_all(stage: &Stage, specs: &[Spec]) -> Vec<(i32, Value)> {
    let bystander = Bystander::start(stage);
    let running: Vec<Running> = specs.iter().map(|spec| stage.start(spec)).collect();
    let done: Vec<Finished> = running.into_iter().map(Running::finish).collect();
    bystander.check(stage);
    let verdicts = done.iter().zip(specs).map(|(done, spec)| (done.code.unwrap_or(-1), check(stage, spec, done)));
    verdicts.collect()
}

/// A job of the guest's root that does `harm` to the contract's folder and ends well.
fn harmful(stage: &Stage, harm: &str) -> Spec {
    let written = "until grep -q before logs/guest.log; do sleep 0.01; done";
    let command = format!("cd $PIKA_CLOUD_DIR; echo before; {written}; pika-guest ready; {harm}\necho after; exit 0");
    stage.spec(&command).as_root().with("watchdogs.collect_secs", 10)
}

/// What may stand in the place of a file of the contract.
const IMPOSTORS: [(&str, &str); 5] = [
    ("fifo", "mkfifo $F"),
    ("link", "ln -s /etc/passwd $F"),
    ("device", "touch $F; mount --bind /dev/zero $F || exit 9"),
    ("folder", "mkdir $F; echo x > $F/x"),
    ("endless", "ln -s $F $F"),
];

fn replace(file: &str, impostor: &str) -> String {
    format!("F=$PIKA_CLOUD_DIR/{file}; rm -rf $F; {impostor}")
}

/// The terminal event is the commit point: what is derived from it may be spoilt.
#[test]
fn impostors_for_status_and_result_cost_no_verdict() {
    let stage = Stage::new("documents");
    for file in ["status.json", "result.json"] {
        let specs: Vec<Spec> = IMPOSTORS.iter().map(|(_, make)| harmful(&stage, &replace(file, make))).collect();
        for ((code, verdict), (name, _)) in run_all(&stage, &specs).into_iter().zip(IMPOSTORS) {
            assert_eq!((code, &verdict["verdict"]), (0, &Value::from("completed")), "{file} as a {name}");
        }
        for spec in &specs {
            assert_eq!(stage.outputs(spec).log(), "before\nafter\n");
        }
    }
}

/// Without a ledger there is no contract; the end is told all the same.
#[test]
fn impostors_for_the_ledger_end_the_runtime() {
    let stage = Stage::new("events");
    let specs: Vec<Spec> = IMPOSTORS
        .iter()
        .map(|(_, make)| harmful(&stage, &replace("events.jsonl", make)).with("watchdogs.run_secs", 20))
        .collect();
    for ((code, verdict), (name, _)) in run_all(&stage, &specs).into_iter().zip(IMPOSTORS) {
        assert_eq!(code, 126, "events.jsonl as a {name}: {verdict}");
        assert_eq!(verdict["verdict"], "guest_died", "events.jsonl as a {name}");
        assert_eq!(verdict["evidence"]["last_event"]["kind"], "ready", "what came before is kept");
    }
}

#[test]
fn impostors_for_artifacts_and_logs_are_not_followed() {
    let stage = Stage::new("folders");
    for file in ["artifacts", "logs"] {
        let specs: Vec<Spec> = IMPOSTORS
            .iter()
            .map(|(name, make)| {
                let make = if *name == "link" { "ln -s /etc $F" } else { make };
                harmful(&stage, &replace(file, make))
            })
            .collect();
        for (((code, verdict), (name, _)), spec) in run_all(&stage, &specs).into_iter().zip(IMPOSTORS).zip(&specs) {
            assert_eq!(verdict["verdict"], "completed", "{file} as a {name}");
            // Complete, or said to be incomplete.
            let complete = verdict["evidence"]["collection"]["complete"] == true;
            assert_eq!(code, if complete { 0 } else { 125 }, "{file} as a {name}: {verdict}");
            let expected: &[&str] = if (file, name) == ("artifacts", "folder") { &["x"] } else { &[] };
            assert_eq!(stage.outputs(spec).artifacts(), expected, "{file} as a {name}");
            // A log that was taken away before anybody could read it is lost, and nothing stands in for it.
            let log = if stage.outputs(spec).has("logs/guest.log") { stage.outputs(spec).log() } else { String::new() };
            assert!(
                log.starts_with("before\n") || (file == "logs" && !log.contains("root:")),
                "{file} as a {name}: {log}"
            );
        }
    }
}

#[test]
fn odd_things_among_the_artifacts_are_left_out_and_counted() {
    let stage = Stage::new("odd");
    let harm =
        "cd artifacts; echo good > good; mkfifo pipe; ln -s /etc/passwd link; ln -s /etc folder; mknod null c 1 3
        mkdir -p deep/er; echo deep > deep/er/file; ln -s ../../../../etc/shadow deep/er/up
        echo x > 'new
line'; echo x > \"$(printf 'bad\\377')\"; echo x > \"$(printf 'esc\\033[2J')\"; ln good hard
        dd if=/dev/zero of=sparse bs=1 count=1 seek=50000000 2>/dev/null
        d=d; i=0; while [ $i -lt 100 ]; do mkdir $d; cd $d; i=$((i+1)); done; echo x > bottom";
    let spec = harmful(&stage, harm);
    let (code, verdict) = run_all(&stage, std::slice::from_ref(&spec)).remove(0);
    assert_eq!(verdict["verdict"], "completed");
    let outputs = stage.outputs(&spec);
    let artifacts = outputs.artifacts();
    assert_eq!(artifacts, ["deep/er/file", "good", "hard", "sparse"]);
    assert_eq!(outputs.check_digests(), 4);
    assert_eq!(outputs.bytes("artifacts/sparse").len(), 50_000_001);
    let collection = &verdict["evidence"]["collection"];
    assert!(collection["skipped"].as_u64().unwrap() >= 8, "{collection}");
    // Files are missing, and not only what can be none.
    assert_eq!((code, &collection["complete"]), (125, &Value::from(false)), "{collection}");
    assert!(collection["error"].as_str().unwrap().starts_with("artifacts are left out: `"), "{collection}");
    let links = harmful(&stage, "cd artifacts; echo good > good; ln -s good link; mkfifo pipe");
    stage.run(&links).expect(0).saying(&["1 files, 5 bytes, 2 left out"]);
}

#[test]
fn limits_of_artifacts_hold() {
    let stage = Stage::new("quota");
    let many = harmful(&stage, "i=0; while [ $i -lt 60 ]; do i=$((i+1)); echo $i > artifacts/$i; done");
    let many = many.with("limits.artifact_files", 20);
    let large = harmful(&stage, "head -c 1000000 /dev/zero > artifacts/a; head -c 5000000 /dev/zero > artifacts/b");
    let large = large.with("limits.artifact_bytes", 2_000_000);
    let chatty = harmful(&stage, "head -c 3000000 /dev/zero | tr '\\0' x").with("limits.log_bytes", 1_000_000);
    let specs = [many, large, chatty];
    let ended = run_all(&stage, &specs);
    for (code, verdict) in &ended[..2] {
        assert_eq!(verdict["verdict"], "completed");
        assert_eq!((*code, &verdict["evidence"]["collection"]["complete"]), (125, &Value::from(false)), "{verdict}");
    }
    for ((_, verdict), limit) in ended.iter().zip(["limits.artifact_files (20)", "limits.artifact_bytes (2000000)"]) {
        let error = verdict["evidence"]["collection"]["error"].as_str().unwrap();
        assert!(error.contains(limit), "{error}");
    }
    assert!(stage.outputs(&specs[0]).artifacts().len() <= 20);
    assert_eq!(stage.outputs(&specs[1]).artifacts(), ["a"]);
    let log = stage.outputs(&specs[2]).log();
    assert!((1_000_000..1_000_200).contains(&log.len()) && log.contains("limits.log_bytes"), "{}", log.len());
    assert_eq!(ended[2].1["verdict"], "completed");
}

/// Invariant 5, with more files than any collection takes, and than the agent looks at in one folder.
#[test]
fn a_million_artifacts_are_cut_at_the_limit() {
    const FILES: u32 = 1_000_000;
    let stage = Stage::new("million");
    let harm = format!(
        "mkdir artifacts/m; cd artifacts/m; make() {{ i=$1; while [ $i -lt {FILES} ]; do : > f$i; i=$((i+2)); done; }}
        make 0 & make 1 & wait"
    );
    let spec = harmful(&stage, &harm).with("watchdogs.collect_secs", 60).with("limits.artifact_files", 2_000);
    let bystander = Bystander::start(&stage);
    let done = stage.start(&spec).finish_within(Duration::from_secs(600));
    bystander.check(&stage);
    println!("{FILES} artifacts: {:.1} s for making them, collecting and destroying", done.took.as_secs_f64());
    assert_eq!(done.code, Some(125), "{}", done.stderr);
    let verdict = check(&stage, &spec, &done);
    assert_eq!(verdict["verdict"], "completed");
    assert_eq!(verdict["evidence"]["collection"]["complete"], false);
    assert_eq!(stage.outputs(&spec).artifacts().len(), 1_999, "and their folder");
}

/// Lines that are no events are counted, kept aside, and stop nothing.
#[test]
fn lines_that_are_no_events_are_passed_over() {
    let stage = Stage::new("lines");
    let event = |seq: &str, kind: &str| {
        format!(
            r#"{{"schema_version":1,"seq":{seq},"timestamp":"2026-01-01T00:00:00Z","kind":"{kind}","message":"forged"}}"#
        )
    };
    let write = |line: &str| format!("printf '%s\\n' '{line}' >> events.jsonl");
    let long = "{ head -c 10000000 /dev/zero | tr '\\0' a; echo; } >> events.jsonl";
    let nuls = "{ head -c 300000 /dev/zero; echo; } >> events.jsonl";
    let deep = "{ printf '{\"schema_version\":1,\"seq\":3,\"timestamp\":\"2026-01-01T00:00:00Z\",\"kind\":\"ready\",\"message\":\"\",\"details\":'; head -c 20000 /dev/zero | tr '\\0' '['; echo; } >> events.jsonl";
    let deep_whole = "{ printf '{\"schema_version\":1,\"seq\":3,\"timestamp\":\"2026-01-01T00:00:00Z\",\"kind\":\"ready\",\"message\":\"\",\"details\":'; head -c 20000 /dev/zero | tr '\\0' '['; head -c 20000 /dev/zero | tr '\\0' ']'; echo '}'; } >> events.jsonl";
    let endless = "head -c 10000000 /dev/zero | tr '\\0' b >> events.jsonl";
    let harms = [
        long.to_owned(),
        nuls.to_owned(),
        deep.to_owned(),
        deep_whole.to_owned(),
        endless.to_owned(),
        write("no event"),
        write(&event("-3", "ready")),
        write(&event("18446744073709551616", "ready")),
        write(&event("3.5", "ready")),
        write(&event("\"3\"", "ready")),
        write(&event("1", "failed")),
        write(&event("2", "failed")),
        write("[]"),
        write("{}"),
        "head -c 200000 /dev/urandom >> events.jsonl; echo >> events.jsonl".to_owned(),
    ];
    let specs: Vec<Spec> = harms
        .iter()
        .map(|harm| harmful(&stage, &format!("{harm}\npika-guest progress on --message behind || exit 9")))
        .collect();
    for (chunk, harms) in specs.chunks(5).zip(harms.chunks(5)) {
        for (((code, verdict), spec), harm) in run_all(&stage, chunk).into_iter().zip(chunk).zip(harms) {
            let harm = &harm[..harm.len().min(120)];
            assert_eq!((code, &verdict["verdict"]), (0, &Value::from("completed")), "{harm}");
            let events = stage.outputs(spec).events();
            assert!(events.iter().any(|event| event["message"] == "behind"), "what came behind is there: {harm}");
            assert!(events.iter().all(|event| event["message"] != "forged"), "{harm}");
            if !harm.contains("tr '\\0' b") {
                assert!(verdict["evidence"]["bad_lines"].as_u64() >= Some(1), "it is counted: {harm}");
            }
        }
    }
}

/// Numbers that jump are a gap that is told; numbers that cannot go on end the runtime.
#[test]
fn numbers_that_jump_are_told() {
    let stage = Stage::new("jump");
    let forge = |seq: u64| {
        let event = format!(
            r#"{{"schema_version":1,"seq":{seq},"timestamp":"2026-01-01T00:00:00Z","kind":"ready","message":"forged"}}"#
        );
        format!("printf '%s\\n' '{event}' >> events.jsonl; sleep 0.3")
    };
    let jump = harmful(&stage, &forge(1000));
    let last = harmful(&stage, &forge((1 << 53) - 1)).with("watchdogs.run_secs", 10);
    let specs = [jump, last];
    let ended = run_all(&stage, &specs);
    let (code, verdict) = &ended[0];
    assert_eq!((*code, &verdict["verdict"]), (0, &Value::from("completed")));
    assert!(verdict["evidence"]["gaps"].as_u64() >= Some(997), "{verdict}");
    let missing = stage.journal(&specs[0]).host("missing").first().map(|record| record["count"].clone());
    assert_eq!(missing, Some(json!(997)));
    // No number is left for its last word: any verdict but success will do, and one must come.
    let (code, verdict) = &ended[1];
    assert!([124, 126].contains(code), "{verdict}");
}

/// Invariant 5: a flood fills neither disk nor memory.
#[test]
fn a_flood_of_events_is_cut_at_the_limit() {
    let stage = Stage::new("flood");
    let line = r#"{"kind":"progress","name":"flood","message":"0123456789012345678901234567890123456789012345678901234567890123456789"}"#;
    let flood = harmful(
        &stage,
        &format!("for i in 1 2 3 4; do while :; do yes '{line}' | pika-guest emit; done & done 2>/dev/null; wait"),
    );
    let flood = flood.with("watchdogs.run_secs", 5).with("limits.event_bytes", 1 << 20);
    let logs = harmful(&stage, "yes 'a line of no worth' & yes 'another' & wait");
    let logs = logs.with("watchdogs.run_secs", 5).with("limits.log_bytes", 1 << 20);
    let specs = [flood, logs];
    for ((code, verdict), spec) in run_all(&stage, &specs).into_iter().zip(&specs) {
        assert_eq!((code, &verdict["watchdog"]), (124, &Value::from("run")), "{verdict}");
        let bytes: u64 =
            files_below(&stage.runtime(spec)).iter().filter_map(|path| Some(path.metadata().ok()?.len())).sum();
        // Guest records, what stands around each, what is derived from them; and notes of what was left out.
        assert!(bytes < 8 << 20, "{bytes} bytes in the state dir");
    }
}

#[test]
fn a_guest_that_kills_its_own_side_died() {
    let stage = Stage::new("suicide");
    let supervisor = harmful(&stage, "kill -9 $PPID; sleep 100");
    let off = harmful(&stage, "poweroff -f; sleep 100");
    let removed = harmful(&stage, "rm -rf /run/pika-cloud").with("watchdogs.run_secs", 20);
    let moved = harmful(&stage, "mv /run/pika-cloud /run/elsewhere; ln -s /run/elsewhere /run/pika-cloud");
    let moved = moved.with("watchdogs.run_secs", 20);
    let all = harmful(&stage, "kill -9 -1; sleep 100").with("watchdogs.run_secs", 20);
    let stream =
        "for p in $(pidof pika-guest exe); do tr '\\0' ' ' < /proc/$p/cmdline | grep -q ' stream' && kill -9 $p; done";
    let gone = harmful(&stage, &format!("rm /usr/bin/pika-guest; {stream}; sleep 100")).with("watchdogs.run_secs", 20);
    let agent = "rm /usr/bin/pika-guest; printf '#!/bin/sh\nexec cat /dev/urandom\n' > /usr/bin/pika-guest; chmod 755 /usr/bin/pika-guest";
    let changed = harmful(&stage, &format!("{agent}; {stream}; sleep 100")).with("watchdogs.run_secs", 20);
    let specs = [supervisor, off, removed, moved, all, changed, gone];
    let ended = run_all(&stage, &specs);
    let died = |at: usize| {
        let (code, verdict): &(i32, Value) = &ended[at];
        assert_eq!((*code, &verdict["verdict"]), (126, &Value::from("guest_died")), "{verdict}");
        verdict["cause"].clone()
    };
    assert_eq!(died(0), "supervisor_lost");
    assert_eq!(died(1), "instance_stopped");
    assert_eq!(ended[1].1["evidence"]["instance_status"], "Stopped");
    // Whatever stands in the files that were made anew.
    died(2);
    // Its supervisor still holds the folder, and may say its last word into it; nothing is collected through a link.
    assert!([125, 126].contains(&ended[3].0), "{}", ended[3].1);
    assert_eq!(died(4), "supervisor_lost");
    assert_eq!(died(5), "contract_broken");
    // What is only gone is replaced by the host's own, and the guest's own words are heard to their end.
    assert_eq!(
        (&ended[6].1["verdict"], &ended[6].1["watchdog"]),
        (&"timed_out".into(), &"run".into()),
        "{}",
        ended[6].1
    );
    assert_eq!(ended[6].1["evidence"]["last_event"]["kind"], "failed");
    for (at, spec) in specs.iter().enumerate() {
        // What was in the guest is collected where its files outlived the harm; else what was on its way may be lost.
        let outputs = stage.outputs(spec);
        let log = if outputs.has("logs/guest.log") { outputs.log() } else { String::new() };
        let whole = log.starts_with("before\n");
        assert!(whole || (log.is_empty() && ![0, 4].contains(&at)), "{}: {log}", spec.id);
    }
}

/// A spec whose agent is `script`, and who is impatient with it.
fn with_agent(stage: &Stage, script: &str) -> Spec {
    // No other agent takes its place.
    let spec = played_by(stage, stage.spec("echo never run"), script).with("incus.agent", "baked");
    let spec = spec.with("watchdogs.collect_secs", 3);
    spec.with("watchdogs.boot_secs", 4).with("watchdogs.run_secs", 3).with("watchdogs.stop_grace_secs", 0)
}

#[test]
fn agents_that_speak_garbage_end_their_runtime() {
    let stage = Stage::new("garbage");
    let after_hello = |rest: &str| format!("{HELLO}\n{rest}");
    let agents = [
        ("noise", "exec cat /dev/urandom".to_owned()),
        ("nuls", "exec cat /dev/zero".to_owned()),
        ("endless", "yes x | tr -d '\\n'".to_owned()),
        ("errors", "yes error >&2".to_owned()),
        ("empty", "yes ''".to_owned()),
        ("silent", "sleep 1000".to_owned()),
        ("dies", "exit 3".to_owned()),
        ("refuses", "echo '{\"error\":{\"code\":\"ledger\",\"message\":\"no\"}}'; sleep 1000".to_owned()),
        (
            "announces",
            after_hello(r#"echo '{"log":{"file":"guest.log","offset":0,"len":10737418240}}'; exec cat /dev/zero"#),
        ),
        (
            "offset",
            after_hello(
                r#"echo '{"log":{"file":"guest.log","offset":9007199254740991,"len":65536}}'; exec cat /dev/zero"#,
            ),
        ),
        (
            "logpath",
            after_hello(
                r#"echo '{"log":{"file":"../../../../../../tmp/pika-evil","offset":0,"len":4}}'; printf evil; sleep 1000"#,
            ),
        ),
        ("twice", after_hello(&format!("set --; echo x | {{ {HELLO}; }}; sleep 1000"))),
        (
            "hellos",
            after_hello(
                r#"yes '{"hello":{"protocol":1,"agent":"0.1.0","schema_version":1,"stream_id":"evil","boot_id":"b","first_seq":1,"last_seq":1}}'"#,
            ),
        ),
        ("notices", after_hello(r#"yes '{"notice":{"what":"started","request_id":"other"}}'"#)),
        ("unknown", after_hello(r#"yes '{"surprise":{"a":1}}'"#)),
    ];
    let specs: Vec<Spec> = agents.iter().map(|(_, script)| with_agent(&stage, script)).collect();
    for (chunk, agents) in specs.chunks(8).zip(agents.chunks(8)) {
        for ((code, verdict), (name, _)) in run_all(&stage, chunk).into_iter().zip(agents) {
            let ended = verdict["verdict"].as_str().unwrap_or_default();
            assert!(
                ["guest_died", "timed_out", "provision_failed", "unreachable"].contains(&ended),
                "{name}: {verdict}"
            );
            assert!([124, 125, 126].contains(&code), "{name}: {code}");
        }
    }
    assert!(!std::path::Path::new("/tmp/pika-evil").exists());
}

#[test]
fn archives_that_reach_out_of_their_folder_get_nowhere() {
    let stage = Stage::new("archive");
    // Where an archive that escapes would end up: beside the outputs, beside the state dir, anywhere.
    let outside = stage.more("outside");
    std::fs::create_dir(&outside).unwrap();
    let absolute = outside.join("absolute").display().to_string();
    let up = "../".repeat(12) + outside.join("up").display().to_string().trim_start_matches('/');
    let folder =
        |path: &str| format!("echo '{{\"entry\":{{\"path\":\"{path}\",\"folder\":true,\"mode\":511,\"size\":0}}}}'\n");
    let agents = [
        ("good", entry("good", "good") + &entry("dir/good", "good") + DONE),
        ("up", entry("good", "good") + &entry(&up, "evil") + DONE),
        ("up1", entry("../verdict.json", "evil") + DONE),
        ("absolute", entry(&absolute, "evil") + DONE),
        ("folderup", folder("../../evil") + DONE),
        ("through", entry("a", "file") + &entry("a/b", "evil") + DONE),
        ("twice", entry("a", "one!") + &entry("a", "two!") + DONE),
        ("dot", entry(".", "evil") + DONE),
        ("empty", entry("", "evil") + DONE),
        ("nul", entry("a\\u0000b", "evil") + DONE),
        ("liar", entry("good", "good").replace(&pika_cloud_tests::sha256(b"good"), &"0".repeat(64)) + DONE),
        ("huge", r#"echo '{"entry":{"path":"a","mode":420,"size":10737418240,"offset":0,"len":10737418240}}'; cat /dev/zero"#.to_owned()),
        ("hole", r#"echo '{"entry":{"path":"a","mode":420,"size":10,"offset":5,"len":0}}'; "#.to_owned() + DONE),
        ("unended", r#"echo '{"entry":{"path":"a","mode":420,"size":10,"offset":0,"len":0}}'; "#.to_owned() + DONE),
        ("endless", r#"i=0; while :; do i=$((i+1)); echo "{\"entry\":{\"path\":\"f$i\",\"mode\":420,\"size\":0,\"offset\":0,\"len\":0,\"digest\":\"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\"}}"; done"#.to_owned()),
        ("never", "sleep 1000".to_owned()),
    ];
    let specs: Vec<Spec> = agents
        .iter()
        .map(|(_, entries)| with_agent(&stage, &archivist(entries)).with("limits.artifact_files", 500))
        .collect();
    for (chunk, agents) in specs.chunks(8).zip(agents.chunks(8)) {
        for (((code, verdict), spec), (name, _)) in run_all(&stage, chunk).into_iter().zip(chunk).zip(agents) {
            assert_eq!(verdict["verdict"], "completed", "{name}: the guest's own word");
            let complete = verdict["evidence"]["collection"]["complete"] == true;
            assert_eq!(complete, *name == "good", "{name}: {verdict}");
            assert_eq!(code, if complete { 0 } else { 125 }, "{name}");
            let outputs = stage.outputs(spec);
            if complete {
                assert_eq!(outputs.artifacts(), ["dir/good", "good"]);
                assert_eq!(outputs.check_digests(), 2);
            }
            assert!(outputs.artifacts().len() <= 500, "{name}: {}", outputs.artifacts().len());
            for path in files_below(&outputs.path("")).into_iter().chain(files_below(&stage.runtime(spec))) {
                let text = std::fs::read(&path).unwrap();
                assert_ne!(text, b"evil", "{name}: {}", path.display());
            }
        }
    }
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0, "something got out");
}

/// Whatever the guest's processes do to each other, the kernel's limits are the host's.
#[test]
fn a_guest_that_exhausts_itself_is_ended() {
    let stage = Stage::new("exhausts");
    let memory =
        stage.spec("pika-guest ready; head -c 400000000 /dev/zero | tail -c 300000000 > /dev/null; exit 3").as_root();
    let memory = memory.with("resources.memory_mib", 64).with("watchdogs.run_secs", 20);
    let processes = stage.spec(
        "pika-guest ready; b() { sleep 100 & sleep 100 & }; i=0; while [ $i -lt 400 ]; do b; i=$((i+1)); done; exit 0",
    );
    let processes = processes.with("watchdogs.run_secs", 20);
    let specs = [memory, processes];
    let ended = run_all(&stage, &specs);
    assert_ne!(ended[0].0, 0, "{}", ended[0].1);
    assert_eq!(ended[1].0, 0, "what it left running is ended with it: {}", ended[1].1);
}
