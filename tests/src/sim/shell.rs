//! The shell around the cores, made of models: performs effects one by one and brings back what came of them. Like the real
//! one it decides nothing; unlike it, it can be killed between any two effects and at any call of the file system.

use std::collections::BTreeMap;
use std::time::Duration;

use pika_cloud_common::wire::{HostMessage, Transport};
use pika_host_collector::incus::{InstanceState, Labels, Ownership, create_request};
use pika_host_collector::machine::{CallFailure, Destroyed, SessionLoss};
use pika_host_collector::runtime::{Agent, Answer, Call, Claim, Core, Effect, Seen};

use super::host::{Artifacts, Dialing, Driven, OWNER};
use super::incus::{Ask, Change, Failure, MACHINE_UUID, Reply, Status, vsock_of};
use super::link::{Link, Read, Way};
use super::oracle::{Oracle, Violation};
use super::world::{Event, Operation, Stream, World};

/// How long a journal that could not be written is left alone.
const REOPEN: Duration = Duration::from_secs(1);

type Checked = Result<(), Violation>;

fn failure(failure: Failure) -> CallFailure {
    CallFailure { transient: failure.transient, message: failure.message }
}

impl World {
    /// A collector is started, and takes every runtime up.
    pub(super) fn start_collector(&mut self) -> Checked {
        if self.host.collector.is_some() {
            // The runtimes' locks are taken: the second one goes.
            return Ok(());
        }
        let generation = self.host.start();
        self.say(&"c", format_args!("the collector starts, the {generation}. of its kind"));
        for runtime in 0..self.plan.runtimes.len() {
            if let Some(collector) = &mut self.host.collector {
                collector.runtimes.push(None);
            }
            self.open(runtime)?;
        }
        Ok(())
    }

    pub(super) fn reopen(&mut self, runtime: usize) -> Checked {
        let lives = self.host.collector.as_ref().is_some_and(|collector| collector.runtimes[runtime].is_none());
        if lives { self.open(runtime) } else { Ok(()) }
    }

    fn open(&mut self, runtime: usize) -> Checked {
        let (random, now) = (self.random.number(), self.now);
        let opened = match self.host.open(&self.plan.runtimes[runtime].spec, random, now) {
            Ok(opened) => opened,
            Err(error) => {
                self.say(&format_args!("r{runtime}"), format_args!("its journal cannot be used: {error}"));
                if self.host.disk.borrow().is_dead() {
                    self.kill_collector();
                } else {
                    self.oracle.unusable(runtime, &error, now)?;
                    self.at(now + REOPEN, Event::Reopen(runtime));
                }
                return Ok(());
            }
        };
        let phase = opened.driven.core.phase();
        self.say(&format_args!("r{runtime}"), format_args!("taken up from its journal: {phase:?}"));
        self.with_oracle(|oracle, world| oracle.recovered(runtime, &opened, world))?;
        if let Some(collector) = &mut self.host.collector {
            collector.runtimes[runtime] = Some(opened.driven);
        }
        self.perform(runtime)
    }

    /// Kills the collector; what it had performed stays so.
    pub(super) fn kill_collector(&mut self) {
        let Some(collector) = self.host.collector.take() else { return };
        let now = self.now;
        self.say(&"c", format_args!("the collector is killed"));
        self.host.disk.borrow_mut().revive();
        for at in 0..self.streams.len() {
            if !self.streams[at].link.is_cut() {
                // Its end of the stream closes with it, most of the time.
                let learns = (!self.random.chance(100)).then(|| self.random.millis(0, 50));
                self.streams[at].link.cut(now, learns, None);
                self.next_read(at, Way::ToGuest);
            }
        }
        self.oracle.killed(now);
        self.at(now + collector.back_after, Event::Collect);
    }

