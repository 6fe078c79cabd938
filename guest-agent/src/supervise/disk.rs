//! Which file systems are full.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{StatVfsMountFlags, statvfs};

/// Less than this is nothing. What is left where a writer fails may be a few blocks short of its next write, and our own
/// files, which another process of ours may be replacing at that moment, give back what the reserve for documents and an ordinary
/// document take, until they take it again.
const FULL_BELOW_BYTES: u64 = 64 * 1024;
/// Longer names are cut: they are evidence for a person, and have their place in an event.
const MAX_NAME_CHARS: usize = 200;

/// The file systems of `paths` that have room neither for bytes nor for names, each once, by where it is mounted. One that
/// cannot be looked at, or is read only and so always full, is none.
pub(super) fn full(paths: &[&Path]) -> Vec<String> {
    let mut seen = Vec::new();
    let mut names = Vec::new();
    for path in paths {
        let Ok(device) = path.metadata().map(|found| found.dev()) else { continue };
        if seen.contains(&device) {
            continue;
        }
        seen.push(device);
        if is_full(path) {
            names.push(mount_point(path, device).to_string_lossy().chars().take(MAX_NAME_CHARS).collect());
        }
    }
    names
}

fn is_full(path: &Path) -> bool {
    let Ok(space) = statvfs(path) else { return false };
    let no_bytes = space.f_blocks > 0 && space.f_bavail.saturating_mul(space.f_frsize) < FULL_BELOW_BYTES;
    // Some file systems do not count names.
    let no_names = space.f_files > 0 && space.f_favail == 0;
    !space.f_flag.contains(StatVfsMountFlags::RDONLY) && (no_bytes || no_names)
}

/// The topmost folder above `path` on the same device.
fn mount_point(path: &Path, device: u64) -> PathBuf {
    let whole = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let same = |folder: &&Path| folder.metadata().is_ok_and(|found| found.dev() == device);
    whole.ancestors().take_while(same).last().unwrap_or(&whole).to_owned()
}
