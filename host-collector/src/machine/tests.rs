//! Each transition and each failure path by itself, then random worlds and random nonsense.

#![expect(clippy::unchecked_time_subtraction, reason = "a time that goes backwards fails the test")]

use std::collections::VecDeque;

use pika_cloud_common::State;
use pika_cloud_common::Timestamp;
use pika_cloud_common::limits::PEER_TIMEOUT;
use pika_cloud_common::spec::{OutputCollectionMode, RetentionPolicy};
use pika_cloud_common::verdict::{Collection, DeathCause, Outcome, Watchdog};
use proptest::prelude::*;
use std::time::Duration;

use super::*;
use crate::journal::Ended;

const SECOND: Duration = Duration::from_secs(1);
const BOOT: Duration = Duration::from_secs(120);
const SILENCE: Duration = Duration::from_secs(60);
const RUN: Duration = Duration::from_secs(600);
const GRACE: Duration = Duration::from_secs(10);

fn plan() -> Plan {
    Plan {
        boot: BOOT,
        silence: SILENCE,
        run: Some(RUN),
        stop_grace: GRACE,
        collect: OutputCollectionMode::Always,
        retention: RetentionPolicy::DestroyOnCompletion,
    }
}

/// A machine with the time, and what it did last.
struct Bench {
    machine: Machine,
    now: Duration,
    last: Vec<Action>,
}

impl Bench {
    fn new(plan: Plan) -> Self {
        Self::from(plan, &Start::default())
    }

    fn from(plan: Plan, start: &Start) -> Self {
        let now = Duration::from_secs(1000);
        let (machine, last) = Machine::new(plan, start, now);
        Self { machine, now, last }
    }

    fn feed(&mut self, input: Input) -> &[Action] {
        self.last = self.machine.step(input, self.now);
        &self.last
    }

    fn found(&mut self, found: Found) -> &[Action] {
        self.feed(Input::Looked(Ok(found)))
    }

    fn lose(&mut self, loss: SessionLoss) -> &[Action] {
        self.feed(Input::NoSession(loss))
    }

    fn guest(&mut self, guest: Guest) -> &[Action] {
        self.feed(Input::Guest(guest))
    }

    fn wait(&mut self, time: Duration) -> &[Action] {
        self.now += time;
        self.feed(Input::Tick)
    }

    /// Waits for what is due next, and says how long that took.
    fn wait_next(&mut self) -> Duration {
        let due = self.machine.next_tick().expect("a deadline");
        let waited = due.saturating_sub(self.now);
        self.wait(waited);
        waited
    }

    fn phase(&self) -> Phase {
        self.machine.phase()
    }

    /// Up to a session in which the workload was asked for.
    fn live(plan: Plan) -> Self {
        let mut bench = Self::new(plan);
        bench.found(Found::Absent);
        bench.feed(Input::Created(Ok(())));
        bench.feed(Input::Started(Ok(())));
        bench.guest(Guest::Opened { run_lost: false });
        assert_eq!(bench.phase(), Phase::Live);
        bench
    }

    fn end(&self) -> &EndDecision {
        let ends: Vec<_> = self
            .last
            .iter()
            .filter_map(|action| if let Action::End(end) = action { Some(end) } else { None })
            .collect();
        assert_eq!(ends.len(), 1, "{:?}", self.last);
        ends[0]
    }

    fn has_ended(&self, outcome: &Outcome) {
        assert_eq!(&self.end().outcome, outcome);
        assert_eq!(self.last.last(), Some(&Action::Collect));
        assert_eq!(self.phase(), Phase::Collecting);
    }
}

fn transient() -> CallFailure {
    CallFailure { transient: true, message: "busy".into() }
}

fn refusal() -> CallFailure {
    CallFailure { transient: false, message: "not allowed".into() }
}

fn lost() -> SessionLoss {
    SessionLoss::Lost("reset".into())
}

fn died(cause: DeathCause) -> Outcome {
    Outcome::GuestDied { cause }
}

fn terminal(exit_code: i32) -> Guest {
    let exit_code = Some(exit_code);
    let outcome = if exit_code == Some(0) { Outcome::Completed { exit_code } } else { Outcome::Failed { exit_code } };
    Guest::Terminal(EndDecision::new(outcome, "it ended"))
}

fn record(state: State, text: &str) -> Action {
    Action::Record(state, text.to_owned())
}

// The happy path.

#[test]
fn a_runtime_goes_from_nothing_to_nothing() {
    let mut bench = Bench::new(plan());
    assert_eq!(bench.last, [Action::Look]);
    assert_eq!(bench.found(Found::Absent), [record(State::Provisioning, "creating the instance"), Action::Create]);
    assert_eq!(
        bench.feed(Input::Created(Ok(()))),
        [record(State::Provisioning, "starting the instance"), Action::Start]
    );
    assert_eq!(bench.feed(Input::Started(Ok(()))), [Action::Dial]);
    assert_eq!(
        bench.guest(Guest::Opened { run_lost: false }),
        [record(State::Booted, "the agent answered"), Action::StartWorkload]
    );
    assert!(bench.machine.start_sent());
    for quiet in [Guest::Accepted, Guest::State(State::Starting), Guest::State(State::Ready)] {
        assert_eq!(bench.guest(quiet), []);
    }
    bench.guest(terminal(0));
    bench.has_ended(&Outcome::Completed { exit_code: Some(0) });
    assert_eq!(bench.feed(Input::Collected(Collection::default())), [Action::Conclude]);
    assert_eq!(bench.feed(Input::Concluded), [Action::Destroy]);
    assert_eq!(bench.feed(Input::Destroyed(Ok(()))), []);
    assert_eq!((bench.phase(), bench.machine.next_tick()), (Phase::Done, None));
}

