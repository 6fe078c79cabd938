//! `status.json`: the current state.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::document::{self, DecodeError, Extra, SCHEMA_VERSION};
use crate::event::State;
use crate::limits::MAX_DOCUMENT_BYTES;
use crate::timestamp::Timestamp;

/// The current state, as the last state event says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Status {
    /// The version of the contract, [`SCHEMA_VERSION`].
    #[cfg_attr(feature = "schema", schemars(extend("const" = 1)))]
    pub schema_version: u32,
    /// The kind of the last state event.
    pub state: State,
    /// The timestamp of that event.
    pub updated_at: Timestamp,
    /// The message of that event.
    pub message: String,
    /// The kernel's `boot_id` at that time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<String>,
    /// The details of that event.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub details: Option<Value>,
    /// What this version does not know.
    #[serde(flatten)]
    pub extra: Extra,
}

impl Status {
    /// Reads a `status.json`.
    pub fn decode(text: &[u8]) -> Result<Self, DecodeError> {
        document::decode("status.json", SCHEMA_VERSION, MAX_DOCUMENT_BYTES, text)
    }

    /// Checks the version of one that did not come through [`Status::decode`], such as the body of a message.
    pub fn check_version(&self) -> Result<(), DecodeError> {
        document::check_version("status.json", u64::from(self.schema_version), SCHEMA_VERSION)
    }
}
