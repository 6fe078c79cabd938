//! What must hold, whatever happens: the nine invariants of the design, as far as an onlooker can see them.
//!
//! ```text
//!   durable commits ──► fold (read by the oracle itself) ──► events, ends, verdicts ──┐
//!   effects ──────────► ack, release, destroy, publish: allowed by what is durable?    ├─► Violation
//!   guests' truth ────► every event, every start                                      │
//!   time ─────────────► deadlines, by the world's own time ───────────────────────────┘
//! ```
//!
//! | invariant | looked at |
//! |---|---|
//! | 1 every event once, in order | each durable record (`Fold::event`), each `ack` (`check_ack`), each start (`recovered`), the end (`invariant_1`) |
//! | 2 one verdict, durable before it is published, right | `Fold::end`, `Fold::verdict`, `publish`, `verdict::check` |
//! | 3 watchdogs within a second, and not before their time | after each step (`Deadlines::check`), each end (`Deadlines::check_fired`) |
//! | 4 nothing of ours outlives its policy, nothing foreign is touched | each effect on Incus (`touched`), the end (`invariant_4`) |
//! | 5 bounds | each commit (`check_bounds`), each effect |
//! | 6 two collectors never both act | each effect on Incus (`touched`) |
//! | 7 collection on every terminal path | `check_destroy`, `publish` |
//! | 8 secrets | each durable record (`Fold::take`), Incus's config and the trace (`invariant_8`) |
//! | 9 a request is started once | after each step (`invariant_9`), each `start` that is sent (`performs`) |
//! | every run ends | `liveness`, and no change of phase that is in no table (`went`) |
//!
//! The oracle sees what the code under test cannot: what the disk would still have after the worst crash, everything that a
//! guest ever said, and how late it really is.

mod deadlines;
mod fold;
mod verdict;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use pika_cloud_common::spec::{AgentPolicy, OutputCollectionMode, RuntimeSpec};
use pika_cloud_common::wire::{Ack, HostMessage};
use pika_host_collector::journal::{Commit, Durable, JournalError};
use pika_host_collector::machine::{Phase, TRANSITIONS, Transition};
use pika_host_collector::runtime::{Call, Effect};

use self::deadlines::{Deadlines, Reading};
use self::fold::{Fold, next_of_header, number_of};
use super::disk::Disk;
use super::guest::Manner;
use super::guest::ledger::byte_of;
use super::host::Opened;
use super::incus::Change;
use super::plan::{Foreign, Plan, SECRET};
use super::world::{Inhabitant, World};

/// The bytes that wait for a disk, at most.
const MAX_PENDING: usize = 9 * 1024 * 1024;
/// What one change of the labels may still find under way.
const UNDER_WAY: Duration = Duration::from_secs(30);

/// Something that must hold and does not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Its number in the design; 0 for what every run must come to.
    pub invariant: u8,
    /// What was seen.
    pub what: String,
}

impl Violation {
    /// Of an invariant.
    pub fn of(invariant: u8, what: String) -> Self {
        Self { invariant, what }
    }

    /// The same, with the runtime that it is about.
    fn about(self, runtime_id: &str) -> Self {
        Self { what: format!("{runtime_id}: {}", self.what), ..self }
    }

    /// Something does not come to its end.
    pub fn liveness(what: String) -> Self {
        Self { invariant: 0, what }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.invariant {
            0 => write!(f, "it does not come to its end: {}", self.what),
            number => write!(f, "invariant {number} does not hold: {}", self.what),
        }
    }
}

type Checked = Result<(), Violation>;

