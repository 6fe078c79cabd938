//! A model of Incus: instances, their labels, and calls that are slow, fail, or are lost.
//!
//! ```text
//!   absent ── create ──► stopped ── start ──► running ── stop, its own end ──► stopped ── delete ──► absent
//!                                               └ error: nothing is known any more, a delete still works
//!
//!   call:  asked ──► (takes effect) ──► answered        each after its time; a fault of the call says what the asker
//!                                                       hears instead, and whether the effect comes all the same
//! ```

use std::collections::BTreeMap;
use std::time::Duration;

use pika_host_collector::incus::VsockAddress;

use super::random::Random;

/// What Incus says of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It does not run.
    Stopped,
    /// It runs.
    Running,
    /// It is frozen, which Incus calls a state of its own.
    Frozen,
    /// Incus cannot tell.
    Error,
}

impl Status {
    /// Incus's own word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stopped => "Stopped",
            Self::Running => "Running",
            Self::Frozen => "Frozen",
            Self::Error => "Error",
        }
    }
}

/// An instance.
#[derive(Clone, Debug)]
pub struct Instance {
    /// Its config, labels included.
    pub config: BTreeMap<String, String>,
    /// What Incus says of it.
    pub status: Status,
    /// Counts the instances of that name: one that was deleted and made again is another.
    pub generation: u64,
    /// Whether a test of the simulator put it there, for nobody to touch.
    pub foreign: bool,
}

/// A call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Read it.
    Look,
    /// Make it, with this config.
    Create(BTreeMap<String, String>),
    /// Start it.
    Start,
    /// Stop it.
    Stop,
    /// Delete it, stopped.
    Delete,
}

impl Ask {
    /// For the trace.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Look => "look",
            Self::Create(_) => "create",
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Delete => "delete",
        }
    }
}

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The same call may go better a little later.
    pub transient: bool,
    /// What Incus says.
    pub message: String,
}

fn passing(message: &str) -> Failure {
    Failure { transient: true, message: message.to_owned() }
}

fn lasting(message: &str) -> Failure {
    Failure { transient: false, message: message.to_owned() }
}

/// What a call found or made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The instance: Incus's word for it, and its config.
    Found(Option<(Status, BTreeMap<String, String>)>),
    /// It was done.
    Done,
}

/// What a call changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    None,
    /// The instance was made.
    Made,
    /// It runs now.
    Started,
    /// It runs no more.
    Stopped,
    /// It is gone.
    Deleted,
}

/// Where a machine is found, by its config.
pub fn vsock_of(config: &BTreeMap<String, String>) -> Option<VsockAddress> {
    let cid = config.get(VSOCK_ID)?.parse().ok()?;
    Some(VsockAddress { cid, machine_uuid: config.get(MACHINE_UUID)?.clone() })
}

/// How a call will go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Course {
    /// When it takes effect, if it does.
    pub effect: Option<Duration>,
    /// When it is answered.
    pub answer: Duration,
    /// What it is answered, where that is not what came of it.
    pub says: Option<Says>,
}

/// An answer that tells nothing of the effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Says {
    /// Incus is not there.
    Unreachable,
    /// It is busy, or failed in passing.
    Busy,
    /// It refuses for good.
    Refused,
}

impl Says {
    fn failure(self) -> Failure {
        match self {
            Self::Unreachable => passing("Incus does not answer"),
            Self::Busy => passing("Instance is busy"),
            Self::Refused => lasting("Incus refuses"),
        }
    }
}

/// How often calls go wrong, out of a thousand each.
#[derive(Clone, Copy, Debug, Default)]
pub struct Trouble {
    /// A failure in passing, before or after the effect.
    pub passing: u32,
    /// The same of what changes something.
    pub stubborn: u32,
    /// A refusal for good.
    pub lasting: u32,
    /// An answer that takes seconds.
    pub slow: u32,
    /// An exec that fails.
    pub dial: u32,
}

/// The daemon.
#[derive(Debug)]
pub struct Incus {
    instances: BTreeMap<String, Instance>,
    random: Random,
    /// How it fares now.
    pub trouble: Trouble,
    /// It is down until then.
    pub down_until: Duration,
    generations: u64,
    renumbered: u32,
    /// When an instance of a name was last made.
    made_at: BTreeMap<String, Duration>,
}

/// The config key that names a machine.
pub const MACHINE_UUID: &str = "volatile.uuid";
/// The config key that says where it is dialled.
const VSOCK_ID: &str = "volatile.vsock_id";
/// The config key that names whose an instance is.
pub const OWNER: &str = "user.pika-cloud.owner";
/// The config key that counts its take-overs.
pub const TERM: &str = "user.pika-cloud.term";

