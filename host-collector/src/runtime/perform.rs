//! Carrying out what the machine decided, and bringing back what came of it.

use pika_cloud_common::request::REQUEST_SCHEMA_VERSION;
use pika_cloud_common::spec::InstanceType;
use pika_cloud_common::verdict::{Outcome, Watchdog};
use pika_cloud_common::wire::{Empty, HostMessage, Signal, Start as StartMessage};
use pika_cloud_common::{GuestRequest, RuntimeSpec, State};

use super::{Answer, Call, CallId, Core, Effect, Intake, LogMarks, Peer, Route, Seen, Way};
use crate::incus::InstanceState;
use crate::journal::HostRecord;
use crate::machine::{Action, CallFailure, EndDecision, Found, Input, Phase};

impl Core {
    /// Performs actions, and those that they lead to.
    pub(super) fn perform(&mut self, actions: Vec<Action>) {
        for action in actions {
            self.perform_one(action);
        }
    }

    fn perform_one(&mut self, action: Action) {
        match action {
            Action::Record(state, message) => self.record(HostRecord::State { state, message }),
            Action::Look => self.look(),
            Action::Create => self.create(),
            Action::Start => {
                self.record(HostRecord::InstanceStarting {});
                let incarnation = self.records.view().incarnation;
                self.next_commit.change(Call::Start { instance: self.instance.clone(), incarnation });
            }
            Action::Halt => self.change(Call::Halt { instance: self.instance.clone() }),
            Action::Dial => self.dial(),
            Action::HangUp => self.hang_up(),
            Action::StartWorkload => self.start_workload(),
            Action::Terminate => {
                self.forget_messages();
                self.grace_given = true;
                self.signal("TERM");
            }
            Action::Command(command) => self.record(HostRecord::Command { command }),
            Action::End(end) => self.end(end),
            Action::Collect => self.collect(),
            Action::Conclude => self.conclude(),
            Action::Destroy => self.destroy(),
            Action::Keep(time) => {
                self.release();
                self.record_last(HostRecord::Kept { for_secs: time.map(|time| time.as_secs()) });
            }
            Action::Finish { destroyed, restart_in } => self.over(destroyed, restart_in),
            Action::Begin { restarts } => self.begin(restarts),
            Action::Yield { owner, term } => {
                self.forget_changes();
                self.record_last(HostRecord::TakenOver { owner, term });
            }
        }
    }

    /// To the workload, where there is a session.
    pub(super) fn signal(&mut self, name: &str) {
        self.send(HostMessage::Signal(Signal { name: name.to_owned() }));
    }

    pub(super) fn record(&mut self, record: HostRecord) {
        self.records.host(record, self.now);
    }

    /// What comes at an end must find room on a full disk.
    pub(super) fn record_last(&mut self, record: HostRecord) {
        self.record(record);
        self.next_commit.is_last();
    }

    /// An instance with labels of ours is looked for under any name, but where Incus was never asked to make one.
    pub(super) fn look(&mut self) {
        let id = self.calls.new_id();
        (self.calls.look, self.calls.look_again) = (Some(id), false);
        let view = self.records.view();
        // One that is kept is there for the next incarnation too.
        let search = view.incarnation > 1 || view.state != Some(State::Requested);
        let call = Call::Look { instance: self.instance.clone(), search };
        self.effects.push_back(Effect::Call(id, call));
    }

    fn create(&mut self) {
        self.instance.clone_from(&self.spec.identity.instance_name);
        let view = self.records.view();
        let call = Call::Create { incarnation: view.incarnation, term: view.term };
        // What Incus is asked for must be on the disk before.
        self.next_commit.change(call);
    }

    /// One change at a time: the next one waits for the answer of the last.
    pub(super) fn change(&mut self, call: Call) {
        if self.calls.change.is_some() {
            self.calls.next_change = Some(call);
            return;
        }
        let id = self.calls.new_id();
        self.calls.change = Some(id);
        self.effects.push_back(Effect::Call(id, call));
    }

    pub(super) fn dial(&mut self) {
        let way = self.route.take();
        self.dial_by(way);
    }

    pub(super) fn dial_by(&mut self, way: Way) {
        let id = self.calls.new_id();
        self.calls.dial = Some(id);
        self.effects.push_back(Effect::Dial { id, instance: self.instance.clone(), way });
    }