    /// Performs what a core wants, one effect after the other.
    pub(super) fn perform(&mut self, runtime: usize) -> Checked {
        loop {
            let Some(collector) = &mut self.host.collector else { return Ok(()) };
            let Some(driven) = collector.runtimes[runtime].as_deref_mut() else { return Ok(()) };
            let transitions = driven.core.take_transitions();
            let phase = driven.core.phase();
            let Some(effect) = driven.core.next_effect() else {
                self.transitions.extend(&transitions);
                self.oracle.went(runtime, &transitions, phase, self.now)?;
                let due = self.host.driven(runtime).and_then(|driven| driven.core.next_tick());
                self.set_tick(runtime, due);
                return Ok(());
            };
            if let Some(left) = &mut collector.kill_in {
                if *left == 0 {
                    self.kill_collector();
                    return Ok(());
                }
                *left -= 1;
            }
            self.transitions.extend(&transitions);
            self.oracle.went(runtime, &transitions, phase, self.now)?;
            if self.trace.is_on() {
                self.say(&format_args!("r{runtime}"), format_args!("{phase:?}: {}", told(&effect)));
            }
            self.with_oracle(|oracle, world| oracle.performs(runtime, &effect, world))?;
            self.perform_one(runtime, effect);
        }
    }

    fn perform_one(&mut self, runtime: usize, effect: Effect) {
        let (now, slow_disk) = (self.now, self.plan.slow_disk);
        let Some(serial) = self.host.serial(runtime) else { return };
        match effect {
            Effect::Call(id, call) => self.ask(runtime, serial, id, call),
            Effect::Dial { id, instance, way } => {
                let number = self.incus.instance(&instance).and_then(|found| vsock_of(&found.config));
                if let Some(driven) = self.host.driven(runtime) {
                    driven.dialing = Some(Dialing { id, way, number });
                }
                let mut begins = now;
                if way.agent == Agent::Put {
                    begins += self.random.millis(20, 900);
                    self.at(begins, Event::Placed(serial, runtime, id));
                }
                let takes = self.random.millis(5, 60);
                self.at(begins + takes, Event::Dialled(serial, runtime, id));
            }
            Effect::HangUp | Effect::Farewell => {
                let Some(driven) = self.host.driven(runtime) else { return };
                driven.dialing = None;
                if let Some(stream) = driven.link.take()
                    && let Some(when) = self.streams[stream].link.close(Way::ToGuest, now)
                {
                    self.at(when, Event::ToGuest(stream));
                }
            }
            Effect::Send(message) => self.send(runtime, &message),
            Effect::Commit(commit) => {
                let takes = self.random.time(Duration::from_micros(50), slow_disk);
                if let Some(driven) = self.host.driven(runtime) {
                    driven.commit = Some(commit);
                }
                self.at(now + takes, Event::Committed(serial, runtime));
            }
            Effect::BeginArtifacts { .. } => {
                if let Some(driven) = self.host.driven(runtime) {
                    driven.artifacts = Artifacts::default();
                }
            }
            Effect::StoreArtifacts { .. } => {
                let takes = self.random.time(Duration::from_micros(50), slow_disk);
                self.at(now + takes, Event::Stored(serial, runtime));
            }
            // What is derived is looked at by the oracle, which saw the effect; outputs are on no disk here.
            Effect::Derive { .. } | Effect::Prune { .. } => {}
        }
    }

    fn send(&mut self, runtime: usize, message: &HostMessage) {
        let Some(stream) = self.host.driven(runtime).and_then(|driven| driven.link) else { return };
        let mut bytes = Vec::new();
        message.write(&mut bytes);
        let idle = self.streams[stream].link.next(Way::ToGuest).is_none();
        if let Some(when) = self.streams[stream].link.send(Way::ToGuest, &bytes, self.now).filter(|_| idle) {
            self.at(when, Event::ToGuest(stream));
        }
    }

    fn set_tick(&mut self, runtime: usize, due: Option<Duration>) {
        let now = self.now;
        let Some(due) = due.map(|mono| self.host.clock.when(mono).max(now)) else { return };
        let Some(driven) = self.host.driven(runtime) else { return };
        let serial = driven.serial;
        if driven.tick_at.is_none_or(|at| due < at) && due < Duration::from_secs(1 << 40) {
            driven.tick_at = Some(due);
            self.at(due, Event::Tick(serial, runtime));
        }
    }

