//! Waits until a systemd that has just begun has mounted its `/run`.
//!
//! A host can be faster than the init of a container that it has just started: an exec is possible before systemd is. What was
//! opened below `/run` by then is hidden by the tmpfs that systemd mounts there a moment later, and whatever is said in it is lost
//! with it: the supervisor and the workload would look at other files than the session. systemd says that it has mounted everything
//! by making [`MOUNTED`].

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// What systemd makes right after it has mounted its file systems.
const MOUNTED: &str = "/run/systemd/system";
/// An init, where it is a link to systemd.
const INIT: &str = "/sbin/init";
/// `NixOS`' systemd, whose init is a script before it becomes that.
const NIXOS: &str = "/nix/var/nix/profiles/system/systemd/lib/systemd/systemd";
/// An init that is older has mounted what it ever will: there is none of systemd.
const YOUNG: Duration = Duration::from_secs(30);
/// How long it is waited for. Nothing of a session has been said by then.
const PATIENCE: Duration = Duration::from_secs(10);
const PACE: Duration = Duration::from_millis(5);

/// Returns when nothing will be mounted over what is opened below `root` from now on, as far as can be known.
pub(super) fn wait_for_run(root: &Path) {
    let deadline = Instant::now() + PATIENCE;
    while root.starts_with("/run") && is_awaited(Path::new("/"), first_process_age) && Instant::now() < deadline {
        std::thread::sleep(PACE);
    }
}

fn is_awaited(root: &Path, age: impl FnOnce() -> Option<Duration>) -> bool {
    let at = |path: &str| root.join(path.trim_start_matches('/'));
    if at(MOUNTED).exists() {
        return false;
    }
    let is_systemd = |init: std::path::PathBuf| init.file_name().is_some_and(|name| name == "systemd");
    let systemd = fs::canonicalize(at(INIT)).is_ok_and(is_systemd) || at(NIXOS).exists();
    systemd && age().is_some_and(|age| age < YOUNG)
}

/// For how long the first process of this machine or container has been there.
fn first_process_age() -> Option<Duration> {
    let stat = fs::read_to_string("/proc/1/stat").ok()?;
    // Behind the name, which may hold anything, the 22nd field is the 20th.
    let ticks: u64 = stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()?;
    // SAFETY: it reads a constant of this system.
    let a_second = u64::try_from(unsafe { libc::sysconf(libc::_SC_CLK_TCK) }).ok().filter(|&ticks| ticks > 0)?;
    let now = u64::try_from(rustix::time::clock_gettime(rustix::time::ClockId::Boottime).tv_sec).ok()?;
    Some(Duration::from_secs(now.saturating_sub(ticks / a_second)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_systemd_that_has_just_begun_is_waited_for() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path.trim_start_matches('/'));
        let make = |path: &str| {
            fs::create_dir_all(at(path).parent().unwrap()).unwrap();
            fs::write(at(path), "").unwrap();
        };
        let is_awaited = |secs: u64| is_awaited(root.path(), || Some(Duration::from_secs(secs)));
        // Another init, or none.
        make(INIT);
        assert!(!is_awaited(0));
        fs::remove_file(at(INIT)).unwrap();
        make("/usr/lib/systemd/systemd");
        assert!(!is_awaited(0));
        std::os::unix::fs::symlink("../usr/lib/systemd/systemd", at(INIT)).unwrap();
        assert!(is_awaited(0) && is_awaited(29) && !is_awaited(30));
        fs::create_dir_all(at(MOUNTED)).unwrap();
        assert!(!is_awaited(0));
        fs::remove_dir(at(MOUNTED)).unwrap();
        fs::remove_file(at(INIT)).unwrap();
        make(NIXOS);
        assert!(is_awaited(0));
    }

    #[test]
    fn the_first_process_has_an_age() {
        let age = first_process_age().unwrap();
        assert!(age.as_secs() <= crate::ledger::system::uptime_secs(), "{age:?}");
    }
}