/// What happened to a runtime, for whoever judges its verdict.
#[derive(Clone, Debug, Default)]
#[allow(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub struct Facts {
    /// Its instance stopped by itself, or an operator stopped it.
    pub stopped: bool,
    /// It was deleted behind our back.
    pub deleted: bool,
    /// It was renamed.
    pub renamed: bool,
    /// Incus lost track of it.
    pub errored: bool,
    /// It booted again.
    pub rebooted: bool,
    /// It went back to a snapshot.
    pub rewound: bool,
    /// Its stream was cut or it stood still.
    pub silenced: bool,
    /// It kept no protocol in some session.
    pub rude: bool,
    /// Its supervisor was killed.
    pub supervisor_killed: bool,
    /// A command was given.
    pub commanded: bool,
    /// Incus may fail its calls.
    pub incus_failed: bool,
    /// Its image or its name cannot work.
    pub unfit: bool,
    /// Its agent is gone, and no other can be had.
    pub agentless: bool,
    /// Another collector has it.
    pub taken_over: bool,
}

impl Facts {
    /// Its instance did not stay as it was.
    fn vanished(&self) -> bool {
        self.stopped || self.deleted || self.renamed || self.errored || self.rebooted || self.rewound
    }
}

/// What is known of one runtime.
#[derive(Debug)]
struct Watched {
    spec: Arc<RuntimeSpec>,
    facts: Facts,
    fold: Fold,
    deadlines: Deadlines,
    published: BTreeMap<u32, String>,
    taken_over_at: Option<Duration>,
    changes_since: u32,
}

/// The onlooker.
#[derive(Debug, Default)]
pub struct Oracle {
    runtimes: Vec<Watched>,
    slept: Duration,
    clock_was_set: bool,
    host_booted: bool,
    quiet_at: Option<Duration>,
}

impl Oracle {
    /// Of a plan.
    pub fn new(plan: &Plan) -> Self {
        let trouble = plan.trouble;
        let incus_failed = trouble.passing + trouble.lasting + trouble.dial > 0;
        let watched = |(at, runtime): (usize, &super::plan::RuntimePlan)| Watched {
            spec: Arc::clone(&runtime.spec),
            facts: Facts {
                incus_failed: incus_failed
                    || plan.faults.iter().any(|(_, fault)| {
                        matches!(fault, super::plan::Fault::IncusDown(_) | super::plan::Fault::Stubborn)
                    }),
                unfit: runtime.is_agentless()
                    || (runtime.future && runtime.spec.incus.agent != AgentPolicy::Inject)
                    || (at == 0 && plan.foreign == Foreign::InTheWay),
                silenced: runtime.boot.is_none(),
                ..Facts::default()
            },
            fold: Fold { runtime_id: runtime.spec.identity.runtime_id.clone(), ..Fold::default() },
            deadlines: Deadlines::new(plan.slow_disk * 2),
            published: BTreeMap::new(),
            taken_over_at: None,
            changes_since: 0,
        };
        Self {
            runtimes: plan.runtimes.iter().enumerate().map(watched).collect(),
            slept: Duration::ZERO,
            clock_was_set: false,
            host_booted: false,
            quiet_at: None,
        }
    }

    /// What happened to a runtime.
    pub fn facts(&mut self, runtime: usize) -> &mut Facts {
        &mut self.runtimes[runtime].facts
    }

    fn reading(&self, now: Duration) -> Reading {
        Reading { awake: now.saturating_sub(self.slept), world: now }
    }

    /// The host slept, or is about to.
    pub fn slept(&mut self, slept: Duration) {
        self.slept += slept;
    }

    /// The host's wall clock was set.
    pub fn clock_set(&mut self, by: i64, now: Duration) {
        self.clock_was_set |= by != 0;
        if self.host_booted {
            let reading = self.reading(now);
            self.runtimes.iter_mut().for_each(|watched| watched.deadlines.forget(reading));
        }
    }

    /// The host boots.
    pub fn host_booted(&mut self, clock: i64, now: Duration) {
        self.clock_was_set |= clock != 0;
        self.host_booted = true;
        let reading = self.reading(now);
        if self.clock_was_set {
            self.runtimes.iter_mut().for_each(|watched| watched.deadlines.forget(reading));
        }
    }

