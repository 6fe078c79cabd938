//! `AF_VSOCK` to a virtual machine on this host: no network, no agent of Incus's, nothing that listens on the host.
//!
//! ```text
//!   Incus ──volatile.vsock_id, volatile.uuid──► connect (cid, 20555) ──► session
//!                                                 │  nobody listens yet: again, for a while
//!                                                 └─ anything else: told apart, and the next dial reads the id anew
//! ```
//!
//! A connection that is open says nothing of who took it. The session checks that: see
//! [`Link::vsock`](crate::driver::Link::vsock).
//!
//! What the kernel answers, as it was seen with vhost-vsock: a closed port ECONNRESET, a machine that is paused or has no
//! driver yet ETIMEDOUT, one that does not run ENODEV.

use std::future::Future;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use pika_cloud_common::limits::VSOCK_PORT;
use rustix::io::Errno;
use tokio::time::Instant;
use tokio_vsock::{VsockAddr, VsockStream};

use crate::driver::{Explain, Link};
use crate::incus::{Client, InstanceView, VsockAddress};
use crate::machine::SessionLoss;

/// There is one where the kernel can do vsock at all.
const DEVICE: &str = "/dev/vsock";

/// The kernel itself gives up after two seconds, as long as the other end's driver is up.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(2500);

/// For how long one dial waits for an agent that does not listen yet, with the id that it read.
const PATIENCE: Duration = Duration::from_secs(1);

/// Between two connects of one dial: what that costs is small, and an agent that comes up is heard at once.
const PACE: Duration = Duration::from_millis(5);

/// Why there is no stream.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// Nobody listens on the port: the agent is not up yet, or there is none.
    #[error("no agent listens on its vsock port {VSOCK_PORT} (is `pika-guest serve` running in the guest?)")]
    NotListening,
    /// No answer at all.
    #[error("the machine does not answer over vsock: it has no vsock driver (yet), or it is paused")]
    NoAnswer,
    /// No machine has that id now.
    #[error("no running machine has the CID that Incus names")]
    NoMachine,
    /// vsock cannot be used from here.
    #[error("vsock cannot be used on this host ({0}): load vhost_vsock (modprobe vhost_vsock)")]
    Unusable(io::Error),
    /// Anything else.
    #[error("vsock: {0}")]
    Other(io::Error),
}

impl VsockError {
    /// What a connect that failed says.
    pub fn of(error: io::Error) -> Self {
        match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::CONNRESET | Errno::CONNREFUSED) => Self::NotListening,
            Some(Errno::TIMEDOUT | Errno::HOSTUNREACH) => Self::NoAnswer,
            Some(Errno::NODEV | Errno::NETUNREACH) => Self::NoMachine,
            Some(Errno::AFNOSUPPORT | Errno::PERM | Errno::ACCESS | Errno::NOENT) => Self::Unusable(error),
            _ => Self::Other(error),
        }
    }

    fn loss(self) -> SessionLoss {
        match self {
            Self::Unusable(_) => SessionLoss::NoTransport(self.to_string()),
            error => SessionLoss::Lost(error.to_string()),
        }
    }
}

/// Connects to an agent that may be about to listen: again and again, for a second.
///
/// # Errors
/// What the last try came to.
pub async fn connect_patiently<T, F>(connect: impl Fn() -> F) -> Result<T, VsockError>
where
    F: Future<Output = Result<T, VsockError>>,
{
    let deadline = Instant::now() + PATIENCE;
    loop {
        match connect().await {
            Err(VsockError::NotListening) if Instant::now() < deadline => tokio::time::sleep(PACE).await,
            connected => return connected,
        }
    }
}

async fn connect(cid: u32) -> Result<VsockStream, VsockError> {
    match tokio::time::timeout(CONNECT_TIMEOUT, VsockStream::connect(VsockAddr::new(cid, VSOCK_PORT))).await {
        Ok(connected) => connected.map_err(VsockError::of),
        Err(_) => Err(VsockError::NoAnswer),
    }
}