    /// A start that still waits for the disk is not sent any more, not in this session and not in the next.
    fn forget_messages(&mut self) {
        self.next_commit.forget_messages();
        self.in_commit.iter_mut().for_each(super::Batch::forget_messages);
    }

    /// What Incus was not asked for yet, it is not asked for any more.
    fn forget_changes(&mut self) {
        self.calls.next_change = None;
        self.next_commit.forget_changes();
        self.in_commit.iter_mut().for_each(super::Batch::forget_changes);
    }

    pub(super) fn hang_up(&mut self) {
        let waited = self.waits_to_open();
        self.peer = Peer::Ours;
        self.next_commit.forget_session();
        self.in_commit.iter_mut().for_each(super::Batch::forget_session);
        if self.session.take().is_some() || self.calls.dial.take().is_some() || waited {
            self.effects.push_back(Effect::HangUp);
        }
    }

    pub(super) fn request_id(&self) -> String {
        format!("{}.{}", self.spec.identity.runtime_id, self.records.view().incarnation)
    }

    /// The guest is asked only after the journal says so: a collector that dies in between asks again, and the guest, which
    /// knows the id, starts nothing (Invariant 9).
    fn start_workload(&mut self) {
        let spec = &self.spec;
        let message = HostMessage::Start(StartMessage {
            request_id: self.request_id(),
            request: GuestRequest {
                schema_version: REQUEST_SCHEMA_VERSION,
                command: spec.entry_command.clone().unwrap_or_default(),
                timeout_secs: spec.watchdogs.run_secs.unwrap_or(0),
                run_as_root: spec.bootstrap.run_as_root,
                extra: serde_json::Map::default(),
            },
            env: spec.bootstrap.env.clone(),
            cwd: spec.bootstrap.cwd.clone(),
            mounts: mounts_to_wait_for(spec),
            stop_grace_secs: spec.watchdogs.stop_grace_secs,
        });
        if self.records.view().start_sent.is_none() {
            self.record(HostRecord::StartSent { request_id: self.request_id() });
        }
        self.next_commit.send(message);
    }

    fn end(&mut self, end: EndDecision) {
        self.forget_changes();
        // What the same batch of words led to before its end: a workload that is over is not started (Invariant 9).
        self.forget_messages();
        let EndDecision { outcome, message, error } = end;
        // Of a boot that took too long because the guest would not take an agent, nobody heard otherwise.
        let is_boot = outcome == Outcome::TimedOut { watchdog: Watchdog::Boot };
        let error = error.or_else(|| self.route.lack().filter(|_| is_boot));
        let instance_status = self.instance_status.clone();
        self.record_last(HostRecord::Ended { outcome, message, error, instance_status });
    }

    fn conclude(&mut self) {
        if self.records.view().verdict.is_none() {
            self.flush_logs();
            let verdict = crate::outputs::verdict(&self.spec, self.records.view());
            self.record(HostRecord::Verdict { verdict: Box::new(verdict) });
        }
        self.next_commit.conclude();
    }

    /// Tells the guest that it may go.
    fn release(&mut self) {
        if self.has_session() {
            self.send(HostMessage::Release(Empty {}));
            self.session = None;
            self.effects.push_back(Effect::Farewell);
        } else {
            self.hang_up();
        }
    }

    fn destroy(&mut self) {
        self.release();
        let call = Call::Destroy { instance: self.instance.clone(), term: self.records.view().term };
        // Where nothing is to be written, it goes on at once.
        self.next_commit.change(call);
    }

    fn over(&mut self, destroyed: bool, restart_in: Option<std::time::Duration>) {
        self.release();
        if destroyed {
            self.left_behind = None;
            self.record(HostRecord::State { state: State::Destroyed, message: "the instance is deleted".to_owned() });
        }
        let restart_in_ms = restart_in.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
        self.record_last(HostRecord::Finished { destroyed, restart_in_ms });
    }

