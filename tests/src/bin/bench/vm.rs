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
//! | `vsock_hello_ms` | a session of an observer, from the dial to the first byte of the agent's hello: a process of the guest is started for it |
//! | `vsock_event_p50_us` | from an event's own timestamp, which its writer takes right before the append, to the event durable in the journal and in the hands of its consumer |
//! | `vsock_echo_p50_us` | a line of as many bytes to the peer and back |
//! | `vsock_event_over_echo` | the former over the latter |
//! | `vsock_fed_p50_us` | the same event from the line that had it written, on the host's clock alone: the way there, the FIFO and the writer are in it |
//! | `vsock_bulk_mib_per_s` | an artifact of 64 MiB, from the workload's last word to the `collected` record: asked for, read and hashed in the guest, sent, hashed and compared on the host, written, synced to the disk |
//! | `vsock_bare_mib_per_s` | as many bytes made, hashed and sent by the peer in writes as large as the agent's, hashed and compared here, and stored nowhere |
//! | `vsock_bulk_percent` | the former of the latter |
//!
//! Events and echoes take turns, and medians are compared. Host and guest share no clock: before each event the peer says what
//! the guest's is, and that is taken to be so in the middle of the fastest exchange of some. Where one way is slower than the
//! other, the event's time is wrong by half of the difference, which is less than half of such an exchange.

mod streams;

use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail, ensure};
use pika_cloud_common::Event;
use pika_cloud_common::digest::Digest;
use pika_cloud_common::limits::{MAX_CHUNK_BYTES, VSOCK_PORT};
use pika_cloud_common::wire::{HostHello, HostMessage, PROTOCOL, Role};
use pika_cloud_tests::monotonic;
use pika_cloud_tests::vm::{DrivenVm, Rig, VmOptions, Vsock, hang_up, spec};
use pika_host_collector::journal::{Body, Follower};
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::runtime::Handle;
use tokio::time::{Instant, sleep, timeout};

use crate::figure::{Figure, Limit};
use crate::setting::{Setting, progress};
use crate::stats::{Samples, micros, millis};
use streams::{clock_offset, dial, open, reach, since_epoch, there_and_back};

const MACHINES: usize = 3;
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
    hello: Samples,
    fed: Samples,
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
        executor.block_on(self.hellos(&vsock))?;
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

    /// What sessions of observers take to begin.
    async fn hellos(&mut self, vsock: &Vsock) -> anyhow::Result<()> {
        for _ in 0..DIALS {
            let began = Instant::now();
            let mut stream = reach(vsock, VSOCK_PORT).await?;
            let hello = HostHello {
                protocol: PROTOCOL,
                role: Role::Observer,
                term: 1,
                after: None,
                machine: Some(Digest::of(VmOptions::default().uuid.as_bytes())),
                follow: false,
            };
            let mut line = Vec::new();
            HostMessage::Hello(hello).write(&mut line);
            stream.write_all(&line).await?;
            timeout(PATIENCE, stream.read_u8()).await.context("the agent does not answer")??;
            self.hello.add(began.elapsed());
            hang_up(stream).await;
        }
        Ok(())
    }

    /// Gives back the stream that feeds the workload.
    async fn events_and_echoes(&mut self, vsock: &Vsock, follower: &mut Follower) -> anyhow::Result<UnixStream> {
        let (mut feed, mut echo) = (open(vsock, "into /tmp/feed").await?, open(vsock, "echo").await?);
        let mut clock = open(vsock, "clock").await?;
        for round in 0..WARM_UP + EVENTS {
            let line =
                format!("{{\"kind\":\"progress\",\"name\":\"round-{round}\",\"message\":\"as a build reports it\"}}\n");
            let echo_time = there_and_back(&mut echo, &line).await?;
            sleep(PAUSE).await;
            let offset = clock_offset(&mut clock).await?;
            sleep(PAUSE).await;
            let (since_fed, since_appended) = feed_and_receive(&mut feed, follower, &line, (round, offset)).await?;
            sleep(PAUSE).await;
            if round >= WARM_UP {
                self.echo.add(echo_time);
                self.fed.add(since_fed);
                self.event.add(since_appended);
            }
        }
        hang_up(echo).await;
        hang_up(clock).await;
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
            let digest = Digest(digest.finalize().into()).to_string();
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
            Figure::beside("vsock_fed_p50_us", micros(self.fed.median()), "us"),
            Figure::beside("vsock_echo_p50_us", micros(echo), "us"),
            Figure::limited("vsock_event_over_echo", event / echo, "x", Limit::AtMost(3.0)),
            Figure::beside("vsock_bulk_mib_per_s", bulk, "MiB/s"),
            Figure::beside("vsock_bare_mib_per_s", bare, "MiB/s"),
            Figure::limited("vsock_bulk_percent", bulk / bare * 100.0, "%", Limit::AtLeast(70.0)),
            Figure::limited("vsock_booted_extra_ms", millis(self.booted.median()), "ms", Limit::AtMost(50.0)),
            Figure::beside("vsock_hello_ms", millis(self.hello.median()), "ms"),
            Figure::beside("vsock_dial_ms", millis(self.dial.median()), "ms"),
        ]
    }
}

/// When the agent began to listen, on the clock of the journal.
fn wait_for_listener(driven: &DrivenVm) -> anyhow::Result<Duration> {
    let began = Instant::now();
    while !driven.console().contains(LISTENS) {
        ensure!(began.elapsed() < PATIENCE, "no agent listens in the machine");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(monotonic())
}

/// Sends the workload a line, and waits until the follower gives out the event that it makes of it: since the line was sent, and
/// since the event was appended.
async fn feed_and_receive(
    feed: &mut UnixStream,
    follower: &mut Follower,
    line: &str,
    (round, offset): (usize, f64),
) -> anyhow::Result<(Duration, Duration)> {
    let name = format!("\"round-{round}\"");
    let began = Instant::now();
    feed.write_all(line.as_bytes()).await?;
    loop {
        let next = timeout(PATIENCE, follower.next()).await.context("an event does not come")??;
        let (took, received) = (began.elapsed(), since_epoch());
        let Some((record, _)) = next else { bail!("the driver ended") };
        let Body::Guest(line) = record.body else { continue };
        if line.get().contains(&name) {
            let event = Event::decode(line.get().as_bytes())?;
            let appended = OffsetDateTime::parse(event.timestamp.as_str(), &Rfc3339)?;
            let appended = SystemTime::from(appended).duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64();
            return Ok((took, Duration::try_from_secs_f64((received - (appended - offset)).max(0.0))?));
        }
    }
}
