//! Whether the agent in an image is one that this host can talk to, and the one that a bake would put in today, by
//! what the image's properties say.

use std::fmt;

use pika_cloud_common::document::SCHEMA_VERSION;
use pika_cloud_common::wire::PROTOCOL;

use super::{
    PROPERTY_AGENT_DIGEST, PROPERTY_AGENT_VERSION, PROPERTY_BAKE, PROPERTY_BASE_ALIAS, PROPERTY_BASE_FINGERPRINT,
    PROPERTY_PROTOCOL, PROPERTY_SCHEMA_VERSION, bake_command, digest_text,
};
use crate::cloud::Cloud;
use crate::incus::{Error, Image};

/// What is wrong with the agent in a baked image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Staleness {
    /// It speaks another protocol, or writes other documents: no session will come about.
    OtherContract {
        /// Its protocol and schema version, as the image says.
        image: (String, String),
        /// The base to bake anew from.
        base: String,
    },
    /// The base alias points to another image by now.
    Base {
        /// The alias.
        base: String,
        /// The image that it was baked from.
        baked_from: String,
        /// The image that the alias points to.
        now: String,
    },
    /// The host's own agent is another one.
    Agent {
        /// The version in the image.
        image: String,
        /// The base to bake anew from.
        base: String,
    },
}

impl Staleness {
    /// Whether nothing can be run with it, rather than that a bake would do good.
    pub fn is_error(&self) -> bool {
        matches!(self, Self::OtherContract { .. })
    }

    /// The command that mends it. `alias` is the image's, in that project.
    pub fn mend(&self, alias: &str, project: &str) -> String {
        let (Self::OtherContract { base, .. } | Self::Base { base, .. } | Self::Agent { base, .. }) = self;
        bake_command(Some(base), alias, project)
    }
}

impl fmt::Display for Staleness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OtherContract { image: (protocol, schema), .. } => write!(
                f,
                "its pika-guest speaks protocol {protocol} with schema version {schema}, and this host protocol {PROTOCOL} with \
                 schema version {SCHEMA_VERSION}"
            ),
            Self::Base { base, baked_from, now } => write!(
                f,
                "it was baked from {}, and `{base}` is {} by now",
                super::tidy::short(baked_from),
                super::tidy::short(now)
            ),
            Self::Agent { image, .. } => write!(f, "its pika-guest ({image}) is another one than this host's own"),
        }
    }
}

/// A baked image whose agent, or base, is not what it could be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StaleImage {
    /// Its project.
    pub project: String,
    /// Its first alias, or its fingerprint where it has none.
    pub name: String,
    /// What is wrong with it.
    pub staleness: Staleness,
}

impl Cloud {
    /// Every baked image with a name that this client may see and that should be baked anew.
    ///
    /// # Errors
    /// Where Incus does not answer.
    pub async fn stale_images(&self) -> Result<Vec<StaleImage>, Error> {
        let mut stale = Vec::new();
        for project in self.incus().projects().await? {
            // A project that has none of its own is answered with those of `default`.
            let images = self.incus().images(&project).await?.into_iter().filter(|image| image.project == project);
            for image in images {
                let Some(name) = image.aliases.first().map(|alias| alias.name.clone()) else { continue };
                let found = self.staleness(&project, &image).await?;
                stale.extend(found.into_iter().map(|staleness| StaleImage {
                    project: project.clone(),
                    name: name.clone(),
                    staleness,
                }));
            }
        }
        Ok(stale)
    }

    /// What is wrong with the agent in an image, beginning with the worst.
    pub(crate) async fn staleness(&self, project: &str, image: &Image) -> Result<Vec<Staleness>, Error> {
        let Some(base) = image.properties.get(PROPERTY_BASE_ALIAS) else { return Ok(Vec::new()) };
        let base_now = self.incus().alias(project, base).await?.map(|alias| alias.target);
        // Where the host has none of its own, the image's is as good as any.
        let own = self.agent().fetch(&image.architecture).await.ok().map(|agent| digest_text(agent.digest));
        Ok(judge(image, base_now.as_deref(), own.as_deref()))
    }
}

