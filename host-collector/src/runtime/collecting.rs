//! Bringing outputs to the host, within a budget of their own, on every terminal path (Invariant 7).
//!
//! Where the agent was never heard, the end of the console is read first, as evidence.
//!
//! With a session open, the archive is asked for at once; the guest sends what is left of its logs before it. Without one,
//! Incus is asked for the instance, and as long as it runs and the budget lasts, the agent is dialled again. However it
//! ends, the machine hears that it is over, and the journal how far it came.
//!
//! Where the end was decided here, by a command or a deadline, the workload may still run, and would run on in an instance
//! that is kept. It is sent TERM before the archive is asked for, and KILL where it does not end within its grace; one that
//! had its grace in a session before is sent KILL at once. That is within the same budget, of which it takes half at most.

use std::time::Duration;

use pika_cloud_common::limits::MAX_LOG_FILES;
use pika_cloud_common::spec::OutputCollectionMode;
use pika_cloud_common::verdict::{Collection, Outcome};
use pika_cloud_common::wire::{Archive, ArchiveLimits, HostMessage};

use super::{Call, Core, Effect, Stored};
use crate::journal::HostRecord;
use crate::machine::{CallFailure, Found, Input, SessionLoss};

/// Between two dials.
const REDIAL: Duration = Duration::from_millis(250);

/// The least time for making what was collected durable.
const MIN_FINISH: Duration = Duration::from_secs(5);

/// Sessions that may be lost in one collection.
const MAX_LOST_SESSIONS: u32 = 8;

/// What a stopped instance comes to: an agent, the image's or ours, runs only in one that runs.
const NOTHING_TO_SALVAGE: &str =
    "the instance is stopped: there is nothing to salvage from a stopped one, what it had not sent is not here";

/// A collection that is under way.
#[derive(Debug)]
pub(super) struct Collecting {
    deadline: Duration,
    redial_at: Option<Duration>,
    lost_sessions: u32,
    /// Until when a workload that was told to end may do that by itself.
    kill_at: Option<Duration>,
    /// What it leaves is waited for, before the archive.
    is_stopping: bool,
    /// The archive was asked for, so that there is something to store.
    is_begun: bool,
    /// The guest began anew since the workload was started: what it had left may be gone.
    is_of_another_boot: bool,
    /// What will come has come, and is being stored.
    storing: Option<Ending>,
}

/// How the guest's side of a collection ended.
#[derive(Debug)]
struct Ending {
    /// Why it is not all.
    problem: Option<String>,
    /// Files that were left out.
    skipped: u64,
}

impl Collecting {
    /// The disk has its own time, so that nothing is due while it stores.
    pub(super) fn next_tick(&self) -> Option<Duration> {
        let kill_at = self.kill_at.filter(|_| self.is_stopping);
        let next = [self.redial_at, kill_at].into_iter().flatten().fold(self.deadline, Duration::min);
        self.storing.is_none().then_some(next)
    }
}

impl Core {
    pub(super) fn collect(&mut self) {
        let deadline = self.now.mono + Duration::from_secs(self.spec.watchdogs.collect_secs);
        self.collecting = Some(Collecting {
            deadline,
            redial_at: None,
            lost_sessions: 0,
            kill_at: self.grace_given.then_some(self.now.mono),
            is_stopping: false,
            is_begun: false,
            is_of_another_boot: false,
            storing: None,
        });
        if self.has_session() {
            // The session itself shows what became of the instance; an answer that is still to come is of before.
            self.calls.look = None;
            self.stop_and_archive();
        } else {
            self.hang_up();
            if self.was_never_heard() {
                self.ask_console();
            } else {
                self.look();
            }
        }
    }

    /// An instance was started, and its agent did not say a word.
    fn was_never_heard(&self) -> bool {
        let view = self.records.view();
        view.starting_at.is_some() && view.booted_at.is_none()
    }

    /// What the guest said on its console may tell why its agent said nothing.
    fn ask_console(&mut self) {
        // The answer to an earlier look says nothing of this collection.
        self.calls.look = None;
        let id = self.calls.new_id();
        self.calls.console = Some(id);
        self.effects.push_back(Effect::Call(id, Call::Console { instance: self.instance.clone() }));
    }

