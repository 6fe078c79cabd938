//! What nobody sane writes: errors, never a panic, never a stack that overflows.

#![allow(clippy::unwrap_used, missing_docs)]

use pika_cloud_common::digest::Digest;
use pika_cloud_common::limits::{MAX_COUNT, MAX_DOCUMENT_BYTES, MAX_EVENT_BYTES, MAX_LINE_BYTES};
use pika_cloud_common::spec::SpecError;
use pika_cloud_common::verdict::{Evidence, LastEvent, Outcome};
use pika_cloud_common::wire::{Decoder, Frame, FrameError, GuestMessage, HostMessage};
use pika_cloud_common::{
    DecodeError, Event, EventHead, GuestRequest, ResultStatus, RunResult, RuntimeSpec, State, Status, Timestamp,
    Verdict,
};
use proptest::prelude::*;
use serde_json::Value;

/// Reads `text` as everything there is; the number of readers that took it.
fn read_as_everything(text: &[u8]) -> usize {
    let taken = [
        Event::decode(text).is_ok(),
        EventHead::decode(text).is_ok(),
        Status::decode(text).is_ok(),
        RunResult::decode(text).is_ok(),
        GuestRequest::decode(text).is_ok(),
        Verdict::decode(text).is_ok(),
        HostMessage::decode(text).is_ok(),
        GuestMessage::decode(text).is_ok(),
        std::str::from_utf8(text).is_ok_and(|text| RuntimeSpec::from_json(text).is_ok()),
    ];
    taken.into_iter().filter(|taken| *taken).count()
}

fn on_a_small_stack<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    std::thread::Builder::new().stack_size(1 << 20).spawn(work).unwrap().join().expect("no panic")
}

const EVENT: &str = r#""schema_version":1,"seq":1,"timestamp":"2026-01-31T12:00:00Z","kind":"ready","message":"m""#;

