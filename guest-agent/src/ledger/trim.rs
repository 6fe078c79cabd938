//! Removes what the owner has acknowledged from the front of `events.jsonl` and of the log.
//!
//! ```text
//!   events.jsonl   │ acknowledged │ waiting │            base moves up in the stream file (synced),
//!   .….tmp                        │ waiting │ ─ renamed ─► events.jsonl
//!   logs/guest.log │ hole         │ waiting │            offsets stay
//! ```
//!
//! Killed between the stream file and the rename, the file still begins below its base; readers leave those lines out.
