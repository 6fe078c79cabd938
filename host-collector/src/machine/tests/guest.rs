//! What the guest does, and sessions that come and go.

use pika_cloud_common::limits::PEER_TIMEOUT;

use super::*;

// Sessions.

#[test]
fn a_lost_session_is_looked_at_and_dialled_again() {
    for loss in [lost(), SessionLoss::NewStream, SessionLoss::Broken("x".into()), SessionLoss::NoAgent("x".into())] {
        let mut bench = Bench::live(plan());
        assert_eq!(bench.lose(loss), [Action::HangUp]);
        assert!(is_about(bench.wait_next(), FIRST_RETRY));
        assert_eq!(bench.last, [Action::Look]);
        assert_eq!(bench.found(Found::Running), [Action::Dial]);
        // The guest starts it once, however often it is asked.
        assert_eq!(bench.guest(Guest::Opened { run_lost: false }), [Action::StartWorkload]);
    }
}

/// The hello of a session is durable only after that session was lost, and the next is under way.
#[test]
fn a_late_word_of_a_lost_session_leaves_none_without_its_start() {
    let mut bench = Bench::live(plan());
    bench.lose(lost());
    bench.wait_next();
    bench.found(Found::Running);
    assert_eq!(bench.guest(Guest::Opened { run_lost: false }), [Action::StartWorkload]);
    assert_eq!(bench.guest(Guest::Opened { run_lost: false }), [Action::StartWorkload]);
}

#[test]
fn a_guest_that_breaks_its_sessions_is_given_up() {
    for loss in [SessionLoss::Broken("garbage".into()), SessionLoss::NoAgent("gone".into())] {
        let mut bench = Bench::live(plan());
        for _ in 0..2 {
            bench.lose(loss.clone());
            bench.wait_next();
            bench.found(Found::Running);
            bench.guest(Guest::Opened { run_lost: false });
            bench.guest(Guest::Accepted);
        }
        bench.lose(loss);
        bench.has_ended(&died(DeathCause::ContractBroken));
    }
    let mut patient = Bench::live(plan());
    for _ in 0..9 {
        patient.guest(Guest::Accepted);
        patient.wait(PEER_TIMEOUT - SECOND);
        patient.feed(Input::Heard);
        patient.wait(SECOND);
        patient.lose(SessionLoss::Broken("now and then".into()));
        patient.wait_next();
        patient.found(Found::Running);
        patient.guest(Guest::Opened { run_lost: false });
    }
    assert_eq!(patient.phase(), Phase::Live, "sessions that held for a while count for it");
}

#[test]
fn sessions_that_end_at_once_are_dialled_less_and_less_often() {
    let mut bench = Bench::live(plan());
    let mut waited = Vec::new();
    for _ in 0..8 {
        bench.lose(lost());
        waited.push(bench.wait_next());
        bench.found(Found::Running);
        bench.guest(Guest::Opened { run_lost: false });
    }
    for (waited, millis) in waited.into_iter().zip([50, 100, 200, 400, 800, 1600, 2000, 2000]) {
        assert!(is_about(waited, Duration::from_millis(millis)), "{waited:?} for {millis}");
    }
    bench.guest(Guest::Accepted);
    bench.wait(PEER_TIMEOUT - SECOND);
    bench.feed(Input::Heard);
    bench.wait(SECOND);
    bench.lose(lost());
    assert!(is_about(bench.wait_next(), FIRST_RETRY));
}

#[test]
fn an_agent_that_is_missing_or_does_not_fit_is_the_end() {
    let asked = Start { start_asked: Some(Duration::ZERO), ..Start::default() };
    let mut bench = Bench::from(plan(), &asked);
    bench.found(Found::Running);
    bench.lose(SessionLoss::NoAgent("exec ended with 127".into()));
    bench.has_ended(&Outcome::ProvisionFailed);
    assert_eq!(bench.end().error.as_deref(), Some("exec ended with 127"));
    for mut bench in [Bench::live(plan()), Bench::from(plan(), &asked)] {
        bench.found(Found::Running);
        bench.lose(SessionLoss::Refused("protocol 2".into()));
        bench.has_ended(&Outcome::ProvisionFailed);
    }
    let mut busy = Bench::live(plan());
    busy.guest(Guest::Refused("another runs".into()));
    busy.has_ended(&Outcome::ProvisionFailed);
}

#[test]
fn a_guest_that_began_anew_is_dead() {
    let mut rebooted = Bench::live(plan());
    rebooted.lose(SessionLoss::NewStream);
    rebooted.wait_next();
    rebooted.found(Found::Running);
    rebooted.guest(Guest::Opened { run_lost: true });
    rebooted.has_ended(&died(DeathCause::Rebooted));
    let mut rewound = Bench::live(plan());
    rewound.guest(Guest::Rewound);
    rewound.has_ended(&died(DeathCause::Rewound));
}

/// What an image reports by itself, before its workload was asked for, is no progress of that.
#[test]
fn progress_of_nothing_sets_no_deadline() {
    let mut bench = Bench::new(Plan { progress: Some(SECOND), ..plan() });
    bench.found(Found::Absent);
    bench.guest(Guest::Progress);
    assert_eq!(bench.machine.next_tick(), None);
    bench.feed(Input::Created(Ok(())));
    bench.feed(Input::Started(Ok(())));
    bench.guest(Guest::Progress);
    assert_eq!(bench.wait_while(Phase::Dialing), BOOT);
}

/// It beats, and never says that it started anything.
#[test]
fn a_guest_that_never_answers_the_start_is_given_up() {
    let mut bench = Bench::live(plan());
    let begin = bench.now;
    while bench.phase() == Phase::Live {
        for _ in 0..3 {
            bench.wait(PEER_TIMEOUT / 3 - Duration::from_millis(1));
            assert_eq!(bench.feed(Input::Heard), []);
        }
        bench.wait_next();
        assert_eq!(bench.last[0], Action::HangUp);
        if bench.phase() == Phase::Looking {
            bench.wait_next();
            bench.found(Found::Running);
            assert_eq!(bench.guest(Guest::Opened { run_lost: false }), [Action::StartWorkload]);
        }
    }
    bench.has_ended(&died(DeathCause::ContractBroken));
    assert!(bench.now - begin < 3 * PEER_TIMEOUT + 2 * SECOND, "{:?}", bench.now - begin);
}

#[test]
fn any_state_is_an_answer_to_the_start() {
    for answer in [Guest::Accepted, Guest::State(State::Starting), Guest::State(State::Ready)] {
        let mut bench = Bench::live(plan());
        bench.guest(answer);
        for _ in 0..10 {
            bench.wait(PEER_TIMEOUT - SECOND);
            bench.feed(Input::Heard);
        }
        assert_eq!(bench.phase(), Phase::Live);
    }
}
