//! Why a verb failed, and the exit code that says so (those of sysexits.h).

use pika_guest_agent::ledger::LedgerError;
use pika_guest_agent::serve::{ServeError, UnixError};
use pika_guest_agent::supervise::SuperviseError;
use rustix::io::Errno;

/// A verb failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The files could not be used, or refused the event.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// What was given is not the expected data.
    #[error("{0}")]
    Data(String),
    /// Nothing is there to be shown.
    #[error("{0}")]
    NoInput(String),
    /// The event is written and was not acknowledged in time.
    #[error("event {seq} is written, but the host did not acknowledge it within {secs} s")]
    NotAcknowledged {
        /// The event.
        seq: u64,
        /// How long was waited.
        secs: f64,
    },
    /// Standard input or output failed.
    #[error("{doing}: {source}")]
    Stdio {
        /// What was tried.
        doing: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// An environment variable is wrong.
    #[error("{0}")]
    Environment(String),
    /// The listener cannot begin.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// What was handed over cannot be supervised.
    #[error(transparent)]
    Supervise(#[from] SuperviseError),
    /// A line of standard input was refused.
    #[error("line {line} of standard input: {source} ({written} events before it are written)")]
    Line {
        /// Its number, from 1.
        line: u64,
        /// Events that were written.
        written: u64,
        /// Why it was refused.
        source: Box<Failure>,
    },
}

impl Failure {
    /// The exit code.
    pub(crate) fn code(&self) -> u8 {
        match self {
            Self::Ledger(error) | Self::Supervise(SuperviseError::Ledger(error)) => ledger_code(error),
            Self::Data(_) => EX_DATAERR,
            Self::NoInput(_) => EX_NOINPUT,
            Self::NotAcknowledged { .. } => EX_TEMPFAIL,
            Self::Stdio { .. } => EX_IOERR,
            Self::Environment(_) => EX_USAGE,
            Self::Serve(error) => serve_code(error),
            Self::Supervise(SuperviseError::HandOver(_)) => EX_PROTOCOL,
            Self::Line { source, .. } => source.code(),
        }
    }
}

pub(crate) const EX_USAGE: u8 = 64;
pub(crate) const EX_DATAERR: u8 = 65;
pub(crate) const EX_NOINPUT: u8 = 66;
pub(crate) const EX_UNAVAILABLE: u8 = 69;
pub(crate) const EX_CANTCREAT: u8 = 73;
pub(crate) const EX_IOERR: u8 = 74;
pub(crate) const EX_TEMPFAIL: u8 = 75;
pub(crate) const EX_PROTOCOL: u8 = 76;
pub(crate) const EX_NOPERM: u8 = 77;

fn serve_code(error: &ServeError) -> u8 {
    match error {
        ServeError::Nowhere(_) => EX_USAGE,
        ServeError::Signals(_) => EX_IOERR,
        ServeError::Unix(UnixError::InUse { .. }) => EX_TEMPFAIL,
        ServeError::Unix(UnixError::Io { errno: Errno::ACCESS | Errno::PERM, .. }) => EX_NOPERM,
        ServeError::Unix(_) => EX_CANTCREAT,
    }
}

fn ledger_code(error: &LedgerError) -> u8 {
    match error {
        LedgerError::Io { doing: "create", .. } | LedgerError::Io { errno: Errno::ROFS, .. } => EX_CANTCREAT,
        LedgerError::Io { errno: Errno::ACCESS | Errno::PERM, .. } => EX_NOPERM,
        LedgerError::Io { .. }
        | LedgerError::Misplaced { .. }
        | LedgerError::Partial { .. }
        | LedgerError::NotDerived { .. }
        | LedgerError::Removed { .. } => EX_IOERR,
        LedgerError::LockBusy { .. }
        | LedgerError::Capped { .. }
        | LedgerError::NoRoom { .. }
        | LedgerError::Supervised => EX_TEMPFAIL,
        LedgerError::AlreadyTerminal { .. } | LedgerError::SeqExhausted { .. } => EX_UNAVAILABLE,
        LedgerError::TooLong { .. }
        | LedgerError::Unreadable { .. }
        | LedgerError::Document { .. }
        | LedgerError::Malformed { .. } => EX_DATAERR,
    }
}
