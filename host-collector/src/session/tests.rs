//! A guest that keeps the protocol, one that does not, and every way to cut what either says.

use std::fmt::Write as _;

use pika_cloud_common::limits::{MAX_EVENT_BYTES, MAX_LINE_BYTES};
use pika_cloud_common::wire::{Heartbeat, write_event};
use proptest::prelude::*;

use super::*;

const NOW: Duration = Duration::from_secs(100);

fn session(cursor: Option<Cursor>) -> Session {
    Session::open(1, cursor, None, NOW).0
}

fn cursor(seq: u64) -> Cursor {
    Cursor { stream_id: "s-1".into(), seq, digest: Digest::of(b"before"), logs: BTreeMap::new() }
}

fn hello_with(fields: &str) -> Vec<u8> {
    let mut text = r#"{"hello":{"protocol":1,"agent":"0.1.0","schema_version":1,"stream_id":"s-1","boot_id":"b-1","first_seq":1,"last_seq":0}}"#.to_owned();
    for field in fields.split(';').filter(|field| !field.is_empty()) {
        let (name, value) = field.split_once('=').unwrap();
        let key = format!("\"{name}\":");
        match text.find(&key) {
            Some(at) => {
                let from = at + key.len();
                let to = from + text[from..].find([',', '}']).unwrap();
                text.replace_range(from..to, value);
            }
            None => text.insert_str(text.len() - 2, &format!(",{key}{value}")),
        }
    }
    text.push('\n');
    text.into_bytes()
}

fn event_text(seq: u64) -> String {
    format!(
        r#"{{"schema_version":1,"seq":{seq},"timestamp":"2026-01-31T12:00:00.000000Z","kind":"ready","message":"m"}}"#
    )
}

fn event_message(seq: u64) -> Vec<u8> {
    let mut out = Vec::new();
    write_event(event_text(seq).as_bytes(), &mut out);
    out
}

fn log_message(file: &str, offset: u64, bytes: &[u8]) -> Vec<u8> {
    let chunk = LogChunk { file: file.to_owned(), offset, len: bytes.len() as u64 };
    let mut out = Vec::new();
    GuestMessage::Log(chunk).write(&mut out);
    out.extend_from_slice(bytes);
    out
}

fn entry(path: &str) -> Entry {
    Entry { path: path.to_owned(), folder: false, mode: 0o644, size: 0, offset: 0, len: 0, digest: None }
}

fn message(message: &GuestMessage) -> Vec<u8> {
    let mut out = Vec::new();
    message.write(&mut out);
    out
}

/// Puts bytes in, a piece at a time, and tells what came out; a fault ends it.
fn feed(session: &mut Session, bytes: &[u8], pieces: &mut dyn Iterator<Item = usize>) -> Vec<String> {
    let mut said = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let space = session.space();
        let n = pieces.next().unwrap_or(rest.len()).clamp(1, rest.len().min(space.len()));
        space[..n].copy_from_slice(&rest[..n]);
        session.filled(n, NOW);
        rest = &rest[n..];
        loop {
            match session.receive() {
                Ok(None) => break,
                Ok(Some(received)) => said.push(tell(&received)),
                Err(fault) => {
                    said.push(format!("fault: {fault}"));
                    return said;
                }
            }
        }
    }
    joined(said)
}

/// Raw bytes may come in any number of pieces.
fn joined(said: Vec<String>) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    let mut next = None;
    for text in said {
        let Some((file, offset, bytes)) = text.strip_prefix("log ").and_then(|rest| {
            let mut parts = rest.splitn(3, ' ');
            Some((parts.next()?.to_owned(), parts.next()?.parse::<usize>().ok()?, parts.next()?.to_owned()))
        }) else {
            if text != "nothing" {
                next = None;
                out.push(text);
            }
            continue;
        };
        let end = offset + bytes.len() / 2;
        match (&next, out.last_mut()) {
            (Some((at_file, at)), Some(last)) if *at_file == file && *at == offset => last.push_str(&bytes),
            _ => out.push(format!("log {file} {offset} {bytes}")),
        }
        next = Some((file, end));
    }
    out
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn tell(received: &Received<'_>) -> String {
    match received {
        Received::Nothing => "nothing".to_owned(),
        Received::Opened(opened) => format!("opened {} {}", opened.hello.stream_id, opened.new_stream),
        Received::Event { head, missing, digest, .. } => format!("event {} missing {missing} {digest}", head.seq),
        Received::BadLine { reason, .. } => format!("bad line: {reason}"),
        Received::Log { file, offset, bytes } => format!("log {file} {offset} {}", hex(bytes)),
        Received::Entry(entry) => format!("entry {} {}", entry.path, entry.offset),
        // A line for each, so that pieces do not show.
        Received::EntryBytes(bytes) => {
            bytes.iter().fold(String::new(), |text, byte| text + &format!("byte {byte:02x}\n"))
        }
        other => format!("{other:?}"),
    }
}

