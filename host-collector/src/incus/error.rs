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
    /// A volume of that name exists and is not this runtime's. It is left alone.
    #[error(
        "volume `{volume}` in pool `{pool}` (project `{project}`) exists and {whose}: it is left alone; name another one in \
         mounts, or, where a collector that is gone left it, take it over (pika-cloud reconcile --take-over RUNTIME_ID)"
    )]
    VolumeNotOurs {
        /// Its name.
        volume: String,
        /// Its storage pool.
        pool: String,
        /// The project that was asked.
        project: String,
        /// Whose it seems to be.
        whose: String,
    },
    /// Somebody else took it over, or it is gone.
    #[error("{what} was not taken over: {now}")]
    TakeOverLost {
        /// What was to be taken over.
        what: String,
        /// How it stands.
        now: String,
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
        self.class() == Class::NotFound
    }

    /// Whether the same call may succeed a little later.
    pub fn is_transient(&self) -> bool {
        self.class() == Class::Transient
    }

    /// What to do about it. The table in the [module's docs](super) says where each was seen.
    pub fn class(&self) -> Class {
        match self {
            Self::NotRunning { .. }
            | Self::Transport { .. }
            | Self::NoAnswer { .. }
            | Self::OperationLost { .. }
            // It may succeed behind our back, so that nothing is concluded from it.
            | Self::OperationUnfinished { .. }
            | Self::Refused { code: 429 | 502 | 503 | 504, .. } => Class::Transient,
            Self::Refused { code: 404, .. } => Class::NotFound,
            // A change while another one is under way is refused with 500, as real failures are.
            Self::Refused { code: 500, message, .. } | Self::OperationFailed { message, .. } if is_busy(message) => {
                Class::Transient
            }
            Self::Refused { .. }
            | Self::OperationFailed { .. }
            | Self::NoPermission { .. }
            | Self::VolumeNotOurs { .. }
            | Self::TakeOverLost { .. }
            | Self::Answer { .. } => Class::Final,
        }
    }
}

/// The one place where Incus gives no code of its own, so that its words have to do.
fn is_busy(message: &str) -> bool {
    message.contains("Instance is busy") || message.contains("database is locked") || is_image_replaced(message)
}

/// The image that an alias pointed to was replaced, and deleted, while Incus made an instance of it: by now the alias points to
/// another.
fn is_image_replaced(message: &str) -> bool {
    message.contains("Image not available on any online member")
        || (message.contains("Failed creating instance from image") && message.contains("no such file"))
}

/// What to do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Class {
    /// The same call may succeed a little later: Incus is starting, stopping or busy, or the connection broke.
    Transient,
    /// It will fail again.
    Final,
    /// The very thing asked for does not exist.
    NotFound,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(code: u16, message: &str) -> Error {
        Error::Refused { request: "PUT /x".to_owned(), code, message: message.to_owned() }
    }

    #[test]
    fn answers_that_were_seen_are_in_their_class() {
        let busy = r#"Failed to create instance update operation: Instance is busy running a "stop" operation"#;
        let failed = |message: &str| Error::OperationFailed { what: "x".into(), message: message.into() };
        for (error, class) in [
            (refused(500, busy), Class::Transient),
            (failed(busy), Class::Transient),
            (refused(503, "Daemon is starting up"), Class::Transient),
            (Error::OperationLost { what: "x".into() }, Class::Transient),
            (Error::OperationUnfinished { what: "x".into(), after: Duration::from_secs(120) }, Class::Transient),
            (refused(404, "Instance not found"), Class::NotFound),
            (refused(500, "The instance is already running"), Class::Final),
            (refused(400, "Instance is running"), Class::Final),
            (refused(409, "Volume by that name already exists"), Class::Final),
            (failed("Failed locating image \"f00\": Image not available on any online member"), Class::Transient),
            (failed("Failed creating instance from image: open /x/f00: no such file or directory"), Class::Transient),
            (failed("Image not provided for instance creation"), Class::Final),
            (failed("disk 404 not found"), Class::Final),
        ] {
            assert_eq!(error.class(), class, "{error}");
        }
    }
}
