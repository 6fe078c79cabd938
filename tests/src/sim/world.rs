//! The world of one seed: a queue of what happens next, and everything that it happens to.
//!
//! ```text
//!   queue (time, order) ──► host: answers, bytes, commits, ticks ──► effects, one by one ──► Incus, links, disk
//!                       ├─► guests: boots, bytes, ticks          ──► bytes
//!                       ├─► faults and commands
//!                       └─► oracle: looks at everything after each step
//! ```
//!
//! Nothing here asks a clock, and nothing runs beside it: a seed gives the same steps always.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};
use std::time::Duration;

use pika_cloud_common::Command;
use pika_host_collector::machine::Transition;
use pika_host_collector::runtime::{Agent, Call};

use super::guest::{Guest, Manner};
use super::host::Host;
use super::incus::{Ask, Change, Course, Failure, Incus, MACHINE_UUID, Reply, Status};
use super::link::{Link, Read, Way};
use super::oracle::{Oracle, Violation};
use super::plan::{Foreign, Plan};
use super::random::Random;
use super::shell::is_at_rest;
use super::trace::Trace;

/// What is read of a stream at once.
const READ_BYTES: usize = 16 * 1024;
/// How long after the last fault every runtime is where it stays: restarts, their deadlines, and the command of the last.
const MAX_QUIET: Duration = Duration::from_secs(400);
/// Steps beyond which a run does not end.
const MAX_STEPS: u64 = 200_000;

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Event {
    /// A collector is started.
    Collect,
    /// The plan's fault of that number.
    Fault(usize),
    /// No more faults.
    Quiet,
    /// A time of a core may have come. The first number is the driver's, the second the runtime's.
    Tick(u64, usize),
    /// The disk is done with a commit.
    Committed(u64, usize),
    /// Artifacts are stored.
    Stored(u64, usize),
    /// A call takes effect.
    Effect(usize),
    /// A call is answered.
    Answer(usize),
    /// A dial came to its end.
    Dialled(u64, usize, u64),
    /// The host's agent has reached a guest whole, if its dial is still under way.
    Placed(u64, usize, u64),
    /// Incus tells that something happened.
    Woken(u64, usize),
    /// The agent is there. The second number counts the starts of the instance.
    GuestUp(usize, u64),
    /// A time of a guest may have come.
    GuestTick(usize),
    /// There is something to read at the guest's end of a stream.
    ToGuest(usize),
    /// The same at the host's.
    ToHost(usize),
    /// A snapshot is put back.
    Restore(usize),
    /// What was paused goes on.
    Resume(usize),
    /// The disk has room again.
    Room,
    /// A journal that could not be used is tried again.
    Reopen(usize),
    /// Somebody wants something, and says so until it is heard.
    Say(usize, Command),
}

/// A call to Incus.
#[derive(Debug)]
pub struct Operation {
    /// Whose.
    pub runtime: usize,
    /// The driver's number.
    pub serial: u64,
    /// The core's name for it.
    pub id: u64,
    /// What the core asked for.
    pub call: Call,
    /// The present step of it.
    pub ask: Ask,
    /// The instance.
    pub name: String,
    /// How the present step goes.
    pub course: Course,
    /// What came of it.
    pub came: Option<Result<Reply, Failure>>,
    /// When it was asked.
    pub asked_at: Duration,
}

/// A stream, and whose it is.
#[derive(Debug)]
pub struct Stream {
    /// The bytes.
    pub link: Link,
    /// The runtime.
    pub runtime: usize,
    /// Whose guest it leads to.
    pub guest: usize,
    /// The guest's session.
    pub session: u64,
    /// The driver that has the other end.
    pub serial: u64,
}

/// One runtime's part of the world.
#[derive(Debug)]
pub struct Inhabitant {
    /// The inside of its instance.
    pub guest: Guest,
    /// Starts of its instance.
    pub starts: u64,
    /// The earliest tick that stands in the queue.
    pub tick_at: Option<Duration>,
    /// The instance's present name.
    pub name: String,
    /// What the image brought is there.
    pub has_agent: bool,
    /// The host's agent lies in it.
    pub has_own: bool,
}

/// Everything.
#[derive(Debug)]
pub struct World {
    /// How late it is.
    pub now: Duration,
    /// What was drawn.
    pub plan: Plan,
    /// What happened.
    pub trace: Trace,
    /// Incus.
    pub incus: Incus,
    /// The machine.
    pub host: Host,
    /// The instances' insides.
    pub inhabitants: Vec<Inhabitant>,
    /// The streams.
    pub streams: Vec<Stream>,
    /// The calls.
    pub operations: Vec<Operation>,
    /// What must hold.
    pub oracle: Oracle,
    /// Whether faults are over.
    pub quiet: bool,
    /// The ways that the machines went.
    pub transitions: BTreeSet<Transition>,
    pub(super) random: Random,
    queue: BinaryHeap<Reverse<(Duration, u64, Event)>>,
    order: u64,
    pub(super) sessions: u64,
}