    /// The collector is gone.
    pub fn killed(&mut self, _: Duration) {
        self.runtimes.iter_mut().for_each(|watched| watched.deadlines.phase = None);
    }

    /// Nothing goes wrong any more.
    pub fn quiet(&mut self, now: Duration) {
        self.quiet_at = Some(now);
    }

    /// Another collector has it from now on.
    pub fn taken_over(&mut self, runtime: usize, now: Duration) {
        let watched = &mut self.runtimes[runtime];
        watched.facts.taken_over = true;
        watched.taken_over_at.get_or_insert(now);
    }

    /// Whether a command is durable.
    pub fn has_command(&self, runtime: usize) -> bool {
        self.runtimes[runtime].fold.commanded
    }

    /// Its instance is gone: what comes next is a new one.
    pub fn deleted(&mut self, runtime: usize) {
        self.runtimes[runtime].facts.deleted = true;
        self.runtimes[runtime].taken_over_at = None;
    }

    /// A session begins.
    pub fn connected(&mut self, runtime: usize, manner: Manner) {
        self.facts(runtime).rude |= matches!(manner, Manner::Garbage | Manner::Mute | Manner::Babble);
    }

    /// Bytes came.
    pub fn heard(&mut self, runtime: usize, now: Duration) {
        self.runtimes[runtime].deadlines.heard = now.saturating_sub(self.slept);
    }

    /// A journal could not be written: nothing of that commit counts.
    pub fn degraded(&mut self, runtime: usize, _: Duration) -> Checked {
        self.runtimes[runtime].deadlines.phase = None;
        Ok(())
    }

    /// A journal cannot be used. Only a disk that fails may say so.
    pub fn unusable(&mut self, runtime: usize, error: &JournalError, _: Duration) -> Checked {
        self.runtimes[runtime].deadlines.phase = None;
        match error {
            JournalError::Io { .. } | JournalError::Degraded { .. } if self.quiet_at.is_none() => Ok(()),
            error => Err(Violation::of(1, format!("the journal of {runtime} cannot be used: {error}"))),
        }
    }

    /// A runtime is taken up: its journal has all that was ever acknowledged, and what more it has counts from now on.
    pub fn recovered(&mut self, runtime: usize, opened: &Opened, world: &World) -> Checked {
        let disk = world.host.disk.borrow();
        let reading = self.reading(world.now);
        let watched = &mut self.runtimes[runtime];
        let core = &opened.driven.core;
        watched.deadlines.taken_up(core.view().host_boots, core.phase(), reading);
        let prefix = format!("{}/journal", watched.spec.identity.runtime_id);
        let records = records_of(&disk, &prefix);
        let known = watched.fold.lines.len();
        if records.len() < known && records.last_key_value().is_none_or(|(last, _)| last + 1 < known) {
            let last = records.last_key_value().map(|(last, _)| *last);
            return Err(Violation::of(
                1,
                format!("the journal had {known} durable records, and ends with {last:?} now"),
            ));
        }
        let guest = &world.inhabitants[runtime].guest;
        records.values().try_for_each(|line| watched.fold.take(line, guest))?;
        let view = &opened.recovered;
        if view.incarnation != watched.fold.incarnation {
            let text =
                format!("recovered incarnation {}, the journal has {}", view.incarnation, watched.fold.incarnation);
            return Err(Violation::of(2, text));
        }
        watched.check_logs(&disk)
    }

