//! Where things lie.

use std::path::{Path, PathBuf};

/// The machine's architecture in the words of Rust's targets and of Debian's library folders alike.
pub(crate) const ARCH: &str = std::env::consts::ARCH;

/// Root of the workspace.
pub(crate) fn root() -> &'static Path {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    // `tests/xtask` is two folders deep.
    package.ancestors().nth(2).unwrap_or(package)
}

/// Cargo's target folder.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |given| root().join(given))
}

/// What these tasks keep for themselves: images, logs, the empty binary.
pub(crate) fn own() -> PathBuf {
    target().join("xtask")
}
