//! What `pika-cloud run` adds to the calls that any program would have to make for the same job.
//!
//! | figure | what |
//! |---|---|
//! | `bare_calls_ms` | create, start, exec of `true` with its four websockets and its exit code, stop by force, delete, one after the other over the socket, each operation waited for |
//! | `run_ms` | `pika-cloud run` as a whole process, of a container job whose command is `true`, its state dir on the disk |
//! | `run_ratio` | the second over the first |
//!
//! Both make the same container from the same image, and take turns; medians are compared.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use tokio::process::Command;

use crate::figure::{Figure, Limit};
use crate::setting::{IMAGE, Setting, progress};
use crate::stats::{Samples, millis};

const ROUNDS: usize = 15;

pub(crate) async fn measure(setting: &Setting) -> anyhow::Result<Vec<Figure>> {
    progress(&format!("{ROUNDS} times a trivial container job, by `pika-cloud run` and by bare calls"));
    let (mut bare, mut run) = (Samples::default(), Samples::default());
    for round in 0..=ROUNDS {
        let bare_time = bare_calls(setting, &format!("{}bare-{round}", setting.prefix())).await?;
        let run_time = whole_run(setting, round).await?;
        // The first of each finds everything cold.
        if round > 0 {
            bare.add(bare_time);
            run.add(run_time);
        }
    }
    let (bare, run) = (bare.median(), run.median());
    Ok(vec![
        Figure::beside("bare_calls_ms", millis(bare), "ms"),
        Figure::beside("run_ms", millis(run), "ms"),
        Figure::limited("run_ratio", run / bare, "x", Limit::AtMost(1.1)),
    ])
}

async fn bare_calls(setting: &Setting, name: &str) -> anyhow::Result<Duration> {
    let incus = &setting.incus;
    let began = Instant::now();
    incus.create(name, IMAGE).await?;
    incus.start(name).await?;
    let exec = incus.exec(name, &["true"]).await?;
    let code = incus.exit_code(&exec).await?;
    incus.stop(name).await?;
    incus.delete(name).await?;
    let took = began.elapsed();
    ensure!(code == 0, "`true` ended with {code}");
    Ok(took)
}

async fn whole_run(setting: &Setting, round: usize) -> anyhow::Result<Duration> {
    let spec = setting.disk().join("trivial.json");
    std::fs::write(&spec, setting.spec(&format!("run-{round}"), "true").to_string())?;
    let mut command = Command::new(&setting.cloud);
    command.arg("--incus").arg(format!("unix:{}", setting.incus.socket().display()));
    command.arg("--state-dir").arg(setting.disk().join("state")).arg("run").arg(&spec);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    let began = Instant::now();
    let status = command.status().await.with_context(|| format!("running {}", setting.cloud.display()))?;
    let took = began.elapsed();
    ensure!(status.success(), "`pika-cloud run` of `true` ended with {status}");
    Ok(took)
}
