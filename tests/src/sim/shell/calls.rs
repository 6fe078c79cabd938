//! Calls to Incus: asked, taking effect, and answered, each at a time of its own.

use std::collections::BTreeMap;

use pika_host_collector::incus::{InstanceState, Labels, Ownership, create_request};
use pika_host_collector::machine::{CallFailure, Destroyed};
use pika_host_collector::runtime::{Answer, Call, Claim, Seen};

use super::Checked;
use crate::sim::host::OWNER;
use crate::sim::incus::{Ask, Change, Failure, MACHINE_UUID, Reply, Status, vsock_of};
use crate::sim::world::{Event, Operation, World};

fn failure(failure: Failure) -> CallFailure {
    CallFailure { transient: failure.transient, message: failure.message }
}

impl World {
    pub(super) fn ask(&mut self, runtime: usize, serial: u64, id: u64, call: Call) {
        let ask = match &call {
            // A console has nothing to say, and is read as fast as the instance.
            Call::Look { .. } | Call::Destroy { .. } | Call::Console { .. } => Ask::Look,
            Call::Create { incarnation, term } => Ask::Create(self.config(runtime, *incarnation, *term)),
            Call::Start { .. } => Ask::Start,
            Call::Halt { .. } => Ask::Stop,
        };
        let name = match &call {
            Call::Look { instance, .. }
            | Call::Start { instance, .. }
            | Call::Halt { instance }
            | Call::Console { instance }
            | Call::Destroy { instance, .. } => instance.clone(),
            Call::Create { .. } => self.plan.runtimes[runtime].spec.identity.instance_name.clone(),
        };
        let course = self.incus.plan(&ask, self.now);
        let operation = Operation { runtime, serial, id, call, ask, name, course, came: None, asked_at: self.now };
        self.operations.push(operation);
        self.schedule(self.operations.len() - 1);
    }

    fn schedule(&mut self, at: usize) {
        let course = self.operations[at].course;
        if let Some(effect) = course.effect {
            self.at(effect, Event::Effect(at));
        }
        self.at(course.answer, Event::Answer(at));
    }

    /// What a new instance is marked with, made by the real code.
    fn config(&self, runtime: usize, incarnation: u32, term: u64) -> BTreeMap<String, String> {
        let ownership = Ownership { owner: OWNER.to_owned(), term, incarnation };
        let wall = self.host.clock.read(self.now).wall;
        let mut request = create_request(&self.plan.runtimes[runtime].spec, &ownership, wall, None);
        let mut config: BTreeMap<String, String> = serde_json::from_value(request["config"].take()).unwrap_or_default();
        if request["type"] == "virtual-machine" {
            config.insert(MACHINE_UUID.to_owned(), format!("machine-{runtime}-{}", self.operations.len()));
        }
        config
    }

    pub(in crate::sim) fn take_effect(&mut self, at: usize) -> Checked {
        let Operation { runtime, ask, name, call, asked_at, course, serial, .. } = &self.operations[at];
        let (runtime, asked_at, course, serial) = (*runtime, *asked_at, *course, *serial);
        let search = matches!(call, Call::Look { search: true, .. } | Call::Destroy { .. });
        let name = if search { self.found_name(runtime, name) } else { name.clone() };
        if matches!(ask, Ask::Create(_)) && self.incus.is_name_taken_since(&name, asked_at, self.now) {
            // Incus gives a name to one call at a time: this one was refused long ago.
            return Ok(());
        }
        let foreign = self.incus.instance(&name).is_some_and(|found| found.foreign);
        let (came, change) = self.incus.perform(&name, ask);
        if self.trace.is_on() {
            let (ask, came) = (ask.name(), came.as_ref().map(|_| "done").map_err(|failure| &failure.message));
            self.trace.line(self.now, &"i", format_args!("{ask} {name}: {came:?}"));
        }
        self.oracle.touched(runtime, change, foreign, asked_at, self.now)?;
        if self.now > course.answer || self.host.serial(runtime) != Some(serial) {
            // Nobody waits for it any more: whoever finds what it did has not asked for it.
            let facts = self.oracle.facts(runtime);
            facts.stopped |= change == Change::Stopped;
            facts.deleted |= change == Change::Deleted;
        }
        if self.operations[at].came.is_none() {
            self.operations[at].came = Some(came);
            self.operations[at].name = name;
        }
        self.changed(runtime, change);
        Ok(())
    }

    /// The name under which an instance of the runtime is found.
    fn found_name(&self, runtime: usize, name: &str) -> String {
        let id = &self.plan.runtimes[runtime].spec.identity.runtime_id;
        let ours = |labels: &Labels| labels.runtime_id == *id;
        let named = self.incus.instance(name).and_then(|found| Labels::read(&found.config));
        if named.as_ref().is_some_and(ours) {
            return name.to_owned();
        }
        let labelled = self.incus.instances().filter_map(|(name, found)| Some((name, Labels::read(&found.config)?)));
        // Ours before one that another collector took over.
        let found = labelled.filter(|(_, labels)| ours(labels)).max_by_key(|(_, labels)| labels.owner == OWNER);
        found.map_or(name, |(name, _)| name).to_owned()
    }

