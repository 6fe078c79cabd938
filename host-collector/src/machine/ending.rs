//! From an end to nothing: it is decided once, outputs are collected, the verdict is made durable, and then the policies
//! say what becomes of the instance and whether the runtime begins anew.

use std::time::Duration;

use pika_cloud_common::Command;
use pika_cloud_common::spec::{OutputCollectionMode, RestartPolicy, RetentionPolicy};
use pika_cloud_common::verdict::Outcome;

use super::{Action, CallFailure, Destroyed, EndDecision, Machine, Phase, Settled};

/// How long Incus may keep failing to destroy an instance before it is left to a later start.
const DESTROY_PATIENCE: Duration = Duration::from_secs(120);

impl Machine {
    pub(super) fn command(&mut self, command: Command, now: Duration, actions: &mut Vec<Action>) {
        if matches!(self.phase, Phase::Done | Phase::TakenOver) || self.command >= Some(command) {
            return;
        }
        self.command = Some(command);
        actions.push(Action::Command(command));
        match self.phase {
            Phase::Resting => self.let_go(now, actions),
            Phase::Kept if !self.keeps() => self.destroy(actions),
            _ => self.cancel(now, actions),
        }
    }

    /// A workload that runs gets its grace; whatever else is under way ends now.
    pub(super) fn cancel(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if !self.may_end() {
            return;
        }
        let end = EndDecision::new(Outcome::Cancelled, "cancelled");
        if self.phase == Phase::Live {
            self.decide(end, now, actions);
            self.terminate(now, actions);
        } else {
            self.end(end, now, actions);
        }
    }

    /// Where an end leads to; the first word stands (Invariant 2).
    pub(super) fn end(&mut self, end: EndDecision, now: Duration, actions: &mut Vec<Action>) {
        if self.phase == Phase::Terminating {
            // What ends now is what was to be ended.
            return self.collect(actions);
        }
        if self.may_end() {
            self.decide(end, now, actions);
            self.collect(actions);
        }
    }

    pub(super) fn decide(&mut self, end: EndDecision, now: Duration, actions: &mut Vec<Action>) {
        if self.ended.is_none() {
            // Booting is no life: an instance that never comes up would never run out of restarts.
            self.lived = self.contact.workload_at.map_or(Duration::ZERO, |at| now.saturating_sub(at));
            self.ended = Some(end.clone());
            actions.push(Action::End(end));
        }
    }

    /// Invariant 7: on every terminal path, but for a policy that wants nothing. What was started and never heard has its
    /// console read all the same, as evidence.
    pub(super) fn collect(&mut self, actions: &mut Vec<Action>) {
        let was_heard = self.contact.booted || !self.provision.start_asked;
        if self.plan.collect == OutputCollectionMode::None && was_heard && !self.leaves_workload() {
            return self.conclude(actions);
        }
        self.enter(Phase::Collecting);
        actions.push(Action::Collect);
    }

    /// Whether what was ended from here would run on in an instance that is kept: collecting begins with its end.
    fn leaves_workload(&self) -> bool {
        let outcome = self.ended.as_ref().map(|end| &end.outcome);
        let decided_here =
            matches!(outcome, Some(Outcome::Cancelled | Outcome::TimedOut { .. } | Outcome::Unreachable));
        decided_here && self.contact.start_sent && self.keeps()
    }

    pub(super) fn conclude(&mut self, actions: &mut Vec<Action>) {
        self.enter(Phase::Concluding);
        actions.push(Action::Conclude);
    }

    /// The verdict is durable: what the policies say comes next.
    pub(super) fn let_go(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if !self.keeps() {
            return self.destroy(actions);
        }
        if let Some(delay) = self.restart_delay() {
            return self.rest(false, delay, now, actions);
        }
        let time = (self.plan.retention == RetentionPolicy::DebugKeep).then_some(self.plan.debug_keep);
        actions.push(Action::Keep(time));
        self.settle(Settled::Kept(time), now, actions);
    }

    /// Whether the policy lets the instance stay, after what was wanted so far.
    fn keeps(&self) -> bool {
        self.plan.retention.keeps_after(self.command)
    }

    pub(super) fn destroy(&mut self, actions: &mut Vec<Action>) {
        self.enter(Phase::Destroying);
        actions.push(Action::Destroy);
    }

    pub(super) fn destroyed(
        &mut self,
        answer: Result<Destroyed, CallFailure>,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        if self.phase != Phase::Destroying {
            return;
        }
        match answer {
            // It would be there again behind our back.
            Ok(Destroyed::Gone) if self.may_appear(now) => self.retry.later(now),
            Ok(Destroyed::Gone) => {
                if let Some(delay) = self.restart_delay() {
                    return self.rest(true, delay, now, actions);
                }
                self.enter(Phase::Done);
                actions.push(Action::Finish { destroyed: true, restart_in: None });
            }
            Ok(Destroyed::TakenOver { owner, term }) => self.give_up_to(owner, term, actions),
            Err(failure) if failure.transient && self.retry.is_patient(DESTROY_PATIENCE, now) => self.retry.later(now),
            // The journal says that it is not finished: the next start tries again.
            Err(_) => self.enter(Phase::Done),
        }
    }

    /// How long to wait before the next incarnation; `None` where there is to be none.
    fn restart_delay(&self) -> Option<Duration> {
        let is_wanted = match (&self.ended.as_ref()?.outcome, self.plan.restart) {
            (_, RestartPolicy::Never) | (Outcome::Completed { .. }, RestartPolicy::OnFailure) => false,
            (_, RestartPolicy::OnFailure | RestartPolicy::Always) => self.command.is_none(),
        };
        let in_a_row = self.restarts_in_a_row();
        let delay = self.plan.restart_backoff.saturating_mul(1_u32.checked_shl(in_a_row).unwrap_or(u32::MAX));
        (is_wanted && in_a_row < self.plan.max_restarts).then_some(delay.min(self.plan.restart_backoff_cap))
    }

    /// One that lived long enough was a good one, whatever ended it.
    fn restarts_in_a_row(&self) -> u32 {
        if self.lived >= self.plan.restart_backoff_cap { 0 } else { self.restarts }
    }

    fn rest(&mut self, destroyed: bool, delay: Duration, now: Duration, actions: &mut Vec<Action>) {
        actions.push(Action::Finish { destroyed, restart_in: Some(delay) });
        self.settle(Settled::Resting(delay), now, actions);
    }

    /// Enters the phase that the journal tells.
    pub(super) fn settle(&mut self, settled: Settled, now: Duration, actions: &mut Vec<Action>) {
        match settled {
            Settled::Finished => self.enter(Phase::Done),
            Settled::TakenOver => self.enter(Phase::TakenOver),
            Settled::Resting(left) => {
                self.enter(Phase::Resting);
                self.deadlines.settled = Some(now + left);
                if self.command.is_some() {
                    self.let_go(now, actions);
                }
            }
            Settled::Kept(left) => {
                self.enter(Phase::Kept);
                self.deadlines.settled = left.map(|left| now + left);
                // Not at the next tick: whoever drives it to where it is kept would leave it (Invariant 4).
                if !self.keeps() || left.is_some_and(|left| left.is_zero()) {
                    self.destroy(actions);
                }
            }
        }
    }

    /// The next incarnation of the same runtime.
    pub(super) fn begin_again(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let restarts = self.restarts_in_a_row().saturating_add(1);
        let next = Self::fresh(self.plan.clone(), restarts, self.retry.random, now);
        *self = next;
        actions.push(Action::Begin { restarts });
        actions.push(Action::Look);
    }
}