#[test]
fn a_policy_that_keeps_destroys_nothing() {
    for retention in [RetentionPolicy::KeepUntilStopped, RetentionPolicy::DebugKeep] {
        let mut bench = Bench::live(Plan { retention, ..plan() });
        bench.guest(terminal(3));
        bench.feed(Input::Collected(Collection::default()));
        assert_eq!(bench.feed(Input::Concluded), [Action::Keep]);
        assert_eq!(bench.phase(), Phase::Done);
    }
}

/// Invariant 7, but for a policy that wants nothing.
#[test]
fn outputs_are_collected_as_the_policy_says() {
    use OutputCollectionMode::{Always, FailureOnly, None};
    for (mode, exit_code, wanted) in [
        (Always, 0, true),
        (Always, 3, true),
        // What was printed last is still on its way: logs are wanted after every end.
        (FailureOnly, 0, true),
        (FailureOnly, 3, true),
        (None, 0, false),
        (None, 3, false),
    ] {
        let mut bench = Bench::live(Plan { collect: mode, ..plan() });
        bench.guest(terminal(exit_code));
        let next = if wanted { Action::Collect } else { Action::Conclude };
        assert_eq!(bench.last.last(), Some(&next), "{mode:?} {exit_code}");
    }
}

// What there is already.

#[test]
fn what_exists_is_taken_over() {
    assert_eq!(Bench::new(plan()).found(Found::Running), [Action::Dial]);
    let mut stopped = Bench::new(plan());
    assert_eq!(stopped.found(Found::Stopped), [record(State::Provisioning, "starting the instance"), Action::Start]);
    let mut changing = Bench::new(plan());
    assert_eq!(changing.found(Found::Changing("Starting".into())), []);
    assert_eq!(changing.wait_next(), Duration::from_millis(50));
    assert_eq!(changing.last, [Action::Look]);
}

#[test]
fn an_instance_that_never_settles_is_given_up() {
    let mut bench = Bench::new(plan());
    while bench.phase() == Phase::Looking {
        bench.found(Found::Changing("Freezing".into()));
        bench.wait_next();
        assert!(bench.now <= Duration::from_secs(1000) + BOOT);
    }
    bench.has_ended(&Outcome::TimedOut { watchdog: Watchdog::Boot });
}

/// Once the workload was asked for, an instance is never made or started again (Invariant 9).
#[test]
fn a_dead_instance_is_the_end() {
    let started = Start { booted: true, start_sent_ago: Some(SECOND), ..Start::default() };
    for (found, cause) in [
        (Found::Absent, DeathCause::InstanceGone),
        (Found::Stopped, DeathCause::InstanceStopped),
        (Found::Error, DeathCause::InstanceError),
    ] {
        let mut bench = Bench::from(plan(), &started);
        bench.found(found.clone());
        bench.has_ended(&died(cause));
        let mut live = Bench::live(plan());
        live.lose(lost());
        live.wait_next();
        live.found(found);
        live.has_ended(&died(cause));
    }
    let mut fresh = Bench::new(plan());
    fresh.found(Found::Error);
    fresh.has_ended(&died(DeathCause::InstanceError));
}

/// The agent had answered, and then somebody deleted the instance before the workload was asked for: it is made again,
/// and has all of its time to boot.
#[test]
fn an_instance_that_is_made_again_boots_again() {
    let start = Start { booted: true, ..Start::default() };
    let mut bench = Bench::from(plan(), &start);
    bench.found(Found::Absent);
    bench.now += 5 * SILENCE;
    bench.feed(Input::Created(Ok(())));
    bench.feed(Input::Started(Ok(())));
    assert_eq!(bench.wait(SECOND), []);
    assert_eq!(bench.phase(), Phase::Dialing);
    bench.guest(Guest::Opened { run_lost: false });
    assert!(bench.last.contains(&record(State::Booted, "the agent answered")));
}

#[test]
fn an_instance_that_stops_at_once_is_started_a_few_times_only() {
    let mut bench = Bench::new(plan());
    bench.found(Found::Absent);
    bench.feed(Input::Created(Ok(())));
    let mut starts = 0;
    while bench.phase() == Phase::Starting {
        starts += 1;
        bench.feed(Input::Started(Ok(())));
        bench.lose(lost());
        bench.wait_next();
        bench.found(Found::Stopped);
    }
    assert_eq!(starts, 3);
    bench.has_ended(&died(DeathCause::InstanceStopped));
}

