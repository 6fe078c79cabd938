//! Waits until the init has made `/run` what it stays.
//!
//! A session may come before the guest is up that far: Incus's exec enters a container whose first process has only just begun.
//! Inits mount a file system of their own on `/run`. What was written there before is hidden by it: a run would be accepted in
//! files that its supervisor does not find, and nobody would hear of it again.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use pika_cloud_common::limits::PEER_TIMEOUT;

/// Inits mount it as the first thing that they do; one that never does holds up each session by this.
const PATIENCE: Duration = Duration::from_secs(4);
/// A host waits longer for a hello.
const _: () = assert!(PATIENCE.as_secs() < PEER_TIMEOUT.as_secs());
/// Between two looks.
const PACE: Duration = Duration::from_millis(5);
/// Where systemd listens for `systemctl`, from when it is up that far.
const SYSTEMD_LISTENS: &str = "run/systemd/private";

/// What of a guest's inits counts here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Init {
    /// systemd, or what becomes systemd (NixOS runs a script first).
    Systemd,
    /// `OpenRC`, whatever its first process is.
    OpenRc,
    /// One that leaves `/run` as it is.
    Other,
}

/// Waits, if the files at `root` are below `/run` and this guest's init has not mounted that yet.
pub(super) fn settle(root: &Path) {
    if !root.starts_with("/run") {
        return;
    }
    let init = init_of(Path::new("/"));
    let deadline = Instant::now() + PATIENCE;
    while !is_settled(init, Path::new("/")) && Instant::now() < deadline {
        std::thread::sleep(PACE);
    }
}

fn init_of(guest: &Path) -> Init {
    // What is to be the first process, not what is: it may not have come to that yet.
    let program = guest.join("sbin/init").canonicalize().unwrap_or_default();
    let is_in_store = program.strip_prefix(guest).is_ok_and(|program| program.starts_with("nix/store"));
    if is_in_store || program.file_name().is_some_and(|name| name == "systemd") {
        Init::Systemd
    } else if guest.join("sbin/openrc").exists() {
        Init::OpenRc
    } else {
        Init::Other
    }
}

fn is_settled(init: Init, guest: &Path) -> bool {
    match init {
        Init::Systemd => is_mounted(guest) && guest.join(SYSTEMD_LISTENS).exists(),
        Init::OpenRc => is_mounted(guest),
        Init::Other => true,
    }
}

/// Whether `/run` is of another file system than `/`.
fn is_mounted(guest: &Path) -> bool {
    let device = |path: &Path| path.metadata().map(|data| data.dev());
    matches!((device(guest), device(&guest.join("run"))), (Ok(root), Ok(run)) if root != run)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    /// A root with that program as its `/sbin/init`.
    fn guest(init: &str) -> tempfile::TempDir {
        let guest = tempfile::tempdir().unwrap();
        for folder in ["sbin", "run"] {
            fs::create_dir(guest.path().join(folder)).unwrap();
        }
        let program = guest.path().join(init);
        fs::create_dir_all(program.parent().unwrap()).unwrap();
        fs::write(&program, "").unwrap();
        if !init.starts_with("sbin/") {
            symlink(program, guest.path().join("sbin/init")).unwrap();
        }
        guest
    }

    fn of(guest: &tempfile::TempDir) -> Init {
        init_of(&guest.path().canonicalize().unwrap())
    }

    #[test]
    fn inits_that_mount_run_are_known() {
        assert_eq!(of(&guest("lib/systemd/systemd")), Init::Systemd);
        assert_eq!(of(&guest("nix/store/abc-nixos/init")), Init::Systemd);
        let alpine = guest("bin/busybox");
        assert_eq!(of(&alpine), Init::Other);
        fs::write(alpine.path().join("sbin/openrc"), "").unwrap();
        assert_eq!(of(&alpine), Init::OpenRc);
        assert_eq!(of(&guest("sbin/init")), Init::Other);
    }

    /// What is below `/run` already may be of the image, and hidden in a moment.
    #[test]
    fn nothing_is_settled_before_run_is_mounted() {
        let guest = guest("lib/systemd/systemd");
        fs::create_dir_all(guest.path().join("run/systemd")).unwrap();
        fs::write(guest.path().join(SYSTEMD_LISTENS), "").unwrap();
        for (init, settled) in [(Init::Systemd, false), (Init::OpenRc, false), (Init::Other, true)] {
            assert_eq!(is_settled(init, guest.path()), settled, "{init:?}");
        }
    }
}
