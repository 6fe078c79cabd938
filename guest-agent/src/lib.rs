//! The guest's side of pika-cloud: writes the lifecycle files, runs the workload, serves the stream.
//!
//! ```text
//!   verbs ───────────► ledger ──► events.jsonl, status.json, result.json
//!   run ──► supervise ───┤
//!   stream ──► serve ──► session ──► (tails the same files)
//! ```
//!
//! The files are the truth and no daemon has to run: a verb writes them itself, under a lock, and returns when they hold.

pub mod drafts;
pub mod ledger;
pub mod serve;
pub mod session;
pub mod supervise;
pub mod users;
pub mod watch;
