//! A stage for one test: its folder, its state dir, its instances; nothing of it is left.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use serde_json::Value;
use tempfile::TempDir;

use crate::host::{command_lines_with, files_below};
use crate::incus::Incus;
use crate::journal::Journal;
use crate::lab::Lab;
use crate::output::Outputs;
use crate::run::{Finished, Running};
use crate::spec::Spec;
use crate::wait::{LIMIT, eventually, until};

/// What one test works in. Dropping it deletes its instances, also when the test panics.
#[derive(Debug)]
pub struct Stage {
    name: String,
    scratch: TempDir,
    instances: Mutex<Vec<String>>,
    began: Instant,
}

impl Stage {
    /// A stage; `test` becomes part of its names.
    pub fn new(test: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        Lab::get();
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{test}-{}-{count}", std::process::id());
        let scratch = tempfile::Builder::new().prefix("pika-test-").tempdir().expect("a folder for the test");
        Self { name, scratch, instances: Mutex::default(), began: Instant::now() }
    }

    /// What its names begin with.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// A path in the stage's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// A path in a folder for whatever else the test needs.
    pub fn more(&self, name: &str) -> PathBuf {
        let folder = self.path("more");
        fs::create_dir_all(&folder).expect("the stage's folder can be written");
        folder.join(name)
    }

    /// The state dir.
    pub fn state(&self) -> PathBuf {
        self.path("state")
    }

    /// A runtime's folder in the state dir.
    pub fn runtime(&self, spec: &Spec) -> PathBuf {
        self.state().join(&spec.id)
    }

    /// A spec with a name of its own, whose instance is deleted with the stage.
    pub fn spec(&self, command: &str) -> Spec {
        let mut instances = self.instances.lock().unwrap_or_else(PoisonError::into_inner);
        let name = format!("{}-{}", self.name, instances.len());
        instances.push(name.clone());
        Spec::new(&name, command)
    }

    /// Writes a spec's file, and gives its path.
    pub fn write(&self, spec: &Spec) -> PathBuf {
        let path = self.path(&format!("{}.json", spec.id));
        fs::write(&path, serde_json::to_vec_pretty(&spec.json).expect("a spec is JSON"))
            .expect("the spec can be written");
        path
    }

    /// `pika-cloud` with this stage's state dir and the private Incus.
    pub fn cloud(&self, args: &[&str]) -> Command {
        let lab = Lab::get();
        let mut command = Command::new(&lab.cloud);
        command.arg("--incus").arg(format!("unix:{}", lab.socket.display())).arg("--state-dir").arg(self.state());
        command.args(args);
        for name in ["PIKA_CLOUD_STATE_DIR", "PIKA_CLOUD_INCUS", "PIKA_CLOUD_LOG"] {
            command.env_remove(name);
        }
        // Beside the program under test there may be a build of the agent that runs on this machine only.
        command.env("PIKA_GUEST_AGENT", &lab.agent);
        command
    }

    /// Runs `pika-cloud` with these arguments to its end.
    pub fn call(&self, args: &[&str]) -> Finished {
        Running::start(&mut self.cloud(args)).finish()
    }

    /// Starts `pika-cloud run` with the spec, its outputs to [`Stage::outputs`].
    pub fn start(&self, spec: &Spec) -> Running {
        self.start_with(spec, &[])
    }

    /// As [`Stage::start`], with more arguments.
    pub fn start_with(&self, spec: &Spec, more: &[&str]) -> Running {
        Running::start(&mut self.run_command(spec, more))
    }

    /// The command that [`Stage::start_with`] starts.
    pub fn run_command(&self, spec: &Spec, more: &[&str]) -> Command {
        let mut command = self.cloud(&["run"]);
        command.arg(self.write(spec)).arg("--output").arg(self.output_folder(spec)).args(more);
        command
    }

    /// Runs a spec to its end.
    pub fn run(&self, spec: &Spec) -> Finished {
        self.start(spec).finish()
    }

    /// The collected outputs of a spec.
    pub fn outputs(&self, spec: &Spec) -> Outputs {
        Outputs::at(&self.output_folder(spec))
    }

