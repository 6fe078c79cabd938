//! Makes the small images that tests and demo run: a static busybox, a first process, and, in one of them, the agent. The
//! root of the VMs is laid out the same way.
//!
//! The first process is a shell script: it reaps what is orphaned, and ends the container at once on Incus's stop
//! (SIGPWR) or a `poweroff`, where busybox's own `init` knows no SIGPWR and waits for seconds on its signals.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::failure::{Result, Tried};
use crate::lab::Lab;
use crate::{incus, place, run, say};

/// Names of the image with the agent.
const WITH_AGENT: [&str; 2] = ["pika-demo", "pika-test"];
/// Name of the image without it.
const BARE: &str = "pika-test-bare";

const CI_UID: u32 = 1000;

const INIT: &str = "\
#!/bin/sh
# The container's first process. It ends when it is told to (SIGPWR by Incus, USR1, USR2 and TERM by
# halt, poweroff and reboot), after a word to the others and up to two seconds for them.
stop() {
    kill -TERM -1
    left=100
    while [ $left -gt 0 ]; do
        set -- /proc/[0-9]*
        [ $# -le 1 ] && break
        sleep 0.02
        left=$((left - 1))
    done
    exit 0
}
trap stop PWR USR1 USR2 TERM
trap : INT HUP
# A shell that waits reaps every child, those it was left by others as well.
while :; do
    sleep 86400 &
    wait $!
done
";

/// What is written into every guest's root.
pub(crate) const FILES: [(&str, u32, &str); 7] = [
    ("sbin/init", 0o755, INIT),
    (
        "etc/passwd",
        0o644,
        "root:x:0:0:root:/root:/bin/sh\nci:x:1000:1000:ci:/workspace:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    ),
    ("etc/group", 0o644, "root:x:0:\npika-cloud:x:990:ci\nci:x:1000:\nnogroup:x:65534:\n"),
    ("etc/hostname", 0o644, "pika\n"),
    ("etc/hosts", 0o644, "127.0.0.1 localhost\n::1 localhost\n"),
    ("etc/profile", 0o644, "export PATH=/usr/bin:/bin:/usr/sbin:/sbin\n"),
    ("etc/os-release", 0o644, "ID=pika-test\nNAME=\"pika-cloud test image\"\n"),
];

const FOLDERS: [(&str, u32); 13] = [
    ("bin", 0o755),
    ("sbin", 0o755),
    ("usr/bin", 0o755),
    ("usr/sbin", 0o755),
    ("etc", 0o755),
    ("root", 0o700),
    ("run", 0o755),
    ("tmp", 0o1777),
    ("var/tmp", 0o1777),
    ("proc", 0o755),
    ("sys", 0o755),
    ("dev", 0o755),
    ("workspace", 0o755),
];

/// Makes the images in the lab's folder and imports them; without an agent only the bare one.
pub(crate) fn provide(lab: &Lab, busybox: &Path, agent: Option<&Path>) -> Result<()> {
    say::step("Make and import the images");
    let scratch = lab.dir().join("image");
    let root = scratch.join("rootfs");
    lay_out(&root, busybox)?;
    write(&scratch.join("metadata.yaml"), 0o644, &metadata("busybox for the tests of pika-cloud"))?;
    incus::import(lab, &pack(&scratch, "bare.tar.gz")?, &[BARE])?;
    if let Some(agent) = agent {
        place_program(agent, &root.join("usr/bin/pika-guest"))?;
        incus::import(lab, &pack(&scratch, "agent.tar.gz")?, &WITH_AGENT)?;
    }
    fs::remove_dir_all(&scratch).tried(format!("remove {}", scratch.display()))
}

/// Makes the root of a guest: busybox under all its names, users, the usual folders.
pub(crate) fn lay_out(root: &Path, busybox: &Path) -> Result<()> {
    for (folder, mode) in FOLDERS {
        let path = root.join(folder);
        fs::create_dir_all(&path).tried(format!("make {}", path.display()))?;
        fs::set_permissions(&path, Permissions::from_mode(mode))
            .tried(format!("set the mode of {}", path.display()))?;
    }
    for (file, mode, text) in FILES {
        write(&root.join(file), mode, text)?;
    }
    let workspace = root.join("workspace");
    chown(&workspace, Some(CI_UID), Some(CI_UID)).tried(format!("give {} to ci", workspace.display()))?;
    place_program(busybox, &root.join("bin/busybox"))?;
    for applet in run::captured(Command::new(busybox).arg("--list-full"))?.lines() {
        let path = root.join(applet);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).tried(format!("make {}", folder.display()))?;
        }
        // `sbin/init` and `bin/busybox` are there already.
        if path.symlink_metadata().is_err() {
            symlink("/bin/busybox", &path).tried(format!("make {}", path.display()))?;
        }
    }
    Ok(())
}

/// An image's `metadata.yaml`.
pub(crate) fn metadata(description: &str) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    format!("architecture: {}\ncreation_date: {now}\nproperties:\n  description: {description}\n", place::ARCH)
}

/// Packs `metadata.yaml` and `rootfs` of a folder into an image, beside them.
pub(crate) fn pack(scratch: &Path, name: &str) -> Result<PathBuf> {
    let archive = scratch.join(name);
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(scratch).args(["--numeric-owner", "-I", "gzip -1", "-cf"]).arg(&archive);
    run::captured(tar.args(["metadata.yaml", "rootfs"]))?;
    Ok(archive)
}

/// Copies a program into a guest's root.
pub(crate) fn place_program(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).tried(format!("copy {} to {}", from.display(), to.display()))?;
    fs::set_permissions(to, Permissions::from_mode(0o755)).tried(format!("set the mode of {}", to.display()))
}

/// Writes a file of a guest's root.
pub(crate) fn write(path: &Path, mode: u32, text: &str) -> Result<()> {
    fs::write(path, text).tried(format!("write {}", path.display()))?;
    fs::set_permissions(path, Permissions::from_mode(mode)).tried(format!("set the mode of {}", path.display()))
}
