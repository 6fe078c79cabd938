//! What the guest does, and sessions that come and go.

use std::time::Duration;

use pika_cloud_common::State;
use pika_cloud_common::limits::PEER_TIMEOUT;
use pika_cloud_common::verdict::{DeathCause, Outcome};

use super::{Action, EndDecision, FIRST_RETRY, Guest, LAST_RETRY, Machine, Phase, SessionLoss};

/// Sessions in a row that a guest may break before it counts as one that does not keep the contract.
const MAX_BROKEN_SESSIONS: u32 = 3;

/// A session that held for so long was a good one, whatever ended it.
const GOOD_SESSION: Duration = PEER_TIMEOUT;

impl Machine {
    pub(super) fn heard(&mut self, now: Duration, actions: &mut Vec<Action>) {
        self.contact.heard_at = now;
        if self.watches_silence() && std::mem::take(&mut self.contact.unreachable) {
            actions.push(Action::Record(State::Booted, "the guest is heard again".to_owned()));
        }
    }

    pub(super) fn guest(&mut self, guest: Guest, now: Duration, actions: &mut Vec<Action>) {
        self.heard(now, actions);
        if matches!(self.phase, Phase::Creating | Phase::Starting | Phase::Halting) {
            // A late word of an instance that is gone; the one that is being made has said nothing.
            return;
        }
        match guest {
            Guest::Opened { run_lost: true } => {
                let text = "the guest began anew: it booted again, or its files were lost";
                self.end(EndDecision::died(DeathCause::Rebooted, text), now, actions);
            }
            // Also where one is open: a word of a session that was lost meanwhile may have come late, and opened that.
            Guest::Opened { .. } if matches!(self.phase, Phase::Dialing | Phase::Live) => self.opened(now, actions),
            Guest::Terminal(end) => self.end(end, now, actions),
            Guest::Refused(message) => {
                let end = EndDecision::new(Outcome::ProvisionFailed, "the guest refused to start the workload");
                self.end(end.because(message), now, actions);
            }
            Guest::Rewound => {
                let message = "the guest was restored to an earlier state";
                self.end(EndDecision::died(DeathCause::Rewound, message), now, actions);
            }
            Guest::Accepted => self.deadlines.answer = None,
            Guest::State(state) => {
                self.deadlines.answer = None;
                if state == State::Ready {
                    (self.contact.is_ready, self.deadlines.ready) = (true, None);
                }
            }
            // A word of a session that was lost before anything was asked for may come late; it sets no deadline.
            Guest::Progress if self.contact.start_sent => self.progressed(now),
            Guest::Progress | Guest::Opened { .. } => {}
        }
    }

    /// The workload is asked for in every session: the guest starts it at most once for a request (Invariant 9).
    fn opened(&mut self, now: Duration, actions: &mut Vec<Action>) {
        self.phase = Phase::Live;
        (self.contact.live_since, self.contact.last_loss) = (now, None);
        (self.retry.at, self.retry.failing_since) = (None, None);
        if !self.contact.booted {
            self.contact.booted = true;
            self.booted(now);
            actions.push(Action::Record(State::Booted, "the agent answered".to_owned()));
        }
        if !self.contact.start_sent {
            (self.contact.start_sent, self.contact.workload_at) = (true, Some(now));
            self.workload_asked(now);
        }
        self.deadlines.answer = Some(now + PEER_TIMEOUT);
        actions.push(Action::StartWorkload);
    }

    pub(super) fn no_session(&mut self, loss: SessionLoss, now: Duration, actions: &mut Vec<Action>) {
        if !matches!(self.phase, Phase::Dialing | Phase::Live) {
            return;
        }
        actions.push(Action::HangUp);
        if self.phase == Phase::Live {
            self.weigh_session(now);
        }
        self.phase = Phase::Looking;
        self.deadlines.answer = None;
        match loss {
            // Whether the instance still runs is Incus's to say.
            SessionLoss::Lost(message)
            | SessionLoss::Died(message)
            | SessionLoss::NoTransport(message)
            | SessionLoss::NotPut(message) => {
                self.contact.last_loss = Some(message);
                self.dial_later(now);
            }
            SessionLoss::NewStream => self.retry.later(now),
            SessionLoss::NoAgent(message) if !self.contact.booted => {
                let end = EndDecision::failed_to_provide("no usable pika-guest is to be had in the guest");
                self.end(end.because(message), now, actions);
            }
            SessionLoss::Refused(message) => {
                let end = EndDecision::failed_to_provide("the guest's agent and this host do not fit");
                self.end(end.because(message), now, actions);
            }
            SessionLoss::NoAgent(message) | SessionLoss::Broken(message) => {
                self.contact.broken_sessions += 1;
                if self.contact.broken_sessions < MAX_BROKEN_SESSIONS {
                    self.contact.last_loss = Some(message);
                    return self.retry.later(now);
                }
                let text = "the guest no longer keeps the contract";
                self.end(EndDecision::died(DeathCause::ContractBroken, text).because(message), now, actions);
            }
        }
    }

    /// A guest that comes up is dialled often at first, and less and less often.
    fn dial_later(&mut self, now: Duration) {
        if let Some(boot) = self.deadlines.boot.filter(|_| !self.contact.booted) {
            let since = (now + self.plan.boot).saturating_sub(boot);
            self.retry.delay = (since / 64).clamp(FIRST_RETRY, LAST_RETRY);
        }
        self.retry.later(now);
    }

    /// A guest whose sessions end at once, again and again, is dialled less and less often. One that still owed an answer was
    /// none that was good.
    fn weigh_session(&mut self, now: Duration) {
        if self.deadlines.answer.is_none() && now.saturating_sub(self.contact.live_since) >= GOOD_SESSION {
            (self.contact.broken_sessions, self.contact.session_delay) = (0, FIRST_RETRY);
        }
        self.retry.delay = self.contact.session_delay;
        self.contact.session_delay = (self.contact.session_delay * 2).min(LAST_RETRY);
    }
}
