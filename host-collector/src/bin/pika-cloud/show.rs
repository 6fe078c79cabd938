//! Showing a runtime as it goes: its phases and its log, driven by its journal.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use pika_cloud_common::{Event, Verdict};
use pika_host_collector::Cloud;
use pika_host_collector::journal::{Body, HostRecord, LogMark, Record};

use crate::exit::Failure;
use crate::print;

/// Bytes of log that are printed at once.
const LOG_CHUNK: usize = 64 * 1024;

/// What of a runtime is shown.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    /// Phases and log.
    All,
    /// The log.
    Log,
    /// Journal records as they stand.
    Json,
}

/// Shows one incarnation, record by record.
pub(crate) struct Show {
    what: What,
    since: Instant,
    log: PathBuf,
    shown: u64,
    finished: bool,
    verdict: Option<Verdict>,
}

impl Show {
    pub(crate) fn new(what: What, since: Instant, log: PathBuf) -> Self {
        Self { what, since, log, shown: 0, finished: false, verdict: None }
    }

    /// Whether the incarnation is over.
    pub(crate) fn is_finished(&self) -> bool {
        self.finished
    }

    pub(crate) fn verdict(&self) -> Option<&Verdict> {
        self.verdict.as_ref()
    }

    pub(crate) fn record(&mut self, record: &Record, line: &str) {
        if self.what == What::Json {
            print::line(line);
        }
        match &record.body {
            Body::Guest(line) => self.event(line.get()),
            Body::Host(HostRecord::State { state, message }) => self.phase(state.as_str(), message),
            Body::Host(HostRecord::Logs { logs }) => {
                if let Some(mark) = logs.get(pika_cloud_common::paths::GUEST_LOG) {
                    self.log(*mark);
                }
            }
            Body::Host(HostRecord::Collected { collection }) => {
                let count = format!("{} files, {} bytes", collection.files, collection.bytes);
                match &collection.error {
                    None => self.phase("collected", &count),
                    Some(error) => self.phase("collected", &format!("{count}, incomplete: {error}")),
                }
            }
            Body::Host(HostRecord::Verdict { verdict }) => {
                self.phase(verdict.outcome.name(), &verdict_line(verdict));
                self.verdict = Some((**verdict).clone());
            }
            Body::Host(HostRecord::Finished { .. }) => self.finished = true,
            Body::Host(_) | Body::Journal(_) => {}
        }
    }

    fn event(&self, line: &str) {
        if self.what != What::All {
            return;
        }
        let Ok(event) = Event::decode(line.as_bytes()) else { return };
        match event.progress() {
            None => self.phase(event.kind.as_str(), &event.message),
            Some(progress) => {
                let name = progress["name"].as_str().unwrap_or_default();
                let percent = progress["fraction"].as_f64().map(|f| format!(" {:.0} %", f * 100.0));
                let message = format!("{name}{} {}", percent.unwrap_or_default(), event.message);
                self.phase("progress", message.trim());
            }
        }
    }

    fn phase(&self, name: &str, message: &str) {
        if self.what == What::All {
            print::phase(self.since.elapsed(), name, message);
        }
    }

    /// Prints the log up to where the journal says that it is durable.
    fn log(&mut self, mark: LogMark) {
        if self.what == What::Json {
            return;
        }
        let Ok(file) = File::open(&self.log) else { return };
        let mut chunk = vec![0; LOG_CHUNK];
        while self.shown < mark.host {
            let want = usize::try_from(mark.host - self.shown).unwrap_or(LOG_CHUNK).min(LOG_CHUNK);
            match file.read_at(&mut chunk[..want], self.shown) {
                Ok(read @ 1..) => {
                    print::log(&chunk[..read]);
                    self.shown += read as u64;
                }
                _ => return,
            }
        }
    }
}

/// A verdict in a line.
fn verdict_line(verdict: &Verdict) -> String {
    use pika_cloud_common::verdict::Outcome;
    let code = match verdict.outcome {
        Outcome::Completed { exit_code: Some(code) } | Outcome::Failed { exit_code: Some(code) } => {
            format!(" (exit code {code})")
        }
        _ => String::new(),
    };
    match &verdict.evidence.error {
        Some(error) => format!("verdict: {}{code}: {error}", verdict.message),
        None => format!("verdict: {}{code}", verdict.message),
    }
}

/// Follows a runtime's current incarnation until it is over; `stay` says whether to wait for what comes.
pub(crate) async fn follow(cloud: &Cloud, id: &str, what: What, since: Instant, stay: bool) -> Result<Show, Failure> {
    let mut follower = cloud.events(id)?;
    let mut show: Option<(u32, Show)> = None;
    loop {
        let next = if stay { follower.next().await } else { follower.try_next() };
        let Some((record, line)) = next.map_err(pika_host_collector::Error::from)? else { break };
        if record.inc == 0 {
            continue;
        }
        let incarnation = record.inc;
        // `run --again` begins a new incarnation behind the last one; each is shown by itself.
        if show.as_ref().is_none_or(|(shown, _)| *shown != incarnation) {
            show = Some((incarnation, Show::new(what, since, cloud.log_path(id)?)));
        }
        if let Some((_, show)) = &mut show {
            show.record(&record, &line);
            if stay && show.is_finished() && is_last(cloud, id, incarnation) {
                break;
            }
        }
    }
    Ok(show.map_or_else(|| Show::new(what, since, PathBuf::new()), |(_, show)| show))
}

/// Whether no later incarnation was begun.
fn is_last(cloud: &Cloud, id: &str, incarnation: u32) -> bool {
    cloud.view(id).is_ok_and(|view| view.incarnation == incarnation && view.finished)
}

/// `pika-cloud logs`.
pub(crate) async fn logs(cloud: &Cloud, id: &str, stay: bool) -> Result<ExitCode, Failure> {
    follow(cloud, id, What::Log, Instant::now() + Duration::ZERO, stay).await?;
    Ok(ExitCode::SUCCESS)
}
