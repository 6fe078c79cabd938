//! Baking: any Linux image that Incus has becomes one with the agent in it.
//!
//! ```text
//!   image FROM ─► builder ─► agent, units, group ─► files, script ─► cleaned, stopped ─► published ─► alias TO ─► tidied
//!                 created,     put in by exec,        the user's      image without a     one         builder goes, and the
//!                 labelled     and run there                          name, with          PUT         image that TO had, if
//!                                                                     properties                      it was ours and unused
//! ```
//!
//! # What was found out on a real Incus (6.0.4, pool `dir`)
//!
//! | | |
//! |---|---|
//! | who asks for an image dies | publishing goes on in Incus; its operation is called "Downloading image", names neither instance nor image, and cannot be cancelled |
//! | the instance is deleted meanwhile | Incus allows it at once; publishing fails some seconds later, with a file that is not there, unless it was past reading: then there is an image |
//! | the instance is started meanwhile | Incus allows it; the image is a mixture. Nobody starts a builder |
//! | a running instance | is refused, by the operation |
//! | an image in a list | is whole, and has its properties from the first moment |
//! | properties | those of the call are added to those in the instance's own `metadata.yaml`, and come before them |
//! | kind | the instance's: one of a virtual machine makes an image for those |
//! | PUT on an alias | 200 swaps under 649 reads: never a 404. It honours `If-Match` (412), answers 404 where the alias or the image is not there, and empties the description unless that is sent along |
//! | POST of an alias that is there | 409 |
//! | DELETE of an image | takes its aliases along; an instance that is just being made from it fails, also where its call had only looked the alias up. One that is listed has its image's fingerprint in `volatile.base_image` from then on |
//!
//! # After a crash
//!
//! What a bake is about to make is in its record before Incus is asked for it, under a lock that goes with the process. The
//! alias is moved by one call, so it is the old image's or the new one's. What else is left is found by
//! [`Cloud::reconcile`](crate::Cloud::reconcile), and by each later bake of the same state dir:
//!
//! | died | left | what is done |
//! |---|---|---|
//! | before the builder was there | the record; a create that goes on in Incus | waited for, then as below |
//! | before it was published | the builder | deleted |
//! | while it was published | the builder; an image that may come | builder deleted, Incus waited for, the image deleted if it has no alias |
//! | after the alias was moved | the builder; the image that it had before | both deleted; an image only where it was baked from here, and only once it has no other alias and no instance was made from it |
//!
//! A builder of another state dir is reported, and never touched.
//!
//! # What is in the image beside what was asked for
//!
//! The agent at `/usr/bin/pika-guest`, what makes the init start it, and the group `pika-cloud`. The builder was booted, so that
//! what its image does at a first boot is in the baked image too. Of that, only what two machines must not share is removed where
//! systemd makes it anew: machine id, random seed, credential secret. Logs, package caches and host keys are the provisioning
//! script's to remove.

mod baker;
mod command;
mod error;
#[cfg(test)]
mod fake;
mod freshness;
mod guest;
mod images;
mod install;
mod order;
mod probe;
pub(crate) mod record;
mod swap;
pub(crate) mod tidy;

use pika_cloud_common::digest::Digest;

pub(crate) use command::bake_command;
pub use error::BakeError;
pub use freshness::{StaleImage, StaleImages, Staleness};
pub use order::{Bake, BakeFile, NotABakeFile};
pub use probe::Init;

use crate::incus::Image;

/// The release of the agent in an image.
pub(crate) const PROPERTY_AGENT_VERSION: &str = "pika-cloud.agent-version";
/// SHA-256 over it.
pub(crate) const PROPERTY_AGENT_DIGEST: &str = "pika-cloud.agent-digest";
/// The session protocol that it speaks.
pub(crate) const PROPERTY_PROTOCOL: &str = "pika-cloud.protocol";
/// The version of the documents that it writes.
pub(crate) const PROPERTY_SCHEMA_VERSION: &str = "pika-cloud.schema-version";
/// The image that was baked from.
pub(crate) const PROPERTY_BASE_FINGERPRINT: &str = "pika-cloud.base-fingerprint";
/// The alias by which that was named.
pub(crate) const PROPERTY_BASE_ALIAS: &str = "pika-cloud.base-alias";
/// The id of the bake.
pub(crate) const PROPERTY_BAKE: &str = "pika-cloud.bake";
/// The id of the state dir that it was baked from.
pub(crate) const PROPERTY_OWNER: &str = "pika-cloud.owner";

/// Images that say that they are of a bake and that nobody named. Only where Incus does not know any more what it published is
/// that asked, and only if one image says so is it believed: [others](images) may say so as well.
fn claimed<'a>(images: &'a [Image], bake: &str, owner: &str) -> Vec<&'a Image> {
    let says = |image: &Image, key: &str, value: &str| image.properties.get(key).is_some_and(|found| found == value);
    let is_claimed = |image: &&Image| {
        says(image, PROPERTY_BAKE, bake)
            && says(image, PROPERTY_OWNER, owner)
            && image.aliases.is_empty()
            && !image.public
    };
    images.iter().filter(is_claimed).collect()
}

/// A digest as agents say it and properties hold it.
pub(crate) fn digest_text(digest: Digest) -> String {
    format!("sha256:{digest}")
}

/// What [`Cloud::bake`](crate::Cloud::bake) tells on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BakeProgress<'a> {
    /// What is done now.
    Step(&'a str),
    /// What the provisioning script prints, as it comes; 64 MiB of it at most.
    Output(&'a [u8]),
    /// The alias points to the image of that fingerprint, and what follows changes nothing about that.
    Baked(&'a str),
}

/// An image that was baked.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Baked {
    /// The id of its bake.
    pub bake: String,
    /// By which Incus names it.
    pub fingerprint: String,
    /// The image that it was baked from.
    pub base_fingerprint: String,
    /// What starts the agent in its instances.
    pub init: Init,
    /// The release of that agent.
    pub agent_version: String,
    /// SHA-256 over it, as `sha256:` and hexadecimal digits.
    pub agent_digest: String,
    /// Images that the alias had before, and that were deleted.
    pub deleted: Vec<String>,
    /// The image that the alias had before, where it was not baked from this state dir: it stays, and nobody here deletes it.
    pub foreign: Option<String>,
    /// What of ours stays for now, and why: another alias or an instance needs it. `reconcile` deletes it once nothing does.
    pub kept: Vec<String>,
    /// What could not be removed, and why: the builder may still be there. `reconcile`, or the next bake, goes on with that.
    pub left: Option<String>,
}