    /// A commit is said to be durable: it is, and it says nothing wrong.
    pub fn durable(&mut self, runtime: usize, commit: &Commit, durable: Durable, world: &World) -> Checked {
        let disk = world.host.disk.borrow();
        let reading = self.reading(world.now);
        let is_sure = !(self.clock_was_set && self.host_booted);
        let watched = &mut self.runtimes[runtime];
        let id = &watched.spec.identity.runtime_id;
        let name = if durable.segment == 1 {
            "journal.jsonl".to_owned()
        } else {
            format!("journal.{}.jsonl", durable.segment)
        };
        let end = usize::try_from(durable.length).unwrap_or(usize::MAX);
        let stands = disk.durable(&format!("{id}/{name}")).and_then(|content| content.get(..end));
        if !stands.is_some_and(|content| content.ends_with(&commit.records)) {
            return Err(Violation::of(
                1,
                format!("{name} is said to be durable up to {end}, and the disk does not have it"),
            ));
        }
        let text = String::from_utf8_lossy(&commit.records);
        let had_end = watched.fold.lives.get(&watched.fold.incarnation).is_some_and(|life| life.ended.is_some());
        let guest = &world.inhabitants[runtime].guest;
        text.lines().try_for_each(|line| watched.fold.take(line, guest))?;
        let facts = watched.facts.clone();
        let life = watched.fold.life();
        if !had_end && let Some(outcome) = life.ended.clone() {
            verdict::check(life, &facts)?;
            if is_sure {
                watched.deadlines.check_fired(&watched.spec, &outcome, reading)?;
            }
        }
        watched.check_logs(&disk)?;
        watched.check_bounds(&disk)
    }

    /// The machine went from phase to phase.
    pub fn went(&mut self, runtime: usize, transitions: &[Transition], phase: Phase, now: Duration) -> Checked {
        let awake = self.reading(now).awake;
        let watched = &mut self.runtimes[runtime];
        for transition in transitions {
            if !TRANSITIONS.is_empty() && !TRANSITIONS.contains(transition) {
                return Err(Violation::liveness(format!("{transition:?} is in no table")));
            }
        }
        if watched.deadlines.phase.is_none_or(|(was, _)| was != phase) || !transitions.is_empty() {
            watched.deadlines.phase = Some((phase, awake));
        }
        Ok(())
    }

    /// An effect is about to be performed: what is durable allows it.
    pub fn performs(&mut self, runtime: usize, effect: &Effect, world: &World) -> Checked {
        let watched = &mut self.runtimes[runtime];
        let disk = &*world.host.disk.borrow();
        let Some(core) = world.host.core(runtime) else { return Ok(()) };
        if core.pending() > MAX_PENDING {
            return Err(Violation::of(5, format!("{} bytes wait for the disk", core.pending())));
        }
        let leads_to = world.host.link(runtime).map_or(runtime, |stream| world.streams[stream].guest);
        match effect {
            Effect::Send(HostMessage::Hello(_) | HostMessage::Ping(_)) => Ok(()),
            // What is in a start is secret, and an owner's word changes a guest.
            Effect::Send(_) if leads_to != runtime => {
                Err(Violation::of(8, format!("the guest of another runtime, g{leads_to}, is told what is not for it")))
            }
            Effect::Send(HostMessage::Ack(ack)) => watched.check_ack(ack, disk),
            Effect::Send(HostMessage::Start(_)) if !watched.fold.life().start_sent => {
                Err(Violation::of(9, "the workload is asked for, and the journal does not say so".to_owned()))
            }
            Effect::Send(HostMessage::Release(_)) if watched.fold.life().verdict.is_none() => {
                Err(Violation::of(2, "the guest is released before its verdict is durable".to_owned()))
            }
            Effect::Call(_, Call::Destroy { .. }) => watched.check_destroy(),
            Effect::Call(_, Call::Create { .. }) if watched.fold.incarnation == 0 => {
                Err(Violation::of(4, "an instance is made before the journal says so".to_owned()))
            }
            Effect::Derive { incarnation } => watched.publish(*incarnation),
            _ => Ok(()),
        }
    }

