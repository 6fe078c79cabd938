//! The drivers of this process: how others reach them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use pika_cloud_common::Command;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::journal::Durable;
use crate::state_dir::StateDir;

/// How often it is looked whether another process wants something of a runtime that is driven here.
const REQUEST_POLL: Duration = Duration::from_secs(1);

/// The drivers of this process, by runtime.
#[derive(Debug)]
pub(super) struct Registry {
    state: StateDir,
    drivers: Mutex<Drivers>,
}

#[derive(Debug, Default)]
struct Drivers {
    by_runtime: HashMap<String, Entry>,
    /// Counts entries, so that a driver that ends late removes no other's.
    last_entry: u64,
    /// The task that looks for requests of other processes: one for all drivers. It ends with its tokio runtime.
    poller: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Entry {
    number: u64,
    durable: watch::Receiver<Durable>,
    commands: mpsc::UnboundedSender<Command>,
}

impl Registry {
    pub(super) fn new(state: StateDir) -> Self {
        Self { state, drivers: Mutex::default() }
    }

    /// Makes a driver known, for as long as what is given lives. Inside of a tokio runtime.
    pub(super) fn enter(
        self: &Arc<Self>,
        runtime_id: &str,
        durable: watch::Receiver<Durable>,
        commands: mpsc::UnboundedSender<Command>,
    ) -> Driving {
        let mut drivers = self.lock();
        drivers.last_entry += 1;
        let number = drivers.last_entry;
        drivers.by_runtime.insert(runtime_id.to_owned(), Entry { number, durable, commands });
        if drivers.poller.as_ref().is_none_or(JoinHandle::is_finished) {
            drivers.poller = Some(tokio::spawn(poll(Arc::downgrade(self))));
        }
        Driving { registry: Arc::clone(self), runtime_id: runtime_id.to_owned(), number }
    }

    /// How far the journal is durable that a driver of this process writes.
    pub(super) fn durable(&self, runtime_id: &str) -> Option<watch::Receiver<Durable>> {
        self.lock().by_runtime.get(runtime_id).map(|entry| entry.durable.clone())
    }

    /// Tells a driver of this process what is wanted; `false` where there is none.
    pub(super) fn command(&self, runtime_id: &str, command: Command) -> bool {
        self.lock().by_runtime.get(runtime_id).is_some_and(|entry| entry.commands.send(command).is_ok())
    }

    fn lock(&self) -> MutexGuard<'_, Drivers> {
        self.drivers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands on what other processes want. `false` where there is no driver any more.
    fn hand_on(&self) -> bool {
        for runtime_id in self.state.requests() {
            if self.durable(&runtime_id).is_some()
                && let Some(command) = self.state.take_request(&runtime_id)
            {
                self.command(&runtime_id, command);
            }
        }
        let mut drivers = self.lock();
        if drivers.by_runtime.is_empty() {
            // Whoever comes next begins another.
            drivers.poller = None;
        }
        drivers.poller.is_some()
    }
}

async fn poll(registry: Weak<Registry>) {
    loop {
        tokio::time::sleep(REQUEST_POLL).await;
        let Some(registry) = registry.upgrade() else { return };
        if !registry.hand_on() {
            return;
        }
    }
}

/// While it lives, a driver can be reached. It may be dropped at any moment.
pub(super) struct Driving {
    registry: Arc<Registry>,
    runtime_id: String,
    number: u64,
}

impl Drop for Driving {
    fn drop(&mut self) {
        let mut drivers = self.registry.lock();
        if drivers.by_runtime.get(&self.runtime_id).is_some_and(|entry| entry.number == self.number) {
            drivers.by_runtime.remove(&self.runtime_id);
        }
    }
}
