//! Exit codes as people know them, and errors on standard error.

use std::process::ExitCode;

use pika_cloud_common::verdict::EXIT_FAILED;
use pika_host_collector::Error;
use pika_host_collector::bake::BakeError;

/// Detached: 128 and SIGHUP.
pub(crate) const DETACHED: u8 = 129;

/// Why a command could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The library's.
    #[error(transparent)]
    Library(#[from] Error),
    /// Of a bake.
    #[error(transparent)]
    Bake(Box<BakeError>),
    /// The command's own.
    #[error("{0}")]
    Other(String),
}

/// Prints a failure, and gives its code.
pub(crate) fn of_failure(failure: &Failure) -> ExitCode {
    crate::print::error(&failure.to_string());
    ExitCode::from(EXIT_FAILED)
}

/// Prints clap's message: help and version are no failure, a wrong call is one of pika-cloud's.
pub(crate) fn of_usage(error: &clap::Error) -> ExitCode {
    // Where even that cannot be printed, the code says enough.
    let _ = error.print();
    if error.use_stderr() { ExitCode::from(EXIT_FAILED) } else { ExitCode::SUCCESS }
}
