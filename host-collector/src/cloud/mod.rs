//! The public surface: a few calls that take a spec or a runtime's name.

mod logs;
mod look;
mod registry;
mod take;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pika_cloud_common::{Command, RuntimeSpec, Verdict};
use tokio::sync::watch;

use crate::agent_binary::AgentSource;
use crate::clock::HostClock;
use crate::driver::{Until, find, is_of};
use crate::error::Error;
use crate::incus::{Client, LifecycleEvents, Wakes};
use crate::journal::{Committer, Follower, View};
use crate::state_dir::{RuntimeFolder, StateDir};
pub use logs::{LogFollower, LogReader};
use look::Look;
use registry::Registry;
pub(crate) use take::read_view;
use take::{Driven, Taken};

/// How often it is tried to take over a runtime whose collector may have died.
const TAKE_OVER: Duration = Duration::from_millis(200);

/// Where Incus, the state dir and the host's own agent are. What is left to `default()` is where a package puts it.
#[derive(Clone, Debug)]
pub struct Config {
    /// Incus's UNIX socket.
    pub incus_socket: PathBuf,
    /// Where journals and outputs are kept. Two machines never share one.
    pub state_dir: PathBuf,
    /// The static `pika-guest` that is put into guests without one. `None`: where `PIKA_GUEST_AGENT` says, else beside the
    /// running executable. It need not be there before it is needed.
    pub agent: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self { incus_socket: "/var/lib/incus/unix.socket".into(), state_dir: "/var/lib/pika-cloud".into(), agent: None }
    }
}

/// A collector: drives runtimes of one state dir on one Incus.
///
/// Cheap to clone. Every call may be made from several tasks at once; one runtime is driven by one of them, in this
/// process or any other, and the others follow its journal.
#[derive(Clone, Debug)]
pub struct Cloud {
    client: Client,
    state: StateDir,
    committer: Committer,
    clock: Arc<HostClock>,
    registry: Arc<Registry>,
    lifecycle: Arc<Mutex<Option<LifecycleEvents>>>,
    agent: AgentSource,
}

/// How [`Cloud::run`] treats a runtime that exists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rerun {
    /// A finished one answers its verdict again; a live one is followed.
    #[default]
    Answer,
    /// A finished one is run anew, as the next incarnation; its outputs are kept. A live one is followed.
    Again,
}

/// What [`Cloud::ensure`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ensured {
    /// It was made and started now.
    Created,
    /// It was there already, for the same spec.
    Adopted,
    /// It has ended already; `inspect` tells how.
    Ended,
}

/// What [`Cloud::wait`] waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// The workload said that it is ready, or has ended.
    Ready,
    /// There is a verdict, and its instance is destroyed or kept as its policy says.
    Verdict,
}

/// What is known of a runtime.
#[derive(Clone, Debug)]
pub struct Inspection {
    /// Its name.
    pub runtime_id: String,
    /// Its spec, secrets redacted.
    pub spec: RuntimeSpec,
    /// What its journal says.
    pub view: View,
    /// Incus's own word for its instance; `None` where there is none.
    pub instance_status: Option<String>,
    /// The folder of its current outputs.
    pub outputs: PathBuf,
    /// The process that drives it, as far as the kernel tells; `None` where nobody does.
    pub driven_by: Option<u32>,
}

impl Cloud {
    /// Opens the state dir. Incus is asked for nothing yet.
    ///
    /// # Errors
    /// Where the state dir cannot be used.
    pub fn connect(config: &Config) -> Result<Self, Error> {
        let state = StateDir::open(&config.state_dir)?;
        let fail = |source| Error::Outputs { path: config.state_dir.clone(), source };
        let committer = Committer::start().map_err(fail)?;
        let clock = Arc::new(HostClock::open().map_err(fail)?);
        let client = Client::unix(&config.incus_socket);
        let registry = Arc::new(Registry::new(state.clone()));
        let agent = AgentSource::find(config.agent.as_deref());
        Ok(Self { client, state, committer, clock, registry, lifecycle: Arc::default(), agent })
    }

    /// The client of the Incus that runtimes are driven on.
    pub fn incus(&self) -> &Client {
        &self.client
    }

    /// Where the host's own agent is looked for.
    pub fn agent(&self) -> &AgentSource {
        &self.agent
    }

