//! From a guest's file to the host's journal, durably, over a local stream.
//!
//! ```text
//!   events.jsonl (memory) ─► `pika-guest stream` ═ pipes ═► runtime ─► journal ─ fdatasync ─► disk
//!                                  ▲                          │
//!                                  └────────── ack ───────────┘
//! ```
//!
//! The agent is the real process; the runtime with its machine, session and records is the library's own
//! [`Core`], and so are journal and committer. What is made here is the shell around it,
//! which says that the instance runs, and leaves out one message: the workload's start, since its stream is there already.
//! Time runs from before the agent is started until the last event is durable and its acknowledgement sent.
//!
//! | figure | what |
//! |---|---|
//! | `journal_per_s` | events a second, 1,000,000 of 217 bytes, from the file to the journal |
//! | others | the same lines moved by something else, see [`crate::peers`] |
//!
//! All take turns, each writes to the same disk; medians are compared.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use pika_cloud_common::RuntimeSpec;
use pika_cloud_common::wire::{Ack, Entry, HostMessage};
use pika_host_collector::clock::HostClock;
use pika_host_collector::incus::InstanceState;
use pika_host_collector::journal::{Committer, HostRecord, Records, Writer};
use pika_host_collector::runtime::{Answer, Call, Claim, Core, Effect, Outputs, Seen};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::pipe;

use crate::figure::{Figure, Limit};
use crate::peers::{self, Peer};
use crate::setting::{Setting, progress};
use crate::stats::Samples;

/// How many events are moved at once.
pub(crate) const EVENTS: u32 = 1_000_000;
/// An event's line, without its newline.
const EVENT_BYTES: usize = 217;
const ROUNDS: usize = 5;
/// Whose the runtime is.
const OWNER: &str = "bench";

pub(crate) async fn measure(setting: &Setting) -> anyhow::Result<Vec<Figure>> {
    progress(&format!(
        "{ROUNDS} times {EVENTS} events from a guest's file to the journal, and by what else is installed"
    ));
    let source = setting.memory().join("source.jsonl");
    std::fs::write(&source, lines()).with_context(|| format!("writing {}", source.display()))?;
    let mut journal = Samples::default();
    let mut peers: Vec<(Peer, Samples)> = Peer::ALL.map(|peer| (peer, Samples::default())).into();
    for round in 0..=ROUNDS {
        let time = to_journal(setting, &source).await?;
        if round == 0 {
            // The first finds everything cold.
            continue;
        }
        journal.add(time);
        for (peer, samples) in peers.iter_mut().filter(|(peer, _)| peer.is_installed()) {
            samples.add(peers::carry(*peer, &source, setting.disk()).await?);
        }
    }
    let per_second = |samples: &Samples| f64::from(EVENTS) / samples.median();
    let mut figures =
        vec![Figure::limited("journal_per_s", per_second(&journal), "events/s", Limit::AtLeast(500_000.0))];
    figures.extend(peers.iter().map(|(peer, samples)| {
        let value = peer.is_installed().then(|| per_second(samples));
        Figure::beside(peer.figure(), value, "events/s")
    }));
    Ok(figures)
}

/// A state event and then progress, as a workload writes them, each filled up to its length.
fn lines() -> String {
    let mut text = String::with_capacity(EVENTS as usize * (EVENT_BYTES + 1));
    for seq in 1..=EVENTS {
        let start = text.len();
        let micros = seq % 1_000_000;
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "{{\"schema_version\":1,\"seq\":{seq},\"timestamp\":\"2026-01-31T12:00:00.{micros:06}Z\",\"kind\":\"ready\",\
             \"message\":\"\",\"boot_id\":\"6f5ad1b6-6c1e-4bd4-8a0f-0d9b3b1c2a17\",\"details\":"
        );
        let (open, close) = if seq == 1 { ("\"", "\"}") } else { ("{\"progress\":{\"name\":\"", "\"}}}") };
        text.push_str(open);
        let filled = text.len() - start + close.len();
        text.extend(std::iter::repeat_n('x', EVENT_BYTES - filled));
        text.push_str(close);
        text.push('\n');
    }
    text
}

/// A guest's folder whose stream holds the lines of `source`.
fn guest_folder(setting: &Setting, source: &Path) -> anyhow::Result<PathBuf> {
    let root = setting.memory().join("guest");
    if root.exists() {
        std::fs::remove_dir_all(&root)?;
    }
    let status = Command::new(&setting.agent).arg("ready").env("PIKA_CLOUD_DIR", &root).status()?;
    ensure!(status.success(), "`pika-guest ready` ended with {status}");
    std::fs::copy(source, root.join("events.jsonl"))?;
    std::fs::write(root.join("events.jsonl.seq"), EVENTS.to_string())?;
    Ok(root)
}

async fn to_journal(setting: &Setting, source: &Path) -> anyhow::Result<Duration> {
    let root = guest_folder(setting, source)?;
    let state = tempfile::tempdir_in(setting.disk())?;
    let host = Host::begin(setting, state.path()).await?;
    let began = Instant::now();
    host.follow(&setting.agent, &root).await?;
    Ok(began.elapsed())
}