    /// Incus did what it was asked for.
    pub fn touched(
        &mut self,
        runtime: usize,
        change: Change,
        foreign: bool,
        asked_at: Duration,
        now: Duration,
    ) -> Checked {
        if change == Change::None {
            return Ok(());
        }
        if foreign {
            return Err(Violation::of(4, format!("a foreign instance was touched: {change:?}")));
        }
        let watched = &mut self.runtimes[runtime];
        let deleted = watched.taken_over_at.take_if(|_| change == Change::Deleted);
        // Invariant 6, and one call that was under way.
        if let Some(at) = deleted.or(watched.taken_over_at).filter(|at| asked_at > *at) {
            watched.changes_since += 1;
            if watched.changes_since > 1 || now > at + UNDER_WAY {
                return Err(Violation::of(
                    6,
                    format!("{change:?}, asked for at {asked_at:?}, of what was taken over at {at:?}"),
                ));
            }
        }
        Ok(())
    }
}

/// The records of a journal as they stand, by their numbers. Where a segment begins before the end of the one before it, it
/// counts.
fn records_of(disk: &Disk, prefix: &str) -> BTreeMap<usize, String> {
    let mut segments: Vec<(u64, &str)> =
        disk.paths(prefix).filter_map(|path| Some((segment_number(path)?, path))).collect();
    segments.sort_unstable();
    let mut records = BTreeMap::new();
    for (_, path) in segments {
        let content = String::from_utf8_lossy(disk.content(path).unwrap_or_default()).into_owned();
        for line in content.lines() {
            match number_of(line) {
                Some(n) => drop(records.insert(n, line.to_owned())),
                None => {
                    if let Some(next) = next_of_header(line) {
                        records.split_off(&next);
                    }
                }
            }
        }
    }
    records
}

/// Of a segment's path.
fn segment_number(path: &str) -> Option<u64> {
    let name = path.rsplit('/').next()?;
    if name == "journal.jsonl" {
        return Some(1);
    }
    name.strip_prefix("journal.")?.strip_suffix(".jsonl")?.parse().ok()
}

impl Watched {
    /// Invariant 1: only what is durable is acknowledged.
    fn check_ack(&self, ack: &Ack, disk: &Disk) -> Checked {
        let durable = self.fold.stream.as_ref().map_or(0, |(_, seq)| *seq);
        if ack.seq > durable {
            return Err(Violation::of(1, format!("event {} is acknowledged, durable is {durable}", ack.seq)));
        }
        for (name, offset) in &ack.logs {
            let mark = self.fold.logs.get(name).copied().unwrap_or_default();
            if *offset > mark.guest {
                return Err(Violation::of(1, format!("{name} is acknowledged up to {offset}, durable is {mark:?}")));
            }
        }
        self.check_logs(disk)
    }

    /// Invariant 1: a log is on the disk as far as the journal says, byte for byte as the guest has it.
    fn check_logs(&self, disk: &Disk) -> Checked {
        for (name, mark) in &self.fold.logs {
            let path = format!("{}/{}/logs/{name}", self.spec.identity.runtime_id, self.fold.incarnation);
            let length = disk.durable(&path).map_or(0, <[u8]>::len) as u64;
            if length < mark.host {
                return Err(Violation::of(
                    1,
                    format!("{name} is said to have {} bytes, durable are {length}", mark.host),
                ));
            }
        }
        Ok(())
    }

    /// Invariant 5: a journal is bounded.
    fn check_bounds(&self, disk: &Disk) -> Checked {
        let id = &self.spec.identity.runtime_id;
        let bytes = disk.bytes(&format!("{id}/journal"));
        // A segment of each kind more than the limit, and what stands in a view.
        let limit = usize::try_from(self.spec.limits.event_bytes).unwrap_or(usize::MAX) + 3 * 256 * 1024;
        if bytes > limit {
            return Err(Violation::of(5, format!("the journal has {bytes} bytes, its limit is {limit}")));
        }
        Ok(())
    }

    /// Invariants 2 and 7: nothing is destroyed before the verdict is durable, and outputs were collected.
    fn check_destroy(&mut self) -> Checked {
        let wanted = self.spec.policies.output_collection.mode != OutputCollectionMode::None;
        let life = self.fold.life();
        if life.verdict.is_none() {
            return Err(Violation::of(2, "the instance is destroyed before its verdict is durable".to_owned()));
        }
        if wanted && life.collected.is_none() {
            return Err(Violation::of(7, "the instance is destroyed before its outputs are collected".to_owned()));
        }
        Ok(())
    }

