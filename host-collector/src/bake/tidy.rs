//! Removing what a bake made, however it ended: the same for one that succeeded, failed, was interrupted, or died.
//!
//! ```text
//!   look at Incus ─► plan (pure) ─┬─► remove ──► look again
//!                                 ├─► wait ────► look again, up to a limit
//!                                 └─► nothing more: the record goes, unless something is kept
//! ```

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::record::{Held, Record};
use super::{PROPERTY_BAKE, is_baked_by};
use crate::incus::{BuilderLabels, Client, Error, Image, InstanceState, InstanceView, backoff, jitter};
use crate::state_dir::StateDirError;

/// Between two looks at what Incus is still doing.
const LOOK: Duration = Duration::from_millis(250);

/// How long an image stays that lost its alias: a call that had looked the alias up before needs it until its instance is listed.
/// On a machine with five times the load that it can bear, that was seen to take seconds.
const GRACE: Duration = Duration::from_secs(5);

/// How often something is tried that Incus is too busy for.
const TRIES: u32 = 8;

/// What there is of a bake's builder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Builder {
    /// None, or an instance of that name which is another's.
    Absent,
    /// It is there.
    Ours,
    /// Incus is still making it.
    Coming,
}

/// An image that the bake made or replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    fingerprint: String,
    /// Of this very bake.
    is_own: bool,
    /// Baked from this state dir.
    is_ours: bool,
    /// Whether it has a name, or is there for everybody.
    is_named: bool,
    /// Instances that were made from it.
    users: Vec<String>,
}

/// What Incus has and does.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Found {
    builder: Builder,
    /// An image may be under way.
    publishing: bool,
    /// An instance is being made, or is about to be, that Incus does not list yet, maybe from an image that is to go.
    creating: bool,
    images: Vec<Seen>,
}

/// What is to be done next.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    EndBuilder,
    DeleteImage(String),
    Wait(&'static str),
    Keep { fingerprint: String, why: String },
}

/// Pure. Waits come with nothing else that depends on what is waited for.
fn plan(record: &Record, found: &Found) -> Vec<Step> {
    let mut steps = Vec::new();
    match found.builder {
        Builder::Ours => steps.push(Step::EndBuilder),
        Builder::Coming => steps.push(Step::Wait("Incus is still making its builder")),
        Builder::Absent => {}
    }
    let publishing = record.publishing && found.publishing;
    if publishing {
        steps.push(Step::Wait("Incus is still publishing an image, maybe its own"));
    }
    for image in &found.images {
        steps.extend(match image {
            // Whoever named it wants it; of another state dir, it is that one's to remove.
            Seen { is_named: true, .. } | Seen { is_ours: false, .. } => None,
            Seen { is_own: true, .. } if publishing || record.swapped => None,
            Seen { is_own: true, .. } => Some(Step::DeleteImage(image.fingerprint.clone())),
            Seen { users, .. } if !users.is_empty() => Some(Step::Keep {
                fingerprint: image.fingerprint.clone(),
                why: format!("instances were made from it: {}", users.join(", ")),
            }),
            // Deleted now, the instance could not be made.
            Seen { .. } if found.creating => {
                Some(Step::Wait("Incus may be making an instance from the image that was replaced"))
            }
            Seen { .. } => Some(Step::DeleteImage(image.fingerprint.clone())),
        });
    }
    steps
}

/// How far tidying came.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tidied {
    /// Images that were deleted.
    pub(crate) deleted: Vec<String>,
    /// What is kept for now, and why.
    pub(crate) kept: Vec<String>,
    /// What could not be waited for any longer.
    pub(crate) unfinished: Option<&'static str>,
}

