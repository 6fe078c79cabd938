//! The host's own copy of the agent: what is put into a guest that has none, or has lost its own.
//!
//! ```text
//!   --agent, Config.agent  ─┐
//!   PIKA_GUEST_AGENT       ─┼─► PATH-ARCH, where there is one ─► read, checked ─► AgentBinary {bytes, digest, machine}
//!   beside this executable ─┘   else PATH                        static ELF, of the instance's architecture
//! ```
//!
//! It goes into an image of whatever kind, so that it must need nothing there: no loader, no library. One of another
//! architecture would only fail in the guest, with words that help nobody; that is told here, before anything is sent.
//!
//! What was read is kept for as long as the file stays as it was, so that ten thousand runtimes share one copy.

mod elf;

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use pika_cloud_common::digest::Digest;

pub use elf::ElfError;
use elf::Program;

/// Names the file where neither an option nor [`Config`](crate::Config) does.
pub const AGENT_VARIABLE: &str = "PIKA_GUEST_AGENT";

/// The file beside the running executable.
const BESIDE: &str = "pika-guest";

/// A larger file is no agent. Ours has less than two MiB.
const MAX_AGENT_BYTES: u64 = 64 * 1024 * 1024;

/// The host has no agent of its own that can be used.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// There is no such file.
    #[error("the host has no pika-guest of its own at {} ({origin}): {WAY_OUT}", path.display())]
    Absent {
        /// Where it was looked for.
        path: PathBuf,
        /// Who named that path.
        origin: Origin,
    },
    /// The file cannot be read.
    #[error("the host's own pika-guest at {} ({origin}) cannot be read: {problem}: {WAY_OUT}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Who named it.
        origin: Origin,
        /// What the kernel says, or what it is instead of a file.
        problem: String,
    },
    /// The file is no static program.
    #[error("{} ({origin}) cannot be put into a guest: {problem}: {WAY_OUT}", path.display())]
    NotStatic {
        /// The file.
        path: PathBuf,
        /// Who named it.
        origin: Origin,
        /// What it is.
        problem: ElfError,
    },
    /// The file is for machines of another kind.
    #[error(
        "the host's own pika-guest at {} ({origin}) is for {found}, and the instance is {wanted}: put one for {wanted} beside \
         it, as {}-{wanted}, or name another one with --agent", path.display(), path.display()
    )]
    Architecture {
        /// The file.
        path: PathBuf,
        /// Who named it.
        origin: Origin,
        /// The architecture that it is for.
        found: String,
        /// The instance's, by Incus's word.
        wanted: String,
    },
}

/// The same for all: the static agent has to be there.
const WAY_OUT: &str = "name a static one (`cargo xtask agent` builds it) with --agent PATH or PIKA_GUEST_AGENT, or put it \
                       beside the running program, as pika-guest";

/// Who named the path of the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Origin {
    /// An option of the command line, or [`Config::agent`](crate::Config::agent).
    Given,
    /// The environment.
    Variable,
    /// Nobody: it is looked for beside the running executable.
    Beside,
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Given => "named with --agent",
            Self::Variable => "named by PIKA_GUEST_AGENT",
            Self::Beside => "beside the running program",
        })
    }
}

/// A static agent, as it is put into a guest.
#[derive(Clone, Debug)]
pub struct AgentBinary {
    /// Where it was read.
    pub path: PathBuf,
    /// All of it. Clones share them.
    pub bytes: Bytes,
    /// SHA-256 over them, which the agent says of itself (`pika-guest version --json`).
    pub digest: Digest,
    /// What it runs on, by Incus's name for it, such as `x86_64`.
    pub architecture: &'static str,
}

/// Where the host's own agent is looked for. Cheap to clone; clones share what was read.
#[derive(Clone, Debug)]
pub struct AgentSource {
    path: PathBuf,
    origin: Origin,
    read: Arc<Mutex<BTreeMap<PathBuf, (Stamp, AgentBinary)>>>,
}

/// What tells that a file is the one that was read. One that was replaced differs in its inode, at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    changed_secs: i64,
    changed_nanos: i64,
}

impl Stamp {
    fn of(data: &Metadata) -> Self {
        let (changed_secs, changed_nanos) = (data.ctime(), data.ctime_nsec());
        Self { device: data.dev(), inode: data.ino(), size: data.size(), changed_secs, changed_nanos }
    }
}

