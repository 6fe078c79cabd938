//! What a person or a program may want of a runtime, at any time.

use serde::{Deserialize, Serialize};

/// What is wanted of a runtime. A later one goes further than an earlier one; none is ever taken back, and after any of
/// them it is not started again by its restart policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// End the workload: TERM, a grace, outputs, verdict `cancelled`. What becomes of the instance is its policy's to say.
    Cancel,
    /// The same, and `keep_until_stopped` keeps the instance no longer.
    Stop,
    /// The same, and no policy keeps the instance.
    Destroy,
}

impl Command {
    /// The name in files and on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Stop => "stop",
            Self::Destroy => "destroy",
        }
    }
}
