//! The host's own agent, put into a guest by exec: its bytes go over standard input, never through the Incus file API, which
//! a FIFO at the path would hang.
//!
//! ```text
//!   /bin/sh -c SCRIPT ◄── bytes ── a new file in a folder of root's ─ size, mode ─► renamed to PATH
//!   PATH version --json ──────────────────────────────────────────────────────────► the digest that was sent?
//! ```
//!
//! A cut at any point leaves PATH as it was, and at most one file beside it, which the next put removes: what is at PATH is
//! whole, as far as the guest's own kernel keeps a rename whole, and what runs from there says by its digest what it is. The
//! guest can spoil all of that, and with it its own runtime only: what it says is bounded, and how long it may take.

use std::time::Duration;

use pika_cloud_common::digest::Digest;
use serde::Deserialize;

use super::exec::{Ran, RunError, is_absent, run};
use crate::agent_binary::AgentBinary;
use crate::incus::{Client, Error};
use crate::words::{is_word, one_line};

/// How long a guest may take to store the agent: less than two MiB.
const PUT_TIMEOUT: Duration = Duration::from_secs(30);

/// How often an agent is asked again that succeeds and says nothing: its answer was seen to get lost on its way through Incus.
const ASKED_AGAIN: u32 = 2;

/// How long an agent may take to say its version.
const VERSION_TIMEOUT: Duration = Duration::from_secs(10);

/// What an agent may say its release or its digest is, in ASCII.
const MAX_WORD_BYTES: usize = 80;

/// Puts standard input at `$1`, of `$2` bytes, where nobody but root can change it. Every command is one that busybox has as
/// well. NixOS has no others in Incus's own `PATH`. The shell itself tells which file it could not make, and why. Where nothing
/// may be run, nothing is left.
const SCRIPT: &str = concat!(include_str!("scripts/roots.sh"), include_str!("scripts/put.sh"));

/// What an agent says of itself, with `pika-guest version --json`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub(crate) struct AgentVersion {
    /// Its release: the guest's word, which is shown to people.
    #[serde(deserialize_with = "word")]
    pub(crate) agent: String,
    /// The session protocol that it speaks.
    pub(crate) protocol: u32,
    /// The version of the documents that it writes.
    pub(crate) schema_version: u32,
    /// SHA-256 over its own bytes, behind `sha256:`; shown as well.
    #[serde(deserialize_with = "word")]
    digest: String,
}

/// A few printable characters: nothing that a terminal takes for more than that.
fn word<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    if is_word(&text, MAX_WORD_BYTES) {
        return Ok(text);
    }
    Err(serde::de::Error::custom(format!(
        "a release or digest of more than {MAX_WORD_BYTES} characters, or of unprintable ones"
    )))
}

impl AgentVersion {
    /// SHA-256 over its own bytes, where it says one.
    pub(crate) fn digest(&self) -> Option<Digest> {
        self.digest.strip_prefix("sha256:")?.parse().ok()
    }
}

/// The agent could not be put into a guest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PutError {
    /// Incus cannot run anything in it.
    #[error("nothing can be run in `{instance}`: {source}")]
    Incus {
        /// The instance.
        instance: String,
        /// What Incus answered.
        source: Error,
    },
    /// There is no shell that could take it.
    #[error("`{instance}` has no /bin/sh to put pika-guest in with (exit code {code})")]
    NoShell {
        /// The instance.
        instance: String,
        /// exec's.
        code: i64,
    },
    /// The guest could not store it.
    #[error("`{instance}` could not store pika-guest at {path}{}: {said}", code.map(|code| format!(" (exit code {code})")).unwrap_or_default())]
    NotStored {
        /// The instance.
        instance: String,
        /// Where to.
        path: String,
        /// The shell's, where it is known.
        code: Option<i64>,
        /// What it said.
        said: String,
    },
    /// The guest went beyond what it is allowed.
    #[error("`{instance}`: {what}: {problem}")]
    Unbounded {
        /// The instance.
        instance: String,
        /// What was run.
        what: String,
        /// What it did.
        problem: String,
    },
    /// What is there does not run, or does not answer what every agent answers.
    #[error("{path} does not run in `{instance}`{}: {said}", code.map(|code| format!(" (exit code {code})")).unwrap_or_default())]
    NotRunning {
        /// The instance.
        instance: String,
        /// Where it is.
        path: String,
        /// Its exit code, where it is known.
        code: Option<i64>,
        /// What it said.
        said: String,
    },
    /// What runs there is another program.
    #[error("{path} in `{instance}` is not the pika-guest that was put there: its digest is {found}, and not {wanted}")]
    Another {
        /// The instance.
        instance: String,
        /// Where it is.
        path: String,
        /// The digest of what runs there.
        found: String,
        /// The digest of what was sent.
        wanted: Digest,
    },
}

