//! Where programs, daemon and scratch are.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use tempfile::TempDir;

use crate::incus::Incus;

/// The image with the agent in it.
pub(crate) const IMAGE: &str = "pika-test";

/// What is measured, and where.
pub(crate) struct Setting {
    /// The static `pika-guest`.
    pub(crate) agent: PathBuf,
    /// `pika-cloud`.
    pub(crate) cloud: PathBuf,
    /// An empty static program.
    pub(crate) empty: PathBuf,
    /// The daemon.
    pub(crate) incus: Incus,
    disk: TempDir,
    memory: TempDir,
    prefix: String,
}

impl Setting {
    /// From what `cargo xtask bench` sets.
    pub(crate) fn from_environment() -> anyhow::Result<Self> {
        let incus_dir = variable("PIKA_TEST_INCUS_DIR")?;
        let beside = incus_dir.parent().context("PIKA_TEST_INCUS_DIR is a root")?;
        let scratch = |folder: &Path| {
            let made = tempfile::Builder::new().prefix("pika-bench-").tempdir_in(folder);
            made.with_context(|| format!("making a folder in {}", folder.display()))
        };
        Ok(Self {
            agent: variable("PIKA_TEST_AGENT")?,
            cloud: variable("PIKA_TEST_CLOUD")?,
            empty: variable("PIKA_BENCH_EMPTY")?,
            incus: Incus::new(variable("PIKA_TEST_INCUS_SOCKET")?),
            disk: scratch(beside)?,
            memory: scratch(Path::new("/dev/shm"))?,
            prefix: format!("pika-bench-{}-", std::process::id()),
        })
    }

    /// A folder on the disk that the daemon's own is on.
    pub(crate) fn disk(&self) -> &Path {
        self.disk.path()
    }

    /// A folder in memory, as a guest's `/run` is.
    pub(crate) fn memory(&self) -> &Path {
        self.memory.path()
    }

    /// How the names of this run's instances begin.
    pub(crate) fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The spec of a container job.
    pub(crate) fn spec(&self, name: &str, command: &str) -> serde_json::Value {
        let name = format!("{}{name}", self.prefix);
        serde_json::json!({
            "identity": { "runtime_id": name, "instance_name": name },
            "incus": { "image_alias": IMAGE, "instance_type": "container" },
            "entry_command": command,
        })
    }
}

fn variable(name: &str) -> anyhow::Result<PathBuf> {
    let value = std::env::var_os(name).filter(|value: &OsString| !value.is_empty());
    value.map(PathBuf::from).with_context(|| format!("{name} is not set: run it by `cargo xtask bench`"))
}

/// Says what goes on.
pub(crate) fn progress(text: &str) {
    eprintln!("bench: {text}");
}
