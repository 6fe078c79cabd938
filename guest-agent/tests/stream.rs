//! The session, spoken with the real binary over pipes.
#![allow(clippy::unwrap_used, reason = "what cannot be unwrapped fails the test")]

mod rig;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

use pika_cloud_common::digest::Digest;
use pika_cloud_common::wire::{Ack, Cursor, Empty, GuestMessage, HostHello, HostMessage, Role};
use rig::{Guest, Said, Stream, events_of, eventually, log_of, misplace, start};
use serde_json::json;

fn supervisor_pid(guest: &Guest) -> Option<u32> {
    // The process that has the lock file open and is the agent.
    std::fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let args = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let environ = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
        let root = format!("PIKA_CLOUD_DIR={}\0", guest.root().display());
        let ours = environ.windows(root.len()).any(|window| window == root.as_bytes());
        (args.starts_with(b"pika-guest\0supervise\0") && ours).then_some(pid)
    })
}

fn kill(pid: u32) {
    assert!(Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
}

#[test]
fn what_is_there_and_then_the_end() {
    let guest = Guest::new();
    guest.ok(&["run", "--", "echo", "hello"]);
    let said = guest.observe();
    let GuestMessage::Hello(hello) = &said[0].message else { panic!("{said:?}") };
    assert_eq!((hello.protocol, hello.first_seq, hello.last_seq), (1, 1, 2));
    assert_eq!(hello.boot_id, std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim());
    assert_eq!(events_of(&said), guest.events());
    assert_eq!(log_of(&said), "hello\n");
    let find = |name: &str| said.iter().position(|said| said.json().get(name).is_some()).unwrap();
    assert!(find("event") < find("status") && find("status") < find("result") && find("result") < find("log"));
    assert_eq!(said.last().unwrap().json(), json!({"end": {"reason": "done"}}));
}

#[test]
fn an_empty_guest() {
    let guest = Guest::new();
    let said = guest.observe();
    assert_eq!(said.len(), 2);
    assert_eq!(said[1].json(), json!({"end": {"reason": "done"}}));
    // The stream's id is there from now on.
    let id = said[0].json()["hello"]["stream_id"].clone();
    guest.ok(&["ready"]);
    assert_eq!(guest.observe()[0].json()["hello"]["stream_id"], id);
}

#[test]
fn wrong_words_of_a_host() {
    let hello = r#"{"hello":{"protocol":1,"role":"owner","term":1,"follow":true}}"#;
    let long = format!("{{\"ping\":{}", " ".repeat(300_000));
    for (lines, code, says, exit) in [
        (vec![r#"{"hello":{"protocol":7,"role":"owner"}}"#], "unsupported_protocol", "protocol 7, this agent", 76),
        (vec![r#"{"ping":{}}"#], "bad_message", "the first message must be `hello`", 76),
        (vec!["GET / HTTP/1.1"], "bad_message", "not a message of the session protocol", 76),
        (vec![hello, hello], "bad_message", "`hello` opens a session", 76),
        (vec![hello, "{\"ack\":{\"seq\":-1}}"], "bad_message", "ack", 76),
        (vec![&long], "bad_message", "a line is longer than", 76),
        (vec![hello, r#"{"signal":{"name":"STOP"}}"#], "bad_request", "no signal `STOP` is passed on", 69),
    ] {
        let guest = Guest::new();
        let mut stream = guest.stream();
        for line in lines {
            stream.say_raw(line.as_bytes());
            stream.say_raw(b"\n");
        }
        let error = stream.find_error();
        assert_eq!(error["code"], code);
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(says) || says == "ack", "{message}");
        assert_eq!(stream.code(), exit, "{code}");
    }
    // A message of a newer host is passed over.
    let guest = Guest::new();
    let mut stream = guest.owner();
    stream.find_hello();
    stream.say_raw(b"{\"dance\":{\"steps\":3}}\n");
    guest.ok(&["ready"]);
    stream.find_event("ready");
}

type Spoil<'a> = &'a dyn Fn(&mut pika_cloud_common::wire::Start);

#[test]
fn a_request_that_can_never_run() {
    let cases: [(&str, Spoil); 7] = [
        ("has schema_version 1, this agent reads 2", &|start| start.request.schema_version = 1),
        ("schema_version 3", &|start| start.request.schema_version = 3),
        ("the command is empty", &|start| start.request.command.clear()),
        ("a NUL", &|start| start.request.command.push('\0')),
        ("`A=B` cannot be an environment variable", &|start| drop(start.env.insert("A=B".to_owned(), String::new()))),
        ("`here` is not an absolute path", &|start| start.cwd = Some("here".to_owned())),
        ("at most 100 years", &|start| start.request.timeout_secs = 1 << 50),
    ];
    for (says, spoil) in cases {
        let guest = Guest::new();
        let mut owner = guest.owner();
        let mut request = start("job-1", "true");
        spoil(&mut request);
        owner.say(&HostMessage::Start(request));
        let error = owner.find_error();
        assert_eq!(error["code"], "bad_request");
        assert!(error["message"].as_str().unwrap().contains(says), "{error}");
        assert!(guest.events().is_empty() && !guest.path("guest-request.json").exists());
    }
}

#[test]
fn events_arrive_as_they_are_written() {
    let guest = Guest::new();
    let mut owner = guest.owner();
    owner.find_hello();
    let mut fastest = Duration::MAX;
    for _ in 0..20 {
        guest.ok(&["ready"]);
        let returned = Instant::now();
        owner.find_event("ready");
        fastest = fastest.min(returned.elapsed());
    }
    // Written before the verb returned, so mostly there already; nothing polls on the way.
    assert!(fastest < Duration::from_millis(2), "{fastest:?}");
}

#[test]
fn a_job_from_start_to_release() {
    let guest = Guest::new();
    let mut owner = guest.owner();
    let id = owner.find_hello().stream_id;
    let mut request = start("job-1", "echo $GREETING; pwd; echo $HOME; exit 3");
    request.env.insert("GREETING".to_owned(), "secret-word".to_owned());
    request.cwd = Some("/etc".to_owned());
    owner.say(&HostMessage::Start(request));
    assert_eq!(owner.find_notice("started")["request_id"], "job-1");
    owner.find_event("starting");
    let failed = owner.find_event("failed");
    assert_eq!(failed.details, Some(json!({"exit_code": 3})));
    assert_eq!(guest.cursor(0).stream_id, id);
    let home = if rustix::process::geteuid().is_root() { "/root\n" } else { "" };
    let log = || guest.read("logs/guest.log");
    assert!(log().starts_with("secret-word\n/etc\n") && log().contains(home), "{}", log());
    // It waits for us, since an owner was seen.
    let supervisor = supervisor_pid(&guest).expect("a supervisor that waits");
    // In a session of its own, so that what ends ours does not reach it.
    let session = rustix::process::getsid(rustix::process::Pid::from_raw(supervisor.try_into().unwrap())).unwrap();
    assert_eq!(session.as_raw_pid().unsigned_abs(), supervisor);
    owner.ack(2);
    owner.release();
    let released = Instant::now();
    eventually("released", || {
        !std::path::Path::new(&format!("/proc/{supervisor}/status")).exists()
            || std::fs::read_to_string(format!("/proc/{supervisor}/status")).unwrap_or_default().contains("zombie")
    });
    // Not because it had waited long enough.
    assert!(released.elapsed() < Duration::from_secs(5));
    // Invariant 8: what was in the environment is in no file but the log that the workload wrote it to.
    for entry in std::fs::read_dir(guest.root()).unwrap().flatten() {
        if entry.file_type().unwrap().is_file() {
            assert!(!std::fs::read_to_string(entry.path()).unwrap().contains("secret-word"), "{:?}", entry.path());
        }
    }
    assert_eq!(guest.observe()[0].json()["hello"]["request_id"], "job-1");
}

/// Invariant 9.
#[test]
fn a_request_is_started_once() {
    let guest = Guest::new();
    let mark = guest.dir.path().join("mark");
    let command = format!("echo x >> {}; sleep 0.4", mark.display());
    let mut owner = guest.owner();
    for _ in 0..3 {
        owner.start("job-1", &command);
    }
    owner.find_notice("started");
    owner.find_notice("already_started");
    owner.find_notice("already_started");
    owner.start("job-2", &command);
    assert_eq!(owner.find_error()["code"], "busy");
    owner.find_event("completed");
    owner.start("job-1", &command);
    owner.find_notice("already_started");
    assert_eq!(std::fs::read_to_string(&mark).unwrap(), "x\n");
    // Another after the end: the next incarnation, in a stream of its own.
    let old = guest.cursor(0).stream_id;
    owner.start("job-2", &command);
    owner.find_notice("started");
    let rest = owner.rest();
    assert_eq!(rest.last().unwrap().json(), json!({"end": {"reason": "new_stream"}}));
    let mut again = guest.owner();
    let hello = again.find_hello();
    assert_eq!(hello.request_id.as_deref(), Some("job-2"));
    assert_ne!(hello.stream_id, old);
    again.find_event("completed");
    assert_eq!(std::fs::read_to_string(&mark).unwrap(), "x\nx\n");
}

#[test]
fn a_stream_that_is_killed_loses_nothing() {
    let guest = Guest::new();
    let mut owner = guest.owner();
    // Each event waits for its turn, so that there is one to come whenever a session begins.
    let turns = guest.dir.path().join("turn");
    let turn = |number: u32| std::fs::write(format!("{}{number}", turns.display()), "").unwrap();
    let command = format!(
        "for i in 1 2 3 4 5 6; do until [ -e {}$i ]; do sleep 0.02; done; {} progress p --message $i; done",
        turns.display(),
        rig::binary().display()
    );
    owner.start("job-1", &command);
    owner.find_notice("started");
    let mut seen = Vec::new();
    for number in 1..=4 {
        turn(number);
        seen.push(owner.find("an event", Said::event));
        kill(owner.id());
        owner.code();
        let cursor = guest.cursor(seen.last().unwrap().seq);
        owner = guest.stream();
        owner.hello(Role::Owner, 1, Some(cursor), true);
        assert_eq!(owner.find_hello().request_id.as_deref(), Some("job-1"));
        // Sent again, since the first answer may have been lost.
        owner.start("job-1", &command);
        owner.find("already_started", |said| {
            seen.extend(said.event());
            said.json()["notice"]["what"].as_str().filter(|what| *what == "already_started").map(|_| ())
        });
    }
    turn(5);
    turn(6);
    while !seen.last().unwrap().kind.is_terminal() {
        seen.push(owner.find("an event", Said::event));
    }
    let wanted: Vec<_> = (1..=8).collect();
    assert_eq!(seen.iter().map(|event| event.seq).collect::<Vec<_>>(), wanted);
    assert_eq!(guest.kinds().len(), 8);
}

#[test]
fn a_supervisor_that_is_killed_is_reported_at_once() {
    let guest = Guest::new();
    let mut owner = guest.owner();
    owner.start("job-1", "echo up; sleep 1");
    owner.find_event("starting");
    eventually("a supervisor", || supervisor_pid(&guest).is_some());
    // Until its workload is another program, that holds the lock as well.
    eventually("its workload runs", || std::fs::read(guest.path("logs/guest.log")).is_ok_and(|log| !log.is_empty()));
    let began = Instant::now();
    kill(supervisor_pid(&guest).unwrap());
    let failed = owner.find_event("failed");
    assert!(began.elapsed() < Duration::from_secs(2));
    assert_eq!(failed.details, Some(json!({"supervisor_lost": true})));
    owner.start("job-1", "sleep 1");
    owner.find_notice("already_started");
    guest.assert_documents_agree();
}

#[test]
fn accepted_and_never_supervised() {
    // As it is left by a stream that was killed between recording the request and starting its supervisor.
    let guest = Guest::new();
    guest.observe();
    let mut stream: serde_json::Value = serde_json::from_str(&guest.read("events.jsonl.stream")).unwrap();
    stream["request_id"] = json!("job-1");
    stream["supervised"] = json!(true);
    std::fs::write(guest.path("events.jsonl.stream"), stream.to_string()).unwrap();
    let said = guest.observe();
    assert_eq!(events_of(&said)[0].details, Some(json!({"supervisor_lost": true})));
    let mut owner = guest.owner();
    owner.start("job-1", "true");
    owner.find_notice("already_started");
    assert_eq!(guest.kinds(), ["failed"]);
}

#[test]
fn signals_of_a_host() {
    for (name, code) in [("TERM", 143), ("KILL", 137), ("USR1", 138)] {
        let guest = Guest::new();
        let mut owner = guest.owner();
        owner.start("job-1", "echo up; sleep 60");
        owner.find("the log", |said| matches!(said.message, GuestMessage::Log(_)).then_some(()));
        owner.signal(name);
        assert_eq!(owner.find_event("failed").exit_code(), Some(code), "{name}");
    }
    // Where nothing runs, nothing happens.
    let guest = Guest::new();
    let mut owner = guest.owner();
    owner.signal("KILL");
    guest.ok(&["ready"]);
    owner.find_event("ready");
}

#[test]
fn cursors() {
    let guest = Guest::new();
    for _ in 0..5 {
        guest.ok(&["ready"]);
    }
    let seqs = |cursor: Cursor| {
        let mut stream = guest.stream();
        stream.hello(Role::Observer, 0, Some(cursor), false);
        let said = stream.rest();
        let rewound = said.iter().any(|said| said.json()["notice"] == json!({"what": "rewound", "last_seq": 5}));
        (events_of(&said).iter().map(|event| event.seq).collect::<Vec<_>>(), rewound)
    };
    assert_eq!(seqs(guest.cursor(3)), (vec![4, 5], false));
    assert_eq!(seqs(guest.cursor(5)), (vec![], false));
    assert_eq!(seqs(guest.cursor(0)), (vec![1, 2, 3, 4, 5], false));
    let all = vec![1, 2, 3, 4, 5];
    assert_eq!(seqs(Cursor { digest: Digest::of(b"another story"), ..guest.cursor(3) }), (all.clone(), true));
    assert_eq!(seqs(Cursor { seq: 9, ..guest.cursor(5) }), (all.clone(), true));
    assert_eq!(seqs(Cursor { stream_id: "0".repeat(32), ..guest.cursor(3) }), (all.clone(), false));
    assert_eq!(seqs(Cursor { stream_id: "../../etc".to_owned(), ..guest.cursor(3) }), (all, false));
}

#[test]
fn logs_go_on_behind_the_cursor() {
    let guest = Guest::new();
    guest.ok(&["run", "--", "printf", "%100000d", "7"]);
    std::fs::write(guest.path("logs/other.log"), "other").unwrap();
    misplace(&guest.path("logs/fifo"), "fifo");
    misplace(&guest.path("logs/link"), "link");
    let mut cursor = guest.cursor(2);
    cursor.logs = BTreeMap::from([("guest.log".to_owned(), 99_990)]);
    let mut stream = guest.stream();
    stream.hello(Role::Observer, 0, Some(cursor), false);
    let logs: Vec<_> = stream
        .rest()
        .into_iter()
        .filter_map(|said| match said.message {
            GuestMessage::Log(chunk) => Some((chunk.file, chunk.offset, String::from_utf8(said.bulk).unwrap())),
            _ => None,
        })
        .collect();
    assert_eq!(
        logs,
        [("guest.log".to_owned(), 99_990, "         7".to_owned()), ("other.log".to_owned(), 0, "other".to_owned())]
    );
}

#[test]
fn a_log_that_the_workload_cuts() {
    let guest = Guest::new();
    guest.ok(&["starting"]);
    std::fs::write(guest.path("logs/own.log"), "0123456789").unwrap();
    let mut owner = guest.owner();
    owner.find("the log", |said| (said.bulk == b"0123456789").then_some(()));
    std::fs::write(guest.path("logs/own.log"), "abc").unwrap();
    let gap = owner.find_notice("log_gap");
    // It may be seen while it is empty.
    assert!(gap["from"].as_u64().unwrap() <= 3 && gap["to"] == 10, "{gap}");
    std::fs::write(guest.path("logs/own.log"), "abcdefghijklm").unwrap();
    owner.find("what is behind", |said| (said.bulk == b"klm").then_some(()));
}

#[test]
fn one_owner_at_a_time() {
    let guest = Guest::new();
    let mut first = guest.stream();
    first.hello(Role::Owner, 5, None, true);
    first.find_hello();
    let mut stale = guest.stream();
    stale.hello(Role::Owner, 4, None, true);
    let error = stale.find_error();
    assert_eq!(error["code"], "stale_term");
    assert!(error["message"].as_str().unwrap().contains("term is 4, and one of term 5"), "{error}");
    let mut second = guest.stream();
    second.hello(Role::Owner, 5, None, true);
    second.find_hello();
    assert_eq!(first.find_error()["code"], "superseded");
    assert_eq!(first.code(), 69);
    second.start("job-1", "true");
    second.find_notice("started");
}

#[test]
fn a_superseded_owner_changes_nothing() {
    let guest = Guest::new();
    guest.ok(&["ready"]);
    let mut first = guest.owner();
    first.find_event("ready");
    // Stopped, so that it cannot notice by itself.
    let signal = |name: &str| {
        assert!(Command::new("kill").args([name, &first.id().to_string()]).status().unwrap().success());
    };
    signal("-STOP");
    let mut second = guest.owner();
    second.find_event("ready");
    let id = first.id();
    first.ack(1);
    first.start("job-1", "true");
    first.release();
    assert!(Command::new("kill").args(["-CONT", &id.to_string()]).status().unwrap().success());
    assert_eq!(first.find_error()["code"], "superseded");
    first.rest();
    assert!(!guest.path("events.jsonl.ack").exists() || !guest.read("events.jsonl.ack").contains("\"seq\":1"));
    assert_eq!(guest.kinds(), ["ready"]);
}

#[test]
fn an_observer_only_reads() {
    let guest = Guest::new();
    guest.ok(&["ready"]);
    let mut observer = guest.stream();
    observer.hello(Role::Observer, 0, None, true);
    observer.find_event("ready");
    let ack = HostMessage::Ack(Ack { seq: 1, logs: BTreeMap::new() });
    for message in [ack, HostMessage::Start(start("job-1", "true")), HostMessage::Release(Empty {})] {
        observer.say(&message);
        assert_eq!(observer.find_error()["code"], "not_owner");
    }
    observer.signal("KILL");
    assert_eq!(observer.find_error()["code"], "not_owner");
    assert!(!guest.path("events.jsonl.ack").exists() && !guest.path("session.owner").exists());
    guest.ok(&["completed"]);
    observer.find_event("completed");
}

#[test]
fn an_earlier_stream_is_served_to_its_end() {
    let guest = Guest::new();
    guest.ok(&["run", "--", "echo", "first"]);
    let cursor = guest.cursor(1);
    guest.ok(&["run", "--", "echo", "second"]);
    let mut owner = guest.stream();
    owner.hello(Role::Owner, 1, Some(cursor.clone()), true);
    let hello = owner.find_hello();
    assert_eq!((hello.stream_id.as_str(), hello.last_seq), (cursor.stream_id.as_str(), 2));
    assert_eq!(owner.find_event("completed").seq, 2);
    owner.find("the log", |said| (said.bulk == b"first\n").then_some(()));
    assert!(owner.is_quiet_for(Duration::from_millis(100)), "it ended before it was acknowledged");
    owner.ack(2);
    assert_eq!(owner.rest().last().unwrap().json(), json!({"end": {"reason": "new_stream"}}));
    assert!(guest.read(&format!("previous/{}/events.jsonl.ack", cursor.stream_id)).contains("\"seq\":2"));
    // An observer is not waited for.
    let mut observer = guest.stream();
    observer.hello(Role::Observer, 0, Some(cursor), true);
    assert_eq!(observer.rest().last().unwrap().json(), json!({"end": {"reason": "new_stream"}}));
}

#[test]
fn what_is_acknowledged_is_trimmed() {
    let guest = Guest::new();
    let mut owner = guest.owner();
    let line = format!("{{\"kind\":\"progress\",\"name\":\"p\",\"message\":\"{}\"}}\n", "m".repeat(20_000));
    assert_eq!(guest.run_with(&["emit"], line.repeat(600).as_bytes()).code, 0);
    let before = std::fs::metadata(guest.path("events.jsonl")).unwrap();
    let mut cursors = vec![guest.cursor(0)];
    for (line, seq) in guest.read("events.jsonl").lines().zip(1..) {
        let before = cursors.last().unwrap().clone();
        cursors.push(Cursor { seq, digest: before.digest.chain(line.as_bytes()), ..before });
    }
    owner.find("the last", |said| said.event().filter(|event| event.seq == 600));
    owner.ack(500);
    eventually("a trim", || std::fs::metadata(guest.path("events.jsonl")).unwrap().ino() != before.ino());
    // Invariant 5: what is left is what waits, and little more.
    assert!(std::fs::metadata(guest.path("events.jsonl")).unwrap().len() < before.len() / 4);
    guest.ok(&["ready"]);
    assert_eq!(owner.find("what follows", Said::event).seq, 601);
    let first = guest.events()[0].seq;
    assert!((450..=501).contains(&first), "{first}");
    let hello = guest.observe()[0].json();
    assert_eq!((&hello["hello"]["first_seq"], &hello["hello"]["last_seq"]), (&json!(first), &json!(601)));
    let cut = usize::try_from(first - 1).unwrap();
    assert_eq!(hello["hello"]["first_digest"], cursors[cut].digest.to_string());
    // A cursor at the cut fits, one behind it is compared from there, one before it has a gap.
    let serve = |cursor: &Cursor| {
        let mut stream = guest.stream();
        stream.hello(Role::Observer, 0, Some(cursor.clone()), false);
        let said = stream.rest();
        let notice = said.iter().find_map(|said| said.json().get("notice").cloned());
        (events_of(&said)[0].seq, notice.map(|notice| notice["what"].as_str().unwrap().to_owned()))
    };
    assert_eq!(serve(&cursors[cut]), (first, None));
    assert_eq!(serve(&cursors[cut + 7]), (first + 7, None));
    assert_eq!(serve(&cursors[3]), (first, Some("gap".to_owned())));
    let other = Cursor { digest: Digest::of(b""), ..cursors[cut + 7].clone() };
    assert_eq!(serve(&other), (first, Some("rewound".to_owned())));
    // The trimmed file is written on and trimmed again.
    let again = std::fs::metadata(guest.path("events.jsonl")).unwrap().ino();
    assert_eq!(guest.run_with(&["emit"], line.repeat(600).as_bytes()).code, 0);
    owner.find("the last", |said| said.event().filter(|event| event.seq == 1201));
    owner.ack(1201);
    eventually("another trim", || std::fs::metadata(guest.path("events.jsonl")).unwrap().ino() != again);
    guest.ok(&["completed"]);
    assert_eq!(owner.find_event("completed").seq, 1202);
}

#[test]
fn the_space_of_an_acknowledged_log_is_given_back() {
    let guest = Guest::new();
    let mut owner = guest.owner();
    owner.start("job-1", "head -c 20000000 /dev/zero | tr '\\0' x; sleep 60");
    let mut sent = 0;
    while sent < 20_000_000 {
        sent += owner.find("the log", |said| match &said.message {
            GuestMessage::Log(chunk) => Some(chunk.len),
            _ => None,
        });
    }
    let held = || std::fs::metadata(guest.path("logs/guest.log")).unwrap().blocks() * 512;
    assert!(held() > 19_000_000);
    owner.say(&HostMessage::Ack(Ack { seq: 0, logs: BTreeMap::from([("guest.log".to_owned(), 15_000_000)]) }));
    eventually("the hole", || held() < 6_000_000);
    assert_eq!(std::fs::metadata(guest.path("logs/guest.log")).unwrap().len(), 20_000_000);
    // Who begins in front of it is told.
    let mut observer = guest.stream();
    observer.hello(Role::Observer, 0, None, false);
    let gap = observer.find_notice("log_gap");
    assert_eq!((&gap["from"], gap["to"].as_u64().unwrap() > 14_000_000), (&json!(0), true));
    owner.signal("KILL");
    owner.find_event("failed");
}

#[test]
fn a_host_that_does_not_read() {
    let guest = Guest::new();
    guest.ok(&["starting"]);
    let line = format!("{{\"kind\":\"progress\",\"name\":\"p\",\"message\":\"{}\"}}\n", "m".repeat(2000));
    assert_eq!(guest.run_with(&["emit"], line.repeat(10_000).as_bytes()).code, 0);
    let mut command = guest.command(&["stream"]);
    let mut child = command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut hello = Vec::new();
    HostMessage::Hello(HostHello {
        protocol: 1,
        role: Role::Observer,
        term: 0,
        machine: None,
        after: None,
        follow: true,
    })
    .write(&mut hello);
    stdin.write_all(&hello).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak < 12_000, "{peak} KiB");
    // It neither spins meanwhile nor misses the end of its input.
    let ticks = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
        let fields: Vec<u64> =
            stat.rsplit(')').next().unwrap().split_whitespace().skip(11).take(2).map(|n| n.parse().unwrap()).collect();
        fields[0] + fields[1]
    };
    let before = ticks();
    std::thread::sleep(Duration::from_millis(500));
    assert!(ticks() - before < 5, "it spins");
    drop(stdin);
    let began = Instant::now();
    assert_eq!(rig::wait(&mut child), 0);
    assert!(began.elapsed() < Duration::from_secs(5));
}

#[test]
fn the_end_of_the_input_ends_the_session() {
    let guest = Guest::new();
    guest.ok(&["ready"]);
    let mut owner = guest.owner();
    owner.find_event("ready");
    owner.close();
    assert_eq!(owner.code(), 0);
    let mut silent = guest.stream();
    silent.close();
    assert_eq!(silent.code(), 0);
    // Who does not follow and closes at once is still sent everything.
    let outcome = guest.run_with(&["stream"], b"{\"hello\":{\"protocol\":1,\"role\":\"observer\"}}\n");
    assert_eq!(outcome.code, 0);
    assert_eq!(outcome.stdout.lines().count(), 4, "{}", outcome.stdout);
}

#[test]
fn heartbeats_come_while_nothing_else_does() {
    let guest = Guest::new();
    guest.ok(&["ready"]);
    let mut owner = guest.owner();
    owner.find_event("ready");
    let began = Instant::now();
    let beat = owner.find("a heartbeat", |said| match &said.message {
        GuestMessage::Heartbeat(beat) => Some(*beat),
        _ => None,
    });
    assert_eq!(beat.seq, 1);
    assert!(beat.uptime > 0);
    assert!((4..7).contains(&began.elapsed().as_secs()));
}

#[test]
fn events_overtake_logs() {
    let guest = Guest::new();
    guest.ok(&["starting"]);
    std::fs::write(guest.path("logs/guest.log"), vec![b'x'; 30_000_000]).unwrap();
    let mut owner = guest.owner();
    owner.find("the first of the log", |said| matches!(said.message, GuestMessage::Log(_)).then_some(()));
    guest.ok(&["ready"]);
    let mut behind = 0;
    owner.find("the event", |said| match &said.message {
        GuestMessage::Event(_) => Some(()),
        GuestMessage::Log(_) => {
            behind += 1;
            None
        }
        _ => None,
    });
    // What was already in the pipes when it was written, and a chunk.
    assert!(behind < 150, "{behind} chunks of log came first");
}

/// A host dialled a number that another machine had before: it is no owner of this one, and leaves no trace.
#[test]
fn a_host_that_means_another_machine_is_refused() {
    let Ok(uuid) = std::fs::read_to_string("/sys/class/dmi/id/product_uuid") else {
        println!("skipped: this machine has no DMI product_uuid, or it cannot be read");
        return;
    };
    let guest = Guest::new();
    let hello = |meant: &str, term| {
        let machine = Some(Digest::of(meant.as_bytes()));
        HostMessage::Hello(HostHello { protocol: 1, role: Role::Owner, term, machine, after: None, follow: true })
    };
    let mut stranger = guest.stream();
    stranger.say(&hello("another", 9));
    assert_eq!(stranger.find_error()["code"], "another_machine");
    stranger.code();
    // Its term is lower than the stranger's, who was never an owner here.
    let mut ours = guest.stream();
    ours.say(&hello(&uuid.trim().to_ascii_lowercase(), 1));
    ours.find_hello();
}

/// Over vsock anything on the host may dial, and has the host's number: who does not name the machine learns nothing of it.
#[test]
fn over_vsock_a_hello_names_the_machine() {
    let guest = Guest::new();
    let mut nameless = Stream::spawn(guest.command(&["stream", "--vsock"]));
    nameless.say(&HostMessage::Hello(HostHello {
        protocol: 1,
        role: Role::Owner,
        term: u64::MAX,
        machine: None,
        after: None,
        follow: true,
    }));
    assert_eq!(nameless.find_error()["code"], "another_machine");
    nameless.code();
    // It was no owner, so that its term counts for nothing.
    guest.owner().find_hello();
}

/// In a virtual machine mounts come some time after the boot, and a job that began before would find empty folders.
#[test]
fn a_workload_waits_for_its_mounts() {
    let guest = Guest::new();
    let begin = |mounts: &[&str], id: &str, timeout_secs| {
        let mut start = start(id, "echo began");
        start.mounts = mounts.iter().map(|mount| (*mount).to_owned()).collect();
        start.request.timeout_secs = timeout_secs;
        let mut owner = guest.owner();
        owner.say(&HostMessage::Start(start));
        owner
    };
    begin(&["/", "/proc"], "r.1", 0).find_event("completed");
    // Its time is the workload's own.
    let failed = begin(&["/proc", "/not/mounted"], "r.2", 1).find_event("failed");
    assert!(failed.message.contains("`/not/mounted` is not mounted"), "{}", failed.message);
    assert_eq!(failed.exit_code(), Some(126));
    let mut ended = begin(&["/not/mounted"], "r.3", 0);
    ended.find_event("starting");
    ended.signal("TERM");
    assert!(ended.find_event("failed").message.contains("ended before it began"));
}
