//! One runtime without I/O: it joins machine, session and journal, and asks a shell for the rest.
//!
//! ```text
//!                      ┌────────────── Action ──────────────┐
//!   answers of Incus ─┐│                                    ▼
//!   bytes ─► session ─┼┴► Input ─► Machine            calls, dials, archive
//!   time, commands ───┘                                     │
//!              session ─► records ─► Commit ─► ack, publish ┴──► Effect
//! ```
//!
//! The shell takes [`Effect`]s from [`Core::next_effect`], performs them in that order, and brings back what came of them.
//! It decides nothing, so that a shell made of models, with virtual time, tells what this one would do.
//!
//! What the guest said reaches the machine, the guest (as `ack`) and followers only after the journal has it durably
//! (Invariants 1 and 2). What Incus is asked for stands in the journal first.
//!
//! Happy path: something comes in, the machine is stepped, its actions are carried out, a commit is started if there is
//! none, and the effects are there to be taken. What can fail here: the journal, and then the shell drops the core and
//! destroys nothing; everything else is an input of the machine.

mod acks;
mod collecting;
mod commit;
mod console;
mod effect;
mod intake;
mod logs;
mod perform;
mod route;
mod start;
mod talk;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use pika_cloud_common::spec::OutputCollectionMode;
use pika_cloud_common::{Command, RuntimeSpec};

use crate::clock::Now;
use crate::incus::VsockAddress;
use crate::journal::{Commit, Records, View};
use crate::machine::{Input, Machine, Phase, Plan, SessionLoss, Transition};
use crate::session::Session;
use acks::Acks;
use collecting::Collecting;
use commit::Batch;
use intake::Intake;
use logs::LogMarks;
use route::{Peer, Route};

pub use effect::{Answer, Call, CallId, Claim, Effect, Outputs, Seen, Stored};
pub use route::{Agent, Way};

/// While more than this waits for the disk, nothing is read from the guest; less, where the spec's `limits.event_bytes` is
/// less: what is kept is bounded by that and one commit.
const MAX_PENDING_BYTES: u64 = 8 * 1024 * 1024;
const MIN_PENDING_BYTES: u64 = 256 * 1024;

/// One runtime, from where its journal left off.
#[derive(Debug)]
pub struct Core {
    spec: Arc<RuntimeSpec>,
    owner: Arc<str>,
    records: Records,
    logs: LogMarks,
    intake: Intake,
    machine: Machine,
    session: Option<Session>,
    /// By which way the agent is dialled.
    route: Route,
    /// Who is at the other end of the stream.
    peer: Peer,
    /// What the open session's stream is to our run.
    stream: StreamOf,
    collecting: Option<Collecting>,
    /// The workload was told to end, and had its grace before outputs are collected.
    grace_given: bool,
    /// The latest reading of the clocks.
    now: Now,
    effects: VecDeque<Effect>,
    /// What the machine hears, and what is done, once the commit under way is durable.
    in_commit: Option<Batch>,
    /// The same for the next one.
    next_commit: Batch,
    /// What the machine hears once it heard the guest's last word.
    held: Vec<Input>,
    acks: Acks,
    /// When what is gathered beside events is committed at the latest.
    gather_until: Option<Duration>,
    calls: Calls,
    /// The instance's name: the spec's, until a person renames it.
    instance: String,
    /// Incus's own word for it, when it was last asked.
    instance_status: Option<String>,
    /// Why the instance could not be destroyed, where it could not.
    left_behind: Option<String>,
    /// Changes of phase that nobody has taken yet.
    transitions: Vec<Transition>,
}

/// Whose a stream of the guest is.
#[derive(Debug, Default)]
struct StreamOf {
    /// The one of the open session is our run's.
    ours: bool,
    /// One that is over and was not: what follows it is asked for from its beginning.
    left: Option<String>,
}

