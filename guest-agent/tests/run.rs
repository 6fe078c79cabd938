//! The supervisor: exit codes, output, signals, time limits, and what a workload leaves running.
#![allow(clippy::unwrap_used, reason = "what cannot be unwrapped fails the test")]

mod rig;

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use pika_cloud_common::{ResultStatus, State};
use rig::{Guest, Outcome, eventually, finish};
use serde_json::json;

fn run(guest: &Guest, script: &str) -> Outcome {
    run_with(guest, &[], script)
}

fn run_with(guest: &Guest, options: &[&str], script: &str) -> Outcome {
    let mut args = vec!["run"];
    args.extend(options);
    args.extend(["--", "/bin/sh", "-c", script]);
    let mut command = guest.command(&args);
    // So that a workload's `pika-guest` is this one.
    let path = format!("{}:{}", rig::binary().parent().unwrap().display(), std::env::var("PATH").unwrap());
    command.env("PATH", path);
    finish(command, b"")
}

fn spawn(guest: &Guest, options: &[&str], script: &str) -> Child {
    let mut args = vec!["run"];
    args.extend(options);
    args.extend(["--", "/bin/sh", "-c", script]);
    guest.command(&args).spawn().unwrap()
}

fn log(guest: &Guest) -> String {
    guest.read("logs/guest.log")
}

fn is_alive(pid: &str) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())) else { return false };
    !stat.rsplit(')').next().unwrap().trim_start().starts_with('Z')
}

#[test]
fn success_and_failure() {
    let guest = Guest::new();
    let outcome = run(&guest, "echo out; echo err >&2; read line; echo \"[$line]\"; echo $PIKA_CLOUD_DIR");
    assert_eq!((outcome.code, outcome.stdout.as_str()), (0, ""));
    assert_eq!(guest.kinds(), ["starting", "completed"]);
    assert_eq!(log(&guest), format!("out\nerr\n[]\n{}\n", guest.root().display()));
    assert_eq!((guest.result().status, guest.result().exit_code), (ResultStatus::Completed, Some(0)));
    guest.assert_documents_agree();

    let guest = Guest::new();
    assert_eq!(run(&guest, "exit 3").code, 3);
    assert_eq!(guest.kinds(), ["starting", "failed"]);
    assert_eq!(guest.result().exit_code, Some(3));
    assert_eq!(guest.result().message, "the workload exited with code 3");
}

#[test]
fn a_program_that_cannot_be_run() {
    let guest = Guest::new();
    let missing = guest.run(&["run", "--", "no-such-program"]);
    assert_eq!(missing.code, 127);
    assert_eq!(guest.kinds(), ["starting", "failed"]);
    assert!(guest.result().message.contains("cannot run `no-such-program`: No such file"), "{:?}", guest.result());
    assert_eq!(guest.result().exit_code, Some(127));
    assert!(log(&guest).contains("cannot run `no-such-program`"));
    let guest = Guest::new();
    assert_eq!(guest.run(&["run", "--", "/etc/passwd"]).code, 126);
    assert_eq!(guest.result().exit_code, Some(126));
}

#[test]
fn a_workload_that_a_signal_ends() {
    let guest = Guest::new();
    assert_eq!(run(&guest, "kill -9 $$").code, 137);
    let result = guest.result();
    let mut details = result.details.unwrap();
    // Where our control group counts kills for memory, the count did not rise; where nobody can read it, nothing is claimed.
    let (claim, words) = match details.as_object_mut().unwrap().remove("oom_kill") {
        Some(claim) => (claim, "killed, and not for memory"),
        None => (json!(false), "killed, cause unknown"),
    };
    assert_eq!((claim, details), (json!(false), json!({"exit_code": 137, "signal": 9})));
    assert_eq!(result.message, format!("the workload was ended by signal 9: {words}"));

    let guest = Guest::new();
    assert_eq!(run(&guest, "sh -c 'kill -9 $$'; exit $?").code, 137);
    let message = guest.result().message;
    assert!(message.starts_with("the workload exited with code 137: killed, "), "{message}");
    // TERM is no kill.
    let guest = Guest::new();
    assert_eq!(run(&guest, "kill -15 $$").code, 143);
    assert_eq!(guest.result().details, Some(json!({"exit_code": 143, "signal": 15})));
}