/// Judges a baked image; nothing is found in one that was not baked. `base_now` is the fingerprint that its base alias points to,
/// `own_digest` that of the host's own agent for its architecture, where there is one.
fn judge(image: &Image, base_now: Option<&str>, own_digest: Option<&str>) -> Vec<Staleness> {
    let get = |key: &str| image.properties.get(key).cloned().unwrap_or_default();
    let mut found = Vec::new();
    if !image.properties.contains_key(PROPERTY_BAKE) {
        return found;
    }
    let base = get(PROPERTY_BASE_ALIAS);
    let contract = (get(PROPERTY_PROTOCOL), get(PROPERTY_SCHEMA_VERSION));
    if contract != (PROTOCOL.to_string(), SCHEMA_VERSION.to_string()) {
        found.push(Staleness::OtherContract { image: contract, base: base.clone() });
    }
    let baked_from = get(PROPERTY_BASE_FINGERPRINT);
    if let Some(now) = base_now.filter(|now| *now != baked_from) {
        found.push(Staleness::Base { base: base.clone(), baked_from, now: now.to_owned() });
    }
    if own_digest.is_some_and(|own| own != get(PROPERTY_AGENT_DIGEST)) {
        found.push(Staleness::Agent { image: get(PROPERTY_AGENT_VERSION), base });
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(change: &[(&str, &str)]) -> Image {
        let protocol = PROTOCOL.to_string();
        let schema = SCHEMA_VERSION.to_string();
        let properties = [
            (PROPERTY_BAKE, "0123456789abcdef0123456789abcdef"),
            (PROPERTY_AGENT_VERSION, "0.1.0"),
            (PROPERTY_AGENT_DIGEST, "sha256:aa"),
            (PROPERTY_PROTOCOL, &protocol),
            (PROPERTY_SCHEMA_VERSION, &schema),
            (PROPERTY_BASE_ALIAS, "debian"),
            (PROPERTY_BASE_FINGERPRINT, "f00dfeedf00dfeed"),
        ];
        let properties = properties.iter().chain(change).map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        Image { properties: properties.collect(), ..Image::default() }
    }

    #[test]
    fn a_fresh_image_is_not_found_fault_with() {
        assert_eq!(judge(&image(&[]), Some("f00dfeedf00dfeed"), Some("sha256:aa")), []);
        // Nobody can tell.
        assert_eq!(judge(&image(&[]), None, None), []);
        assert_eq!(judge(&Image::default(), Some("f00d"), Some("sha256:bb")), [], "it was not baked");
    }

    #[test]
    fn another_contract_is_an_error_and_names_both_and_the_way_out() {
        for change in [[(PROPERTY_PROTOCOL, "0")], [(PROPERTY_SCHEMA_VERSION, "")]] {
            let found = judge(&image(&change), None, None);
            assert!(matches!(found[..], [Staleness::OtherContract { .. }]) && found[0].is_error(), "{found:?}");
            assert_eq!(found[0].mend("ci", "p"), "pika-cloud bake --from debian --to ci --project p");
        }
        let words = judge(&image(&[(PROPERTY_PROTOCOL, "0")]), None, None)[0].to_string();
        assert!(words.contains("protocol 0") && words.contains("protocol 1"), "{words}");
    }

    /// Whoever makes an image says what it was baked from.
    #[test]
    fn a_base_that_is_no_plain_word_is_not_to_be_pasted() {
        let found = judge(&image(&[(PROPERTY_BASE_ALIAS, "x; id")]), None, Some("sha256:bb"));
        assert_eq!(found[0].mend("ci", "default"), "pika-cloud bake --from BASE --to ci");
    }

    #[test]
    fn a_newer_base_and_another_agent_are_warnings() {
        let found = judge(&image(&[]), Some("beefbeefbeefbeef"), Some("sha256:bb"));
        assert!(matches!(found[..], [Staleness::Base { .. }, Staleness::Agent { .. }]), "{found:?}");
        assert!(found.iter().all(|one| !one.is_error()));
        assert_eq!(found[0].to_string(), "it was baked from f00dfeedf00d, and `debian` is beefbeefbeef by now");
    }
}
