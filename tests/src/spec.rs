//! Specs for tests.

use serde_json::{Value, json};

use crate::lab;

/// A spec under construction: small and impatient unless a test says otherwise.
#[derive(Clone, Debug)]
pub struct Spec {
    /// `identity.runtime_id`.
    pub id: String,
    /// `identity.instance_name`.
    pub instance: String,
    /// All of it.
    pub json: Value,
}

impl Spec {
    /// Of a container that runs `command`.
    pub(crate) fn new(name: &str, command: &str) -> Self {
        Self {
            id: name.to_owned(),
            instance: name.to_owned(),
            json: json!({
                "identity": { "runtime_id": name, "instance_name": name },
                "incus": { "image_alias": lab::IMAGE, "instance_type": "container" },
                "entry_command": command,
                "watchdogs": { "boot_secs": 60, "silence_secs": 20, "stop_grace_secs": 2, "collect_secs": 30 },
            }),
        }
    }

    /// The same with another value at `path`, such as `watchdogs.run_secs`.
    #[must_use]
    pub fn with(mut self, path: &str, value: impl Into<Value>) -> Self {
        let mut at = &mut self.json;
        for name in path.split('.') {
            at = &mut at[name];
        }
        *at = value.into();
        self
    }

    /// The same, its workload run as root.
    #[must_use]
    pub fn as_root(self) -> Self {
        self.with("bootstrap.run_as_root", true)
    }
}
