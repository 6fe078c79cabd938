//! The one task that owns a runtime: it joins machine, session and journal with Incus, and decides nothing itself.
//!
//! ```text
//!                        ┌────────────── Action ──────────────┐
//!   Incus's answers ─┐   │                                    ▼
//!   bytes ─► session ┼─► Input ─► Machine            calls to Incus (ops), dial, archive
//!   time, cancel ────┘                                        │
//!                 session ─► journal ─► commit ─► ack, publish ┘
//! ```
//!
//! What the guest said reaches the machine, the guest (as `ack`) and followers only after the journal has it durably
//! (Invariants 1 and 2).
//!
//! Happy path: wake, take what came in, step the machine, perform its actions, start a commit if there is none, sleep. What
//! can fail here: the journal, and then the driver ends with an error and destroys nothing; everything else is an input of
//! the machine.

mod collecting;
mod intake;
mod link;
mod perform;
mod talk;

use std::collections::VecDeque;
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use pika_cloud_common::RuntimeSpec;
use pika_cloud_common::spec::OutputCollectionMode;
use pika_cloud_common::wire::{Ack, HostMessage};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::error::Error;
use crate::incus::{Client, InstanceView};
use crate::journal::{HostRecord, Journal};
use crate::logs::{Dirty, LogFiles};
use crate::machine::{Action, CallFailure, Guest, Input, Machine, Phase, Plan, SessionLoss, Start};
use crate::state_dir::RuntimeFolder;
use crate::transport::Link;
use collecting::Collecting;
use intake::Intake;
use link::Live;
pub(crate) use perform::failure;

/// How often it is looked whether another process asked for the runtime's end.
const CANCEL_POLL: Duration = Duration::from_secs(1);

/// While more than this waits for the disk, nothing is read from the guest.
const MAX_PENDING_BYTES: usize = 8 * 1024 * 1024;

/// How long a deadline that has passed lets what comes in go first.
const MAX_OVERDUE: Duration = Duration::from_millis(500);

/// How long log bytes wait for more before they are synced.
const GATHER: Duration = Duration::from_millis(50);

/// The same for counts alone, where bytes and events are beyond their limits: what a flood costs stays small.
const GATHER_COUNTS: Duration = Duration::from_secs(30);

/// How far a driver goes before it gives control back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Until {
    /// The workload has been started, or the incarnation is over.
    Accepted,
    /// Everything is done.
    Done,
}

/// What a driver is made of.
pub(crate) struct Parts {
    pub(crate) client: Client,
    pub(crate) spec: RuntimeSpec,
    pub(crate) owner: String,
    pub(crate) folder: RuntimeFolder,
    pub(crate) journal: Journal,
}

/// Drives one incarnation.
pub(crate) struct Driver {
    client: Client,
    spec: RuntimeSpec,
    owner: String,
    folder: RuntimeFolder,
    journal: Journal,
    logs: LogFiles,
    machine: Machine,
    /// What the machine wants before anything came in.
    first: Vec<Action>,
    clock: Instant,
    live: Option<Live>,
    intake: Intake,
    collecting: Option<Collecting>,
    ops: JoinSet<Op>,
    /// What the machine hears once the commit under way is durable.
    in_commit: CommitBatch,
    /// What it hears once the next one is.
    next_commit: CommitBatch,
    acked: Ack,
    /// When what is gathered beside events is committed at the latest.
    gather_until: Option<Duration>,
    /// Log files that the next commit speaks of.
    unsynced_logs: Vec<Arc<File>>,
    /// Since when a deadline that has passed lets others go first.
    overdue_since: Option<Duration>,
    /// When it is looked next whether another process asked for the end.
    next_poll: Duration,
    /// Whether Incus is creating or starting the instance for us.
    provisioning: bool,
    /// Incus's own word for the instance, when it was last asked.
    instance_status: Option<String>,
    /// Whether the spec wants logs on the host.
    keeps_logs: bool,
    /// Why the instance could not be destroyed, where it could not.
    left_behind: Option<String>,
}

/// What waits for one commit.
#[derive(Default)]
struct CommitBatch {
    guest: VecDeque<Guest>,
    send: Vec<HostMessage>,
    ack: Option<Ack>,
}

impl CommitBatch {
    /// What the guest repeats is heard once.
    fn hear(&mut self, guest: Guest) {
        if self.guest.back() != Some(&guest) {
            self.guest.push_back(guest);
        }
    }

    fn is_empty(&self) -> bool {
        self.guest.is_empty() && self.send.is_empty()
    }
}

