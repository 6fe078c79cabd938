//! The phases, and every way from one to another.

/// Where the machine stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Asking Incus what there is.
    Looking,
    /// Incus creates the instance.
    Creating,
    /// Incus starts it.
    Starting,
    /// Incus stops one that an earlier incarnation left running.
    Halting,
    /// A session is being opened.
    Dialing,
    /// A session is open.
    Live,
    /// The end is decided, and the workload has a grace to end by itself.
    Terminating,
    /// Outputs are being collected.
    Collecting,
    /// The verdict is being made durable.
    Concluding,
    /// The instance is being destroyed.
    Destroying,
    /// The instance stays, as its policy says: for a time, or until a command ends it.
    Kept,
    /// It is over, and begins anew after a while.
    Resting,
    /// Nothing is left to do.
    Done,
    /// Another collector has it: nothing is done here any more.
    TakenOver,
}

/// What leads from one phase to another: the kind of an [`Input`](super::Input).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Trigger {
    /// Incus said what there is.
    Looked,
    /// Incus answered the create.
    Created,
    /// Incus answered the start.
    Started,
    /// Incus answered the stop.
    Halted,
    /// The guest did something.
    Guest,
    /// There is no session.
    NoSession,
    /// Collection is over.
    Collected,
    /// The verdict is durable.
    Concluded,
    /// Incus answered the deletion.
    Destroyed,
    /// A person or a program wants something.
    Command,
    /// Time passed.
    Tick,
}

/// A change of the phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Transition {
    /// From where.
    pub from: Phase,
    /// By what.
    pub on: Trigger,
    /// To where.
    pub to: Phase,
}
