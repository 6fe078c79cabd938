//! The tokio shell around a runtime's [`Core`]: it performs effects in their order, waits for whatever comes first, and
//! decides nothing.
//!
//! ```text
//!   Core ──Effect──► Driver ──► Backend (Incus), Writer (journal), Live (stream), Sink (artifacts)
//!    ▲                 │
//!    └── what came ────┘
//! ```
//!
//! What can fail here is the journal: then the driver ends with an error and destroys nothing, and the next one goes on
//! from what is durable.
//!
//! [`Cloud`](crate::Cloud) drives runtimes on Incus this way; whoever has another [`Backend`] gives it to a driver itself.
//! Thousands of drivers wait in one process: each is one task without a thread, a timer, and no descriptor but its lock.

mod backend;
mod incus;
mod link;
mod sink;

use std::sync::Arc;
use std::time::Duration;

use pika_cloud_common::{Command, RuntimeSpec};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::clock::{HostClock, Now};
use crate::error::Error;
use crate::incus::Wakes;
use crate::journal::{Records, View, Writer};
use crate::machine::{Phase, SessionLoss};
use crate::runtime::{Answer, CallId, Core, Effect, Stored};
use link::Live;
use sink::Sink;

pub use crate::state_dir::{RuntimeFolder, RuntimeLock};
pub use backend::{Backend, Explain, Link};
pub(crate) use incus::{IncusBackend, claim, failure, find, is_of};

/// How long a deadline that has passed lets what comes in go first.
const MAX_OVERDUE: Duration = Duration::from_millis(300);

/// How far a driver goes before it gives control back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// The workload has been started, or the incarnation is over.
    Accepted,
    /// There is a verdict that no restart follows, and its instance is destroyed or kept.
    Settled,
    /// Nothing is left to do: what a policy keeps is not kept any longer.
    Done,
}

/// What a driver is made of.
pub struct Parts<B> {
    /// Calls and streams.
    pub backend: B,
    /// What it goes by, validated.
    pub spec: Arc<RuntimeSpec>,
    /// The id of the state dir, which its instance is marked with.
    pub owner: Arc<str>,
    /// Where its journal and its outputs are.
    pub folder: RuntimeFolder,
    /// Its journal, which holds the runtime's lock.
    pub writer: Writer,
    /// What that says. The current incarnation was begun in it.
    pub records: Records,
    /// The host's.
    pub clock: Arc<HostClock>,
    /// What people and programs want of it.
    pub commands: mpsc::UnboundedReceiver<Command>,
    /// Incus says that something happened to its instance.
    pub wakes: Wakes,
    /// Whether the spec is whole: of one that was read back from disk the secrets are missing.
    pub is_whole: bool,
}

/// Drives one runtime.
pub struct Driver<B> {
    backend: B,
    folder: RuntimeFolder,
    writer: Writer,
    core: Core,
    clock: Arc<HostClock>,
    live: Option<Live>,
    /// Counts streams, so that the end of an earlier one is not taken for the present one's.
    stream: u64,
    sink: Sink,
    ops: JoinSet<Op>,
    commands: mpsc::UnboundedReceiver<Command>,
    wakes: Wakes,
    is_whole: bool,
    /// Since when a deadline that has passed lets others go first.
    overdue_since: Option<Duration>,
    /// The number of the record that follows what told that the workload was started, or a later one.
    accepted_before: Option<u64>,
    /// The number of the first record in the last commit: those before it are durable.
    durable_before: u64,
}

/// What a task beside the driver came to.
enum Op {
    /// Incus answered.
    Answered(CallId, Answer),
    /// A stream to the agent.
    Dialled(CallId, Result<Link, SessionLoss>),
    /// Why a stream ended.
    Ended(u64, SessionLoss),
    /// Artifacts are stored.
    Stored(Stored),
}

/// What woke the driver.
enum Event {
    Op(Op),
    Read(std::io::Result<usize>),
    Committed(crate::journal::Commit),
    Command(Command),
    Woken,
    Time,
}

