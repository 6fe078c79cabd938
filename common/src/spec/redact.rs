//! Invariant 8: what is secret in a spec is in no log and no journal.

use std::fmt;

use serde_json::Value;

use super::types::{Bootstrap, RuntimeSpec};

/// What stands in the place of a value that is not shown.
pub const REDACTED: &str = "[redacted]";

impl RuntimeSpec {
    /// The same spec with [`REDACTED`] for each value in `bootstrap.env` and `bootstrap.secrets`; their names stay. It has
    /// the same [`hash`](super::hash), and it is what a journal may hold.
    #[must_use]
    pub fn redacted(&self) -> Self {
        let mut spec = self.clone();
        let Bootstrap { env, cwd: _, run_as_root: _, user: _, files: _, secrets } = &mut spec.bootstrap;
        for value in env.values_mut() {
            REDACTED.clone_into(value);
        }
        for value in secrets.values_mut() {
            *value = Value::from(REDACTED);
        }
        spec
    }
}

impl fmt::Debug for Bootstrap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { env, cwd, run_as_root, user, files, secrets } = self;
        f.debug_struct("Bootstrap")
            .field("env", &env.keys())
            .field("cwd", cwd)
            .field("run_as_root", run_as_root)
            .field("user", user)
            .field("files", &files.keys())
            .field("secrets", &secrets.keys())
            .finish()
    }
}
