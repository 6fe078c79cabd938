//! By which way the agent is dialled, and whose; and whether it is our machine that answered. Pure.
//!
//! ```text
//!              vsock ──no session, three times──► exec ──no session──┐
//!                ▲                                                   │
//!                └───────────── a session was had, or lost ◄─────────┘
//!
//!   by exec:   the image's agent ──none, or it only dies──► ours, where it was put ──not there──► ours, put in first
//! ```
//!
//! A container has no other way than exec, in which Incus itself names the instance. A virtual machine is dialled over vsock
//! first, which needs nothing in it but its agent; where that brings no session (no `/dev/vsock` here, another host, an agent
//! that does not listen), exec is tried in between, which needs Incus's own agent in the machine.
//!
//! Whose agent it is `incus.agent` says. Once the guest was heard there is something to lose: an agent that vanished, or dies
//! again and again, is replaced by ours whatever that says, and the session goes on from the guest's files. What the image has
//! is left as it is. That there is no agent ends a runtime only where no way is left.
//!
//! A context id says nothing of who is behind it: they are given to other machines again. So it is read from Incus before each
//! dial; the hello says which machine is meant, and an agent of another refuses it; the agent must name the machine that Incus
//! has under our instance; and Incus is asked once more whether instance and id still belong together. Before that nothing
//! that the guest says is taken, and nothing but a hello is said to it.

use pika_cloud_common::RuntimeSpec;
use pika_cloud_common::digest::Digest;
use pika_cloud_common::spec::{AgentPolicy, InstanceType};
use pika_cloud_common::wire::{AgentOrigin, Transport};

use super::{CallId, Seen};
use crate::incus::{InstanceState, VsockAddress};
use crate::machine::SessionLoss;
use crate::session::Opened;

/// Dials over vsock in a row, before exec is tried in between.
const VSOCK_TRIES: u32 = 3;

/// Streams of the image's agent in a row that ended without a session, or soon after it, before ours takes its place.
const MAX_DEATHS: u32 = 3;

/// Times in a row that a container could not take our agent, before it is given up. A machine may not have come up that far,
/// and a run is worth `silence_secs`.
const MAX_REFUSED_PUTS: u32 = 3;

/// What to do about an image that was to have an agent.
const WAY_OUT_OF_BAKED: &str =
    ", and incus.agent is `baked`: bake one in (pika-cloud bake), or set it to `auto`, and the host puts its own in";

/// By which way an agent is dialled, and which one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// What carries the session.
    pub transport: Transport,
    /// What is to answer. Over vsock that is always the image's.
    pub agent: Agent,
}

/// An agent that may be dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Agent {
    /// The image's: it serves, or lies in the guest's `PATH`.
    Image,
    /// The host's, which lies where it was put before.
    Placed,
    /// The host's, which is put in first.
    Put,
}

impl Agent {
    /// Whose it is.
    pub fn origin(self) -> AgentOrigin {
        match self {
            Self::Image => AgentOrigin::Image,
            Self::Placed | Self::Put => AgentOrigin::Host,
        }
    }
}

/// By which way.
#[derive(Debug)]
pub(super) struct Route {
    is_machine: bool,
    policy: AgentPolicy,
    /// The guest was heard in this incarnation, so that there is something to lose.
    is_heard: bool,
    /// Dials over vsock in a row that brought no session.
    missed: u32,
    /// What exec runs next.
    agent: Agent,
    /// Streams of the image's agent in a row that died.
    deaths: u32,
    /// Times in a row that the guest did not take ours.
    refused_puts: u32,
    /// Why the image's is not the one.
    lack: Option<String>,
    /// The way of the last dial.
    last: Way,
}

impl Route {
    /// For an incarnation: whether its guest was heard before, and with whose agent.
    pub(super) fn new(spec: &RuntimeSpec, is_heard: bool, origin: Option<AgentOrigin>) -> Self {
        let policy = spec.incus.agent;
        let is_ours = origin == Some(AgentOrigin::Host) || policy == AgentPolicy::Inject;
        let is_machine = spec.incus.instance_type == InstanceType::VirtualMachine;
        let agent = if is_ours { Agent::Placed } else { Agent::Image };
        Self {
            is_machine,
            policy,
            is_heard,
            missed: if is_ours { VSOCK_TRIES } else { 0 },
            agent,
            deaths: 0,
            refused_puts: 0,
            lack: None,
            last: Way { transport: Transport::Exec, agent },
        }
    }

    /// The way that is taken now.
    pub(super) fn take(&mut self) -> Way {
        if self.has_vsock() && self.missed < VSOCK_TRIES {
            self.last = Way { transport: Transport::Vsock, agent: Agent::Image };
            return self.last;
        }
        self.take_exec()
    }

    fn take_exec(&mut self) -> Way {
        self.last = Way { transport: Transport::Exec, agent: self.agent };
        self.last
    }

    /// The one that was taken last.
    pub(super) fn last(&self) -> Way {
        self.last
    }

    fn has_vsock(&self) -> bool {
        self.is_machine && self.policy != AgentPolicy::Inject
    }

    /// Whether ours may take the place of the image's.
    fn may_put(&self) -> bool {
        self.is_heard || self.policy != AgentPolicy::Baked
    }

