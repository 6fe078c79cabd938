//! The journal: what is known of one runtime, durably. Everything else in its folder is derived from it.
//!
//! # The bytes
//!
//! `<state_dir>/<runtime_id>/journal.jsonl` holds one record a line. The first names the format's version; `n` counts the
//! records from 0; `inc` is the incarnation; guest lines stand in it as they stood in the guest's file; `crc` is the CRC-32
//! of all bytes of the line before `,"crc":`.
//!
//! ```text
//! {"n":0,"at":"…","inc":0,"journal":{"version":1,"runtime_id":"job-7"},"crc":"9f1c0c52"}
//! {"n":1,"at":"…","inc":1,"host":{"what":"requested","spec_hash":"v1:…"},"crc":"…"}
//! {"n":5,"at":"…","inc":1,"guest":{"schema_version":1,"seq":1,…},"crc":"…"}
//! ```
//!
//! # The order of writes
//!
//! What the host adds is read back before it is taken: no guest can have a record written that recovery refuses.
//!
//! Records are gathered in memory, then appended with one write and made durable with one `fdatasync`; log files that they
//! speak of are synced before them. Invariant 1: only then are they published to followers and acknowledged to the guest.
//!
//! # After a crash
//!
//! | found | what it means | what recovery does |
//! |---|---|---|
//! | whole lines only | nothing was under way, or the last sync finished | goes on behind the last |
//! | a torn last line, zeros, a hole | a write was under way, nothing of it was acknowledged | cuts the file at the last line whose CRC and number fit |
//! | no file, or no whole first line | the crash came before the first sync, so Incus was asked for nothing | begins anew |
//! | a damaged first line with records behind it | no crash of ours leaves that: the disk does | an error, and nothing is touched |
//! | a first line of another version | another release wrote it | an error that names both versions |
//! | an intact line that is no record, or out of order | somebody edited it | an error that names the line |

mod error;
mod follow;
mod format;
mod recover;
mod view;
mod write;

pub use error::JournalError;
pub use follow::Follower;
pub use format::{Body, GuestLine, Header, HostRecord, LogMark, Record, VERSION};
pub use view::{Ended, StartSent, View};
pub use write::{Committer, Journal};

#[cfg(test)]
mod tests;
