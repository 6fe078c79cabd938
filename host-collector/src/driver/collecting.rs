//! Bringing outputs to the host, within a budget of their own, on every terminal path (Invariant 7).
//!
//! With a session open, the archive is asked for at once; the guest sends what is left of its logs before it. Without one,
//! Incus is asked for the instance, and as long as it runs and the budget lasts, the agent is dialled again. However it
//! ends, the machine hears how far it came.

use std::time::Duration;

use pika_cloud_common::limits::MAX_LOG_FILES;
use pika_cloud_common::spec::OutputCollectionMode;
use pika_cloud_common::verdict::{Collection, Outcome};
use pika_cloud_common::wire::{Archive, ArchiveLimits, Entry, HostMessage, Notice};

use super::Driver;
use super::perform::found;
use crate::artifacts::{ArtifactError, ArtifactTree};
use crate::error::Error;
use crate::incus::InstanceView;
use crate::journal::HostRecord;
use crate::machine::{CallFailure, Found, Input, SessionLoss};

/// Between two dials.
const REDIAL: Duration = Duration::from_millis(250);

/// The least time for making what was collected durable.
const MIN_FINISH: Duration = Duration::from_secs(5);

/// Sessions that may be lost in one collection.
const MAX_LOST_SESSIONS: u32 = 8;

/// A collection that is under way.
pub(super) struct Collecting {
    deadline: Duration,
    redial_at: Option<Duration>,
    lost_sessions: u32,
    tree: Option<ArtifactTree>,
    failed: Option<String>,
}

impl Collecting {
    pub(super) fn next_tick(&self) -> Duration {
        self.redial_at.map_or(self.deadline, |at| at.min(self.deadline))
    }

    pub(super) fn entry(&mut self, entry: &Entry) {
        self.with_tree(|tree| tree.entry(entry));
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.with_tree(|tree| tree.bytes_of_entry(bytes));
    }

    /// After the first failure what still comes is dropped, and the failure is told at the end.
    fn with_tree(&mut self, act: impl FnOnce(&mut ArtifactTree) -> Result<(), ArtifactError>) {
        if self.failed.is_none()
            && let Some(tree) = &mut self.tree
            && let Err(error) = act(tree)
        {
            self.failed = Some(error.to_string());
        }
    }
}

impl Driver {
    pub(super) async fn collect(&mut self) -> Result<(), Error> {
        let deadline = self.now() + Duration::from_secs(self.spec.watchdogs.collect_secs);
        self.collecting = Some(Collecting { deadline, redial_at: None, lost_sessions: 0, tree: None, failed: None });
        if self.live.as_ref().is_some_and(|live| live.session.is_open()) {
            self.request_archive();
            self.after_request().await
        } else {
            self.hang_up();
            self.look();
            Ok(())
        }
    }

    /// Asks for the archive, and makes room for it. A host that has none ends the collection at the next tick.
    pub(super) fn request_archive(&mut self) {
        let Some(collecting) = &mut self.collecting else { return };
        let limits =
            ArchiveLimits { max_files: self.spec.limits.artifact_files, max_bytes: self.spec.limits.artifact_bytes };
        match ArtifactTree::begin(&self.folder.incarnation(self.journal.view().incarnation), limits) {
            Ok(tree) => collecting.tree = Some(tree),
            Err(error) => collecting.failed = Some(error.to_string()),
        }
        let policy = &self.spec.policies.output_collection;
        let succeeded =
            matches!(self.journal.view().ended.as_ref().map(|end| &end.outcome), Some(Outcome::Completed { .. }));
        // Without a glob it still brings the end of the logs, which the guest sends before it.
        let globs = match policy.mode {
            OutputCollectionMode::FailureOnly if succeeded => Vec::new(),
            _ => policy.artifact_globs.clone(),
        };
        let message = HostMessage::Archive(Archive { globs, limits, after: None });
        if let Some(live) = &self.live {
            // A guest that reads nothing any more is noticed by its silence.
            live.send(&message);
        }
    }

    async fn after_request(&mut self) -> Result<(), Error> {
        match self.collecting.as_ref().and_then(|collecting| collecting.failed.clone()) {
            Some(problem) => self.finish_collecting(Some(problem), 0).await,
            None => Ok(()),
        }
    }

