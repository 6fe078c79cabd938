//! What a seed draws before its run begins: the runtimes, how their guests behave, and what goes wrong when.
//!
//! Numbers are small, so that a run of some virtual minutes meets every deadline. Half of all seeds are kind to most parts
//! of the world: what goes wrong alone shows other faults than what goes wrong together.

use std::sync::Arc;
use std::time::Duration;

use pika_cloud_common::Command;
use pika_cloud_common::spec::{
    AgentPolicy, InstanceType, OutputCollectionMode, RestartPolicy, RetentionPolicy, RuntimeSpec, Watchdogs,
};

use super::guest::workload::{Act, Afterwards, Script};
use super::incus::Trouble;
use super::link::Nature;
use super::random::Random;

/// Stands in the environment of every workload, and nowhere else (Invariant 8).
pub const SECRET: &str = "geheim-7f3a";

/// Everything that a seed draws.
#[derive(Debug)]
pub struct Plan {
    /// The runtimes.
    pub runtimes: Vec<RuntimePlan>,
    /// What happens when, in order.
    pub faults: Vec<(Duration, Fault)>,
    /// From here on nothing goes wrong any more.
    pub quiet_at: Duration,
    /// How Incus fares until then.
    pub trouble: Trouble,
    /// Numbers of machines that are another's by the time that they are dialled, or change right behind that, of a thousand.
    pub moved: u32,
    /// How streams behave.
    pub nature: Nature,
    /// How long a commit takes at most.
    pub slow_disk: Duration,
    /// Wake-ups that Incus leaves out, of a thousand.
    pub lost_wakes: u32,
    /// The instance of somebody else.
    pub foreign: Foreign,
}

/// What there is in Incus that is not ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Foreign {
    /// Something with a name of its own.
    Beside,
    /// Something with the name that the first runtime wants.
    InTheWay,
}

/// One runtime.
#[derive(Debug)]
pub struct RuntimePlan {
    /// What is asked for.
    pub spec: Arc<RuntimeSpec>,
    /// What its workload does.
    pub script: Script,
    /// From the start of its instance to the agent; `None` where there never is one.
    pub boot: Option<Duration>,
    /// Its image has no agent at all.
    pub no_agent: bool,
    /// The host has no agent of its own for it.
    pub no_own: bool,
    /// Times that its guest does not take that, of a thousand.
    pub bad_puts: u32,
    /// Dials over vsock that the host cannot make, of a thousand.
    pub no_vsock: u32,
    /// Its files outlive a boot.
    pub keeps_files: bool,
    /// Sessions that keep no protocol, of a thousand.
    pub rude: u32,
    /// Its agent is of a later version.
    pub future: bool,
    /// How often what is acknowledged is given back, of a thousand.
    pub trims: u32,
}

/// Something that goes wrong, or that somebody does. The number is the runtime's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The collector is killed after so many more effects, and started again later.
    KillCollector(u32, Duration),
    /// The same after so many more calls of the file system.
    KillInWrite(u32, Duration),
    /// The power of the host is cut, and it boots later. Its wall clock may be off by so many seconds then.
    CrashHost(Duration, i64),
    /// The host sleeps.
    Suspend(Duration),
    /// The wall clock is set, by so many seconds.
    SetClock(i64),
    /// The next appends and syncs fail.
    BadDisk(u32, u32),
    /// So many bytes are left, for a time.
    FullDisk(usize, Duration),
    /// Incus answers, and as good as never does what it is asked for any more.
    Stubborn,
    /// Incus is down.
    IncusDown(Duration),
    /// The stream breaks; who learns of it.
    CutLink(usize, bool, bool),
    /// The guest stands still.
    Freeze(usize, Duration),
    /// Its supervisor is killed.
    KillSupervisor(usize),
    /// Its agent's sessions are killed.
    KillAgent(usize),
    /// The same, and the image's agent is no more.
    LoseAgent(usize),
    /// It boots again.
    Reboot(usize),
    /// It powers off.
    PowerOff(usize),
    /// Its state is remembered, and put back later.
    Snapshot(usize, Duration),
    /// Incus cannot tell any more.
    InstanceError(usize),
    /// An operator pauses it, for a time.
    Pause(usize, Duration),
    /// An operator stops it.
    OperatorStop(usize),
    /// An operator deletes it.
    OperatorDelete(usize),
    /// An operator renames it.
    OperatorRename(usize),
    /// Another collector takes it over.
    TakeOver(usize),
    /// A command.
    Command(usize, Command),
}

fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

