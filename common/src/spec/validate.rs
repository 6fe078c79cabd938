//! What a spec must hold before anything is touched.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Component, Path};

use super::policy::Policies;
use super::types::{InstanceType, Mount, MountKind, MountMode, Paths, RuntimeSpec, Watchdogs};
use crate::glob::{GlobError, Globs};
use crate::limits::{MAX_ENV_BYTES, MAX_GLOBS, MAX_START_BYTES};
use crate::paths as contract;

/// A field that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldError {
    /// Its path in the spec, such as `mounts[1].guest_path`.
    pub path: String,
    /// What is wrong, and what would be right.
    pub problem: String,
}

impl FieldError {
    pub(super) fn new(path: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { path: path.into(), problem: problem.into() }
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.problem)
    }
}

/// The path of the member `name` of what stands at `at`. A name that is no plain word is quoted, so that no path can be
/// taken for another and no control character reaches a terminal.
pub(super) fn member(at: &str, name: &str) -> String {
    let plain = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b));
    match (plain, at.is_empty()) {
        (true, true) => name.to_owned(),
        (true, false) => format!("{at}.{name}"),
        (false, _) => format!("{at}[{}]", serde_json::Value::from(name)),
    }
}

/// Guest folders that a mount would not survive in, or would break: tmpfs and the kernel's own.
const RESERVED_GUEST_FOLDERS: [&str; 5] = ["/run", "/var/run", "/proc", "/sys", "/dev"];

/// The longest deadline, ten years: far beyond use, and far below what arithmetic on times could overflow on.
const MAX_SECS: u64 = 10 * 366 * 86_400;

/// Beyond use, and far from where a count of incarnations ends.
const MAX_RESTARTS: u64 = 1_000_000;

/// Beyond use, and few enough for one request to Incus.
const MAX_PROFILES: usize = 64;

/// Beyond use; each mount is a device of the instance.
const MAX_MOUNTS: usize = 128;

const NO_VOLUME: &str =
    "must be a volume's NAME or POOL/NAME, each 1 to 63 of A-Z a-z 0-9 . _ -, first a letter or a digit";

/// All of `metadata` as JSON: it is kept in the journal.
const MAX_METADATA_BYTES: usize = 64 * 1024;

/// Collects what is wrong.
#[derive(Default)]
struct Problems(Vec<FieldError>);

impl Problems {
    fn add(&mut self, path: impl Into<String>, problem: impl Into<String>) {
        self.0.push(FieldError::new(path, problem));
    }

    fn check(&mut self, holds: bool, path: &str, problem: &str) {
        if !holds {
            self.add(path, problem);
        }
    }

    fn range(&mut self, path: &str, value: u64, min: u64, max: u64) {
        if !(min..=max).contains(&value) {
            self.add(path, format!("is {value}, must be {min} to {max}"));
        }
    }

    /// That a bound is at least what it bounds, where each of the two is in its range.
    fn order(&mut self, path: &str, bound: u64, bounded_path: &str, bounded: u64) {
        if bound < bounded && bound >= 1 && bounded <= MAX_SECS {
            self.add(path, format!("is {bound}, must be at least {bounded_path}, which is {bounded}"));
        }
    }

    fn not_implemented(&mut self, unused: bool, path: &str, instead: &str) {
        if !unused {
            self.add(path, format!("is not implemented yet: {instead}"));
        }
    }
}

/// Everything that is wrong with a spec.
pub(super) fn validate(spec: &RuntimeSpec) -> Vec<FieldError> {
    let mut problems = Problems::default();
    identity(spec, &mut problems);
    incus(spec, &mut problems);
    resources(spec, &mut problems);
    mounts(&spec.mounts, &mut problems);
    paths(&spec.paths, &mut problems);
    policies(&spec.policies, &mut problems);
    workload(spec, &mut problems);
    watchdogs(&spec.watchdogs, &mut problems);
    limits(spec, &mut problems);
    labels(spec, &mut problems);
    metadata(spec, &mut problems);
    problems.0
}

/// Whether `text` may be an `identity.runtime_id`: it is a single, plain name then, and safe as that of a folder.
pub fn is_runtime_id(text: &str) -> bool {
    // What names the state dir's owner, where each runtime has a folder.
    text != "id"
        && (1..=64).contains(&text.len())
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

fn identity(spec: &RuntimeSpec, problems: &mut Problems) {
    problems.check(
        is_runtime_id(&spec.identity.runtime_id),
        "identity.runtime_id",
        "must be 1 to 64 of A-Z a-z 0-9 . _ -, first a letter or a digit, and not `id`",
    );
    let name = &spec.identity.instance_name;
    let name_fits = (1..=63).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_alphabetic())
        && !name.ends_with('-')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    problems.check(
        name_fits,
        "identity.instance_name",
        "must be 1 to 63 of A-Z a-z 0-9 -, first a letter, last no hyphen (Incus's rule)",
    );
}

