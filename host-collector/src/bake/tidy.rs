//! Removing what a bake made, however it ended: the same for one that succeeded, failed, was interrupted, or died.
//!
//! ```text
//!   look at Incus ─► plan (pure) ─┬─► remove ──► look again
//!                                 ├─► wait ────► look again, up to a limit
//!                                 └─► nothing more: the record goes, unless something is kept
//! ```

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::claimed;
use super::images::OwnImages;
use super::record::{Held, Record};
use crate::incus::{BuilderLabels, Client, Error, Image, InstanceState, InstanceView, Publishing, backoff, jitter};
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

/// Whose an image is, by what was written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whose {
    /// Of this very bake.
    Own,
    /// Of an earlier one of the state dir.
    Earlier,
    /// Of this bake, maybe: several say so, and it is not written down which.
    Unclear,
    /// Not of this state dir.
    Foreign,
}

/// An image that the bake made or replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    fingerprint: String,
    whose: Whose,
    /// Its aliases.
    aliases: Vec<String>,
    /// It is there for everybody.
    is_public: bool,
    /// Instances that were made from it.
    users: Vec<String>,
}

impl Seen {
    /// Whether somebody gave it a name, or to everybody.
    fn is_wanted(&self) -> bool {
        !self.aliases.is_empty() || self.is_public
    }
}

/// What Incus has and does.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Found {
    builder: Builder,
    /// Incus says what it is doing. Where it does not, what is absent may still come.
    is_told: bool,
    /// An image may be under way.
    publishing: bool,
    /// An instance is being made that Incus does not list yet, maybe from an image that is to go.
    creating: bool,
    /// So little time has passed since the record was written that a call of before may still be on its way.
    is_recent: bool,
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
    if !found.is_told {
        steps.push(Step::Wait("Incus does not say what it is doing"));
        return steps;
    }
    if found.publishing {
        steps.push(Step::Wait("Incus is still publishing an image, maybe its own"));
    }
    steps.extend(found.images.iter().filter_map(|image| plan_image(record, found, image)));
    steps
}

