//! Baking in a test, and what there is of it in Incus.

use std::collections::BTreeMap;
use std::process::Command;

use serde_json::Value;

use crate::host::read_text;
use crate::image::Image;
use crate::incus::Incus;
use crate::lab::Lab;
use crate::run::{Finished, Running};
use crate::spec::Spec;
use crate::stage::Stage;

/// An image as Incus describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Its fingerprint.
    pub fingerprint: String,
    /// Names that point to it.
    pub aliases: Vec<String>,
    /// Its properties.
    pub properties: BTreeMap<String, String>,
}

impl Stage {
    /// `pika-cloud bake` of one alias into another, with the agent of the lab.
    pub fn bake_command(&self, from: &str, to: &str, more: &[&str]) -> Command {
        let mut command = self.cloud(&["bake", "--from", from, "--to", to, "--agent"]);
        command.arg(&Lab::get().agent).args(more);
        command
    }

    /// Runs that to its end.
    pub fn bake(&self, from: &str, to: &str, more: &[&str]) -> Finished {
        Running::start(&mut self.bake_command(from, to, more)).finish()
    }

    /// An alias that no other test has; what it names in the end is deleted.
    pub fn alias(&self, name: &str) -> Image {
        Image { alias: format!("{name}-{}", self.name()) }
    }

    /// A spec of a baked image that must not need the host's own agent.
    pub fn baked_spec(&self, image: &Image, command: &str) -> Spec {
        self.spec(command).with("incus.image_alias", image.alias.as_str()).with("incus.agent", "baked")
    }

    /// The id of the state dir.
    pub fn owner(&self) -> String {
        read_text(&self.state().join("id")).trim().to_owned()
    }

    /// Every image that was baked from this state dir.
    pub fn baked(&self) -> Vec<Seen> {
        let owner = self.owner();
        images().into_iter().filter(|image| image.properties.get("pika-cloud.owner") == Some(&owner)).collect()
    }

    /// Instances in which this state dir bakes.
    pub fn builders(&self) -> Vec<String> {
        let owner = self.owner();
        let all = Incus.get("/1.0/instances?recursion=1").expect("instances can be listed");
        let is_ours = |view: &&Value| {
            let config = &view["config"];
            config["user.pika-cloud.builder"].is_string() && config["user.pika-cloud.owner"] == *owner
        };
        let name = |view: &Value| view["name"].as_str().unwrap_or_default().to_owned();
        all.as_array().into_iter().flatten().filter(is_ours).map(name).collect()
    }

    /// That no bake left anything but images with a name: no builder, no image without one, no record.
    pub fn check_baked(&self, images: usize) {
        assert_eq!(self.builders(), Vec::<String>::new(), "a builder is left");
        let baked = self.baked();
        assert_eq!(baked.len(), images, "{baked:?}");
        assert!(baked.iter().all(|image| !image.aliases.is_empty()), "an image without a name: {baked:?}");
        let records = std::fs::read_dir(self.state().join(".bakes")).into_iter().flatten().flatten();
        // `images` says of what is there whose it is.
        let records: Vec<_> = records.map(|entry| entry.path()).filter(|path| !path.ends_with("images")).collect();
        assert!(records.is_empty(), "{records:?}");
    }
}

/// Every image of the default project.
pub fn images() -> Vec<Seen> {
    let all = Incus.get("/1.0/images?recursion=1").expect("images can be listed");
    let seen = |image: &Value| Seen {
        fingerprint: image["fingerprint"].as_str().unwrap_or_default().to_owned(),
        aliases: image["aliases"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|alias| alias["name"].as_str().map(str::to_owned))
            .collect(),
        properties: serde_json::from_value(image["properties"].clone()).unwrap_or_default(),
    };
    all.as_array().into_iter().flatten().map(seen).collect()
}

/// The image behind an alias.
pub fn image_of(alias: &str) -> Option<Seen> {
    images().into_iter().find(|image| image.aliases.iter().any(|name| name == alias))
}