    /// One connection for all runtimes, from the first that is driven on.
    fn wakes(&self, project: &str, instance: &str) -> Wakes {
        let mut lifecycle = self.lifecycle.lock().unwrap_or_else(PoisonError::into_inner);
        if !lifecycle.as_ref().is_some_and(LifecycleEvents::is_running) {
            *lifecycle = None;
        }
        lifecycle.get_or_insert_with(|| self.client.lifecycle_events()).subscribe(project, instance)
    }

    /// Runs a spec to its end: creates, starts, follows, collects, concludes, destroys, and begins anew where its restart
    /// policy says so. Idempotent: see [`Rerun`].
    ///
    /// `cancel` turning true ends the workload; dropping the future detaches, and the same call goes on later. Where the
    /// policy keeps the instance this returns at the verdict, and [`Cloud::drive`] keeps the keeping's time.
    ///
    /// # Errors
    /// Where the spec is wrong, something that it names is missing, or the host itself cannot go on. However the workload
    /// ends is not an error but its verdict.
    pub async fn run(&self, spec: &RuntimeSpec, rerun: Rerun, cancel: watch::Receiver<bool>) -> Result<Verdict, Error> {
        spec.validate()?;
        let id = &spec.identity.runtime_id;
        let (mut rerun, mut cancel) = (rerun, cancel);
        let mut look = Look::new(self.state.runtime(id));
        // What is run again is newer than what is over now.
        let over = look.now()?.is_settled().then_some(look.now()?.incarnation);
        loop {
            match self.take(spec, rerun).await? {
                Taken::Finished(verdict) => return Ok(*verdict),
                // An earlier incarnation that is concluded and not yet destroyed comes first; a wish is for the next one.
                Taken::Driver { mut driver, .. } if rerun == Rerun::Again && driver.view().verdict.is_some() => {
                    driver.drive(Until::Settled).await?;
                }
                Taken::Driver { mut driver, .. } => {
                    self.drive_or_cancel(&mut driver, &mut cancel).await?;
                    if let Some(verdict) = driver.view().verdict.clone() {
                        return Ok(verdict);
                    }
                }
                // Whoever drives it may end, or die: then it is ours.
                Taken::Busy => {
                    let view = look.now()?;
                    let is_newer = !view.is_settled() || over.is_none_or(|over| view.incarnation > over);
                    match (rerun, &view.verdict) {
                        (Rerun::Answer, Some(verdict)) if view.is_settled() => return Ok(verdict.clone()),
                        // What was asked to be run again is running: from here on it is followed.
                        (Rerun::Again, _) if is_newer => rerun = Rerun::Answer,
                        // Somebody keeps its time.
                        (Rerun::Again, _) if view.kept.is_some() => self.make_way(spec, view.command).await?,
                        _ => {}
                    }
                    if *cancel.borrow() && rerun == Rerun::Answer && view.command.is_none() {
                        self.ask(id, Command::Cancel)?;
                    }
                    tokio::time::sleep(TAKE_OVER).await;
                }
            }
        }
    }

    async fn drive_or_cancel(&self, driver: &mut Driven, cancel: &mut watch::Receiver<bool>) -> Result<(), Error> {
        let id = driver.runtime_id().to_owned();
        let mut driving = std::pin::pin!(driver.drive(Until::Settled));
        tokio::select! {
            biased;
            () = wished(cancel) => {
                self.registry.command(&id, Command::Cancel);
            }
            ended = &mut driving => return ended,
        }
        driving.await
    }

    /// Makes sure that the runtime exists and its workload was started, and returns.
    ///
    /// Nobody drives it from then on: the guest's files keep what happens, and deadlines of the host stand still, until
    /// [`Cloud::run`], [`Cloud::drive`] or [`Cloud::wait`] takes it up again. A server keeps one of them going for each of
    /// its runtimes. A changed value in `bootstrap.env` makes no other spec: what runs keeps the old one.
    ///
    /// # Errors
    /// As [`Cloud::run`]; also where the runtime exists with another spec.
    pub async fn ensure(&self, spec: &RuntimeSpec, rerun: Rerun) -> Result<Ensured, Error> {
        spec.validate()?;
        let mut look = Look::new(self.state.runtime(&spec.identity.runtime_id));
        loop {
            match self.take(spec, rerun).await? {
                Taken::Finished(_) => return Ok(Ensured::Ended),
                Taken::Driver { mut driver, fresh } => {
                    driver.drive(Until::Accepted).await?;
                    return Ok(match (driver.view().ended.is_some(), fresh) {
                        (true, _) => Ensured::Ended,
                        (false, true) => Ensured::Created,
                        (false, false) => Ensured::Adopted,
                    });
                }
                // Whoever has it may only be looking, or may not be that far yet.
                Taken::Busy => {
                    let view = look.now()?;
                    match (view.is_settled(), rerun) {
                        (true, Rerun::Answer) => return Ok(Ensured::Ended),
                        (false, _) if view.accepted_at.is_some() && view.ended.is_none() => {
                            return Ok(Ensured::Adopted);
                        }
                        // Somebody keeps its time.
                        (true, Rerun::Again) if view.kept.is_some() => self.make_way(spec, view.command).await?,
                        _ => {}
                    }
                    tokio::time::sleep(TAKE_OVER).await;
                }
            }
        }
    }

