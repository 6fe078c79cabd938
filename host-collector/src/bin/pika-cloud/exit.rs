//! Exit codes as people know them, and errors on standard error.

use std::process::ExitCode;

use pika_cloud_common::Verdict;
use pika_cloud_common::verdict::{Collection, Outcome};
use pika_host_collector::Error;

/// A watchdog ended it, as with `timeout`.
const TIMED_OUT: u8 = 124;
/// pika-cloud itself failed, as with `docker run`.
const FAILED: u8 = 125;
/// The guest died or was lost.
const LOST: u8 = 126;
/// Detached: 128 and SIGHUP.
pub(crate) const DETACHED: u8 = 129;
/// Interrupted: 128 and SIGINT.
pub(crate) const INTERRUPTED: u8 = 130;

/// Why a command could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The library's.
    #[error(transparent)]
    Library(#[from] Error),
    /// The command's own.
    #[error("{0}")]
    Other(String),
}

/// The code for a verdict.
pub(crate) fn of_verdict(verdict: &Verdict) -> u8 {
    let complete = !matches!(verdict.evidence.collection, Some(Collection { complete: false, .. }));
    match &verdict.outcome {
        // A success whose outputs are not all here is none that a caller may rely on.
        Outcome::Completed { exit_code: None | Some(0) } if !complete => FAILED,
        Outcome::Completed { exit_code } => own(exit_code.unwrap_or(0)),
        Outcome::Failed { exit_code } => match own(exit_code.unwrap_or(1)) {
            // A workload that said `failed` and exited with 0 did not succeed.
            0 => 1,
            code => code,
        },
        Outcome::TimedOut { .. } => TIMED_OUT,
        Outcome::GuestDied { .. } | Outcome::Unreachable => LOST,
        Outcome::ProvisionFailed => FAILED,
        Outcome::Cancelled => INTERRUPTED,
    }
}

/// A workload's own code, as a process can exit with it.
fn own(code: i32) -> u8 {
    u8::try_from(code).unwrap_or(255)
}

/// Prints a failure, and gives its code.
pub(crate) fn of_failure(failure: &Failure) -> ExitCode {
    crate::print::error(&failure.to_string());
    ExitCode::from(FAILED)
}

/// Prints clap's message: help and version are no failure, a wrong call is one of pika-cloud's.
pub(crate) fn of_usage(error: &clap::Error) -> ExitCode {
    // Where even that cannot be printed, the code says enough.
    let _ = error.print();
    if error.use_stderr() { ExitCode::from(FAILED) } else { ExitCode::SUCCESS }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pika_cloud_common::verdict::{DeathCause, Evidence, Watchdog};
    use pika_cloud_common::{SCHEMA_VERSION, Timestamp};

    fn code(outcome: Outcome, complete: bool) -> u8 {
        let collection = Collection { complete, ..Collection::default() };
        of_verdict(&Verdict {
            schema_version: SCHEMA_VERSION,
            runtime_id: "job".into(),
            incarnation: 1,
            outcome,
            decided_at: Timestamp::from_unix(0, 0),
            message: String::new(),
            evidence: Evidence { collection: Some(collection), ..Evidence::default() },
            extra: serde_json::Map::default(),
        })
    }

    #[test]
    fn codes_are_those_that_people_know() {
        assert_eq!(code(Outcome::Completed { exit_code: Some(0) }, true), 0);
        assert_eq!(code(Outcome::Completed { exit_code: None }, true), 0);
        assert_eq!(code(Outcome::Completed { exit_code: Some(0) }, false), 125);
        assert_eq!(code(Outcome::Failed { exit_code: Some(3) }, true), 3);
        assert_eq!(code(Outcome::Failed { exit_code: Some(3) }, false), 3);
        assert_eq!(code(Outcome::Failed { exit_code: None }, true), 1);
        assert_eq!(code(Outcome::Failed { exit_code: Some(0) }, true), 1);
        assert_eq!(code(Outcome::Failed { exit_code: Some(-7) }, true), 255);
        assert_eq!(code(Outcome::TimedOut { watchdog: Watchdog::Run }, true), 124);
        assert_eq!(code(Outcome::ProvisionFailed, true), 125);
        assert_eq!(code(Outcome::GuestDied { cause: DeathCause::InstanceGone }, false), 126);
        assert_eq!(code(Outcome::Unreachable, false), 126);
        assert_eq!(code(Outcome::Cancelled, true), 130);
    }
}