    /// Invariant 2: what is published is durable, and never another.
    fn publish(&mut self, incarnation: u32) -> Checked {
        let verdict = self.fold.lives.get(&incarnation).and_then(|life| life.verdict.clone());
        let Some(verdict) = verdict else {
            return Err(Violation::of(
                2,
                format!("incarnation {incarnation} is published, and has no durable verdict"),
            ));
        };
        let first = self.published.entry(incarnation).or_insert_with(|| verdict.clone());
        if *first != verdict {
            return Err(Violation::of(
                2,
                format!("incarnation {incarnation} is published as {verdict}, and was {first}"),
            ));
        }
        let wanted = self.spec.policies.output_collection.mode != OutputCollectionMode::None;
        if wanted && self.fold.lives.get(&incarnation).is_some_and(|life| life.collected.is_none()) {
            return Err(Violation::of(7, format!("incarnation {incarnation} is published, and nothing was collected")));
        }
        Ok(())
    }
}

impl World {
    /// Looks at everything after a step.
    pub(super) fn look(&mut self) -> Checked {
        let reading = self.oracle.reading(self.now);
        self.invariant_9()?;
        let Some(collector) = &self.host.collector else { return Ok(()) };
        for (driven, watched) in collector.runtimes.iter().zip(&mut self.oracle.runtimes) {
            if let Some(driven) = driven {
                let checked = watched.deadlines.check(&watched.spec, driven.core.view(), reading);
                checked.map_err(|violation| violation.about(&watched.spec.identity.runtime_id))?;
            }
        }
        Ok(())
    }

    /// A request is started at most once per incarnation.
    fn invariant_9(&self) -> Checked {
        for inhabitant in &self.inhabitants {
            if let Some((id, times)) = inhabitant.guest.machine.starts.iter().find(|(_, times)| **times > 1) {
                return Err(Violation::of(9, format!("{id} was started {times} times")));
            }
        }
        Ok(())
    }

    /// What must hold when all is over.
    pub(super) fn end(&mut self) -> Checked {
        self.invariant_1()?;
        self.invariant_4()?;
        self.invariant_8()?;
        self.liveness()
    }

    /// What was collected whole has everything that the guest had said before.
    fn invariant_1(&self) -> Checked {
        for (watched, inhabitant) in self.oracle.runtimes.iter().zip(&self.inhabitants) {
            for (incarnation, life) in &watched.fold.lives {
                for stream in life.streams.iter().filter(|_| life.collected == Some(true)) {
                    let sent = inhabitant.guest.machine.archived.iter().filter(|(id, ..)| id == stream);
                    let least = sent.map(|(_, seq, _)| *seq).min().unwrap_or(0);
                    let seen = watched.fold.seen.get(stream).copied().unwrap_or(0);
                    if seen < least {
                        let text = format!(
                            "incarnation {incarnation} is complete, and has {seen} of {least} events of {stream}"
                        );
                        return Err(Violation::of(1, text));
                    }
                }
            }
            watched.log_is_the_guests(inhabitant, &self.host.disk.borrow())?;
        }
        Ok(())
    }

