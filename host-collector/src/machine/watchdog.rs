//! Deadlines: when each is due, what it means that it passed, and how they are rebuilt from a journal.
//!
//! Invariant 3: each fires within a second of its time while a collector runs. What the guest said in time must not be
//! judged as late because it was read late, so a deadline that passes while nobody listens lets a session that is being
//! opened bring that first: for [`GRACE`] at most, and where it passed before this collector began, for [`CATCH_UP`].

use std::time::Duration;

use pika_cloud_common::State;
use pika_cloud_common::limits::PEER_TIMEOUT;
use pika_cloud_common::verdict::{DeathCause, Outcome, Watchdog};

use super::{Action, EndDecision, Machine, Phase, SessionLoss, Start};

/// Beyond the guest's own deadline and its grace, so that it can say its last word first.
const RUN_BACKSTOP: Duration = Duration::from_secs(5);

/// How long a deadline that passed while no collector ran waits for a guest that is not heard yet.
const CATCH_UP: Duration = Duration::from_secs(5);

/// How long any other deadline waits for a session that is being opened.
const GRACE: Duration = Duration::from_millis(400);

/// How long an open session takes at most to bring what was said before it.
const RECHECK: Duration = Duration::from_millis(500);

/// Beyond the grace, for the terminal event to arrive.
const STOP_MARGIN: Duration = Duration::from_secs(2);

impl Machine {
    /// What was due before this collector began is due now; see [`Machine::judged_at`].
    pub(super) fn rebuild_deadlines(&mut self, start: &Start, now: Duration) {
        let due = |since: Option<Duration>, after: Option<Duration>| {
            since.zip(after).map(|(ago, after)| now + after.saturating_sub(ago))
        };
        let deadlines = &mut self.deadlines;
        deadlines.boot = due(start.start_asked, Some(self.plan.boot));
        deadlines.ready = due(start.booted.filter(|_| !start.is_ready), self.plan.ready);
        deadlines.run = due(start.start_sent, self.plan.run.map(|run| run + self.plan.stop_grace + RUN_BACKSTOP));
        deadlines.progress_cap = due(start.start_sent, self.plan.progress_cap);
        let progress =
            due(start.progress.or(start.start_sent).filter(|_| start.start_sent.is_some()), self.plan.progress);
        deadlines.progress = progress.map(|at| deadlines.progress_cap.map_or(at, |cap| at.min(cap)));
    }

    /// The agent answered for the first time.
    pub(super) fn booted(&mut self, now: Duration) {
        self.deadlines.ready = self.plan.ready.filter(|_| !self.contact.is_ready).map(|ready| now + ready);
    }

    /// The workload is asked for, for the first time.
    pub(super) fn workload_asked(&mut self, now: Duration) {
        self.deadlines.run = self.plan.run.map(|run| now + run + self.plan.stop_grace + RUN_BACKSTOP);
        self.deadlines.progress_cap = self.plan.progress_cap.map(|cap| now + cap);
        self.progressed(now);
    }

    /// The guest made progress: the deadline moves on, under its cap.
    pub(super) fn progressed(&mut self, now: Duration) {
        let cap = self.deadlines.progress_cap;
        self.deadlines.progress =
            self.plan.progress.map(|progress| cap.map_or(now + progress, |cap| cap.min(now + progress)));
    }

    /// The end is decided, and the workload may end by itself for a while.
    pub(super) fn terminate(&mut self, now: Duration, actions: &mut Vec<Action>) {
        self.enter(Phase::Terminating);
        self.deadlines.stop = Some(now + self.plan.stop_grace + STOP_MARGIN);
        actions.push(Action::Terminate);
    }

    /// When [`Input::Tick`](super::Input::Tick) is due; earlier ones do no harm. Invariant 3: no deadline is left out of it.
    pub fn next_tick(&self) -> Option<Duration> {
        let Watched { boot, ready, progress, run, answer, silence } = self.watched();
        let stop = self.deadlines.stop.filter(|_| self.phase == Phase::Terminating);
        let settled = self.deadlines.settled.filter(|_| matches!(self.phase, Phase::Kept | Phase::Resting));
        [boot, ready, progress, run, answer, silence, stop, settled, self.retry.at].into_iter().flatten().min()
    }

    /// Those that are watched in the present phase, each with the time at which it is judged.
    fn watched(&self) -> Watched {
        let open = |at: Option<Duration>| at.filter(|_| self.may_end()).map(|at| self.judged_at(at));
        let silence = self.watches_silence().then(|| {
            let next = if self.contact.unreachable { self.plan.silence } else { self.plan.silence.min(PEER_TIMEOUT) };
            self.contact.heard_at + next
        });
        Watched {
            boot: self.deadlines.boot.filter(|_| self.may_end() && !self.contact.booted).map(|at| self.caught_up(at)),
            ready: open(self.deadlines.ready),
            progress: open(self.deadlines.progress),
            run: open(self.deadlines.run),
            answer: self.deadlines.answer.filter(|_| self.phase == Phase::Live),
            silence,
        }
    }

