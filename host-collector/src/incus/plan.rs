//! From a spec to what Incus is asked for. Pure, so that what reaches a customer's machine can be read in a test.

use std::collections::BTreeMap;
use std::time::Duration;

use pika_cloud_common::spec::{InstanceType, MountMode, RestartPolicy, RetentionPolicy, hash, is_runtime_id};
use pika_cloud_common::{RuntimeSpec, Timestamp};
use serde_json::{Map, Value, json};

use crate::machine::MAX_STARTS;
use crate::state_dir::is_owner_id;

/// Before every key of ours in an instance's config.
const PREFIX: &str = "user.pika-cloud.";

/// The config key of one of our labels, such as `user.pika-cloud.runtime-id`.
pub fn label(name: &str) -> String {
    format!("{PREFIX}{name}")
}

/// How long an instance may stand beyond every deadline of its spec before anyone may reap it: what Incus itself takes to
/// create, stop and delete, and clocks that differ.
const EXPIRY_MARGIN_SECS: u64 = 600;

/// The longest spec that is kept in a label. Each list of instances holds it twice for each of them, beside what expands to
/// a few kilobytes.
const MAX_SPEC_LABEL_BYTES: usize = 32 * 1024;

/// The highest incarnation that a label may name: beyond use, and far from where the count ends.
const MAX_INCARNATION: u32 = 1 << 31;

/// For whom something is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ownership {
    /// The id of the state dir whose collector may change it.
    pub owner: String,
    /// Raised at each take-over; 1 for what is new.
    pub term: u64,
    /// The incarnation that it is made for.
    pub incarnation: u32,
}

/// What marks an instance as ours, from the call that creates it.
///
/// A guest can read them (`/dev/incus/sock` gives `user.*`), and change none. Whoever may change instances of the project can
/// write them: that can make an instance ours, which is ended then, or a runtime's spec another one where it is taken over.
/// It is believed no more than that: an id is a plain name, never a path; a spec is validated, and is of that very project.
/// A spec that is taken over is run as it stands there, mounts included: take over only what was written by people whose specs
/// would be run anyway.
#[derive(Clone, Debug, PartialEq)]
pub struct Labels {
    /// Whose.
    pub runtime_id: String,
    /// Of the spec that it was made for.
    pub spec_hash: String,
    /// The id of the state dir whose collector may change it.
    pub owner: String,
    /// Raised at each take-over.
    pub term: u64,
    /// The incarnation that it was made for.
    pub incarnation: u32,
    /// What becomes of it when its workload has ended.
    pub retention: RetentionPolicy,
    /// When anyone may reap it, since the UNIX epoch; `None` where its spec does not bound its life.
    pub expires_at: Option<Duration>,
    /// The spec as JSON, secrets redacted; `None` where it is longer than 32 KiB. Such an instance cannot be taken over to go
    /// on elsewhere, but only, once it expired, to be ended.
    pub spec: Option<String>,
}

impl Labels {
    /// The labels of an instance, or `None` where one is missing or malformed: then it is not ours. Labels of other names
    /// are left alone.
    pub fn read(config: &BTreeMap<String, String>) -> Option<Self> {
        let get = |name: &str| config.get(&label(name)).filter(|value| !value.is_empty());
        let expires_at = match config.get(&label("expires-at")) {
            None => None,
            Some(text) => Some(since_epoch(text)?),
        };
        Some(Self {
            runtime_id: get("runtime-id").filter(|id| is_runtime_id(id))?.clone(),
            spec_hash: get("spec-hash")?.clone(),
            owner: get("owner").filter(|owner| is_owner_id(owner))?.clone(),
            term: get("term")?.parse().ok()?,
            incarnation: get("incarnation")?.parse().ok().filter(|count| (1..=MAX_INCARNATION).contains(count))?,
            retention: serde_json::from_value(Value::from(get("retention")?.as_str())).ok()?,
            expires_at,
            spec: get("spec").cloned(),
        })
    }

