//! What happens when a runtime ends. The difference between the two consumers stands here, and nowhere else.

use serde::{Deserialize, Serialize};

/// What happens when a runtime ends.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(deny_unknown_fields))]
#[serde(default)]
pub struct Policies {
    /// Whether it is started again. Only `never` is implemented yet.
    pub restart_policy: RestartPolicy,
    /// Whether its instance stays.
    pub retention_policy: RetentionPolicy,
    /// What is brought to the host.
    pub output_collection: OutputCollection,
}

/// Whether a runtime is started again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum RestartPolicy {
    /// Never.
    #[default]
    Never,
    /// After everything but `completed`. Not implemented yet.
    OnFailure,
    /// After everything. Not implemented yet.
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
    /// It stays until `destroy` is called.
    KeepUntilStopped,
    /// It stays for a person to look at, for a time. Not implemented yet.
    DebugKeep,
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
    /// Which artifacts, by their path below `artifacts/`: `*` and `?` within a component, `**` across them.
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
