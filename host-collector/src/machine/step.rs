//! The transitions.

use std::time::Duration;

use pika_cloud_common::State;
use pika_cloud_common::spec::{OutputCollectionMode, RetentionPolicy};
use pika_cloud_common::verdict::{DeathCause, Outcome, Watchdog};

use super::types::{Action, CallFailure, EndDecision, Found, Guest, Input, Phase, Plan, SessionLoss, Start};
use pika_cloud_common::limits::PEER_TIMEOUT;

/// Between two tries of what failed: doubled from the first to the last.
const FIRST_RETRY: Duration = Duration::from_millis(50);
const LAST_RETRY: Duration = Duration::from_secs(2);

/// How long Incus may keep failing in passing ways before provisioning is given up.
const PROVISION_PATIENCE: Duration = Duration::from_secs(60);

/// How long Incus may keep failing to destroy an instance before it is left to a later start.
const DESTROY_PATIENCE: Duration = Duration::from_secs(120);

/// Sessions in a row that a guest may break before it counts as one that does not keep the contract.
const MAX_BROKEN_SESSIONS: u32 = 3;

/// A session that held for so long was a good one, whatever ended it.
const GOOD_SESSION: Duration = PEER_TIMEOUT;

/// Starts of an instance that stops each time before its agent has answered.
const MAX_STARTS: u32 = 3;

/// Beyond the guest's own deadline, so that it can say its last word first; and for a deadline that passed while no
/// collector ran, from its start on: what the guest said meanwhile is still to be read.
const RUN_BACKSTOP: Duration = Duration::from_secs(5);

/// The least time that a deadline leaves after a start, so that what the guest said meanwhile is heard first.
const CATCH_UP: Duration = Duration::from_millis(750);

/// How long an open session takes at most to bring what was said before it.
const RECHECK: Duration = Duration::from_millis(500);

/// Beyond the grace, for the terminal event to arrive.
const STOP_MARGIN: Duration = Duration::from_secs(2);

/// Decides what happens next to one incarnation.
#[derive(Debug)]
pub struct Machine {
    plan: Plan,
    phase: Phase,
    booted: bool,
    start_sent: bool,
    unreachable: bool,
    ended: Option<EndDecision>,
    /// Why Incus would not create the instance; what it made of the call all the same is looked at first.
    create_refused: Option<CallFailure>,
    /// The same of the start.
    start_refused: Option<CallFailure>,
    /// When this collector took it up.
    began: Duration,
    heard_at: Duration,
    /// When the session was opened.
    live_since: Duration,
    /// Before the next session, where this one does not hold: doubled from the first to the last.
    session_delay: Duration,
    broken_sessions: u32,
    /// How often the instance was started from here without a word from its agent.
    starts: u32,
    /// When what is waited for is tried again.
    retry_at: Option<Duration>,
    retry_delay: Duration,
    /// Since when the current kind of call has been failing.
    failing_since: Option<Duration>,
    boot_deadline: Option<Duration>,
    run_deadline: Option<Duration>,
    stop_deadline: Option<Duration>,
}

impl Machine {
    /// Goes on from where the journal left off, and says what to do first.
    pub fn new(plan: Plan, start: &Start, now: Duration) -> (Self, Vec<Action>) {
        let ended = start.ended.as_ref().map(|ended| EndDecision {
            outcome: ended.outcome.clone(),
            message: ended.message.clone(),
            error: ended.error.clone(),
        });
        let mut machine = Self {
            phase: Phase::Looking,
            booted: start.booted,
            start_sent: start.start_sent_ago.is_some(),
            unreachable: false,
            ended,
            create_refused: None,
            start_refused: None,
            began: now,
            heard_at: now,
            live_since: now,
            session_delay: FIRST_RETRY,
            broken_sessions: 0,
            starts: 0,
            retry_at: None,
            retry_delay: FIRST_RETRY,
            failing_since: None,
            boot_deadline: None,
            run_deadline: None,
            stop_deadline: None,
            plan,
        };
        machine.run_deadline = start.start_sent_ago.and_then(|ago| machine.run_deadline(now, ago));
        let mut actions = Vec::new();
        match start {
            Start { finished: true, .. } => machine.phase = Phase::Done,
            Start { concluded: true, .. } => machine.let_go(&mut actions),
            Start { ended: Some(_), collection: Some(_), .. } => machine.conclude(&mut actions),
            Start { ended: Some(_), .. } => machine.collect(&mut actions),
            // The collector died between the guest's last word and what follows from it.
            Start { last_word: Some(end), .. } => machine.end(end.clone(), &mut actions),
            _ => actions.push(Action::Look),
        }
        (machine, actions)
    }