/// All at once, behind a hello.
fn said(cursor: Option<Cursor>, hello: &[u8], rest: &[u8]) -> Vec<String> {
    feed(&mut session(cursor), &[hello, rest].concat(), &mut std::iter::empty())
}

fn fault_of(said: &[String]) -> &str {
    said.last().and_then(|text| text.strip_prefix("fault: ")).unwrap_or("")
}

// Opening.

#[test]
fn the_host_says_its_cursor() {
    let (_, hello) = Session::open(7, Some(cursor(5)), None, NOW);
    let HostMessage::Hello(hello) = hello else { panic!("a hello") };
    assert_eq!((hello.protocol, hello.term, hello.follow, hello.after), (PROTOCOL, 7, true, Some(cursor(5))));
}

#[test]
fn a_session_opens_with_a_hello() {
    let mut session = session(None);
    assert!(!session.is_open());
    let said = feed(&mut session, &hello_with(""), &mut std::iter::empty());
    assert_eq!(said, ["opened s-1 true"]);
    assert!(session.is_open());
    let cursor = session.cursor().unwrap();
    assert_eq!((cursor.stream_id.as_str(), cursor.seq, cursor.digest), ("s-1", 0, Digest::EMPTY_STREAM));
}

#[test]
fn whoever_does_not_say_hello_is_refused() {
    let cases: [(&[u8], &str); 6] = [
        (b"{\"heartbeat\":{\"seq\":0,\"uptime\":1}}\n", "no hello at first"),
        (b"{\"later\":{}}\n", "unknown message `later`"),
        (b"SSH-2.0-OpenSSH\r\n", "not a message of the session protocol"),
        (b"\n", "not a message of the session protocol"),
        (&hello_with("stream_id=\"\""), "stream_id"),
        (&hello_with("first_seq=9007199254740993"), "out of range"),
    ];
    for (bytes, problem) in cases {
        let said = feed(&mut session(None), bytes, &mut std::iter::empty());
        assert!(fault_of(&said).contains(problem), "{said:?}");
    }
    let long = hello_with(&format!("boot_id=\"{}\"", "b".repeat(129)));
    assert!(fault_of(&feed(&mut session(None), &long, &mut std::iter::empty())).contains("boot_id"));
    let said = said(None, &hello_with(""), &hello_with(""));
    assert_eq!(fault_of(&said), "the guest broke the session protocol: a second hello");
}

#[test]
fn names_of_a_stream_have_a_bound() {
    for field in ["stream_id", "boot_id"] {
        for (length, fits) in [(128, true), (129, false)] {
            let hello = hello_with(&format!("{field}=\"{}\"", "x".repeat(length)));
            let said = feed(&mut session(None), &hello, &mut std::iter::empty());
            assert_eq!(fault_of(&said).is_empty(), fits, "{field} of {length}: {said:?}");
        }
    }
}

#[test]
fn another_version_is_told_by_both_and_for_good() {
    for (field, problem) in [
        ("protocol=2", "speaks session protocol 2, this host speaks 1"),
        ("protocol=0", "speaks session protocol 0, this host speaks 1"),
        ("schema_version=3", "schema_version 3, this host reads 1"),
    ] {
        let mut session = session(None);
        let hello = hello_with(&format!("{field};agent=\"\\u001b[2J\\n{}\"", "9".repeat(5000)));
        session.decoder.feed(&hello);
        let fault = session.receive().unwrap_err();
        assert!(fault.is_final(), "{fault}");
        let text = fault.to_string();
        assert!(text.contains(problem) && text.len() < 400, "{text}");
        assert!(text.contains("[2J 9") && !text.contains(char::is_control), "{text:?}");
    }
}

