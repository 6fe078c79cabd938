//! The guest's userland: the tests' image with a first process for a VM, that loads the vsock modules, sees to it that the
//! agent serves, and starts it again however it ends.
//!
//! Words on the kernel's command line, which a test chooses, change what the guest does:
//!
//! | word | what |
//! |---|---|
//! | `pika_rig` | always there: without it the tests' vsock peer refuses to run |
//! | `pika_rig.loopback` | processes in the guest can dial the guest itself |
//! | `pika_rig.plays=ROLE` | instead of the agent, the peer listens on its port and plays that role |
//! | `pika_rig.root=DEVICE` | behind the modules, that disk's `/sbin/init` takes over |
//!
//! `pika-rig: up` on the console says that the modules are loaded. Nearly all of the time to there is the kernel's.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::kernel::{Kernel, LOOPBACK_MODULE, MODULES};
use super::{folder, remove_old};
use crate::failure::{Result, Tried};
use crate::{image, run, say};

const INIT: &str = "\
#!/bin/sh
# The VM's first process, until it becomes busybox's init.
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
modules=$(cat /lib/modules/list)
grep -qw pika_rig.loopback /proc/cmdline && modules=\"$modules LOOPBACK\"
for word in $(cat /proc/cmdline); do
    case $word in pika_rig.root=*) root=${word#*=} modules=\"$modules $(cat /lib/modules/disk)\" ;; esac
done
for module in $modules; do
    insmod /lib/modules/$module.ko || echo \"pika-rig: no module $module\"
done
echo \"pika-rig: up after $(cut -d' ' -f1 /proc/uptime) s\"
if [ -n \"$root\" ]; then
    mkdir /disk
    mount $root /disk || echo \"pika-rig: no root disk $root\"
    for folder in proc sys dev; do
        mount --move /$folder /disk/$folder
    done
    exec switch_root /disk /sbin/init
fi
mount -t tmpfs -o mode=755,size=75% run /run
mount -t tmpfs -o mode=1777,size=25% tmp /tmp
hostname pika
exec /bin/busybox init
";

const INITTAB: &str = "\
::respawn:/sbin/agent
::respawn:/usr/bin/vsock-peer serve
";

const AGENT: &str = "\
#!/bin/sh
# The agent, or what plays it.
for word in $(cat /proc/cmdline); do
    case $word in pika_rig.plays=*) exec /usr/bin/vsock-peer play \"${word#*=}\" ;; esac
done
exec /usr/bin/pika-guest serve
";

/// What it is made of.
pub(super) struct Inputs<'a> {
    pub(super) busybox: &'a Path,
    pub(super) agent: &'a Path,
    pub(super) peer: &'a Path,
    pub(super) kernel: &'a Kernel,
}

impl Inputs<'_> {
    fn module(&self, name: &str) -> PathBuf {
        self.kernel.modules.join(format!("{name}.ko"))
    }

    fn modules(&self) -> impl Iterator<Item = &'static str> {
        MODULES.iter().chain(self.kernel.disk_modules).copied()
    }

    /// Changes with every byte of it.
    fn digest(&self) -> Result<u64> {
        let mut hasher = DefaultHasher::new();
        (INIT, INITTAB, AGENT, MODULES, self.kernel.disk_modules).hash(&mut hasher);
        image::FILES.hash(&mut hasher);
        let programs = [self.busybox, self.agent, self.peer].map(Path::to_owned);
        for path in programs.into_iter().chain(self.modules().map(|name| self.module(name))) {
            fs::read(&path).tried(format!("read {}", path.display()))?.hash(&mut hasher);
        }
        Ok(hasher.finish())
    }
}

/// The initramfs of these inputs.
pub(super) fn provide(inputs: &Inputs<'_>) -> Result<PathBuf> {
    let name = format!("initramfs-{:016x}.gz", inputs.digest()?);
    let kept = folder().join(&name);
    remove_old("initramfs-", &name);
    if kept.exists() {
        return Ok(kept);
    }
    say::step("Make the initramfs of the VMs");
    let scratch = folder().join(format!("initramfs-{}", std::process::id()));
    let root = scratch.join("root");
    lay_out(&root, inputs)?;
    pack(&root, inputs.busybox, &kept)?;
    fs::remove_dir_all(&scratch).tried(format!("remove {}", scratch.display()))?;
    Ok(kept)
}

/// Names of the modules that every guest loads, and of some more.
pub(super) fn list(more: &[&str]) -> String {
    let always = MODULES.iter().filter(|name| **name != LOOPBACK_MODULE);
    always.chain(more).copied().collect::<Vec<_>>().join("\n")
}

/// Packs what is below `root`, and moves it to its place when it is whole.
pub(super) fn pack(root: &Path, busybox: &Path, to: &Path) -> Result<()> {
    let script = "find . | \"$1\" cpio -o -H newc 2>../cpio.log | gzip -1 > ../packed.gz && mv ../packed.gz \"$2\"";
    let mut pack = Command::new("sh");
    pack.args(["-c", script, "pack"]).arg(busybox).arg(to).current_dir(root);
    run::captured(&mut pack).map(drop)
}

fn lay_out(root: &Path, inputs: &Inputs<'_>) -> Result<()> {
    image::lay_out(root, inputs.busybox)?;
    image::place_program(inputs.agent, &root.join("usr/bin/pika-guest"))?;
    image::place_program(inputs.peer, &root.join("usr/bin/vsock-peer"))?;
    let modules = root.join("lib/modules");
    fs::create_dir_all(&modules).tried(format!("make {}", modules.display()))?;
    for name in inputs.modules() {
        let to = modules.join(format!("{name}.ko"));
        fs::copy(inputs.module(name), &to).tried(format!("write {}", to.display()))?;
    }
    for (file, mode, text) in [
        ("init", 0o755, INIT.replace("LOOPBACK", LOOPBACK_MODULE).as_str()),
        ("etc/inittab", 0o644, INITTAB),
        ("sbin/agent", 0o755, AGENT),
        ("lib/modules/list", 0o644, list(&[]).as_str()),
        ("lib/modules/disk", 0o644, inputs.kernel.disk_modules.join("\n").as_str()),
    ] {
        image::write(&root.join(file), mode, text)?;
    }
    Ok(())
}
