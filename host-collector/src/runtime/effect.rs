//! What the core asks of its shell, and what it is answered.

use pika_cloud_common::wire::{ArchiveLimits, Entry, HostMessage};

use super::route::Way;
use crate::incus::VsockAddress;
use crate::journal::Commit;
use crate::machine::{CallFailure, Destroyed};

/// Names one call, so that the answer of one that nobody waits for any more is known as such.
pub type CallId = u64;

/// What the shell is to do, in this order.
#[derive(Debug)]
pub enum Effect {
    /// Ask Incus; answered by [`Core::answer`](super::Core::answer) under the same id.
    Call(CallId, Call),
    /// Open a stream to the agent; answered by [`Core::dialled`](super::Core::dialled).
    Dial {
        /// To be answered with.
        id: CallId,
        /// The instance's present name.
        instance: String,
        /// By which way, and which agent.
        way: Way,
    },
    /// Close the stream, if there is one, or forget about the one that is being opened. Nothing waits for that.
    HangUp,
    /// Close the stream once the guest took what was sent, or after a second at most: what comes next may be its end.
    Farewell,
    /// Send to the guest.
    Send(HostMessage),
    /// Make it durable; answered by [`Core::committed`](super::Core::committed). There is never more than one under way.
    Commit(Commit),
    /// Make room for a collection; what an earlier try left is thrown away.
    BeginArtifacts {
        /// Of which incarnation.
        incarnation: u32,
        /// What the spec allows.
        limits: ArchiveLimits,
    },
    /// Make durable what was collected; answered by [`Core::stored`](super::Core::stored).
    StoreArtifacts {
        /// What is left of the budget.
        within: std::time::Duration,
    },
    /// Remove the outputs of old incarnations.
    Prune {
        /// Those with a lower number.
        before: u32,
    },
    /// Write the files that are derived from the journal.
    Derive {
        /// Of which incarnation.
        incarnation: u32,
    },
}

/// A call to Incus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// Read the instance.
    Look {
        /// Its name.
        instance: String,
        /// Where there is none of that name, one with our labels is looked for: a person may have renamed it.
        search: bool,
    },
    /// Create it.
    Create {
        /// Of which incarnation.
        incarnation: u32,
        /// Under which term.
        term: u64,
    },
    /// Start it.
    Start {
        /// Its name.
        instance: String,
        /// For which incarnation.
        incarnation: u32,
    },
    /// Read the end of what it said on its console.
    Console {
        /// Its name.
        instance: String,
    },
    /// Stop it, without asking what runs in it.
    Halt {
        /// Its name.
        instance: String,
    },
    /// Stop and delete it, after another look at its labels.
    Destroy {
        /// Its name.
        instance: String,
        /// Ours: with a higher one it is another collector's.
        term: u64,
    },
}

/// What Incus answered.
#[derive(Clone, Debug)]
pub enum Answer {
    /// The instance, where there is one.
    Looked(Result<Option<Seen>, CallFailure>),
    /// It is created, or was refused.
    Created(Result<(), CallFailure>),
    /// It is started.
    Started(Result<(), CallFailure>),
    /// It is stopped.
    Halted(Result<(), CallFailure>),
    /// The end of what it said on its console, where that can be read.
    Console(Option<String>),
    /// It is gone.
    Destroyed(Result<Destroyed, CallFailure>),
}

/// An instance as Incus has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Its present name.
    pub name: String,
    /// Incus's own word for its state.
    pub status: String,
    /// What that means.
    pub state: crate::incus::InstanceState,
    /// Whose it is, by its labels.
    pub claim: Option<Claim>,
    /// Where it is found over vsock, if it is a machine that was started.
    pub vsock: Option<VsockAddress>,
    /// The alias of the image that its own was baked from, where it was baked.
    pub base_alias: Option<String>,
}

/// Whose an instance is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The runtime.
    pub runtime_id: String,
    /// The id of the state dir whose collector may change it.
    pub owner: String,
    /// Raised at each take-over.
    pub term: u64,
}

/// Where collected artifacts go, byte for byte as they come, behind [`Effect::BeginArtifacts`]. What fails is told by
/// [`Core::stored`](super::Core::stored).
pub trait Outputs {
    /// A file or folder begins, or a file goes on.
    fn entry(&mut self, entry: &Entry);
    /// The next bytes of that entry.
    fn bytes(&mut self, bytes: &[u8]);
}

/// What came of storing artifacts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stored {
    /// Files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Why it is not all.
    pub problem: Option<String>,
}
