//! `run`, `ensure` and `watch`.

use std::io::Read as _;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use pika_cloud_common::verdict::EXIT_CANCELLED;
use pika_cloud_common::{RuntimeSpec, Verdict};
use pika_host_collector::{Cloud, Ensured, Error, Rerun};
use rustix::fs::Access;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::args::Run;
use crate::exit::{self, Failure};
use crate::print;
use crate::show::{Follow, What, follow, verdict_line};

/// How long what is shown may lag behind what has ended.
const LAST_LINES: Duration = Duration::from_secs(5);

/// Specs are small; this keeps a wrong path such as `/dev/zero` from filling the memory.
const MAX_SPEC_BYTES: u64 = 4 * 1024 * 1024;

/// Reads a spec from a file or from standard input.
fn read_spec(path: &Path) -> Result<RuntimeSpec, Failure> {
    let fail = |error: std::io::Error| Failure::Other(format!("{}: the spec cannot be read: {error}", path.display()));
    let mut text = String::new();
    if path == Path::new("-") {
        std::io::stdin().take(MAX_SPEC_BYTES).read_to_string(&mut text).map_err(fail)?;
    } else {
        let file = std::fs::File::open(path).map_err(fail)?;
        file.take(MAX_SPEC_BYTES).read_to_string(&mut text).map_err(fail)?;
    }
    RuntimeSpec::from_json(&text).map_err(|error| Failure::Other(format!("{}: {error}", path.display())))
}

/// What a signal asks for.
pub(crate) enum Wish {
    Cancel,
    Detach,
    Now,
}

/// Waits for a signal; the second one to interrupt means at once.
pub(crate) struct Wishes {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    hang_up: tokio::signal::unix::Signal,
    wished: bool,
}

impl Wishes {
    pub(crate) fn new() -> Result<Self, Failure> {
        let listen = |kind| signal(kind).map_err(|error| Failure::Other(format!("no signals can be had: {error}")));
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hang_up: listen(SignalKind::hangup())?,
            wished: false,
        })
    }

    pub(crate) async fn next(&mut self) -> Wish {
        let again = tokio::select! {
            _ = self.interrupt.recv() => std::mem::replace(&mut self.wished, true),
            _ = self.terminate.recv() => std::mem::replace(&mut self.wished, true),
            _ = self.hang_up.recv() => return Wish::Detach,
        };
        if again { Wish::Now } else { Wish::Cancel }
    }
}

/// `pika-cloud run`.
pub(crate) async fn run(cloud: &Cloud, args: &Run, json: bool) -> Result<ExitCode, Failure> {
    let spec = read_spec(&args.spec)?;
    let id = spec.identity.runtime_id.clone();
    if let Some(output) = &args.output {
        make_output(output)?;
    }
    let rerun = if args.again { Rerun::Again } else { Rerun::Answer };
    let what = if json { What::Json } else { What::All };
    let began = Instant::now();
    let (cancel, wish) = watch::channel(false);
    let mut wishes = Wishes::new()?;
    let shown = first_to_show(cloud, &id, rerun).map(|incarnation| {
        tokio::spawn(show_beside(cloud.clone(), id.clone(), Follow { what, since: began, incarnation, stay: true }))
    });
    let running = cloud.run(&spec, rerun, wish);
    tokio::pin!(running);
    let verdict = loop {
        tokio::select! {
            verdict = &mut running => break verdict,
            wish = wishes.next() => match wish {
                Wish::Cancel => {
                    print::note("interrupted: ending the workload, collecting, then what its policy says; once more to leave at once");
                    // `run` holds the other end.
                    let _ = cancel.send(true);
                }
                Wish::Detach => {
                    print::note(&format!("detached from {id}: the same command goes on"));
                    return Ok(ExitCode::from(exit::DETACHED));
                }
                Wish::Now => {
                    print::note(&format!("left {id} as it is: `pika-cloud destroy {id}` ends it"));
                    return Ok(ExitCode::from(EXIT_CANCELLED));
                }
            },
        }
    };
    let verdict = match verdict {
        Ok(verdict) => verdict,
        Err(error) => {
            if let Some(shown) = shown {
                shown.abort();
            }
            // What was collected is here, whatever became of the instance.
            if let (Some(output), Error::NotDestroyed { verdict: Some(_), .. }) = (&args.output, &error)
                && let Err(failure) = copy_outputs(cloud, &id, output)
            {
                print::error(&failure.to_string());
            }
            return Err(error.into());
        }
    };
    match shown {
        // The last lines are on their way: what is shown comes from the journal, and that is complete.
        Some(shown) => drop(tokio::time::timeout(LAST_LINES, shown).await),
        None => show_answer(cloud, &id, &verdict, what, began).await,
    }
    if let Some(output) = &args.output {
        copy_outputs(cloud, &id, output)?;
    }
    Ok(ExitCode::from(verdict.exit_code()))
}

