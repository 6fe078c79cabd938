//! From a spec to what Incus is asked for. Pure, so that what reaches a customer's machine can be read in a test.

use std::collections::BTreeMap;

use pika_cloud_common::RuntimeSpec;
use pika_cloud_common::spec::{InstanceType, RetentionPolicy, hash};
use serde_json::{Map, Value, json};

/// Before every key of ours in an instance's config.
const PREFIX: &str = "user.pika-cloud.";

/// The config key of one of our labels, such as `user.pika-cloud.runtime-id`.
pub fn label(name: &str) -> String {
    format!("{PREFIX}{name}")
}

/// What marks an instance as ours, from the call that creates it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labels {
    /// Whose.
    pub runtime_id: String,
    /// Of the spec that it was made for.
    pub spec_hash: String,
    /// The id of the state dir whose collector may change it.
    pub owner: String,
    /// Raised at each take-over.
    pub term: u64,
}

impl Labels {
    /// The labels of an instance, or `None` where it is not ours.
    pub fn read(config: &BTreeMap<String, String>) -> Option<Self> {
        let get = |name: &str| config.get(&label(name)).cloned();
        Some(Self {
            runtime_id: get("runtime-id")?,
            spec_hash: get("spec-hash")?,
            owner: get("owner")?,
            term: get("term")?.parse().ok()?,
        })
    }
}

/// The body of `POST /1.0/instances`.
///
/// `root_disk` is the root disk of the profiles, which is repeated here where the spec gives it a size.
pub fn create_request(spec: &RuntimeSpec, owner: &str, root_disk: Option<&BTreeMap<String, String>>) -> Value {
    let mut profiles = vec![spec.incus.profile.clone()];
    profiles.extend(spec.incus.extra_profiles.iter().cloned());
    json!({
        "name": spec.identity.instance_name,
        "type": match spec.incus.instance_type {
            InstanceType::Container => "container",
            InstanceType::VirtualMachine => "virtual-machine",
        },
        "profiles": profiles,
        "config": config(spec, owner),
        "devices": devices(spec, root_disk),
        "source": { "type": "image", "alias": spec.incus.image_alias },
    })
}

fn config(spec: &RuntimeSpec, owner: &str) -> Map<String, Value> {
    let mut config = Map::new();
    let mut set = |key: String, value: String| config.insert(key, Value::String(value));
    set(label("runtime-id"), spec.identity.runtime_id.clone());
    set(label("spec-hash"), hash(spec));
    set(label("owner"), owner.to_owned());
    set(label("term"), "1".to_owned());
    let retention = match spec.policies.retention_policy {
        RetentionPolicy::DestroyOnCompletion => "destroy_on_completion",
        RetentionPolicy::KeepUntilStopped => "keep_until_stopped",
        RetentionPolicy::DebugKeep => "debug_keep",
    };
    set(label("retention"), retention.to_owned());
    for (name, value) in &spec.labels {
        set(label(&format!("label.{name}")), value.clone());
    }
    // An instance that starts again by itself after a restart of its host would run beside the collector's knowledge.
    set("boot.autostart".to_owned(), "false".to_owned());
    if let Some(count) = spec.resources.vcpu_count {
        set("limits.cpu".to_owned(), count.to_string());
    }
    if let Some(mib) = spec.resources.memory_mib {
        set("limits.memory".to_owned(), format!("{mib}MiB"));
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
    for (index, mount) in spec.mounts.iter().enumerate() {
        // Incus takes the first folder of the source as it is: a link in it would be followed, so `source` is the user's.
        let device = json!({
            "type": "disk",
            "source": mount.source,
            "path": mount.guest_path,
            "readonly": "true",
        });
        devices.insert(format!("pika-mount-{index}"), device);
    }
    devices
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> RuntimeSpec {
        let text = r#"{
            "identity": {"runtime_id": "job-7", "instance_name": "job-7"},
            "incus": {"image_alias": "ci", "instance_type": "container"},
            "resources": {"vcpu_count": 2, "memory_mib": 512, "root_disk_gib": 8},
            "mounts": [{"kind": "read_only_snapshot", "guest_path": "/workspace", "source": "/srv/snap"}],
            "entry_command": "make",
            "bootstrap": {"env": {"TOKEN": "geheim"}},
            "labels": {"team": "core"}
        }"#;
        RuntimeSpec::from_json(text).unwrap()
    }

    #[test]
    fn labels_limits_and_mounts_are_in_the_creating_call() {
        let root = BTreeMap::from([
            ("type".to_owned(), "disk".to_owned()),
            ("path".to_owned(), "/".to_owned()),
            ("pool".to_owned(), "default".to_owned()),
        ]);
        let request = create_request(&spec(), "owner-1", Some(&root));
        let config: BTreeMap<String, String> = serde_json::from_value(request["config"].clone()).unwrap();
        let labels = Labels::read(&config).unwrap();
        assert_eq!((labels.runtime_id.as_str(), labels.owner.as_str(), labels.term), ("job-7", "owner-1", 1));
        assert_eq!(labels.spec_hash, hash(&spec()));
        assert_eq!(config["limits.cpu"], "2");
        assert_eq!(config["limits.memory"], "512MiB");
        assert_eq!(config["user.pika-cloud.label.team"], "core");
        assert_eq!(request["devices"]["root"]["size"], "8GiB");
        assert_eq!(request["devices"]["root"]["pool"], "default");
        assert_eq!(request["devices"]["pika-mount-0"]["readonly"], "true");
        assert_eq!(request["type"], "container");
    }

    /// Invariant 8: the environment reaches the guest through the session only.
    #[test]
    fn no_environment_is_in_the_creating_call() {
        assert!(!create_request(&spec(), "owner-1", None).to_string().contains("geheim"));
    }

    #[test]
    fn an_instance_without_all_labels_is_not_ours() {
        assert_eq!(Labels::read(&BTreeMap::from([(label("runtime-id"), "job-7".to_owned())])), None);
    }
}