#[test]
fn a_refusal_is_told_as_such() {
    for (code, is_final) in
        [("unsupported_protocol", true), ("stale_term", true), ("superseded", false), ("ledger", false), ("new", false)]
    {
        let line = format!("{{\"error\":{{\"code\":\"{code}\",\"message\":\"because\"}}}}\n");
        let mut session = session(None);
        session.decoder.feed(line.as_bytes());
        let fault = session.receive().unwrap_err();
        assert_eq!(fault.is_final(), is_final, "{code}");
        assert!(fault.to_string().contains("because"));
    }
}

// Streams and cursors.

#[test]
fn events_go_on_behind_the_cursor() {
    let rest = [event_message(6), event_message(7)].concat();
    let said = said(Some(cursor(5)), &hello_with("last_seq=7"), &rest);
    let sixth = Digest::of(b"before").chain(event_text(6).as_bytes());
    let seventh = sixth.chain(event_text(7).as_bytes());
    assert_eq!(
        said,
        ["opened s-1 false".to_owned(), format!("event 6 missing 0 {sixth}"), format!("event 7 missing 0 {seventh}")]
    );
}

#[test]
fn another_stream_begins_anew() {
    let said = said(Some(cursor(5)), &hello_with("stream_id=\"s-2\""), &event_message(1));
    let first = Digest::EMPTY_STREAM.chain(event_text(1).as_bytes());
    assert_eq!(said, ["opened s-2 true".to_owned(), format!("event 1 missing 0 {first}")]);
}

/// The journal has to learn of both, since it would compute another digest after a crash.
#[test]
fn a_trimmed_stream_goes_on_from_the_guests_own_digest() {
    let digest = Digest::of(b"the guest's");
    let hello = hello_with(&format!("first_seq=9;last_seq=9;first_digest=\"{digest}\""));
    for (cursor, before) in [(None, 0), (Some(cursor(5)), 5)] {
        let said = said(cursor, &hello, &event_message(9));
        let ninth = digest.chain(event_text(9).as_bytes());
        assert_eq!(said, ["opened s-1 true".to_owned(), format!("event 9 missing 0 {ninth}")], "from {before}");
    }
    // What was trimmed is here already: nothing is skipped, and nothing but the cursor counts.
    let said = said(Some(cursor(8)), &hello, &event_message(9));
    let ninth = Digest::of(b"before").chain(event_text(9).as_bytes());
    assert_eq!(said, ["opened s-1 false".to_owned(), format!("event 9 missing 0 {ninth}")]);
}

#[test]
fn events_that_are_known_are_skipped() {
    let rest: Vec<u8> = (3..8).flat_map(event_message).collect();
    let said = said(Some(cursor(5)), &hello_with("last_seq=7"), &rest);
    assert_eq!(said.len(), 3, "{said:?}");
    assert!(said[1].starts_with("event 6 ") && said[2].starts_with("event 7 "), "{said:?}");
}

#[test]
fn numbers_that_are_left_out_are_counted() {
    let rest = [event_message(9), event_message(1 << 53), event_message((1 << 53) - 1), event_message(0)].concat();
    let said = said(Some(cursor(5)), &hello_with(""), &rest);
    assert!(said[1].starts_with("event 9 missing 3 "), "{said:?}");
    assert!(said[2].starts_with("bad line: ") && said[2].contains("out of range"), "{said:?}");
    let missing = (1u64 << 53) - 1 - 9 - 1;
    assert!(said[3].starts_with(&format!("event {} missing {missing} ", (1u64 << 53) - 1)), "{said:?}");
    assert!(said[4].starts_with("bad line: "), "{said:?}");
}

#[test]
fn numbers_that_do_not_rise_are_bad_lines() {
    let rest = [event_message(1), event_message(1), event_message(3), event_message(2), event_message(4)].concat();
    let said = said(None, &hello_with(""), &rest);
    assert!(said[1].starts_with("event 1 missing 0"), "{said:?}");
    assert_eq!(said[2], "bad line: seq 1 comes after 1");
    assert!(said[3].starts_with("event 3 missing 1"), "{said:?}");
    assert_eq!(said[4], "bad line: seq 2 comes after 3");
    assert!(said[5].starts_with("event 4 missing 0"), "{said:?}");
}

