//! Instances and what they need: images, profiles, projects.

use std::collections::BTreeMap;
use std::time::Duration;

use hyper::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use super::client::{CALL_TIMEOUT, Client};
use super::error::Error;
use super::operation::Operation;

/// How long Incus may take to unpack an image into a new instance.
const CREATE_LIMIT: Duration = Duration::from_secs(600);
/// How long Incus may take to start, stop or delete an instance.
const CHANGE_LIMIT: Duration = Duration::from_secs(120);

/// An instance as Incus describes it.
#[derive(Clone, Debug, Deserialize)]
pub struct InstanceView {
    /// Its name in its project.
    pub name: String,
    /// Its project.
    #[serde(default)]
    pub project: String,
    /// Incus's own word, such as `Running`.
    #[serde(default)]
    pub status: String,
    /// Its own configuration, labels included.
    #[serde(default)]
    pub config: BTreeMap<String, String>,
    /// `container` or `virtual-machine`.
    #[serde(rename = "type", default)]
    pub kind: String,
    /// The cluster member that it is on; `none` where there is no cluster.
    #[serde(default)]
    pub location: String,
    /// What its programs run on, such as `x86_64`.
    #[serde(default)]
    pub architecture: String,
}

/// Where the kernel of the host that runs a virtual machine finds it, and which machine that must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockAddress {
    /// Its context id. It may change at each start, and be another machine's afterwards.
    pub cid: u32,
    /// The machine's DMI `product_uuid`, in lower case.
    pub machine_uuid: String,
}

/// What an instance's status means to pika-cloud.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InstanceState {
    /// It runs, or comes up.
    Running,
    /// It is stopped.
    Stopped,
    /// It is between two states, or frozen.
    Changing,
    /// Incus itself cannot tell what became of it.
    Error,
}

impl InstanceView {
    /// Whether it was ever started, as far as Incus's own record goes.
    pub fn was_started(&self) -> bool {
        self.state() != InstanceState::Stopped || self.config.contains_key("volatile.last_state.power")
    }

    /// Where it is found over vsock, as Incus has it; `None` for a container, and for a machine that was never started.
    pub fn vsock(&self) -> Option<VsockAddress> {
        if self.kind != "virtual-machine" {
            return None;
        }
        let cid = self.config.get("volatile.vsock_id")?.parse().ok()?;
        let machine_uuid = self.config.get("volatile.uuid")?.to_ascii_lowercase();
        Some(VsockAddress { cid, machine_uuid })
    }

    /// What its status means.
    pub fn state(&self) -> InstanceState {
        match self.status.as_str() {
            // A guest may tell Incus that it is ready; it runs all the same.
            "Running" | "Ready" => InstanceState::Running,
            "Stopped" => InstanceState::Stopped,
            "Error" => InstanceState::Error,
            _ => InstanceState::Changing,
        }
    }
}

/// An image as Incus describes it.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Image {
    /// SHA-256 over it, by which it is named.
    #[serde(default)]
    pub fingerprint: String,
    /// Its project: `default` for a project that has no images of its own.
    #[serde(default)]
    pub project: String,
    /// Whether everybody may have it.
    #[serde(default)]
    pub public: bool,
    /// Names that point to it.
    #[serde(default)]
    pub aliases: Vec<ImageAlias>,
    /// `container` or `virtual-machine`.
    #[serde(rename = "type", default)]
    pub kind: String,
    /// What its programs run on, such as `x86_64`.
    #[serde(default)]
    pub architecture: String,
    /// What was baked into it.
    #[serde(default)]
    pub properties: BTreeMap<String, String>,
}

impl Image {
    /// What properties may be in all: Incus copies them into each instance, and tells them in every answer about one.
    pub(crate) const MAX_PROPERTY_BYTES: usize = 64 * 1024;

    /// Bytes of its properties where those are too many.
    pub(crate) fn too_many_properties(&self) -> Option<usize> {
        let bytes = self.properties.iter().map(|(key, value)| key.len() + value.len()).sum();
        (bytes > Self::MAX_PROPERTY_BYTES).then_some(bytes)
    }
}

/// A name of an image.
#[derive(Clone, Debug, Deserialize)]
pub struct ImageAlias {
    /// It.
    pub name: String,
}

/// A profile as Incus describes it.
#[derive(Clone, Debug, Deserialize)]
pub struct Profile {
    /// What it sets, by its key.
    #[serde(default)]
    pub config: BTreeMap<String, String>,
    /// Devices by name.
    #[serde(default)]
    pub devices: BTreeMap<String, BTreeMap<String, String>>,
}

