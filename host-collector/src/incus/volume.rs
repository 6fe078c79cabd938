//! Custom volumes: what a runtime keeps beyond its instances.

use std::collections::BTreeMap;

use hyper::Method;
use pika_cloud_common::RuntimeSpec;
use serde::Deserialize;
use serde_json::Value;

use super::client::{CALL_TIMEOUT, Client};
use super::error::Error;
use super::instance::{encode, found};
use super::plan::{Ownership, VolumeLabels, volume_request};

/// A custom volume as Incus describes it.
#[derive(Clone, Debug, Deserialize)]
pub struct VolumeView {
    /// Its name in its pool and project.
    pub name: String,
    /// Its project: `default` for a project that has no volumes of its own.
    #[serde(default)]
    pub project: String,
    /// Its storage pool.
    #[serde(skip)]
    pub pool: String,
    /// Its configuration, labels included.
    #[serde(default)]
    pub config: BTreeMap<String, String>,
    /// Paths of the instances, profiles and so on that it is attached to.
    #[serde(default)]
    pub used_by: Vec<String>,
}

pub(super) fn volume_path(project: &str, pool: &str, name: &str) -> String {
    format!("/1.0/storage-pools/{}/volumes/custom/{}?project={}", encode(pool), encode(name), encode(project))
}

impl Client {
    /// The custom volume of that name, or `None`, also where there is no such pool.
    ///
    /// # Errors
    /// Where the question itself failed: that is not absence.
    pub async fn volume(&self, project: &str, pool: &str, name: &str) -> Result<Option<VolumeView>, Error> {
        let volume: Option<VolumeView> = found(self.get(&volume_path(project, pool, name)).await)?;
        Ok(volume.map(|volume| VolumeView { pool: pool.to_owned(), ..volume }))
    }

    /// Every custom volume of every pool and project that this client may see.
    ///
    /// # Errors
    /// Where Incus does not answer.
    pub async fn volumes(&self) -> Result<Vec<VolumeView>, Error> {
        let mut all = Vec::new();
        for pool in self.storage_pools().await? {
            let path = format!("/1.0/storage-pools/{}/volumes/custom?recursion=1&all-projects=true", encode(&pool));
            // An empty list is answered as null.
            let volumes: Option<Vec<VolumeView>> = self.get(&path).await?;
            all.extend(volumes.into_iter().flatten().map(|volume| VolumeView { pool: pool.clone(), ..volume }));
        }
        Ok(all)
    }

    /// Makes a volume that a spec names, or finds it, which must be of the same runtime and owner.
    ///
    /// # Errors
    /// Where it is somebody else's ([`Error::VolumeNotOurs`]), or Incus refuses.
    pub(crate) async fn ensure_volume(
        &self,
        spec: &RuntimeSpec,
        ownership: &Ownership,
        pool: &str,
        name: &str,
    ) -> Result<(), Error> {
        let project = &spec.incus.project;
        let runtime_id = &spec.identity.runtime_id;
        if let Some(volume) = self.volume(project, pool, name).await? {
            return check_volume(&volume, project, runtime_id, &ownership.owner);
        }
        let path = format!("/1.0/storage-pools/{}/volumes/custom?project={}", encode(pool), encode(project));
        let request = volume_request(spec, ownership, name);
        match self.change("making the volume", Method::POST, &path, Some(&request), CALL_TIMEOUT).await {
            Err(Error::Refused { code: 409, request, message }) => {
                // Somebody was first, and it is read whose it is.
                match self.volume(project, pool, name).await? {
                    Some(volume) => check_volume(&volume, project, runtime_id, &ownership.owner),
                    None => Err(Error::Refused { code: 409, request, message }),
                }
            }
            made => made,
        }
    }

    /// Deletes a volume. Incus refuses where it is attached.
    ///
    /// # Errors
    /// Where Incus refuses or fails. One that is gone already is fine.
    pub(crate) async fn delete_volume(&self, project: &str, pool: &str, name: &str) -> Result<(), Error> {
        let path = volume_path(project, pool, name);
        let deleted = self.change("deleting the volume", Method::DELETE, &path, None::<&Value>, CALL_TIMEOUT).await;
        found(deleted).map(|_| ())
    }
}

/// Invariant 4: that a volume is the runtime's own.
pub(crate) fn check_volume(volume: &VolumeView, project: &str, runtime_id: &str, owner: &str) -> Result<(), Error> {
    let whose = match VolumeLabels::read(&volume.config) {
        None => "was not made by pika-cloud".to_owned(),
        Some(labels) if labels.runtime_id != runtime_id => format!("belongs to runtime `{}`", labels.runtime_id),
        Some(labels) if labels.owner != owner => {
            "belongs to this runtime under the collector of another state dir".to_owned()
        }
        Some(_) => return Ok(()),
    };
    Err(Error::VolumeNotOurs {
        volume: volume.name.clone(),
        pool: volume.pool.clone(),
        project: project.to_owned(),
        whose,
    })
}
