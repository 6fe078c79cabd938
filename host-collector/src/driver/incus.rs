//! Calls of one runtime, performed on Incus.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use pika_cloud_common::RuntimeSpec;
use pika_cloud_common::limits::PEER_TIMEOUT;
use pika_cloud_common::wire::Transport;

use super::backend::{Backend, Link};
use crate::agent_binary::AgentSource;
use crate::clock::HostClock;
use crate::incus::{Client, Error, InstanceState, InstanceView, Labels, Ownership, Patched, Work, label, provision};
use crate::machine::{CallFailure, SessionLoss};
use crate::runtime::{Agent, Answer, Call, Claim, Seen, Way};
use crate::transport::{PUT_DIAL_TIMEOUT, dial_exec, dial_own, dial_vsock};

/// How long a dial may take: Incus answers an exec and its websockets in milliseconds, or not at all.
const DIAL_TIMEOUT: Duration = PEER_TIMEOUT;

/// Which image an instance's own was baked from, as Incus has it in the instance's configuration.
const BASE_ALIAS: &str = "image.pika-cloud.base-alias";

/// What is read of a console, escapes and all.
const CONSOLE_BYTES: usize = 32 * 1024;
/// How long that may take.
const CONSOLE_TIMEOUT: Duration = Duration::from_secs(5);

/// Incus, and the runtime that is driven on it.
#[derive(Clone)]
pub(crate) struct IncusBackend {
    pub(crate) client: Client,
    pub(crate) spec: Arc<RuntimeSpec>,
    pub(crate) owner: Arc<str>,
    pub(crate) clock: Arc<HostClock>,
    pub(crate) agent: AgentSource,
}

impl Backend for IncusBackend {
    fn call(&self, call: Call) -> impl Future<Output = Answer> + Send + 'static {
        let this = self.clone();
        async move {
            let project = &this.spec.incus.project;
            let done = |answer: Result<(), Error>| answer.map_err(|error| failure(&error));
            match call {
                Call::Look { instance, search } => Answer::Looked(this.look(&instance, search).await),
                Call::Create { incarnation, term } => Answer::Created(done(this.create(incarnation, term).await)),
                Call::Start { instance, incarnation } => Answer::Started(this.start(&instance, incarnation).await),
                Call::Console { instance } => Answer::Console(this.console(&instance).await),
                Call::Halt { instance } => Answer::Halted(this.halt(&instance).await),
                Call::Destroy { instance, term } => {
                    let runtime_id = &this.spec.identity.runtime_id;
                    let ours = Claim { runtime_id: runtime_id.clone(), owner: this.owner.to_string(), term };
                    Answer::Destroyed(crate::destroy::destroy(&this.client, project, &instance, &ours).await)
                }
            }
        }
    }

    fn dial(&self, instance: String, way: Way) -> impl Future<Output = Result<Link, SessionLoss>> + Send + 'static {
        let this = self.clone();
        async move {
            let (client, project) = (&this.client, &this.spec.incus.project);
            let dial = async {
                match (way.transport, way.agent) {
                    (Transport::Vsock, _) => dial_vsock(client, project, &instance).await,
                    (Transport::Exec, Agent::Image) => dial_exec(client, project, &instance)
                        .await
                        .map_err(|error| SessionLoss::Lost(error.to_string())),
                    (Transport::Exec, agent) => dial_own(client, (project, &instance), &this.agent, agent).await,
                }
            };
            let limit = if way.agent == Agent::Put { PUT_DIAL_TIMEOUT } else { DIAL_TIMEOUT };
            match tokio::time::timeout(limit, dial).await {
                Ok(dialled) => dialled,
                Err(_) => Err(SessionLoss::Lost(format!("no session over {} in time", way.transport.as_str()))),
            }
        }
    }
}

impl IncusBackend {
    async fn look(&self, instance: &str, search: bool) -> Result<Option<Seen>, CallFailure> {
        let project = &self.spec.incus.project;
        let found = if search {
            find(&self.client, project, instance, &self.spec.identity.runtime_id, &self.owner).await
        } else {
            self.client.instance(project, instance).await
        };
        match found.map_err(|error| failure(&error))? {
            // Asked for by a collector that died, or did not hear the answer. Whose it is shows once it is there.
            None if search && self.is_at(Work::Creating, instance).await? => Ok(Some(self.unborn(instance))),
            // Likewise. To be asked to start it once more, it would take for a failure.
            Some(view) if view.state() == InstanceState::Stopped && self.is_at(Work::Starting, &view.name).await? => {
                let status = "being started".to_owned();
                Ok(Some(Seen { state: InstanceState::Changing, status, ..seen(view) }))
            }
            found => Ok(found.map(seen)),
        }
    }

    async fn is_at(&self, work: Work, instance: &str) -> Result<bool, CallFailure> {
        let asked = self.client.is_at(work, &self.spec.incus.project, instance).await;
        asked.map_err(|error| failure(&error))
    }