    /// The runtime's driver, where it is still the one of that number.
    fn of(&mut self, serial: u64, runtime: usize) -> Option<&mut Driven> {
        self.host.driven(runtime).filter(|driven| driven.serial == serial)
    }

    pub(super) fn tick_core(&mut self, serial: u64, runtime: usize) -> Checked {
        let (now, reading) = (self.now, self.host.clock.read(self.now));
        let Some(driven) = self.of(serial, runtime) else { return Ok(()) };
        if driven.tick_at.is_some_and(|at| at <= now) {
            driven.tick_at = None;
        }
        driven.core.tick(reading);
        self.perform(runtime)
    }

    pub(super) fn wake(&mut self, serial: u64, runtime: usize) -> Checked {
        let reading = self.host.clock.read(self.now);
        let Some(driven) = self.of(serial, runtime) else { return Ok(()) };
        driven.core.woken(reading);
        self.perform(runtime)
    }

    pub(super) fn stored(&mut self, serial: u64, runtime: usize) -> Checked {
        let reading = self.host.clock.read(self.now);
        let Some(driven) = self.of(serial, runtime) else { return Ok(()) };
        let stored = driven.artifacts.stored();
        driven.core.stored(stored, reading);
        self.perform(runtime)
    }

    /// The disk's turn: the commit is written now, and done.
    pub(super) fn commit(&mut self, serial: u64, runtime: usize) -> Checked {
        let (now, reading) = (self.now, self.host.clock.read(self.now));
        let Some(driven) = self.of(serial, runtime) else { return Ok(()) };
        let Some(commit) = driven.commit.take() else { return Ok(()) };
        let written = driven.store.commit(&commit);
        self.host.disk.borrow_mut().dealt_with();
        if self.host.disk.borrow().is_dead() {
            self.kill_collector();
            return Ok(());
        }
        match written {
            Ok(durable) => {
                self.with_oracle(|oracle, world| oracle.durable(runtime, &commit, durable, world))?;
                if let Some(driven) = self.of(serial, runtime) {
                    driven.core.committed(commit, reading);
                }
                self.perform(runtime)?;
                self.read_on(runtime);
                Ok(())
            }
            Err(error) => {
                self.say(&format_args!("r{runtime}"), format_args!("the journal is degraded: {error}"));
                self.oracle.degraded(runtime, now)?;
                self.drop_runtime(runtime);
                self.at(now + REOPEN, Event::Reopen(runtime));
                Ok(())
            }
        }
    }

    /// Nothing more is done to a runtime whose journal cannot be written.
    fn drop_runtime(&mut self, runtime: usize) {
        let Some(collector) = &mut self.host.collector else { return };
        let driven = collector.runtimes[runtime].take();
        if let Some(stream) = driven.and_then(|driven| driven.link)
            && let Some(when) = self.streams[stream].link.close(Way::ToGuest, self.now)
        {
            self.at(when, Event::ToGuest(stream));
        }
    }