#[test]
fn lines_that_are_no_events_are_told_and_survived() {
    let with = |inner: &str| [b"{\"event\":", inner.as_bytes(), b"}\n"].concat();
    let too_long = event_text(1).replace("\"m\"", &format!("\"{}\"", "m".repeat(MAX_EVENT_BYTES)));
    let deep = event_text(1).replace("\"m\"", &format!("\"m\",\"details\":{}1{}", "[".repeat(200), "]".repeat(200)));
    let cases = [
        with("7"),
        with("[]"),
        with(&event_text(1).replace("\"schema_version\":1", "\"schema_version\":2")),
        with(&event_text(1).replace("2026", "yesterday")),
        with(&too_long),
        with(&deep),
        with(&event_text(1).replace("\"seq\":1", "\"seq\":18446744073709551616")),
        with("{\"seq\":1}"),
        b"{\"event\":\xff\xfe\0}\n".to_vec(),
    ];
    for bad in cases {
        let said = said(None, &hello_with(""), &[bad, event_message(1)].concat());
        assert_eq!(said.len(), 3, "{said:?}");
        assert!(said[1].starts_with("bad line: "), "{said:?}");
        assert!(said[2].starts_with("event 1 missing 0"), "{said:?}");
    }
}

#[test]
fn what_a_newer_agent_adds_is_skipped() {
    let rest = [
        &b"{\"later\":{\"x\":[1,2]}}\n{\"notice\":{\"what\":\"later\",\"x\":1}}\n{\"heartbeat\":{\"seq\":0,\"uptime\":1,\"x\":2}}\n"[..],
        &event_message(1),
    ]
    .concat();
    let said = said(None, &hello_with("later=true"), &rest);
    assert_eq!(said[1], "Notice(Unknown)");
    assert!(said[2].starts_with("event 1 "), "{said:?}");
}

#[test]
fn documents_of_another_version_are_bad_lines() {
    let status = r#"{"status":{"schema_version":V,"state":"ready","updated_at":"2026-01-31T12:00:00Z","message":""}}"#;
    let result =
        r#"{"result":{"schema_version":V,"status":"failed","finished_at":"2026-01-31T12:00:00Z","message":""}}"#;
    for document in [status, result] {
        let known = format!("{}\n", document.replace('V', "1"));
        let newer = format!("{}\n", document.replace('V', "2"));
        let said = said(None, &hello_with(""), format!("{known}{newer}").as_bytes());
        assert!(said[1].starts_with("Status(") || said[1].starts_with("Result("), "{said:?}");
        assert!(said[2].starts_with("bad line: ") && said[2].contains("schema_version 2"), "{said:?}");
    }
}

// Logs.

#[test]
fn logs_go_on_where_they_were() {
    let mut cursor = cursor(0);
    cursor.logs.insert("guest.log".into(), 100);
    let rest = [
        log_message("guest.log", 90, b"0123456789"),
        log_message("guest.log", 100, b"abc"),
        log_message("other.log", 0, b"x"),
        log_message("guest.log", 103, b""),
        log_message("guest.log", 103, b"d"),
    ]
    .concat();
    let mut session = session(Some(cursor));
    let said = feed(&mut session, &[hello_with(""), rest].concat(), &mut std::iter::empty());
    assert_eq!(said[1..], ["log guest.log 100 616263", "log other.log 0 78", "log guest.log 103 64"]);
    assert_eq!(session.cursor().unwrap().logs, BTreeMap::from([("guest.log".into(), 104), ("other.log".into(), 1)]));
}

#[test]
fn log_bytes_that_are_left_out_are_told() {
    let said = said(None, &hello_with(""), &log_message("guest.log", 50, b"a"));
    assert!(said[1].starts_with("Notice(LogGap") && said[1].contains("from: 0, to: 50"), "{said:?}");
    assert_eq!(said[2], "log guest.log 50 61");
}

