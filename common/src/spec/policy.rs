//! What happens when a runtime ends. The difference between the two consumers stands here, and nowhere else.

use serde::{Deserialize, Serialize};

use crate::Command;

/// What happens when a runtime ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(deny_unknown_fields))]
#[serde(default)]
pub struct Policies {
    /// Whether it is started again after its end. Each start is an incarnation of its own, with a verdict of its own.
    pub restart_policy: RestartPolicy,
    /// Restarts in a row, 1 to 1000000; the verdict after the last one stays. An incarnation that lived at least
    /// `restart_backoff_cap_secs` lets the count begin anew.
    pub max_restarts: u32,
    /// Seconds before the first restart in a row, at least 1; doubled for each one that follows.
    pub restart_backoff_secs: u64,
    /// The longest time before a restart, in seconds; at least `restart_backoff_secs`.
    pub restart_backoff_cap_secs: u64,
    /// Whether its instance stays after its last end.
    pub retention_policy: RetentionPolicy,
    /// How long `debug_keep` keeps the instance after the verdict, in seconds, at least 1.
    pub debug_keep_secs: u64,
    /// What is brought to the host.
    pub output_collection: OutputCollection,
}

impl Default for Policies {
    fn default() -> Self {
        Self {
            restart_policy: RestartPolicy::default(),
            max_restarts: 10,
            restart_backoff_secs: 1,
            restart_backoff_cap_secs: 300,
            retention_policy: RetentionPolicy::default(),
            debug_keep_secs: 3600,
            output_collection: OutputCollection::default(),
        }
    }
}

/// Whether a runtime is started again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum RestartPolicy {
    /// Never.
    #[default]
    Never,
    /// After everything but `completed` and `cancelled`.
    OnFailure,
    /// After everything but `cancelled`: who asked for an end does not want it undone.
    Always,
}

/// Whether an instance stays after its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum RetentionPolicy {
    /// It is destroyed once its outputs are on the host.
    #[default]
    DestroyOnCompletion,
    /// It stays until `stop` or `destroy` is called.
    KeepUntilStopped,
    /// It stays as it is for a person to look at, until `debug_keep_secs` after the verdict; then it is destroyed.
    DebugKeep,
}

impl RetentionPolicy {
    /// Whether the instance stays after an end, where that much was wanted of its runtime.
    pub fn keeps_after(self, command: Option<Command>) -> bool {
        match self {
            Self::DestroyOnCompletion => false,
            Self::KeepUntilStopped => command < Some(Command::Stop),
            Self::DebugKeep => command < Some(Command::Destroy),
        }
    }
}

/// What is brought to the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(deny_unknown_fields))]
#[serde(default)]
pub struct OutputCollection {
    /// When.
    pub mode: OutputCollectionMode,
    /// The logs, live.
    pub include_logs: bool,
    /// `result.json`.
    pub include_result: bool,
    /// Which artifacts, by their path below `artifacts/`: `*` and `?` within a component, `[a-z]` and
    /// `[!a-z]` for one character of it, `**` across components.
    pub artifact_globs: Vec<String>,
}

impl Default for OutputCollection {
    fn default() -> Self {
        Self {
            mode: OutputCollectionMode::default(),
            include_logs: true,
            include_result: true,
            artifact_globs: vec!["**".to_owned()],
        }
    }
}

/// When outputs are brought to the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum OutputCollectionMode {
    /// Never; events and verdict are kept all the same.
    None,
    /// Artifacts after everything but `completed`.
    FailureOnly,
    /// After every end.
    #[default]
    Always,
}
