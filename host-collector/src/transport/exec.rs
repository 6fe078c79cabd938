//! Programs run by Incus `exec`, their standard streams over websockets: the agent's stream, and small scripts.
//!
//! ```text
//!   session ── fd 0 ──►┐                    ┌──► stdin  ┐
//!           ◄── fd 1 ──┤  incusd, forkexec  ├◄── stdout ┤ pika-guest stream
//!   tail    ◄── fd 2 ──┘                    └◄── stderr ┘
//! ```
//!
//! Losing the control websocket ends that one process only: a workload is detached from the agent that started it and lives
//! on. exec's own exit code is used to say why there is no session, and whether a script did its work; a verdict rests on
//! the guest's files.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::AbortHandle;

use crate::driver::{Explain, Link};
use crate::incus::{Client, Error, WebSocketHalf};
use crate::machine::SessionLoss;

/// The agent, looked up in the guest's `PATH`.
const COMMAND: [&str; 2] = ["pika-guest", "stream"];

/// How much of a program's standard error is kept.
const STDERR_TAIL_BYTES: usize = 4096;

/// What a script may say on its standard output.
const MAX_OUTPUT_BYTES: usize = 16 * 1024;

/// What is written at once: Incus passes it on in pieces of that size.
const PIECE_BYTES: usize = 64 * 1024;

/// The shell's convention, which Incus follows: 127 not found, 126 not executable.
pub(crate) fn is_absent(code: i64) -> bool {
    matches!(code, 126 | 127)
}

/// A program that runs in an instance. Dropping any of it but its input ends the program.
pub(crate) struct Exec {
    /// Its standard input.
    pub(crate) input: WebSocketHalf,
    /// Its standard output.
    pub(crate) output: WebSocketHalf,
    /// The rest.
    pub(crate) end: ExecEnd,
}

/// How a program ends, and what it said meanwhile on its standard error.
pub(crate) struct ExecEnd {
    client: Client,
    operation_id: String,
    stderr: Arc<Mutex<Vec<u8>>>,
    stderr_task: AbortHandle,
    /// Kept open: Incus ends the program when it closes.
    _control: WebSocketHalf,
}

impl Exec {
    /// Runs a command as root in an instance that runs.
    ///
    /// # Errors
    /// Where Incus cannot do that; that there is no such program shows only in its exit code.
    pub(crate) async fn start(client: &Client, project: &str, instance: &str, command: &[&str]) -> Result<Self, Error> {
        let operation = client.exec(project, instance, command).await?;
        let open = async |fd: &str| {
            let secret = operation.secrets.get(fd).ok_or_else(|| Error::Answer {
                request: "exec".to_owned(),
                problem: format!("no websocket for `{fd}`"),
            })?;
            client.websocket(&operation.id, secret).await
        };
        // Incus starts the command once all are open; together they take one round trip instead of four.
        let (control, input, output, errors) = tokio::try_join!(open("control"), open("0"), open("1"), open("2"))?;
        let stderr = Arc::new(Mutex::new(Vec::new()));
        let stderr_task = tokio::spawn(keep_tail(errors, Arc::clone(&stderr))).abort_handle();
        let (client, operation_id) = (client.clone(), operation.id);
        let end = ExecEnd { client, operation_id, stderr, stderr_task, _control: control };
        Ok(Self { input, output, end })
    }
}

impl ExecEnd {
    /// Its exit code, where Incus tells one within two seconds.
    pub(crate) async fn code(&self) -> Option<i64> {
        self.client.exec_exit_code(&self.operation_id).await
    }

    /// Whether it runs, as far as Incus knows.
    pub(crate) async fn is_running(&self) -> bool {
        self.client.is_exec_running(&self.operation_id).await
    }

    /// The end of what it said on its standard error.
    pub(crate) fn errors(&self) -> String {
        let stderr = self.stderr.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&stderr).trim().to_owned()
    }
}

impl Drop for ExecEnd {
    fn drop(&mut self) {
        self.stderr_task.abort();
    }
}

/// Reads to the end and keeps the last bytes, so that a chatty program neither blocks nor grows the host.
async fn keep_tail(mut errors: WebSocketHalf, tail: Arc<Mutex<Vec<u8>>>) {
    let mut chunk = [0; 1024];
    while let Ok(n @ 1..) = errors.read(&mut chunk).await {
        let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
        tail.extend_from_slice(&chunk[..n]);
        let excess = tail.len().saturating_sub(STDERR_TAIL_BYTES);
        tail.drain(..excess);
    }
}