fn incus(spec: &RuntimeSpec, problems: &mut Problems) {
    let incus = &spec.incus;
    let mut name = |path: &str, value: &str| {
        let fits = (1..=256).contains(&value.len()) && !value.chars().any(char::is_control);
        problems.check(fits, path, "must be a name of 1 to 256 bytes, without control characters");
    };
    name("incus.project", &incus.project);
    name("incus.profile", &incus.profile);
    name("incus.image_alias", &incus.image_alias);
    let extra = incus.extra_profiles.len();
    for (index, profile) in incus.extra_profiles.iter().enumerate() {
        name(&format!("incus.extra_profiles[{index}]"), profile);
    }
    let is_vm = incus.instance_type == InstanceType::VirtualMachine;
    for (path, is_given) in [("incus.secureboot", incus.secureboot.is_some()), ("incus.csm", incus.csm.is_some())] {
        problems.check(is_vm || !is_given, path, "is of virtual machines only: a container has no firmware");
    }
    problems.check(
        !is_vm || incus.csm != Some(true) || incus.secureboot == Some(false),
        "incus.csm",
        "needs incus.secureboot to be false: a BIOS checks no signatures",
    );
    problems.check(extra <= MAX_PROFILES, "incus.extra_profiles", "must be at most 64 profiles");
    problems.not_implemented(incus.target.is_none(), "incus.target", "remove it");
}

fn resources(spec: &RuntimeSpec, problems: &mut Problems) {
    let resources = &spec.resources;
    if let Some(count) = resources.vcpu_count {
        problems.range("resources.vcpu_count", u64::from(count), 1, 1024);
    }
    if let Some(mib) = resources.memory_mib {
        problems.range("resources.memory_mib", mib, 16, 1 << 24);
    }
    if let Some(gib) = resources.root_disk_gib {
        problems.range("resources.root_disk_gib", gib, 1, 1 << 20);
    }
}

fn mounts(mounts: &[Mount], problems: &mut Problems) {
    if mounts.len() > MAX_MOUNTS {
        problems.add("mounts", format!("are {}, must be at most {MAX_MOUNTS}", mounts.len()));
        return;
    }
    let mut taken: BTreeSet<&Path> = BTreeSet::new();
    let mut volumes: BTreeSet<&str> = BTreeSet::new();
    let mut written: Option<usize> = None;
    for (index, mount) in mounts.iter().enumerate() {
        let at = |field: &str| format!("mounts[{index}].{field}");
        problems.not_implemented(
            matches!(mount.kind, MountKind::ReadOnlySnapshot | MountKind::PersistentVolume),
            &at("kind"),
            "only `read_only_snapshot` and `persistent_volume` are",
        );
        problems.check(
            mount.kind != MountKind::ReadOnlySnapshot || mount.mode == MountMode::ReadOnly,
            &at("mode"),
            "must be \"read_only\" for a read_only_snapshot",
        );
        problems.not_implemented(mount.required, &at("required"), "an optional mount; remove the field, or the mount");
        if mount.kind == MountKind::PersistentVolume {
            problems.check(mount.volume().is_some(), &at("source"), NO_VOLUME);
            problems.check(volumes.insert(&mount.source), &at("source"), "names the volume of another mount again");
            if mount.mode == MountMode::ReadWrite {
                let first = *written.get_or_insert(index);
                let problem = format!("must be \"read_only\": mounts[{first}] is the one volume that is written");
                problems.check(first == index, &at("mode"), &problem);
            }
        } else if let Err(problem) = normal_absolute(&mount.source) {
            problems.add(at("source"), problem);
        }
        match normal_absolute(&mount.guest_path) {
            Err(problem) => problems.add(at("guest_path"), problem),
            Ok(path) => guest_path(path, &at("guest_path"), &mut taken, problems),
        }
    }
}

/// By component: `/runner` is not below `/run`.
fn guest_path<'a>(path: &'a Path, field: &str, taken: &mut BTreeSet<&'a Path>, problems: &mut Problems) {
    if path == Path::new("/") {
        problems.add(field, "must not be the guest's root");
    }
    if let Some(reserved) = RESERVED_GUEST_FOLDERS.into_iter().find(|folder| path.starts_with(folder)) {
        problems.add(field, format!("must not be below {reserved}: the guest mounts over it when it boots"));
    }
    if let Some(other) = taken.iter().find(|other| path.starts_with(other) || other.starts_with(path)) {
        problems.add(field, format!("overlaps the mount at {}", other.display()));
    }
    taken.insert(path);
}

