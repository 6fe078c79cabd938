//! Whether this is a container: it shares its kernel with others, and so has no vsock of its own.
//!
//! Whoever listened there would listen on the machine that the container is on, where another agent may be the one that is meant.

use std::fs;
use std::path::Path;

/// The number that the kernel has always given to the first namespace of process ids; a container has another.
const FIRST_PID_NAMESPACE: &str = "pid:[4026531836]";

/// What says that this is a container, if anything does. A file that container engines leave in a root does not count: virtual
/// machines are made of such roots, too.
pub(super) fn evidence() -> Option<&'static str> {
    evidence_below(Path::new("/"))
}

fn evidence_below(root: &Path) -> Option<&'static str> {
    let at = |path: &str| root.join(path.trim_start_matches('/'));
    // systemd's word. In a sandbox of its making, what follows may not be seen.
    if fs::read(at("/run/systemd/container")).is_ok_and(|text| !text.trim_ascii().is_empty()) {
        return Some("/run/systemd/container");
    }
    // LXC's word, and that of others, for whatever init there is.
    let environ = fs::read(at("/proc/1/environ")).unwrap_or_default();
    if environ
        .split(|&byte| byte == 0)
        .any(|entry| entry.strip_prefix(b"container=").is_some_and(|kind| !kind.is_empty()))
    {
        return Some("`container=` in the environment of process 1");
    }
    let namespace = fs::read_link(at("/proc/self/ns/pid")).ok()?;
    (namespace != Path::new(FIRST_PID_NAMESPACE)).then_some("a namespace of process ids of its own")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_are_told_from_machines() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        for folder in ["run/systemd", "proc/1", "proc/self/ns"] {
            fs::create_dir_all(at(folder)).unwrap();
        }
        let evidence = || evidence_below(root.path());
        // Without /proc nothing says so.
        assert_eq!(evidence(), None);
        std::os::unix::fs::symlink(FIRST_PID_NAMESPACE, at("proc/self/ns/pid")).unwrap();
        fs::write(at("proc/1/environ"), "PATH=/bin\0not_container=lxc\0container=\0").unwrap();
        fs::write(at("run/systemd/container"), "\n").unwrap();
        assert_eq!(evidence(), None);
        fs::remove_file(at("proc/self/ns/pid")).unwrap();
        std::os::unix::fs::symlink("pid:[4026532001]", at("proc/self/ns/pid")).unwrap();
        assert_eq!(evidence(), Some("a namespace of process ids of its own"));
        fs::write(at("proc/1/environ"), "PATH=/bin\0container=lxc\0").unwrap();
        assert_eq!(evidence(), Some("`container=` in the environment of process 1"));
        fs::write(at("run/systemd/container"), "lxc\n").unwrap();
        assert_eq!(evidence(), Some("/run/systemd/container"));
    }
}
