//! Looking, and carrying a plan out. What may be done was decided by the plan; what is still true is read again here.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use pika_cloud_common::verdict::{DeathCause, Outcome as End};
use pika_cloud_common::{Command, RuntimeSpec, State};
use tokio::sync::Semaphore;

use super::bakes::{LocalBake, SeenBuilder, plan_bakes};
use super::plan::{InstanceName, LocalRuntime, Seen, SeenVolume, Standing, VolumeName, plan};
use super::{Outcome, ReconcileOptions, ReconcileReport, Step};
use crate::bake::record::{self, Held, Taken};
use crate::bake::tidy::{Tidied, end_builder, tidy};
use crate::clock::Now;
use crate::cloud::Cloud;
use crate::destroy::destroy_named;
use crate::error::Error;
use crate::incus::{
    BuilderLabels, Holder, InstanceState, InstanceView, Labels, VolumeLabels, backoff, is_marked, jitter,
};
use crate::journal::{HostRecord, View};
use crate::machine::Destroyed;
use crate::runtime::Claim;
use crate::state_dir::{RuntimeFolder, RuntimeLock};

/// Instances that are ended at once. Stopping one takes Incus about a second, mostly of waiting.
const ENDED_AT_ONCE: usize = 16;

/// How long Incus may take to end what it still does for a bake whose builder is gone.
const TIDIED_WITHIN: Duration = Duration::from_secs(300);

/// How often ending an instance is tried where Incus is busy.
const TRIES: u32 = 6;

impl Cloud {
    /// Brings what Incus holds in line with what this state dir knows: adopts what a dead collector left and drives it to its
    /// end, ends what its policy says, reports the rest. Says what it did, or in a dry run what it would do.
    ///
    /// Whatever is adopted is driven until its end, which for a runtime without `watchdogs.run_secs` may never come, and only then is
    /// there a report: a service spawns it. Dropping the future detaches. What dead bakes left is tidied meanwhile.
    ///
    /// # Errors
    /// Where Incus cannot be listed, or the state dir not be read. What fails of single steps is in the report.
    pub async fn reconcile(&self, options: &ReconcileOptions) -> Result<ReconcileReport, Error> {
        let mut report = ReconcileReport::default();
        let seen = self.look().await?;
        let known = |id: &String| seen.knows(id);
        report.unknown = options.take_over.iter().filter(|id| !known(id)).cloned().collect();
        let steps = seen.plan(self.state().owner(), options);
        if options.dry_run {
            let outcome = |step: &Step| if is_said(step) { Outcome::Done } else { Outcome::Planned };
            report.done = steps.into_iter().map(|step| (outcome(&step), step)).map(|(o, s)| (s, o)).collect();
            return Ok(report);
        }
        let takes = |step: &Step| matches!(step, Step::TakeOver { .. } | Step::TakeOverVolume { .. });
        let (first, mut then): (Vec<Step>, Vec<Step>) = steps.into_iter().partition(takes);
        if !first.is_empty() {
            self.take_over_all(first, &mut report).await;
            // What was taken is ours now, and is treated as such; what could not be taken is not tried again.
            let tried: BTreeSet<String> = report.done.iter().map(|(step, _)| step.name()).collect();
            then = self.look().await?.plan(self.state().owner(), options);
            then.retain(|step| is_end(step) || (!takes(step) && !tried.contains(&step.name())));
        }
        let ending = Arc::new(Semaphore::new(ENDED_AT_ONCE));
        let outcomes = join_all(then.iter().map(|step| self.act(step, &ending))).await;
        report.done.extend(then.into_iter().zip(outcomes));
        Ok(report)
    }

    /// One after the other: an instance comes before its volumes, which stay with whoever holds it.
    async fn take_over_all(&self, steps: Vec<Step>, report: &mut ReconcileReport) {
        let mut lost = BTreeSet::new();
        for step in steps {
            let outcome = match &step {
                Step::TakeOver { instance, runtime_id, from } => {
                    let outcome = self.take_over_instance(instance, from).await;
                    if outcome != Outcome::Done {
                        lost.insert(runtime_id.clone());
                    }
                    outcome
                }
                Step::TakeOverVolume { runtime_id, .. } if lost.contains(runtime_id) => {
                    Outcome::LeftAlone("its instance was not taken over".to_owned())
                }
                Step::TakeOverVolume { volume, from, .. } => {
                    let VolumeName { project, pool, name } = volume;
                    let owner = self.state().owner();
                    outcome(self.incus().take_over_volume(project, pool, name, owner, from).await)
                }
                _ => Outcome::Done,
            };
            report.done.push((step, outcome));
        }
    }