    /// No owned instance outlives its policy; no foreign instance is touched.
    fn invariant_4(&self) -> Checked {
        let foreign = self.incus.instances().filter(|(_, instance)| instance.foreign).count();
        if foreign != 1 {
            return Err(Violation::of(4, format!("there are {foreign} foreign instances")));
        }
        let Some(collector) = &self.host.collector else { return Ok(()) };
        for (runtime, driven) in collector.runtimes.iter().enumerate() {
            let Some(driven) = driven else { continue };
            let id = &self.plan.runtimes[runtime].spec.identity.runtime_id;
            let left = self.incus.instances().find(|(_, instance)| {
                // What another collector has is its own to end.
                let owner = instance.config.get(super::incus::OWNER).map(String::as_str);
                instance.config.get("user.pika-cloud.runtime-id") == Some(id) && owner == Some(super::host::OWNER)
            });
            if let (Phase::Done, Some((name, _))) = (driven.core.phase(), left) {
                let why = driven.core.left_behind();
                return Err(Violation::of(4, format!("{id} is done, and its instance {name} is there: {why:?}")));
            }
        }
        Ok(())
    }

    /// The secret is where it belongs.
    fn invariant_8(&self) -> Checked {
        let leaks = |(_, instance): &(&str, &super::incus::Instance)| {
            instance.config.iter().any(|(key, value)| key.contains(SECRET) || value.contains(SECRET))
        };
        if self.incus.instances().any(|instance| leaks(&instance)) {
            return Err(Violation::of(8, "the secret is in Incus's config".to_owned()));
        }
        match self.trace.leaks().first() {
            Some(line) => Err(Violation::of(8, format!("the secret is in what was done: {line}"))),
            None => Ok(()),
        }
    }

    /// Every runtime is where it stays.
    fn liveness(&self) -> Checked {
        let Some(collector) = &self.host.collector else {
            return Err(Violation::liveness("there is no collector".to_owned()));
        };
        for (runtime, driven) in collector.runtimes.iter().enumerate() {
            let Some(driven) = driven else {
                return Err(Violation::liveness(format!("the journal of {runtime} cannot be used")));
            };
            if !super::shell::is_at_rest(&driven.core) || !driven.core.is_settled() {
                let phase = driven.core.phase();
                return Err(Violation::liveness(format!("runtime {runtime} stays in {phase:?} with nothing to come")));
            }
        }
        Ok(())
    }
}

impl Watched {
    /// Invariant 1, of the log: as long as nothing was left out, it is the guest's, byte for byte.
    fn log_is_the_guests(&self, inhabitant: &Inhabitant, disk: &Disk) -> Checked {
        let Some((stream, _)) = &self.fold.stream else { return Ok(()) };
        let Some(told) = inhabitant.guest.machine.truth.get(stream) else { return Ok(()) };
        let Some(mark) = self.fold.logs.get("guest.log") else { return Ok(()) };
        let life = self.fold.lives.get(&self.fold.incarnation);
        let one_stream = life.is_some_and(|life| life.streams.iter().all(|id| id == stream));
        if !one_stream {
            return Ok(());
        }
        if mark.guest > told.log.1 && !told.rewound {
            let text = format!("guest.log is taken up to {}, and the guest has {} bytes", mark.guest, told.log.1);
            return Err(Violation::of(1, text));
        }
        let policy = &self.spec.policies.output_collection;
        if !policy.include_logs || policy.mode == OutputCollectionMode::None {
            return Ok(());
        }
        let path = format!("{}/{}/logs/guest.log", self.spec.identity.runtime_id, self.fold.incarnation);
        let content = disk.content(&path).unwrap_or_default();
        if mark.guest != mark.host {
            let said = [&b" bytes are missing here]"[..], b"goes on beyond", b" bytes were removed here]"];
            let is_said = said.iter().any(|text| content.windows(text.len()).any(|window| window == *text));
            let text = format!("{path} has {} bytes of {}, and does not say so", mark.host, mark.guest);
            return if is_said { Ok(()) } else { Err(Violation::of(1, text)) };
        }
        let wrong = content.iter().take(usize::try_from(mark.host).unwrap_or(0)).enumerate();
        let wrong = wrong.into_iter().find(|(at, byte)| **byte != byte_of(told.log.0, *at as u64));
        match wrong {
            Some((at, _)) => Err(Violation::of(1, format!("byte {at} of {path} is not the guest's"))),
            None => Ok(()),
        }
    }
}