/// How a program ended that was run to its end.
#[derive(Debug)]
pub(crate) struct Ran {
    /// Its exit code; `None` where it closed its output and goes on, or Incus does not know.
    pub(crate) code: Option<i64>,
    /// All of its standard output.
    pub(crate) output: Vec<u8>,
    /// The end of its standard error.
    pub(crate) errors: String,
}

/// A program could not be run to its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunError {
    /// Incus cannot run it.
    #[error(transparent)]
    Incus(#[from] Error),
    /// It is still at it. It was killed.
    #[error("not done after {} s", .0.as_secs())]
    TimedOut(Duration),
    /// It does not stop talking. It was killed.
    #[error("more than {MAX_OUTPUT_BYTES} bytes of output")]
    TooMuch,
}

/// Runs a command as root in an instance to its end, with `input` on its standard input. What it may say and how long it may
/// take are bounded: it is the guest's.
///
/// # Errors
/// Where Incus cannot run it, or it goes beyond those bounds. Its exit code is no error here.
pub(crate) async fn run(
    client: &Client,
    (project, instance): (&str, &str),
    command: &[&str],
    mut input: impl AsyncRead + Unpin,
    limit: Duration,
) -> Result<Ran, RunError> {
    let run = async {
        let Exec { input: mut stdin, output: mut stdout, end } =
            Exec::start(client, project, instance, command).await?;
        let write = async {
            let mut piece = vec![0; PIECE_BYTES];
            while let n @ 1.. = input.read(&mut piece).await? {
                stdin.write_all(&piece[..n]).await?;
                stdin.flush().await?;
            }
            stdin.shutdown().await
        };
        // Whoever ends without reading all of it says by its exit code whether that is a failure.
        let write = async {
            let _ = write.await;
            Ok(())
        };
        // One that talks without end reads nothing: it is not waited for.
        let ((), output) = tokio::try_join!(write, read_bounded(&mut stdout))?;
        Ok(Ran { output, code: end.code().await, errors: end.errors() })
    };
    tokio::time::timeout(limit, run).await.unwrap_or(Err(RunError::TimedOut(limit)))
}

async fn read_bounded(stdout: &mut WebSocketHalf) -> Result<Vec<u8>, RunError> {
    let mut output = Vec::new();
    // A connection that breaks leaves no exit code behind, or that of a program that was killed.
    let _ = stdout.take(MAX_OUTPUT_BYTES as u64 + 1).read_to_end(&mut output).await;
    if output.len() > MAX_OUTPUT_BYTES { Err(RunError::TooMuch) } else { Ok(output) }
}

/// Starts the stream of the image's agent in a running instance.
///
/// # Errors
/// Where Incus cannot run it; an agent that is missing shows only later, in [`Explain::explain`].
pub(crate) async fn dial_exec(client: &Client, project: &str, instance: &str) -> Result<Link, Error> {
    Ok(Exec::start(client, project, instance, &COMMAND).await?.into_link(StreamOf::Image))
}

/// Whose agent a stream is of.
#[derive(Clone, Copy)]
pub(crate) enum StreamOf {
    /// The image's.
    Image,
    /// The host's own.
    Host,
}

impl Exec {
    /// A program that is an agent's stream.
    pub(crate) fn into_link(self, of: StreamOf) -> Link {
        let Self { input, output, end } = self;
        let diagnosis = Box::new(StreamEnd { end, of });
        Link { reader: Box::new(output), writer: Box::new(input), diagnosis, vsock: None }
    }
}

/// Why an agent's stream ended.
struct StreamEnd {
    end: ExecEnd,
    of: StreamOf,
}

impl Explain for StreamEnd {
    fn explain(&self) -> Pin<Box<dyn Future<Output = SessionLoss> + Send + '_>> {
        Box::pin(async move {
            let code = self.end.code().await;
            match (code, self.of) {
                (Some(code), StreamOf::Image) if is_absent(code) => SessionLoss::NoAgent(format!(
                    "exec of `pika-guest stream` ended with {code}: the image has no agent at a place in its PATH"
                )),
                (Some(code), StreamOf::Host) if is_absent(code) => SessionLoss::NoAgent(format!(
                    "the host's own pika-guest does not lie in the guest, or does not run there (exit code {code})"
                )),
                (Some(code), _) => {
                    SessionLoss::Died(format!("the agent's stream ended with {code}: {}", self.end.errors()))
                }
                (None, _) => SessionLoss::Lost(format!("the agent's stream ended: {}", self.end.errors())),
            }
        })
    }
}