/// What a bake left could not be removed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TidyError {
    /// Incus failed.
    #[error(transparent)]
    Incus(#[from] Error),
    /// The state dir cannot be written.
    #[error(transparent)]
    StateDir(#[from] StateDirError),
}

/// Removes what a bake left, as far as nothing uses it, and its record once nothing is left. `limit` is how long is waited for
/// what Incus still does.
pub(crate) async fn tidy(client: &Client, owner: &str, mut held: Held, limit: Duration) -> Result<Tidied, TidyError> {
    let deadline = Instant::now() + limit;
    let mut tidied = Tidied::default();
    loop {
        // Looked at first, as all that may change into what is there.
        let is_recent = held.age() < GRACE;
        let mut found = look(client, owner, held.record()).await?;
        found.creating |= is_recent;
        if !held.record().swapped && found.images.iter().any(|image| image.is_own && image.is_named) {
            held.swapped()?;
        }
        let record = held.record();
        let steps = plan(record, &found);
        let mut acted = false;
        for step in &steps {
            match step {
                Step::EndBuilder => {
                    end_builder(client, &record.project, &record.builder(), &record.bake, owner).await?;
                }
                Step::DeleteImage(fingerprint) => {
                    delete_image(client, &record.project, fingerprint).await?;
                    tidied.deleted.push(fingerprint.clone());
                }
                Step::Wait(_) | Step::Keep { .. } => continue,
            }
            acted = true;
        }
        let waits_for = steps.iter().find_map(|step| if let Step::Wait(what) = step { Some(*what) } else { None });
        match waits_for {
            Some(what) if Instant::now() >= deadline => {
                tidied.unfinished = Some(what);
                return Ok(tidied);
            }
            Some(_) => sleep(LOOK).await,
            None if acted => {}
            None => {
                tidied.kept = steps.iter().filter_map(kept).collect();
                // What cannot be removed here is found, and tried again, by the next one.
                let forgotten = if tidied.kept.is_empty() { held.forget() } else { Ok(()) };
                if let Err(error) = forgotten {
                    tracing::warn!("{error}");
                }
                return Ok(tidied);
            }
        }
    }
}

fn kept(step: &Step) -> Option<String> {
    match step {
        Step::Keep { fingerprint, why } => Some(format!("image {}: {why}", short(fingerprint))),
        _ => None,
    }
}

/// A fingerprint as Incus's own lists show it.
pub(super) fn short(fingerprint: &str) -> &str {
    fingerprint.get(..12).unwrap_or(fingerprint)
}

/// What is under way is read before what is there: what ended in between is there.
async fn look(client: &Client, owner: &str, record: &Record) -> Result<Found, Error> {
    let project = &record.project;
    let being_created = client.being_created(project).await?;
    let publishing = record.publishing && client.is_publishing(project, record.operation.as_deref()).await?;
    let replaces = !record.replaced.is_empty();
    let builder = match client.instance(project, &record.builder()).await? {
        Some(view) if is_builder(&view, &record.bake, owner) => Builder::Ours,
        None if being_created.contains(&record.builder()) => Builder::Coming,
        _ => Builder::Absent,
    };
    let instances = if replaces { everybodys(client, project).await? } else { Vec::new() };
    let is_listed = |name: &String| instances.iter().any(|view| view.name == *name && view.project == *project);
    let creating = replaces && !being_created.iter().all(is_listed);
    let mut images = Vec::new();
    if record.publishing || replaces {
        let all = client.images(project).await?;
        images.extend(all.iter().filter_map(|image| seen(image, owner, record, &instances)));
    }
    Ok(Found { builder, publishing, creating, images })
}

/// Projects may share their images.
async fn everybodys(client: &Client, project: &str) -> Result<Vec<InstanceView>, Error> {
    match client.all_instances().await {
        Err(Error::Refused { code: 403, .. }) => client.instances(project).await,
        answer => answer,
    }
}

fn seen(image: &Image, owner: &str, record: &Record, instances: &[InstanceView]) -> Option<Seen> {
    let is_own = image.properties.get(PROPERTY_BAKE) == Some(&record.bake);
    let is_replaced = record.replaced.contains(&image.fingerprint);
    let made_from = |view: &&InstanceView| view.config.get("volatile.base_image") == Some(&image.fingerprint);
    (is_own || is_replaced).then(|| Seen {
        fingerprint: image.fingerprint.clone(),
        is_own,
        is_ours: is_baked_by(image, owner),
        is_named: !image.aliases.is_empty() || image.public,
        users: instances.iter().filter(made_from).map(|view| view.name.clone()).collect(),
    })
}

fn is_builder(view: &InstanceView, bake: &str, owner: &str) -> bool {
    BuilderLabels::read(&view.config).is_some_and(|labels| labels.bake == bake && labels.owner == owner)
}

/// Invariant 4: stops and deletes a builder, and nothing else. Incus ignores conditions on state changes and deletes, so the labels
/// are read right before each of them.
pub(crate) async fn end_builder(
    client: &Client,
    project: &str,
    name: &str,
    bake: &str,
    owner: &str,
) -> Result<(), Error> {
    let mut attempt = 0;
    loop {
        let pause = match try_end(client, project, name, bake, owner).await {
            Ok(true) => return Ok(()),
            Ok(false) => Duration::ZERO,
            Err(error) if !is_worth_another(&error) || attempt + 1 >= TRIES => return Err(error),
            Err(_) => backoff(attempt, jitter()),
        };
        sleep(pause).await;
        attempt += 1;
    }
}

/// One step towards its end; whether it is gone.
async fn try_end(client: &Client, project: &str, name: &str, bake: &str, owner: &str) -> Result<bool, Error> {
    let view = client.instance(project, name).await?;
    let Some(view) = view.filter(|view| is_builder(view, bake, owner)) else { return Ok(true) };
    if view.state() != InstanceState::Stopped {
        return client.stop_instance(project, name).await.map(|()| false);
    }
    match client.delete_instance(project, name).await {
        Err(error) if !error.is_not_found() => Err(error),
        _ => Ok(true),
    }
}

/// What Incus refuses may only be refused because the builder was just starting, or stopped by itself.
fn is_worth_another(error: &Error) -> bool {
    error.is_transient()
        || matches!(error, Error::Refused { code: 400 | 404 | 500, .. } | Error::OperationFailed { .. })
}

async fn delete_image(client: &Client, project: &str, fingerprint: &str) -> Result<(), Error> {
    match client.delete_image(project, fingerprint).await {
        Err(error) if !error.is_not_found() => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
