//! Worlds that behave as Incus, guests, disks and people may: what comes in answers what was done, late or never.

use std::collections::{BTreeSet, VecDeque};

use proptest::prelude::*;

use super::promises::{Watch, answer, any_plan, command, loss};
use super::*;

/// How a world behaves; everything in it answers after a while.
#[derive(Clone, Debug)]
pub(super) struct World {
    plan: Plan,
    /// What there is at first.
    left: Found,
    /// Answers of Incus, over and over: whether a call goes well.
    calls: Vec<Result<(), CallFailure>>,
    /// How long a call takes that changes something, over and over, in milliseconds.
    takes: Vec<u64>,
    /// The same for dials and looks.
    reads: Vec<u64>,
    /// Whether its workloads end when they are asked to.
    obeys: bool,
    /// What becomes of each dial, over and over.
    dials: Vec<Dial>,
    /// How long the disk takes, in milliseconds.
    disk: u64,
    /// What becomes of the instance behind our back, and when.
    events: Vec<(Duration, Found)>,
    /// Whether Incus tells of that.
    wakes: bool,
    /// When the collector dies, and another takes over.
    deaths: Vec<Duration>,
    /// What somebody wants, and when.
    wish: (Duration, Command),
    /// When all of it is to go.
    destroy_after: Duration,
}

#[derive(Clone, Debug)]
enum Dial {
    Fails(SessionLoss),
    /// It opens, says these things a second apart, and may be lost right after that, together with the instance.
    Opens {
        anew: bool,
        words: Vec<Guest>,
        loss: Option<(SessionLoss, Option<Found>)>,
    },
}

fn word() -> impl Strategy<Value = Guest> {
    prop_oneof![
        4 => Just(Guest::Accepted),
        2 => Just(Guest::State(State::Ready)),
        4 => Just(Guest::Progress),
        3 => (0..3).prop_map(terminal),
        1 => Just(Guest::Refused("busy".into())),
        1 => Just(Guest::Rewound),
    ]
}

pub(super) fn world() -> impl Strategy<Value = World> {
    let end = (loss(), prop::option::of(prop::sample::select(vec![Found::Absent, Found::Stopped])));
    let dial = prop_oneof![
        2 => loss().prop_map(Dial::Fails),
        4 => (prop::bool::weighted(0.1), prop::collection::vec(word(), 0..8), prop::option::of(end))
            .prop_map(|(anew, words, loss)| Dial::Opens { anew, words, loss }),
    ];
    let secs = |to: u64| (0..to).prop_map(Duration::from_secs);
    let becomes = prop::sample::select(vec![
        Found::Absent,
        Found::Stopped,
        Found::Error,
        Found::Foreign,
        Found::Running,
        Found::Changing("Stopping".into()),
        Found::TakenOver { owner: "other".into(), term: 2 },
    ]);
    let left = prop_oneof![
        6 => Just(Found::Absent),
        1 => Just(Found::Stopped),
        2 => Just(Found::Running),
        1 => Just(Found::Changing("Starting".into())),
        1 => Just(Found::Foreign),
    ];
    let takes = prop::sample::select(vec![5, 80, 150, 600, 5000, 90_000]);
    let nature = (
        any_plan(),
        left,
        prop::collection::vec(answer(), 1..6),
        prop::collection::vec(takes, 1..4),
        prop::collection::vec(prop::sample::select(vec![5, 30, 300, 9000]), 1..4),
        prop::collection::vec(dial, 1..6),
        any::<bool>(),
        prop::sample::select(vec![1, 1, 20, 700]),
    );
    let fate = (
        prop::collection::vec((secs(300), becomes), 0..4),
        any::<bool>(),
        prop::collection::vec(secs(400), 0..4),
        (secs(400), command()),
        secs(900),
    );
    (nature, fate).prop_map(|((plan, left, calls, takes, reads, dials, obeys, disk), fate)| {
        let (mut events, wakes, mut deaths, wish, destroy_after) = fate;
        deaths.sort_unstable();
        events.sort_by_key(|(at, _)| *at);
        World { plan, left, calls, takes, reads, obeys, dials, disk, events, wakes, deaths, wish, destroy_after }
    })
}

/// What comes in, and while what holds.
#[derive(Clone, Debug)]
enum Due {
    /// The answer to the last look; earlier ones are not waited for.
    Looked(u64),
    /// Any other answer.
    Answer(Input),
    /// Of this dial, or the session that it became.
    OfSession(u64, SessionLoss),
    /// The same, and the instance goes with it.
    Breaks(u64, SessionLoss, Found),
    /// The guest says something in this session.
    Says(u64, Guest),
    /// What it said is durable, whatever became of the session.
    Heard(Guest),
    Event(Found),
    Wish(Command),
}

/// Runs a world with its machine.
pub(super) struct Run {
    world: World,
    now: Duration,
    machine: Machine,
    instance: Found,
    calls: usize,
    changes: usize,
    reads: usize,
    dials: usize,
    looks: u64,
    session: u64,
    due: VecDeque<(Duration, Due)>,
    watch: Watch,
    pub(super) seen: BTreeSet<Transition>,
}

