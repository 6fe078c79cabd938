//! Golden documents and messages: what is read and written today is read and written tomorrow.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::collections::BTreeSet;
use std::fmt::Debug;

use pika_cloud_common::spec::RuntimeSpec;
use pika_cloud_common::verdict::{DeathCause, Outcome, Watchdog};
use pika_cloud_common::wire::{
    Empty, EndReason, ErrorCode, GuestMessage, HostMessage, MessageError, Notice, Role, event_line, write_event,
};
use pika_cloud_common::{DecodeError, Event, EventHead, GuestRequest, ResultStatus, RunResult, State, Status, Verdict};
use serde_json::Value;

use support::{KINDS, fixtures};

/// Reads a document or message of that kind and writes it again; or says why it is refused.
fn reencode(kind: &str, text: &str) -> Result<String, String> {
    fn json<T: serde::Serialize, E: ToString>(read: Result<T, E>) -> Result<String, String> {
        read.map(|value| serde_json::to_string(&value).unwrap()).map_err(|error| error.to_string())
    }
    fn line<T: Debug, E: ToString>(read: Result<T, E>, write: impl Fn(&T, &mut Vec<u8>)) -> Result<String, String> {
        let message = read.map_err(|error| error.to_string())?;
        let mut out = b"before".to_vec();
        write(&message, &mut out);
        let out = String::from_utf8(out).unwrap();
        Ok(out.strip_prefix("before").unwrap().strip_suffix('\n').unwrap().to_owned())
    }
    let bytes = text.as_bytes();
    match kind {
        "event" => json(Event::decode(bytes)),
        "status" => json(Status::decode(bytes)),
        "result" => json(RunResult::decode(bytes)),
        "guest-request" => json(GuestRequest::decode(bytes)),
        "verdict" => json(Verdict::decode(bytes)),
        "runtime-spec" => json(RuntimeSpec::from_json(text)),
        "session-host" => line(HostMessage::decode(bytes), HostMessage::write),
        "session-guest" => line(GuestMessage::decode(bytes), GuestMessage::write),
        other => panic!("no kind {other}"),
    }
}

#[test]
fn every_fixture_reencodes_byte_for_byte() {
    for kind in KINDS {
        for fixture in fixtures(kind) {
            assert!(!fixture.text.contains('\n'), "{}: more than one line", fixture.name);
            assert_eq!(reencode(kind, &fixture.text).as_ref(), Ok(&fixture.text), "{}", fixture.name);
        }
    }
}

#[test]
fn foreign_documents_keep_their_meaning() {
    for kind in ["event", "status", "result", "guest-request", "verdict"] {
        for fixture in fixtures(&format!("foreign/{kind}")) {
            let again = reencode(kind, &fixture.text).unwrap_or_else(|error| panic!("{}: {error}", fixture.name));
            let json = |text: &str| serde_json::from_str::<Value>(text).unwrap();
            assert_eq!(json(&again), json(&fixture.text), "{}", fixture.name);
        }
    }
}

#[test]
fn wrong_documents_are_refused() {
    for kind in KINDS {
        for fixture in fixtures(&format!("wrong/{kind}")) {
            let read = reencode(kind, &fixture.text);
            assert!(read.is_err(), "{} was read as {}", fixture.name, read.unwrap());
        }
    }
}

/// A `match` without a wildcard and the names of all its arms: who adds a variant must name it here, and then the test
/// below asks for its fixture.
macro_rules! variants {
    ($function:ident, $names:ident, $type:ty, { $($pattern:pat => $name:literal),+ $(,)? }) => {
        fn $function(value: &$type) -> &'static str {
            match value { $($pattern => $name),+ }
        }
        const $names: &[&str] = &[$($name),+];
    };
}

