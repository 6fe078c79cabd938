//! Runs a workload from its start to its terminal event.
//!
//! ```text
//!   accept (a session's `start`) ─┐ under the ledger's lock:
//!   run (a person, an init)      ─┤  1 flock supervisor.lock ── held by somebody: busy
//!                                 │  2 a lost run before this one: its `failed {supervisor_lost}`
//!                                 │  3 after a terminal event: the next stream
//!                                 │  4 guest-request.json
//!                                 │  5 stream file: request_id, supervised; synced    ◄── from here on it counts as started
//!                                 └─► supervisor: starting ── workload ── completed | failed ── lock free ── release
//! ```
//!
//! The flock belongs to one open file that is handed from the acceptor to the supervisor, so that it is held without a
//! gap from 1 until the supervisor ends, however it ends; the workload does not inherit it. Killed
//!
//! - before 5: nothing was accepted; the host asks again and it starts.
//! - after 5, before the terminal event: the lock is free and the stream says `supervised`, so the next stream or run
//!   writes `failed {supervisor_lost}`. It is never started again.

mod accept;
mod begin;
mod disk;
mod ending;
mod handover;
mod job;
mod logs;
mod memory;
mod mounts;
mod search_path;
pub mod signals;
mod spawn;

pub use accept::{Answer, accept, prepare_run, settle_abandoned, settle_lost, signal_supervisor, supervisor_pid};
pub use begin::{BeginError, SuperviseError, begin, give_up, supervise_handed_over, supervise_spawned};
pub use handover::{HandOverError, InitSocket, SOCKET_ENV};
pub use job::{Job, run_job};
pub use spawn::{SpawnError, What};