/// Whoever asked for a KILL knows its cause.
#[test]
fn a_kill_that_was_asked_for_is_no_evidence() {
    let guest = Guest::new();
    let mut stream = guest.owner();
    stream.start("job.1", "echo up; sleep 60");
    eventually("it is up", || guest.path("logs/guest.log").exists() && log(&guest) == "up\n");
    stream.signal("KILL");
    let failed = stream.find_event("failed");
    assert_eq!(failed.details, Some(json!({"exit_code": 137, "signal": 9})));
    assert_eq!(failed.message, "the workload was ended by signal 9");
    stream.release();
}

/// The kernel's first choice, whoever it runs as; and it does not have what keeps the supervisor.
#[test]
fn the_workload_goes_before_its_supervisor() {
    let guest = Guest::new();
    assert_eq!(run(&guest, "cat /proc/self/oom_score_adj /proc/$PPID/oom_score_adj").code, 0);
    let scores: Vec<i32> = log(&guest).lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(scores[0], 1000);
    assert!(scores[1] <= 0, "{scores:?}");
    if !rustix::process::geteuid().is_root() {
        return println!("skipped in part: only root can become another user");
    }
    let guest = Guest::new();
    let request = guest.dir.path().join("request.json");
    let text = r#"{"schema_version":2,"command":"cat /proc/self/oom_score_adj","timeout_secs":0,"run_as_root":false}"#;
    std::fs::write(&request, text).unwrap();
    assert_eq!(guest.run(&["run", "--request", request.to_str().unwrap()]).code, 0);
    assert_eq!(log(&guest), "1000\n");
}

#[test]
fn signals_are_passed_on_to_the_whole_group() {
    for (name, number) in [("TERM", 15), ("INT", 2), ("HUP", 1), ("QUIT", 3), ("USR1", 10), ("USR2", 12)] {
        let guest = Guest::new();
        // A shell's children in the background ignore INT and QUIT, and may not undo that.
        let wait = if matches!(name, "INT" | "QUIT") { "echo child" } else { "wait" };
        let script = format!(
            "(trap 'echo child; exit' {name}; echo up; while :; do sleep 0.02; done) & trap '{wait}; exit 7' {name}; \
             echo up; while :; do sleep 0.02; done"
        );
        // Whoever started the tests in the background has QUIT ignored, and no shell may undo that.
        let agent = rig::binary();
        let args = ["--default-signal", agent.to_str().unwrap(), "run", "--", "/bin/sh", "-c", &script];
        let mut child = guest.command_of(Path::new("env"), &args).spawn().unwrap();
        eventually("both are up", || guest.path("logs/guest.log").exists() && log(&guest).contains("up\nup\n"));
        let kill = Command::new("kill").arg(format!("-{number}")).arg(child.id().to_string()).status().unwrap();
        assert!(kill.success());
        println!("sent: {name}");
        assert_eq!(rig::wait(&mut child), 7, "{name}");
        assert!(log(&guest).contains("child"), "{name}: {}", log(&guest));
    }
}

#[test]
fn a_workload_without_our_signal_mask() {
    let guest = Guest::new();
    run(&guest, "grep -E 'SigBlk|SigIgn' /proc/self/status");
    let blocked = log(&guest);
    assert!(blocked.contains("SigBlk:\t0000000000000000"), "{blocked}");
    // PIPE (bit 12) is not ignored; a shell's own habits aside.
    let ignored = blocked.lines().find_map(|line| line.strip_prefix("SigIgn:\t")).unwrap();
    assert_eq!(u64::from_str_radix(ignored, 16).unwrap() & 0x1000, 0, "{blocked}");
}

#[test]
fn a_workload_inherits_no_descriptor_of_ours() {
    let guest = Guest::new();
    run(&guest, "ls -l /proc/self/fd");
    let text = log(&guest);
    assert!(!text.contains("supervisor.lock") && !text.contains("events.jsonl"), "{text}");
}

#[test]
fn a_time_limit() {
    let guest = Guest::new();
    let began = Instant::now();
    assert_eq!(run_with(&guest, &["--timeout", "0.3", "--stop-grace", "5"], "sleep 60").code, 124);
    assert!(began.elapsed() < Duration::from_secs(3));
    let result = guest.result();
    assert_eq!(result.details, Some(json!({"exit_code": 124, "timed_out": {"watchdog": "run", "secs": 0}})));
    assert_eq!((result.status, result.exit_code), (ResultStatus::Failed, Some(124)));
}

