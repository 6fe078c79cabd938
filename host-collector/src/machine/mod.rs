//! What happens next: the lifecycle of a runtime as a plain state machine, `(state, input, now) -> actions`.
//!
//! It does no I/O, has no clock and knows neither Incus nor a byte of the session; the core feeds it what they answer.
//! `now` is the host's monotonic time. The core makes durable what an input rests on before it feeds it.
//!
//! ```text
//!  ┌► Looking ──absent──► Creating ──► Starting ──► Dialing ──► Live ──a command, ready_secs──► Terminating
//!  │   ▲ ▲ ├──stopped───────────────────▲              ▲ │        │ │                               │
//!  │   │ │ ├──running──────────────────────────────────┘ │        │ └──any other end──► Collecting ◄┘
//!  │   │ │ └──of an earlier run──► Halting               │        │                        │
//!  │   │ └────────────────────────────┘                  │        │                    Concluding
//!  │   └──────────────no session─────────────────────────┴────────┘                        │
//!  └─────── Resting ◄──restart_policy── Destroying ◄──retention_policy─────────────────────┤
//!                                         │   └◄──stop, destroy, its time── Kept ◄─────────┘
//!                                         └──► Done
//! ```
//!
//! Happy path: there is no instance, so it is created and started; the agent is dialled and asked to start the workload;
//! its terminal event is the end; outputs are collected; the verdict is made durable; the instance is destroyed.
//!
//! Failure paths: every end but the guest's own word is decided in one place, once: Incus refuses
//! (`provision_failed`), a deadline passes (`timed_out`), the instance or its supervisor is gone (`guest_died`), the guest is
//! not heard (`unreachable`), a command comes (`cancelled`). Whatever the end, collection is tried within a budget of its
//! own (Invariant 7), then the verdict is made durable (Invariant 2), and only then is anything destroyed. Another owner in
//! the instance's labels ends it without a verdict: `TakenOver`, from any phase in which Incus is asked (Invariant 6).
//!
//! A guest that was restored to an earlier state ends its incarnation, with a verdict of its own (`guest_died`, `rewound`).
//! What the journal has of it happened, and what the guest has now contradicts that: nothing that it says from here on can be
//! put behind what it said before (Invariant 1), and asking it once more could run twice what was to run once (Invariant 9).
//! A new incarnation begins with the request, the stream and the boot of its own, and whether one does is for `restart_policy`
//! to say, as after any other end: whoever restored the guest may have wanted just that state.
//!
//! Every phase before `Live` may end as `Live` does; where nothing is to be collected, the way to `Concluding` is the
//! direct one; and an instance that stays goes from `Concluding` to `Resting`. Every way from one phase to another, as
//! [`TRANSITIONS`] has it and a test holds this text to it:
//!
#![doc = include_str!("transitions.md")]

mod ending;
mod guest;
mod phase;
mod provide;
mod transitions;
mod types;
mod watchdog;

use std::time::Duration;

use pika_cloud_common::Command;

pub use phase::{Phase, Transition, Trigger};
pub(crate) use provide::MAX_STARTS;
pub use transitions::TRANSITIONS;
pub use types::{
    Action, CallFailure, Destroyed, EndDecision, Found, Guest, Input, Plan, SessionLoss, Settled, Start, last_word,
};

#[cfg(test)]
mod tests;

/// Between two tries of what failed: doubled from the first to the last, and a random part of it more.
const FIRST_RETRY: Duration = Duration::from_millis(50);
const LAST_RETRY: Duration = Duration::from_secs(2);

/// Decides what happens next to one runtime.
#[derive(Debug)]
pub struct Machine {
    plan: Plan,
    phase: Phase,
    /// The change of phase that the last step made.
    transition: Option<Transition>,
    command: Option<Command>,
    /// Restarts in a row that led to this incarnation.
    restarts: u32,
    /// From its workload's start to its end, once that is decided.
    lived: Duration,
    /// When this collector took it up.
    began: Duration,
    provision: Provision,
    contact: Contact,
    deadlines: Deadlines,
    retry: Retry,
    ended: Option<EndDecision>,
}

/// How far the instance is.
#[derive(Debug, Default)]
struct Provision {
    /// Incus was asked to start it for this incarnation: what runs is its own boot.
    start_asked: bool,
    /// How often the instance was started from here without a word from its agent.
    starts: u32,
    /// Why Incus would not create it; what it made of the call all the same is looked at first.
    create_refused: Option<CallFailure>,
    /// The same of the start.
    start_refused: Option<CallFailure>,
    /// Incus could not tell what became of it, when it was last asked.
    in_error: bool,
    /// Until when a create whose answer was not heard may make the instance.
    unsure_until: Option<Duration>,
}

/// What is known of the guest.
#[derive(Debug, Default)]
struct Contact {
    booted: bool,
    is_ready: bool,
    start_sent: bool,
    /// When the workload was asked for first.
    workload_at: Option<Duration>,
    unreachable: bool,
    heard_at: Duration,
    /// When the session was opened.
    live_since: Duration,
    /// Before the next session, where this one does not hold: doubled from the first to the last.
    session_delay: Duration,
    broken_sessions: u32,
    /// Why the last session was lost, or could not be had, where none was opened since.
    last_loss: Option<String>,
}

/// When what is to happen; `None` where nothing is.
#[derive(Debug, Default)]
struct Deadlines {
    boot: Option<Duration>,
    ready: Option<Duration>,
    progress: Option<Duration>,
    /// Beyond which no progress moves that.
    progress_cap: Option<Duration>,
    run: Option<Duration>,
    /// For the guest's answer to the start of its workload.
    answer: Option<Duration>,
    /// For the workload's end by itself.
    stop: Option<Duration>,
    /// The end of a keeping, or of a rest.
    settled: Option<Duration>,
}