    /// Drives a runtime that was begun until nothing is left to do: to its verdict, through its restarts, and through the
    /// time for which its instance is kept. A server does this for each of its runtimes, in a task of its own. Where
    /// another drives it already, it is waited until that one lets go.
    ///
    /// # Errors
    /// As [`Cloud::run`]; also where there is no such runtime, and [`Error::SpecNeeded`] where its workload is still to be
    /// started with an environment that only [`Cloud::run`] and [`Cloud::ensure`] know.
    pub async fn drive(&self, runtime_id: &str) -> Result<View, Error> {
        let folder = self.folder(runtime_id)?;
        loop {
            let spec = folder.read_spec().ok_or_else(|| unknown(runtime_id))?;
            match self.resume(&folder, spec)? {
                Some(mut driver) => {
                    driver.check_spec()?;
                    driver.drive(Until::Done).await?;
                    return Ok(driver.view().clone());
                }
                None => tokio::time::sleep(TAKE_OVER).await,
            }
        }
    }

    /// Waits until a runtime that was begun is ready, or has ended; gives what its journal says then. Where nobody drives it,
    /// it is driven from here for as long as it is waited for.
    ///
    /// # Errors
    /// As [`Cloud::run`]; also where there is no such runtime, or the condition does not come before `deadline`.
    pub async fn wait(&self, runtime_id: &str, condition: Condition, deadline: Duration) -> Result<View, Error> {
        let wanted = match condition {
            Condition::Ready => "ready",
            Condition::Verdict => "ended",
        };
        let reached = self.reached(runtime_id, condition);
        // Nobody may be driving it: then it is driven from here for as long as it is waited for.
        let driving = async {
            match self.drive(runtime_id).await {
                Ok(_) => std::future::pending().await,
                Err(error) => Err(error),
            }
        };
        tokio::select! {
            biased;
            reached = reached => reached,
            failed = driving => failed,
            () = tokio::time::sleep(deadline) => {
                Err(Error::WaitTimedOut { runtime_id: runtime_id.to_owned(), wanted, after: deadline })
            }
        }
    }

    /// Follows a journal from what it says now on: what earlier incarnations said is over.
    async fn reached(&self, runtime_id: &str, condition: Condition) -> Result<View, Error> {
        let mut view = self.view(runtime_id)?;
        // Not at the verdict but when all is done: whoever waits here may be the one who drives it.
        let is_met = |view: &View| {
            let is_ready = condition == Condition::Ready && view.is_ready && view.ended.is_none();
            is_ready || (view.is_settled() && view.incarnation > 0)
        };
        loop {
            let mut follower = self.events(runtime_id)?;
            loop {
                if is_met(&view) {
                    return Ok(view);
                }
                let Some((record, _)) = follower.next().await? else { break };
                if let Some(base) = follower.take_base().filter(|base| base.next_n > view.next_n) {
                    view = base;
                }
                if record.n >= view.next_n {
                    view.apply(&record);
                }
            }
        }
    }

    /// What is known of a runtime.
    ///
    /// # Errors
    /// Where there is none of that name, or Incus does not answer.
    pub async fn inspect(&self, runtime_id: &str) -> Result<Inspection, Error> {
        let folder = self.folder(runtime_id)?;
        let Some(spec) = folder.read_spec() else { return Err(unknown(runtime_id)) };
        let view = read_view(&folder)?;
        let (project, instance) = (&spec.incus.project, &spec.identity.instance_name);
        let instance = find(&self.client, project, instance, runtime_id, self.state.owner()).await?;
        let outputs = folder.incarnation(view.incarnation);
        Ok(Inspection {
            runtime_id: runtime_id.to_owned(),
            spec,
            view,
            instance_status: instance.filter(|view| is_of(view, runtime_id)).map(|view| view.status),
            outputs,
            driven_by: folder.driver(),
        })
    }

