//! What every document of the contract shares: a version that is checked, and fields that survive unread.

use serde::Deserialize;

/// The version of event, status, result and verdict that this build reads and writes.
pub const SCHEMA_VERSION: u32 = 1;

/// Fields that this version does not know, in the order in which they came.
pub type Extra = serde_json::Map<String, serde_json::Value>;

/// A document of the contract could not be read.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// Written by another version of the contract.
    #[error(
        "{document} has schema_version {found}, this build reads {supported}: update the older of guest agent and host"
    )]
    Version {
        /// Which document.
        document: &'static str,
        /// The version that it names.
        found: u64,
        /// The version that this build reads.
        supported: u32,
    },
    /// Longer than the contract allows.
    #[error("{document} is {found} bytes long, at most {limit} are read")]
    TooLong {
        /// Which document.
        document: &'static str,
        /// Its length in bytes.
        found: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// Not JSON, or not of the document's form.
    #[error("{document} is malformed: {source}")]
    Malformed {
        /// Which document.
        document: &'static str,
        /// What the parser says, with line and column.
        source: serde_json::Error,
    },
}

#[derive(Deserialize)]
struct VersionProbe {
    schema_version: u64,
}

/// Decodes a document after its length and its version were checked, so that a newer one is told as such even where its
/// other fields have changed.
pub(crate) fn decode<'a, T: Deserialize<'a>>(
    document: &'static str,
    supported: u32,
    limit: usize,
    text: &'a [u8],
) -> Result<T, DecodeError> {
    if text.len() > limit {
        return Err(DecodeError::TooLong { document, found: text.len(), limit });
    }
    let malformed = |source| DecodeError::Malformed { document, source };
    // serde_json does not look into what it skips, and everything is skipped once.
    let text = std::str::from_utf8(text).map_err(|error| malformed(serde::de::Error::custom(error)))?;
    // serde takes an array for a struct's fields; the contract does not.
    if text.trim_ascii_start().starts_with('[') {
        return Err(malformed(serde::de::Error::custom("expected an object, found an array")));
    }
    let probe: VersionProbe = serde_json::from_str(text).map_err(malformed)?;
    check_version(document, probe.schema_version, supported)?;
    serde_json::from_str(text).map_err(malformed)
}

/// Refuses another version than the one that is read.
pub(crate) fn check_version(document: &'static str, found: u64, supported: u32) -> Result<(), DecodeError> {
    if found == u64::from(supported) { Ok(()) } else { Err(DecodeError::Version { document, found, supported }) }
}
