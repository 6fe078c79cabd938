//! A runtime in a VM, driven by the library's own driver, core and journal.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pika_cloud_common::spec::hash;
use pika_cloud_common::{Command, RuntimeSpec};
use pika_host_collector::clock::HostClock;
use pika_host_collector::driver::{Driver, Parts, RuntimeFolder, Until};
use pika_host_collector::incus::Client;
use pika_host_collector::journal::{Committer, Durable, Follower, Records, Writer};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::{mpsc, oneshot, watch};

use super::PEER_PORT;
use super::backend::VmBackend;
use super::machine::{Vm, VmOptions};
use super::rig::Rig;
use crate::journal::Journal;
use crate::output::Outputs;
use crate::wait::until;

const OWNER: &str = "vm-tests";

/// How long a test waits for something to stand in a journal: a boot, and what comes after it, on a machine that is busy.
const RECORD_LIMIT: Duration = Duration::from_secs(120);

/// A driver at work on a runtime of its own. Dropping it ends the driver, the VM, and all their files.
#[derive(Debug)]
pub struct DrivenVm {
    /// The runtime's id, which is also its instance's name.
    pub id: String,
    scratch: TempDir,
    backend: VmBackend,
    /// How far its journal is durable; there once the journal is open.
    durable: Arc<OnceLock<watch::Receiver<Durable>>>,
    commands: mpsc::UnboundedSender<Command>,
    /// Sent to, or dropped, it ends the driver.
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<(), String>>>,
    began: Instant,
}

/// A piece of shell that waits until [`DrivenVm::open_gate`] is called.
pub const GATE: &str = "while [ ! -e /tmp/gate ]; do sleep 0.1; done";

/// A spec for VMs of the rig, its workload run as root: small and impatient unless a test says otherwise.
pub fn spec(id: &str, command: &str) -> Value {
    json!({
        "identity": { "runtime_id": id, "instance_name": id },
        "incus": { "image_alias": "none", "instance_type": "virtual_machine" },
        "entry_command": command,
        "bootstrap": { "run_as_root": true },
        "watchdogs": { "boot_secs": 90, "silence_secs": 20, "stop_grace_secs": 2, "collect_secs": 60 },
    })
}

impl DrivenVm {
    /// Begins to drive a runtime.
    pub fn start(rig: &'static Rig, spec: &Value, options: VmOptions) -> Self {
        Self::start_in(&std::env::temp_dir(), rig, spec, options)
    }

    /// The same with all of its files below `folder`, which has a short path.
    pub fn start_in(folder: &Path, rig: &'static Rig, spec: &Value, options: VmOptions) -> Self {
        let spec = RuntimeSpec::from_json(&spec.to_string()).expect("the spec is valid");
        let id = spec.identity.runtime_id.clone();
        let scratch = tempfile::Builder::new().prefix("pika-vm-").tempdir_in(folder).expect("a folder for the VM");
        let (machine, state) = (scratch.path().join("vm"), scratch.path().join("state"));
        for folder in [&machine, &state, &state.join(&id)] {
            fs::create_dir(folder).expect("the VM's folder can be written");
        }
        let text = serde_json::to_vec_pretty(&spec).expect("a spec is JSON");
        fs::write(state.join(&id).join("spec.json"), text).expect("the spec can be written");
        let backend = VmBackend::new(rig, machine, options, &id, OWNER);
        let (commands, received) = mpsc::unbounded_channel();
        let (stop, stopped) = oneshot::channel();
        let durable = Arc::new(OnceLock::new());
        let thread = std::thread::spawn({
            let (backend, durable) = (backend.clone(), Arc::clone(&durable));
            move || {
                let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
                let runtime = runtime.map_err(|error| error.to_string())?;
                let driven = runtime.block_on(async {
                    tokio::select! {
                        driven = drive(&state, spec, (backend, &durable), received) => driven,
                        _ = stopped => Ok(()),
                    }
                });
                runtime.shutdown_background();
                driven
            }
        });
        Self { id, scratch, backend, durable, commands, stop: Some(stop), thread: Some(thread), began: Instant::now() }
    }

    /// Does something with the VM, which has been started.
    pub fn with_vm<T>(&self, act: impl FnOnce(&mut Vm) -> T) -> T {
        self.backend.with_vm(act)
    }

    /// Waits until its guest is up.
    pub fn wait_up(&self) {
        until(&format!("the guest of {} is up", self.id), RECORD_LIMIT, || self.backend.is_up().then_some(()));
    }

    /// What its guest said on its console, as far as there is one.
    pub fn console(&self) -> String {
        self.backend.console().unwrap_or_default()
    }

