//! What goes into the machine, and what comes out.

use std::time::Duration;

use pika_cloud_common::spec::{OutputCollectionMode, RestartPolicy, RetentionPolicy, RuntimeSpec};
use pika_cloud_common::verdict::{DeathCause, Outcome, Watchdog};
use pika_cloud_common::{Command, Event, State};

use super::phase::Trigger;

/// What of a spec the machine goes by.
#[derive(Clone, Debug)]
pub struct Plan {
    /// From the instance's start to the agent's first word.
    pub boot: Duration,
    /// From the agent's first word to `ready`.
    pub ready: Option<Duration>,
    /// Without a word from the guest.
    pub silence: Duration,
    /// Between two progress events.
    pub progress: Option<Duration>,
    /// From the workload's start, however much progress it makes.
    pub progress_cap: Option<Duration>,
    /// From the workload's start to its end, in the guest.
    pub run: Option<Duration>,
    /// Between TERM and KILL.
    pub stop_grace: Duration,
    /// When outputs are collected.
    pub collect: OutputCollectionMode,
    /// Whether the instance stays.
    pub retention: RetentionPolicy,
    /// How long [`RetentionPolicy::DebugKeep`] keeps it.
    pub debug_keep: Duration,
    /// Whether it is started again.
    pub restart: RestartPolicy,
    /// How often in a row.
    pub max_restarts: u32,
    /// Before the first restart; doubled for each one more.
    pub restart_backoff: Duration,
    /// Before a restart at most. An incarnation whose workload lived so long lets the count begin anew.
    pub restart_backoff_cap: Duration,
}

impl Plan {
    /// Of a validated spec.
    pub fn of(spec: &RuntimeSpec) -> Self {
        let (watchdogs, policies) = (&spec.watchdogs, &spec.policies);
        Self {
            boot: Duration::from_secs(watchdogs.boot_secs),
            ready: watchdogs.ready_secs.map(Duration::from_secs),
            silence: Duration::from_secs(watchdogs.silence_secs),
            progress: watchdogs.progress_secs.map(Duration::from_secs),
            progress_cap: watchdogs.progress_cap_secs.map(Duration::from_secs),
            run: watchdogs.run_secs.map(Duration::from_secs),
            stop_grace: Duration::from_secs(watchdogs.stop_grace_secs),
            collect: policies.output_collection.mode,
            retention: policies.retention_policy,
            debug_keep: Duration::from_secs(policies.debug_keep_secs),
            restart: policies.restart_policy,
            max_restarts: policies.max_restarts,
            restart_backoff: Duration::from_secs(policies.restart_backoff_secs),
            restart_backoff_cap: Duration::from_secs(policies.restart_backoff_cap_secs),
        }
    }
}

/// Where an incarnation stood when its collector last wrote to the journal. Times are how long ago something was.
#[derive(Clone, Debug, Default)]
pub struct Start {
    /// From its workload's start to its end, where that was decided; nothing where it was never asked for.
    pub lived: Duration,
    /// Restarts in a row that led to it.
    pub restarts: u32,
    /// Whether Incus was asked to create the instance, and no answer is known.
    pub create_unanswered: bool,
    /// Incus was about to be asked to start the instance.
    pub start_asked: Option<Duration>,
    /// The agent answered.
    pub booted: Option<Duration>,
    /// Whether the guest said that it is ready.
    pub is_ready: bool,
    /// The guest was asked to start its workload.
    pub start_sent: Option<Duration>,
    /// The guest's last progress event.
    pub progress: Option<Duration>,
    /// What the guest's last word made of it, if that was in the journal.
    pub last_word: Option<EndDecision>,
    /// The end, if it was decided.
    pub ended: Option<EndDecision>,
    /// Whether collection was tried.
    pub is_collected: bool,
    /// Whether the verdict is durable.
    pub is_concluded: bool,
    /// What was wanted of it.
    pub command: Option<Command>,
    /// What became of it after that.
    pub settled: Option<Settled>,
}