    /// Where it stands.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether the guest's workload was asked for, now or by an earlier collector.
    pub fn start_sent(&self) -> bool {
        self.start_sent
    }

    /// When [`Input::Tick`] is due; earlier ones do no harm. Invariant 3: no deadline is left out of it.
    pub fn next_tick(&self) -> Option<Duration> {
        let silence = self.watches_silence().then(|| {
            let next = if self.unreachable { self.plan.silence } else { self.plan.silence.min(PEER_TIMEOUT) };
            self.heard_at + next
        });
        let boot = self.boot_deadline.filter(|_| self.watches_boot());
        let run = self.run_deadline.filter(|_| self.may_end());
        let stop = self.stop_deadline.filter(|_| self.phase == Phase::Stopping);
        [silence, boot, run, stop, self.retry_at].into_iter().flatten().min()
    }

    /// Takes an input, and says what to do.
    pub fn step(&mut self, input: Input, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        match input {
            Input::Looked(answer) => self.looked(answer, now, &mut actions),
            Input::Created(answer) => self.created(answer, now, &mut actions),
            Input::Started(answer) => self.started(answer, now, &mut actions),
            Input::Heard => self.heard(now, &mut actions),
            Input::Guest(guest) => self.guest(guest, now, &mut actions),
            Input::NoSession(loss) => self.no_session(loss, now, &mut actions),
            Input::Collected(_) if self.phase == Phase::Collecting => self.conclude(&mut actions),
            Input::Concluded if self.phase == Phase::Concluding => self.let_go(&mut actions),
            Input::Collected(_) | Input::Concluded => {}
            Input::Destroyed(answer) => self.destroyed(answer, now),
            Input::Cancel => self.cancel(now, &mut actions),
            Input::Tick => self.tick(now, &mut actions),
        }
        actions
    }

    fn looked(&mut self, answer: Result<Found, CallFailure>, now: Duration, actions: &mut Vec<Action>) {
        if self.phase != Phase::Looking {
            return;
        }
        let found = match answer {
            Ok(found) => found,
            Err(failure) => {
                return self.call_failed(failure, "Incus could not be asked for the instance", now, actions);
            }
        };
        match found {
            Found::Absent if self.create_refused.is_some() => {
                let refused = self.create_refused.take().map(|failure| failure.message).unwrap_or_default();
                let end = EndDecision::new(Outcome::ProvisionFailed, "Incus could not create the instance");
                self.end(end.because(refused), actions);
            }
            Found::Stopped if self.start_refused.is_some() => {
                let refused = self.start_refused.take().map(|failure| failure.message).unwrap_or_default();
                let end = EndDecision::new(Outcome::ProvisionFailed, "Incus could not start the instance");
                self.end(end.because(refused), actions);
            }
            // Nothing was started in it, so that making it is harmless, again or for the first time.
            Found::Absent if !self.start_sent && self.starts < MAX_STARTS => {
                // Only the call itself shows whether it goes better now, so that what failed before still counts.
                (self.phase, self.booted) = (Phase::Creating, false);
                actions.push(Action::Record(State::Provisioning, "creating the instance".to_owned()));
                actions.push(Action::Create);
            }
            Found::Stopped if !self.booted && self.starts < MAX_STARTS => self.start_instance(actions),
            Found::Running => self.dial(now, actions),
            Found::Changing(_) => {
                self.boot_deadline.get_or_insert(now + self.plan.boot);
                self.retry(now);
            }
            Found::Absent => {
                self.end(EndDecision::died(DeathCause::InstanceGone, "the instance is gone"), actions);
            }
            Found::Stopped => {
                self.end(EndDecision::died(DeathCause::InstanceStopped, "the instance stopped"), actions);
            }
            Found::Error => {
                let end = EndDecision::died(DeathCause::InstanceError, "Incus cannot tell what became of the instance");
                self.end(end, actions);
            }
        }
    }