    pub(super) async fn collecting_looked(
        &mut self,
        answer: Result<Option<InstanceView>, CallFailure>,
    ) -> Result<(), Error> {
        match answer.map(|view| found(view.as_ref())) {
            Ok(Found::Running) => {
                self.dial();
                Ok(())
            }
            Ok(Found::Stopped) => self.finish_collecting(Some("the instance is stopped".to_owned()), 0).await,
            Ok(Found::Absent) => self.finish_collecting(Some("the instance is gone".to_owned()), 0).await,
            Ok(Found::Error | Found::Changing(_)) => {
                self.collect_later();
                Ok(())
            }
            Err(failure) if failure.transient => {
                self.collect_later();
                Ok(())
            }
            Err(failure) => self.finish_collecting(Some(failure.message), 0).await,
        }
    }

    pub(super) async fn collecting_lost(&mut self, loss: SessionLoss) -> Result<(), Error> {
        let Some(collecting) = &mut self.collecting else { return Ok(()) };
        collecting.lost_sessions += 1;
        let given_up = collecting.lost_sessions >= MAX_LOST_SESSIONS;
        match loss {
            SessionLoss::Lost(_) | SessionLoss::NewStream if !given_up => {
                self.collect_later();
                Ok(())
            }
            SessionLoss::NewStream => self.finish_collecting(Some("the guest booted again".to_owned()), 0).await,
            SessionLoss::Lost(problem)
            | SessionLoss::NoAgent(problem)
            | SessionLoss::Refused(problem)
            | SessionLoss::Broken(problem) => self.finish_collecting(Some(problem), 0).await,
        }
    }

    fn collect_later(&mut self) {
        let at = self.now() + REDIAL;
        if let Some(collecting) = &mut self.collecting {
            collecting.redial_at = Some(at);
        }
    }

    pub(super) async fn collecting_tick(&mut self) -> Result<(), Error> {
        let now = self.now();
        let Some(collecting) = &mut self.collecting else { return Ok(()) };
        if now >= collecting.deadline {
            let problem = format!("not done within collect_secs ({} s)", self.spec.watchdogs.collect_secs);
            return self.finish_collecting(Some(problem), 0).await;
        }
        if collecting.redial_at.is_some_and(|at| at <= now) {
            collecting.redial_at = None;
            self.look();
        }
        Ok(())
    }

    /// The guest sent all that it has.
    pub(super) async fn archived(&mut self, notice: &Notice) -> Result<(), Error> {
        let Notice::ArchiveDone { skipped, truncated, .. } = notice else { return Ok(()) };
        let problem = truncated.then(|| "the artifacts are beyond the spec's limits, or the agent's".to_owned());
        self.finish_collecting(problem, *skipped).await
    }

    pub(super) async fn archive_failed(&mut self, problem: String) -> Result<(), Error> {
        if self.collecting.is_some() {
            return self.finish_collecting(Some(problem), 0).await;
        }
        Ok(())
    }

    async fn finish_collecting(&mut self, problem: Option<String>, skipped: u64) -> Result<(), Error> {
        let Some(collecting) = self.collecting.take() else { return Ok(()) };
        let mut collection = Collection { skipped, log_bytes: self.logs.bytes(), ..Collection::default() };
        let mut problem = collecting.failed.or(problem);
        if let Some(tree) = collecting.tree {
            (collection.files, collection.bytes) = (tree.files(), tree.bytes());
            problem = problem
                .or(tree.unended().map(|path| format!("{path}: the guest did not send its end: it is left out")));
            // The budget is the disk's too; a little is left for it even where the guest took all.
            let left = collecting.deadline.saturating_sub(self.now()).max(MIN_FINISH);
            let finish = tokio::task::spawn_blocking(move || tree.finish());
            match tokio::time::timeout(left, finish).await {
                Ok(finished) => {
                    let finished = finished.map_err(|error| Error::Panicked(error.to_string()))?;
                    problem = problem.or(finished.err().map(|error| error.to_string()));
                }
                Err(_) => problem = problem.or(Some("the host's disk was not done within collect_secs".to_owned())),
            }
        }
        if self.logs.left_some_out() {
            problem = problem.or(Some(format!("the guest has more than {MAX_LOG_FILES} log files: some are left out")));
        }
        collection.complete = problem.is_none();
        collection.error = problem;
        self.journal.host(HostRecord::Collected { collection: collection.clone() });
        self.step(Input::Collected(collection)).await
    }
}
