//! What a machine may never do, whatever comes in and in whatever order.

use proptest::prelude::*;

use super::*;

/// Watches all that a machine does, over any number of collectors, and keeps what their journal would say.
#[derive(Debug, Default)]
pub(super) struct Watch {
    start: Start,
    start_asked_at: Option<Duration>,
    booted_at: Option<Duration>,
    start_sent_at: Option<Duration>,
    ended_at: Option<Duration>,
    /// When the present keeping or rest began, and how long it lasts.
    settled_at: Duration,
    ends: usize,
    collects: usize,
    collects_nothing: bool,
    /// Nothing may follow.
    pub(super) is_over: bool,
}

impl Watch {
    pub(super) fn new(plan: &Plan) -> Self {
        let collects_nothing = plan.collect == OutputCollectionMode::None;
        Self { collects_nothing, ..Self::default() }
    }

    pub(super) fn actions(&mut self, actions: &[Action], now: Duration) {
        for action in actions {
            assert!(!self.is_over, "{action:?} after it was all over");
            self.action(action, now);
        }
    }

    fn action(&mut self, action: &Action, now: Duration) {
        let has_ended = self.ends > 0;
        match action {
            Action::Record(state, _) => {
                assert!(!has_ended, "a state was entered after the end");
                if *state == State::Booted {
                    self.booted_at.get_or_insert(now);
                }
            }
            Action::Create => {
                // Invariant 9.
                assert!(!has_ended && self.start_sent_at.is_none(), "a workload would run twice");
                self.start.create_unanswered = self.start_asked_at.is_none();
            }
            Action::Start => {
                assert!(!has_ended, "an instance was started after the end");
                self.start.create_unanswered = false;
                self.start_asked_at = Some(now);
            }
            Action::Halt => assert!(!has_ended && self.start_asked_at.is_none(), "its own instance was stopped"),
            Action::StartWorkload => {
                assert!(!has_ended, "a workload was started after the end");
                self.start_sent_at.get_or_insert(now);
            }
            Action::Command(command) => {
                assert!(self.start.command < Some(*command), "a wish went back");
                self.start.command = Some(*command);
            }
            Action::End(end) => {
                self.ends += 1;
                assert_eq!(self.ends, 1, "one end");
                (self.start.ended, self.ended_at) = (Some(end.clone()), Some(now));
            }
            Action::Collect => {
                assert!(has_ended, "outputs are collected before the end");
                self.collects += 1;
            }
            Action::Conclude => {
                assert!(has_ended, "a verdict without an end");
                assert!(!self.start.is_concluded, "a second verdict");
                // Invariant 7.
                assert!(self.collects > 0 || self.collects_nothing, "no collection was tried");
            }
            // Invariant 2.
            Action::Destroy => assert!(self.start.is_concluded, "destroyed without a verdict"),
            Action::Keep(time) => self.settle(Settled::Kept(*time), now),
            Action::Finish { restart_in, .. } => {
                self.settle(restart_in.map_or(Settled::Finished, Settled::Resting), now);
            }
            Action::Begin { restarts } => {
                assert!(self.start.is_concluded, "a life began in another");
                let collects_nothing = self.collects_nothing;
                *self = Self { collects_nothing, ..Self::default() };
                self.start.restarts = *restarts;
            }
            Action::Yield { .. } => self.start.settled = Some(Settled::TakenOver),
            Action::Look | Action::Dial | Action::HangUp | Action::Terminate => {}
        }
    }

    fn settle(&mut self, settled: Settled, now: Duration) {
        assert!(self.start.is_concluded, "{settled:?} without a verdict");
        (self.start.settled, self.settled_at) = (Some(settled), now);
    }

    /// What is durable before the machine hears of it.
    pub(super) fn input(&mut self, machine: &Machine, input: &Input) {
        match input {
            Input::Collected if machine.phase() == Phase::Collecting => self.start.is_collected = true,
            Input::Concluded if machine.phase() == Phase::Concluding => self.start.is_concluded = true,
            Input::Guest(Guest::State(State::Ready)) if self.ends == 0 => self.start.is_ready = true,
            _ => {}
        }
    }

    pub(super) fn after(&mut self, machine: &Machine) {
        self.is_over = matches!(machine.phase(), Phase::Done | Phase::TakenOver);
    }

    /// Whether the workload was asked for.
    pub(super) fn has_started(&self) -> bool {
        self.start_sent_at.is_some()
    }

    /// Whether the end is decided.
    pub(super) fn has_ended(&self) -> bool {
        self.ends > 0
    }

    /// Whether a verdict is durable.
    pub(super) fn is_concluded(&self) -> bool {
        self.start.is_concluded
    }

    /// What the next collector reads.
    pub(super) fn start(&self, now: Duration) -> Start {
        let ago = |at: Option<Duration>| at.map(|at| now - at);
        let left = |time: Duration| time.saturating_sub(now - self.settled_at);
        Start {
            lived: self
                .start_sent_at
                .zip(self.ended_at)
                .map_or(Duration::ZERO, |(sent, ended)| ended.saturating_sub(sent)),
            start_asked: ago(self.start_asked_at),
            booted: ago(self.booted_at),
            start_sent: ago(self.start_sent_at),
            settled: self.start.settled.map(|settled| match settled {
                Settled::Kept(time) => Settled::Kept(time.map(left)),
                Settled::Resting(time) => Settled::Resting(left(time)),
                settled => settled,
            }),
            ..self.start.clone()
        }
    }
}