    /// Its journal as a consumer in the driver's process has it: each record as soon as it is durable.
    pub fn follow(&self) -> Follower {
        let durable = until("the journal is open", RECORD_LIMIT, || self.durable.get().cloned());
        Follower::new(&self.folder(), Some(durable))
    }

    /// Wants something of the runtime.
    pub fn command(&self, command: Command) {
        self.commands.send(command).expect("the runtime is driven");
    }

    /// The runtime's journal, as far as it is written.
    pub fn journal(&self) -> Journal {
        Journal::read(&self.folder())
    }

    /// Waits for a record of the journal for which `is` holds.
    pub fn wait_record(&self, what: &str, is: impl Fn(&Value) -> bool) {
        until(&format!("{what} in the journal of {}", self.id), RECORD_LIMIT, || {
            std::thread::sleep(Duration::from_millis(40));
            assert!(!self.thread.as_ref().is_none_or(JoinHandle::is_finished), "the driver ended before {what}");
            self.journal().records.iter().any(&is).then_some(())
        });
    }

    /// Waits until the workload says that it is ready.
    pub fn wait_ready(&self) {
        self.wait_record("ready", |record| record["guest"]["kind"] == "ready");
    }

    /// Lets a workload go on that waits in [`GATE`].
    pub fn open_gate(&self) {
        let vsock = self.with_vm(|vm| vm.vsock());
        until("the gate opens", RECORD_LIMIT, || {
            vsock.ask(PEER_PORT, "gate").is_ok_and(|said| said == "open\n").then_some(())
        });
    }

    /// Waits until the driver has nothing left to do, and gives the journal.
    pub fn finish(&mut self, within: Duration) -> Journal {
        let thread = self.thread.take().expect("a driver is waited for once");
        let began = Instant::now();
        while !thread.is_finished() {
            if began.elapsed() > within {
                self.thread = Some(thread);
                panic!("the runtime {} is not done after {} s", self.id, within.as_secs());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        thread.join().expect("the driver does not panic").expect("the driver has no error");
        self.journal()
    }

    /// What was collected from the first incarnation.
    pub fn outputs(&self) -> Outputs {
        Outputs::at(&self.folder().join("1"))
    }

    fn folder(&self) -> PathBuf {
        self.scratch.path().join("state").join(&self.id)
    }
}

impl Drop for DrivenVm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let journal = self.journal();
            let last = journal.lines.iter().rev().take(20).rev();
            println!("the end of the journal of {}:", self.id);
            last.for_each(|line| println!("{}", line.chars().take(400).collect::<String>()));
            println!("{}", self.backend.last_words().unwrap_or_default());
        }
        drop(self.stop.take());
        let _ = self.thread.take().map(JoinHandle::join);
        eprintln!("{}: {:.1} s", self.id, self.began.elapsed().as_secs_f64());
    }
}

/// Takes a runtime up as the library does, from its folder, and drives it to its end.
async fn drive(
    state: &Path,
    spec: RuntimeSpec,
    (backend, durable): (VmBackend, &OnceLock<watch::Receiver<Durable>>),
    commands: mpsc::UnboundedReceiver<Command>,
) -> Result<(), String> {
    let id = spec.identity.runtime_id.clone();
    let say = |what: &str, error: &dyn std::fmt::Display| format!("{what} of {id}: {error}");
    let clock = Arc::new(HostClock::open().map_err(|error| say("the clock", &error))?);
    let committer = Committer::start().map_err(|error| say("the committer", &error))?;
    let folder = RuntimeFolder::new(state, &id);
    let lock = folder.lock().map_err(|error| say("the lock", &error))?.map_err(|_| say("the lock", &"it is taken"))?;
    let (mut writer, view) = Writer::open(folder.path(), &id, committer).map_err(|error| say("the journal", &error))?;
    writer.hold(lock);
    let _ = durable.set(writer.durable());
    let filled = writer.store().map_or(0, |store| store.filled());
    let mut records = Records::new(view, spec.limits.event_bytes, filled);
    if records.view().incarnation == 0 {
        let now = clock.now();
        records.boot(clock.boot_id(), now);
        records.begin(hash(&spec), 0, now);
        if let Some(commit) = records.take_commit(false) {
            records.recycle(writer.commit(commit).await.map_err(|error| say("the journal", &error))?);
        }
    }
    // Nobody listens there: what becomes of a VM is seen where it is looked at.
    let lifecycle = Client::unix(state.join("no-socket")).lifecycle_events();
    let wakes = lifecycle.subscribe(&spec.incus.project, &id);
    let spec = Arc::new(spec);
    let parts =
        Parts { backend, spec, owner: OWNER.into(), folder, writer, records, clock, commands, wakes, is_whole: true };
    let mut driver = Driver::new(parts).map_err(|error| say("the driver", &error))?;
    driver.drive(Until::Done).await.map_err(|error| say("the driver", &error))
}