impl Run {
    pub(super) fn new(world: World) -> Self {
        let now = Duration::from_secs(1000);
        let watch = Watch::new(&world.plan);
        let (machine, actions) = Machine::new(world.plan.clone(), &Start::default(), 7, now);
        let mut run = Self {
            instance: world.left.clone(),
            world,
            now,
            machine,
            calls: 0,
            changes: 0,
            reads: 0,
            dials: 0,
            looks: 0,
            session: 0,
            due: VecDeque::new(),
            watch,
            seen: BTreeSet::new(),
        };
        for (after, found) in run.world.events.clone() {
            run.at(now + after, Due::Event(found));
        }
        let (after, command) = run.world.wish;
        run.at(now + after, Due::Wish(command));
        run.at(now + run.world.destroy_after, Due::Wish(Command::Destroy));
        run.perform(&actions);
        run
    }

    fn at(&mut self, at: Duration, due: Due) {
        let place = self.due.partition_point(|(other, _)| *other <= at);
        self.due.insert(place, (at, due));
    }

    fn later(&mut self, millis: u64, due: Due) {
        self.at(self.now + Duration::from_millis(millis), due);
    }

    fn call(&mut self) -> Result<(), CallFailure> {
        self.calls += 1;
        self.world.calls[self.calls % self.world.calls.len()].clone()
    }

    /// A call that changes the instance, where it is one that Incus can change that way.
    fn change(&mut self, from: &[Found], to: Found, input: impl FnOnce(Result<(), CallFailure>) -> Input) {
        let mut answer = self.call();
        if answer.is_ok() && !from.contains(&self.instance) {
            answer = Err(refusal());
        }
        if answer.is_ok() {
            self.instance = to;
        }
        self.changes += 1;
        let takes = self.world.takes[self.changes % self.world.takes.len()];
        self.later(takes, Due::Answer(input(answer)));
    }

    fn perform(&mut self, actions: &[Action]) {
        self.watch.actions(actions, self.now);
        self.watch.after(&self.machine);
        for action in actions {
            match action {
                Action::Look => self.look(),
                Action::Create => self.change(&[Found::Absent], Found::Stopped, Input::Created),
                Action::Start => self.change(&[Found::Stopped], Found::Running, Input::Started),
                Action::Halt => self.change(&[Found::Running], Found::Stopped, Input::Halted),
                Action::Dial => self.dial(),
                Action::HangUp => {
                    self.session += 1;
                    // That it opened is no news any more.
                    let opened = Guest::Opened { run_lost: false };
                    self.due.retain(|(_, due)| !matches!(due, Due::Heard(guest) if *guest == opened));
                }
                Action::Terminate if self.world.obeys => {
                    self.later(1000, Due::Says(self.session, terminal(143)));
                }
                Action::Collect => {
                    self.look();
                    self.later(3000, Due::Answer(Input::Collected));
                }
                Action::Conclude => self.later(self.world.disk, Due::Answer(Input::Concluded)),
                Action::Destroy => self.destroy(),
                Action::Begin { .. } => self.due.retain(|(_, due)| !matches!(due, Due::Heard(_))),
                Action::Keep(_) | Action::Finish { .. } => self.session += 1,
                Action::Record(..)
                | Action::StartWorkload
                | Action::End(_)
                | Action::Command(_)
                | Action::Terminate
                | Action::Yield { .. } => {}
            }
        }
    }

    fn read(&mut self) -> u64 {
        self.reads += 1;
        self.world.reads[self.reads % self.world.reads.len()]
    }

    fn look(&mut self) {
        self.looks += 1;
        let takes = self.read();
        self.later(takes, Due::Looked(self.looks));
    }

    fn destroy(&mut self) {
        self.session += 1;
        let answer = match &self.instance {
            Found::TakenOver { owner, term } => Ok(Destroyed::TakenOver { owner: owner.clone(), term: *term }),
            Found::Foreign => Ok(Destroyed::Gone),
            _ => self.call().map(|()| Destroyed::Gone),
        };
        if answer == Ok(Destroyed::Gone) && self.instance != Found::Foreign {
            self.instance = Found::Absent;
        }
        self.later(600, Due::Answer(Input::Destroyed(answer)));
    }

    fn dial(&mut self) {
        self.session += 1;
        self.dials += 1;
        let (session, takes) = (self.session, self.read());
        if self.instance != Found::Running {
            return self.later(takes, Due::OfSession(session, lost()));
        }
        match self.world.dials[self.dials % self.world.dials.len()].clone() {
            Dial::Fails(loss) => self.later(takes, Due::OfSession(session, loss)),
            Dial::Opens { anew, words, loss } => {
                let run_lost = anew && self.watch.has_started();
                self.later(takes, Due::Says(session, Guest::Opened { run_lost }));
                let mut last = takes;
                for (after, word) in (1..).step_by(1000).zip(words) {
                    last = takes + after;
                    self.later(last, Due::Says(session, word));
                }
                match loss {
                    None => {}
                    Some((loss, None)) => self.later(last + 1, Due::OfSession(session, loss)),
                    Some((loss, Some(found))) => self.later(last + 1, Due::Breaks(session, loss, found)),
                }
            }
        }
    }