variants!(host_message, HOST_MESSAGES, HostMessage, {
    HostMessage::Hello(_) => "hello",
    HostMessage::Ack(_) => "ack",
    HostMessage::Start(_) => "start",
    HostMessage::Signal(_) => "signal",
    HostMessage::Archive(_) => "archive",
    HostMessage::Release(_) => "release",
    HostMessage::Ping(_) => "ping",
});
variants!(role, ROLES, Role, { Role::Owner => "owner", Role::Observer => "observer" });
variants!(guest_message, GUEST_MESSAGES, GuestMessage, {
    GuestMessage::Hello(_) => "hello",
    GuestMessage::Event(_) => "event",
    GuestMessage::Status(_) => "status",
    GuestMessage::Result(_) => "result",
    GuestMessage::Log(_) => "log",
    GuestMessage::Entry(_) => "entry",
    GuestMessage::Heartbeat(_) => "heartbeat",
    GuestMessage::Notice(_) => "notice",
    GuestMessage::Error(_) => "error",
    GuestMessage::End(_) => "end",
});
variants!(notice, NOTICES, Notice, {
    Notice::Started { .. } => "started",
    Notice::AlreadyStarted { .. } => "already_started",
    Notice::Gap { .. } => "gap",
    Notice::BadLine { .. } => "bad_line",
    Notice::LogGap { .. } => "log_gap",
    Notice::Rewound { .. } => "rewound",
    Notice::Skipped { .. } => "skipped",
    Notice::ArchiveDone { .. } => "archive_done",
    Notice::Unknown => "unknown",
});
variants!(error_code, ERROR_CODES, ErrorCode, {
    ErrorCode::UnsupportedProtocol => "unsupported_protocol",
    ErrorCode::BadMessage => "bad_message",
    ErrorCode::StaleTerm => "stale_term",
    ErrorCode::Superseded => "superseded",
    ErrorCode::AnotherMachine => "another_machine",
    ErrorCode::TooManySessions => "too_many_sessions",
    ErrorCode::NotOwner => "not_owner",
    ErrorCode::Busy => "busy",
    ErrorCode::BadRequest => "bad_request",
    ErrorCode::Archive => "archive",
    ErrorCode::Ledger => "ledger",
    ErrorCode::Unknown => "unknown",
});
variants!(end_reason, END_REASONS, EndReason, {
    EndReason::Done => "done",
    EndReason::NewStream => "new_stream",
    EndReason::Shutdown => "shutdown",
    EndReason::Unknown => "unknown",
});
variants!(outcome, OUTCOMES, Outcome, {
    Outcome::Completed { .. } => "completed",
    Outcome::Failed { .. } => "failed",
    Outcome::TimedOut { .. } => "timed_out",
    Outcome::GuestDied { .. } => "guest_died",
    Outcome::Unreachable => "unreachable",
    Outcome::ProvisionFailed => "provision_failed",
    Outcome::Cancelled => "cancelled",
});
variants!(watchdog, WATCHDOGS, Watchdog, {
    Watchdog::Boot => "boot",
    Watchdog::Ready => "ready",
    Watchdog::Silence => "silence",
    Watchdog::Progress => "progress",
    Watchdog::Run => "run",
    Watchdog::Collect => "collect",
});
variants!(death_cause, DEATH_CAUSES, DeathCause, {
    DeathCause::InstanceStopped => "instance_stopped",
    DeathCause::InstanceError => "instance_error",
    DeathCause::InstanceGone => "instance_gone",
    DeathCause::Rebooted => "rebooted",
    DeathCause::SupervisorLost => "supervisor_lost",
    DeathCause::ContractBroken => "contract_broken",
    DeathCause::Rewound => "rewound",
});
variants!(state, STATES, State, {
    State::Requested => "requested",
    State::Provisioning => "provisioning",
    State::Booted => "booted",
    State::Starting => "starting",
    State::Ready => "ready",
    State::Failed => "failed",
    State::Completed => "completed",
    State::Unreachable => "unreachable",
    State::Stopped => "stopped",
    State::Destroyed => "destroyed",
    State::Unknown(_) => "(unknown)",
});
variants!(result_status, RESULT_STATUSES, ResultStatus, {
    ResultStatus::Completed => "completed",
    ResultStatus::Failed => "failed",
});