#[test]
fn a_time_limit_against_a_group_that_ignores_term() {
    let guest = Guest::new();
    let script = "trap '' TERM; (trap '' TERM; (trap '' TERM; echo $$-$(exec sh -c 'echo $PPID'); sleep 60) & sleep 60) & \
                  sleep 60";
    let began = Instant::now();
    assert_eq!(run_with(&guest, &["--timeout", "0.4s", "--stop-grace", "0.3s"], script).code, 124);
    let took = began.elapsed();
    assert!(took > Duration::from_millis(650) && took < Duration::from_secs(4), "{took:?}");
    for pid in log(&guest).trim().split('-') {
        eventually("the group is gone", || !is_alive(pid));
    }
    assert_eq!(guest.kinds(), ["starting", "failed"]);
}

/// Whoever is the first process kills everything in the end. Before that the workload's end is written down; others' TERM is passed on
/// and that is all.
#[test]
fn an_end_that_the_init_asks_for_comes_within_the_grace() {
    // A shell that is the first process of a namespace of its own, and has the agent run what does not end by itself.
    const INIT: &str = "\
        \"$1\" run --stop-grace 1 --wait-release 0 -- /bin/sh -c 'trap \"echo asked\" TERM; echo up; while :; do sleep 0.05; done' &
        agent=$!
        until grep -q up \"$PIKA_CLOUD_DIR/logs/guest.log\" 2>/dev/null; do sleep 0.05; done
        /bin/kill -TERM $agent
        sleep 2
        grep -q completed\\|failed \"$PIKA_CLOUD_DIR/events.jsonl\" && exit 99
        kill -TERM $agent
        wait $agent";
    let guest = Guest::new();
    let mut command = guest.command_of(Path::new("unshare"), &["--pid", "--fork", "--kill-child"]);
    command.args(["--mount-proc", "/bin/sh", "-c", INIT, "init"]).arg(rig::binary());
    let began = Instant::now();
    let outcome = finish(command, b"");
    if outcome.stderr.contains("unshare failed") {
        println!("skipped: this user may not make a namespace of process ids");
        return;
    }
    assert_eq!(outcome.code, 137, "{}", outcome.stderr);
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert_eq!(log(&guest).lines().filter(|line| *line == "asked").count(), 2, "{}", log(&guest));
    assert_eq!(guest.result().exit_code, Some(137));
}

#[test]
fn what_is_left_running_does_not_hold_up_the_end() {
    let guest = Guest::new();
    let began = Instant::now();
    assert_eq!(run(&guest, "sleep 60 & echo $!; exit 5").code, 5);
    assert!(began.elapsed() < Duration::from_secs(3));
    let pid = log(&guest);
    eventually("what was left is gone", || !is_alive(&pid));
    // One that never stops talking.
    let guest = Guest::new();
    let began = Instant::now();
    assert_eq!(run(&guest, "yes & exit 4").code, 4);
    assert!(began.elapsed() < Duration::from_secs(4));
    // One that left the group keeps its life, but not ours.
    let guest = Guest::new();
    let began = Instant::now();
    assert_eq!(run(&guest, "setsid sleep 8 & exit 6").code, 6);
    assert!(began.elapsed() < Duration::from_secs(4));
    // One that holds no output of ours goes with its group, too.
    let guest = Guest::new();
    assert_eq!(run(&guest, "sleep 60 >/dev/null 2>&1 & echo $!").code, 0);
    let pid = log(&guest);
    eventually("what was left is gone", || !is_alive(&pid));
}

#[test]
fn output_that_comes_late_is_kept() {
    let guest = Guest::new();
    assert_eq!(run(&guest, "(sleep 0.2; echo late) & exit 0").code, 0);
    assert_eq!(log(&guest), "late\n");
}

#[test]
fn a_flood_of_output() {
    let guest = Guest::new();
    assert_eq!(run(&guest, "head -c 20000000 /dev/zero | tr '\\0' x; exit 1").code, 1);
    assert_eq!(std::fs::metadata(guest.path("logs/guest.log")).unwrap().len(), 20_000_000);
}

