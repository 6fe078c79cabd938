//! How a task ends when it does not succeed.

use std::fmt::Display;
use std::io;

/// The result of a step.
pub(crate) type Result<T> = std::result::Result<T, Failure>;

/// Why a task stopped.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The command line was not understood.
    Usage(String),
    /// A step failed; the text names the thing and the way out.
    Step(String),
    /// A program whose exit code is the task's own ended with this code, and has told why itself.
    Exit(u8),
    /// This signal asked the task to stop.
    Interrupted(i32),
}

impl Failure {
    pub(crate) fn usage(text: impl Into<String>) -> Self {
        Self::Usage(text.into())
    }

    pub(crate) fn step(text: impl Into<String>) -> Self {
        Self::Step(text.into())
    }

    /// What to tell the user, if it has not been told yet.
    pub(crate) fn text(&self) -> Option<String> {
        match self {
            Self::Usage(text) | Self::Step(text) => Some(text.clone()),
            Self::Exit(_) => None,
            Self::Interrupted(signal) => Some(format!("interrupted by signal {signal}")),
        }
    }

    /// As shells have it: 2 for the command line, 128 + signal for an interruption.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Step(_) => 1,
            Self::Exit(code) => *code,
            Self::Interrupted(signal) => u8::try_from(128 + signal).unwrap_or(1),
        }
    }
}

/// Puts what was tried before an I/O error.
pub(crate) trait Tried<T> {
    /// `what` reads as in "cannot {what}: No such file".
    fn tried(self, what: impl Display) -> Result<T>;
}

impl<T> Tried<T> for io::Result<T> {
    fn tried(self, what: impl Display) -> Result<T> {
        self.map_err(|error| Failure::step(format!("cannot {what}: {error}")))
    }
}
