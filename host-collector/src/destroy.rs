//! Destroying an instance, and only one of ours.

use crate::driver::{claim, failure};
use crate::incus::{Client, Error, InstanceState, InstanceView, Work};
use crate::machine::{CallFailure, Destroyed};
use crate::runtime::Claim;

/// Invariants 4 and 6: stops and deletes the instance of a runtime. One that is gone already is fine, one that a person gave
/// another name is found by its labels, one that is not ours is not touched, and one that another collector took over is told.
pub(crate) async fn destroy(
    client: &Client,
    project: &str,
    name: &str,
    ours: &Claim,
) -> Result<Destroyed, CallFailure> {
    if let Some(destroyed) = destroy_named(client, project, name, ours).await? {
        return Ok(destroyed);
    }
    let all = client.instances(project).await.map_err(|error| failure(&error))?;
    // Ours before one that another collector took over.
    let renamed = all.iter().filter(|view| whose(view, ours) != Whose::Nobodys);
    match renamed.max_by_key(|view| whose(view, ours) == Whose::Ours) {
        Some(renamed) => Ok(destroy_named(client, project, &renamed.name, ours).await?.unwrap_or(Destroyed::Gone)),
        // Nobody heard the answer to its create: what is made behind our back would be left.
        None if client.is_at(Work::Creating, project, name).await.map_err(|error| failure(&error))? => {
            let message = format!("Incus is still creating the instance `{name}`, which cannot be destroyed before");
            Err(CallFailure { transient: true, message })
        }
        None => Ok(Destroyed::Gone),
    }
}

/// The same, of an instance of that very name; `None` where there is none of ours.
///
/// Incus ignores conditions on state changes and deletes, so the labels are read right before each of them.
pub(crate) async fn destroy_named(
    client: &Client,
    project: &str,
    name: &str,
    ours: &Claim,
) -> Result<Option<Destroyed>, CallFailure> {
    let read = || async { client.instance(project, name).await.map_err(|error| failure(&error)) };
    let Some(instance) = read().await? else { return Ok(None) };
    match whose(&instance, ours) {
        Whose::Ours => {}
        Whose::Nobodys => return Ok(None),
        Whose::Others(holder) => return Ok(Some(holder)),
    }
    if instance.state() != InstanceState::Stopped {
        match client.stop_instance(project, name).await {
            // Whether it stopped by itself meanwhile shows at the delete, which refuses a running one.
            Err(Error::Refused { .. } | Error::OperationFailed { .. } | Error::OperationLost { .. }) | Ok(()) => {}
            Err(error) => return Err(failure(&error)),
        }
        match read().await?.map(|instance| whose(&instance, ours)) {
            Some(Whose::Ours) => {}
            Some(Whose::Others(holder)) => return Ok(Some(holder)),
            Some(Whose::Nobodys) | None => return Ok(Some(Destroyed::Gone)),
        }
    }
    match client.delete_instance(project, name).await {
        Ok(()) => Ok(Some(Destroyed::Gone)),
        Err(error) if error.is_not_found() => Ok(Some(Destroyed::Gone)),
        // The outcome is read from the resource, by the next try.
        Err(error) => Err(CallFailure { transient: true, message: error.to_string() }),
    }
}

/// Whose an instance is, as seen from a runtime.
#[derive(Debug, PartialEq, Eq)]
enum Whose {
    Ours,
    /// Of this runtime, taken over by another collector.
    Others(Destroyed),
    /// Of something else, whatever that is.
    Nobodys,
}

fn whose(instance: &InstanceView, ours: &Claim) -> Whose {
    match claim(instance) {
        Some(claim) if claim.runtime_id != ours.runtime_id => Whose::Nobodys,
        Some(claim) if claim.owner == ours.owner => Whose::Ours,
        Some(claim) if claim.term > ours.term => {
            Whose::Others(Destroyed::TakenOver { owner: claim.owner, term: claim.term })
        }
        Some(_) | None => Whose::Nobodys,
    }
}