impl Plan {
    /// What `seed` draws.
    pub fn draw(random: &mut Random) -> Self {
        let count = random.pick(&[1, 1, 1, 1, 2, 2, 3]);
        // Incus changes nothing any more, for longer than anybody's patience.
        let hopeless = random.chance(40);
        let runtimes: Vec<_> = (0..count).map(|at| RuntimePlan::draw(at, hopeless, random)).collect();
        let kind = random.chance(400);
        let quiet_at = secs(if hopeless { random.between(80, 110) } else { random.between(10, 90) });
        let mut faults = Vec::new();
        let how_many = if kind { random.between(0, 2) } else { random.between(0, 8) };
        for _ in 0..how_many {
            let latest = if random.chance(600) { quiet_at / 4 } else { quiet_at };
            let at = random.time(Duration::ZERO, latest);
            let fault = Fault::draw(count, random);
            faults.push((at, fault));
            if let Fault::TakeOver(runtime) = fault {
                // Whoever takes over is not alone: something else may be wanted of it at the same time.
                let (before, after) = (random.millis(0, 900), random.millis(0, 100));
                let at = if random.chance(300) { at.saturating_sub(before) } else { at + after };
                faults.push((at, Fault::Command(runtime, Command::Stop)));
            }
        }
        if hopeless {
            faults.push((random.time(Duration::ZERO, secs(10)), Fault::Stubborn));
            for _ in 0..random.between(0, 4) {
                let (at, runtime) = (random.time(secs(1), secs(15)), random.index(count));
                faults.push((at, Fault::Pause(runtime, random.millis(100, 6000))));
            }
        }
        faults.sort_by_key(|(at, _)| *at);
        let trouble = if hopeless || kind || random.chance(400) {
            Trouble::default()
        } else {
            Trouble {
                passing: random.pick(&[0, 50, 300]),
                lasting: random.pick(&[0, 0, 0, 100]),
                slow: random.pick(&[0, 50, 300]),
                dial: random.pick(&[0, 100, 500]),
                stubborn: 0,
            }
        };
        let delay = random.pick(&[1, 5, 40, 400]);
        Self {
            runtimes,
            faults,
            quiet_at,
            trouble,
            moved: random.pick(&[0, 0, 100, 500]),
            nature: Nature {
                delay: (Duration::from_micros(100), Duration::from_millis(delay)),
                capacity: random.pick(&[4096, 65_536, 1 << 20]),
                splits: random.chance(300),
            },
            slow_disk: Duration::from_millis(random.pick(&[1, 5, 50, 900])),
            lost_wakes: random.pick(&[0, 200, 1000]),
            foreign: if random.chance(15) { Foreign::InTheWay } else { Foreign::Beside },
        }
    }
}

impl RuntimePlan {
    /// Whether nobody may help an image that has no agent, before it was ever heard.
    pub fn is_helpless(&self) -> bool {
        self.no_own || self.spec.incus.agent == AgentPolicy::Baked
    }

    /// Whether no agent can be had from the beginning.
    pub fn is_agentless(&self) -> bool {
        let injects = self.spec.incus.agent == AgentPolicy::Inject;
        (injects && self.no_own) || (!injects && self.no_agent && self.is_helpless())
    }

    fn draw(at: usize, hopeless: bool, random: &mut Random) -> Self {
        let boot = random.millis(20, 900);
        Self {
            spec: Arc::new(spec(at, hopeless, random)),
            script: script(random),
            boot: (!random.chance(20)).then_some(boot),
            no_agent: random.chance(80),
            no_own: random.chance(60),
            bad_puts: if random.chance(100) { random.pick(&[300, 1000]) } else { 0 },
            no_vsock: random.pick(&[0, 0, 0, 300, 1000]),
            keeps_files: random.chance(500),
            rude: if random.chance(60) { random.pick(&[100, 500, 1000]) } else { 0 },
            future: random.chance(8),
            trims: random.pick(&[0, 100, 1000]),
        }
    }
}

