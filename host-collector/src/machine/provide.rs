//! From nothing to a session: what Incus has is read, and what is missing is made.

use std::time::Duration;

use pika_cloud_common::State;
use pika_cloud_common::verdict::{DeathCause, Outcome};

use super::{Action, CallFailure, Deadlines, EndDecision, Found, Machine, Phase, Provision};

/// How long Incus may keep failing in passing ways before provisioning is given up.
const PROVISION_PATIENCE: Duration = Duration::from_secs(60);

/// How long a create may go on behind the back of whoever asked for it and did not hear the answer.
pub(super) const CREATE_SETTLES: Duration = Duration::from_secs(5);

/// What ends a runtime whose instance ended: no agent can be put into one that does not run.
const STOPPED: &str = "the instance stopped, and there is nothing to salvage from a stopped one";

/// Starts of an instance that stops each time before its agent has answered.
pub(crate) const MAX_STARTS: u32 = 3;

impl Machine {
    pub(super) fn looked(&mut self, answer: Result<Found, CallFailure>, now: Duration, actions: &mut Vec<Action>) {
        match (self.phase, answer) {
            (
                Phase::Looking | Phase::Dialing | Phase::Live | Phase::Terminating | Phase::Collecting | Phase::Kept,
                Ok(Found::TakenOver { owner, term }),
            ) => self.give_up_to(owner, term, actions),
            (Phase::Looking, Ok(found)) => self.found(found, now, actions),
            (Phase::Looking, Err(failure)) => {
                // A workload that runs does not end because a question was refused: that may go better in a moment.
                let failure = CallFailure { transient: failure.transient || self.contact.start_sent, ..failure };
                self.call_failed(failure, "Incus could not be asked for the instance", now, actions);
            }
            // Looked at since Incus said that something happened; most of the time it was nothing of ours. Where Incus cannot
            // tell, the guest itself does.
            (Phase::Live | Phase::Dialing, Ok(found @ (Found::Absent | Found::Stopped))) => {
                actions.push(Action::HangUp);
                self.enter(Phase::Looking);
                self.found(found, now, actions);
            }
            // What may still be made behind our back would be left by us all.
            (Phase::Kept, Ok(Found::Absent)) if self.may_appear(now) => self.retry.later(now),
            // A create that nobody hears the end of: Incus tells nobody when it fails.
            (Phase::Kept, Ok(Found::Changing(_))) if self.provision.unsure_until.is_some() => self.retry.later(now),
            (Phase::Kept, Ok(Found::Absent)) => {
                self.enter(Phase::Done);
                actions.push(Action::Finish { destroyed: true, restart_in: None });
            }
            _ => {}
        }
    }

    fn found(&mut self, found: Found, now: Duration, actions: &mut Vec<Action>) {
        let Provision { start_asked, starts, .. } = self.provision;
        self.provision.in_error = found == Found::Error;
        match found {
            Found::Absent | Found::Foreign if self.provision.create_refused.is_some() => {
                let refused = self.provision.create_refused.take().map(|failure| failure.message).unwrap_or_default();
                self.end(
                    EndDecision::failed_to_provide("Incus could not create the instance").because(refused),
                    now,
                    actions,
                );
            }
            Found::Stopped if self.provision.start_refused.is_some() => {
                let refused = self.provision.start_refused.take().map(|failure| failure.message).unwrap_or_default();
                self.end(
                    EndDecision::failed_to_provide("Incus could not start the instance").because(refused),
                    now,
                    actions,
                );
            }
            // Nothing was started in it, so that making it is harmless, again or for the first time.
            Found::Absent if !self.contact.start_sent && starts < MAX_STARTS => {
                // Only the call itself shows whether it goes better now, so that what failed before still counts.
                (self.phase, self.contact.booted) = (Phase::Creating, false);
                self.deadlines = Deadlines::default();
                actions.push(Action::Record(State::Provisioning, "creating the instance".to_owned()));
                actions.push(Action::Create);
            }
            Found::Stopped if !self.contact.booted && starts < MAX_STARTS => self.start_instance(now, actions),
            // An earlier incarnation left it running: this one begins with a boot of its own.
            Found::Running if !start_asked => {
                self.phase = Phase::Halting;
                actions.push(Action::Halt);
            }
            Found::Running => {
                // Somebody else may have started what was made anew here.
                self.deadlines.boot.get_or_insert(now + self.plan.boot);
                self.dial(actions);
            }
            // A passing error ends nothing: boot_secs or silence_secs does, if it stays.
            Found::Changing(_) | Found::Error => {
                self.deadlines.boot.get_or_insert(now + self.plan.boot);
                self.retry.later(now);
            }
            Found::Foreign if !start_asked => {
                let text = "the instance's name is in use, and not by this runtime";
                self.end(EndDecision::failed_to_provide(text), now, actions);
            }
            Found::Absent | Found::Foreign => {
                self.end(EndDecision::died(DeathCause::InstanceGone, "the instance is gone"), now, actions);
            }
            Found::Stopped => {
                self.end(EndDecision::died(DeathCause::InstanceStopped, STOPPED), now, actions);
            }
            Found::TakenOver { owner, term } => self.give_up_to(owner, term, actions),
        }
    }

