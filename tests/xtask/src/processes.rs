//! Finds the processes of a lab by what their environment says, and ends them by their ids.
//!
//! It names the lab's folder, whose name is used once. What a task runs carries it in a variable that nothing else has.
//! The daemon passes on little of its environment to its own helpers (the monitors of containers, proxies), but always
//! `INCUS_DIR`; a developer's shell may have that as well, so only `incusd` itself is taken by it. What runs in
//! containers has an environment of its own, and is found as descending from their monitors.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::run;

/// Who a process is, beyond its id, which is used again: the id with its start time, or `None` if it is gone.
pub(crate) fn identity(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything, so count from its end: state is the 3rd field, the start the 22nd.
    let after_name = stat.rsplit_once(')')?.1;
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    (!matches!(fields.first(), Some(&"Z" | &"X"))).then(|| fields.get(19).map(|start| format!("{pid} {start}")))?
}

/// Processes whose environment has `name=path`.
pub(crate) fn marked(name: &str, path: &Path) -> BTreeSet<u32> {
    let mark = [name.as_bytes(), b"=", path.as_os_str().as_bytes()].concat();
    let own = std::process::id();
    all().filter(|&pid| pid != own && environment_has(pid, &mark)).collect()
}

/// The daemon of this `INCUS_DIR`, its helpers, and all that descends from them.
pub(crate) fn of_daemon(incus_dir: &Path) -> BTreeSet<u32> {
    let is_incusd = |pid: &u32| {
        let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        // After an upgrade the kernel writes `incusd (deleted)`.
        program.file_name().is_some_and(|name| name.to_string_lossy().split(' ').next() == Some("incusd"))
    };
    with_descendants(&marked("INCUS_DIR", incus_dir).into_iter().filter(is_incusd).collect())
}

/// The given processes and all that descend from them.
fn with_descendants(roots: &BTreeSet<u32>) -> BTreeSet<u32> {
    let parents: BTreeMap<u32, u32> = all().filter_map(|pid| Some((pid, parent(pid)?))).collect();
    let descends = |pid: u32| {
        let mut at = Some(pid);
        while let Some(now) = at {
            if roots.contains(&now) {
                return true;
            }
            at = parents.get(&now).copied();
        }
        false
    };
    parents.keys().copied().filter(|&pid| descends(pid)).chain(roots.iter().copied()).collect()
}

/// Asks what `find` finds to end, and kills it after `grace`, until it finds nothing. Whether that was reached.
pub(crate) fn end_all(grace: Duration, find: impl Fn() -> BTreeSet<u32>) -> bool {
    const KILLED_WITHIN: Duration = Duration::from_secs(10);
    let started = Instant::now();
    let mut asked = BTreeSet::new();
    loop {
        let found = find();
        if found.is_empty() {
            return true;
        }
        if started.elapsed() > grace + KILLED_WITHIN {
            return false;
        }
        for pid in found {
            if started.elapsed() >= grace {
                run::signal(pid, "KILL");
            } else if asked.insert(pid) {
                run::signal(pid, "TERM");
            }
        }
        sleep(Duration::from_millis(20));
    }
}

/// Folders of the control groups that LXC made for these processes.
pub(crate) fn lxc_cgroups(pids: &BTreeSet<u32>) -> BTreeSet<PathBuf> {
    let mut folders = BTreeSet::new();
    for pid in pids {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        for line in text.lines() {
            let mut fields = line.splitn(3, ':');
            let (_, controllers, path) = (fields.next(), fields.next().unwrap_or_default(), fields.next());
            // The first component that is LXC's own; the container's own groups lie below it.
            let top =
                path.and_then(|path| path.trim_start_matches('/').split('/').find(|part| part.starts_with("lxc.")));
            let controllers = controllers.trim_start_matches("name=");
            let Some(top) = top else { continue };
            for hierarchy in [controllers, "unified", ""] {
                let folder = Path::new("/sys/fs/cgroup").join(hierarchy).join(top);
                if folder.is_dir() {
                    folders.insert(folder);
                }
            }
        }
    }
    folders
}

fn all() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

fn environment_has(pid: u32, mark: &[u8]) -> bool {
    fs::read(format!("/proc/{pid}/environ")).is_ok_and(|all| all.split(|&byte| byte == 0).any(|entry| entry == mark))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_marked_process_is_found_with_its_children_and_ended() {
        let lab = PathBuf::from(format!("/nowhere/lab-of-{}", std::process::id()));
        let mut shell = Command::new("sh");
        shell.args(["-c", "env -i sleep 1000 & wait"]).env("PIKA_XTASK_TEST", &lab).stdin(Stdio::null());
        let mut shell = shell.spawn().unwrap();
        while with_descendants(&marked("PIKA_XTASK_TEST", &lab)).len() < 2 {
            sleep(Duration::from_millis(5));
        }
        let identity_before = identity(shell.id());
        assert!(identity_before.is_some());
        let all_of_them = with_descendants(&marked("PIKA_XTASK_TEST", &lab));
        assert!(all_of_them.contains(&shell.id()));
        let left = || all_of_them.iter().copied().filter(|&pid| identity(pid).is_some()).collect();
        assert!(end_all(Duration::from_secs(5), left));
        shell.wait().unwrap();
        assert_eq!(identity(shell.id()), None);
    }

    #[test]
    fn another_mark_is_not_ours() {
        assert!(marked("PIKA_XTASK_TEST", Path::new("/nowhere/else")).is_empty());
    }
}