    fn created(&mut self, answer: Result<(), CallFailure>, now: Duration, actions: &mut Vec<Action>) {
        if self.phase != Phase::Creating {
            return;
        }
        match answer {
            Ok(()) => {
                self.enter(Phase::Starting);
                self.boot_deadline = None;
                self.start_instance(actions);
            }
            // The create of a collector that died may have come to its end in between.
            Err(failure) if !failure.transient => {
                self.create_refused = Some(failure);
                self.phase = Phase::Looking;
                actions.push(Action::Look);
            }
            Err(failure) => self.call_failed(failure, "Incus could not create the instance", now, actions),
        }
    }

    fn start_instance(&mut self, actions: &mut Vec<Action>) {
        (self.phase, self.create_refused) = (Phase::Starting, None);
        actions.push(Action::Record(State::Provisioning, "starting the instance".to_owned()));
        actions.push(Action::Start);
    }

    fn started(&mut self, answer: Result<(), CallFailure>, now: Duration, actions: &mut Vec<Action>) {
        if self.phase != Phase::Starting {
            return;
        }
        match answer {
            Ok(()) => {
                self.starts += 1;
                self.dial(now, actions);
            }
            // It may run already: the start of a collector that died came to its end in between.
            Err(failure) if !failure.transient => {
                self.start_refused = Some(failure);
                self.phase = Phase::Looking;
                actions.push(Action::Look);
            }
            Err(failure) => self.call_failed(failure, "Incus could not start the instance", now, actions),
        }
    }

    fn dial(&mut self, now: Duration, actions: &mut Vec<Action>) {
        self.boot_deadline.get_or_insert(now + self.plan.boot);
        (self.phase, self.create_refused, self.start_refused) = (Phase::Dialing, None, None);
        self.retry_at = None;
        self.failing_since = None;
        actions.push(Action::Dial);
    }

    fn heard(&mut self, now: Duration, actions: &mut Vec<Action>) {
        self.heard_at = now;
        if self.watches_silence() && std::mem::take(&mut self.unreachable) {
            actions.push(Action::Record(State::Booted, "the guest is heard again".to_owned()));
        }
    }

    fn guest(&mut self, guest: Guest, now: Duration, actions: &mut Vec<Action>) {
        self.heard(now, actions);
        match guest {
            Guest::Opened { run_lost: true } => {
                self.end(
                    EndDecision::died(
                        DeathCause::Rebooted,
                        "the guest began anew: it booted again, or its files were lost",
                    ),
                    actions,
                );
            }
            // Also where one is open: a word of a session that was lost meanwhile may have come late, and opened that.
            Guest::Opened { .. } if matches!(self.phase, Phase::Dialing | Phase::Live) => self.opened(now, actions),
            Guest::Terminal(end) => self.end(end, actions),
            Guest::Refused(message) => {
                let end = EndDecision::new(Outcome::ProvisionFailed, "the guest refused to start the workload");
                self.end(end.because(message), actions);
            }
            Guest::Rewound => {
                let message = "the guest was restored to an earlier state";
                self.end(EndDecision::died(DeathCause::Rewound, message), actions);
            }
            Guest::Opened { .. } | Guest::Accepted | Guest::State(_) => {}
        }
    }

    /// The workload is asked for in every session: the guest starts it at most once for a request (Invariant 9).
    fn opened(&mut self, now: Duration, actions: &mut Vec<Action>) {
        self.phase = Phase::Live;
        self.live_since = now;
        (self.retry_at, self.failing_since) = (None, None);
        if !self.booted {
            self.booted = true;
            actions.push(Action::Record(State::Booted, "the agent answered".to_owned()));
        }
        if !self.start_sent {
            self.start_sent = true;
            self.run_deadline = self.run_deadline(now, Duration::ZERO);
        }
        actions.push(Action::StartWorkload);
    }