    fn output_folder(&self, spec: &Spec) -> PathBuf {
        self.path(&format!("{}.out", spec.id))
    }

    /// The outputs of one incarnation in the state dir.
    pub fn incarnation(&self, spec: &Spec, incarnation: u32) -> Outputs {
        Outputs::at(&self.runtime(spec).join(incarnation.to_string()))
    }

    /// A runtime's journal, as far as it is written.
    pub fn journal(&self, spec: &Spec) -> Journal {
        Journal::read(&self.runtime(spec))
    }

    /// Waits for a guest event for which `is` holds.
    pub fn wait_event(&self, spec: &Spec, what: &str, is: impl Fn(&Value) -> bool) {
        self.wait_record(spec, what, |record| record.get("guest").is_some_and(&is));
    }

    /// Waits for a record of the journal for which `is` holds.
    pub fn wait_record(&self, spec: &Spec, what: &str, is: impl Fn(&Value) -> bool) {
        until(&format!("{what} in the journal of {}", spec.id), LIMIT, || {
            self.journal(spec).records.iter().any(&is).then_some(())
        });
    }

    /// Waits until the workload says that it is ready.
    pub fn wait_ready(&self, spec: &Spec) {
        self.wait_event(spec, "ready", |event| event["kind"] == "ready");
    }

    /// Lets a workload go on that waits in [`Stage::gate`].
    pub fn open_gate(&self, spec: &Spec) {
        Incus.exec_ok(&spec.instance, "touch /tmp/gate");
    }

    /// A piece of shell that waits until [`Stage::open_gate`] is called.
    pub fn gate() -> &'static str {
        "while [ ! -e /tmp/gate ]; do sleep 0.05; done"
    }

    /// Whether Incus has the spec's instance.
    pub fn has_instance(&self, spec: &Spec) -> bool {
        Incus.instance(&spec.instance).is_some()
    }

    /// That the spec left nothing: no instance, no process, nothing half done in the state dir.
    pub fn check_nothing_left(&self, spec: &Spec) {
        assert!(!self.has_instance(spec), "the instance {} is left", spec.instance);
        eventually(&format!("no process of {} is left", spec.instance), || {
            command_lines_with(&spec.instance).iter().all(|(pid, _)| *pid == std::process::id())
        });
        self.check_folders();
        let runtime = self.runtime(spec);
        if runtime.exists() {
            self.journal(spec).host("finished").last().expect("the journal says that it is finished");
            assert!(is_unlocked(&runtime.join("lock")), "{} is still locked", runtime.display());
            let temporary = |path: &PathBuf| {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let guests = path.components().any(|part| part.as_os_str() == "artifacts");
                !guests && (name == "cancel" || [".new", ".partial", ".tmp"].iter().any(|end| name.ends_with(end)))
            };
            let left: Vec<PathBuf> = files_below(&runtime).into_iter().filter(temporary).collect();
            assert!(left.is_empty(), "half done: {left:?}");
            assert!(!files_below(&runtime).iter().any(|path| path.to_string_lossy().contains("artifacts.partial")));
        }
    }

    /// That there is nothing in the stage's folder but the state dir, specs, outputs and what the test itself put there.
    pub fn check_folders(&self) {
        let ours = |name: &str| ["state", "more"].contains(&name) || name.starts_with(&self.name);
        let entries = fs::read_dir(self.scratch.path()).expect("the stage's folder can be read").flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let others: Vec<String> = names.filter(|name| !ours(name)).collect();
        assert!(others.is_empty(), "in the stage's folder there is also {others:?}");
    }
}

fn is_unlocked(path: &Path) -> bool {
    use rustix::fs::{FlockOperation, flock};
    let file = fs::File::open(path).expect("the lock is there");
    flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
}

impl Drop for Stage {
    fn drop(&mut self) {
        for name in self.instances.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            Incus.delete(&name);
        }
        println!("{}: {:.1} s", self.name, self.began.elapsed().as_secs_f64());
    }
}