/// The job is over: its outputs are in the state dir, whatever becomes of the copy.
fn copy_outputs(cloud: &Cloud, id: &str, output: &Path) -> Result<(), Failure> {
    let kept = |error| format!("{error} (the outputs are kept: pika-cloud collect {id} --output DIR)");
    cloud.collect(id, output).map_err(|error| Failure::Other(kept(error)))
}

/// Makes the folder for the outputs: one that cannot be had is told before a job is run for it.
fn make_output(output: &Path) -> Result<(), Failure> {
    let access = Access::WRITE_OK | Access::EXEC_OK;
    let made = std::fs::create_dir_all(output).and_then(|()| Ok(rustix::fs::access(output, access)?));
    made.map_err(|error| {
        Failure::Other(format!("{}: {error}: name a folder that can be written, by --output", output.display()))
    })
}

/// The incarnation that a run begins or goes on with; `None` where it is over, and is answered once it is known to be of the
/// same spec.
fn first_to_show(cloud: &Cloud, id: &str, rerun: Rerun) -> Option<u32> {
    match cloud.view(id).ok() {
        Some(view) if view.is_settled() && rerun == Rerun::Answer => None,
        Some(view) if view.is_settled() => Some(view.incarnation + 1),
        Some(view) => Some(view.incarnation.max(1)),
        None => Some(1),
    }
}

/// Shows what had ended before.
async fn show_answer(cloud: &Cloud, id: &str, verdict: &Verdict, what: What, since: Instant) {
    if what == What::Json {
        // What is shown does not change the job's code.
        let from = Follow { what, since, incarnation: verdict.incarnation, stay: false };
        if let Err(failure) = follow(cloud, id, from).await {
            print::error(&failure.to_string());
        }
        return;
    }
    let collection = verdict.evidence.collection.as_ref();
    let missing = collection.and_then(|collection| collection.error.as_deref());
    let missing = missing.map_or_else(String::new, |error| format!("; its outputs are not all here: {error}"));
    let message = format!("already ended: {}{missing}; --again runs it anew", verdict_line(verdict));
    print::phase(since.elapsed(), verdict.outcome.name(), &message);
}

/// Shows the runtime that is about to be begun, or goes on.
async fn show_beside(cloud: Cloud, id: String, from: Follow) -> Result<(), Failure> {
    // It may not have been begun yet.
    while !cloud.view(&id).is_ok_and(|view| view.incarnation >= from.incarnation) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    follow(&cloud, &id, from).await?;
    Ok(())
}

/// `pika-cloud ensure`.
pub(crate) async fn ensure(cloud: &Cloud, spec: &Path, again: bool, json: bool) -> Result<ExitCode, Failure> {
    let spec = read_spec(spec)?;
    let id = &spec.identity.runtime_id;
    let ensured = cloud.ensure(&spec, if again { Rerun::Again } else { Rerun::Answer }).await?;
    if json {
        let incarnation = cloud.view(id)?.incarnation;
        follow(cloud, id, Follow { what: What::Json, since: Instant::now(), incarnation, stay: false }).await?;
    }
    let text = match ensured {
        Ensured::Created => "its workload was started; `pika-cloud run SPEC` or `pika-cloud reconcile` goes on with it",
        Ensured::Adopted => "it was running already",
        Ensured::Ended => "it has ended, and `--again` starts it anew",
    };
    print::note(&format!("{id}: {text}; `pika-cloud inspect {id}` tells more"));
    Ok(ExitCode::SUCCESS)
}

/// `pika-cloud watch`.
pub(crate) async fn watch(cloud: &Cloud, id: &str, json: bool) -> Result<ExitCode, Failure> {
    let what = if json { What::Json } else { What::All };
    let mut wishes = Wishes::new()?;
    let incarnation = cloud.view(id)?.incarnation;
    let show = tokio::select! {
        show = follow(cloud, id, Follow { what, since: Instant::now(), incarnation, stay: true }) => show?,
        _ = wishes.next() => return Ok(ExitCode::from(EXIT_CANCELLED)),
    };
    match show.verdict() {
        Some(verdict) => Ok(ExitCode::from(verdict.exit_code())),
        None => Err(Error::Unknown { runtime_id: id.to_owned() }.into()),
    }
}
