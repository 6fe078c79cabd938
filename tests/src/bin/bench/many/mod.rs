//! One collector process with 10,000 runtimes.
//!
//! ```text
//!   this process                         the collector, a process of its own
//!   10,000 guests: session protocol ═ one socket ═ 10,000 × driver, runtime, journal on the disk
//!                                                  └────► 10,000 × consumer (Follower)
//! ```
//!
//! A guest here is its end of the session and no more, so that what is measured is the collector. Its heartbeat comes every
//! 10 s, those of all guests evenly spread; the host's own pings go out as ever. Drivers, runtimes, journals and followers
//! are the library's own, each in a task; what stands in for Incus answers at once. All streams share one socket, since the
//! runtimes' locks already take half of the files that a process may open: what a socket for each would cost the kernel is
//! not in the figures.
//!
//! | figure | what |
//! |---|---|
//! | `many_kib_each` | what the collector's resident memory has grown by from before the first runtime, after all that stands below but the restart, for each runtime and its consumer; what waits in the socket's stead is in it, the guests are not |
//! | `many_cpu_percent` | of one core, what all threads of the collector took in 20 s with nothing but heartbeats and pings |
//! | `many_ready_s` | from the first of 10,000 `ready` events that are sent at once to the last in its consumer's hands, which is after it is durable |
//! | `many_restart_s` | the collector is killed; from the start of the next process until every guest has got, after its own hello, what the host answers it with |

mod collector;
mod guests;
mod mux;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use pika_cloud_common::RuntimeSpec;
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::{sleep, timeout};

use crate::figure::{Figure, Limit};
use crate::setting::{IMAGE, Setting, progress};
use guests::{Connection, Guests};

pub(crate) use collector::run as run_collector;

const RUNTIMES: usize = 10_000;
/// How long only heartbeats are heard.
const IDLE: Duration = Duration::from_secs(20);
/// Behind what was busy, before it counts as idle.
const PAUSE: Duration = Duration::from_secs(2);
/// Longer than anything here takes on a machine that works.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the collector says when it can begin.
const UP: &str = "up";
/// What it says when every consumer has its `ready`.
const DELIVERED: &str = "delivered";
/// The number of what is for the collector itself, which is that it may begin.
const COLLECTOR: u32 = u32::MAX;

pub(crate) async fn measure(setting: &Setting) -> anyhow::Result<Vec<Figure>> {
    progress(&format!("{RUNTIMES} runtimes in one collector: {} s idle, all ready at once, a restart", IDLE.as_secs()));
    let state = tempfile::tempdir_in(setting.disk())?;
    make_runtimes(state.path())?;
    let guests = Guests::new(RUNTIMES);
    let mut first = Collector::start(state.path(), &guests).await?;
    first.within("starting", first.connection.reached(|progress| progress.acked == RUNTIMES)).await?;
    let began = Instant::now();
    first.connection.all_enter_next_state()?;
    first.delivered().await?;
    let ready = began.elapsed();
    first.within("acknowledging", first.connection.reached(|progress| progress.acked == RUNTIMES)).await?;
    sleep(PAUSE).await;
    let before = first.cpu_time()?;
    let began = Instant::now();
    sleep(IDLE).await;
    let (busy, idle) = (first.cpu_time()?.saturating_sub(before), began.elapsed());
    let grown = first.resident_kib()?.saturating_sub(first.empty_kib);
    first.kill().await?;
    let began = Instant::now();
    let second = Collector::start(state.path(), &guests).await?;
    second.within("following again", second.connection.reached(|progress| progress.started == RUNTIMES)).await?;
    let restart = began.elapsed();
    second.kill().await?;
    #[allow(clippy::cast_precision_loss)]
    let kib_each = grown as f64 / RUNTIMES as f64;
    Ok(vec![
        Figure::limited("many_kib_each", kib_each, "KiB", Limit::AtMost(20.0)),
        Figure::limited("many_cpu_percent", busy.as_secs_f64() / idle.as_secs_f64() * 100.0, "%", Limit::AtMost(10.0)),
        Figure::limited("many_ready_s", ready.as_secs_f64(), "s", Limit::AtMost(2.0)),
        Figure::limited("many_restart_s", restart.as_secs_f64(), "s", Limit::AtMost(3.0)),
    ])
}