impl Incus {
    /// Without instances.
    pub fn new(random: Random, trouble: Trouble) -> Self {
        Self {
            instances: BTreeMap::new(),
            random,
            trouble,
            down_until: Duration::ZERO,
            generations: 0,
            renumbered: 0,
            made_at: BTreeMap::new(),
        }
    }

    /// An instance, as it is.
    pub fn instance(&self, name: &str) -> Option<&Instance> {
        self.instances.get(name)
    }

    /// All of them.
    pub fn instances(&self) -> impl Iterator<Item = (&str, &Instance)> {
        self.instances.iter().map(|(name, instance)| (name.as_str(), instance))
    }

    /// Puts one there that is nobody's of ours.
    pub fn put_foreign(&mut self, name: &str) {
        self.generations += 1;
        let config = BTreeMap::from([("user.somebody".to_owned(), "else".to_owned())]);
        let (status, generation) = (Status::Running, self.generations);
        self.instances.insert(name.to_owned(), Instance { config, status, generation, foreign: true });
    }

    /// How a call that is made now will go.
    pub fn plan(&mut self, ask: &Ask, now: Duration) -> Course {
        let Self { random, trouble, .. } = self;
        let usual = match ask {
            Ask::Look => (1, 8),
            Ask::Create(_) => (40, 300),
            Ask::Start => (80, 400),
            Ask::Stop => (200, 900),
            Ask::Delete => (10, 60),
        };
        let mut took = random.millis(usual.0, usual.1);
        if random.chance(trouble.slow) {
            took += random.millis(500, 8000);
        }
        let stubborn = if *ask == Ask::Look { 0 } else { trouble.stubborn };
        let (passing, refused) = (random.chance(trouble.passing.max(stubborn)), random.chance(trouble.lasting));
        let late = random.chance(if stubborn > 0 { 10 } else { 500 });
        if now < self.down_until {
            return Course { effect: None, answer: now + random.millis(1, 5), says: Some(Says::Unreachable) };
        }
        let (effect, answer) = (now + took, now + took + random.millis(0, 5));
        if passing {
            // Incus goes on for a while with what it gave up, and not for ever.
            let behind = took.min(Duration::from_secs(4));
            let (effect, answer) = if late { (Some(effect + behind), answer) } else { (None, answer) };
            return Course { effect, answer, says: Some(Says::Busy) };
        }
        if refused && *ask != Ask::Look {
            return Course { effect: late.then_some(effect), answer, says: Some(Says::Refused) };
        }
        Course { effect: Some(effect), answer, says: None }
    }

    /// A call takes effect.
    pub fn perform(&mut self, name: &str, ask: &Ask) -> (Result<Reply, Failure>, Change) {
        let done = |change| (Ok(Reply::Done), change);
        match (ask, self.instances.get_mut(name)) {
            (Ask::Look, found) => {
                (Ok(Reply::Found(found.map(|found| (found.status, found.config.clone())))), Change::None)
            }
            (Ask::Create(_), Some(_)) => (Err(lasting("Instance already exists")), Change::None),
            (Ask::Create(config), None) => {
                self.generations += 1;
                let (config, generation) = (config.clone(), self.generations);
                let made = Instance { config, status: Status::Stopped, generation, foreign: false };
                self.instances.insert(name.to_owned(), made);
                done(Change::Made)
            }
            (_, None) => (Err(lasting("Instance not found")), Change::None),
            (Ask::Start, Some(found)) => match found.status {
                Status::Stopped => {
                    self.start(name);
                    done(Change::Started)
                }
                Status::Running => (Err(lasting("The instance is already running")), Change::None),
                Status::Frozen | Status::Error => (Err(passing("Instance is busy")), Change::None),
            },
            (Ask::Stop, Some(found)) => match found.status {
                Status::Stopped => (Err(lasting("The instance is already stopped")), Change::None),
                Status::Running | Status::Frozen | Status::Error => {
                    found.status = Status::Stopped;
                    done(Change::Stopped)
                }
            },
            (Ask::Delete, Some(found)) if found.status == Status::Running || found.status == Status::Frozen => {
                (Err(lasting("Instance is running")), Change::None)
            }
            (Ask::Delete, Some(_)) => {
                self.instances.remove(name);
                done(Change::Deleted)
            }
        }
    }

    /// It runs from now on. A machine has the lowest number that no other machine has that runs: one that stopped may find its
    /// own with another.
    fn start(&mut self, name: &str) {
        let taken: Vec<String> = self
            .instances
            .values()
            .filter(|instance| instance.status != Status::Stopped)
            .filter_map(|instance| instance.config.get(VSOCK_ID).cloned())
            .collect();
        let free = (10..1000).map(|cid: u32| cid.to_string()).find(|cid| !taken.contains(cid));
        let Some(found) = self.instances.get_mut(name) else { return };
        found.status = Status::Running;
        if found.config.contains_key(MACHINE_UUID) {
            found.config.extend(free.map(|cid| (VSOCK_ID.to_owned(), cid)));
        }
    }

