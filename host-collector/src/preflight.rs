//! Everything that a spec names is looked up before anything is made, so that a missing image leaves nothing half done.

use std::path::PathBuf;

use pika_cloud_common::RuntimeSpec;
use pika_cloud_common::spec::{AgentPolicy, InstanceType};

use crate::agent_binary::AgentSource;
use crate::error::Error;
use crate::incus::{Client, Image, Labels, check_volume, root_disk, root_pool};

/// Checks that Incus has what the spec names, and that the name is free or ours. Gives the image.
pub(crate) async fn check(
    client: &Client,
    agent: &AgentSource,
    spec: &RuntimeSpec,
    owner: &str,
) -> Result<Image, Error> {
    let server = client.server().await?;
    if spec.incus.instance_type == InstanceType::VirtualMachine && !server.environment.driver.contains("qemu") {
        return Err(Error::Missing {
            what: "driver for virtual machines",
            name: "qemu".to_owned(),
            project: String::new(),
            way_out: "install QEMU and load vhost_vsock on the host, and start Incus anew (`incus info` names its drivers), or \
                      set incus.instance_type to \"container\""
                .to_owned(),
        });
    }
    mounts(spec)?;
    let project = &spec.incus.project;
    if !client.has_project(project).await? {
        return Err(Error::Missing {
            what: "project",
            name: project.clone(),
            project: String::new(),
            way_out: format!("make it (incus project create {project}), or correct incus.project"),
        });
    }
    let image = image(client, spec).await?;
    if spec.incus.agent == AgentPolicy::Inject {
        agent.fetch(&image.architecture).await?;
    }
    profiles(client, spec).await?;
    volumes(client, spec, owner).await?;
    if let Some(instance) = client.instance(project, &spec.identity.instance_name).await? {
        let labels = Labels::read(&instance.config);
        let whose = match labels {
            None => "was not made by pika-cloud".to_owned(),
            Some(labels) if labels.runtime_id != spec.identity.runtime_id => {
                format!("belongs to runtime `{}`", labels.runtime_id)
            }
            Some(labels) if labels.owner != owner => "belongs to the collector of another state dir".to_owned(),
            Some(_) => return Ok(image),
        };
        return Err(Error::NotOurs { instance: instance.name, project: project.clone(), whose });
    }
    Ok(image)
}

/// Incus is on this host, so that a mount's source must be, too.
fn mounts(spec: &RuntimeSpec) -> Result<(), Error> {
    for (index, mount) in spec.mounts.iter().enumerate().filter(|(_, mount)| mount.volume().is_none()) {
        let path = PathBuf::from(&mount.source);
        if !path.is_dir() {
            return Err(Error::MountSource { index, path });
        }
    }
    Ok(())
}

/// A volume that is there must be this runtime's; one that is not is made with the instance.
async fn volumes(client: &Client, spec: &RuntimeSpec, owner: &str) -> Result<(), Error> {
    if !spec.mounts.iter().any(|mount| mount.volume().is_some()) {
        return Ok(());
    }
    let pools = client.storage_pools().await?;
    let root_disk = root_disk(client, spec).await?;
    for (index, volume) in spec.mounts.iter().enumerate().filter_map(|(n, mount)| Some((n, mount.volume()?))) {
        let pool = volume.pool.unwrap_or_else(|| root_pool(root_disk.as_ref()));
        if !pools.iter().any(|known| known == pool) {
            return Err(Error::Missing {
                what: "storage pool",
                name: pool.to_owned(),
                project: String::new(),
                way_out: format!("make it (incus storage create {pool} dir), or correct mounts[{index}].source"),
            });
        }
        if let Some(found) = client.volume(&spec.incus.project, pool, volume.name).await? {
            check_volume(&found, &spec.incus.project, &spec.identity.runtime_id, owner)?;
        }
    }
    Ok(())
}

async fn image(client: &Client, spec: &RuntimeSpec) -> Result<Image, Error> {
    let project = &spec.incus.project;
    let alias = &spec.incus.image_alias;
    let Some(image) = client.image(project, alias).await? else {
        return Err(Error::Missing {
            what: "image",
            name: alias.clone(),
            project: project.clone(),
            way_out:
                "copy one (incus image copy images:debian/12 local: --alias NAME), import one (incus image import FILE --alias \
                 NAME), or bake one (pika-cloud bake --from BASE --to NAME); or correct incus.image_alias: `incus image list` \
                 shows those that are"
                    .to_owned(),
        });
    };
    let (kind, wanted) = match spec.incus.instance_type {
        InstanceType::Container => ("container", "container"),
        InstanceType::VirtualMachine => ("virtual-machine", "virtual_machine"),
    };
    if image.kind != kind {
        return Err(Error::ImageKind { alias: alias.clone(), found: image.kind, wanted });
    }
    if let Some(bytes) = image.too_many_properties() {
        return Err(Error::ImageProperties { alias: alias.clone(), project: project.clone(), bytes });
    }
    Ok(image)
}

async fn profiles(client: &Client, spec: &RuntimeSpec) -> Result<(), Error> {
    let project = &spec.incus.project;
    let mut pool = None;
    for name in std::iter::once(&spec.incus.profile).chain(&spec.incus.extra_profiles) {
        let Some(profile) = client.profile(project, name).await? else {
            return Err(Error::Missing {
                what: "profile",
                name: name.clone(),
                project: project.clone(),
                way_out: format!(
                    "make it (incus profile create {name} --project {project}), or correct incus.profile; `incus profile \
                     list` shows those that are"
                ),
            });
        };
        pool = profile.root_disk().and_then(|root| root.get("pool").cloned()).or(pool);
    }
    let Some(pool) = pool else {
        return Err(Error::Missing {
            what: "root disk of profile",
            name: spec.incus.profile.clone(),
            project: project.clone(),
            way_out: format!(
                "give it one (incus profile device add {} root disk path=/ pool=POOL); `incus storage list` shows pools, \
                 `incus storage create default dir` makes one",
                spec.incus.profile
            ),
        });
    };
    if !client.storage_pools().await?.contains(&pool) {
        return Err(Error::Missing {
            what: "storage pool",
            name: pool.clone(),
            project: String::new(),
            way_out: format!("make it (incus storage create {pool} dir), or give the profile another root disk"),
        });
    }
    Ok(())
}
