//! The public surface: a few calls that take a spec or a runtime's name.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use pika_cloud_common::spec::{difference, hash};
use pika_cloud_common::{RuntimeSpec, State, Verdict};
use tokio::sync::watch;

use crate::driver::{Driver, Parts, Until, never};
use crate::error::Error;
use crate::incus::Client;
use crate::journal::{Committer, Follower, Journal, View};
use crate::state_dir::{RuntimeFolder, RuntimeLock, StateDir};

/// How often it is tried to take over a runtime whose collector may have died.
const TAKE_OVER: Duration = Duration::from_millis(200);

/// Where Incus and the state dir are.
#[derive(Clone, Debug)]
pub struct Config {
    /// Incus's UNIX socket.
    pub incus_socket: PathBuf,
    /// Where journals and outputs are kept. Two machines never share one.
    pub state_dir: PathBuf,
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
    /// The journals that this process writes, for followers beside the driver.
    writing: Arc<Mutex<HashMap<String, watch::Receiver<u64>>>>,
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
}

impl Cloud {
    /// Opens the state dir. Incus is asked for nothing yet.
    ///
    /// # Errors
    /// Where the state dir cannot be used.
    pub fn connect(config: &Config) -> Result<Self, Error> {
        let state = StateDir::open(&config.state_dir)?;
        let committer =
            Committer::start().map_err(|source| Error::Outputs { path: config.state_dir.clone(), source })?;
        let client = Client::unix(&config.incus_socket);
        Ok(Self { client, state, committer, writing: Arc::default() })
    }

    /// The client of the Incus that runtimes are driven on.
    pub fn incus(&self) -> &Client {
        &self.client
    }

    /// Runs a spec to its end: creates, starts, follows, collects, concludes, destroys. Idempotent: see [`Rerun`].
    ///
    /// `cancel` turning true ends the workload; dropping the future detaches, and the same call goes on later.
    ///
    /// # Errors
    /// Where the spec is wrong, something that it names is missing, or the host itself cannot go on. However the workload
    /// ends is not an error but its verdict.
    pub async fn run(&self, spec: &RuntimeSpec, rerun: Rerun, cancel: watch::Receiver<bool>) -> Result<Verdict, Error> {
        spec.validate()?;
        let mut rerun = rerun;
        let mut asked = false;
        loop {
            match self.take(spec, rerun).await? {
                Taken::Finished(verdict) => return Ok(*verdict),
                Taken::Driver { mut driver, .. } => {
                    // An earlier incarnation that is concluded and not yet destroyed comes first.
                    let earlier = driver.journal().view().verdict.is_some();
                    let id = &spec.identity.runtime_id;
                    self.drive(id, &mut driver, Until::Done, cancel.clone()).await?;
                    if let Some(message) = driver.left_behind() {
                        let instance = spec.identity.instance_name.clone();
                        return Err(Error::NotDestroyed { instance, message: message.to_owned() });
                    }
                    match driver.journal().view().verdict.clone() {
                        Some(verdict) if !(earlier && rerun == Rerun::Again) => return Ok(verdict),
                        _ => {}
                    }
                }
                // Whoever drives it may end, or die: then it is ours.
                Taken::Busy => {
                    if *cancel.borrow() && !std::mem::replace(&mut asked, true) {
                        self.folder(&spec.identity.runtime_id)?.request_cancel()?;
                    }
                    tokio::time::sleep(TAKE_OVER).await;
                    // What was asked to be run again is running: from here on it is followed.
                    rerun = Rerun::Answer;
                }
            }
        }
    }

    /// Makes sure that the runtime exists and its workload was started, and returns.
    ///
    /// Nobody drives it from then on: the guest's files keep what happens, and deadlines of the host stand still, until
    /// [`Cloud::run`] or [`Cloud::wait`] takes it up again. A server keeps one of them going for each of its runtimes. A
    /// changed value in `bootstrap.env` makes no other spec: what runs keeps the old one.
    ///
    /// # Errors
    /// As [`Cloud::run`]; also where the runtime exists with another spec.
    pub async fn ensure(&self, spec: &RuntimeSpec, rerun: Rerun) -> Result<Ensured, Error> {
        spec.validate()?;
        match self.take(spec, rerun).await? {
            Taken::Finished(_) => Ok(Ensured::Ended),
            Taken::Busy => Ok(Ensured::Adopted),
            Taken::Driver { mut driver, fresh } => {
                let id = &spec.identity.runtime_id;
                self.drive(id, &mut driver, Until::Accepted, never()).await?;
                let view = driver.journal().view();
                Ok(match (view.ended.is_some(), fresh) {
                    (true, _) => Ensured::Ended,
                    (false, true) => Ensured::Created,
                    (false, false) => Ensured::Adopted,
                })
            }
        }
    }

