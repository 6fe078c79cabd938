//! HTTP over the UNIX socket: a connection a call, an envelope an answer.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::UnixStream;

use super::error::Error;

/// How long a call that waits for nothing may take.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// An answer is read up to this size. The largest that is asked for is a list of instances: each takes it a few kilobytes and
/// twice its labels, of which the spec's is 32 KiB at most, so that it holds about a thousand of the largest and ten thousand
/// usual ones.
const MAX_ANSWER_BYTES: usize = 64 * 1024 * 1024;

/// A client of one Incus daemon, in one project at a time.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

/// What stands around every answer of Incus.
#[derive(Debug, Deserialize)]
pub(super) struct Envelope {
    #[serde(rename = "type")]
    kind: String,
    /// The path of the operation, where the answer is asynchronous.
    #[serde(default)]
    pub(super) operation: String,
    #[serde(default)]
    error_code: u16,
    #[serde(default)]
    error: String,
    #[serde(default)]
    pub(super) metadata: Value,
    /// The version of what was read, from the answer's head.
    #[serde(skip)]
    pub(super) etag: String,
}

/// An answer, as it came.
struct Answered {
    status: StatusCode,
    body: Bytes,
    etag: String,
}

/// What a call sends beside its method and path.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sent<'a> {
    /// As JSON.
    pub(super) body: Option<&'a Value>,
    /// Only where the resource still has this version; Incus answers 412 where it has another.
    pub(super) if_match: Option<&'a str>,
}

impl Client {
    /// For the daemon behind a UNIX socket. Nothing is opened yet.
    pub fn unix(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The daemon's own description, which also tells that it answers and trusts us.
    ///
    /// # Errors
    /// Where it does not answer, or does not trust whoever asks.
    pub async fn server(&self) -> Result<Server, Error> {
        let server: Server = self.get("/1.0").await?;
        if server.auth == "trusted" { Ok(server) } else { Err(Error::NoPermission { path: self.socket.clone() }) }
    }

    pub(super) async fn connect(&self) -> Result<UnixStream, Error> {
        UnixStream::connect(&self.socket).await.map_err(|source| match source.kind() {
            std::io::ErrorKind::PermissionDenied => Error::NoPermission { path: self.socket.clone() },
            _ => Error::NotRunning { path: self.socket.clone(), source },
        })
    }

    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Error> {
        self.get_with_etag(path).await.map(|(found, _)| found)
    }

    /// As [`Client::get`], with the version of what was read.
    pub(super) async fn get_with_etag<T: DeserializeOwned>(&self, path: &str) -> Result<(T, String), Error> {
        let envelope = self.call(Method::GET, path, None, CALL_TIMEOUT).await?;
        let found = serde_json::from_value(envelope.metadata)
            .map_err(|e| Error::Answer { request: format!("GET {path}"), problem: e.to_string() })?;
        Ok((found, envelope.etag))
    }

    /// One call. `timeout` covers all of it, so for a call that waits it must be longer than that wait.
    pub(super) async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        timeout: Duration,
    ) -> Result<Envelope, Error> {
        self.send(method, path, Sent { body, if_match: None }, timeout).await
    }

    /// As [`Client::call`], with a condition.
    pub(super) async fn send(
        &self,
        method: Method,
        path: &str,
        sent: Sent<'_>,
        timeout: Duration,
    ) -> Result<Envelope, Error> {
        let request = format!("{method} {}", without_query_secrets(path));
        match tokio::time::timeout(timeout, self.exchange(method, path, sent, &request)).await {
            Ok(answer) => {
                let Answered { status, body, etag } = answer?;
                Ok(Envelope { etag, ..read_envelope(&request, status, &body)? })
            }
            Err(_) => Err(Error::NoAnswer { request, after: timeout }),
        }
    }

    /// What is answered as it is, without an envelope. Never a path in a guest: a FIFO there would hang the call, and later the
    /// instance.
    pub(super) async fn download(&self, path: &str) -> Result<Bytes, Error> {
        let request = format!("GET {path}");
        let exchange = self.exchange(Method::GET, path, Sent::default(), &request);
        let answer = tokio::time::timeout(CALL_TIMEOUT, exchange).await;
        let answer = answer.map_err(|_| Error::NoAnswer { request: request.clone(), after: CALL_TIMEOUT })??;
        if answer.status.is_success() {
            return Ok(answer.body);
        }
        Err(refusal(&request, answer.status, &answer.body))
    }

