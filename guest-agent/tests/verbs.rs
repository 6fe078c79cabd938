//! The verbs: what they write, what they refuse, and how they say so.
#![allow(clippy::unwrap_used, reason = "what cannot be unwrapped fails the test")]

mod rig;

use std::os::unix::fs::PermissionsExt as _;
use std::time::Instant;

use rig::{Guest, binary, eventually, finish, misplace};
use serde_json::json;

#[test]
fn a_lifecycle_in_files() {
    let guest = Guest::new();
    guest.ok(&["starting", "--message", "here we go"]);
    guest.ok(&["progress", "load", "--fraction", "0.5", "--details", r#"{"items":7}"#]);
    guest.assert_documents_agree();
    assert_eq!(guest.status().message, "here we go");
    guest.ok(&["ready", "--details", "[1]"]);
    assert_eq!(guest.status().details, Some(json!([1])));
    guest.ok(&["progress", "serve"]);
    guest.assert_documents_agree();
    guest.ok(&["completed", "--exit-code", "0", "--details", r#"{"tests":12}"#]);
    assert_eq!(guest.kinds(), ["starting", "starting", "ready", "ready", "completed"]);
    let events = guest.events();
    assert_eq!(events[1].details, Some(json!({"progress": {"name": "load", "fraction": 0.5}, "items": 7})));
    assert!(events.iter().all(|event| event.boot_id.is_some()));
    assert_eq!(guest.result().exit_code, Some(0));
    assert_eq!(guest.result().details, Some(json!({"exit_code": 0, "tests": 12})));
    guest.assert_documents_agree();
    assert_eq!(guest.read("events.jsonl.seq"), "5");
}

#[test]
fn progress_before_any_state_is_starting() {
    let guest = Guest::new();
    guest.ok(&["progress", "boot"]);
    assert_eq!(guest.kinds(), ["starting"]);
    assert!(!guest.path("status.json").exists());
}

#[test]
fn nothing_follows_a_terminal_event() {
    let guest = Guest::new();
    guest.ok(&["failed", "--exit-code", "3", "--details", "\"why\""]);
    let before = (guest.read("events.jsonl"), guest.read("status.json"), guest.read("result.json"));
    for verb in [&["ready"][..], &["completed"], &["progress", "more"]] {
        let refused = guest.run(verb);
        assert_eq!(refused.code, 69);
        assert!(refused.stderr.contains("already `failed` (event 1)"), "{}", refused.stderr);
    }
    assert_eq!((guest.read("events.jsonl"), guest.read("status.json"), guest.read("result.json")), before);
    assert_eq!(guest.result().details, Some(json!({"exit_code": 3, "value": "why"})));
}

#[test]
fn wrong_words_say_what_and_how() {
    let guest = Guest::new();
    let long = "x".repeat(70_000);
    let deep = format!("{}1{}", "[".repeat(127), "]".repeat(127));
    for (args, code, says) in [
        (&["redy"][..], 64, "unrecognized subcommand 'redy'"),
        (&["ready", "--fraction", "1"], 64, "unexpected argument '--fraction'"),
        (&["progress"], 64, "<NAME>"),
        (&["progress", "p", "--fraction", "1.5"], 64, "not between 0 and 1"),
        (&["progress", "p", "--fraction", "nan"], 64, "not between 0 and 1"),
        (&["ready", "--wait-ack", "soon"], 64, "not a number of seconds (such as 10 or 10s)"),
        (&["failed", "--exit-code", "x"], 64, "'--exit-code <N>'"),
        (&["run"], 64, "<COMMAND>"),
        (&["ready", "--details", "{oops"], 65, "the details are not JSON"),
        (&["ready", "--details", r#"{"progress":1}"#], 65, "`progress` in the details is reserved"),
        (&["ready", "--details", r#"{"notice":1}"#], 65, "`notice` in the details is reserved"),
        (&["failed", "--exit-code", "1", "--details", r#"{"exit_code":2}"#], 65, "another `exit_code`"),
        (&["progress", ""], 65, "needs a `name`"),
        (&["ready", "--message", &long], 65, "at most 65536 are allowed"),
        (&["ready", "--details", &deep], 65, "no reader would take the event"),
        (&["status"], 66, "nothing was reported yet"),
        (&["events"], 66, "nothing was reported yet"),
        (&["run", "--request", "/nonexistent/request.json"], 66, "/nonexistent/request.json does not exist"),
    ] {
        if args[0] == "status" || args[0] == "events" {
            let _ = std::fs::remove_dir_all(guest.root());
        }
        let refused = guest.run(args);
        assert_eq!(refused.code, code, "{args:?}: {}", refused.stderr);
        assert!(refused.stderr.contains(says), "{args:?}: {}", refused.stderr);
        assert!(!guest.path("events.jsonl").exists() || guest.events().is_empty(), "{args:?} wrote something");
    }
}

#[test]
fn help_and_version() {
    let guest = Guest::new();
    assert_eq!(guest.ok(&["--version"]), concat!("pika-guest ", env!("CARGO_PKG_VERSION"), "\n"));
    let help = guest.ok(&["--help"]);
    for word in ["starting", "progress", "emit", "run", "stream", "Examples:", "Exit codes", "PIKA_CLOUD_DIR"] {
        assert!(help.contains(word), "{word}");
    }
    assert!(!help.contains("supervise"));
    assert!(guest.ok(&["progress", "--help"]).contains("--fraction"));
    let bare = guest.run(&[]);
    assert_eq!(bare.code, 64);
    assert!(bare.stderr.contains("Usage: pika-guest"), "{}", bare.stderr);
}

#[test]
fn a_root_that_cannot_be_made() {
    let guest = Guest::new();
    std::fs::write(guest.root(), "a file").unwrap();
    let refused = guest.run(&["ready"]);
    assert_eq!(refused.code, 74);
    assert!(refused.stderr.contains("is a regular file, and a folder belongs there"), "{}", refused.stderr);
    let mut below = guest.command(&["ready"]);
    below.env("PIKA_CLOUD_DIR", "/proc/nowhere/root");
    let refused = finish(below, b"");
    assert_eq!(refused.code, 73, "{}", refused.stderr);
    assert!(refused.stderr.contains("/proc/nowhere"), "{}", refused.stderr);
}

#[test]
fn modes_are_not_the_umasks() {
    let guest = Guest::new();
    let mut command = std::process::Command::new("/bin/sh");
    command.arg("-c").arg("umask 077; exec \"$0\" completed").arg(binary()).env("PIKA_CLOUD_DIR", guest.root());
    assert_eq!(finish(command, b"").code, 0);
    let mode = |name: &str| std::fs::metadata(guest.path(name)).unwrap().permissions().mode() & 0o7777;
    for name in ["events.jsonl", "events.jsonl.stream", "status.json", "result.json"] {
        assert_eq!(mode(name), 0o664, "{name}");
    }
    // Whoever may not write may not hold the writers up.
    assert_eq!(mode("events.jsonl.seq"), 0o660);
    for name in ["", "logs", "artifacts"] {
        assert_eq!(mode(name), 0o2775, "{name}");
    }
}

#[test]
fn something_odd_in_place_of_a_file() {
    for name in ["events.jsonl", "events.jsonl.seq", "events.jsonl.stream", "status.json", "result.json", "logs"] {
        for kind in ["fifo", "folder", "link", "dangling", "socket", "hardlink"] {
            if name == "logs" && kind == "hardlink" || (name, kind) == ("logs", "folder") {
                continue;
            }
            let guest = Guest::new();
            std::fs::create_dir(guest.root()).unwrap();
            misplace(&guest.path(name), kind);
            let passwd = std::fs::read("/etc/passwd").unwrap();
            let began = Instant::now();
            let outcome = guest.run(&["completed"]);
            assert!(began.elapsed().as_secs() < 5, "{name} as {kind} takes long");
            assert_eq!(std::fs::read("/etc/passwd").unwrap(), passwd);
            // What is only ever replaced is replaced, unless it is a folder.
            if matches!(name, "status.json" | "result.json") && kind != "folder" {
                assert_eq!(outcome.code, 0, "{name} as {kind}: {}", outcome.stderr);
                guest.assert_documents_agree();
                continue;
            }
            assert_eq!(outcome.code, 74, "{name} as {kind}: {}", outcome.stderr);
            assert!(outcome.stderr.contains(&format!("/{name} is a")), "{name} as {kind}: {}", outcome.stderr);
            assert!(outcome.stderr.contains("remove it"), "{name} as {kind}: {}", outcome.stderr);
            assert!(!std::path::Path::new("/nonexistent").exists());
        }
    }
}

#[test]
fn waiting_for_the_host() {
    let guest = Guest::new();
    let began = Instant::now();
    let late = guest.run(&["ready", "--wait-ack", "0.3s"]);
    assert_eq!(late.code, 75);
    assert!(late.stderr.contains("event 1 is written, but the host did not acknowledge it within 0.3 s"));
    assert!(began.elapsed().as_millis() >= 300);
    assert_eq!(guest.kinds(), ["ready"]);

    let mut owner = guest.owner();
    let mut waiting = guest.command(&["completed", "--wait-ack", "20s"]).spawn().unwrap();
    owner.find_event("completed");
    assert!(waiting.try_wait().unwrap().is_none());
    owner.ack(2);
    assert_eq!(rig::wait(&mut waiting), 0);
}

#[test]
fn showing_status_and_events() {
    let guest = Guest::new();
    guest.ok(&["starting"]);
    guest.ok(&["ready", "--message", "listening"]);
    let shown = guest.ok(&["status"]);
    assert!(shown.starts_with("ready since 20") && shown.ends_with("Z: listening\n"), "{shown}");
    assert_eq!(guest.ok(&["status", "--json"]), guest.read("status.json"));
    assert_eq!(guest.ok(&["events"]), guest.read("events.jsonl"));
    assert_eq!(guest.ok(&["events", "--after", "1"]).lines().count(), 1);

    let out = guest.dir.path().join("followed");
    let mut follow = guest
        .command(&["events", "--follow", "--after", "1"])
        .stdout(std::fs::File::create(&out).unwrap())
        .spawn()
        .unwrap();
    guest.ok(&["progress", "more"]);
    let lines = || std::fs::read_to_string(&out).unwrap().lines().count();
    eventually("the followed event", || lines() == 2);
    follow.kill().unwrap();
    follow.wait().unwrap();
}

#[test]
fn many_events_at_once() {
    let guest = Guest::new();
    let lines = concat!(
        "{\"kind\":\"starting\"}\n\n",
        "{\"kind\":\"progress\",\"name\":\"build\",\"fraction\":0.1}\n",
        "{\"kind\":\"ready\",\"message\":\"m\",\"details\":{\"a\":1}}\n",
        "{\"kind\":\"failed\",\"exit_code\":4}"
    );
    assert_eq!(guest.run_with(&["emit"], lines.as_bytes()).code, 0);
    assert_eq!(guest.kinds(), ["starting", "starting", "ready", "failed"]);
    assert_eq!(guest.result().exit_code, Some(4));
    guest.assert_documents_agree();
}

#[test]
fn a_wrong_line_is_named_and_what_came_before_is_written() {
    for (third, code, says) in [
        ("nonsense", 65, "line 3 of standard input: not an event of the form"),
        ("{\"kind\":\"stopped\"}", 65, "line 3 of standard input: `stopped` is no kind"),
        ("{\"kind\":\"ready\",\"details\":{\"notice\":1}}", 65, "`notice` in the details is reserved"),
    ] {
        let guest = Guest::new();
        let lines = format!("{{\"kind\":\"starting\"}}\n{{\"kind\":\"ready\"}}\n{third}\n{{\"kind\":\"completed\"}}\n");
        let outcome = guest.run_with(&["emit"], lines.as_bytes());
        assert_eq!(outcome.code, code);
        assert!(outcome.stderr.contains(says), "{}", outcome.stderr);
        assert!(outcome.stderr.contains("2 events before it are written"), "{}", outcome.stderr);
        assert_eq!(guest.kinds(), ["starting", "ready"]);
    }
    let guest = Guest::new();
    let outcome = guest.run_with(&["emit"], b"{\"kind\":\"completed\"}\n{\"kind\":\"ready\"}\n");
    assert_eq!(outcome.code, 69);
    assert!(outcome.stderr.contains("line 2 of standard input: the runtime is already `completed`"));
    assert_eq!(guest.kinds(), ["completed"]);
    let outcome = Guest::new().run_with(&["emit"], &vec![b'x'; 1 << 20]);
    assert_eq!(outcome.code, 65, "{}", outcome.stderr);
}

#[test]
fn no_lock_is_held_while_emit_waits() {
    let guest = Guest::new();
    let mut emit = guest.command(&["emit"]).stdin(std::process::Stdio::piped()).spawn().unwrap();
    let mut stdin = emit.stdin.take().unwrap();
    std::io::Write::write_all(&mut stdin, b"{\"kind\":\"starting\"}\n{\"kind\":").unwrap();
    eventually("the first line", || guest.path("status.json").exists());
    guest.ok(&["ready"]);
    std::io::Write::write_all(&mut stdin, b"\"completed\"}\n").unwrap();
    drop(stdin);
    assert_eq!(rig::wait(&mut emit), 0);
    assert_eq!(guest.kinds(), ["starting", "ready", "completed"]);
}

/// An image may have less wait for the host than the contract allows; what is no number is refused.
#[test]
fn caps_that_the_image_sets() {
    let guest = Guest::new();
    let lines = format!("{}\n", json!({"kind": "progress", "name": "p", "message": "m".repeat(60_000)})).repeat(40);
    let emit = |cap: &str| {
        let mut command = guest.command(&["emit"]);
        command.env("PIKA_GUEST_MAX_EVENT_BYTES", cap);
        finish(command, lines.as_bytes())
    };
    let refused = emit("2097152");
    assert_eq!(refused.code, 75, "{}", refused.stderr);
    let held = guest.read("events.jsonl").len();
    assert!((900_000..1_100_000).contains(&held), "{held} bytes are held: the cap without what is kept for states");
    assert_eq!(emit("99999999999").code, 0);
    let wrong = emit("8M");
    assert_eq!(wrong.code, 64);
    assert!(wrong.stderr.contains("PIKA_GUEST_MAX_EVENT_BYTES: `8M` is not a number of bytes"), "{}", wrong.stderr);
}