/// What Incus and the agent were asked for, and have not answered.
#[derive(Debug, Default)]
struct Calls {
    last_id: CallId,
    look: Option<CallId>,
    /// Something happened since.
    look_again: bool,
    dial: Option<CallId>,
    console: Option<CallId>,
    /// A call that changes the instance. There is one at most: a create that is still under way would make behind our back
    /// what is being destroyed.
    change: Option<CallId>,
    /// The change that comes next.
    next_change: Option<Call>,
}

impl Calls {
    fn new_id(&mut self) -> CallId {
        self.last_id += 1;
        self.last_id
    }
}

impl Core {
    /// Takes a runtime over from its journal, whose current incarnation was begun. `short_logs` has the lengths of the
    /// current incarnation's log files that are shorter than the journal says; `random` spreads retries.
    pub fn open(
        spec: Arc<RuntimeSpec>,
        owner: Arc<str>,
        mut records: Records,
        short_logs: &BTreeMap<String, u64>,
        random: u64,
        now: Now,
    ) -> Self {
        let (machine, first) = Machine::new(Plan::of(&spec), &start::of(records.view(), now), random, now.mono);
        let logs = LogMarks::new(spec.limits.log_bytes, &mut records, short_logs);
        let mut core = Self {
            logs,
            intake: Intake::default(),
            machine,
            session: None,
            route: Route::new(&spec, records.view().booted_at.is_some(), records.view().agent_origin),
            peer: Peer::Ours,
            stream: StreamOf::default(),
            collecting: None,
            grace_given: false,
            now,
            effects: VecDeque::new(),
            in_commit: None,
            next_commit: Batch::default(),
            held: Vec::new(),
            acks: Acks::new(),
            gather_until: None,
            calls: Calls::default(),
            instance: spec.identity.instance_name.clone(),
            instance_status: None,
            left_behind: None,
            transitions: Vec::new(),
            spec,
            owner,
            records,
        };
        core.perform(first);
        core.settle();
        core
    }

    /// What to do next; `None` until something comes in.
    pub fn next_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// The spec that it goes by.
    pub fn spec(&self) -> &RuntimeSpec {
        &self.spec
    }

    /// What the journal says, with what is not durable yet.
    pub fn view(&self) -> &View {
        self.records.view()
    }

    /// Where the machine stands.
    pub fn phase(&self) -> Phase {
        self.machine.phase()
    }

    /// Whether everything that was done is durable, so that the core may be dropped.
    pub fn is_settled(&self) -> bool {
        self.in_commit.is_none()
            && self.records.pending() == 0
            && self.next_commit.is_empty()
            && self.effects.is_empty()
    }

    /// Why the instance is still there, where it should not be.
    pub fn left_behind(&self) -> Option<&str> {
        self.left_behind.as_deref()
    }

    /// Changes of the phase since this was last asked.
    pub fn take_transitions(&mut self) -> Vec<Transition> {
        std::mem::take(&mut self.transitions)
    }

    /// Bytes that wait for the disk.
    pub fn pending(&self) -> usize {
        self.records.pending()
    }

    /// Whether bytes of the guest may come. While they may not, the transport holds the guest back (Invariant 5).
    pub fn wants_read(&self) -> bool {
        let bound = self.spec.limits.event_bytes.clamp(MIN_PENDING_BYTES, MAX_PENDING_BYTES);
        self.session.is_some() && !self.peer.is_asked() && (self.records.pending() as u64) < bound
    }

    /// Incus answered a call.
    pub fn answer(&mut self, id: CallId, answer: Answer, now: Now) {
        self.now = now;
        self.answered(id, answer);
        self.settle();
    }

    /// Whether the answer to this dial is still wanted.
    pub fn waits_for_dial(&self, id: CallId) -> bool {
        self.calls.dial == Some(id)
    }

    /// There is a stream to the agent, or there is none to be had. One over vsock names where it leads to.
    pub fn dialled(&mut self, id: CallId, dialled: Result<Option<VsockAddress>, SessionLoss>, now: Now) {
        self.now = now;
        if self.calls.dial.take_if(|dial| *dial == id).is_some() {
            match dialled {
                Ok(address) => {
                    self.peer = address.map_or(Peer::Ours, Peer::Dialled);
                    self.connected();
                }
                Err(loss) => self.session_missed(loss),
            }
            self.settle();
        }
    }