/// What came of a seed.
#[derive(Debug)]
pub struct Outcome {
    /// What does not hold.
    pub violation: Option<Violation>,
    /// What happened.
    pub trace: Trace,
    /// The ways that the machines went.
    pub transitions: BTreeSet<Transition>,
    /// How long it took, in the world's time.
    pub took: Duration,
}

/// Runs a seed.
pub fn run(seed: u64, with_trace: bool) -> Outcome {
    let mut world = World::new(seed, with_trace);
    let violation = world.run().err();
    if let Some(violation) = &violation {
        let (step, now) = (world.trace.steps(), world.now);
        world.trace.line(now, &"!", format_args!("step {step}: {violation}"));
    }
    let World { trace, transitions, now, .. } = world;
    Outcome { violation, trace, transitions, took: now }
}

impl World {
    /// As `seed` draws it.
    pub fn new(seed: u64, with_trace: bool) -> Self {
        let mut random = Random::new(seed);
        let plan = Plan::draw(&mut random);
        let mut incus = Incus::new(random.fork(), plan.trouble);
        incus.put_foreign(if plan.foreign == Foreign::InTheWay { "i0" } else { "somebody-elses" });
        let inhabitants = plan.runtimes.iter().map(|runtime| {
            let mut guest = Guest::new(runtime.script.clone(), random.fork());
            guest.machine.trims_per_mille = runtime.trims;
            let name = runtime.spec.identity.instance_name.clone();
            Inhabitant { guest, starts: 0, tick_at: None, name, has_agent: !runtime.no_agent, has_own: false }
        });
        let inhabitants: Vec<_> = inhabitants.collect();
        let mut world = Self {
            now: Duration::ZERO,
            oracle: Oracle::new(&plan),
            trace: Trace::new(with_trace),
            incus,
            host: Host::new(random.fork()),
            inhabitants,
            streams: Vec::new(),
            operations: Vec::new(),
            quiet: false,
            transitions: BTreeSet::new(),
            random,
            queue: BinaryHeap::new(),
            order: 0,
            sessions: 0,
            plan,
        };
        for at in 0..world.plan.faults.len() {
            world.at(world.plan.faults[at].0, Event::Fault(at));
        }
        world.at(world.plan.quiet_at, Event::Quiet);
        world.at(Duration::from_millis(1), Event::Collect);
        world
    }

    /// Lets something happen then.
    pub fn at(&mut self, at: Duration, event: Event) {
        self.order += 1;
        self.queue.push(Reverse((at.max(self.now), self.order, event)));
    }

    /// A line of the trace.
    pub fn say(&mut self, who: &dyn std::fmt::Display, text: std::fmt::Arguments<'_>) {
        self.trace.line(self.now, who, text);
    }

    /// Runs to the end.
    ///
    /// # Errors
    /// What does not hold.
    pub fn run(&mut self) -> Result<(), Violation> {
        while let Some(Reverse((at, _, event))) = self.queue.pop() {
            self.now = at;
            if let Some(wakes) = self.host.clock.asleep_until.filter(|wakes| at < *wakes && is_hosts(event)) {
                // The machine sleeps: its programs find it when it wakes.
                self.at(wakes, event);
                continue;
            }
            self.trace.step(at, kind(event), self.order);
            self.happen(event)?;
            self.look()?;
            if self.quiet && self.is_over() {
                break;
            }
            if self.now > self.plan.quiet_at + MAX_QUIET {
                break;
            }
            if self.trace.steps() > MAX_STEPS {
                return Err(Violation::liveness("the run does not end: too many steps".to_owned()));
            }
        }
        self.end()
    }