    async fn act(&self, step: &Step, ending: &Semaphore) -> Outcome {
        match step {
            Step::Adopt { runtime_id } => match self.adopt(runtime_id).await {
                Ok(true) => Outcome::Done,
                Ok(false) => driven(),
                // It was driven up to there.
                Err(error @ Error::SpecNeeded { .. }) => Outcome::LeftAlone(error.to_string()),
                Err(error) => Outcome::Failed(error.to_string()),
            },
            Step::Cancel { runtime_id, .. } => outcome(self.destroy(runtime_id).await),
            Step::End { instance, runtime_id, term, .. } => {
                // Never closed.
                let _turn = ending.acquire().await;
                self.end_instance(instance, runtime_id, *term).await
            }
            Step::Tidy { bake, .. } => self.tidy_bake(bake).await,
            Step::EndBuilder { instance, bake } => {
                let InstanceName { project, name } = instance;
                outcome(end_builder(self.incus(), project, name, bake, self.state().owner()).await)
            }
            Step::DeleteVolume { volume, runtime_id } => self.delete_orphan(volume, runtime_id).await,
            Step::TakeOver { .. } | Step::TakeOverVolume { .. } | Step::Refuse { .. } | Step::Report { .. } => {
                Outcome::Done
            }
        }
    }

    /// Takes the runtime's lock, whether it has a folder or not, so that no `run` begins meanwhile.
    fn lock_out(&self, runtime_id: &str) -> Result<(RuntimeFolder, RuntimeLock), Outcome> {
        let folder = self.state().runtime(runtime_id);
        let locked = folder.make_for_lock().and_then(|()| folder.lock());
        match locked {
            Ok(Ok(lock)) => Ok((folder, lock)),
            Ok(Err(_)) => Err(driven()),
            Err(error) => Err(Outcome::Failed(error.to_string())),
        }
    }

    /// Invariant 4: ends an instance, if what was planned still holds.
    async fn end_instance(&self, instance: &InstanceName, runtime_id: &str, term: u64) -> Outcome {
        let (folder, _lock) = match self.lock_out(runtime_id) {
            Ok(locked) => locked,
            Err(outcome) => return outcome,
        };
        if folder.exists() {
            match crate::cloud::read_view(&folder) {
                Err(error) => return Outcome::Failed(error.to_string()),
                // A `run` began, and was ended, between plan and act: the next look tells more.
                Ok(view) if begun_with(&folder, &view, instance) => {
                    return Outcome::LeftAlone("its runtime was begun anew".to_owned());
                }
                Ok(_) => {}
            }
        }
        let ours = Claim { runtime_id: runtime_id.to_owned(), owner: self.state().owner().to_owned(), term };
        let mut attempt = 0;
        loop {
            match destroy_named(self.incus(), &instance.project, &instance.name, &ours).await {
                Ok(Some(Destroyed::Gone) | None) => return Outcome::Done,
                Ok(Some(Destroyed::TakenOver { owner, .. })) => {
                    return Outcome::LeftAlone(format!("the collector {owner} took it over"));
                }
                Err(failure) if failure.transient && attempt + 1 < TRIES => {
                    tokio::time::sleep(backoff(attempt, jitter())).await;
                    attempt += 1;
                }
                Err(failure) => return Outcome::Failed(failure.message),
            }
        }
    }

