//! Memory: whom the kernel kills first, and whether it did.
//!
//! ```text
//!   /proc/self/cgroup      0::/a/b              4:memory:/a/b
//!   /proc/self/mountinfo   … cgroup2            … cgroup … memory          which folder that is here
//!   that folder            memory.events        memory.oom_control         oom_kill N
//! ```
//!
//! The counter is read before the workload starts and after it ended: only a counter that rose is evidence for a kill, only
//! one that was read twice and stayed is evidence against. A namespace may show the group's root as `/`, or not show it.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open};

/// Our own score: before us goes everything that did not ask for more than this.
const OWN_SCORE: &str = "-900";
const SCORE: &str = "/proc/self/oom_score_adj";
/// None of the files that are read here comes near it.
const MAX_COUNTER_BYTES: usize = 64 * 1024;

/// Makes this process, and what it becomes, the kernel's first choice where memory runs out. Best effort. To be called
/// between fork and exec, while the process may still write to its own files: nothing is allocated.
pub(super) fn volunteer() {
    let opened = open(c"/proc/self/oom_score_adj", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
    let _ = opened.and_then(|fd| rustix::io::write(&fd, b"1000"));
}

/// Keeps this process from being the kernel's choice. Only to be called once the workload has begun, which must not inherit
/// it. Best effort: most containers may not go below what they were given.
pub(super) fn protect_self() {
    let own: Option<i32> = fs::read_to_string(SCORE).ok().and_then(|text| text.trim().parse().ok());
    if fs::write(SCORE, OWN_SCORE).is_err() && own.is_some_and(|own| own > 0) {
        let _ = fs::write(SCORE, "0");
    }
}

/// How often the kernel killed a process of our control group for memory.
#[derive(Debug)]
pub(super) struct KillCounter {
    pub(super) place: Option<PathBuf>,
    pub(super) before: Option<u64>,
}

impl KillCounter {
    /// Reads it for the first time.
    pub(super) fn begin() -> Self {
        Self::begin_at(Path::new("/"))
    }

    fn begin_at(root: &Path) -> Self {
        let place = find(root);
        let before = place.as_deref().and_then(read);
        Self { place, before }
    }

    /// Whether it rose since then; `None` where it could not be read both times.
    pub(super) fn rose(&self) -> Option<bool> {
        let now = self.place.as_deref().and_then(read)?;
        Some(now > self.before?)
    }
}

/// The file that counts for us.
fn find(root: &Path) -> Option<PathBuf> {
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let mounts = fs::read_to_string(root.join("proc/self/mountinfo")).ok()?;
    let mounts: Vec<Mount<'_>> = mounts.lines().filter_map(Mount::parse).collect();
    groups.lines().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, group) = rest.split_once(':')?;
        if controllers.split(',').any(|name| name == "memory") {
            let mount = mounts.iter().find(|mount| mount.kind == "cgroup" && mount.has_option("memory"))?;
            // Version 1 counts for each group alone, so that only our own says anything.
            return Some(mount.folder_of(root, group)?.join("memory.oom_control")).filter(|file| read(file).is_some());
        }
        if !controllers.is_empty() {
            return None;
        }
        let mount = mounts.iter().find(|mount| mount.kind == "cgroup2")?;
        let own = mount.folder_of(root, group)?;
        let top = root.join(mount.point.trim_start_matches('/'));
        // Version 2 counts for a group and all below it; the nearest that counts memory at all is the one.
        let above = if mount.has_option("memory_localevents") { 1 } else { usize::MAX };
        let folders = own.ancestors().take_while(|folder| folder.starts_with(&top)).take(above);
        folders.map(|folder| folder.join("memory.events")).find(|file| read(file).is_some())
    })
}

/// The counter in such a file.
fn read(file: &Path) -> Option<u64> {
    let text = fs::read(file).ok().filter(|text| text.len() <= MAX_COUNTER_BYTES)?;
    let text = std::str::from_utf8(&text).ok()?;
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

/// A line of `mountinfo`.
struct Mount<'a> {
    /// Which folder of the file system is mounted.
    root: &'a str,
    /// Where.
    point: &'a str,
    kind: &'a str,
    options: &'a str,
}

