//! A simulator of everything around a collector: the same seed gives the same run, byte for byte.
//!
//! ```text
//!   seed ─► plan ─► world ─┬─ host: clocks, disk, shell ─── the real core, machine, session and journal
//!                          ├─ incus: instances, calls
//!                          ├─ link: bytes in both directions
//!                          ├─ guest: files, workload ────── the real core of the agent's session
//!                          ├─ nemesis: what goes wrong
//!                          └─ oracle: the nine invariants, after every step
//! ```
//!
//! Time is virtual, and every number comes from the seed. What is modelled is said in each module; what is real is what
//! decides.

pub mod disk;
pub mod guest;
pub mod host;
pub mod incus;
pub mod link;
mod nemesis;
pub mod oracle;
pub mod plan;
pub mod random;
pub mod shell;
pub mod trace;
pub mod world;