    /// A dial brought no session: another way that is taken at once, or why there is none.
    pub(super) fn missed(&mut self, loss: SessionLoss) -> Result<Way, SessionLoss> {
        if self.last.transport == Transport::Vsock {
            return self.missed_vsock(loss);
        }
        let next = match (self.last.agent, loss) {
            (Agent::Image, SessionLoss::NoAgent(lack)) if self.may_put() => Ok(self.turn_to_ours(lack)),
            (Agent::Image, SessionLoss::NoAgent(lack)) => Err(SessionLoss::NoAgent(lack + WAY_OUT_OF_BAKED)),
            (Agent::Image, SessionLoss::Refused(lack)) if self.is_heard => Ok(self.turn_to_ours(lack)),
            (Agent::Placed, SessionLoss::NoAgent(_)) => {
                self.agent = Agent::Put;
                Ok(self.take_exec())
            }
            (Agent::Placed | Agent::Put, loss) => Err(self.without_ours(loss)),
            (Agent::Image, loss) => {
                self.count_death(&loss);
                Err(loss)
            }
        };
        if next.is_err() {
            // Exec has had its turn then.
            self.missed = 0;
        }
        next.map_err(|loss| match loss {
            // A machine's agent may be served all the same, over vsock.
            SessionLoss::NoAgent(message) if self.has_vsock() => SessionLoss::Lost(message),
            SessionLoss::NoTransport(message) => SessionLoss::Lost(message),
            loss => loss,
        })
    }

    fn missed_vsock(&mut self, loss: SessionLoss) -> Result<Way, SessionLoss> {
        if let SessionLoss::NoTransport(_) = loss {
            // It cannot be taken from here at all.
            self.missed = VSOCK_TRIES;
            return Ok(self.take());
        }
        self.missed += 1;
        match loss {
            SessionLoss::Refused(lack) if self.is_heard => {
                self.missed = VSOCK_TRIES;
                Ok(self.turn_to_ours(lack))
            }
            loss => {
                self.count_death(&loss);
                Err(loss)
            }
        }
    }

    fn turn_to_ours(&mut self, lack: String) -> Way {
        (self.lack, self.agent, self.deaths) = (Some(lack), Agent::Placed, 0);
        self.take_exec()
    }

    /// The image's agent may have died: once may be anything's fault.
    fn count_death(&mut self, loss: &SessionLoss) {
        let SessionLoss::Died(message) = loss else { return };
        self.deaths += 1;
        if self.deaths >= MAX_DEATHS && self.may_put() {
            (self.lack, self.agent, self.deaths) = (Some(message.clone()), Agent::Placed, 0);
            self.missed = VSOCK_TRIES;
        }
    }

    /// Ours brought no session either.
    fn without_ours(&mut self, loss: SessionLoss) -> SessionLoss {
        match loss {
            // What lies there may be damaged: it is put in anew, the next time.
            SessionLoss::Died(message) => {
                self.agent = Agent::Put;
                SessionLoss::Died(message)
            }
            SessionLoss::NotPut(message) => {
                self.refused_puts += 1;
                let message = self.with_lack(message);
                if self.is_machine || self.is_heard || self.refused_puts < MAX_REFUSED_PUTS {
                    return SessionLoss::Lost(message);
                }
                SessionLoss::NoAgent(message)
            }
            SessionLoss::NoAgent(message) => {
                let message = self.with_lack(message);
                // Whatever comes next begins with what the image has by then.
                if self.policy != AgentPolicy::Inject {
                    self.agent = Agent::Image;
                }
                SessionLoss::NoAgent(message)
            }
            loss => loss,
        }
    }

    /// What the image lacks comes first: that is what its maker can mend.
    fn with_lack(&self, message: String) -> String {
        match &self.lack {
            Some(lack) => format!("{lack}; and {message}"),
            None => message,
        }
    }

    /// Why ours is being tried.
    pub(super) fn lack(&self) -> Option<String> {
        self.lack.as_ref().map(|lack| format!("{lack}; and the host's own has not answered yet"))
    }

    /// A session was had.
    pub(super) fn opened(&mut self) {
        (self.is_heard, self.refused_puts, self.lack) = (true, 0, None);
        match self.last.agent {
            Agent::Image => self.missed = 0,
            Agent::Placed | Agent::Put => {
                // What answered once is dialled first from now on.
                (self.agent, self.missed) = (Agent::Placed, VSOCK_TRIES);
            }
        }
    }

    /// A session was lost. One that held for long was a good one, whatever ended it.
    pub(super) fn lost(&mut self, loss: &SessionLoss, held: bool) {
        if held {
            self.deaths = 0;
        } else if self.last.agent == Agent::Image {
            self.count_death(loss);
        }
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
    /// Nobody any more: its agent does not fit. Incus is being asked what its image was baked from.
    Unfit {
        /// The call.
        id: CallId,
        /// Why not.
        message: String,
    },
}

impl Peer {
    /// What the agent is told of the machine that is meant.
    pub(super) fn machine(&self) -> Option<Digest> {
        match self {
            Self::Dialled(address) => Some(Digest::of(address.machine_uuid.as_bytes())),
            Self::Ours | Self::Asked { .. } | Self::Unfit { .. } => None,
        }
    }

    /// Whether nothing is taken from it for now.
    pub(super) fn is_asked(&self) -> bool {
        matches!(self, Self::Asked { .. })
    }

    /// Whether that call is about it.
    pub(super) fn waits_for(&self, call: CallId) -> bool {
        matches!(self, Self::Asked { id, .. } | Self::Unfit { id, .. } if *id == call)
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
mod tests;