/// An ephemeral instance deletes itself when it stops.
#[test]
fn an_instance_that_vanishes_at_once_is_made_a_few_times_only() {
    let mut bench = Bench::new(plan());
    let mut created = 0;
    bench.found(Found::Absent);
    while bench.phase() == Phase::Creating {
        created += 1;
        bench.feed(Input::Created(Ok(())));
        bench.feed(Input::Started(Ok(())));
        bench.lose(lost());
        bench.wait_next();
        bench.found(Found::Absent);
    }
    assert_eq!(created, 3);
    bench.has_ended(&died(DeathCause::InstanceGone));
}

// Incus fails.

#[test]
fn a_refusal_of_incus_is_the_end() {
    let mut looked = Bench::new(plan());
    looked.feed(Input::Looked(Err(refusal())));
    looked.has_ended(&Outcome::ProvisionFailed);
    assert_eq!(looked.end().error.as_deref(), Some("not allowed"));
    let mut created = Bench::new(plan());
    created.found(Found::Absent);
    assert_eq!(created.feed(Input::Created(Err(refusal()))), [Action::Look], "what it made all the same is looked at");
    created.found(Found::Absent);
    created.has_ended(&Outcome::ProvisionFailed);
    assert_eq!(created.end().error.as_deref(), Some("not allowed"));
    let mut started = Bench::new(plan());
    started.found(Found::Stopped);
    assert_eq!(started.feed(Input::Started(Err(refusal()))), [Action::Look], "what it made all the same is looked at");
    started.found(Found::Stopped);
    started.has_ended(&Outcome::ProvisionFailed);
    assert_eq!(started.end().error.as_deref(), Some("not allowed"));
    let mut running = Bench::live(plan());
    running.lose(lost());
    running.wait_next();
    running.feed(Input::Looked(Err(refusal())));
    running.has_ended(&Outcome::Unreachable);
}

#[test]
fn a_create_that_another_collector_began_is_taken_over() {
    let mut bench = Bench::new(plan());
    bench.found(Found::Absent);
    bench.feed(Input::Created(Err(CallFailure { transient: false, message: "already exists".into() })));
    bench.found(Found::Stopped);
    assert_eq!(bench.phase(), Phase::Starting);
}

/// What went well begins the patience with the next call anew.
#[test]
fn patience_is_for_what_fails_now() {
    let mut bench = Bench::new(plan());
    bench.feed(Input::Looked(Err(transient())));
    bench.wait(SILENCE - SECOND);
    bench.found(Found::Absent);
    bench.feed(Input::Created(Ok(())));
    bench.now += 2 * SECOND;
    assert_eq!(bench.feed(Input::Started(Err(transient()))), []);
    assert_eq!(bench.phase(), Phase::Looking);
    // The boot has all of its time as well, though another instance took of it before.
    let mut again = Bench::new(plan());
    again.found(Found::Running);
    again.lose(lost());
    again.wait(BOOT - SECOND);
    again.found(Found::Absent);
    again.feed(Input::Created(Ok(())));
    again.feed(Input::Started(Ok(())));
    assert_eq!(again.wait(2 * SECOND), []);
    assert_eq!(again.phase(), Phase::Dialing);
    // And a refusal that came to nothing is forgotten.
    let mut refused = Bench::new(plan());
    refused.found(Found::Absent);
    refused.feed(Input::Created(Err(refusal())));
    refused.found(Found::Running);
    refused.lose(lost());
    refused.wait_next();
    assert!(refused.found(Found::Absent).contains(&Action::Create));
}

/// Each by itself: looking goes well in between, and that must not begin the patience anew.
#[test]
fn what_fails_in_passing_is_tried_again_for_a_while() {
    let begin = Duration::from_secs(1000);
    let cases = [
        ("looking", vec![Input::Looked(Err(transient()))]),
        ("creating", vec![Input::Looked(Ok(Found::Absent)), Input::Created(Err(transient()))]),
        ("starting", vec![Input::Looked(Ok(Found::Stopped)), Input::Started(Err(transient()))]),
    ];
    for (what, answers) in cases {
        let mut bench = Bench::new(plan());
        let mut tries = 0;
        loop {
            for answer in &answers {
                bench.feed(answer.clone());
            }
            tries += 1;
            if bench.phase() != Phase::Looking {
                break;
            }
            let waited = bench.wait_next();
            assert!(waited >= Duration::from_millis(50) && waited <= 2 * SECOND, "{what}: {waited:?}");
            assert_eq!(bench.last, [Action::Look], "{what}");
            assert!(bench.now < begin + 2 * SILENCE, "{what} is tried for ever");
        }
        bench.has_ended(&Outcome::ProvisionFailed);
        assert!(bench.now >= begin + SILENCE, "{what} was given up after {:?}", bench.now - begin);
        assert!(tries < 50, "{what} was tried {tries} times");
    }
}

