//! The contract of pika-cloud: what a guest and its host must agree on.
//!
//! ```text
//!   RuntimeSpec ──► host ──── session protocol (wire) ────► guest ──► events.jsonl (event)
//!                    │                                               status.json  (status)
//!                    ▼                                               result.json  (result)
//!                 verdict                                            guest-request.json (request)
//! ```
//!
//! This crate is pure: it reads no file, opens no socket, asks no clock. Both sides link it, so a name, a limit or a
//! rule of reading stands here once. Every document keeps fields that it does not know, and checks `schema_version`:
//! a newer guest never breaks an older host without a typed error that names both versions.

#![forbid(unsafe_code)]

mod bounded;
pub mod command;
pub mod digest;
pub mod document;
pub mod event;
pub mod glob;
pub mod limits;
pub mod paths;
pub mod request;
pub mod result;
#[cfg(feature = "schema")]
pub mod schema;
pub mod spec;
pub mod status;
pub mod timestamp;
pub mod verdict;
pub mod wire;

pub use command::Command;
pub use document::{DecodeError, SCHEMA_VERSION};
pub use event::{Event, EventHead, State};
pub use request::GuestRequest;
pub use result::{ResultStatus, RunResult};
pub use spec::RuntimeSpec;
pub use status::Status;
pub use timestamp::Timestamp;
pub use verdict::Verdict;
