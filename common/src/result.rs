//! `result.json`: the terminal result.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::document::{self, DecodeError, Extra, SCHEMA_VERSION};
use crate::limits::MAX_DOCUMENT_BYTES;
use crate::timestamp::Timestamp;

/// How a workload ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum ResultStatus {
    /// With success.
    Completed,
    /// Without.
    Failed,
}

/// The terminal result, written once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct RunResult {
    /// The version of the contract, [`SCHEMA_VERSION`].
    #[cfg_attr(feature = "schema", schemars(extend("const" = 1)))]
    pub schema_version: u32,
    /// How the workload ended.
    pub status: ResultStatus,
    /// The timestamp of the terminal event.
    pub finished_at: Timestamp,
    /// The message of the terminal event.
    pub message: String,
    /// The workload's exit code; 128 plus the signal where a signal ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// The details of the terminal event.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub details: Option<Value>,
    /// What this version does not know.
    #[serde(flatten)]
    pub extra: Extra,
}

impl RunResult {
    /// Reads a `result.json`.
    pub fn decode(text: &[u8]) -> Result<Self, DecodeError> {
        document::decode("result.json", SCHEMA_VERSION, MAX_DOCUMENT_BYTES, text)
    }

    /// Checks the version of one that did not come through [`RunResult::decode`], such as the body of a message.
    pub fn check_version(&self) -> Result<(), DecodeError> {
        document::check_version("result.json", u64::from(self.schema_version), SCHEMA_VERSION)
    }
}
