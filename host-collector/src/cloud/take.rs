//! Taking a runtime: to begin it, to drive it, to answer its verdict, or to learn that another has it.

use std::sync::Arc;

use pika_cloud_common::spec::{AgentPolicy, difference, hash};
use pika_cloud_common::{RuntimeSpec, Verdict};
use tokio::sync::mpsc;

use super::registry::Driving;
use super::{Cloud, Rerun};
use crate::artifacts::ArtifactTree;
use crate::driver::{Driver, IncusBackend, Parts, Until};
use crate::error::Error;
use crate::incus::Image;
use crate::journal::{HostRecord, Records, View, Writer};
use crate::machine::{CallFailure, Destroyed};
use crate::runtime::Claim;
use crate::state_dir::{RuntimeFolder, RuntimeLock};

/// What became of the wish to have a runtime.
pub(super) enum Taken {
    /// It is ours to drive.
    Driver {
        driver: Box<Driven>,
        /// Whether it was begun just now.
        fresh: bool,
    },
    /// It is over.
    Finished(Box<Verdict>),
    /// Another collector drives it.
    Busy,
}

/// A driver that others of this process can reach.
pub(super) struct Driven {
    /// Before the driver, which holds the runtime's lock: whoever takes that next makes itself known behind this one.
    _driving: Driving,
    pub(super) driver: Driver<IncusBackend>,
    spec: Arc<RuntimeSpec>,
}

impl Driven {
    /// Drives until `until` is reached.
    pub(super) async fn drive(&mut self, until: Until) -> Result<(), Error> {
        Box::pin(self.driver.drive(until)).await?;
        let view = self.driver.view();
        if let Some(taken) = &view.taken_over {
            let runtime_id = self.spec.identity.runtime_id.clone();
            return Err(Error::TakenOver { runtime_id, owner: taken.owner.clone(), term: taken.term });
        }
        match self.driver.left_behind() {
            Some(message) => Err(Error::NotDestroyed {
                instance: self.spec.identity.instance_name.clone(),
                message: message.to_owned(),
                verdict: view.verdict.clone().map(Box::new),
            }),
            None => Ok(()),
        }
    }

    /// That its workload can be started with what is known of it here, where it is still to be started.
    pub(super) fn check_spec(&self) -> Result<(), Error> {
        let (view, spec) = (self.view(), &self.spec);
        let is_same = view.spec_hash.as_ref().is_none_or(|begun| *begun == hash(spec));
        let is_over = view.ended.is_some() || view.is_settled();
        let has_started = view.accepted_at.is_some() || is_over;
        if view.incarnation > 0 && (is_same || is_over) && (has_started || spec.bootstrap.env.is_empty()) {
            return Ok(());
        }
        Err(Error::SpecNeeded { runtime_id: spec.identity.runtime_id.clone() })
    }

    pub(super) fn view(&self) -> &View {
        self.driver.view()
    }

    pub(super) fn runtime_id(&self) -> &str {
        &self.spec.identity.runtime_id
    }
}

impl Cloud {
    /// Takes a runtime for the spec.
    pub(super) async fn take(&self, spec: &RuntimeSpec, rerun: Rerun) -> Result<Taken, Error> {
        let id = &spec.identity.runtime_id;
        let folder = self.state.runtime(id);
        // Before the folder is made, so that a spec that names what is missing leaves nothing.
        let is_checked = !folder.exists();
        if is_checked {
            self.preflight(spec).await?;
        }
        folder.make()?;
        let Ok(lock) = folder.lock()? else {
            same_spec(&folder, &read_view(&folder)?, spec)?;
            return Ok(Taken::Busy);
        };
        let mut journal = self.open_journal(&folder, lock, spec)?;
        let is_over = journal.view().is_settled();
        if is_over && rerun == Rerun::Answer {
            same_spec(&folder, journal.view(), spec)?;
            return journal.verdict(id).map(|verdict| Taken::Finished(Box::new(verdict)));
        }
        let fresh = is_over || journal.view().incarnation == 0;
        if fresh {
            // Before anything is destroyed: what is kept stays where the next run cannot begin.
            if !is_checked {
                self.preflight(spec).await?;
            }
            if is_over {
                let earlier = folder.read_spec();
                self.destroy_instance(earlier.as_ref().unwrap_or(spec), journal.view().term).await?;
            }
            // Before the journal begins: what it says is always of the spec beside it, or over.
            folder.write_spec(spec)?;
            crate::state_dir::sync_folder(folder.path())?;
            self.state.take_request(id);
            journal.begin(hash(spec), &self.clock).await?;
            // Invariant 5.
            let before = journal.view().incarnation.saturating_sub(spec.limits.incarnations);
            crate::driver::prune(folder.clone(), before);
        } else {
            same_spec(&folder, journal.view(), spec)?;
        }
        let driver = self.driver(spec.clone(), folder, journal, true)?;
        Ok(Taken::Driver { driver: Box::new(driver), fresh })
    }

    /// That a run of the spec can begin.
    pub(super) async fn preflight(&self, spec: &RuntimeSpec) -> Result<(), Error> {
        let image = crate::preflight::check(&self.client, &self.agent, spec, self.state.owner()).await?;
        self.check_image_agent(spec, &image).await
    }

