//! The host's own agent in a guest: where it lies there, how it gets there, and how it is dialled.
//!
//! ```text
//!   placed   exec of a shell that runs the first that is there ──► session, or 127: it is to be put in
//!   put      put_agent at one place after the other ──► exec of it ──► session
//! ```
//!
//! It lies in folders of root's own, which no workload controls unless it is root itself, under a name that its digest makes: a
//! collector of another release has a place of its own, and nothing of the image is replaced. `/var` may be read-only, and
//! `/run` may forbid to run anything, so there are several. It is stored once for the life of an instance; each session
//! after that is one exec.

use std::time::Duration;

use pika_cloud_common::digest::Digest;

use super::exec::{Exec, StreamOf};
use super::put::{PutError, put_agent};
use crate::agent_binary::{AgentBinary, AgentError, AgentSource};
use crate::driver::Link;
use crate::incus::{Client, Error, InstanceView};
use crate::machine::SessionLoss;
use crate::runtime::Agent;

/// Folders to put it in, the best first. All of them can be entered by everybody, so that workloads find `pika-guest ready`.
const FOLDERS: [&str; 3] = ["/var/lib/pika-cloud-agent", "/opt/pika-cloud-agent", "/run/pika-cloud-agent"];

/// Digits of the digest that tell agents apart.
const NAME_DIGITS: usize = 16;

/// Runs the first of its arguments that is there, which is whole: an agent is put there by a rename, once it was seen to run.
const RUN_PLACED: &str = r#"for place; do [ -x "$place" ] && exec "$place" stream; done; exit 127"#;

/// How long all of it may take, each place tried.
pub(crate) const PUT_DIAL_TIMEOUT: Duration = Duration::from_secs(60);

/// Where an agent may lie.
fn places(digest: Digest) -> [String; FOLDERS.len()] {
    let digest = digest.to_string();
    FOLDERS.map(|folder| format!("{folder}/{}/pika-guest", &digest[..NAME_DIGITS]))
}

/// Why the host's agent cannot be dialled.
#[derive(Debug, thiserror::Error)]
enum OwnError {
    /// Incus does not run anything there.
    #[error("{0}")]
    Incus(#[from] Error),
    /// Incus does not run anything in a machine.
    #[error(
        "{0}: the host's own pika-guest gets into a virtual machine through incus exec, which needs incus-agent in its image"
    )]
    Machine(Error),
    /// It went away.
    #[error("the instance is gone")]
    Gone,
    /// The host has none.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The guest did not take it.
    #[error(transparent)]
    Put(#[from] PutError),
}

impl From<OwnError> for SessionLoss {
    fn from(error: OwnError) -> Self {
        let message = error.to_string();
        match error {
            OwnError::Agent(_) => Self::NoAgent(message),
            OwnError::Put(error) if error.is_final() => Self::NoAgent(message),
            OwnError::Put(_) => Self::NotPut(message),
            OwnError::Incus(_) | OwnError::Machine(_) | OwnError::Gone => Self::Lost(message),
        }
    }
}

/// Opens a stream to the host's own agent in an instance that runs, which is put in first for [`Agent::Put`].
///
/// # Errors
/// [`SessionLoss::NoAgent`] where the host has none that can be used there, [`SessionLoss::NotPut`] where the guest did not take
/// it. That it does not lie there shows only when its stream ends.
pub(crate) async fn dial_own(
    client: &Client,
    (project, instance): (&str, &str),
    source: &AgentSource,
    agent: Agent,
) -> Result<Link, SessionLoss> {
    Ok(dial(client, (project, instance), source, agent == Agent::Put).await?)
}

