//! The outer guest's root disk and kernel: Debian 13 with Incus, QEMU, and a first process of our own.
//!
//! No systemd, no network, no login: the first process takes what there is to run from the second disk, a tar archive, runs
//! its `run`, and powers off. Nothing in it changes from run to run (QEMU writes to a copy that it throws away), so the disk is
//! made once for each recipe, which this file is.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::super::kept;
use crate::debian::{self, own_entry};
use crate::failure::{Failure, Result, Tried};
use crate::{image, place, run};

const SUITE: &str = "trixie";

/// `incus-agent` is what Incus hands to its VMs; `virtiofsd` serves folders of the host.
const PACKAGES: [&str; 13] = [
    "kmod",
    "iproute2",
    "procps",
    "busybox-static",
    "linux-image-cloud-amd64",
    "incus",
    "incus-client",
    "incus-agent",
    "qemu-system-x86",
    "qemu-system-modules-spice",
    "qemu-utils",
    "ovmf",
    "virtiofsd",
];

/// Room for a few VMs and what tests write; the file is sparse.
const DISK_SIZE: &str = "6G";

const INIT: &str = r#"#!/bin/sh
# The outer guest's first process.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts -o gid=5,mode=620 devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ln -s /proc/self/fd /dev/fd
mkdir -p /run/lock /run/incus /payload
ip link set lo up
for module in virtio_pci virtio_blk virtio_console kvm_amd vhost_vsock fuse; do
    modprobe "$module" || echo "outer: no module $module"
done
echo "outer: up after $(cut -d' ' -f1 /proc/uptime) s"
tar -xf /dev/vda -C /payload && sh /payload/run
busybox poweroff -f
"#;

/// What the outer guest is booted from.
pub(super) struct Outer {
    pub(super) kernel: PathBuf,
    /// A raw ext4 file system.
    pub(super) disk: PathBuf,
}

/// The disk that is kept for this recipe, or else a new one.
pub(super) fn provide() -> Result<Outer> {
    let step = "Make the outer guest's disk, with Debian's Incus and QEMU (minutes)";
    let kept = kept("outer", &(SUITE, PACKAGES, DISK_SIZE, INIT), step, |scratch, whole| {
        bootstrap(scratch).and_then(|root| pack(&root, whole))
    })?;
    Ok(Outer { kernel: kept.join("vmlinuz"), disk: kept.join("root.img") })
}

/// Installs the packages into a folder.
fn bootstrap(scratch: &Path) -> Result<PathBuf> {
    let entry = own_entry(&debian::codename()?, SUITE)?.ok_or_else(|| {
        Failure::step("no entry of Debian's main in apt's sources, from which a guest could be installed")
    })?;
    let sources = scratch.join(format!("outer.{}", entry.extension));
    fs::write(&sources, entry.text).tried(format!("write {}", sources.display()))?;
    let root = scratch.join("root");
    let mut command = Command::new("mmdebstrap");
    command.arg("--variant=minbase").arg(format!("--include={}", PACKAGES.join(",")));
    command.arg("--aptopt=APT::Install-Recommends \"false\"");
    for part in ["doc", "man", "locale"] {
        command.arg(format!("--dpkgopt=path-exclude=/usr/share/{part}/*"));
    }
    // The kernel finds its disk by itself.
    command.env("INITRD", "No");
    command.arg(SUITE).arg(&root).arg(&sources);
    run::logged(&mut command, &place::own().join("outer-disk.log")).map(|()| root)
}

/// Makes kernel and disk of the folder.
fn pack(root: &Path, whole: &Path) -> Result<()> {
    image::write(&root.join("usr/sbin/outer-init"), 0o755, INIT)?;
    run::captured(
        Command::new("sh").args(["-c", "cp \"$1\"/boot/vmlinuz-* \"$2\"", "cp"]).arg(root).arg(whole.join("vmlinuz")),
    )?;
    let mut make = Command::new("mke2fs");
    make.args(["-q", "-t", "ext4", "-O", "^has_journal,^metadata_csum", "-d"]).arg(root);
    run::captured(make.arg(whole.join("root.img")).arg(DISK_SIZE)).map(drop)
}
