//! By which way the agent is dialled, and whether it is our machine that answered. Pure.
//!
//! ```text
//!              vsock ──no session, three times──► exec ──no session──┐
//!                ▲                                                   │
//!                └───────────── a session was had, or lost ◄─────────┘
//! ```
//!
//! A container has no other way than exec, in which Incus itself names the instance. A virtual machine is dialled over vsock
//! first, which needs nothing in it but its agent; where that brings no session (no `/dev/vsock` here, another host, an agent
//! that does not listen), exec is tried in between, which needs Incus's own agent in the machine.
//!
//! A context id says nothing of who is behind it: they are given to other machines again. So it is read from Incus before each
//! dial; the hello says which machine is meant, and an agent of another refuses it; the agent must name the machine that Incus
//! has under our instance; and Incus is asked once more whether instance and id still belong together. Before that nothing
//! that the guest says is taken, and nothing but a hello is said to it.

use pika_cloud_common::digest::Digest;
use pika_cloud_common::spec::InstanceType;
use pika_cloud_common::wire::Transport;

use super::{CallId, Seen};
use crate::incus::{InstanceState, VsockAddress};
use crate::session::Opened;

/// Dials over vsock in a row, before exec is tried in between.
const VSOCK_TRIES: u32 = 3;

/// By which way.
#[derive(Debug)]
pub(super) struct Route {
    is_machine: bool,
    /// Dials over vsock in a row that brought no session.
    missed: u32,
    /// The way of the last dial.
    last: Transport,
}

impl Route {
    pub(super) fn new(kind: InstanceType) -> Self {
        Self { is_machine: kind == InstanceType::VirtualMachine, missed: 0, last: Transport::Exec }
    }

    /// Whether there is more than one.
    pub(super) fn has_choice(&self) -> bool {
        self.is_machine
    }

    /// The way that is taken now.
    pub(super) fn take(&mut self) -> Transport {
        self.last = if self.is_machine && self.missed < VSOCK_TRIES { Transport::Vsock } else { Transport::Exec };
        self.last
    }

    /// The one that was taken last.
    pub(super) fn last(&self) -> Transport {
        self.last
    }

    /// It brought no session.
    pub(super) fn missed(&mut self) {
        // Exec has had its turn then.
        self.missed = if self.last == Transport::Vsock { self.missed + 1 } else { 0 };
    }

    /// It cannot be taken from here at all.
    pub(super) fn is_closed(&mut self) {
        self.missed = if self.last == Transport::Vsock { VSOCK_TRIES } else { 0 };
    }

    /// A session was had.
    pub(super) fn opened(&mut self) {
        self.missed = 0;
    }
}

/// Who is at the other end of the stream.
#[derive(Debug, Default)]
pub(super) enum Peer {
    /// Our instance.
    #[default]
    Ours,
    /// Whoever had that id when it was dialled.
    Dialled(VsockAddress),
    /// The machine of ours, by its own word. Incus is being asked whether it still has that id.
    Asked {
        /// The call.
        id: CallId,
        address: VsockAddress,
        /// Its hello, which counts only then.
        opened: Box<Opened>,
    },
}

impl Peer {
    /// What the agent is told of the machine that is meant.
    pub(super) fn machine(&self) -> Option<Digest> {
        match self {
            Self::Dialled(address) => Some(Digest::of(address.machine_uuid.as_bytes())),
            Self::Ours | Self::Asked { .. } => None,
        }
    }

    /// Whether nothing is taken from it for now.
    pub(super) fn is_asked(&self) -> bool {
        matches!(self, Self::Asked { .. })
    }
}

/// Why a hello is not of the machine that was dialled.
pub(super) fn stranger(address: &VsockAddress, opened: &Opened) -> Option<String> {
    let VsockAddress { cid, machine_uuid } = address;
    match opened.hello.machine_uuid.as_deref() {
        Some(found) if found.eq_ignore_ascii_case(machine_uuid) => None,
        Some(_) => Some(format!("another machine than this instance's ({machine_uuid}) answered at CID {cid}")),
        None => Some(format!("the agent at CID {cid} does not name its machine: it must run as root to read that")),
    }
}

/// Whether an instance is still the one that was dialled.
pub(super) fn is_still_at(address: &VsockAddress, seen: &Seen) -> bool {
    seen.state == InstanceState::Running && seen.vsock.as_ref() == Some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_has_one_way() {
        let mut route = Route::new(InstanceType::Container);
        for _ in 0..10 {
            assert_eq!(route.take(), Transport::Exec);
            route.missed();
        }
    }

    #[test]
    fn a_machine_is_dialled_over_vsock_and_sometimes_by_exec() {
        let mut route = Route::new(InstanceType::VirtualMachine);
        let ways: Vec<_> = (0..9)
            .map(|_| {
                let way = route.take();
                route.missed();
                way
            })
            .collect();
        let (vsock, exec) = (Transport::Vsock, Transport::Exec);
        assert_eq!(ways, [vsock, vsock, vsock, exec, vsock, vsock, vsock, exec, vsock]);
    }

    /// A session by exec is none for ever: the next one is tried over vsock again.
    #[test]
    fn after_a_session_vsock_comes_first() {
        let mut route = Route::new(InstanceType::VirtualMachine);
        assert_eq!(route.take(), Transport::Vsock);
        route.is_closed();
        assert_eq!(route.take(), Transport::Exec);
        route.opened();
        assert_eq!(route.take(), Transport::Vsock);
    }
}
