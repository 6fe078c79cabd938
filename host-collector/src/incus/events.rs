//! Lifecycle events of Incus, as wake-ups: one websocket for a whole collector.
//!
//! ```text
//!   /1.0/events ──► one task ──┬─► wakes of (project, instance)
//!        ▲  lost: wait, again  └─► at every connection: all of them
//!        └──────────┘
//! ```
//!
//! A client that may not hear of all projects (Incus answers 403) follows each project that anyone is subscribed in, with a
//! websocket for each.
//!
//! Events are not resent, a slow listener is dropped, and nothing is told of what happened while the daemon was away. So
//! an event only says where to look; state is always read. Whoever is subscribed is woken once at every connection, for
//! what was missed before it. A collector that hears nothing still learns of whatever breaks a session or runs into a
//! deadline; what happens to an instance that is kept, it learns only here.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt as _;
use serde::Deserialize;
use tokio::sync::{Notify, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio_tungstenite::tungstenite::Message;

use super::backoff::{backoff, jitter};
use super::client::Client;
use super::error::Error;
use super::instance::encode;

/// Incus pings every 10 s; a connection on which nothing comes for so long is dead.
const SILENCE: Duration = Duration::from_secs(35);

/// An instance's project and name.
type Key = (String, String);

/// Lifecycle events of one Incus. The task that reads them ends with the last clone.
#[derive(Clone, Debug)]
pub struct LifecycleEvents {
    shared: Arc<Shared>,
    task: Arc<Task>,
}

#[derive(Debug, Default)]
struct Shared {
    /// One channel an instance, for as long as anyone is subscribed to it.
    instances: Mutex<HashMap<Key, watch::Sender<()>>>,
    /// Somebody came or went.
    changed: Notify,
}

#[derive(Debug)]
struct Task(AbortHandle);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Client {
    /// Follows lifecycle events from now on, over lost connections and restarts of the daemon. Must be called within a
    /// tokio runtime.
    pub fn lifecycle_events(&self) -> LifecycleEvents {
        let shared = Arc::new(Shared::default());
        let task = tokio::spawn(follow(self.clone(), Arc::clone(&shared)));
        LifecycleEvents { shared, task: Arc::new(Task(task.abort_handle())) }
    }
}

impl LifecycleEvents {
    /// Whether they still come: they end with the tokio runtime in which they began.
    pub(crate) fn is_running(&self) -> bool {
        !self.task.0.is_finished()
    }

    /// Wakes for one instance, whether it exists or not.
    pub fn subscribe(&self, project: &str, instance: &str) -> Wakes {
        let key = (project.to_owned(), instance.to_owned());
        let mut instances = self.shared.lock();
        let sender = instances.entry(key.clone()).or_insert_with(|| watch::channel(()).0);
        let receiver = sender.subscribe();
        drop(instances);
        self.shared.changed.notify_one();
        Wakes { key, receiver, shared: Arc::clone(&self.shared) }
    }
}

/// Wakes for one instance. They add up: what comes while nobody waits is one wake.
#[derive(Debug)]
pub struct Wakes {
    key: Key,
    receiver: watch::Receiver<()>,
    shared: Arc<Shared>,
}

impl Wakes {
    /// Waits until something may have happened to the instance. Cancelling loses nothing.
    pub async fn next(&mut self) {
        if self.receiver.changed().await.is_err() {
            // Its sender lives while this is subscribed.
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Wakes {
    fn drop(&mut self) {
        let mut instances = self.shared.lock();
        // This one still counts.
        if instances.get(&self.key).is_some_and(|sender| sender.receiver_count() <= 1) {
            instances.remove(&self.key);
            self.shared.changed.notify_one();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, HashMap<Key, watch::Sender<()>>> {
        self.instances.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self, key: &Key) {
        if let Some(sender) = self.lock().get(key) {
            sender.send_replace(());
        }
    }

    /// Wakes everyone, or everyone of a project.
    fn wake_all(&self, project: Option<&str>) {
        for (key, sender) in self.lock().iter() {
            if project.is_none_or(|project| key.0 == project) {
                sender.send_replace(());
            }
        }
    }

    fn projects(&self) -> BTreeSet<String> {
        self.lock().keys().map(|(project, _)| project.clone()).collect()
    }
}

/// Reads events for ever: of all projects at once, or where that is not allowed, of each.
async fn follow(client: Client, shared: Arc<Shared>) {
    follow_until_refused(&client, &shared, None).await;
    let mut tasks = JoinSet::new();
    let mut followed: BTreeMap<String, AbortHandle> = BTreeMap::new();
    loop {
        let wanted = shared.projects();
        followed.retain(|project, task| {
            let is_wanted = wanted.contains(project);
            if !is_wanted {
                task.abort();
            }
            is_wanted
        });
        for project in wanted {
            followed.entry(project).or_insert_with_key(|project| {
                let (client, shared, project) = (client.clone(), Arc::clone(&shared), project.clone());
                tasks.spawn(async move { follow_until_refused(&client, &shared, Some(&project)).await })
            });
        }
        shared.changed.notified().await;
        // Those that were aborted leave nothing behind.
        while tasks.try_join_next().is_some() {}
    }
}

/// Reads events of one project or of all, over lost connections, until Incus says that this client may not.
async fn follow_until_refused(client: &Client, shared: &Shared, project: Option<&str>) {
    let mut failures = 0;
    loop {
        match connection(client, shared, project).await {
            // It had been open.
            Ok(()) => failures = 0,
            Err(Error::Refused { code: 403, .. }) if project.is_none() => return,
            Err(error) => tracing::debug!("events of Incus: {error}"),
        }
        tokio::time::sleep(backoff(failures, jitter())).await;
        failures += 1;
    }
}

/// One connection, from its opening to its loss.
async fn connection(client: &Client, shared: &Shared, project: Option<&str>) -> Result<(), Error> {
    let of = project.map_or_else(|| "all-projects=true".to_owned(), |project| format!("project={}", encode(project)));
    let path = format!("/1.0/events?type=lifecycle&{of}");
    let mut socket = client.open_websocket(&path, &path).await?;
    // What was missed before this moment is looked for; what comes from now on is heard.
    shared.wake_all(project);
    while let Ok(Some(Ok(message))) = tokio::time::timeout(SILENCE, socket.next()).await {
        let bytes = match &message {
            Message::Text(text) => text.as_bytes(),
            Message::Binary(bytes) => bytes.as_ref(),
            // A ping is answered by the next read.
            _ => continue,
        };
        for key in instances_of(bytes) {
            shared.wake(&key);
        }
    }
    Ok(())
}

/// The instances that an event is about: two at a renaming, none where it is about something else.
fn instances_of(event: &[u8]) -> Vec<Key> {
    #[derive(Deserialize)]
    struct Event {
        #[serde(default)]
        project: String,
        metadata: Lifecycle,
    }
    #[derive(Deserialize)]
    struct Lifecycle {
        #[serde(default)]
        action: String,
        #[serde(default)]
        source: String,
        #[serde(default)]
        context: Option<Context>,
    }
    #[derive(Deserialize)]
    struct Context {
        old_name: Option<String>,
    }
    let Ok(Event { project, metadata }) = serde_json::from_slice(event) else { return Vec::new() };
    if !metadata.action.starts_with("instance-") {
        return Vec::new();
    }
    // Snapshots, logs and the like stand below their instance.
    let path = metadata.source.split('?').next().unwrap_or_default();
    let name = path.strip_prefix("/1.0/instances/").and_then(|rest| rest.split('/').next());
    let old = metadata.context.and_then(|context| context.old_name);
    let project = if project.is_empty() { "default".to_owned() } else { project };
    let names = name.map(str::to_owned).into_iter().chain(old);
    names.filter(|name| !name.is_empty()).map(|name| (project.clone(), name)).collect()
}

#[cfg(test)]
mod tests;