    /// It has another number from now on.
    pub fn renumber(&mut self, name: &str) {
        self.renumbered += 1;
        let number = (1000 + self.renumbered).to_string();
        if let Some(found) = self.instances.get_mut(name).filter(|found| found.config.contains_key(VSOCK_ID)) {
            found.config.insert(VSOCK_ID.to_owned(), number);
        }
    }

    /// The machine that has a number, and runs.
    pub fn machine_at(&self, cid: u32) -> Option<&str> {
        let cid = cid.to_string();
        let has = |instance: &Instance| {
            instance.status == Status::Running && instance.config.get(VSOCK_ID).is_some_and(|id| *id == cid)
        };
        self.instances.iter().find(|(_, instance)| has(instance)).map(|(name, _)| name.as_str())
    }

    /// What the asker hears.
    pub fn answer(&self, course: &Course, came: Option<Result<Reply, Failure>>) -> Result<Reply, Failure> {
        match course.says {
            Some(says) => Err(says.failure()),
            None => came.unwrap_or_else(|| Err(passing("Incus does not answer"))),
        }
    }

    /// Notes that an instance was made; says whether one of that name was since `asked_at`, which then held the name.
    pub fn is_name_taken_since(&mut self, name: &str, asked_at: Duration, now: Duration) -> bool {
        let last = self.made_at.entry(name.to_owned()).or_default();
        let taken = *last > asked_at;
        if !taken {
            *last = now;
        }
        taken
    }

    /// Whether an instance of that name was made since then.
    pub fn was_made_since(&self, name: &str, asked_at: Duration) -> bool {
        self.made_at.get(name).is_some_and(|last| *last > asked_at)
    }

    /// Something happened to an instance beside all calls.
    pub fn set_status(&mut self, name: &str, status: Status) -> bool {
        self.instances.get_mut(name).map(|found| found.status = status).is_some()
    }

    /// An operator deletes it, by force.
    pub fn remove(&mut self, name: &str) -> bool {
        self.instances.remove(name).is_some()
    }

    /// An operator renames it; what runs in it goes on.
    pub fn rename(&mut self, name: &str, to: &str) -> bool {
        let Some(instance) = self.instances.remove(name) else { return false };
        self.instances.insert(to.to_owned(), instance);
        true
    }

    /// Another collector takes it over: it has the config as it was read, so that its change is the one that wins.
    pub fn take_over(&mut self, name: &str, owner: &str) -> Option<u64> {
        let config = &mut self.instances.get_mut(name)?.config;
        let term: u64 = config.get(TERM)?.parse().ok()?;
        config.insert(OWNER.to_owned(), owner.to_owned());
        config.insert(TERM.to_owned(), (term + 1).to_string());
        Some(term + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn incus(trouble: Trouble) -> Incus {
        Incus::new(Random::new(3), trouble)
    }

    #[test]
    fn an_instance_goes_from_its_making_to_its_end() {
        let mut incus = incus(Trouble::default());
        let config = BTreeMap::from([(TERM.to_owned(), "1".to_owned())]);
        let create = Ask::Create(config);
        assert_eq!(incus.perform("a", &create), (Ok(Reply::Done), Change::Made));
        assert!(matches!(incus.perform("a", &create), (Err(Failure { transient: false, .. }), Change::None)));
        assert_eq!(incus.perform("a", &Ask::Start).1, Change::Started);
        assert_eq!(incus.perform("a", &Ask::Delete).1, Change::None);
        assert_eq!(incus.take_over("a", "other"), Some(2));
        assert_eq!(incus.perform("a", &Ask::Stop).1, Change::Stopped);
        assert_eq!(incus.perform("a", &Ask::Delete).1, Change::Deleted);
        assert_eq!(incus.perform("a", &Ask::Look), (Ok(Reply::Found(None)), Change::None));
    }

    #[test]
    fn a_failure_in_passing_tells_nothing_of_the_effect() {
        let mut incus = incus(Trouble { passing: 1000, ..Trouble::default() });
        let courses: Vec<Course> = (0..50).map(|_| incus.plan(&Ask::Start, Duration::ZERO)).collect();
        assert!(courses.iter().all(|course| course.says == Some(Says::Busy)));
        assert!(courses.iter().any(|course| course.effect.is_some()));
        assert!(courses.iter().any(|course| course.effect.is_none()));
    }

    #[test]
    fn a_daemon_that_is_down_does_nothing() {
        let mut incus = incus(Trouble::default());
        incus.down_until = Duration::from_secs(1);
        let course = incus.plan(&Ask::Stop, Duration::ZERO);
        assert_eq!((course.effect, course.says), (None, Some(Says::Unreachable)));
        assert!(incus.answer(&course, None).is_err_and(|failure| failure.transient));
    }
}
