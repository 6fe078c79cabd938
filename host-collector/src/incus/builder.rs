//! The instance in which an image is baked: its labels, and the call that makes it. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde_json::{Value, json};

use super::instance::Image;
use super::plan::{label, rfc3339, since_epoch};
use crate::state_dir::is_owner_id;

/// What marks an instance as a builder, from the call that creates it. It has no runtime's id, so that no runtime is taken for
/// it; see [`Labels`](super::Labels) for what labels are believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BuilderLabels {
    /// The bake that made it.
    pub(crate) bake: String,
    /// The id of the state dir whose collector may remove it.
    pub(crate) owner: String,
    /// When its bake is over for certain, since the UNIX epoch.
    pub(crate) expires_at: Duration,
}

impl BuilderLabels {
    /// The labels of a builder, or `None` where one is missing or malformed, or it is a runtime's. A copy has them as well: it is
    /// its maker's, and has another name.
    pub(crate) fn read(name: &str, config: &BTreeMap<String, String>) -> Option<Self> {
        let get = |name: &str| config.get(&label(name));
        if get("runtime-id").is_some() {
            return None;
        }
        Some(Self {
            bake: get("builder").filter(|bake| is_bake_id(bake) && builder_name(bake) == name)?.clone(),
            owner: get("owner").filter(|owner| is_owner_id(owner))?.clone(),
            expires_at: since_epoch(get("expires-at")?)?,
        })
    }

    fn write(&self) -> BTreeMap<String, String> {
        BTreeMap::from([
            (label("builder"), self.bake.clone()),
            (label("owner"), self.owner.clone()),
            (label("expires-at"), rfc3339(self.expires_at)),
        ])
    }
}

