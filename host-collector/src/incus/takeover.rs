//! Taking over what another collector holds: one conditional change, which exactly one can win.
//!
//! ```text
//!   read (config, ETag) ── not as expected ──► lost
//!        │ as expected
//!        ▼
//!   PATCH owner, term + 1, If-Match: ETag ── 200 ──► taken
//!        │            └─ 412: something changed ──► read again
//!        └─ busy, or no answer ──► wait, read again
//! ```
//!
//! Incus honours `If-Match` on a PATCH of an instance and of a custom volume. It ignores it on state changes and deletes,
//! so owner and term are read right before those. Any change of the config, `volatile.*` included, makes another version: a 412
//! alone does not tell who changed what.

use std::collections::BTreeMap;

use hyper::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use super::backoff::{backoff, jitter};
use super::client::{CALL_TIMEOUT, Client, Sent};
use super::error::Error;
use super::instance::{InstanceView, found, instance_path};
use super::plan::{Labels, VolumeLabels, label};
use super::volume::volume_path;

/// How often a change is tried that meets a busy instance, or another change.
const TRIES: u32 = 12;

/// What a conditional change came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patched {
    /// It is made.
    Done,
    /// Something was changed since it was read, so nothing was changed now.
    Raced,
}

/// Who holds an instance or a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The id of the state dir.
    pub owner: String,
    /// Raised at each take-over.
    pub term: u64,
}

/// What can be taken over.
#[derive(Clone, Copy, Debug)]
enum Target<'a> {
    Instance { project: &'a str, name: &'a str },
    Volume { project: &'a str, pool: &'a str, name: &'a str },
}

impl Target<'_> {
    fn path(self) -> String {
        match self {
            Self::Instance { project, name } => instance_path(project, name),
            Self::Volume { project, pool, name } => volume_path(project, pool, name),
        }
    }

    fn holder(self, config: &BTreeMap<String, String>) -> Option<Holder> {
        let (owner, term) = match self {
            Self::Instance { .. } => Labels::read(config).map(|labels| (labels.owner, labels.term)),
            Self::Volume { .. } => VolumeLabels::read(config).map(|labels| (labels.owner, labels.term)),
        }?;
        Some(Holder { owner, term })
    }

    fn lost(self, now: &str) -> Error {
        let what = match self {
            Self::Instance { project, name } => format!("instance `{name}` in project `{project}`"),
            Self::Volume { pool, name, .. } => format!("volume `{name}` in pool `{pool}`"),
        };
        Error::TakeOverLost { what, now: now.to_owned() }
    }
}

impl Client {
    /// The instance of that name with its version, for [`Client::patch_instance`].
    ///
    /// # Errors
    /// Where the question itself failed: that is not absence.
    pub async fn instance_with_etag(&self, project: &str, name: &str) -> Result<Option<(InstanceView, String)>, Error> {
        found(self.get_with_etag(&instance_path(project, name)).await)
    }

    /// Sets config keys of an instance, only where it still has the version that `etag` names. Other keys stay.
    ///
    /// # Errors
    /// Where Incus refuses for another reason than the version, or does not answer: then it may have been made.
    pub async fn patch_instance(
        &self,
        project: &str,
        name: &str,
        etag: &str,
        config: &BTreeMap<String, String>,
    ) -> Result<Patched, Error> {
        self.patch_config(&instance_path(project, name), etag, &json!(config)).await
    }

    async fn patch_config(&self, path: &str, etag: &str, config: &Value) -> Result<Patched, Error> {
        let body = json!({ "config": config });
        let sent = Sent { body: Some(&body), if_match: Some(etag) };
        match self.send(Method::PATCH, path, sent, CALL_TIMEOUT).await {
            Ok(_) => Ok(Patched::Done),
            Err(Error::Refused { code: 412, .. }) => Ok(Patched::Raced),
            Err(error) => Err(error),
        }
    }

    /// Invariant 6: takes an instance over from `expected`, and gives the new term.
    ///
    /// # Errors
    /// [`Error::TakeOverLost`] where somebody else holds it by now or it is gone; else where Incus fails.
    pub async fn take_over(&self, project: &str, name: &str, owner: &str, expected: &Holder) -> Result<u64, Error> {
        self.take_over_target(Target::Instance { project, name }, owner, expected).await
    }

    /// As [`Client::take_over`], of a custom volume.
    ///
    /// # Errors
    /// As [`Client::take_over`].
    pub async fn take_over_volume(
        &self,
        project: &str,
        pool: &str,
        name: &str,
        owner: &str,
        expected: &Holder,
    ) -> Result<u64, Error> {
        self.take_over_target(Target::Volume { project, pool, name }, owner, expected).await
    }

    async fn take_over_target(&self, target: Target<'_>, owner: &str, expected: &Holder) -> Result<u64, Error> {
        let path = target.path();
        let taken = Holder { owner: owner.to_owned(), term: expected.term.saturating_add(1) };
        let change = json!({ label("owner"): taken.owner, label("term"): taken.term.to_string() });
        let mut unanswered = false;
        let mut last = None;
        for attempt in 0..TRIES {
            if attempt > 0 {
                tokio::time::sleep(backoff(attempt - 1, jitter())).await;
            }
            let read = match found(self.get_with_etag::<Config>(&path).await) {
                Err(error) if error.is_transient() => {
                    last = Some(error);
                    continue;
                }
                read => read?,
            };
            let Some((Config { config }, etag)) = read else { return Err(target.lost("it is gone")) };
            match target.holder(&config) {
                None => return Err(target.lost("it has not all of pika-cloud's labels")),
                // A change of ours whose answer was lost had been made.
                Some(holder) if unanswered && holder == taken => return Ok(taken.term),
                Some(holder) if holder != *expected => {
                    return Err(target.lost(&format!("owner `{}` holds it with term {}", holder.owner, holder.term)));
                }
                Some(_) => {}
            }
            match self.patch_config(&path, &etag, &change).await {
                Ok(Patched::Done) => return Ok(taken.term),
                Ok(Patched::Raced) => {}
                Err(error) if error.is_transient() => {
                    unanswered |= !matches!(error, Error::Refused { .. });
                    last = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        Err(last.unwrap_or_else(|| target.lost("it changes all the time")))
    }
}

/// What instances and volumes have in common.
#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    config: BTreeMap<String, String>,
}
