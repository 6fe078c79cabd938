//! What can go wrong between pika-cloud and Incus.

use std::path::PathBuf;
use std::time::Duration;

/// A call to Incus failed. Every message says what was tried, on what, and where there is one, the way out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Nothing listens there.
    #[error(
        "no Incus answers at unix:{} ({source}): start it (systemctl start incus), install it (apt install incus), or name \
         another socket with --incus unix:PATH",
        path.display()
    )]
    NotRunning {
        /// The socket.
        path: PathBuf,
        /// What the kernel says.
        source: std::io::Error,
    },
    /// The socket may not be opened.
    #[error(
        "no permission on Incus's socket unix:{}: run as root, or join the group that owns it (usually \
         `usermod -aG incus-admin $USER`, then log in again)",
        path.display()
    )]
    NoPermission {
        /// The socket.
        path: PathBuf,
    },
    /// The connection broke, or the answer was no HTTP.
    #[error("{request}: the connection to Incus failed: {source}")]
    Transport {
        /// Method and path.
        request: String,
        /// What the HTTP library says.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No answer in time.
    #[error("{request}: Incus did not answer within {} s", after.as_secs())]
    NoAnswer {
        /// Method and path.
        request: String,
        /// How long was waited.
        after: Duration,
    },
    /// Incus refused.
    #[error("{request}: Incus answered {code}: {message}")]
    Refused {
        /// Method and path.
        request: String,
        /// HTTP's code.
        code: u16,
        /// Incus's message.
        message: String,
    },
    /// An operation that Incus had taken on failed.
    #[error("{what}: {message}")]
    OperationFailed {
        /// What was to be done.
        what: String,
        /// Incus's message.
        message: String,
    },
    /// An operation was not done in time; it may still be going on.
    #[error("{what}: not done after {} s, and Incus still works on it", after.as_secs())]
    OperationUnfinished {
        /// What was to be done.
        what: String,
        /// How long was waited.
        after: Duration,
    },
    /// An operation is no longer known, so its outcome has to be read from the resource.
    #[error("{what}: Incus no longer knows the operation; the outcome has to be read from the resource")]
    OperationLost {
        /// What was to be done.
        what: String,
    },
    /// An answer of another form than Incus's API has.
    #[error("{request}: Incus's answer could not be read: {problem}")]
    Answer {
        /// Method and path.
        request: String,
        /// What is wrong with it.
        problem: String,
    },
}

impl Error {
    /// Whether Incus said that the very thing asked for does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { code: 404, .. })
    }

    /// Whether the same call may succeed a little later: Incus is starting, busy, or the connection broke.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::NotRunning { .. } | Self::Transport { .. } | Self::NoAnswer { .. } | Self::OperationLost { .. } => {
                true
            }
            // Incus answers 500 where an instance is in the middle of a change, and 503 while it starts.
            Self::Refused { code, message, .. } => {
                *code == 503 || *code == 429 || (*code == 500 && message.contains("busy"))
            }
            Self::OperationFailed { message, .. } => message.contains("busy"),
            Self::NoPermission { .. } | Self::OperationUnfinished { .. } | Self::Answer { .. } => false,
        }
    }
}
