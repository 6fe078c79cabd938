//! Making everything that a runtime needs in Incus.

use std::collections::BTreeMap;
use std::time::Duration;

use pika_cloud_common::RuntimeSpec;
use pika_cloud_common::spec::Mount;

use super::client::Client;
use super::error::Error;
use super::plan::{Ownership, create_request};

/// Makes the volumes that are absent, and then the instance, stopped. `now` is wall time since the UNIX epoch.
///
/// A volume comes first, so that an instance never stands without what it keeps its data on; one that is left because the
/// instance could not be made is found again by the next try, and by `reconcile`.
///
/// # Errors
/// Where a volume is somebody else's, or Incus refuses, fails, or takes longer than ten minutes.
pub async fn provision(client: &Client, spec: &RuntimeSpec, ownership: &Ownership, now: Duration) -> Result<(), Error> {
    let root_disk = root_disk(client, spec).await?;
    let root_pool = root_pool(root_disk.as_ref());
    for volume in spec.mounts.iter().filter_map(Mount::volume) {
        client.ensure_volume(spec, ownership, volume.pool.unwrap_or(root_pool), volume.name).await?;
    }
    let request = create_request(spec, ownership, now, root_disk.as_ref());
    client.create_instance(&spec.incus.project, &request).await
}

/// The root disk of the last profile that gives one, as Incus applies them.
pub(crate) async fn root_disk(client: &Client, spec: &RuntimeSpec) -> Result<Option<BTreeMap<String, String>>, Error> {
    let mut last = None;
    for name in std::iter::once(&spec.incus.profile).chain(&spec.incus.extra_profiles) {
        let profile = client.profile(&spec.incus.project, name).await?;
        last = profile.and_then(|profile| profile.root_disk().cloned()).or(last);
    }
    Ok(last)
}

/// The pool of volumes that name none.
pub(crate) fn root_pool(root_disk: Option<&BTreeMap<String, String>>) -> &str {
    root_disk.and_then(|root| root.get("pool")).map_or("default", String::as_str)
}
