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
    fn is(&self, work: Work, name: &str) -> bool {
        let is_it = |path: &String| path.split('?').next().and_then(|path| path.rsplit('/').next()) == Some(name);
        work.descriptions().contains(&self.description.as_str())
            && progress(self.status_code) == Progress::Going
            && self.resources.iter().flat_map(BTreeMap::values).flatten().any(is_it)
    }
}

impl Client {
    /// Whether Incus is at work on an instance of that name, whoever asked for it: one that is not there yet may come to be, and
    /// one that is stopped may be about to run.
    pub(crate) async fn is_at(&self, work: Work, project: &str, name: &str) -> Result<bool, Error> {
        // By status; nothing under way may be answered as null.
        type ByStatus = Option<BTreeMap<String, Vec<Listed>>>;
        let path = format!("/1.0/operations?recursion=1&project={}", encode(project));
        match self.get::<ByStatus>(&path).await {
            Ok(operations) => Ok(operations.iter().flat_map(BTreeMap::values).flatten().any(|one| one.is(work, name))),
            // Not everybody who may make instances may see operations, and a cluster that misses a member may not list them.
            Err(Error::Refused { code, message, .. }) => {
                tracing::debug!("operations cannot be read: {code} {message}");
                Ok(false)
            }
            Err(error) => Err(error),
        }
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
        self.wait(what, &envelope.operation, limit).await
    }

    async fn wait(&self, what: &str, operation: &str, limit: Duration) -> Result<(), Error> {
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
                        Ok(state) if progress(state.status_code) == Progress::Succeeded => Ok(()),
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
                Progress::Succeeded => return Ok(()),
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

    #[test]
    fn a_wait_that_answers_running_is_no_success() {
        assert_eq!(progress(103), Progress::Going);
        assert_eq!(progress(0), Progress::Going);
        assert_eq!(progress(200), Progress::Succeeded);
        assert_eq!(progress(400), Progress::Failed);
        assert_eq!(progress(401), Progress::Failed);
    }
}
