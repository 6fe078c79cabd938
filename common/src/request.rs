//! `guest-request.json`: what the host asked the guest to run.

use serde::{Deserialize, Serialize};

use crate::document::{self, DecodeError, Extra};
use crate::limits::MAX_DOCUMENT_BYTES;

/// The version of [`GuestRequest`] that this build reads and writes.
pub const REQUEST_SCHEMA_VERSION: u32 = 2;

/// A command for the guest to run. Nothing secret stands here: members of the guest's group can read it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct GuestRequest {
    /// The version of the request, [`REQUEST_SCHEMA_VERSION`].
    #[cfg_attr(feature = "schema", schemars(extend("const" = 2)))]
    pub schema_version: u32,
    /// Run by `/bin/sh -c`.
    pub command: String,
    /// Seconds until the command is ended: TERM, a grace, KILL, to its whole process group. 0 means no limit.
    pub timeout_secs: u64,
    /// Whether it runs as root; else as the guest's `ci` user where the image has one, or as `nobody`.
    pub run_as_root: bool,
    /// What this version does not know.
    #[serde(flatten)]
    pub extra: Extra,
}

impl GuestRequest {
    /// Reads a `guest-request.json`.
    pub fn decode(text: &[u8]) -> Result<Self, DecodeError> {
        document::decode("guest-request.json", REQUEST_SCHEMA_VERSION, MAX_DOCUMENT_BYTES, text)
    }

    /// Checks the version of one that did not come through [`GuestRequest::decode`], such as the body of a message.
    pub fn check_version(&self) -> Result<(), DecodeError> {
        document::check_version("guest-request.json", u64::from(self.schema_version), REQUEST_SCHEMA_VERSION)
    }
}