    /// What the journal of a runtime says.
    ///
    /// # Errors
    /// Where there is no such runtime, or its journal cannot be read.
    pub fn view(&self, runtime_id: &str) -> Result<View, Error> {
        read_view(&self.folder(runtime_id)?)
    }

    /// Every runtime of this state dir, with what its journal says.
    ///
    /// # Errors
    /// Where the state dir cannot be read.
    pub fn list(&self) -> Result<Vec<(String, View)>, Error> {
        let view = |name: String| match read_view(&self.state.runtime(&name)) {
            Ok(view) => Some((name, view)),
            // One that cannot be read hides no other.
            Err(error) => {
                tracing::warn!("runtime {name} is left out: {error}");
                None
            }
        };
        Ok(self.state.runtimes()?.into_iter().filter_map(view).collect())
    }

    /// The records of a runtime's journal, from its first on, as they become durable.
    ///
    /// # Errors
    /// Where there is no such runtime.
    pub fn events(&self, runtime_id: &str) -> Result<Follower, Error> {
        let folder = self.folder(runtime_id)?;
        let durable = self.registry.durable(runtime_id);
        Ok(Follower::new(folder.path(), durable))
    }

    /// The bytes of one of the current incarnation's log files, from its first on, as they become durable; `guest.log` is the
    /// workload's own output.
    ///
    /// # Errors
    /// Where there is no such runtime.
    pub fn logs(&self, runtime_id: &str, file: &str) -> Result<LogFollower, Error> {
        let folder = self.folder(runtime_id)?;
        let incarnation = read_view(&folder)?.incarnation.max(1);
        let path = folder.incarnation(incarnation).join(pika_cloud_common::paths::LOGS_DIR).join(file);
        let (reader, file) = (LogReader::new(path), file.to_owned());
        Ok(LogFollower::new(folder.path().to_owned(), self.events(runtime_id)?, reader, incarnation, file))
    }

    /// The folder of an incarnation's outputs; its `logs/` grow live.
    ///
    /// # Errors
    /// Where there is no such runtime.
    pub fn outputs(&self, runtime_id: &str, incarnation: u32) -> Result<PathBuf, Error> {
        Ok(self.folder(runtime_id)?.incarnation(incarnation))
    }

    /// Copies a runtime's outputs, as far as they are on the host, to a folder: `events.jsonl`, `status.json`,
    /// `result.json`, `verdict.json`, `logs/`, `artifacts/`.
    ///
    /// # Errors
    /// Where there is no such runtime, or the folder cannot be written.
    pub fn collect(&self, runtime_id: &str, target: &Path) -> Result<(), Error> {
        let folder = self.folder(runtime_id)?;
        let view = read_view(&folder)?;
        let outputs = folder.incarnation(view.incarnation);
        crate::outputs::derive(folder.path(), &outputs, view.incarnation)?;
        crate::outputs::copy(&outputs, target)
    }

    /// Ends a runtime's workload, whatever it is doing, and returns when its outputs and its verdict are there. What becomes
    /// of the instance is its retention policy's to say.
    ///
    /// # Errors
    /// Where there is no such runtime, or it cannot be driven to its end.
    pub async fn cancel(&self, runtime_id: &str) -> Result<(), Error> {
        self.end(runtime_id, Command::Cancel).await
    }

    /// Ends a runtime as [`Cloud::cancel`] does; an instance that is kept until it is stopped is kept no longer.
    ///
    /// # Errors
    /// As [`Cloud::destroy`].
    pub async fn stop(&self, runtime_id: &str) -> Result<(), Error> {
        self.end(runtime_id, Command::Stop).await
    }

    /// Ends a runtime as [`Cloud::cancel`] does, and destroys its instance, whatever its policy. Its journal and outputs stay,
    /// and so do its persistent volumes.
    ///
    /// # Errors
    /// Where there is no such runtime, or its instance cannot be destroyed.
    pub async fn destroy(&self, runtime_id: &str) -> Result<(), Error> {
        self.end(runtime_id, Command::Destroy).await
    }