/// What the library's driver holds, without Incus.
struct Host {
    core: Core,
    writer: Writer,
    clock: HostClock,
}

/// The agent, and both ends of its stream.
struct Agent {
    process: Child,
    reader: pipe::Receiver,
    writer: pipe::Sender,
}

/// No artifacts are asked for.
struct NoOutputs;

impl Outputs for NoOutputs {
    fn entry(&mut self, _: &Entry) {}
    fn bytes(&mut self, _: &[u8]) {}
}

impl Host {
    /// A runtime whose instance was started, as its journal says.
    async fn begin(setting: &Setting, folder: &Path) -> anyhow::Result<Self> {
        let spec = RuntimeSpec::from_json(&setting.spec("throughput", "exec true").to_string())?;
        let clock = HostClock::open()?;
        let now = clock.now();
        let (mut writer, view) = Writer::open(folder, &spec.identity.runtime_id, Committer::start()?)?;
        let mut records = Records::new(view, spec.limits.event_bytes, 0);
        records.boot(clock.boot_id(), now);
        records.begin("v1:bench".to_owned(), 0, now);
        records.host(HostRecord::InstanceStarting {}, now);
        let commit = records.take_commit(false).context("nothing was begun")?;
        records.recycle(writer.commit(commit).await?);
        let core = Core::open(Arc::new(spec), OWNER.into(), records, &BTreeMap::new(), 1, now);
        Ok(Self { core, writer, clock })
    }

    /// Performs what the core asks for, and waits, as the library's driver does.
    async fn follow(mut self, program: &Path, root: &Path) -> anyhow::Result<()> {
        let mut agent = None;
        loop {
            while let Some(effect) = self.core.next_effect() {
                if self.perform(effect, &mut agent, (program, root)).await? {
                    return agent.map_or(Ok(()), Agent::end);
                }
            }
            self.wait(agent.as_mut()).await?;
        }
    }

    /// Says whether the last event was acknowledged.
    async fn perform(
        &mut self,
        effect: Effect,
        agent: &mut Option<Agent>,
        (program, root): (&Path, &Path),
    ) -> anyhow::Result<bool> {
        match effect {
            Effect::Call(id, Call::Look { instance, .. }) => {
                let runtime_id = self.core.spec().identity.runtime_id.clone();
                let claim = Some(Claim { runtime_id, owner: OWNER.to_owned(), term: 1 });
                let (status, state) = ("Running".to_owned(), InstanceState::Running);
                let seen = Seen { name: instance, status, state, claim, vsock: None, base_alias: None };
                self.core.answer(id, Answer::Looked(Ok(Some(seen))), self.clock.now());
            }
            Effect::Dial { id, .. } => {
                *agent = Some(Agent::start(program, root)?);
                self.core.dialled(id, Ok(None), self.clock.now());
            }
            // The stream is there already; nothing is to run.
            Effect::Send(HostMessage::Start(_)) => {}
            Effect::Send(message) => {
                let mut bytes = Vec::new();
                message.write(&mut bytes);
                agent.as_mut().context("a message before a stream")?.writer.write_all(&bytes).await?;
                return Ok(matches!(message, HostMessage::Ack(Ack { seq, .. }) if seq == u64::from(EVENTS)));
            }
            Effect::Commit(commit) => self.writer.start(commit)?,
            other => bail!("the library asks for {other:?}"),
        }
        Ok(false)
    }

    async fn wait(&mut self, agent: Option<&mut Agent>) -> anyhow::Result<()> {
        let until = self.core.next_tick().map(|due| due.saturating_sub(self.clock.now().mono));
        let may_read = agent.is_some() && self.core.wants_read();
        let read = async {
            match agent {
                Some(agent) if may_read => agent.reader.read(self.core.space()).await,
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            commit = self.writer.committed() => self.core.committed(commit?, self.clock.now()),
            read = read => {
                let read = read?;
                ensure!(read > 0, "`pika-guest stream` ended early");
                self.core.read(read, self.clock.now(), &mut NoOutputs);
            }
            () = tokio::time::sleep(until.unwrap_or(Duration::MAX)) => self.core.tick(self.clock.now()),
        }
        Ok(())
    }
}

impl Agent {
    fn start(program: &Path, root: &Path) -> anyhow::Result<Self> {
        let mut command = Command::new(program);
        command.arg("stream").env("PIKA_CLOUD_DIR", root).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().context("starting `pika-guest stream`")?;
        let reader = process.stdout.take().map(ChildStdout::into).context("no standard output")?;
        let writer = process.stdin.take().map(ChildStdin::into).context("no standard input")?;
        Ok(Self {
            process,
            reader: pipe::Receiver::from_owned_fd(reader)?,
            writer: pipe::Sender::from_owned_fd(writer)?,
        })
    }

    fn end(self) -> anyhow::Result<()> {
        let Self { mut process, reader, writer } = self;
        // The agent ends with its input.
        drop((reader, writer));
        process.wait()?;
        Ok(())
    }
}
