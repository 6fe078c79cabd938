//! Waiting for an operation of Incus.

use std::collections::BTreeMap;
use std::time::Duration;

use hyper::Method;
use serde::Deserialize;
use serde_json::Value;
use tokio::time::Instant;

use super::client::{CALL_TIMEOUT, Client};
use super::error::Error;
use super::instance::encode;

/// The longest single wait that Incus is asked for; the call around it may take [`CALL_TIMEOUT`] longer.
const WAIT_SLICE: Duration = Duration::from_secs(30);

/// An operation as Incus describes it.
#[derive(Debug, Deserialize)]
pub(super) struct Operation {
    pub(super) id: String,
    #[serde(default)]
    status_code: u16,
    #[serde(default)]
    err: String,
    #[serde(default)]
    pub(super) metadata: Value,
}

/// What Incus may be doing with an instance, in its own words for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// It makes it.
    Creating,
    /// It starts it.
    Starting,
}

impl Work {
    fn descriptions(self) -> &'static [&'static str] {
        match self {
            Self::Creating => &["Creating instance"],
            Self::Starting => &["Starting instance", "Restarting instance"],
        }
    }
}

/// An operation in a list of them.
#[derive(Debug, Deserialize)]
struct Listed {
    #[serde(default)]
    status_code: u16,
    #[serde(default)]
    description: String,
    /// Paths by their kind.
    #[serde(default)]
    resources: Option<BTreeMap<String, Vec<String>>>,
}

impl Listed {
    fn is_going(&self, work: Work) -> bool {
        work.descriptions().contains(&self.description.as_str()) && progress(self.status_code) == Progress::Going
    }

    /// Projects and names of the instances that it is about.
    fn instances(&self) -> impl Iterator<Item = (String, String)> {
        let paths = self.resources.iter().filter_map(|all| all.get("instances")).flatten();
        paths.filter_map(|path| {
            let (path, query) = path.split_once('?').unwrap_or((path, ""));
            let project = query.split('&').find_map(|pair| pair.strip_prefix("project="));
            Some((project.unwrap_or("default").to_owned(), path.rsplit('/').next()?.to_owned()))
        })
    }

    /// The last parts of the paths of what it is about.
    fn names(&self) -> impl Iterator<Item = &str> {
        let paths = self.resources.iter().flat_map(BTreeMap::values).flatten();
        paths.filter_map(|path| path.split('?').next()?.rsplit('/').next())
    }

    fn is(&self, work: Work, name: &str) -> bool {
        self.is_going(work) && self.names().any(|its| its == name)
    }

    /// Incus calls the publishing of an image a download, and names neither the instance nor the image.
    fn may_publish(&self) -> bool {
        let names_instances = self.resources.iter().flat_map(BTreeMap::keys).any(|kind| kind == "instances");
        progress(self.status_code) == Progress::Going
            && !names_instances
            && self.description.to_ascii_lowercase().contains("image")
    }
}

/// What became of the publishing of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Publishing {
    /// It goes on.
    Going,
    /// It made the image of that fingerprint.
    Done(String),
    /// It made none.
    Failed,
    /// It is over, and Incus does not know any more how it ended.
    Unknown,
}

fn of_project(project: &str) -> String {
    format!("project={}", encode(project))
}

/// The image that an operation made.
pub(super) fn fingerprint(metadata: &Value) -> Option<String> {
    metadata.get("fingerprint")?.as_str().filter(|fingerprint| !fingerprint.is_empty()).map(str::to_owned)
}

impl Client {
    /// Whether Incus is at work on an instance of that name, whoever asked for it: one that is not there yet may come to be, and
    /// one that is stopped may be about to run.
    pub(crate) async fn is_at(&self, work: Work, project: &str, name: &str) -> Result<bool, Error> {
        match self.operations(&of_project(project)).await {
            // Not everybody who may make instances may see operations, and a cluster that misses a member may not list them.
            Err(Error::Refused { code, message, .. }) => {
                tracing::debug!("operations cannot be read: {code} {message}");
                Ok(false)
            }
            answer => Ok(answer?.iter().any(|one| one.is(work, name))),
        }
    }

    /// Projects and names of the instances that Incus is making, in all projects, as they may share their images; in `project`
    /// alone where it does not let this client ask for more. Those that it has made a record of are in its lists, too.
    pub(crate) async fn being_created(&self, project: &str) -> Result<Vec<(String, String)>, Error> {
        let all = match self.operations("all-projects=true").await {
            Err(Error::Refused { code: 403, .. }) => self.operations(&of_project(project)).await?,
            answer => answer?,
        };
        Ok(all.iter().filter(|one| one.is_going(Work::Creating)).flat_map(Listed::instances).collect())
    }

    /// Whether an image may be under way in a project, whoever asked for it.
    pub(crate) async fn may_publish(&self, project: &str) -> Result<bool, Error> {
        Ok(self.operations(&of_project(project)).await?.iter().any(Listed::may_publish))
    }

    /// What became of the publishing of an image.
    pub(crate) async fn published(&self, operation: &str) -> Result<Publishing, Error> {
        match self.get::<Operation>(operation).await {
            Ok(operation) => Ok(match progress(operation.status_code) {
                Progress::Going => Publishing::Going,
                Progress::Succeeded => fingerprint(&operation.metadata).map_or(Publishing::Unknown, Publishing::Done),
                Progress::Failed => Publishing::Failed,
            }),
            // It is over for some seconds, or Incus was started anew, which ends it.
            Err(error) if error.is_not_found() => Ok(Publishing::Unknown),
            Err(error) => Err(error),
        }
    }

