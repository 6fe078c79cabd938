//! The spec's shape and its defaults.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::policy::Policies;
use crate::paths;

/// Whether a field holds what it would hold anyway. Such fields are left out, so that a new default changes no hash.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// What to run, where, with which policies.
///
/// Read one with [`RuntimeSpec::from_json`], which reports every error at once. Unknown fields are errors: a typing
/// mistake in a policy must not pass for the default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(deny_unknown_fields, extend("required" = ["identity", "incus"])))]
#[serde(default)]
pub struct RuntimeSpec {
    /// Who it is.
    pub identity: Identity,
    /// Where Incus puts it.
    pub incus: Incus,
    /// What it may use.
    #[serde(skip_serializing_if = "is_default")]
    pub resources: Resources,
    /// Host folders and volumes in it.
    #[serde(skip_serializing_if = "is_default")]
    pub mounts: Vec<Mount>,
    /// Where the contract's files lie in the guest.
    #[serde(skip_serializing_if = "is_default")]
    pub paths: Paths,
    /// What happens when it ends.
    #[serde(skip_serializing_if = "is_default")]
    pub policies: Policies,
    /// The workload, run by `/bin/sh -c`. Required: images that start their own workload are not implemented yet.
    #[serde(skip_serializing_if = "is_default")]
    pub entry_command: Option<String>,
    /// What the workload finds when it starts.
    #[serde(skip_serializing_if = "is_default")]
    pub bootstrap: Bootstrap,
    /// Deadlines.
    #[serde(skip_serializing_if = "is_default")]
    pub watchdogs: Watchdogs,
    /// Bounds of what is collected.
    #[serde(skip_serializing_if = "is_default")]
    pub limits: OutputLimits,
    /// Proxied ports. Not implemented yet: must be empty.
    #[serde(skip_serializing_if = "is_default")]
    pub devices: Vec<Value>,
    /// Copied to the instance as `user.pika-cloud.label.NAME`.
    #[serde(skip_serializing_if = "is_default")]
    pub labels: BTreeMap<String, String>,
    /// Kept in the journal for whoever reads it; pika-cloud does not look at it.
    #[serde(skip_serializing_if = "is_default")]
    pub metadata: BTreeMap<String, Value>,
}

/// Who a runtime is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(deny_unknown_fields, extend("required" = ["runtime_id", "instance_name"])))]
#[serde(default)]
pub struct Identity {
    /// The runtime's name in the state dir: 1 to 64 of `A-Za-z0-9._-`, first a letter or a digit.
    pub runtime_id: String,
    /// The instance's name in its Incus project: 1 to 63 of `A-Za-z0-9-`, first a letter, last no hyphen.
    pub instance_name: String,
}

/// Where Incus puts a runtime.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(deny_unknown_fields, extend("required" = ["image_alias"])))]
#[serde(default)]
pub struct Incus {
    /// The Incus project.
    pub project: String,
    /// The profile that gives it a root disk and, where it needs one, a network.
    pub profile: String,
    /// More profiles, applied after `profile`, in order.
    #[serde(skip_serializing_if = "is_default")]
    pub extra_profiles: Vec<String>,
    /// The alias of a local image.
    pub image_alias: String,
    /// Virtual machine or container.
    #[serde(skip_serializing_if = "is_default")]
    pub instance_type: InstanceType,
    /// Of a virtual machine: whether its firmware starts signed systems only (Incus `security.secureboot`); what the profile
    /// says where absent, and yes where that says nothing.
    #[serde(skip_serializing_if = "is_default")]
    pub secureboot: Option<bool>,
    /// Of a virtual machine: whether its firmware is a BIOS instead of UEFI (Incus `security.csm`). It needs `secureboot`
    /// to be false.
    #[serde(skip_serializing_if = "is_default")]
    pub csm: Option<bool>,
    /// Whose agent is used: the image's own, or one that the host puts in.
    #[serde(skip_serializing_if = "is_default")]
    pub agent: AgentPolicy,
    /// The cluster member. Not implemented yet: must be absent.
    #[serde(skip_serializing_if = "is_default")]
    pub target: Option<String>,
}

impl Default for Incus {
    fn default() -> Self {
        Self {
            project: "default".to_owned(),
            profile: "default".to_owned(),
            extra_profiles: Vec::new(),
            image_alias: String::new(),
            instance_type: InstanceType::default(),
            secureboot: None,
            csm: None,
            agent: AgentPolicy::default(),
            target: None,
        }
    }
}