    /// The next incarnation, for the same spec.
    fn begin(&mut self, restarts: u32) {
        // Words of the last one that the disk still has say nothing about this one.
        self.next_commit.forget_words();
        self.in_commit.iter_mut().for_each(super::Batch::forget_words);
        let spec_hash = self.records.view().spec_hash.clone().unwrap_or_default();
        self.records.begin(spec_hash, restarts, self.now);
        let before = self.records.view().incarnation.saturating_sub(self.spec.limits.incarnations);
        if before > 1 {
            // Invariant 5.
            self.effects.push_back(Effect::Prune { before });
        }
        self.logs = LogMarks::new(self.spec.limits.log_bytes, &mut self.records, &std::collections::BTreeMap::new());
        self.intake = Intake::default();
        (self.session, self.collecting, self.instance_status, self.gather_until) = (None, None, None, None);
        (self.grace_given, self.peer) = (false, Peer::Ours);
        self.route = Route::new(&self.spec, false, None);
    }

    /// Takes the answer of a call, if anybody still waits for it.
    pub(super) fn answered(&mut self, id: CallId, answer: Answer) {
        match answer {
            Answer::Looked(looked) if self.peer.waits_for(id) => {
                self.identified(looked);
            }
            Answer::Looked(looked) => {
                if self.calls.look.take_if(|look| *look == id).is_some() {
                    self.looked(looked);
                    if self.calls.look.is_none() && std::mem::take(&mut self.calls.look_again) {
                        self.step(Input::Woken);
                    }
                }
            }
            Answer::Console(console) => {
                if self.calls.console.take_if(|console| *console == id).is_some() {
                    self.console(console.as_deref());
                }
            }
            change => {
                if self.calls.change.take_if(|change| *change == id).is_some() {
                    self.changed(change);
                }
            }
        }
    }

    fn changed(&mut self, answer: Answer) {
        if let Answer::Destroyed(answer) = &answer {
            self.left_behind = answer.as_ref().err().map(|failure| failure.message.clone());
        }
        self.step(match answer {
            Answer::Created(answer) => Input::Created(answer),
            Answer::Started(answer) => Input::Started(answer),
            Answer::Halted(answer) => Input::Halted(answer),
            Answer::Destroyed(answer) => Input::Destroyed(answer),
            // Told apart by the caller.
            Answer::Looked(_) | Answer::Console(_) => return,
        });
        if self.calls.change.is_none()
            && let Some(next) = self.calls.next_change.take()
        {
            self.change(next);
        }
    }

    fn looked(&mut self, answer: Result<Option<Seen>, CallFailure>) {
        if let Ok(seen) = &answer {
            self.instance_status = Some(seen.as_ref().map_or("absent", |seen| seen.status.as_str()).to_owned());
        }
        let found = answer.map(|seen| self.found(seen));
        if self.collecting.is_some() && !matches!(found, Ok(Found::TakenOver { .. })) {
            return self.collecting_looked(&found);
        }
        // A create that is under way has the last word on that, and the instance is looked at anew then (Invariant 4).
        if found == Ok(Found::Absent) && self.phase() == Phase::Kept && self.calls.change.is_some() {
            return;
        }
        self.step(Input::Looked(found));
    }

    /// Invariants 4 and 6: what is not ours is another's, and a higher term is a take-over.
    pub(super) fn found(&mut self, seen: Option<Seen>) -> Found {
        let Some(seen) = seen else { return Found::Absent };
        let Some(claim) = seen.claim.filter(|claim| claim.runtime_id == self.spec.identity.runtime_id) else {
            return Found::Foreign;
        };
        if claim.owner != *self.owner {
            let is_taken = claim.term > self.records.view().term;
            return if is_taken { Found::TakenOver { owner: claim.owner, term: claim.term } } else { Found::Foreign };
        }
        if claim.term > self.records.view().term {
            self.record(HostRecord::Term { term: claim.term });
        }
        self.instance = seen.name;
        match seen.state {
            InstanceState::Running => Found::Running,
            InstanceState::Stopped => Found::Stopped,
            InstanceState::Changing => Found::Changing(seen.status),
            InstanceState::Error => Found::Error,
        }
    }
}

/// A container has its mounts before it runs. Into a virtual machine Incus's own agent brings them, and ours may be faster.
fn mounts_to_wait_for(spec: &RuntimeSpec) -> Vec<String> {
    match spec.incus.instance_type {
        InstanceType::Container => Vec::new(),
        InstanceType::VirtualMachine => spec.mounts.iter().map(|mount| mount.guest_path.clone()).collect(),
    }
}