    fn unborn(&self, instance: &str) -> Seen {
        let runtime_id = self.spec.identity.runtime_id.clone();
        Seen {
            name: instance.to_owned(),
            status: "being created".to_owned(),
            state: InstanceState::Changing,
            // No term is below any that is known.
            claim: Some(Claim { runtime_id, owner: self.owner.to_string(), term: 0 }),
            vsock: None,
            base_alias: None,
        }
    }

    /// Starts it for an incarnation, which its label names from before it runs: whoever takes it over goes on with that one.
    async fn start(&self, instance: &str, incarnation: u32) -> Result<(), CallFailure> {
        let project = &self.spec.incus.project;
        let (labels, etag) = self.read_ours(instance).await?;
        if labels.incarnation < incarnation {
            let change = BTreeMap::from([(label("incarnation"), incarnation.to_string())]);
            let patched = self.client.patch_instance(project, instance, &etag, &change).await;
            if patched.map_err(|error| failure(&error))? == Patched::Raced {
                let message = format!("the instance `{instance}` was changed while its label was");
                return Err(CallFailure { transient: true, message });
            }
        }
        self.client.start_instance(project, instance).await.map_err(|error| failure(&error))
    }

    /// The end of its console, if that can be read in good time: it is evidence, and nothing waits for it for long.
    async fn console(&self, instance: &str) -> Option<String> {
        let read = self.client.console_tail(&self.spec.incus.project, instance, CONSOLE_BYTES);
        match tokio::time::timeout(CONSOLE_TIMEOUT, read).await {
            Ok(Ok(console)) => Some(console),
            Ok(Err(error)) => {
                tracing::debug!("the console of `{instance}` cannot be read: {error}");
                None
            }
            Err(_) => None,
        }
    }

    async fn halt(&self, instance: &str) -> Result<(), CallFailure> {
        self.read_ours(instance).await?;
        let halted = self.client.stop_instance(&self.spec.incus.project, instance).await;
        halted.map_err(|error| failure(&error))
    }

    /// Invariants 4 and 6: the labels of an instance, with its version, where it is this collector's. Incus ignores conditions
    /// on state changes, so this is read right before each of them. What is not ours is a final failure, after which the
    /// instance is looked at anew.
    async fn read_ours(&self, instance: &str) -> Result<(Labels, String), CallFailure> {
        let project = &self.spec.incus.project;
        let read = self.client.instance_with_etag(project, instance).await.map_err(|error| failure(&error))?;
        let not_ours = |now: &str| {
            let message = format!("the instance `{instance}` in project `{project}` is left alone: {now}");
            CallFailure { transient: false, message }
        };
        let Some((view, etag)) = read else { return Err(not_ours("it is gone")) };
        match Labels::read(&view.config) {
            Some(labels) if labels.runtime_id != self.spec.identity.runtime_id => {
                Err(not_ours(&format!("it belongs to runtime `{}`", labels.runtime_id)))
            }
            Some(labels) if labels.owner != *self.owner => {
                Err(not_ours(&format!("owner `{}` holds it with term {}", labels.owner, labels.term)))
            }
            Some(labels) => Ok((labels, etag)),
            None => Err(not_ours("it has not all of pika-cloud's labels")),
        }
    }

    async fn create(&self, incarnation: u32, term: u64) -> Result<(), Error> {
        let ownership = Ownership { owner: self.owner.to_string(), term, incarnation };
        provision(&self.client, &self.spec, &ownership, self.clock.now().wall).await
    }
}

/// The instance of a runtime, under whatever name; where there is none, whatever has its name.
pub(crate) async fn find(
    client: &Client,
    project: &str,
    instance: &str,
    runtime_id: &str,
    owner: &str,
) -> Result<Option<InstanceView>, Error> {
    let view = client.instance(project, instance).await?;
    if view.as_ref().is_some_and(|view| is_of(view, runtime_id)) {
        return Ok(view);
    }
    // A person may have given it another name.
    let all = client.instances(project).await?;
    // Ours before one that another collector took over (Invariant 6).
    let is_ours = |view: &InstanceView| claim(view).is_some_and(|claim| claim.owner == owner);
    let renamed = all.into_iter().filter(|view| is_of(view, runtime_id)).max_by_key(is_ours);
    Ok(renamed.or(view))
}

/// Whether an instance is that runtime's, whoever holds it.
pub(crate) fn is_of(view: &InstanceView, runtime_id: &str) -> bool {
    claim(view).is_some_and(|claim| claim.runtime_id == runtime_id)
}

fn seen(view: InstanceView) -> Seen {
    // Incus notes an image's properties with each instance that is made from it.
    let base_alias = view.config.get(BASE_ALIAS).cloned();
    let (claim, state, vsock) = (claim(&view), view.state(), view.vsock());
    Seen { name: view.name, status: view.status, state, claim, vsock, base_alias }
}

/// Whose an instance is, by its labels.
pub(crate) fn claim(view: &InstanceView) -> Option<Claim> {
    let Labels { runtime_id, owner, term, .. } = Labels::read(&view.config)?;
    Some(Claim { runtime_id, owner, term })
}

pub(crate) fn failure(error: &Error) -> CallFailure {
    CallFailure { transient: error.is_transient(), message: error.to_string() }
}

#[cfg(test)]
mod tests;