/// Whether `text` may be a bake's id: 32 hexadecimal digits, and so the name of a folder, too.
pub(crate) fn is_bake_id(text: &str) -> bool {
    text.len() == 32 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The builder's name, by its bake.
pub(crate) fn builder_name(bake: &str) -> String {
    format!("pika-bake-{}", bake.get(..12).unwrap_or(bake))
}

/// What an image says of itself where its kernel is not signed. Incus refuses to start it otherwise.
const UNSIGNED: (&str, &str) = ("requirements.secureboot", "false");

/// What cloud-init does where it is told nothing.
const NO_DATA: &str = "#cloud-config\n{}\n";

/// What a builder has instead of what a profile has cloud-init do, which is for instances, and may hold their secrets: cloud-init
/// would leave it in the image. Incus takes an empty value for none, and the profile's stays.
fn instead(key: &str, kind: &str) -> Option<String> {
    match key {
        "cloud-init.user-data" | "cloud-init.vendor-data" | "user.user-data" | "user.vendor-data" => {
            Some(NO_DATA.to_owned())
        }
        "user.meta-data" => Some("#\n".to_owned()),
        "cloud-init.network-config" | "user.network-config" => {
            // As Incus's own images do where they are told nothing.
            let name = if kind == "virtual-machine" { "enp5s0" } else { "eth0" };
            Some(format!(
                "version: 1\nconfig:\n- type: physical\n  name: {name}\n  subnets:\n  - type: dhcp\n    control: auto\n"
            ))
        }
        _ => None,
    }
}

/// The body of `POST /1.0/instances` for a builder. `from_profiles` are the keys that its profiles set.
pub(crate) fn builder_request(
    labels: &BuilderLabels,
    profiles: &[String],
    from_profiles: &BTreeSet<String>,
    base: &Image,
) -> Value {
    let mut config = labels.write();
    config.extend(from_profiles.iter().filter_map(|key| Some((key.clone(), instead(key, &base.kind)?))));
    config.insert("boot.autostart".to_owned(), "false".to_owned());
    if base.kind == "virtual-machine" && base.properties.get(UNSIGNED.0).is_some_and(|value| value == UNSIGNED.1) {
        config.insert("security.secureboot".to_owned(), "false".to_owned());
    }
    json!({
        "name": builder_name(&labels.bake),
        "type": base.kind,
        "profiles": profiles,
        "config": config,
        "source": { "type": "image", "fingerprint": base.fingerprint },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::incus::{Labels, is_marked};

    const BAKE: &str = "0123456789abcdef0123456789abcdef";
    const NAME: &str = "pika-bake-0123456789ab";

    fn labels() -> BuilderLabels {
        BuilderLabels { bake: BAKE.to_owned(), owner: "me".to_owned(), expires_at: Duration::from_secs(1_800_000_000) }
    }

    fn base(kind: &str, properties: &[(&str, &str)]) -> Image {
        let properties = properties.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Image { kind: kind.to_owned(), fingerprint: "f00".to_owned(), properties, ..Image::default() }
    }

    fn config(request: &Value) -> BTreeMap<String, String> {
        serde_json::from_value(request["config"].clone()).unwrap()
    }

    #[test]
    fn a_builder_is_marked_from_the_call_that_creates_it() {
        let request =
            builder_request(&labels(), &["default".to_owned()], &BTreeSet::new(), &base("virtual-machine", &[]));
        assert_eq!(BuilderLabels::read(NAME, &config(&request)), Some(labels()));
        assert_eq!(BuilderLabels::read("copy", &config(&request)), None, "somebody copied it");
        assert_eq!(request["name"], "pika-bake-0123456789ab");
        assert_eq!(request["type"], "virtual-machine");
        assert_eq!(request["source"]["fingerprint"], "f00");
    }

    #[test]
    fn what_profiles_have_cloud_init_do_is_not_done_in_a_builder() {
        let keys: Vec<String> = ["network-config", "user-data", "vendor-data"]
            .iter()
            .flat_map(|name| [format!("cloud-init.{name}"), format!("user.{name}")])
            .chain(["user.meta-data".to_owned()])
            .collect();
        let request = |keys: &[String]| {
            let set = keys.iter().cloned().chain(["limits.cpu".to_owned()]).collect();
            config(&builder_request(&labels(), &[], &set, &base("container", &[])))
        };
        let (with, without) = (request(&keys), request(&[]));
        for key in &keys {
            assert!(with.get(key).is_some_and(|value| !value.is_empty()), "{key}: Incus forgets what is empty");
            assert!(!without.contains_key(key), "{key}");
        }
        assert!(!with.contains_key("limits.cpu"));
    }

    #[test]
    fn a_machine_whose_kernel_is_not_signed_can_be_started() {
        let secureboot = |kind, properties| {
            config(&builder_request(&labels(), &[], &BTreeSet::new(), &base(kind, properties)))
                .get("security.secureboot")
                .cloned()
        };
        assert_eq!(secureboot("virtual-machine", &[UNSIGNED]).as_deref(), Some("false"));
        assert_eq!(secureboot("virtual-machine", &[]), None);
        // Incus takes it for nothing but machines.
        assert_eq!(secureboot("container", &[UNSIGNED]), None);
    }

    /// Invariant 4: no runtime's reconciliation takes it for one of its own.
    #[test]
    fn a_builder_is_no_runtime_and_a_runtime_no_builder() {
        let mut config = config(&builder_request(&labels(), &[], &BTreeSet::new(), &base("container", &[])));
        assert!(is_marked(&config) && Labels::read(&config).is_none());
        config.insert(label("runtime-id"), "job".to_owned());
        assert_eq!(BuilderLabels::read(NAME, &config), None);
    }

    #[test]
    fn what_is_missing_or_malformed_is_nobodys() {
        let whole = labels().write();
        for (key, value) in [("builder", "../../etc"), ("builder", ""), ("owner", "a/b"), ("expires-at", "soon")] {
            let mut config = whole.clone();
            config.insert(label(key), value.to_owned());
            assert_eq!(BuilderLabels::read(NAME, &config), None, "{key}");
            config.remove(&label(key));
            assert_eq!(BuilderLabels::read(NAME, &config), None, "{key}");
        }
    }
}