    /// Whether an exec operation's program runs; not, where Incus does not know it any more.
    pub(crate) async fn is_exec_running(&self, id: &str) -> bool {
        self.is_going(&format!("/1.0/operations/{}", encode(id))).await.unwrap_or(false)
    }

    async fn is_going(&self, operation: &str) -> Result<bool, Error> {
        match self.get::<Operation>(operation).await {
            Ok(operation) => Ok(progress(operation.status_code) == Progress::Going),
            // It is over for some seconds, or Incus was started anew, which ends it.
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn operations(&self, of: &str) -> Result<Vec<Listed>, Error> {
        // By status; nothing under way may be answered as null.
        type ByStatus = Option<BTreeMap<String, Vec<Listed>>>;
        let operations = self.get::<ByStatus>(&format!("/1.0/operations?recursion=1&{of}")).await?;
        Ok(operations.into_iter().flat_map(BTreeMap::into_values).flatten().collect())
    }

    /// Makes a call that changes something, and waits until Incus has done it. Some calls are answered at once; some give
    /// an operation, which is then waited for until its own status says that it is over.
    pub(super) async fn change(
        &self,
        what: &str,
        method: Method,
        path: &str,
        body: Option<&Value>,
        limit: Duration,
    ) -> Result<(), Error> {
        let envelope = self.call(method, path, body, CALL_TIMEOUT.max(limit)).await?;
        if envelope.operation.is_empty() {
            return Ok(());
        }
        self.wait(what, &envelope.operation, limit).await.map(drop)
    }

    /// Waits for an operation that a call gave, and gives what that has to say.
    pub(super) async fn wait(&self, what: &str, operation: &str, limit: Duration) -> Result<Value, Error> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::OperationUnfinished { what: what.to_owned(), after: limit });
            }
            let slice = left.min(WAIT_SLICE);
            let path = format!("{operation}/wait?timeout={}", slice.as_secs().max(1));
            let answer = self.call(Method::GET, &path, None, slice + CALL_TIMEOUT).await;
            let failed = |message| Error::OperationFailed { what: what.to_owned(), message };
            let envelope = match answer {
                Ok(envelope) => envelope,
                Err(Error::Refused { code, message, .. }) => {
                    // The wait of a failed operation is answered as an error of its own, with any code. Finished operations
                    // vanish after some seconds. Neither says anything of the resource, and only the operation itself tells
                    // one from the other.
                    return match self.get::<Operation>(operation).await {
                        Ok(state) if progress(state.status_code) == Progress::Succeeded => Ok(state.metadata),
                        Ok(state) if progress(state.status_code) == Progress::Going => continue,
                        Err(error) if error.is_not_found() && code == 404 => {
                            Err(Error::OperationLost { what: what.to_owned() })
                        }
                        Ok(_) | Err(_) => Err(failed(message)),
                    };
                }
                Err(error) => return Err(error),
            };
            let state: Operation = serde_json::from_value(envelope.metadata)
                .map_err(|e| Error::Answer { request: format!("GET {path}"), problem: e.to_string() })?;
            match progress(state.status_code) {
                Progress::Going => {}
                Progress::Succeeded => return Ok(state.metadata),
                Progress::Failed if state.err.is_empty() => return Err(failed("Incus gives no reason".to_owned())),
                Progress::Failed => return Err(failed(state.err)),
            }
        }
    }
}

/// What an operation's status code means.
#[derive(Debug, PartialEq, Eq)]
enum Progress {
    Going,
    Succeeded,
    Failed,
}

/// Incus's codes: 1xx goes on, 200 succeeded, 4xx failed or was cancelled.
fn progress(status_code: u16) -> Progress {
    match status_code {
        200 => Progress::Succeeded,
        400.. => Progress::Failed,
        _ => Progress::Going,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Incus 6.0.4 lists them.
    #[test]
    fn what_publishes_is_told_from_what_creates() {
        let listed = |json: &str| serde_json::from_str::<Listed>(json).unwrap();
        let publish = listed(r#"{"status_code": 103, "description": "Downloading image", "resources": {}}"#);
        let create = listed(
            r#"{"status_code": 103, "description": "Creating instance",
                "resources": {"instances": ["/1.0/instances/pika-bake-1?project=p"]}}"#,
        );
        let over = listed(r#"{"status_code": 400, "description": "Downloading image", "resources": null}"#);
        assert!(publish.may_publish() && !publish.is(Work::Creating, "pika-bake-1"));
        assert!(
            create.is(Work::Creating, "pika-bake-1")
                && !create.is(Work::Creating, "pika-bake")
                && !create.may_publish()
        );
        assert!(!over.may_publish());
        let instances = |listed: &Listed| listed.instances().collect::<Vec<_>>();
        assert_eq!(instances(&create), [("p".to_owned(), "pika-bake-1".to_owned())]);
        let create = listed(
            r#"{"status_code": 103, "resources": {"instances": ["/1.0/instances/a"], "images": ["/1.0/images/f"]}}"#,
        );
        assert_eq!(instances(&create), [("default".to_owned(), "a".to_owned())]);
    }

    #[test]
    fn a_wait_that_answers_running_is_no_success() {
        assert_eq!(progress(103), Progress::Going);
        assert_eq!(progress(0), Progress::Going);
        assert_eq!(progress(200), Progress::Succeeded);
        assert_eq!(progress(400), Progress::Failed);
        assert_eq!(progress(401), Progress::Failed);
    }
}
