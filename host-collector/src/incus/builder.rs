//! The instance in which an image is baked: its labels, and the call that makes it. Pure.

use std::collections::BTreeMap;
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
    /// The labels of a builder, or `None` where one is missing or malformed, or it is a runtime's.
    pub(crate) fn read(config: &BTreeMap<String, String>) -> Option<Self> {
        let get = |name: &str| config.get(&label(name));
        if get("runtime-id").is_some() {
            return None;
        }
        Some(Self {
            bake: get("builder").filter(|bake| is_bake_id(bake))?.clone(),
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

/// The body of `POST /1.0/instances` for a builder.
pub(crate) fn builder_request(labels: &BuilderLabels, profiles: &[String], base: &Image) -> Value {
    let mut config = labels.write();
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
        let request = builder_request(&labels(), &["default".to_owned()], &base("virtual-machine", &[]));
        assert_eq!(BuilderLabels::read(&config(&request)), Some(labels()));
        assert_eq!(request["name"], "pika-bake-0123456789ab");
        assert_eq!(request["type"], "virtual-machine");
        assert_eq!(request["source"]["fingerprint"], "f00");
    }

    #[test]
    fn a_machine_whose_kernel_is_not_signed_can_be_started() {
        let secureboot = |kind, properties| {
            config(&builder_request(&labels(), &[], &base(kind, properties))).get("security.secureboot").cloned()
        };
        assert_eq!(secureboot("virtual-machine", &[UNSIGNED]).as_deref(), Some("false"));
        assert_eq!(secureboot("virtual-machine", &[]), None);
        // Incus takes it for nothing but machines.
        assert_eq!(secureboot("container", &[UNSIGNED]), None);
    }

    /// Invariant 4: no runtime's reconciliation takes it for one of its own.
    #[test]
    fn a_builder_is_no_runtime_and_a_runtime_no_builder() {
        let mut config = config(&builder_request(&labels(), &[], &base("container", &[])));
        assert!(is_marked(&config) && Labels::read(&config).is_none());
        config.insert(label("runtime-id"), "job".to_owned());
        assert_eq!(BuilderLabels::read(&config), None);
    }

    #[test]
    fn what_is_missing_or_malformed_is_nobodys() {
        let whole = labels().write();
        for (key, value) in [("builder", "../../etc"), ("builder", ""), ("owner", "a/b"), ("expires-at", "soon")] {
            let mut config = whole.clone();
            config.insert(label(key), value.to_owned());
            assert_eq!(BuilderLabels::read(&config), None, "{key}");
            config.remove(&label(key));
            assert_eq!(BuilderLabels::read(&config), None, "{key}");
        }
    }
}