    /// Removes what a bake left, unless somebody is at it by now.
    async fn tidy_bake(&self, bake: &str) -> Outcome {
        let held = match Held::take(self.state(), bake) {
            Ok(Taken::Held(held)) => held,
            Ok(Taken::Gone) => return Outcome::Done,
            Ok(Taken::Lives) => return Outcome::LeftAlone("somebody is at it by now".to_owned()),
            Ok(Taken::Unreadable(path)) => {
                return Outcome::Failed(format!("{} cannot be read: remove its folder", path.display()));
            }
            Err(error) => return Outcome::Failed(error.to_string()),
        };
        match tidy(self.incus(), self.state().owner(), held, TIDIED_WITHIN).await {
            Ok(Tidied { unfinished: Some(what), .. }) => Outcome::Failed(format!("{what}: try again later")),
            Ok(Tidied { kept, .. }) if !kept.is_empty() => Outcome::LeftAlone(kept.join("; ")),
            Ok(_) => Outcome::Done,
            Err(error) => Outcome::Failed(error.to_string()),
        }
    }

    async fn delete_orphan(&self, volume: &VolumeName, runtime_id: &str) -> Outcome {
        let (folder, _lock) = match self.lock_out(runtime_id) {
            Ok(locked) => locked,
            Err(outcome) => return outcome,
        };
        if folder.exists() {
            return Outcome::LeftAlone("a runtime of that name was begun".to_owned());
        }
        let VolumeName { project, pool, name } = volume;
        let found = match self.incus().volume(project, pool, name).await {
            Ok(Some(found)) => found,
            Ok(None) => return Outcome::Done,
            Err(error) => return Outcome::Failed(error.to_string()),
        };
        let ours = VolumeLabels::read(&found.config)
            .is_some_and(|labels| labels.owner == self.state().owner() && labels.runtime_id == runtime_id);
        if !ours || !found.used_by.is_empty() {
            return Outcome::LeftAlone("it is not ours, or is used, by now".to_owned());
        }
        outcome(self.incus().delete_volume(project, pool, name).await)
    }

    async fn take_over_instance(&self, instance: &InstanceName, from: &Holder) -> Outcome {
        let InstanceName { project, name } = instance;
        if from.owner != self.state().owner() {
            let taken = self.incus().take_over(project, name, self.state().owner(), from).await;
            if let Err(error) = taken {
                return Outcome::Failed(error.to_string());
            }
        }
        match self.incus().instance(project, name).await {
            Ok(Some(view)) => outcome(self.begin_taken_over(&view).await),
            Ok(None) => Outcome::Failed("it is gone".to_owned()),
            Err(error) => Outcome::Failed(error.to_string()),
        }
    }

    /// Gives an instance that was taken over its place in this state dir: folder, spec from its label, and a journal that
    /// stands at its incarnation. Does nothing where that is there already.
    async fn begin_taken_over(&self, instance: &InstanceView) -> Result<(), Error> {
        let lost = |now: &str| crate::incus::Error::TakeOverLost {
            what: format!("instance `{}` in project `{}`", instance.name, instance.project),
            now: now.to_owned(),
        };
        let labels = Labels::read(&instance.config).filter(|labels| labels.owner == self.state().owner());
        let Some(labels) = labels else { return Err(lost("somebody else holds it").into()) };
        if labels.spec.is_none() && labels.is_expired(self.clock().now().wall) {
            // The next plan ends it.
            return Ok(());
        }
        let Some(spec) = labels.read_spec(&instance.project) else {
            return Err(lost("the spec in its labels cannot be read").into());
        };
        let folder = self.state().runtime(&labels.runtime_id);
        folder.make()?;
        let Ok(lock) = folder.lock()? else { return Err(lost("its runtime is driven here").into()) };
        let mut journal = self.open_journal(&folder, lock, &spec)?;
        if self.standing(&spec, journal.view()).is_of_another_life(&labels, self.state().owner()) {
            return Err(lost("the journal of its runtime here is of an earlier one").into());
        }
        let is_known = journal.view().incarnation >= labels.incarnation;
        if is_known && journal.view().taken_over.is_none() {
            return Ok(());
        }
        if !is_known {
            // Before the journal begins: what it says is always of the spec beside it, or over. Of a spec without a journal, and
            // of an instance with a higher term than the journal's, the next plan goes on.
            folder.write_spec(&spec)?;
            crate::state_dir::sync_folder(folder.path())?;
        }
        let (now, records) = (self.clock().now(), journal.records());
        records.boot(self.clock().boot_id(), now);
        if records.view().incarnation < labels.incarnation {
            records.begin_at(labels.incarnation, labels.spec_hash.clone(), 0, now);
        }
        // Under a higher term, it is taken back where it had been taken from here.
        records.host(HostRecord::Term { term: labels.term }, now);
        if is_known {
            return journal.commit().await;
        }
        if instance.was_started() {
            // What runs in it is of this incarnation: it is neither booted anew, nor started again where it stops.
            records.host(HostRecord::InstanceStarting {}, now);
            let message = "it had been started when it was taken over".to_owned();
            records.host(HostRecord::State { state: State::Booted, message }, now);
        }
        // Invariant 9: its workload may have been started, and what the guest knew of that went with its stop.
        if instance.state() == InstanceState::Stopped && instance.was_started() {
            let ended = HostRecord::Ended {
                outcome: End::GuestDied { cause: DeathCause::InstanceStopped },
                message: "the instance had stopped when it was taken over".to_owned(),
                error: None,
                instance_status: Some(instance.status.clone()),
            };
            records.host(ended, now);
        }
        journal.commit().await
    }