    /// Waits until a runtime that was begun is ready, or has ended; gives what its journal says then. Where nobody drives it,
    /// it is driven from here for as long as it is waited for.
    ///
    /// # Errors
    /// As [`Cloud::run`]; also where there is no such runtime, or the condition does not come before `deadline`.
    pub async fn wait(&self, runtime_id: &str, condition: Condition, deadline: Duration) -> Result<View, Error> {
        let folder = self.folder(runtime_id)?;
        let wanted = match condition {
            Condition::Ready => "ready",
            Condition::Verdict => "ended",
        };
        let reached = async {
            let mut follower = self.events(runtime_id)?;
            let mut view = View::default();
            loop {
                let Some((record, _)) = follower.next().await? else {
                    follower = self.events(runtime_id)?;
                    view = View::default();
                    continue;
                };
                view.apply(&record);
                let ready = view.state == Some(State::Ready);
                // Not at the verdict but when all is done: whoever waits here may be the one who drives it.
                if (condition == Condition::Ready && ready) || view.finished {
                    return Ok(view);
                }
            }
        };
        // Nobody may be driving it: then it is driven from here for as long as it is waited for.
        let driving = async {
            loop {
                let Some(spec) = folder.read_spec() else { return std::future::pending().await };
                // What was redacted from the spec is needed for the start, so that is left to `run` and `ensure`.
                let view = read_view(&folder)?;
                let started = view.incarnation > 0 && (view.accepted || spec.bootstrap.env.is_empty());
                match if started { self.resume(&folder, spec)? } else { None } {
                    Some(mut driver) => {
                        self.drive(runtime_id, &mut driver, Until::Done, never()).await?;
                        return std::future::pending().await;
                    }
                    None => tokio::time::sleep(TAKE_OVER).await,
                }
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

    /// What is known of a runtime.
    ///
    /// # Errors
    /// Where there is none of that name, or Incus does not answer.
    pub async fn inspect(&self, runtime_id: &str) -> Result<Inspection, Error> {
        let folder = self.folder(runtime_id)?;
        let Some(spec) = folder.read_spec() else { return Err(unknown(runtime_id)) };
        let view = read_view(&folder)?;
        let instance = self.client.instance(&spec.incus.project, &spec.identity.instance_name).await?;
        let outputs = folder.incarnation(view.incarnation);
        Ok(Inspection {
            runtime_id: runtime_id.to_owned(),
            spec,
            view,
            instance_status: instance.map(|instance| instance.status),
            outputs,
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
        let durable = self.lock_writing().get(runtime_id).cloned();
        Ok(Follower::new(folder.path(), durable))
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

    /// Ends a runtime, whatever it is doing, and destroys its instance. Its journal and outputs stay.
    ///
    /// # Errors
    /// Where there is no such runtime, or its instance cannot be destroyed.
    pub async fn destroy(&self, runtime_id: &str) -> Result<(), Error> {
        let folder = self.folder(runtime_id)?;
        let Some(spec) = folder.read_spec() else { return Err(unknown(runtime_id)) };
        if read_view(&folder)?.incarnation == 0 {
            // Nothing was begun: there is nothing to end, and no verdict to give.
            return self.destroy_instance(&spec, runtime_id).await;
        }
        loop {
            match self.resume(&folder, spec.clone())? {
                // Another process drives it: it is asked, and the instance is looked after once it has let go.
                None => {
                    folder.request_cancel()?;
                    tokio::time::sleep(TAKE_OVER).await;
                }
                Some(mut driver) => {
                    folder.clear_cancel();
                    // The wish comes before anything else, so that nothing is started any more.
                    driver.cancel_first();
                    self.drive(runtime_id, &mut driver, Until::Done, never()).await?;
                    return self.destroy_instance(&spec, runtime_id).await;
                }
            }
        }
    }

    /// What a policy kept is destroyed all the same.
    async fn destroy_instance(&self, spec: &RuntimeSpec, runtime_id: &str) -> Result<(), Error> {
        let project = &spec.incus.project;
        let name = &spec.identity.instance_name;
        let destroyed = crate::destroy::destroy(&self.client, project, name, runtime_id, self.state.owner()).await;
        destroyed.map_err(|failure| Error::NotDestroyed { instance: name.clone(), message: failure.message })
    }

    fn folder(&self, runtime_id: &str) -> Result<RuntimeFolder, Error> {
        let folder = self.state.runtime(runtime_id);
        let plain = !runtime_id.is_empty() && !runtime_id.starts_with('.') && !runtime_id.contains('/');
        if plain && folder.exists() { Ok(folder) } else { Err(unknown(runtime_id)) }
    }

    /// Takes a runtime for the spec: to drive it, to answer its verdict, or to learn that another drives it.
    async fn take(&self, spec: &RuntimeSpec, rerun: Rerun) -> Result<Taken, Error> {
        let id = &spec.identity.runtime_id;
        let folder = self.state.runtime(id);
        // Before the folder is made, so that a spec that names what is missing leaves nothing.
        let checked = !folder.exists();
        if checked {
            crate::preflight::check(&self.client, spec, self.state.owner()).await?;
        }
        folder.make()?;
        let Ok(lock) = folder.lock()? else {
            same_spec(&folder, &read_view(&folder)?, spec)?;
            return Ok(Taken::Busy);
        };
        let mut journal = Journal::open(folder.path(), id, self.committer.clone())?;
        let fresh = match (journal.view().finished, rerun) {
            (true, Rerun::Answer) => {
                same_spec(&folder, journal.view(), spec)?;
                return journal.view().verdict.clone().map(|v| Taken::Finished(Box::new(v))).ok_or_else(|| unknown(id));
            }
            (true, Rerun::Again) => {
                let earlier = folder.read_spec();
                self.destroy_instance(earlier.as_ref().unwrap_or(spec), id).await?;
                true
            }
            (false, _) => journal.view().incarnation == 0,
        };
        if fresh {
            if !checked {
                crate::preflight::check(&self.client, spec, self.state.owner()).await?;
            }
            folder.clear_cancel();
            journal.begin(hash(spec));
            journal.commit().await?;
        } else {
            same_spec(&folder, journal.view(), spec)?;
        }
        // The journal says whose incarnation it is; the spec's file follows, also where a crash came between the two.
        if folder.read_spec().is_none_or(|stored| hash(&stored) != hash(spec)) {
            folder.write_spec(spec)?;
            crate::state_dir::sync_folder(folder.path())?;
        }
        let driver = self.driver(spec.clone(), folder, lock, journal)?;
        Ok(Taken::Driver { driver, fresh })
    }

    /// Takes a runtime that was begun, with the spec in its folder; `None` where another drives it.
    fn resume(&self, folder: &RuntimeFolder, spec: RuntimeSpec) -> Result<Option<Box<Driver>>, Error> {
        let Ok(lock) = folder.lock()? else { return Ok(None) };
        let journal = Journal::open(folder.path(), &spec.identity.runtime_id, self.committer.clone())?;
        self.driver(spec, folder.clone(), lock, journal).map(Some)
    }

    fn driver(
        &self,
        spec: RuntimeSpec,
        folder: RuntimeFolder,
        lock: RuntimeLock,
        mut journal: Journal,
    ) -> Result<Box<Driver>, Error> {
        journal.hold(lock);
        let owner = self.state.owner().to_owned();
        Ok(Box::new(Driver::new(Parts { client: self.client.clone(), spec, owner, folder, journal })?))
    }

    /// Drives, with the journal open to followers of this process.
    async fn drive(
        &self,
        runtime_id: &str,
        driver: &mut Driver,
        until: Until,
        cancel: watch::Receiver<bool>,
    ) -> Result<(), Error> {
        let _writing = Writing::begin(self, runtime_id, driver.journal().durable());
        Box::pin(driver.drive(until, cancel)).await
    }

    fn lock_writing(&self) -> MutexGuard<'_, HashMap<String, watch::Receiver<u64>>> {
        self.writing.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// While it lives, followers of this process hear of a journal's commits at once. A driver may be dropped at any moment.
struct Writing<'a> {
    cloud: &'a Cloud,
    runtime_id: &'a str,
}

impl<'a> Writing<'a> {
    fn begin(cloud: &'a Cloud, runtime_id: &'a str, durable: watch::Receiver<u64>) -> Self {
        cloud.lock_writing().insert(runtime_id.to_owned(), durable);
        Self { cloud, runtime_id }
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.cloud.lock_writing().remove(self.runtime_id);
    }
}

/// What became of the wish to have a runtime.
enum Taken {
    /// It is ours to drive.
    Driver {
        driver: Box<Driver>,
        /// Whether it was begun just now.
        fresh: bool,
    },
    /// It is over.
    Finished(Box<Verdict>),
    /// Another collector drives it.
    Busy,
}

fn unknown(runtime_id: &str) -> Error {
    Error::Unknown { runtime_id: runtime_id.to_owned() }
}

/// That the runtime's incarnation was begun for this very spec, as its journal says.
fn same_spec(folder: &RuntimeFolder, view: &View, spec: &RuntimeSpec) -> Result<(), Error> {
    match &view.spec_hash {
        Some(begun) if *begun != hash(spec) => Err(Error::SpecDiffers {
            runtime_id: spec.identity.runtime_id.clone(),
            fields: folder.read_spec().map(|stored| difference(&stored, spec)).unwrap_or_default(),
        }),
        _ => Ok(()),
    }
}

/// Reads a journal without touching it.
fn read_view(folder: &RuntimeFolder) -> Result<View, Error> {
    let mut view = View::default();
    let mut follower = Follower::new(folder.path(), None);
    while let Some((record, _)) = follower.try_next()? {
        view.apply(&record);
    }
    Ok(view)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A consumer drives many runtimes, each in a task of its own.
    #[test]
    fn every_call_can_be_spawned() {
        fn is_send<T: Send>(_: &T) {}
        let folder = tempfile::tempdir().unwrap();
        let config = Config { incus_socket: "/nonexistent".into(), state_dir: folder.path().join("state") };
        let cloud = Cloud::connect(&config).unwrap();
        let spec = RuntimeSpec::default();
        is_send(&cloud.run(&spec, Rerun::Answer, never()));
        is_send(&cloud.ensure(&spec, Rerun::Answer));
        is_send(&cloud.wait("job", Condition::Ready, Duration::ZERO));
        is_send(&cloud.inspect("job"));
        is_send(&cloud.destroy("job"));
    }
}
