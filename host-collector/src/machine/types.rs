//! What goes into the machine, and what comes out.

use std::time::Duration;

use pika_cloud_common::spec::{OutputCollectionMode, RetentionPolicy, RuntimeSpec};
use pika_cloud_common::verdict::{Collection, DeathCause, Outcome, Watchdog};
use pika_cloud_common::{Event, State};

use crate::journal::{Ended, View};

/// What of a spec the machine goes by.
#[derive(Clone, Debug)]
pub struct Plan {
    /// From the instance's start to the agent's first word.
    pub boot: Duration,
    /// Without a word from the guest.
    pub silence: Duration,
    /// From the workload's start to its end, in the guest.
    pub run: Option<Duration>,
    /// Between TERM and KILL.
    pub stop_grace: Duration,
    /// When outputs are collected.
    pub collect: OutputCollectionMode,
    /// Whether the instance stays.
    pub retention: RetentionPolicy,
}

impl Plan {
    /// Of a validated spec.
    pub fn of(spec: &RuntimeSpec) -> Self {
        let watchdogs = &spec.watchdogs;
        Self {
            boot: Duration::from_secs(watchdogs.boot_secs),
            silence: Duration::from_secs(watchdogs.silence_secs),
            run: watchdogs.run_secs.map(Duration::from_secs),
            stop_grace: Duration::from_secs(watchdogs.stop_grace_secs),
            collect: spec.policies.output_collection.mode,
            retention: spec.policies.retention_policy,
        }
    }
}

/// Where an incarnation stood when its collector last wrote to the journal.
#[derive(Clone, Debug, Default)]
pub struct Start {
    /// Whether the agent had answered.
    pub booted: bool,
    /// How long ago the guest was asked to start its workload.
    pub start_sent_ago: Option<Duration>,
    /// What the guest's last word made of it, if that was in the journal.
    pub last_word: Option<EndDecision>,
    /// The end, if it was decided.
    pub ended: Option<Ended>,
    /// How far collection came, if it was tried.
    pub collection: Option<Collection>,
    /// Whether the verdict is durable.
    pub concluded: bool,
    /// Whether everything is done.
    pub finished: bool,
}

impl Start {
    /// From a journal. `start_sent_ago` is the driver's to compute, since it needs a clock.
    pub fn of(view: &View, start_sent_ago: Option<Duration>) -> Self {
        Self {
            booted: view.cursor.is_some(),
            start_sent_ago: view.start_sent.as_ref().and(start_sent_ago),
            last_word: view.terminal.as_ref().map(last_word),
            ended: view.ended.clone(),
            collection: view.collection.clone(),
            concluded: view.verdict.is_some(),
            finished: view.finished,
        }
    }
}

/// What a guest's last word makes of its incarnation.
pub fn last_word(event: &Event) -> EndDecision {
    let exit_code = event.exit_code();
    let says = |name: &str| event.details.as_ref().is_some_and(|details| details.get(name).is_some());
    let outcome = if event.kind == State::Completed {
        Outcome::Completed { exit_code }
    } else if says("supervisor_lost") {
        Outcome::GuestDied { cause: DeathCause::SupervisorLost }
    } else if says("timed_out") {
        Outcome::TimedOut { watchdog: Watchdog::Run }
    } else {
        Outcome::Failed { exit_code }
    };
    EndDecision::new(outcome, event.message.clone())
}

/// What Incus says of the instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// There is none.
    Absent,
    /// It is stopped.
    Stopped,
    /// It runs.
    Running,
    /// It is between two states, or frozen; by Incus's word.
    Changing(String),
    /// Incus cannot tell what became of it.
    Error,
}

/// A call to Incus failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallFailure {
    /// Whether the same call may go better a little later.
    pub transient: bool,
    /// What Incus answered.
    pub message: String,
}

/// Why there is no session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionLoss {
    /// The connection broke or could not be made.
    Lost(String),
    /// The guest ended it because a new stream began.
    NewStream,
    /// The image has no agent.
    NoAgent(String),
    /// The agent speaks another version, or refuses this host for good.
    Refused(String),
    /// The guest does not keep the protocol, or cannot read or write its own files.
    Broken(String),
}

/// What the guest did; durable before the machine hears of it.
#[derive(Clone, Debug, PartialEq)]
pub enum Guest {
    /// The session is open.
    Opened {
        /// Whether the run that was asked for cannot be in this stream: the guest booted anew.
        run_lost: bool,
    },
    /// It has started the workload, or had before.
    Accepted,
    /// It will not start the workload, whatever is tried.
    Refused(String),
    /// It entered a state.
    State(State),
    /// It said its last word.
    Terminal(EndDecision),
    /// It went back to an earlier snapshot.
    Rewound,
}

/// What the driver saw.
#[derive(Clone, Debug)]
pub enum Input {
    /// Incus was asked for the instance.
    Looked(Result<Found, CallFailure>),
    /// Incus was asked to create it.
    Created(Result<(), CallFailure>),
    /// Incus was asked to start it.
    Started(Result<(), CallFailure>),
    /// Any byte came from the guest.
    Heard,
    /// The guest did something.
    Guest(Guest),
    /// There is no session.
    NoSession(SessionLoss),
    /// Collection is over, complete or not.
    Collected(Collection),
    /// The verdict is durable.
    Concluded,
    /// Incus was asked to destroy the instance.
    Destroyed(Result<(), CallFailure>),
    /// A person or a program wants it ended.
    Cancel,
    /// Time passed.
    Tick,
}

/// What the driver is to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Write down a state that was entered.
    Record(State, String),
    /// Ask Incus for the instance.
    Look,
    /// Ask Incus to create it.
    Create,
    /// Ask Incus to start it.
    Start,
    /// Open a session.
    Dial,
    /// Close the session, if there is one.
    HangUp,
    /// Make it durable that the workload is about to be started, then ask the guest to.
    StartWorkload,
    /// Send TERM to the workload.
    Terminate,
    /// Make the end durable.
    End(EndDecision),
    /// Collect outputs, within the spec's budget.
    Collect,
    /// Make the verdict durable, and publish it.
    Conclude,
    /// Tell the guest that it may go, stop the instance and delete it.
    Destroy,
    /// Tell the guest that it may go, and leave the instance.
    Keep,
}

/// The end of an incarnation.
#[derive(Clone, Debug, PartialEq)]
pub struct EndDecision {
    /// How.
    pub outcome: Outcome,
    /// For a person.
    pub message: String,
    /// What Incus or the session answered, where that led to it.
    pub error: Option<String>,
}

impl EndDecision {
    pub(super) fn new(outcome: Outcome, message: impl Into<String>) -> Self {
        Self { outcome, message: message.into(), error: None }
    }

    pub(super) fn died(cause: DeathCause, message: impl Into<String>) -> Self {
        Self::new(Outcome::GuestDied { cause }, message)
    }

    pub(super) fn because(mut self, error: impl Into<String>) -> Self {
        self.error = Some(error.into());
        self
    }
}

/// Where the machine stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Asking Incus what there is.
    Looking,
    /// Incus creates the instance.
    Creating,
    /// Incus starts it.
    Starting,
    /// A session is being opened.
    Dialing,
    /// A session is open.
    Live,
    /// The end is decided, and the workload has a grace to end by itself.
    Stopping,
    /// Outputs are being collected.
    Collecting,
    /// The verdict is being made durable.
    Concluding,
    /// The instance is being destroyed, or let go.
    Destroying,
    /// Nothing is left to do.
    Done,
}