/// A runtime's name.
fn name(number: u32) -> String {
    format!("many-{number:05}")
}

/// Folders with a spec, as a consumer's `ensure` leaves them. Nothing of it is synced: that they are made is not measured.
fn make_runtimes(state: &Path) -> anyhow::Result<()> {
    for number in 0..u32::try_from(RUNTIMES)? {
        let name = name(number);
        let spec = serde_json::json!({
            "identity": { "runtime_id": name, "instance_name": name },
            "incus": { "image_alias": IMAGE, "instance_type": "container" },
            "entry_command": "exec /opt/agent/serve",
            "policies": { "restart_policy": "always", "retention_policy": "keep_until_stopped" },
        });
        let spec = RuntimeSpec::from_json(&spec.to_string())?;
        let folder = state.join(name);
        std::fs::create_dir(&folder)?;
        std::fs::write(folder.join("spec.json"), serde_json::to_vec_pretty(&spec)?)?;
    }
    Ok(())
}

/// A collector process.
struct Collector {
    process: Child,
    words: Lines<BufReader<ChildStdout>>,
    connection: Connection,
    /// What it holds before its first runtime.
    empty_kib: u64,
    proc: PathBuf,
}

impl Collector {
    async fn start(state: &Path, guests: &Arc<Guests>) -> anyhow::Result<Self> {
        let (ours, its) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--collector").arg(state).arg("--runtimes").arg(RUNTIMES.to_string());
        command.stdin(std::os::fd::OwnedFd::from(its)).stdout(Stdio::piped()).kill_on_drop(true);
        let mut process = command.spawn().context("starting the collector")?;
        // The command has the other end, whose closing is to be noticed.
        drop(command);
        let stdout = process.stdout.take().context("no standard output")?;
        let proc = PathBuf::from(format!("/proc/{}", process.id().context("the collector has ended")?));
        let connection = guests.serve(UnixStream::from_std(ours)?);
        let mut words = BufReader::new(stdout).lines();
        ensure!(words.next_line().await?.as_deref() == Some(UP), "the collector did not start");
        let mut collector = Self { process, words, connection, empty_kib: 0, proc };
        collector.empty_kib = collector.resident_kib()?;
        collector.connection.tell(COLLECTOR);
        Ok(collector)
    }

    async fn within(&self, doing: &str, reached: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
        timeout(PATIENCE, reached).await.with_context(|| format!("{RUNTIMES} runtimes do not get done with {doing}"))?
    }

    async fn delivered(&mut self) -> anyhow::Result<()> {
        let word = timeout(PATIENCE, self.words.next_line()).await.context("not every consumer gets its event")??;
        ensure!(word.as_deref() == Some(DELIVERED), "the collector ended");
        Ok(())
    }

    fn resident_kib(&self) -> anyhow::Result<u64> {
        let status = std::fs::read_to_string(self.proc.join("status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        Ok(line.trim().trim_end_matches("kB").trim().parse()?)
    }

    /// What all of its threads took of any core, to the nanosecond.
    fn cpu_time(&self) -> anyhow::Result<Duration> {
        let mut all = Duration::ZERO;
        for thread in std::fs::read_dir(self.proc.join("task"))? {
            let text = std::fs::read_to_string(thread?.path().join("schedstat"))?;
            all += Duration::from_nanos(text.split(' ').next().unwrap_or_default().parse()?);
        }
        Ok(all)
    }

    async fn kill(mut self) -> anyhow::Result<()> {
        Ok(self.process.kill().await?)
    }
}