async fn dial(
    client: &Client,
    (project, instance): (&str, &str),
    source: &AgentSource,
    is_put: bool,
) -> Result<Link, OwnError> {
    let view = client.instance(project, instance).await?.ok_or(OwnError::Gone)?;
    let agent = source.fetch(&view.architecture).await?;
    let places = places(agent.digest);
    let exec = if is_put {
        let place = put(client, project, &view, &agent, &places).await?;
        Exec::start(client, project, instance, &[place, "stream"]).await
    } else {
        let mut command = vec!["/bin/sh", "-c", RUN_PLACED, "pika-cloud"];
        command.extend(places.iter().map(String::as_str));
        Exec::start(client, project, instance, &command).await
    };
    Ok(exec.map_err(|error| of_exec(&view, error))?.into_link(StreamOf::Host))
}

/// Stores it at the first place that takes it.
async fn put<'a>(
    client: &Client,
    project: &str,
    view: &InstanceView,
    agent: &AgentBinary,
    places: &'a [String],
) -> Result<&'a str, OwnError> {
    let mut refused = None;
    for place in places {
        match put_agent(client, project, &view.name, agent, place).await {
            Ok(version) => {
                tracing::info!("pika-guest {} was put into `{}` at {place}", version.agent, view.name);
                return Ok(place);
            }
            Err(PutError::Incus { source, .. }) => return Err(of_exec(view, source)),
            Err(error) if !error.is_of_the_place() => return Err(error.into()),
            // The first place is the one that is meant; why the others did not do either is in the log.
            Err(error) => {
                tracing::debug!("{error}");
                refused.get_or_insert(error);
            }
        }
    }
    // There is a first place, and it was refused.
    Err(refused.map_or(OwnError::Gone, OwnError::Put))
}

fn of_exec(view: &InstanceView, error: Error) -> OwnError {
    if view.kind == "virtual-machine" { OwnError::Machine(error) } else { OwnError::Incus(error) }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::Path;
    use std::process::Command;

    use super::*;

    #[test]
    fn each_agent_has_a_place_of_its_own() {
        let digest = Digest::of(b"agent");
        let places = places(digest);
        assert_eq!(places[0], format!("/var/lib/pika-cloud-agent/{}/pika-guest", &digest.to_string()[..16]));
        assert_ne!(places, super::places(Digest::of(b"another")));
    }

    fn run_placed(places: &[&Path]) -> (Option<i32>, String) {
        let output = Command::new("/bin/sh").args(["-c", RUN_PLACED, "pika-cloud"]).args(places).output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    }

    /// In the form that exec gives to a program that is not there, so that it is told the same way.
    #[test]
    fn what_was_placed_is_run_and_what_was_not_is_absent() {
        let folder = tempfile::tempdir().unwrap();
        let (absent, second) = (folder.path().join("first"), folder.path().join("second"));
        assert_eq!(run_placed(&[&absent, &second]), (Some(127), String::new()));
        fs::write(&second, "#!/bin/sh\necho \"$0 $1\"\nexit 7\n").unwrap();
        fs::set_permissions(&second, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(run_placed(&[&absent, &second]), (Some(7), format!("{} stream\n", second.display())));
    }

    #[test]
    fn what_only_the_host_can_mend_is_told_from_what_time_may() {
        let (path, origin) = ("/agent".into(), crate::agent_binary::Origin::Beside);
        let agent = AgentError::Absent { path, origin };
        assert!(matches!(SessionLoss::from(OwnError::Agent(agent)), SessionLoss::NoAgent(_)));
        let shell = PutError::NoShell { instance: "a".to_owned(), code: 127 };
        assert!(matches!(SessionLoss::from(OwnError::Put(shell)), SessionLoss::NoAgent(_)));
        let full = PutError::NotStored { instance: "a".into(), path: "/p".into(), code: Some(1), said: "full".into() };
        assert!(matches!(SessionLoss::from(OwnError::Put(full)), SessionLoss::NotPut(_)));
        let down = Error::NoAnswer { request: "exec".to_owned(), after: Duration::from_secs(1) };
        let lost = SessionLoss::from(OwnError::Machine(down));
        assert!(matches!(&lost, SessionLoss::Lost(message) if message.contains("incus-agent")), "{lost:?}");
    }
}