/// An absolute path of plain components, without control characters.
fn normal_absolute(text: &str) -> Result<&Path, &'static str> {
    let path = Path::new(text);
    if !path.is_absolute() {
        return Err("must be an absolute path");
    }
    if text.len() > 4096 || text.chars().any(char::is_control) {
        return Err("must be at most 4096 bytes, without control characters");
    }
    // `components` folds `//`, `/./` and a final `/`, so the text itself is looked at too.
    let plain = path.components().skip(1).all(|component| matches!(component, Component::Normal(_)));
    let folded =
        text.len() > 1 && (text.ends_with('/') || text.contains("//") || text.contains("/./") || text.ends_with("/."));
    if !plain || folded {
        return Err("must be plain: no `..`, no `.`, no doubled or final slash");
    }
    Ok(path)
}

fn paths(paths: &Paths, problems: &mut Problems) {
    let canonical = Paths::default();
    for (field, value, expected) in [
        ("paths.state_dir", &paths.state_dir, &canonical.state_dir),
        ("paths.events_path", &paths.events_path, &canonical.events_path),
        ("paths.status_path", &paths.status_path, &canonical.status_path),
        ("paths.result_path", &paths.result_path, &canonical.result_path),
        ("paths.guest_request_path", &paths.guest_request_path, &canonical.guest_request_path),
        ("paths.logs_dir", &paths.logs_dir, &canonical.logs_dir),
        ("paths.guest_log_path", &paths.guest_log_path, &canonical.guest_log_path),
        ("paths.artifacts_dir", &paths.artifacts_dir, &canonical.artifacts_dir),
    ] {
        problems.not_implemented(
            value == expected,
            field,
            &format!("another place; leave it out or set it to {expected}"),
        );
    }
}

fn policies(policies: &Policies, problems: &mut Problems) {
    // No restart at all is said by the policy, not by its count.
    problems.range("policies.max_restarts", u64::from(policies.max_restarts), 1, MAX_RESTARTS);
    let (backoff, cap) = (policies.restart_backoff_secs, policies.restart_backoff_cap_secs);
    problems.range("policies.restart_backoff_secs", backoff, 1, MAX_SECS);
    problems.range("policies.restart_backoff_cap_secs", cap, 1, MAX_SECS);
    problems.order("policies.restart_backoff_cap_secs", cap, "policies.restart_backoff_secs", backoff);
    problems.range("policies.debug_keep_secs", policies.debug_keep_secs, 1, MAX_SECS);
    let globs = &policies.output_collection.artifact_globs;
    if globs.len() > MAX_GLOBS {
        problems.add("policies.output_collection.artifact_globs", format!("must be at most {MAX_GLOBS} patterns"));
    }
    for (index, glob) in globs.iter().enumerate() {
        let path = format!("policies.output_collection.artifact_globs[{index}]");
        match Globs::parse([glob.as_str()].into_iter()) {
            Err(error @ (GlobError::OpenClass(_) | GlobError::TooLong)) => problems.add(&path, error.to_string()),
            read => problems.check(
                read.is_ok() && !glob.chars().any(char::is_control),
                &path,
                "must be a pattern relative to artifacts/, without `..` and control characters",
            ),
        }
    }
}

