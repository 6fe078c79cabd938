//! What the VMs inside boot: Debian's generic kernel, the quick VMs' userland, and what an Incus VM needs beyond it.
//!
//! QEMU loads both itself, as the VMs' profile tells it to (`raw.qemu`), and the kernel comes unpacked: a BIOS that reads them
//! from a disk, and a kernel that unpacks itself, take longer under two emulations than the kernel takes to boot. So Incus's
//! image is an empty disk. `incus-agent` comes over 9p, which Incus gives to every VM, and is started where a word on the
//! kernel's command line says so.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::super::kernel::INCUS_MODULES;
use super::super::{Guest, initramfs, kept};
use crate::failure::{Failure, Result, Tried};
use crate::{image, run};

const INITTAB: &str = "\
::respawn:/sbin/agent
::respawn:/usr/bin/vsock-peer serve
::respawn:/sbin/incus-agent
";

const AGENT: &str = "\
#!/bin/sh
# The agent, where this VM is not the one in which nobody listens.
grep -qw pika_rig.deaf /proc/cmdline && exec sleep 1000000
exec /usr/bin/pika-guest serve
";

/// How what Incus brings is started, by root, where there is no udev.
pub(super) const START_INCUS_AGENT: &str = "\
config=/run/incus_agent
if ! [ -x $config/incus-agent ]; then
    # There is no udev to make these, and they come one after the other.
    mkdir -p /dev/virtio-ports
    until grep -qs org.linuxcontainers.incus /sys/class/virtio-ports/*/name; do sleep 0.2; done
    for port in /sys/class/virtio-ports/*; do
        [ -s $port/name ] && ln -sf /dev/${port##*/} /dev/virtio-ports/$(cat $port/name)
    done
    mkdir -p $config /mnt
    mount -t tmpfs -o mode=700,size=50M incus_agent $config
    mount -t 9p -o access=0,trans=virtio,size=1048576 config /mnt && cp -a /mnt/* $config/ && umount /mnt
fi
cd $config && exec ./incus-agent
";

/// Starts it where this VM is one that has it.
fn incus_agent() -> String {
    let has = "grep -qw pika_rig.incus_agent /proc/cmdline || exec sleep 1000000";
    format!("#!/bin/sh\n{has}\n{START_INCUS_AGENT}")
}

/// The folder of `vmlinux`, `initramfs.gz`, and the image as Incus imports it: `metadata.tar.gz` and `disk.qcow2`.
pub(super) fn provide(busybox: &Path, guest: &Guest) -> Result<PathBuf> {
    kept("inner", &digest(guest)?, "Make what the VMs inside boot", |scratch, whole| {
        unpack_kernel(&guest.kernel.image, scratch, &whole.join("vmlinux"))?;
        // The kernel unpacks one after the other.
        let mut archive = fs::read(&guest.initramfs).tried(format!("read {}", guest.initramfs.display()))?;
        let more = more(scratch, busybox, guest)?;
        archive.extend(fs::read(&more).tried(format!("read {}", more.display()))?);
        let initramfs = whole.join("initramfs.gz");
        fs::write(&initramfs, archive).tried(format!("write {}", initramfs.display()))?;
        pack_metadata(scratch, "a VM of the tests of pika-cloud", &whole.join("metadata.tar.gz"))?;
        let mut disk = Command::new("qemu-img");
        disk.args(["create", "-q", "-f", "qcow2"]).arg(whole.join("disk.qcow2")).arg("1M");
        run::captured(&mut disk).map(drop)
    })
}

/// Packs what Incus wants to know of an image whose disk is a file of its own.
pub(super) fn pack_metadata(scratch: &Path, description: &str, to: &Path) -> Result<()> {
    image::write(&scratch.join("metadata.yaml"), 0o644, &image::metadata(description))?;
    let mut tar = Command::new("tar");
    run::captured(tar.arg("-C").arg(scratch).arg("-czf").arg(to).arg("metadata.yaml")).map(drop)
}

fn digest(guest: &Guest) -> Result<u64> {
    let mut hasher = DefaultHasher::new();
    (INITTAB, AGENT, incus_agent(), INCUS_MODULES).hash(&mut hasher);
    for path in [&guest.kernel.image, &guest.initramfs] {
        fs::read(path).tried(format!("read {}", path.display()))?.hash(&mut hasher);
    }
    Ok(hasher.finish())
}

/// Takes the kernel itself, which QEMU can load as well, out of what unpacks it.
fn unpack_kernel(image: &Path, scratch: &Path, to: &Path) -> Result<()> {
    const XZ: &[u8] = b"\xfd7zXZ\0";
    let bytes = fs::read(image).tried(format!("read {}", image.display()))?;
    let from = bytes.windows(XZ.len()).position(|window| window == XZ);
    let from = from.ok_or_else(|| Failure::step(format!("{} is not packed with xz", image.display())))?;
    let packed = scratch.join("vmlinux.xz");
    fs::write(&packed, &bytes[from..]).tried(format!("write {}", packed.display()))?;
    // What follows is not packed, and not needed.
    let mut unpack = Command::new("sh");
    unpack.args(["-c", "xz -dc --single-stream \"$1\" >\"$2\"", "xz"]).arg(&packed).arg(to);
    run::captured(&mut unpack).map(drop)
}

/// What the kernel unpacks over the quick VMs' userland.
fn more(scratch: &Path, busybox: &Path, guest: &Guest) -> Result<PathBuf> {
    let root = scratch.join("more");
    for name in ["etc", "sbin", "lib/modules"] {
        let path = root.join(name);
        fs::create_dir_all(&path).tried(format!("make {}", path.display()))?;
    }
    image::write(&root.join("lib/modules/list"), 0o644, &initramfs::list(&INCUS_MODULES))?;
    for name in INCUS_MODULES {
        let file = format!("{name}.ko");
        let to = root.join("lib/modules").join(&file);
        fs::copy(guest.kernel.modules.join(&file), &to).tried(format!("write {}", to.display()))?;
    }
    image::write(&root.join("etc/inittab"), 0o644, INITTAB)?;
    image::write(&root.join("sbin/agent"), 0o755, AGENT)?;
    image::write(&root.join("sbin/incus-agent"), 0o755, &incus_agent())?;
    let packed = scratch.join("more.gz");
    initramfs::pack(&root, busybox, &packed)?;
    Ok(packed)
}