#[test]
fn log_chunks_that_cannot_be_end_the_session() {
    let header = |file: &str, offset: u64, len: u64| {
        format!("{}\n", serde_json::json!({"log": {"file": file, "offset": offset, "len": len}}))
    };
    let overlap = [log_message("guest.log", 0, b"0123456789"), log_message("guest.log", 5, b"56789a")].concat();
    assert!(fault_of(&said(None, &hello_with(""), &overlap)).contains("overlap"));
    for (header, problem) in [
        (header("guest.log", 0, 65_537), "out of range"),
        (header("guest.log", 0, u64::MAX), "out of range"),
        (header("guest.log", u64::MAX, 1), "out of range"),
        (header("../x", 0, 1), "no plain name"),
        (header("a/b", 0, 1), "no plain name"),
        (header("/etc/passwd", 0, 1), "no plain name"),
        (header("a\0b", 0, 1), "no plain name"),
        (header("a\nb", 0, 1), "no plain name"),
        (header(".", 0, 1), "no plain name"),
        (header("..", 0, 1), "no plain name"),
        (header("", 0, 1), "no plain name"),
        (header(&"x".repeat(256), 0, 1), "no plain name"),
        (header(&"é".repeat(128), 0, 1), "no plain name"),
    ] {
        let said = said(None, &hello_with(""), header.as_bytes());
        assert!(fault_of(&said).contains(problem), "{header}: {said:?}");
    }
}

#[test]
fn a_stream_has_a_bounded_number_of_logs() {
    let rest: Vec<u8> = (0..MAX_LOG_FILES + 5).flat_map(|n| log_message(&format!("{n}.log"), 0, b"x\n{")).collect();
    let again = [&rest[..], &log_message("0.log", 3, b"y"), &event_message(1)].concat();
    let mut session = session(None);
    let said = feed(&mut session, &[hello_with(""), again].concat(), &mut std::iter::empty());
    assert_eq!(said.len(), 1 + MAX_LOG_FILES + 5 + 2, "{said:?}");
    assert_eq!(said[1 + MAX_LOG_FILES..][..5], ["LogLeftOut"; 5], "told, so that nobody takes the logs for whole");
    assert_eq!(said[1 + MAX_LOG_FILES + 5], "log 0.log 3 79");
    assert_eq!(session.cursor().unwrap().logs.len(), MAX_LOG_FILES);
}

// Archives.

#[test]
fn plain_paths_are_taken() {
    let deepest = vec!["d"; MAX_ARCHIVE_DEPTH].join("/");
    for path in ["a", "a/b", "...", "a b", "ünïcode/☃", "-rf", "back\\slash", "quo\"te", &"x".repeat(255), &deepest]
    {
        let said = said(None, &hello_with(""), &message(&GuestMessage::Entry(entry(path))));
        assert_eq!(said[1], format!("entry {path} 0"));
    }
}

#[test]
fn paths_that_leave_their_place_end_the_session() {
    let long = vec!["x".repeat(200); 21].join("/");
    let deep = vec!["d"; MAX_ARCHIVE_DEPTH + 1].join("/");
    for path in [
        "",
        "/",
        "/a",
        "a/",
        "a//b",
        ".",
        "..",
        "./a",
        "a/.",
        "../a",
        "a/../b",
        "a/..",
        "a\0b",
        "a\nb",
        "a\rb",
        "a\x1b[0m",
        "a\u{85}b",
        "a\u{7f}",
        &"x".repeat(256),
        &long,
        &deep,
    ] {
        let said = said(None, &hello_with(""), &message(&GuestMessage::Entry(entry(path))));
        assert!(fault_of(&said).contains("archive path"), "{path:?}: {said:?}");
    }
}

#[test]
fn chunks_that_cannot_be_end_the_session() {
    let text = |fields: &str| format!("{{\"entry\":{{\"path\":\"a\",\"mode\":420,{fields}}}}}\n");
    for fields in [
        "\"size\":9,\"len\":65537",
        "\"size\":9,\"len\":18446744073709551615",
        "\"size\":9,\"offset\":9007199254740992",
        "\"size\":-1",
        "\"size\":0,\"len\":1,\"folder\":true",
    ] {
        let said = said(None, &hello_with(""), text(fields).as_bytes());
        assert!(!fault_of(&said).is_empty(), "{fields}: {said:?}");
    }
}

