//! A workload's `PATH`: whatever it was, `pika-guest` is found in it.
//!
//! An image's own agent is in `/usr/bin`. The host's, put into an image that has none, is wherever there was room for it, and its
//! workload has to be able to say `pika-guest ready` all the same. What the image has goes first.

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

/// The name that workloads say.
const PROGRAM: &str = "pika-guest";

/// `path`, and the folder of the agent that runs where no folder of `path` has one.
pub(super) fn with_agent(path: &OsStr) -> OsString {
    add(path, running_agent().as_deref())
}

/// Where the program that runs is; nowhere if it was removed meanwhile.
fn running_agent() -> Option<PathBuf> {
    std::env::current_exe().ok()?.parent().map(Path::to_owned)
}

fn add(path: &OsStr, folder: Option<&Path>) -> OsString {
    let mut folders: Vec<PathBuf> = std::env::split_paths(path).collect();
    let Some(folder) = folder.filter(|folder| has_agent(folder)) else { return path.to_owned() };
    if folders.iter().any(|folder| has_agent(folder)) {
        return path.to_owned();
    }
    folders.push(folder.to_owned());
    // Only where a folder has a colon in its name.
    std::env::join_paths(folders).unwrap_or_else(|_| path.to_owned())
}

fn has_agent(folder: &Path) -> bool {
    let found = std::fs::metadata(folder.join(PROGRAM));
    folder.is_absolute() && found.is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_images_own_agent_goes_first_and_ours_last() {
        let dir = tempfile::tempdir().unwrap();
        let place = |name: &str, mode: u32| {
            let folder = dir.path().join(name);
            std::fs::create_dir(&folder).unwrap();
            std::fs::write(folder.join(PROGRAM), "").unwrap();
            std::fs::set_permissions(folder.join(PROGRAM), std::fs::Permissions::from_mode(mode)).unwrap();
            folder
        };
        let (own, image, data) = (place("own", 0o755), place("image", 0o755), place("data", 0o644));
        let join = |folders: &[&Path]| std::env::join_paths(folders).unwrap();
        let empty = Path::new("/nowhere");
        assert_eq!(add(&join(&[empty, &image]), Some(&own)), join(&[empty, &image]));
        assert_eq!(add(&join(&[empty]), Some(&own)), join(&[empty, &own]));
        assert_eq!(add(&join(&[empty, &data]), Some(&own)), join(&[empty, &data, &own]), "a file that cannot be run");
        for nothing in [None, Some(empty), Some(Path::new(".")), Some(data.as_path())] {
            assert_eq!(add(&join(&[empty]), nothing), join(&[empty]), "{nothing:?}");
        }
    }
}
