//! What drives instances and opens streams to their agents. Three users: Incus, a benchmark that has ten thousand guests in
//! another process, and tests whose instances are VMs of their own.

use std::future::Future;
use std::pin::Pin;

use tokio::io::{AsyncRead, AsyncWrite};

use crate::incus::VsockAddress;
use crate::machine::SessionLoss;
use crate::runtime::{Answer, Call, Way};

/// A stream to an agent.
pub struct Link {
    /// From the guest.
    pub reader: Box<dyn AsyncRead + Send + Unpin>,
    /// To the guest.
    pub writer: Box<dyn AsyncWrite + Send + Unpin>,
    /// Tells why the agent ended. Dropping it hangs up.
    pub diagnosis: Box<dyn Explain>,
    /// Where it leads to, if it is a stream over vsock: that this is our instance's machine is checked then. Without it, it is
    /// known to lead to our instance.
    pub vsock: Option<VsockAddress>,
}

/// Tells why an agent ended, where the transport knows.
pub trait Explain: Send + Sync {
    /// Asked after its stream ended.
    fn explain(&self) -> Pin<Box<dyn Future<Output = SessionLoss> + Send + '_>>;
}

/// Performs calls of one runtime. A call runs to its end, whether or not anybody still waits for it.
pub trait Backend: Clone + Send + Sync + 'static {
    /// Performs a call, and tells what came of it.
    fn call(&self, call: Call) -> impl Future<Output = Answer> + Send + 'static;
    /// Opens a stream to an agent in an instance, by that way; one that is to be put in first is put in.
    fn dial(&self, instance: String, way: Way) -> impl Future<Output = Result<Link, SessionLoss>> + Send + 'static;
}