    /// What comes in by this, if it is still waited for.
    fn input(&mut self, due: Due) -> Option<Input> {
        match due {
            Due::Looked(look) if look == self.looks => {
                // A collection asks Incus by itself, and the machine hears only who has the instance.
                let found = self.call().map(|()| self.instance.clone());
                if matches!(self.instance, Found::Changing(_)) && self.calls.is_multiple_of(3) {
                    self.instance = Found::Running;
                }
                let is_taken = matches!(found, Ok(Found::TakenOver { .. }));
                (is_taken || self.machine.phase() != Phase::Collecting).then_some(Input::Looked(found))
            }
            Due::OfSession(session, loss) if session == self.session => Some(Input::NoSession(loss)),
            Due::Breaks(session, loss, found) if session == self.session => {
                if self.instance == Found::Running {
                    self.instance = found;
                }
                Some(Input::NoSession(loss))
            }
            Due::Says(session, guest) if session == self.session => {
                self.later(self.world.disk, Due::Heard(guest));
                Some(Input::Heard)
            }
            Due::Looked(_) | Due::OfSession(..) | Due::Breaks(..) | Due::Says(..) => None,
            Due::Answer(input) => Some(input),
            Due::Heard(guest) => Some(Input::Guest(guest)),
            Due::Event(found) => {
                // Nobody makes one of ours, or has one that is another's.
                if !matches!(self.instance, Found::Absent | Found::Foreign | Found::TakenOver { .. }) {
                    self.instance = found;
                }
                self.world.wakes.then_some(Input::Woken)
            }
            Due::Wish(command) => Some(Input::Command(command)),
        }
    }

    fn step(&mut self, input: Input) {
        self.watch.input(&self.machine, &input);
        let actions = self.machine.step(input, self.now);
        self.seen.extend(self.machine.transition());
        self.perform(&actions);
    }

    /// When the guest's last word is durable, where one is on its way to the disk and the end is open.
    fn last_word(&self) -> Option<Duration> {
        let is_last = |due: &Due| matches!(due, Due::Heard(Guest::Terminal(_)));
        let word = self.due.iter().find(|(_, due)| is_last(due)).map(|(at, _)| *at);
        word.filter(|_| !self.watch.has_ended())
    }

    /// The collector dies with all that it waits for, and another one goes on.
    fn die(&mut self) {
        self.due.retain(|(_, due)| matches!(due, Due::Event(_) | Due::Wish(_)));
        self.session += 1;
        let (next, actions) = Machine::new(self.world.plan.clone(), &self.watch.start(self.now), 7, self.now);
        self.machine = next;
        self.perform(&actions);
    }

    /// To the end, which must come; gives the time that it took.
    pub(super) fn run(&mut self) -> Duration {
        let begin = self.now;
        let mut deaths: VecDeque<Duration> = self.world.deaths.iter().map(|after| begin + *after).collect();
        let mut steps = 0;
        while !self.watch.is_over {
            steps += 1;
            assert!(steps < 20_000, "it does not end: {:?} in {:?}", self.world, self.machine.phase());
            let next = [self.machine.next_tick(), self.due.front().map(|(at, _)| *at), deaths.front().copied()];
            self.now = self.now.max(next.into_iter().flatten().min().expect("something is under way"));
            if deaths.front().is_some_and(|at| *at <= self.now) {
                deaths.pop_front();
                self.die();
            } else if let Some(at) = self.last_word() {
                // Nothing else is judged, or goes on, before it is durable.
                self.now = self.now.max(at);
                let place = self.due.iter().position(|(_, due)| matches!(due, Due::Heard(_)));
                if let Some((_, Due::Heard(guest))) = place.and_then(|place| self.due.remove(place)) {
                    self.step(Input::Guest(guest));
                }
            } else if self.due.front().is_some_and(|(at, _)| *at <= self.now) {
                let due = self.due.pop_front().map(|(_, due)| due);
                if let Some(input) = due.and_then(|due| self.input(due)) {
                    self.step(input);
                }
            } else {
                self.step(Input::Tick);
            }
        }
        assert!(self.watch.is_concluded() || self.machine.phase() == Phase::TakenOver);
        self.now - begin
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Invariant 7 and the end of everything: whatever the world does, there is a verdict in bounded time; and no change of
    /// the phase is another than the table has it.
    #[test]
    fn every_world_comes_to_its_end(world in world()) {
        let last_death = world.deaths.last().copied().unwrap_or_default();
        let (destroy_after, stop_grace) = (world.destroy_after, world.plan.stop_grace);
        let mut run = Run::new(world);
        let took = run.run();
        // A command that comes while Incus fails waits for nothing; destroying is tried for two minutes.
        let bound = destroy_after.max(last_death) + stop_grace + Duration::from_secs(2 + 3 + 1 + 125);
        prop_assert!(took <= bound, "{:?} of {:?}", took, bound);
        for transition in &run.seen {
            prop_assert!(TRANSITIONS.contains(transition), "{:?} is not in the table", transition);
        }
    }
}