/// What kind of instance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum InstanceType {
    /// A machine of its own, with a kernel of its own.
    #[default]
    VirtualMachine,
    /// A container, which shares the host's kernel.
    Container,
}

/// Whose agent is used. Whatever is said here, an agent that dies or vanishes while its workload runs is replaced by the
/// host's own, so that nothing of the run is lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum AgentPolicy {
    /// The image's own; where it has none, the host puts its own in.
    #[default]
    Auto,
    /// The image's own, and no other is put into an image without one.
    Baked,
    /// The host's own, put in and run through Incus exec, whatever the image has. A virtual machine needs incus-agent for that.
    Inject,
}

/// What a runtime may use; absent means what the profile gives.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(deny_unknown_fields))]
#[serde(default)]
pub struct Resources {
    /// Processors, 1 to 1024 (Incus `limits.cpu`).
    #[serde(skip_serializing_if = "is_default")]
    pub vcpu_count: Option<u32>,
    /// Memory in MiB, at least 16 (Incus `limits.memory`).
    #[serde(skip_serializing_if = "is_default")]
    pub memory_mib: Option<u64>,
    /// Size of the root disk in GiB, at least 1. Pools of driver `dir` cannot enforce it.
    #[serde(skip_serializing_if = "is_default")]
    pub root_disk_gib: Option<u64>,
}

/// A host folder or a volume in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(deny_unknown_fields, extend("required" = ["guest_path", "source"])))]
#[serde(default)]
pub struct Mount {
    /// What it is for. Only `read_only_snapshot` and `persistent_volume` are implemented yet.
    pub kind: MountKind,
    /// Absolute; not below `/run`, `/proc`, `/sys` or `/dev`.
    pub guest_path: String,
    /// An absolute folder on the host that runs Incus. Of a `persistent_volume`: a custom volume of Incus, as `POOL/NAME`, or
    /// `NAME` in the pool of the root disk; each part is 1 to 63 of `A-Za-z0-9._-`, first a letter or a digit.
    pub source: String,
    /// Whether the guest may write.
    pub mode: MountMode,
    /// Whether the runtime fails where the source is missing. An optional mount is not implemented yet: must be true.
    #[serde(skip_serializing_if = "is_true")]
    pub required: bool,
}

impl Default for Mount {
    fn default() -> Self {
        Self {
            kind: MountKind::default(),
            guest_path: String::new(),
            source: String::new(),
            mode: MountMode::default(),
            required: true,
        }
    }
}

/// A custom volume of Incus, as a mount names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeName<'a> {
    /// Its storage pool; the root disk's where absent.
    pub pool: Option<&'a str>,
    /// Its name.
    pub name: &'a str,
}

impl Mount {
    /// The volume that a `persistent_volume` names; `None` for other kinds, and for a source that names none.
    pub fn volume(&self) -> Option<VolumeName<'_>> {
        if self.kind != MountKind::PersistentVolume {
            return None;
        }
        let (pool, name) = match self.source.split_once('/') {
            Some((pool, name)) => (Some(pool), name),
            None => (None, self.source.as_str()),
        };
        let plain = |text: &str| {
            (1..=63).contains(&text.len())
                && text.starts_with(|c: char| c.is_ascii_alphanumeric())
                && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        };
        (plain(name) && pool.is_none_or(plain)).then_some(VolumeName { pool, name })
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
fn is_true(value: &bool) -> bool {
    *value
}

/// What a mount is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum MountKind {
    /// A volume that outlives the instance, made where it is absent. A runtime has at most one that it writes to.
    PersistentVolume,
    /// A host folder that the guest reads, such as the source of a CI job.
    #[default]
    ReadOnlySnapshot,
    /// A host folder that the guest leaves its outputs in. Not implemented yet.
    ArtifactOutput,
    /// A host folder shared between runs. Not implemented yet.
    Cache,
}

/// Whether a guest may write to a mount.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum MountMode {
    /// It may not.
    #[default]
    ReadOnly,
    /// It may.
    ReadWrite,
}

/// Where the contract's files lie in the guest. Only the canonical paths are implemented yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(deny_unknown_fields))]
#[serde(default)]
pub struct Paths {
    /// `/run/pika-cloud`.
    pub state_dir: String,
    /// `events.jsonl` in it.
    pub events_path: String,
    /// `status.json` in it.
    pub status_path: String,
    /// `result.json` in it.
    pub result_path: String,
    /// `guest-request.json` in it.
    pub guest_request_path: String,
    /// `logs` in it.
    pub logs_dir: String,
    /// `logs/guest.log` in it.
    pub guest_log_path: String,
    /// `artifacts` in it.
    pub artifacts_dir: String,
}

