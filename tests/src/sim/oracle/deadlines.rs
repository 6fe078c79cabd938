//! Invariant 3: what is due when, reckoned by the world's own time.

use std::time::Duration;

use pika_cloud_common::spec::RuntimeSpec;
use pika_cloud_common::verdict::{Outcome, Watchdog};
use pika_host_collector::journal::{Moment, View};
use pika_host_collector::machine::Phase;

use super::Violation;

/// What the design allows beyond a deadline.
const LATE: Duration = Duration::from_secs(1);
/// What the guest's own deadline is given before the host's backstop, beside the grace.
const RUN_BACKSTOP: Duration = Duration::from_secs(5);
/// What a deadline that passed while no collector ran may take from its start: what the guest said meanwhile comes first.
const CATCH_UP: Duration = Duration::from_secs(5);
/// For the guest's last word, beyond the grace.
const STOP_MARGIN: Duration = Duration::from_secs(2);
/// The least time for making what was collected durable.
const MIN_FINISH: Duration = Duration::from_secs(5);

/// Something that a deadline counts from, and when it was first seen.
#[derive(Clone, Copy, Debug, Default)]
struct Since {
    moment: Option<Moment>,
    /// So long before `at` it was.
    ago: Duration,
    at: Duration,
    /// By the world's time, which a sleep of the host does not stop.
    world: Duration,
}

impl Since {
    fn note(&mut self, moment: Option<Moment>, now: Reading) {
        if moment != self.moment {
            *self = Self { moment, ago: Duration::ZERO, at: now.awake, world: now.world };
        }
    }

    fn is_set(&self) -> bool {
        self.moment.is_some()
    }

    /// A later boot of the host reckons by wall time, which went on while the host slept.
    fn taken_up(&mut self, boot: u32, now: Reading) {
        if self.moment.is_some_and(|moment| moment.boot != boot) {
            (self.at, self.ago) = (now.awake, now.world.saturating_sub(self.world));
        }
    }

    fn is_due(&self, after: Duration) -> Duration {
        (self.at + after).saturating_sub(self.ago)
    }
}

/// The world's time, and how much of it the host was awake.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::sim) struct Reading {
    /// Without what the host slept.
    pub awake: Duration,
    /// All of it.
    pub world: Duration,
}

/// What one runtime's deadlines count from.
#[derive(Debug, Default)]
pub(in crate::sim) struct Deadlines {
    starting: Since,
    booted: Since,
    start_sent: Since,
    progress: Since,
    incarnation: u32,
    /// Starts that were made before it was created once more.
    remade: Option<Moment>,
    /// The first start of this incarnation: a later one may be lost with a crash.
    first_start: Option<Duration>,
    /// The host's wall clock told a deadline's time, and was set.
    is_unsure: bool,
    /// When bytes last came.
    pub heard: Duration,
    /// When the collector took it up.
    opened: Duration,
    /// What is durable is heard that much later, at most.
    slow_disk: Duration,
    /// The phase, and since when.
    pub phase: Option<(Phase, Duration)>,
}

impl Deadlines {
    /// None yet; `slow_disk` is how much later than it came something durable may be heard.
    pub(in crate::sim) fn new(slow_disk: Duration) -> Self {
        Self { slow_disk, ..Self::default() }
    }

    /// After a boot of the host whose wall clock is another, nobody knows how much time has passed.
    pub(in crate::sim) fn forget(&mut self, now: Reading) {
        self.is_unsure = true;
        for since in [&mut self.starting, &mut self.booted, &mut self.start_sent, &mut self.progress] {
            (since.at, since.ago) = (now.awake, Duration::ZERO);
        }
    }

    /// A collector takes the runtime up, in this boot of the host.
    pub(in crate::sim) fn taken_up(&mut self, boot: u32, phase: Phase, now: Reading) {
        (self.opened, self.heard, self.phase) = (now.awake, now.awake, Some((phase, now.awake)));
        if self.is_unsure {
            return;
        }
        for since in [&mut self.starting, &mut self.booted, &mut self.start_sent, &mut self.progress] {
            since.taken_up(boot, now);
        }
    }