/// What a call that ran beside the driver came to.
enum Op {
    /// The instance, where there is one.
    Looked(Result<Option<InstanceView>, CallFailure>),
    /// Created, or started.
    Provisioned(Input),
    /// A stream to the agent.
    Dialled(Result<Box<Link>, SessionLoss>),
    /// Why a session ended.
    Lost(SessionLoss),
    /// The instance is gone, or is not.
    Destroyed(Result<(), CallFailure>),
}

/// What woke the driver.
enum Wake {
    Op(Op),
    Read(std::io::Result<usize>),
    Committed,
    Cancel,
    Time,
}

impl Driver {
    /// Takes a runtime over from its journal, whose current incarnation was begun.
    pub(crate) fn new(parts: Parts) -> Result<Self, Error> {
        let Parts { client, spec, owner, folder, journal } = parts;
        let view = journal.view();
        let start = Start::of(view, view.start_sent.as_ref().map(|sent| crate::clock::since(&sent.at)));
        let (machine, first) = Machine::new(Plan::of(&spec), &start, Duration::ZERO);
        let outputs = folder.incarnation(view.incarnation);
        crate::state_dir::make_folder(&outputs)?;
        crate::outputs::remove_stale(&outputs).map_err(|source| Error::Outputs { path: outputs.clone(), source })?;
        let logs = LogFiles::open(&outputs.join("logs"), spec.limits.log_bytes, view)
            .map_err(|source| Error::Outputs { path: outputs.join("logs"), source })?;
        let intake = Intake::new(&spec);
        let collection = &spec.policies.output_collection;
        let keeps_logs = collection.include_logs && collection.mode != OutputCollectionMode::None;
        Ok(Self {
            client,
            spec,
            owner,
            folder,
            journal,
            logs,
            machine,
            first,
            clock: Instant::now(),
            live: None,
            intake,
            collecting: None,
            ops: JoinSet::new(),
            in_commit: CommitBatch::default(),
            next_commit: CommitBatch::default(),
            acked: Ack { seq: 0, logs: std::collections::BTreeMap::new() },
            gather_until: None,
            unsynced_logs: Vec::new(),
            overdue_since: None,
            next_poll: CANCEL_POLL,
            provisioning: false,
            instance_status: None,
            keeps_logs,
            left_behind: None,
        })
    }

    /// The journal, for what it says.
    pub(crate) fn journal(&self) -> &Journal {
        &self.journal
    }

    /// Why the instance is still there, where it should not be.
    pub(crate) fn left_behind(&self) -> Option<&str> {
        self.left_behind.as_deref()
    }

    /// Drives until `until` is reached. `cancel` turns true when the caller wants the end.
    ///
    /// # Errors
    /// Where the journal or an output on the host cannot be written: nothing is destroyed then, and the next start goes on.
    pub(crate) async fn drive(&mut self, until: Until, mut cancel: watch::Receiver<bool>) -> Result<(), Error> {
        let first = std::mem::take(&mut self.first);
        self.perform(first).await?;
        loop {
            self.settle().await?;
            if self.has_reached(until) && !self.journal.is_committing() {
                return Ok(());
            }
            match self.wake(&mut cancel).await? {
                Wake::Op(op) => self.op(op).await?,
                Wake::Read(read) => self.read(read).await?,
                Wake::Committed => self.committed().await?,
                Wake::Cancel => self.step(Input::Cancel).await?,
                Wake::Time => self.time().await?,
            }
        }
    }

    /// Makes the end the first thing: nothing is started any more.
    pub(crate) fn cancel_first(&mut self) {
        let ending = self.machine.step(Input::Cancel, self.now());
        if !ending.is_empty() {
            self.first = ending;
        }
    }

    fn has_reached(&self, until: Until) -> bool {
        match until {
            Until::Done => self.machine.phase() == Phase::Done,
            Until::Accepted => self.journal.view().accepted || self.machine.phase() == Phase::Done,
        }
    }

    /// Monotonic time since this driver began.
    fn now(&self) -> Duration {
        self.clock.elapsed()
    }

    async fn step(&mut self, input: Input) -> Result<(), Error> {
        let actions = self.machine.step(input, self.now());
        self.perform(actions).await
    }

