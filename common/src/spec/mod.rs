//! `RuntimeSpec`: what to run, where, with which policies. One type for both consumers; they differ in policy fields only.

mod hash;
mod policy;
mod read;
mod redact;
mod strict;
mod types;
mod validate;

pub use hash::{difference, hash};
pub use policy::{OutputCollection, OutputCollectionMode, Policies, RestartPolicy, RetentionPolicy};
pub use read::SpecError;
pub use redact::REDACTED;
pub use types::{
    AgentPolicy, Bootstrap, Identity, Incus, InstanceType, Mount, MountKind, MountMode, OutputLimits, Paths, Resources,
    RuntimeSpec, VolumeName, Watchdogs,
};
pub use validate::{FieldError, is_runtime_id};
