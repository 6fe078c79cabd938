//! A virtual machine over vsock, each figure against a bare stream to the same machine in the same run.
//!
//! ```text
//!   this process                                             the machine (QEMU, no /dev/kvm), its kernel's own AF_VSOCK
//!   feed ─────────────────────── port 20600 ───────────────► vsock-peer ─ FIFO ─► `pika-guest emit` ─► events.jsonl ─┐
//!   consumer ◄─ Follower ◄─ fdatasync ◄─ journal ◄─ session ◄─────── port 20555 ── `pika-guest stream` ◄─ inotify ───┘
//!   echo ◄────────────────────── port 20600 ───────────────► vsock-peer
//! ```
//!
//! Some machines are started one after the other, each with a runtime that the library's driver, core and journal follow, its
//! journal on the disk. In each, in this order:
//!
//! | figure | what |
//! |---|---|
//! | `vsock_booted_extra_ms` | from `listens on vsock` on the guest's console, which the agent writes as soon as it does and which is looked at every millisecond, to the `booted` record: the driver's pacing, the dial, the start of the session's process in the guest, both hellos; minus a bare dial |
//! | `vsock_dial_ms` | that bare dial of a port on which something listens, up to the device's `OK` |
//! | `vsock_event_p50_us` | a line of the host, by the peer and a FIFO to `pika-guest emit`, its event appended, streamed, durable in the journal and in the hands of its consumer |
//! | `vsock_echo_p50_us` | a line of as many bytes to the peer and back |
//! | `vsock_event_over_echo` | the first over the second. Host and guest share no clock, so that both are there and back, and measured on the host's; the way there and the FIFO are in the event's time as well |
//! | `vsock_bulk_mib_per_s` | an artifact of 64 MiB, from the workload's last word to the `collected` record: asked for, read and hashed in the guest, sent, hashed and compared on the host, written, synced to the disk |
//! | `vsock_bare_mib_per_s` | as many bytes made, hashed and sent by the peer in writes as large as the agent's, hashed and compared here, and stored nowhere |
//! | `vsock_bulk_percent` | the former of the latter |
//!
//! Events and echoes take turns. Medians are compared. Ratios, since a processor that is emulated makes both sides slower.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use pika_cloud_common::limits::MAX_CHUNK_BYTES;
use pika_cloud_tests::monotonic;
use pika_cloud_tests::vm::{DrivenVm, PEER_PORT, Rig, VmOptions, Vsock, hang_up, spec};
use pika_host_collector::journal::{Body, Follower};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::runtime::Handle;
use tokio::time::{Instant, sleep, timeout};

use crate::figure::{Figure, Limit};
use crate::setting::{Setting, progress};
use crate::stats::{Samples, micros, millis};

const MACHINES: usize = 5;
const EVENTS: usize = 200;
const WARM_UP: usize = 20;
const DIALS: usize = 10;
const BARE_SENDS: usize = 2;
const BULK_MIB: u32 = 64;
const BULK_BYTES: usize = (BULK_MIB as usize) << 20;
/// Between one measurement and the next, so that nothing of the last is under way.
const PAUSE: Duration = Duration::from_millis(5);
/// Longer than anything here takes in a machine that works.
const PATIENCE: Duration = Duration::from_secs(60);
/// What the agent says on the console once it can be dialled.
const LISTENS: &str = "listens on vsock";

/// What was measured in all machines.
#[derive(Default)]
struct Measured {
    dial: Samples,
    booted: Samples,
    event: Samples,
    echo: Samples,
    bare: Samples,
    bulk: Samples,
}

pub(crate) async fn measure(setting: &Setting) -> anyhow::Result<Vec<Figure>> {
    progress(&format!("{MACHINES} virtual machines: their start, {EVENTS} events, and {BULK_MIB} MiB from each"));
    let disk = setting.disk().to_owned();
    // What the tests stand on waits without a word to the executor, and fails by panicking.
    let measured = tokio::task::spawn_blocking(move || visit_all(&disk)).await.context("a machine does not work")??;
    Ok(measured.map_or_else(Vec::new, |measured| measured.figures()))
}

/// `None` where there can be no machines, which was said then.
fn visit_all(disk: &Path) -> anyhow::Result<Option<Measured>> {
    let Some(rig) = Rig::get() else { return Ok(None) };
    let mut measured = Measured::default();
    for number in 0..MACHINES {
        measured.visit(rig, disk, number)?;
    }
    Ok(Some(measured))
}

impl Measured {
    /// Starts a machine, measures in it, and lets its job end.
    fn visit(&mut self, rig: &'static Rig, disk: &Path, number: usize) -> anyhow::Result<()> {
        let command = format!(
            "set -e
            head -c {BULK_BYTES} /dev/urandom > $PIKA_CLOUD_DIR/artifacts/blob
            mkfifo /tmp/feed
            pika-guest ready
            exec pika-guest emit < /tmp/feed"
        );
        let spec = spec(&format!("vm-{number}"), &command);
        let mut driven = DrivenVm::start_in(disk, rig, &spec, VmOptions::default());
        let listens_at = wait_for_listener(&driven)?;
        driven.wait_ready();
        let vsock = driven.with_vm(|vm| vm.vsock());
        let (executor, mut follower) = (Handle::current(), driven.follow());
        let dial = executor.block_on(dial(&vsock))?;
        self.dial.add(dial);
        executor.block_on(self.send_bare(&vsock))?;
        let feed = executor.block_on(self.events_and_echoes(&vsock, &mut follower))?;
        // The workload's input ends, and it with it.
        executor.block_on(hang_up(feed));
        let journal = driven.finish(PATIENCE);
        let verdict = journal.verdict(1);
        ensure!(verdict["verdict"] == "completed", "the job in the machine has not completed: {verdict}");
        self.booted.add(journal.state_at(1, "booted").saturating_sub(listens_at).saturating_sub(dial));
        let ended_at = journal.at(1, "its end", |record| record["guest"]["kind"] == "completed");
        self.bulk.add(journal.host_at(1, "collected").saturating_sub(ended_at));
        Ok(())
    }