    fn happen(&mut self, event: Event) -> Result<(), Violation> {
        match event {
            Event::Collect => self.start_collector(),
            Event::Fault(at) => {
                self.strike(self.plan.faults[at].1);
                Ok(())
            }
            Event::Quiet => {
                self.be_quiet();
                Ok(())
            }
            Event::Tick(serial, runtime) => self.tick_core(serial, runtime),
            Event::Committed(serial, runtime) => self.commit(serial, runtime),
            Event::Stored(serial, runtime) => self.stored(serial, runtime),
            Event::Effect(operation) => self.take_effect(operation),
            Event::Answer(operation) => self.answer(operation),
            Event::Dialled(serial, runtime, id) => self.dialled(serial, runtime, id),
            Event::Placed(serial, runtime, id) => {
                self.placed(serial, runtime, id);
                Ok(())
            }
            Event::Woken(serial, runtime) => self.wake(serial, runtime),
            Event::Reopen(runtime) => self.reopen(runtime),
            Event::ToHost(stream) => self.read_at_host(stream),
            Event::GuestUp(runtime, start) => {
                self.guest_up(runtime, start);
                Ok(())
            }
            Event::GuestTick(runtime) => {
                self.inhabitants[runtime].tick_at = None;
                self.inhabitants[runtime].guest.tick(self.now);
                self.after_guest(runtime);
                Ok(())
            }
            Event::ToGuest(stream) => {
                self.read_at_guest(stream);
                Ok(())
            }
            Event::Resume(runtime) => {
                self.resume(runtime);
                Ok(())
            }
            Event::Restore(runtime) => {
                self.restore(runtime);
                Ok(())
            }
            Event::Say(runtime, command) => {
                let at_rest = self.host.core(runtime).is_some_and(is_at_rest);
                if !at_rest && !self.oracle.has_command(runtime) {
                    self.command(runtime, command);
                    self.at(self.now + Duration::from_secs(2), event);
                }
                Ok(())
            }
            Event::Room => {
                self.host.disk.borrow_mut().limit(None);
                Ok(())
            }
        }
    }

    /// Whether every runtime is where it stays.
    fn is_over(&self) -> bool {
        let Some(collector) = &self.host.collector else { return false };
        collector.runtimes.iter().all(|driven| {
            let Some(driven) = driven else { return false };
            is_at_rest(&driven.core) && driven.core.is_settled() && driven.commit.is_none()
        })
    }

    /// The guest's end of a stream has something.
    fn read_at_guest(&mut self, at: usize) {
        let Stream { guest: runtime, session, .. } = self.streams[at];
        let guest = &mut self.inhabitants[runtime].guest;
        if let Some(thaw) = guest.frozen_until.filter(|thaw| self.now < *thaw) {
            return self.at(thaw, Event::ToGuest(at));
        }
        if !guest.up || guest.session(session).is_none() {
            return;
        }
        match self.streams[at].link.read(Way::ToGuest, READ_BYTES, self.now) {
            Read::Nothing => {}
            Read::Bytes(bytes) => guest.feed(session, Some(&bytes), self.now),
            Read::End => return self.end_of_input(at),
        }
        self.next_read(at, Way::ToGuest);
        self.after_guest(runtime);
    }

    fn end_of_input(&mut self, at: usize) {
        let Stream { guest: runtime, session, .. } = self.streams[at];
        self.inhabitants[runtime].guest.feed(session, None, self.now);
        self.after_guest(runtime);
    }

    /// Lets the reader look again when there is something.
    pub(super) fn next_read(&mut self, at: usize, way: Way) {
        if let Some(when) = self.streams[at].link.next(way) {
            let event = if way == Way::ToGuest { Event::ToGuest(at) } else { Event::ToHost(at) };
            self.at(when, event);
        }
    }

    /// A guest did something: its sessions' output leaves, its next time is set, and it may be powered off.
    pub(super) fn after_guest(&mut self, runtime: usize) {
        for at in 0..self.streams.len() {
            if self.streams[at].guest == runtime {
                self.drain(at);
            }
        }
        let inhabitant = &mut self.inhabitants[runtime];
        inhabitant.guest.sessions.retain(|session| !session.is_over());
        if inhabitant.guest.machine.powers_off {
            self.say(&format_args!("g{runtime}"), format_args!("powers off"));
            self.power_off(runtime);
        }
        let inhabitant = &mut self.inhabitants[runtime];
        if let Some(due) = inhabitant.guest.next_tick()
            && inhabitant.tick_at.is_none_or(|at| due < at)
        {
            inhabitant.tick_at = Some(due.max(self.now));
            self.at(due, Event::GuestTick(runtime));
        }
    }

    /// Moves a session's output into its stream.
    fn drain(&mut self, at: usize) {
        let Stream { guest: runtime, session: id, .. } = self.streams[at];
        loop {
            let room = self.streams[at].link.room(Way::ToHost);
            let guest = &mut self.inhabitants[runtime].guest;
            let Some(session) = guest.session(id) else { return };
            let over = session.is_over();
            let len = if over { session.output.len() } else { session.output.len().min(room) };
            let bytes: Vec<u8> = session.output.drain(..len).collect();
            if bytes.is_empty() {
                if over {
                    let closed = self.streams[at].link.close(Way::ToHost, self.now);
                    if let Some(when) = closed {
                        self.at(when, Event::ToHost(at));
                    }
                }
                return;
            }
            let idle = self.streams[at].link.next(Way::ToHost).is_none();
            let arrives = self.streams[at].link.send(Way::ToHost, &bytes, self.now);
            if let Some(when) = arrives.filter(|_| idle) {
                self.at(when, Event::ToHost(at));
            }
            self.inhabitants[runtime].guest.wrote(id, self.now);
        }
    }