impl Profile {
    /// The device that gives an instance its root disk.
    pub fn root_disk(&self) -> Option<&BTreeMap<String, String>> {
        let is =
            |device: &BTreeMap<String, String>, key: &str, value: &str| device.get(key).is_some_and(|v| v == value);
        self.devices.values().find(|device| is(device, "type", "disk") && is(device, "path", "/"))
    }
}

/// The operation behind an `exec`, with a secret for each of its websockets.
pub(crate) struct ExecOperation {
    pub(crate) id: String,
    pub(crate) secrets: BTreeMap<String, String>,
}

impl Client {
    /// The instance of that name, or `None` where Incus says that there is none.
    ///
    /// # Errors
    /// Where the question itself failed: that is not absence.
    pub async fn instance(&self, project: &str, name: &str) -> Result<Option<InstanceView>, Error> {
        found(self.get(&instance_path(project, name)).await)
    }

    /// All instances of a project.
    ///
    /// # Errors
    /// Where Incus does not answer.
    pub async fn instances(&self, project: &str) -> Result<Vec<InstanceView>, Error> {
        self.list(&format!("/1.0/instances?recursion=1&project={}", encode(project))).await
    }

    /// All instances of all projects that this client may see.
    ///
    /// # Errors
    /// Where Incus does not answer, or does not let this client ask for more than one project.
    pub async fn all_instances(&self) -> Result<Vec<InstanceView>, Error> {
        self.list("/1.0/instances?recursion=1&all-projects=true").await
    }

    async fn list(&self, path: &str) -> Result<Vec<InstanceView>, Error> {
        // An empty list may be answered as null.
        self.get::<Option<Vec<InstanceView>>>(path).await.map(Option::unwrap_or_default)
    }

    /// The profile of that name, or `None`.
    ///
    /// # Errors
    /// Where the question itself failed.
    pub async fn profile(&self, project: &str, name: &str) -> Result<Option<Profile>, Error> {
        found(self.get(&format!("/1.0/profiles/{}?project={}", encode(name), encode(project))).await)
    }

    /// Whether there is a project of that name.
    ///
    /// # Errors
    /// Where the question itself failed.
    pub async fn has_project(&self, name: &str) -> Result<bool, Error> {
        Ok(found(self.get::<Value>(&format!("/1.0/projects/{}", encode(name))).await)?.is_some())
    }

    /// The names of all storage pools.
    ///
    /// # Errors
    /// Where Incus does not answer.
    pub async fn storage_pools(&self) -> Result<Vec<String>, Error> {
        let paths: Vec<String> = self.get("/1.0/storage-pools").await?;
        Ok(paths.iter().filter_map(|path| path.rsplit('/').next()).map(str::to_owned).collect())
    }

    /// Makes an instance, stopped. `request` comes from [`create_request`](super::create_request).
    ///
    /// # Errors
    /// Where Incus refuses, fails, or takes longer than ten minutes.
    pub async fn create_instance(&self, project: &str, request: &Value) -> Result<(), Error> {
        let path = format!("/1.0/instances?project={}", encode(project));
        self.change("creating the instance", Method::POST, &path, Some(request), CREATE_LIMIT).await
    }

    /// Starts a stopped instance.
    ///
    /// # Errors
    /// Where Incus refuses, fails, or takes longer than two minutes.
    pub async fn start_instance(&self, project: &str, name: &str) -> Result<(), Error> {
        let body = json!({ "action": "start", "timeout": 60 });
        let path = format!("/1.0/instances/{}/state?project={}", encode(name), encode(project));
        self.change("starting the instance", Method::PUT, &path, Some(&body), CHANGE_LIMIT).await
    }

    /// Stops an instance, without asking what runs in it.
    ///
    /// # Errors
    /// Where Incus refuses, fails, or takes longer than two minutes.
    pub async fn stop_instance(&self, project: &str, name: &str) -> Result<(), Error> {
        let body = json!({ "action": "stop", "force": true, "timeout": 60 });
        let path = format!("/1.0/instances/{}/state?project={}", encode(name), encode(project));
        self.change("stopping the instance", Method::PUT, &path, Some(&body), CHANGE_LIMIT).await
    }

    /// Asks what runs in an instance to end, and waits for that.
    ///
    /// # Errors
    /// Where Incus refuses, or it does not end in time.
    pub(crate) async fn shut_down_instance(&self, project: &str, name: &str, limit: Duration) -> Result<(), Error> {
        let body = json!({ "action": "stop", "force": false, "timeout": limit.as_secs() });
        let path = format!("/1.0/instances/{}/state?project={}", encode(name), encode(project));
        self.change("shutting the instance down", Method::PUT, &path, Some(&body), limit + CALL_TIMEOUT).await
    }