fn plan_image(record: &Record, found: &Found, image: &Seen) -> Option<Step> {
    let fingerprint = image.fingerprint.clone();
    let is_own = image.whose == Whose::Own;
    match image {
        // Of another state dir, it is that one's to remove.
        Seen { whose: Whose::Foreign, .. } => None,
        Seen { .. } if is_own && (found.publishing || record.swapped) => None,
        // Whoever named it wants it.
        Seen { whose: Whose::Own | Whose::Unclear, .. } if image.is_wanted() => None,
        // It never lost its place.
        Seen { aliases, .. } if aliases.contains(&record.to) => None,
        Seen { aliases, .. } if !aliases.is_empty() => {
            Some(Step::Keep { fingerprint, why: format!("it has another alias: {}", aliases.join(", ")) })
        }
        Seen { is_public: true, .. } => Some(Step::Keep { fingerprint, why: "it is public".to_owned() }),
        Seen { whose: Whose::Unclear, .. } => {
            let why = "it is one of several that say they are of this bake: what nobody needs of them has to be deleted by hand";
            Some(Step::Keep { fingerprint, why: why.to_owned() })
        }
        Seen { users, .. } if !users.is_empty() => {
            Some(Step::Keep { fingerprint, why: format!("instances were made from it: {}", users.join(", ")) })
        }
        // Deleted now, the instance could not be made.
        Seen { .. } if found.creating => {
            Some(Step::Wait("Incus is making an instance, maybe from an image that is to go"))
        }
        Seen { .. } if found.is_recent && (record.swapping || !is_own) => Some(Step::Wait(
            "an alias was moved or removed just now, and somebody may still have read where it pointed",
        )),
        Seen { .. } => Some(Step::DeleteImage(fingerprint)),
    }
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
///
/// One thing is removed after each look, so that what is concluded of an image was read right before its deletion.
pub(crate) async fn tidy(client: &Client, owner: &str, mut held: Held, limit: Duration) -> Result<Tidied, TidyError> {
    let deadline = Instant::now() + limit;
    let mut tidied = Tidied::default();
    loop {
        let known = held.images().known();
        let (found, images) = look(client, owner, &held).await?;
        if !held.record().swapped && found.images.iter().any(|image| image.whose == Whose::Own && image.is_wanted()) {
            held.swapped()?;
        }
        let steps = plan(held.record(), &found);
        // What lost its last alias just now may still be looked for by whoever read that.
        if found.is_told && held.keeps(steps.iter().filter_map(kept_fingerprint).collect())? {
            continue;
        }
        if act(client, owner, held.record(), &steps, &mut tidied).await? {
            continue;
        }
        match steps.iter().find_map(|step| if let Step::Wait(what) = step { Some(*what) } else { None }) {
            Some(what) if Instant::now() >= deadline => {
                tidied.unfinished = Some(what);
                return Ok(tidied);
            }
            Some(_) => sleep(LOOK).await,
            None => {
                held.images().sweep(&known, &images);
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

/// Removes the first that is to go; whether there was anything.
async fn act(
    client: &Client,
    owner: &str,
    record: &Record,
    steps: &[Step],
    tidied: &mut Tidied,
) -> Result<bool, TidyError> {
    for step in steps {
        match step {
            Step::EndBuilder => end_builder(client, &record.project, &record.builder(), &record.bake, owner).await?,
            Step::DeleteImage(fingerprint) => {
                delete_image(client, &record.project, fingerprint).await?;
                tidied.deleted.push(fingerprint.clone());
            }
            Step::Wait(_) | Step::Keep { .. } => continue,
        }
        return Ok(true);
    }
    Ok(false)
}

fn kept_fingerprint(step: &Step) -> Option<String> {
    if let Step::Keep { fingerprint, .. } = step { Some(fingerprint.clone()) } else { None }
}

/// For a person. Aliases of others are in it.
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

/// What is under way is read before what is there: what ended in between is there. Gives the images of its project as well, where
/// it may have made or replaced any.
async fn look(client: &Client, owner: &str, held: &Held) -> Result<(Found, Vec<Image>), Error> {
    let record = held.record();
    let project = &record.project;
    // Looked at first, as all that may change into what is there.
    let is_recent = held.age() < GRACE;
    let (is_told, being_created, published) = match under_way(client, record, is_recent).await {
        Ok((being_created, published)) => (true, being_created, published),
        Err(Error::Refused { code, message, .. }) => {
            tracing::debug!("operations cannot be read: {code} {message}");
            (false, Vec::new(), Publishing::Unknown)
        }
        Err(error) => return Err(error),
    };
    let (mut instances, mut images) = (Vec::new(), Vec::new());
    let builder = match client.instance(project, &record.builder()).await? {
        Some(view) if is_builder(&view, &record.bake, owner) => Builder::Ours,
        None if being_created.contains(&(project.clone(), record.builder())) => Builder::Coming,
        _ => Builder::Absent,
    };
    if record.publishing || !record.replaced.is_empty() {
        instances = everybodys(client, project).await?;
        images = client.images(project).await?;
    }
    let is_listed = |(project, name): &(String, String)| {
        instances.iter().any(|view| view.name == *name && view.project == *project)
    };
    let creating = !being_created.iter().all(is_listed);
    let publishing = published == Publishing::Going;
    let whose = Judged::new(record, owner, &published, &images, held.images());
    let seen = images.iter().filter_map(|image| Some(seen(image, whose.of(image)?, &instances))).collect();
    Ok((Found { builder, is_told, publishing, creating, is_recent, images: seen }, images))
}

/// What instances Incus is making, and whether it is publishing the bake's image.
async fn under_way(
    client: &Client,
    record: &Record,
    is_recent: bool,
) -> Result<(Vec<(String, String)>, Publishing), Error> {
    let being_created = client.being_created(&record.project).await?;
    let published = match &record.operation {
        _ if record.published.is_some() || !record.publishing => Publishing::Unknown,
        Some(operation) => client.published(operation).await?,
        // It was asked for, and nobody heard the answer.
        None if is_recent || client.may_publish(&record.project).await? => Publishing::Going,
        None => Publishing::Unknown,
    };
    Ok((being_created, published))
}

/// Tells whose images are.
struct Judged<'a> {
    record: &'a Record,
    /// Of the bake itself, once it is known, or those that may be it.
    own: Vec<String>,
    published: OwnImages,
}

impl<'a> Judged<'a> {
    fn new(record: &'a Record, owner: &str, said: &Publishing, images: &[Image], published: OwnImages) -> Self {
        let own = match (&record.published, said) {
            (Some(fingerprint), _) | (None, Publishing::Done(fingerprint)) => vec![fingerprint.clone()],
            (None, Publishing::Unknown) if record.publishing => {
                claimed(images, &record.bake, owner).into_iter().map(|image| image.fingerprint.clone()).collect()
            }
            (None, Publishing::Going | Publishing::Failed | Publishing::Unknown) => Vec::new(),
        };
        Self { record, own, published }
    }

    /// `None` for what the bake has nothing to do with.
    fn of(&self, image: &Image) -> Option<Whose> {
        if self.own.contains(&image.fingerprint) {
            return Some(if self.own.len() == 1 { Whose::Own } else { Whose::Unclear });
        }
        let is_replaced = self.record.replaced.contains(&image.fingerprint);
        is_replaced.then(|| if self.published.has(image) { Whose::Earlier } else { Whose::Foreign })
    }
}

/// Projects may share their images.
async fn everybodys(client: &Client, project: &str) -> Result<Vec<InstanceView>, Error> {
    match client.all_instances().await {
        Err(Error::Refused { code: 403, .. }) => client.instances(project).await,
        answer => answer,
    }
}

fn seen(image: &Image, whose: Whose, instances: &[InstanceView]) -> Seen {
    let made_from = |view: &&InstanceView| view.config.get("volatile.base_image") == Some(&image.fingerprint);
    Seen {
        fingerprint: image.fingerprint.clone(),
        whose,
        aliases: image.aliases.iter().map(|alias| alias.name.clone()).collect(),
        is_public: image.public,
        users: instances.iter().filter(made_from).map(|view| view.name.clone()).collect(),
    }
}

fn is_builder(view: &InstanceView, bake: &str, owner: &str) -> bool {
    BuilderLabels::read(&view.name, &view.config).is_some_and(|labels| labels.bake == bake && labels.owner == owner)
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