    /// Waits for whatever comes first.
    async fn wake(&mut self, cancel: &mut watch::Receiver<bool>) -> Result<Wake, Error> {
        let deadline = self.next_deadline();
        let may_read = self.journal.pending() < MAX_PENDING_BYTES;
        let may_tick = !self.journal.is_committing();
        // Where time stood still for us, what came in meanwhile is heard before any deadline that has passed; and where so much
        // comes in that it never ends, the deadline has its turn all the same (Invariant 3).
        if self.now() < deadline {
            self.overdue_since = None;
        } else if may_tick && self.now() >= *self.overdue_since.get_or_insert(self.clock.elapsed()) + MAX_OVERDUE {
            self.overdue_since = None;
            return Ok(Wake::Time);
        }
        let Self { journal, live, ops, clock, .. } = self;
        let wake = tokio::select! {
            biased;
            committed = journal.committed() => { committed?; Wake::Committed }
            Some(op) = ops.join_next() => match op {
                Ok(op) => Wake::Op(op),
                // A panic in a call is a fault of ours; the runtime goes on from its journal at the next start.
                Err(error) => return Err(Error::Panicked(error.to_string())),
            },
            () = wished(cancel) => Wake::Cancel,
            read = link::read(live.as_mut()), if may_read => Wake::Read(read),
            () = tokio::time::sleep_until(*clock + deadline), if may_tick => Wake::Time,
        };
        // One wish for an end is enough; another look at the same value would only spin.
        if matches!(wake, Wake::Cancel) {
            *cancel = never();
        }
        Ok(wake)
    }

    fn next_deadline(&self) -> Duration {
        let poll = self.next_poll;
        let session = self.live.as_ref().map(|live| live.session.next_tick());
        let collecting = self.collecting.as_ref().map(Collecting::next_tick);
        let gather = self.gather_until.filter(|_| !self.journal.is_committing());
        [self.machine.next_tick(), session, collecting, gather, Some(poll)].into_iter().flatten().min().unwrap_or(poll)
    }

    /// Time passed: whoever has a deadline looks at it.
    async fn time(&mut self) -> Result<(), Error> {
        let now = self.now();
        if let Some(live) = &mut self.live {
            match live.session.tick(now) {
                Ok(Some(ping)) => self.send(&ping).await?,
                Ok(None) => {}
                Err(fault) => self.fault(fault).await?,
            }
        }
        self.collecting_tick().await?;
        self.next_poll = now + CANCEL_POLL;
        if self.folder.cancel_requested() {
            self.folder.clear_cancel();
            self.step(Input::Cancel).await?;
        }
        self.step(Input::Tick).await
    }

    /// Hands what was gathered to the disk, unless it is busy with the last. Where nothing has to be written, what waited
    /// for a commit goes on at once.
    async fn settle(&mut self) -> Result<(), Error> {
        while !self.journal.is_committing() {
            self.start_commit(false)?;
            if self.journal.is_committing() || self.next_commit.is_empty() {
                return Ok(());
            }
            self.in_commit = std::mem::take(&mut self.next_commit);
            self.committed().await?;
        }
        Ok(())
    }

    /// Starts a commit of what was gathered. Log bytes, and counts of what is left out, wait a little for more of their
    /// kind unless `all` is wanted, so that a chatty guest costs neither a sync nor a record for every line.
    fn start_commit(&mut self, all: bool) -> Result<(), Error> {
        let gathering = self.logs.is_dirty() || self.intake.has_dropped();
        let pause = if self.logs.is_full() || self.intake.has_dropped() { GATHER_COUNTS } else { GATHER };
        let due = gathering.then(|| *self.gather_until.get_or_insert(self.clock.elapsed() + pause));
        if due.is_some_and(|due| all || due <= self.now()) {
            self.flush_gathered();
        }
        if self.journal.pending() > 0 {
            self.in_commit = std::mem::take(&mut self.next_commit);
            self.in_commit.ack =
                self.journal.view().cursor.as_ref().map(|cursor| Ack { seq: cursor.seq, logs: cursor.logs.clone() });
            self.journal.start_commit(std::mem::take(&mut self.unsynced_logs))?;
        }
        Ok(())
    }

    /// Writes down how far the logs are, and how many events were left out.
    fn flush_gathered(&mut self) {
        self.gather_until = None;
        self.intake.flush(&mut self.journal);
        if let Some(Dirty { marks, files }) = self.logs.take_dirty() {
            self.journal.host(HostRecord::Logs { logs: marks });
            self.unsynced_logs.extend(files);
        }
    }

    /// What was gathered is durable: the guest may forget it, and the machine may rest on it.
    async fn committed(&mut self) -> Result<(), Error> {
        let batch = std::mem::take(&mut self.in_commit);
        if let Some(ack) = batch.ack.filter(|ack| *ack != self.acked) {
            self.acked.clone_from(&ack);
            self.send(&HostMessage::Ack(ack)).await?;
        }
        for message in batch.send {
            self.send(&message).await?;
        }
        for guest in batch.guest {
            self.step(Input::Guest(guest)).await?;
        }
        Ok(())
    }
}

/// Waits for the wish to end. Never ready where nobody can wish any more.
async fn wished(cancel: &mut watch::Receiver<bool>) {
    let nobody = cancel.wait_for(|wanted| *wanted).await.is_err();
    if nobody {
        std::future::pending::<()>().await;
    }
}

/// A wish that never comes.
pub(crate) fn never() -> watch::Receiver<bool> {
    watch::channel(false).1
}
