//! Takes a lab down, whatever state it is in, and any number of times.
//!
//! First what the task ran (its marked processes), then instances and networks by Incus's own means, within a time
//! limit, since a daemon can hang. Whatever is left then is ended outright: the daemon and all it started, its mounts,
//! its control groups, its folder. Nothing in there is worth an orderly shutdown.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use crate::lab::{LABS, Lab, MARK};
use crate::{place, processes, say};

/// For programs of the task that outlived it, to clear up after themselves.
const PROGRAMS_GRACE: Duration = Duration::from_secs(5);
/// For one call of Incus, in seconds.
const INCUS_LIMIT_SECS: &str = "10";
/// A folder without a guard's note is that of a task that is just starting, up to this age.
const STARTING: Duration = Duration::from_secs(60);

/// Ends and removes all of the lab. `silently` leaves out the line that says so.
pub(crate) fn take_down(lab: &Lab, silently: bool) {
    let programs = || processes::marked(MARK, lab.dir());
    if !programs().is_empty() {
        say::step("End the programs that are left of this task");
        processes::end_all(PROGRAMS_GRACE, programs);
    }
    if !silently {
        say::step(&format!("Take down the private Incus in {}", lab.incus_dir().display()));
    }
    if lab.socket().exists() {
        delete_instances(lab);
        delete_networks(lab);
    }
    let daemon = || processes::of_daemon(&lab.incus_dir());
    let cgroups = processes::lxc_cgroups(&daemon());
    if !processes::end_all(Duration::ZERO, daemon) {
        say::error(&format!("processes of {} do not end: {:?}", lab.dir().display(), daemon()));
    }
    for folder in cgroups {
        remove_cgroup(&folder);
    }
    unmount_all(lab.dir());
    keep_log(lab);
    remove(lab);
}

/// Takes down the labs whose guard is gone: it was killed, or the machine went down.
pub(crate) fn sweep() {
    for entry in fs::read_dir(LABS).into_iter().flatten().flatten() {
        let lab = Lab::at(&entry.path());
        let abandoned = match fs::read_to_string(lab.guard_file()) {
            Ok(identity) => {
                let pid = identity.split(' ').next().and_then(|pid| pid.parse().ok());
                pid.and_then(processes::identity).is_none_or(|now| now != identity)
            }
            Err(_) => entry
                .metadata()
                .and_then(|data| data.modified())
                .is_ok_and(|at| at.elapsed().is_ok_and(|age| age > STARTING)),
        };
        if abandoned {
            say::step(&format!("Found {} without its guard", lab.dir().display()));
            take_down(&lab, false);
        }
    }
}

/// Runs the `incus` command quietly, within the time limit; what it said, if it succeeded.
fn incus(lab: &Lab, args: &[&str]) -> Option<String> {
    let mut command = Command::new("timeout");
    command.args(["--signal=KILL", INCUS_LIMIT_SECS, "incus"]).args(args);
    command.env("INCUS_DIR", lab.incus_dir()).env("INCUS_CONF", lab.client_dir());
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Deletes every instance of every project; several at once, since most of it is waiting.
fn delete_instances(lab: &Lab) {
    const AT_ONCE: usize = 8;
    let listed = incus(lab, &["list", "--all-projects", "--format=csv", "--columns=en"]).unwrap_or_default();
    let instances: Vec<(&str, &str)> = listed.lines().filter_map(|line| line.split_once(',')).collect();
    if !instances.is_empty() {
        say::step(&format!("Delete {} instances that are left", instances.len()));
    }
    for some in instances.chunks(AT_ONCE) {
        std::thread::scope(|scope| {
            for (project, name) in some {
                scope.spawn(move || incus(lab, &["delete", "--force", "--project", project, name]));
            }
        });
    }
}

/// Deletes the daemon's networks: their bridges would outlive it.
fn delete_networks(lab: &Lab) {
    let listed = incus(lab, &["network", "list", "--format=csv", "--columns=nm"]).unwrap_or_default();
    for (name, managed) in listed.lines().filter_map(|line| line.split_once(',')) {
        if managed.eq_ignore_ascii_case("yes") {
            incus(lab, &["network", "delete", name]);
        }
    }
}

/// Removes a control group with all below it, which goes only where no process is left in it.
fn remove_cgroup(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    let _ = fs::remove_dir(folder);
}

/// Unmounts everything below the folder, the innermost first.
fn unmount_all(dir: &Path) {
    for _ in 0..5 {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mounts: BTreeSet<String> = mount_points_below(&table, dir);
        if mounts.is_empty() {
            return;
        }
        for mount in mounts.iter().rev() {
            quiet(Command::new("umount").args(["-l", mount]));
        }
        sleep(Duration::from_millis(20));
    }
}

/// The mount points below `dir` in a table of `/proc/self/mountinfo`.
fn mount_points_below(table: &str, dir: &Path) -> BTreeSet<String> {
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape);
    points.filter(|point| Path::new(point).starts_with(dir)).collect()
}

/// The kernel writes space, tab, newline and backslash in octal.
fn unescape(point: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(point.to_owned(), |text, (escaped, plain)| text.replace(escaped, plain))
}

/// Keeps the daemon's log of the last lab, to look at after a failed test.
fn keep_log(lab: &Lab) {
    let _ = fs::create_dir_all(place::own()).and_then(|()| fs::copy(lab.log(), place::own().join("incusd.log")));
}

fn remove(lab: &Lab) {
    for _ in 0..5 {
        match fs::remove_dir_all(lab.dir()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => sleep(Duration::from_millis(100)),
            _ => {
                // Goes only when no other lab is left in it.
                let _ = fs::remove_dir(LABS);
                return;
            }
        }
    }
    // Immutable files, or a mount made meanwhile: name it, since the next task will try again.
    say::error(&format!("{} cannot be removed: see what is left in it, then remove it", lab.dir().display()));
}

fn quiet(command: &mut Command) {
    let _ = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_told_by_component() {
        let table = "22 1 0:5 / /var/lib/pika-xtask/1-a/incus/shmounts rw - tmpfs t rw\n\
            23 1 0:5 / /var/lib/pika-xtask/1-ab/incus/shmounts rw - tmpfs t rw\n\
            24 22 0:5 / /var/lib/pika-xtask/1-a/incus/with\\040space rw - tmpfs t rw\n";
        let found = mount_points_below(table, Path::new("/var/lib/pika-xtask/1-a"));
        assert_eq!(
            found.into_iter().collect::<Vec<_>>(),
            ["/var/lib/pika-xtask/1-a/incus/shmounts", "/var/lib/pika-xtask/1-a/incus/with space"]
        );
    }
}