    /// The end of the console is here, as far as there is one.
    pub(super) fn console(&mut self, console: Option<&str>) {
        if let Some(tail) = console.and_then(super::console::tail) {
            self.record_last(HostRecord::Console { tail });
        }
        if self.under_way().is_none() {
            return;
        }
        if self.spec.policies.output_collection.mode == OutputCollectionMode::None {
            return self.came_to_its_end(None, 0);
        }
        self.look();
    }

    /// Whether artifacts may come: not before they were asked for, nor while what came is being stored.
    pub(super) fn takes_entries(&self) -> bool {
        self.collecting.as_ref().is_some_and(|collecting| collecting.is_begun && collecting.storing.is_none())
    }

    /// The collection, as long as it waits for the guest.
    fn under_way(&mut self) -> Option<&mut Collecting> {
        self.collecting.as_mut().filter(|collecting| collecting.storing.is_none())
    }

    /// The session that is open is with another boot than the one that ran the workload.
    pub(super) fn collects_from_another_boot(&mut self) {
        if let Some(collecting) = &mut self.collecting {
            collecting.is_of_another_boot = true;
        }
    }

    /// There is a session: the archive is asked for once the workload has ended.
    pub(super) fn stop_and_archive(&mut self) {
        if !self.workload_may_run() {
            return self.request_archive();
        }
        let (now, grace) = (self.now.mono, Duration::from_secs(self.spec.watchdogs.stop_grace_secs));
        let Some(collecting) = self.under_way() else { return };
        let within = collecting.deadline.saturating_sub(now) / 2;
        let kill_at = *collecting.kill_at.get_or_insert(now + grace.min(within));
        if kill_at <= now {
            self.signal("KILL");
            return self.request_archive();
        }
        collecting.is_stopping = true;
        self.signal("TERM");
    }

    /// Whether nobody but the host says that the workload is over.
    fn workload_may_run(&self) -> bool {
        let view = self.records.view();
        let decided_here = view.ended.as_ref().is_some_and(|end| {
            matches!(end.outcome, Outcome::Cancelled | Outcome::TimedOut { .. } | Outcome::Unreachable)
        });
        // A boot that came after it runs nothing of ours.
        let stream = view.cursor.as_ref().map(|cursor| &cursor.stream_id);
        let is_here = view.start_sent.as_ref().is_some_and(|sent| self.stream.ours || stream == Some(&sent.stream_id));
        decided_here && is_here && view.terminal.is_none()
    }

    /// The workload had its grace, or said its last word meanwhile.
    pub(super) fn tick_stopping(&mut self) {
        let is_over = !self.workload_may_run();
        let now = self.now.mono;
        let Some(collecting) = self.under_way().filter(|collecting| collecting.is_stopping) else { return };
        if is_over || collecting.kill_at.is_some_and(|at| at <= now) {
            self.stop_and_archive();
        }
    }

    /// Asks for the archive, and makes room for it.
    fn request_archive(&mut self) {
        if self.spec.policies.output_collection.mode == OutputCollectionMode::None {
            return self.came_to_its_end(None, 0);
        }
        let Some(collecting) = self.under_way() else { return };
        (collecting.is_begun, collecting.is_stopping) = (true, false);
        let limits =
            ArchiveLimits { max_files: self.spec.limits.artifact_files, max_bytes: self.spec.limits.artifact_bytes };
        let policy = &self.spec.policies.output_collection;
        let ended = self.records.view().ended.as_ref();
        let succeeded = ended.is_some_and(|end| matches!(end.outcome, Outcome::Completed { .. }));
        // Without a glob it still brings the end of the logs, which the guest sends before it.
        let globs = match policy.mode {
            OutputCollectionMode::FailureOnly if succeeded => Vec::new(),
            _ => policy.artifact_globs.clone(),
        };
        let incarnation = self.records.view().incarnation;
        self.effects.push_back(Effect::BeginArtifacts { incarnation, limits });
        self.send(HostMessage::Archive(Archive { globs, limits, after: None }));
    }

