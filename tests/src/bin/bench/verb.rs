//! What one verb costs a workload.
//!
//! Measured is a whole process, from before it is started to after it was waited for, its folder in memory.
//!
//! | figure | what |
//! |---|---|
//! | `empty_us` | an empty static program of the same build settings: the floor for any program |
//! | `ready_us` | `pika-guest ready` where the stream has events already, as nearly every verb finds it |
//! | `ready_ratio` | the second over the first |
//! | `ready_first_us`, `ready_first_ratio` | the same where nothing is there yet, so that folder and stream are made too |
//!
//! The programs take turns, each folder of a first `ready` is new; medians are compared.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use crate::figure::{Figure, Limit};
use crate::setting::{Setting, progress};
use crate::stats::{Samples, micros};

const ROUNDS: usize = 600;
const WARM_UP: usize = 20;

pub(crate) async fn measure(setting: &Setting) -> anyhow::Result<Vec<Figure>> {
    progress(&format!(
        "{ROUNDS} times `pika-guest ready`, the first in a folder and a later one, and an empty program"
    ));
    let (agent, empty, folder) = (setting.agent.clone(), setting.empty.clone(), setting.memory().join("verb"));
    // Waiting for processes keeps a thread of its own.
    tokio::task::spawn_blocking(move || take_turns(&agent, &empty, &folder)).await?
}

fn take_turns(agent: &Path, empty: &Path, folder: &Path) -> anyhow::Result<Vec<Figure>> {
    let (mut floor, mut usual, mut first) = (Samples::default(), Samples::default(), Samples::default());
    let used = folder.join("used");
    run(agent, &["starting"], &used)?;
    for round in 0..WARM_UP + ROUNDS {
        let fresh = folder.join("fresh");
        let floor_time = run(empty, &[], &used)?;
        let usual_time = run(agent, &["ready"], &used)?;
        let first_time = run(agent, &["ready"], &fresh)?;
        std::fs::remove_dir_all(&fresh).context("removing the folder of a first `ready`")?;
        if round >= WARM_UP {
            floor.add(floor_time);
            usual.add(usual_time);
            first.add(first_time);
        }
    }
    let (floor, usual, first) = (floor.median(), usual.median(), first.median());
    Ok(vec![
        Figure::beside("empty_us", micros(floor), "us"),
        Figure::beside("ready_us", micros(usual), "us"),
        Figure::limited("ready_ratio", usual / floor, "x", Limit::AtMost(2.0)),
        Figure::beside("ready_first_us", micros(first), "us"),
        Figure::beside("ready_first_ratio", first / floor, "x"),
    ])
}

/// Runs a program with `folder` as its contract's folder; says how long it took.
fn run(program: &Path, args: &[&str], folder: &Path) -> anyhow::Result<Duration> {
    let mut command = Command::new(program);
    command.args(args).env_clear().env("PIKA_CLOUD_DIR", folder).stdin(Stdio::null()).stdout(Stdio::null());
    let began = Instant::now();
    let status = command.status().with_context(|| format!("running {}", program.display()))?;
    let took = began.elapsed();
    ensure!(status.success(), "{} ended with {status}", program.display());
    Ok(took)
}