#[test]
fn every_variant_has_a_fixture() {
    let mut seen: BTreeSet<(&str, &str)> = BTreeSet::new();
    for fixture in fixtures("session-host") {
        let message = HostMessage::decode(fixture.text.as_bytes()).unwrap();
        seen.insert(("HostMessage", host_message(&message)));
        if let HostMessage::Hello(hello) = &message {
            seen.insert(("Role", role(&hello.role)));
        }
    }
    for fixture in fixtures("session-guest") {
        let message = GuestMessage::decode(fixture.text.as_bytes()).unwrap();
        seen.insert(("GuestMessage", guest_message(&message)));
        match &message {
            GuestMessage::Notice(inner) => seen.insert(("Notice", notice(inner))),
            GuestMessage::Error(error) => seen.insert(("ErrorCode", error_code(&error.code))),
            GuestMessage::End(reason) => seen.insert(("EndReason", end_reason(reason))),
            _ => true,
        };
    }
    for fixture in fixtures("verdict") {
        let verdict = Verdict::decode(fixture.text.as_bytes()).unwrap();
        assert_eq!(verdict.outcome.name(), outcome(&verdict.outcome));
        seen.insert(("Outcome", outcome(&verdict.outcome)));
        match &verdict.outcome {
            Outcome::TimedOut { watchdog: inner } => {
                assert_eq!(inner.as_str(), watchdog(inner));
                seen.insert(("Watchdog", watchdog(inner)));
            }
            Outcome::GuestDied { cause } => {
                seen.insert(("DeathCause", death_cause(cause)));
            }
            _ => {}
        }
    }
    for fixture in fixtures("event") {
        let kind = Event::decode(fixture.text.as_bytes()).unwrap().kind;
        seen.insert(("State", state(&kind)));
    }
    for fixture in fixtures("result") {
        let status = RunResult::decode(fixture.text.as_bytes()).unwrap().status;
        seen.insert(("ResultStatus", result_status(&status)));
    }
    let all = [
        ("HostMessage", HOST_MESSAGES),
        ("Role", ROLES),
        ("GuestMessage", GUEST_MESSAGES),
        ("Notice", NOTICES),
        ("ErrorCode", ERROR_CODES),
        ("EndReason", END_REASONS),
        ("Outcome", OUTCOMES),
        ("Watchdog", WATCHDOGS),
        ("DeathCause", DEATH_CAUSES),
        ("State", STATES),
        ("ResultStatus", RESULT_STATUSES),
    ];
    let missing: Vec<String> = all
        .iter()
        .flat_map(|(of, names)| names.iter().map(move |name| (*of, *name)))
        .filter(|variant| !seen.contains(variant))
        .map(|(of, name)| format!("{of}::{name}"))
        .collect();
    assert!(missing.is_empty(), "no fixture in common/fixtures holds {}", missing.join(", "));
}

#[test]
fn every_known_state_has_its_own_name() {
    let names: BTreeSet<&str> = State::KNOWN.iter().map(state).collect();
    assert_eq!(names.len(), STATES.len() - 1, "State::KNOWN lacks one");
    for known in State::KNOWN {
        assert_eq!(known.as_str(), state(&known));
        assert_eq!(State::from_name(known.as_str()), known);
    }
}