impl<B: Backend> Driver<B> {
    /// Takes a runtime over from its journal, whose current incarnation was begun.
    ///
    /// # Errors
    /// Where its log files cannot be read or cut.
    pub fn new(parts: Parts<B>) -> Result<Self, Error> {
        let Parts { backend, spec, owner, folder, mut writer, mut records, clock, commands, wakes, is_whole } = parts;
        let now = clock.now();
        let short_logs = match writer.store() {
            Some(store) => store.cut_logs(records.view())?,
            None => std::collections::BTreeMap::new(),
        };
        records.boot(clock.boot_id(), now);
        // Anything that differs between runtimes will do to spread their retries.
        let random = u64::from(crc32fast::hash(spec.identity.runtime_id.as_bytes())) << 20 | 0x9E37;
        let core = Core::open(spec, owner, records, &short_logs, random, now);
        let sink = Sink::new(folder.clone());
        Ok(Self {
            backend,
            folder,
            writer,
            core,
            clock,
            live: None,
            stream: 0,
            sink,
            ops: JoinSet::new(),
            commands,
            wakes,
            is_whole,
            overdue_since: None,
            accepted_before: None,
            durable_before: 0,
        })
    }

    /// What the journal says.
    pub fn view(&self) -> &View {
        self.core.view()
    }

    /// Why the instance is still there, where it should not be.
    pub fn left_behind(&self) -> Option<&str> {
        self.core.left_behind()
    }

    /// Drives until `until` is reached.
    ///
    /// # Errors
    /// Where the journal or an output on the host cannot be written: nothing is destroyed then, and the next start goes on.
    pub async fn drive(&mut self, until: Until) -> Result<(), Error> {
        // What was recovered may be acted on once it is durable.
        self.writer.settle().await?;
        loop {
            while let Some(effect) = self.core.next_effect() {
                self.perform(effect).await?;
            }
            if self.has_reached(until) && (self.core.is_settled() || self.is_accepted(until)) {
                return Ok(());
            }
            // The next incarnation would be started without its secrets.
            if !self.is_whole && self.core.phase() == Phase::Resting && self.core.is_settled() {
                return Err(Error::SpecNeeded { runtime_id: self.core.spec().identity.runtime_id.clone() });
            }
            let event = self.wait().await?;
            self.take(event);
        }
    }

    fn has_reached(&self, until: Until) -> bool {
        let phase = self.core.phase();
        let is_done = matches!(phase, Phase::Done | Phase::TakenOver);
        match until {
            Until::Done => is_done,
            Until::Settled => is_done || phase == Phase::Kept,
            Until::Accepted => is_done || phase == Phase::Kept || self.core.view().accepted_at.is_some(),
        }
    }

    /// That it is durable that the workload was started, for whoever waits for no more: one that never stops talking always has
    /// something that is not durable yet.
    fn is_accepted(&mut self, until: Until) -> bool {
        let view = self.core.view();
        if until != Until::Accepted || view.accepted_at.is_none() {
            return false;
        }
        let before = *self.accepted_before.get_or_insert(view.next_n);
        self.durable_before >= before
    }

    async fn perform(&mut self, effect: Effect) -> Result<(), Error> {
        match effect {
            Effect::Call(id, call) => {
                let call = self.backend.call(call);
                self.ops.spawn(async move { Op::Answered(id, call.await) });
            }
            Effect::Dial { id, instance, way } => {
                let dial = self.backend.dial(instance, way);
                self.ops.spawn(async move { Op::Dialled(id, dial.await) });
            }
            Effect::HangUp => {
                if let Some(live) = self.live.take() {
                    tokio::spawn(live.hang_up());
                }
            }
            Effect::Farewell => {
                if let Some(live) = self.live.take() {
                    // Rare, and large: no driver that waits has room for it.
                    Box::pin(live.hang_up()).await;
                }
            }
            Effect::Send(message) => {
                if self.live.as_mut().is_some_and(|live| !live.send(&message)) {
                    self.live = None;
                    let loss = SessionLoss::Lost("the guest does not read what it is sent".to_owned());
                    self.core.link_lost(loss, self.clock.now());
                }
            }
            Effect::Commit(commit) => {
                // There is never more than one under way.
                self.durable_before = commit.first_n;
                self.writer.start(commit)?;
            }
            Effect::BeginArtifacts { incarnation, limits } => self.sink.begin(incarnation, limits),
            Effect::StoreArtifacts { within } => {
                let stored = self.sink.store(within);
                self.ops.spawn(async move { Op::Stored(stored.await) });
            }
            Effect::Prune { before } => prune(self.folder.clone(), before),
            Effect::Derive { incarnation } => Box::pin(derive(self.folder.clone(), incarnation)).await?,
        }
        Ok(())
    }