    fn no_session(&mut self, loss: SessionLoss, now: Duration, actions: &mut Vec<Action>) {
        if !matches!(self.phase, Phase::Dialing | Phase::Live) {
            return;
        }
        actions.push(Action::HangUp);
        if self.phase == Phase::Live {
            self.weigh_session(now);
        }
        self.phase = Phase::Looking;
        match loss {
            // Whether the instance still runs is Incus's to say.
            SessionLoss::Lost(_) | SessionLoss::NewStream => self.retry(now),
            SessionLoss::NoAgent(message) if !self.booted => {
                let end = EndDecision::new(Outcome::ProvisionFailed, "the image has no usable pika-guest");
                self.end(end.because(message), actions);
            }
            SessionLoss::Refused(message) => {
                let end = EndDecision::new(Outcome::ProvisionFailed, "the guest's agent and this host do not fit");
                self.end(end.because(message), actions);
            }
            SessionLoss::NoAgent(message) | SessionLoss::Broken(message) => {
                self.broken_sessions += 1;
                if self.broken_sessions < MAX_BROKEN_SESSIONS {
                    return self.retry(now);
                }
                let text = "the guest no longer keeps the contract";
                self.end(EndDecision::died(DeathCause::ContractBroken, text).because(message), actions);
            }
        }
    }

    /// A guest whose sessions end at once, again and again, is dialled less and less often.
    fn weigh_session(&mut self, now: Duration) {
        if now.saturating_sub(self.live_since) >= GOOD_SESSION {
            (self.broken_sessions, self.session_delay) = (0, FIRST_RETRY);
        }
        self.retry_delay = self.session_delay;
        self.session_delay = (self.session_delay * 2).min(LAST_RETRY);
    }

    fn cancel(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if !self.may_end() {
            return;
        }
        let end = EndDecision::new(Outcome::Cancelled, "cancelled");
        if self.phase == Phase::Live {
            self.decide(end, actions);
            self.enter(Phase::Stopping);
            self.stop_deadline = Some(now + self.plan.stop_grace + STOP_MARGIN);
            actions.push(Action::Terminate);
        } else {
            self.end(end, actions);
        }
    }

    fn tick(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let due = |deadline: Option<Duration>| deadline.is_some_and(|deadline| deadline <= now);
        if self.phase == Phase::Stopping && due(self.stop_deadline) {
            return self.collect(actions);
        }
        if self.may_end() && due(self.run_deadline) && self.may_be_behind(now) {
            self.run_deadline = Some(now + RECHECK);
            return;
        }
        if self.may_end() && due(self.run_deadline) {
            let text = "the workload ran beyond run_secs, and the guest did not end it";
            return self.end(timed_out(Watchdog::Run, text), actions);
        }
        if self.watches_boot() && due(self.boot_deadline) {
            return self.end(timed_out(Watchdog::Boot, "the agent did not answer within boot_secs"), actions);
        }
        if self.watches_silence() {
            let silent = now.saturating_sub(self.heard_at);
            if silent >= self.plan.silence {
                let text = "the guest was not heard within silence_secs";
                return self.end(EndDecision::new(Outcome::Unreachable, text), actions);
            }
            if silent >= PEER_TIMEOUT && !self.unreachable {
                self.unreachable = true;
                actions.push(Action::Record(State::Unreachable, "the guest is not heard".to_owned()));
            }
        }
        if due(self.retry_at) {
            self.retry_at = None;
            match self.phase {
                Phase::Looking => actions.push(Action::Look),
                Phase::Destroying => actions.push(Action::Destroy),
                _ => {}
            }
        }
    }

    fn destroyed(&mut self, answer: Result<(), CallFailure>, now: Duration) {
        if self.phase != Phase::Destroying {
            return;
        }
        match answer {
            Err(failure) if failure.transient && self.is_patient(DESTROY_PATIENCE, now) => self.retry(now),
            // After a failure that stays, the journal says that it is not finished: the next start tries again.
            Ok(()) | Err(_) => self.enter(Phase::Done),
        }
    }

