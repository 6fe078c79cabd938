//! Showing a runtime as it goes: its phases and its log, driven by its journal.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use pika_cloud_common::{Event, Verdict, paths};
use pika_host_collector::journal::{Body, HostRecord, LogMark, Record};
use pika_host_collector::{Cloud, LogReader};

use crate::exit::Failure;
use crate::print;

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
    log: LogReader,
    finished: bool,
    verdict: Option<Verdict>,
}

impl Show {
    pub(crate) fn new(what: What, since: Instant, log: PathBuf) -> Self {
        Self { what, since, log: LogReader::new(log), finished: false, verdict: None }
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
                if let Some(mark) = logs.get(paths::GUEST_LOG) {
                    self.log(*mark);
                }
            }
            Body::Host(HostRecord::Collected { collection }) => {
                let skipped = match collection.skipped {
                    0 => String::new(),
                    skipped => format!(", {skipped} left out"),
                };
                let count = format!("{} files, {} bytes{skipped}", collection.files, collection.bytes);
                match &collection.error {
                    None => self.phase("collected", &count),
                    Some(error) => self.phase("collected", &format!("{count}, incomplete: {error}")),
                }
            }
            Body::Host(HostRecord::Verdict { verdict }) => {
                self.phase(verdict.outcome.name(), &format!("verdict: {}", verdict_line(verdict)));
                self.verdict = Some((**verdict).clone());
            }
            Body::Host(HostRecord::Kept { for_secs }) => {
                let until = match for_secs {
                    None => "until it is stopped (pika-cloud stop)".to_owned(),
                    Some(secs) => format!("for {secs} s; after that `pika-cloud reconcile` destroys it"),
                };
                self.phase("kept", &until);
                self.finished = true;
            }
            Body::Host(HostRecord::Finished { restart_in_ms: Some(ms), .. }) => {
                self.phase("restarting", &format!("in {:.1} s", Duration::from_millis(*ms).as_secs_f64()));
            }
            Body::Host(HostRecord::Finished { .. }) => self.finished = true,
            Body::Host(HostRecord::TakenOver { owner, term }) => {
                self.phase("taken over", &format!("by the collector {owner}, under term {term}"));
                self.finished = true;
            }
            Body::Host(_) => {}
        }
    }

    fn event(&self, line: &str) {
        if self.what != What::All {
            return;
        }
        let Ok(event) = Event::decode(line.as_bytes()) else { return };
        match event.progress() {
            None => print::guest_phase(self.since.elapsed(), event.kind.as_str(), &event.message),
            Some(progress) => {
                let name = progress["name"].as_str().unwrap_or_default();
                let percent = progress["fraction"].as_f64().map(|f| format!(" {:.0} %", f * 100.0));
                let message = format!("{name}{} {}", percent.unwrap_or_default(), event.message);
                print::guest_phase(self.since.elapsed(), "progress", message.trim());
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
        while let Ok(piece) = self.log.read_up_to(mark.host) {
            if piece.is_empty() {
                return;
            }
            print::log(&piece);
        }
    }
}

/// A verdict in a line.
pub(crate) fn verdict_line(verdict: &Verdict) -> String {
    use pika_cloud_common::verdict::Outcome;
    let code = match verdict.outcome {
        Outcome::Completed { exit_code: Some(code) } | Outcome::Failed { exit_code: Some(code) } => {
            format!(" (exit code {code})")
        }
        _ => String::new(),
    };
    match &verdict.evidence.error {
        Some(error) => format!("{}{code}: {error}", verdict.message),
        None => format!("{}{code}", verdict.message),
    }
}

/// Follows a runtime from an incarnation on until the last one is over; `stay` says whether to wait for what comes.
pub(crate) async fn follow(cloud: &Cloud, id: &str, from: Follow) -> Result<Show, Failure> {
    let Follow { what, since, incarnation: first, stay } = from;
    let mut follower = cloud.events(id)?;
    let new_show = |incarnation| -> Result<Show, Failure> {
        let log = cloud.outputs(id, incarnation)?.join(paths::LOGS_DIR).join(paths::GUEST_LOG);
        Ok(Show::new(what, since, log))
    };
    let mut shown = first;
    let mut show = new_show(shown)?;
    loop {
        let next = if stay { follower.next().await } else { follower.try_next() };
        let Some((record, line)) = next.map_err(pika_host_collector::Error::from)? else {
            return Ok(show);
        };
        if record.inc < first {
            continue;
        }
        // `run --again` begins a new incarnation behind the last one; each is shown by itself.
        if record.inc != shown {
            shown = record.inc;
            show = new_show(shown)?;
        }
        show.record(&record, &line);
        if stay && show.is_finished() && is_last(cloud, id, shown) {
            return Ok(show);
        }
    }
}

/// What to follow, and how.
#[derive(Clone, Copy)]
pub(crate) struct Follow {
    /// What is shown of it.
    pub(crate) what: What,
    /// From when elapsed time counts.
    pub(crate) since: Instant,
    /// The first incarnation that is shown.
    pub(crate) incarnation: u32,
    /// Whether to wait for what comes.
    pub(crate) stay: bool,
}

/// Whether no later incarnation was begun.
fn is_last(cloud: &Cloud, id: &str, incarnation: u32) -> bool {
    cloud.view(id).is_ok_and(|view| view.incarnation == incarnation && view.is_settled())
}

/// `pika-cloud logs`.
pub(crate) async fn logs(cloud: &Cloud, id: &str, stay: bool) -> Result<ExitCode, Failure> {
    let incarnation = cloud.view(id)?.incarnation;
    follow(cloud, id, Follow { what: What::Log, since: Instant::now(), incarnation, stay }).await?;
    Ok(ExitCode::SUCCESS)
}