    /// Deletes a stopped instance.
    ///
    /// # Errors
    /// Where Incus refuses, fails, or takes longer than two minutes.
    pub async fn delete_instance(&self, project: &str, name: &str) -> Result<(), Error> {
        let path = instance_path(project, name);
        self.change("deleting the instance", Method::DELETE, &path, None, CHANGE_LIMIT).await
    }

    /// Runs a command in an instance, its standard streams on websockets. `command` stands in a host-readable command
    /// line, so nothing secret may be in it.
    pub(crate) async fn exec(&self, project: &str, name: &str, command: &[&str]) -> Result<ExecOperation, Error> {
        let body = json!({
            "command": command,
            "environment": {},
            "wait-for-websocket": true,
            "interactive": false,
            "record-output": false,
        });
        let path = format!("/1.0/instances/{}/exec?project={}", encode(name), encode(project));
        let envelope = self.call(Method::POST, &path, Some(&body), CALL_TIMEOUT).await?;
        let answer = |problem: String| Error::Answer { request: format!("POST {path}"), problem };
        let operation: Operation = serde_json::from_value(envelope.metadata).map_err(|e| answer(e.to_string()))?;
        let secrets = serde_json::from_value(operation.metadata["fds"].clone())
            .map_err(|e| answer(format!("no secrets for the websockets: {e}")))?;
        Ok(ExecOperation { id: operation.id, secrets })
    }

    /// The end of what an instance said on its console, as Incus kept it: at most `bytes` of it.
    pub(crate) async fn console_tail(&self, project: &str, name: &str, bytes: usize) -> Result<String, Error> {
        let path = format!("/1.0/instances/{}/console?type=log&project={}", encode(name), encode(project));
        let console = self.download(&path).await?;
        let tail = &console[console.len().saturating_sub(bytes)..];
        Ok(String::from_utf8_lossy(tail).into_owned())
    }

    /// The exit code of what an exec operation ran, where Incus still knows it.
    pub(crate) async fn exec_exit_code(&self, id: &str) -> Option<i64> {
        let operation = format!("/1.0/operations/{}", encode(id));
        // The wait of a failed operation is answered by an error without the exit code, so the operation is read after it.
        let _ = self.get::<Value>(&format!("{operation}/wait?timeout=2")).await;
        let operation: Operation = self.get(&operation).await.ok()?;
        operation.metadata["return"].as_i64()
    }
}

pub(super) fn instance_path(project: &str, name: &str) -> String {
    format!("/1.0/instances/{}?project={}", encode(name), encode(project))
}

/// Tells absence from failure.
pub(super) fn found<T>(answer: Result<T, Error>) -> Result<Option<T>, Error> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Percent-encodes a path segment or a query value.
pub(super) fn encode(text: &str) -> String {
    use std::fmt::Write as _;
    text.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_their_place_in_a_path() {
        assert_eq!(encode("pikaci/dev?x#y z"), "pikaci%2Fdev%3Fx%23y%20z");
    }

    /// Context ids are large numbers of 32 bits; a stopped machine keeps its last one.
    #[test]
    fn a_machine_has_an_address_and_a_container_has_none() {
        let view = |kind: &str, config: &[(&str, &str)]| InstanceView {
            name: "a".into(),
            project: "default".into(),
            status: "Running".into(),
            config: config.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
            kind: kind.into(),
            location: "none".into(),
            architecture: "x86_64".into(),
        };
        let uuid = ("volatile.uuid", "7D0A1F3C-0000-4000-8000-00000000000A");
        let cid = ("volatile.vsock_id", "2795226010");
        let address = VsockAddress { cid: 2_795_226_010, machine_uuid: uuid.1.to_ascii_lowercase() };
        assert_eq!(view("virtual-machine", &[uuid, cid]).vsock(), Some(address));
        assert_eq!(view("container", &[uuid, cid]).vsock(), None);
        assert_eq!(view("virtual-machine", &[uuid]).vsock(), None);
        assert_eq!(view("virtual-machine", &[uuid, ("volatile.vsock_id", "4294967296")]).vsock(), None);
    }

    #[test]
    fn a_guest_that_calls_itself_ready_still_runs() {
        let view = |status: &str| InstanceView {
            name: "a".into(),
            project: "default".into(),
            status: status.into(),
            config: BTreeMap::new(),
            kind: "container".into(),
            location: "none".into(),
            architecture: "x86_64".into(),
        };
        assert_eq!(view("Ready").state(), InstanceState::Running);
        assert_eq!(view("Running").state(), InstanceState::Running);
        assert_eq!(view("Frozen").state(), InstanceState::Changing);
        assert_eq!(view("Error").state(), InstanceState::Error);
    }
}
