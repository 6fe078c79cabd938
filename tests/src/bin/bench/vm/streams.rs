//! Bare streams to a machine of the rig.

use std::time::{Duration, SystemTime};

use anyhow::{Context as _, anyhow};
use pika_cloud_tests::vm::{PEER_PORT, Vsock, hang_up};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout};

use super::{DIALS, PATIENCE};
use crate::stats::Samples;

/// Of so many looks at the guest's clock the fastest counts.
const LOOKS_AT_CLOCK: usize = 5;

/// A stream to one of its ports.
pub(super) async fn reach(vsock: &Vsock, port: u32) -> anyhow::Result<UnixStream> {
    vsock.dial(port, PATIENCE).await.map_err(|error| anyhow!("port {port} of the machine: {error}"))
}

/// What a bare dial takes.
pub(super) async fn dial(vsock: &Vsock) -> anyhow::Result<Duration> {
    let mut dials = Samples::default();
    for _ in 0..DIALS {
        let began = Instant::now();
        let stream = reach(vsock, PEER_PORT).await?;
        dials.add(began.elapsed());
        hang_up(stream).await;
    }
    Ok(Duration::from_secs_f64(dials.median()))
}

/// A stream to the peer, which knows what it is for.
pub(super) async fn open(vsock: &Vsock, what: &str) -> anyhow::Result<UnixStream> {
    let mut stream = reach(vsock, PEER_PORT).await?;
    stream.write_all(format!("{what}\n").as_bytes()).await?;
    Ok(stream)
}

pub(super) async fn there_and_back(echo: &mut UnixStream, line: &str) -> anyhow::Result<Duration> {
    let mut back = vec![0; line.len()];
    let began = Instant::now();
    echo.write_all(line.as_bytes()).await?;
    timeout(PATIENCE, echo.read_exact(&mut back)).await.context("no echo comes")??;
    Ok(began.elapsed())
}

/// How far the guest's clock is before this one's, in seconds: what it says was so in the middle of the way there and back, as
/// far as the fastest of some exchanges tells.
pub(super) async fn clock_offset(clock: &mut UnixStream) -> anyhow::Result<f64> {
    let (mut clock, mut fastest) = (BufReader::new(clock), (f64::INFINITY, 0.0));
    for _ in 0..LOOKS_AT_CLOCK {
        let (began, wall) = (Instant::now(), since_epoch());
        clock.write_all(b"?\n").await?;
        let mut said = String::new();
        timeout(PATIENCE, clock.read_line(&mut said)).await.context("the guest's clock says nothing")??;
        let took = began.elapsed().as_secs_f64();
        if took < fastest.0 {
            fastest = (took, said.trim().parse::<f64>()? / 1e6 - (wall + took / 2.0));
        }
    }
    Ok(fastest.1)
}

pub(super) fn since_epoch() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