impl<'a> Mount<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        // 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
        let (place, what) = line.split_once(" - ")?;
        let mut place = place.split(' ').skip(3);
        let mut what = what.split(' ');
        let (root, point) = (place.next()?, place.next()?);
        let (kind, options) = (what.next()?, what.nth(1)?);
        Some(Self { root, point, kind, options })
    }

    fn has_option(&self, name: &str) -> bool {
        self.options.split(',').any(|option| option == name)
    }

    /// The folder of a control group, where it lies in what is mounted.
    fn folder_of(&self, root: &Path, group: &str) -> Option<PathBuf> {
        let below = Path::new(group).strip_prefix(self.root).ok()?;
        // A group outside of our namespace shows as `/../…`.
        let plain = below.components().all(|part| matches!(part, std::path::Component::Normal(_)));
        plain.then(|| root.join(self.point.trim_start_matches('/')).join(below))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fake(tempfile::TempDir);

    impl Fake {
        fn new(groups: &str, mounts: &str) -> Self {
            let fake = Self(tempfile::tempdir().unwrap());
            fake.write("proc/self/cgroup", groups);
            fake.write("proc/self/mountinfo", mounts);
            fake
        }

        fn write(&self, name: &str, text: &str) {
            let path = self.0.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn begin(&self) -> KillCounter {
            KillCounter::begin_at(self.0.path())
        }
    }

    const V1: &str = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
    const V2: &str = "24 23 0:22 / /proc rw - proc proc rw\n31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";

    #[test]
    fn a_counter_that_rose_and_one_that_stayed() {
        let fake = Fake::new("0::/\n", V2);
        let events = |kills| format!("low 0\nhigh 0\nmax 7\noom 9\noom_kill {kills}\noom_group_kill 5\n");
        fake.write("sys/fs/cgroup/memory.events", &events(3));
        let counter = fake.begin();
        assert_eq!(counter.rose(), Some(false));
        fake.write("sys/fs/cgroup/memory.events", &events(4));
        assert_eq!(counter.rose(), Some(true));
        fake.write("sys/fs/cgroup/memory.events", "low 0\n");
        assert_eq!(counter.rose(), None);
    }

    #[test]
    fn without_a_counter_nothing_is_claimed() {
        assert_eq!(Fake::new("", "").begin().rose(), None);
        assert_eq!(Fake::new("0::/\n", V2).begin().rose(), None);
        // No file at the beginning, and one at the end.
        let fake = Fake::new("0::/\n", V2);
        let counter = fake.begin();
        fake.write("sys/fs/cgroup/memory.events", "oom_kill 4\n");
        assert_eq!(counter.rose(), None);
        // A group that our namespace does not show.
        let fake = Fake::new("0::/../other\n", V2);
        fake.write("sys/fs/cgroup/memory.events", "oom_kill 4\n");
        assert_eq!(fake.begin().rose(), None);
        assert_eq!(KillCounter::begin_at(Path::new("/not/there")).rose(), None);
    }

    #[test]
    fn the_nearest_group_that_counts_is_the_one() {
        let fake = Fake::new("0::/a/b\n", V2);
        fake.write("sys/fs/cgroup/a/memory.events", "oom_kill 1\n");
        fs::create_dir_all(fake.0.path().join("sys/fs/cgroup/a/b")).unwrap();
        let counter = fake.begin();
        fake.write("sys/fs/cgroup/a/memory.events", "oom_kill 2\n");
        assert_eq!(counter.rose(), Some(true));
        // Not where each group counts for itself.
        let fake = Fake::new("0::/a/b\n", &V2.replace("nsdelegate", "memory_localevents"));
        fake.write("sys/fs/cgroup/a/memory.events", "oom_kill 1\n");
        assert_eq!(fake.begin().rose(), None);
    }

    #[test]
    fn version_1_and_a_part_of_the_tree() {
        let groups = "9:name=systemd:/\n4:memory:/lxc/job\n1:cpu,cpuacct:/\n0::/\n";
        let text = |kills| format!("oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n");
        for (mounts, folder) in [
            (V1.to_owned(), "sys/fs/cgroup/memory/lxc/job"),
            (V1.replace(" / /sys", " /lxc /sys"), "sys/fs/cgroup/memory/job"),
            (V1.replace(" / /sys", " /lxc/job /sys"), "sys/fs/cgroup/memory"),
        ] {
            let fake = Fake::new(groups, &mounts);
            let file = format!("{folder}/memory.oom_control");
            fake.write(&file, &text(0));
            let counter = fake.begin();
            assert_eq!(counter.rose(), Some(false), "{folder}");
            fake.write(&file, &text(1));
            assert_eq!(counter.rose(), Some(true), "{folder}");
        }
        // Another part of the tree, and a group above ours, which does not count for us.
        let fake = Fake::new(groups, &V1.replace(" / /sys", " /lxc/other /sys"));
        fake.write("sys/fs/cgroup/memory/memory.oom_control", &text(0));
        assert_eq!(fake.begin().rose(), None);
        let fake = Fake::new(groups, V1);
        fake.write("sys/fs/cgroup/memory/lxc/memory.oom_control", &text(0));
        assert_eq!(fake.begin().rose(), None);
    }
}