    /// Gives back the stream that feeds the workload.
    async fn events_and_echoes(&mut self, vsock: &Vsock, follower: &mut Follower) -> anyhow::Result<UnixStream> {
        let (mut feed, mut echo) = (open(vsock, "into /tmp/feed").await?, open(vsock, "echo").await?);
        for round in 0..WARM_UP + EVENTS {
            let line =
                format!("{{\"kind\":\"progress\",\"name\":\"round-{round}\",\"message\":\"as a build reports it\"}}\n");
            let echo_time = there_and_back(&mut echo, &line).await?;
            sleep(PAUSE).await;
            let event_time = feed_and_receive(&mut feed, follower, &line, round).await?;
            sleep(PAUSE).await;
            if round >= WARM_UP {
                self.echo.add(echo_time);
                self.event.add(event_time);
            }
        }
        hang_up(echo).await;
        Ok(feed)
    }

    async fn send_bare(&mut self, vsock: &Vsock) -> anyhow::Result<()> {
        for _ in 0..BARE_SENDS {
            let began = Instant::now();
            let mut stream = open(vsock, &format!("send {BULK_BYTES} {MAX_CHUNK_BYTES}")).await?;
            let (mut digest, mut left, mut bytes) = (Sha256::new(), BULK_BYTES, vec![0; 256 * 1024]);
            while left > 0 {
                let space = left.min(bytes.len());
                let read = timeout(PATIENCE, stream.read(&mut bytes[..space])).await.context("bytes are lost")??;
                ensure!(read > 0, "the peer ended early");
                digest.update(&bytes[..read]);
                left -= read;
            }
            let mut said = [0; 65];
            stream.read_exact(&mut said).await?;
            let digest = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect::<String>();
            ensure!(said[..64] == *digest.as_bytes(), "other bytes came than were sent");
            self.bare.add(began.elapsed());
            hang_up(stream).await;
        }
        Ok(())
    }

    fn figures(&self) -> Vec<Figure> {
        let speed = |samples: &Samples| f64::from(BULK_MIB) / samples.median();
        let (event, echo) = (self.event.median(), self.echo.median());
        let (bulk, bare) = (speed(&self.bulk), speed(&self.bare));
        vec![
            Figure::beside("vsock_event_p50_us", micros(event), "us"),
            Figure::beside("vsock_echo_p50_us", micros(echo), "us"),
            Figure::limited("vsock_event_over_echo", event / echo, "x", Limit::AtMost(3.0)),
            Figure::beside("vsock_bulk_mib_per_s", bulk, "MiB/s"),
            Figure::beside("vsock_bare_mib_per_s", bare, "MiB/s"),
            Figure::limited("vsock_bulk_percent", bulk / bare * 100.0, "%", Limit::AtLeast(70.0)),
            Figure::limited("vsock_booted_extra_ms", millis(self.booted.median()), "ms", Limit::AtMost(50.0)),
            Figure::beside("vsock_dial_ms", millis(self.dial.median()), "ms"),
        ]
    }
}

/// When the agent began to listen, on the clock of the journal.
fn wait_for_listener(driven: &DrivenVm) -> anyhow::Result<Duration> {
    let began = monotonic();
    while !driven.console().contains(LISTENS) {
        ensure!(monotonic() - began < PATIENCE, "no agent listens in the machine");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(monotonic())
}

/// What a bare dial takes.
async fn dial(vsock: &Vsock) -> anyhow::Result<Duration> {
    let mut dials = Samples::default();
    for _ in 0..DIALS {
        let began = Instant::now();
        let stream = vsock.dial(PEER_PORT, PATIENCE).await;
        dials.add(began.elapsed());
        hang_up(stream.map_err(|error| anyhow::anyhow!("{error}"))?).await;
    }
    Ok(Duration::from_secs_f64(dials.median()))
}

/// A stream to the peer, which knows what it is for.
async fn open(vsock: &Vsock, what: &str) -> anyhow::Result<UnixStream> {
    let stream = vsock.dial(PEER_PORT, PATIENCE).await;
    let mut stream = stream.map_err(|error| anyhow::anyhow!("{error}"))?;
    stream.write_all(format!("{what}\n").as_bytes()).await?;
    Ok(stream)
}

async fn there_and_back(echo: &mut UnixStream, line: &str) -> anyhow::Result<Duration> {
    let mut back = vec![0; line.len()];
    let began = Instant::now();
    echo.write_all(line.as_bytes()).await?;
    timeout(PATIENCE, echo.read_exact(&mut back)).await.context("no echo comes")??;
    Ok(began.elapsed())
}

/// Sends the workload a line, and waits until the follower gives out the event that it makes of it.
async fn feed_and_receive(
    feed: &mut UnixStream,
    follower: &mut Follower,
    line: &str,
    round: usize,
) -> anyhow::Result<Duration> {
    let name = format!("\"round-{round}\"");
    let began = Instant::now();
    feed.write_all(line.as_bytes()).await?;
    loop {
        let next = timeout(PATIENCE, follower.next()).await.context("an event does not come")??;
        let Some((record, _)) = next else { bail!("the driver ended") };
        if matches!(&record.body, Body::Guest(event) if event.get().contains(&name)) {
            return Ok(began.elapsed());
        }
    }
}