impl Default for Paths {
    fn default() -> Self {
        let below = |name: &str| format!("{}/{name}", paths::ROOT);
        Self {
            state_dir: paths::ROOT.to_owned(),
            events_path: below(paths::EVENTS),
            status_path: below(paths::STATUS),
            result_path: below(paths::RESULT),
            guest_request_path: below(paths::REQUEST),
            logs_dir: below(paths::LOGS_DIR),
            guest_log_path: below(&format!("{}/{}", paths::LOGS_DIR, paths::GUEST_LOG)),
            artifacts_dir: below(paths::ARTIFACTS_DIR),
        }
    }
}

/// What the workload finds when it starts. Its `Debug` form shows the names of environment, files and secrets only.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(deny_unknown_fields))]
#[serde(default)]
pub struct Bootstrap {
    /// The workload's environment. It reaches the guest through the session only: it stands neither in Incus's config nor
    /// in a command line nor in a file of the guest.
    #[serde(skip_serializing_if = "is_default")]
    pub env: BTreeMap<String, String>,
    /// The workload's working folder in the guest, absolute; `/` where absent.
    #[serde(skip_serializing_if = "is_default")]
    pub cwd: Option<String>,
    /// Whether the workload runs as root in the guest; else as its user `ci`, or `nobody` where the image has no `ci`.
    #[serde(skip_serializing_if = "is_default")]
    pub run_as_root: bool,
    /// Another user. Not implemented yet: must be absent.
    #[serde(skip_serializing_if = "is_default")]
    pub user: Option<String>,
    /// Files. Not implemented yet: must be empty.
    #[serde(skip_serializing_if = "is_default")]
    pub files: BTreeMap<String, Value>,
    /// Secrets. Not implemented yet: must be empty.
    #[serde(skip_serializing_if = "is_default")]
    pub secrets: BTreeMap<String, Value>,
}

/// Deadlines, in seconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(deny_unknown_fields))]
#[serde(default)]
pub struct Watchdogs {
    /// From the start of the instance to the agent's first word.
    pub boot_secs: u64,
    /// From `booted` to the guest's `ready`; a workload that ended before has ended, and is not late. Off where absent.
    #[serde(skip_serializing_if = "is_default")]
    pub ready_secs: Option<u64>,
    /// Without a heartbeat, hence `unreachable`.
    pub silence_secs: u64,
    /// From the start of the workload to its end; each progress event begins it anew. Off where absent.
    #[serde(skip_serializing_if = "is_default")]
    pub progress_secs: Option<u64>,
    /// From the start of the workload to where no progress event moves the deadline of `progress_secs` any further; at
    /// least `progress_secs`, and an error without it. No bound where absent.
    #[serde(skip_serializing_if = "is_default")]
    pub progress_cap_secs: Option<u64>,
    /// From the start of the workload to its end. Off where absent.
    #[serde(skip_serializing_if = "is_default")]
    pub run_secs: Option<u64>,
    /// Between TERM and KILL.
    pub stop_grace_secs: u64,
    /// For the collection of outputs, after all of that.
    pub collect_secs: u64,
}

impl Default for Watchdogs {
    fn default() -> Self {
        Self {
            boot_secs: 120,
            ready_secs: None,
            silence_secs: 60,
            progress_secs: None,
            progress_cap_secs: None,
            run_secs: None,
            stop_grace_secs: 10,
            collect_secs: 120,
        }
    }
}

/// Bounds of what is collected from one incarnation. What lies beyond is left in the guest, counted, and said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(deny_unknown_fields))]
#[serde(default)]
pub struct OutputLimits {
    /// Bytes of all artifacts together.
    pub artifact_bytes: u64,
    /// Artifact files and folders.
    pub artifact_files: u64,
    /// Bytes of all logs together.
    pub log_bytes: u64,
    /// Bytes of the journal's guest records.
    pub event_bytes: u64,
    /// How many incarnations that are over keep their outputs. Older ones lose them when the next one begins; what the journal
    /// says of them stays.
    pub incarnations: u32,
}

impl Default for OutputLimits {
    fn default() -> Self {
        Self {
            artifact_bytes: 4 << 30,
            artifact_files: 10_000,
            log_bytes: 1 << 30,
            event_bytes: 1 << 30,
            incarnations: 10,
        }
    }
}