/// No deadline is due that a tick does not meet: a shell that waits for it would spin.
fn assert_no_spin(machine: &mut Machine, watch: &mut Watch, now: Duration) {
    for _ in 0..6 {
        if machine.next_tick().is_none_or(|due| due > now) {
            return;
        }
        let actions = machine.step(Input::Tick, now);
        watch.actions(&actions, now);
        watch.after(machine);
    }
    panic!("{:?} at {now:?} in {:?} is due for ever", machine.next_tick(), machine.phase());
}

pub(super) fn any_plan() -> impl Strategy<Value = Plan> {
    use OutputCollectionMode::{Always, FailureOnly, None};
    use RetentionPolicy::{DebugKeep, DestroyOnCompletion, KeepUntilStopped};
    let secs = |from: u64, to: u64| (from..to).prop_map(Duration::from_secs);
    let maybe = |to: u64| prop::option::of((1..to).prop_map(Duration::from_secs));
    let watchdogs = (secs(1, 200), maybe(60), secs(1, 100), maybe(60), maybe(200), maybe(300), secs(0, 20));
    let policies = (
        prop::sample::select(vec![Always, FailureOnly, None]),
        prop::sample::select(vec![DestroyOnCompletion, KeepUntilStopped, DebugKeep]),
        secs(1, 300),
        prop::sample::select(vec![RestartPolicy::Never, RestartPolicy::OnFailure, RestartPolicy::Always]),
        0..4u32,
        (secs(0, 20), secs(1, 60)),
    );
    (watchdogs, policies).prop_map(|(watchdogs, policies)| {
        let (boot, ready, silence, progress, progress_cap, run, stop_grace) = watchdogs;
        let (collect, retention, debug_keep, restart, max_restarts, (restart_backoff, restart_backoff_cap)) = policies;
        Plan {
            boot,
            ready,
            silence,
            progress,
            progress_cap,
            run,
            stop_grace,
            collect,
            retention,
            debug_keep,
            restart,
            max_restarts,
            restart_backoff,
            restart_backoff_cap,
        }
    })
}

pub(super) fn failure() -> impl Strategy<Value = CallFailure> {
    any::<bool>().prop_map(|transient| CallFailure { transient, message: "no".into() })
}

pub(super) fn answer() -> impl Strategy<Value = Result<(), CallFailure>> {
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
        Found::Foreign,
        Found::TakenOver { owner: "other".into(), term: 2 },
    ])
}

pub(super) fn loss() -> impl Strategy<Value = SessionLoss> {
    prop::sample::select(vec![
        lost(),
        lost(),
        SessionLoss::NewStream,
        SessionLoss::NoAgent("a".into()),
        SessionLoss::Refused("b".into()),
        SessionLoss::Broken("c".into()),
    ])
}

pub(super) fn command() -> impl Strategy<Value = Command> {
    prop::sample::select(vec![Command::Cancel, Command::Stop, Command::Destroy])
}

fn destroyed() -> impl Strategy<Value = Result<Destroyed, CallFailure>> {
    let taken = Destroyed::TakenOver { owner: "other".into(), term: 2 };
    prop_oneof![8 => Just(Ok(Destroyed::Gone)), 1 => Just(Ok(taken)), 4 => failure().prop_map(Err)]
}

fn input() -> impl Strategy<Value = Input> {
    let guest = prop_oneof![
        4 => any::<bool>().prop_map(|run_lost| Guest::Opened { run_lost }),
        4 => Just(Guest::Opened { run_lost: false }),
        2 => Just(Guest::Accepted),
        1 => Just(Guest::State(State::Ready)),
        1 => Just(Guest::Progress),
        1 => (0..4).prop_map(terminal),
        1 => Just(Guest::Refused("no".into())),
        1 => Just(Guest::Rewound),
    ];
    prop_oneof![
        6 => found().prop_map(|found| Input::Looked(Ok(found))),
        1 => failure().prop_map(|failure| Input::Looked(Err(failure))),
        3 => answer().prop_map(Input::Created),
        3 => answer().prop_map(Input::Started),
        2 => answer().prop_map(Input::Halted),
        3 => Just(Input::Heard),
        12 => guest.prop_map(Input::Guest),
        5 => loss().prop_map(Input::NoSession),
        3 => Just(Input::Collected),
        3 => Just(Input::Concluded),
        2 => destroyed().prop_map(Input::Destroyed),
        1 => command().prop_map(Input::Command),
        1 => Just(Input::Woken),
        3 => Just(Input::Tick),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Inputs in any order, at any time, over any number of collectors that die anywhere.
    #[test]
    fn no_inputs_make_it_break_its_promises(
        plan in any_plan(),
        inputs in prop::collection::vec((input(), 0u64..30_000, prop::bool::weighted(0.05)), 1..80),
    ) {
        let mut now = Duration::from_secs(1000);
        let mut watch = Watch::new(&plan);
        let (mut machine, actions) = Machine::new(plan.clone(), &Start::default(), 7, now);
        watch.actions(&actions, now);
        for (input, millis, dies) in inputs {
            now += Duration::from_millis(millis);
            if dies && !watch.is_over {
                let (next, actions) = Machine::new(plan.clone(), &watch.start(now), 7, now);
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
    }
}