    async fn exchange(&self, method: Method, path: &str, sent: Sent<'_>, request: &str) -> Result<Answered, Error> {
        let transport = |source| Error::Transport { request: request.to_owned(), source };
        let stream = self.connect().await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| transport(e.into()))?;
        let bytes = sent.body.map_or_else(Bytes::new, |value| Bytes::from(value.to_string()));
        let mut http = Request::builder()
            .method(method)
            .uri(path)
            .header(hyper::header::HOST, "incus")
            .header(hyper::header::CONTENT_TYPE, "application/json");
        if let Some(etag) = sent.if_match {
            http = http.header(hyper::header::IF_MATCH, etag);
        }
        let http = http.body(Full::new(bytes)).map_err(|e| transport(e.into()))?;
        // The connection is driven beside the call, and ends with it: no task is left behind by a call that timed out.
        let answer = async {
            let response = sender.send_request(http).await.map_err(|e| transport(e.into()))?;
            let status = response.status();
            let etag = response.headers().get(hyper::header::ETAG).and_then(|etag| etag.to_str().ok());
            let etag = etag.unwrap_or_default().to_owned();
            let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await.map_err(transport)?;
            Ok(Answered { status, body: body.to_bytes(), etag })
        };
        tokio::pin!(answer);
        tokio::select! {
            biased;
            answer = &mut answer => answer,
            ended = connection => {
                ended.map_err(|e| transport(e.into()))?;
                answer.await
            }
        }
    }
}

/// A websocket's secret must not reach an error message.
fn without_query_secrets(path: &str) -> &str {
    path.split_once("?secret=").map_or(path, |(path, _)| path)
}

fn read_envelope(request: &str, status: StatusCode, body: &[u8]) -> Result<Envelope, Error> {
    let envelope: Envelope = serde_json::from_slice(body)
        .map_err(|e| Error::Answer { request: request.to_owned(), problem: format!("status {status}, {e}") })?;
    if envelope.kind == "error" || !status.is_success() {
        return Err(refused(request, status, envelope));
    }
    Ok(envelope)
}

fn refused(request: &str, status: StatusCode, envelope: Envelope) -> Error {
    let code = if envelope.error_code == 0 { status.as_u16() } else { envelope.error_code };
    Error::Refused { request: request.to_owned(), code, message: envelope.error }
}

/// What an answer that is no success says, whether or not it stands in an envelope.
fn refusal(request: &str, status: StatusCode, body: &[u8]) -> Error {
    match serde_json::from_slice(body) {
        Ok(envelope) => refused(request, status, envelope),
        Err(_) => Error::Answer { request: request.to_owned(), problem: format!("status {status}") },
    }
}

/// What Incus says of itself.
#[derive(Clone, Debug, Deserialize)]
pub struct Server {
    /// `trusted` where whoever asks may do things.
    #[serde(default)]
    auth: String,
    /// The rest.
    #[serde(default)]
    pub environment: ServerEnvironment,
}

/// A part of what Incus says of itself.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct ServerEnvironment {
    /// Such as `6.0.4`.
    #[serde(default)]
    pub server_version: String,
    /// Its own name, which in a cluster tells the members apart.
    #[serde(default)]
    pub server_name: String,
    /// What its host's programs run on, such as `x86_64`.
    #[serde(default)]
    pub kernel_architecture: String,
    /// Which kinds of instance it can run, such as `lxc`, or `lxc | qemu`.
    #[serde(default)]
    pub driver: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absence_is_told_from_the_code() {
        let body = br#"{"type":"error","error":"Instance not found","error_code":404}"#;
        let error = read_envelope("GET /x", StatusCode::NOT_FOUND, body).unwrap_err();
        assert!(error.is_not_found());
        let body = br#"{"type":"error","error":"not found: the disk 404","error_code":500}"#;
        let error = read_envelope("GET /x", StatusCode::INTERNAL_SERVER_ERROR, body).unwrap_err();
        assert!(!error.is_not_found());
    }

    #[test]
    fn a_secret_reaches_no_message() {
        assert_eq!(without_query_secrets("/1.0/operations/a/websocket?secret=s"), "/1.0/operations/a/websocket");
    }

    #[tokio::test]
    async fn a_missing_socket_names_it_and_the_way_out() {
        let error = Client::unix("/nonexistent/incus.socket").server().await.unwrap_err().to_string();
        assert!(error.contains("unix:/nonexistent/incus.socket") && error.contains("--incus unix:PATH"), "{error}");
    }
}
