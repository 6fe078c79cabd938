//! Bringing what Incus holds back in line with what the state dir knows, after a collector died.
//!
//! ```text
//!   Incus: instances, volumes ─┐
//!   state dir: journals, locks ┴─► plan (pure) ─► steps ─┬─► take over ─► look again, plan again
//!                                                        ├─► adopt   (drive to its end)
//!                                                        ├─► end     (stop, delete)
//!                                                        └─► report  (left alone)
//! ```
//!
//! | found | step |
//! |---|---|
//! | a journal here that is not finished, driven by nobody | adopt: what is left of its run is done, outputs and verdict included |
//! | the same, but its workload is still to be started, maybe anew, and needs values that only its spec had | report; cancel once it expired |
//! | an instance of ours whose journal is finished, and whose policy does not keep it, or it expired | end |
//! | an instance of ours that its journal keeps, for how long that says | nothing; once that is over, adopt |
//! | an instance of ours without a journal here, that is to be destroyed on completion, or expired | end |
//! | an instance of ours without a journal here, that its policy keeps | report |
//! | an instance of ours of an older incarnation, or of another name than its journal's | end, or report where its policy keeps it |
//! | an instance that was taken over by a collector that died before its journal said so | take over again, from ourselves |
//! | an instance of another owner | report; take over only where the options name it, or all that expired |
//! | the same, and a runtime of that name was run and ended here before | report, or refuse where the options name it |
//! | a volume of ours that nothing uses and no runtime here knows | report; deleted only where the options say so |
//! | a bake of this state dir that nobody is at any more | what it left is removed, see [`bake`](crate::bake#after-a-crash) |
//! | a builder of ours of which no bake is written down | end |
//! | a builder of another owner | report |
//! | anything without all our labels | nothing; a report where it has some of them |
//!
//! # Why no race remains
//!
//! Incus is listed *before* the state dir. A runtime's folder is durable before Incus is asked for anything, so that whatever
//! was listed has its folder by the time that folders are looked at: an instance without one really has none. A runtime
//! whose folder came later has nothing in the list.
//!
//! Between plan and act, the runtime's lock is taken, also where it has no folder yet (one with a lock alone is made then and
//! stays: whoever waits for that very lock must not wait for another file of its name). So no `run` of this state dir begins
//! or goes on meanwhile, and one that does already is left alone. Under the lock, journal and labels are read again, and labels
//! once more before each stop and delete. What remains is another owner's take-over within one call to Incus, which
//! Invariant 6 allows.

mod act;
mod bakes;
mod plan;

use std::collections::BTreeSet;

pub use plan::{InstanceName, Step, VolumeName};

/// What [`Cloud::reconcile`](crate::Cloud::reconcile) may do beyond what is ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReconcileOptions {
    /// Only say what would be done.
    pub dry_run: bool,
    /// Runtimes that are taken over from whoever holds them. The spec in an instance's labels is run as it stands there, see
    /// [`Labels`](crate::incus::Labels).
    pub take_over: BTreeSet<String>,
    /// Whether everything that expired is taken over.
    pub take_over_expired: bool,
    /// Whether volumes of ours that nothing uses and no runtime here knows are deleted, with all that is on them.
    pub delete_orphan_volumes: bool,
}

/// What [`Cloud::reconcile`](crate::Cloud::reconcile) did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReconcileReport {
    /// Each step, and what came of it, in the order of the plan.
    pub done: Vec<(Step, Outcome)>,
    /// Runtimes that the options name and that nobody has.
    pub unknown: Vec<String>,
}

/// What came of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done; of a report, it is said.
    Done,
    /// It would be done: this was a dry run.
    Planned,
    /// Somebody was at it meanwhile, so nothing was done.
    LeftAlone(String),
    /// It could not be done.
    Failed(String),
}

impl ReconcileReport {
    /// What could not be done, by name; what was asked for and refused is among it.
    pub fn failed(&self) -> Vec<String> {
        let failed = |(step, outcome): &(Step, Outcome)| {
            let is_failed = matches!(outcome, Outcome::Failed(_)) || matches!(step, Step::Refuse { .. });
            is_failed.then(|| step.name())
        };
        self.done.iter().filter_map(failed).chain(self.unknown.iter().cloned()).collect()
    }
}
