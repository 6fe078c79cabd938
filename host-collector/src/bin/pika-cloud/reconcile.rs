//! `reconcile`: what was found, what is done about it, and what could not be done.

use std::process::ExitCode;

use pika_host_collector::reconcile::{Outcome, Step};
use pika_host_collector::{Cloud, ReconcileOptions, ReconcileReport};
use serde_json::{Value, json};

use crate::args;
use crate::exit::Failure;
use crate::print;

/// `pika-cloud reconcile`.
pub(crate) async fn reconcile(cloud: &Cloud, args: &args::Reconcile, json: bool) -> Result<ExitCode, Failure> {
    let options = ReconcileOptions {
        dry_run: args.dry_run,
        take_over: args.take_over.iter().cloned().collect(),
        take_over_expired: args.take_over_expired,
        delete_orphan_volumes: args.delete_orphan_volumes,
    };
    let report = cloud.reconcile(&options).await?;
    show(&report, json);
    let mut failed = report.failed();
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    failed.sort_unstable();
    Err(Failure::Other(format!("not reconciled: {}", failed.join(", "))))
}

fn show(report: &ReconcileReport, json: bool) {
    for (step, outcome) in &report.done {
        let (word, detail) = outcome_words(outcome);
        if json {
            print::line(&row(step, word, detail).to_string());
        } else {
            let detail = detail.map(|detail| format!(": {detail}")).unwrap_or_default();
            // Names and aliases of others are in it.
            let line = format!("{:<9} {} ({}): {word}{detail}", step.verb(), step.name(), step.why());
            print::line(&print::plain(&line));
        }
    }
    if report.done.is_empty() && !json {
        print::note("there is nothing to reconcile");
    }
    for id in &report.unknown {
        print::note(&format!("--take-over {id}: nothing in Incus belongs to a runtime of that name"));
    }
}

fn row(step: &Step, outcome: &str, detail: Option<&str>) -> Value {
    json!({ "step": step.verb(), "what": step.name(), "why": step.why(), "outcome": outcome, "detail": detail })
}

fn outcome_words(outcome: &Outcome) -> (&'static str, Option<&str>) {
    match outcome {
        Outcome::Done => ("done", None),
        Outcome::Planned => ("planned", None),
        Outcome::LeftAlone(why) => ("left alone", Some(why)),
        Outcome::Failed(why) => ("failed", Some(why)),
    }
}