    /// The agent of an instance that was started is there.
    fn guest_up(&mut self, runtime: usize, start: u64) {
        let inhabitant = &mut self.inhabitants[runtime];
        let running = self.incus.instance(&inhabitant.name).is_some_and(|found| found.status == Status::Running);
        if start != inhabitant.starts || !running || inhabitant.guest.up {
            return;
        }
        inhabitant.guest.boot(self.plan.runtimes[runtime].keeps_files, self.now);
        self.say(&format_args!("g{runtime}"), format_args!("the agent is there"));
        self.after_guest(runtime);
    }

    /// An instance changed by a call.
    pub(super) fn changed(&mut self, runtime: usize, change: Change) {
        match change {
            Change::None => return,
            Change::Made => self.made(runtime),
            Change::Started => self.started(runtime),
            Change::Stopped | Change::Deleted => self.halted(runtime),
        }
        self.notify(runtime);
    }

    fn made(&mut self, runtime: usize) {
        let name = &self.plan.runtimes[runtime].spec.identity.instance_name;
        let config = self.incus.instance(name).map(|made| &made.config);
        let uuid = config.and_then(|config| config.get(MACHINE_UUID)).cloned();
        let inhabitant = &mut self.inhabitants[runtime];
        (inhabitant.has_agent, inhabitant.has_own) = (!self.plan.runtimes[runtime].no_agent, false);
        inhabitant.guest.scrap();
        inhabitant.guest.machine.uuid = uuid;
    }

    /// An instance runs from now on.
    pub(super) fn started(&mut self, runtime: usize) {
        self.inhabitants[runtime].starts += 1;
        let start = self.inhabitants[runtime].starts;
        if let Some(boot) = self.plan.runtimes[runtime].boot {
            self.at(self.now + boot, Event::GuestUp(runtime, start));
        }
    }

    /// An instance runs no more: its streams end, for those who can see it.
    pub(super) fn halted(&mut self, runtime: usize) {
        self.inhabitants[runtime].guest.halt();
        self.inhabitants[runtime].starts += 1;
        let now = self.now;
        for at in 0..self.streams.len() {
            if self.streams[at].guest == runtime && !self.streams[at].link.is_cut() {
                let learns = (!self.random.chance(200)).then(|| self.random.millis(0, 200));
                self.streams[at].link.cut(now, None, learns);
                self.next_read(at, Way::ToHost);
            }
        }
    }

    /// Incus tells whoever listens, or leaves it out.
    pub(super) fn notify(&mut self, runtime: usize) {
        let lost = self.random.chance(self.plan.lost_wakes);
        if let Some(serial) = self.host.serial(runtime).filter(|_| !lost) {
            let after = self.random.millis(1, 50);
            self.at(self.now + after, Event::Woken(serial, runtime));
        }
    }

    /// How the next session behaves.
    pub(super) fn manner(&mut self, runtime: usize, agent: Agent) -> Manner {
        let plan = &self.plan.runtimes[runtime];
        let rude = if self.quiet { 0 } else { plan.rude };
        if plan.future && agent == Agent::Image {
            return Manner::Future;
        }
        if self.random.chance(rude) {
            return self.random.pick(&[Manner::Garbage, Manner::Mute, Manner::Babble]);
        }
        Manner::Honest
    }
}

/// Whether a program of the host would see it.
fn is_hosts(event: Event) -> bool {
    matches!(
        event,
        Event::Collect
            | Event::Tick(..)
            | Event::Committed(..)
            | Event::Stored(..)
            | Event::Answer(_)
            | Event::Dialled(..)
            | Event::Placed(..)
            | Event::Woken(..)
            | Event::ToHost(_)
            | Event::Reopen(_)
            | Event::Say(..)
            | Event::Quiet
            | Event::Fault(_)
    )
}

fn kind(event: Event) -> &'static str {
    match event {
        Event::Collect => "collect",
        Event::Fault(_) => "fault",
        Event::Quiet => "quiet",
        Event::Tick(..) => "tick",
        Event::Committed(..) => "committed",
        Event::Stored(..) => "stored",
        Event::Effect(_) => "effect",
        Event::Answer(_) => "answer",
        Event::Dialled(..) => "dialled",
        Event::Placed(..) => "placed",
        Event::Woken(..) => "woken",
        Event::GuestUp(..) => "guest up",
        Event::GuestTick(_) => "guest tick",
        Event::ToGuest(_) => "to guest",
        Event::ToHost(_) => "to host",
        Event::Restore(_) => "restore",
        Event::Resume(_) => "resume",
        Event::Room => "room",
        Event::Reopen(_) => "reopen",
        Event::Say(..) => "say",
    }
}
