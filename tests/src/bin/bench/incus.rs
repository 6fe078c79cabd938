//! A small client of Incus, with the calls that the figures compare with, one after the other and nothing around them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use http_body_util::{BodyExt as _, Full};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

/// Longer than any call here takes on a machine that works.
const PATIENCE: Duration = Duration::from_secs(60);

/// A daemon behind its UNIX socket.
#[derive(Clone, Debug)]
pub(crate) struct Incus {
    socket: PathBuf,
}

impl Incus {
    /// The daemon at `socket`.
    pub(crate) fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Its socket.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Makes a container, stopped.
    pub(crate) async fn create(&self, name: &str, image: &str) -> anyhow::Result<()> {
        let source = json!({ "type": "image", "alias": image });
        let body = json!({ "name": name, "type": "container", "profiles": ["default"], "source": source });
        self.change(Method::POST, "/1.0/instances", Some(&body)).await
    }

    /// Starts it.
    pub(crate) async fn start(&self, name: &str) -> anyhow::Result<()> {
        self.put_state(name, &json!({ "action": "start", "timeout": 60 })).await
    }

    /// Stops it without asking what runs in it.
    pub(crate) async fn stop(&self, name: &str) -> anyhow::Result<()> {
        self.put_state(name, &json!({ "action": "stop", "force": true, "timeout": 60 })).await
    }

    /// Deletes it.
    pub(crate) async fn delete(&self, name: &str) -> anyhow::Result<()> {
        self.change(Method::DELETE, &format!("/1.0/instances/{name}"), None).await
    }

    /// Runs a command in it, its standard streams on websockets.
    pub(crate) async fn exec(&self, name: &str, command: &[&str]) -> anyhow::Result<Exec> {
        let body = json!({
            "command": command,
            "environment": {},
            "wait-for-websocket": true,
            "interactive": false,
            "record-output": false,
        });
        let answer = self.call(Method::POST, &format!("/1.0/instances/{name}/exec"), Some(&body)).await?;
        let operation = &answer["metadata"];
        let path = format!("/1.0/operations/{}", operation["id"].as_str().context("exec without an operation")?);
        let open = async |fd: &str| {
            let secret = operation["metadata"]["fds"][fd].as_str().context("exec without a websocket")?;
            self.websocket(&format!("{path}/websocket?secret={secret}")).await
        };
        let (control, stdin, stdout, stderr) = tokio::try_join!(open("control"), open("0"), open("1"), open("2"))?;
        Ok(Exec { operation: path, stdin, stdout, unread: 0, _others: [control, stderr] })
    }

    /// Waits until the command of an exec has ended; gives its exit code.
    pub(crate) async fn exit_code(&self, exec: &Exec) -> anyhow::Result<i64> {
        let done = self.wait(&exec.operation).await?;
        done["metadata"]["return"].as_i64().context("exec without an exit code")
    }

    /// Removes every instance whose name begins with `prefix`.
    pub(crate) async fn remove_all(&self, prefix: &str) -> anyhow::Result<()> {
        let all = self.call(Method::GET, "/1.0/instances", None).await?;
        let paths = all["metadata"].as_array().into_iter().flatten().filter_map(Value::as_str);
        for name in paths.filter_map(|path| path.rsplit('/').next()).filter(|name| name.starts_with(prefix)) {
            // It may be stopped already; whether it is gone is what counts.
            let _ = self.stop(name).await;
            self.delete(name).await?;
        }
        Ok(())
    }

    async fn put_state(&self, name: &str, body: &Value) -> anyhow::Result<()> {
        self.change(Method::PUT, &format!("/1.0/instances/{name}/state"), Some(body)).await
    }

    async fn change(&self, method: Method, path: &str, body: Option<&Value>) -> anyhow::Result<()> {
        let answer = self.call(method, path, body).await?;
        match answer["operation"].as_str().filter(|operation| !operation.is_empty()) {
            Some(operation) => self.wait(operation).await.map(|_| ()),
            None => Ok(()),
        }
    }

    /// Waits for an operation to succeed; gives it as it is then.
    async fn wait(&self, operation: &str) -> anyhow::Result<Value> {
        let mut answer = self.call(Method::GET, &format!("{operation}/wait?timeout=50"), None).await?;
        let done = answer["metadata"].take();
        ensure!(done["status_code"] == 200, "{operation}: {} {}", done["status"], done["err"]);
        Ok(done)
    }

    async fn call(&self, method: Method, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        let what = format!("{method} {path}");
        let answer = tokio::time::timeout(PATIENCE, self.exchange(method, path, body)).await;
        let answer = answer.with_context(|| format!("{what}: no answer"))?.with_context(|| what.clone())?;
        ensure!(answer["type"] != "error", "{what}: {}", answer["error"]);
        Ok(answer)
    }

    async fn exchange(&self, method: Method, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        let stream = UnixStream::connect(&self.socket).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let bytes = body.map_or_else(Bytes::new, |body| Bytes::from(body.to_string()));
        let request = Request::builder().method(method).uri(path).header(HOST, "incus");
        let request = request.header(CONTENT_TYPE, "application/json").body(Full::new(bytes))?;
        let answer = sender.send_request(request).await?.into_body().collect().await?.to_bytes();
        drop(sender);
        connection.await??;
        Ok(serde_json::from_slice(&answer)?)
    }

    async fn websocket(&self, path: &str) -> anyhow::Result<WebSocketStream<UnixStream>> {
        let stream = UnixStream::connect(&self.socket).await?;
        Ok(tokio_tungstenite::client_async(format!("ws://incus{path}"), stream).await?.0)
    }
}

/// A command that runs in an instance.
pub(crate) struct Exec {
    operation: String,
    stdin: WebSocketStream<UnixStream>,
    stdout: WebSocketStream<UnixStream>,
    /// Bytes of standard output that came with those that were waited for.
    unread: usize,
    /// Control and standard error; Incus ends the command when the former closes.
    _others: [WebSocketStream<UnixStream>; 2],
}

impl Exec {
    /// Writes to its standard input.
    pub(crate) async fn write(&mut self, bytes: Bytes) -> anyhow::Result<()> {
        Ok(self.stdin.send(Message::Binary(bytes)).await?)
    }

    /// Waits for `count` bytes of its standard output.
    pub(crate) async fn read(&mut self, count: usize) -> anyhow::Result<()> {
        while self.unread < count {
            match self.stdout.next().await {
                Some(Ok(Message::Binary(bytes))) => self.unread += bytes.len(),
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Err(error)) => return Err(error.into()),
                Some(Ok(_)) | None => bail!("the command ended before it had answered"),
            }
        }
        self.unread -= count;
        Ok(())
    }
}