    pub(super) fn collecting_looked(&mut self, answer: &Result<Found, CallFailure>) {
        if self.under_way().is_none() {
            return;
        }
        match answer {
            Ok(Found::Running) => self.dial(),
            // Whatever Incus answered, the budget bounds how often it is asked.
            Ok(Found::Error | Found::Changing(_)) | Err(_) => self.collect_later(),
            Ok(Found::Stopped) => self.came_to_its_end(Some(NOTHING_TO_SALVAGE.to_owned()), 0),
            Ok(Found::Absent | Found::Foreign | Found::TakenOver { .. }) => {
                self.came_to_its_end(Some("the instance is gone".to_owned()), 0);
            }
        }
    }

    pub(super) fn collecting_lost(&mut self, loss: SessionLoss) {
        let Some(collecting) = self.under_way() else { return };
        collecting.lost_sessions += 1;
        collecting.is_stopping = false;
        let given_up = collecting.lost_sessions >= MAX_LOST_SESSIONS;
        match loss {
            SessionLoss::Lost(_)
            | SessionLoss::Died(_)
            | SessionLoss::NoTransport(_)
            | SessionLoss::NotPut(_)
            | SessionLoss::NewStream
                if !given_up =>
            {
                self.collect_later();
            }
            SessionLoss::NewStream => self.came_to_its_end(Some("the guest booted again".to_owned()), 0),
            SessionLoss::Lost(problem)
            | SessionLoss::Died(problem)
            | SessionLoss::NoTransport(problem)
            | SessionLoss::NoAgent(problem)
            | SessionLoss::NotPut(problem)
            | SessionLoss::Refused(problem)
            | SessionLoss::Broken(problem) => self.came_to_its_end(Some(problem), 0),
        }
    }

    fn collect_later(&mut self) {
        if let Some(collecting) = &mut self.collecting {
            collecting.redial_at = Some(self.now.mono + REDIAL);
        }
    }

    pub(super) fn tick_collecting(&mut self) {
        let now = self.now.mono;
        let Some(collecting) = self.under_way() else { return };
        if now >= collecting.deadline {
            let problem = format!("not done within collect_secs ({} s)", self.spec.watchdogs.collect_secs);
            return self.came_to_its_end(Some(problem), 0);
        }
        if collecting.redial_at.is_some_and(|at| at <= now) {
            collecting.redial_at = None;
            self.look();
        }
        self.tick_stopping();
    }

    /// The guest sent all that it has. Where nothing was asked for yet, it says nothing.
    pub(super) fn archived(&mut self, skipped: u64, problem: Option<String>) {
        if !self.takes_entries() {
            return;
        }
        let problem = problem.map(|problem| format!("artifacts are left out: {problem}"));
        self.came_to_its_end(problem, skipped);
    }

    pub(super) fn archive_failed(&mut self, problem: String) {
        if self.takes_entries() {
            self.came_to_its_end(Some(problem), 0);
        }
    }

    /// Nothing more will come; what came is stored.
    fn came_to_its_end(&mut self, problem: Option<String>, skipped: u64) {
        let Some(collecting) = self.under_way() else { return };
        collecting.redial_at = None;
        collecting.storing = Some(Ending { problem, skipped });
        if collecting.is_begun {
            // The budget is the disk's too; a little is left for it even where the guest took all.
            let within = collecting.deadline.saturating_sub(self.now.mono).max(MIN_FINISH);
            self.effects.push_back(Effect::StoreArtifacts { within });
        } else {
            self.artifacts_stored(Stored::default());
        }
    }

    pub(super) fn artifacts_stored(&mut self, stored: Stored) {
        let Some(Collecting { storing: Some(Ending { problem, skipped }), is_of_another_boot, .. }) =
            self.collecting.take()
        else {
            return;
        };
        let too_many_logs = self.logs.left_some_out();
        let left_out =
            || too_many_logs.then(|| format!("the guest has more than {MAX_LOG_FILES} log files: some are left out"));
        let lost = || {
            let text = "the guest began anew before its outputs were here: what it had left may be lost";
            is_of_another_boot.then(|| text.to_owned())
        };
        let problem = stored.problem.or(problem).or_else(lost).or_else(left_out);
        let collection = Collection {
            complete: problem.is_none(),
            files: stored.files,
            bytes: stored.bytes,
            skipped,
            log_bytes: self.logs.bytes(),
            log_cut: self.logs.are_cut(),
            error: problem,
        };
        self.record_last(HostRecord::Collected { collection });
        self.step(Input::Collected);
    }
}