#[test]
fn destroying_is_tried_again_for_a_while() {
    let mut bench = Bench::live(plan());
    bench.guest(terminal(0));
    bench.feed(Input::Collected(Collection::default()));
    bench.feed(Input::Concluded);
    let begin = bench.now;
    while bench.phase() == Phase::Destroying {
        bench.feed(Input::Destroyed(Err(transient())));
        if bench.phase() == Phase::Destroying {
            bench.wait_next();
            assert_eq!(bench.last, [Action::Destroy]);
        }
    }
    let waited = bench.now - begin;
    assert!((119..=123).contains(&waited.as_secs()), "{waited:?}");
    assert_eq!((bench.phase(), bench.machine.next_tick()), (Phase::Done, None));
    let mut refused = Bench::from(plan(), &Start { concluded: true, ..Start::default() });
    assert_eq!(refused.feed(Input::Destroyed(Err(refusal()))), []);
    assert_eq!(refused.phase(), Phase::Done);
}

// Sessions.

#[test]
fn a_lost_session_is_looked_at_and_dialled_again() {
    for loss in [lost(), SessionLoss::NewStream, SessionLoss::Broken("x".into()), SessionLoss::NoAgent("x".into())] {
        let mut bench = Bench::live(plan());
        assert_eq!(bench.lose(loss), [Action::HangUp]);
        assert_eq!(bench.wait_next(), Duration::from_millis(50));
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
        waited.push(bench.wait_next().as_millis());
        bench.found(Found::Running);
        bench.guest(Guest::Opened { run_lost: false });
    }
    assert_eq!(waited, [50, 100, 200, 400, 800, 1600, 2000, 2000]);
    bench.wait(PEER_TIMEOUT - SECOND);
    bench.feed(Input::Heard);
    bench.wait(SECOND);
    bench.lose(lost());
    assert_eq!(bench.wait_next().as_millis(), 50);
}