fn workload(spec: &RuntimeSpec, problems: &mut Problems) {
    match &spec.entry_command {
        None => {
            problems.add("entry_command", "is missing: images that start their own workload are not implemented yet");
        }
        Some(command) => {
            let fits = !command.trim().is_empty() && command.len() <= 65_536 && !command.contains('\0');
            problems.check(fits, "entry_command", "must be a command of 1 to 65536 bytes, without NUL");
        }
    }
    let bootstrap = &spec.bootstrap;
    for (name, value) in &bootstrap.env {
        let path = member("bootstrap.env", name);
        let named = (1..=256).contains(&name.len())
            && !name.starts_with(|c: char| c.is_ascii_digit())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        problems.check(named, &path, "a variable's name is A-Z a-z 0-9 _, first no digit");
        problems.check(name != contract::ROOT_ENV, &path, "is set by the guest's agent: remove it");
        problems.check(!value.contains('\0'), &path, "must not hold NUL");
    }
    let env_bytes: usize = bootstrap.env.iter().map(|(name, value)| name.len() + value.len()).sum();
    if env_bytes > MAX_ENV_BYTES {
        problems.add("bootstrap.env", format!("is {env_bytes} bytes long, must be at most {MAX_ENV_BYTES}"));
    } else if start_bytes(spec) > MAX_START_BYTES {
        let bytes = start_bytes(spec);
        problems.add(
            "bootstrap.env",
            format!(
                "takes {bytes} bytes as JSON together with entry_command, cwd and the mounts, must be at most {MAX_START_BYTES}: \
                 put what is long into a read_only_snapshot mount"
            ),
        );
    }
    if let Some(Err(problem)) = bootstrap.cwd.as_deref().map(normal_absolute) {
        problems.add("bootstrap.cwd", problem);
    }
    problems.not_implemented(bootstrap.user.is_none(), "bootstrap.user", "use run_as_root");
    problems.not_implemented(bootstrap.files.is_empty(), "bootstrap.files", "use a read_only_snapshot mount");
    problems.not_implemented(bootstrap.secrets.is_empty(), "bootstrap.secrets", "remove it");
    problems.not_implemented(spec.devices.is_empty(), "devices", "remove it");
}

/// What the spec gives of a `start` message, as JSON.
fn start_bytes(spec: &RuntimeSpec) -> usize {
    let bootstrap = &spec.bootstrap;
    // Strings and a map of strings are serializable.
    let mounts: Vec<_> = spec.mounts.iter().map(|mount| &mount.guest_path).collect();
    serde_json::to_string(&(&spec.entry_command, &bootstrap.env, &bootstrap.cwd, mounts)).expect("serializable").len()
}

fn watchdogs(watchdogs: &Watchdogs, problems: &mut Problems) {
    problems.range("watchdogs.boot_secs", watchdogs.boot_secs, 1, MAX_SECS);
    problems.range("watchdogs.silence_secs", watchdogs.silence_secs, 20, MAX_SECS);
    problems.range("watchdogs.stop_grace_secs", watchdogs.stop_grace_secs, 0, MAX_SECS);
    problems.range("watchdogs.collect_secs", watchdogs.collect_secs, 1, MAX_SECS);
    for (path, value) in [
        ("watchdogs.ready_secs", watchdogs.ready_secs),
        ("watchdogs.progress_secs", watchdogs.progress_secs),
        ("watchdogs.progress_cap_secs", watchdogs.progress_cap_secs),
        ("watchdogs.run_secs", watchdogs.run_secs),
    ] {
        if let Some(secs) = value {
            problems.range(path, secs, 1, MAX_SECS);
        }
    }
    match (watchdogs.progress_cap_secs, watchdogs.progress_secs) {
        (Some(cap), Some(secs)) => problems.order("watchdogs.progress_cap_secs", cap, "watchdogs.progress_secs", secs),
        (Some(_), None) => problems.add("watchdogs.progress_cap_secs", "bounds watchdogs.progress_secs: set that too"),
        (None, _) => {}
    }
}

fn limits(spec: &RuntimeSpec, problems: &mut Problems) {
    let limits = &spec.limits;
    problems.range("limits.artifact_bytes", limits.artifact_bytes, 0, 1 << 50);
    problems.range("limits.artifact_files", limits.artifact_files, 0, 1_000_000);
    problems.range("limits.log_bytes", limits.log_bytes, 0, 1 << 50);
    problems.range("limits.event_bytes", limits.event_bytes, 1 << 20, 1 << 50);
    // The last one at least: it is the one that a collector comes back to that dies while the next one begins.
    problems.range("limits.incarnations", limits.incarnations.into(), 1, 1000);
}

fn labels(spec: &RuntimeSpec, problems: &mut Problems) {
    problems.check(spec.labels.len() <= 64, "labels", "must be at most 64 labels");
    for (name, value) in &spec.labels {
        let path = member("labels", name);
        let named =
            (1..=64).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        problems.check(named, &path, "a label's name is 1 to 64 of A-Z a-z 0-9 . _ -");
        let fits = value.len() <= 1024 && !value.chars().any(char::is_control);
        problems.check(fits, &path, "must be at most 1024 bytes, without control characters");
    }
}

fn metadata(spec: &RuntimeSpec, problems: &mut Problems) {
    // JSON values under string keys are serializable.
    let bytes = serde_json::to_string(&spec.metadata).expect("serializable").len();
    if bytes > MAX_METADATA_BYTES {
        problems.add("metadata", format!("takes {bytes} bytes as JSON, must be at most {MAX_METADATA_BYTES}"));
    }
}