    /// The spec that it was made for, secrets redacted; `None` where there is none, or it is not of this release, is not
    /// valid, or is another than the one whose hash stands beside it, or one for another project than the instance's own. The
    /// instance may have another name than its spec says: a person can rename it.
    pub fn read_spec(&self, project: &str) -> Option<RuntimeSpec> {
        let spec: RuntimeSpec = serde_json::from_str(self.spec.as_ref()?).ok()?;
        let is_its_own = hash(&spec) == self.spec_hash
            && spec.identity.runtime_id == self.runtime_id
            && spec.incus.project == project;
        (is_its_own && spec.validate().is_ok()).then_some(spec)
    }

    /// Whether anyone may reap it by now. `now` is wall time since the UNIX epoch.
    pub fn is_expired(&self, now: Duration) -> bool {
        self.expires_at.is_some_and(|at| at <= now)
    }
}

/// Whether anything in a config is a label of ours, complete or not.
pub(crate) fn is_marked(config: &BTreeMap<String, String>) -> bool {
    config.keys().any(|key| key.starts_with(PREFIX))
}

/// What marks a volume as ours, from the call that creates it. A volume outlives instances and specs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeLabels {
    /// The one runtime that may use it.
    pub runtime_id: String,
    /// The id of the state dir whose collector may change it.
    pub owner: String,
    /// Raised at each take-over.
    pub term: u64,
}

impl VolumeLabels {
    /// The labels of a volume, or `None` where one is missing or malformed: then it is not ours.
    pub fn read(config: &BTreeMap<String, String>) -> Option<Self> {
        let get = |name: &str| config.get(&label(name)).filter(|value| !value.is_empty());
        get("spec-hash")?;
        Some(Self {
            runtime_id: get("runtime-id").filter(|id| is_runtime_id(id))?.clone(),
            owner: get("owner").filter(|owner| is_owner_id(owner))?.clone(),
            term: get("term")?.parse().ok()?,
        })
    }
}

pub(super) fn since_epoch(text: &str) -> Option<Duration> {
    let at = time::OffsetDateTime::parse(text, &time::format_description::well_known::Rfc3339).ok()?;
    Some(Duration::from_secs(at.unix_timestamp().try_into().ok()?))
}

pub(super) fn rfc3339(since_epoch: Duration) -> String {
    Timestamp::from_unix(since_epoch.as_secs(), since_epoch.subsec_micros()).as_str().to_owned()
}

/// When anyone may reap an instance that is made now, since the UNIX epoch. Only where the spec itself bounds its life.
///
/// Invariant 4: every deadline that a collector would keep fits before it, so that no job is reaped that a collector would
/// still let run.
fn expires_at(spec: &RuntimeSpec, now: Duration) -> Option<Duration> {
    let watchdogs = &spec.watchdogs;
    let policies = &spec.policies;
    let keep_secs = match policies.retention_policy {
        RetentionPolicy::DestroyOnCompletion => 0,
        RetentionPolicy::DebugKeep => policies.debug_keep_secs,
        RetentionPolicy::KeepUntilStopped => return None,
    };
    // Restarts are bounded in a row only, so that nothing bounds them in time.
    if policies.restart_policy != RestartPolicy::Never {
        return None;
    }
    let secs = [
        // Each of its starts has so long for itself.
        watchdogs.boot_secs.saturating_mul(MAX_STARTS.into()),
        watchdogs.ready_secs.unwrap_or(0),
        watchdogs.run_secs?,
        watchdogs.stop_grace_secs,
        watchdogs.collect_secs,
        keep_secs,
        EXPIRY_MARGIN_SECS,
    ];
    Some(secs.into_iter().fold(now, |sum, secs| sum.saturating_add(Duration::from_secs(secs))))
}

/// The body of `POST /1.0/instances`. `now` is wall time since the UNIX epoch.
///
/// `root_disk` is the root disk of the profiles, which is repeated here where the spec gives it a size, and whose pool holds
/// volumes that name none.
pub fn create_request(
    spec: &RuntimeSpec,
    ownership: &Ownership,
    now: Duration,
    root_disk: Option<&BTreeMap<String, String>>,
) -> Value {
    let mut profiles = vec![spec.incus.profile.clone()];
    profiles.extend(spec.incus.extra_profiles.iter().cloned());
    json!({
        "name": spec.identity.instance_name,
        "type": match spec.incus.instance_type {
            InstanceType::Container => "container",
            InstanceType::VirtualMachine => "virtual-machine",
        },
        "profiles": profiles,
        "config": config(spec, ownership, now),
        "devices": devices(spec, root_disk),
        "source": { "type": "image", "alias": spec.incus.image_alias },
    })
}