    /// Waits for whatever comes first.
    async fn wait(&mut self) -> Result<Event, Error> {
        let now = self.clock.now();
        let deadline = self.core.next_tick();
        // Where time stood still for us, what came in meanwhile is heard before any deadline that has passed; and where so much
        // comes in that it never ends, the deadline has its turn all the same (Invariant 3).
        if deadline.is_none_or(|deadline| now.mono < deadline) {
            self.overdue_since = None;
        } else if now.mono >= *self.overdue_since.get_or_insert(now.mono) + MAX_OVERDUE {
            self.overdue_since = None;
            return Ok(Event::Time);
        }
        let sleep = deadline.map(|deadline| Instant::now() + deadline.saturating_sub(now.mono));
        let Self { core, writer, live, ops, commands, wakes, .. } = self;
        Ok(tokio::select! {
            biased;
            committed = writer.committed() => Event::Committed(committed?),
            Some(op) = ops.join_next() => match op {
                Ok(op) => Event::Op(op),
                // A panic in a call is a fault of ours; the runtime goes on from its journal at the next start.
                Err(error) => return Err(Error::Panicked(error.to_string())),
            },
            Some(command) = commands.recv() => Event::Command(command),
            () = wakes.next() => Event::Woken,
            read = link::read(live.as_mut(), core) => Event::Read(read),
            () = sleep_until(sleep) => Event::Time,
        })
    }

    fn take(&mut self, event: Event) {
        let now = self.clock.now();
        match event {
            Event::Op(op) => self.op(op, now),
            Event::Read(Ok(n @ 1..)) => self.core.read(n, now, &mut self.sink),
            Event::Read(Ok(_)) => self.ended_by_guest(),
            Event::Read(Err(error)) => {
                self.live = None;
                self.core.link_lost(SessionLoss::Lost(error.to_string()), now);
            }
            Event::Committed(commit) => self.core.committed(commit, now),
            Event::Command(command) => self.core.command(command, now),
            Event::Woken => self.core.woken(now),
            Event::Time => self.core.tick(now),
        }
    }

    fn op(&mut self, op: Op, now: Now) {
        match op {
            Op::Answered(id, answer) => self.core.answer(id, answer, now),
            Op::Dialled(id, Ok(link)) => {
                let address = link.vsock.clone();
                // One that nobody waits for any more is dropped again by the core's hang-up, or here.
                if self.core.waits_for_dial(id) {
                    self.stream += 1;
                    self.live = Some(Live::new(link));
                }
                self.core.dialled(id, Ok(address), now);
            }
            Op::Dialled(id, Err(loss)) => self.core.dialled(id, Err(loss), now),
            Op::Ended(stream, loss) if stream == self.stream => self.core.link_lost(loss, now),
            Op::Ended(..) => {}
            Op::Stored(stored) => self.core.stored(stored, now),
        }
    }

    /// The guest's side ended without a word. Why is Incus's to say, and is asked beside everything else.
    fn ended_by_guest(&mut self) {
        let Some(live) = self.live.take() else { return };
        let stream = self.stream;
        self.ops.spawn(async move { Op::Ended(stream, live.ended().await) });
    }
}

/// What is derived can be derived again, so that a failure here is told and stops nothing.
async fn derive(folder: RuntimeFolder, incarnation: u32) -> Result<(), Error> {
    let derive = move || crate::outputs::derive(folder.path(), &folder.incarnation(incarnation), incarnation);
    let derived = tokio::task::spawn_blocking(derive).await.map_err(|error| Error::Panicked(error.to_string()))?;
    if let Err(error) = derived {
        tracing::warn!("what is derived from the journal is not written: {error}");
    }
    Ok(())
}

/// Removes old outputs, which nothing waits for: what of them is left goes when the next incarnation begins.
pub(crate) fn prune(folder: RuntimeFolder, before: u32) {
    tokio::task::spawn_blocking(move || {
        if let Err(error) = folder.prune(before) {
            tracing::warn!("outputs of old incarnations are left: {error}");
        }
    });
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