fn spec(at: usize, hopeless: bool, random: &mut Random) -> RuntimeSpec {
    let mut spec = RuntimeSpec::default();
    spec.identity.runtime_id = format!("r{at}");
    spec.identity.instance_name = format!("i{at}");
    "ci".clone_into(&mut spec.incus.image_alias);
    spec.incus.instance_type = random.pick(&[InstanceType::Container, InstanceType::VirtualMachine]);
    spec.incus.agent = random.pick(&[
        AgentPolicy::Auto,
        AgentPolicy::Auto,
        AgentPolicy::Auto,
        AgentPolicy::Baked,
        AgentPolicy::Inject,
    ]);
    spec.entry_command = Some("make".to_owned());
    spec.bootstrap.env.insert("TOKEN".to_owned(), SECRET.to_owned());
    let maybe = |random: &mut Random, per_mille, from, to| {
        let drawn = random.between(from, to);
        random.chance(per_mille).then_some(drawn)
    };
    spec.watchdogs = Watchdogs {
        boot_secs: if random.chance(100) { 75 } else { random.between(4, 12) },
        ready_secs: maybe(random, 250, 2, 10),
        silence_secs: random.between(18, 30),
        progress_secs: maybe(random, 200, 3, 10),
        progress_cap_secs: None,
        run_secs: maybe(random, 700, 3, 25),
        stop_grace_secs: random.between(1, 3),
        collect_secs: random.between(2, 8),
    };
    if spec.watchdogs.progress_secs.is_some() {
        spec.watchdogs.progress_cap_secs = maybe(random, 500, 10, 20);
    }
    let policies = &mut spec.policies;
    policies.restart_policy =
        random.pick(&[RestartPolicy::Never, RestartPolicy::Never, RestartPolicy::OnFailure, RestartPolicy::Always]);
    policies.max_restarts = random.pick(&[0, 1, 2, 3]);
    policies.restart_backoff_secs = random.between(1, 2);
    policies.restart_backoff_cap_secs = random.between(2, 4);
    policies.retention_policy = random.pick(&[
        RetentionPolicy::DestroyOnCompletion,
        RetentionPolicy::DestroyOnCompletion,
        RetentionPolicy::KeepUntilStopped,
        RetentionPolicy::DebugKeep,
    ]);
    if hopeless && random.chance(700) {
        // What stays and begins anew is stopped first.
        policies.retention_policy = RetentionPolicy::KeepUntilStopped;
        (policies.restart_policy, policies.max_restarts) = (RestartPolicy::Always, 3);
    }
    policies.debug_keep_secs = random.between(2, 15);
    policies.output_collection.mode = random.pick(&[
        OutputCollectionMode::Always,
        OutputCollectionMode::Always,
        OutputCollectionMode::FailureOnly,
        OutputCollectionMode::None,
    ]);
    policies.output_collection.include_logs = !random.chance(200);
    spec.limits.log_bytes = random.pick(&[1 << 20, 1 << 20, 500]);
    spec.limits.event_bytes = random.pick(&[1 << 20, 1 << 20, 64 * 1024]);
    spec.limits.artifact_files = random.pick(&[100, 100, 1]);
    spec
}

fn script(random: &mut Random) -> Script {
    let mut acts = Vec::new();
    let pace = random.pick(&[20, 300, 2000]);
    for _ in 0..random.between(0, 8) {
        let act = match random.below(20) {
            0..=3 => Act::Ready,
            18 if random.chance(150) => Act::Flood(u32::try_from(random.between(50, 400)).unwrap_or(50)),
            4..=8 | 18 => Act::Progress,
            9..=13 => Act::Output(random.pick(&[20, 300, 3000])),
            14 => Act::BadLine,
            15..=17 => Act::Artifact(random.index(3000)),
            _ if random.chance(60) => Act::Output(90_000),
            _ => Act::Artifact(random.pick(&[0, 10, 70_000])),
        };
        acts.push((random.millis(0, pace), act));
    }
    let last = match random.below(20) {
        0..=9 => Some(Act::Exit(0)),
        10..=12 => Some(Act::Exit(5)),
        13 => Some(Act::Signalled(9)),
        14 => Some(Act::LastWord(true)),
        _ => None,
    };
    acts.extend(last.map(|act| (random.millis(0, pace), act)));
    if last == Some(Act::LastWord(true)) {
        acts.push((random.millis(0, pace), Act::Exit(random.pick(&[0, 5]))));
    }
    let afterwards =
        random.pick(&[Afterwards::Stay, Afterwards::Stay, Afterwards::PowerOff, Afterwards::PowerOffAtOnce]);
    Script { acts, obeys: random.chance(700), afterwards }
}

impl Fault {
    fn draw(runtimes: usize, random: &mut Random) -> Self {
        let at = random.index(runtimes);
        let away = random.millis(0, 9000);
        let few = |random: &mut Random, most| u32::try_from(random.below(most)).unwrap_or(0);
        match random.below(40) {
            0..=7 => Self::KillCollector(few(random, 12), away),
            8..=11 => Self::KillInWrite(few(random, 10), away),
            12..=14 => Self::CrashHost(away, random.pick(&[0, 0, 0, 3600, -3600])),
            15 => Self::Suspend(random.millis(100, 30_000)),
            16 => Self::SetClock(random.pick(&[-7200, -30, 30, 7200])),
            17 => Self::BadDisk(few(random, 3), few(random, 3)),
            18 => Self::FullDisk(random.pick(&[0, 1000, 20_000]), away),
            19..=20 => Self::IncusDown(away),
            21..=24 => Self::CutLink(at, random.chance(700), random.chance(700)),
            25 if random.chance(600) => Self::Pause(at, random.millis(10, 8000)),
            25 => Self::Freeze(at, random.pick(&[secs(3), secs(18), secs(60)])),
            26 => Self::KillSupervisor(at),
            27 if random.chance(500) => Self::KillAgent(at),
            27 => Self::LoseAgent(at),
            28 => Self::Reboot(at),
            29 => Self::PowerOff(at),
            30 => Self::Snapshot(at, random.millis(0, 4000)),
            31 => Self::InstanceError(at),
            32 => Self::OperatorStop(at),
            33 => Self::OperatorDelete(at),
            34 => Self::OperatorRename(at),
            35 => Self::TakeOver(at),
            _ => Self::Command(at, random.pick(&[Command::Cancel, Command::Stop, Command::Destroy])),
        }
    }
}