#[test]
fn the_workloads_own_last_word_stands() {
    let guest = Guest::new();
    assert_eq!(run(&guest, "pika-guest completed --message mine; exit 5").code, 5);
    assert_eq!(guest.kinds(), ["starting", "completed"]);
    let result = guest.result();
    assert_eq!((result.status, result.message.as_str(), result.exit_code), (ResultStatus::Completed, "mine", None));
    assert_eq!(result.extra["workload_exit_code"], json!(5));
    assert_eq!(guest.status().extra["workload_exit_code"], json!(5));
    assert!(log(&guest).contains("exit code 5; it had said `completed` itself (event 2), and that stands"));
    // No look at it later takes that away.
    guest.observe();
    assert_eq!(guest.run(&["ready"]).code, 69);
    assert_eq!(guest.result().extra["workload_exit_code"], json!(5));
}

#[test]
fn one_at_a_time_and_one_after_the_other() {
    let guest = Guest::new();
    let mut first = spawn(&guest, &[], "echo up; sleep 60");
    eventually("it is up", || guest.path("logs/guest.log").exists() && log(&guest).contains("up"));
    let second = guest.run(&["run", "--", "true"]);
    assert_eq!(second.code, 75);
    assert!(second.stderr.contains("another workload is being supervised"), "{}", second.stderr);
    assert_eq!(guest.kinds(), ["starting"]);
    Command::new("kill").arg(first.id().to_string()).status().unwrap();
    assert_eq!(rig::wait(&mut first), 143);
    let id = guest.cursor(0).stream_id;
    assert_eq!(guest.run(&["run", "--", "true"]).code, 0);
    assert_eq!(guest.kinds(), ["starting", "completed"]);
    assert_ne!(guest.cursor(0).stream_id, id);
    assert!(guest.read(&format!("previous/{id}/logs/guest.log")).contains("up"));
}

#[test]
fn a_supervisor_that_was_killed() {
    let guest = Guest::new();
    let mut lost = spawn(&guest, &[], "echo up; sleep 0.5");
    // Not before the workload's own program runs: until then the lock is the child's as well, for an instant.
    eventually("it has begun", || guest.path("logs/guest.log").exists() && log(&guest).contains("up"));
    lost.kill().unwrap();
    lost.wait().unwrap();
    // The next run says so, then begins the next stream.
    let id = guest.cursor(0).stream_id;
    assert_eq!(guest.run(&["run", "--", "true"]).code, 0);
    let old = guest.read(&format!("previous/{id}/events.jsonl"));
    assert!(old.lines().last().unwrap().contains("\"details\":{\"supervisor_lost\":true}"), "{old}");
    assert_eq!(guest.kinds(), ["starting", "completed"]);
}

#[test]
fn a_request_in_a_file() {
    let guest = Guest::new();
    let path = guest.dir.path().join("request.json");
    let name = path.to_str().unwrap();
    let root = rustix::process::geteuid().is_root();
    let request = |version: u64, command: &str, timeout: u64| {
        let request =
            json!({"schema_version": version, "command": command, "timeout_secs": timeout, "run_as_root": root});
        std::fs::write(&path, request.to_string()).unwrap();
    };
    request(2, "echo $0 $HOME; pwd; exit 4", 0);
    assert_eq!(guest.run(&["run", "--request", name]).code, 4);
    assert!(log(&guest).ends_with("/\n"), "{}", log(&guest));
    request(2, "sleep 60", 1);
    assert_eq!(guest.run(&["run", "--request", name]).code, 124);
    for version in [1, 3] {
        request(version, "true", 0);
        let refused = guest.run(&["run", "--request", name]);
        assert_eq!(refused.code, 65);
        assert!(
            refused.stderr.contains(&format!("has schema_version {version}, this build reads 2")),
            "{}",
            refused.stderr
        );
    }
    std::fs::write(&path, "{").unwrap();
    let refused = guest.run(&["run", "--request", name]);
    assert_eq!(refused.code, 65);
    assert!(refused.stderr.contains("line 1 column"), "{}", refused.stderr);
    rig::misplace(&path, "fifo");
    assert_eq!(guest.run(&["run", "--request", name]).code, 74);
}