    /// Where to read the guest's bytes into; followed by [`Core::read`]. Empty where there is no session.
    pub fn space(&mut self) -> &mut [u8] {
        self.session.as_mut().map_or(&mut [], Session::space)
    }

    /// `n` bytes were read.
    pub fn read(&mut self, n: usize, now: Now, outputs: &mut impl Outputs) {
        self.now = now;
        self.take_in(n, outputs);
        self.settle();
    }

    /// The stream broke, or its other end closed it.
    pub fn link_lost(&mut self, loss: SessionLoss, now: Now) {
        self.now = now;
        if self.session.is_some() || self.waits_to_open() {
            self.session_lost(loss);
            self.settle();
        }
    }

    /// The commit under way is durable; its buffers are used again.
    pub fn committed(&mut self, commit: Commit, now: Now) {
        self.now = now;
        self.excuse_silence();
        self.records.recycle(commit);
        if let Some(batch) = self.in_commit.take() {
            self.finish(batch);
        }
        self.settle();
    }

    /// A person or a program wants something.
    pub fn command(&mut self, command: Command, now: Now) {
        self.now = now;
        self.step(Input::Command(command));
        self.settle();
    }

    /// Incus said that something happened to the instance.
    pub fn woken(&mut self, now: Now) {
        self.now = now;
        if self.calls.look.is_some() {
            // However much happens, there is one question under way, and the next one behind its answer (Invariant 5).
            self.calls.look_again = true;
        } else {
            self.step(Input::Woken);
        }
        self.settle();
    }

    /// What was collected is durable, as far as it could be.
    pub fn stored(&mut self, stored: Stored, now: Now) {
        self.now = now;
        self.artifacts_stored(stored);
        self.settle();
    }

    /// Time passed: whoever has a deadline looks at it.
    pub fn tick(&mut self, now: Now) {
        self.now = now;
        self.excuse_silence();
        self.tick_session();
        self.acknowledge(false);
        self.tick_collecting();
        self.step(Input::Tick);
        self.settle();
    }

    /// When [`Core::tick`] is due, in monotonic time; earlier ones do no harm.
    pub fn next_tick(&self) -> Option<Duration> {
        let session = self.session.as_ref().map(Session::next_tick);
        let collecting = self.collecting.as_ref().and_then(Collecting::next_tick);
        let gather = self.gather_until.filter(|_| self.in_commit.is_none());
        // Nothing is judged while the guest's last word waits for the disk.
        let machine = self.machine.next_tick().filter(|_| !self.awaits_last_word());
        let ack = self.acks.due().filter(|_| self.open_stream().is_some());
        [machine, session, collecting, gather, ack].into_iter().flatten().min()
    }

    /// The guest's last word stands in the journal as soon as it came, so that nothing that is seen while it waits for the
    /// disk may end the incarnation in another way (Invariant 2).
    fn step(&mut self, input: Input) {
        if self.awaits_last_word() {
            match input {
                Input::Guest(_) | Input::Heard | Input::Concluded | Input::Collected => {}
                Input::Tick | Input::Woken => return,
                later => return self.held.push(later),
            }
        }
        let actions = self.machine.step(input, self.now.mono);
        self.transitions.extend(self.machine.transition());
        self.perform(actions);
    }

    fn awaits_last_word(&self) -> bool {
        let under_way = self.in_commit.as_ref().is_some_and(Batch::has_last_word) || self.next_commit.has_last_word();
        under_way && self.records.view().ended.is_none()
    }

    /// Whether the spec wants logs on the host.
    fn keeps_logs(&self) -> bool {
        let policy = &self.spec.policies.output_collection;
        policy.include_logs && policy.mode != OutputCollectionMode::None
    }
}

#[cfg(test)]
mod tests;
