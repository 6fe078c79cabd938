//! What must hold whatever a host says and whenever it says it.

use proptest::prelude::*;

use super::*;

fn line(text: &str) -> Vec<u8> {
    text.as_bytes().to_vec()
}

fn hello(role: &str, follow: bool) -> Vec<u8> {
    line(&format!(r#"{{"hello":{{"protocol":1,"role":"{role}","term":1,"follow":{follow}}}}}"#))
}

fn opened(previous: bool, acked_seq: u64) -> Opened {
    let hello = GuestHello {
        protocol: PROTOCOL,
        agent: String::new(),
        schema_version: 1,
        stream_id: String::new(),
        boot_id: String::new(),
        machine_uuid: None,
        first_seq: 1,
        first_digest: None,
        last_seq: 3,
        request_id: None,
    };
    Opened { hello, notices: Vec::new(), previous, acked_seq }
}

/// A session that is open, with all that is there sent.
fn idle(role: &str, follow: bool, previous: bool, now: Instant) -> (Core, Vec<Action>) {
    let mut core = Core::new(now);
    core.step(Input::Line(&hello(role, follow)), now);
    core.step(Input::Opened(opened(previous, 0)), now);
    let mut actions = Vec::new();
    while let Some(work) = core.next_work(now) {
        let done = if work == Work::Events { Done::EventsTo(3) } else { Done::Nothing };
        actions.extend(core.step(Input::Did(work, done), now));
    }
    (core, actions)
}

fn says_end(actions: &[Action]) -> Option<EndReason> {
    actions.iter().find_map(|action| match action {
        Action::Say(GuestMessage::End(reason)) => Some(*reason),
        _ => None,
    })
}

#[test]
fn work_comes_in_the_order_of_its_urgency() {
    let now = Instant::now();
    let (mut core, _) = idle("owner", true, false, now);
    core.step(Input::Line(&line(r#"{"archive":{"globs":[],"limits":{"max_files":1,"max_bytes":1}}}"#)), now);
    core.step(Input::Line(&line(r#"{"ack":{"seq":2}}"#)), now);
    core.step(Input::Changed(Dirt::ALL), now);
    let later = now + HEARTBEAT_INTERVAL;
    let mut order = Vec::new();
    while let Some(work) = core.next_work(later) {
        order.push(work);
        core.step(Input::Did(work, Done::Nothing), later);
    }
    let wanted = [Work::Heartbeat, Work::Ack, Work::Events, Work::Status, Work::Result, Work::Log, Work::Archive];
    assert_eq!(order, wanted);
    // An event that comes between two chunks is next.
    core.step(Input::Changed(Dirt { logs: true, ..Dirt::default() }), later);
    core.step(Input::Did(Work::Log, Done::More), later);
    core.step(Input::Changed(Dirt { events: true, ..Dirt::default() }), later);
    assert_eq!(core.next_work(later), Some(Work::Events));
}

#[test]
fn how_sessions_end() {
    let now = Instant::now();
    assert_eq!(says_end(&idle("observer", false, false, now).1), Some(EndReason::Done));
    assert_eq!(says_end(&idle("observer", true, false, now).1), None);
    assert_eq!(says_end(&idle("observer", true, true, now).1), Some(EndReason::NewStream));
    assert_eq!(says_end(&idle("owner", false, true, now).1), Some(EndReason::NewStream));
    // An owner that follows an earlier stream is waited for.
    let (mut core, actions) = idle("owner", true, true, now);
    assert_eq!(says_end(&actions), None);
    core.step(Input::Line(&line(r#"{"ack":{"seq":3}}"#)), now);
    assert_eq!(says_end(&core.step(Input::Did(Work::Ack, Done::Nothing), now)), Some(EndReason::NewStream));
    assert_eq!(core.ending(), Some(Ending::Done));
    // A stream that is over while it is followed.
    let (mut core, _) = idle("observer", true, false, now);
    core.step(Input::Changed(Dirt { events: true, ..Dirt::default() }), now);
    let actions = core.step(Input::Did(Work::Events, Done::NewStream(3)), now);
    assert_eq!(says_end(&actions), Some(EndReason::NewStream));
    // The agent ends: a session that is open is told, one that is not has nobody to tell.
    let (mut core, _) = idle("owner", true, false, now);
    assert_eq!(says_end(&core.step(Input::Shutdown, now)), Some(EndReason::Shutdown));
    assert_eq!(core.ending(), Some(Ending::Shutdown));
    let mut core = Core::new(now);
    assert!(core.step(Input::Shutdown, now).is_empty());
    assert_eq!(core.ending(), Some(Ending::Shutdown));
}

/// Invariant 9: a run whose guest booted again is not started a second time in what that boot began.
#[test]
fn the_run_of_an_earlier_stream_is_not_started_again() {
    let now = Instant::now();
    let start = |id: &str| {
        line(&format!(
            r#"{{"start":{{"request_id":"{id}","request":{{"schema_version":2,"command":"x","timeout_secs":0,"run_as_root":true}}}}}}"#
        ))
    };
    let starts = |previous: bool, id: &str| {
        let mut core = Core::new(now);
        core.step(Input::Line(&hello("owner", true)), now);
        let mut opened = opened(previous, 0);
        opened.hello.request_id = Some("job.1".to_owned());
        core.step(Input::Opened(opened), now);
        match &core.step(Input::Line(&start(id)), now)[..] {
            [Action::Start(_)] => true,
            [Action::Say(GuestMessage::Notice(Notice::AlreadyStarted { request_id }))] if request_id == id => false,
            other => panic!("{other:?}"),
        }
    };
    assert!(!starts(true, "job.1"));
    assert!(starts(true, "job.2"));
    // Whether one of the present stream runs is for the ledger to say.
    assert!(starts(false, "job.1"));
}

#[test]
fn silence_ends_a_session() {
    let now = Instant::now();
    let mut core = Core::new(now);
    core.step(Input::Tick, now + Duration::from_secs(15));
    assert_eq!(core.ending(), None);
    core.step(Input::Tick, now + PEER_TIMEOUT);
    assert_eq!(core.ending(), Some(Ending::PeerLost));
    let (mut core, _) = idle("owner", true, false, now);
    core.step(Input::Line(b"{\"ping\":{}}"), now + Duration::from_secs(10));
    // What we send is no sign of its life.
    core.step(Input::Wrote, now + Duration::from_secs(20));
    core.step(Input::Tick, now + Duration::from_secs(25));
    assert_eq!(core.ending(), None);
    assert_eq!(core.deadline(), now + HEARTBEAT_INTERVAL);
    core.step(Input::Tick, now + Duration::from_secs(10) + PEER_TIMEOUT);
    assert_eq!(core.ending(), Some(Ending::PeerLost));
}

fn host_line() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        any::<bool>().prop_map(|follow| hello("owner", follow)),
        any::<bool>().prop_map(|follow| hello("observer", follow)),
        Just(line(r#"{"hello":{"protocol":2,"role":"owner"}}"#)),
        (0u64..9).prop_map(|seq| line(&format!(r#"{{"ack":{{"seq":{seq},"logs":{{"guest.log":{seq}}}}}}}"#))),
        Just(line(
            r#"{"start":{"request_id":"a","request":{"schema_version":2,"command":"x","timeout_secs":0,"run_as_root":true}}}"#
        )),
        Just(line(r#"{"signal":{"name":"TERM"}}"#)),
        Just(line(r#"{"archive":{"globs":["**"],"limits":{"max_files":1,"max_bytes":1}}}"#)),
        Just(line(r#"{"release":{}}"#)),
        Just(line(r#"{"ping":{}}"#)),
        Just(line(r#"{"later":{}}"#)),
        prop::collection::vec(any::<u8>(), 0..20),
    ]
}

#[derive(Clone, Debug)]
enum Move {
    Line(Vec<u8>),
    Closed,
    Opened(bool, u64),
    Changed,
    Work(u8),
    Superseded,
    Shutdown,
    Archive,
    Pass(u16),
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let one = prop_oneof![
        4 => host_line().prop_map(Move::Line),
        1 => Just(Move::Closed),
        3 => (any::<bool>(), 0u64..4).prop_map(|(previous, acked)| Move::Opened(previous, acked)),
        2 => Just(Move::Changed),
        6 => any::<u8>().prop_map(Move::Work),
        1 => Just(Move::Superseded),
        1 => Just(Move::Shutdown),
        1 => Just(Move::Archive),
        2 => (0u16..6000).prop_map(Move::Pass),
    ];
    prop::collection::vec(one, 0..60)
}

/// What a test knows of a session by what it was told.
#[derive(Default)]
struct Known {
    hello: Option<(bool, bool)>,
    open: bool,
    seq: u64,
}

fn make(core: &mut Core, known: &mut Known, now: Instant, made: &Move) -> Vec<Action> {
    match made {
        Move::Line(text) => core.step(Input::Line(text), now),
        Move::Closed => core.step(Input::HostClosed, now),
        Move::Opened(previous, acked) if known.hello.is_some() && !known.open => {
            known.open = true;
            core.step(Input::Opened(opened(*previous, *acked)), now)
        }
        Move::Changed => core.step(Input::Changed(Dirt::ALL), now),
        Move::Work(kind) => match core.next_work(now) {
            Some(work) => {
                known.seq += u64::from(kind % 3);
                let done = match (work, kind % 4) {
                    (Work::Events, 0) => Done::MoreEvents(known.seq),
                    (Work::Events, 1) => Done::NewStream(known.seq),
                    (Work::Events, _) => Done::EventsTo(known.seq),
                    (Work::Log | Work::Archive, 0) => Done::More,
                    _ => Done::Nothing,
                };
                core.step(Input::Did(work, done), now)
            }
            None => Vec::new(),
        },
        Move::Superseded => core.step(Input::Superseded, now),
        Move::Shutdown => core.step(Input::Shutdown, now),
        Move::Archive => core.step(Input::Refused(error(ErrorCode::Archive, "")), now),
        Move::Opened(..) | Move::Pass(_) => core.step(Input::Tick, now),
    }
}

proptest! {
    #[test]
    fn whatever_happens(moves in moves()) {
        let mut now = Instant::now();
        let mut core = Core::new(now);
        let mut known = Known::default();
        let mut ends = 0;
        for made in &moves {
            if let Move::Pass(millis) = made {
                now += Duration::from_millis(u64::from(*millis));
            }
            let ended = core.ending();
            let actions = make(&mut core, &mut known, now, made);
            // After its end a session neither does nor says anything, and its end stays what it was.
            if let Some(ended) = ended {
                prop_assert!(actions.is_empty() && core.next_work(now).is_none());
                prop_assert_eq!(core.ending(), Some(ended));
            }
            for action in &actions {
                match action {
                    Action::Open(hello) => {
                        prop_assert!(known.hello.is_none(), "opened twice");
                        known.hello = Some((hello.role == Role::Owner, hello.follow));
                    }
                    // Invariant 6: only an owner's session acts.
                    Action::Start(_) | Action::Signal(_) | Action::Release => {
                        prop_assert!(known.hello.is_some_and(|(owner, _)| owner));
                    }
                    Action::Say(GuestMessage::End(reason)) => {
                        ends += 1;
                        let asked = *reason == EndReason::Shutdown;
                        prop_assert_eq!(core.ending(), Some(if asked { Ending::Shutdown } else { Ending::Done }));
                        let follows = known.hello.is_some_and(|(_, follow)| follow);
                        prop_assert!(asked || !follows || *reason == EndReason::NewStream);
                    }
                    Action::Say(_) => prop_assert!(ended.is_none()),
                    Action::Archive(_) => prop_assert!(known.hello.is_some()),
                }
            }
            if core.pending_ack().is_some() {
                prop_assert!(core.is_owner());
            }
            if core.next_work(now).is_some() {
                prop_assert!(known.open, "work before the session is open");
            }
            // It never waits for ever.
            prop_assert!(core.until_deadline(now) <= PEER_TIMEOUT);
        }
        prop_assert!(ends <= 1);
    }
}
