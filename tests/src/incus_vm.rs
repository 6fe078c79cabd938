//! Incus's own VMs, where this run has them: in an outer guest that `cargo xtask test --vm full` boots, whose Incus has a real
//! vhost-vsock and a real incus-agent. Everything in there is slow, and the tests are as patient. They start one VM after the
//! other: with two at once, Incus was seen to fail a start that took half a minute.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::incus::Incus;
use crate::run::{Finished, Running};
use crate::spec::Spec;
use crate::stage::Stage;

/// What is in a VM beside pika-cloud's own agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmKind {
    /// Nothing: Incus can exec nothing in it, and vsock is the only way.
    Bare,
    /// incus-agent.
    WithIncusAgent,
    /// incus-agent, and nobody listens on vsock: exec is the only way.
    Deaf,
    /// A stock Debian's systemd, and incus-agent, on a root disk.
    Debian,
}

impl VmKind {
    fn profiles(self) -> &'static [&'static str] {
        match self {
            Self::Bare => &[],
            Self::WithIncusAgent => &["incus-agent"],
            Self::Deaf => &["incus-agent", "deaf"],
            Self::Debian => &["debian"],
        }
    }
}

/// The Incus of this run, which has VMs.
#[derive(Clone, Copy, Debug)]
pub struct IncusVms;

impl IncusVms {
    /// `None`, with the reason printed, where this run has none.
    pub fn get() -> Option<Self> {
        if std::env::var_os("PIKA_TEST_VM_FULL").is_some() {
            return Some(Self);
        }
        println!(
            "skipped: this machine's Incus has no VMs; `cargo xtask test --vm full` boots a guest whose Incus has them"
        );
        None
    }

    /// A spec of a VM that runs `command`.
    pub fn spec(self, stage: &Stage, kind: VmKind, command: &str) -> Spec {
        let incus = json!({
            "image_alias": "pika-vm", "instance_type": "virtual_machine", "secureboot": false, "csm": true,
            "extra_profiles": kind.profiles(),
        });
        let watchdogs = json!({ "boot_secs": 600, "silence_secs": 60, "stop_grace_secs": 10, "collect_secs": 120 });
        let resources = json!({ "vcpu_count": 1, "memory_mib": 256, "root_disk_gib": 1 });
        stage.spec(command).with("incus", incus).with("watchdogs", watchdogs).with("resources", resources)
    }

    /// Imports a stock Debian for VMs, which has no agent of pika-cloud. For one test.
    pub fn import_debian(self) -> &'static str {
        const ALIAS: &str = "debian-vm";
        let mut import = Incus.client(&["image", "import", "vm/debian-metadata.tar.gz", "vm/debian.qcow2"]);
        let imported = import.args(["--quiet", "--alias", ALIAS]).status().expect("the incus command runs");
        assert!(imported.success(), "import the Debian: {imported}");
        ALIAS
    }

    /// Begins to run a spec.
    pub fn start<'a>(self, stage: &'a Stage, spec: &'a Spec) -> VmJob<'a> {
        VmJob { running: stage.start(spec), stage, spec }
    }

    /// The context id that Incus has for a VM.
    pub fn cid(self, spec: &Spec) -> u32 {
        let instance = Incus.instance(&spec.instance).expect("the VM is there");
        let cid = instance["config"]["volatile.vsock_id"].as_str().expect("a VM that was started has a context id");
        cid.parse().expect("a context id is a number")
    }

    /// Gives a stopped VM another context id for its next start.
    pub fn set_cid(self, spec: &Spec, cid: u32) {
        let body = json!({ "config": { "volatile.vsock_id": cid.to_string() } });
        Incus.change("PATCH", &format!("/1.0/instances/{}", spec.instance), Some(&body)).expect("the id is changed");
    }

    /// Has Incus do something with a VM, at once.
    pub fn act(self, spec: &Spec, action: &str) {
        let body = json!({ "action": action, "force": true, "timeout": 60 });
        Incus.change("PUT", &format!("/1.0/instances/{}/state", spec.instance), Some(&body)).expect("Incus does it");
    }

    /// Deletes a VM at once, whatever it does.
    pub fn delete(self, spec: &Spec) {
        let deleted = Incus.client(&["delete", "-f", &spec.instance]).status().expect("the incus command runs");
        assert!(deleted.success(), "`incus delete -f {}`: {deleted}", spec.instance);
    }
}

/// A `pika-cloud run` of a VM. Dropping it kills `pika-cloud`.
#[derive(Debug)]
pub struct VmJob<'a> {
    /// The process.
    pub running: Running,
    stage: &'a Stage,
    spec: &'a Spec,
}

impl VmJob<'_> {
    /// Far beyond what a boot takes in there: only a hang reaches it.
    const PATIENCE: Duration = Duration::from_secs(600);
    /// Between two looks: in there, looking costs the VMs their time.
    const LOOK: Duration = Duration::from_secs(1);

    /// Waits until `is`; fails where it has ended before.
    pub fn wait(&mut self, what: &str, mut is: impl FnMut(&Running) -> bool) {
        let began = Instant::now();
        loop {
            let runs = self.running.is_running();
            if is(&self.running) {
                return;
            }
            let lines = || self.stage.journal(self.spec).lines.join("\n");
            assert!(runs, "{} ended before {what}: {}\n{}", self.spec.id, self.running.said(), lines());
            assert!(began.elapsed() < Self::PATIENCE, "{}: not in time: {what}\n{}", self.spec.id, lines());
            std::thread::sleep(Self::LOOK);
        }
    }

    /// Waits for a record of the journal for which `is` holds.
    pub fn wait_record(&mut self, what: &str, is: impl Fn(&Value) -> bool) {
        let (stage, spec) = (self.stage, self.spec);
        self.wait(what, |_| stage.journal(spec).records.iter().any(&is));
    }

    /// Waits until the workload of an incarnation says that it is ready.
    pub fn wait_ready(&mut self, incarnation: u32) {
        let is_ready = |record: &Value| record["inc"] == incarnation && record["guest"]["kind"] == "ready";
        self.wait_record(&format!("incarnation {incarnation} is ready"), is_ready);
    }

    /// Waits for its end, and prints what it said.
    pub fn finish(self) -> Finished {
        let done = self.running.finish_within(Self::PATIENCE);
        println!("{}{}: after {:.0} s", done.stderr, self.spec.id, done.took.as_secs_f64());
        done
    }
}