/// What failed is tried again.
#[derive(Debug)]
struct Retry {
    at: Option<Duration>,
    delay: Duration,
    /// Since when the current kind of call has been failing.
    failing_since: Option<Duration>,
    /// Spreads the tries of many runtimes.
    random: u64,
}

impl Retry {
    fn new(random: u64) -> Self {
        Self { at: None, delay: FIRST_RETRY, failing_since: None, random: random | 1 }
    }

    fn is_patient(&mut self, patience: Duration, now: Duration) -> bool {
        let since = *self.failing_since.get_or_insert(now);
        now.saturating_sub(since) < patience
    }

    /// Later: up to a quarter beyond the delay, so that a thousand runtimes do not ask at once.
    fn later(&mut self, now: Duration) {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let jitter = self.delay * u32::from(self.random.to_be_bytes()[3]) / 1024;
        self.at = Some(now + self.delay + jitter);
        self.delay = (self.delay * 2).min(LAST_RETRY);
    }

    /// What failed before counts no more.
    fn forget(&mut self) {
        (self.at, self.delay, self.failing_since) = (None, FIRST_RETRY, None);
    }
}

impl Machine {
    /// Goes on from where the journal left off, and says what to do first. `random` spreads the retries of many runtimes.
    pub fn new(plan: Plan, start: &Start, random: u64, now: Duration) -> (Self, Vec<Action>) {
        let mut machine = Self::fresh(plan, start.restarts, random, now);
        machine.lived = start.lived;
        machine.command = start.command;
        machine.ended.clone_from(&start.ended);
        machine.provision.start_asked = start.start_asked.is_some();
        machine.provision.unsure_until = start.create_unanswered.then_some(now + provide::CREATE_SETTLES);
        machine.contact.booted = start.booted.is_some();
        machine.contact.is_ready = start.is_ready;
        machine.contact.start_sent = start.start_sent.is_some();
        machine.contact.workload_at = start.start_sent.map(|ago| now.saturating_sub(ago));
        machine.rebuild_deadlines(start, now);
        let mut actions = Vec::new();
        match start {
            Start { settled: Some(settled), .. } => {
                machine.settle(*settled, now, &mut actions);
                if machine.phase == Phase::Kept {
                    // Somebody may have deleted it while nobody looked.
                    actions.push(Action::Look);
                }
            }
            Start { is_concluded: true, .. } => machine.let_go(now, &mut actions),
            Start { ended: Some(_), is_collected: true, .. } => machine.conclude(&mut actions),
            Start { ended: Some(_), .. } => machine.collect(&mut actions),
            // The collector died between the guest's last word, or a command, and what follows from it.
            Start { last_word: Some(end), .. } => machine.end(end.clone(), now, &mut actions),
            Start { command: Some(_), .. } => machine.cancel(now, &mut actions),
            _ => actions.push(Action::Look),
        }
        (machine, actions)
    }

    fn fresh(plan: Plan, restarts: u32, random: u64, now: Duration) -> Self {
        let contact = Contact { heard_at: now, session_delay: FIRST_RETRY, ..Contact::default() };
        Self {
            plan,
            phase: Phase::Looking,
            transition: None,
            command: None,
            restarts,
            lived: Duration::ZERO,
            began: now,
            provision: Provision::default(),
            contact,
            deadlines: Deadlines::default(),
            retry: Retry::new(random),
            ended: None,
        }
    }

    /// Where it stands.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The change of phase that the last step made, if it made one.
    pub fn transition(&self) -> Option<Transition> {
        self.transition
    }

    /// Restarts in a row that led to this incarnation.
    pub fn restarts(&self) -> u32 {
        self.restarts
    }

    /// Takes an input, and says what to do.
    pub fn step(&mut self, input: Input, now: Duration) -> Vec<Action> {
        let (from, trigger) = (self.phase, input.trigger());
        let mut actions = Vec::new();
        match input {
            Input::Looked(answer) => self.looked(answer, now, &mut actions),
            Input::Created(answer) => self.created(answer, now, &mut actions),
            Input::Started(answer) => self.started(answer, now, &mut actions),
            Input::Halted(answer) => self.halted(answer, now, &mut actions),
            Input::Heard => self.heard(now, &mut actions),
            Input::Guest(guest) => self.guest(guest, now, &mut actions),
            Input::NoSession(loss) => self.no_session(loss, now, &mut actions),
            Input::Collected if self.phase == Phase::Collecting => self.conclude(&mut actions),
            Input::Concluded if self.phase == Phase::Concluding => self.let_go(now, &mut actions),
            Input::Collected | Input::Concluded => {}
            Input::Destroyed(answer) => self.destroyed(answer, now, &mut actions),
            Input::Command(command) => self.command(command, now, &mut actions),
            Input::Woken => self.woken(&mut actions),
            Input::Tick => self.tick(now, &mut actions),
        }
        self.transition = trigger.filter(|_| self.phase != from).map(|on| Transition { from, on, to: self.phase });
        actions
    }

    /// Enters a phase by success, so that what failed before it counts no more.
    fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.retry.forget();
    }

    /// Whether the end is still open.
    fn may_end(&self) -> bool {
        use Phase::{Creating, Dialing, Halting, Live, Looking, Starting};
        self.ended.is_none() && matches!(self.phase, Looking | Creating | Starting | Halting | Dialing | Live)
    }
}
