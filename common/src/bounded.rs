//! Numbers of a peer, bounded where they are read: nothing that is computed from them can overflow.

use serde::{Deserialize, Deserializer, de};

/// A count, an offset or a size in bytes: at most [`MAX_COUNT`](crate::limits::MAX_COUNT).
pub(crate) fn count<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    within(0, crate::limits::MAX_COUNT, deserializer)
}

/// The number of an event: as [`count`], from 1.
pub(crate) fn seq<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    within(1, crate::limits::MAX_COUNT, deserializer)
}

/// The raw bytes behind a header: at most [`MAX_CHUNK_BYTES`](crate::limits::MAX_CHUNK_BYTES).
pub(crate) fn chunk_len<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    within(0, crate::limits::MAX_CHUNK_BYTES as u64, deserializer)
}

fn within<'de, D: Deserializer<'de>>(min: u64, max: u64, deserializer: D) -> Result<u64, D::Error> {
    let number = u64::deserialize(deserializer)?;
    if (min..=max).contains(&number) {
        Ok(number)
    } else {
        Err(de::Error::custom(format_args!("{number} is out of range, expected {min} to {max}")))
    }
}
