//! The verbs that write one event.

use std::time::{Duration, Instant};

use pika_cloud_common::State;
use pika_guest_agent::drafts;
use pika_guest_agent::ledger::{AckFile, Draft, Ledger};
use pika_guest_agent::watch::Watch;

use crate::args::{ProgressWords, Words};
use crate::exit::Failure;

/// The runtime enters a state.
pub(crate) fn enter(state: State, words: Words, exit_code: Option<i32>) -> Result<u8, Failure> {
    let details = details(words.details.as_deref())?;
    write(drafts::state(state, words.message, details, exit_code)?, words.wait_ack)
}

/// The workload is that far.
pub(crate) fn progress(args: ProgressWords) -> Result<u8, Failure> {
    let details = details(args.words.details.as_deref())?;
    write(drafts::progress(&args.name, args.fraction, args.words.message, details)?, args.words.wait_ack)
}

fn details(text: Option<&str>) -> Result<Option<serde_json::Value>, Failure> {
    Ok(text.map(drafts::parse_details).transpose()?)
}

fn write(draft: Draft, wait_ack: Option<Duration>) -> Result<u8, Failure> {
    let ledger = Ledger::open()?;
    let mut locked = ledger.lock()?;
    let seq = locked.append_one(draft)?;
    if let Some(wait) = wait_ack {
        let stream_id = locked.stream().stream_id.clone();
        drop(locked);
        wait_for_ack(&ledger, &stream_id, seq, wait)?;
    }
    Ok(0)
}

/// Waits until the owner has `seq`, durably.
fn wait_for_ack(ledger: &Ledger, stream_id: &str, seq: u64, wait: Duration) -> Result<(), Failure> {
    let deadline = Instant::now() + wait;
    let watch = Watch::new(ledger.folder());
    loop {
        if AckFile::read(ledger.folder(), stream_id).seq >= seq {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(Failure::NotAcknowledged { seq, secs: wait.as_secs_f64() });
        }
        watch.wait(deadline);
    }
}

impl From<drafts::DraftError> for Failure {
    fn from(error: drafts::DraftError) -> Self {
        Self::Data(error.to_string())
    }
}