    /// When a deadline for what the guest says is judged: at once where a session was listening, else as soon as one has
    /// brought what was said, and not much later in any case.
    fn judged_at(&self, deadline: Duration) -> Duration {
        let listens_since = self.contact.live_since + RECHECK;
        let is_live = self.phase == Phase::Live;
        if is_live && listens_since <= deadline {
            return deadline;
        }
        let limit = if deadline <= self.began { self.caught_up(deadline) } else { deadline + GRACE };
        if is_live { limit.min(listens_since) } else { limit }
    }

    /// One that passed while no collector ran leaves time to hear a guest that kept it.
    fn caught_up(&self, deadline: Duration) -> Duration {
        if deadline <= self.began { self.began + CATCH_UP } else { deadline }
    }

    pub(super) fn tick(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let due = |deadline: Option<Duration>| deadline.is_some_and(|deadline| deadline <= now);
        match self.phase {
            Phase::Terminating if due(self.deadlines.stop) => return self.collect(actions),
            Phase::Kept if due(self.deadlines.settled) => return self.destroy(actions),
            Phase::Resting if due(self.deadlines.settled) => return self.begin_again(now, actions),
            _ => {}
        }
        let watched = self.watched();
        if let Some((end, has_grace)) = self.overdue(&watched, now) {
            return if has_grace && self.phase == Phase::Live {
                self.decide(end, now, actions);
                self.terminate(now, actions);
            } else {
                self.end(end, now, actions);
            };
        }
        if due(watched.answer) {
            let broken = SessionLoss::Broken("the guest did not answer the start of its workload".to_owned());
            return self.no_session(broken, now, actions);
        }
        if due(watched.silence) && !self.contact.unreachable {
            self.contact.unreachable = true;
            actions.push(Action::Record(State::Unreachable, "the guest is not heard".to_owned()));
        }
        if due(self.retry.at) {
            self.retry.at = None;
            match self.phase {
                Phase::Looking | Phase::Kept => actions.push(Action::Look),
                Phase::Destroying => actions.push(Action::Destroy),
                _ => {}
            }
        }
    }

    /// The end that a deadline makes, if one has passed; and whether the workload may end by itself then.
    fn overdue(&self, watched: &Watched, now: Duration) -> Option<(EndDecision, bool)> {
        let due = |deadline: Option<Duration>| deadline.is_some_and(|deadline| deadline <= now);
        let timed_out = |watchdog, text: &str, limit: Option<Duration>| {
            EndDecision::timed_out(watchdog, format!("{text} ({} s)", limit.unwrap_or_default().as_secs()))
        };
        let plan = &self.plan;
        if due(watched.run) {
            // The guest had its grace, and did not keep it.
            let text = "the guest did not end its workload, which ran beyond run_secs";
            return Some((timed_out(Watchdog::Run, text, plan.run), false));
        }
        if due(watched.ready) {
            let text = "the workload was not ready within ready_secs";
            return Some((timed_out(Watchdog::Ready, text, plan.ready), true));
        }
        if due(watched.progress) {
            let is_capped =
                self.deadlines.progress_cap.is_some() && self.deadlines.progress >= self.deadlines.progress_cap;
            let (text, limit) = if is_capped {
                ("the workload was not done within progress_cap_secs", plan.progress_cap)
            } else {
                ("the workload made no progress within progress_secs", plan.progress)
            };
            return Some((timed_out(Watchdog::Progress, text, limit), true));
        }
        if due(watched.boot) {
            let end = timed_out(Watchdog::Boot, "the agent did not answer within boot_secs", Some(plan.boot));
            return Some((self.with_evidence(end), false));
        }
        let is_silent = self.watches_silence() && now.saturating_sub(self.contact.heard_at) >= plan.silence;
        is_silent.then(|| {
            let text = format!("the guest was not heard within silence_secs ({} s)", plan.silence.as_secs());
            let end = EndDecision::new(Outcome::Unreachable, text);
            (self.with_evidence(end), false)
        })
    }

    /// Why nothing was heard, as far as that is known.
    fn with_evidence(&self, end: EndDecision) -> EndDecision {
        let end = if self.provision.in_error {
            EndDecision::died(DeathCause::InstanceError, "Incus cannot tell what became of the instance")
        } else {
            end
        };
        match &self.contact.last_loss {
            Some(loss) => end.because(loss.as_str()),
            None => end,
        }
    }

    /// Nothing was read from the guest up to now, since the disk has enough to do: that is no silence of the guest's.
    pub fn excuse_silence(&mut self, now: Duration) {
        self.contact.heard_at = self.contact.heard_at.max(now);
    }

    pub(super) fn watches_silence(&self) -> bool {
        self.contact.booted && matches!(self.phase, Phase::Looking | Phase::Dialing | Phase::Live)
    }
}

/// When the deadlines of the present phase are due.
struct Watched {
    boot: Option<Duration>,
    ready: Option<Duration>,
    progress: Option<Duration>,
    run: Option<Duration>,
    answer: Option<Duration>,
    silence: Option<Duration>,
}