    /// That the agent in a baked image is one that this host can talk to. What a new bake would do good is said.
    async fn check_image_agent(&self, spec: &RuntimeSpec, image: &Image) -> Result<(), Error> {
        if spec.incus.agent == AgentPolicy::Inject {
            return Ok(());
        }
        let (project, alias) = (&spec.incus.project, &spec.incus.image_alias);
        let (stale, agent_error) = self.staleness(project, alias, image).await?;
        if let Some(error) = agent_error {
            // The image has one.
            tracing::warn!("{error}");
        }
        match stale {
            Some(stale) if stale.is_error() => return Err(Error::ImageAgent(Box::new(stale))),
            Some(stale) => tracing::warn!("{stale}; to bake it anew: {}", stale.mend()),
            None => {}
        }
        Ok(())
    }

    /// Takes a runtime that was begun, with the spec in its folder; `None` where another drives it.
    pub(super) fn resume(&self, folder: &RuntimeFolder, spec: RuntimeSpec) -> Result<Option<Box<Driven>>, Error> {
        let Ok(lock) = folder.lock()? else { return Ok(None) };
        let journal = self.open_journal(folder, lock, &spec)?;
        let is_whole = spec.bootstrap.env.is_empty();
        Ok(Some(Box::new(self.driver(spec, folder.clone(), journal, is_whole)?)))
    }

    pub(crate) fn open_journal(
        &self,
        folder: &RuntimeFolder,
        lock: RuntimeLock,
        spec: &RuntimeSpec,
    ) -> Result<OpenJournal, Error> {
        let id = &spec.identity.runtime_id;
        let (mut writer, view) = Writer::open(folder.path(), id, self.committer.clone())?;
        writer.hold(lock);
        let filled = writer.store().map_or(0, |store| store.filled());
        Ok(OpenJournal { records: Records::new(view, spec.limits.event_bytes, filled), writer })
    }

    fn driver(
        &self,
        spec: RuntimeSpec,
        folder: RuntimeFolder,
        journal: OpenJournal,
        is_whole: bool,
    ) -> Result<Driven, Error> {
        let OpenJournal { writer, mut records } = journal;
        let spec = Arc::new(spec);
        let id = &spec.identity.runtime_id;
        let outputs = folder.incarnation(records.view().incarnation);
        crate::state_dir::make_folder(&outputs)?;
        crate::outputs::remove_stale(&outputs);
        // What a guest filled may take a while to remove, and nothing waits for it.
        tokio::task::spawn_blocking(move || ArtifactTree::remove_abandoned(&outputs));
        if let Some(command) = self.state.take_request(id) {
            // Before anything else, so that nothing is started any more.
            records.host(HostRecord::Command { command }, self.clock.now());
        }
        let owner: Arc<str> = self.state.owner().into();
        let (commands, receiver) = mpsc::unbounded_channel();
        let (client, clock) = (self.client.clone(), Arc::clone(&self.clock));
        let agent = self.agent.clone();
        let backend = IncusBackend {
            client,
            spec: Arc::clone(&spec),
            owner: Arc::clone(&owner),
            clock: Arc::clone(&clock),
            agent,
        };
        let wakes = self.wakes(&spec.incus.project, &spec.identity.instance_name);
        let driving = self.registry.enter(id, writer.durable(), commands);
        let parts = Parts {
            backend,
            spec: Arc::clone(&spec),
            owner,
            folder,
            writer,
            records,
            clock,
            commands: receiver,
            wakes,
            is_whole,
        };
        Ok(Driven { _driving: driving, driver: Driver::new(parts)?, spec })
    }

    /// What a policy kept is destroyed all the same.
    pub(super) async fn destroy_instance(&self, spec: &RuntimeSpec, term: u64) -> Result<(), Error> {
        let (project, name) = (&spec.incus.project, &spec.identity.instance_name);
        let runtime_id = spec.identity.runtime_id.clone();
        let ours = Claim { runtime_id: runtime_id.clone(), owner: self.state.owner().to_owned(), term };
        match crate::destroy::destroy(&self.client, project, name, &ours).await {
            Ok(Destroyed::Gone) => Ok(()),
            Ok(Destroyed::TakenOver { owner, term }) => Err(Error::TakenOver { runtime_id, owner, term }),
            Err(CallFailure { message, .. }) => {
                Err(Error::NotDestroyed { instance: name.clone(), message, verdict: None })
            }
        }
    }
}

/// A journal that is ours to write.
pub(crate) struct OpenJournal {
    writer: Writer,
    records: Records,
}

impl OpenJournal {
    pub(crate) fn view(&self) -> &View {
        self.records.view()
    }

    /// To add to it what another collector knew.
    pub(crate) fn records(&mut self) -> &mut Records {
        &mut self.records
    }

    /// Makes durable what was added.
    pub(crate) async fn commit(&mut self) -> Result<(), Error> {
        if let Some(commit) = self.records.take_commit(false) {
            let commit = self.writer.commit(commit).await?;
            self.records.recycle(commit);
        }
        Ok(())
    }

    /// The verdict of one that is over.
    fn verdict(&self, runtime_id: &str) -> Result<Verdict, Error> {
        if let Some(taken) = &self.view().taken_over {
            let runtime_id = runtime_id.to_owned();
            return Err(Error::TakenOver { runtime_id, owner: taken.owner.clone(), term: taken.term });
        }
        self.view().verdict.clone().ok_or_else(|| super::unknown(runtime_id))
    }

    /// Makes it durable that the next incarnation begins.
    async fn begin(&mut self, spec_hash: String, clock: &crate::clock::HostClock) -> Result<(), Error> {
        let now = clock.now();
        self.records.boot(clock.boot_id(), now);
        self.records.begin(spec_hash, 0, now);
        self.commit().await
    }
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
pub(crate) fn read_view(folder: &RuntimeFolder) -> Result<View, Error> {
    Ok(crate::journal::read_view(folder.path())?)
}
