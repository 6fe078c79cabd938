//! Wall time, where a deadline has to outlive a collector.

use std::time::{Duration, SystemTime};

use pika_cloud_common::Timestamp;

/// How long ago a record was written; nothing where the clock went back since.
pub(crate) fn since(at: &Timestamp) -> Duration {
    let parsed = time::OffsetDateTime::parse(at.as_str(), &time::format_description::well_known::Rfc3339);
    parsed.ok().and_then(|at| SystemTime::now().duration_since(at.into()).ok()).unwrap_or_default()
}

/// The time, for a record.
pub(crate) fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp::from_unix(since.as_secs(), since.subsec_micros())
}
