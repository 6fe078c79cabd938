//! From what a journal says to where the machine goes on.

use std::time::Duration;

use pika_cloud_common::State;

use crate::clock::Now;
use crate::journal::{Ended, Moment, View};
use crate::machine::{EndDecision, Settled, Start, last_word};

/// Where an incarnation stood when its collector last wrote to the journal.
pub(super) fn of(view: &View, now: Now) -> Start {
    let ago = |moment: &Option<Moment>| moment.as_ref().map(|moment| view.ago(moment, now));
    let ended = view.ended.as_ref().map(|ended| view.ago(&ended.at, now));
    let start_sent = view.start_sent.as_ref().map(|sent| view.ago(&sent.at, now));
    Start {
        lived: start_sent.zip(ended).map_or(Duration::ZERO, |(sent, ended)| sent.saturating_sub(ended)),
        restarts: view.restarts,
        create_unanswered: view.state == Some(State::Provisioning) && view.starting_at.is_none(),
        start_asked: ago(&view.starting_at),
        booted: ago(&view.booted_at),
        is_ready: view.is_ready,
        start_sent,
        progress: ago(&view.progress_at),
        last_word: view.terminal.as_ref().map(last_word),
        ended: view.ended.as_ref().map(decision),
        is_collected: view.collection.is_some(),
        is_concluded: view.verdict.is_some(),
        command: view.command,
        settled: settled(view, now),
    }
}

fn decision(ended: &Ended) -> EndDecision {
    EndDecision { outcome: ended.outcome.clone(), message: ended.message.clone(), error: ended.error.clone() }
}

fn settled(view: &View, now: Now) -> Option<Settled> {
    if view.taken_over.is_some() {
        return Some(Settled::TakenOver);
    }
    if let Some(finished) = &view.finished {
        let rest = finished.restart_in_ms.map(Duration::from_millis);
        let left = rest.map(|rest| rest.saturating_sub(view.ago(&finished.at, now)));
        return Some(left.map_or(Settled::Finished, Settled::Resting));
    }
    let kept = view.kept.as_ref()?;
    let left = kept.for_secs.map(|secs| Duration::from_secs(secs).saturating_sub(view.ago(&kept.at, now)));
    Some(Settled::Kept(left))
}