    /// What there is: Incus first, then the state dir. The order matters, see the module's docs.
    async fn look(&self) -> Result<Look, Error> {
        let instances = self.listed_instances().await?;
        let volumes = self.incus().volumes().await?;
        let mut local = Vec::new();
        for name in self.state().runtimes()? {
            local.extend(self.local(name));
        }
        let local_bake = |bake: String| {
            let (record, lives) = record::look(self.state(), &bake);
            LocalBake { bake, to: record.map(|record| record.to), lives }
        };
        let bakes = record::list(self.state()).into_iter().map(local_bake).collect();
        let (builders, instances): (Vec<_>, Vec<_>) =
            instances.into_iter().partition(|view| BuilderLabels::read(&view.name, &view.config).is_some());
        let builder = |view: InstanceView| {
            let labels = BuilderLabels::read(&view.name, &view.config)?;
            Some(SeenBuilder { labels, instance: InstanceName { project: view.project, name: view.name } })
        };
        let seen = |view: InstanceView| {
            is_marked(&view.config).then(|| Seen {
                labels: Labels::read(&view.config),
                instance: InstanceName { project: view.project, name: view.name },
            })
        };
        let seen_volume = |view: crate::incus::VolumeView| {
            Some(SeenVolume {
                labels: VolumeLabels::read(&view.config)?,
                in_use: !view.used_by.is_empty(),
                volume: VolumeName { project: view.project, pool: view.pool, name: view.name },
            })
        };
        Ok(Look {
            local,
            bakes,
            builders: builders.into_iter().filter_map(builder).collect(),
            instances: instances.into_iter().filter_map(seen).collect(),
            volumes: volumes.into_iter().filter_map(seen_volume).collect(),
            now: self.clock().now().wall,
        })
    }