impl AgentSource {
    /// At a given path, else where `PIKA_GUEST_AGENT` says, else beside the running executable. Nothing is read yet.
    pub fn find(given: Option<&Path>) -> Self {
        let variable = std::env::var_os(AGENT_VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from);
        Self::choose(given, variable, std::env::current_exe().ok().as_deref())
    }

    fn choose(given: Option<&Path>, variable: Option<PathBuf>, executable: Option<&Path>) -> Self {
        let (path, origin) = match (given, variable) {
            (Some(given), _) => (given.to_owned(), Origin::Given),
            (None, Some(named)) => (named, Origin::Variable),
            (None, None) => {
                let folder = executable.and_then(Path::parent).unwrap_or_else(|| Path::new("/usr/bin"));
                (folder.join(BESIDE), Origin::Beside)
            }
        };
        Self { path, origin, read: Arc::default() }
    }

    /// The path that it was given or found; `PATH-ARCH` beside it comes first.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The agent for an instance, whose architecture is given as Incus says it. Reads a file: it may take milliseconds.
    ///
    /// # Errors
    /// Where there is none for that architecture, or what is there is no static program.
    pub fn load(&self, architecture: &str) -> Result<AgentBinary, AgentError> {
        let mut special = self.path.clone().into_os_string();
        special.push("-");
        special.push(architecture);
        let special = PathBuf::from(special);
        let is_plain = !architecture.is_empty() && !architecture.contains('/');
        let path = if is_plain && special.exists() { special } else { self.path.clone() };
        let agent = self.read(&path)?;
        if agent.architecture == architecture {
            return Ok(agent);
        }
        let (origin, found, wanted) = (self.origin, agent.architecture.to_owned(), architecture.to_owned());
        Err(AgentError::Architecture { path: self.path.clone(), origin, found, wanted })
    }

    /// As [`AgentSource::load`], beside everything else.
    pub(crate) async fn fetch(&self, architecture: &str) -> Result<AgentBinary, AgentError> {
        let (source, wanted) = (self.clone(), architecture.to_owned());
        let load = tokio::task::spawn_blocking(move || source.load(&wanted)).await;
        load.unwrap_or_else(|panic| {
            let (path, origin) = (self.path.clone(), self.origin);
            Err(AgentError::Unreadable { path, origin, problem: panic.to_string() })
        })
    }

    fn read(&self, path: &Path) -> Result<AgentBinary, AgentError> {
        let (origin, owned) = (self.origin, path.to_owned());
        let unreadable = |error: std::io::Error| match error.kind() {
            std::io::ErrorKind::NotFound => AgentError::Absent { path: owned.clone(), origin },
            _ => AgentError::Unreadable { path: owned.clone(), origin, problem: error.to_string() },
        };
        // What is no file is not opened: a FIFO would hold us up.
        let data = std::fs::metadata(path).map_err(unreadable)?;
        let stamp = Stamp::of(&data);
        if let Some((known, agent)) = self.read.lock().unwrap_or_else(PoisonError::into_inner).get(path)
            && *known == stamp
        {
            return Ok(agent.clone());
        }
        if !data.is_file() || data.len() > MAX_AGENT_BYTES {
            let problem = if data.is_file() { "it is far larger than any agent" } else { "it is no file" };
            return Err(AgentError::Unreadable { path: path.to_owned(), origin, problem: problem.to_owned() });
        }
        let mut bytes = Vec::new();
        let file = std::fs::File::open(path).map_err(unreadable)?;
        file.take(MAX_AGENT_BYTES).read_to_end(&mut bytes).map_err(unreadable)?;
        let not_static = |problem| AgentError::NotStatic { path: path.to_owned(), origin, problem };
        let program = Program::read(&bytes).and_then(Program::check).map_err(not_static)?;
        let digest = Digest::of(&bytes);
        let architecture = program.architecture;
        let agent = AgentBinary { path: path.to_owned(), bytes: bytes.into(), digest, architecture };
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        read.insert(path.to_owned(), (stamp, agent.clone()));
        Ok(agent)
    }
}

#[cfg(test)]
mod tests;