/// Opens a stream to the agent of an instance, which has to prove still that it is that instance's.
///
/// # Errors
/// [`SessionLoss::NoTransport`] where vsock cannot lead there.
pub(crate) async fn dial_vsock(client: &Client, project: &str, instance: &str) -> Result<Link, SessionLoss> {
    if !Path::new(DEVICE).exists() {
        return Err(VsockError::Unusable(Errno::NOENT.into()).loss());
    }
    let lost = |message: String| SessionLoss::Lost(message);
    let view = client.instance(project, instance).await.map_err(|error| lost(error.to_string()))?;
    let view = view.ok_or_else(|| lost("the instance is gone".to_owned()))?;
    check_place(client, &view).await?;
    let address = view.vsock().ok_or_else(|| lost("Incus names no CID for the machine (yet)".to_owned()))?;
    let stream = connect_patiently(|| connect(address.cid)).await.map_err(VsockError::loss)?;
    Ok(link(stream, address))
}

/// Only the host that runs a machine finds it by its id: another host may have a machine of its own with the same.
async fn check_place(client: &Client, view: &InstanceView) -> Result<(), SessionLoss> {
    if matches!(view.location.as_str(), "" | "none") {
        return Ok(());
    }
    let server = client.server().await.map_err(|error| SessionLoss::Lost(error.to_string()))?;
    if server.environment.server_name == view.location {
        return Ok(());
    }
    let message = format!("vsock does not reach the cluster member `{}` from here", view.location);
    Err(SessionLoss::NoTransport(message))
}

fn link(stream: VsockStream, address: VsockAddress) -> Link {
    let (reader, writer) = tokio::io::split(stream);
    Link { reader: Box::new(reader), writer: Box::new(writer), diagnosis: Box::new(Ended), vsock: Some(address) }
}

/// A stream over vsock ends without a word about why.
struct Ended;

impl Explain for Ended {
    fn explain(&self) -> Pin<Box<dyn Future<Output = SessionLoss> + Send + '_>> {
        Box::pin(std::future::ready(SessionLoss::Died("the agent's stream over vsock ended".to_owned())))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn of(errno: Errno) -> VsockError {
        VsockError::of(errno.into())
    }

    #[test]
    fn what_the_kernel_answers_is_told_apart() {
        assert!(matches!(of(Errno::CONNRESET), VsockError::NotListening));
        assert!(matches!(of(Errno::CONNREFUSED), VsockError::NotListening));
        assert!(matches!(of(Errno::TIMEDOUT), VsockError::NoAnswer));
        assert!(matches!(of(Errno::NODEV), VsockError::NoMachine));
        assert!(matches!(of(Errno::AFNOSUPPORT), VsockError::Unusable(_)));
        assert!(matches!(of(Errno::MFILE), VsockError::Other(_)));
    }

    /// What another way may mend is told from what only time does.
    #[test]
    fn only_a_host_without_vsock_asks_for_another_way() {
        assert!(matches!(of(Errno::AFNOSUPPORT).loss(), SessionLoss::NoTransport(_)));
        for errno in [Errno::CONNRESET, Errno::TIMEDOUT, Errno::NODEV, Errno::MFILE] {
            assert!(matches!(of(errno).loss(), SessionLoss::Lost(_)), "{errno}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_that_comes_up_is_heard_at_once() {
        let up_at = Instant::now() + Duration::from_millis(500);
        let listens = || async move { if Instant::now() < up_at { Err(of(Errno::CONNRESET)) } else { Ok(()) } };
        connect_patiently(listens).await.unwrap();
        assert!(up_at.elapsed() <= PACE);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_does_not_is_given_up_for_now() {
        let (began, tries) = (Instant::now(), Cell::new(0));
        let refused = connect_patiently(|| async {
            tries.set(tries.get() + 1);
            Err::<(), _>(of(Errno::CONNRESET))
        });
        assert!(matches!(refused.await, Err(VsockError::NotListening)));
        assert!(began.elapsed() >= PATIENCE && began.elapsed() <= PATIENCE + PACE);
        assert_eq!(tries.get(), PATIENCE.as_millis() / PACE.as_millis() + 1);
        // Where the kernel has waited itself, or waiting changes nothing.
        for errno in [Errno::TIMEDOUT, Errno::NODEV, Errno::AFNOSUPPORT] {
            tries.set(0);
            let refused = connect_patiently(|| async {
                tries.set(tries.get() + 1);
                Err::<(), _>(of(errno))
            });
            assert!(refused.await.is_err() && tries.get() == 1);
        }
    }
}