#[test]
fn what_is_unknown_is_kept_or_told() {
    let event = |name: &str| {
        let fixture = fixtures("event").into_iter().find(|fixture| fixture.name == format!("event/{name}")).unwrap();
        Event::decode(fixture.text.as_bytes()).unwrap()
    };
    let unknown = event("unknown_kind");
    assert_eq!(unknown.kind, State::Unknown("hibernating".to_owned()));
    assert!(!unknown.changes_state());
    assert_eq!(event("unknown_fields").extra.keys().collect::<Vec<_>>(), ["severity", "trace", "nothing"]);

    // A newer guest's words inside a known message.
    let notice = GuestMessage::decode(br#"{"notice":{"what":"oom_kill","bytes":5}}"#).unwrap();
    assert!(matches!(notice, GuestMessage::Notice(Notice::Unknown)));
    let error = GuestMessage::decode(br#"{"error":{"code":"quota","message":"m","hint":"h"}}"#).unwrap();
    assert!(matches!(error, GuestMessage::Error(error) if error.code == ErrorCode::Unknown && error.message == "m"));
    let end = GuestMessage::decode(br#"{"end":{"reason":"moved","to":"b"}}"#).unwrap();
    assert!(matches!(end, GuestMessage::End(EndReason::Unknown)));
    assert_eq!(HostMessage::decode(br#"{"ping":{"at":1}}"#).unwrap(), HostMessage::Ping(Empty::default()));

    // A newer peer's message is told from nonsense.
    let name = |result: Result<GuestMessage, MessageError>| match result {
        Err(MessageError::Unknown { name }) => Some(name),
        _ => None,
    };
    assert_eq!(name(GuestMessage::decode(br#"{"metrics":{"cpu":1}}"#)).as_deref(), Some("metrics"));
    assert_eq!(name(GuestMessage::decode(br#"{"log":{"file":5}}"#)), None);
    assert_eq!(name(GuestMessage::decode(br#"{"metrics":{},"more":{}}"#)), None);
    assert_eq!(name(GuestMessage::decode(b"metrics")), None);
    let long = format!("{{\"{}\":1}}", "é".repeat(1000));
    assert_eq!(name(GuestMessage::decode(long.as_bytes())), Some("é".repeat(64)));
}

#[test]
fn progress_and_notices_change_no_state() {
    let changes: Vec<(String, bool)> = fixtures("event")
        .iter()
        .map(|fixture| (fixture.name.clone(), Event::decode(fixture.text.as_bytes()).unwrap().changes_state()))
        .filter(|(name, _)| !name.contains("unknown"))
        .collect();
    let changing: Vec<&str> =
        changes.iter().filter(|(_, changes)| *changes).map(|(name, _)| name.trim_start_matches("event/")).collect();
    assert_eq!(changing, ["completed", "failed", "last_seq", "minimal", "ready", "starting", "unicode"]);

    let event = |kind: &str, details: &str| {
        let text = format!(
            r#"{{"schema_version":1,"seq":1,"timestamp":"2026-01-31T12:00:00Z","kind":"{kind}","message":"","details":{details}}}"#
        );
        Event::decode(text.as_bytes()).unwrap()
    };
    assert!(
        event("failed", r#"{"progress":{"name":"x"},"exit_code":3}"#).changes_state(),
        "a terminal kind always does"
    );
    assert_eq!(event("failed", r#"{"exit_code":3}"#).exit_code(), Some(3));
    for wrong in [r#"{"exit_code":"3"}"#, r#"{"exit_code":4294967296}"#, r#"{"exit_code":1.5}"#, "[3]", "3", "null"] {
        assert_eq!(event("failed", wrong).exit_code(), None, "{wrong}");
    }
    assert_eq!(event("ready", r#"{"progress":{"name":"x"}}"#).progress().unwrap()["name"], "x");
    assert!(event("ready", r#""progress""#).changes_state());
}

#[test]
fn an_event_line_goes_through_the_stream_unchanged() {
    for fixture in fixtures("event").iter().chain(&fixtures("foreign/event")) {
        let mut out = Vec::new();
        write_event(fixture.text.as_bytes(), &mut out);
        let line = out.strip_suffix(b"\n").unwrap();
        assert_eq!(event_line(line), Some(fixture.text.as_bytes()), "{}", fixture.name);
        match GuestMessage::decode(line).unwrap() {
            GuestMessage::Event(raw) => assert_eq!(raw.get(), fixture.text, "{}", fixture.name),
            other => panic!("{other:?}"),
        }
        let event = Event::decode(fixture.text.as_bytes()).unwrap();
        let head = EventHead::decode(fixture.text.as_bytes()).unwrap();
        assert_eq!((head.seq, &*head.kind), (event.seq, event.kind.as_str()), "{}", fixture.name);
    }
    assert_eq!(event_line(br#"{"status":{}}"#), None);
    assert_eq!(event_line(br#"{"event":{}"#), Some(&b"{"[..]), "what comes out is checked as an event");
}

/// A document of another version is told as such, both versions named, even where its form has changed too.
#[test]
fn another_version_names_both() {
    fn refusal<T: Debug>(read: Result<T, DecodeError>) -> String {
        let error = read.unwrap_err();
        assert!(matches!(error, DecodeError::Version { .. }), "{error}");
        error.to_string()
    }
    let text = |version: &str| format!(r#"{{"when":"later","schema_version":{version},"seq":"one"}}"#).into_bytes();
    let all = |text: &[u8]| {
        [
            ("event", 1, refusal(Event::decode(text))),
            ("event", 1, refusal(EventHead::decode(text))),
            ("status.json", 1, refusal(Status::decode(text))),
            ("result.json", 1, refusal(RunResult::decode(text))),
            ("verdict.json", 1, refusal(Verdict::decode(text))),
            ("guest-request.json", 2, refusal(GuestRequest::decode(text))),
        ]
    };
    for version in ["0", "3", "4294967296", "18446744073709551615"] {
        for (document, reads, message) in all(&text(version)) {
            let expected = format!("{document} has schema_version {version}, this build reads {reads}:");
            assert!(message.starts_with(&expected), "{message}");
        }
    }
    let whole = r#"{"schema_version":2,"seq":1,"timestamp":"2026-01-31T12:00:00Z","kind":"ready","message":"m"}"#;
    refusal(Event::decode(whole.as_bytes()));
    refusal(EventHead::decode(whole.as_bytes()));
    refusal(Status::decode(whole.as_bytes()));
    let request = |version: u32| {
        format!(r#"{{"schema_version":{version},"command":"true","timeout_secs":0,"run_as_root":false}}"#).into_bytes()
    };
    GuestRequest::decode(&request(2)).unwrap();
    refusal(GuestRequest::decode(&request(1)));
    refusal(GuestRequest::decode(&request(3)));
}

/// The bodies of messages are read whatever their version; who uses them checks it.
#[test]
fn the_version_of_a_message_body_can_be_checked() {
    let status = |version: u32| {
        let text = format!(
            r#"{{"status":{{"schema_version":{version},"state":"ready","updated_at":"2026-01-31T12:00:00Z","message":""}}}}"#
        );
        match GuestMessage::decode(text.as_bytes()).unwrap() {
            GuestMessage::Status(status) => status.check_version().map_err(|error| error.to_string()),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(status(1), Ok(()));
    assert!(status(2).unwrap_err().starts_with("status.json has schema_version 2, this build reads 1"));
    let start = fixtures("session-host").into_iter().find(|f| f.name == "session-host/start").unwrap();
    let newer = start.text.replace(r#""schema_version":2"#, r#""schema_version":3"#);
    match HostMessage::decode(newer.as_bytes()).unwrap() {
        HostMessage::Start(start) => {
            let message = start.request.check_version().unwrap_err().to_string();
            assert!(message.starts_with("guest-request.json has schema_version 3, this build reads 2"), "{message}");
        }
        other => panic!("{other:?}"),
    }
}

/// Invariant 8.
#[test]
fn debug_shows_no_environment() {
    let start = fixtures("session-host").into_iter().find(|f| f.name == "session-host/start").unwrap();
    let text = start.text.replace(r#""CI":"1""#, r#""TOKEN":"hunter2""#);
    let shown = format!("{:?}", HostMessage::decode(text.as_bytes()).unwrap());
    assert!(shown.contains("TOKEN") && shown.contains("make -C /src test") && !shown.contains("hunter2"), "{shown}");
}

#[test]
fn specs_in_fixtures_are_valid() {
    for fixture in fixtures("runtime-spec") {
        RuntimeSpec::from_json(&fixture.text).unwrap_or_else(|error| panic!("{}: {error}", fixture.name));
    }
}
