//! The host's side of pika-cloud: runs workloads in Incus instances, follows what they report, and gives a verdict.
//!
//! ```text
//!   bin/pika-cloud ──► cloud ──► driver ──► runtime (pure) ──┬─► machine   what happens next     (pure)
//!                      │  │        │                        ├─► session   what the guest says   (pure)
//!          reconcile ◄─┘  │        │                        └─► journal   what is known, durably
//!                         │        ├─► incus, transport   how to reach it
//!              preflight ◄┘        └─► artifacts, outputs what it leaves
//! ```
//!
//! Machine, session and journal know nothing of each other; `runtime` joins them without I/O, and the driver is a tokio
//! shell around that. Start at [`Cloud`].
//!
//! What this module names itself, [`bake`] and [`reconcile`] are for consumers. The other modules are open to the project's own
//! tests and simulator, and change as they need. Errors are whole sentences, with their cause in them: show them alone, without
//! the chain of their sources. Where one says what to do, that is said for the command line; the state dir is the caller's own
//! (`pika-cloud --state-dir DIR`).
//!
//! # Example
//!
//! ```no_run
//! use pika_host_collector::{Cloud, Config, Rerun};
//! use pika_cloud_common::RuntimeSpec;
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let cloud = Cloud::connect(&Config {
//!     incus_socket: "/var/lib/incus/unix.socket".into(),
//!     state_dir: "/var/lib/pika-cloud".into(),
//!     ..Config::default()
//! })?;
//! let spec = RuntimeSpec::from_json(&std::fs::read_to_string("ci-job.json")?)?;
//! let (_cancel, wish) = tokio::sync::watch::channel(false);
//! let verdict = cloud.run(&spec, Rerun::Answer, wish).await?;
//! println!("{}", verdict.outcome.name());
//! # Ok(())
//! # }
//! ```
//!
//! An image with the agent in it, made of one without ([`bake`]):
//!
//! ```no_run
//! # use pika_host_collector::Cloud;
//! use pika_host_collector::bake::{Bake, BakeProgress};
//!
//! # async fn example(cloud: &Cloud) -> Result<(), Box<dyn std::error::Error>> {
//! let mut order = Bake::new("debian", "ci-debian");
//! order.files.push("tool:/usr/local/bin/tool".parse()?);
//! order.provision = Some("provision.sh".into());
//! let mut tell = |progress: BakeProgress<'_>| {
//!     if let BakeProgress::Step(what) = progress {
//!         println!("{what}");
//!     }
//! };
//! let (_cancel, wish) = tokio::sync::watch::channel(false);
//! let baked = cloud.bake(&order, &mut tell, wish).await?;
//! println!("ci-debian is {}", baked.fingerprint);
//! for stale in cloud.stale_images().await?.images {
//!     println!("{stale}");
//! }
//! # Ok(())
//! # }
//! ```

mod agent_binary;
mod artifacts;
pub mod bake;
pub mod clock;
mod cloud;
mod destroy;
pub mod driver;
mod error;
pub mod incus;
pub mod journal;
pub mod machine;
mod outputs;
mod preflight;
pub mod reconcile;
pub mod runtime;
pub mod session;
mod state_dir;
pub mod transport;
pub mod words;

pub use agent_binary::{AGENT_VARIABLE, AgentBinary, AgentError, AgentSource, ElfError, Origin};
pub use cloud::{Cloud, Condition, Config, Ensured, Inspection, LogFollower, LogReader, Rerun};
pub use error::Error;
pub use pika_cloud_common as common;
pub use reconcile::{ReconcileOptions, ReconcileReport};
pub use state_dir::StateDirError;
