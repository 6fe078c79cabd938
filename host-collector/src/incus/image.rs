//! Images and their aliases: what is baked, published, and pointed to.
//!
//! An alias is moved by one conditional PUT, so that it points to the old image or to the new one, and never to nothing. That
//! PUT replaces the description as well, so the old one is sent along.

use std::collections::BTreeMap;
use std::time::Duration;

use hyper::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use super::client::{CALL_TIMEOUT, Client, Sent};
use super::error::Error;
use super::instance::{Image, encode, found};
use super::operation::fingerprint;
use super::takeover::Patched;

/// How long Incus may take to pack, compress and store an image.
pub(crate) const PUBLISH_LIMIT: Duration = Duration::from_secs(3600);

/// Where an alias points.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Alias {
    /// The fingerprint of its image.
    pub(crate) target: String,
    #[serde(default)]
    description: String,
    /// Of what was read, for [`Client::move_alias`].
    #[serde(skip)]
    etag: String,
}

fn alias_path(project: &str, name: &str) -> String {
    format!("/1.0/images/aliases/{}?project={}", encode(name), encode(project))
}

fn image_path(project: &str, fingerprint: &str) -> String {
    format!("/1.0/images/{}?project={}", encode(fingerprint), encode(project))
}

impl Client {
    /// The alias of that name, or `None`.
    pub(crate) async fn alias(&self, project: &str, name: &str) -> Result<Option<Alias>, Error> {
        let answer = found(self.get_with_etag::<Alias>(&alias_path(project, name)).await)?;
        Ok(answer.map(|(alias, etag)| Alias { etag, ..alias }))
    }

    /// The image behind an alias, or `None`.
    ///
    /// # Errors
    /// Where the question itself failed.
    pub async fn image(&self, project: &str, alias: &str) -> Result<Option<Image>, Error> {
        match self.alias(project, alias).await? {
            None => Ok(None),
            Some(alias) => self.image_of(project, &alias.target).await,
        }
    }

    /// The image of that fingerprint, or `None`.
    pub(crate) async fn image_of(&self, project: &str, fingerprint: &str) -> Result<Option<Image>, Error> {
        found(self.get(&image_path(project, fingerprint)).await)
    }

    /// Every image of a project; none where there is no such project.
    ///
    /// # Errors
    /// Where Incus does not answer.
    pub async fn images(&self, project: &str) -> Result<Vec<Image>, Error> {
        let path = format!("/1.0/images?recursion=1&project={}", encode(project));
        // An empty list may be answered as null.
        Ok(found(self.get::<Option<Vec<Image>>>(&path).await)?.flatten().unwrap_or_default())
    }

    /// The names of all projects that this client may see.
    pub(crate) async fn projects(&self) -> Result<Vec<String>, Error> {
        let paths: Vec<String> = self.get("/1.0/projects").await?;
        Ok(paths.iter().filter_map(|path| path.rsplit('/').next()).map(str::to_owned).collect())
    }

    /// Has Incus make an image of a stopped instance; gives the path of the operation that does.
    pub(crate) async fn begin_publish(
        &self,
        project: &str,
        instance: &str,
        properties: &BTreeMap<String, String>,
    ) -> Result<String, Error> {
        let path = format!("/1.0/images?project={}", encode(project));
        let body = json!({
            "source": { "type": "instance", "name": instance },
            "properties": properties,
            "public": false,
        });
        let envelope = self.call(Method::POST, &path, Some(&body), CALL_TIMEOUT).await?;
        Ok(envelope.operation)
    }

    /// Waits until an image is published, and gives its fingerprint; `None` where Incus does not say it.
    pub(crate) async fn wait_published(&self, operation: &str) -> Result<Option<String>, Error> {
        self.wait("publishing the image", operation, PUBLISH_LIMIT).await.map(|metadata| fingerprint(&metadata))
    }

    /// Makes an alias; `false` where there is one of that name.
    pub(crate) async fn make_alias(&self, project: &str, name: &str, fingerprint: &str) -> Result<bool, Error> {
        let path = format!("/1.0/images/aliases?project={}", encode(project));
        let body = json!({ "name": name, "description": "", "target": fingerprint });
        match self.call(Method::POST, &path, Some(&body), CALL_TIMEOUT).await {
            Ok(_) => Ok(true),
            Err(Error::Refused { code: 409, .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Points an alias to another image, if nobody changed it since `alias` was read.
    pub(crate) async fn move_alias(
        &self,
        project: &str,
        name: &str,
        alias: &Alias,
        fingerprint: &str,
    ) -> Result<Patched, Error> {
        let body: Value = json!({ "description": alias.description, "target": fingerprint });
        let sent = Sent { body: Some(&body), if_match: Some(&alias.etag) };
        match self.send(Method::PUT, &alias_path(project, name), sent, CALL_TIMEOUT).await {
            Ok(_) => Ok(Patched::Done),
            Err(Error::Refused { code: 412, .. }) => Ok(Patched::Raced),
            Err(error) => Err(error),
        }
    }

    /// Deletes an image, and with it every alias that it has.
    pub(crate) async fn delete_image(&self, project: &str, fingerprint: &str) -> Result<(), Error> {
        let path = image_path(project, fingerprint);
        self.change("deleting the image", Method::DELETE, &path, None, Duration::from_secs(120)).await
    }
}