    pub(super) fn dialled(&mut self, serial: u64, runtime: usize, id: u64) -> Checked {
        let (now, reading) = (self.now, self.host.clock.read(self.now));
        let dialing = self.of(serial, runtime).and_then(|driven| driven.dialing.take_if(|dialing| dialing.id == id));
        let Some(Dialing { way: dialled_by, number, .. }) = dialing else { return Ok(()) };
        let (transport, agent) = (dialled_by.transport, dialled_by.agent);
        let trouble = if self.quiet { 0 } else { self.plan.trouble.dial };
        let fails = self.random.chance(trouble) || now < self.incus.down_until;
        let closed = transport == Transport::Vsock && self.random.chance(self.plan.runtimes[runtime].no_vsock);
        let name = match (transport, &number) {
            // The number that was read a moment ago; whoever has it now is at the other end.
            (Transport::Vsock, Some(number)) => self.incus.machine_at(number.cid).map(str::to_owned),
            (Transport::Vsock, None) => None,
            (Transport::Exec, _) => Some(self.inhabitants[runtime].name.clone()),
        };
        let guest = self.inhabitants.iter().position(|inhabitant| Some(&inhabitant.name) == name.as_ref());
        let mut guest = guest.unwrap_or(runtime);
        let may_move = transport == Transport::Vsock && !self.quiet;
        if may_move && self.random.chance(self.plan.moved) {
            let others = (0..self.inhabitants.len()).filter(|other| *other != runtime);
            let mut machines = others.filter(|other| self.inhabitants[*other].guest.machine.uuid.is_some());
            let stranger = machines.next_back();
            match stranger.filter(|_| self.random.chance(500)) {
                Some(stranger) => guest = stranger,
                None => self.incus.renumber(&self.inhabitants[runtime].name),
            }
        }
        let inhabitant = &self.inhabitants[guest];
        let status = name.and_then(|name| self.incus.instance(&name)).map(|found| found.status);
        let dialled = if closed {
            Err(SessionLoss::NoTransport("there is no vsock here".to_owned()))
        } else if fails || status != Some(Status::Running) {
            Err(SessionLoss::Lost("nobody is there".to_owned()))
        } else if agent != Agent::Image && self.plan.runtimes[runtime].no_own {
            Err(SessionLoss::NoAgent("the host has none".to_owned()))
        } else if !inhabitant.guest.up || inhabitant.guest.is_frozen(now) {
            Err(SessionLoss::Lost("the agent does not answer".to_owned()))
        } else if agent == Agent::Put && !inhabitant.has_own {
            self.oracle.facts(runtime).agentless = true;
            Err(SessionLoss::NotPut("the disk is full".to_owned()))
        } else if transport == Transport::Vsock && !inhabitant.has_agent {
            Err(SessionLoss::Lost("nobody listens".to_owned()))
        } else if !(if agent == Agent::Image { inhabitant.has_agent } else { inhabitant.has_own }) {
            return self.dialled_nobody(serial, runtime, id);
        } else {
            Ok(number.filter(|_| transport == Transport::Vsock))
        };
        if dialled.is_ok() {
            self.connect(serial, runtime, guest, agent);
        }
        let Some(driven) = self.of(serial, runtime) else { return Ok(()) };
        driven.core.dialled(id, dialled, reading);
        self.perform(runtime)
    }

    /// There is a stream, and a program at its other end that ends at once: there is no such agent.
    fn dialled_nobody(&mut self, serial: u64, runtime: usize, id: u64) -> Checked {
        let reading = self.host.clock.read(self.now);
        let Some(driven) = self.of(serial, runtime) else { return Ok(()) };
        driven.core.dialled(id, Ok(None), reading);
        self.perform(runtime)?;
        let Some(driven) = self.of(serial, runtime) else { return Ok(()) };
        driven.core.link_lost(SessionLoss::NoAgent("exec ended with 127".to_owned()), reading);
        self.perform(runtime)
    }

    /// All of the host's agent has come, where the collector lives that sends it and the guest takes it.
    pub(super) fn placed(&mut self, serial: u64, runtime: usize, id: u64) {
        let now = self.now;
        let is_sent =
            self.of(serial, runtime).is_some_and(|driven| driven.dialing.as_ref().is_some_and(|d| d.id == id));
        let plan = &self.plan.runtimes[runtime];
        let (bad, no_own) = (if self.quiet { 0 } else { plan.bad_puts }, plan.no_own);
        let is_refused = self.random.chance(bad);
        let inhabitant = &mut self.inhabitants[runtime];
        if is_sent && !no_own && !is_refused && inhabitant.guest.up && !inhabitant.guest.is_frozen(now) {
            inhabitant.has_own = true;
            self.say(&format_args!("g{runtime}"), format_args!("has the host's agent"));
        }
    }

    fn connect(&mut self, serial: u64, runtime: usize, guest: usize, agent: Agent) {
        self.sessions += 1;
        let (session, now, manner) = (self.sessions, self.now, self.manner(guest, agent));
        self.oracle.connected(runtime, manner);
        if guest != runtime {
            self.say(&format_args!("r{runtime}"), format_args!("its number leads to g{guest}"));
        }
        let link = Link::new(self.plan.nature, self.random.fork());
        self.streams.push(Stream { link, runtime, guest, session, serial });
        let stream = self.streams.len() - 1;
        self.inhabitants[guest].guest.accept(session, manner, now);
        if let Some(driven) = self.of(serial, runtime) {
            driven.link = Some(stream);
        }
        self.after_guest(guest);
    }

