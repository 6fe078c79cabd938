//! From a guest's file to the host's journal, durably, over a local stream.
//!
//! ```text
//!   events.jsonl (memory) ─► `pika-guest stream` ═ pipes ═► session ─► journal ─ fdatasync ─► disk
//!                                  ▲                          │
//!                                  └────────── ack ───────────┘
//! ```
//!
//! The agent is the real process; session, journal and committer are the library's own. What joins them here is what the
//! library's driver does between two waits: read while less than 8 MiB wait for the disk, take all that came, hand it to the
//! committer, acknowledge what became durable. It leaves out what a driver does beside events: its state machine, logs,
//! status documents, followers. Time runs from before the agent is started until the last event is durable and its
//! acknowledgement sent.
//!
//! | figure | what |
//! |---|---|
//! | `journal_per_s` | events a second, 1,000,000 of 217 bytes, from the file to the journal |
//! | others | the same lines moved by something else, see [`crate::peers`] |
//!
//! All take turns, each writes to the same disk; medians are compared.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, ensure};
use pika_cloud_common::Timestamp;
use pika_cloud_common::digest::Digest;
use pika_cloud_common::wire::{Ack, HostMessage, Role};
use pika_host_collector::journal::{Committer, HostRecord, Journal};
use pika_host_collector::session::{Received, Session};
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
/// The driver's own bound on what waits for the disk.
const MAX_PENDING_BYTES: usize = 8 * 1024 * 1024;

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
    let mut journal = Journal::open(state.path(), "bench", Committer::start()?)?;
    journal.begin("v1:bench".to_owned());
    journal.commit().await?;
    let began = Instant::now();
    let mut host = Host::dial(&setting.agent, &root, journal).await?;
    host.receive_all().await?;
    let took = began.elapsed();
    host.end()?;
    Ok(took)
}

/// The host's side of one session, as the driver has it.
struct Host {
    agent: Child,
    reader: pipe::Receiver,
    writer: pipe::Sender,
    session: Session,
    journal: Journal,
    began: Instant,
    /// What the commit under way makes durable.
    in_commit: Option<Ack>,
    acked: u64,
}

impl Host {
    async fn dial(agent: &Path, root: &Path, journal: Journal) -> anyhow::Result<Self> {
        let mut command = Command::new(agent);
        command.arg("stream").env("PIKA_CLOUD_DIR", root).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut agent = command.spawn().context("starting `pika-guest stream`")?;
        let reader = agent.stdout.take().map(ChildStdout::into).context("no standard output")?;
        let writer = agent.stdin.take().map(ChildStdin::into).context("no standard input")?;
        let began = Instant::now();
        let (session, hello) = Session::open(Role::Owner, 1, None, true, began.elapsed());
        let mut host = Self {
            agent,
            reader: pipe::Receiver::from_owned_fd(reader)?,
            writer: pipe::Sender::from_owned_fd(writer)?,
            session,
            journal,
            began,
            in_commit: None,
            acked: 0,
        };
        host.send(&hello).await?;
        Ok(host)
    }

    async fn send(&mut self, message: &HostMessage) -> anyhow::Result<()> {
        let mut bytes = Vec::new();
        message.write(&mut bytes);
        Ok(self.writer.write_all(&bytes).await?)
    }

    async fn receive_all(&mut self) -> anyhow::Result<()> {
        while self.acked < u64::from(EVENTS) {
            self.start_commit()?;
            let may_read = self.journal.pending() < MAX_PENDING_BYTES;
            tokio::select! {
                committed = self.journal.committed() => {
                    committed?;
                    if let Some(ack) = self.in_commit.take() {
                        self.acked = ack.seq;
                        self.send(&HostMessage::Ack(ack)).await?;
                    }
                }
                read = self.reader.read(self.session.space()), if may_read => {
                    let read = read?;
                    ensure!(read > 0, "`pika-guest stream` ended early");
                    self.session.filled(read, self.began.elapsed());
                    self.take()?;
                }
            }
        }
        Ok(())
    }

    /// Takes all that was read into the journal.
    fn take(&mut self) -> anyhow::Result<()> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let at = Timestamp::from_unix(since.as_secs(), since.subsec_micros());
        while let Some(received) = self.session.receive()? {
            match received {
                Received::Event { head, missing, line, digest } => {
                    ensure!(missing == 0, "{missing} events are missing before {}", head.seq);
                    self.journal.guest(&at, &head, line, digest);
                }
                Received::Opened(opened) => self.journal.host(HostRecord::Stream {
                    stream_id: opened.hello.stream_id,
                    boot_id: opened.hello.boot_id,
                    agent: opened.hello.agent,
                    after_seq: 0,
                    digest: Digest::EMPTY_STREAM,
                }),
                Received::Status(_) | Received::Nothing => {}
                other => anyhow::bail!("the agent sent {other:?}"),
            }
        }
        Ok(())
    }

    fn start_commit(&mut self) -> anyhow::Result<()> {
        if !self.journal.is_committing() && self.journal.pending() > 0 {
            let cursor = self.journal.view().cursor.as_ref();
            self.in_commit = cursor.map(|cursor| Ack { seq: cursor.seq, logs: cursor.logs.clone() });
            self.journal.start_commit(Vec::new())?;
        }
        Ok(())
    }

    fn end(self) -> anyhow::Result<()> {
        let Self { mut agent, reader, writer, .. } = self;
        // The agent ends with its input.
        drop((reader, writer));
        agent.wait()?;
        Ok(())
    }
}
