//! Each way from one phase to another and each failure path by itself, then random worlds and random nonsense.

#![expect(clippy::unchecked_time_subtraction, reason = "a time that goes backwards fails the test")]

mod commands;
mod ending;
mod guest;
mod promises;
mod provide;
mod resume;
mod table;
mod watchdog;
mod world;

use pika_cloud_common::spec::{OutputCollectionMode, RestartPolicy, RetentionPolicy};
use pika_cloud_common::verdict::{DeathCause, Outcome};
use pika_cloud_common::{Command, State};

use super::*;

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
        ready: None,
        progress: None,
        progress_cap: None,
        debug_keep: Duration::from_secs(3600),
        restart: RestartPolicy::Never,
        max_restarts: 3,
        restart_backoff: SECOND,
        restart_backoff_cap: 60 * SECOND,
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
        let (machine, last) = Machine::new(plan, start, 7, now);
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

    /// Waits for every deadline in turn, until the phase is another; gives the time that it took.
    fn wait_while(&mut self, phase: Phase) -> Duration {
        let begin = self.now;
        for _ in 0..1000 {
            if self.phase() != phase {
                return self.now - begin;
            }
            self.wait_next();
        }
        panic!("{phase:?} does not end");
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

    /// The workload ended, and its verdict is durable.
    fn concluded(plan: Plan, exit_code: i32) -> Self {
        let mut bench = Self::live(plan);
        bench.guest(terminal(exit_code));
        bench.feed(Input::Collected);
        bench.feed(Input::Concluded);
        bench
    }

    fn has_ended(&self, outcome: &Outcome) {
        assert_eq!(&self.end().outcome, outcome);
        assert_eq!(self.last.last(), Some(&Action::Collect));
        assert_eq!(self.phase(), Phase::Collecting);
    }
}

/// A wait before another try: this long, and a random part of it more.
fn is_about(waited: Duration, delay: Duration) -> bool {
    waited >= delay && waited <= delay + delay / 4
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
    for quiet in [Guest::Accepted, Guest::State(State::Starting), Guest::State(State::Ready)] {
        assert_eq!(bench.guest(quiet), []);
    }
    bench.guest(terminal(0));
    bench.has_ended(&Outcome::Completed { exit_code: Some(0) });
    assert_eq!(bench.feed(Input::Collected), [Action::Conclude]);
    assert_eq!(bench.feed(Input::Concluded), [Action::Destroy]);
    let finish = Action::Finish { destroyed: true, restart_in: None };
    assert_eq!(bench.feed(Input::Destroyed(Ok(Destroyed::Gone))), [finish]);
    assert_eq!((bench.phase(), bench.machine.next_tick()), (Phase::Done, None));
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