    /// The one place where an end is decided; the first word stands (Invariant 2).
    fn end(&mut self, end: EndDecision, actions: &mut Vec<Action>) {
        if self.phase == Phase::Stopping {
            // What ends now is what was to be ended.
            return self.collect(actions);
        }
        if self.may_end() {
            self.decide(end, actions);
            self.collect(actions);
        }
    }

    fn decide(&mut self, end: EndDecision, actions: &mut Vec<Action>) {
        if self.ended.is_none() {
            self.ended = Some(end.clone());
            actions.push(Action::End(end));
        }
    }

    /// Invariant 7: on every terminal path, but for a policy that wants nothing.
    fn collect(&mut self, actions: &mut Vec<Action>) {
        if self.plan.collect == OutputCollectionMode::None {
            return self.conclude(actions);
        }
        self.enter(Phase::Collecting);
        actions.push(Action::Collect);
    }

    fn conclude(&mut self, actions: &mut Vec<Action>) {
        self.enter(Phase::Concluding);
        actions.push(Action::Conclude);
    }

    fn let_go(&mut self, actions: &mut Vec<Action>) {
        match self.plan.retention {
            RetentionPolicy::DestroyOnCompletion => {
                self.enter(Phase::Destroying);
                actions.push(Action::Destroy);
            }
            RetentionPolicy::KeepUntilStopped | RetentionPolicy::DebugKeep => {
                self.enter(Phase::Done);
                actions.push(Action::Keep);
            }
        }
    }

    /// Incus failed a call while the instance is being provided: again where that may help, else that is the end.
    fn call_failed(&mut self, failure: CallFailure, text: &str, now: Duration, actions: &mut Vec<Action>) {
        if failure.transient && self.is_patient(PROVISION_PATIENCE.max(self.plan.silence), now) {
            // What Incus made of the call is read, never guessed.
            self.phase = Phase::Looking;
            return self.retry(now);
        }
        let outcome = if self.start_sent { Outcome::Unreachable } else { Outcome::ProvisionFailed };
        self.end(EndDecision::new(outcome, text).because(failure.message), actions);
    }

    fn is_patient(&mut self, patience: Duration, now: Duration) -> bool {
        let since = *self.failing_since.get_or_insert(now);
        now.saturating_sub(since) < patience
    }

    fn retry(&mut self, now: Duration) {
        self.retry_at = Some(now + self.retry_delay);
        self.retry_delay = (self.retry_delay * 2).min(LAST_RETRY);
    }

    /// Enters a phase by success, so that what failed before it counts no more.
    fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.retry_at = None;
        self.retry_delay = FIRST_RETRY;
        self.failing_since = None;
    }

    /// Whether the end is still open.
    fn may_end(&self) -> bool {
        self.ended.is_none()
            && matches!(self.phase, Phase::Looking | Phase::Creating | Phase::Starting | Phase::Dialing | Phase::Live)
    }

    fn watches_boot(&self) -> bool {
        !self.booted && matches!(self.phase, Phase::Looking | Phase::Dialing)
    }

    fn watches_silence(&self) -> bool {
        self.booted && matches!(self.phase, Phase::Looking | Phase::Dialing | Phase::Live)
    }

    /// Whether the guest may have said its last word while nobody listened: shortly after a start, until a session has
    /// been open long enough to bring it.
    fn may_be_behind(&self, now: Duration) -> bool {
        let listens = self.phase == Phase::Live && now >= self.live_since + RECHECK;
        now < self.began + RUN_BACKSTOP && !listens
    }

    fn run_deadline(&self, now: Duration, ago: Duration) -> Option<Duration> {
        let budget = self.plan.run? + self.plan.stop_grace + RUN_BACKSTOP;
        Some(now + budget.saturating_sub(ago).max(CATCH_UP))
    }
}

fn timed_out(watchdog: Watchdog, text: &str) -> EndDecision {
    EndDecision::new(Outcome::TimedOut { watchdog }, text)
}
