//! What a session does with a stream that does not keep the contract: lines that are no events, odd files, a folder that is gone.
#![allow(clippy::unwrap_used, reason = "what cannot be unwrapped fails the test")]

mod rig;

use std::io::Write as _;
use std::time::{Duration, Instant};

use pika_cloud_common::wire::Role;
use rig::{Guest, misplace};

fn append(guest: &Guest, bytes: &[u8]) {
    let mut file = std::fs::OpenOptions::new().append(true).open(guest.path("events.jsonl")).unwrap();
    file.write_all(bytes).unwrap();
}

#[test]
fn lines_that_are_no_events() {
    let guest = Guest::new();
    guest.ok(&["ready"]);
    let line = guest.read("events.jsonl");
    append(&guest, b"no event\n");
    append(&guest, line.as_bytes());
    append(&guest, &vec![0; 1000]);
    append(&guest, b"\n");
    append(&guest, format!("{}\n", "[".repeat(60_000)).as_bytes());
    append(&guest, line.replacen("\"seq\":1", "\"seq\":2", 1).as_bytes());
    append(&guest, &vec![b'x'; 10_000_000]);
    append(&guest, b"\n");
    append(&guest, b"\xff\xfe\n");
    append(&guest, line.replacen("\"seq\":1", "\"seq\":9", 1).as_bytes());
    let mut stream = guest.stream();
    stream.hello(Role::Observer, 0, None, true);
    let first = stream.find_notice("bad_line");
    assert_eq!(first["offset"], line.len());
    assert_eq!(first["bytes"], "no event\n".len() + line.len() + 1001 + 60_000);
    assert_eq!(first["sample"], "no event");
    assert!(
        first["reason"].as_str().unwrap().starts_with("4 lines in a row are no events; the first: not a JSON object")
    );
    let second = stream.find_notice("bad_line");
    assert!(second["reason"].as_str().unwrap().contains("2 lines in a row are no events; the first: longer than"));
    assert_eq!(second["sample"], "x".repeat(128));
    assert_eq!(stream.find_event("ready").seq, 9);
    // Its peak was bounded, whatever the length of the line.
    let status = std::fs::read_to_string(format!("/proc/{}/status", stream.id())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak < 30_000, "{peak} KiB");
    append(&guest, b"not finished");
    append(&guest, b" yet\n");
    assert_eq!(stream.find_notice("bad_line")["sample"], "not finished yet");
}

#[test]
fn a_flood_of_bad_lines_is_told_in_few_words() {
    let guest = Guest::new();
    guest.ok(&["ready"]);
    append(&guest, &b"\n".repeat(500_000));
    append(&guest, &b"{}\n".repeat(50_000));
    let said = guest.observe();
    assert!(said.len() < 20, "{}", said.len());
}

#[test]
fn an_endless_line() {
    let guest = Guest::new();
    guest.ok(&["ready"]);
    let mut stream = guest.stream();
    stream.hello(Role::Observer, 0, None, true);
    stream.find_event("ready");
    let pid = stream.id();
    for _ in 0..200 {
        append(&guest, &vec![b'x'; 100_000]);
    }
    let began = Instant::now();
    append(&guest, b"\n");
    assert_eq!(stream.find_notice("bad_line")["bytes"], 20_000_000);
    assert!(began.elapsed() < Duration::from_secs(2));
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains("VmHWM:"));
}

#[test]
fn something_odd_takes_the_place_of_a_file() {
    for name in ["events.jsonl", "events.jsonl.seq", "events.jsonl.stream"] {
        for kind in ["fifo", "folder", "link", "socket"] {
            let guest = Guest::new();
            guest.ok(&["ready"]);
            misplace(&guest.path(name), kind);
            let mut stream = guest.owner();
            let error = stream.find_error();
            assert_eq!(error["code"], "ledger", "{name} as {kind}");
            assert!(error["message"].as_str().unwrap().contains(name), "{error}");
            assert_eq!(stream.code(), 74);
        }
    }
    // While a session is open.
    for kind in ["fifo", "folder", "link"] {
        let guest = Guest::new();
        guest.ok(&["ready"]);
        let mut stream = guest.owner();
        stream.find_event("ready");
        misplace(&guest.path("events.jsonl"), kind);
        assert_eq!(stream.find_error()["code"], "ledger", "{kind}");
    }
    // Documents, the acknowledgement and the logs are no reason to end.
    for name in
        ["status.json", "result.json", "events.jsonl.ack", "session.owner", "logs", "logs/guest.log", "artifacts"]
    {
        for kind in ["fifo", "folder", "dangling"] {
            let guest = Guest::new();
            guest.ok(&["ready"]);
            misplace(&guest.path(name), kind);
            let mut stream = guest.owner();
            let hello = stream.next().json();
            if kind == "folder" && (name == "session.owner" || name == "status.json") {
                assert_eq!(hello["error"]["code"], "ledger", "{name} as {kind}: {hello}");
                continue;
            }
            assert!(hello.get("hello").is_some(), "{name} as {kind}: {hello}");
            stream.find_event("ready");
            stream.ack(1);
            guest.ok(&["progress", "p"]);
            stream.find("progress", |said| said.event().filter(|event| event.seq == 2));
        }
    }
    let guest = Guest::new();
    guest.ok(&["ready"]);
    let mut stream = guest.owner();
    stream.find_event("ready");
    misplace(&guest.path("result.json"), "fifo");
    let notice = stream.find_notice("skipped");
    assert_eq!(notice["path"], "result.json");
    assert!(notice["reason"].as_str().unwrap().contains("is a FIFO"), "{notice}");
}

/// Nothing that could be watched says so where nobody writes into it any more.
#[test]
fn a_folder_that_is_removed_or_replaced_ends_the_session() {
    for is_replaced in [false, true] {
        let guest = Guest::new();
        guest.ok(&["ready"]);
        let mut stream = guest.owner();
        stream.find_event("ready");
        if is_replaced {
            std::fs::rename(guest.root(), guest.root().with_extension("elsewhere")).unwrap();
            std::fs::create_dir(guest.root()).unwrap();
        } else {
            std::fs::remove_dir_all(guest.root()).unwrap();
        }
        let error = stream.find_error();
        assert_eq!(error["code"], "ledger", "{error}");
        assert!(error["message"].as_str().unwrap().contains("was removed or replaced"), "{error}");
        guest.ok(&["ready"]);
        guest.owner().find_event("ready");
    }
}