impl PutError {
    /// Whether nothing in the guest, and no other time, can help.
    pub(crate) fn is_final(&self) -> bool {
        matches!(self, Self::NoShell { .. })
    }

    /// Whether another place in the same guest may do.
    pub(crate) fn is_of_the_place(&self) -> bool {
        matches!(self, Self::NotStored { .. } | Self::NotRunning { .. } | Self::Another { .. })
    }

    fn of(instance: &str, what: String, error: RunError) -> Self {
        let instance = instance.to_owned();
        match error {
            RunError::Incus(source) => Self::Incus { instance, source },
            problem @ (RunError::TimedOut(_) | RunError::TooMuch) => {
                Self::Unbounded { instance, what, problem: problem.to_string() }
            }
        }
    }
}

/// Puts the host's agent at `path`, in a folder of root's own that is made where it is not there, and has it say there what it
/// is. Whatever file was at `path` is replaced, all at once or not at all.
///
/// # Errors
/// Where the guest could not store it, or what runs there then is not what was sent.
pub(crate) async fn put_agent(
    client: &Client,
    project: &str,
    instance: &str,
    agent: &AgentBinary,
    path: &str,
) -> Result<AgentVersion, PutError> {
    let size = agent.bytes.len().to_string();
    let command = ["/bin/sh", "-c", SCRIPT, "pika-cloud", path, &size];
    let put = run(client, (project, instance), &command, &agent.bytes[..], PUT_TIMEOUT).await;
    let ran = put.map_err(|error| PutError::of(instance, format!("putting pika-guest at {path}"), error))?;
    match ran.code {
        Some(0) => {}
        Some(code) if is_absent(code) => return Err(PutError::NoShell { instance: instance.to_owned(), code }),
        code => {
            let (instance, path) = (instance.to_owned(), path.to_owned());
            return Err(PutError::NotStored { instance, path, code, said: shown(&ran) });
        }
    }
    let version = agent_version(client, project, instance, path).await?;
    if version.digest() == Some(agent.digest) {
        return Ok(version);
    }
    let (instance, path) = (instance.to_owned(), path.to_owned());
    Err(PutError::Another { instance, path, found: version.digest, wanted: agent.digest })
}

/// What the agent at `path` says of itself.
///
/// # Errors
/// Where it does not run, or does not say that.
pub(crate) async fn agent_version(
    client: &Client,
    project: &str,
    instance: &str,
    path: &str,
) -> Result<AgentVersion, PutError> {
    let command = [path, "version", "--json"];
    let ask = || run(client, (project, instance), &command, &[][..], VERSION_TIMEOUT);
    let failed = |error| PutError::of(instance, format!("`{path} version --json`"), error);
    let mut ran = ask().await.map_err(failed)?;
    for _ in 0..ASKED_AGAIN {
        if ran.code == Some(0) && ran.output.is_empty() {
            ran = ask().await.map_err(failed)?;
        }
    }
    let answer = serde_json::from_slice(&ran.output).ok().filter(|_| ran.code == Some(0));
    answer.ok_or_else(|| PutError::NotRunning {
        instance: instance.to_owned(),
        path: path.to_owned(),
        code: ran.code,
        said: shown(&ran),
    })
}

/// What a person is shown of a guest's words: no control characters, and not many.
pub(crate) fn shown(ran: &Ran) -> String {
    let said = if ran.errors.is_empty() { String::from_utf8_lossy(&ran.output) } else { ran.errors.as_str().into() };
    let shown = one_line(&said);
    if shown.is_empty() { "it said nothing".to_owned() } else { shown }
}

#[cfg(test)]
mod tests;
