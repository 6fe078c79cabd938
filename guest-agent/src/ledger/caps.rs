//! The cap on events that the owner has not taken yet, and the count of what was refused there.
//!
//! What is acknowledged is trimmed by the owner's stream (see [`trim`](super::trim)), so the size of the file is what
//! waits. Below [`LOW`] nothing else is looked at: a verb stays cheap.

use pika_cloud_common::limits::{MAX_UNACKED_EVENT_BYTES, RESERVED_EVENT_BYTES};
use rustix::fs;
use serde_json::json;

use super::append::{Draft, What};
use super::error::LedgerError;
use super::format::DROPPED;
use super::{Locked, own_caps, system};

/// A file smaller than this is never at a cap.
const LOW: u64 = 1024 * 1024;

/// The cap in force, found out when it is first needed.
#[derive(Debug)]
pub(super) struct Cap {
    bytes: Option<u64>,
}

impl Cap {
    pub(super) fn of(_: &Locked<'_>) -> Self {
        Self { bytes: None }
    }

    /// Whether the file may grow by `batch` bytes; `reserved` names an event that may use the reserve.
    pub(super) fn admits(&mut self, ledger: &Locked<'_>, batch: usize, reserved: bool) -> bool {
        let size = ledger.len + batch as u64;
        if size <= LOW {
            return true;
        }
        let cap = *self.bytes.get_or_insert_with(|| find_cap(ledger));
        size <= if reserved { cap.saturating_add(RESERVED_EVENT_BYTES) } else { cap }
    }

    pub(super) fn refusal(&self, ledger: &Locked<'_>) -> LedgerError {
        LedgerError::Capped { held: ledger.len, cap: self.bytes.unwrap_or(LOW) }
    }
}

/// At most [`MAX_UNACKED_EVENT_BYTES`] (or what the image says) with the reserve, a quarter of the memory limit, half of what the file system has.
fn find_cap(ledger: &Locked<'_>) -> u64 {
    let mut cap = own_caps::lower(own_caps::EVENTS_ENV, MAX_UNACKED_EVENT_BYTES);
    if let Some(limit) = system::memory_limit() {
        cap = cap.min(limit / 4);
    }
    if let Ok(space) = fs::fstatvfs(&ledger.ledger.folder) {
        let free = space.f_bavail.saturating_mul(space.f_frsize);
        cap = cap.min((free.saturating_add(ledger.len)) / 2);
    }
    cap.saturating_sub(RESERVED_EVENT_BYTES).max(LOW)
}

/// How many progress events were refused since it was last told.
pub(super) fn take_dropped(ledger: &Locked<'_>) -> Option<u64> {
    let text = ledger.ledger.folder.read(DROPPED, 32).ok().flatten()?;
    std::str::from_utf8(&text).ok()?.trim().parse().ok()
}

pub(super) fn count_dropped(ledger: &Locked<'_>, count: u64) -> Result<(), LedgerError> {
    ledger.ledger.folder.replace(DROPPED, count.to_string().as_bytes(), false)
}

pub(super) fn forget_dropped(ledger: &Locked<'_>) -> Result<(), LedgerError> {
    ledger.ledger.folder.remove_file(DROPPED)
}

/// Tells how many were refused.
pub(super) fn drop_notice(count: u64) -> Draft {
    Draft {
        what: What::Notice,
        message: format!("{count} progress events were dropped, too many waited for the host"),
        details: Some(json!({ "notice": { "dropped_events": count } })),
    }
}