/// What became of an incarnation after its verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// The instance stays, for what is left of a time or until a command.
    Kept(Option<Duration>),
    /// It is over, and begins anew after what is left of its rest.
    Resting(Duration),
    /// It is over.
    Finished,
    /// Another collector has it.
    TakenOver,
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
    /// Its name is another's, which is not of this runtime.
    Foreign,
    /// It is of this runtime, and another collector took it over.
    TakenOver {
        /// Who has it.
        owner: String,
        /// Under which term.
        term: u64,
    },
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
    /// The agent ended, and its stream with it.
    Died(String),
    /// This transport cannot be used from here; another one may.
    NoTransport(String),
    /// The guest ended it because a new stream began.
    NewStream,
    /// The image has no agent, and no other can be had.
    NoAgent(String),
    /// The guest did not take the host's own agent.
    NotPut(String),
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
    /// It made progress.
    Progress,
    /// It said its last word.
    Terminal(EndDecision),
    /// It went back to an earlier snapshot.
    Rewound,
}

/// What the core saw.
#[derive(Clone, Debug)]
pub enum Input {
    /// Incus was asked for the instance.
    Looked(Result<Found, CallFailure>),
    /// Incus was asked to create it.
    Created(Result<(), CallFailure>),
    /// Incus was asked to start it.
    Started(Result<(), CallFailure>),
    /// Incus was asked to stop it.
    Halted(Result<(), CallFailure>),
    /// Any byte came from the guest.
    Heard,
    /// The guest did something.
    Guest(Guest),
    /// There is no session.
    NoSession(SessionLoss),
    /// Collection is over, complete or not.
    Collected,
    /// The verdict is durable.
    Concluded,
    /// Incus was asked to destroy the instance. An instance that another collector has is left alone.
    Destroyed(Result<Destroyed, CallFailure>),
    /// A person or a program wants something.
    Command(Command),
    /// Incus said that something happened to the instance: what, is read.
    Woken,
    /// Time passed.
    Tick,
}

/// What came of destroying an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destroyed {
    /// It is gone.
    Gone,
    /// Another collector has it.
    TakenOver {
        /// Who has it.
        owner: String,
        /// Under which term.
        term: u64,
    },
}

impl Input {
    /// Its kind; `None` for those that never change the phase by themselves.
    pub fn trigger(&self) -> Option<Trigger> {
        Some(match self {
            Self::Looked(_) => Trigger::Looked,
            Self::Created(_) => Trigger::Created,
            Self::Started(_) => Trigger::Started,
            Self::Halted(_) => Trigger::Halted,
            Self::Guest(_) => Trigger::Guest,
            Self::NoSession(_) => Trigger::NoSession,
            Self::Collected => Trigger::Collected,
            Self::Concluded => Trigger::Concluded,
            Self::Destroyed(_) => Trigger::Destroyed,
            Self::Command(_) => Trigger::Command,
            Self::Tick => Trigger::Tick,
            Self::Heard | Self::Woken => return None,
        })
    }
}

/// What the core is to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Write down a state that was entered.
    Record(State, String),
    /// Ask Incus for the instance.
    Look,
    /// Ask Incus to create it.
    Create,
    /// Write down that it is about to be started, and ask Incus to start it.
    Start,
    /// Ask Incus to stop it.
    Halt,
    /// Open a session.
    Dial,
    /// Close the session, if there is one.
    HangUp,
    /// Make it durable that the workload is about to be started, then ask the guest to.
    StartWorkload,
    /// Send TERM to the workload.
    Terminate,
    /// Write down what was wanted.
    Command(Command),
    /// Make the end durable.
    End(EndDecision),
    /// Collect outputs, within the spec's budget.
    Collect,
    /// Make the verdict durable, and publish it.
    Conclude,
    /// Tell the guest that it may go, stop the instance and delete it.
    Destroy,
    /// Tell the guest that it may go, and leave the instance, for a time or until a command.
    Keep(Option<Duration>),
    /// Write down that the incarnation is over, and when the next one begins, if one does.
    Finish {
        /// Whether the instance is gone.
        destroyed: bool,
        /// Before the next incarnation.
        restart_in: Option<Duration>,
    },
    /// Begin the next incarnation.
    Begin {
        /// Restarts in a row that led to it.
        restarts: u32,
    },
    /// Write down that another collector has it, and do nothing more.
    Yield {
        /// Who has it.
        owner: String,
        /// Under which term.
        term: u64,
    },
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

    pub(super) fn failed_to_provide(message: impl Into<String>) -> Self {
        Self::new(Outcome::ProvisionFailed, message)
    }

    pub(super) fn timed_out(watchdog: Watchdog, message: impl Into<String>) -> Self {
        Self::new(Outcome::TimedOut { watchdog }, message)
    }

    pub(super) fn because(mut self, error: impl Into<String>) -> Self {
        self.error = Some(error.into());
        self
    }
}