#[test]
fn a_chunk_may_be_as_long_as_the_limit() {
    let bytes = vec![b'x'; MAX_CHUNK_BYTES];
    let chunk = Entry { len: bytes.len() as u64, size: bytes.len() as u64, ..entry("a") };
    let rest = [&message(&GuestMessage::Entry(chunk)), &bytes[..], &event_message(1)].concat();
    let said = said(None, &hello_with(""), &rest);
    assert_eq!(said[1], "entry a 0");
    assert!(fault_of(&said).is_empty() && said.last().unwrap().starts_with("event 1 "));
}

/// Raw bytes may look like anything.
#[test]
fn raw_bytes_are_never_read_as_messages() {
    let bytes = b"{\"end\":{\"reason\":\"done\"}}\n";
    let chunk = Entry { len: bytes.len() as u64, size: bytes.len() as u64, ..entry("a") };
    let rest = [&message(&GuestMessage::Entry(chunk)), &bytes[..], &event_message(1)].concat();
    let said = said(None, &hello_with(""), &rest);
    assert_eq!(said[1], "entry a 0");
    assert_eq!(said[2].lines().count(), bytes.len());
    assert!(said[3].starts_with("event 1 "), "{said:?}");
}

// Bounds and time.

#[test]
fn a_line_without_end_ends_the_session_in_bounded_memory() {
    let mut session = session(None);
    let said = feed(&mut session, &vec![0; 4 * MAX_LINE_BYTES], &mut std::iter::repeat(4096));
    assert!(fault_of(&said).contains("a line is longer than"), "{said:?}");
    assert!(session.space().len() <= MAX_LINE_BYTES + 2 * MAX_READ_BYTES);
}

