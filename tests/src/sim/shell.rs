//! The shell around the cores, made of models: performs effects one by one and brings back what came of them. Like the real
//! one it decides nothing; unlike it, it can be killed between any two effects and at any call of the file system.

mod calls;
mod dial;

use std::time::Duration;

use pika_cloud_common::wire::HostMessage;
use pika_host_collector::machine::SessionLoss;
use pika_host_collector::runtime::{Core, Effect};

use super::host::{Artifacts, Driven};
use super::link::{Read, Way};
use super::oracle::{Oracle, Violation};
use super::world::{Event, Stream, World};

/// How long a journal that could not be written is left alone.
const REOPEN: Duration = Duration::from_secs(1);

type Checked = Result<(), Violation>;

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
            Effect::Dial { id, instance, way } => self.dial(serial, runtime, id, &instance, way),
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

    /// Lets the oracle look at the whole world.
    fn with_oracle(&mut self, look: impl FnOnce(&mut Oracle, &Self) -> Checked) -> Checked {
        let mut oracle = std::mem::take(&mut self.oracle);
        let checked = look(&mut oracle, self);
        self.oracle = oracle;
        checked
    }
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
