//! `pika-guest stream` run by Incus `exec`, its standard streams over websockets.
//!
//! ```text
//!   session ── fd 0 ──►┐                    ┌──► stdin  ┐
//!           ◄── fd 1 ──┤  incusd, forkexec  ├◄── stdout ┤ pika-guest stream
//!   tail    ◄── fd 2 ──┘                    └◄── stderr ┘
//! ```
//!
//! Losing the control websocket ends that one process only: the workload is detached from it and lives on. exec's own
//! exit code is used to say why there is no session, and for nothing else; a verdict rests on the guest's files.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use tokio::io::AsyncReadExt as _;
use tokio::task::AbortHandle;

use crate::driver::{Explain, Link};
use crate::incus::{Client, Error, WebSocketHalf};
use crate::machine::SessionLoss;

/// The agent, looked up in the guest's `PATH`.
const COMMAND: [&str; 2] = ["pika-guest", "stream"];

/// How much of the agent's standard error is kept.
const STDERR_TAIL_BYTES: usize = 4096;

/// Why a session over exec ended.
struct Diagnosis {
    client: Client,
    operation_id: String,
    stderr: Arc<Mutex<Vec<u8>>>,
    stderr_task: AbortHandle,
    /// Kept open: Incus ends the agent when it closes.
    _control: WebSocketHalf,
}

/// Starts the agent's stream in a running instance.
///
/// # Errors
/// Where Incus cannot run it; an agent that is missing shows only later, in [`Explain::explain`].
pub(crate) async fn dial_exec(client: &Client, project: &str, instance: &str) -> Result<Link, Error> {
    let operation = client.exec(project, instance, &COMMAND).await?;
    let open = async |fd: &str| {
        let secret = operation
            .secrets
            .get(fd)
            .ok_or_else(|| Error::Answer { request: "exec".to_owned(), problem: format!("no websocket for `{fd}`") })?;
        client.websocket(&operation.id, secret).await
    };
    // Incus starts the command once all are open; together they take one round trip instead of four.
    let (control, input, output, errors) = tokio::try_join!(open("control"), open("0"), open("1"), open("2"))?;
    let stderr = Arc::new(Mutex::new(Vec::new()));
    let stderr_task = tokio::spawn(keep_tail(errors, Arc::clone(&stderr))).abort_handle();
    let diagnosis =
        Diagnosis { client: client.clone(), operation_id: operation.id, stderr, stderr_task, _control: control };
    Ok(Link { reader: Box::new(output), writer: Box::new(input), diagnosis: Box::new(diagnosis), vsock: None })
}

/// Reads to the end and keeps the last bytes, so that a chatty agent neither blocks nor grows the host.
async fn keep_tail(mut errors: WebSocketHalf, tail: Arc<Mutex<Vec<u8>>>) {
    let mut chunk = [0; 1024];
    while let Ok(n @ 1..) = errors.read(&mut chunk).await {
        let mut tail = tail.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        tail.extend_from_slice(&chunk[..n]);
        let excess = tail.len().saturating_sub(STDERR_TAIL_BYTES);
        tail.drain(..excess);
    }
}

impl Explain for Diagnosis {
    fn explain(&self) -> Pin<Box<dyn Future<Output = SessionLoss> + Send + '_>> {
        Box::pin(async move {
            let code = self.client.exec_exit_code(&self.operation_id).await;
            let stderr = self.stderr.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let stderr = String::from_utf8_lossy(&stderr).trim().to_owned();
            match code {
                // The shell's convention, which Incus follows: 127 not found, 126 not executable.
                Some(code @ (126 | 127)) => SessionLoss::NoAgent(format!(
                    "exec of `pika-guest stream` ended with {code}: the image has no agent at a place in its PATH"
                )),
                Some(code) => SessionLoss::Lost(format!("the agent's stream ended with {code}: {stderr}")),
                None => SessionLoss::Lost(format!("the agent's stream ended: {stderr}")),
            }
        })
    }
}

impl Drop for Diagnosis {
    fn drop(&mut self) {
        self.stderr_task.abort();
    }
}
