//! Where the private Incus and the programs under test are.

use std::path::PathBuf;
use std::sync::OnceLock;

/// What `cargo xtask test` has set up, as its environment says.
#[derive(Debug)]
pub struct Lab {
    /// The daemon's socket.
    pub socket: PathBuf,
    /// The daemon's own folder.
    pub incus_dir: PathBuf,
    /// The static agent, as it is in the image.
    pub agent: PathBuf,
    /// `pika-cloud`.
    pub cloud: PathBuf,
}

/// The image with the agent.
pub(crate) const IMAGE: &str = "pika-test";
/// The image without it.
pub const BARE_IMAGE: &str = "pika-test-bare";

impl Lab {
    /// The lab of this run. Without one the test fails: no other Incus is ever touched.
    pub fn get() -> &'static Self {
        static LAB: OnceLock<Lab> = OnceLock::new();
        LAB.get_or_init(|| Self {
            socket: from_environment("PIKA_TEST_INCUS_SOCKET"),
            incus_dir: from_environment("PIKA_TEST_INCUS_DIR"),
            agent: agent(),
            cloud: from_environment("PIKA_TEST_CLOUD"),
        })
    }
}

/// The static agent, for a test that needs no Incus.
pub(crate) fn agent() -> PathBuf {
    from_environment("PIKA_TEST_AGENT")
}

fn from_environment(name: &str) -> PathBuf {
    let Some(value) = std::env::var_os(name).filter(|value| !value.is_empty()) else {
        panic!(
            "{name} is not set: end-to-end tests need a private Incus. Run `cargo xtask test`, or in one shell `cargo xtask \
             incus` and in another what it prints, then `cargo test -p pika-cloud-tests`"
        );
    };
    PathBuf::from(value)
}