    /// The host's end of a stream has something.
    pub(super) fn read_at_host(&mut self, stream: usize) -> Checked {
        let Stream { runtime, guest, serial, .. } = self.streams[stream];
        let reading = self.host.clock.read(self.now);
        let now = self.now;
        let Some(driven) = self.of(serial, runtime).filter(|driven| driven.link == Some(stream)) else {
            return Ok(());
        };
        if !driven.core.wants_read() {
            // It is read on when the disk is done.
            return Ok(());
        }
        let max = driven.core.space().len().min(64 * 1024);
        match self.streams[stream].link.read(Way::ToHost, max, now) {
            Read::Nothing => {}
            Read::Bytes(bytes) => {
                let Some(Driven { core, artifacts, .. }) = self.of(serial, runtime) else { return Ok(()) };
                core.space()[..bytes.len()].copy_from_slice(&bytes);
                core.read(bytes.len(), reading, artifacts);
                self.oracle.heard(runtime, now);
                self.perform(runtime)?;
                self.next_read(stream, Way::ToHost);
                // There is room in the stream again.
                self.after_guest(guest);
            }
            Read::End => {
                let died = self.random.chance(500);
                let Some(driven) = self.of(serial, runtime) else { return Ok(()) };
                driven.link = None;
                // Whether a program ended or only a connection shows at its exit code, where Incus still knows that.
                let message = "the stream ended".to_owned();
                let loss = if died { SessionLoss::Died(message) } else { SessionLoss::Lost(message) };
                driven.core.link_lost(loss, reading);
                self.perform(runtime)?;
            }
        }
        Ok(())
    }

    /// Bytes may have waited for the disk.
    fn read_on(&mut self, runtime: usize) {
        let stream = self.host.driven(runtime).and_then(|driven| driven.link);
        if let Some(stream) = stream {
            self.next_read(stream, Way::ToHost);
        }
    }
}

/// Calls to Incus.
impl World {
    /// Lets the oracle look at the whole world.
    fn with_oracle(&mut self, look: impl FnOnce(&mut Oracle, &Self) -> Checked) -> Checked {
        let mut oracle = std::mem::take(&mut self.oracle);
        let checked = look(&mut oracle, self);
        self.oracle = oracle;
        checked
    }

    fn ask(&mut self, runtime: usize, serial: u64, id: u64, call: Call) {
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

    pub(super) fn take_effect(&mut self, at: usize) -> Checked {
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

    pub(super) fn answer(&mut self, at: usize) -> Checked {
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

/// An effect in a line. What it carries for the guest alone stays out.
fn told(effect: &Effect) -> String {
    match effect {
        Effect::Call(id, call) => format!("call {id}: {call:?}"),
        Effect::Send(message) => format!("send {message:?}"),
        Effect::Commit(commit) => {
            let records = String::from_utf8_lossy(&commit.records);
            let whats: Vec<&str> = records.lines().map(what).collect();
            let logs: usize = commit.logs.iter().map(|log| log.bytes.len()).sum();
            format!("commit from {}: {}, {logs} log bytes, last {}", commit.first_n, whats.join(" "), commit.last)
        }
        Effect::Dial { .. }
        | Effect::HangUp
        | Effect::Farewell
        | Effect::BeginArtifacts { .. }
        | Effect::StoreArtifacts { .. }
        | Effect::Derive { .. }
        | Effect::Prune { .. } => format!("{effect:?}"),
    }
}

/// What a record says, in a word.
pub(super) fn what(line: &str) -> &str {
    let kind = |line: &'static str| line;
    if line.contains(",\"guest\":") {
        return kind("event");
    }
    line.split("\"what\":\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap_or("?")
}

/// Whether a core has come to where it stays.
pub fn is_at_rest(core: &Core) -> bool {
    use pika_host_collector::machine::Phase;
    matches!(core.phase(), Phase::Done | Phase::TakenOver)
        || (core.phase() == Phase::Kept && core.next_tick().is_none())
}