#[test]
fn a_session_that_was_busy_once_gives_its_memory_back() {
    let mut session = session(None);
    feed(&mut session, &hello_with(""), &mut std::iter::empty());
    assert!(session.space().len() <= 2 * MIN_READ_BYTES);
    let log = format!(r#"{{"log":{{"file":"a","offset":0,"len":{MAX_CHUNK_BYTES}}}}}"#);
    let mut bytes = format!("{log}\n").into_bytes();
    bytes.resize(bytes.len() + MAX_CHUNK_BYTES, b'x');
    feed(&mut session, &bytes, &mut std::iter::empty());
    assert!(session.space().len() > 16 * 1024, "few reads for much");
    feed(&mut session, &message(&GuestMessage::Heartbeat(Heartbeat { seq: 0, uptime: 1 })), &mut std::iter::empty());
    assert!(session.space().len() <= 2 * MIN_READ_BYTES);
}

/// Four times as much after a read that took all; twice what came, where that was a small part of it.
#[test]
fn a_read_asks_for_what_the_last_one_suggests() {
    let mut session = session(None);
    for (read, next) in [(512, 2048), (2048, 8192), (8191, 8192), (512, 8192), (511, 1022), (1022, 4088), (10, 512)] {
        session.space();
        session.filled(read, NOW);
        assert_eq!(session.read_bytes, next, "after {read}");
    }
}

#[test]
fn silence_is_noticed_and_nothing_else_is() {
    let mut session = session(None);
    assert_eq!(session.next_tick(), NOW + HEARTBEAT_INTERVAL);
    assert!(matches!(session.tick(NOW), Ok(None)));
    let mut now = NOW;
    let mut pings = 0;
    loop {
        now = session.next_tick().max(now);
        match session.tick(now) {
            Ok(Some(HostMessage::Ping(_))) => pings += 1,
            Ok(other) => panic!("{other:?}: due at {now:?}, and nothing was done"),
            Err(fault) => {
                assert!(matches!(fault, SessionFault::Silent));
                assert!(!fault.is_final());
                break;
            }
        }
    }
    assert_eq!((pings, now), (3, NOW + PEER_TIMEOUT));
    session.filled(0, now);
    assert_eq!(session.heard_at(), now);
    assert!(session.tick(now).is_ok(), "a single byte is a sign of life");
}

#[test]
fn the_end_is_told() {
    let rest = message(&GuestMessage::End(EndReason::NewStream));
    assert_eq!(said(None, &hello_with(""), &rest)[1], "End(NewStream)");
}

// Properties.

/// A stream of a guest, mostly well formed.
fn stream() -> impl Strategy<Value = Vec<u8>> {
    let part = prop_oneof![
        6 => (0u64..20).prop_map(event_message),
        3 => ("[ab]", 0u64..8, prop::collection::vec(any::<u8>(), 0..20))
            .prop_map(|(file, offset, bytes)| log_message(&file, offset, &bytes)),
        2 => ("[a-c/.]{1,6}", prop::collection::vec(any::<u8>(), 0..9)).prop_map(|(path, bytes)| {
            let chunk = Entry { len: bytes.len() as u64, ..entry(&path) };
            [message(&GuestMessage::Entry(chunk)), bytes].concat()
        }),
        1 => Just(b"{\"later\":1}\n".to_vec()),
        1 => prop::collection::vec(any::<u8>(), 0..30),
        1 => Just(message(&GuestMessage::End(EndReason::Done))),
    ];
    (prop::collection::vec(part, 0..30), prop::option::of(1u64..20)).prop_map(|(parts, first)| {
        let trimmed = first
            .map_or(String::new(), |first| format!("first_seq={first};first_digest=\"{}\"", Digest::of(b"trimmed")));
        let mut bytes = hello_with(&trimmed);
        bytes.extend(parts.into_iter().flatten());
        bytes
    })
}

fn any_cursor() -> impl Strategy<Value = Option<Cursor>> {
    prop::option::of((0u64..20).prop_map(cursor))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn cuts_do_not_matter(
        cursor in any_cursor(),
        bytes in stream(),
        cuts in prop::collection::vec(1usize..40, 1..40),
    ) {
        let (mut whole, mut cut) = (session(cursor.clone()), session(cursor));
        let at_once = feed(&mut whole, &bytes, &mut std::iter::empty());
        let in_pieces = feed(&mut cut, &bytes, &mut cuts.into_iter().cycle());
        // Where the session ended in a fault the pieces before it were not joined.
        prop_assert_eq!(joined(in_pieces).concat(), joined(at_once).concat());
        prop_assert_eq!(whole.cursor(), cut.cursor());
    }

    #[test]
    fn what_is_given_out_rises_and_counts(cursor in any_cursor(), bytes in stream()) {
        let mut session = session(cursor);
        let mut at = None;
        for text in feed(&mut session, &bytes, &mut std::iter::empty()) {
            if text.starts_with("opened") {
                continue;
            }
            if let Some(rest) = text.strip_prefix("event ") {
                let mut words = rest.split(' ');
                let seq: u64 = words.next().unwrap().parse().unwrap();
                let missing: u64 = words.nth(1).unwrap().parse().unwrap();
                prop_assert!(at.is_none_or(|before| before + missing + 1 == seq), "{} after {:?}", text, at);
                at = Some(seq);
            }
        }
        prop_assert!(at.is_none_or(|at| session.cursor().unwrap().seq == at));
    }

    /// Whatever comes, with a hello before it or not: no panic, and bounded memory.
    #[test]
    fn no_bytes_do_harm(
        hello in any::<bool>(),
        parts in prop::collection::vec(
            prop_oneof![
                prop::collection::vec(any::<u8>(), 0..200),
                "\\PC{0,80}\n".prop_map(String::into_bytes),
                r#"\{"(log|entry|event|status|result|notice|end|error|hello)":\{?.{0,60}\}?\}"#
                    .prop_map(|line| format!("{line}\n").into_bytes()),
            ],
            0..40,
        ),
        cuts in prop::collection::vec(1usize..300, 1..20),
    ) {
        let mut session = session(None);
        let mut bytes = if hello { hello_with("") } else { Vec::new() };
        bytes.extend(parts.into_iter().flatten());
        feed(&mut session, &bytes, &mut cuts.into_iter().cycle());
        prop_assert!(session.space().len() <= MAX_LINE_BYTES + 2 * MAX_READ_BYTES);
        prop_assert!(session.cursor().is_none_or(|cursor| cursor.logs.len() <= MAX_LOG_FILES));
    }
}

/// What ends it then says nothing against the agent.
#[test]
fn a_session_has_held_once_it_was_open_for_long() {
    let mut session = session(None);
    assert!(!session.has_held(NOW + PEER_TIMEOUT), "nobody said hello");
    session.decoder.feed(&hello_with(""));
    session.receive().unwrap();
    assert!(!session.has_held(NOW + PEER_TIMEOUT / 2));
    assert!(session.has_held(NOW + PEER_TIMEOUT));
}