/// The body of the call that makes a volume. It is writable for the guest's root: Incus gives it to the container's user ids
/// when it is attached.
pub(crate) fn volume_request(spec: &RuntimeSpec, ownership: &Ownership, name: &str) -> Value {
    json!({
        "name": name,
        "type": "custom",
        "content_type": "filesystem",
        "config": {
            label("runtime-id"): spec.identity.runtime_id,
            label("spec-hash"): hash(spec),
            label("owner"): ownership.owner,
            label("term"): ownership.term.to_string(),
            // Never deleted with its instance.
            label("retention"): policy_name(RetentionPolicy::KeepUntilStopped),
        },
    })
}

fn policy_name(policy: RetentionPolicy) -> Value {
    // An enum without data is a string.
    serde_json::to_value(policy).expect("serializable")
}

fn config(spec: &RuntimeSpec, ownership: &Ownership, now: Duration) -> Map<String, Value> {
    let mut config = Map::new();
    let mut set = |key: String, value: Value| config.insert(key, value);
    set(label("runtime-id"), spec.identity.runtime_id.clone().into());
    set(label("spec-hash"), hash(spec).into());
    set(label("owner"), ownership.owner.clone().into());
    set(label("term"), ownership.term.to_string().into());
    set(label("incarnation"), ownership.incarnation.to_string().into());
    set(label("retention"), policy_name(spec.policies.retention_policy));
    if let Some(at) = expires_at(spec, now) {
        set(label("expires-at"), rfc3339(at).into());
    }
    // Invariant 8: whoever may ask Incus reads this.
    let redacted = serde_json::to_string(&spec.redacted()).expect("a spec is serializable");
    if redacted.len() <= MAX_SPEC_LABEL_BYTES {
        set(label("spec"), redacted.into());
    }
    for (name, value) in &spec.labels {
        set(label(&format!("label.{name}")), value.clone().into());
    }
    // An instance that starts again by itself after a restart of its host would run beside the collector's knowledge.
    set("boot.autostart".to_owned(), "false".into());
    if let Some(count) = spec.resources.vcpu_count {
        set("limits.cpu".to_owned(), count.to_string().into());
    }
    if let Some(mib) = spec.resources.memory_mib {
        set("limits.memory".to_owned(), format!("{mib}MiB").into());
    }
    for (key, value) in [("security.secureboot", spec.incus.secureboot), ("security.csm", spec.incus.csm)] {
        if let Some(value) = value {
            set(key.to_owned(), value.to_string().into());
        }
    }
    config
}

fn devices(spec: &RuntimeSpec, root_disk: Option<&BTreeMap<String, String>>) -> Map<String, Value> {
    let mut devices = Map::new();
    if let (Some(gib), Some(root)) = (spec.resources.root_disk_gib, root_disk) {
        let mut root = root.clone();
        root.insert("size".to_owned(), format!("{gib}GiB"));
        devices.insert("root".to_owned(), json!(root));
    }
    let root_pool = root_disk.and_then(|root| root.get("pool")).map_or("default", String::as_str);
    for (index, mount) in spec.mounts.iter().enumerate() {
        let mut device = Map::new();
        let mut set = |key: &str, value: &str| device.insert(key.to_owned(), value.into());
        set("type", "disk");
        set("path", &mount.guest_path);
        if let Some(volume) = mount.volume() {
            set("pool", volume.pool.unwrap_or(root_pool));
            set("source", volume.name);
        } else {
            // Incus takes the first folder of the source as it is: a link in it would be followed, so `source` is the user's.
            set("source", &mount.source);
        }
        set("readonly", if mount.mode == MountMode::ReadWrite { "false" } else { "true" });
        devices.insert(format!("pika-mount-{index}"), device.into());
    }
    devices
}

#[cfg(test)]
mod tests;
