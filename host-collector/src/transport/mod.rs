//! Byte streams to a guest's agent. The session runs over any of them and does not know which.

mod exec;

use tokio::io::{AsyncRead, AsyncWrite};

pub(crate) use exec::{AgentEnd, Diagnosis, dial_exec};

/// What a session reads from.
pub(crate) type Reader = Box<dyn AsyncRead + Send + Unpin>;
/// What a session writes to.
pub(crate) type Writer = Box<dyn AsyncWrite + Send + Unpin>;

/// Both directions, and what keeps them open.
pub(crate) struct Link {
    /// From the guest.
    pub reader: Reader,
    /// To the guest.
    pub writer: Writer,
    /// Tells why the agent ended, where the transport knows. Dropping it hangs up.
    pub diagnosis: Diagnosis,
}