    pub(super) fn created(&mut self, answer: Result<(), CallFailure>, now: Duration, actions: &mut Vec<Action>) {
        if answer.as_ref().is_err_and(|failure| failure.transient) {
            // Also where the end is decided already: it may come to be behind the back of its destruction (Invariant 4).
            self.provision.unsure_until = Some(now + CREATE_SETTLES);
        }
        if self.phase == Phase::Kept {
            // Whether there is anything to keep is known now.
            actions.push(Action::Look);
        }
        if self.phase != Phase::Creating {
            return;
        }
        match answer {
            Ok(()) => {
                self.enter(Phase::Starting);
                self.start_instance(now, actions);
            }
            // The create of a collector that died may have come to its end in between.
            Err(failure) if !failure.transient => {
                self.provision.create_refused = Some(failure);
                self.look(actions);
            }
            Err(failure) => self.call_failed(failure, "Incus could not create the instance", now, actions),
        }
    }

    /// Whether a create whose answer nobody heard may still make the instance.
    pub(super) fn may_appear(&self, now: Duration) -> bool {
        self.provision.unsure_until.is_some_and(|until| now < until)
    }

    fn start_instance(&mut self, now: Duration, actions: &mut Vec<Action>) {
        self.phase = Phase::Starting;
        (self.provision.create_refused, self.provision.start_refused) = (None, None);
        self.provision.start_asked = true;
        self.deadlines.boot = Some(now + self.plan.boot);
        actions.push(Action::Record(State::Provisioning, "starting the instance".to_owned()));
        actions.push(Action::Start);
    }

    pub(super) fn started(&mut self, answer: Result<(), CallFailure>, now: Duration, actions: &mut Vec<Action>) {
        if self.phase != Phase::Starting {
            return;
        }
        match answer {
            Ok(()) => {
                self.provision.starts += 1;
                self.dial(actions);
            }
            // It may run already: the start of a collector that died came to its end in between.
            Err(failure) if !failure.transient => {
                self.provision.start_refused = Some(failure);
                self.look(actions);
            }
            Err(failure) => self.call_failed(failure, "Incus could not start the instance", now, actions),
        }
    }

    pub(super) fn halted(&mut self, answer: Result<(), CallFailure>, now: Duration, actions: &mut Vec<Action>) {
        if self.phase != Phase::Halting {
            return;
        }
        match answer {
            Ok(()) => {
                self.enter(Phase::Looking);
                actions.push(Action::Look);
            }
            // What Incus refuses now may have happened by itself, so it is asked again, for as long as it is worth it.
            Err(CallFailure { message, .. }) => {
                let failure = CallFailure { transient: true, message };
                self.call_failed(failure, "Incus could not stop what an earlier run left", now, actions);
            }
        }
    }

    fn look(&mut self, actions: &mut Vec<Action>) {
        self.phase = Phase::Looking;
        actions.push(Action::Look);
    }

    fn dial(&mut self, actions: &mut Vec<Action>) {
        (self.provision.create_refused, self.provision.start_refused) = (None, None);
        self.phase = Phase::Dialing;
        self.retry.at = None;
        self.retry.failing_since = None;
        actions.push(Action::Dial);
    }

    /// Incus failed a call while the instance is being provided: again where that may help, else that is the end.
    fn call_failed(&mut self, failure: CallFailure, text: &str, now: Duration, actions: &mut Vec<Action>) {
        if failure.transient && self.retry.is_patient(PROVISION_PATIENCE.max(self.plan.silence), now) {
            // What Incus made of the call is read, never guessed.
            self.phase = Phase::Looking;
            return self.retry.later(now);
        }
        let outcome = if self.contact.start_sent { Outcome::Unreachable } else { Outcome::ProvisionFailed };
        self.end(EndDecision::new(outcome, text).because(failure.message), now, actions);
    }

    /// Incus said that something happened. Calls under way answer for themselves.
    pub(super) fn woken(&mut self, actions: &mut Vec<Action>) {
        let waits = self.phase == Phase::Looking && self.retry.at.take().is_some();
        if waits || matches!(self.phase, Phase::Live | Phase::Dialing | Phase::Kept) {
            actions.push(Action::Look);
        }
    }

    /// Invariant 6: a collector that finds another owner stops acting, and gives no verdict.
    pub(super) fn give_up_to(&mut self, owner: String, term: u64, actions: &mut Vec<Action>) {
        actions.push(Action::HangUp);
        self.enter(Phase::TakenOver);
        actions.push(Action::Yield { owner, term });
    }
}