#[test]
fn an_agent_that_is_missing_or_does_not_fit_is_the_end() {
    let mut bench = Bench::new(plan());
    bench.found(Found::Running);
    bench.lose(SessionLoss::NoAgent("exec ended with 127".into()));
    bench.has_ended(&Outcome::ProvisionFailed);
    assert_eq!(bench.end().error.as_deref(), Some("exec ended with 127"));
    for mut bench in [Bench::live(plan()), Bench::new(plan())] {
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

// Watchdogs.

#[test]
fn an_agent_that_does_not_answer_is_given_up_at_its_deadline() {
    let mut bench = Bench::new(plan());
    bench.found(Found::Running);
    let begin = bench.now;
    while bench.phase() != Phase::Collecting {
        bench.lose(lost());
        bench.wait_next();
        if bench.last == [Action::Look] {
            bench.found(Found::Running);
        }
    }
    bench.has_ended(&Outcome::TimedOut { watchdog: Watchdog::Boot });
    assert_eq!(bench.now, begin + BOOT);
}

#[test]
fn silence_is_told_and_then_the_end() {
    let mut bench = Bench::live(plan());
    let begin = bench.now;
    bench.lose(lost());
    let mut unreachable_at = None;
    while bench.phase() != Phase::Collecting {
        bench.wait_next();
        if bench.last.contains(&record(State::Unreachable, "the guest is not heard")) {
            assert_eq!(unreachable_at.replace(bench.now - begin), None, "told once");
        }
        if bench.last.contains(&Action::Look) {
            bench.found(Found::Running);
            bench.lose(lost());
        }
    }
    bench.has_ended(&Outcome::Unreachable);
    assert_eq!((unreachable_at, bench.now - begin), (Some(PEER_TIMEOUT), SILENCE));
}

#[test]
fn a_guest_that_is_heard_again_is_back() {
    let mut bench = Bench::live(plan());
    assert_eq!(bench.wait(PEER_TIMEOUT), [record(State::Unreachable, "the guest is not heard")]);
    assert_eq!(bench.wait(SECOND), []);
    assert_eq!(bench.feed(Input::Heard), [record(State::Booted, "the guest is heard again")]);
    assert_eq!(bench.feed(Input::Heard), []);
    bench.wait(SILENCE - SECOND);
    assert_eq!(bench.phase(), Phase::Live);
    bench.wait(SECOND);
    bench.has_ended(&Outcome::Unreachable);
    // What is heard while its outputs are collected changes no state any more.
    assert_eq!(bench.feed(Input::Heard), []);
}

#[test]
fn a_workload_that_the_guest_does_not_end_is_ended_from_here() {
    let mut bench = Bench::live(plan());
    let begin = bench.now;
    while bench.phase() == Phase::Live {
        bench.feed(Input::Heard);
        let due = bench.machine.next_tick().unwrap().min(bench.now + SECOND);
        bench.now = due;
        bench.feed(Input::Tick);
    }
    bench.has_ended(&Outcome::TimedOut { watchdog: Watchdog::Run });
    assert_eq!(bench.now - begin, RUN + GRACE + Duration::from_secs(5));
    let mut endless = Bench::live(Plan { run: None, ..plan() });
    for _ in 0..10_000 {
        endless.feed(Input::Heard);
        endless.wait(SECOND);
    }
    assert_eq!(endless.phase(), Phase::Live);
}

/// The time without a collector counts; and yet what the guest said meanwhile is read first.
#[test]
fn a_deadline_goes_on_without_a_collector() {
    let at = |ago: Duration| {
        let start = Start { booted: true, start_sent_ago: Some(ago), ..Start::default() };
        let mut bench = Bench::from(plan(), &start);
        let begin = bench.now;
        bench.found(Found::Running);
        bench.guest(Guest::Opened { run_lost: false });
        while bench.phase() == Phase::Live {
            bench.feed(Input::Heard);
            bench.now = bench.machine.next_tick().unwrap().min(bench.now + SECOND);
            bench.feed(Input::Tick);
        }
        bench.has_ended(&Outcome::TimedOut { watchdog: Watchdog::Run });
        bench.now - begin
    };
    assert_eq!(at(Duration::from_secs(500)), RUN + GRACE - Duration::from_secs(495));
    assert_eq!(at(10 * RUN), Duration::from_millis(750));
    let late = Start { booted: true, start_sent_ago: Some(10 * RUN), ..Start::default() };
    let mut bench = Bench::from(plan(), &late);
    assert_eq!(bench.feed(Input::Tick), []);
    bench.found(Found::Running);
    bench.guest(Guest::Opened { run_lost: false });
    bench.guest(terminal(0));
    bench.has_ended(&Outcome::Completed { exit_code: Some(0) });
}

// Cancelling.

#[test]
fn a_live_workload_is_asked_to_end_and_has_its_grace() {
    let mut bench = Bench::live(plan());
    bench.feed(Input::Cancel);
    assert_eq!(bench.end().outcome, Outcome::Cancelled);
    assert_eq!(bench.last.last(), Some(&Action::Terminate));
    assert_eq!(bench.feed(Input::Cancel), [], "once is enough");
    assert_eq!(bench.guest(terminal(143)), [Action::Collect], "the first word stands");
    let mut deaf = Bench::live(plan());
    deaf.feed(Input::Cancel);
    assert_eq!(deaf.wait_next(), GRACE + 2 * SECOND);
    assert_eq!(deaf.last, [Action::Collect]);
    assert_eq!(deaf.machine.next_tick(), None, "a deadline that was met is none any more");
    let mut lost_meanwhile = Bench::live(plan());
    lost_meanwhile.feed(Input::Cancel);
    assert_eq!(lost_meanwhile.lose(lost()), []);
    lost_meanwhile.wait_next();
    assert_eq!(lost_meanwhile.last, [Action::Collect]);
}

#[test]
fn elsewhere_a_cancel_is_the_end_at_once() {
    let mut phases = Vec::new();
    let answers = [Input::Looked(Ok(Found::Absent)), Input::Created(Ok(())), Input::Started(Ok(()))];
    for count in 0..=answers.len() {
        let mut bench = Bench::new(plan());
        for answer in &answers[..count] {
            bench.feed(answer.clone());
        }
        phases.push(bench.phase());
        bench.feed(Input::Cancel);
        bench.has_ended(&Outcome::Cancelled);
        // Answers to what was under way start nothing.
        for input in [Input::Created(Ok(())), Input::Started(Ok(())), Input::Looked(Ok(Found::Absent))] {
            assert_eq!(bench.feed(input), []);
        }
    }
    assert_eq!(phases, [Phase::Looking, Phase::Creating, Phase::Starting, Phase::Dialing]);
}

// Starting from a journal.

fn ended(outcome: Outcome) -> Ended {
    Ended { outcome, message: "m".into(), error: None, instance_status: None, at: Timestamp::from_unix(0, 0) }
}

#[test]
fn a_new_collector_goes_on_where_the_last_one_stopped() {
    let cancelled = || Some(ended(Outcome::Cancelled));
    let completed = || Some(ended(Outcome::Completed { exit_code: Some(0) }));
    let collection = || Some(Collection::default());
    let failure_only = Plan { collect: OutputCollectionMode::FailureOnly, ..plan() };
    let keep = Plan { retention: RetentionPolicy::KeepUntilStopped, ..plan() };
    let cases = [
        (plan(), Start { ended: cancelled(), ..Start::default() }, vec![Action::Collect], Phase::Collecting),
        (failure_only, Start { ended: completed(), ..Start::default() }, vec![Action::Collect], Phase::Collecting),
        (
            plan(),
            Start { ended: completed(), collection: collection(), ..Start::default() },
            vec![Action::Conclude],
            Phase::Concluding,
        ),
        (
            plan(),
            Start { ended: completed(), concluded: true, ..Start::default() },
            vec![Action::Destroy],
            Phase::Destroying,
        ),
        (keep, Start { ended: completed(), concluded: true, ..Start::default() }, vec![Action::Keep], Phase::Done),
        (
            plan(),
            Start { ended: completed(), concluded: true, finished: true, ..Start::default() },
            vec![],
            Phase::Done,
        ),
    ];
    for (plan, start, actions, phase) in cases {
        let bench = Bench::from(plan, &start);
        assert_eq!((&bench.last, bench.phase()), (&actions, phase), "{start:?}");
    }
    let last_word = Some(EndDecision::new(Outcome::Failed { exit_code: Some(3) }, "it failed"));
    let bench = Bench::from(plan(), &Start { last_word, ..Start::default() });
    bench.has_ended(&Outcome::Failed { exit_code: Some(3) });
}

// Anything at all.

/// What a machine may never do, watched over any number of collectors of one incarnation.
#[derive(Default)]
struct Watch {
    /// What their journal says.
    start: Start,
    start_sent_at: Option<Duration>,
    ends: usize,
    collects: usize,
    concludes: usize,
    is_gone: bool,
    collects_nothing: bool,
}

impl Watch {
    fn new(plan: &Plan) -> Self {
        Self { collects_nothing: plan.collect == OutputCollectionMode::None, ..Self::default() }
    }

    fn actions(&mut self, actions: &[Action], now: Duration) {
        for action in actions {
            assert!(!self.is_gone, "{action:?} after it was all over");
            match action {
                Action::Record(state, _) => {
                    assert_eq!(self.ends, 0, "a state was entered after the end");
                    self.start.booted |= *state == State::Booted;
                }
                Action::Create | Action::Start => {
                    assert!(self.ends == 0, "{action:?} after the end");
                    // Invariant 9.
                    assert!(*action == Action::Start || self.start_sent_at.is_none(), "a workload would run twice");
                }
                Action::StartWorkload => {
                    assert_eq!(self.ends, 0, "a workload was started after the end");
                    self.start_sent_at.get_or_insert(now);
                }
                Action::End(end) => {
                    self.ends += 1;
                    assert_eq!(self.ends, 1, "one end");
                    self.start.ended = Some(Ended { message: end.message.clone(), ..ended(end.outcome.clone()) });
                }
                Action::Collect => {
                    assert_eq!(self.ends, 1, "outputs are collected before the end");
                    self.collects += 1;
                }
                Action::Conclude => self.conclude(),
                // Invariant 2.
                Action::Destroy | Action::Keep => assert!(self.start.concluded, "{action:?} without a verdict"),
                Action::Look | Action::Dial | Action::HangUp | Action::Terminate => {}
            }
        }
    }

    fn conclude(&mut self) {
        assert_eq!(self.ends, 1, "a verdict without an end");
        assert!(!self.start.concluded, "a second verdict");
        let wanted = !self.collects_nothing;
        assert!(self.collects > 0 || !wanted, "no collection was tried");
        self.concludes += 1;
    }

    /// What is durable before the machine hears of it.
    fn input(&mut self, machine: &Machine, input: &Input) {
        match input {
            Input::Collected(collection) if machine.phase() == Phase::Collecting => {
                self.start.collection = Some(collection.clone());
            }
            Input::Concluded if machine.phase() == Phase::Concluding => self.start.concluded = true,
            _ => {}
        }
    }

    fn after(&mut self, machine: &Machine) {
        self.is_gone = machine.phase() == Phase::Done;
    }

    fn start(&self, now: Duration) -> Start {
        let start_sent_ago = self.start_sent_at.map(|at| now - at);
        Start { start_sent_ago, ..self.start.clone() }
    }
}

/// No deadline is due that a tick does not meet: a driver that waits for it would spin.
fn assert_no_spin(machine: &mut Machine, watch: &mut Watch, now: Duration) {
    for _ in 0..4 {
        if machine.next_tick().is_none_or(|due| due > now) {
            return;
        }
        let actions = machine.step(Input::Tick, now);
        watch.actions(&actions, now);
        watch.after(machine);
    }
    panic!("{:?} at {now:?} in {:?} is due for ever", machine.next_tick(), machine.phase());
}

fn any_plan() -> impl Strategy<Value = Plan> {
    let secs = |from: u64, to: u64| (from..to).prop_map(Duration::from_secs);
    let collect = prop::sample::select(vec![
        OutputCollectionMode::Always,
        OutputCollectionMode::FailureOnly,
        OutputCollectionMode::None,
    ]);
    let retention = prop::sample::select(vec![RetentionPolicy::DestroyOnCompletion, RetentionPolicy::KeepUntilStopped]);
    (secs(1, 200), secs(1, 100), prop::option::of(secs(1, 300)), secs(0, 20), collect, retention).prop_map(
        |(boot, silence, run, stop_grace, collect, retention)| Plan {
            boot,
            silence,
            run,
            stop_grace,
            collect,
            retention,
        },
    )
}

fn failure() -> impl Strategy<Value = CallFailure> {
    any::<bool>().prop_map(|transient| CallFailure { transient, message: "no".into() })
}

fn answer() -> impl Strategy<Value = Result<(), CallFailure>> {
    prop_oneof![2 => Just(Ok(())), 1 => failure().prop_map(Err)]
}

fn found() -> impl Strategy<Value = Found> {
    prop::sample::select(vec![
        Found::Absent,
        Found::Stopped,
        Found::Running,
        Found::Running,
        Found::Changing("Frozen".into()),
        Found::Error,
    ])
}

fn loss() -> impl Strategy<Value = SessionLoss> {
    prop::sample::select(vec![
        lost(),
        lost(),
        SessionLoss::NewStream,
        SessionLoss::NoAgent("a".into()),
        SessionLoss::Refused("b".into()),
        SessionLoss::Broken("c".into()),
    ])
}

fn input() -> impl Strategy<Value = Input> {
    prop_oneof![
        6 => found().prop_map(|found| Input::Looked(Ok(found))),
        1 => failure().prop_map(|failure| Input::Looked(Err(failure))),
        3 => answer().prop_map(Input::Created),
        3 => answer().prop_map(Input::Started),
        3 => Just(Input::Heard),
        4 => any::<bool>().prop_map(|lost| Input::Guest(Guest::Opened { run_lost: lost })),
        4 => Just(Input::Guest(Guest::Opened { run_lost: false })),
        1 => Just(Input::Guest(Guest::Accepted)),
        1 => (0..4).prop_map(|code| Input::Guest(terminal(code))),
        1 => Just(Input::Guest(Guest::Refused("no".into()))),
        1 => Just(Input::Guest(Guest::Rewound)),
        5 => loss().prop_map(Input::NoSession),
        3 => Just(Input::Collected(Collection::default())),
        3 => Just(Input::Concluded),
        2 => answer().prop_map(Input::Destroyed),
        1 => Just(Input::Cancel),
        3 => Just(Input::Tick),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Inputs in any order, at any time, over any number of collectors that die anywhere.
    #[test]
    fn no_inputs_make_it_break_its_promises(
        plan in any_plan(),
        inputs in prop::collection::vec((input(), 0u64..30_000, prop::bool::weighted(0.05)), 1..80),
    ) {
        let mut now = Duration::from_secs(1000);
        let mut watch = Watch::new(&plan);
        let (mut machine, actions) = Machine::new(plan.clone(), &Start::default(), now);
        watch.actions(&actions, now);
        for (input, millis, dies) in inputs {
            now += Duration::from_millis(millis);
            if dies && !watch.is_gone {
                let (next, actions) = Machine::new(plan.clone(), &watch.start(now), now);
                machine = next;
                watch.actions(&actions, now);
                watch.after(&machine);
            }
            watch.input(&machine, &input);
            let actions = machine.step(input, now);
            watch.actions(&actions, now);
            watch.after(&machine);
            assert_no_spin(&mut machine, &mut watch, now);
        }
        prop_assert!(watch.ends <= 1);
    }
}

// Worlds.

/// How a world behaves; everything in it answers after a while.
#[derive(Clone, Debug)]
struct World {
    plan: Plan,
    /// Answers of Incus, over and over: whether a call goes well.
    calls: Vec<Result<(), CallFailure>>,
    /// What becomes of each dial, over and over.
    dials: Vec<Dial>,
    /// When the instance stops by itself.
    stops_after: Option<Duration>,
    /// When the collector dies, and another takes over.
    deaths: Vec<Duration>,
    cancel_after: Duration,
}

#[derive(Clone, Debug)]
enum Dial {
    Fails(SessionLoss),
    /// It opens, and is lost after a while.
    Opens {
        lost_after: u64,
        loss: SessionLoss,
    },
    /// It opens, and the workload ends.
    Ends(i32),
}

fn world() -> impl Strategy<Value = World> {
    let dial = prop_oneof![
        3 => loss().prop_map(Dial::Fails),
        3 => (0u64..40, loss()).prop_map(|(lost_after, loss)| Dial::Opens { lost_after, loss }),
        2 => (0..3).prop_map(Dial::Ends),
    ];
    let secs = || (0u64..400).prop_map(Duration::from_secs);
    (
        any_plan(),
        prop::collection::vec(answer(), 1..6),
        prop::collection::vec(dial, 1..6),
        prop::option::of(secs()),
        prop::collection::vec(secs(), 0..4),
        secs(),
    )
        .prop_map(|(plan, calls, dials, stops_after, mut deaths, cancel_after)| {
            deaths.sort_unstable();
            World { plan, calls, dials, stops_after, deaths, cancel_after }
        })
}

/// Runs a world with its machine. Inputs are answers to actions and nothing else; time goes on to whatever is due first.
struct Run {
    world: World,
    now: Duration,
    instance: Found,
    started_at: Option<Duration>,
    calls: usize,
    dials: usize,
    is_open: bool,
    due: VecDeque<(Duration, Input)>,
    watch: Watch,
}

impl Run {
    fn new(world: World) -> Self {
        let watch = Watch::new(&world.plan);
        Self {
            world,
            now: Duration::from_secs(1000),
            instance: Found::Absent,
            started_at: None,
            calls: 0,
            dials: 0,
            is_open: false,
            due: VecDeque::new(),
            watch,
        }
    }

    fn later(&mut self, millis: u64, input: Input) {
        self.due.push_back((self.now + Duration::from_millis(millis), input));
        self.due.make_contiguous().sort_by_key(|(at, _)| *at);
    }

    fn call(&mut self) -> Result<(), CallFailure> {
        self.calls += 1;
        self.world.calls[self.calls % self.world.calls.len()].clone()
    }

    fn perform(&mut self, actions: &[Action]) {
        self.watch.actions(actions, self.now);
        for action in actions {
            match action {
                Action::Look => {
                    let found = self.call().map(|()| self.instance.clone());
                    self.later(5, Input::Looked(found));
                }
                Action::Create => {
                    let answer = self.call();
                    if answer.is_ok() {
                        self.instance = Found::Stopped;
                    }
                    self.later(80, Input::Created(answer));
                }
                Action::Start => {
                    let answer = self.call();
                    if answer.is_ok() {
                        self.instance = Found::Running;
                        self.started_at.get_or_insert(self.now);
                    }
                    self.later(150, Input::Started(answer));
                }
                Action::Dial => self.dial(),
                Action::HangUp => self.is_open = false,
                Action::Terminate if self.is_open => self.later(1000, Input::Guest(terminal(143))),
                Action::Collect => self.later(3000, Input::Collected(Collection::default())),
                Action::Conclude => self.later(1, Input::Concluded),
                Action::Destroy => {
                    let answer = self.call();
                    self.later(600, Input::Destroyed(answer));
                }
                Action::Record(..) | Action::StartWorkload | Action::Terminate | Action::End(_) | Action::Keep => {}
            }
        }
    }

    fn dial(&mut self) {
        self.dials += 1;
        if self.instance != Found::Running {
            return self.later(30, Input::NoSession(lost()));
        }
        match self.world.dials[self.dials % self.world.dials.len()].clone() {
            Dial::Fails(loss) => self.later(30, Input::NoSession(loss)),
            Dial::Opens { lost_after, loss } => {
                self.later(30, Input::Guest(Guest::Opened { run_lost: false }));
                self.later(30 + lost_after * 1000, Input::NoSession(loss));
            }
            Dial::Ends(code) => {
                self.later(30, Input::Guest(Guest::Opened { run_lost: false }));
                self.later(1500, Input::Guest(terminal(code)));
            }
        }
    }

    /// To the end, which must come; gives the time that it took.
    fn run(mut self) -> Duration {
        let begin = self.now;
        let mut deaths: VecDeque<Duration> = self.world.deaths.iter().map(|after| begin + *after).collect();
        let mut cancel = Some(begin + self.world.cancel_after);
        let mut steps = 0;
        let (mut machine, actions) = Machine::new(self.world.plan.clone(), &Start::default(), self.now);
        self.perform(&actions);
        while machine.phase() != Phase::Done {
            steps += 1;
            assert!(steps < 20_000, "it does not end: {:?} in {:?}", self.world, machine.phase());
            let next = [machine.next_tick(), self.due.front().map(|(at, _)| *at), deaths.front().copied(), cancel];
            self.now = self.now.max(next.into_iter().flatten().min().expect("something is under way"));
            if self.started_at.zip(self.world.stops_after).is_some_and(|(at, after)| self.now >= at + after) {
                self.instance = Found::Stopped;
            }
            if deaths.front().is_some_and(|at| *at <= self.now) {
                deaths.pop_front();
                self.due.clear();
                let (next, actions) = Machine::new(self.world.plan.clone(), &self.watch.start(self.now), self.now);
                machine = next;
                self.perform(&actions);
                self.watch.after(&machine);
                continue;
            }
            let input = match (cancel, self.due.front()) {
                (Some(at), _) if at <= self.now => {
                    cancel = None;
                    Input::Cancel
                }
                (_, Some((at, _))) if *at <= self.now => self.due.pop_front().map_or(Input::Tick, |(_, input)| input),
                _ => Input::Tick,
            };
            if matches!(input, Input::Guest(Guest::Opened { .. })) {
                self.is_open = true;
            }
            self.watch.input(&machine, &input);
            let actions = machine.step(input, self.now);
            self.perform(&actions);
            self.watch.after(&machine);
        }
        assert_eq!((self.watch.ends, self.watch.start.concluded), (1, true));
        self.now - begin
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Invariant 7 and the end of everything: whatever the world does, there is a verdict in bounded time.
    #[test]
    fn every_world_comes_to_its_end(world in world()) {
        let last_death = world.deaths.last().copied().unwrap_or_default();
        let (cancel_after, stop_grace) = (world.cancel_after, world.plan.stop_grace);
        let took = Run::new(world).run();
        // A cancel that comes while Incus fails waits for nothing; destroying is tried for two minutes.
        let bound = cancel_after.max(last_death) + stop_grace + Duration::from_secs(2 + 3 + 1 + 125);
        prop_assert!(took <= bound, "{:?} of {:?}", took, bound);
    }
}

/// The start of a collector that died may come to its end behind the back of the next one.
#[test]
fn a_start_that_is_refused_is_looked_at_before_it_is_believed() {
    let refused = || CallFailure { transient: false, message: "The instance is already running".to_owned() };
    for (found, expected) in [(Found::Running, Phase::Dialing), (Found::Stopped, Phase::Collecting)] {
        let plan = Plan {
            boot: Duration::from_secs(60),
            silence: Duration::from_secs(60),
            run: None,
            stop_grace: Duration::from_secs(1),
            collect: OutputCollectionMode::Always,
            retention: RetentionPolicy::DestroyOnCompletion,
        };
        let (mut machine, _) = Machine::new(plan, &Start::default(), Duration::ZERO);
        machine.step(Input::Looked(Ok(Found::Stopped)), Duration::ZERO);
        let actions = machine.step(Input::Started(Err(refused())), Duration::ZERO);
        assert!(actions.contains(&Action::Look), "{actions:?}");
        machine.step(Input::Looked(Ok(found)), Duration::ZERO);
        assert_eq!(machine.phase(), expected);
    }
}
