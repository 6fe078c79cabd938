//! From an event's append in a guest to the event in a consumer's hands, over Incus `exec`.
//!
//! ```text
//!   `pika-guest emit` ─ lock, timestamp, append ─► events.jsonl ─ inotify ─► `pika-guest stream` ─ exec's websocket ─┐
//!   consumer ◄─ Follower ◄─ published ◄─ fdatasync ◄─ journal ◄─ session ◄───────────────────────────────────────────┘
//! ```
//!
//! A runtime is driven by the library in this process, which also follows its journal through `Cloud::events`. Another
//! `exec` feeds `pika-guest emit` a line at a time. Time begins with the event's own timestamp, which the writer takes under
//! the lock right before the append, and ends when the follower gives the event out; guest and host share one clock.
//!
//! | figure | what |
//! |---|---|
//! | `event_p50_us`, `event_p99_us` | as above, an event every few milliseconds |
//! | `echo_p50_us`, `echo_p99_us` | 200 bytes to a `cat` in the same container and back, over the same kind of websockets |
//! | `event_over_echo` | the first's median over the second's |
//! | `flush_p50_us` | appending 300 bytes to a file on the journal's disk, and one fdatasync: the disk's own part of the first |
//!
//! The three take turns, each when the one before is over.

use std::fs::File;
use std::io::Write as _;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use pika_cloud_common::{Event, RuntimeSpec};
use pika_host_collector::journal::{Body, Follower};
use pika_host_collector::{Cloud, Config, Rerun};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use crate::figure::{Figure, Limit};
use crate::incus::{Exec, Incus};
use crate::setting::{Setting, progress};
use crate::stats::{Samples, micros};

const ROUNDS: usize = 1500;
const WARM_UP: usize = 100;
/// Between one measurement and the next, so that nothing of the last is under way.
const PAUSE: Duration = Duration::from_millis(3);
/// Longer than anything here takes on a machine that works.
const PATIENCE: Duration = Duration::from_secs(30);
/// A line that is sent there and back.
const ECHO_BYTES: usize = 200;
/// About what one event takes in the journal.
const FLUSH_BYTES: usize = 300;

pub(crate) async fn measure(setting: &Setting) -> anyhow::Result<Vec<Figure>> {
    progress(&format!("{ROUNDS} events from a container to a consumer, and as many lines there and back"));
    let config = Config {
        incus_socket: setting.incus.socket().to_owned(),
        state_dir: setting.disk().join("latency-state"),
        ..Config::default()
    };
    let cloud = Cloud::connect(&config)?;
    let spec = setting.spec("latency", "exec sleep 3600");
    let spec = RuntimeSpec::from_json(&spec.to_string())?;
    cloud.ensure(&spec, Rerun::Answer).await?;
    let (cancel, wish) = watch::channel(false);
    // Driver and consumer in tasks of their own, as a server has them.
    let driver = tokio::spawn({
        let (cloud, spec) = (cloud.clone(), spec.clone());
        async move { cloud.run(&spec, Rerun::Answer, wish).await }
    });
    let (incus, disk) = (setting.incus.clone(), tempfile::tempfile_in(setting.disk())?);
    let consumer = tokio::spawn(async move { timeout(PATIENCE * 4, follow(&incus, &cloud, &spec, disk)).await });
    let measured = consumer.await;
    // However that went, the runtime ends. Where its driver has ended already, nobody hears it.
    let _ = cancel.send(true);
    timeout(PATIENCE, driver).await.context("the runtime does not end")???;
    measured?.context("the events do not come")?
}

async fn follow(incus: &Incus, cloud: &Cloud, spec: &RuntimeSpec, disk: File) -> anyhow::Result<Vec<Figure>> {
    // A follower hears of its driver only where that is at work already.
    sleep(Duration::from_millis(500)).await;
    let mut follower = cloud.events(&spec.identity.runtime_id)?;
    let instance = &spec.identity.instance_name;
    let mut emit = incus.exec(instance, &["pika-guest", "emit"]).await?;
    let mut cat = incus.exec(instance, &["cat"]).await?;
    let disk = Arc::new(disk);
    let (mut event, mut echo, mut flush) = (Samples::default(), Samples::default(), Samples::default());
    for round in 0..WARM_UP + ROUNDS {
        let echo_time = there_and_back(&mut cat).await?;
        sleep(PAUSE).await;
        let event_time = append_and_receive(&mut emit, &mut follower, round).await?;
        sleep(PAUSE).await;
        let flush_time = append_and_flush(&disk).await?;
        sleep(PAUSE).await;
        if round >= WARM_UP {
            echo.add(echo_time);
            flush.add(flush_time);
            event.add(event_time);
        }
    }
    Ok(vec![
        Figure::limited("event_p50_us", micros(event.median()), "us", Limit::AtMost(1000.0)),
        Figure::beside("event_p99_us", micros(event.quantile(0.99)), "us"),
        Figure::beside("echo_p50_us", micros(echo.median()), "us"),
        Figure::beside("echo_p99_us", micros(echo.quantile(0.99)), "us"),
        Figure::limited("event_over_echo", event.median() / echo.median(), "x", Limit::AtMost(4.0)),
        Figure::beside("flush_p50_us", micros(flush.median()), "us"),
    ])
}

async fn there_and_back(cat: &mut Exec) -> anyhow::Result<Duration> {
    let mut line = vec![b'x'; ECHO_BYTES];
    line[ECHO_BYTES - 1] = b'\n';
    let began = Instant::now();
    cat.write(Bytes::from(line)).await?;
    cat.read(ECHO_BYTES).await?;
    Ok(began.elapsed())
}

async fn append_and_flush(disk: &Arc<File>) -> anyhow::Result<Duration> {
    let disk = Arc::clone(disk);
    let flushed = tokio::task::spawn_blocking(move || {
        let began = Instant::now();
        (&*disk).write_all(&[b'x'; FLUSH_BYTES])?;
        disk.sync_data()?;
        Ok(began.elapsed())
    });
    flushed.await?
}

/// Has an event appended, and waits until the follower gives it out; says how old it is then.
async fn append_and_receive(emit: &mut Exec, follower: &mut Follower, round: usize) -> anyhow::Result<Duration> {
    let name = format!("round-{round}");
    let line = format!("{{\"kind\":\"progress\",\"name\":\"{name}\",\"message\":\"as a build reports it\"}}\n");
    emit.write(Bytes::from(line)).await?;
    loop {
        let (record, _) = follower.next().await?.context("the driver ended")?;
        let received = SystemTime::now();
        let Body::Guest(line) = record.body else { continue };
        let event = Event::decode(line.get().as_bytes())?;
        if event.kind.is_terminal() {
            bail!("the runtime ended: {}", event.message);
        }
        if event.progress().and_then(|progress| progress["name"].as_str()) == Some(name.as_str()) {
            let appended = SystemTime::from(OffsetDateTime::parse(event.timestamp.as_str(), &Rfc3339)?);
            return received.duration_since(appended).context("the event comes from the future");
        }
    }
}
