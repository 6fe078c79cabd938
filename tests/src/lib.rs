//! What the end-to-end tests stand on: a real Incus, the real programs, and a stage for each test that leaves nothing.
//!
//! ```text
//!   test ─► Stage (scratch folder, state dir, names of instances) ─► pika-cloud as a child process ─► Incus
//!             │                                                          │
//!             └─ Drop: ends its children, deletes its instances          └─ journal, outputs, exit code, memory
//! ```
//!
//! Nothing here starts an Incus: `cargo xtask test` does, and names it in the environment (see [`Lab`]). Nothing waits for
//! a time to pass: tests wait for conditions, with limits that only a hang reaches. [`vm`] needs no Incus.

#![allow(clippy::missing_panics_doc, reason = "what a test stands on fails by panicking")]

mod agent;
mod bake;
mod chance;
mod daemon;
mod debian;
mod dial;
mod host;
mod image;
mod incus;
mod incus_vm;
mod journal;
mod lab;
mod lab_daemon;
mod output;
mod run;
pub mod sim;
mod spec;
mod stage;
pub mod vm;
mod wait;

pub use agent::{DONE, ENDLESS, HELLO, archivist, entry, played_by};
pub use bake::{Seen, image_of, images};
pub use chance::Chance;
pub use daemon::Daemon;
pub use debian::{debian_image, openrc_image};
pub use dial::Dial;
pub use host::{command_lines_with, count_in_files, files_below, monotonic, processes, read_text};
pub use image::{Image, debian_disk_with_agent};
pub use incus::Incus;
pub use incus_vm::{IncusVms, VmJob, VmKind};
pub use journal::{Journal, moment};
pub use lab::{BARE_IMAGE, Lab};
pub use lab_daemon::LabDaemon;
pub use output::{Outputs, sha256};
pub use run::{Finished, Line, Running};
pub use rustix::process::Signal;
pub use spec::Spec;
pub use stage::Stage;
pub use wait::{LIMIT, eventually, until};