    /// Every instance that Incus shows; where it does not let this client ask for all projects, those of the projects that
    /// the state dir's runtimes name.
    async fn listed_instances(&self) -> Result<Vec<InstanceView>, Error> {
        match self.incus().all_instances().await {
            Err(crate::incus::Error::Refused { code: 403, .. }) => {}
            answer => return Ok(answer?),
        }
        let specs = self.state().runtimes()?.into_iter().filter_map(|name| self.state().runtime(&name).read_spec());
        let projects: BTreeSet<String> = specs.map(|spec| spec.incus.project).collect();
        let mut all = Vec::new();
        for project in projects {
            match self.incus().instances(&project).await {
                Ok(instances) => all.extend(instances),
                // A project that is gone holds nothing.
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(all)
    }

    /// How a runtime of the state dir stands; `None` where its folder went meanwhile.
    fn local(&self, runtime_id: String) -> Option<LocalRuntime> {
        let folder = self.state().runtime(&runtime_id);
        let Some(spec) = folder.read_spec() else {
            let instance = InstanceName { project: String::new(), name: String::new() };
            let problem = format!("{}: its spec.json cannot be read", folder.path().display());
            let standing = Standing::Unreadable(problem);
            return folder.exists().then_some(LocalRuntime { runtime_id, instance, incarnation: 0, term: 0, standing });
        };
        let elsewise =
            |standing| LocalRuntime { standing, incarnation: 0, term: 0, ..self.standing(&spec, &View::default()) };
        // The lock first: a journal that was read before could be another's by then.
        let local = match folder.lock() {
            Err(error) => elsewise(Standing::Unreadable(error.to_string())),
            Ok(Err(_)) => elsewise(Standing::Driven),
            Ok(Ok(_lock)) => match crate::cloud::read_view(&folder) {
                Err(error) => elsewise(Standing::Unreadable(error.to_string())),
                Ok(view) => self.standing(&spec, &view),
            },
        };
        Some(LocalRuntime { runtime_id, ..local })
    }

    /// How a runtime stands whose journal was read.
    fn standing(&self, spec: &RuntimeSpec, view: &View) -> LocalRuntime {
        let (without_secrets, clock) = (spec.bootstrap.env.is_empty(), self.clock());
        LocalRuntime {
            runtime_id: spec.identity.runtime_id.clone(),
            instance: InstanceName { project: spec.incus.project.clone(), name: spec.identity.instance_name.clone() },
            incarnation: view.incarnation,
            // Below that of whoever took it over, so that theirs is a later one.
            term: view.taken_over.as_ref().map_or(view.term, |taken| taken.term.saturating_sub(1)),
            standing: standing(view, without_secrets, clock.boot_id(), clock.now()),
        }
    }
}

/// What was found at one moment.
struct Look {
    local: Vec<LocalRuntime>,
    instances: Vec<Seen>,
    bakes: Vec<LocalBake>,
    builders: Vec<SeenBuilder>,
    volumes: Vec<SeenVolume>,
    now: Duration,
}

impl Look {
    fn plan(&self, owner: &str, options: &ReconcileOptions) -> Vec<Step> {
        let mut steps = plan(&self.local, &self.instances, &self.volumes, owner, self.now, options);
        steps.extend(plan_bakes(&self.bakes, &self.builders, owner, self.now));
        steps
    }

    fn knows(&self, runtime_id: &str) -> bool {
        let instance = |seen: &Seen| seen.labels.as_ref().is_some_and(|labels| labels.runtime_id == runtime_id);
        self.instances.iter().any(instance) || self.volumes.iter().any(|seen| seen.labels.runtime_id == runtime_id)
    }
}

fn standing(view: &View, without_secrets: bool, boot_id: &str, now: Now) -> Standing {
    if view.incarnation == 0 {
        return Standing::NotBegun;
    }
    if let Some(kept) = view.kept.as_ref().filter(|_| view.finished.is_none() && view.taken_over.is_none()) {
        let is_due = kept.for_secs.is_some_and(|secs| view.ago_in(&kept.at, boot_id, now) >= Duration::from_secs(secs));
        // What is to go goes through its own driver, which also writes down that it is gone.
        let goes = is_due || view.command == Some(Command::Destroy);
        return if goes { Standing::Unfinished { needs_spec: false } } else { Standing::Kept };
    }
    if view.is_settled() {
        return Standing::Finished { destroyed: view.finished.as_ref().is_some_and(|finished| finished.destroyed) };
    }
    // What was cancelled starts nothing any more.
    let is_to_start = (view.accepted_at.is_none() && view.ended.is_none()) || view.finished.is_some();
    Standing::Unfinished { needs_spec: is_to_start && view.command.is_none() && !without_secrets }
}

/// Whether a runtime has more to do, with that very instance.
fn begun_with(folder: &RuntimeFolder, view: &View, instance: &InstanceName) -> bool {
    let names =
        |spec: RuntimeSpec| spec.incus.project == instance.project && spec.identity.instance_name == instance.name;
    view.incarnation > 0 && !view.is_settled() && folder.read_spec().is_some_and(names)
}

fn is_said(step: &Step) -> bool {
    matches!(step, Step::Report { .. } | Step::Refuse { .. })
}

fn is_end(step: &Step) -> bool {
    matches!(step, Step::End { .. })
}

fn driven() -> Outcome {
    Outcome::LeftAlone("a collector drives it".to_owned())
}

fn outcome<T, E: std::fmt::Display>(result: Result<T, E>) -> Outcome {
    match result {
        Ok(_) => Outcome::Done,
        Err(error) => Outcome::Failed(error.to_string()),
    }
}

#[cfg(test)]
mod tests;