    async fn end(&self, runtime_id: &str, command: Command) -> Result<(), Error> {
        let folder = self.folder(runtime_id)?;
        let spec = folder.read_spec().ok_or_else(|| unknown(runtime_id))?;
        let mut look = Look::new(folder.clone());
        loop {
            let view = look.now()?;
            if view.command < Some(command) {
                // Whoever drives it takes it from there, and so does whoever takes it up: here, before anything else.
                self.ask(runtime_id, command)?;
            }
            match self.resume(&folder, spec.clone())? {
                Some(driver) if driver.view().incarnation == 0 => {
                    // Nothing was begun: there is nothing to end, and no verdict to give.
                    return self.destroy_instance(&spec, 1).await;
                }
                Some(mut driver) => {
                    return driver.drive(if command == Command::Destroy { Until::Done } else { Until::Settled }).await;
                }
                None => {
                    tokio::time::sleep(TAKE_OVER).await;
                    // What is kept all the same is driven on by whoever does.
                    let view = look.now()?;
                    if view.command >= Some(command) && view.is_settled() && !is_let_go(view, command, &spec) {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Has an instance destroyed whose time somebody keeps, for the next run of `spec`, if that can begin.
    async fn make_way(&self, spec: &RuntimeSpec, asked: Option<Command>) -> Result<(), Error> {
        if asked < Some(Command::Destroy) {
            self.preflight(spec).await?;
            self.ask(&spec.identity.runtime_id, Command::Destroy)?;
        }
        Ok(())
    }

    /// Tells whoever drives a runtime what is wanted, in this process or another.
    fn ask(&self, runtime_id: &str, command: Command) -> Result<(), Error> {
        if !self.registry.command(runtime_id, command) {
            self.state.request(runtime_id, command)?;
        }
        Ok(())
    }

    /// Takes a runtime up that nobody drives, and drives it to its end. Says whether it did: another may drive it by now.
    pub(crate) async fn adopt(&self, runtime_id: &str) -> Result<bool, Error> {
        let folder = self.folder(runtime_id)?;
        let spec = folder.read_spec().ok_or_else(|| unknown(runtime_id))?;
        match self.resume(&folder, spec)? {
            Some(mut driver) => {
                driver.check_spec()?;
                driver.drive(Until::Settled).await.map(|()| true)
            }
            None => Ok(false),
        }
    }

    pub(crate) fn state(&self) -> &StateDir {
        &self.state
    }

    pub(crate) fn clock(&self) -> &HostClock {
        &self.clock
    }

    fn folder(&self, runtime_id: &str) -> Result<RuntimeFolder, Error> {
        let folder = self.state.runtime(runtime_id);
        let is_plain = !runtime_id.is_empty() && !runtime_id.starts_with('.') && !runtime_id.contains('/');
        if is_plain && folder.exists() { Ok(folder) } else { Err(unknown(runtime_id)) }
    }
}

/// Whether the instance is kept no longer after that command, and still on its way out.
fn is_let_go(view: &View, command: Command, spec: &RuntimeSpec) -> bool {
    let ends = !spec.policies.retention_policy.keeps_after(Some(command));
    ends && view.kept.is_some() && view.finished.is_none() && view.taken_over.is_none()
}

fn unknown(runtime_id: &str) -> Error {
    Error::Unknown { runtime_id: runtime_id.to_owned() }
}

/// Waits for the wish to end. Never ready where nobody can wish any more.
pub(crate) async fn wished(cancel: &mut watch::Receiver<bool>) {
    let nobody = cancel.wait_for(|wanted| *wanted).await.is_err();
    if nobody {
        std::future::pending::<()>().await;
    }
}

/// A wish that never comes.
#[cfg(test)]
fn never() -> watch::Receiver<bool> {
    watch::channel(false).1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ReconcileOptions;
    use crate::bake::Bake;

    /// A consumer drives many runtimes, each in a task of its own.
    #[test]
    fn every_call_can_be_spawned() {
        fn is_send<T: Send>(_: &T) {}
        let folder = tempfile::tempdir().unwrap();
        let config =
            Config { incus_socket: "/nonexistent".into(), state_dir: folder.path().join("state"), ..Config::default() };
        let cloud = Cloud::connect(&config).unwrap();
        let spec = RuntimeSpec::default();
        is_send(&cloud.run(&spec, Rerun::Answer, never()));
        is_send(&cloud.ensure(&spec, Rerun::Answer));
        is_send(&cloud.wait("job", Condition::Ready, Duration::ZERO));
        is_send(&cloud.inspect("job"));
        is_send(&cloud.drive("job"));
        is_send(&cloud.cancel("job"));
        is_send(&cloud.stop("job"));
        is_send(&cloud.destroy("job"));
        is_send(&cloud.reconcile(&ReconcileOptions::default()));
        is_send(&cloud.bake(&Bake::new("base", "ci"), &mut |_| (), never()));
        is_send(&cloud.stale_images());
    }
}