    /// Looks at what is known, and at what should have happened by now.
    pub(in crate::sim) fn check(&mut self, spec: &RuntimeSpec, view: &View, now: Reading) -> Result<(), Violation> {
        if view.incarnation != self.incarnation {
            self.incarnation = view.incarnation;
            for since in [&mut self.starting, &mut self.booted, &mut self.start_sent, &mut self.progress] {
                since.moment = None;
            }
            (self.first_start, self.is_unsure) = (None, false);
        }
        if matches!(self.phase, Some((Phase::Creating, _))) {
            // It is made again: what counts is its next start.
            self.remade = view.starting_at;
        }
        self.starting.note(view.starting_at.filter(|at| self.remade != Some(*at)), now);
        // What was written down right before its writer died is seen now for the first time, and is older than that.
        let of_the_dead = now.awake == self.opened && self.starting.is_set() && self.starting.at == self.opened;
        self.is_unsure |= of_the_dead;
        self.first_start = self.first_start.or(self.starting.moment.map(|_| now.world));
        self.booted.note(view.booted_at, now);
        self.start_sent.note(view.start_sent.as_ref().map(|sent| sent.at), now);
        self.progress.note(view.progress_at, now);
        self.check_phase(spec, now)?;
        let watches = self.phase.is_some_and(|(phase, _)| {
            matches!(phase, Phase::Looking | Phase::Creating | Phase::Starting | Phase::Dialing | Phase::Live)
        });
        if view.ended.is_some() || !watches {
            return Ok(());
        }
        let watchdogs = &spec.watchdogs;
        let secs = Duration::from_secs;
        if self.starting.is_set() && !self.booted.is_set() {
            self.due("boot", self.starting.is_due(secs(watchdogs.boot_secs)), now)?;
        }
        if let Some(ready) = watchdogs.ready_secs.filter(|_| self.booted.is_set() && !view.is_ready) {
            self.due("ready", self.booted.is_due(secs(ready)), now)?;
        }
        if self.start_sent.is_set() {
            if let Some(run) = watchdogs.run_secs {
                let budget = secs(run + watchdogs.stop_grace_secs) + RUN_BACKSTOP;
                self.due("run", self.start_sent.is_due(budget), now)?;
            }
            if let Some(progress) = self.progress_due(spec) {
                self.due("progress", progress, now)?;
            }
        }
        if self.booted.is_set() {
            self.due("silence", self.heard.max(self.opened) + secs(watchdogs.silence_secs), now)?;
        }
        Ok(())
    }

    fn progress_due(&self, spec: &RuntimeSpec) -> Option<Duration> {
        let progress = Duration::from_secs(spec.watchdogs.progress_secs?);
        let asked = self.start_sent.is_due(progress);
        let due = if self.progress.is_set() { self.progress.is_due(progress).max(asked) } else { asked };
        let cap = spec.watchdogs.progress_cap_secs.map(|cap| self.start_sent.is_due(Duration::from_secs(cap)));
        Some(cap.map_or(due, |cap| cap.min(due)))
    }

    /// Whether something that was due has not come.
    fn due(&self, what: &str, due: Duration, now: Reading) -> Result<(), Violation> {
        let passed_before = due <= self.opened || self.is_unsure;
        let latest = if passed_before { due.max(self.opened + CATCH_UP) } else { due };
        if now.awake > latest + LATE + self.slow_disk {
            let text = format!("{what} was due at {due:?} (taken up at {:?}), and it is {:?}", self.opened, now.awake);
            return Err(Violation::of(3, text));
        }
        Ok(())
    }

    /// Phases that end by a deadline of their own.
    fn check_phase(&self, spec: &RuntimeSpec, now: Reading) -> Result<(), Violation> {
        let Some((phase, since)) = self.phase else { return Ok(()) };
        let secs = Duration::from_secs;
        let budget = match phase {
            Phase::Terminating => secs(spec.watchdogs.stop_grace_secs) + STOP_MARGIN,
            Phase::Collecting => secs(spec.watchdogs.collect_secs) + MIN_FINISH,
            Phase::Resting => secs(spec.policies.restart_backoff_cap_secs.max(spec.policies.restart_backoff_secs)),
            _ => return Ok(()),
        };
        if now.awake > since + budget + LATE + self.slow_disk {
            return Err(Violation::of(3, format!("{phase:?} since {since:?}, and it is {:?}", now.awake)));
        }
        Ok(())
    }

    /// Whether a deadline that is said to have passed has.
    pub(in crate::sim) fn check_fired(
        &self,
        spec: &RuntimeSpec,
        outcome: &Outcome,
        now: Reading,
    ) -> Result<(), Violation> {
        let Outcome::TimedOut { watchdog } = outcome else { return Ok(()) };
        let watchdogs = &spec.watchdogs;
        let secs = Duration::from_secs;
        let (since, least) = match watchdog {
            Watchdog::Boot => (self.first_start.unwrap_or_default(), secs(watchdogs.boot_secs)),
            Watchdog::Ready => (self.booted.world, secs(watchdogs.ready_secs.unwrap_or(0))),
            // The guest's own, or the host's: at least so long after the workload was asked for.
            Watchdog::Run => (self.start_sent.world, secs(watchdogs.run_secs.unwrap_or(0))),
            Watchdog::Progress => {
                let cap = watchdogs.progress_cap_secs.unwrap_or(u64::MAX).min(watchdogs.progress_secs.unwrap_or(0));
                (self.start_sent.world, secs(cap))
            }
            Watchdog::Silence | Watchdog::Collect => return Ok(()),
        };
        // A guest's clock and the host's begin to count within a moment of each other.
        if now.world + Duration::from_millis(5) < since + least {
            let text = format!("{watchdog:?} fired at {:?}, {least:?} after {since:?}", now.world);
            return Err(Violation::of(3, text));
        }
        Ok(())
    }
}