#[test]
fn an_unprivileged_workload_reports_and_leaves_artifacts() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can become another user");
        return;
    }
    let guest = Guest::new();
    // The folder that tempfile makes is its owner's alone.
    std::fs::set_permissions(guest.dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let path = guest.dir.path().join("request.json");
    let agent = guest.dir.path().join("pika-guest");
    std::fs::copy(rig::binary(), &agent).unwrap();
    let command = format!(
        "id -u; {0} ready && {0} progress p && echo x > $PIKA_CLOUD_DIR/artifacts/file && echo $USER $HOME",
        agent.display()
    );
    let request = json!({"schema_version": 2, "command": command, "timeout_secs": 0, "run_as_root": false});
    std::fs::write(&path, request.to_string()).unwrap();
    assert_eq!(guest.run(&["run", "--request", path.to_str().unwrap()]).code, 0, "{}", log(&guest));
    assert_eq!(guest.kinds(), ["starting", "ready", "ready", "completed"]);
    assert_ne!(log(&guest).lines().next(), Some("0"));
    assert_eq!(guest.read("artifacts/file"), "x\n");
    guest.assert_documents_agree();
}

#[test]
fn a_log_that_cannot_be_written() {
    let guest = Guest::new();
    guest.ok(&["starting"]);
    rig::misplace(&guest.path("logs/guest.log"), "fifo");
    assert_eq!(guest.run(&["run", "--", "true"]).code, 126);
    assert!(guest.result().message.contains("guest.log is a FIFO"), "{:?}", guest.result());
    assert_eq!(guest.status().state, State::Failed);
}

#[test]
fn a_hidden_verb_called_by_a_person() {
    let guest = Guest::new();
    let outcome = guest.run(&["supervise", "--lock-fd", "77"]);
    assert_eq!(outcome.code, 74, "{}", outcome.stderr);
    assert!(!guest.path("status.json").exists());
}

#[test]
fn a_run_without_an_owner_does_not_wait_for_one() {
    let guest = Guest::new();
    let began = Instant::now();
    assert_eq!(guest.run(&["run", "--wait-release", "20", "--", "true"]).code, 0);
    assert!(began.elapsed() < Duration::from_secs(5));
}

#[test]
fn ended_by_a_terminal_that_closes() {
    // A hangup of the supervisor's own group reaches the workload once, through the supervisor.
    let guest = Guest::new();
    let mut command =
        guest.command(&["run", "--", "/bin/sh", "-c", "trap 'echo hup; exit 9' HUP; echo up; sleep 60 & wait"]);
    let mut child = command.process_group(0).spawn().unwrap();
    eventually("it is up", || guest.path("logs/guest.log").exists() && log(&guest).contains("up"));
    Command::new("kill").args(["-HUP", "--", &format!("-{}", child.id())]).status().unwrap();
    assert_eq!(rig::wait(&mut child), 9);
    assert_eq!(log(&guest).matches("hup").count(), 1);
}

/// An init may ignore the end of its children, and hand that on.
#[test]
fn the_exit_code_is_known_under_any_init() {
    let guest = Guest::new();
    let mut command = guest.command(&["run", "--", "/bin/sh", "-c", "exit 3"]);
    // SAFETY: signal is async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            libc::signal(libc::SIGCHLD, libc::SIG_IGN);
            Ok(())
        });
    }
    assert_eq!(finish(command, b"").code, 3);
}

/// The cap on what waits of the output, and that the workload's own verbs have the caps of its supervisor.
#[test]
fn caps_that_the_image_sets() {
    let guest = Guest::new();
    let path = guest.dir.path().join("request.json");
    let command = "head -c 4000000 /dev/zero; echo $PIKA_GUEST_MAX_EVENT_BYTES > $PIKA_CLOUD_DIR/artifacts/cap";
    let root = rustix::process::geteuid().is_root();
    let request = json!({"schema_version": 2, "command": command, "timeout_secs": 0, "run_as_root": root});
    std::fs::write(&path, request.to_string()).unwrap();
    std::fs::create_dir_all(guest.path("artifacts")).unwrap();
    let mut run = guest.command(&["run", "--request", path.to_str().unwrap()]);
    run.env("PIKA_GUEST_MAX_LOG_BYTES", "2097152").env("PIKA_GUEST_MAX_EVENT_BYTES", "3145728");
    let outcome = finish(run, b"");
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    let held = std::fs::metadata(guest.path("logs/guest.log")).unwrap().len();
    // Up to a block less, where the last one did not fit, and a line that says how much was dropped.
    assert!((1_900_000..=2_097_152 + 200).contains(&held), "{held} bytes are held");
    assert_eq!(guest.read("artifacts/cap"), "3145728\n");
}