    pub(in crate::sim) fn answer(&mut self, at: usize) -> Checked {
        let operation = &self.operations[at];
        let (serial, runtime, id) = (operation.serial, operation.runtime, operation.id);
        let came = self.incus.answer(&operation.course, operation.came.clone());
        let reading = self.host.clock.read(self.now);
        if self.of(serial, runtime).is_none() {
            return Ok(());
        }
        let operation = &self.operations[at];
        let done = |came: Result<Reply, Failure>| came.map(|_| ()).map_err(failure);
        let answer = match operation.call {
            Call::Look { .. } => Answer::Looked(came.map(|reply| self.seen(at, reply)).map_err(failure)),
            Call::Create { .. } => Answer::Created(done(came)),
            Call::Start { .. } => Answer::Started(done(came)),
            Call::Halt { .. } => Answer::Halted(done(came)),
            Call::Console { .. } => Answer::Console(came.is_ok().then(|| "login:".to_owned())),
            Call::Destroy { .. } => match self.destroy_on(at, came) {
                Some(answer) => Answer::Destroyed(answer),
                None => return Ok(()),
            },
        };
        if self.trace.is_on() {
            self.trace.line(self.now, &format_args!("r{runtime}"), format_args!("answer {id}: {answer:?}"));
        }
        let Some(driven) = self.of(serial, runtime) else { return Ok(()) };
        let was_held_back = driven.link.is_some() && !driven.core.wants_read();
        driven.core.answer(id, answer, reading);
        if was_held_back {
            // The host itself kept the guest waiting, until Incus said which machine it is, or that it is another: that is no
            // silence of the guest's.
            let now = self.now;
            self.oracle.heard(runtime, now);
        }
        self.perform(runtime)
    }

    fn seen(&self, at: usize, reply: Reply) -> Option<Seen> {
        let Reply::Found(Some((status, config))) = reply else { return None };
        let state = match status {
            Status::Running => InstanceState::Running,
            Status::Stopped => InstanceState::Stopped,
            Status::Frozen => InstanceState::Changing,
            Status::Error => InstanceState::Error,
        };
        let name = self.operations[at].name.clone();
        let (status, claim, vsock) = (status.as_str().to_owned(), claim(&config), vsock_of(&config));
        Some(Seen { name, status, state, claim, vsock, base_alias: None })
    }

    /// Whether Incus has an operation under way that will make it, whoever still waits for that.
    fn is_being_created(&self, name: &str) -> bool {
        let will_be = |operation: &Operation| {
            let is_create = operation.name == name && matches!(operation.ask, Ask::Create(_));
            // One whose name was given to another since was refused.
            is_create
                && operation.course.effect.is_some_and(|at| at > self.now)
                && !self.incus.was_made_since(name, operation.asked_at)
        };
        self.operations.iter().any(will_be)
    }

    /// The next step of a destruction, as the real shell takes it; or what it came to.
    fn destroy_on(&mut self, at: usize, came: Result<Reply, Failure>) -> Option<Result<Destroyed, CallFailure>> {
        let runtime = self.operations[at].runtime;
        let id = &self.plan.runtimes[runtime].spec.identity.runtime_id;
        let next = match (&self.operations[at].ask, came) {
            (Ask::Look, Err(problem)) => return Some(Err(failure(problem))),
            (Ask::Look, Ok(Reply::Found(Some((status, config))))) => match claim(&config) {
                Some(claim) if claim.runtime_id == *id && claim.owner != OWNER => {
                    return Some(Ok(Destroyed::TakenOver { owner: claim.owner, term: claim.term }));
                }
                Some(claim) if claim.runtime_id == *id => {
                    if status == Status::Stopped {
                        Ask::Delete
                    } else {
                        Ask::Stop
                    }
                }
                _ => return Some(Ok(Destroyed::Gone)),
            },
            (Ask::Look, Ok(_)) if self.is_being_created(&self.operations[at].name) => {
                return Some(Err(CallFailure { transient: true, message: "being created".to_owned() }));
            }
            (Ask::Stop, Err(problem)) if problem.transient => return Some(Err(failure(problem))),
            // The labels are read right before each change.
            (Ask::Stop, _) => Ask::Look,
            (_, Ok(_)) => return Some(Ok(Destroyed::Gone)),
            (_, Err(problem)) if problem.message.ends_with("not found") => return Some(Ok(Destroyed::Gone)),
            (_, Err(problem)) => return Some(Err(CallFailure { transient: true, message: problem.message })),
        };
        let course = self.incus.plan(&next, self.now);
        let Operation { runtime, serial, id, asked_at, .. } = self.operations[at];
        let (call, name) = (self.operations[at].call.clone(), self.operations[at].name.clone());
        self.operations.push(Operation { runtime, serial, id, call, ask: next, name, course, came: None, asked_at });
        self.schedule(self.operations.len() - 1);
        None
    }
}

fn claim(config: &BTreeMap<String, String>) -> Option<Claim> {
    let Labels { runtime_id, owner, term, .. } = Labels::read(config)?;
    Some(Claim { runtime_id, owner, term })
}