#[test]
fn deep_nesting_is_refused() {
    on_a_small_stack(|| {
        for levels in [1_000, 30_000, 100_000] {
            for (open, close) in [("[", "]"), (r#"{"a":"#, "}")] {
                let inner = if open == "[" { "" } else { "1" };
                let deep = open.repeat(levels) + inner + &close.repeat(levels);
                assert_eq!(read_as_everything(deep.as_bytes()), 0);
                assert_eq!(read_as_everything(open.repeat(levels).as_bytes()), 0, "never closed");
                for field in ["details", "extra"] {
                    let event = format!(r#"{{{EVENT},"{field}":{deep}}}"#);
                    assert_eq!(read_as_everything(event.as_bytes()), 0, "{levels} {field}");
                    // Moved as it stands, refused when it is read.
                    let message = format!(r#"{{"event":{event}}}"#);
                    if let Ok(GuestMessage::Event(raw)) = GuestMessage::decode(message.as_bytes()) {
                        assert!(EventHead::decode(raw.get().as_bytes()).is_err());
                    }
                    let status = format!(r#"{{"status":{event}}}"#);
                    assert!(GuestMessage::decode(status.as_bytes()).is_err());
                }
                let spec = format!(r#"{{"metadata":{{"a":{deep}}}}}"#);
                assert!(matches!(RuntimeSpec::from_json(&spec), Err(SpecError::NotJson(_))));
            }
        }
    });
}

#[test]
fn long_lines_are_refused() {
    let too_long = |limit: usize, read: DecodeError| match read {
        DecodeError::TooLong { found, limit: told, .. } => assert_eq!((found, told), (10_000_000, limit)),
        other => panic!("{other}"),
    };
    for byte in [b'x', b'"', b'{', b'[', 0, b'1', b' ', 0xff] {
        let line = vec![byte; 10_000_000];
        assert_eq!(read_as_everything(&line), 0);
        too_long(MAX_EVENT_BYTES, Event::decode(&line).unwrap_err());
        too_long(MAX_EVENT_BYTES, EventHead::decode(&line).unwrap_err());
        too_long(MAX_DOCUMENT_BYTES, Status::decode(&line).unwrap_err());
        too_long(MAX_DOCUMENT_BYTES, RunResult::decode(&line).unwrap_err());
        too_long(MAX_DOCUMENT_BYTES, Verdict::decode(&line).unwrap_err());
        too_long(MAX_DOCUMENT_BYTES, GuestRequest::decode(&line).unwrap_err());
        let mut decoder = Decoder::new();
        let mut refused = 0;
        for chunk in line.chunks(8192) {
            decoder.feed(chunk);
            match decoder.next_frame() {
                Ok(None) => assert_eq!(refused, 0),
                Ok(Some(frame)) => panic!("{frame:?}"),
                Err(FrameError::LineTooLong) => refused += 1,
            }
            if refused == 3 {
                break;
            }
        }
        assert_eq!(refused, 3, "once refused, always refused");
    }
}

#[test]
fn events_fill_their_limit_and_no_more() {
    let event = |bytes: usize| {
        let empty = format!(r#"{{{EVENT},"pad":""}}"#).len();
        format!(r#"{{{EVENT},"pad":"{}"}}"#, "x".repeat(bytes - empty))
    };
    assert!(Event::decode(event(MAX_EVENT_BYTES).as_bytes()).is_ok());
    assert!(EventHead::decode(event(MAX_EVENT_BYTES).as_bytes()).is_ok());
    assert!(Event::decode(event(MAX_EVENT_BYTES + 1).as_bytes()).is_err());
    assert!(EventHead::decode(event(MAX_EVENT_BYTES + 1).as_bytes()).is_err());
}

/// Each is refused by `Event` and by `EventHead`; what is in brackets stands in its reason.
#[test]
fn broken_events_are_refused_by_both_readers() {
    let with = |more: &str| format!("{{{EVENT},{more}}}").into_bytes();
    let seq = |seq: &str| format!("{{{EVENT}}}").replace(r#""seq":1"#, &format!(r#""seq":{seq}"#)).into_bytes();
    let message = |bytes: &[u8]| {
        let [before, after] = [
            r#"{"message":""#.as_bytes(),
            br#"","schema_version":1,"seq":1,"timestamp":"2026-01-31T12:00:00Z","kind":"ready"}"#,
        ];
        [before, bytes, after].concat()
    };
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (vec![0; 100], "expected value"),
        (with("\"a\":1\0"), "expected"),
        (message(b"a\0b"), "control character"),
        (message(b"a\xffb"), "utf-8"),
        (message(b"\xed\xa0\x80"), "utf-8"),
        (message(br"\ud800"), "hex escape"),
        (with("\"details\":\"\\ud800\""), "hex escape"),
        (with("\"a\":[1e999]"), "number out of range"),
        (with(r#""seq":1"#), "duplicate field `seq`"),
        (with(r#""schema_version":1"#), "duplicate field `schema_version`"),
        (with(r#""message":"""#), "duplicate field `message`"),
        (with(r#""kind":"ready""#), "duplicate field `kind`"),
        (with(r#""timestamp":"2026-01-31T12:00:00Z""#), "duplicate field `timestamp`"),
        (with(r#""details":1,"details":2"#), "duplicate field `details`"),
        (with(r#""boot_id":null,"boot_id":"b""#), "duplicate field `boot_id`"),
        (with(r#""a":1} {"b":2"#), "trailing characters"),
        (seq("0"), "0 is out of range"),
        (seq("-1"), "expected u64"),
        (seq("1.0"), "expected u64"),
        (seq("9007199254740992"), "9007199254740992 is out of range"),
        (seq("18446744073709551615"), "is out of range"),
        (seq("18446744073709551616"), "expected u64"),
        (seq("1e400"), "number out of range"),
        (seq(&"9".repeat(1000)), "number out of range"),
        (b"{}".to_vec(), "missing field `schema_version`"),
        (b"[1,1,\"ready\"]".to_vec(), "expected"),
        (b"".to_vec(), "EOF"),
        (b"{".to_vec(), "EOF"),
    ];
    for (line, reason) in cases {
        let shown = String::from_utf8_lossy(&line);
        for refusal in [Event::decode(&line).unwrap_err(), EventHead::decode(&line).unwrap_err()] {
            let refusal = refusal.to_string();
            assert!(refusal.starts_with("event is malformed: ") && refusal.contains(reason), "{shown}: {refusal}");
        }
    }
    let highest = Event::decode(&seq(&MAX_COUNT.to_string())).unwrap();
    assert_eq!(highest.seq, MAX_COUNT);
}

/// As deep as a document may be, and one level deeper: both readers agree.
#[test]
fn both_readers_of_events_agree_on_depth() {
    let mut depths = Vec::new();
    for levels in 100..140 {
        for field in ["details", "extra"] {
            let line = format!(r#"{{{EVENT},"{field}":{}{}}}"#, "[".repeat(levels), "]".repeat(levels));
            let (event, head) = (Event::decode(line.as_bytes()).is_ok(), EventHead::decode(line.as_bytes()).is_ok());
            assert_eq!(event, head, "{field} {levels}");
            depths.push(event);
        }
    }
    assert!(depths.contains(&true) && depths.contains(&false));
}

fn json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_filter("JSON has no other", |n| n.is_finite()).prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(".{0,6}", inner, 0..4).prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

fn timestamp() -> impl Strategy<Value = Timestamp> {
    (any::<u64>(), any::<u32>()).prop_map(|(secs, micros)| Timestamp::from_unix(secs, micros))
}

fn state() -> impl Strategy<Value = State> {
    prop_oneof![prop::sample::select(State::KNOWN.to_vec()), ".{0,12}".prop_map(|name| State::from_name(&name))]
}

fn extra() -> impl Strategy<Value = serde_json::Map<String, Value>> {
    prop::collection::btree_map("x_[a-z]{0,8}", json(), 0..4).prop_map(|map| map.into_iter().collect())
}

/// Details that are null are written as absent ones.
fn details() -> impl Strategy<Value = Option<Value>> {
    prop::option::of(json().prop_filter("null is absent", |value| !value.is_null()))
}

prop_compose! {
    fn event()(
        (seq, timestamp, kind) in (1..=MAX_COUNT, timestamp(), state()),
        (message, boot_id, details, extra) in (".{0,40}", prop::option::of("[0-9a-f-]{36}"), details(), extra()),
    ) -> Event {
        Event { schema_version: 1, seq, timestamp, kind, message, boot_id, details, extra }
    }
}

prop_compose! {
    fn verdict()(
        runtime_id in "[a-z]{1,9}",
        incarnation in any::<u32>(),
        outcome in prop_oneof![
            prop::option::of(any::<i32>()).prop_map(|exit_code| Outcome::Completed { exit_code }),
            prop::option::of(any::<i32>()).prop_map(|exit_code| Outcome::Failed { exit_code }),
            Just(Outcome::Unreachable),
            Just(Outcome::Cancelled),
        ],
        (decided_at, message, extra) in (timestamp(), ".{0,20}", extra()),
        last_event in prop::option::of((1..=MAX_COUNT, state(), ".{0,9}")),
        bad_lines in any::<u64>(),
    ) -> Verdict {
        let last_event = last_event.map(|(seq, kind, message)| LastEvent { seq, kind, message });
        let evidence = Evidence { last_event, bad_lines, ..Evidence::default() };
        Verdict { schema_version: 1, runtime_id, incarnation, outcome, decided_at, message, evidence, extra }
    }
}

/// JSON text with a few of its bytes changed, or none.
fn damaged(text: impl Strategy<Value = Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    (text, prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3)).prop_map(|(mut text, damage)| {
        for (index, byte) in damage {
            let at = index.index(text.len());
            text[at] = byte;
        }
        text
    })
}

fn bytes(value: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn arbitrary_bytes_never_panic(text in prop::collection::vec(any::<u8>(), 0..200)) {
        read_as_everything(&text);
    }

    #[test]
    fn arbitrary_json_never_panics(value in json()) {
        read_as_everything(&bytes(&value));
        for name in ["event", "status", "result", "notice", "entry", "start", "hello", "ack", "end", "x"] {
            read_as_everything(&bytes(&serde_json::json!({ name: &value })));
        }
    }

    #[test]
    fn both_readers_of_events_agree(line in damaged(event().prop_map(|event| bytes(&event)))) {
        match (Event::decode(&line), EventHead::decode(&line)) {
            (Ok(event), Ok(head)) => prop_assert_eq!((event.seq, event.kind.as_str()), (head.seq, &*head.kind)),
            (Err(_), Err(_)) => {}
            (event, head) => prop_assert!(false, "{:?} {:?} {}", event, head, String::from_utf8_lossy(&line)),
        }
    }

    #[test]
    fn events_come_back(event in event()) {
        let text = bytes(&event);
        let again = Event::decode(&text).unwrap();
        prop_assert_eq!(&again, &event);
        prop_assert_eq!(bytes(&again), text);
    }

    #[test]
    fn verdicts_come_back(verdict in verdict()) {
        let text = bytes(&verdict);
        let again = Verdict::decode(&text).unwrap();
        prop_assert_eq!(&again, &verdict);
        prop_assert_eq!(bytes(&again), text);
    }

    #[test]
    fn statuses_and_results_come_back(event in event(), completed in any::<bool>(), exit_code in any::<Option<i32>>()) {
        let Event { timestamp, kind, message, boot_id, details, extra, .. } = event;
        let status = Status {
            schema_version: 1,
            state: kind,
            updated_at: timestamp.clone(),
            message: message.clone(),
            boot_id,
            details: details.clone(),
            extra: extra.clone(),
        };
        prop_assert_eq!(Status::decode(&bytes(&status)).unwrap(), status);
        let status = if completed { ResultStatus::Completed } else { ResultStatus::Failed };
        let result = RunResult { schema_version: 1, status, finished_at: timestamp, message, exit_code, details, extra };
        prop_assert_eq!(RunResult::decode(&bytes(&result)).unwrap(), result);
    }

    #[test]
    fn timestamps_come_back(timestamp in timestamp()) {
        prop_assert_eq!(Timestamp::parse(timestamp.as_str()), Ok(timestamp));
    }

    #[test]
    fn other_text_is_no_timestamp_or_stays(text in "[0-9TtZz:.+ -]{15,32}|\\PC{0,30}") {
        if let Ok(timestamp) = Timestamp::parse(&text) {
            prop_assert_eq!(timestamp.as_str(), text);
        }
    }

    #[test]
    fn digests_come_back(content in any::<[u8; 32]>(), line in prop::collection::vec(any::<u8>(), 0..50)) {
        let digest = Digest(content);
        prop_assert_eq!(digest.to_string().parse(), Ok(digest));
        prop_assert_eq!(serde_json::from_slice::<Digest>(&bytes(&digest)).unwrap(), digest);
        prop_assert_ne!(digest.chain(&line), digest);
    }

    /// Whatever comes, and whatever its reader takes for the length of raw bytes: all of it comes out, in order.
    #[test]
    fn frames_lose_nothing(stream in prop::collection::vec(prop_oneof![Just(b'\n'), any::<u8>()], 0..300), bulk in 0u64..20) {
        let mut decoder = Decoder::new();
        let mut out = Vec::new();
        for chunk in stream.chunks(7) {
            decoder.feed(chunk);
            while let Some(frame) = decoder.next_frame().unwrap() {
                match frame {
                    Frame::Line(line) => {
                        out.extend_from_slice(line);
                        out.push(b'\n');
                        decoder.expect_bulk(bulk);
                    }
                    Frame::Bulk(bytes) => out.extend_from_slice(bytes),
                }
            }
        }
        prop_assert!(stream.starts_with(&out));
        prop_assert!(!stream[out.len()..].contains(&b'\n'), "a whole line is left");
    }
}

#[test]
fn digests_chain_over_what_was_before() {
    let digest = Digest::EMPTY_STREAM.chain(b"a").chain(b"b");
    assert_eq!(digest.to_string(), "abccbe9b24d2bbd3aa1360d605147a841dd051130131c6929d6004e1ae4796e8");
    assert_ne!(digest, Digest::EMPTY_STREAM.chain(b"ab"));
    assert_ne!(digest, Digest::EMPTY_STREAM.chain(b"b").chain(b"a"));
    for text in
        ["", "0", &"g".repeat(64), &"0".repeat(63), &"0".repeat(65), &"é".repeat(32), &format!("+{}", "0".repeat(63))]
    {
        assert!(text.parse::<Digest>().is_err(), "{text}");
    }
}

#[test]
fn a_decoder_forgets_its_search_where_raw_bytes_begin() {
    let mut decoder = Decoder::new();
    decoder.feed(b"abc");
    assert_eq!(decoder.next_frame(), Ok(None));
    decoder.expect_bulk(2);
    assert_eq!(decoder.next_frame(), Ok(Some(Frame::Bulk(b"ab"))));
    decoder.feed(b"\n");
    assert_eq!(decoder.next_frame(), Ok(Some(Frame::Line(b"c"))));
    assert_eq!(decoder.next_frame(), Ok(None));
    decoder.feed(&vec![b'x'; MAX_LINE_BYTES]);
    decoder.feed(b"\n");
    assert!(matches!(decoder.next_frame(), Ok(Some(Frame::Line(line))) if line.len() == MAX_LINE_BYTES));
}

#[test]
fn a_line_is_too_long_even_where_its_end_came_with_it() {
    let mut decoder = Decoder::new();
    decoder.feed(&vec![b'x'; MAX_LINE_BYTES + 1]);
    decoder.feed(b"\n");
    assert_eq!(decoder.next_frame(), Err(FrameError::LineTooLong));
}
